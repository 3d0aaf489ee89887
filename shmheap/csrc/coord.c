/*
 * What the coordinator does outside a collection: taking over from a dead one, reaping the dead,
 * stamping idle pages and giving them back. Mechanism only: when and how much is decided in Python.
 *
 * Whatever it takes is its own by its word in the record (RELEASING) before any system call, so
 * that a successor can finish it (I-5, I-9). Only the coordinator punches pages, and only after a
 * handshake: having taken every process's lock once, it knows that nobody is still looking at what
 * it took.
 */
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BATCH 32u /* runs taken from the page heap at a time, and given back together */

static bool in_use(const struct sh_ctx *c, uint32_t slot)
{
    return atomic_load_explicit(&sh_slot(c, slot)->state, ACQ) != SH_SLOT_FREE;
}

/* Takes each process's lock once, and sets its phase unless that is -1. SH_BUSY: not that of one
 * which was stopped inside an operation; the others have it, and do not wait for that one. */
enum sh_status sh_handshake(struct sh_ctx *c, int64_t phase)
{
    enum sh_status all = SH_OK;
    for (uint32_t i = 0; i < sh_slots_used(c); i++) {
        struct sh_slot *s = sh_slot(c, i);
        if (i != 0 && !in_use(c, i))
            continue;
        if (sh_process_lock(c, s, c->patience_ms) != SH_OK) {
            all = SH_BUSY;
            continue;
        }
        uint64_t from = sh_os_now_ns();
        if (phase >= 0)
            atomic_store_explicit(&s->phase, (uint32_t)phase, REL);
        sh_process_unlock(s);
        sh_kept_waiting(c, from);
    }
    return all;
}

/* From now on the longest is looked for that anybody was kept waiting. Of a collection that was
 * given up nobody has been told yet: then it goes on. */
void sh_pauses_begin(struct sh_ctx *c)
{
    if (c->trace == NULL && sh_phase_of(atomic_load(&c->hdr->phase)) == SH_IDLE)
        c->longest_ns = 0;
}

/* The statistics of all processes that are and were. */
struct sh_sums sh_sum(const struct sh_ctx *c)
{
    const struct sh_header *h = c->hdr;
    struct sh_sums sum = {.mallocs = atomic_load(&h->past_mallocs),
                          .frees = atomic_load(&h->past_frees),
                          .alloc_bytes = atomic_load(&h->past_alloc_bytes),
                          .freed_bytes = atomic_load(&h->past_freed_bytes)};
    for (uint32_t i = 0; i < sh_slots_used(c); i++) {
        struct sh_slot *s = sh_slot(c, i);
        sum.mallocs += atomic_load(&s->mallocs);
        sum.frees += atomic_load(&s->frees);
        SH_CRASH("sum:counted");
        sum.alloc_bytes += atomic_load(&s->alloc_bytes);
        sum.freed_bytes += atomic_load(&s->freed_bytes);
        sum.pins += atomic_load(&s->pins);
        sum.leases += sh_leases(s);
        sum.processes += i != 0 && atomic_load(&s->state) == SH_SLOT_LIVE;
    }
    return sum;
}

static uint64_t positive(uint64_t difference)
{
    return (int64_t)difference < 0 ? 0 : difference;
}

uint64_t sh_heap_alloc(const struct sh_sums *sum)
{
    return positive(sum->alloc_bytes - sum->freed_bytes);
}

uint64_t sh_heap_objects(const struct sh_sums *sum)
{
    return positive(sum->mallocs - sum->frees);
}

/* Gives back runs that are ours, or puts them aside for the next time. */
enum sh_status sh_give(struct sh_ctx *c, const uint32_t *pages, uint32_t n)
{
    enum sh_status status = n ? sh_pages_give(c, pages, n, c->patience_ms) : SH_OK;
    for (uint32_t i = 0; status != SH_OK && i < n; i++)
        sh_defer(c, pages[i]);
    return status;
}

/* Gives back the runs that were put aside so far. */
enum sh_status sh_give_all(struct sh_ctx *c)
{
    enum sh_status status = SH_OK;
    while (c->ndeferred != 0 && status == SH_OK) {
        uint32_t pages[SH_GIVE_MAX], n = sh_undefer(c, pages, SH_GIVE_MAX);
        status = sh_give(c, pages, n);
    }
    return status;
}

static enum sh_status put_aside(struct sh_ctx *c, uint32_t page)
{
    sh_defer(c, page);
    return c->ndeferred < BATCH ? SH_OK : sh_give_all(c);
}

/* Runs of units to be punched, neighbours joined */

struct punch {
    uint64_t unit, n;
};

struct punches {
    struct punch *run;
    uint32_t n, room;
    uint64_t units;
};

static bool punch_add(struct punches *p, uint64_t unit)
{
    p->units++;
    if (p->n > 0 && p->run[p->n - 1].unit + p->run[p->n - 1].n == unit) {
        p->run[p->n - 1].n++;
        return true;
    }
    if (p->n == p->room) {
        uint32_t room = p->room ? 2 * p->room : 64;
        struct punch *run = realloc(p->run, room * sizeof *run);
        if (run == NULL)
            return false;
        p->run = run;
        p->room = room;
    }
    p->run[p->n++] = (struct punch){unit, 1};
    return true;
}

