/*
 * Bad bytes: copies of a heap that has everything in it, a few bytes of each changed, and everybody
 * goes on. A process and a coordinator do all there is to do, before and after the change; each
 * call ends soon, with a status, and no block is handed out that lies outside of the data area.
 *
 * What was changed follows from seed and case number alone. SH_TEST_CASE=N runs one case.
 */
#include "support.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define CAPACITY (4ull << 20)
#define CASE_S   20 /* a case that takes longer hangs; one takes about a millisecond */
#define HANDLES  24u
#define NAMES    12u

/* The heap with everything in it */

struct extent {
    uint64_t off, bytes;
    uint8_t *data;
};

struct original {
    struct extent *extent;
    uint32_t n;
    uint64_t file_bytes, used_pages, roots_used;
    struct sh_geometry geo;
    struct handle handle[HANDLES];
    uint32_t nhandles;
    struct extent part[6]; /* of the collections: node, body and a record of each */
};

static struct original original;

static void keep_handle(const struct handle *h)
{
    if (original.nhandles < HANDLES)
        original.handle[original.nhandles++] = *h;
}

static uint32_t name_of(uint32_t i, char name[SH_ROOT_NAME_MAX])
{
    return (uint32_t)snprintf(name, SH_ROOT_NAME_MAX, "name %u", i);
}

/* Blocks of many sizes; every other one goes again, so that spans have holes. */
static void populate(struct sh_ctx *c, struct sh_ctx *other, uint32_t leases)
{
    static const uint64_t sizes[] = {16, 48, 100, 500, 1000, 3000, 9000, 20000, 70000, 140000};
    struct sh_ref r[4 * sizeof sizes / sizeof *sizes], got;
    uint32_t n = 0;
    for (uint32_t round = 0; round < 4; round++)
        for (uint32_t i = 0; i < sizeof sizes / sizeof *sizes && n < 34; i++)
            r[n++] = block_new(c, sizes[i]);
    for (uint32_t i = 0; i < n; i++) {
        struct handle h = i % 5 < leases ? handle_lease(c, &r[i]) : handle_of(c, &r[i]);
        if (i % 7 == 3) {
            CHECK_OK(handle_open(other, &h, &got)); /* pinned by both */
            h = handle_of(c, &r[i]);
        }
        if (i % 3 == 0)
            keep_handle(&h);
        if (i % 2)
            block_drop(c, &r[i]);
    }
}

static void name_some(struct sh_ctx *c)
{
    char name[SH_ROOT_NAME_MAX];
    for (uint32_t i = 0; i < NAMES; i++) {
        struct sh_ref r = block_new(c, 40 + 700 * i);
        uint32_t len = name_of(i, name);
        CHECK_OK(sh_root_set(c, name, len, &r, 1000));
        block_drop(c, &r);
    }
    for (uint32_t i = 0; i < NAMES; i += 4)
        CHECK_OK(sh_root_clear(c, name, name_of(i, name), 1000));
}

/* A dict and a list, each under a name, of ITEMS numbers, a third of which are texts. */

#define ITEMS 20u

static struct sh_key key_of(const uint32_t *number)
{
    return (struct sh_key){.hash = sh_hash(number, 4, 0), .kind = 3, .nbytes = 4, .bytes = number};
}

static struct sh_value value_of(const uint32_t *number)
{
    static const uint8_t text[300];
    if (*number % 3 == 0)
        return (struct sh_value){.kind = 5, .nbytes = sizeof text, .bytes = text};
    return (struct sh_value){.kind = 3, .nbytes = 4, .bytes = number};
}

static struct extent part_at(struct sh_ctx *c, const struct sh_ref *r)
{
    return (struct extent){.off = (uint64_t)(r->data - c->base), .bytes = r->nbytes};
}

static void collect_some(struct sh_ctx *c, bool list)
{
    struct sh_use u = {0};
    struct sh_ref record;
    CHECK_OK((list ? sh_list_new : sh_dict_new)(c, 1000, &u.coll));
    CHECK_OK(sh_root_set(c, list ? "list" : "dict", 4, &u.coll, 1000));
    for (uint32_t i = 0; i < ITEMS; i++) {
        struct sh_key k = key_of(&i);
        struct sh_value v = value_of(&i);
        enum sh_status status =
            list ? sh_list_append(c, &u, &v, 1000) : sh_dict_set(c, &u, &k, &v, false, 1000);
        CHECK(status == SH_OK || status == SH_DEFERRED);
    }
    CHECK_OK(sh_enter(c, 1000));
    CHECK(sh_find_cell(c, atomic_load(&sh_body(&u)->ref[3]), &record)); /* a text */
    sh_leave(c);
    struct extent *part = &original.part[3 * list];
    part[0] = part_at(c, &u.coll);
    part[1] = part_at(c, &u.body);
    part[2] = part_at(c, &record);
    CHECK_OK(sh_use_end(c, &u, 1000));
    block_drop(c, &u.coll);
}

static void keep_extents(int fd)
{
    off_t at = 0, end;
    original.file_bytes = original.geo.end;
    while ((at = lseek(fd, at, SEEK_DATA)) >= 0) {
        end = lseek(fd, at, SEEK_HOLE);
        original.extent = realloc(original.extent, (original.n + 1) * sizeof *original.extent);
        struct extent *e = &original.extent[original.n++];
        *e = (struct extent){(uint64_t)at, (uint64_t)(end - at), malloc((size_t)(end - at))};
        CHECK(pread(fd, e->data, e->bytes, at) == (ssize_t)e->bytes);
        at = end;
    }
}

