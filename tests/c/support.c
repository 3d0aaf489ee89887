/* See support.h. Nothing here trusts a list, a counter or a bitmap that it is to check. */
#include "support.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define GUARD_S 300 /* a test that hangs fails */

/* Running */

static const char *running = "?";

void test_fail(const char *file, int line, const char *what, int status)
{
    fprintf(stderr, "%s: %s:%d: %s", running, file, line, what);
    if (status != 0)
        fprintf(stderr, " (%s)", sh_status_text((enum sh_status)status));
    fprintf(stderr, "\n");
    fflush(NULL);
    abort();
}

static bool passes(const struct test *t)
{
    int status;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        running = t->name;
        alarm(GUARD_S);
        t->run();
        exit(0); /* the leak checker has its say */
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int test_main(const char *name, const struct test *tests, size_t n)
{
    const char *only = getenv("SH_TEST_ONLY");
    int failed = 0;
    for (size_t i = 0; i < n; i++) {
        if (only != NULL && strcmp(only, tests[i].name) != 0)
            continue;
        uint64_t from = sh_os_now_ns();
        bool ok = passes(&tests[i]);
        printf("%s %s/%s (%.1f s)\n", ok ? "ok" : "FAILED", name, tests[i].name,
               (double)(sh_os_now_ns() - from) / 1e9);
        failed += !ok;
    }
    printf("end of %s\n", name);
    return failed != 0;
}

uint64_t test_scale(uint64_t n)
{
    const char *scale = getenv("SH_TEST_SCALE"), *mode = getenv("SH_TEST_MODE");
    double times = scale == NULL ? 1 : strtod(scale, NULL);
    if (mode != NULL && strcmp(mode, "tsan") == 0)
        times /= 4;
    return (uint64_t)((double)n * times) + 1;
}

uint64_t test_seed(void)
{
    const char *seed = getenv("SH_TEST_SEED");
    return 0x9e3779b97f4a7c15ull * (1 + (seed == NULL ? 0 : strtoull(seed, NULL, 10)));
}

uint32_t rng_below(struct rng *r, uint32_t n) /* xorshift64* */
{
    r->state ^= r->state >> 12;
    r->state ^= r->state << 25;
    r->state ^= r->state >> 27;
    return (uint32_t)(((r->state * 0x2545f4914f6cdd1dull) >> 32) * n >> 32);
}

/* The thread sanitizer does not know this function and would believe the lock free. */
#ifdef __SANITIZE_THREAD__
int pthread_mutex_clocklock(pthread_mutex_t *m, clockid_t clock, const struct timespec *until)
{
    struct timespec now;
    int rc;
    while ((rc = pthread_mutex_trylock(m)) == EBUSY) {
        clock_gettime(clock, &now);
        if (now.tv_sec > until->tv_sec ||
            (now.tv_sec == until->tv_sec && now.tv_nsec > until->tv_nsec))
            return ETIMEDOUT;
        sh_os_nap(1000);
    }
    return rc;
}
#endif

/* Coordinator */

/* That a death comes before its discovery the kernel knows (I-8); this tells the thread sanitizer.
 */
static _Atomic uint32_t deaths;

void reap_dead(struct sh_ctx *lead, uint64_t lease_cutoff_ns)
{
    struct sh_reaped r;
    for (uint32_t slot = 1; slot < atomic_load(&lead->hdr->slots_used); slot++) {
        if (sh_alive(lead, slot))
            continue;
        atomic_load(&deaths);
        CHECK_OK(sh_reap(lead, slot, lease_cutoff_ns, &r));
    }
}

uint64_t end_collection(struct sh_ctx *lead)
{
    uint64_t units, bytes, swept;
    CHECK_OK(sh_sweep(lead, &swept, &bytes));
    CHECK_OK(sh_stamp(lead, sh_now_stamp(lead), &units));
    CHECK_OK(sh_end_cycle(lead, 4 << 20, true, 0));
    return swept;
}

uint64_t collect(struct sh_ctx *lead)
{
    uint64_t blocks;
    CHECK_OK(sh_start_cycle(lead));
    CHECK_OK(sh_mark(lead, &blocks));
    CHECK_OK(sh_finish_mark(lead, &blocks));
    return end_collection(lead);
}

uint64_t release_all(struct sh_ctx *lead)
{
    uint64_t bytes, runs, sum = 0;
    uint32_t page = 0;
    do {
        CHECK_OK(sh_release(lead, SH_STAMP_MAX, 4 << 20, &page, &bytes, &runs));
        sum += bytes;
    } while (page != 0);
    return sum;
}

/* Arenas */

int arena_new(uint64_t capacity, uint64_t limit_bytes)
{
    int fd = open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    CHECK(fd >= 0);
    CHECK_OK(sh_format(fd, capacity, 42, limit_bytes, "{}", 2));
    return fd;
}

void arena_join(struct sh_ctx *c, int fd)
{
    CHECK_OK(sh_map(c, dup(fd), true));
    CHECK_OK(sh_attach(c, 10000));
}

void arena_lead(struct sh_ctx *c, int fd)
{
    uint32_t phase;
    CHECK_OK(sh_map(c, dup(fd), true));
    CHECK_OK(sh_attach_coordinator(c, 10000));
    CHECK_OK(sh_begin(c, &phase));
    if (phase == SH_SWEEP) /* marks are whole: go on; else from the start (rule 13) */
        end_collection(c);
    else if (phase != SH_IDLE)
        collect(c);
}

static _Atomic(void *) shared_base;

void arena_share(struct sh_ctx *c, struct sh_ctx *with)
{
    shared_base = with->base;
    if (c->base == with->base)
        return;
    sh_os_unmap(c->base, c->geo.end);
    c->base = with->base;
    c->hdr = with->hdr;
    c->slot = sh_slot(c, c->slot_index);
}

static void arena_unmap(struct sh_ctx *c)
{
    if (c->base == shared_base) { /* sh_unmap takes the descriptor for the mapping's */
        close(c->fd);
        c->base = NULL;
    }
    sh_unmap(c);
}

void arena_leave(struct sh_ctx *c)
{
    sh_detach(c, true);
    arena_unmap(c);
}

void arena_die(struct sh_ctx *c)
{
    void *alive = c->alive;
    sh_pspans_forget(c);
    c->slot = NULL;
    c->alive = NULL;
    arena_unmap(c);
    atomic_fetch_add(&deaths, 1);
    sh_os_let_go(alive); /* last, as in a real death */
}

/* Blocks */

struct sh_ref block_new(struct sh_ctx *c, uint64_t nbytes)
{
    struct sh_ref r;
    enum sh_status status;
    while ((status = sh_alloc(c, nbytes, true, 10000, &r)) == SH_BUSY) {
    }
    CHECK_OK(status);
    CHECK(r.nbytes == nbytes);
    return r;
}

void block_drop(struct sh_ctx *c, struct sh_ref *r)
{
    enum sh_status status = sh_unpin(c, r, 10000);
    while (status == SH_DEFERRED || status == SH_BUSY)
        status = sh_flush(c, 10000);
    CHECK_OK(status);
}

struct sh_ref node_new(struct sh_ctx *c, uint32_t nrefs)
{
    struct sh_ref r;
    enum sh_status status;
    while ((status = sh_node_new(c, SH_NODE_PLAIN, nrefs, 0, 1000, &r)) == SH_BUSY) {
    }
    CHECK_OK(status);
    return r;
}

void node_store(struct sh_ctx *c, const struct sh_ref *node, uint32_t i, const struct sh_ref *r)
{
    enum sh_status status;
    while ((status = sh_node_store(c, node, i, r, 1000)) == SH_BUSY) {
    }
    while (status == SH_DEFERRED || status == SH_BUSY)
        status = sh_flush(c, 1000);
    CHECK_OK(status);
}

enum sh_status block_adopt(struct sh_ctx *c, uint64_t off, uint64_t gen, struct sh_ref *r)
{
    struct handle h = {off, gen, 0, 0};
    return handle_open(c, &h, r);
}

struct handle handle_of(const struct sh_ctx *c, const struct sh_ref *r)
{
    return (struct handle){sh_data_offset(c, r), r->gen, 0, 0};
}

struct handle handle_lease(struct sh_ctx *c, const struct sh_ref *r)
{
    struct handle h = handle_of(c, r);
    enum sh_status status;
    while ((status = sh_lease_make(c, r, 10000, &h.cell, &h.seq)) == SH_BUSY) {
    }
    CHECK_OK(status);
    return h;
}

enum sh_status handle_open(struct sh_ctx *c, const struct handle *h, struct sh_ref *r)
{
    enum sh_status status;
    do
        status = sh_adopt(c, h->off, h->gen, h->cell, h->seq, 10000, r);
    while (status == SH_BUSY || status == SH_AGAIN);
    return status;
}

/* Content */

static uint8_t byte_of(uint64_t seed, uint64_t i)
{
    return (uint8_t)((seed >> (i % 7 * 8)) + i * 31);
}

static uint64_t next_byte(uint64_t i, uint64_t n)
{
    return n <= 512 || i < 64 || i + 64 >= n ? i + 1 : i + 257 < n - 64 ? i + 257 : n - 64;
}

void content_write(uint8_t *data, uint64_t from, uint64_t nbytes, uint64_t seed)
{
    for (uint64_t i = from; i < nbytes; i = next_byte(i, nbytes))
        data[i] = byte_of(seed, i);
}

bool content_is(const uint8_t *data, uint64_t from, uint64_t nbytes, uint64_t seed)
{
    for (uint64_t i = from; i < nbytes; i = next_byte(i, nbytes))
        if (data[i] != byte_of(seed, i))
            return false;
    return true;
}

bool content_is_zero(const uint8_t *data, uint64_t nbytes)
{
    for (uint64_t i = 0; i < nbytes; i = next_byte(i, nbytes))
        if (data[i] != 0)
            return false;
    return true;
}

/* Death, and what others do at a moment */

const char *die_at;
uint32_t die_in;
static const char *moment;
static void (*act_then)(void *);
static void *act_with;

void at_moment(const char *point, void (*act)(void *), void *arg)
{
    moment = point;
    act_then = act;
    act_with = arg;
}

bool moment_waits(void)
{
    return moment != NULL;
}

static void *act_in_thread(void *unused)
{
    (void)unused;
    act_then(act_with);
    return NULL;
}

static void moment_passes(const char *name)
{
    if (moment == NULL || strcmp(moment, name) != 0)
        return;
    moment = NULL;   /* once, and not again by what is done now */
    pthread_t other; /* a thread, because the one who passes may hold locks */
    CHECK(pthread_create(&other, NULL, act_in_thread, NULL) == 0);
    CHECK(pthread_join(other, NULL) == 0);
}

/* Points between a system call that commits or punches and the next (I-4). */
static bool is_at_the_door(const char *name)
{
    return strcmp(name, "commit:step") == 0 || strcmp(name, "release:punched") == 0;
}

void sh_crash_point(const char *name)
{
    CHECK(!is_at_the_door(name) || sh_ranks_held() == 0);
    moment_passes(name);
    if (die_at != NULL && strcmp(die_at, name) == 0 && --die_in == 0)
        kill(getpid(), SIGKILL);
}

void die_when(const char *point, uint32_t n)
{
    die_in = n;
    die_at = point;
}

bool child_survives(void (*run)(void *), void *arg, const char *point, uint32_t n)
{
    int status;
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(GUARD_S);
        die_when(point, n);
        run(arg);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child);
    if (WIFSIGNALED(status))
        CHECK(WTERMSIG(status) == SIGKILL);
    else
        CHECK(WEXITSTATUS(status) == 0);
    return WIFEXITED(status);
}

