/*
 * Block words, and finding the block that a word, a handle or a cell means.
 *
 * One 64-bit word per block holds state, generation, count and the epoch that touched it, and
 * changes by compare-and-swap only (DESIGN section 6). The order of every operation errs on the
 * high side (I-6): count up, then write the holder; clear the holder, then count down (drop.c).
 */
#include "core.h"

#include <string.h>

/* Words */

/* Rule 5. False: the block is gone. On the path of every store and load: inline says to the linker
 * that a call from another file is worth replacing. */
inline bool sh_count_up(_Atomic uint64_t *word, uint64_t gen, uint32_t phase)
{
    uint64_t w = atomic_load_explicit(word, ACQ), new;
    do {
        if (!sh_is_live(w, gen))
            return false;
#ifdef SH_SPLIT_CAS /* may count another block by now: the control of tools/use_after_free.py */
        sh_os_pause();
        w = atomic_load_explicit(word, ACQ);
#endif
        new = SH_COUNT(w) == SH_COUNT_MAX ? w : w + SH_COUNT_ONE; /* a full count sticks */
        new = sh_touched(new, phase);
    } while (!atomic_compare_exchange_weak_explicit(word, &w, new, ACQR, ACQ));
    return true;
}

/* Rule 6: before any holder is cleared while a collection runs. */
void sh_touch(_Atomic uint64_t *word, uint64_t gen, uint32_t phase)
{
    uint64_t w = atomic_load_explicit(word, ACQ), new;
    do {
        new = sh_touched(w, phase);
        if (new == w || !sh_is_live(w, gen))
            return;
    } while (!atomic_compare_exchange_weak_explicit(word, &w, new, ACQR, ACQ));
}

/* Sizes. A block of a class that is larger than asked for says in its last bytes by how much: one
 * byte below 128, else four with the top bit set. So a size costs no metadata. */

void sh_write_padding(uint8_t *end, uint64_t padding)
{
    uint32_t wide = 0x80000000u | (uint32_t)padding;
    if (padding < 128)
        end[-1] = (uint8_t)padding;
    else
        memcpy(end - 4, &wide, 4);
}

/* The collector's recount reads it of blocks that may be freed and made anew meanwhile, and throws
 * the sum away if any was: a race by design, which the thread sanitizer shall not see. */
__attribute__((no_sanitize("thread"))) static uint64_t read_padding(const uint8_t *end,
                                                                    uint64_t size)
{
    uint32_t wide;
    uint64_t padding = end[-1];
    if (padding >= 128) {
        memcpy(&wide, end - 4, 4);
        padding = wide & 0x7fffffffu;
    }
    return padding < size ? padding : size;
}

inline uint64_t sh_block_bytes(const struct sh_ctx *c, const struct sh_ref *r, uint64_t w)
{
    if (r->kind == SH_KIND_LARGE) {
        uint64_t n = atomic_load_explicit(&sh_page(c, r->page)->link, RLX);
        uint64_t room = (uint64_t)SH_SPAN_NPAGES(sh_span(c, r->page)) << c->geo.page_shift;
        return n < room ? n : room;
    }
    uint64_t size = c->kinds[r->kind].size;
    return w & SH_PADDED ? size - read_padding(r->data + size, size) : size;
}

/* Finding a block */

uint64_t sh_data_offset(const struct sh_ctx *c, const struct sh_ref *r)
{
    return (uint64_t)(r->data - c->base) - c->geo.data;
}

bool sh_page_in_use(const struct sh_ctx *c, uint64_t page)
{
    return page < atomic_load_explicit(&c->hdr->used_pages, ACQ) && page < c->geo.npages;
}

/* Whether it is a span of blocks, and the page lies in it. */
static inline bool span_has_page(const struct sh_ctx *c, uint32_t head, uint64_t span,
                                 uint64_t page, uint64_t used)
{
    uint32_t state = SH_SPAN_STATE(span);
    return (state == SH_LARGE || state == SH_SMALL) && page - head < SH_SPAN_NPAGES(span) &&
           sh_span_fits(c, head, span, used);
}

/* The span of blocks that a page lies in: its record, and its first page. Pages inside a large
 * block need not know. */
static inline bool span_of_page(const struct sh_ctx *c, uint64_t page, uint32_t *head,
                                uint64_t *span)
{
    uint64_t used = atomic_load_explicit(&c->hdr->used_pages, ACQ);
    if (page >= used || page >= c->geo.npages)
        return false;
    *head = (uint32_t)page;
    *span = sh_span(c, *head);
    if (SH_SPAN_STATE(*span) == SH_NONE) {
        *head = SH_HI(atomic_load_explicit(&sh_page(c, (uint32_t)page)->head, ACQ));
        if (*head > page)
            return false;
        *span = sh_span(c, *head);
    }
    return span_has_page(c, *head, *span, page, used);
}

