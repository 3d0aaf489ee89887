/*
 * What users do with blocks: allocate, drop, hand over.
 *
 *     alloc    bitmap -> CAS FREE -> LIVE count 1 -> pin
 *     drop     (touch) -> pin cleared -> CAS count 1 -> FREE, next generation -> back into a bitmap
 *
 * An operation holds its own process's lock from reading the phase to its last step (rule 4), and
 * no other lock. A large block's pages go back after the lock is left, and so do the references of
 * a node (drop.c).
 */
#include "core.h"

#include <string.h>

/* Pins (I-7). Locked by the process lock */

enum sh_status sh_pin(struct sh_ctx *c, struct sh_ref *r)
{
    struct sh_pspan *s;
    int64_t index = sh_pspan_pop(c, SH_KIND_PINS, &s);
    if (index < 0)
        return SH_SLOW;
    r->pin = s->number << (c->geo.page_shift - 3) | (uint32_t)index;
    atomic_store_explicit(sh_pin_cell(c, r->pin), SH_PIN_CELL(sh_word_number(c, r->word), r->gen),
                          REL);
    sh_bump(&c->slot->pins, 1);
    return SH_OK;
}

void sh_pin_clear(struct sh_ctx *c, uint32_t pin)
{
    atomic_store_explicit(sh_pin_cell(c, pin), 0, REL);
}

void sh_pin_free(struct sh_ctx *c, uint32_t pin)
{
    uint32_t shift = c->geo.page_shift - 3;
    sh_bump(&c->slot->pins, (uint64_t)-1);
    sh_pspan_push(c, c->pin_spans[pin >> shift], pin & ((1u << shift) - 1));
}

static bool pins_left(struct sh_ctx *c)
{
    return sh_pspan_any(c, SH_KIND_PINS);
}

/* Allocation */

/* What a block is to be: `head` is that of a node, 0 of a leaf. */

/* A node is one before it lives: a death after that drops what it says that it holds. */
static void make_node(uint8_t *data, uint64_t nbytes, uint64_t head)
{
    memset(data, 0, nbytes);
    atomic_store_explicit(&((struct sh_node *)data)->head, head, RLX);
}

/* Makes a FREE block of a span of ours LIVE, count 1. False: the hint was wrong. */
static inline bool come_alive(struct sh_ctx *c, const struct sh_kind *k, uint64_t head,
                              struct sh_ref *r)
{
    uint64_t w = atomic_load_explicit(r->word, ACQ), padding = k->size - r->nbytes;
    if (SH_BSTATE(w) != SH_BLOCK_FREE || SH_GEN(w) == SH_GEN_MAX)
        return false;
    uint64_t new = SH_BLOCK_WORD(SH_BLOCK_LIVE, SH_GEN(w)) | SH_COUNT_ONE;
    if (padding != 0) {
        sh_write_padding(r->data + k->size, padding);
        new |= SH_PADDED;
    }
    if (head != 0) {
        make_node(r->data, r->nbytes, head);
        new |= SH_NODE;
    }
    r->gen = SH_GEN(w);
    return atomic_compare_exchange_strong_explicit(r->word, &w, sh_touched(new, sh_phase(c)), ACQR,
                                                   RLX);
}

/* A block of the class, LIVE with count 1, for which the caller writes a holder before it leaves
 * the lock. SH_SLOW: none is known to be free. Locked. */
static inline enum sh_status take(struct sh_ctx *c, uint32_t kind, uint64_t nbytes, uint64_t head,
                                  struct sh_ref *r)
{
    const struct sh_kind *k = &c->kinds[kind];
    struct sh_pspan *s;
    int64_t index;
    while ((index = sh_pspan_pop(c, kind, &s)) >= 0) {
        r->word = sh_words(c, s->page, k->tier) + index;
        r->data = sh_data(c, s->page) + (uint64_t)index * k->size;
        r->nbytes = nbytes;
        if (!come_alive(c, k, head, r))
            continue;
        r->page = s->page;
        r->kind = kind;
        sh_bump(&c->slot->mallocs, 1);
        sh_bump(&c->slot->alloc_bytes, nbytes);
        return SH_OK;
    }
    return SH_SLOW;
}

