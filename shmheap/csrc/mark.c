/*
 * A collection: rules 10 to 14 of DESIGN section 6, for blocks without references.
 *
 *     IDLE (everybody) -> new epoch, marks cleared -> MARK -> roots, leases, pins
 *          -> FINAL -> what was touched -> SWEEP -> free what is neither -> IDLE
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

static void clear_mark(struct sh_ctx *c, _Atomic uint64_t *word, void *arg)
{
    (void)c, (void)arg;
    if (atomic_load_explicit(word, RLX) & SH_MARKED)
        atomic_fetch_and_explicit(word, ~SH_MARKED, ACQR);
}

/* Rule 10, up to the flip to MARK. First everybody goes to IDLE: no two epochs may be in use at
 * once. */
enum sh_status sh_start_cycle(struct sh_ctx *c)
{
    uint32_t epoch = epoch_of(atomic_load(&c->hdr->phase));
    c->longest_ns = 0;
    enum sh_status status = set_phase(c, SH_IDLE, epoch);
    if (status == SH_OK)
        status = each_word(c, clear_mark, NULL);
    epoch = epoch == 0x3f ? 1 : epoch + 1; /* 0 is "never touched" */
    return status == SH_OK ? set_phase(c, SH_MARK, epoch) : status;
}

/* Marks a block that a holder names. A leaf has nothing to trace. */
static uint64_t shade(struct sh_ctx *c, uint64_t cell)
{
    struct sh_ref r;
    if (cell == 0 || !sh_locate(c, SH_CELL_WORD(cell), &r))
        return 0;
    uint64_t w = atomic_load_explicit(r.word, ACQ);
    while (SH_BSTATE(w) == SH_BLOCK_LIVE && !(w & SH_MARKED))
        if (atomic_compare_exchange_weak_explicit(r.word, &w, w | SH_MARKED, ACQR, ACQ))
            return 1;
    return 0;
}

static uint64_t shade_cells(struct sh_ctx *c, uint32_t page, uint32_t kind)
{
    const _Atomic uint64_t *cells = (const _Atomic uint64_t *)sh_data(c, page);
    uint32_t step = c->kinds[kind].size / 8;
    uint64_t n = 0;
    for (uint32_t i = 0; i < c->kinds[kind].nblocks; i++)
        n += shade(c, atomic_load_explicit(&cells[(uint64_t)i * step], ACQ));
    return n;
}

static uint64_t shade_roots(struct sh_ctx *c)
{
    uint64_t n = 0, used = atomic_load_explicit((_Atomic uint64_t *)&c->hdr->roots_used, ACQ);
    const struct sh_root *roots = (const struct sh_root *)(c->base + c->geo.roots);
    for (uint64_t i = 0; i < used && i < SH_MAX_ROOTS; i++)
        n += shade(c, atomic_load_explicit(&roots[i].cell, ACQ));
    return n;
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

/* Rule 11: named roots, leases, and the pins of every slot not yet reaped, dead or alive. */
enum sh_status sh_mark(struct sh_ctx *c, uint64_t *blocks)
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    uint64_t oldest = UINT64_MAX;
    enum sh_status status;
    *blocks = shade_roots(c);
    SH_CRASH("gc:marking");
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        if (SH_SPAN_STATE(span) == SH_PINS)
            *blocks += shade_cells(c, page, SH_KIND_PINS);
        if (SH_SPAN_STATE(span) == SH_LEASES) {
            *blocks += shade_cells(c, page, SH_KIND_LEASES);
            oldest = older(c, page, oldest);
        }
    }
    atomic_store(&c->hdr->oldest_lease_ns, oldest == UINT64_MAX ? 0 : oldest);
    return status == SH_ABSENT ? SH_OK : status;
}

struct count {
    uint64_t touch, n;
};

static void count_touched(struct sh_ctx *c, _Atomic uint64_t *word, void *arg)
{
    struct count *count = arg;
    uint64_t w = atomic_load_explicit(word, ACQ);
    (void)c;
    count->n +=
        SH_BSTATE(w) == SH_BLOCK_LIVE && !(w & SH_MARKED) && (w & SH_TOUCH_MASK) == count->touch;
}

/* Rule 12. *blocks: those that live because they were touched. Without success the collection is
 * given up, lest who opens a handle in FINAL waits for one that was stopped. */
enum sh_status sh_finish_mark(struct sh_ctx *c, uint64_t *blocks)
{
    uint32_t epoch = epoch_of(atomic_load(&c->hdr->phase));
    struct count count = {.touch = (uint64_t)epoch << SH_TOUCH_SHIFT};
    enum sh_status status = set_phase(c, SH_FINAL, epoch);
    if (status == SH_OK)
        status = each_word(c, count_touched, &count);
    *blocks = count.n;
    if (status == SH_OK)
        status = set_phase(c, SH_SWEEP, epoch);
    if (status != SH_OK)
        set_phase(c, SH_IDLE, epoch);
    return status;
}

/* Sweep */

#define SUSPECTS 64u

struct sweep {
    uint64_t touch, blocks, bytes;
    uint64_t live_blocks, live_bytes;
    uint32_t nsuspects;
    uint32_t page[SUSPECTS];
    uint64_t span[SUSPECTS], word[SUSPECTS];
};