static void *hold_the_heap_lock(void *arg)
{
    struct stopped *s = arg;
    CHECK_OK(sh_heap_lock(s->c, 1000));
    pthread_barrier_wait(&s->barrier);
    pthread_barrier_wait(&s->barrier);
    sh_heap_unlock(s->c);
    return NULL;
}

void stop_with_heap_lock(void *arg)
{
    struct stopped *s = arg;
    pthread_barrier_init(&s->barrier, NULL, 2);
    CHECK(pthread_create(&s->thread, NULL, hold_the_heap_lock, s) == 0);
    pthread_barrier_wait(&s->barrier);
}

void go_on(struct stopped *s)
{
    pthread_barrier_wait(&s->barrier);
    pthread_join(s->thread, NULL);
    pthread_barrier_destroy(&s->barrier);
}

/* Second opinion */

static uint64_t used_pages(const struct sh_ctx *c)
{
    return atomic_load(&c->hdr->used_pages);
}

static void check_list(struct sh_ctx *c, uint64_t first, uint32_t state, uint32_t kind, uint64_t *n)
{
    uint64_t page = first;
    if (first == SH_NIL)
        return;
    do {
        CHECK(page < used_pages(c));
        uint64_t span = sh_span(c, (uint32_t)page),
                 link = atomic_load(&sh_page(c, (uint32_t)page)->link);
        CHECK(SH_SPAN_STATE(span) == state);
        CHECK(SH_SPAN_OWNER(span) == SH_OWNER_NONE);
        CHECK((state == SH_FREE ? sh_bin_of(SH_SPAN_NPAGES(span)) : SH_SPAN_KIND(span)) == kind);
        CHECK(SH_HI(link) < used_pages(c));
        CHECK(SH_LO(atomic_load(&sh_page(c, SH_HI(link))->link)) == page);
        CHECK(++*n <= used_pages(c));
        page = SH_HI(link);
    } while (page != first);
}

