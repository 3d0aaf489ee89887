/*
 * What holds a block, for somebody who wonders why it lives: every cell that does, a handle, a
 * lease, or a reference in a node, which has holders itself. And the largest blocks.
 *
 * Spans are looked at one by one with our process lock held, so that nothing of them is punched.
 * Others go on meanwhile: it is of no one moment.
 */
#include "core.h"

#include <stdlib.h>
#include <string.h>

/* Calls `look` with each span, locked. */
enum sh_status sh_each_span(struct sh_ctx *c, sh_look *look, void *arg)
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    enum sh_status status;
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        status = sh_enter(c, c->patience_ms);
        if (status != SH_OK)
            return status;
        if (sh_span(c, page) == span)
            status = look(c, arg, page, span);
        sh_leave(c);
        if (status != SH_OK)
            return status;
    }
    return status == SH_ABSENT ? SH_OK : status;
}

bool sh_has_cells(uint64_t span)
{
    return SH_SPAN_STATE(span) == SH_PINS || SH_SPAN_STATE(span) == SH_LEASES;
}

/* Calls `see` with each pin or lease of a span that has them. */
enum sh_status sh_each_cell(struct sh_ctx *c, uint32_t page, uint64_t span, sh_see *see, void *arg)
{
    bool pins = SH_SPAN_STATE(span) == SH_PINS;
    const struct sh_kind *kind = &c->kinds[pins ? SH_KIND_PINS : SH_KIND_LEASES];
    struct sh_holder h = {.kind = pins ? SH_HOLDER_PIN : SH_HOLDER_LEASE,
                          .slot = SH_SPAN_SLOT(span)};
    enum sh_status status = SH_OK;
    for (uint32_t i = 0; i < kind->nblocks && status == SH_OK && sh_span(c, page) == span; i++) {
        const uint8_t *at = sh_data(c, page) + (uint64_t)i * kind->size;
        h.cell = atomic_load_explicit((const _Atomic uint64_t *)at, ACQ);
        if (!pins)
            h.made_ns = atomic_load_explicit(&((const struct sh_lease *)at)->made_ns, RLX);
        if (h.cell != 0)
            status = see(c, arg, &h);
    }
    return status;
}

/* Blocks. Locked */

static uint32_t blocks_in(const struct sh_ctx *c, uint64_t span)
{
    uint32_t state = SH_SPAN_STATE(span);
    return state == SH_SMALL ? c->kinds[SH_SPAN_KIND(span)].nblocks : state == SH_LARGE;
}

/* The head of a node; 0: it is none. */
bool sh_node_head(const struct sh_ctx *c, const struct sh_ref *r, uint64_t w, uint64_t *head)
{
    *head = 0;
    if (!sh_is_node(w, SH_GEN(w)))
        return false;
    uint64_t seen = atomic_load_explicit(&((const struct sh_node *)r->data)->head, ACQ);
    bool fits = sh_node_fits(seen, sh_block_bytes(c, r, w));
    if (!fits || !sh_is_node(atomic_load_explicit(r->word, ACQ), SH_GEN(w)))
        return false;
    *head = seen;
    return true;
}

static enum sh_status each_ref(struct sh_ctx *c, const struct sh_ref *r, sh_see *see, void *arg)
{
    uint64_t w = atomic_load_explicit(r->word, ACQ), head;
    const struct sh_node *n = (const struct sh_node *)r->data;
    enum sh_status status = SH_OK;
    if (!sh_node_head(c, r, w, &head))
        return SH_OK;
    struct sh_holder h = {
        .kind = SH_HOLDER_REFERENCE, .node = sh_data_offset(c, r), .node_kind = SH_NODE_KIND(head)};
    for (uint32_t i = 0; i < SH_NODE_NREFS(head) && status == SH_OK; i++) {
        h.cell = atomic_load_explicit(&n->ref[i], ACQ);
        if (!SH_REF_IS_CELL(h.cell))
            continue;
        if (!sh_is_node(atomic_load_explicit(r->word, ACQ), SH_GEN(w)))
            break; /* freed meanwhile: its bytes are another's */
        status = see(c, arg, &h);
    }
    return status;
}

/* What holds one of these blocks */

