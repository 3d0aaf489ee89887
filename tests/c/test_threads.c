/*
 * Threads that play processes, all on one mapping, so that the thread sanitizer sees every access; a
 * coordinator collects, stamps, releases and reaps meanwhile.
 *
 * Each block says by its first bytes what the others must be, and its bytes are written once, before
 * anybody else knows of it. Whoever holds it checks them: an overlap, a use after free, or a page given
 * back under its user, shows as a wrong byte.
 */
#include "support.h"

#include <pthread.h>
#include <string.h>
#include <unistd.h>

#define WORKERS  3
#define HELD     48u
#define LETTERS  64u
#define NAMES    8u
#define CAPACITY (48ull << 20)

/* Content */

static uint64_t seed_of(const struct sh_ref *r)
{
    uint64_t seed;
    memcpy(&seed, r->data, sizeof seed);
    return seed;
}

static uint8_t byte_of(uint64_t seed, uint64_t i)
{
    return (uint8_t)((seed >> (i % 7 * 8)) + i * 31);
}

/* Small blocks whole; of large ones, the ends and some in between. */
static uint64_t next_byte(uint64_t i, uint64_t n)
{
    return n <= 512 || i < 64 || i + 64 >= n ? i + 1 : i + 257 < n - 64 ? i + 257 : n - 64;
}

static void write_content(struct sh_ref *r, uint64_t seed)
{
    memcpy(r->data, &seed, sizeof seed);
    for (uint64_t i = sizeof seed; i < r->nbytes; i = next_byte(i, r->nbytes))
        r->data[i] = byte_of(seed, i);
}

static void check_content(const struct sh_ref *r, uint64_t nbytes)
{
    uint64_t seed = seed_of(r);
    CHECK(r->nbytes == nbytes && seed >> 20 == nbytes);
    for (uint64_t i = sizeof seed; i < r->nbytes; i = next_byte(i, r->nbytes))
        CHECK(r->data[i] == byte_of(seed, i));
}

/* What is on its way between the workers: handles, as bytes that may be delivered twice */

struct letters {
    pthread_mutex_t lock;
    struct handle handle[LETTERS];
    uint64_t nbytes[LETTERS]; /* 0: no letter */
};

struct play {
    int fd;
    struct sh_ctx anchor, lead; /* anchor: the mapping that all share */
    struct letters letters;
    _Atomic uint32_t working;
    _Atomic uint64_t stale, full, deaths, opened;
    uint64_t steps;
    bool mortal;
    struct sh_ctx *shared; /* threads of one process share a context */
};

struct worker {
    struct play *play;
    struct sh_ctx own, *c;
    struct rng rng;
    struct sh_ref held[HELD];
    uint64_t count;
};

static uint64_t random_size(struct rng *rng)
{
    uint32_t kind = rng_below(rng, 100);
    if (kind < 70)
        return 8 + rng_below(rng, 600);
    if (kind < 90)
        return 8 + rng_below(rng, 12000);
    if (kind < 97)
        return 8 + rng_below(rng, 66000);
    return 66000 + rng_below(rng, 200000);
}

static void join_shared(struct sh_ctx *c, struct play *p)
{
    CHECK_OK(sh_map(c, dup(p->fd), true));
    arena_share(c, &p->anchor);
    CHECK_OK(sh_attach(c, 10000));
}

/* Steps of a worker. held[i].nbytes 0: an empty hand */

static void make(struct worker *w, struct sh_ref *r)
{
    uint64_t nbytes = random_size(&w->rng);
    bool zero = rng_below(&w->rng, 4) == 0;
    enum sh_status status = sh_alloc(w->c, nbytes, zero, 1000, r);
    if (status != SH_OK) {
        CHECK(status == SH_BUSY || status == SH_FULL);
        atomic_fetch_add(&w->play->full, status == SH_FULL);
        r->nbytes = 0;
        return;
    }
    for (uint64_t i = 0; zero && i < nbytes; i = next_byte(i, nbytes))
        CHECK(r->data[i] == 0);
    write_content(r, nbytes << 20 | (++w->count & 0xfffff));
}

static void drop(struct worker *w, struct sh_ref *r)
{
    check_content(r, r->nbytes);
    block_drop(w->c, r);
    r->nbytes = 0;
}

static void flush(struct sh_ctx *c)
{
    while (sh_flush(c, 10000) == SH_BUSY) {
    }
}