/* Processes 1 and 2 live, 3 died and was reaped except for what others hold, 4 died just now. */
static void make_original(void)
{
    struct sh_ctx a, b, gone, dead, lead;
    int fd = arena_new(CAPACITY, NO_LIMIT);
    arena_lead(&lead, fd);
    arena_join(&a, fd);
    arena_join(&b, fd);
    arena_join(&gone, fd);
    populate(&a, &b, 1);
    populate(&gone, &a, 2);
    name_some(&a);
    collect_some(&a, false);
    collect_some(&a, true);
    arena_die(&gone);
    reap_dead(&lead, UINT64_MAX);
    collect(&lead);
    release_all(&lead);
    arena_join(&dead, fd);
    populate(&b, &a, 1);
    populate(&dead, &b, 2);
    collect(&lead); /* stamped, not released */
    must_be_sound(&a, 0);
    original.geo = a.geo;
    original.used_pages = atomic_load(&a.hdr->used_pages);
    original.roots_used = a.hdr->roots_used;
    arena_die(&dead);
    keep_extents(fd);
    arena_die(&a);
    arena_die(&b);
    arena_die(&lead);
    close(fd);
}

static int copy_new(void)
{
    int fd = open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)original.file_bytes) == 0);
    for (uint32_t i = 0; i < original.n; i++) {
        const struct extent *e = &original.extent[i];
        CHECK(pwrite(fd, e->data, e->bytes, (off_t)e->off) == (ssize_t)e->bytes);
    }
    return fd;
}

/* Everybody goes on. Any status will do; the alarm and the signals judge. */

struct heap {
    int fd;
    struct sh_ctx p, lead; /* mapped and attached, or not */
    bool mapped, attached, leads;
    void *alive[2];
    struct sh_ref held[16];
    uint32_t n;
    uint32_t found; /* violations */
    bool refused, corrupt;
};

static enum sh_status note(struct heap *h, enum sh_status status)
{
    CHECK(status <= SH_SYSTEM);
    if (status == SH_CORRUPT)
        CHECK(atomic_load(&h->p.hdr->poisoned) != 0 && "everybody is told what was found");
    h->corrupt |= status == SH_CORRUPT;
    return status;
}

static void count_violation(void *arg, const char *invariant, const char *what)
{
    CHECK(strncmp(invariant, "I-", 2) == 0 && what[0] != 0);
    ++*(uint32_t *)arg;
}

static void must_lie_inside(const struct heap *h, const struct sh_ref *r)
{
    const uint8_t *from = h->p.base + h->p.geo.data, *to = h->p.base + h->p.geo.end;
    CHECK(r->data >= from && r->data < to && r->nbytes <= (uint64_t)(to - r->data));
}

static void hold(struct heap *h, const struct sh_ref *r)
{
    must_lie_inside(h, r);
    CHECK(h->n < sizeof h->held / sizeof *h->held);
    h->held[h->n++] = *r;
}

static void use_blocks(struct heap *h)
{
    static const uint64_t sizes[] = {16, 100, 1000, 9000, 70000, 100000};
    struct sh_ref r;
    for (uint32_t i = 0; i < sizeof sizes / sizeof *sizes && h->n < 14; i++) {
        enum sh_status status = SH_BUSY;
        for (int tries = 0; tries < 3 && status == SH_BUSY; tries++)
            status = note(h, sh_alloc(&h->p, sizes[i], i % 2, 1, &r));
        if (status != SH_OK)
            continue;
        hold(h, &r);
        r.data[0] = r.data[r.nbytes - 1] = 1;
    }
}

static void use_handles(struct heap *h)
{
    struct sh_ref r;
    for (uint32_t i = 0; i < original.nhandles; i++) {
        const struct handle *a = &original.handle[i];
        if (i % 4 == 3)
            note(h, sh_lease_drop(&h->p, a->off, a->gen, a->cell, a->seq, 1));
        if (note(h, sh_adopt(&h->p, a->off, a->gen, a->cell, a->seq, 1, &r)) != SH_OK)
            continue;
        must_lie_inside(h, &r);
        note(h, sh_unpin(&h->p, &r, 1));
    }
}

static void use_names(struct heap *h)
{
    char name[SH_ROOT_NAME_MAX];
    struct sh_ref r;
    uint32_t len, entry = 0;
    for (uint32_t i = 0; i < 2 * original.roots_used; i++)
        if (note(h, sh_root_name(&h->p, &entry, name, &len, 1)) != SH_OK)
            break;
    for (uint32_t i = 0; i < NAMES + 2; i++) {
        len = name_of(i, name);
        if (note(h, sh_root_get(&h->p, name, len, 1, &r)) == SH_OK) {
            must_lie_inside(h, &r);
            note(h, sh_unpin(&h->p, &r, 1));
        }
        if (i % 2 && h->n != 0)
            note(h, sh_root_set(&h->p, name, len, &h->held[i % h->n], 1));
        if (i % 5 == 0)
            note(h, sh_root_clear(&h->p, name, len, 1));
    }
}

static void found(struct heap *h, struct sh_found *f)
{
    static uint8_t sink;
    for (uint32_t i = 0; i < f->nbytes; i++)
        sink ^= f->value[i];
    if (f->pinned)
        note(h, sh_unpin(&h->p, &f->record, 1));
}

static void use_dict(struct heap *h, struct sh_use *u)
{
    uint64_t n, stamp, place = 0;
    struct sh_found f;
    note(h, sh_coll_size(&h->p, u, 1, &n, &stamp));
    for (uint32_t i = 0; i < 2 * ITEMS; i++)
        if (note(h, sh_dict_next(&h->p, u, &place, stamp, 1, &f)) == SH_OK)
            found(h, &f);
    for (uint32_t i = 0; i < 2 * ITEMS; i++) {
        struct sh_key k = key_of(&i);
        struct sh_value v = value_of(&i);
        if (note(h, sh_dict_get(&h->p, u, &k, 1, &f)) == SH_OK)
            found(h, &f);
        if (i % 2)
            note(h, sh_dict_set(&h->p, u, &k, &v, i % 4 == 1, 1));
        else
            note(h, sh_dict_pop(&h->p, u, &k, 0, 1, NULL));
    }
    if (note(h, sh_dict_pop(&h->p, u, NULL, 0, 1, &f)) == SH_OK)
        found(h, &f);
}