struct tally {
    uint64_t free_runs, inuse, orphans, committed, live;
};

static void check_free_run(struct sh_ctx *c, uint32_t page, uint32_t n, uint32_t before,
                           struct tally *t)
{
    uint64_t head = atomic_load(&sh_page(c, page)->head),
             units = (uint64_t)n * sh_units_per_page(c);
    CHECK(before != SH_FREE); /* neighbours are merged */
    CHECK(SH_HI(atomic_load(&sh_page(c, page + n - 1)->head)) == page);
    CHECK(SH_LO(head) == sh_units_released(c, sh_unit_of_page(c, page), units));
    t->free_runs++;
}

static uint32_t unit_state(struct sh_ctx *c, uint64_t unit)
{
    return SH_UNIT_STATE(atomic_load(sh_unit(c, unit)));
}

static void check_small(struct sh_ctx *c, uint32_t page, uint64_t span, struct tally *t)
{
    uint32_t kind = SH_SPAN_KIND(span), first, last;
    CHECK(kind < SH_NCLASSES);
    CHECK(SH_SPAN_NPAGES(span) == c->kinds[kind].npages);
    const _Atomic uint64_t *words = sh_words(c, page, c->kinds[kind].tier);
    for (uint32_t i = 0; i < c->kinds[kind].nblocks; i++) {
        uint64_t w = atomic_load(&words[i]);
        t->live += SH_BSTATE(w) == SH_BLOCK_LIVE;
        CHECK(SH_BSTATE(w) != SH_BLOCK_DYING);
        CHECK((SH_BSTATE(w) == SH_BLOCK_LIVE) == (SH_COUNT(w) != 0));
        if (SH_BSTATE(w) == SH_BLOCK_HOLE || SH_GEN(w) == SH_GEN_MAX)
            continue;
        sh_block_units(c, kind, i, &first, &last);
        for (uint32_t u = first; u <= last; u++)
            CHECK(unit_state(c, sh_unit_of_page(c, page) + u) == SH_UNIT_COMMITTED);
    }
    t->orphans += SH_SPAN_OWNER(span) == SH_OWNER_NONE;
}

