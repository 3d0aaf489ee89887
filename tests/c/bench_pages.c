/*
 * What a run of pages costs among many free runs: the page heap alone, committing stubbed.
 *
 *     cc -std=c11 -O2 -D_GNU_SOURCE -pthread -Wl,--wrap=sh_os_commit -I shmheap/csrc \
 *        tests/c/bench_pages.c $(ls shmheap/csrc/[!m]*.c shmheap/csrc/mark.c) -o bench_pages
 *     ./bench_pages 1000000
 *
 * (everything in csrc but csrc/py). For 10, 100, ... free runs of one page, every other page in
 * use, given back in random order, prints a line: free runs, ns to take a run of one page and give
 * it back, ns to give back any page in use and take another. All heaps are there together and take
 * turns; medians. The second figure has cache misses in it: it goes to places all over the tables.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

#define ROUNDS   31
#define OPS      20000
#define WAIT_MS  1000
#define MAX_RUNS 8

/* Tables come into being when they are touched; the data area is never touched. */
int __wrap_sh_os_commit(struct sh_ctx *c, uint64_t off, uint64_t bytes);
int __wrap_sh_os_commit(struct sh_ctx *c, uint64_t off, uint64_t bytes)
{
    (void)c, (void)off, (void)bytes;
    return 0;
}

struct bench {
    struct sh_ctx c;
    uint32_t *used; /* pages in use */
    uint32_t nfree;
    double hot[ROUNDS], any[ROUNDS];
};

static uint64_t rng = 88172645463325252ull;

static uint32_t below(uint32_t n)
{
    rng ^= rng << 13, rng ^= rng >> 7, rng ^= rng << 17; /* xorshift64 */
    return (uint32_t)(rng % n);
}

static void must(enum sh_status s)
{
    if (s != SH_OK) {
        fprintf(stderr, "bench_pages: %s\n", sh_status_text(s));
        exit(1);
    }
}

static uint32_t take(struct sh_ctx *c)
{
    uint32_t page;
    must(sh_pages_take(c, 1, WAIT_MS, &page));
    must(sh_pages_commit(c, page, 1));
    return page;
}

static void give(struct sh_ctx *c, uint32_t page)
{
    must(sh_pages_give(c, &page, 1, WAIT_MS));
}

static void open_heap(struct sh_ctx *c, uint64_t capacity)
{
    int fd = memfd_create("bench_pages", MFD_CLOEXEC);
    if (fd < 0) {
        perror("bench_pages: memfd_create");
        exit(1);
    }
    must(sh_format(fd, capacity, 1, ~0ull >> 2, "{}", 2));
    must(sh_map(c, fd, true));
    must(sh_attach(c, WAIT_MS));
}

/* 2 * nfree pages in a row, those of odd place given back in random order. */
static void prepare(struct bench *b, uint32_t nfree)
{
    open_heap(&b->c, (2ull * nfree + 1024) << 13);
    b->nfree = nfree;
    b->used = malloc(nfree * sizeof *b->used);
    uint32_t *back = malloc(nfree * sizeof *back);
    if (b->used == NULL || back == NULL)
        exit(1);
    for (uint32_t i = 0; i < nfree; i++) {
        b->used[i] = take(&b->c);
        back[i] = take(&b->c);
    }
    take(&b->c); /* so that the last one given back does not merge with what follows */
    for (uint32_t i = nfree; i-- > 0;) {
        uint32_t k = below(i + 1), page = back[k];
        back[k] = back[i];
        give(&b->c, page);
    }
    free(back);
}

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static double hot(struct bench *b)
{
    double start = now_ns();
    for (int i = 0; i < OPS; i++)
        give(&b->c, take(&b->c));
    return (now_ns() - start) / OPS;
}

static double any(struct bench *b)
{
    double start = now_ns();
    for (int i = 0; i < OPS; i++) {
        uint32_t k = below(b->nfree);
        give(&b->c, b->used[k]);
        b->used[k] = take(&b->c);
    }
    return (now_ns() - start) / OPS;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x)
{
    qsort(x, ROUNDS, sizeof *x, compare);
    return x[ROUNDS / 2];
}

int main(int argc, char **argv)
{
    static struct bench heaps[MAX_RUNS];
    uint32_t most = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 1000000, n = 0;
    for (uint32_t nfree = 10; nfree <= most && n < MAX_RUNS; nfree *= 10)
        prepare(&heaps[n++], nfree);
    for (int round = 0; round < ROUNDS; round++) /* first what leaves the free runs as they are */
        for (uint32_t i = 0; i < n; i++)
            heaps[i].hot[round] = hot(&heaps[i]);
    for (int round = 0; round < ROUNDS; round++)
        for (uint32_t i = 0; i < n; i++)
            heaps[i].any[round] = any(&heaps[i]);
    for (uint32_t i = 0; i < n; i++)
        printf("%u %.1f %.1f\n", heaps[i].nfree, median(heaps[i].hot), median(heaps[i].any));
    return 0;
}
