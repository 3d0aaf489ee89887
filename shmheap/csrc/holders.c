/*
 * Who holds the memory, for somebody who is told that there is none left.
 *
 * Problem: who made a block need not be who keeps it: a pool's workers make the results, and their
 * parent has them. Goal: for each process, the bytes that are in use on its account:
 *
 *     sum over its handles, and leases that it gave out, of  bytes of the block / holders of it
 *
 * So a block that several hold counts for each in part, as PSS counts a page, and all together are
 * at most what lives. What is left over is held by named roots.
 */
#include "core.h"

#include <string.h>

/* Locked: so that what it names is not punched while we look. */
static uint64_t share(const struct sh_ctx *c, uint64_t cell)
{
    struct sh_ref r;
    if (cell == 0 || !sh_locate(c, SH_CELL_WORD(cell), &r))
        return 0;
    uint64_t w = atomic_load_explicit(r.word, ACQ);
    if (SH_BSTATE(w) != SH_BLOCK_LIVE || SH_COUNT(w) == 0)
        return 0;
    return sh_block_bytes(c, &r, w) / SH_COUNT(w);
}

static enum sh_status add_span(struct sh_ctx *c, uint32_t page, uint64_t span, uint64_t *bytes)
{
    uint32_t kind = SH_SPAN_STATE(span) == SH_PINS ? SH_KIND_PINS : SH_KIND_LEASES;
    const _Atomic uint64_t *cells = (const _Atomic uint64_t *)sh_data(c, page);
    uint32_t step = c->kinds[kind].size / 8;
    enum sh_status status = sh_enter(c, c->patience_ms);
    if (status != SH_OK)
        return status;
    for (uint32_t i = 0; i < c->kinds[kind].nblocks && sh_span(c, page) == span; i++)
        *bytes += share(c, atomic_load_explicit(&cells[(uint64_t)i * step], ACQ));
    sh_leave(c);
    return SH_OK;
}

/* Says how many bytes each slot's process holds. Others go on meanwhile: it is of no one moment.
 * Cost: a pass over all spans, pins and leases. */
enum sh_status sh_holders(struct sh_ctx *c, uint64_t bytes[SH_MAX_SLOTS])
{
    struct sh_walk walk = {0};
    uint32_t page;
    uint64_t span;
    enum sh_status status;
    memset(bytes, 0, SH_MAX_SLOTS * sizeof *bytes);
    while ((status = sh_walk_next(c, &walk, &page, &span)) == SH_OK) {
        if (SH_SPAN_STATE(span) != SH_PINS && SH_SPAN_STATE(span) != SH_LEASES)
            continue;
        status = add_span(c, page, span, &bytes[SH_SPAN_SLOT(span)]);
        if (status != SH_OK)
            return status;
    }
    return status == SH_ABSENT ? SH_OK : status;
}
