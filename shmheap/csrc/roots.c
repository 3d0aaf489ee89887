/*
 * Named roots: blocks that live because they have a name.
 *
 * Names are in a table under the roots lock; what a name stands for is one cell, which changes like
 * every reference (DESIGN section 6, rules 5 to 7) with the process lock held inside the roots
 * lock. Only the table is logged: an entry whose cell is 0 is a name that stands for nothing.
 */
#include "core.h"

#include <string.h>

static struct sh_root *root_at(const struct sh_ctx *c, uint64_t entry)
{
    return (struct sh_root *)(c->base + c->geo.roots) + entry;
}

static uint32_t hash_of(const char *name, uint32_t len) /* FNV-1a */
{
    uint32_t h = 2166136261u;
    for (uint32_t i = 0; i < len; i++)
        h = (h ^ (uint8_t)name[i]) * 16777619u;
    return h;
}

static bool is_entry(const struct sh_ctx *c, uint64_t entry)
{
    return entry < SH_MAX_ROOTS && entry < c->hdr->roots_used;
}

/* *link leads to the entry of the name, or is the one at the end of its chain; *entry: what it
 * holds. A chain ends, and leads to entries only. */
static enum sh_status find_link(struct sh_ctx *c, const char *name, uint32_t len, uint32_t hash,
                                uint64_t **link, uint64_t *entry)
{
    *link = &c->hdr->root_buckets[hash % SH_ROOT_BUCKETS];
    for (uint64_t i = 0; i <= SH_MAX_ROOTS; i++) {
        *entry = **link;
        if (*entry == SH_NIL)
            return SH_OK;
        if (!is_entry(c, *entry))
            return sh_corrupt(c, SH_FAULT_NAMES, *entry);
        struct sh_root *r = root_at(c, *entry);
        if (r->hash == hash && r->len == len && memcmp(r->name, name, len) == 0)
            return SH_OK;
        *link = &r->next;
    }
    return sh_corrupt(c, SH_FAULT_NAMES, *entry);
}

enum sh_status sh_names_lock(struct sh_ctx *c, int wait_ms)
{
    enum sh_status status = sh_lock(c, &c->hdr->roots, wait_ms);
    if (status == SH_CHANGED) { /* names are no cache: nothing to rebuild them from */
        status = sh_corrupt(c, SH_FAULT_LOG, SH_RANK_ROOTS);
        sh_unlock(c, &c->hdr->roots);
    }
    return status;
}

/* Roots lock, then our process lock. */
enum sh_status sh_names_enter(struct sh_ctx *c, int wait_ms)
{
    enum sh_status status = sh_names_lock(c, wait_ms);
    if (status != SH_OK)
        return status;
    status = sh_enter(c, wait_ms);
    if (status != SH_OK)
        sh_unlock(c, &c->hdr->roots);
    return status;
}

void sh_names_leave(struct sh_ctx *c)
{
    sh_leave(c);
    sh_unlock(c, &c->hdr->roots);
}

/* Makes an entry for a new name. SH_SLOW: its memory must be committed first. */
static enum sh_status add_entry(struct sh_ctx *c, uint64_t *bucket, const char *name, uint32_t len,
                                uint32_t hash, uint64_t *entry)
{
    struct sh_lock *l = &c->hdr->roots;
    uint64_t used = c->hdr->roots_used, unused = c->hdr->roots_free;
    bool fresh = unused == SH_NIL;
    *entry = fresh ? used : unused;
    if (used > SH_MAX_ROOTS || (!fresh && !is_entry(c, unused)))
        return sh_corrupt(c, SH_FAULT_NAMES, *entry);
    if (*entry == SH_MAX_ROOTS)
        return SH_NOROOTS;
    if (fresh && *entry >= c->roots_committed)
        return SH_SLOW;
    struct sh_root *r = root_at(c, *entry);
    if (!fresh && atomic_load(&r->cell) != 0) /* a name that stands for something */
        return sh_corrupt(c, SH_FAULT_NAMES, *entry);
    if (fresh)
        sh_set(c, l, &c->hdr->roots_used, *entry + 1);
    else
        sh_set(c, l, &c->hdr->roots_free, r->next);
    atomic_store(&r->cell, 0);
    r->hash = hash;
    r->len = len;
    memcpy(r->name, name, len);
    sh_set(c, l, &r->next, *bucket);
    sh_set(c, l, bucket, *entry);
    sh_commit(l);
    return SH_OK;
}