/* The units are RELEASING; afterwards they are RELEASED. An error of the system call leaves the run
 * on the books as what the kernel says: still there. */
static enum sh_status punch_all(struct sh_ctx *c, const struct punches *p)
{
    enum sh_status status = SH_OK;
    for (uint32_t i = 0; i < p->n; i++) {
        const struct punch *run = &p->run[i];
        int error = sh_os_unused(c, c->geo.data + (run->unit << c->geo.unit_shift),
                                 run->n << c->geo.unit_shift);
        SH_CRASH("release:punched");
        sh_set_units(c, run->unit, run->n,
                     error ? SH_UNIT_COMMITTED | SH_UNIT_DIRTY : SH_UNIT_RELEASED);
        if (error == 0)
            sh_unbudget(c, run->n);
        else
            status = sh_status_of_errno(error);
    }
    return status;
}

/* What the dead left half done */

/* Punches every unit of a run that `which` names by state, a bit each. */
static enum sh_status punch_states(struct sh_ctx *c, uint32_t page, uint32_t npages, uint32_t which)
{
    struct punches p = {0};
    uint64_t unit = sh_unit_of_page(c, page), end = unit + (uint64_t)npages * sh_units_per_page(c);
    bool room = true;
    for (; unit < end && room; unit++) {
        if (!(which >> SH_UNIT_STATE(atomic_load(sh_unit(c, unit))) & 1))
            continue;
        atomic_store(sh_unit(c, unit), SH_UNIT_RELEASING);
        room = punch_add(&p, unit);
    }
    enum sh_status status = room ? punch_all(c, &p) : SH_NOMEM;
    free(p.run);
    return status;
}

#define HALF_DONE (1u << SH_UNIT_RESERVED | 1u << SH_UNIT_RELEASING)
#define HELD      (HALF_DONE | 1u << SH_UNIT_COMMITTED)

/* A run that a dead process had RESERVED may be half committed or half cut: all of it is punched.
 * One that a dead coordinator was RELEASING goes on from where it was. */
static enum sh_status finish_run(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    uint32_t n = SH_SPAN_NPAGES(span),
             which = SH_SPAN_STATE(span) == SH_RESERVED ? HELD : HALF_DONE;
    sh_set_span(c, page, SH_SPAN(SH_RELEASING, 0, c->owner, n));
    SH_CRASH("begin:claimed");
    enum sh_status status = punch_states(c, page, n, which);
    return status == SH_OK ? put_aside(c, page) : status;
}

/* Orphans: the coordinator takes one for itself while it works on it. */

static bool take_orphan(struct sh_ctx *c, uint32_t page, uint64_t *span)
{
    if (sh_heap_lock(c, c->patience_ms) != SH_OK)
        return false;
    bool same =
        sh_span(c, page) == *span && sh_unlink(c, &c->hdr->orphans[SH_SPAN_KIND(*span)], page);
    if (same) {
        *span = (*span & ~SH_OWNER_MASK) | c->owner;
        sh_set(c, &c->hdr->heap, &sh_page(c, page)->span, *span);
    }
    sh_heap_unlock(c);
    SH_CRASH("orphan:held");
    return same;
}

static enum sh_status make_orphan(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    enum sh_status status = sh_heap_lock(c, c->patience_ms);
    if (status != SH_OK)
        return status;
    if (sh_link(c, &c->hdr->orphans[SH_SPAN_KIND(span)], page, false))
        sh_set(c, &c->hdr->heap, &sh_page(c, page)->span, span & ~SH_OWNER_MASK);
    else
        status = SH_CORRUPT;
    sh_heap_unlock(c);
    return status;
}

/* A span whose owner is gone: empty ones go back, the others become orphans. */
static enum sh_status end_small(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    enum sh_status status = punch_states(c, page, SH_SPAN_NPAGES(span), HALF_DONE);
    if (status != SH_OK)
        return status;
    if (sh_span_give_up(c, page, span, SH_RELEASING))
        return put_aside(c, page);
    return SH_SPAN_STATE(sh_span(c, page)) == SH_SMALL ? make_orphan(c, page, span) : SH_OK;
}

static bool has_releasing(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    uint64_t unit = sh_unit_of_page(c, page);
    uint64_t end = unit + (uint64_t)SH_SPAN_NPAGES(span) * sh_units_per_page(c);
    for (; unit < end; unit++)
        if (SH_UNIT_STATE(atomic_load(sh_unit(c, unit))) == SH_UNIT_RELEASING)
            return true;
    return false;
}

static bool is_of_predecessor(const struct sh_ctx *c, uint64_t span)
{
    return SH_SPAN_OWNER(span) != SH_OWNER_NONE && SH_SPAN_SLOT(span) == 0 &&
           SH_SPAN_OWNER(span) != c->owner;
}

/* What an earlier coordinator was in the middle of. */
static bool is_unfinished(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    uint32_t state = SH_SPAN_STATE(span);
    if (is_of_predecessor(c, span))
        return state == SH_SMALL || state == SH_RESERVED || state == SH_RELEASING;
    return state == SH_SMALL && has_releasing(c, page, span);
}

