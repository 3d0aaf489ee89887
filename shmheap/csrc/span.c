/*
 * Spans of one class: cutting them, and knowing which of their blocks are free.
 *
 * Problem: allocate without a lock that another process wants, and let any process free. Goal: the
 * owner takes a block from a private bitmap; only when it has none left does it look at what others
 * freed, at pages that were given back, at what the dead left, and at the page heap, in this order.
 *
 * The bitmap is a hint. The truth is the block words, and the compare-and-swap FREE -> LIVE decides
 * (DESIGN section 6, rule 3). A hint that is lost with a process costs a scan, never a block.
 *
 * A block whose unit was set aside or released is a HOLE: not FREE, so the fast path cannot take
 * it.
 */
#include "core.h"

#include <stdlib.h>
#include <string.h>

#define FILL_UNITS   16u /* committed at a time inside a span: 64 KiB */
#define REMOTE_LOOKS 32u /* spans of one kind looked at for foreign frees in one refill */

static uint32_t tier_of(uint32_t size)
{
    uint32_t tier = 0;
    while (tier < SH_LARGE_TIER && size >= 64u << (2 * tier))
        tier++;
    return tier;
}

/* A span of the table, or one page where pages are larger than the table's. */
void sh_kinds_init(struct sh_ctx *c)
{
    uint32_t page_bytes = 1u << c->geo.page_shift;
    for (uint32_t k = 0; k < SH_NCLASSES; k++) {
        const struct sh_class *t = &sh_classes[k];
        bool table = page_bytes == SH_CLASS_PAGE_BYTES;
        uint32_t npages = table ? t->npages : (t->size + page_bytes - 1) / page_bytes;
        c->kinds[k] = (struct sh_kind){
            t->size, npages, table ? t->nblocks : npages * page_bytes / t->size, tier_of(t->size)};
    }
    c->kinds[SH_KIND_PINS] = (struct sh_kind){8, 1, page_bytes / 8, SH_LARGE_TIER};
    c->kinds[SH_KIND_LEASES] = (struct sh_kind){
        sizeof(struct sh_lease), 1, page_bytes / sizeof(struct sh_lease), SH_LARGE_TIER};
}

/* Rings of private spans */

static void ring_add(struct sh_ctx *c, enum sh_ring r, struct sh_pspan *s)
{
    struct sh_pspan **first = &c->shelves[s->kind].ring[r];
    if (s->rings & 1u << r)
        return;
    s->rings |= 1u << r;
    if (*first == NULL) {
        s->next[r] = s->prev[r] = s;
    } else {
        s->next[r] = *first;
        s->prev[r] = (*first)->prev[r];
        s->prev[r]->next[r] = s;
        s->next[r]->prev[r] = s;
    }
    *first = s;
}

static void ring_remove(struct sh_ctx *c, enum sh_ring r, struct sh_pspan *s)
{
    struct sh_pspan **first = &c->shelves[s->kind].ring[r];
    if (!(s->rings & 1u << r))
        return;
    s->rings &= ~(1u << r);
    s->next[r]->prev[r] = s->prev[r];
    s->prev[r]->next[r] = s->next[r];
    if (*first == s)
        *first = s->next[r] == s ? NULL : s->next[r];
}

static void pspan_drop(struct sh_ctx *c, struct sh_pspan *s)
{
    struct sh_shelf *shelf = &c->shelves[s->kind];
    if (shelf->cursor == s)
        shelf->cursor = s->next[SH_ALL] == s ? NULL : s->next[SH_ALL];
    for (enum sh_ring r = SH_AVAIL; r < SH_NRINGS; r++)
        ring_remove(c, r, s);
    if (c->pspan_at[s->page] == s)
        c->pspan_at[s->page] = NULL;
    if (s->kind == SH_KIND_PINS)
        c->pin_spans[s->number] = NULL;
    while (c->npin_spans != 0 && c->pin_spans[c->npin_spans - 1] == NULL)
        c->npin_spans--;
    free(s);
}

/* The record is not ours any more: the coordinator has given the span up, or somebody wrote over
 * it. Nobody gives up pins that are in use, and their holders will look for them here. */
static void pspan_lose(struct sh_ctx *c, struct sh_pspan *s)
{
    if (s->kind == SH_KIND_PINS && s->nfree != s->nblocks) {
        sh_corrupt(c, SH_FAULT_CELLS, s->page);
        ring_remove(c, SH_AVAIL, s);
    } else {
        pspan_drop(c, s);
    }
}