static void remove_entry(struct sh_ctx *c, uint64_t *link, uint64_t entry)
{
    struct sh_lock *l = &c->hdr->roots;
    sh_set(c, l, link, root_at(c, entry)->next);
    sh_set(c, l, &root_at(c, entry)->next, c->hdr->roots_free);
    sh_set(c, l, &c->hdr->roots_free, entry);
}

/* Rule 7. Only holders of the roots lock write the cell. */
static void replace_cell(struct sh_ctx *c, struct sh_root *root, uint64_t cell)
{
    sh_swap_ref(c, &root->cell, atomic_load_explicit(&root->cell, ACQ), cell);
}

/* expected: NULL, or the cell that the name must have, 0 for none; SH_CHANGED if it has another. */
static enum sh_status set_locked(struct sh_ctx *c, const char *name, uint32_t len,
                                 const struct sh_ref *ref, const uint64_t *expected)
{
    uint32_t hash = hash_of(name, len);
    uint64_t entry, *link;
    enum sh_status status = find_link(c, name, len, hash, &link, &entry);
    uint64_t cell = status == SH_OK && entry != SH_NIL ? atomic_load(&root_at(c, entry)->cell) : 0;
    if (status == SH_OK && expected != NULL && cell != *expected)
        return SH_CHANGED;
    if (status == SH_OK && entry == SH_NIL)
        status =
            add_entry(c, &c->hdr->root_buckets[hash % SH_ROOT_BUCKETS], name, len, hash, &entry);
    if (status != SH_OK)
        return status;
    SH_CRASH("root:entered");
    if (!sh_count_up(ref->word, ref->gen, sh_phase(c)))
        return SH_STALE;
    replace_cell(c, root_at(c, entry), sh_cell_of(c, ref));
    return SH_OK;
}

static enum sh_status set_or_add(struct sh_ctx *c, const char *name, uint32_t len,
                                 const struct sh_ref *ref, const uint64_t *expected, int wait_ms)
{
    for (;;) {
        enum sh_status status = sh_names_enter(c, wait_ms);
        if (status != SH_OK)
            return status;
        status = set_locked(c, name, len, ref, expected);
        uint64_t used = c->hdr->roots_used;
        sh_names_leave(c);
        if (status == SH_OK)
            return sh_after_free(c);
        if (status != SH_SLOW)
            return status;
        uint64_t n = 16;
        status = sh_status_of_errno(sh_os_commit(c, c->geo.roots + used * sizeof(struct sh_root),
                                                 n * sizeof(struct sh_root)));
        if (status != SH_OK)
            return status;
        c->roots_committed = (uint32_t)(used + n);
    }
}

/* The name stands for the block from now on. Atomic: others see the old block or the new one. */
enum sh_status sh_root_set(struct sh_ctx *c, const char *name, uint32_t len,
                           const struct sh_ref *ref, int wait_ms)
{
    return set_or_add(c, name, len, ref, NULL, wait_ms);
}

/* The same unless it stands for something already: SH_CHANGED. */
enum sh_status sh_root_add(struct sh_ctx *c, const char *name, uint32_t len,
                           const struct sh_ref *ref, int wait_ms)
{
    return set_or_add(c, name, len, ref, &(uint64_t){0}, wait_ms);
}

/* The same if it stands for that block: SH_CHANGED. */
enum sh_status sh_root_replace(struct sh_ctx *c, const char *name, uint32_t len,
                               const struct sh_ref *old, const struct sh_ref *ref, int wait_ms)
{
    return set_or_add(c, name, len, ref, &(uint64_t){sh_cell_of(c, old)}, wait_ms);
}

/* The name stands for nothing from now on. SH_ABSENT: it did not before, or, where only one block
 * is meant, not for that. */