enum sh_status sh_take(struct sh_ctx *c, uint64_t nbytes, uint64_t head, struct sh_ref *r)
{
    return take(c, sh_class_of((uint32_t)nbytes), nbytes, head, r);
}

static inline enum sh_status alloc_fast(struct sh_ctx *c, uint32_t kind, uint64_t nbytes,
                                        uint64_t head, struct sh_ref *r)
{
    enum sh_status status = sh_enter(c, 0);
    if (status != SH_OK)
        return status;
    status = pins_left(c) ? take(c, kind, nbytes, head, r) : SH_SLOW;
    if (status == SH_OK)
        status = sh_pin(c, r);
    sh_leave(c);
    return status;
}

/* A leaf of the class, pinned. SH_SLOW: no block or no pin is known to be free. The caller zeroes.
 * Cost: the process lock, one compare-and-swap, one store. */
enum sh_status sh_alloc_fast(struct sh_ctx *c, uint32_t kind, uint64_t nbytes, struct sh_ref *r)
{
    return alloc_fast(c, kind, nbytes, 0, r);
}

static enum sh_status alloc_small(struct sh_ctx *c, uint64_t nbytes, uint64_t head, bool zero,
                                  int wait_ms, struct sh_ref *r)
{
    uint32_t kind = sh_class_of((uint32_t)nbytes);
    enum sh_status status;
    while ((status = alloc_fast(c, kind, nbytes, head, r)) == SH_SLOW || status == SH_BUSY) {
        status = sh_refill(c, SH_KIND_PINS, wait_ms);
        if (status == SH_OK)
            status = sh_refill(c, kind, wait_ms);
        if (status != SH_OK)
            return status;
    }
    if (status == SH_OK && zero)
        memset(r->data, 0, nbytes);
    return status;
}

/* Zeroes what may hold old bytes, runs at a time, and says that from now on all of it may. */
static void clean_units(struct sh_ctx *c, uint32_t page, uint32_t npages, bool zero)
{
    uint64_t unit = sh_unit_of_page(c, page), end = unit + (uint64_t)npages * sh_units_per_page(c);
    if (!zero && sh_units_steady(c, unit, end - unit))
        return;
    while (unit < end) {
        uint64_t first = unit;
        while (unit < end && atomic_load_explicit(sh_unit(c, unit), RLX) & SH_UNIT_DIRTY)
            unit++;
        if (zero && unit > first)
            memset(c->base + c->geo.data + (first << c->geo.unit_shift), 0,
                   (unit - first) << c->geo.unit_shift);
        for (; unit < end && !(atomic_load_explicit(sh_unit(c, unit), RLX) & SH_UNIT_DIRTY); unit++)
            atomic_store_explicit(sh_unit(c, unit), SH_UNIT_COMMITTED | SH_UNIT_DIRTY, RLX);
    }
}

/* The run becomes a block, and ours, in one section under the process lock. The word first: where a
 * span is LARGE and its word is not LIVE, a block is being freed, or a death has left it so. */
