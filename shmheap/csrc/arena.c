/*
 * Making an arena, and opening one that somebody else made.
 *
 * The file has no name while it is being formatted, so nobody ever sees half of it. Whoever opens
 * it computes the layout from capacity and shifts and believes nothing else of the header.
 */
#include "core.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#define PAGE_SHIFT  13u
#define DATA_ALIGN  (2ull << 20) /* so that huge pages of the data area are whole */
#define TMPFS_MAGIC 0x01021994

static uint64_t aligned(uint64_t n, uint64_t to)
{
    return (n + to - 1) / to * to;
}

void sh_geometry(struct sh_geometry *g, uint64_t capacity, uint32_t page_shift, uint32_t unit_shift)
{
    uint64_t unit = 1ull << unit_shift, at = aligned(sizeof(struct sh_header), unit);
    memset(g, 0, sizeof *g);
    g->page_shift = page_shift;
    g->unit_shift = unit_shift;
    g->npages = (uint32_t)(capacity >> page_shift);
    g->capacity = (uint64_t)g->npages << page_shift;
    g->slots = at;
    at += aligned(SH_MAX_SLOTS * sizeof(struct sh_slot), unit);
    g->roots = at;
    at += aligned((uint64_t)SH_MAX_ROOTS * sizeof(struct sh_root), unit);
    g->sites = at;
    at += aligned((uint64_t)SH_NSITES * sizeof(struct sh_site), unit);
    g->pages = at;
    at += aligned((uint64_t)g->npages * sizeof(struct sh_page), unit);
    g->units = at;
    at += aligned((g->capacity >> unit_shift) * 4, unit);
    for (uint32_t tier = SH_NTIERS; tier-- > 0;) {
        g->words[tier] = at;
        at += aligned((uint64_t)g->npages << (page_shift - 1 - 2 * tier), unit);
    }
    g->data = aligned(at, DATA_ALIGN);
    g->end = g->data + g->capacity;
}

/* The unit is what the file system can give back: its block, or 2 MiB where it uses huge pages. */
static uint32_t unit_shift_of(int fd)
{
    struct stat st;
    uint64_t unit = (uint64_t)sysconf(_SC_PAGESIZE);
    if (fstat(fd, &st) == 0 && (uint64_t)st.st_blksize > unit && st.st_blksize == 2 << 20)
        unit = (uint64_t)st.st_blksize;
    return (uint32_t)__builtin_ctzll(unit);
}

static void init_header(struct sh_header *h, const struct sh_geometry *g, uint64_t nonce)
{
    memcpy(h->magic, SH_MAGIC, sizeof h->magic);
    h->version = SH_VERSION;
    h->layout = SH_LAYOUT;
    h->header_bytes = sizeof *h;
    h->nonce = nonce;
    h->capacity = g->capacity;
    h->file_bytes = g->end;
    h->pid_namespace = sh_os_pid_namespace();
    h->created_ns = sh_os_now_ns();
    h->page_shift = g->page_shift;
    h->unit_shift = g->unit_shift;
    sh_lock_init(&h->registry, SH_RANK_REGISTRY);
    sh_lock_init(&h->roots, SH_RANK_ROOTS);
    sh_lock_init(&h->heap, SH_RANK_HEAP);
    for (uint32_t i = 0; i < SH_NBINS; i++)
        h->bins[i] = SH_NIL;
    for (uint32_t i = 0; i < SH_NCLASSES; i++)
        h->orphans[i] = SH_NIL;
    for (uint32_t i = 0; i < SH_ROOT_BUCKETS; i++)
        h->root_buckets[i] = SH_NIL;
    h->roots_free = SH_NIL;
    atomic_store(&h->gc_trigger_pages, (4ull << 20) >> g->page_shift);
    atomic_store(&h->next_gc, 4ull << 20);
    atomic_store(&h->phase, SH_IDLE | 1u << 8);
}

/* Only tmpfs says truly what it holds and lets go of it: a disk's file system has blocks of its own
 * size and writes them out, ramfs commits and punches nothing, hugetlbfs no file can be read from.
 */
static bool is_tmpfs(int fd)
{
    struct statfs fs;
    return fstatfs(fd, &fs) == 0 && (uint64_t)fs.f_type == TMPFS_MAGIC;
}

/* Formats an empty file: header and the coordinator's slot. Nothing else is committed. errno:
 * EMEDIUMTYPE (no tmpfs), EFBIG, ENOSPC, EINVAL (capacity) and what the calls say. */