enum sh_status sh_root_clear_of(struct sh_ctx *c, const char *name, uint32_t len,
                                const struct sh_ref *only, int wait_ms)
{
    enum sh_status status = sh_names_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    uint64_t *link, entry;
    status = find_link(c, name, len, hash_of(name, len), &link, &entry);
    uint64_t cell = status == SH_OK && entry != SH_NIL ? atomic_load(&root_at(c, entry)->cell) : 0;
    if (status == SH_OK && (entry == SH_NIL || (only != NULL && cell != sh_cell_of(c, only)))) {
        status = SH_ABSENT;
    } else if (status == SH_OK) {
        if (cell == 0)
            status = SH_ABSENT;
        replace_cell(c, root_at(c, entry), 0);
        remove_entry(c, link, entry);
    }
    sh_names_leave(c);
    return status == SH_OK ? sh_after_free(c) : status;
}

enum sh_status sh_root_clear(struct sh_ctx *c, const char *name, uint32_t len, int wait_ms)
{
    return sh_root_clear_of(c, name, len, NULL, wait_ms);
}

/* Pins the block that the name stands for. */
enum sh_status sh_root_get(struct sh_ctx *c, const char *name, uint32_t len, int wait_ms,
                           struct sh_ref *r)
{
    enum sh_status status = sh_refill(c, SH_KIND_PINS, wait_ms);
    if (status == SH_OK)
        status = sh_names_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    uint64_t entry, *link;
    status = find_link(c, name, len, hash_of(name, len), &link, &entry);
    bool found = status == SH_OK && entry != SH_NIL;
    uint64_t cell = found ? atomic_load(&root_at(c, entry)->cell) : 0;
    if (status == SH_OK && cell == 0) {
        status = SH_ABSENT;
    } else if (status == SH_OK && !sh_hold_cell(c, cell, r)) {
        status = sh_corrupt(c, SH_FAULT_ROOT, entry);
    } else if (status == SH_OK) {
        status = sh_pin(c, r);
        if (status == SH_SLOW) /* another thread took the last pin; the root still counts */
            sh_count_down(c, r, sh_phase(c));
    }
    sh_names_leave(c);
    return status == SH_SLOW ? SH_BUSY : status;
}

static bool has_name(const struct sh_root *r)
{
    return atomic_load(&r->cell) != 0 && r->len <= SH_ROOT_NAME_MAX;
}

static uint32_t copy_names(const struct sh_ctx *c, struct sh_name *names, uint32_t used)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < used; i++) {
        const struct sh_root *r = root_at(c, i);
        if (!has_name(r))
            continue;
        names[n].len = r->len;
        memcpy(names[n++].text, r->name, r->len);
    }
    return n;
}

/* All names as they are at one moment, in table order; *n: for how many there is room, and how many
 * there are. SH_CHANGED: *n says for how many there must be room. */
enum sh_status sh_root_names(struct sh_ctx *c, struct sh_name *names, uint32_t *n, int wait_ms)
{
    enum sh_status status = sh_names_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    uint64_t used = c->hdr->roots_used;
    if (used > SH_MAX_ROOTS)
        used = SH_MAX_ROOTS;
    if (used > *n)
        status = SH_CHANGED;
    *n = status == SH_OK ? copy_names(c, names, (uint32_t)used) : (uint32_t)used;
    sh_names_leave(c);
    return status;
}

/* What an entry's name stands for, 0: nothing. */
uint64_t sh_root_cell(const struct sh_ctx *c, uint32_t entry)
{
    return is_entry(c, entry) ? atomic_load(&root_at(c, entry)->cell) : 0;
}

/* The first name at or after *entry in table order, and *entry behind it. SH_ABSENT: there is none.
 */
enum sh_status sh_root_name(struct sh_ctx *c, uint32_t *entry, char name[SH_ROOT_NAME_MAX],
                            uint32_t *len, int wait_ms)
{
    enum sh_status status = sh_names_enter(c, wait_ms);
    if (status != SH_OK)
        return status;
    status = SH_ABSENT;
    for (; status == SH_ABSENT && is_entry(c, *entry); ++*entry) {
        const struct sh_root *r = root_at(c, *entry);
        if (!has_name(r))
            continue;
        *len = r->len;
        memcpy(name, r->name, r->len);
        status = SH_OK;
    }
    sh_names_leave(c);
    return status;
}
