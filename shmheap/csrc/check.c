/*
 * Walks every invariant, and rebuilds the caches of the truth to compare (docs/invariants.md).
 *
 * The page heap is looked at under its lock. Holders and counts change without it; what is said of
 * them holds at the moment of the look.
 */
#include "core.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

struct checker {
    struct sh_ctx *c;
    sh_report *report;
    void *arg;
};

static void wrong(struct checker *k, const char *invariant, const char *format, ...)
{
    char what[200];
    va_list values;
    va_start(values, format);
    vsnprintf(what, sizeof what, format, values);
    va_end(values);
    k->report(k->arg, invariant, what);
}

/* Units */

static void check_units(struct checker *k, uint32_t page, uint32_t n, uint32_t allowed,
                        const char *of)
{
    uint64_t unit = sh_unit_of_page(k->c, page), end = unit + (uint64_t)n * sh_units_per_page(k->c);
    for (; unit < end; unit++) {
        uint32_t u = atomic_load_explicit(sh_unit(k->c, unit), ACQ);
        if (!(allowed >> SH_UNIT_STATE(u) & 1))
            wrong(k, "I-5", "unit %llu of a %s run at page %u is in state %u",
                  (unsigned long long)unit, of, page, SH_UNIT_STATE(u));
    }
}

#define AT_REST (1u << SH_UNIT_RELEASED | 1u << SH_UNIT_COMMITTED)
#define ANY     (AT_REST | 1u << SH_UNIT_RESERVED | 1u << SH_UNIT_RELEASING)

/* Small spans */

static bool lies_in_holes(struct checker *k, uint32_t page, uint32_t kind, uint32_t index)
{
    uint32_t first, last;
    sh_block_units(k->c, kind, index, &first, &last);
    for (uint32_t i = first; i <= last; i++) {
        uint32_t u = atomic_load_explicit(sh_unit(k->c, sh_unit_of_page(k->c, page) + i), ACQ);
        if (SH_UNIT_STATE(u) != SH_UNIT_COMMITTED || SH_UNIT_STAMP(u) != 0)
            return true;
    }
    return false;
}

static void check_word(struct checker *k, uint32_t page, uint64_t span, uint32_t kind,
                       uint32_t index)
{
    const _Atomic uint64_t *word = sh_words(k->c, page, k->c->kinds[kind].tier) + index;
    uint64_t w = atomic_load_explicit(word, ACQ), state = SH_BSTATE(w);
    if (state == SH_BLOCK_LIVE) {
        if (SH_COUNT(w) == 0)
            wrong(k, "I-6", "block %u of the span at page %u lives without a holder", index, page);
        if (lies_in_holes(k, page, kind, index) && atomic_load_explicit(word, ACQ) == w &&
            sh_span(k->c, page) == span)
            wrong(k, "I-5", "block %u of the span at page %u lives in a page that is not committed",
                  index, page);
    } else if (state == SH_BLOCK_DYING) {
        if (!(w & SH_NODE) || SH_COUNT(w) >= sh_slots_used(k->c))
            wrong(k, "I-6", "block %u of the span at page %u dies by nobody, or is no node", index,
                  page);
    } else if (w >> SH_GEN_BITS != state << (SH_BSTATE_SHIFT - SH_GEN_BITS)) {
        wrong(k, "I-6", "block %u of the span at page %u is not live but has holders or marks",
              index, page);
    }
}

static void check_small(struct checker *k, uint32_t page, uint64_t span)
{
    uint32_t kind = SH_SPAN_KIND(span);
    for (uint32_t p = page; p < page + SH_SPAN_NPAGES(span); p++)
        if (SH_HI(atomic_load_explicit(&sh_page(k->c, p)->head, RLX)) != page)
            wrong(k, "I-1", "page %u does not know the head of its span, page %u", p, page);
    for (uint32_t i = 0; i < k->c->kinds[kind].nblocks && sh_span(k->c, page) == span; i++)
        check_word(k, page, span, kind, i);
}

/* Free runs and lists. Heap locked */