static enum sh_status finish_predecessor(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    if (!is_of_predecessor(c, span))
        return punch_states(c, page, SH_SPAN_NPAGES(span), 1u << SH_UNIT_RELEASING);
    return SH_SPAN_STATE(span) == SH_SMALL ? end_small(c, page, span) : finish_run(c, page, span);
}

/* Works off all that is dying by a slot of a dead process, or by the coordinator's. */
static void bury(struct sh_ctx *c, uint32_t slot, uint32_t phase)
{
    while (sh_bury(c, slot, 4096, phase))
        if (c->ndeferred >= BATCH)
            sh_give_all(c);
}

/* Somebody died, perhaps between two steps of what is counted. */
static void recount_all(struct sh_ctx *c)
{
    c->recount_blocks = c->recount_units = c->recount_leases = c->recount_holders = true;
}

/* Takes over as coordinator. *phase: that of a collection that was under way. Cost: a walk over the
 * span records. */
enum sh_status sh_begin(struct sh_ctx *c, uint32_t *phase)
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    bool nobody_looks = false; /* the other may have died between claiming and its handshake */
    enum sh_status status;
    *phase = sh_phase_of(atomic_load(&c->hdr->phase));
    recount_all(c);
    atomic_store(&c->hdr->borrowed_pages, 0);
    bury(c, 0, SH_IDLE); /* garbage of the other's sweep, or what the dead had left */
    atomic_store(&c->hdr->started, 0);
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        if (!is_unfinished(c, page, span))
            continue;
        if (!nobody_looks)
            status = sh_handshake(c, -1);
        if (status == SH_OK)
            status = finish_predecessor(c, page, span);
        if (status != SH_OK)
            return status;
        nobody_looks = true;
    }
    return status == SH_ABSENT ? sh_give_all(c) : status;
}

/* Reaping (rule 14): clear the pin or lease, then count down */

/* False: it was a lease, and is taken meanwhile. */
static bool drop_cell(struct sh_ctx *c, _Atomic uint64_t *cell, uint64_t seen)
{
    struct sh_ref r;
    bool found = sh_locate(c, SH_CELL_WORD(seen), &r);
    uint32_t phase = atomic_load(&c->slot->phase);
    if (found) {
        uint64_t w = atomic_load_explicit(r.word, ACQ); /* the holder keeps it */
        r.gen = SH_GEN(w);
        r.nbytes = sh_block_bytes(c, &r, w);
        sh_touch(r.word, r.gen, phase);
    }
    SH_CRASH("reap:seen");
    if (!atomic_compare_exchange_strong(cell, &seen, 0))
        return false;
    if (found)
        sh_count_down(c, &r, phase);
    return true;
}

/* The bytes freed since *before, with all that hung on what was dropped. */
static uint64_t freed_since(struct sh_ctx *c, uint64_t *before)
{
    bury(c, 0, sh_phase(c));
    uint64_t now = atomic_load(&c->slot->freed_bytes), bytes = now - *before;
    *before = now;
    return bytes;
}

static enum sh_status free_cells(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    sh_set_span(c, page, SH_SPAN(SH_RELEASING, 0, c->owner, SH_SPAN_NPAGES(span)));
    return put_aside(c, page);
}

static enum sh_status reap_pins(struct sh_ctx *c, uint32_t page, uint64_t span, struct sh_reaped *r)
{
    _Atomic uint64_t *cells = (_Atomic uint64_t *)sh_data(c, page);
    for (uint32_t i = 0; i < c->kinds[SH_KIND_PINS].nblocks; i++) {
        uint64_t cell = atomic_load_explicit(&cells[i], ACQ);
        if (cell != 0)
            r->pins += drop_cell(c, &cells[i], cell);
    }
    return free_cells(c, page, span);
}

/* Drops the leases of a page that were made before the cutoff. True: younger ones are left. */
static bool drop_leases(struct sh_ctx *c, uint32_t page, uint64_t span, uint64_t cutoff_ns,
                        uint64_t *dropped)
{
    struct sh_lease *leases = (struct sh_lease *)sh_data(c, page);
    struct sh_slot *s = sh_slot(c, SH_SPAN_SLOT(span));
    bool left = false;
    for (uint32_t i = 0; i < c->kinds[SH_KIND_LEASES].nblocks; i++) {
        uint64_t cell = atomic_load_explicit(&leases[i].cell, ACQ);
        if (cell == 0)
            continue;
        if (atomic_load_explicit(&leases[i].made_ns, RLX) > cutoff_ns) {
            left = true;
            continue;
        }
        if (!drop_cell(c, &leases[i].cell, cell))
            continue; /* and counted by who took it */
        ++*dropped;
        atomic_store_explicit(&s->leases_taken, 1, REL);
        sh_add(&s->leases, SH_LEASE_TAKEN);
    }
    return left;
}

static enum sh_status reap_leases(struct sh_ctx *c, uint32_t page, uint64_t span,
                                  uint64_t cutoff_ns, struct sh_reaped *r)
{
    bool left = drop_leases(c, page, span, cutoff_ns, &r->leases);
    r->done = r->done && !left;
    return left ? SH_OK : free_cells(c, page, span);
}

/* Drops the leases of the living, too, that were made before the cutoff (CLOCK_MONOTONIC ns): who
 * comes with one later finds its block gone. Not while marks are in use. Cost: a walk over the span
 * records; a process's lock is kept for a page of its leases. */
