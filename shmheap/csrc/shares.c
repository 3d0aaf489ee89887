/*
 * Who holds how much, for somebody who is told that there is no memory left.
 *
 * Problem: who made a block need not be who keeps it: a pool's workers make the results, and their
 * parent has them. And all who use a shared dict have handles of it, while it lives by its name.
 * Goal: each block that lives on one account, the one where something can be done about it:
 *
 *     what can be reached from a name            the name's; of several, that of one
 *     else from a node, a collection such as     the process's; of several, that of one
 *     a dict, that a process has handles of
 *     else a block itself                        bytes / holders, for each handle of a process
 *
 * So a block that several processes have counts for each in part, as PSS counts a page, and all
 * together are at most what lives. Handles on their way, leases, are accounts of their own.
 *
 * Nodes are looked through with our process lock held, a slice at a time. Others go on meanwhile:
 * it is of no one moment.
 */
#include "core.h"

#include <stdlib.h>
#include <string.h>

#define SLICE 1024u /* references */

/* A node that is being looked through. */
struct hop {
    uint64_t word, gen;
    uint64_t *account; /* bytes: who has all that is behind it */
    uint32_t next;     /* reference */
};

struct search {
    struct sh_shares *shares;
    uint64_t *seen; /* a bit for each block word */
    struct hop *hops;
    uint64_t n, room;
};

/* The block that a cell names. Its holder may be gone, and so may the block. Locked */
static bool held_by(const struct sh_ctx *c, uint64_t cell, struct sh_ref *r, uint64_t *w)
{
    if (!sh_locate(c, SH_CELL_WORD(cell), r))
        return false;
    *w = atomic_load_explicit(r->word, ACQ);
    r->gen = SH_GEN(*w);
    r->nbytes = sh_block_bytes(c, r, *w);
    return SH_BSTATE(*w) == SH_BLOCK_LIVE && SH_COUNT(*w) != 0;
}

/* The bit of a block. Tiers follow each other, the sparsest first. */
static uint64_t *bit_of(const struct sh_ctx *c, const struct search *s, const struct sh_ref *r,
                        uint64_t *mask)
{
    uint64_t i = sh_word_number(c, r->word) - c->geo.words[SH_LARGE_TIER] / 8;
    *mask = 1ull << i % 64;
    return &s->seen[i / 64];
}

static uint64_t seen_bytes(const struct sh_ctx *c)
{
    return ((c->geo.data - c->geo.words[SH_LARGE_TIER]) / 64 + 64) & ~7ull;
}

static enum sh_status add_hop(struct search *s, struct hop hop)
{
    if (s->n == s->room) {
        uint64_t room = s->room ? 2 * s->room : 64;
        struct hop *hops = realloc(s->hops, room * sizeof *hops);
        if (hops == NULL)
            return SH_NOMEM;
        s->hops = hops;
        s->room = room;
    }
    s->hops[s->n++] = hop;
    return SH_OK;
}

/* Puts what a cell names on an account, unless it is on one. Locked */
static enum sh_status reach(struct sh_ctx *c, struct search *s, uint64_t cell, uint64_t *account)
{
    struct sh_ref r;
    uint64_t w, mask, *bits;
    if (!held_by(c, cell, &r, &w))
        return SH_OK;
    bits = bit_of(c, s, &r, &mask);
    if (*bits & mask)
        return SH_OK;
    *bits |= mask;
    *account += r.nbytes;
    struct hop hop = {.word = SH_CELL_WORD(cell), .gen = r.gen, .account = account};
    return w & SH_NODE ? add_hop(s, hop) : SH_OK;
}

/* Reaches along some more references of the last node, or is at its end. Locked */
static enum sh_status follow(struct sh_ctx *c, struct search *s)
{
    uint64_t at = s->n - 1, w, head = 0;
    struct hop hop = s->hops[at];
    struct sh_ref r;
    enum sh_status status = SH_OK;
    if (sh_locate(c, hop.word, &r) && SH_GEN(w = atomic_load_explicit(r.word, ACQ)) == hop.gen)
        sh_node_head(c, &r, w, &head);
    if (hop.next >= SH_NODE_NREFS(head)) {
        s->n = at;
        return SH_OK;
    }
    const struct sh_node *n = (const struct sh_node *)r.data;
    for (uint32_t i = 0; i < SLICE && hop.next < SH_NODE_NREFS(head) && status == SH_OK; i++) {
        uint64_t cell = atomic_load_explicit(&n->ref[hop.next++], ACQ);
        if (!sh_is_node(atomic_load_explicit(r.word, ACQ), hop.gen))
            break; /* freed meanwhile: its bytes are another's */
        if (SH_REF_IS_CELL(cell))
            status = reach(c, s, cell, hop.account);
    }
    s->hops[at].next = hop.next;
    return status;
}