static void use_list(struct heap *h, struct sh_use *u)
{
    struct sh_copy copy = {.stop = INT64_MAX};
    struct sh_splice part = {.start = 2, .stop = 4};
    struct sh_found f;
    uint64_t n;
    note(h, sh_list_copy(&h->p, u, &copy, 1));
    while (sh_copy_next(&copy, &f))
        found(h, &f);
    free(copy.bytes);
    note(h, sh_coll_size(&h->p, u, 1, &n, &part.stamp));
    note(h, sh_list_splice(&h->p, u, &part, 1));
    for (uint32_t i = 0; i < 2 * ITEMS; i++) {
        struct sh_value v = value_of(&i);
        if (note(h, sh_list_get(&h->p, u, i, 1, &f)) == SH_OK)
            found(h, &f);
        note(h, i % 2 ? sh_list_append(&h->p, u, &v, 1) : sh_list_set(&h->p, u, i, &v, 1));
    }
    if (note(h, sh_list_pop(&h->p, u, 0, 1, &f)) == SH_OK)
        found(h, &f);
}

static void use_colls(struct heap *h)
{
    for (uint32_t list = 0; list < 2; list++) {
        struct sh_use u = {0};
        if (note(h, sh_root_get(&h->p, list ? "list" : "dict", 4, 1, &u.coll)) != SH_OK)
            continue;
        must_lie_inside(h, &u.coll);
        uint64_t head = atomic_load(&((struct sh_node *)u.coll.data)->head);
        if (u.coll.nbytes >= sizeof(struct sh_coll) &&
            SH_NODE_KIND(head) == (list ? SH_NODE_LIST : SH_NODE_DICT))
            (list ? use_list : use_dict)(h, &u);
        note(h, sh_use_end(&h->p, &u, 1));
        note(h, sh_unpin(&h->p, &u.coll, 1));
    }
}

static void use_holds(struct heap *h)
{
    struct sh_ref r;
    uint64_t cell;
    uint32_t seq;
    for (uint32_t i = 0; i < h->n; i++) {
        if (note(h, sh_repin(&h->p, &h->held[i], 1, &r)) == SH_OK)
            note(h, sh_unpin(&h->p, &r, 1));
        if (i % 2 && note(h, sh_lease_make(&h->p, &h->held[i], 1, &cell, &seq)) == SH_OK && i % 4)
            note(h, sh_lease_drop(&h->p, sh_data_offset(&h->p, &h->held[i]), h->held[i].gen, cell,
                                  seq, 1));
    }
}

static void drop_holds(struct heap *h, uint32_t from)
{
    while (h->n > from)
        note(h, sh_unpin(&h->p, &h->held[--h->n], 1));
    note(h, sh_flush(&h->p, 1));
}

static void lead_on(struct heap *h)
{
    struct sh_ctx *c = &h->lead;
    struct sh_reaped reaped;
    uint64_t n, bytes, runs;
    uint32_t from = 0;
    for (uint32_t slot = 1; slot < 8; slot++)
        note(h, sh_reap(c, slot, slot % 2 ? UINT64_MAX : 0, &reaped));
    if (note(h, sh_start_cycle(c)) == SH_OK && note(h, sh_mark(c, &n)) == SH_OK)
        note(h, sh_finish_mark(c, &n));
    note(h, sh_sweep(c, &n, &bytes));
    note(h, sh_stamp(c, sh_now_stamp(c), &n));
    note(h, sh_end_cycle(c, 4 << 20, false, 0));
    for (uint32_t i = 0; i < 8 && (i == 0 || from != 0); i++)
        if (note(h, sh_release(c, SH_STAMP_MAX, 1 << 20, &from, &bytes, &runs)) != SH_OK)
            break;
    struct sh_sums sums = sh_sum(c);
    CHECK(sh_heap_alloc(&sums) <= INT64_MAX);
    sh_users(c);
    sh_refuse_waiters(c);
}

static void check(struct heap *h, struct sh_ctx *c)
{
    note(h, sh_check(c, count_violation, &h->found));
}

/* The bytes of slots 1 and 2 are held, as their processes would. */
static void keep_alive(struct heap *h)
{
    for (uint32_t i = 0; i < 2; i++)
        if (h->alive[i] == NULL)
            h->alive[i] = sh_os_hold_byte(&h->lead, sh_slot_byte(&h->lead, 1 + i), false);
}

static void enter(struct heap *h)
{
    uint32_t phase;
    if (!h->mapped) {
        enum sh_status status = note(h, sh_map(&h->p, dup(h->fd), true));
        if (status == SH_UNTRUSTED)
            CHECK(h->p.why != NULL);
        if (status == SH_OK)
            CHECK_OK(note(h, sh_map(&h->lead, dup(h->fd), true)));
        h->refused = status != SH_OK;
        h->mapped = status == SH_OK;
        if (!h->mapped)
            return;
        h->lead.patience_ms = 2;
        keep_alive(h);
    }
    if (!h->leads) {
        h->leads = note(h, sh_attach_coordinator(&h->lead, 1)) == SH_OK;
        if (h->leads)
            note(h, sh_begin(&h->lead, &phase));
    }
    if (!h->attached)
        h->attached = note(h, sh_attach(&h->p, 1)) == SH_OK;
}

static void work(struct heap *h)
{
    if (h->attached) {
        check(h, &h->p);
        use_blocks(h);
        use_handles(h);
        use_names(h);
        use_colls(h);
        use_holds(h);
        drop_holds(h, 4);
    }
    if (h->leads)
        lead_on(h);
}

static void inspect(struct heap *h)
{
    struct sh_ctx copy;
    enum sh_status status = sh_inspect(&copy, h->fd, count_violation, &h->found);
    CHECK(status == SH_OK || (status == SH_UNTRUSTED && copy.why != NULL));
}

static void leave(struct heap *h)
{
    bool closed;
    if (!h->mapped)
        return;
    if (h->attached) {
        use_blocks(h);
        check(h, &h->p);
        drop_holds(h, 0);
        sh_detach(&h->p, false);
    }
    if (h->leads) {
        note(h, sh_try_close(&h->lead, &closed));
        sh_detach(&h->lead, true);
    }
    for (uint32_t i = 0; i < 2; i++)
        if (h->alive[i] != NULL)
            sh_os_let_go(h->alive[i]);
    sh_unmap(&h->p);
    sh_unmap(&h->lead);
}