enum sh_status sh_expire_leases(struct sh_ctx *c, uint64_t cutoff_ns, uint64_t *dropped,
                                uint64_t *bytes)
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span, freed = atomic_load(&c->slot->freed_bytes);
    enum sh_status status;
    *dropped = *bytes = 0;
    sh_pauses_begin(c);
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        if (SH_SPAN_STATE(span) != SH_LEASES || !sh_hold_small(c, page, &span))
            continue;
        drop_leases(c, page, span, cutoff_ns, dropped);
        sh_let_owner(c, span);
        *bytes += freed_since(c, &freed);
    }
    return status == SH_ABSENT ? sh_give_all(c) : status;
}

static enum sh_status reap_span(struct sh_ctx *c, uint32_t page, uint64_t span, bool cells,
                                uint64_t cutoff_ns, struct sh_reaped *r)
{
    uint64_t freed = atomic_load(&c->slot->freed_bytes);
    enum sh_status status = SH_OK;
    switch (SH_SPAN_STATE(span)) {
    case SH_PINS:
        if (cells)
            status = reap_pins(c, page, span, r);
        r->pin_bytes += freed_since(c, &freed);
        return status;
    case SH_LEASES:
        if (cells)
            status = reap_leases(c, page, span, cutoff_ns, r);
        r->lease_bytes += freed_since(c, &freed);
        return status;
    case SH_SMALL:
        r->spans += !cells;
        return cells ? SH_OK : end_small(c, page, span);
    case SH_RESERVED:
        r->spans += !cells;
        return cells ? SH_OK : finish_run(c, page, span);
    default:
        return SH_OK;
    }
}

/* One pass over the dead process's spans: first what it held, then what it owned. */
static enum sh_status reap_pass(struct sh_ctx *c, uint64_t owner, bool cells, uint64_t cutoff_ns,
                                struct sh_reaped *r)
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    enum sh_status status;
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        if (SH_SPAN_OWNER(span) != owner || SH_SPAN_STATE(span) == SH_FREE ||
            sh_span(c, page) != span)
            continue;
        status = reap_span(c, page, span, cells, cutoff_ns, r);
        if (status != SH_OK)
            return status;
    }
    return status == SH_ABSENT ? sh_give_all(c) : status;
}

static void fold_counters(struct sh_ctx *c, struct sh_slot *s)
{
    sh_add(&c->hdr->past_mallocs, atomic_exchange(&s->mallocs, 0));
    sh_add(&c->hdr->past_frees, atomic_exchange(&s->frees, 0));
    sh_add(&c->hdr->past_alloc_bytes, atomic_exchange(&s->alloc_bytes, 0));
    sh_add(&c->hdr->past_freed_bytes, atomic_exchange(&s->freed_bytes, 0));
    atomic_store(&s->pins, 0);
}

static enum sh_status set_state(struct sh_ctx *c, struct sh_slot *s, uint32_t state)
{
    enum sh_status status = sh_registry(c, c->patience_ms);
    if (status != SH_OK)
        return status;
    atomic_store(&s->state, state);
    sh_unlock(c, &c->hdr->registry);
    return SH_OK;
}

static void forget_waiters(struct sh_ctx *c, struct sh_slot *s)
{
    uint32_t n = atomic_exchange(&s->waiting, 0);
    if (n != 0)
        atomic_fetch_sub(&c->hdr->waiters, n);
}

/* Takes from a slot whose liveness lock is lost its pins, its spans, and its leases made before the
 * cutoff (CLOCK_MONOTONIC ns). Not while marks are in use. May be repeated until r->done. */
enum sh_status sh_reap(struct sh_ctx *c, uint32_t slot, uint64_t lease_cutoff_ns,
                       struct sh_reaped *r)
{
    struct sh_slot *s = sh_slot(c, slot);
    memset(r, 0, sizeof *r);
    if (slot == 0 || slot >= sh_slots_used(c) || !in_use(c, slot) || sh_alive(c, slot))
        return SH_OK;
    uint64_t owner = SH_OWNER(slot, atomic_load(&s->incarnation));
    r->done = true;
    recount_all(c);
    if (atomic_load(&s->ended_ns) == 0)
        atomic_store(&s->ended_ns, sh_os_now_ns());
    enum sh_status status = set_state(c, s, SH_SLOT_DEAD);
    uint64_t freed = atomic_load(&c->slot->freed_bytes);
    bury(c, slot, sh_phase(c)); /* its lock is nobody's any more */
    r->pin_bytes += freed_since(c, &freed);
    if (status == SH_OK)
        status = reap_pass(c, owner, true, lease_cutoff_ns, r);
    SH_CRASH("reap:cells");
    if (status == SH_OK)
        status = sh_handshake(c, -1); /* before anything of it is punched */
    if (status == SH_OK)
        status = reap_pass(c, owner, false, lease_cutoff_ns, r);
    if (status != SH_OK)
        return status;
    forget_waiters(c, s);
    fold_counters(c, s);
    sh_after_free(c);
    return r->done ? set_state(c, s, SH_SLOT_FREE) : SH_OK;
}

