/*
 * Collections: what shared dicts (table.c) and lists (list.c) have in common.
 *
 *     holders -> collection -> body: a table, or an array -> records
 *
 * A collection is one small node that never changes place; its body is replaced as a whole when it
 * is too small. Each handle pins the body that it has seen last, so whoever reads need not fear
 * that it goes: at worst it is not the collection's any more, and that shows by one look at the
 * cell.
 *
 * Readers take their own process lock and nothing else. Who changes size or order takes the
 * collection's lock, one word as a process lock is. If its holder dies, the next one takes it, and
 * puts right what the other had half done (sh_repair). References have write orders of their own
 * (I-6), so there is nothing else to put right.
 *
 * Replacing a body: every place is frozen and copied, in slices; the new body is published by one
 * compare-and-swap; then the references of the old one are dropped, for others may have it pinned
 * for long.
 */
#include "core.h"

static uint64_t body_bytes(const struct sh_use *u)
{
    bool table = u->kind == SH_NODE_TABLE;
    uint64_t tail = table ? sizeof(struct sh_table) : sizeof(struct sh_array);
    return sizeof(struct sh_node) + 8 * u->room + tail + (table ? 8 * (u->mask + 1) : 0);
}

/* Reads once, and checks, what the body is, and how large. */
bool sh_coll_measure(struct sh_use *u)
{
    uint64_t head = atomic_load_explicit(&sh_body(u)->head, RLX);
    if (SH_NODE_KIND(head) != u->kind || !sh_node_fits(head, u->body.nbytes))
        return false;
    u->room = SH_NODE_NREFS(head);
    u->tail = &sh_body(u)->ref[u->room];
    for (u->mask = 1; u->mask + 1 < 2 * u->room;)
        u->mask = 2 * u->mask + 1;
    return body_bytes(u) <= u->body.nbytes;
}

static uint32_t body_kind(const struct sh_use *u)
{
    uint64_t head = atomic_load_explicit(&sh_coll_of(u)->head, RLX);
    return SH_NODE_KIND(head) == SH_NODE_DICT ? SH_NODE_TABLE : SH_NODE_ARRAY;
}

/* Locked. SH_SLOW: no pin is free. */
static enum sh_status see_body(struct sh_ctx *c, struct sh_use *u)
{
    struct sh_ref r;
    uint64_t cell = atomic_load_explicit(&sh_coll_of(u)->body, ACQ), again;
    if (cell == u->cell && cell != 0)
        return SH_OK;
    if (u->cell == 0)
        u->kind = body_kind(u);
    while (!sh_hold_cell(c, cell, &r)) {
        again = cell;
        cell = atomic_load_explicit(&sh_coll_of(u)->body, ACQ);
        if (cell == again)
            return sh_corrupt(c, SH_FAULT_NODE, sh_word_number(c, u->coll.word));
    }
    enum sh_status status = sh_pin(c, &r);
    if (status != SH_OK) {
        sh_count_down(c, &r, sh_phase(c));
        return status;
    }
    if (u->cell != 0)
        sh_unpin_locked(c, &u->body);
    u->body = r;
    u->cell = cell;
    return sh_coll_measure(u) ? SH_OK : sh_corrupt(c, SH_FAULT_NODE, sh_word_number(c, r.word));
}

/* Our process lock, with the body as it is now. SH_SLOW: no pin is free. */
static enum sh_status enter(struct sh_ctx *c, struct sh_use *u, int wait_ms)
{
    enum sh_status status = sh_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    status = see_body(c, u);
    if (status != SH_OK)
        sh_leave(c);
    return status;
}

/* More pins, without a lock: that may need system calls, so only who waits does it (SH_BUSY). */
static enum sh_status more_pins(struct sh_ctx *c, int wait_ms)
{
    return wait_ms == 0 ? SH_BUSY : sh_refill(c, SH_KIND_PINS, wait_ms);
}

enum sh_status sh_coll_enter(struct sh_ctx *c, struct sh_use *u, int wait_ms)
{
    enum sh_status status;
    while ((status = enter(c, u, wait_ms)) == SH_SLOW &&
           (status = more_pins(c, wait_ms)) == SH_OK) {
    }
    return status;
}