static void post(struct worker *w, struct sh_ref *r)
{
    struct letters *l = &w->play->letters;
    bool leased = rng_below(&w->rng, 3) != 0;
    struct handle h = leased ? handle_lease(w->c, r) : handle_of(w->c, r);
    uint32_t i = rng_below(&w->rng, LETTERS);
    pthread_mutex_lock(&l->lock);
    struct handle before = l->handle[i];
    bool was = l->nbytes[i] != 0;
    l->handle[i] = h;
    l->nbytes[i] = r->nbytes;
    pthread_mutex_unlock(&l->lock);
    if (was && before.seq != 0) { /* nobody will open it any more */
        struct sh_ref lost;
        if (handle_open(w->c, &before, &lost) == SH_OK)
            block_drop(w->c, &lost);
    }
    if (leased && rng_below(&w->rng, 4) == 0) { /* the sender changes its mind: too late, perhaps */
        enum sh_status status = sh_lease_drop(w->c, h.off, h.cell, h.seq, 10000);
        CHECK(status == SH_OK || status == SH_DEFERRED || status == SH_STALE);
    }
    flush(w->c);
}

static void open_letter(struct worker *w, struct sh_ref *r)
{
    struct letters *l = &w->play->letters;
    uint32_t i = rng_below(&w->rng, LETTERS);
    bool keep = rng_below(&w->rng, 2); /* it may be opened again */
    pthread_mutex_lock(&l->lock);
    struct handle h = l->handle[i];
    uint64_t nbytes = l->nbytes[i];
    if (!keep)
        l->nbytes[i] = 0;
    pthread_mutex_unlock(&l->lock);
    if (nbytes == 0)
        return;
    enum sh_status status = handle_open(w->c, &h, r);
    if (status != SH_OK) {
        CHECK_IS(status, SH_STALE);
        atomic_fetch_add(&w->play->stale, 1);
        r->nbytes = 0;
        return;
    }
    atomic_fetch_add(&w->play->opened, 1);
    check_content(r, nbytes);
}

static void name(struct worker *w, struct sh_ref *r)
{
    char text[2] = {'n', (char)('0' + rng_below(&w->rng, NAMES))};
    enum sh_status status = SH_BUSY;
    switch (rng_below(&w->rng, 4)) {
    case 0:
        while (r->nbytes != 0 && (status = sh_root_set(w->c, text, 2, r, 10000)) == SH_BUSY) {
        }
        CHECK(status == SH_OK || status == SH_DEFERRED || r->nbytes == 0);
        break;
    case 1:
        while ((status = sh_root_clear(w->c, text, 2, 10000)) == SH_BUSY) {
        }
        CHECK(status == SH_OK || status == SH_DEFERRED || status == SH_ABSENT);
        break;
    default:
        if (r->nbytes != 0)
            break;
        while ((status = sh_root_get(w->c, text, 2, 10000, r)) == SH_BUSY) {
        }
        CHECK(status == SH_OK || status == SH_ABSENT);
        if (status == SH_OK)
            check_content(r, r->nbytes);
        else
            r->nbytes = 0;
    }
    flush(w->c);
}

static void copy(struct worker *w, const struct sh_ref *from, struct sh_ref *to)
{
    enum sh_status status = sh_repin(w->c, from, 10000, to);
    if (status != SH_OK)
        to->nbytes = 0;
    CHECK(status == SH_OK || status == SH_BUSY);
}

/* Gone with everything in its hands; another takes its place. */
static void die(struct worker *w)
{
    arena_die(&w->own);
    memset(w->held, 0, sizeof w->held);
    join_shared(&w->own, w->play);
    atomic_fetch_add(&w->play->deaths, 1);
}

static void work_step(struct worker *w)
{
    struct sh_ref *r = &w->held[rng_below(&w->rng, HELD)], *other = &w->held[rng_below(&w->rng, HELD)];
    uint32_t what = rng_below(&w->rng, 100);
    if (w->play->mortal && rng_below(&w->rng, 1500) == 0)
        die(w);
    else if (what < 8)
        name(w, r);
    else if (r->nbytes == 0 && what < 25)
        open_letter(w, r);
    else if (r->nbytes == 0)
        make(w, r);
    else if (what < 25)
        post(w, r);
    else if (what < 32 && other->nbytes == 0)
        copy(w, r, other);
    else
        drop(w, r);
}