uint32_t sh_users(struct sh_ctx *c)
{
    uint32_t users = 0;
    for (uint32_t i = 1; i < sh_slots_used(c); i++)
        users += in_use(c, i);
    return users;
}

/* Without users the heap closes for ever: attaching looks at the flag under the same lock. */
enum sh_status sh_try_close(struct sh_ctx *c, bool *closed)
{
    enum sh_status status = sh_registry(c, c->patience_ms);
    *closed = false;
    if (status != SH_OK)
        return status;
    if (sh_users(c) == 0) {
        atomic_store(&c->hdr->closing, 1);
        *closed = true;
    }
    sh_unlock(c, &c->hdr->registry);
    return SH_OK;
}

/* Rule 16: every process that holds anything waits, and has seen the latest free. Whoever waits
 * without holding is refused with them. */
uint32_t sh_refuse_waiters(struct sh_ctx *c)
{
    uint32_t freed = atomic_load(&c->hdr->freed), refused = 0;
    bool all = true;
    if (sh_registry(c, c->patience_ms) != SH_OK)
        return 0;
    for (uint32_t i = 1; i < sh_slots_used(c); i++) {
        struct sh_slot *s = sh_slot(c, i);
        if (!in_use(c, i))
            continue;
        bool waits = atomic_load(&s->waiting) != 0;
        bool holds = atomic_load(&s->pins) != 0 || sh_leases(s) != 0;
        if (waits ? atomic_load(&s->wait_seen) != freed : holds)
            all = false;
        refused += waits;
    }
    for (uint32_t i = 1; all && i < sh_slots_used(c); i++)
        if (atomic_load(&sh_slot(c, i)->waiting) != 0)
            atomic_store(&sh_slot(c, i)->refused, freed + 1);
    sh_unlock(c, &c->hdr->registry);
    if (!all || refused == 0)
        return 0;
    sh_os_wake(&c->hdr->freed);
    return refused;
}

/* Stamps: when a unit was first seen idle (S2, S4) */

uint32_t sh_now_stamp(const struct sh_ctx *c)
{
    uint64_t stamp = (sh_os_now_ns() - c->hdr->created_ns) / 100000000u + 1;
    return stamp < SH_STAMP_MAX ? (uint32_t)stamp : SH_STAMP_MAX - 1;
}

static bool is_unstamped(uint32_t u)
{
    return SH_UNIT_STATE(u) == SH_UNIT_COMMITTED && SH_UNIT_STAMP(u) == 0;
}

static bool is_due(uint32_t u, uint32_t stamp_le)
{
    if (SH_UNIT_STATE(u) != SH_UNIT_COMMITTED)
        return false;
    return stamp_le == SH_STAMP_MAX || (SH_UNIT_STAMP(u) != 0 && SH_UNIT_STAMP(u) <= stamp_le);
}

static uint64_t stamp_units(struct sh_ctx *c, uint32_t page, uint32_t npages, uint32_t stamp)
{
    uint64_t unit = sh_unit_of_page(c, page), end = unit + (uint64_t)npages * sh_units_per_page(c),
             n = 0;
    for (; unit < end; unit++) {
        uint32_t u = atomic_load_explicit(sh_unit(c, unit), RLX);
        if (!is_unstamped(u))
            continue;
        atomic_store_explicit(sh_unit(c, unit), stamp << 3 | (u & 7u), RLX);
        n++;
    }
    return n;
}

/* Blocks of a small span that touch a unit: [*first, *end). */
static void blocks_of_unit(const struct sh_ctx *c, uint32_t kind, uint32_t unit, uint32_t *first,
                           uint32_t *end)
{
    const struct sh_kind *k = &c->kinds[kind];
    uint64_t from = (uint64_t)unit << c->geo.unit_shift, to = (uint64_t)(unit + 1)
                                                              << c->geo.unit_shift;
    *first = (uint32_t)(from / k->size);
    *end = (uint32_t)((to + k->size - 1) / k->size);
    *first = *first < k->nblocks ? *first : k->nblocks;
    *end = *end < k->nblocks ? *end : k->nblocks;
}

/* Makes every FREE block of a unit a HOLE. False: one lives, and all are as they were. */
static bool set_aside(_Atomic uint64_t *words, uint32_t first, uint32_t end)
{
    for (uint32_t i = first; i < end; i++) {
        uint64_t state = SH_BSTATE(atomic_load_explicit(&words[i], ACQ));
        if (state != SH_BLOCK_FREE && state != SH_BLOCK_HOLE)
            return false;
    }
    for (uint32_t i = first; i < end; i++) { /* the owner is locked out: none can come alive */
        uint64_t w = atomic_load_explicit(&words[i], ACQ);
        if (SH_BSTATE(w) == SH_BLOCK_FREE)
            atomic_compare_exchange_strong(&words[i], &w, SH_BLOCK_WORD(SH_BLOCK_HOLE, SH_GEN(w)));
    }
    return true;
}