enum sh_status sh_format(int fd, uint64_t capacity, uint64_t nonce, uint64_t limit_bytes,
                         const char *config, size_t config_bytes)
{
    struct sh_ctx c = {.fd = fd};
    struct stat st;
    uint32_t unit_shift = unit_shift_of(fd);
    uint32_t page_shift = unit_shift > PAGE_SHIFT ? unit_shift : PAGE_SHIFT;
    errno = EMEDIUMTYPE;
    if (!is_tmpfs(fd))
        return SH_SYSTEM;
    errno = EINVAL;
    if (capacity < 1ull << page_shift || capacity >> page_shift > SH_MAX_PAGES ||
        config_bytes > SH_CONFIG_BYTES)
        return SH_SYSTEM;
    sh_geometry(&c.geo, capacity, page_shift, unit_shift);
    if (sh_os_resize(fd, c.geo.end) != 0 || fstat(fd, &st) != 0)
        return SH_SYSTEM;
    c.dev = st.st_dev;
    c.ino = st.st_ino;
    enum sh_status status =
        sh_status_of_errno(sh_os_commit(&c, 0, c.geo.slots + sizeof(struct sh_slot)));
    if (status != SH_OK)
        return status;
    c.base = sh_os_map(fd, c.geo.slots + sizeof(struct sh_slot), true);
    if (c.base == NULL)
        return SH_SYSTEM;
    struct sh_header *h = (struct sh_header *)c.base;
    init_header(h, &c.geo, nonce);
    memcpy(h->config, config, config_bytes);
    h->config_bytes = (uint32_t)config_bytes;
    atomic_store(&h->limit_units, limit_bytes >> unit_shift);
    atomic_store(&h->look_units, limit_bytes >> unit_shift);
    atomic_store(&h->slots_used, 1);
    sh_os_unmap(c.base, c.geo.slots + sizeof(struct sh_slot));
    return SH_OK;
}

/* What is wrong with a header, NULL: nothing. `h` is a copy. */
static const char *fault_of(const struct sh_header *h, uint64_t file_bytes)
{
    struct sh_geometry g;
    if (memcmp(h->magic, SH_MAGIC, sizeof h->magic) != 0)
        return "it is not a shmheap arena";
    if (h->version != SH_VERSION || h->layout != SH_LAYOUT || h->header_bytes != sizeof *h)
        return "it was made by another version of shmheap";
    if (h->unit_shift != (uint32_t)__builtin_ctzl((unsigned long)sysconf(_SC_PAGESIZE)) &&
        h->unit_shift != 21) /* before anything is shifted by it */
        return "its page size is not this system's";
    if (h->page_shift != (h->unit_shift > PAGE_SHIFT ? h->unit_shift : PAGE_SHIFT))
        return "its page size is not one that shmheap makes";
    if (h->capacity == 0 || h->capacity >> h->page_shift > SH_MAX_PAGES)
        return "its capacity is senseless";
    sh_geometry(&g, h->capacity, h->page_shift, h->unit_shift);
    if (g.capacity != h->capacity || g.end != h->file_bytes)
        return "its layout does not fit its capacity";
    if (g.end != file_bytes)
        return "it is cut off or too long";
    if (h->config_bytes > SH_CONFIG_BYTES)
        return "its configuration is too long";
    if (h->pid_namespace != sh_os_pid_namespace())
        return "it belongs to another PID namespace (run both sides in one: docker run --pid=...)";
    return NULL;
}

static const char *read_header(int fd, struct sh_header *h, struct stat *st)
{
    if (fstat(fd, st) != 0 || !S_ISREG(st->st_mode))
        return "it is not a regular file";
    if (st->st_size < (off_t)sizeof *h || pread(fd, h, sizeof *h, 0) != (ssize_t)sizeof *h)
        return "it is too short";
    return fault_of(h, (uint64_t)st->st_size);
}

/* What the header says of the heap's configuration, without mapping the arena. SH_UNTRUSTED: *why.
 */
enum sh_status sh_read_config(int fd, char config[SH_CONFIG_BYTES], uint32_t *bytes,
                              const char **why)
{
    struct stat st;
    struct sh_header *h = malloc(sizeof *h);
    if (h == NULL)
        return SH_NOMEM;
    *why = read_header(fd, h, &st);
    if (*why == NULL) {
        *bytes = h->config_bytes;
        memcpy(config, h->config, *bytes);
    }
    free(h);
    return *why == NULL ? SH_OK : SH_UNTRUSTED;
}

