/*
 * What an allocation costs, a slice at a time: tools/bench.py lock lets the core as it is, and one
 * without locks and undo log, take turns.
 *
 *     cc -std=c11 -O2 -flto -DNDEBUG -D_GNU_SOURCE -pthread -I shmheap/csrc \
 *        [-DSH_NO_LOCKS -DSH_NO_UNDO] \
 *        tests/c/bench_lock.c shmheap/csrc/*.c -o bench_lock
 *     ./bench_lock < /dev/zero | head
 *
 * For each byte on standard input prints a line, ns of CPU time each: alloc and drop of 64 B; alloc
 * of 64 B, and drop of 64 B, many side by side; alloc and drop of 80 KiB, which takes a run of
 * pages and gives it back.
 *
 *     ./bench_lock PAIRS
 *
 * only allocates and drops 64 B so often: for whoever counts instructions.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

#define PAIRS    20000
#define TOGETHER 500
#define LARGE    2000
#define WAIT_MS  1000

static void must(enum sh_status s)
{
    if (s != SH_OK) {
        fprintf(stderr, "bench_lock: %s\n", sh_status_text(s));
        exit(1);
    }
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void open_heap(struct sh_ctx *c)
{
    int fd = memfd_create("bench_lock", MFD_CLOEXEC);
    if (fd < 0) {
        perror("bench_lock: memfd_create");
        exit(1);
    }
    must(sh_format(fd, 64 << 20, 1, ~0ull >> 2, "{}", 2));
    must(sh_map(c, fd, true));
    must(sh_attach(c, WAIT_MS));
}

static void pairs(struct sh_ctx *c, uint64_t nbytes, uint64_t n)
{
    struct sh_ref r;
    for (uint64_t i = 0; i < n; i++) {
        must(sh_alloc(c, nbytes, false, WAIT_MS, &r));
        must(sh_unpin(c, &r, WAIT_MS));
    }
}

static double pair_ns(struct sh_ctx *c, uint64_t nbytes, uint64_t n)
{
    uint64_t from = now_ns();
    pairs(c, nbytes, n);
    return (double)(now_ns() - from) / (double)n;
}

/* Many, and then their drops: the spans are those of the round before. */
static void apart_ns(struct sh_ctx *c, double *alloc, double *drop)
{
    static struct sh_ref r[TOGETHER];
    uint64_t allocs = 0, drops = 0;
    for (int round = 0; round < PAIRS / TOGETHER; round++) {
        uint64_t from = now_ns(), between;
        for (int i = 0; i < TOGETHER; i++)
            must(sh_alloc(c, 64, false, WAIT_MS, &r[i]));
        between = now_ns();
        for (int i = 0; i < TOGETHER; i++)
            must(sh_unpin(c, &r[i], WAIT_MS));
        allocs += between - from;
        drops += now_ns() - between;
    }
    *alloc = (double)allocs / (PAIRS / TOGETHER * TOGETHER);
    *drop = (double)drops / (PAIRS / TOGETHER * TOGETHER);
}

int main(int argc, char **argv)
{
    struct sh_ctx c = {0};
    double alloc, drop;
    open_heap(&c);
    if (argc > 1)
        pairs(&c, 64, strtoull(argv[1], NULL, 10));
    while (argc == 1 && getchar() != EOF) {
        double pair = pair_ns(&c, 64, PAIRS);
        apart_ns(&c, &alloc, &drop);
        printf("%.2f %.2f %.2f %.2f\n", pair, alloc, drop, pair_ns(&c, 80000, LARGE));
        fflush(stdout);
    }
    sh_detach(&c, true);
    sh_unmap(&c);
    return 0;
}