/* Stamps the idle units of a small span. Its owner is locked out. */
static uint64_t stamp_small(struct sh_ctx *c, uint32_t page, uint64_t span, uint32_t stamp)
{
    uint32_t kind = SH_SPAN_KIND(span), first, end;
    uint32_t units = SH_SPAN_NPAGES(span) * sh_units_per_page(c);
    uint64_t base = sh_unit_of_page(c, page), n = 0;
    for (uint32_t i = 0; i < units; i++) {
        uint32_t u = atomic_load_explicit(sh_unit(c, base + i), RLX);
        if (!is_unstamped(u))
            continue;
        blocks_of_unit(c, kind, i, &first, &end);
        if (!set_aside(sh_words(c, page, c->kinds[kind].tier), first, end))
            continue;
        atomic_store_explicit(sh_unit(c, base + i), stamp << 3 | (u & 7u), REL);
        n++;
    }
    if (n != 0)
        sh_hint_remote(c, page, span);
    return n;
}

/* Locks the owner of a small span out of it: by its process lock, or by taking an orphan. False:
 * the span is not what it was. */
bool sh_hold_small(struct sh_ctx *c, uint32_t page, uint64_t *span)
{
    if (SH_SPAN_OWNER(*span) == SH_OWNER_NONE)
        return take_orphan(c, page, span);
    if (SH_SPAN_OWNER(*span) == c->owner)
        return sh_span(c, page) == *span; /* an orphan that could not be put back */
    struct sh_slot *s = sh_slot(c, SH_SPAN_SLOT(*span));
    if (sh_process_lock(c, s, c->patience_ms) != SH_OK)
        return false;
    c->held_since_ns = sh_os_now_ns();
    if (sh_span(c, page) == *span)
        return true;
    sh_process_unlock(s);
    return false;
}

/* The span is no small span any more. */
void sh_let_owner(struct sh_ctx *c, uint64_t span)
{
    if (SH_SPAN_OWNER(span) == c->owner)
        return;
    sh_process_unlock(sh_slot(c, SH_SPAN_SLOT(span)));
    sh_kept_waiting(c, c->held_since_ns);
}

void sh_let_small(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    if (SH_SPAN_OWNER(span) == c->owner)
        make_orphan(c, page, span);
    sh_let_owner(c, span);
}

/* Stamps a free run where it is, some of it at a time: it shall not look as if there were no room,
 * least of all when we die meanwhile. */
#define STAMP_PAGES 1024u

static enum sh_status stamp_free(struct sh_ctx *c, uint32_t page, uint64_t span, uint32_t stamp,
                                 uint64_t *units)
{
    bool same = true;
    for (uint32_t done = 0, n = SH_SPAN_NPAGES(span); same && done < n; done += STAMP_PAGES) {
        enum sh_status status = sh_heap_lock(c, c->patience_ms);
        if (status != SH_OK)
            return status;
        same = sh_span(c, page) == span;
        if (same)
            *units +=
                stamp_units(c, page + done, n - done < STAMP_PAGES ? n - done : STAMP_PAGES, stamp);
        sh_heap_unlock(c);
    }
    return SH_OK;
}

static bool any_unit(struct sh_ctx *c, uint32_t page, uint32_t npages, uint32_t stamp_le,
                     bool unstamped)
{
    uint64_t unit = sh_unit_of_page(c, page), end = unit + (uint64_t)npages * sh_units_per_page(c);
    for (; unit < end; unit++) {
        uint32_t u = atomic_load_explicit(sh_unit(c, unit), RLX);
        if (unstamped ? is_unstamped(u) : is_due(u, stamp_le))
            return true;
    }
    return false;
}

/* After a death between the budget and a unit's word, puts committed right if nothing moved while
 * the walk counted. Budget and word change together under a process lock, so after the handshake
 * whatever `before` counts is in the words. */
static void recount_units(struct sh_ctx *c)
{
    uint64_t before = atomic_load(&c->hdr->committed), n = 0;
    SH_CRASH("recount:begins");
    if (!c->recount_units || sh_handshake(c, -1) != SH_OK)
        return;
    uint64_t pages = atomic_load(&c->hdr->used_pages);
    if (pages > c->geo.npages)
        return;
    for (uint64_t unit = 0; unit < sh_unit_of_page(c, (uint32_t)pages); unit++) {
        uint32_t state = SH_UNIT_STATE(atomic_load_explicit(sh_unit(c, unit), RLX));
        if (state == SH_UNIT_RESERVED || state == SH_UNIT_RELEASING)
            return;
        n += state == SH_UNIT_COMMITTED;
    }
    if (atomic_compare_exchange_strong(&c->hdr->committed, &before, sh_committed_now(before, n)))
        c->recount_units = false;
}

/* Gives every idle unit that has no stamp this one. *units: how many. */
enum sh_status sh_stamp(struct sh_ctx *c, uint32_t stamp, uint64_t *units)
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    enum sh_status status;
    *units = 0;
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        if (!any_unit(c, page, SH_SPAN_NPAGES(span), 0, true))
            continue;
        if (SH_SPAN_STATE(span) == SH_FREE) {
            if ((status = stamp_free(c, page, span, stamp, units)) != SH_OK)
                return status;
        } else if (SH_SPAN_STATE(span) == SH_SMALL && sh_hold_small(c, page, &span)) {
            *units += stamp_small(c, page, span, stamp);
            sh_let_small(c, page, span);
        }
    }
    recount_units(c);
    return status == SH_ABSENT ? SH_OK : status;
}

/* Releasing */

/* Pieces of free runs that the coordinator has out of the page heap for a moment */