/* After a fork the child owns none of its parent's spans. */
void sh_pspans_forget(struct sh_ctx *c)
{
    for (uint32_t k = 0; k < SH_NKINDS; k++)
        while (c->shelves[k].ring[SH_ALL] != NULL)
            pspan_drop(c, c->shelves[k].ring[SH_ALL]);
    while (c->npin_spans != 0) /* reserved, and not yet published */
        pspan_drop(c, c->pin_spans[c->npin_spans - 1]);
}

struct sh_pspan *sh_pspan_new(struct sh_ctx *c, uint32_t page, uint32_t kind)
{
    uint32_t n = c->kinds[kind].nblocks;
    struct sh_pspan *s = calloc(1, sizeof *s + (n + 63) / 64 * 8);
    if (s != NULL) {
        s->page = page;
        s->kind = kind;
        s->nblocks = n;
        s->number = SH_NIL;
    }
    return s;
}

static bool still_ours(const struct sh_ctx *c, const struct sh_pspan *s)
{
    return sh_span(c, s->page) == s->span;
}

/* Forgets the spans of a kind that the collector has given back meanwhile: their pages are nobody's
 * to look at. */
void sh_pspans_prune(struct sh_ctx *c, uint32_t kind)
{
    struct sh_pspan *s = c->shelves[kind].ring[SH_ALL], *next;
    const struct sh_pspan *last = s ? s->prev[SH_ALL] : NULL;
    for (; s != NULL; s = next) {
        next = s == last ? NULL : s->next[SH_ALL];
        if (!still_ours(c, s))
            pspan_lose(c, s);
    }
}

/* What is free in a span */

/* The units that a block lies in, counted from the start of its span. */
void sh_block_units(const struct sh_ctx *c, uint32_t kind, uint32_t index, uint32_t *first,
                    uint32_t *last)
{
    uint64_t size = c->kinds[kind].size;
    *first = (uint32_t)(index * size >> c->geo.unit_shift);
    *last = (uint32_t)(((index + 1) * size - 1) >> c->geo.unit_shift);
}

static bool unit_usable(const struct sh_ctx *c, uint64_t unit)
{
    uint32_t u = atomic_load_explicit(sh_unit(c, unit), ACQ);
    return SH_UNIT_STATE(u) == SH_UNIT_COMMITTED && SH_UNIT_STAMP(u) == 0;
}

static bool block_usable(const struct sh_ctx *c, const struct sh_pspan *s, uint32_t index)
{
    uint32_t first, last;
    uint64_t base = sh_unit_of_page(c, s->page);
    sh_block_units(c, s->kind, index, &first, &last);
    for (uint32_t u = first; u <= last; u++)
        if (!unit_usable(c, base + u))
            return false;
    return true;
}

/* FREE, or a HOLE that need not be one any more. */
static bool claim_free(struct sh_ctx *c, struct sh_pspan *s, uint32_t index, bool *hole)
{
    _Atomic uint64_t *word = sh_words(c, s->page, c->kinds[s->kind].tier) + index;
    uint64_t w = atomic_load_explicit(word, ACQ);
    if (SH_GEN(w) == SH_GEN_MAX)
        return false; /* retired */
    if (SH_BSTATE(w) == SH_BLOCK_FREE)
        return true;
    if (SH_BSTATE(w) != SH_BLOCK_HOLE)
        return false;
    if (block_usable(c, s, index) &&
        atomic_compare_exchange_strong(word, &w, SH_BLOCK_WORD(SH_BLOCK_FREE, SH_GEN(w))))
        return true;
    *hole = true;
    return false;
}

static bool cell_is_free(struct sh_ctx *c, struct sh_pspan *s, uint32_t index)
{
    const _Atomic uint64_t *cells = (const _Atomic uint64_t *)sh_data(c, s->page);
    uint32_t step = c->kinds[s->kind].size / 8;
    return atomic_load_explicit(&cells[(uint64_t)index * step], ACQ) == 0;
}

