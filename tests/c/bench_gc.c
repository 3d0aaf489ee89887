/*
 * What a collection costs, for tools/bench.py gc. Alone:
 *
 *     cc -std=c11 -O2 -flto -DNDEBUG -D_GNU_SOURCE -pthread -I shmheap/csrc [-DSH_NO_BARRIER] \
 *        tests/c/bench_gc.c shmheap/csrc/*.c -o bench_gc
 *
 *     ./bench_gc graph|tree BLOCKS CYCLES
 *
 * builds a graph and collects it, and then, when nobody names it any more, once again. Prints a
 * line for each: blocks marked, and blocks swept; ns of CPU time to clear marks, to mark, to end
 * the marking, to sweep, to stamp. `graph`: nodes of two to four references and leaves, in random
 * places; `tree`: a binary tree, laid breadth first. tools/bench/gc_peer.go builds the same.
 *
 *     ./bench_gc waits BLOCKS ROUNDS
 *
 * lets another process allocate and drop 64 B, and prints a line each: ns, p50, p99, p99.99 and the
 * longest, of its allocations in the time of a cycle without one, and then with one.
 *
 *     ./bench_gc stores < /dev/zero | head
 *
 * prints for each byte on standard input a line, ns each: of storing a reference in a node, and of
 * alloc and drop of 64 B; then both again with a collection in its phase of marking.
 *
 *     ./bench_gc stores PAIRS
 *
 * only stores so often: for whoever counts instructions.
 */
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

#define WAIT_MS 10000
#define TIMES   20000

static void must(enum sh_status s)
{
    if (s != SH_OK) {
        fprintf(stderr, "bench_gc: %s\n", sh_status_text(s));
        exit(1);
    }
}

static uint64_t now_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t cpu_ns(void)
{
    return now_ns(CLOCK_THREAD_CPUTIME_ID);
}

static int new_file(uint64_t blocks)
{
    int fd = memfd_create("bench_gc", MFD_CLOEXEC);
    if (fd < 0) {
        perror("bench_gc: memfd_create");
        exit(1);
    }
    must(sh_format(fd, (64ull << 20) + 128 * blocks, 1, ~0ull >> 2, "{}", 2));
    return fd;
}

static void join(struct sh_ctx *c, int fd)
{
    must(sh_map(c, dup(fd), true));
    must(sh_attach(c, WAIT_MS));
}

static void lead(struct sh_ctx *c, int fd)
{
    uint32_t phase;
    must(sh_map(c, dup(fd), true));
    must(sh_attach_coordinator(c, WAIT_MS));
    must(sh_begin(c, &phase));
}

static void finish(struct sh_ctx *c, enum sh_status s)
{
    while (s == SH_DEFERRED || s == SH_BUSY)
        s = sh_flush(c, WAIT_MS);
    must(s);
}

/* Graphs */

static uint64_t next_random(uint64_t *state) /* xorshift64*, as in gc_peer.go */
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dull;
}

static uint32_t random_below(uint64_t *state, uint32_t n)
{
    return (uint32_t)((next_random(state) >> 32) * n >> 32);
}

/* References of the i-th of n blocks in the order of the graph; 0: a leaf. */
static uint32_t degree(bool tree, uint32_t i, uint32_t n)
{
    if (tree)
        return 2ull * i + 1 < n ? 2 : 0;
    return i < 64 || i % 5 < 2 ? 2 + i % 3 : 0;
}

/* Where in memory each block lies: place[k] is the k-th that is allocated. */
static uint32_t *order(bool tree, uint32_t n, uint64_t *state)
{
    uint32_t *place = malloc(n * sizeof *place);
    if (place == NULL)
        must(SH_NOMEM);
    for (uint32_t k = 0; k < n; k++)
        place[k] = k;
    for (uint32_t k = n; !tree && k > 1; k--) {
        uint32_t other = random_below(state, k), was = place[k - 1];
        place[k - 1] = place[other];
        place[other] = was;
    }
    return place;
}

/* A node's references are the next blocks that nobody names yet; the last of four, and all when
 * there is no such block, are to any. */
static void connect(struct sh_ctx *c, const struct sh_ref *at, bool tree, uint32_t n,
                    uint64_t *state)
{
    for (uint32_t i = 0, next = 1; i < n; i++)
        for (uint32_t k = 0, d = degree(tree, i, n); k < d; k++) {
            bool any = k == 3 || next >= n;
            if (any && tree)
                continue;
            finish(c, sh_node_store(c, &at[i], k, &at[any ? random_below(state, n) : next++],
                                    WAIT_MS));
        }
}