static bool map_private(struct sh_ctx *c)
{
    c->pspan_at = sh_os_private((uint64_t)c->geo.npages * sizeof *c->pspan_at);
    c->pin_spans = sh_os_private((uint64_t)c->geo.npages * sizeof *c->pin_spans);
    c->forked = sh_os_wiped_on_fork();
    return c->pspan_at != NULL && c->pin_spans != NULL && c->forked != NULL;
}

/* Maps an arena after checking it. SH_UNTRUSTED: c->why says what is wrong. `fd` stays the caller's
 * until success. Read-only contexts can look (stats, books) and nothing else. */
enum sh_status sh_map(struct sh_ctx *c, int fd, bool writable)
{
    struct stat st;
    struct sh_header *h = malloc(sizeof *h);
    memset(c, 0, sizeof *c);
    c->fd = -1;
    if (h == NULL)
        return SH_NOMEM;
    c->why = read_header(fd, h, &st);
    if (c->why == NULL)
        sh_geometry(&c->geo, h->capacity, h->page_shift, h->unit_shift);
    free(h);
    if (c->why != NULL)
        return SH_UNTRUSTED;
    c->dev = st.st_dev;
    c->ino = st.st_ino;
    c->base = sh_os_map(fd, c->geo.end, writable);
    if (c->base == NULL)
        return SH_SYSTEM;
    c->hdr = (struct sh_header *)c->base;
    c->fd = fd;
    c->patience_ms = 10000;
    c->mutex_kind = sh_mutex_kind();
    sh_kinds_init(c);
    if (writable && !map_private(c)) {
        c->fd = -1;
        sh_unmap(c);
        return SH_NOMEM;
    }
    return SH_OK;
}

/* The context must be detached. Closes the descriptor that sh_map took. */
void sh_unmap(struct sh_ctx *c)
{
    sh_trace_end(c);
    if (c->pspan_at != NULL && c->pin_spans != NULL)
        sh_pspans_forget(c);
    if (c->pspan_at != NULL)
        sh_os_unmap(c->pspan_at, (uint64_t)c->geo.npages * sizeof *c->pspan_at);
    if (c->pin_spans != NULL)
        sh_os_unmap(c->pin_spans, (uint64_t)c->geo.npages * sizeof *c->pin_spans);
    if (c->forked != NULL)
        sh_os_unmap((void *)c->forked, (uint64_t)sysconf(_SC_PAGESIZE));
    if (c->base != NULL)
        sh_os_unmap(c->base, c->geo.end);
    if (c->base != NULL)
        sh_os_close(c);
    memset(c, 0, sizeof *c);
    c->fd = -1;
}

const char *sh_status_text(enum sh_status s)
{
    static const char *const text[] = {"ok",
                                       "a lock is held",
                                       "slow path",
                                       "deferred",
                                       "try again",
                                       "the heap is full",
                                       "the memory limit is reached",
                                       "the file system is full",
                                       "too many processes",
                                       "too many named roots",
                                       "the block is gone",
                                       "no such root",
                                       "the value has changed",
                                       "the heap is closed",
                                       "this process was forked without hooks",
                                       "the heap is corrupt",
                                       "not a usable arena",
                                       "nobody can free memory",
                                       "timeout",
                                       "out of private memory",
                                       "system error"};
    return s < sizeof text / sizeof text[0] ? text[s] : "unknown";
}

const char *sh_fault_text(uint32_t fault)
{
    static const char *const text[] = {"nothing",
                                       "the bytes of a lock are damaged, rank",
                                       "the undo log of a lock is damaged, rank",
                                       "the high-water mark is senseless:",
                                       "the record of a span is damaged, page",
                                       "a list of spans is torn, page",
                                       "a run that is not its giver's was given back, page",
                                       "handles in use have lost their span, page",
                                       "the table of named roots is damaged, entry",
                                       "a named root stands for a block that is gone, entry",
                                       "a list of dying nodes is damaged, word",
                                       "a node is damaged, word"};
    static_assert(sizeof text / sizeof text[0] == SH_NFAULTS, "each has a text");
    return fault < SH_NFAULTS ? text[fault] : "the word that would say what is damaged itself,";
}
