/*
 * A collection: rules 10 to 14 of DESIGN section 6.
 *
 *     IDLE (everybody) -> new epoch, marks cleared -> MARK -> roots, leases, pins, and what hangs
 * on them -> FINAL -> what was touched meanwhile -> SWEEP -> free what is neither -> IDLE
 *
 * Marking: a block that a holder names is marked, and a node among them is grey until its
 * references have been looked at. The grey ones are on a stack in the coordinator's own memory;
 * marks are in the block words. What is touched by its users while marking (rules 5 and 6) is found
 * by walking over the words: a pass that finds nothing ends the marking.
 *
 * Nobody is stopped. A change of phase is a handshake: each process's phase word is set under that
 * process's lock, so an operation is wholly in one phase. Marks are in the block words and stay as
 * they are while sweeping, so a successor can go on with the sweep of a coordinator that died.
 */
#include "core.h"

#include <stdlib.h>

static uint32_t epoch_of(uint32_t phase)
{
    return (phase >> 8) & 0x3fu;
}

/* Under the registry lock, so that a process that attaches has the old phase and is flipped with
 * the others, or has the new one. */
static enum sh_status set_phase(struct sh_ctx *c, uint32_t phase, uint32_t epoch)
{
    uint32_t value = phase | epoch << 8;
    enum sh_status status = sh_registry(c, c->patience_ms);
    if (status != SH_OK)
        return status;
    atomic_store_explicit(&c->hdr->phase, value, REL);
    sh_unlock(c, &c->hdr->registry);
    SH_CRASH("gc:phase");
    return sh_handshake(c, value);
}

/* Block words of a span, by visitor */

typedef void visit(struct sh_ctx *, _Atomic uint64_t *word, void *arg);

static uint32_t words_of(struct sh_ctx *c, uint32_t page, uint64_t span, _Atomic uint64_t **words)
{
    if (SH_SPAN_STATE(span) == SH_LARGE) {
        *words = sh_words(c, page, SH_LARGE_TIER);
        return 1;
    }
    if (SH_SPAN_STATE(span) != SH_SMALL || SH_SPAN_KIND(span) >= SH_NCLASSES)
        return 0;
    *words = sh_words(c, page, c->kinds[SH_SPAN_KIND(span)].tier);
    return c->kinds[SH_SPAN_KIND(span)].nblocks;
}

static enum sh_status each_word(struct sh_ctx *c, visit *v, void *arg)
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    enum sh_status status;
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        _Atomic uint64_t *words;
        uint32_t n = words_of(c, page, span, &words);
        for (uint32_t i = 0; i < n; i++)
            v(c, &words[i], arg);
    }
    return status == SH_ABSENT ? SH_OK : status;
}

/* Touches go with the marks: epochs come round, and garbage that was touched in one 63 collections
 * ago would be taken for touched, with all that it names. Everybody is in IDLE: nobody touches. */
static void clear_mark(struct sh_ctx *c, _Atomic uint64_t *word, void *arg)
{
    (void)c, (void)arg;
    if (atomic_load_explicit(word, RLX) & (SH_MARKED | SH_TOUCH_MASK))
        atomic_fetch_and_explicit(word, ~(SH_MARKED | SH_TOUCH_MASK), ACQR);
}

/* A sweep that was given up goes on, as a successor's does. In IDLE a handle that is still about
 * could bring back what it condemned, which may name what it has freed. */
static enum sh_status finish_sweep(struct sh_ctx *c)
{
    uint64_t blocks, bytes;
    if (sh_phase_of(atomic_load(&c->hdr->phase)) != SH_SWEEP)
        return SH_OK;
    sh_trace_end(c);
    return sh_sweep(c, &blocks, &bytes);
}

/* Rule 10, up to the flip to MARK. First everybody goes to IDLE: no two epochs may be in use at
 * once. */
enum sh_status sh_start_cycle(struct sh_ctx *c)
{
    uint32_t epoch = epoch_of(atomic_load(&c->hdr->phase));
    sh_pauses_begin(c);
    enum sh_status status = finish_sweep(c);
    if (status == SH_OK)
        status = set_phase(c, SH_IDLE, epoch);
    if (status == SH_OK)
        status = each_word(c, clear_mark, NULL);
    epoch = epoch == 0x3f ? 1 : epoch + 1; /* 0 is "never touched" */
    return status == SH_OK ? set_phase(c, SH_MARK, epoch) : status;
}

