/*
 * What the C tests share: an arena without a name, contexts that play processes, a coordinator, a
 * death at a chosen place, and a slow second opinion on what the books must look like.
 *
 * Each test runs in a child of its own with an alarm, so that one which crashes or hangs is one
 * failure.
 */
#ifndef SHMHEAP_TEST_SUPPORT_H
#define SHMHEAP_TEST_SUPPORT_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "core.h"

/* Aborts the test, saying where. */
#define CHECK(cond)                                  \
    do {                                             \
        if (!(cond))                                 \
            test_fail(__FILE__, __LINE__, #cond, 0); \
    } while (0)
#define CHECK_OK(status) CHECK_IS(status, SH_OK)
#define CHECK_IS(status, want)                                                     \
    do {                                                                           \
        enum sh_status status_ = (status);                                         \
        if (status_ != (want))                                                     \
            test_fail(__FILE__, __LINE__, #status " is not " #want, (int)status_); \
    } while (0)
_Noreturn void test_fail(const char *file, int line, const char *what, int status);

struct test {
    const char *name;
    void (*run)(void);
};
int test_main(const char *name, const struct test *tests, size_t n);
uint64_t test_scale(uint64_t n); /* n times SH_TEST_SCALE, less under a sanitizer */
uint64_t test_seed(void);

/* Random numbers; a seed gives the same ones always. */
struct rng {
    uint64_t state;
};
uint32_t rng_below(struct rng *, uint32_t n);

/* Arenas: files without a name, so that nothing can be left behind */
#define NO_LIMIT (1ull << 50)
int arena_new(uint64_t capacity, uint64_t limit_bytes);
void arena_join(struct sh_ctx *, int fd); /* a process */
void arena_lead(struct sh_ctx *, int fd); /* the coordinator; finishes what the last one left */
void arena_share(struct sh_ctx *,
                 struct sh_ctx *); /* uses the mapping of the second: for the thread
                                      sanitizer, which knows memory by its address */
void arena_leave(struct sh_ctx *); /* detaches in order */
void arena_die(struct sh_ctx *);   /* as if killed: only its liveness lock goes */

/* What a Python caller does around the core: repeat what was busy. */
struct sh_ref block_new(struct sh_ctx *, uint64_t nbytes);
void block_drop(struct sh_ctx *, struct sh_ref *);
enum sh_status block_adopt(struct sh_ctx *, uint64_t off, uint64_t gen, struct sh_ref *);

struct sh_ref node_new(struct sh_ctx *, uint32_t nrefs);
void node_store(struct sh_ctx *, const struct sh_ref *node, uint32_t i, const struct sh_ref *);

/* What a block's bytes from `from` on ought to be. Of long blocks the ends and some in between, at
 * least one of each OS page. */
void content_write(uint8_t *data, uint64_t from, uint64_t nbytes, uint64_t seed);
bool content_is(const uint8_t *data, uint64_t from, uint64_t nbytes, uint64_t seed);
bool content_is_zero(const uint8_t *data, uint64_t nbytes);

struct handle {
    uint64_t off, gen, cell;
    uint32_t seq;
};
struct handle handle_of(const struct sh_ctx *, const struct sh_ref *); /* without a lease */
struct handle handle_lease(struct sh_ctx *, const struct sh_ref *);
enum sh_status handle_open(struct sh_ctx *, const struct handle *, struct sh_ref *);

/* Coordinator */
void reap_dead(struct sh_ctx *lead, uint64_t lease_cutoff_ns);
uint64_t collect(struct sh_ctx *lead);        /* a cycle; blocks swept */
uint64_t end_collection(struct sh_ctx *lead); /* what follows marking */
uint64_t release_all(struct sh_ctx *lead);    /* bytes */

/* Death: a forked child dies at the n-th passing of a crash point. */
extern const char *die_at;
extern uint32_t die_in;
void die_when(const char *point, uint32_t n);
bool child_survives(void (*run)(void *), void *arg, const char *point, uint32_t n);

/* What somebody else does when the next operation passes a crash point. */
void at_moment(const char *point, void (*act)(void *), void *arg);
#define MOMENT_CAME(point) CHECK(!moment_waits() && "nobody passed " point)
bool moment_waits(void);

/* Somebody is stopped with the heap lock, and goes on later. */
struct stopped {
    pthread_t thread;
    pthread_barrier_t barrier;
    struct sh_ctx *c;
};
void stop_with_heap_lock(void *stopped);
void go_on(struct stopped *);

/* The second opinion, at a quiet moment */
enum {
    EXACT_COUNTS = 1
}; /* nobody died: each count is that of its holders */
void must_be_sound(struct sh_ctx *, uint32_t flags);
void test_say(void *violations, const char *invariant, const char *what); /* for sh_check */
void must_be_empty(struct sh_ctx *);                                      /* no block lives */
void counters_must_be(struct sh_ctx *, uint64_t blocks, uint64_t bytes);
uint64_t live_blocks(struct sh_ctx *);
void kernel_must_agree(struct sh_ctx *);
void nothing_must_be_left(struct sh_ctx *lead); /* after the last user */

/* Two processes and a coordinator. At the end those that have not died leave, and nothing is left.
 */
struct cast {
    int fd;
    struct sh_ctx a, b, lead;
};
struct cast *cast_new(uint64_t capacity, uint64_t limit_bytes);
void cast_end(struct cast *);

#endif