static void *work(void *arg)
{
    struct worker *w = arg;
    if (w->play->shared != NULL) {
        w->c = w->play->shared;
    } else {
        join_shared(&w->own, w->play);
        w->c = &w->own;
    }
    for (uint64_t i = 0; i < w->play->steps; i++)
        work_step(w);
    for (uint32_t i = 0; i < HELD; i++)
        if (w->held[i].nbytes != 0)
            drop(w, &w->held[i]);
    if (w->play->shared == NULL)
        arena_leave(&w->own);
    atomic_fetch_sub(&w->play->working, 1);
    return NULL;
}

/* The coordinator, never idle */

static void lead_on(struct play *p)
{
    struct rng rng = {test_seed() + 1};
    for (uint32_t round = 0; atomic_load(&p->working) != 0; round++) {
        if (p->mortal)
            reap_dead(&p->lead, sh_os_now_ns() - 20000000);
        if (round % 8 == 3) { /* killed, and followed */
            arena_die(&p->lead);
            arena_lead(&p->lead, p->fd);
            arena_share(&p->lead, &p->anchor);
        }
        collect(&p->lead);
        if (round % 16 == 5) {
            uint32_t violations = 0;
            CHECK_OK(sh_check(&p->lead, test_say, &violations));
            CHECK(violations == 0); /* at any moment, not only at a quiet one */
        }
        uint64_t bytes, runs;
        bool more;
        if (rng_below(&rng, 2))
            CHECK_OK(sh_release(&p->lead, SH_STAMP_MAX, 1 << 20, &bytes, &runs, &more));
        else
            CHECK_OK(sh_release(&p->lead, sh_now_stamp(&p->lead), 1 << 18, &bytes, &runs, &more));
    }
}

static void drop_the_rest(struct play *p)
{
    struct sh_ctx c;
    struct sh_ref r;
    join_shared(&c, p);
    for (uint32_t i = 0; i < LETTERS; i++)
        if (p->letters.nbytes[i] != 0 && handle_open(&c, &p->letters.handle[i], &r) == SH_OK) {
            check_content(&r, p->letters.nbytes[i]);
            block_drop(&c, &r);
        }
    for (uint32_t i = 0; i < NAMES; i++) {
        char text[2] = {'n', (char)('0' + i)};
        enum sh_status status = sh_root_clear(&c, text, 2, 1000);
        CHECK(status == SH_OK || status == SH_ABSENT || status == SH_DEFERRED);
    }
    arena_leave(&c);
}

static void all_must_be_gone(struct play *p)
{
    reap_dead(&p->lead, UINT64_MAX);
    CHECK(sh_users(&p->lead) == 0);
    collect(&p->lead);
    collect(&p->lead);
    release_all(&p->lead);
    must_be_empty(&p->lead);
    must_be_sound(&p->lead, EXACT_COUNTS);
    kernel_must_agree(&p->lead);
    CHECK(atomic_load(&p->lead.hdr->inuse_pages) == 0);
    CHECK(atomic_load(&p->lead.hdr->committed_units) == 0);
}

static void play(uint64_t steps, bool mortal, bool one_process)
{
    struct play *p = calloc(1, sizeof *p);
    struct worker *w = calloc(WORKERS, sizeof *w);
    struct sh_ctx shared;
    pthread_t thread[WORKERS];
    p->fd = arena_new(CAPACITY, NO_LIMIT);
    CHECK_OK(sh_map(&p->anchor, dup(p->fd), true));
    arena_lead(&p->lead, p->fd);
    arena_share(&p->lead, &p->anchor);
    pthread_mutex_init(&p->letters.lock, NULL);
    p->steps = steps;
    p->mortal = mortal;
    p->working = WORKERS;
    if (one_process) {
        join_shared(&shared, p);
        p->shared = &shared;
    }
    for (uint32_t i = 0; i < WORKERS; i++) {
        w[i].play = p;
        w[i].rng.state = test_seed() + 7919 * (i + 1);
        CHECK(pthread_create(&thread[i], NULL, work, &w[i]) == 0);
    }
    lead_on(p);
    for (uint32_t i = 0; i < WORKERS; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
    CHECK(atomic_load(&p->opened) > 0);
    if (one_process)
        arena_leave(&shared);
    must_be_sound(&p->lead, 0);
    drop_the_rest(p);
    all_must_be_gone(p);
    printf("   %llu opened, %llu stale, %llu full, %llu deaths, %llu collections\n",
           (unsigned long long)p->opened, (unsigned long long)p->stale, (unsigned long long)p->full,
           (unsigned long long)p->deaths, (unsigned long long)p->lead.hdr->num_gc);
    fflush(stdout);
    arena_leave(&p->lead);
    sh_unmap(&p->anchor);
    close(p->fd);
    free(w);
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