/* Changes */

struct area {
    uint64_t off, bytes;
};

enum {
    AREAS = 18
};

static uint32_t areas(struct area area[AREAS])
{
    const struct sh_geometry *g = &original.geo;
    uint64_t pages = original.used_pages, n = 0;
    uint64_t locks = offsetof(struct sh_header, registry),
             heap = offsetof(struct sh_header, used_pages),
             roots = offsetof(struct sh_header, roots_used);
    area[n++] = (struct area){0, sizeof(struct sh_header)};
    area[n++] = (struct area){locks, heap - locks};
    area[n++] = (struct area){heap, roots - heap};
    area[n++] = (struct area){g->slots, 6 * sizeof(struct sh_slot)};
    area[n++] = (struct area){g->roots, (original.roots_used + 1) * sizeof(struct sh_root)};
    area[n++] = (struct area){g->pages, pages * sizeof(struct sh_page)};
    area[n++] = (struct area){g->units, pages << (g->page_shift - g->unit_shift) << 2};
    for (uint32_t t = 0; t < SH_NTIERS; t++)
        area[n++] = (struct area){g->words[t], pages << (g->page_shift - 1 - 2 * t)};
    for (uint32_t i = 0; i < 6; i++)
        area[n++] = (struct area){original.part[i].off, original.part[i].bytes};
    CHECK(n == AREAS);
    return (uint32_t)n;
}

/* A page of pins or leases, or SH_NIL. */
static uint32_t cell_page(struct rng *rng, const uint8_t *base)
{
    const struct sh_page *pages = (const struct sh_page *)(base + original.geo.pages);
    uint32_t first = rng_below(rng, (uint32_t)original.used_pages);
    for (uint32_t i = 0; i < original.used_pages; i++) {
        uint32_t page = (first + i) % (uint32_t)original.used_pages;
        uint32_t state = SH_SPAN_STATE(atomic_load(&pages[page].span));
        if (state == SH_PINS || state == SH_LEASES)
            return page;
    }
    return SH_NIL;
}

static uint64_t random_64(struct rng *rng)
{
    return (uint64_t)rng_below(rng, ~0u) << 32 | rng_below(rng, ~0u);
}

/* A page number as one might stand there: most are in use, some are just outside of something. */
static uint64_t a_page(struct rng *rng)
{
    const uint64_t edges[] = {original.used_pages - 1,
                              original.used_pages,
                              original.used_pages + 1,
                              original.geo.npages - 1,
                              original.geo.npages,
                              original.geo.npages + 1,
                              SH_MAX_PAGES,
                              SH_NIL};
    if (rng_below(rng, 3))
        return rng_below(rng, (uint32_t)original.used_pages);
    return edges[rng_below(rng, sizeof edges / sizeof *edges)];
}

static uint64_t a_span(struct rng *rng)
{
    uint64_t owner = rng_below(rng, 2) ? SH_OWNER(rng_below(rng, 8), rng_below(rng, 3)) : 0;
    uint64_t n = rng_below(rng, 3) ? 1 + rng_below(rng, 20) : a_page(rng);
    uint32_t kind = rng_below(rng, 2) ? rng_below(rng, SH_NKINDS) : rng_below(rng, 128);
    return SH_SPAN(rng_below(rng, SH_RETIRED + 3), kind, owner, n & SH_MAX_PAGES);
}

static uint64_t a_word(struct rng *rng)
{
    switch (rng_below(rng, 6)) {
    case 0:
        return a_page(rng);
    case 1:
        return SH_PAIR(a_page(rng), a_page(rng));
    case 2:
        return a_span(rng);
    case 3:
        return SH_BLOCK_WORD(rng_below(rng, 4), rng_below(rng, 3)) |
               rng_below(rng, 3) * SH_COUNT_ONE;
    case 4:
        return SH_PIN_CELL(original.geo.words[rng_below(rng, SH_NTIERS)] / 8 + rng_below(rng, 9000),
                           rng_below(rng, 3));
    default:
        return rng_below(rng, 2) ? rng_below(rng, 5) : ~0ull >> rng_below(rng, 64);
    }
}

static void change(struct rng *rng, uint8_t *base)
{
    struct area area[AREAS];
    const struct area *in = &area[rng_below(rng, areas(area))];
    uint64_t off = in->off, bytes = in->bytes;
    uint32_t cells = rng_below(rng, 10) == 0 ? cell_page(rng, base) : SH_NIL;
    if (cells != SH_NIL) {
        off = original.geo.data + ((uint64_t)cells << original.geo.page_shift);
        bytes = 256;
    }
    uint64_t at = off + rng_below(rng, (uint32_t)bytes);
    uint64_t *word = (uint64_t *)(base + at / 8 * 8);
    uint64_t *other = (uint64_t *)(base + off) + rng_below(rng, (uint32_t)(bytes / 8)), was = *word;
    switch (rng_below(rng, 8)) {
    case 0:
        base[at] ^= (uint8_t)(1u << rng_below(rng, 8));
        break;
    case 1:
        base[at] = (uint8_t)rng_below(rng, 256);
        break;
    case 2:
        ((uint32_t *)word)[at / 4 % 2] = (uint32_t)a_page(rng);
        break;
    case 3:
        *word = random_64(rng);
        break;
    case 4:
        *word = *other;
        *other = was;
        break;
    case 5:
        *word = *other;
        break;
    case 6:
        *word += rng_below(rng, 2) ? 1 : -1ull;
        break;
    default:
        *word = a_word(rng);
    }
}