/* The bitmap anew from the truth. */
static void scan(struct sh_ctx *c, struct sh_pspan *s)
{
    bool hole = false;
    atomic_fetch_and_explicit(&sh_page(c, s->page)->mark, ~SH_PAGE_REMOTE, ACQR);
    memset(s->bits, 0, (s->nblocks + 63) / 64 * 8);
    s->nfree = s->first = 0;
    for (uint32_t i = 0; i < s->nblocks; i++) {
        bool is_free = s->kind < SH_NCLASSES ? claim_free(c, s, i, &hole) : cell_is_free(c, s, i);
        s->bits[i / 64] |= (uint64_t)is_free << (i % 64);
        s->nfree += is_free;
    }
    (s->nfree ? ring_add : ring_remove)(c, SH_AVAIL, s);
    (hole ? ring_add : ring_remove)(c, SH_HOLEY, s);
}

/* Takes the span into the shelf of its kind. The record says `span`, or will. */
void sh_pspan_add(struct sh_ctx *c, struct sh_pspan *s, uint64_t span)
{
    s->span = span;
    if (c->pspan_at[s->page] != NULL)
        pspan_lose(c, c->pspan_at[s->page]);
    c->pspan_at[s->page] = s;
    ring_add(c, SH_ALL, s);
    scan(c, s);
}

int64_t sh_pspan_pop(struct sh_ctx *c, uint32_t kind, struct sh_pspan **out)
{
    struct sh_pspan *s;
    while ((s = c->shelves[kind].ring[SH_AVAIL]) != NULL) {
        if (__builtin_expect(!still_ours(c, s), 0)) {
            pspan_lose(c, s);
            continue;
        }
        uint32_t w = s->first;
        while (s->bits[w] == 0)
            w++;
        uint32_t bit = (uint32_t)__builtin_ctzll(s->bits[w]);
        s->bits[w] &= s->bits[w] - 1;
        s->first = w;
        if (--s->nfree == 0)
            ring_remove(c, SH_AVAIL, s);
        *out = s;
        return (int64_t)w * 64 + bit;
    }
    return -1;
}

/* Empty spans: each kind keeps one, so that a loop at the edge of a span does not give it up and
 * take it again; the others go back to the page heap at once. */

bool sh_pspan_any(struct sh_ctx *c, uint32_t kind)
{
    struct sh_pspan *s;
    while ((s = c->shelves[kind].ring[SH_AVAIL]) != NULL && !still_ours(c, s))
        pspan_lose(c, s);
    return s != NULL;
}

bool sh_pspan_push(struct sh_ctx *c, struct sh_pspan *s, uint32_t index)
{
    uint64_t bit = 1ull << (index % 64);
    if (s->bits[index / 64] & bit)
        return false;
    s->bits[index / 64] |= bit;
    if (index / 64 < s->first)
        s->first = index / 64;
    if (s->nfree++ == 0)
        ring_add(c, SH_AVAIL, s);
    if (s->nfree < s->nblocks || s->next[SH_AVAIL] == s ||
        (c->keep_pins && s->kind == SH_KIND_PINS))
        return false;
    uint32_t page = s->page;
    if (!sh_span_give_up(c, page, s->span, SH_RESERVED))
        return false;
    pspan_drop(c, s);
    sh_defer(c, page);
    return true;
}

/* No step from RELEASED to COMMITTED or back is under way in these pages. */
static bool units_at_rest(struct sh_ctx *c, uint32_t page, uint32_t npages)
{
    uint64_t unit = sh_unit_of_page(c, page), end = unit + (uint64_t)npages * sh_units_per_page(c);
    for (; unit < end; unit++) {
        uint32_t state = SH_UNIT_STATE(atomic_load_explicit(sh_unit(c, unit), ACQ));
        if (state == SH_UNIT_RESERVED || state == SH_UNIT_RELEASING)
            return false;
    }
    return true;
}

/* Every block is FREE or a HOLE. With the owner's process lock held this stays so. */
bool sh_span_is_empty(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    uint32_t kind = SH_SPAN_KIND(span);
    const _Atomic uint64_t *words = sh_words(c, page, c->kinds[kind].tier);
    for (uint32_t i = 0; i < c->kinds[kind].nblocks; i++) {
        uint64_t state = SH_BSTATE(atomic_load_explicit(&words[i], ACQ));
        if (state != SH_BLOCK_FREE && state != SH_BLOCK_HOLE)
            return false;
    }
    return true;
}

