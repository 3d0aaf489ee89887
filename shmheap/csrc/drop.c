/*
 * A hold on a block goes, and with the last one the block (rules 2, 5 and 9).
 *
 *     leaf   LIVE count 1 -> FREE, next generation -> back into a bitmap
 *     node   LIVE count 1 -> DYING by our slot -> in the slot's list -> its references are dropped,
 *            the last one first -> FREE
 *
 * However much hangs on a node, nothing is recursive and no lock is held for long: a node that dies
 * goes into its slot's list, and the list is worked off in slices. A node that is on its way into
 * the list or out of it is named in slot.transit, so that a death loses none: who comes next
 * (settle) sees by the node itself how far it had come.
 *
 * Only the slot that a DYING word names changes the node; the coordinator does if that one is dead.
 */
#include "core.h"

static struct sh_node *node_of(const struct sh_ref *r)
{
    return (struct sh_node *)r->data;
}

/* We made the block FREE: find it a place where it is found again. Locked. */
void sh_block_freed(struct sh_ctx *c, const struct sh_ref *r)
{
    uint64_t span = sh_span(c, r->page);
    if (r->kind != SH_KIND_LARGE) {
        sh_span_freed(c, r->page, span, r->word);
    } else if (SH_SPAN_STATE(span) != SH_LARGE) {
        sh_corrupt(c, SH_FAULT_SPAN, r->page);
    } else {
        uint64_t mark = atomic_load_explicit(&sh_page(c, r->page)->mark, RLX);
        uint64_t gen = SH_GEN(atomic_load_explicit(r->word, RLX));
        atomic_store_explicit(&sh_page(c, r->page)->mark, (mark & SH_PAGE_TIERS) | gen, RLX);
        sh_set_span(c, r->page, SH_SPAN(SH_RESERVED, 0, c->owner, SH_SPAN_NPAGES(span)));
        sh_defer(c, r->page);
    }
    if (c->slot != NULL) {
        sh_bump(&c->slot->frees, 1);
        sh_bump(&c->slot->freed_bytes, r->nbytes);
    }
    if (atomic_load_explicit(&c->hdr->waiters, memory_order_seq_cst) != 0)
        c->ring_waiters = true;
}

/* Nodes that are dying */

static bool is_dying_by(const struct sh_ctx *c, uint64_t number, uint32_t slot, struct sh_ref *r)
{
    if (!sh_locate(c, number, r))
        return false;
    uint64_t w = atomic_load_explicit(r->word, ACQ);
    r->gen = SH_GEN(w);
    r->nbytes = sh_block_bytes(c, r, w);
    return SH_BSTATE(w) == SH_BLOCK_DYING && SH_COUNT(w) == slot;
}

/* The last step. Only a mark can come in between. */
static void end_death(struct sh_ctx *c, const struct sh_ref *r)
{
    uint64_t w = atomic_load_explicit(r->word, ACQ);
    while (!atomic_compare_exchange_weak_explicit(r->word, &w, SH_BLOCK_WORD(SH_BLOCK_FREE, r->gen),
                                                  ACQR, ACQ)) {
    }
    sh_block_freed(c, r);
}

/* The node that is on its way gets there: without references it ends, with some it is in the list.
 */
static void settle(struct sh_ctx *c, uint32_t slot)
{
    struct sh_slot *s = sh_slot(c, slot);
    struct sh_ref r;
    uint64_t number = atomic_load_explicit(&s->transit, RLX);
    uint64_t first = atomic_load_explicit(&s->dying, RLX);
    if (number == 0)
        return;
    if (is_dying_by(c, number, slot, &r)) {
        struct sh_node *n = node_of(&r);
        if (SH_NODE_NREFS(atomic_load_explicit(&n->head, RLX)) == 0) {
            if (first == number)
                atomic_store_explicit(&s->dying, atomic_load_explicit(&n->next, RLX), REL);
            SH_CRASH("node:unlisted");
            end_death(c, &r);
        } else if (first != number) {
            atomic_store_explicit(&n->next, first, RLX);
            atomic_store_explicit(&s->dying, number, REL);
        }
    }
    SH_CRASH("node:settled");
    atomic_store_explicit(&s->transit, 0, REL);
}

/* The block's life ends, if its word is still *w: a leaf is FREE at once, and its caller's to put
 * into a bitmap (sh_block_freed); a node is DYING, and ours to work off. Locked. */
bool sh_end_life(struct sh_ctx *c, const struct sh_ref *r, uint64_t *w)
{
    uint64_t gen = SH_GEN(*w) + 1;
    if (!(*w & SH_NODE))
        return atomic_compare_exchange_weak_explicit(r->word, w, SH_BLOCK_WORD(SH_BLOCK_FREE, gen),
                                                     ACQR, ACQ);
    uint64_t dying = SH_BLOCK_WORD(SH_BLOCK_DYING, gen) | (*w & (SH_NODE | SH_PADDED)) |
                     (uint64_t)c->slot_index << SH_COUNT_SHIFT;
    atomic_store_explicit(&c->slot->transit, sh_word_number(c, r->word), REL);
    bool ended = atomic_compare_exchange_weak_explicit(r->word, w, dying, ACQR, ACQ);
    SH_CRASH("node:dying");
    if (ended)
        settle(c, c->slot_index);
    else
        atomic_store_explicit(&c->slot->transit, 0, REL);
    return ended;
}