static void check_whole(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    uint64_t unit = sh_unit_of_page(c, page);
    uint64_t n = (uint64_t)SH_SPAN_NPAGES(span) * sh_units_per_page(c);
    for (uint64_t i = 0; i < n; i++)
        CHECK(unit_state(c, unit + i) == SH_UNIT_COMMITTED);
}

static void check_span(struct sh_ctx *c, uint32_t page, uint64_t span, uint32_t before,
                       struct tally *t)
{
    uint32_t n = SH_SPAN_NPAGES(span), state = SH_SPAN_STATE(span);
    if (state != SH_FREE)
        t->inuse += n;
    switch (state) {
    case SH_FREE:
        check_free_run(c, page, n, before, t);
        break;
    case SH_SMALL:
        check_small(c, page, span, t);
        break;
    case SH_LARGE:
        check_whole(c, page, span);
        CHECK(SH_BSTATE(atomic_load(sh_words(c, page, SH_LARGE_TIER))) == SH_BLOCK_LIVE);
        t->live++;
        break;
    case SH_PINS:
    case SH_LEASES:
        CHECK(n == 1);
        check_whole(c, page, span);
        break;
    default:
        CHECK(state == SH_RETIRED || state == SH_RESERVED || state == SH_RELEASING);
    }
}

/* Records in page order: they cover every page below the high-water mark once. */
static void check_records(struct sh_ctx *c, struct tally *t)
{
    uint32_t before = SH_NONE;
    for (uint64_t page = 0; page < used_pages(c);) {
        uint64_t span = sh_span(c, (uint32_t)page);
        CHECK(SH_SPAN_STATE(span) != SH_NONE);
        CHECK(SH_SPAN_NPAGES(span) > 0 && page + SH_SPAN_NPAGES(span) <= used_pages(c));
        for (uint32_t i = 1; i < SH_SPAN_NPAGES(span); i++)
            CHECK(SH_SPAN_STATE(sh_span(c, (uint32_t)page + i)) == SH_NONE);
        check_span(c, (uint32_t)page, span, before, t);
        before = SH_SPAN_STATE(span);
        page += SH_SPAN_NPAGES(span);
    }
    uint64_t units = used_pages(c) * sh_units_per_page(c);
    for (uint64_t unit = 0; unit < units; unit++) {
        uint32_t state = unit_state(c, unit);
        CHECK(state == SH_UNIT_RELEASED || state == SH_UNIT_COMMITTED);
        t->committed += state == SH_UNIT_COMMITTED;
    }
}