/* Block words die with the span; the generations they reached must not (DESIGN section 3). */
void sh_span_keep_generations(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    uint32_t kind = SH_SPAN_KIND(span), n = SH_SPAN_NPAGES(span);
    const _Atomic uint64_t *words = sh_words(c, page, c->kinds[kind].tier);
    uint64_t gen = 0;
    for (uint32_t i = 0; i < c->kinds[kind].nblocks; i++) {
        uint64_t g = SH_GEN(atomic_load_explicit(&words[i], RLX));
        gen = g > gen ? g : gen;
    }
    for (uint32_t p = page; p < page + n; p++) {
        uint64_t mark = atomic_load_explicit(&sh_page(c, p)->mark, RLX);
        atomic_store_explicit(&sh_page(c, p)->mark, (mark & SH_PAGE_TIERS) | gen, RLX);
    }
}

/* An empty span becomes `state` (RESERVED or RELEASING) by us. The owner's process lock is held, or
 * the owner is dead. False: it is not empty, or not at rest. */
bool sh_span_give_up(struct sh_ctx *c, uint32_t page, uint64_t span, uint32_t state)
{
    uint32_t n = SH_SPAN_NPAGES(span), kind = SH_SPAN_KIND(span);
    if (!units_at_rest(c, page, n))
        return false;
    if (SH_SPAN_STATE(span) == SH_SMALL) {
        if (kind >= SH_NCLASSES || !sh_span_is_empty(c, page, span))
            return false;
        sh_span_keep_generations(c, page, span);
        if ((atomic_load_explicit(&sh_page(c, page)->mark, RLX) & SH_GEN_MAX) == SH_GEN_MAX)
            state = SH_RETIRED;
    }
    sh_set_span(c, page, SH_SPAN(state, 0, state == SH_RETIRED ? 0 : c->owner, n));
    return state != SH_RETIRED;
}

/* A run that is RESERVED by us is put aside until we may take the heap lock. */
void sh_defer(struct sh_ctx *c, uint32_t page)
{
    atomic_store_explicit(&sh_page(c, page)->link, c->deferred, RLX);
    c->deferred = page;
    c->ndeferred++;
}

uint32_t sh_undefer(struct sh_ctx *c, uint32_t *pages, uint32_t at_most)
{
    uint32_t n = 0;
    for (; n < at_most && c->ndeferred != 0; c->ndeferred--) {
        if (c->deferred >= c->geo.npages) { /* the link before was written over */
            sh_corrupt(c, SH_FAULT_GIVEN, c->deferred);
            c->ndeferred = 0;
            break;
        }
        pages[n++] = c->deferred;
        c->deferred = (uint32_t)atomic_load_explicit(&sh_page(c, c->deferred)->link, RLX);
    }
    return n;
}

/* Somebody freed a block of a span that is not theirs: the owner finds it at its next refill. */
void sh_hint_remote(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    _Atomic uint64_t *mark = &sh_page(c, page)->mark;
    if (!(atomic_load_explicit(mark, RLX) & SH_PAGE_REMOTE))
        atomic_fetch_or_explicit(mark, SH_PAGE_REMOTE, ACQR);
    if (SH_SPAN_OWNER(span) == SH_OWNER_NONE)
        return;
    _Atomic uint64_t *remote = &sh_slot(c, SH_SPAN_SLOT(span))->remote[SH_SPAN_KIND(span) / 64];
    uint64_t bit = 1ull << (SH_SPAN_KIND(span) % 64);
    if (!(atomic_load_explicit(remote, RLX) & bit))
        atomic_fetch_or_explicit(remote, bit, ACQR);
}

/* A block of a SMALL span became FREE by our compare-and-swap. Our process lock is held. */
void sh_span_freed(struct sh_ctx *c, uint32_t page, uint64_t span, const _Atomic uint64_t *word)
{
    struct sh_pspan *s = c->slot && c->pspan_at ? c->pspan_at[page] : NULL;
    if (s != NULL && SH_SPAN_OWNER(span) == c->owner && s->span == span)
        sh_pspan_push(c, s, (uint32_t)(word - sh_words(c, page, c->kinds[s->kind].tier)));
    else
        sh_hint_remote(c, page, span);
}

/* Refilling */