static bool is_garbage(const struct sweep *s, uint64_t w)
{
    return SH_BSTATE(w) == SH_BLOCK_LIVE && !(w & SH_MARKED) && (w & SH_TOUCH_MASK) != s->touch;
}

/* Rule 13: the same transition as a count that falls to 0, so nothing is freed twice. */
static void sweep_word(struct sh_ctx *c, _Atomic uint64_t *word, struct sweep *s)
{
    struct sh_ref r;
    uint64_t w = atomic_load_explicit(word, ACQ);
    bool live = SH_BSTATE(w) == SH_BLOCK_LIVE;
    if (!live || (!is_garbage(s, w) && !c->recount_blocks) ||
        !sh_locate(c, sh_word_number(c, word), &r))
        return;
    r.gen = SH_GEN(w);
    r.nbytes = sh_block_bytes(c, &r, w);
    while (is_garbage(s, w)) {
        if (!atomic_compare_exchange_weak_explicit(
                word, &w, SH_BLOCK_WORD(SH_BLOCK_FREE, r.gen + 1), ACQR, ACQ))
            continue;
        s->blocks++;
        s->bytes += r.nbytes;
        sh_block_freed(c, &r);
        return;
    }
    s->live_blocks++;
    s->live_bytes += r.nbytes;
}

/* A large run whose block does not live: being made or freed at this moment, or left so by a death.
 * Which of the two, a handshake tells. */
static void suspect(struct sh_ctx *c, uint32_t page, uint64_t span, struct sweep *s)
{
    uint64_t w = atomic_load_explicit(sh_words(c, page, SH_LARGE_TIER), ACQ);
    if (SH_BSTATE(w) == SH_BLOCK_LIVE || s->nsuspects == SUSPECTS || sh_span(c, page) != span)
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

/* Deaths between a block and its counter leave the counters wrong: put them right if nothing but
 * this sweep moved. A block and its counter change under a process lock, so after the handshake
 * what the walk saw is counted. */
static void recount_blocks(struct sh_ctx *c, const struct sweep *s, const struct sh_sums *before)
{
    if (sh_handshake(c, -1) != SH_OK)
        return;
    struct sh_sums now = sh_sum(c), after = sh_sum(c); /* numbers go up before bytes */
    if (after.mallocs != before->mallocs || after.frees != before->frees + s->blocks)
        return;
    sh_add(&c->hdr->past_alloc_bytes, s->live_bytes - (now.alloc_bytes - now.freed_bytes));
    sh_add(&c->hdr->past_mallocs, s->live_blocks - (now.mallocs - now.frees));
    c->recount_blocks = false;
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

/* Frees every block that is neither marked nor touched, gives back empty spans and what deaths
 * lost. */
enum sh_status sh_sweep(struct sh_ctx *c, uint64_t *blocks, uint64_t *bytes)
{
    struct sweep *s = calloc(1, sizeof *s);
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    struct sh_sums before = sh_sum(c);
    enum sh_status status;
    if (s == NULL)
        return SH_NOMEM;
    s->touch = (uint64_t)epoch_of(atomic_load(&c->hdr->phase)) << SH_TOUCH_SHIFT;
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        status = sweep_span(c, page, span, s);
        SH_CRASH("gc:sweeping");
        if (status != SH_OK)
            break;
    }
    if (status == SH_ABSENT)
        status = judge_suspects(c, s);
    if (status == SH_OK)
        status = sh_give_all(c);
    if (status == SH_OK && c->recount_blocks)
        recount_blocks(c, s, &before);
    if (status == SH_OK && c->recount_leases)
        status = recount_leases(c);
    *blocks = s->blocks;
    *bytes = s->bytes;
    if (s->blocks != 0)
        sh_tell_waiters(c);
    free(s);
    return status;
}

/* The cycle is on the books, and everybody goes to IDLE. next_gc in bytes of heap_alloc. */
enum sh_status sh_end_cycle(struct sh_ctx *c, uint64_t next_gc, bool forced, uint64_t pause_ns)
{
    struct sh_header *h = c->hdr;
    struct sh_sums sum = sh_sum(c);
    uint64_t alloc = sh_heap_alloc(&sum), room = next_gc > alloc ? next_gc - alloc : 0;
    enum sh_status status = set_phase(c, SH_IDLE, epoch_of(atomic_load(&h->phase)));
    if (status != SH_OK)
        return status;
    pause_ns = pause_ns > c->longest_ns ? pause_ns : c->longest_ns;
    uint64_t n = sh_add(&h->num_gc, 1);
    atomic_store(&h->pause_ns[n % SH_PAUSES], pause_ns);
    sh_add(&h->pause_total_ns, pause_ns);
    sh_add(&h->num_forced_gc, forced);
    atomic_store(&h->last_gc, sh_os_now_ns());
    atomic_store(&h->next_gc, next_gc);
    atomic_store(&h->gc_trigger_pages,
                 atomic_load(&h->inuse_pages) + (room >> c->geo.page_shift) + 1);
    return SH_OK;
}