/* Holders: every cell names a block that lives, and no count is below its holders (I-6). */

struct holders {
    uint64_t *word; /* word number of each cell */
    uint64_t n, room;
};

static void hold(struct sh_ctx *c, struct holders *h, uint64_t cell)
{
    struct sh_ref r;
    if (cell == 0)
        return;
    CHECK(sh_locate(c, SH_CELL_WORD(cell), &r));
    CHECK(SH_BSTATE(atomic_load(r.word)) == SH_BLOCK_LIVE);
    if (h->n == h->room) {
        h->room = h->room ? 2 * h->room : 1024;
        h->word = realloc(h->word, h->room * sizeof *h->word);
        CHECK(h->word != NULL);
    }
    h->word[h->n++] = SH_CELL_WORD(cell);
}

static void hold_refs(struct sh_ctx *c, struct holders *h, const _Atomic uint64_t *word)
{
    struct sh_ref r;
    uint64_t w = atomic_load(word);
    if (SH_BSTATE(w) != SH_BLOCK_LIVE || !(w & SH_NODE))
        return;
    CHECK(sh_locate(c, sh_word_number(c, word), &r));
    const struct sh_node *n = (const struct sh_node *)r.data;
    CHECK(sizeof *n + 8ull * SH_NODE_NREFS(n->head) <= sh_block_bytes(c, &r, w));
    for (uint32_t i = 0; i < SH_NODE_NREFS(n->head); i++)
        if (SH_REF_IS_CELL(n->ref[i]))
            hold(c, h, n->ref[i]);
}