static void check_free(struct checker *k, uint32_t page, uint32_t n, bool after_free)
{
    uint64_t head = atomic_load_explicit(&sh_page(k->c, page)->head, RLX);
    uint64_t units = (uint64_t)n * sh_units_per_page(k->c);
    uint64_t released = sh_units_released(k->c, sh_unit_of_page(k->c, page), units);
    if (after_free)
        wrong(k, "I-1", "the free runs before and at page %u are not merged", page);
    if (SH_HI(head) != page || SH_LO(head) != released)
        wrong(k, "I-1", "the free run at page %u says %u released units at head %u, there are %llu",
              page, SH_LO(head), SH_HI(head), (unsigned long long)released);
    if (SH_HI(atomic_load_explicit(&sh_page(k->c, page + n - 1)->head, RLX)) != page)
        wrong(k, "I-1", "the last page of the free run at page %u does not name it", page);
    check_units(k, page, n, AT_REST, "free");
}

/* Members of a circular list. Their number, bounded: a broken list may run for ever. */
static uint64_t check_list(struct checker *k, uint32_t first, uint64_t at_most, uint32_t state,
                           uint32_t bin)
{
    uint64_t n = 0;
    uint32_t page = first, used = (uint32_t)atomic_load(&k->c->hdr->used_pages);
    while (page != SH_NIL && n < at_most) {
        if (page >= used) {
            wrong(k, "I-1", "a list names page %u, which was never used", page);
            return n;
        }
        uint64_t span = sh_span(k->c, page),
                 link = atomic_load_explicit(&sh_page(k->c, page)->link, RLX);
        bool member = state == SH_FREE
                          ? sh_bin_of(SH_SPAN_NPAGES(span)) == bin
                          : SH_SPAN_KIND(span) == bin && SH_SPAN_OWNER(span) == SH_OWNER_NONE;
        if (SH_SPAN_STATE(span) != state || SH_SPAN_NPAGES(span) == 0 || !member)
            wrong(k, "I-1", "page %u is in list %u and does not belong there", page, bin);
        if (SH_HI(link) >= used ||
            SH_LO(atomic_load_explicit(&sh_page(k->c, SH_HI(link))->link, RLX)) != page)
            wrong(k, "I-1", "the list through page %u is torn", page);
        n++;
        page = SH_HI(link) < used ? SH_HI(link) : first;
        if (page == first)
            break;
    }
    return n;
}

static void check_lists(struct checker *k, uint64_t free_runs, uint64_t orphans)
{
    const struct sh_header *h = k->c->hdr;
    uint64_t runs = 0, lost = 0;
    for (uint32_t b = 0; b < SH_NBINS; b++) {
        bool bit = h->bin_bits[b / 64] >> (b % 64) & 1;
        if (bit != (h->bins[b] != SH_NIL))
            wrong(k, "I-1", "the bit of list %u is wrong", b);
        runs += check_list(k, (uint32_t)h->bins[b], free_runs + 1, SH_FREE, b);
    }
    for (uint32_t kind = 0; kind < SH_NCLASSES; kind++)
        lost += check_list(k, (uint32_t)h->orphans[kind], orphans + 1, SH_SMALL, kind);
    if (runs != free_runs)
        wrong(k, "I-1", "%llu free runs, %llu in lists", (unsigned long long)free_runs,
              (unsigned long long)runs);
    if (lost != orphans)
        wrong(k, "I-1", "%llu spans without owner, %llu in lists", (unsigned long long)orphans,
              (unsigned long long)lost);
}

static void check_owner(struct checker *k, uint32_t page, uint64_t span)
{
    uint32_t slot = SH_SPAN_SLOT(span), used = sh_slots_used(k->c);
    if (SH_SPAN_OWNER(span) != SH_OWNER_NONE && slot >= used)
        wrong(k, "I-1", "the span at page %u belongs to process %u, %u were used", page, slot,
              used);
}

static void check_run(struct checker *k, uint32_t page, uint64_t span, bool after_free)
{
    uint32_t n = SH_SPAN_NPAGES(span);
    check_owner(k, page, span);
    switch (SH_SPAN_STATE(span)) {
    case SH_FREE:
        check_free(k, page, n, after_free);
        break;
    case SH_SMALL:
        check_small(k, page, span);
        break;
    case SH_LARGE:
    case SH_PINS:
    case SH_LEASES:
        if (sh_span(k->c, page) == span)
            check_units(k, page, n, 1u << SH_UNIT_COMMITTED, "used");
        break;
    case SH_RESERVED:
    case SH_RELEASING:
        check_units(k, page, n, ANY, "reserved");
        break;
    case SH_RETIRED:
        break;
    default:
        wrong(k, "I-1", "page %u is in state %u", page, SH_SPAN_STATE(span));
    }
}