/* Tracing. A block's word and a node's bytes are where no cache has them, and the wait for memory
 * is most of what marking costs. So both are asked for as soon as they are known to be wanted, and
 * looked at AHEAD others later: cells between a reference and its word, nodes between the stack
 * and their references. */

#define AHEAD 16u

struct grey {
    const struct sh_node *node; /* NULL: none */
    uint64_t room;              /* bytes */
};

struct sh_trace {
    struct grey *grey; /* nodes that are marked and not yet looked at: a stack */
    uint64_t n, room;
    struct grey node[AHEAD]; /* likewise, and asked for: a ring */
    uint64_t cell[AHEAD];    /* holders not yet followed, whose words are asked for: a ring */
    uint32_t node_turn, cell_turn;
    uint64_t blocks; /* marked */
    /* By word number, sparse: holders seen of each block, as far as 65,535. NULL: nobody died since
     * counts were right, so none is too high. */
    uint16_t *seen;
    uint64_t nwords;
    bool failed; /* no memory */
};

static struct sh_trace *trace_new(struct sh_ctx *c)
{
    struct sh_trace *t = calloc(1, sizeof *t);
    if (t == NULL)
        return NULL;
    t->nwords = c->geo.data / 8;
    if (c->recount_holders)
        t->seen = sh_os_private(t->nwords * sizeof *t->seen);
    return t;
}

/* The coordinator forgets what it has marked. */
void sh_trace_end(struct sh_ctx *c)
{
    struct sh_trace *t = c->trace;
    c->trace = NULL;
    if (t == NULL)
        return;
    if (t->seen != NULL)
        sh_os_unmap(t->seen, t->nwords * sizeof *t->seen);
    free(t->grey);
    free(t);
}

static void push_grey(struct sh_trace *t, struct grey g)
{
    if (t->n == t->room) {
        uint64_t room = t->room ? 2 * t->room : 1024;
        struct grey *grey = realloc(t->grey, room * sizeof *grey);
        if (grey == NULL) {
            t->failed = true;
            return;
        }
        t->grey = grey;
        t->room = room;
    }
    t->grey[t->n++] = g;
}

/* The node that was asked for first; one from the stack is asked for in its place. None: there is
 * no grey node any more. */
static struct grey next_grey(struct sh_trace *t)
{
    struct grey g = {0};
    for (uint32_t i = 0; i <= AHEAD && g.node == NULL; i++) {
        struct grey *place = &t->node[t->node_turn++ % AHEAD];
        g = *place;
        *place = t->n != 0 ? t->grey[--t->n] : (struct grey){0};
        __builtin_prefetch(place->node);
    }
    return g;
}

/* Marks a block that lives, or a dying node. */
static void mark_block(struct sh_ctx *c, const struct sh_ref *r, uint64_t w)
{
    struct sh_trace *t = c->trace;
    while (SH_BSTATE(w) == SH_BLOCK_LIVE || SH_BSTATE(w) == SH_BLOCK_DYING) {
        if (w & SH_MARKED)
            return;
        if (!atomic_compare_exchange_weak_explicit(r->word, &w, w | SH_MARKED, ACQR, ACQ))
            continue;
        t->blocks++;
        if (w & SH_NODE)
            push_grey(t, (struct grey){(const struct sh_node *)r->data, r->nbytes});
        return;
    }
}

/* A block that a holder names. A lease's cell has no generation, and keeps its block. */
static void shade(struct sh_ctx *c, uint64_t cell)
{
    struct sh_ref r;
    uint64_t number = SH_CELL_WORD(cell);
    bool lease = cell & SH_REF_VALUE;
    if (!sh_locate(c, number, &r))
        return;
    uint64_t w = atomic_load_explicit(r.word, ACQ);
    if (SH_BSTATE(w) != SH_BLOCK_LIVE ||
        (!lease && (SH_GEN(w) & SH_CELL_LOW_MASK) != SH_CELL_LOW(cell)))
        return;
    if (c->trace->seen != NULL && c->trace->seen[number] != UINT16_MAX)
        c->trace->seen[number]++;
    mark_block(c, &r, w);
}