/* Looks at some of our spans in which others may have freed. Locked. */
static bool collect_remote(struct sh_ctx *c, uint32_t kind)
{
    struct sh_shelf *shelf = &c->shelves[kind];
    _Atomic uint64_t *remote = &c->slot->remote[kind / 64];
    uint64_t bit = 1ull << (kind % 64);
    if (!(atomic_load_explicit(remote, ACQ) & bit))
        return false;
    if (shelf->cursor == NULL) { /* a round begins: what comes from now on asks for another */
        atomic_fetch_and_explicit(remote, ~bit, ACQR);
        shelf->cursor = shelf->ring[SH_ALL];
    }
    for (uint32_t i = 0; i < REMOTE_LOOKS && shelf->cursor != NULL; i++) {
        struct sh_pspan *s = shelf->cursor;
        shelf->cursor = s->next[SH_ALL] == shelf->ring[SH_ALL] ? NULL : s->next[SH_ALL];
        if (!still_ours(c, s))
            pspan_drop(c, s);
        else if (atomic_load_explicit(&sh_page(c, s->page)->mark, RLX) & SH_PAGE_REMOTE)
            scan(c, s);
    }
    if (shelf->cursor != NULL)
        atomic_fetch_or_explicit(remote, bit, ACQR);
    return shelf->ring[SH_AVAIL] != NULL;
}

/* Marks up to FILL_UNITS units of a span for committing; those that are only stamped need nothing
 * more than to lose the stamp. Locked. */
static uint32_t reserve_units(struct sh_ctx *c, struct sh_pspan *s, uint64_t *units, bool *limited)
{
    uint64_t base = sh_unit_of_page(c, s->page);
    uint32_t n = 0, all = c->kinds[s->kind].npages * sh_units_per_page(c), budget = FILL_UNITS;
    uint32_t first, least;
    sh_block_units(c, s->kind, 0, &first, &least);
    budget = budget > least + 1 ? budget : least + 2; /* one block whole, wherever it starts */
    for (uint32_t i = 0; i < all && n < budget; i++) {
        _Atomic uint32_t *unit = sh_unit(c, base + i);
        uint32_t u = atomic_load_explicit(unit, ACQ);
        if (SH_UNIT_STATE(u) == SH_UNIT_COMMITTED && SH_UNIT_STAMP(u) != 0)
            atomic_store_explicit(unit, u & 7u, REL);
        if (SH_UNIT_STATE(u) == SH_UNIT_RELEASED) {
            if (!sh_budget(c, 1)) { /* before the word: a reaper takes off what it finds RESERVED */
                *limited = true;
                break;
            }
            atomic_store_explicit(unit, SH_UNIT_RESERVED, REL);
            units[n++] = base + i;
        }
    }
    return n;
}

/* Commits units that are RESERVED by us; says of each what it became. Not locked. */
static enum sh_status commit_reserved(struct sh_ctx *c, const uint64_t *units, uint32_t n,
                                      uint32_t *done)
{
    enum sh_status status = SH_OK;
    *done = 0;
    while (*done < n && status == SH_OK) {
        uint32_t run = 1;
        while (*done + run < n && units[*done + run] == units[*done] + run)
            run++;
        uint64_t off = c->geo.data + (units[*done] << c->geo.unit_shift);
        status = sh_status_of_errno(sh_os_commit(c, off, (uint64_t)run << c->geo.unit_shift));
        if (status == SH_OK)
            *done += run;
        else
            sh_os_unused(c, off, (uint64_t)run << c->geo.unit_shift);
    }
    return status;
}

#define FILL_MAX 64u /* units: as many as a block may touch, and FILL_UNITS */

/* Brings some holes of a span of ours back into use. Locked on entry and exit, not in between. */
static enum sh_status fill(struct sh_ctx *c, struct sh_pspan *s, int wait_ms)
{
    uint64_t units[FILL_MAX];
    bool limited = false;
    uint32_t page = s->page, done, n = reserve_units(c, s, units, &limited);
    uint64_t span = s->span;
    sh_leave(c);
    enum sh_status status = commit_reserved(c, units, n, &done);
    while (sh_enter(c, wait_ms ? wait_ms : 1000) == SH_BUSY) {
    } /* the units are ours: nothing is left half done */
    for (uint32_t i = 0; i < n; i++)
        atomic_store_explicit(sh_unit(c, units[i]),
                              i < done ? SH_UNIT_COMMITTED | SH_UNIT_DIRTY : SH_UNIT_RELEASED, REL);
    sh_unbudget(c, n - done);
    s = c->pspan_at[page];
    if (s != NULL && s->span == span && still_ours(c, s))
        scan(c, s);
    if (done == 0 && n == 0)
        return limited ? SH_LIMIT : SH_OK; /* or there was nothing to commit */
    return done > 0 ? SH_OK : status;
}