/* The graph hangs on a node that names itself, too; and that one, on a name. */
static void hang(struct sh_ctx *c, const struct sh_ref *first)
{
    struct sh_ref top;
    must(sh_node_new(c, SH_NODE_PLAIN, 2, 0, WAIT_MS, &top));
    finish(c, sh_node_store(c, &top, 0, first, WAIT_MS));
    finish(c, sh_node_store(c, &top, 1, &top, WAIT_MS));
    must(sh_root_set(c, "graph", 5, &top, WAIT_MS));
    finish(c, sh_unpin(c, &top, WAIT_MS));
}

static void build(struct sh_ctx *c, bool tree, uint32_t n)
{
    uint64_t state = 1;
    uint32_t *place = order(tree, n, &state);
    struct sh_ref *at = malloc(n * sizeof *at);
    if (at == NULL)
        must(SH_NOMEM);
    for (uint32_t k = 0; k < n; k++) {
        uint32_t i = place[k], d = degree(tree, i, n);
        must(d ? sh_node_new(c, SH_NODE_PLAIN, d, 0, WAIT_MS, &at[i])
               : sh_alloc(c, 48, true, WAIT_MS, &at[i]));
    }
    connect(c, at, tree, n, &state);
    hang(c, &at[0]);
    for (uint32_t i = 0; i < n; i++)
        finish(c, sh_unpin(c, &at[i], WAIT_MS));
    free(at);
    free(place);
}

/* Cycles */

static void cycle(struct sh_ctx *c, bool tell)
{
    uint64_t marked, late, swept, bytes, units, t[6];
    t[0] = cpu_ns();
    must(sh_start_cycle(c));
    t[1] = cpu_ns();
    must(sh_mark(c, &marked));
    t[2] = cpu_ns();
    must(sh_finish_mark(c, &late));
    t[3] = cpu_ns();
    must(sh_sweep(c, &swept, &bytes));
    t[4] = cpu_ns();
    must(sh_stamp(c, sh_now_stamp(c), &units));
    must(sh_end_cycle(c, UINT64_MAX / 2, false, 0));
    t[5] = cpu_ns();
    if (!tell)
        return;
    printf("%llu %llu", (unsigned long long)marked + late, (unsigned long long)swept);
    for (int i = 1; i < 6; i++)
        printf(" %llu", (unsigned long long)(t[i] - t[i - 1]));
    printf("\n");
    fflush(stdout);
}

static void collect(bool tree, uint32_t blocks, uint32_t cycles)
{
    struct sh_ctx c = {0}, of = {0};
    int fd = new_file(blocks);
    lead(&of, fd);
    join(&c, fd);
    build(&c, tree, blocks);
    cycle(&of, false); /* a first one finds pages and holders that nobody looked at */
    for (uint32_t i = 0; i < cycles; i++)
        cycle(&of, true);
    finish(&c, sh_root_clear(&c, "graph", 5, WAIT_MS));
    cycle(&of, true);
}

/* Waiting */

#define FINE    6 /* bits of a number that tell one bucket from the next: within 1.6 % */
#define BUCKETS (64u << FINE)

struct shared {
    _Atomic uint32_t run, ran; /* round asked for, round that ended */
    _Atomic uint32_t stop;
    uint64_t count, longest, bucket[BUCKETS];
};

static uint32_t bucket_of(uint64_t ns)
{
    uint32_t high = 63u - (uint32_t)__builtin_clzll(ns | 1u << FINE);
    return (high - FINE) * (1u << FINE) + (uint32_t)(ns >> (high - FINE));
}

static uint64_t bucket_ns(uint32_t i)
{
    uint32_t shift = i >> FINE ? (i >> FINE) - 1 : 0;
    return (uint64_t)(i - shift * (1u << FINE)) << shift;
}

static uint64_t quantile(const struct shared *s, double q)
{
    uint64_t rank = (uint64_t)(q * (double)s->count), sum = 0;
    for (uint32_t i = 0; i < BUCKETS; i++)
        if ((sum += s->bucket[i]) > rank)
            return bucket_ns(i);
    return s->longest;
}

static void allocate(struct sh_ctx *c, struct shared *s)
{
    struct sh_ref r;
    uint64_t from = now_ns(CLOCK_MONOTONIC), to;
    while (!atomic_load_explicit(&s->stop, RLX)) {
        must(sh_alloc(c, 64, true, WAIT_MS, &r));
        to = now_ns(CLOCK_MONOTONIC);
        s->bucket[bucket_of(to - from)]++;
        s->longest = to - from > s->longest ? to - from : s->longest;
        s->count++;
        finish(c, sh_unpin(c, &r, WAIT_MS));
        from = now_ns(CLOCK_MONOTONIC);
    }
}