struct search {
    const uint64_t *words; /* ascending */
    uint64_t n;
    struct sh_found_holders *found;
};

static int by_number(const void *x, const void *y)
{
    uint64_t a = *(const uint64_t *)x, b = *(const uint64_t *)y;
    return a < b ? -1 : a > b;
}

static enum sh_status add_holder(struct sh_ctx *c, void *arg, const struct sh_holder *h)
{
    struct search *s = arg;
    struct sh_found_holders *f = s->found;
    struct sh_ref r;
    uint64_t word = SH_CELL_WORD(h->cell);
    if (bsearch(&word, s->words, s->n, sizeof word, by_number) == NULL || !sh_locate(c, word, &r))
        return SH_OK;
    if (f->n == f->room) {
        uint64_t room = f->room ? 2 * f->room : 64;
        struct sh_holder *list = realloc(f->list, room * sizeof *list);
        if (list == NULL)
            return SH_NOMEM;
        f->list = list;
        f->room = room;
    }
    f->list[f->n] = *h;
    f->list[f->n++].held = sh_data_offset(c, &r);
    return SH_OK;
}

static enum sh_status add_holders(struct sh_ctx *c, void *arg, uint32_t page, uint64_t span)
{
    uint32_t n = blocks_in(c, span);
    struct sh_ref r;
    enum sh_status status = SH_OK;
    if (sh_has_cells(span))
        return sh_each_cell(c, page, span, add_holder, arg);
    for (uint32_t i = 0; i < n && status == SH_OK && sh_span(c, page) == span; i++) {
        sh_fill_ref(c, &r, page, span, i);
        status = each_ref(c, &r, add_holder, arg);
    }
    return status;
}

/* Finds the handles, leases and references that hold one of the blocks at these n offsets; names:
 * roots.c. Where no block is there are no holders. The caller frees the list. Cost: a pass over all
 * spans, pins, leases and references. */
enum sh_status sh_holders_of(struct sh_ctx *c, const uint64_t *offsets, uint64_t n,
                             struct sh_found_holders *found)
{
    struct sh_ref r;
    uint64_t *words = malloc((n + 1) * sizeof *words);
    struct search s = {.words = words, .found = found};
    found->n = 0;
    if (words == NULL)
        return SH_NOMEM;
    for (uint64_t i = 0; i < n; i++)
        if (sh_locate_data(c, offsets[i], &r))
            words[s.n++] = sh_word_number(c, r.word);
    qsort(words, s.n, sizeof *words, by_number);
    enum sh_status status = sh_each_span(c, add_holders, &s);
    free(words);
    return status;
}

/* The largest blocks */

struct largest {
    struct sh_sized *list; /* the largest first */
    uint32_t n, room;
};

static void add_sized(struct largest *l, struct sh_sized one)
{
    uint32_t at;
    if (l->n == l->room && (l->room == 0 || l->list[l->n - 1].nbytes >= one.nbytes))
        return;
    l->n += l->n < l->room;
    for (at = l->n - 1; at > 0 && l->list[at - 1].nbytes < one.nbytes; at--)
        l->list[at] = l->list[at - 1];
    l->list[at] = one;
}

static enum sh_status add_blocks(struct sh_ctx *c, void *arg, uint32_t page, uint64_t span)
{
    uint32_t n = blocks_in(c, span);
    struct sh_ref r;
    for (uint32_t i = 0; i < n && sh_span(c, page) == span; i++) {
        sh_fill_ref(c, &r, page, span, i);
        uint64_t w = atomic_load_explicit(r.word, ACQ), head;
        if (SH_BSTATE(w) != SH_BLOCK_LIVE)
            continue;
        sh_node_head(c, &r, w, &head);
        add_sized(arg, (struct sh_sized){.offset = sh_data_offset(c, &r),
                                         .nbytes = sh_block_bytes(c, &r, w),
                                         .node_kind = SH_NODE_KIND(head)});
    }
    return SH_OK;
}

/* Finds the largest blocks, *n at most. Cost: a pass over all block words. */
enum sh_status sh_largest(struct sh_ctx *c, struct sh_sized *list, uint32_t *n)
{
    struct largest l = {.list = list, .room = *n};
    enum sh_status status = sh_each_span(c, add_blocks, &l);
    *n = l.n;
    return status;
}