/* Asks for what a holder names, and shades what was asked for AHEAD holders ago; 0 is no holder. */
static void follow(struct sh_ctx *c, uint64_t cell)
{
    uint64_t *place = &c->trace->cell[c->trace->cell_turn++ % AHEAD], before = *place;
    *place = cell;
    __builtin_prefetch(c->base + 8 * SH_CELL_WORD(cell), 1);
    if (before != 0)
        shade(c, before);
}

static void follow_all(struct sh_ctx *c)
{
    for (uint32_t i = 0; i < AHEAD; i++)
        follow(c, 0);
}

/* The references of a node. It may die meanwhile, and its place be another block's: then what is
 * read here is not what it was, and marks blocks that need not live, for this collection. Nobody
 * punches but the coordinator, so the bytes are there. A race by design. */
__attribute__((no_sanitize("thread"))) static void look_into(struct sh_ctx *c, struct grey g)
{
    uint64_t head = atomic_load_explicit(&g.node->head, ACQ);
    if (!sh_node_fits(head, g.room))
        return;
    for (uint32_t i = 0; i < SH_NODE_NREFS(head); i++) {
        uint64_t ref = atomic_load_explicit(&g.node->ref[i], ACQ);
        if (SH_REF_IS_CELL(ref))
            follow(c, ref);
    }
}

static void empty_grey(struct sh_ctx *c)
{
    do {
        struct grey g;
        while ((g = next_grey(c->trace)).node != NULL)
            look_into(c, g);
        follow_all(c);
    } while (c->trace->n != 0);
}

/* Touched in this collection; or dying by a process, which drops what it still names in slices: a
 * root of that. Garbage of a collection before this one is nobody's root. */
static void find_untraced(struct sh_ctx *c, _Atomic uint64_t *word, void *arg)
{
    uint64_t w = atomic_load_explicit(word, ACQ);
    bool touched = SH_BSTATE(w) == SH_BLOCK_LIVE && (w & SH_TOUCH_MASK) == *(uint64_t *)arg;
    bool dropped = SH_BSTATE(w) == SH_BLOCK_DYING && SH_COUNT(w) != 0;
    struct sh_ref r;
    if ((touched || dropped) && !(w & SH_MARKED) && sh_locate(c, sh_word_number(c, word), &r))
        mark_block(c, &r, w);
}

/* Rule 12: until a full pass finds nothing that was touched and is not traced. */
static enum sh_status trace_all(struct sh_ctx *c)
{
    uint64_t before, touch = sh_touch_of(atomic_load(&c->hdr->phase));
    enum sh_status status;
    do {
        empty_grey(c);
        before = c->trace->blocks;
        status = each_word(c, find_untraced, &touch);
        SH_CRASH("gc:traced");
    } while (status == SH_OK && !c->trace->failed && c->trace->blocks != before);
    return c->trace->failed ? SH_NOMEM : status;
}

static void follow_cells(struct sh_ctx *c, uint32_t page, uint32_t kind)
{
    const _Atomic uint64_t *cells = (const _Atomic uint64_t *)sh_data(c, page);
    uint32_t step = c->kinds[kind].size / 8;
    for (uint32_t i = 0; i < c->kinds[kind].nblocks; i++)
        follow(c, atomic_load_explicit(&cells[(uint64_t)i * step], ACQ));
}

static void follow_roots(struct sh_ctx *c)
{
    uint64_t used = atomic_load_explicit((_Atomic uint64_t *)&c->hdr->roots_used, ACQ);
    const struct sh_root *roots = (const struct sh_root *)(c->base + c->geo.roots);
    for (uint64_t i = 0; i < used && i < SH_MAX_ROOTS; i++)
        follow(c, atomic_load_explicit(&roots[i].cell, ACQ));
}

