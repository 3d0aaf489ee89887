/*
 * References between blocks (rule 7): a node is an array of them, each one word, without a lock.
 *
 *     load     read the word -> count up, checking the generation -> pin; on failure read again
 *     store    count up the new block -> touch the old one -> compare-and-swap -> count it down
 *
 * Whoever stores or loads holds the node. A reference in a node that is held leads to a block that
 * lives, so a load that fails has met a store, and finds another word.
 */
#include "core.h"

static struct sh_node *node_at(const struct sh_ref *node, uint32_t i)
{
    struct sh_node *n = (struct sh_node *)node->data;
    uint64_t head = atomic_load_explicit(&n->head, RLX);
    return sh_node_fits(head, node->nbytes) && i < SH_NODE_NREFS(head) ? n : NULL;
}

/* One holder more for what a cell names, which the caller writes next. Locked. */
bool sh_hold_cell(struct sh_ctx *c, uint64_t cell, struct sh_ref *r)
{
    return sh_find_cell(c, cell, r) && sh_count_up(r->word, r->gen, sh_phase(c));
}

/* Puts a word in the place of another, which names *r (NULL: nothing that lives): that is touched
 * first, and then let go (rules 6 and 7). What the new one names is counted already. False: the
 * place has another one by now. Locked. */
inline bool sh_swap_found(struct sh_ctx *c, _Atomic uint64_t *at, uint64_t old,
                          const struct sh_ref *r, uint64_t new)
{
    uint32_t phase = sh_phase(c);
    if (r != NULL && sh_phase_of(phase) != SH_IDLE)
        sh_touch(r->word, r->gen, phase);
    if (!atomic_compare_exchange_strong_explicit(at, &old, new, ACQR, ACQ))
        return false;
    SH_CRASH("node:stored");
    if (r != NULL)
        sh_count_down(c, r, phase);
    return true;
}

bool sh_swap_ref(struct sh_ctx *c, _Atomic uint64_t *at, uint64_t old, uint64_t new)
{
    struct sh_ref r;
    return sh_swap_found(c, at, old, sh_find_cell(c, old, &r) ? &r : NULL, new);
}

/* Pins what the i-th reference names. SH_ABSENT: it names nothing. SH_CORRUPT: the node has none,
 * or it leads nowhere. */
enum sh_status sh_node_load(struct sh_ctx *c, const struct sh_ref *node, uint32_t i, int wait_ms,
                            struct sh_ref *r)
{
    enum sh_status status = sh_enter_with_pin(c, wait_ms);
    if (status != SH_OK)
        return status;
    struct sh_node *n = node_at(node, i);
    uint64_t cell = 0, again = 1;
    status = n == NULL ? SH_CORRUPT : SH_ABSENT;
    while (n != NULL && (cell = atomic_load_explicit(&n->ref[i], ACQ)) != 0) {
        if (!SH_REF_IS_CELL(cell))
            break;
        if (sh_hold_cell(c, cell, r)) {
            status = sh_pin(c, r);
            break;
        }
        if (cell == again) { /* the same word twice, and nothing there */
            status = sh_corrupt(c, SH_FAULT_NODE, sh_word_number(c, node->word));
            break;
        }
        again = cell;
    }
    sh_leave(c);
    return status;
}

/* The i-th reference names this block from now on, or nothing (NULL). SH_STALE: it is gone.
 * SH_DEFERRED: done, call sh_flush. */
enum sh_status sh_node_store(struct sh_ctx *c, const struct sh_ref *node, uint32_t i,
                             const struct sh_ref *r, int wait_ms)
{
    enum sh_status status = sh_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    struct sh_node *n = node_at(node, i);
    if (n == NULL)
        status = SH_CORRUPT;
    else if (r != NULL && !sh_count_up(r->word, r->gen, sh_phase(c)))
        status = SH_STALE;
    while (status == SH_OK && !sh_swap_ref(c, &n->ref[i], atomic_load_explicit(&n->ref[i], ACQ),
                                           r == NULL ? 0 : sh_cell_of(c, r))) {
    }
    sh_leave(c);
    return status == SH_OK ? sh_after_free(c) : status;
}
