/*
 * A check by somebody who is no user: of a copy, in which nothing moves and whose locks are
 * nobody's.
 *
 * Problem: a poisoned arena refuses every lock, and one that is damaged may have none that works;
 * an observer may not write at all. Goal: the whole report all the same. What is copied while
 * others go on is of no one moment: only what several looks find alike is there (shmheap verify
 * --deep).
 */
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

/* Header, tables, and the cells of pins and leases; no block. */
static int copy_arena(struct sh_ctx *c, uint8_t *to)
{
    int error = sh_os_copy(c->fd, 0, c->geo.data, to);
    const struct sh_page *pages = (const struct sh_page *)(to + c->geo.pages);
    uint64_t used = atomic_load(&((const struct sh_header *)to)->used_pages);
    for (uint64_t page = 0; error == 0 && page < used && page < c->geo.npages; page++) {
        uint32_t state = SH_SPAN_STATE(atomic_load(&pages[page].span));
        uint64_t off = c->geo.data + (page << c->geo.page_shift);
        if (state == SH_PINS || state == SH_LEASES)
            error = sh_os_copy(c->fd, off, 1ull << c->geo.page_shift, to + off);
    }
    return error;
}

/* The copy takes the mapping's place. */
static enum sh_status become_copy(struct sh_ctx *c)
{
    uint8_t *copy = sh_os_private(c->geo.end);
    if (copy == NULL)
        return SH_NOMEM;
    int error = copy_arena(c, copy);
    if (error != 0) {
        sh_os_unmap(copy, c->geo.end);
        return sh_status_of_errno(error);
    }
    sh_os_unmap(c->base, c->geo.end);
    c->base = copy;
    c->hdr = (struct sh_header *)copy;
    return SH_OK;
}

/* Says what is wrong with a lock, and makes it one that can be taken. */
static void renew_lock(struct sh_ctx *c, struct sh_lock *l, uint32_t rank, sh_report *report,
                       void *arg)
{
    static const char *const damaged[] = {"", "the mutex of the registry is damaged",
                                          "the mutex of the names is damaged",
                                          "the mutex of the page heap is damaged"};
    static const char *const bad_log[] = {"", "the log of the registry is bad",
                                          "the log of the names is bad",
                                          "the log of the page heap is bad"};
    if (l->mutex.__data.__kind != c->mutex_kind || l->rank != rank)
        report(arg, "I-2", damaged[rank]);
    if (atomic_load(&l->len) > SH_UNDO_MAX || atomic_load(&l->rebuild) != 0)
        report(arg, "I-3", bad_log[rank]);
    sh_lock_init(l, rank);
}

/* Reports every violation found in a copy of the arena, from a descriptor that may be read. The
 * context is for the call alone. SH_UNTRUSTED: c->why. Cost: a copy of all tables, then sh_check.
 */
enum sh_status sh_inspect(struct sh_ctx *c, int fd, sh_report *report, void *arg)
{
    struct sh_slot us = {0};
    enum sh_status status = sh_map(c, fd, false);
    if (status != SH_OK)
        return status;
    status = become_copy(c);
    if (status == SH_OK) {
        renew_lock(c, &c->hdr->registry, SH_RANK_REGISTRY, report, arg);
        renew_lock(c, &c->hdr->roots, SH_RANK_ROOTS, report, arg);
        renew_lock(c, &c->hdr->heap, SH_RANK_HEAP, report, arg);
        atomic_store(&c->hdr->poisoned, 0);
        c->slot = &us;
        status = sh_check(c, report, arg);
        c->slot = NULL;
    }
    c->fd = -1; /* the caller's */
    sh_unmap(c);
    return status;
}