static enum sh_status fill_some(struct sh_ctx *c, uint32_t kind, int wait_ms)
{
    struct sh_shelf *shelf = &c->shelves[kind];
    for (uint32_t tries = 0; shelf->ring[SH_AVAIL] == NULL && shelf->ring[SH_HOLEY] != NULL;
         tries++) {
        struct sh_pspan *s = shelf->ring[SH_HOLEY];
        if (!still_ours(c, s)) {
            pspan_drop(c, s);
            continue;
        }
        shelf->ring[SH_HOLEY] = s->next[SH_HOLEY]; /* another one next time */
        enum sh_status status = fill(c, s, wait_ms);
        if (status != SH_OK)
            return status;
        if (tries > 8)
            break; /* holes that somebody else is busy with */
    }
    return SH_OK;
}

/* Heap locked. */
static enum sh_status take_first(struct sh_ctx *c, uint32_t kind, uint32_t *page, uint64_t *span)
{
    uint64_t *list = &c->hdr->orphans[kind], first = *list,
             used = atomic_load_explicit(&c->hdr->used_pages, RLX);
    if (first >= used)
        return sh_corrupt(c, SH_FAULT_LIST, first);
    uint64_t was = sh_span(c, (uint32_t)first);
    if (SH_SPAN_STATE(was) != SH_SMALL || SH_SPAN_KIND(was) != kind ||
        SH_SPAN_OWNER(was) != SH_OWNER_NONE || !sh_span_fits(c, (uint32_t)first, was, used) ||
        !sh_unlink(c, list, (uint32_t)first))
        return sh_corrupt(c, SH_FAULT_LIST, first);
    *page = (uint32_t)first;
    *span = was | c->owner;
    sh_set(c, &c->hdr->heap, &sh_page(c, *page)->span, *span);
    return SH_OK;
}

/* An orphan of the class becomes ours. Heap lock alone. */
static enum sh_status adopt(struct sh_ctx *c, uint32_t kind, int wait_ms, uint32_t *page,
                            uint64_t *span)
{
    uint64_t *list = &c->hdr->orphans[kind];
    *page = SH_NIL;
    if (atomic_load_explicit((_Atomic uint64_t *)list, RLX) == SH_NIL)
        return SH_OK;
    enum sh_status s = sh_heap_lock(c, wait_ms);
    if (s != SH_OK)
        return s;
    if (*list != SH_NIL)
        s = take_first(c, kind, page, span);
    sh_heap_unlock(c);
    return s;
}

/* Words of a fresh span go on where the generations of its pages ended. */
static void init_words(struct sh_ctx *c, struct sh_pspan *s)
{
    const struct sh_kind *k = &c->kinds[s->kind];
    _Atomic uint64_t *words = sh_words(c, s->page, k->tier);
    uint64_t gen = 0;
    for (uint32_t p = s->page; p < s->page + k->npages; p++) {
        uint64_t mark = atomic_load_explicit(&sh_page(c, p)->mark, RLX);
        gen = (mark & SH_GEN_MAX) > gen ? mark & SH_GEN_MAX : gen;
        atomic_store_explicit(&sh_page(c, p)->mark,
                              (mark & ~SH_PAGE_REMOTE) | SH_PAGE_TIER(k->tier), RLX);
        atomic_store_explicit(&sh_page(c, p)->head, SH_PAIR(s->page, 0), RLX);
    }
    for (uint32_t i = 0; i < k->nblocks; i++)
        atomic_store_explicit(&words[i], SH_BLOCK_WORD(SH_BLOCK_HOLE, gen), RLX);
}

/* Committed units of a run that becomes a small span: they hold old bytes, and are not idle. */
static void wake_units(struct sh_ctx *c, uint32_t page, uint32_t npages)
{
    uint64_t unit = sh_unit_of_page(c, page), end = unit + (uint64_t)npages * sh_units_per_page(c);
    for (; unit < end; unit++)
        if (SH_UNIT_STATE(atomic_load_explicit(sh_unit(c, unit), RLX)) == SH_UNIT_COMMITTED)
            atomic_store_explicit(sh_unit(c, unit), SH_UNIT_COMMITTED | SH_UNIT_DIRTY, RLX);
}

