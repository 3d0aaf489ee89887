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
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
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
        use_holds(h);
        drop_holds(h, 4);
    }
    if (h->leads)
        lead_on(h);
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
    const char *name;
    uint64_t off, bytes;
};

enum {
    AREAS = 12
};

static uint32_t areas(struct area area[AREAS])
{
    const struct sh_geometry *g = &original.geo;
    uint64_t pages = original.used_pages, n = 0;
    const uint64_t heap = offsetof(struct sh_header, used_pages);
    const uint64_t locks = offsetof(struct sh_header, registry);
    area[n++] = (struct area){"header", 0, sizeof(struct sh_header)};
    area[n++] = (struct area){"heap fields", heap, offsetof(struct sh_header, roots_used) - heap};
    area[n++] = (struct area){"locks", locks, heap - locks};
    area[n++] = (struct area){"slots", g->slots, 6 * sizeof(struct sh_slot)};
    area[n++] =
        (struct area){"roots", g->roots, (original.roots_used + 1) * sizeof(struct sh_root)};
    area[n++] = (struct area){"page records", g->pages, pages * sizeof(struct sh_page)};
    area[n++] =
        (struct area){"unit words", g->units, pages << (g->page_shift - g->unit_shift) << 2};
    for (uint32_t t = 0; t < SH_NTIERS; t++)
        area[n++] = (struct area){"block words", g->words[t], pages << (g->page_shift - 1 - 2 * t)};
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

static const struct test tests[] = {
    {"nothing_changed", test_nothing_changed},
    {"header_bytes", test_header_bytes},
    {"random_changes", test_random_changes},
};

int main(void)
{
    return test_main("bytes", tests, sizeof tests / sizeof tests[0]);
}