struct piece {
    uint32_t head, page, npages;
    uint64_t span; /* of the run that it is of */
};

struct batch {
    struct piece piece[BATCH];
    uint32_t n;
};

/* Takes those whose runs still are what they were; batch->n of them are left. */
static enum sh_status take_batch(struct sh_ctx *c, struct batch *b)
{
    uint32_t taken = 0;
    uint32_t wanted = b->n;
    enum sh_status status = sh_heap_lock(c, c->patience_ms);
    b->n = 0;
    if (status != SH_OK)
        return status;
    for (uint32_t i = 0; i < wanted; i++) {
        const struct piece p = b->piece[i];
        if (!sh_pages_take_at(c, p.head, p.span, p.page, p.npages))
            continue;
        sh_commit(&c->hdr->heap);
        sh_add(&c->hdr->borrowed_pages, p.npages);
        b->piece[taken++] = p;
    }
    b->n = taken;
    sh_heap_unlock(c);
    return SH_OK;
}

static enum sh_status give_batch(struct sh_ctx *c, struct batch *b)
{
    uint32_t pages[BATCH], n = b->n;
    for (uint32_t i = 0; i < n; i++)
        pages[i] = b->piece[i].page;
    b->n = 0;
    enum sh_status status = sh_give(c, pages, n);
    atomic_store(&c->hdr->borrowed_pages, 0);
    return status;
}

static bool claim_free_units(struct sh_ctx *c, uint32_t page, uint32_t npages, uint32_t stamp_le,
                             struct punches *p)
{
    uint64_t unit = sh_unit_of_page(c, page), end = unit + (uint64_t)npages * sh_units_per_page(c);
    for (; unit < end; unit++) {
        uint32_t u = atomic_load_explicit(sh_unit(c, unit), RLX);
        if (!is_due(u, stamp_le))
            continue;
        if (!punch_add(p, unit))
            return false;
        atomic_store_explicit(sh_unit(c, unit), SH_UNIT_RELEASING | (u & SH_UNIT_DIRTY), REL);
    }
    return true;
}

static bool all_holes(struct sh_ctx *c, uint32_t page, uint32_t kind, uint32_t unit)
{
    uint32_t first, end;
    const _Atomic uint64_t *words = sh_words(c, page, c->kinds[kind].tier);
    blocks_of_unit(c, kind, unit, &first, &end);
    for (uint32_t i = first; i < end; i++)
        if (SH_BSTATE(atomic_load_explicit(&words[i], ACQ)) != SH_BLOCK_HOLE)
            return false;
    return true;
}

/* Units inside a small span: whole OS pages between blocks that live (IN_USE_HOLE). */
static bool claim_small_units(struct sh_ctx *c, uint32_t page, uint64_t span, uint32_t stamp_le,
                              struct punches *p)
{
    uint64_t base = sh_unit_of_page(c, page);
    uint32_t units = SH_SPAN_NPAGES(span) * sh_units_per_page(c);
    if (!sh_hold_small(c, page, &span))
        return true;
    if (stamp_le == SH_STAMP_MAX)
        stamp_small(c, page, span, SH_STAMP_MAX - 1);
    bool room = true;
    for (uint32_t i = 0; i < units && room; i++) {
        uint32_t u = atomic_load_explicit(sh_unit(c, base + i), RLX);
        if (SH_UNIT_STAMP(u) == 0 || !is_due(u, stamp_le) ||
            !all_holes(c, page, SH_SPAN_KIND(span), i))
            continue;
        room = punch_add(p, base + i);
        if (room)
            atomic_store_explicit(sh_unit(c, base + i), SH_UNIT_RELEASING | (u & SH_UNIT_DIRTY),
                                  REL);
    }
    sh_let_small(c, page, span);
    return room;
}

/* Block words of pages that hold no block: whole OS pages of them go, too. */
static void release_words(struct sh_ctx *c, uint32_t page, uint32_t npages)
{
    uint64_t tiers = 0, os = 1ull << c->geo.unit_shift;
    for (uint32_t p = page; p < page + npages; p++)
        tiers |= atomic_load_explicit(&sh_page(c, p)->mark, RLX) & SH_PAGE_TIERS;
    for (uint32_t t = 0; t < SH_LARGE_TIER; t++) {
        uint64_t stride = sh_stride(c, t), from = c->geo.words[t] + page * stride;
        uint64_t to = from + npages * stride;
        from = (from + os - 1) / os * os;
        to = to / os * os;
        if (!(tiers & SH_PAGE_TIER(t)) || from >= to || sh_os_unused(c, from, to - from) != 0)
            continue;
        uint32_t first = (uint32_t)((from - c->geo.words[t] + stride - 1) / stride);
        uint32_t end = (uint32_t)((to - c->geo.words[t]) / stride);
        for (uint32_t p = first; p < end; p++)
            atomic_fetch_and_explicit(&sh_page(c, p)->mark, ~SH_PAGE_TIER(t), RLX);
    }
}

static void unclaim(struct sh_ctx *c, const struct punches *p)
{
    for (uint32_t i = 0; i < p->n; i++)
        sh_set_units(c, p->run[i].unit, p->run[i].n, SH_UNIT_COMMITTED | SH_UNIT_DIRTY);
}