/* The bytes are those that there is room for. */
inline void sh_fill_ref(const struct sh_ctx *c, struct sh_ref *r, uint32_t head, uint64_t span,
                        uint32_t index)
{
    r->page = head;
    if (SH_SPAN_STATE(span) == SH_LARGE) {
        r->kind = SH_KIND_LARGE;
        r->nbytes = (uint64_t)SH_SPAN_NPAGES(span) << c->geo.page_shift;
        r->data = sh_data(c, head);
        r->word = sh_words(c, head, SH_LARGE_TIER);
        return;
    }
    const struct sh_kind *k = &c->kinds[SH_SPAN_KIND(span)];
    r->kind = SH_SPAN_KIND(span);
    r->nbytes = k->size;
    r->data = sh_data(c, head) + (uint64_t)index * k->size;
    r->word = sh_words(c, head, k->tier) + index;
}

/* The block of a span whose room a byte of the data area is in. */
static bool locate_in_span(const struct sh_ctx *c, uint64_t off, uint32_t head, uint64_t span,
                           struct sh_ref *r)
{
    uint32_t index = 0, kind = SH_SPAN_KIND(span);
    if (SH_SPAN_STATE(span) == SH_SMALL) {
        index = sh_block_index(&sh_classes[kind], off - ((uint64_t)head << c->geo.page_shift));
        if (index >= c->kinds[kind].nblocks)
            return false;
    }
    sh_fill_ref(c, r, head, span, index);
    return true;
}

/* From a handle's offset in the data area: the block's first byte. */
bool sh_locate_data(const struct sh_ctx *c, uint64_t off, struct sh_ref *r)
{
    uint32_t head;
    uint64_t span;
    return off < c->geo.capacity && span_of_page(c, off >> c->geo.page_shift, &head, &span) &&
           locate_in_span(c, off, head, span, r) && sh_data_offset(c, r) == off;
}

/* From any byte of a block. Cost: of a large one, a look at each of its pages before that byte. */
bool sh_locate_inside(const struct sh_ctx *c, uint64_t off, struct sh_ref *r)
{
    uint64_t page = off >> c->geo.page_shift;
    uint64_t used = atomic_load_explicit(&c->hdr->used_pages, ACQ);
    if (off >= c->geo.capacity || page >= used)
        return false;
    uint32_t head = sh_head_of(c, (uint32_t)page);
    uint64_t span = head != SH_NIL ? sh_span(c, head) : 0;
    return span_has_page(c, head, span, page, used) && locate_in_span(c, off, head, span, r);
}

/* From a cell's word number. Tiers follow each other, the sparsest first. */
inline bool sh_locate(const struct sh_ctx *c, uint64_t word_number, struct sh_ref *r)
{
    uint64_t span, off = word_number * 8;
    uint32_t head, tier = 0;
    while (tier < SH_NTIERS && off < c->geo.words[tier])
        tier++;
    if (tier == SH_NTIERS || off >= c->geo.data)
        return false;
    uint32_t shift = sh_stride_shift(c, tier);
    off -= c->geo.words[tier];
    if (!span_of_page(c, off >> shift, &head, &span))
        return false;
    uint64_t index = (off - ((uint64_t)head << shift)) / 8;
    bool large = SH_SPAN_STATE(span) == SH_LARGE;
    const struct sh_kind *k = large ? NULL : &c->kinds[SH_SPAN_KIND(span)];
    if (large ? tier != SH_LARGE_TIER || index != 0 : tier != k->tier || index >= k->nblocks)
        return false;
    sh_fill_ref(c, r, head, span, (uint32_t)index);
    return true;
}

/* Cells that name a block and a generation: pins, roots, references */

uint64_t sh_cell_of(const struct sh_ctx *c, const struct sh_ref *r)
{
    return SH_PIN_CELL(sh_word_number(c, r->word), r->gen);
}

/* What a cell names, if it lives. Whoever holds the cell keeps it so. */
inline bool sh_find_cell(const struct sh_ctx *c, uint64_t cell, struct sh_ref *r)
{
    if (!SH_REF_IS_CELL(cell) || !sh_locate(c, SH_CELL_WORD(cell), r))
        return false;
    uint64_t w = atomic_load_explicit(r->word, ACQ);
    r->gen = SH_GEN(w);
    if (SH_BSTATE(w) != SH_BLOCK_LIVE || (r->gen & SH_CELL_LOW_MASK) != SH_CELL_LOW(cell))
        return false;
    r->nbytes = sh_block_bytes(c, r, w);
    return true;
}
