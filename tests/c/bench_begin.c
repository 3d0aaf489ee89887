/*
 * What taking over costs a coordinator: sh_begin among many spans, committing stubbed.
 *
 *     cc -std=c11 -O2 -D_GNU_SOURCE -pthread -Wl,--wrap=sh_os_commit -I shmheap/csrc \
 *        tests/c/bench_begin.c $(ls shmheap/csrc/[!m]*.c shmheap/csrc/mark.c) -o bench_begin
 *     ./bench_begin 1000000
 *
 * (everything in csrc but csrc/py). For 1,000, 10,000, ... spans of one page, every other one
 * free, prints a line: spans, us of sh_begin, us of sh_reap of a dead process that had nothing.
 * Medians of CPU time.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "core.h"

#define ROUNDS  31
#define WAIT_MS 1000

/* Tables come into being when they are touched; the data area is never touched. */
int __wrap_sh_os_commit(struct sh_ctx *c, uint64_t off, uint64_t bytes);
int __wrap_sh_os_commit(struct sh_ctx *c, uint64_t off, uint64_t bytes)
{
    (void)c, (void)off, (void)bytes;
    return 0;
}

static void must(enum sh_status s)
{
    if (s != SH_OK) {
        fprintf(stderr, "bench_begin: %s\n", sh_status_text(s));
        exit(1);
    }
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int new_arena(uint64_t capacity)
{
    int fd = memfd_create("bench_begin", MFD_CLOEXEC);
    if (fd < 0) {
        perror("bench_begin: memfd_create");
        exit(1);
    }
    must(sh_format(fd, capacity, 1, ~0ull >> 2, "{}", 2));
    return fd;
}

/* Every other page is given back, so no two free ones merge. */
static void make_spans(struct sh_ctx *c, uint32_t nspans)
{
    uint32_t *page = malloc(nspans * sizeof *page);
    if (page == NULL)
        exit(1);
    for (uint32_t i = 0; i < nspans; i++) {
        must(sh_pages_take(c, 1, WAIT_MS, &page[i]));
        must(sh_pages_commit(c, page[i], 1));
        sh_set_span(c, page[i], SH_SPAN(SH_LARGE, 0, 0, 1)); /* a living user's block */
    }
    for (uint32_t i = 1; i < nspans; i += 2) {
        sh_set_span(c, page[i], SH_SPAN(SH_RESERVED, 0, c->owner, 1));
        must(sh_pages_give(c, &page[i], 1, WAIT_MS));
    }
    free(page);
}

static double take_over(int fd)
{
    struct sh_ctx lead = {0};
    uint32_t phase;
    must(sh_map(&lead, dup(fd), true));
    must(sh_attach_coordinator(&lead, WAIT_MS));
    lead.patience_ms = WAIT_MS;
    uint64_t from = now_ns();
    must(sh_begin(&lead, &phase));
    uint64_t took = now_ns() - from;
    sh_detach(&lead, true);
    sh_unmap(&lead);
    return (double)took / 1e3;
}

static double reap_one(int fd)
{
    struct sh_ctx lead = {0}, dead = {0};
    struct sh_reaped reaped;
    must(sh_map(&dead, dup(fd), true));
    must(sh_attach(&dead, WAIT_MS));
    uint32_t slot = dead.slot_index;
    sh_os_let_go(dead.alive); /* as if killed */
    must(sh_map(&lead, dup(fd), true));
    must(sh_attach_coordinator(&lead, WAIT_MS));
    lead.patience_ms = WAIT_MS;
    uint64_t from = now_ns();
    must(sh_reap(&lead, slot, UINT64_MAX, &reaped));
    uint64_t took = now_ns() - from;
    sh_detach(&lead, true);
    sh_unmap(&lead);
    sh_unmap(&dead);
    return (double)took / 1e3;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_of(double (*act)(int), int fd)
{
    double us[ROUNDS];
    for (int i = 0; i < ROUNDS; i++)
        us[i] = act(fd);
    qsort(us, ROUNDS, sizeof *us, compare);
    return us[ROUNDS / 2];
}

int main(int argc, char **argv)
{
    uint32_t most = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 1000000;
    for (uint32_t nspans = 1000; nspans <= most; nspans *= 10) {
        int fd = new_arena((nspans + 1024ull) << 13);
        struct sh_ctx c = {0};
        must(sh_map(&c, dup(fd), true));
        must(sh_attach(&c, WAIT_MS));
        make_spans(&c, nspans);
        printf("%u %.1f %.1f\n", nspans, median_of(take_over, fd), median_of(reap_one, fd));
        sh_detach(&c, true);
        sh_unmap(&c);
        close(fd);
    }
    return 0;
}