static enum sh_status publish_large(struct sh_ctx *c, uint32_t page, uint32_t npages,
                                    uint64_t nbytes, uint64_t head, struct sh_ref *r)
{
    enum sh_status status = sh_enter(c, 60000);
    if (status != SH_OK)
        return status;
    if (!pins_left(c)) {
        sh_leave(c);
        return SH_SLOW;
    }
    uint64_t span = SH_SPAN(SH_LARGE, SH_KIND_LARGE, 0, npages);
    sh_fill_ref(c, r, page, span, 0);
    r->gen = atomic_load_explicit(&sh_page(c, page)->mark, RLX) & SH_GEN_MAX;
    r->nbytes = nbytes;
    atomic_store_explicit(&sh_page(c, page)->link, nbytes, RLX);
    atomic_store_explicit(&sh_page(c, page)->head, SH_PAIR(page, 0), RLX);
    uint64_t w = SH_BLOCK_WORD(SH_BLOCK_LIVE, r->gen) | SH_COUNT_ONE | (head ? SH_NODE : 0);
    if (head != 0) /* zeroed by clean_units */
        atomic_store_explicit(&((struct sh_node *)r->data)->head, head, RLX);
    atomic_store_explicit(r->word, sh_touched(w, sh_phase(c)), REL);
    sh_set_span(c, page, span);
    status = sh_pin(c, r);
    sh_bump(&c->slot->mallocs, 1);
    sh_bump(&c->slot->alloc_bytes, nbytes);
    sh_leave(c);
    return status;
}

static enum sh_status take_large(struct sh_ctx *c, uint32_t npages, int wait_ms, uint32_t *page)
{
    for (;;) {
        enum sh_status status = sh_pages_take(c, npages, wait_ms, page);
        if (status != SH_OK)
            return status;
        if ((atomic_load_explicit(&sh_page(c, *page)->mark, RLX) & SH_GEN_MAX) == SH_GEN_MAX) {
            sh_set_span(c, *page, SH_SPAN(SH_RETIRED, 0, 0, npages));
            continue;
        }
        status = sh_pages_commit(c, *page, npages);
        if (status != SH_OK)
            sh_pages_give(c, page, 1, 60000);
        return status;
    }
}

static enum sh_status alloc_large(struct sh_ctx *c, uint64_t nbytes, uint64_t head, bool zero,
                                  int wait_ms, struct sh_ref *r)
{
    uint64_t npages = (nbytes + (1ull << c->geo.page_shift) - 1) >> c->geo.page_shift;
    uint32_t page;
    if (npages > c->geo.npages)
        return SH_FULL;
    enum sh_status status = take_large(c, (uint32_t)npages, wait_ms, &page);
    if (status != SH_OK)
        return status;
    SH_CRASH("large:committed");
    clean_units(c, page, (uint32_t)npages, zero);
    do {
        status = sh_refill(c, SH_KIND_PINS, 60000);
        if (status == SH_OK)
            status = publish_large(c, page, (uint32_t)npages, nbytes, head, r);
    } while (status == SH_SLOW);
    if (status != SH_OK)
        sh_pages_give(c, &page, 1, 60000);
    return status;
}

static enum sh_status alloc(struct sh_ctx *c, uint64_t nbytes, uint64_t head, bool zero,
                            int wait_ms, struct sh_ref *r)
{
    enum sh_status status = nbytes <= SH_MAX_SMALL ? alloc_small(c, nbytes, head, zero, wait_ms, r)
                                                   : alloc_large(c, nbytes, head, zero, wait_ms, r);
    if (c->ndeferred != 0)
        sh_flush(c, 0);
    return status;
}

/* A block of nbytes > 0, pinned. SH_BUSY: nothing happened. Cost: sh_alloc_fast, or, where no free
 * block is known, the heap lock and perhaps system calls. */
enum sh_status sh_alloc(struct sh_ctx *c, uint64_t nbytes, bool zero, int wait_ms, struct sh_ref *r)
{
    return alloc(c, nbytes, 0, zero, wait_ms, r);
}

/* The same of a node: nrefs references, and `more` bytes behind them, all 0. */
enum sh_status sh_node_new(struct sh_ctx *c, uint32_t kind, uint32_t nrefs, uint64_t more,
                           int wait_ms, struct sh_ref *r)
{
    uint64_t nbytes = sizeof(struct sh_node) + 8ull * nrefs + more;
    return alloc(c, nbytes, SH_NODE_HEAD(kind, nrefs), nbytes > SH_MAX_SMALL, wait_ms, r);
}

/* Dropping */