/* Block words of a fresh small span, or zeroed cells. Its pages are RESERVED by us. */
static enum sh_status prepare(struct sh_ctx *c, struct sh_pspan *s)
{
    const struct sh_kind *k = &c->kinds[s->kind];
    enum sh_status status = SH_OK;
    if (s->kind >= SH_NCLASSES) {
        status = sh_pages_commit(c, s->page, k->npages);
        if (status == SH_OK)
            memset(sh_data(c, s->page), 0, (uint64_t)k->npages << c->geo.page_shift);
    } else if (k->tier < SH_LARGE_TIER) {
        uint64_t off = (uint64_t)((uint8_t *)sh_words(c, s->page, k->tier) - c->base);
        status = sh_status_of_errno(sh_os_commit(c, off, (uint64_t)k->nblocks * 8));
    }
    if (status == SH_OK) {
        wake_units(c, s->page, k->npages);
        if (s->kind < SH_NCLASSES)
            init_words(c, s);
    }
    return status;
}

/* A pin is named by its span's number, so that it keeps its name in a forked child. Locked. */
static void number_pins(struct sh_ctx *c, struct sh_pspan *s)
{
    uint32_t i = 0;
    while (i < c->npin_spans && c->pin_spans[i] != NULL)
        i++;
    c->npin_spans = i == c->npin_spans ? i + 1 : c->npin_spans;
    c->pin_spans[s->number = i] = s;
}

/* A span of ours comes into use: one that we cut, RESERVED until here, or an orphan that we took.
 * SH_BUSY: the coordinator found the orphan empty before we did, and it is gone. */
static enum sh_status publish(struct sh_ctx *c, struct sh_pspan *s, uint64_t from, uint64_t span,
                              int wait_ms)
{
    enum sh_status status;
    while ((status = sh_enter(c, wait_ms ? wait_ms : 1000)) == SH_BUSY) {
    } /* the pages are ours: nothing is left half done */
    if (status != SH_OK) {
        free(s); /* the span is ours by its record, and found when we end */
        return status;
    }
    if (sh_span(c, s->page) != from) {
        sh_leave(c);
        free(s);
        return SH_BUSY;
    }
    if (s->kind == SH_KIND_PINS)
        number_pins(c, s);
    sh_set_span(c, s->page, span);
    sh_pspan_add(c, s, span);
    status = fill_some(c, s->kind, wait_ms);
    bool some = c->shelves[s->kind].ring[SH_AVAIL] != NULL;
    sh_leave(c);
    return some ? SH_OK : status == SH_OK ? SH_BUSY : status;
}

static uint32_t state_of_kind(uint32_t kind)
{
    return kind == SH_KIND_PINS ? SH_PINS : kind == SH_KIND_LEASES ? SH_LEASES : SH_SMALL;
}

static uint64_t record_of(const struct sh_ctx *c, uint32_t kind)
{
    return SH_SPAN(state_of_kind(kind), kind, c->owner, c->kinds[kind].npages);
}

/* A run that is ready to be a span of the kind, RESERVED until it is one. */
static enum sh_status reserve(struct sh_ctx *c, uint32_t kind, int wait_ms, struct sh_pspan **out)
{
    const struct sh_kind *k = &c->kinds[kind];
    struct sh_pspan *s = *out = sh_pspan_new(c, 0, kind);
    if (s == NULL)
        return SH_NOMEM;
    enum sh_status status = sh_pages_take(c, k->npages, wait_ms, &s->page);
    if (status != SH_OK) {
        free(s);
        return status;
    }
    SH_CRASH("cut:reserved");
    if (!sh_alive(c, 0))
        c->ring = true; /* whoever finds the coordinator dead starts a successor (I-9) */
    uint32_t page = s->page;
    status = prepare(c, s);
    if (status == SH_OK)
        return SH_OK;
    free(s);
    sh_pages_give(c, &page, 1, 60000);
    return status;
}

static enum sh_status cut(struct sh_ctx *c, uint32_t kind, int wait_ms)
{
    struct sh_pspan *s;
    enum sh_status status = reserve(c, kind, wait_ms, &s);
    uint64_t reserved = SH_SPAN(SH_RESERVED, 0, c->owner, c->kinds[kind].npages);
    if (status != SH_OK)
        return status;
    return publish(c, s, reserved, record_of(c, kind), wait_ms ? wait_ms : 60000);
}

/* One more span for the pins of a fork's child: RESERVED until they are copied, lest the collector
 * finds it empty and gives it back. */