enum sh_status sh_coll_leave(struct sh_ctx *c, enum sh_status status)
{
    sh_leave(c);
    enum sh_status after = sh_after_free(c);
    return status == SH_OK ? after : status;
}

/* Leaves the process lock for a moment, in the middle of something that only we can end: also if
 * the heap was found damaged meanwhile. */
void sh_coll_breathe(struct sh_ctx *c)
{
    sh_leave(c);
    while (sh_process_lock(c, c->slot, 1000) == SH_BUSY) {
    }
}

#define MANY 100000u /* others cannot have been faster so often */

/* Whether to try once more: something was replaced while we looked at it (SH_AGAIN), or no pin is
 * free (SH_SLOW). */
bool sh_coll_again(struct sh_ctx *c, int wait_ms, enum sh_status *status, uint32_t *tries)
{
    if (*status == SH_SLOW)
        *status = more_pins(c, wait_ms);
    else if (*status == SH_AGAIN)
        *status = ++*tries < MANY ? SH_OK : sh_corrupt(c, SH_FAULT_NODE, 0);
    else
        return false;
    return *status == SH_OK;
}

static enum sh_status lock_once(struct sh_ctx *c, struct sh_use *u, sh_repair *repair, int wait_ms)
{
    uint64_t dead;
    enum sh_status status = sh_word_lock(c, &sh_coll_of(u)->lock, wait_ms, &dead);
    if (status != SH_OK)
        return status;
    SH_CRASH("coll:locked");
    status = enter(c, u, wait_ms);
    if (status != SH_OK)
        sh_word_unlock(&sh_coll_of(u)->lock, dead);
    else if (dead != 0)
        repair(c, u);
    return status;
}

/* Both locks. */
enum sh_status sh_coll_lock(struct sh_ctx *c, struct sh_use *u, sh_repair *repair, int wait_ms)
{
    enum sh_status status;
    while ((status = lock_once(c, u, repair, wait_ms)) == SH_SLOW &&
           (status = more_pins(c, wait_ms)) == SH_OK) {
    }
    return status;
}

/* Leaves both. */
enum sh_status sh_coll_done(struct sh_ctx *c, struct sh_use *u, enum sh_status status)
{
    sh_leave(c);
    sh_word_unlock(&sh_coll_of(u)->lock, 0);
    enum sh_status after = sh_after_free(c);
    return status == SH_OK ? after : status;
}

/* The body that we have seen is still the collection's. */
bool sh_coll_current(const struct sh_use *u)
{
    return atomic_load_explicit(&sh_coll_of(u)->body, ACQ) == u->cell;
}

void sh_coll_changed(struct sh_use *u)
{
    sh_bump(&sh_coll_of(u)->stamp, 1);
}

/* Makes a collection with an empty body. */
static enum sh_status try_new(struct sh_ctx *c, uint32_t kind, struct sh_ref *body, int wait_ms,
                              struct sh_ref *r)
{
    enum sh_status status =
        sh_node_new(c, kind, 1, sizeof(struct sh_coll) - sizeof(struct sh_node) - 8, wait_ms, r);
    if (status != SH_OK)
        return status;
    do
        status = sh_node_store(c, r, 0, body, 1000);
    while (status == SH_BUSY);
    return status;
}

enum sh_status sh_coll_new(struct sh_ctx *c, uint32_t kind, struct sh_ref *body, int wait_ms,
                           struct sh_ref *r)
{
    enum sh_status status = try_new(c, kind, body, wait_ms, r), dropped;
    do
        dropped = sh_unpin(c, body, 1000);
    while (dropped == SH_BUSY);
    return status;
}

/* The handle goes: it lets go of the body. */
enum sh_status sh_use_end(struct sh_ctx *c, struct sh_use *u, int wait_ms)
{
    if (u->cell == 0)
        return SH_OK;
    enum sh_status status = sh_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    sh_unpin_locked(c, &u->body);
    u->cell = 0;
    return sh_coll_leave(c, SH_OK);
}