/* False: spans do not follow each other, or are not what they can be, so nobody can walk them. */
static bool check_heap(struct checker *k)
{
    const struct sh_header *h = k->c->hdr;
    bool walkable = true;
    uint64_t used = atomic_load(&h->used_pages), inuse = 0, free_runs = 0, orphans = 0;
    bool after_free = false;
    for (uint32_t page = 0; page < used;) {
        uint64_t span = sh_span(k->c, page);
        uint32_t n = SH_SPAN_NPAGES(span), state = SH_SPAN_STATE(span);
        if (n == 0 || state == SH_NONE || page + (uint64_t)n > used) {
            wrong(k, "I-1", "no span starts at page %u, where the one before it ends", page);
            return false;
        }
        if (sh_span_fits(k->c, page, span, used)) {
            check_run(k, page, span, after_free);
        } else {
            wrong(k, "I-1", "the span at page %u has state %u, class %u and %u pages", page, state,
                  SH_SPAN_KIND(span), n);
            walkable = false;
        }
        after_free = state == SH_FREE;
        free_runs += state == SH_FREE;
        orphans += state == SH_SMALL && SH_SPAN_OWNER(span) == SH_OWNER_NONE;
        inuse += state == SH_FREE ? 0 : n;
        page += n;
    }
    if (inuse != atomic_load(&h->inuse_pages))
        wrong(k, "I-1", "%llu pages are in use, the counter says %llu", (unsigned long long)inuse,
              (unsigned long long)atomic_load(&h->inuse_pages));
    check_lists(k, free_runs, orphans);
    return walkable;
}

/* Names. Roots locked */

#define UNSEEN SH_ROOT_BUCKETS
#define UNUSED (SH_ROOT_BUCKETS + 1) /* in the list of free entries */

/* Each entry is in one chain, that of its name's hash, and each chain ends. */
static void check_chain(struct checker *k, uint64_t entry, uint16_t *chain_of, uint16_t chain)
{
    const struct sh_root *roots = (const struct sh_root *)(k->c->base + k->c->geo.roots);
    uint64_t used = k->c->hdr->roots_used;
    while (entry != SH_NIL) {
        if (entry >= used || chain_of[entry] != UNSEEN) {
            wrong(k, "I-1", "chain %u of the names leads to entry %llu, which %s", chain,
                  (unsigned long long)entry, entry < used ? "is in a chain" : "was never used");
            return;
        }
        const struct sh_root *r = &roots[entry];
        chain_of[entry] = chain;
        if (chain == UNUSED ? atomic_load(&r->cell) != 0
                            : r->hash % SH_ROOT_BUCKETS != chain || r->len > SH_ROOT_NAME_MAX)
            wrong(k, "I-1", "entry %llu of the names is in chain %u and does not belong there",
                  (unsigned long long)entry, chain);
        entry = r->next;
    }
}

static enum sh_status check_names(struct checker *k)
{
    const struct sh_header *h = k->c->hdr;
    uint64_t used = h->roots_used;
    if (used > SH_MAX_ROOTS) {
        wrong(k, "I-1", "%llu entries of the names are used", (unsigned long long)used);
        return SH_OK;
    }
    uint16_t *chain_of = malloc((used + 1) * sizeof *chain_of);
    if (chain_of == NULL)
        return SH_NOMEM;
    for (uint64_t i = 0; i < used; i++)
        chain_of[i] = UNSEEN;
    for (uint16_t chain = 0; chain < SH_ROOT_BUCKETS; chain++)
        check_chain(k, h->root_buckets[chain], chain_of, chain);
    check_chain(k, h->roots_free, chain_of, UNUSED);
    for (uint64_t i = 0; i < used; i++)
        if (chain_of[i] == UNSEEN)
            wrong(k, "I-1", "entry %llu of the names is in no chain", (unsigned long long)i);
    free(chain_of);
    return SH_OK;
}

/* Holders and counts. Others go on meanwhile, but their orders tell: a cell is cleared before its
 * block is counted down, and written after it was counted up. So a cell that is the same before and
 * after a look at the word held the block at that moment. */