static void find_references(struct sh_ctx *c, struct holders *h, uint32_t page)
{
    uint64_t span = sh_span(c, page);
    if (SH_SPAN_STATE(span) == SH_LARGE)
        hold_refs(c, h, sh_words(c, page, SH_LARGE_TIER));
    if (SH_SPAN_STATE(span) != SH_SMALL)
        return;
    const struct sh_kind *k = &c->kinds[SH_SPAN_KIND(span)];
    for (uint32_t i = 0; i < k->nblocks; i++)
        hold_refs(c, h, sh_words(c, page, k->tier) + i);
}

static void find_holders(struct sh_ctx *c, struct holders *h)
{
    const struct sh_root *roots = (const struct sh_root *)(c->base + c->geo.roots);
    for (uint64_t i = 0; i < c->hdr->roots_used; i++)
        hold(c, h, atomic_load(&roots[i].cell));
    for (uint64_t page = 0; page < used_pages(c);
         page += SH_SPAN_NPAGES(sh_span(c, (uint32_t)page))) {
        uint32_t state = SH_SPAN_STATE(sh_span(c, (uint32_t)page));
        uint32_t kind = state == SH_PINS ? SH_KIND_PINS : SH_KIND_LEASES;
        find_references(c, h, (uint32_t)page);
        if (state != SH_PINS && state != SH_LEASES)
            continue;
        const _Atomic uint64_t *cells = (const _Atomic uint64_t *)sh_data(c, (uint32_t)page);
        for (uint32_t i = 0; i < c->kinds[kind].nblocks; i++)
            hold(c, h, atomic_load(&cells[(uint64_t)i * c->kinds[kind].size / 8]));
    }
}