/* What was claimed so far: nobody can still be looking at it after the handshake; then it goes. */
static enum sh_status release_claimed(struct sh_ctx *c, struct batch *b, struct punches *p,
                                      uint64_t *bytes, uint64_t *runs)
{
    enum sh_status status = SH_OK;
    if (p->n != 0) {
        status = sh_handshake(c, -1);
        SH_CRASH("release:claimed");
        if (status == SH_OK) {
            status = punch_all(c, p);
            *bytes += p->units << c->geo.unit_shift;
            *runs += p->n;
            for (uint32_t i = 0; i < b->n; i++)
                release_words(c, b->piece[i].page, b->piece[i].npages);
        } else {
            unclaim(c, p);
        }
    }
    enum sh_status given = give_batch(c, b);
    if (p->n != 0)
        sh_tell_waiters(c); /* room under a limit counts, too */
    p->n = 0;
    p->units = 0;
    return status == SH_OK ? given : status;
}

/* Claims the due units of the free runs in the batch. */
static enum sh_status claim_batch(struct sh_ctx *c, struct batch *b, uint32_t stamp_le,
                                  struct punches *p)
{
    enum sh_status status = take_batch(c, b);
    for (uint32_t i = 0; status == SH_OK && i < b->n; i++)
        if (!claim_free_units(c, b->piece[i].page, b->piece[i].npages, stamp_le, p))
            status = SH_NOMEM;
    return status;
}

#define RUNS_AT_ONCE 4096u
/* Out of reach of those who allocate at one moment, and punched between two handshakes: 0.8 ms. */
#define PIECE_BYTES  (4ull << 20)

struct release {
    uint32_t stamp_le;
    uint64_t max_bytes, piece_bytes, waiting; /* bytes of the pieces in the batch */
    uint64_t *bytes, *runs;
    struct batch b;
    struct punches p;
};

static enum sh_status release_batch(struct sh_ctx *c, struct release *r)
{
    enum sh_status status = claim_batch(c, &r->b, r->stamp_le, &r->p);
    r->waiting = 0;
    return status == SH_OK ? release_claimed(c, &r->b, &r->p, r->bytes, r->runs) : status;
}

/* SH_OK, also if the batch was full and is released. */
static enum sh_status release_if_full(struct sh_ctx *c, struct release *r)
{
    if (r->b.n < BATCH && r->p.n < RUNS_AT_ONCE &&
        r->waiting + (r->p.units << c->geo.unit_shift) < r->piece_bytes)
        return SH_OK;
    return release_batch(c, r);
}

/* A run that is longer than a piece goes piece by piece, each from the run that is whole again. */
static enum sh_status release_free(struct sh_ctx *c, struct release *r, uint32_t head,
                                   uint64_t span)
{
    uint32_t end = head + SH_SPAN_NPAGES(span),
             most = (uint32_t)(r->piece_bytes >> c->geo.page_shift);
    most = most ? most : 1;
    enum sh_status status = SH_OK;
    for (uint32_t at = head, n; status == SH_OK && at < end && *r->bytes < r->max_bytes; at += n) {
        n = end - at < most ? end - at : most;
        if (!any_unit(c, at, n, r->stamp_le, false))
            continue;
        r->b.piece[r->b.n++] = (struct piece){head, at, n, span};
        r->waiting += (uint64_t)n << c->geo.page_shift;
        status = n < end - head ? release_batch(c, r) : release_if_full(c, r);
    }
    return status;
}

static enum sh_status release_span(struct sh_ctx *c, struct release *r, uint32_t page,
                                   uint64_t span)
{
    if (SH_SPAN_STATE(span) == SH_FREE)
        return release_free(c, r, page, span);
    if (SH_SPAN_STATE(span) != SH_SMALL ||
        !any_unit(c, page, SH_SPAN_NPAGES(span), r->stamp_le, false))
        return SH_OK;
    return claim_small_units(c, page, span, r->stamp_le, &r->p) ? release_if_full(c, r) : SH_NOMEM;
}

/* Gives back units that are idle since a stamp in 1..stamp_le (SH_STAMP_MAX: every idle one), about
 * max_bytes a call. *from: the page at which to begin; then that at which the next call goes on, 0
 * at the end of the walk. */
enum sh_status sh_release(struct sh_ctx *c, uint32_t stamp_le, uint64_t max_bytes, uint32_t *from,
                          uint64_t *bytes, uint64_t *runs)
{
    struct sh_walk walk = {.next = *from};
    struct release r = {.stamp_le = stamp_le, .max_bytes = max_bytes, .bytes = bytes, .runs = runs};
    r.piece_bytes = max_bytes < PIECE_BYTES ? max_bytes : PIECE_BYTES;
    uint32_t page = 0;
    uint64_t span;
    enum sh_status status;
    *bytes = *runs = 0;
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        status = release_span(c, &r, page, span);
        if (status != SH_OK || *bytes >= max_bytes)
            break;
    }
    *from = status == SH_OK ? page + 1 : 0;
    if (status == SH_ABSENT)
        status = release_batch(c, &r);
    if (r.p.n != 0) { /* an error came between claiming and releasing */
        unclaim(c, &r.p);
        give_batch(c, &r.b);
    }
    free(r.p.run);
    return status;
}