struct holder {
    uint64_t word, cell;
    const _Atomic uint64_t *at;
    uint32_t page;                /* of the span the cell is in; SH_NIL: a root */
    const _Atomic uint64_t *node; /* a reference: the word of its node, which had generation gen */
    uint64_t gen;
};

struct holders {
    struct holder *list;
    uint64_t n, room;
};

static bool add_holder(struct holders *a, const struct holder *one)
{
    if (a->n == a->room) {
        uint64_t room = a->room ? 2 * a->room : 1024;
        struct holder *list = realloc(a->list, room * sizeof *list);
        if (list == NULL)
            return false;
        a->list = list;
        a->room = room;
    }
    a->list[a->n++] = *one;
    return true;
}

/* What a collection has condemned may name what it has freed. Nobody but the coordinator uses it,
 * by whom it dies. The phase first: what one condemned is gone in the next. */
static bool is_garbage(const struct checker *k, const _Atomic uint64_t *word)
{
    uint32_t phase = atomic_load_explicit(&k->c->hdr->phase, ACQ);
    uint64_t w = atomic_load_explicit(word, ACQ);
    return SH_BSTATE(w) == SH_BLOCK_DYING
               ? SH_COUNT(w) == 0
               : sh_phase_of(phase) == SH_SWEEP && sh_is_condemned(w, phase);
}

/* A cell may be looked at while span or node is what it was: locked, so that it is not punched. */
static bool cell_is_there(struct checker *k, const struct holder *h)
{
    if (h->node != NULL)
        return sh_is_node(atomic_load_explicit(h->node, ACQ), h->gen) && !is_garbage(k, h->node);
    uint32_t state = h->page == SH_NIL ? SH_PINS : SH_SPAN_STATE(sh_span(k->c, h->page));
    return state == SH_PINS || state == SH_LEASES;
}

/* A node may be freed and its place another block's while it is looked at. What is read then counts
 * for nothing, since the word has changed: a race by design, which the thread sanitizer shall not
 * see. */
__attribute__((no_sanitize("thread"))) static uint64_t peek_ref(const _Atomic uint64_t *at)
{
    return atomic_load_explicit(at, ACQ);
}

static bool unchanged(const struct holder *h)
{
    return peek_ref(h->at) == h->cell;
}

/* Looks at one cell. `kind`: of holder; a lease has a number where others have a generation. */
static bool look_at(struct checker *k, struct holders *a, struct holder h, const char *kind)
{
    struct sh_ref r;
    bool generation = kind[0] != 'l';
    h.cell = peek_ref(h.at);
    if (h.cell == 0 || (h.node != NULL && !SH_REF_IS_CELL(h.cell)))
        return true;
    h.word = SH_CELL_WORD(h.cell);
    bool found = sh_locate(k->c, h.word, &r);
    uint64_t w = found ? atomic_load_explicit(r.word, ACQ) : 0;
    bool other = found && generation && (SH_GEN(w) & SH_CELL_LOW_MASK) != SH_CELL_LOW(h.cell);
    if (found && SH_BSTATE(w) == SH_BLOCK_LIVE && !other)
        return add_holder(a, &h);
    if (cell_is_there(k, &h) && unchanged(&h))
        wrong(k, "I-6", "a holder (a %s) names word %llu, where %s", kind,
              (unsigned long long)h.word,
              !found  ? "no block is"
              : other ? "another generation is"
                      : "the block is dead");
    return true;
}

/* Spans are looked at with our process lock held, so that nothing of them is punched. */

static enum sh_status add_cells(struct checker *k, struct holders *a, uint32_t page, uint64_t span)
{
    bool pins = SH_SPAN_STATE(span) == SH_PINS;
    uint32_t kind = pins ? SH_KIND_PINS : SH_KIND_LEASES;
    const _Atomic uint64_t *cells = (const _Atomic uint64_t *)sh_data(k->c, page);
    uint32_t step = k->c->kinds[kind].size / 8;
    for (uint32_t i = 0; i < k->c->kinds[kind].nblocks && sh_span(k->c, page) == span; i++) {
        struct holder h = {.at = &cells[(uint64_t)i * step], .page = page};
        if (!look_at(k, a, h, pins ? "pin" : "lease"))
            return SH_NOMEM;
    }
    return SH_OK;
}

/* Collections. Whoever changes size or order holds the collection's lock, and changes its stamp or
 * its body. So what was found is true if nobody had the lock before, and nothing of it changed. A
 * death leaves the lock held: what is half done is put right by who takes it next. */