/* A link of a list leads back, or elsewhere. */
static void change_list(struct rng *rng, uint8_t *base)
{
    struct sh_page *pages = (struct sh_page *)(base + original.geo.pages);
    struct sh_header *h = (struct sh_header *)base;
    uint64_t head = rng_below(rng, 2) ? h->bins[rng_below(rng, SH_NBINS)]
                                      : h->orphans[rng_below(rng, SH_NCLASSES)];
    if (head >= original.used_pages)
        head = rng_below(rng, (uint32_t)original.used_pages);
    uint64_t link = atomic_load(&pages[head].link);
    uint64_t to = rng_below(rng, 2) ? head : a_page(rng);
    atomic_store(&pages[head].link,
                 rng_below(rng, 2) ? SH_PAIR(to, SH_LO(link)) : SH_PAIR(SH_HI(link), to));
}

static void change_some(struct rng *rng, int fd)
{
    uint8_t *base =
        mmap(NULL, original.file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    CHECK(base != MAP_FAILED);
    for (uint32_t n = 1 + (rng_below(rng, 3) == 0) * rng_below(rng, 4); n-- > 0;)
        (rng_below(rng, 12) ? change : change_list)(rng, base);
    munmap(base, original.file_bytes);
}

/* Cases, each counted by what became of it */

enum verdict {
    V_REFUSED, /* by sh_map */
    V_CORRUPT, /* an operation found it */
    V_FOUND,   /* the check found it */
    V_UNSEEN,  /* nothing that matters */
    NVERDICTS
};

struct progress {
    uint64_t at, counts[NVERDICTS];
};

static struct progress *progress;

static void judge(const struct heap *h)
{
    enum verdict v = h->refused      ? V_REFUSED
                     : h->corrupt    ? V_CORRUPT
                     : h->found != 0 ? V_FOUND
                                     : V_UNSEEN;
    progress->counts[v]++;
}

/* A lock that names a thread which we may not look at may be that thread's, and waiting for it
 * would be right: it is free instead. */
static void free_what_may_be_held(int fd)
{
    const uint64_t locks[] = {offsetof(struct sh_header, registry),
                              offsetof(struct sh_header, roots), offsetof(struct sh_header, heap)};
    for (uint32_t i = 0; i < sizeof locks / sizeof *locks; i++) {
        pthread_mutex_t m;
        char path[64];
        CHECK(pread(fd, &m, sizeof m, (off_t)locks[i]) == (ssize_t)sizeof m);
        snprintf(path, sizeof path, "/proc/%u/maps", (uint32_t)m.__data.__lock & FUTEX_TID_MASK);
        int maps = open(path, O_RDONLY | O_CLOEXEC), error = errno;
        if (maps >= 0)
            close(maps);
        else if (error != ENOENT && error != ESRCH)
            CHECK(pwrite(fd, &(int){0}, sizeof(int), (off_t)locks[i]) == sizeof(int));
    }
}

typedef void run_case(uint64_t number);

static void random_case(uint64_t number)
{
    struct rng rng = {(test_seed() ^ (number * 0xd1342543de82ef95ull)) | 1};
    struct heap h = {.fd = copy_new()};
    if (rng_below(&rng, 2)) { /* somebody is in the middle of things */
        enter(&h);
        CHECK(h.attached && h.leads);
        use_blocks(&h);
        drop_holds(&h, 4);
    }
    change_some(&rng, h.fd);
    if (rng_below(&rng, 8) == 0)
        inspect(&h);
    free_what_may_be_held(h.fd);
    enter(&h);
    work(&h);
    leave(&h);
    judge(&h);
    close(h.fd);
}

#define HEADER_VALUES 10u

static void header_case(uint64_t number)
{
    static const uint8_t values[HEADER_VALUES] = {0, 1, 2, 3, 0x10, 0x40, 0x7f, 0x80, 0xfe, 0xff};
    uint64_t at = number / HEADER_VALUES;
    struct heap h = {.fd = copy_new()};
    CHECK(pwrite(h.fd, &values[number % HEADER_VALUES], 1, (off_t)at) == 1);
    free_what_may_be_held(h.fd);
    enter(&h);
    work(&h);
    leave(&h);
    judge(&h);
    close(h.fd);
}

/* Runs cases from, from + step, ... below `to`, in children that may die of them. */
static void run_cases(run_case *run, uint64_t from, uint64_t to, uint64_t step)
{
    const char *one = getenv("SH_TEST_CASE");
    uint64_t bad = 0;
    if (one != NULL) {
        from = strtoull(one, NULL, 10);
        to = from + 1;
    }
    progress =
        mmap(NULL, sizeof *progress, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(progress != MAP_FAILED);
    progress->at = from;
    alarm(0); /* each case has its own */
    while (progress->at < to && bad < 40) {
        int status;
        fflush(NULL);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            for (; progress->at < to; progress->at += step) {
                alarm(CASE_S);
                run(progress->at);
            }
            exit(0);
        }
        CHECK(waitpid(child, &status, 0) == child);
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
            continue;
        fprintf(stderr, "case %llu: %s %d\n", (unsigned long long)progress->at,
                WIFSIGNALED(status) ? "signal" : "status",
                WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
        bad++;
        progress->at += step;
    }
    printf(
        "   %llu cases: %llu refused, %llu corrupt, %llu found by the check, %llu without effect\n",
        (unsigned long long)((to - from + step - 1) / step),
        (unsigned long long)progress->counts[V_REFUSED],
        (unsigned long long)progress->counts[V_CORRUPT],
        (unsigned long long)progress->counts[V_FOUND],
        (unsigned long long)progress->counts[V_UNSEEN]);
    CHECK(bad == 0);
}

static uint64_t share(uint64_t n)
{
    const char *mode = getenv("SH_TEST_MODE");
    return test_scale(mode != NULL && strcmp(mode, "plain") ? n / 4 : n);
}

static void test_nothing_changed(void)
{
    make_original();
    struct heap h = {.fd = copy_new()};
    enter(&h);
    CHECK(h.attached && h.leads);
    work(&h);
    leave(&h);
    inspect(&h);
    CHECK(!h.corrupt && h.found == 0);
    close(h.fd);
}

/* SH_TEST_SCALE=100 does every byte of the header with each value. */
static void test_header_bytes(void)
{
    make_original();
    uint64_t all = sizeof(struct sh_header) * HEADER_VALUES, n = share(all / 100);
    run_cases(header_case, 0, all, n < all ? all / n : 1);
}

/* SH_TEST_SCALE=200 does 10^6. */
static void test_random_changes(void)
{
    make_original();
    run_cases(random_case, 0, share(5000), 1);
}

/* What went wrong: one change each, in an arena that is in use */

struct damage {
    const char *name;
    enum sh_fault fault; /* that everybody is told; NONE: nobody need find it */
    void (*make)(struct sh_ctx *);
};

/* The first page from `from` that is in such a state. */
static uint32_t page_in(const struct sh_ctx *c, uint32_t state, uint32_t from)
{
    for (uint32_t page = from; page < original.used_pages; page++)
        if (SH_SPAN_STATE(sh_span(c, page)) == state)
            return page;
    CHECK(!"there is one");
    return SH_NIL;
}

static uint32_t page_of(const struct sh_ctx *c, uint32_t state)
{
    return page_in(c, state, 0);
}

static uint32_t last_page_of(const struct sh_ctx *c, uint32_t state)
{
    uint32_t last = SH_NIL;
    for (uint32_t page = 0; page < original.used_pages; page++)
        last = SH_SPAN_STATE(sh_span(c, page)) == state ? page : last;
    CHECK(last != SH_NIL);
    return last;
}

static void change_span(struct sh_ctx *c, uint32_t page, uint32_t kind, uint32_t npages)
{
    uint64_t span = sh_span(c, page);
    sh_set_span(c, page, SH_SPAN(SH_SPAN_STATE(span), kind, SH_SPAN_OWNER(span), npages));
}

static void each_free_run(struct sh_ctx *c, uint64_t link, uint32_t npages)
{
    for (uint32_t page = 0; page < original.used_pages; page++)
        if (SH_SPAN_STATE(sh_span(c, page)) == SH_FREE) {
            if (link != 0)
                atomic_store(&sh_page(c, page)->link, link);
            else
                change_span(c, page, 0, npages);
        }
}

static void list_goes_in_a_circle(struct sh_ctx *c)
{
    for (uint32_t b = 0; b < SH_NBINS; b++) {
        uint64_t first = c->hdr->bins[b];
        if (first != SH_NIL) /* its neighbours come back to themselves, never to it */
            atomic_store(&sh_page(c, (uint32_t)first)->link, SH_PAIR(first + 1, first + 1));
    }
}

static void list_leads_out_of_the_table(struct sh_ctx *c)
{
    each_free_run(c, SH_PAIR(SH_MAX_PAGES, SH_MAX_PAGES), 0);
}

static void free_run_of_no_pages(struct sh_ctx *c)
{
    each_free_run(c, 0, 0);
}

static void free_run_beyond_the_end(struct sh_ctx *c)
{
    each_free_run(c, 0, SH_MAX_PAGES);
}

static void bin_names_a_page_beyond(struct sh_ctx *c)
{
    for (uint32_t b = 0; b < SH_NBINS; b++)
        c->hdr->bins[b] = 1ull << 32; /* its low half is page 0 */
    memset(c->hdr->bin_bits, 0xff, sizeof c->hdr->bin_bits);
}

static void orphans_are_somebodys(struct sh_ctx *c)
{
    for (uint32_t k = 0; k < SH_NCLASSES; k++)
        c->hdr->orphans[k] = page_of(c, SH_LARGE);
}

static void high_water_mark_beyond_capacity(struct sh_ctx *c)
{
    atomic_store(&c->hdr->used_pages, 1ull << 40);
}

static void tables_beyond_capacity(struct sh_ctx *c)
{
    atomic_store(&c->hdr->table_pages, ~0ull);
}

static void more_slots_than_there_are(struct sh_ctx *c)
{
    atomic_store(&c->hdr->slots_used, ~0u);
}

static void span_of_no_class(struct sh_ctx *c)
{
    uint32_t page = page_of(c, SH_SMALL);
    change_span(c, page, 127, SH_SPAN_NPAGES(sh_span(c, page)));
}

static void pins_longer_than_their_page(struct sh_ctx *c)
{
    change_span(c, page_of(c, SH_PINS), SH_KIND_PINS, 1000);
}

/* Its blocks would lie beyond the end of the mapping. */
static void span_of_a_larger_class_at_the_end(struct sh_ctx *c)
{
    uint32_t page = last_page_of(c, SH_SMALL), n = SH_SPAN_NPAGES(sh_span(c, page));
    uint32_t kind = SH_NCLASSES - 1;
    while (c->kinds[kind].npages <= n)
        kind--;
    change_span(c, page, kind, n);
}

static void pins_in_use_are_somebody_elses(struct sh_ctx *c)
{
    for (uint32_t i = 0; i < c->npin_spans; i++)
        sh_set_span(c, c->pin_spans[i]->page, SH_SPAN(SH_PINS, SH_KIND_PINS, SH_OWNER(1, 1), 1));
}

static void log_longer_than_it_is(struct sh_ctx *c)
{
    atomic_store(&c->hdr->roots.len, 100000);
}

static void heap_log_longer_than_it_is(struct sh_ctx *c)
{
    atomic_store(&c->hdr->heap.len, ~0u);
}

static void rank_that_there_is_not(struct sh_ctx *c)
{
    c->hdr->heap.rank = c->hdr->roots.rank = c->hdr->registry.rank = 77;
}

/* With priority inheritance, libc aborts on what the kernel says of the word. */
static void mutex_of_another_kind(struct sh_ctx *c)
{
    c->hdr->heap.mutex.__data.__kind |= PTHREAD_PRIO_INHERIT << 5;
}

static void mutex_held_by_nobody(struct sh_ctx *c)
{
    c->hdr->heap.mutex.__data.__lock = 0x3ffffff0;
}

/* Somebody who has never heard of us. */
static void mutex_held_by_a_stranger(struct sh_ctx *c)
{
    int ready[2];
    char none;
    CHECK(pipe2(ready, O_CLOEXEC) == 0);
    pid_t stranger = fork();
    CHECK(stranger >= 0);
    if (stranger == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execlp("sleep", "sleep", "60", NULL);
        _exit(127);
    }
    close(ready[1]);
    CHECK(read(ready[0], &none, 1) == 0); /* it has let go of our memory */
    close(ready[0]);
    c->hdr->roots.mutex.__data.__lock = stranger;
}

static void mutex_that_is_ours_already(struct sh_ctx *c)
{
    c->hdr->registry.mutex.__data.__lock = (int)gettid();
}

static void names_go_in_a_circle(struct sh_ctx *c)
{
    struct sh_root *r = (struct sh_root *)(c->base + c->geo.roots);
    for (uint64_t i = 0; i < c->hdr->roots_used; i++) {
        r[i].next = i;
        r[i].hash = ~r[i].hash;
    }
}

static void free_name_is_in_use(struct sh_ctx *c)
{
    const struct sh_root *r = (const struct sh_root *)(c->base + c->geo.roots);
    uint64_t i = 0;
    while (atomic_load(&r[i].cell) == 0)
        i++;
    c->hdr->roots_free = i;
    struct sh_ref ref = block_new(c, 16);
    CHECK_IS(sh_root_set(c, "another", 7, &ref, 1000), SH_CORRUPT);
}

static void name_of_another_generation(struct sh_ctx *c)
{
    struct sh_root *r = (struct sh_root *)(c->base + c->geo.roots);
    for (uint64_t i = 0; i < c->hdr->roots_used; i++)
        if (atomic_load(&r[i].cell) != 0)
            atomic_fetch_add(&r[i].cell, 1);
}

static void more_names_than_there_are(struct sh_ctx *c)
{
    c->hdr->roots_used = 1ull << 60;
    c->hdr->roots_free = 1ull << 59;
}

static void lock_word_of_nobody(struct sh_ctx *c)
{
    for (uint32_t slot = 1; slot < 4; slot++)
        atomic_store(&sh_slot(c, slot)->lock, SH_OWNER(1023, 0x7fff) | 1);
}

static void lock_word_that_is_no_holders(struct sh_ctx *c)
{
    uint64_t coordinator = SH_OWNER(0, atomic_load(&sh_slot(c, 0)->incarnation));
    atomic_store(&c->slot->lock, coordinator); /* who lives; but a bit is missing */
}

static const struct damage damages[] = {
    {"a list goes in a circle", SH_FAULT_LIST, list_goes_in_a_circle},
    {"a list leads out of the table", SH_FAULT_LIST, list_leads_out_of_the_table},
    {"a free run of no pages", SH_FAULT_LIST, free_run_of_no_pages},
    {"a free run beyond the end", SH_FAULT_LIST, free_run_beyond_the_end},
    {"a bin names a page beyond", SH_FAULT_LIST, bin_names_a_page_beyond},
    {"orphans are somebody's", SH_FAULT_LIST, orphans_are_somebodys},
    {"the high-water mark is beyond the capacity", SH_FAULT_USED, high_water_mark_beyond_capacity},
    {"tables beyond the capacity", SH_FAULT_USED, tables_beyond_capacity},
    {"more slots than there are", SH_FAULT_NONE, more_slots_than_there_are},
    {"a span of no class", SH_FAULT_SPAN, span_of_no_class},
    {"pins longer than their page", SH_FAULT_SPAN, pins_longer_than_their_page},
    {"a span of a larger class at the end", SH_FAULT_SPAN, span_of_a_larger_class_at_the_end},
    {"pins in use are somebody else's", SH_FAULT_CELLS, pins_in_use_are_somebody_elses},
    {"a log longer than it is", SH_FAULT_LOG, log_longer_than_it_is},
    {"the heap's log longer than it is", SH_FAULT_NONE, heap_log_longer_than_it_is},
    {"a rank that there is not", SH_FAULT_NONE, rank_that_there_is_not},
    {"a mutex of another kind", SH_FAULT_LOCK, mutex_of_another_kind},
    {"a mutex held by nobody", SH_FAULT_LOCK, mutex_held_by_nobody},
    {"a mutex held by a stranger", SH_FAULT_LOCK, mutex_held_by_a_stranger},
    {"a mutex that is ours already", SH_FAULT_LOCK, mutex_that_is_ours_already},
    {"names go in a circle", SH_FAULT_NAMES, names_go_in_a_circle},
    {"a free name is in use", SH_FAULT_NAMES, free_name_is_in_use},
    {"a name of another generation", SH_FAULT_ROOT, name_of_another_generation},
    {"more names than there are", SH_FAULT_NAMES, more_names_than_there_are},
    {"a lock word of nobody", SH_FAULT_NONE, lock_word_of_nobody},
    {"a lock word that is no holder's", SH_FAULT_NONE, lock_word_that_is_no_holders},
};

static void damage_case(uint64_t number)
{
    const struct damage *d = &damages[number];
    struct heap h = {.fd = copy_new()};
    enter(&h);
    use_blocks(&h);
    d->make(&h.p);
    inspect(&h);
    h.found = 0;
    work(&h);
    uint64_t poisoned = atomic_load(&h.p.hdr->poisoned);
    if (SH_FAULT_OF(poisoned) != d->fault)
        fprintf(stderr, "%s: %s %llu\n", d->name, sh_fault_text(SH_FAULT_OF(poisoned)),
                (unsigned long long)SH_FAULT_AT(poisoned));
    CHECK(SH_FAULT_OF(poisoned) == d->fault);
    leave(&h);
    judge(&h);
    close(h.fd);
}

static void test_each_damage(void)
{
    make_original();
    run_cases(damage_case, 0, sizeof damages / sizeof damages[0], 1);
}

/* A large block whose record says more pages than it has would take its neighbours along. */
static void test_a_block_that_grew(void)
{
    make_original();
    struct heap h = {.fd = copy_new()};
    struct sh_ref a, b;
    enter(&h);
    CHECK_OK(sh_alloc(&h.p, 100000, false, 1000, &a));
    CHECK_OK(sh_alloc(&h.p, 100000, false, 1000, &b));
    uint32_t n = SH_SPAN_NPAGES(sh_span(&h.p, a.page));
    CHECK(SH_SPAN_STATE(sh_span(&h.p, a.page + n)) != SH_NONE);
    change_span(&h.p, a.page, SH_KIND_LARGE, n + 1);
    note(&h, sh_unpin(&h.p, &a, 1000));
    CHECK(atomic_load(&h.p.hdr->poisoned) != 0);
    CHECK(SH_SPAN_STATE(sh_span(&h.p, a.page)) != SH_FREE);
    CHECK_IS(sh_alloc(&h.p, 16, false, 1000, &a), SH_CORRUPT);
    leave(&h);
    close(h.fd);
}

/* The chain of runs that wait to be given back runs through shared memory. */
static void test_a_run_that_waits_leads_elsewhere(void)
{
    make_original();
    for (uint32_t i = 0; i < 3; i++) {
        const uint32_t to[] = {SH_MAX_PAGES, 0, SH_NIL};
        struct heap h = {.fd = copy_new()};
        uint32_t a, b;
        enter(&h);
        CHECK_OK(sh_pages_take(&h.p, 3, 1000, &a));
        CHECK_OK(sh_pages_take(&h.p, 3, 1000, &b));
        CHECK_OK(sh_enter(&h.p, 1000));
        sh_defer(&h.p, a);
        sh_defer(&h.p, b);
        sh_leave(&h.p);
        atomic_store(&sh_page(&h.p, b)->link, to[i]);
        note(&h, sh_flush(&h.p, 1000));
        CHECK(SH_FAULT_OF(atomic_load(&h.p.hdr->poisoned)) == SH_FAULT_GIVEN);
        leave(&h);
        close(h.fd);
    }
}

/* Files that are no arena, or no longer */

struct header_fault {
    uint64_t off, bytes, value;
};

static void must_be_refused(int fd)
{
    struct sh_ctx c;
    CHECK_IS(sh_map(&c, fd, true), SH_UNTRUSTED);
    CHECK(c.why != NULL && c.base == NULL);
    CHECK_IS(sh_map(&c, fd, false), SH_UNTRUSTED);
    CHECK_IS(sh_inspect(&c, fd, count_violation, NULL), SH_UNTRUSTED);
    close(fd);
}

static void test_headers_of_others(void)
{
#define FIELD(field) offsetof(struct sh_header, field), sizeof((struct sh_header *)0)->field
    static const struct header_fault faults[] = {
        {FIELD(magic), 0},
        {FIELD(version), SH_VERSION + 1},
        {FIELD(layout), SH_LAYOUT + 1},
        {FIELD(version), SH_VERSION - 1},
        {FIELD(header_bytes), sizeof(struct sh_header) + 8},
        {FIELD(capacity), 0},
        {FIELD(capacity), CAPACITY + 1},
        {FIELD(capacity), 2 * CAPACITY},
        {FIELD(capacity), 1ull << 41},
        {FIELD(capacity), ~0ull},
        {FIELD(capacity), ~0ull << 13},
        {FIELD(file_bytes), 4096},
        {FIELD(pid_namespace), 1},
        {FIELD(page_shift), 12},
        {FIELD(page_shift), 64},
        {FIELD(page_shift), ~0u},
        {FIELD(unit_shift), 0},
        {FIELD(unit_shift), 13},
        {FIELD(unit_shift), 21},
        {FIELD(unit_shift), 64 + 12}, /* a shift by so much is a shift by 12 */
        {FIELD(unit_shift), ~0u},
        {FIELD(config_bytes), SH_CONFIG_BYTES + 1},
        {FIELD(config_bytes), ~0u},
    };
    make_original();
    for (uint32_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        int fd = copy_new();
        CHECK(pwrite(fd, &faults[i].value, faults[i].bytes, (off_t)faults[i].off) ==
              (ssize_t)faults[i].bytes);
        must_be_refused(fd);
    }
}

static void test_files_of_other_lengths(void)
{
    make_original();
    const struct sh_geometry *g = &original.geo;
    const uint64_t ends[] = {0,           1,           7,        8,           4095,
                             4096,        g->slots,    g->roots, g->pages,    g->units,
                             g->words[4], g->words[0], g->data,  g->data + 1, g->end - 4096,
                             g->end - 1};
    for (uint32_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        int fd = copy_new();
        CHECK(ftruncate(fd, (off_t)ends[i]) == 0);
        must_be_refused(fd);
    }
    int longer = copy_new(), empty = open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    CHECK(ftruncate(longer, (off_t)g->end + 1) == 0);
    must_be_refused(longer);
    CHECK(ftruncate(empty, (off_t)g->end) == 0); /* as long as an arena, and nothing in it */
    must_be_refused(empty);
    must_be_refused(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
    must_be_refused(open("/dev/null", O_RDWR | O_CLOEXEC));
}

/* A header alone: whoever made it died before anything else, or the rest was punched out. */
static void test_half_made(void)
{
    make_original();
    for (uint32_t keep = 1; keep < 3; keep++) {
        struct heap h = {.fd = copy_new()};
        uint64_t from = keep == 1 ? original.geo.slots : original.geo.pages;
        CHECK(fallocate(h.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)from,
                        (off_t)(original.geo.end - from)) == 0);
        enter(&h);
        work(&h);
        CHECK(h.found != 0 || h.corrupt);
        leave(&h);
        close(h.fd);
    }
}

static const struct test tests[] = {
    {"headers_of_others", test_headers_of_others},
    {"files_of_other_lengths", test_files_of_other_lengths},
    {"half_made", test_half_made},
    {"each_damage", test_each_damage},
    {"a_block_that_grew", test_a_block_that_grew},
    {"a_run_that_waits_leads_elsewhere", test_a_run_that_waits_leads_elsewhere},
    {"nothing_changed", test_nothing_changed},
    {"header_bytes", test_header_bytes},
    {"random_changes", test_random_changes},
};

int main(void)
{
    return test_main("bytes", tests, sizeof tests / sizeof tests[0]);
}