/* The lock that users have: 0 not now, 1 ours, 2 ours and who had it died. */
int sh_coll_try(struct sh_ctx *c, struct sh_use *u)
{
    return sh_word_try(c, &sh_coll_of(u)->held);
}

bool sh_coll_let(struct sh_ctx *c, struct sh_use *u)
{
    return sh_word_let(c, &sh_coll_of(u)->held);
}

/* The entries of a table at this moment, for whom its lock is not needed. */
uint64_t sh_coll_live(const struct sh_use *u)
{
    uint64_t live = atomic_load_explicit(&((struct sh_table *)u->tail)->live, ACQ);
    uint64_t at = SH_HI(live), words = (u->body.nbytes - sizeof(struct sh_node)) / 8;
    if (at == 0 || at > words)
        return SH_LO(live);
    uint64_t word = atomic_load_explicit(&sh_body(u)->ref[at - 1], ACQ);
    return SH_LO(live) + ((word & ~SH_REF_FROZEN) != 0);
}

enum sh_status sh_coll_size(struct sh_ctx *c, struct sh_use *u, int wait_ms, uint64_t *n,
                            uint64_t *stamp)
{
    enum sh_status status = sh_coll_enter(c, u, wait_ms);
    if (status != SH_OK)
        return status;
    *n = u->kind == SH_NODE_TABLE ? sh_coll_live(u)
                                  : atomic_load_explicit(&((struct sh_array *)u->tail)->len, ACQ);
    *stamp = atomic_load_explicit(&sh_coll_of(u)->stamp, ACQ);
    return sh_coll_leave(c, SH_OK);
}

/* Another body */

/* From now on a place is read, and not changed by anybody but the holder of the lock. What it
 * holds. */
uint64_t sh_freeze(_Atomic uint64_t *place)
{
    return atomic_fetch_or_explicit(place, SH_REF_FROZEN, ACQR) & ~SH_REF_FROZEN;
}

/* The next body was not published: its maker died. */
void sh_thaw(struct sh_use *u)
{
    for (uint64_t i = 0; i < u->room; i++)
        if (atomic_load_explicit(&sh_body(u)->ref[i], RLX) & SH_REF_FROZEN)
            atomic_fetch_and_explicit(&sh_body(u)->ref[i], ~SH_REF_FROZEN, ACQR);
}

/* The collection's body is another one from now on, which we have pinned; *body is the old one,
 * with our pin. Both locks are held. */
void sh_coll_publish(struct sh_ctx *c, struct sh_use *u, struct sh_ref *body)
{
    uint64_t cell = sh_cell_of(c, body);
    struct sh_ref old = u->body;
    sh_count_up(body->word, body->gen, sh_phase(c)); /* our pin keeps it */
    SH_CRASH("coll:counted");
    sh_swap_ref(c, &sh_coll_of(u)->body, u->cell, cell); /* nobody else changes it */
    SH_CRASH("coll:published");
    u->body = *body;
    u->cell = cell;
    sh_coll_measure(u);
    sh_coll_changed(u);
    *body = old;
}

#define SLICE 128u

/* Drops the references of a body that is no collection's any more, and our pin. */
enum sh_status sh_coll_retire(struct sh_ctx *c, struct sh_ref *body, int wait_ms)
{
    struct sh_node *n = (struct sh_node *)body->data;
    uint32_t nrefs = SH_NODE_NREFS(atomic_load_explicit(&n->head, RLX));
    bool others = SH_COUNT(atomic_load_explicit(body->word, RLX)) != 1;
    for (uint32_t i = 0; others && i < nrefs;) {
        if (sh_enter(c, wait_ms) != SH_OK)
            break; /* it goes with its last pin, then */
        for (uint32_t end = i + SLICE; i < end && i < nrefs; i++)
            sh_swap_ref(c, &n->ref[i], atomic_load_explicit(&n->ref[i], ACQ), 0);
        sh_coll_leave(c, SH_OK);
    }
    enum sh_status status;
    do
        status = sh_unpin(c, body, 1000);
    while (status == SH_BUSY);
    return status;
}