static bool is_at_rest(struct checker *k, const struct sh_ref *r, uint64_t stamp, uint64_t cell)
{
    const struct sh_coll *coll = (const struct sh_coll *)r->data;
    return peek_ref(&coll->body) == cell && peek_ref(&coll->stamp) == stamp &&
           peek_ref(&coll->lock) == 0 && sh_is_live(atomic_load_explicit(r->word, ACQ), r->gen) &&
           !is_garbage(k, r->word);
}

static const char *coll_fault(struct sh_ctx *c, struct sh_use *u)
{
    if (!sh_find_cell(c, u->cell, &u->body) || !sh_coll_measure(u))
        return "its body is none";
    return u->kind == SH_NODE_TABLE ? sh_table_fault(c, u) : sh_array_fault(u);
}

static void check_coll(struct checker *k, const struct sh_ref *r)
{
    const struct sh_coll *coll = (const struct sh_coll *)r->data;
    uint32_t kind = SH_NODE_KIND(peek_ref(&coll->head));
    if ((kind != SH_NODE_DICT && kind != SH_NODE_LIST) || r->nbytes < sizeof *coll)
        return;
    uint64_t stamp = peek_ref(&coll->stamp);
    bool dict = kind == SH_NODE_DICT;
    struct sh_use u = {.coll = *r, .cell = peek_ref(&coll->body)};
    u.kind = dict ? SH_NODE_TABLE : SH_NODE_ARRAY;
    if (u.cell == 0 || !is_at_rest(k, r, stamp, u.cell))
        return; /* being made, or changed */
    const char *fault = coll_fault(k->c, &u);
    if (fault != NULL && is_at_rest(k, r, stamp, u.cell))
        wrong(k, "I-1", "the shared %s of word %llu: %s", dict ? "dict" : "list",
              (unsigned long long)sh_word_number(k->c, r->word), fault);
}

static enum sh_status add_refs(struct checker *k, struct holders *a, uint32_t page,
                               const _Atomic uint64_t *word)
{
    struct sh_ref r;
    uint64_t w = atomic_load_explicit(word, ACQ);
    if (!sh_is_node(w, SH_GEN(w)) || !sh_locate(k->c, sh_word_number(k->c, word), &r))
        return SH_OK;
    const struct sh_node *n = (const struct sh_node *)r.data;
    uint64_t head = peek_ref(&n->head);
    r.gen = SH_GEN(w);
    r.nbytes = sh_block_bytes(k->c, &r, w);
    bool fits = sh_node_fits(head, r.nbytes);
    if (!sh_is_node(atomic_load_explicit(word, ACQ), SH_GEN(w)))
        return SH_OK;
    if (!fits)
        wrong(k, "I-6", "the node of word %llu has %u references, more than bytes",
              (unsigned long long)sh_word_number(k->c, word), SH_NODE_NREFS(head));
    if (fits)
        check_coll(k, &r);
    for (uint32_t i = 0; fits && i < SH_NODE_NREFS(head); i++) {
        struct holder h = {.at = &n->ref[i], .page = page, .node = word, .gen = SH_GEN(w)};
        if (!look_at(k, a, h, "reference"))
            return SH_NOMEM;
    }
    return SH_OK;
}

static enum sh_status add_nodes(struct checker *k, struct holders *a, uint32_t page, uint64_t span)
{
    bool large = SH_SPAN_STATE(span) == SH_LARGE;
    const struct sh_kind *kind = large ? NULL : &k->c->kinds[SH_SPAN_KIND(span)];
    const _Atomic uint64_t *words = sh_words(k->c, page, large ? SH_LARGE_TIER : kind->tier);
    enum sh_status status = SH_OK;
    for (uint32_t i = 0; i < (large ? 1 : kind->nblocks) && status == SH_OK; i++)
        if (sh_span(k->c, page) == span)
            status = add_refs(k, a, page, &words[i]);
    return status;
}

static enum sh_status add_span(struct checker *k, struct holders *a, uint32_t page, uint64_t span)
{
    uint32_t state = SH_SPAN_STATE(span);
    bool cells = state == SH_PINS || state == SH_LEASES;
    if (!cells && state != SH_SMALL && state != SH_LARGE)
        return SH_OK;
    enum sh_status status = sh_enter(k->c, 60000);
    if (status != SH_OK)
        return status;
    if (sh_span(k->c, page) == span)
        status = (cells ? add_cells : add_nodes)(k, a, page, span);
    sh_leave(k->c);
    return status;
}