static uint64_t older(struct sh_ctx *c, uint32_t page, uint64_t oldest)
{
    const struct sh_lease *leases = (const struct sh_lease *)sh_data(c, page);
    for (uint32_t i = 0; i < c->kinds[SH_KIND_LEASES].nblocks; i++) {
        uint64_t made = atomic_load_explicit(&leases[i].made_ns, RLX);
        if (atomic_load_explicit(&leases[i].cell, RLX) != 0 && made < oldest)
            oldest = made;
    }
    return oldest;
}

static enum sh_status follow_holders(struct sh_ctx *c)
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    uint64_t oldest = UINT64_MAX;
    enum sh_status status;
    follow_roots(c);
    SH_CRASH("gc:marking");
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        if (SH_SPAN_STATE(span) == SH_PINS)
            follow_cells(c, page, SH_KIND_PINS);
        if (SH_SPAN_STATE(span) == SH_LEASES) {
            follow_cells(c, page, SH_KIND_LEASES);
            oldest = older(c, page, oldest);
        }
    }
    atomic_store(&c->hdr->oldest_lease_ns, oldest == UINT64_MAX ? 0 : oldest);
    return status == SH_ABSENT ? SH_OK : status;
}

/* Rule 11: named roots, leases, and the pins of every slot not yet reaped, dead or alive; and all
 * that hangs on them. *blocks: how many that is. */
enum sh_status sh_mark(struct sh_ctx *c, uint64_t *blocks)
{
    sh_trace_end(c); /* of a collection that was given up */
    c->trace = trace_new(c);
    if (c->trace == NULL)
        return SH_NOMEM;
    enum sh_status status = follow_holders(c);
    if (status == SH_OK)
        status = trace_all(c);
    *blocks = c->trace->blocks;
    return status;
}

/* Rule 12. *blocks: those that were found since. Without success the collection is given up, lest
 * who opens a handle in FINAL waits for one that was stopped. */
enum sh_status sh_finish_mark(struct sh_ctx *c, uint64_t *blocks)
{
    uint32_t epoch = epoch_of(atomic_load(&c->hdr->phase));
    uint64_t before = c->trace->blocks, from = sh_os_now_ns();
    enum sh_status status = set_phase(c, SH_FINAL, epoch);
    if (status == SH_OK)
        status = trace_all(c);
    *blocks = c->trace->blocks - before;
    if (status == SH_OK)
        status = set_phase(c, SH_SWEEP, epoch);
    sh_kept_waiting(c, from); /* who opens a handle without a lease */
    if (status != SH_OK)
        set_phase(c, SH_IDLE, epoch);
    return status;
}

/* Sweep */

#define SUSPECTS 64u

struct sweep {
    uint32_t phase; /* with the epoch */
    uint32_t nsuspects;
    uint32_t page[SUSPECTS];
    uint64_t span[SUSPECTS], word[SUSPECTS];
};

/* What was worked off is no longer a block that could be touched: its references are dropped as if
 * no collection was under way, for who is condemned with it shall go with it. */
static void bury_garbage(struct sh_ctx *c)
{
    while (sh_bury(c, 0, 4096, SH_IDLE)) {
    }
}

/* Rule 13: the same transition as a count that falls to 0, so nothing is freed twice. */
static void sweep_word(struct sh_ctx *c, _Atomic uint64_t *word, struct sweep *s)
{
    struct sh_ref r;
    uint64_t w = atomic_load_explicit(word, ACQ);
    if (!sh_is_condemned(w, s->phase) || !sh_locate(c, sh_word_number(c, word), &r))
        return;
    r.gen = SH_GEN(w);
    r.nbytes = sh_block_bytes(c, &r, w);
    while (sh_is_condemned(w, s->phase)) {
        bool leaf = !(w & SH_NODE);
        if (!sh_end_life(c, &r, &w))
            continue;
        if (leaf)
            sh_block_freed(c, &r);
        else
            bury_garbage(c);
        return;
    }
}

/* A large run whose block does not live: being made or freed at this moment, or left so by a death.
 * Which of the two, a handshake tells. */