/* Rules 2 and 5. The holder was cleared before. SH_FREED: it was the last one, and the block's life
 * is over. Locked. */
enum sh_drop sh_count_down(struct sh_ctx *c, const struct sh_ref *r, uint32_t phase)
{
    uint64_t w = atomic_load_explicit(r->word, ACQ);
    for (;;) {
        if (!sh_is_live(w, r->gen) || SH_COUNT(w) == 0)
            return SH_GONE;
        if (SH_COUNT(w) == 1) {
            bool leaf = !(w & SH_NODE);
            if (!sh_end_life(c, r, &w))
                continue;
            if (leaf)
                sh_block_freed(c, r);
            return SH_FREED;
        }
        uint64_t less = SH_COUNT(w) == SH_COUNT_MAX ? w : w - SH_COUNT_ONE;
        if (atomic_compare_exchange_weak_explicit(r->word, &w, sh_touched(less, phase), ACQR, ACQ))
            return SH_DROPPED;
    }
}

/* The last reference of a dying node goes (rules 6 and 9). */
static void drop_last(struct sh_ctx *c, struct sh_node *n, uint64_t head, uint32_t phase)
{
    uint32_t last = SH_NODE_NREFS(head) - 1;
    struct sh_ref r;
    bool held = sh_find_cell(c, atomic_load_explicit(&n->ref[last], RLX), &r);
    if (held)
        sh_touch(r.word, r.gen, phase);
    atomic_store_explicit(&n->ref[last], 0, REL);
    atomic_store_explicit(&n->head, SH_NODE_HEAD(SH_NODE_KIND(head), last), REL);
    SH_CRASH("node:cleared");
    if (held)
        sh_count_down(c, &r, phase);
}

/* Works off what is dying by a slot: about n references of it. Its lock is held, or it is dead and
 * we are the coordinator. True: there is more. */
bool sh_bury(struct sh_ctx *c, uint32_t slot, uint32_t n, uint32_t phase)
{
    struct sh_slot *s = sh_slot(c, slot);
    for (;; n--) {
        struct sh_ref r;
        settle(c, slot);
        uint64_t number = atomic_load_explicit(&s->dying, RLX);
        if (number == 0 || n == 0)
            return number != 0;
        if (!is_dying_by(c, number, slot, &r)) {
            sh_corrupt(c, SH_FAULT_DYING, number);
            return false;
        }
        uint64_t head = atomic_load_explicit(&node_of(&r)->head, RLX);
        if (SH_NODE_NREFS(head) == 0) {
            atomic_store_explicit(&s->transit, number, REL);
        } else if (!sh_node_fits(head, r.nbytes)) {
            sh_corrupt(c, SH_FAULT_NODE, number);
            return false;
        } else {
            drop_last(c, node_of(&r), head, phase);
        }
    }
}

/* After the lock is left: what one operation put off */

#define SLICE 256u /* references, some 10 us */

static void tell_waiters(struct sh_ctx *c)
{
    if (!c->ring_waiters)
        return;
    c->ring_waiters = false;
    atomic_fetch_add(&c->hdr->freed, 1);
    sh_os_wake(&c->hdr->freed);
}

static bool any_dying(const struct sh_ctx *c)
{
    return atomic_load_explicit(&c->slot->dying, RLX) != 0;
}

/* SH_DEFERRED: done, but sh_flush has more to do. */
enum sh_status sh_after_free(struct sh_ctx *c)
{
    tell_waiters(c);
    if (c->ndeferred == 0 && !any_dying(c))
        return SH_OK;
    return sh_flush(c, 0) == SH_OK ? SH_OK : SH_DEFERRED;
}

/* SH_BUSY without waiting: there is more than one slice. */
static enum sh_status bury_all(struct sh_ctx *c, int wait_ms)
{
    bool more = any_dying(c);
    while (more) {
        enum sh_status status = sh_enter(c, wait_ms);
        if (status != SH_OK)
            return status;
        more = sh_bury(c, c->slot_index, SLICE, sh_phase(c));
        sh_leave(c);
        if (more && wait_ms == 0)
            return SH_BUSY;
    }
    return SH_OK;
}

static void defer_again(struct sh_ctx *c, const uint32_t *pages, uint32_t n)
{
    while (sh_enter(c, 1000) == SH_BUSY) {
    }
    for (uint32_t i = 0; i < n; i++)
        sh_defer(c, pages[i]);
    sh_leave(c);
}

/* Gives back the runs that were put aside under the process lock. */
static enum sh_status give_deferred(struct sh_ctx *c, int wait_ms)
{
    while (c->ndeferred != 0) {
        uint32_t pages[SH_GIVE_MAX];
        enum sh_status status = sh_enter(c, wait_ms);
        if (status != SH_OK)
            return status;
        uint32_t n = sh_undefer(c, pages, SH_GIVE_MAX);
        sh_leave(c);
        status = n ? sh_pages_give(c, pages, n, wait_ms) : SH_OK;
        if (status != SH_OK) {
            defer_again(c, pages, n);
            return status;
        }
    }
    return SH_OK;
}

/* Works off what is dying by us, and gives back the runs that were put aside. */
enum sh_status sh_flush(struct sh_ctx *c, int wait_ms)
{
    enum sh_status status = bury_all(c, wait_ms);
    if (status == SH_OK)
        status = give_deferred(c, wait_ms);
    tell_waiters(c);
    return status;
}