static enum sh_status follow_all(struct sh_ctx *c, struct search *s)
{
    enum sh_status status = SH_OK;
    while (status == SH_OK && s->n != 0) {
        status = sh_enter(c, c->patience_ms);
        if (status == SH_OK) {
            status = follow(c, s);
            sh_leave(c);
        }
    }
    return status;
}

/* Names */

static void add_name(struct sh_shares *shares, const struct sh_share *one)
{
    uint32_t at = SH_TOP_NAMES;
    while (at > 0 && shares->names[at - 1].bytes < one->bytes)
        at--;
    if (at == SH_TOP_NAMES)
        return;
    struct sh_share *place = &shares->names[at];
    memmove(place + 1, place, (SH_TOP_NAMES - 1 - at) * sizeof *place);
    *place = *one;
}

static enum sh_status share_of_name(struct sh_ctx *c, struct search *s, uint32_t entry,
                                    struct sh_share *one)
{
    enum sh_status status = sh_enter(c, c->patience_ms);
    if (status != SH_OK)
        return status;
    status = reach(c, s, sh_root_cell(c, entry), &one->bytes);
    sh_leave(c);
    return status == SH_OK ? follow_all(c, s) : status;
}

static enum sh_status add_names(struct sh_ctx *c, struct search *s)
{
    uint32_t entry = 0;
    enum sh_status status = SH_OK;
    while (status == SH_OK) {
        struct sh_share one = {0};
        status = sh_root_name(c, &entry, one.name, &one.len, c->patience_ms);
        if (status == SH_OK)
            status = share_of_name(c, s, entry - 1, &one);
        add_name(s->shares, &one);
    }
    return status == SH_ABSENT ? SH_OK : status;
}

/* Processes */

static uint64_t *account_of(const struct search *s, const struct sh_holder *h)
{
    return &(h->kind == SH_HOLDER_PIN ? s->shares->pins : s->shares->leases)[h->slot];
}

static enum sh_status add_node(struct sh_ctx *c, void *arg, const struct sh_holder *h)
{
    struct search *s = arg;
    struct sh_ref r;
    uint64_t w;
    if (!held_by(c, h->cell, &r, &w) || !(w & SH_NODE))
        return SH_OK;
    return reach(c, s, h->cell, account_of(s, h));
}

static enum sh_status add_part(struct sh_ctx *c, void *arg, const struct sh_holder *h)
{
    struct search *s = arg;
    struct sh_ref r;
    uint64_t w, mask;
    if (held_by(c, h->cell, &r, &w) && !(*bit_of(c, s, &r, &mask) & mask))
        *account_of(s, h) += r.nbytes / SH_COUNT(w);
    return SH_OK;
}

static enum sh_status add_nodes(struct sh_ctx *c, void *s, uint32_t page, uint64_t span)
{
    return sh_has_cells(span) ? sh_each_cell(c, page, span, add_node, s) : SH_OK;
}

static enum sh_status add_parts(struct sh_ctx *c, void *s, uint32_t page, uint64_t span)
{
    return sh_has_cells(span) ? sh_each_cell(c, page, span, add_part, s) : SH_OK;
}

/* Says who holds how much. Cost: a pass over all pins and leases, and over what is reached from
 * names and nodes; of private memory a bit for each block word, and what is touched of that. */
enum sh_status sh_shares(struct sh_ctx *c, struct sh_shares *shares)
{
    struct search s = {.shares = shares, .seen = sh_os_private(seen_bytes(c))};
    memset(shares, 0, sizeof *shares);
    if (s.seen == NULL)
        return SH_NOMEM;
    enum sh_status status = add_names(c, &s);
    if (status == SH_OK)
        status = sh_each_span(c, add_nodes, &s);
    if (status == SH_OK)
        status = follow_all(c, &s);
    if (status == SH_OK)
        status = sh_each_span(c, add_parts, &s);
    sh_os_unmap(s.seen, seen_bytes(c));
    free(s.hops);
    return status;
}