static void suspect(struct sh_ctx *c, uint32_t page, uint64_t span, struct sweep *s)
{
    uint64_t w = atomic_load_explicit(sh_words(c, page, SH_LARGE_TIER), ACQ);
    if (SH_BSTATE(w) == SH_BLOCK_LIVE || SH_BSTATE(w) == SH_BLOCK_DYING ||
        s->nsuspects == SUSPECTS || sh_span(c, page) != span)
        return;
    s->page[s->nsuspects] = page;
    s->span[s->nsuspects] = span;
    s->word[s->nsuspects++] = w;
}

static enum sh_status judge_suspects(struct sh_ctx *c, struct sweep *s)
{
    enum sh_status status = s->nsuspects ? sh_handshake(c, -1) : SH_OK;
    for (uint32_t i = 0; status == SH_OK && i < s->nsuspects; i++) {
        uint64_t span = s->span[i];
        uint32_t page = s->page[i];
        if (sh_span(c, page) != span || /* before the word: it was written before the span */
            atomic_load(sh_words(c, page, SH_LARGE_TIER)) != s->word[i])
            continue;
        /* Lost, and ours. The generation first: a successor gives back what is RELEASING. */
        uint64_t mark = atomic_load(&sh_page(c, page)->mark);
        atomic_store(&sh_page(c, page)->mark, (mark & SH_PAGE_TIERS) | SH_GEN(s->word[i]));
        if (!atomic_compare_exchange_strong(
                &sh_page(c, page)->span, &span,
                SH_SPAN(SH_RELEASING, 0, c->owner, SH_SPAN_NPAGES(span))))
            continue;
        SH_CRASH("gc:judged");
        status = sh_give(c, &page, 1);
    }
    return status;
}

static bool has_free(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    _Atomic uint64_t *words;
    uint32_t n = words_of(c, page, span, &words);
    for (uint32_t i = 0; i < n; i++)
        if (SH_BSTATE(atomic_load_explicit(&words[i], RLX)) == SH_BLOCK_FREE)
            return true;
    return false;
}

/* An empty small span goes back to the page heap, also that of a process which would not notice. */
static enum sh_status end_span(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    bool given = false;
    if (sh_hold_small(c, page, &span)) {
        given = sh_span_give_up(c, page, span, SH_RELEASING);
        if (given || SH_SPAN_STATE(sh_span(c, page)) != SH_SMALL)
            sh_let_owner(c, span);
        else
            sh_let_small(c, page, span);
    }
    return given ? sh_give(c, &page, 1) : SH_OK;
}

static bool cells_are_clear(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    const _Atomic uint64_t *cells = (const _Atomic uint64_t *)sh_data(c, page);
    const struct sh_kind *k =
        &c->kinds[SH_SPAN_STATE(span) == SH_PINS ? SH_KIND_PINS : SH_KIND_LEASES];
    for (uint32_t i = 0; i < k->nblocks; i++)
        if (atomic_load_explicit(&cells[(uint64_t)i * (k->size / 8)], ACQ) != 0)
            return false;
    return true;
}

/* Nor does an idle process keep cells in which it holds nothing. */
static enum sh_status end_cells(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    if (!cells_are_clear(c, page, span) || !sh_hold_small(c, page, &span))
        return SH_OK;
    bool given = cells_are_clear(c, page, span) && sh_span_give_up(c, page, span, SH_RELEASING);
    sh_let_owner(c, span);
    return given ? sh_give(c, &page, 1) : SH_OK;
}

static enum sh_status sweep_span(struct sh_ctx *c, uint32_t page, uint64_t span, struct sweep *s)
{
    _Atomic uint64_t *words;
    uint32_t n = words_of(c, page, span, &words);
    for (uint32_t i = 0; i < n; i++)
        sweep_word(c, &words[i], s);
    if (SH_SPAN_STATE(span) == SH_LARGE)
        suspect(c, page, span, s);
    if (SH_SPAN_STATE(span) == SH_PINS || SH_SPAN_STATE(span) == SH_LEASES)
        return end_cells(c, page, span);
    if (c->ndeferred >= SH_GIVE_MAX && sh_give_all(c) != SH_OK)
        return SH_BUSY;
    if (SH_SPAN_STATE(span) != SH_SMALL || n == 0 || sh_span(c, page) != span)
        return SH_OK;
    if (sh_span_is_empty(c, page, span))
        return end_span(c, page, span);
    if (has_free(c, page, span))
        sh_hint_remote(c, page, span); /* a hint that a death lost is found again */
    return SH_OK;
}