static int by_number(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void check_counts(struct sh_ctx *c, const struct tally *t, uint32_t flags)
{
    struct holders h = {0};
    uint64_t held = 0;
    find_holders(c, &h);
    if (h.n != 0)
        qsort(h.word, h.n, sizeof *h.word, by_number);
    for (uint64_t i = 0, run; i < h.n; i += run, held++) {
        for (run = 1; i + run < h.n && h.word[i + run] == h.word[i]; run++) {
        }
        uint64_t count = SH_COUNT(atomic_load((_Atomic uint64_t *)(c->base + h.word[i] * 8)));
        CHECK(count >= run || count == SH_COUNT_MAX);
        CHECK(!(flags & EXACT_COUNTS) || count == run || count == SH_COUNT_MAX);
    }
    CHECK(!(flags & EXACT_COUNTS) || held == t->live);
    free(h.word);
}

/* Each entry that was used is in one place: under its name, or in the free list. */
static void check_roots(struct sh_ctx *c)
{
    const struct sh_root *roots = (const struct sh_root *)(c->base + c->geo.roots);
    uint64_t n = 0, used = c->hdr->roots_used;
    for (uint32_t b = 0; b <= SH_ROOT_BUCKETS; b++) {
        uint64_t e = b < SH_ROOT_BUCKETS ? c->hdr->root_buckets[b] : c->hdr->roots_free;
        for (; e != SH_NIL; e = roots[e].next) {
            CHECK(e < used && ++n <= used);
            CHECK(b == SH_ROOT_BUCKETS || roots[e].hash % SH_ROOT_BUCKETS == b);
        }
    }
    CHECK(n == used);
}

void test_say(void *arg, const char *invariant, const char *what)
{
    ++*(uint32_t *)arg;
    fprintf(stderr, "%s: sh_check: %s: %s\n", running, invariant, what);
}

void counters_must_be(struct sh_ctx *c, uint64_t blocks, uint64_t bytes)
{
    struct sh_sums sum = sh_sum(c);
    CHECK(sh_heap_objects(&sum) == blocks);
    CHECK(sh_heap_alloc(&sum) == bytes);
}

void must_be_sound(struct sh_ctx *c, uint32_t flags)
{
    struct tally t = {0};
    uint64_t free_runs = 0, orphans = 0;
    uint32_t violations = 0;
    check_records(c, &t);
    CHECK(t.inuse == atomic_load(&c->hdr->inuse_pages));
    for (uint32_t bin = 0; bin < SH_NBINS; bin++) {
        check_list(c, c->hdr->bins[bin], SH_FREE, bin, &free_runs);
        CHECK((c->hdr->bins[bin] != SH_NIL) == (c->hdr->bin_bits[bin / 64] >> bin % 64 & 1));
    }
    CHECK(free_runs == t.free_runs);
    for (uint32_t kind = 0; kind < SH_NCLASSES; kind++)
        check_list(c, c->hdr->orphans[kind], SH_SMALL, kind, &orphans);
    CHECK(orphans == t.orphans);
    if (flags & EXACT_COUNTS)
        CHECK(t.committed == sh_committed_units(c));
    check_counts(c, &t, flags);
    check_roots(c);
    CHECK_OK(sh_check(c, test_say, &violations));
    CHECK(violations == 0);
}

uint64_t live_blocks(struct sh_ctx *c)
{
    struct tally t = {0};
    check_records(c, &t);
    return t.live;
}

void must_be_empty(struct sh_ctx *c)
{
    CHECK(live_blocks(c) == 0);
}

/* The kernel: cachestat(2) counts the pages of the file that it holds, also those never written to,
 * and touches none. Where it is missing (before Linux 6.5), SEEK_DATA of pages that were written.
 */

static uint64_t pages_held(int fd, uint64_t off, uint64_t bytes)
{
    struct {
        uint64_t off, len;
    } range = {off, bytes};
    struct {
        uint64_t cache, dirty, writeback, evicted, recently_evicted;
    } stat = {0};
    if (syscall(451, fd, &range, &stat, 0) == 0)
        return stat.cache;
    return UINT64_MAX;
}

void kernel_must_agree(struct sh_ctx *c)
{
    uint64_t unit_bytes = 1ull << c->geo.unit_shift, os = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t units = used_pages(c) * sh_units_per_page(c), unit = 0;
    if (pages_held(c->fd, 0, 0) == UINT64_MAX)
        return;
    while (unit < units) {
        uint64_t n = 1;
        while (unit + n < units && unit_state(c, unit + n) == unit_state(c, unit))
            n++;
        bool held = unit_state(c, unit) == SH_UNIT_COMMITTED;
        uint64_t pages = pages_held(c->fd, c->geo.data + unit * unit_bytes, n * unit_bytes);
        CHECK(pages == (held ? n * unit_bytes / os : 0));
        unit += n;
    }
    if (unit * unit_bytes < c->geo.capacity) /* above the high-water mark is nothing */
        CHECK(pages_held(c->fd, c->geo.data + unit * unit_bytes,
                         c->geo.capacity - unit * unit_bytes) == 0);
}

/* The heap is empty, and everything of it was given back. */
void nothing_must_be_left(struct sh_ctx *lead)
{
    reap_dead(lead, UINT64_MAX);
    CHECK(sh_users(lead) == 0);
    collect(lead);
    collect(lead);
    release_all(lead);
    must_be_empty(lead);
    must_be_sound(lead, 0);
    kernel_must_agree(lead);
    CHECK(atomic_load(&lead->hdr->inuse_pages) == 0);
    CHECK(sh_committed_units(lead) == 0);
    counters_must_be(lead, 0, 0);
}

struct cast *cast_new(uint64_t capacity, uint64_t limit_bytes)
{
    struct cast *s = calloc(1, sizeof *s);
    s->fd = arena_new(capacity, limit_bytes);
    arena_lead(&s->lead, s->fd);
    arena_join(&s->a, s->fd);
    arena_join(&s->b, s->fd);
    return s;
}

void cast_end(struct cast *s)
{
    if (s->a.slot != NULL)
        arena_leave(&s->a);
    if (s->b.slot != NULL)
        arena_leave(&s->b);
    nothing_must_be_left(&s->lead);
    arena_leave(&s->lead);
    close(s->fd);
    free(s);
}