enum sh_status sh_pins_reserve(struct sh_ctx *c, int wait_ms)
{
    struct sh_pspan *s;
    enum sh_status status = reserve(c, SH_KIND_PINS, wait_ms, &s);
    if (status == SH_OK)
        number_pins(c, s);
    return status;
}

/* They are. The cells are looked at first: one without pins may be given back as soon as the record
 * says what it is. */
void sh_pins_publish(struct sh_ctx *c)
{
    uint64_t span = record_of(c, SH_KIND_PINS);
    for (uint32_t i = 0; i < c->npin_spans; i++) {
        sh_pspan_add(c, c->pin_spans[i], span);
        sh_set_span(c, c->pin_spans[i]->page, span);
    }
}

static enum sh_status refill_locked(struct sh_ctx *c, uint32_t kind, int wait_ms)
{
    struct sh_shelf *shelf = &c->shelves[kind];
    if (shelf->ring[SH_AVAIL] != NULL)
        return SH_OK;
    if (kind == SH_KIND_LEASES && atomic_exchange(&c->slot->leases_taken, 0)) {
        sh_pspans_prune(c, kind);
        struct sh_pspan *s = shelf->ring[SH_ALL];
        while (s != NULL) {
            scan(c, s);
            s = s->next[SH_ALL] == shelf->ring[SH_ALL] ? NULL : s->next[SH_ALL];
        }
    }
    if (kind < SH_NCLASSES && !collect_remote(c, kind))
        return fill_some(c, kind, wait_ms);
    return SH_OK;
}

/* What is free in spans of ours. SH_SLOW: nothing that we know of. *round_over: we have looked at
 * all in which others had freed when the round began. */
static enum sh_status refill_ours(struct sh_ctx *c, uint32_t kind, int wait_ms, bool *round_over)
{
    enum sh_status status = sh_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    status = refill_locked(c, kind, wait_ms);
    *round_over = c->shelves[kind].cursor == NULL;
    bool some = sh_pspan_any(c, kind);
    sh_leave(c);
    return some ? SH_OK : status == SH_OK ? SH_SLOW : status;
}

/* Takes an orphan of the class. SH_SLOW: nothing in it is free. SH_ABSENT: there is none. */
static enum sh_status refill_from_orphan(struct sh_ctx *c, uint32_t kind, int wait_ms)
{
    uint32_t page = SH_NIL;
    uint64_t span;
    enum sh_status status = kind < SH_NCLASSES ? adopt(c, kind, wait_ms, &page, &span) : SH_OK;
    if (status != SH_OK || page == SH_NIL)
        return status == SH_OK ? SH_ABSENT : status;
    struct sh_pspan *s = sh_pspan_new(c, page, kind);
    if (s == NULL)
        return SH_NOMEM; /* the span is ours by its record and found when we end */
    SH_CRASH("adopt:taken");
    status = publish(c, s, span, span, wait_ms ? wait_ms : 60000);
    return status == SH_BUSY ? SH_SLOW : status;
}

static bool lacks(enum sh_status s)
{
    return s == SH_SLOW || s == SH_FULL || s == SH_LIMIT || s == SH_NOSPACE;
}

/* Before anybody is told that there is no room: whatever may be free after all. Two rounds through
 * our own spans, for others may have freed behind where the first one was. Cost: a look at each of
 * our spans and at each orphan of the kind. */
static enum sh_status refill_without_room(struct sh_ctx *c, uint32_t kind, int wait_ms,
                                          enum sh_status lacking)
{
    enum sh_status status = lacking;
    bool round_over = false;
    for (uint32_t rounds = 0; rounds < 2 && lacks(status); rounds += round_over)
        status = refill_ours(c, kind, wait_ms, &round_over);
    while (lacks(status))
        status = refill_from_orphan(c, kind, wait_ms);
    return status == SH_ABSENT ? lacking : status;
}

/* Makes free blocks (or cells) of the kind known to this process. */
enum sh_status sh_refill(struct sh_ctx *c, uint32_t kind, int wait_ms)
{
    bool round_over;
    enum sh_status status = refill_ours(c, kind, wait_ms, &round_over);
    if (status == SH_SLOW) /* else there is no room to fill holes: nor for another span of them */
        status = refill_from_orphan(c, kind, wait_ms);
    if (status == SH_SLOW || status == SH_ABSENT)
        status = cut(c, kind, wait_ms);
    return lacks(status) ? refill_without_room(c, kind, wait_ms, status) : status;
}