struct recount {
    uint64_t blocks, bytes;
};

/* One that is dying is counted as freed when it ends. */
static void count_block(struct sh_ctx *c, _Atomic uint64_t *word, void *arg)
{
    struct recount *n = arg;
    struct sh_ref r;
    uint64_t w = atomic_load_explicit(word, ACQ);
    bool there = SH_BSTATE(w) == SH_BLOCK_LIVE || SH_BSTATE(w) == SH_BLOCK_DYING;
    if (!there || !sh_locate(c, sh_word_number(c, word), &r))
        return;
    n->blocks++;
    n->bytes += sh_block_bytes(c, &r, w);
}

/* Deaths between a block and its counter leave the counters wrong: put them right if nothing moves
 * meanwhile. A block and its counter change under a process lock, so after the handshake what the
 * walk saw is counted. Not the sweep's own walk: what it passed alive may go with garbage later. */
static enum sh_status recount_blocks(struct sh_ctx *c)
{
    struct recount n = {0};
    struct sh_sums before = sh_sum(c);
    enum sh_status status = each_word(c, count_block, &n);
    SH_CRASH("gc:counted");
    if (status == SH_OK)
        status = sh_handshake(c, -1);
    struct sh_sums now = sh_sum(c), after = sh_sum(c); /* numbers go up before bytes */
    if (status != SH_OK || after.mallocs != before.mallocs || after.frees != before.frees)
        return status;
    sh_add(&c->hdr->past_alloc_bytes, n.bytes - (now.alloc_bytes - now.freed_bytes));
    sh_add(&c->hdr->past_mallocs, n.blocks - (now.mallocs - now.frees));
    c->recount_blocks = false;
    return SH_OK;
}

static uint32_t leases_in(struct sh_ctx *c, uint32_t page)
{
    const struct sh_lease *leases = (const struct sh_lease *)sh_data(c, page);
    uint32_t n = 0;
    for (uint32_t i = 0; i < c->kinds[SH_KIND_LEASES].nblocks; i++)
        n += atomic_load_explicit(&leases[i].cell, ACQ) != 0;
    return n;
}

/* Likewise for who died between taking a lease and counting it, which left its owner's count too
 * high. Here the count changes last: after the handshake what the walk saw is counted. */
static enum sh_status recount_leases(struct sh_ctx *c)
{
    uint64_t before[SH_MAX_SLOTS];
    uint32_t page, n[SH_MAX_SLOTS] = {0};
    struct sh_walk walk = {0};
    uint64_t span;
    enum sh_status status;
    for (uint32_t i = 0; i < SH_MAX_SLOTS; i++)
        before[i] = i < atomic_load(&c->hdr->slots_used) ? atomic_load(&sh_slot(c, i)->leases) : 0;
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        if (SH_SPAN_STATE(span) != SH_LEASES)
            continue;
        if (!sh_hold_small(c, page, &span))
            return SH_OK; /* it is another span by now: next time */
        n[SH_SPAN_SLOT(span)] += leases_in(c, page);
        sh_let_owner(c, span);
    }
    if (status != SH_ABSENT || (status = sh_handshake(c, -1)) != SH_OK)
        return status;
    c->recount_leases = false;
    for (uint32_t i = 0; i < SH_MAX_SLOTS; i++)
        if ((uint32_t)before[i] != n[i] &&
            !atomic_compare_exchange_strong(&sh_slot(c, i)->leases, &before[i],
                                            (before[i] | 0xffffffffu) + 1 + n[i]))
            c->recount_leases = true; /* they moved: next time */
    return SH_OK;
}

/* Rule 13: a count that a death left too high is lowered to the holders that were seen, if nothing
 * touched the block since. Only who marked has seen them. */