static void be_worker(int fd, struct shared *s)
{
    struct sh_ctx c = {0};
    join(&c, fd);
    for (uint32_t round = 1; round != 0; round++) {
        while (atomic_load(&s->run) != round)
            sched_yield();
        allocate(&c, s);
        atomic_store(&s->ran, round);
    }
}

/* The worker allocates while we collect, or, for as long, while we do nothing. */
static void let_run(struct shared *s, struct sh_ctx *of, uint64_t idle_ns)
{
    struct timespec t = {(time_t)(idle_ns / 1000000000u), (long)(idle_ns % 1000000000u)};
    memset(s->bucket, 0, sizeof s->bucket);
    s->count = s->longest = 0;
    atomic_store(&s->stop, 0);
    uint32_t round = atomic_fetch_add(&s->run, 1) + 1;
    if (idle_ns != 0)
        nanosleep(&t, NULL);
    else
        cycle(of, false);
    atomic_store(&s->stop, 1);
    while (atomic_load(&s->ran) != round)
        sched_yield();
    printf("%llu %llu %llu %llu\n", (unsigned long long)quantile(s, 0.5),
           (unsigned long long)quantile(s, 0.99), (unsigned long long)quantile(s, 0.9999),
           (unsigned long long)s->longest);
    fflush(stdout);
}

static void waits(uint32_t blocks, uint32_t rounds)
{
    struct sh_ctx c = {0}, of = {0};
    int fd = new_file(blocks);
    struct shared *s =
        mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t worker = s == MAP_FAILED ? -1 : fork();
    if (worker < 0)
        must(SH_SYSTEM);
    if (worker == 0)
        be_worker(fd, s);
    lead(&of, fd);
    join(&c, fd);
    build(&c, false, blocks);
    cycle(&of, false);
    for (uint32_t i = 0; i < rounds; i++) {
        uint64_t from = now_ns(CLOCK_MONOTONIC);
        cycle(&of, false);
        let_run(s, &of, now_ns(CLOCK_MONOTONIC) - from);
        let_run(s, &of, 0);
    }
    kill(worker, SIGKILL);
    waitpid(worker, NULL, 0);
}

/* Storing */

static void store_times(struct sh_ctx *c, const struct sh_ref r[3], uint64_t n)
{
    for (uint64_t i = 0; i < n; i++)
        must(sh_node_store(c, &r[0], 0, &r[1 + i % 2], WAIT_MS));
}

static double store_ns(struct sh_ctx *c, const struct sh_ref r[3])
{
    uint64_t from = cpu_ns();
    store_times(c, r, TIMES);
    return (double)(cpu_ns() - from) / TIMES;
}

static double alloc_ns(struct sh_ctx *c)
{
    uint64_t from = cpu_ns();
    for (int i = 0; i < TIMES; i++) {
        struct sh_ref r;
        must(sh_alloc(c, 64, false, WAIT_MS, &r));
        must(sh_unpin(c, &r, WAIT_MS));
    }
    return (double)(cpu_ns() - from) / TIMES;
}

static void stores(uint64_t pairs)
{
    struct sh_ctx c = {0}, of = {0};
    struct sh_ref r[3];
    int fd = new_file(1000);
    lead(&of, fd);
    join(&c, fd);
    must(sh_node_new(&c, SH_NODE_PLAIN, 2, 0, WAIT_MS, &r[0]));
    must(sh_alloc(&c, 48, true, WAIT_MS, &r[1]));
    must(sh_alloc(&c, 48, true, WAIT_MS, &r[2]));
    store_times(&c, r, pairs);
    while (pairs == 0 && getchar() != EOF) {
        double store = store_ns(&c, r), alloc = alloc_ns(&c);
        must(sh_start_cycle(&of));
        printf("%.2f %.2f", store, alloc);
        store = store_ns(&c, r);
        printf(" %.2f %.2f\n", store, alloc_ns(&c));
        fflush(stdout);
        must(sh_end_cycle(&of, UINT64_MAX / 2, false, 0));
    }
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    uint64_t n = argc > 2 ? strtoull(argv[2], NULL, 10) : 0;
    uint32_t times = argc > 3 ? (uint32_t)strtoul(argv[3], NULL, 10) : 1;
    bool tree = strcmp(what, "tree") == 0;
    if (strcmp(what, "stores") == 0)
        stores(n);
    else if (strcmp(what, "waits") == 0)
        waits((uint32_t)n, times);
    else if (tree || strcmp(what, "graph") == 0)
        collect(tree, (uint32_t)n, times);
    else
        return 2;
    return 0;
}