void sh_unpin_locked(struct sh_ctx *c, const struct sh_ref *r)
{
    uint32_t phase = sh_phase(c);
    if (sh_phase_of(phase) != SH_IDLE)
        sh_touch(r->word, r->gen, phase);
#ifndef SH_I6_REVERSED /* the wrong order: a negative control of tools/killpoints.py */
    sh_pin_clear(c, r->pin);
#endif
    sh_count_down(c, r, phase);
#ifdef SH_I6_REVERSED
    sh_pin_clear(c, r->pin);
#endif
    sh_pin_free(c, r->pin);
}

/* Drops a pin, and frees the block if it was the last hold. SH_DEFERRED: done, call sh_flush. Cost:
 * the process lock and one compare-and-swap; a large block also the heap lock. */
enum sh_status sh_unpin(struct sh_ctx *c, struct sh_ref *r, int wait_ms)
{
    enum sh_status status = sh_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    sh_unpin_locked(c, r);
    sh_leave(c);
    return sh_after_free(c);
}

/* Handles */

enum sh_status sh_enter_with_pin(struct sh_ctx *c, int wait_ms)
{
    for (;;) {
        enum sh_status status = sh_refill(c, SH_KIND_PINS, wait_ms);
        if (status == SH_OK)
            status = sh_enter(c, wait_ms);
        if (status != SH_OK || pins_left(c))
            return status;
        sh_leave(c);
    }
}

/* A second pin on a block that we hold. */
enum sh_status sh_repin(struct sh_ctx *c, const struct sh_ref *r, int wait_ms, struct sh_ref *out)
{
    enum sh_status status = sh_enter_with_pin(c, wait_ms);
    if (status != SH_OK)
        return status;
    *out = *r;
    status = sh_count_up(r->word, r->gen, sh_phase(c)) ? sh_pin(c, out) : SH_STALE;
    sh_leave(c);
    return status;
}

/* Rule 8: count up, write the lease; only then may the bytes be given out. */
enum sh_status sh_lease_make(struct sh_ctx *c, const struct sh_ref *r, int wait_ms,
                             uint64_t *cell_off, uint32_t *seq)
{
    enum sh_status status = sh_refill(c, SH_KIND_LEASES, wait_ms);
    if (status == SH_OK)
        status = sh_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    struct sh_pspan *s;
    int64_t index = sh_pspan_pop(c, SH_KIND_LEASES, &s);
    if (index < 0) {
        sh_leave(c);
        return SH_BUSY;
    }
    struct sh_lease *lease = (struct sh_lease *)sh_data(c, s->page) + index;
    if (sh_count_up(r->word, r->gen, sh_phase(c))) {
        c->lease_seq = (c->lease_seq + 1) & SH_CELL_LOW_MASK;
        atomic_store_explicit(&lease->made_ns, sh_os_now_ns(), RLX);
        atomic_store_explicit(&lease->cell, SH_LEASE_CELL(sh_word_number(c, r->word), c->lease_seq),
                              REL);
        sh_add(&c->slot->leases, SH_LEASE_MADE);
        *cell_off = (uint64_t)((uint8_t *)lease - c->base) - c->geo.data;
        *seq = c->lease_seq;
    } else {
        sh_pspan_push(c, s, (uint32_t)index);
        status = SH_STALE;
    }
    sh_leave(c);
    return status;
}

/* The lease that a handle names, if it is still there, and the slot of its owner. */
static struct sh_lease *find_lease(struct sh_ctx *c, uint64_t cell_off, uint32_t *slot)
{
    if (cell_off % sizeof(struct sh_lease) != 0 || cell_off >= c->geo.capacity ||
        !sh_page_in_use(c, cell_off >> c->geo.page_shift))
        return NULL;
    uint64_t span = sh_span(c, (uint32_t)(cell_off >> c->geo.page_shift));
    if (SH_SPAN_STATE(span) != SH_LEASES)
        return NULL;
    *slot = SH_SPAN_SLOT(span);
    return (struct sh_lease *)(c->base + c->geo.data + cell_off);
}