static bool add_roots(struct checker *k, struct holders *a)
{
    const struct sh_root *roots = (const struct sh_root *)(k->c->base + k->c->geo.roots);
    uint64_t used = atomic_load_explicit((_Atomic uint64_t *)&k->c->hdr->roots_used, ACQ);
    for (uint64_t i = 0; i < used && i < SH_MAX_ROOTS; i++) /* one without a name has no cell */
        if (!look_at(k, a, (struct holder){.at = &roots[i].cell, .page = SH_NIL}, "root"))
            return false;
    return true;
}

static enum sh_status gather(struct checker *k, struct holders *a)
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    enum sh_status status;
    if (!add_roots(k, a))
        return SH_NOMEM;
    while ((status = sh_walk_next(k->c, &walk, &page, &span)) == SH_OK) {
        status = add_span(k, a, page, span);
        if (status != SH_OK)
            return status;
    }
    return status == SH_ABSENT ? SH_OK : status;
}

static int by_word(const void *x, const void *y)
{
    uint64_t a = ((const struct holder *)x)->word, b = ((const struct holder *)y)->word;
    return a < b ? -1 : a > b;
}

/* How many of these cells still hold the block. Locked. */
static uint64_t still_holding(struct checker *k, const struct holder *h, uint64_t n)
{
    uint64_t held = 0;
    for (uint64_t i = 0; i < n; i++)
        held += cell_is_there(k, &h[i]) && unchanged(&h[i]);
    return held;
}

static void compare_count(struct checker *k, const struct holder *h, uint64_t n)
{
    struct sh_ref r;
    if (!sh_locate(k->c, h->word, &r))
        return;
    uint64_t before = still_holding(k, h, n);
    uint64_t count = SH_COUNT(atomic_load_explicit(r.word, ACQ));
    uint64_t after = still_holding(k, h, n);
    if (before == n && after == n && count < n && count != SH_COUNT_MAX)
        wrong(k, "I-6", "%llu holders, count %llu of word %llu", (unsigned long long)n,
              (unsigned long long)count, (unsigned long long)h->word);
}

static enum sh_status compare_counts(struct checker *k, const struct holders *a)
{
    for (uint64_t i = 0, same; i < a->n; i += same) {
        struct sh_ref r;
        for (same = 1; i + same < a->n && a->list[i + same].word == a->list[i].word;)
            same++;
        if (!sh_locate(k->c, a->list[i].word, &r) ||
            SH_COUNT(atomic_load_explicit(r.word, ACQ)) >= same)
            continue;
        enum sh_status status = sh_enter(k->c, 60000);
        if (status != SH_OK)
            return status;
        compare_count(k, &a->list[i], same);
        sh_leave(k->c);
    }
    return SH_OK;
}

static enum sh_status check_holders(struct checker *k)
{
    struct holders a = {0};
    enum sh_status status = gather(k, &a);
    if (status == SH_OK && a.n != 0)
        qsort(a.list, a.n, sizeof *a.list, by_word);
    if (status == SH_OK)
        status = compare_counts(k, &a);
    free(a.list);
    return status;
}

/* Reports every violation. SH_OK: nothing kept it from looking, whatever it found. Who holds what
 * is looked at only where the spans can be walked. */
enum sh_status sh_check(struct sh_ctx *c, sh_report *report, void *arg)
{
    struct checker k = {.c = c, .report = report, .arg = arg};
    if (!sh_marks_fit(c)) { /* not even its lock can be had: where do the records end? */
        wrong(&k, "I-1", "the high-water mark is page %llu, tables there are for %llu",
              (unsigned long long)atomic_load(&c->hdr->used_pages),
              (unsigned long long)atomic_load(&c->hdr->table_pages));
        return SH_OK;
    }
    enum sh_status status = sh_heap_lock(c, 60000);
    if (status != SH_OK)
        return status;
    bool walkable = check_heap(&k);
    sh_heap_unlock(c);
    status = sh_names_lock(c, 60000);
    if (status != SH_OK)
        return status;
    status = check_names(&k);
    sh_unlock(c, &c->hdr->roots);
    return status == SH_OK && walkable ? check_holders(&k) : status;
}
