/*
 * Allocation sites: which lines of a program made the blocks that fill the heap.
 *
 * Problem: who holds a block need not have made it, and who made it may be dead. Goal: a line of
 * text for each block that a process made with SHMHEAP_TRACK, for every process to read; others pay
 * nothing for it.
 *
 * The table is a cache of fixed size in the arena, so it goes with it. An entry names its block by
 * word and generation: it is nobody's as soon as the block is gone, and nobody clears it. A block
 * may lie in any entry of one bucket; where all of a bucket are of living blocks, the newest takes
 * another's. The table is committed whole, by the first who writes.
 */
#include "core.h"

#include <string.h>

#define BUCKET   16u /* entries */
#define NBUCKETS (SH_NSITES / BUCKET)

static struct sh_site *site_at(const struct sh_ctx *c, uint32_t entry)
{
    return (struct sh_site *)(c->base + c->geo.sites) + entry;
}

static bool has_table(const struct sh_ctx *c)
{
    return atomic_load_explicit(&c->hdr->sites_committed, ACQ) != 0;
}

static enum sh_status commit_table(struct sh_ctx *c)
{
    uint64_t bytes = (uint64_t)SH_NSITES * sizeof(struct sh_site);
    enum sh_status status = sh_status_of_errno(sh_os_commit(c, c->geo.sites, bytes));
    if (status == SH_OK)
        atomic_store_explicit(&c->hdr->sites_committed, 1, REL);
    return status;
}

/* The block that an entry is of, if that lives. Locked */
static bool block_of(const struct sh_ctx *c, const struct sh_site *s, struct sh_ref *r)
{
    uint64_t word = atomic_load_explicit(&s->word, ACQ), w;
    if (word == 0 || !sh_locate(c, word, r))
        return false;
    w = atomic_load_explicit(r->word, ACQ);
    r->nbytes = sh_block_bytes(c, r, w);
    return sh_is_live(w, s->gen);
}

/* That of the block before, of nobody, or of another. Locked */
static struct sh_site *entry_for(const struct sh_ctx *c, uint64_t word)
{
    uint32_t hash = (uint32_t)(word * 0x9e3779b97f4a7c15u >> 32);
    struct sh_site *bucket = site_at(c, hash % NBUCKETS * BUCKET), *unused = NULL;
    struct sh_ref r;
    for (uint32_t i = 0; i < BUCKET; i++) {
        if (atomic_load_explicit(&bucket[i].word, RLX) == word)
            return &bucket[i];
        if (unused == NULL && !block_of(c, &bucket[i], &r))
            unused = &bucket[i];
    }
    return unused ? unused : &bucket[hash / NBUCKETS % BUCKET];
}

/* Says where a block was made, which the caller holds. SH_NOSPACE: that cannot be kept. */
enum sh_status sh_site_set(struct sh_ctx *c, const struct sh_ref *r, const char *text, uint32_t len,
                           int wait_ms)
{
    enum sh_status status = has_table(c) ? SH_OK : commit_table(c);
    if (status == SH_OK)
        status = sh_names_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    uint64_t word = sh_word_number(c, r->word);
    struct sh_site *s = entry_for(c, word);
    atomic_store_explicit(&s->word, 0, REL);
    atomic_signal_fence(memory_order_seq_cst);
    s->gen = r->gen;
    s->len = len < SH_SITE_MAX ? len : SH_SITE_MAX;
    memcpy(s->text, text, s->len);
    SH_CRASH("site:written");
    atomic_store_explicit(&s->word, word, REL);
    sh_names_leave(c);
    return SH_OK;
}

/* The first entry of a living block at or after *entry, and *entry behind it. SH_ABSENT: there is
 * none. */
enum sh_status sh_site_next(struct sh_ctx *c, uint32_t *entry, struct sh_made_at *made, int wait_ms)
{
    struct sh_ref r;
    if (!has_table(c))
        return SH_ABSENT;
    enum sh_status status = sh_names_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    status = SH_ABSENT;
    for (; status == SH_ABSENT && *entry < SH_NSITES; ++*entry) {
        const struct sh_site *s = site_at(c, *entry);
        if (s->len > SH_SITE_MAX || !block_of(c, s, &r))
            continue;
        made->offset = sh_data_offset(c, &r);
        made->nbytes = r.nbytes;
        made->len = s->len;
        memcpy(made->text, s->text, s->len);
        status = SH_OK;
    }
    sh_names_leave(c);
    return status;
}
