/*
 * Threads that play processes, all on one mapping, so that the thread sanitizer sees every access;
 * a coordinator collects, stamps, releases, checks and reaps meanwhile, and dies now and then.
 */
#include "hammer.h"

#include <pthread.h>
#include <string.h>
#include <unistd.h>

#define WORKERS  3
#define CAPACITY (48ull << 20)

struct play {
    int fd;
    struct sh_ctx anchor, lead; /* anchor: the mapping that all share */
    struct mail mail;
    struct sh_ctx *shared; /* set: threads of one process share a context */
    uint64_t steps;
    uint32_t page; /* where the next release goes on */
    bool mortal;
    _Atomic uint32_t working;
    _Atomic uint64_t deaths;
};

struct worker {
    struct play *play;
    struct sh_ctx own;
    struct user user;
};

static void join_play(struct sh_ctx *c, struct play *p)
{
    CHECK_OK(sh_map(c, dup(p->fd), true));
    arena_share(c, &p->anchor);
    CHECK_OK(sh_attach(c, 10000));
}

/* Gone with everything in its hands; another takes its place. */
static void die(struct worker *w)
{
    arena_die(&w->own);
    memset(w->user.held, 0, sizeof w->user.held);
    join_play(&w->own, w->play);
    atomic_fetch_add(&w->play->deaths, 1);
}

static void *work(void *arg)
{
    struct worker *w = arg;
    struct play *p = w->play;
    w->user.c = p->shared != NULL ? p->shared : &w->own;
    if (p->shared == NULL)
        join_play(&w->own, p);
    for (uint64_t i = 0; i < p->steps; i++) {
        if (p->mortal && rng_below(&w->user.rng, 1500) == 0)
            die(w);
        user_step(&w->user);
    }
    user_drop_all(&w->user);
    if (p->shared == NULL)
        arena_leave(&w->own);
    atomic_fetch_sub(&p->working, 1);
    return NULL;
}

/* The coordinator, never idle */

static void lead_round(struct play *p, uint32_t round)
{
    uint64_t bytes, runs;
    uint32_t violations = 0, stamp = round % 2 ? SH_STAMP_MAX : sh_now_stamp(&p->lead);
    if (p->mortal)
        reap_dead(&p->lead, sh_os_now_ns() - 20000000);
    if (round % 8 == 3) { /* killed, and followed */
        arena_die(&p->lead);
        arena_lead(&p->lead, p->fd);
        arena_share(&p->lead, &p->anchor);
    }
    collect(&p->lead);
    CHECK_OK(sh_release(&p->lead, stamp, 1 << 19, &p->page, &bytes, &runs));
    if (round % 16 != 5)
        return;
    CHECK_OK(sh_check(&p->lead, test_say, &violations));
    CHECK(violations == 0); /* at any moment, not only at a quiet one */
    struct sh_shares shares;
    uint64_t sum = 0;
    CHECK_OK(sh_shares(&p->lead, &shares));
    for (uint32_t i = 0; i < SH_MAX_SLOTS; i++)
        sum += shares.pins[i] + shares.leases[i];
    CHECK(sum <= CAPACITY);
}

static struct play *play_new(uint64_t steps, bool mortal)
{
    struct play *p = calloc(1, sizeof *p);
    p->fd = arena_new(CAPACITY, NO_LIMIT);
    CHECK_OK(sh_map(&p->anchor, dup(p->fd), true));
    arena_lead(&p->lead, p->fd);
    arena_share(&p->lead, &p->anchor);
    p->steps = steps;
    p->mortal = mortal;
    p->working = WORKERS;
    return p;
}

static void run_workers(struct play *p)
{
    struct worker *w = calloc(WORKERS, sizeof *w);
    pthread_t thread[WORKERS];
    for (uint32_t i = 0; i < WORKERS; i++) {
        w[i].play = p;
        w[i].user =
            (struct user){.mail = &p->mail, .id = i + 2, .rng = {test_seed() + 7919 * (i + 1)}};
        CHECK(pthread_create(&thread[i], NULL, work, &w[i]) == 0);
    }
    for (uint32_t round = 0; atomic_load(&p->working) != 0; round++)
        lead_round(p, round);
    for (uint32_t i = 0; i < WORKERS; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
    free(w);
}

static void play(uint64_t steps, bool mortal, bool one_process)
{
    struct play *p = play_new(steps, mortal);
    struct sh_ctx c;
    if (one_process) {
        join_play(&c, p);
        p->shared = &c;
    }
    run_workers(p);
    CHECK(atomic_load(&p->mail.opened) > 0);
    must_be_sound(&p->lead, 0);
    if (!one_process)
        join_play(&c, p);
    mail_end(&p->mail, &c);
    arena_leave(&c);
    nothing_must_be_left(&p->lead);
    mail_say(&p->mail, &p->lead, p->deaths);
    arena_leave(&p->lead);
    sh_unmap(&p->anchor);
    close(p->fd);
    free(p);
}

static void test_processes(void)
{
    play(test_scale(400000), false, false);
}

static void test_mortal_processes(void)
{
    play(test_scale(400000), true, false);
}

static void test_threads_of_one_process(void)
{
    play(test_scale(200000), false, true);
}

int main(void)
{
    static const struct test tests[] = {
        {"processes", test_processes},
        {"mortal_processes", test_mortal_processes},
        {"threads_of_one_process", test_threads_of_one_process},
    };
    return test_main("threads", tests, sizeof tests / sizeof tests[0]);
}