static void lower_count(struct sh_ctx *c, _Atomic uint64_t *word, void *arg)
{
    const struct sweep *s = arg;
    uint64_t w = atomic_load_explicit(word, ACQ);
    uint64_t seen = c->trace->seen[sh_word_number(c, word)];
    while (SH_BSTATE(w) == SH_BLOCK_LIVE && w & SH_MARKED && SH_COUNT(w) > seen) {
        if ((w & SH_TOUCH_MASK) == sh_touch_of(s->phase) || SH_COUNT(w) == SH_COUNT_MAX) {
            c->recount_holders |= SH_COUNT(w) != SH_COUNT_MAX; /* next time */
            return;
        }
        uint64_t lower = (w & ~(SH_COUNT_MAX << SH_COUNT_SHIFT)) | seen << SH_COUNT_SHIFT;
        if (atomic_compare_exchange_weak_explicit(word, &w, lower, ACQR, ACQ))
            return;
    }
}

static enum sh_status lower_counts(struct sh_ctx *c, struct sweep *s)
{
    if (c->trace == NULL || c->trace->seen == NULL)
        return SH_OK;
    c->recount_holders = false;
    return each_word(c, lower_count, s);
}

static enum sh_status sweep_all(struct sh_ctx *c, struct sweep *s)
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    enum sh_status status;
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        status = sweep_span(c, page, span, s);
        SH_CRASH("gc:sweeping");
        if (status != SH_OK)
            return status;
    }
    if (status == SH_ABSENT)
        status = judge_suspects(c, s);
    return status == SH_OK ? sh_give_all(c) : status;
}

/* Frees every block that is neither marked nor touched, gives back empty spans and what deaths
 * lost, and lowers counts that deaths left too high. */
enum sh_status sh_sweep(struct sh_ctx *c, uint64_t *blocks, uint64_t *bytes)
{
    struct sweep *s = calloc(1, sizeof *s);
    uint64_t frees = atomic_load(&c->slot->frees), freed = atomic_load(&c->slot->freed_bytes);
    if (s == NULL)
        return SH_NOMEM;
    s->phase = atomic_load(&c->hdr->phase);
    enum sh_status status = sweep_all(c, s);
    *blocks = atomic_load(&c->slot->frees) - frees; /* ours alone */
    *bytes = atomic_load(&c->slot->freed_bytes) - freed;
    if (status == SH_OK)
        status = lower_counts(c, s);
    if (status == SH_OK && c->recount_blocks)
        status = recount_blocks(c);
    if (status == SH_OK && c->recount_leases)
        status = recount_leases(c);
    if (*blocks != 0)
        sh_tell_waiters(c);
    sh_trace_end(c);
    free(s);
    return status;
}

/* next_gc in bytes of heap_alloc. Whoever takes pages asks from so many pages in use on as there
 * are now and as room is left: what is in use beside blocks counts in the one and not in the other,
 * and it grows. A heap that stays just below next_gc would ask each time, and nothing would be due.
 */
void sh_set_next_gc(struct sh_ctx *c, uint64_t next_gc)
{
    struct sh_header *h = c->hdr;
    struct sh_sums sum = sh_sum(c);
    uint64_t alloc = sh_heap_alloc(&sum), room = next_gc > alloc ? next_gc - alloc : 0;
    atomic_store(&h->next_gc, next_gc);
    atomic_store(&h->gc_trigger_pages,
                 atomic_load(&h->inuse_pages) + (room >> c->geo.page_shift) + 1);
}

/* The cycle is on the books, and everybody goes to IDLE. */
enum sh_status sh_end_cycle(struct sh_ctx *c, uint64_t next_gc, bool forced, uint64_t pause_ns)
{
    struct sh_header *h = c->hdr;
    enum sh_status status = set_phase(c, SH_IDLE, epoch_of(atomic_load(&h->phase)));
    if (status != SH_OK)
        return status;
    pause_ns = pause_ns > c->longest_ns ? pause_ns : c->longest_ns;
    uint64_t n = sh_add(&h->num_gc, 1);
    atomic_store(&h->pause_ns[n % SH_PAUSES], pause_ns);
    sh_add(&h->pause_total_ns, pause_ns);
    sh_add(&h->num_forced_gc, forced);
    atomic_store(&h->last_gc, sh_os_now_ns());
    sh_set_next_gc(c, next_gc);
    return SH_OK;
}