/* The lease may be gone, and its page another span's by now, but not punched, for that would wait
 * for our lock. What stands there then is not what we look for: a race by design, which the thread
 * sanitizer shall not see. */
__attribute__((no_sanitize("thread"))) static uint64_t peek(const struct sh_lease *lease)
{
    return atomic_load_explicit(&lease->cell, ACQ);
}

/* The owner of a lease's cell learns that it may be used again. The span may be somebody else's by
 * now: nothing but the lease kept it. */
static void lease_taken(struct sh_ctx *c, uint32_t slot)
{
    struct sh_slot *s = sh_slot(c, slot);
    atomic_store_explicit(&s->leases_taken, 1, REL);
    sh_add(&s->leases, SH_LEASE_TAKEN);
}

/* Takes the lease by compare-and-swap, only after it was seen and its block touched: taking one
 * that appeared in between left a count too low (found by the model). */
static bool take_lease(struct sh_ctx *c, const struct sh_ref *r, uint64_t cell_off, uint32_t seq)
{
    uint32_t owner, phase = sh_phase(c);
    struct sh_lease *lease = find_lease(c, cell_off, &owner);
    uint64_t cell = SH_LEASE_CELL(sh_word_number(c, r->word), seq);
    if (lease == NULL || peek(lease) != cell)
        return false;
    if (!sh_is_live(atomic_load_explicit(r->word, ACQ), r->gen))
        return false; /* another block's lease, whose number came round to this one's */
    sh_touch(r->word, r->gen, phase);
    if (!atomic_compare_exchange_strong_explicit(&lease->cell, &cell, 0, ACQR, ACQ))
        return false;
    SH_CRASH("lease:taken");
    lease_taken(c, owner);
    return true;
}

/* The collection that our phase is one of is over, or was given up, and we missed its end: nobody
 * is condemned, for no other begins before it was in our phase that there is none. */
static bool missed_the_end(const struct sh_ctx *c)
{
    return sh_phase_of(atomic_load_explicit(&c->hdr->phase, ACQ)) == SH_IDLE;
}

/* Rule 8 without a lease: only a block that is not condemned may be pinned again. */
static enum sh_status resurrect(const struct sh_ctx *c, const struct sh_ref *r, uint32_t phase)
{
    uint64_t w = atomic_load_explicit(r->word, ACQ);
    uint32_t p = missed_the_end(c) ? SH_IDLE : sh_phase_of(phase);
    if (!sh_is_live(w, r->gen))
        return SH_STALE;
    if (p == SH_FINAL)
        return SH_AGAIN;
    if (p == SH_SWEEP && sh_is_condemned(w, phase))
        return SH_STALE;
    return sh_count_up(r->word, r->gen, phase) ? SH_OK : SH_STALE;
}

/* In FINAL: the collector is about to decide. */
static void await_verdict(struct sh_ctx *c)
{
    if (!sh_alive(c, 0))
        c->ring = true; /* it died: its successor starts again */
    sh_os_nap(200000);
}

/* A handle that came from elsewhere becomes a pin of ours. SH_STALE, or SH_AGAIN in FINAL. */
enum sh_status sh_adopt(struct sh_ctx *c, uint64_t data_off, uint64_t gen, uint64_t cell_off,
                        uint32_t seq, int wait_ms, struct sh_ref *r)
{
    enum sh_status status = sh_enter_with_pin(c, wait_ms);
    if (status != SH_OK)
        return status;
    r->gen = gen;
    if (!sh_locate_data(c, data_off, r))
        status = SH_STALE;
    else if (!take_lease(c, r, cell_off, seq))
        status = resurrect(c, r, sh_phase(c));
    if (status == SH_OK) {
        r->nbytes = sh_block_bytes(c, r, atomic_load_explicit(r->word, ACQ));
        status = sh_pin(c, r);
    }
    sh_leave(c);
    if (status == SH_AGAIN)
        await_verdict(c);
    return status;
}

/* The leaf that has these bytes of the data area, if there is one now. */
static bool find_bytes(const struct sh_ctx *c, uint64_t off, uint64_t nbytes, struct sh_ref *r)
{
    if (!sh_locate_inside(c, off, r))
        return false;
    uint64_t w = atomic_load_explicit(r->word, ACQ), inside = off - sh_data_offset(c, r);
    r->gen = SH_GEN(w);
    r->nbytes = sh_block_bytes(c, r, w);
    return SH_BSTATE(w) == SH_BLOCK_LIVE && !(w & SH_NODE) && inside < r->nbytes &&
           nbytes <= r->nbytes - inside;
}

/* A pin on the leaf that has these bytes of the data area, for who knows it by no handle. SH_STALE:
 * none has. Looks again once it is counted: if nobody held it, it may have gone meanwhile, and its
 * pages be another span's. */
enum sh_status sh_block_at(struct sh_ctx *c, uint64_t off, uint64_t nbytes, int wait_ms,
                           struct sh_ref *r)
{
    enum sh_status status = sh_enter_with_pin(c, wait_ms);
    if (status != SH_OK)
        return status;
    struct sh_ref found;
    status = find_bytes(c, off, nbytes, &found) ? resurrect(c, &found, sh_phase(c)) : SH_STALE;
    if (status == SH_OK) {
        bool still = find_bytes(c, off, nbytes, r) && r->word == found.word && r->gen == found.gen;
        status = still ? sh_pin(c, r) : SH_STALE;
        if (!still)
            sh_count_down(c, &found, sh_phase(c));
    }
    sh_leave(c);
    if (status == SH_AGAIN)
        await_verdict(c);
    return status;
}

/* A lease of ours is not needed after all. SH_STALE: somebody took it. */
enum sh_status sh_lease_drop(struct sh_ctx *c, uint64_t data_off, uint64_t gen, uint64_t cell_off,
                             uint32_t seq, int wait_ms)
{
    struct sh_ref r = {.gen = gen};
    enum sh_status status = sh_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    status = SH_STALE;
    if (sh_locate_data(c, data_off, &r)) {
        uint64_t w = atomic_load_explicit(r.word, ACQ); /* the lease, if it is there, keeps it so */
        r.nbytes = sh_block_bytes(c, &r, w);
        if (take_lease(c, &r, cell_off, seq)) {
            status = SH_OK;
            sh_count_down(c, &r, sh_phase(c));
        }
    }
    sh_leave(c);
    return status == SH_OK ? sh_after_free(c) : status;
}

/* Waiting (rule 16) */

/* A thread begins or ends to wait for memory. Begins: before it reads hdr.freed and tries again.
 * The sum in the header errs on the high side: too low, and a waiter would not be woken. */
void sh_waiting(struct sh_ctx *c, bool begins)
{
    if (begins) {
        atomic_fetch_add(&c->hdr->waiters, 1);
        SH_CRASH("wait:counted");
        if (atomic_fetch_add(&c->slot->waiting, 1) == 0)
            atomic_store(&c->slot->refused, 0);
    } else {
        atomic_fetch_sub(&c->slot->waiting, 1);
        SH_CRASH("wait:counted");
        atomic_fetch_sub(&c->hdr->waiters, 1);
    }
}

/* Sleeps until memory was freed after `seen` was read from hdr.freed. SH_OK: try again. SH_REFUSED:
 * nobody can free any. */
enum sh_status sh_wait_memory(struct sh_ctx *c, uint32_t seen, int wait_ms)
{
    atomic_store(&c->slot->wait_seen, seen);
    int error = 0;
    if (atomic_load(&c->slot->refused) != seen + 1)
        error = sh_os_wait(&c->hdr->freed, seen, wait_ms);
    if (atomic_load(&c->slot->refused) == seen + 1)
        return SH_REFUSED;
    return error == 0 ? SH_OK : SH_TIMEOUT;
}
