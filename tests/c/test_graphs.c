/*
 * A graph of nodes and leaves, which threads that play processes change at random, on one mapping,
 * so that the thread sanitizer sees every access; a coordinator collects and releases meanwhile,
 * reaps, checks, and dies at any step of a collection.
 *
 * Now and then all stop, with everything in their hands. A marker that knows nothing of touches,
 * epochs and counts then says which blocks can be reached: all of them live, and when two
 * collections have passed, no other does.
 */
#include "support.h"

#include <string.h>
#include <unistd.h>

#define WORKERS  3u
#define CAPACITY (48ull << 20)
#define HELD     24u
#define NAMES    24u
#define ROUNDS   8u

struct worker {
    struct play *play;
    struct sh_ctx c;
    struct rng rng;
    uint64_t count;
    struct sh_ref held[HELD];  /* word NULL: an empty hand */
    struct handle known[HELD]; /* of blocks that were held: perhaps gone */
};

struct play {
    int fd;
    struct sh_ctx anchor, lead; /* anchor: the mapping that all share */
    struct worker worker[WORKERS];
    struct rng rng;   /* the coordinator's */
    uint64_t chances; /* to die, of the coordinator */
    uint64_t steps;
    uint32_t page; /* where the next release goes on */
    bool mortal;
    _Atomic uint32_t working;
    _Atomic uint64_t deaths, full, stale, opened;
    uint64_t swept, successions;
};

static void join_play(struct sh_ctx *c, struct play *p)
{
    CHECK_OK(sh_map(c, dup(p->fd), true));
    arena_share(c, &p->anchor);
    CHECK_OK(sh_attach(c, 10000));
}

/* Users. A leaf is full of what its first bytes say. */

static bool is_node(const struct sh_ref *r)
{
    return atomic_load(r->word) & SH_NODE;
}

static uint32_t nrefs_of(const struct sh_ref *r)
{
    return SH_NODE_NREFS(atomic_load(&((struct sh_node *)r->data)->head));
}

static void look_at(const struct sh_ref *r)
{
    uint64_t seed;
    if (is_node(r)) {
        CHECK(sizeof(struct sh_node) + 8ull * nrefs_of(r) <= r->nbytes);
        return;
    }
    memcpy(&seed, r->data, sizeof seed);
    CHECK(content_is(r->data, sizeof seed, r->nbytes, seed));
}

/* What is to be done after it is put off: a wide node dies over many steps, and collections. */
static void drop(struct worker *w, struct sh_ref *r)
{
    enum sh_status status;
    look_at(r);
    w->known[rng_below(&w->rng, HELD)] = handle_of(&w->c, r);
    while ((status = sh_unpin(&w->c, r, 10000)) == SH_BUSY) {
    }
    CHECK(status == SH_OK || status == SH_DEFERRED);
    r->word = NULL;
}

static void drop_all(struct worker *w)
{
    for (uint32_t i = 0; i < HELD; i++)
        if (w->held[i].word != NULL)
            drop(w, &w->held[i]);
}

/* No room: let go of what is in our hands. The hand is empty, too, if there is nothing. */
static void got(struct worker *w, enum sh_status status, struct sh_ref *r)
{
    if (status == SH_OK) {
        look_at(r);
        return;
    }
    r->word = NULL;
    if (status == SH_FULL) {
        atomic_fetch_add(&w->play->full, 1);
        drop_all(w);
    }
    CHECK(status == SH_FULL || status == SH_BUSY || status == SH_ABSENT || status == SH_STALE);
}

static void make_leaf(struct worker *w, struct sh_ref *r)
{
    uint64_t n = 8 + rng_below(&w->rng, rng_below(&w->rng, 20) == 0 ? 80000 : 300);
    uint64_t seed = ++w->count;
    enum sh_status status = sh_alloc(&w->c, n, false, 1000, r);
    if (status == SH_OK) {
        memcpy(r->data, &seed, sizeof seed);
        content_write(r->data, sizeof seed, n, seed);
    }
    got(w, status, r);
}

/* Few references, as a rule; so many now and then that they die in slices. */
static void make_node(struct worker *w, struct sh_ref *r)
{
    uint32_t n = rng_below(&w->rng, 40) == 0 ? 9000 : 1 + rng_below(&w->rng, 6);
    enum sh_status status = sh_node_new(&w->c, SH_NODE_PLAIN, n, rng_below(&w->rng, 9), 1000, r);
    for (uint32_t i = 0; status == SH_OK && i < n; i++)
        CHECK(atomic_load(&((struct sh_node *)r->data)->ref[i]) == 0);
    got(w, status, r);
}

static void load(struct worker *w, const struct sh_ref *node, struct sh_ref *r)
{
    uint32_t i = rng_below(&w->rng, nrefs_of(node));
    got(w, sh_node_load(&w->c, node, i, 1000, r), r);
}

/* The same block into a part of a wide node, or into one place; nothing, seldom. */
static void store(struct worker *w, const struct sh_ref *node, const struct sh_ref *r)
{
    uint32_t n = nrefs_of(node), i = rng_below(&w->rng, n);
    if (r->word == NULL && rng_below(&w->rng, 8) != 0)
        return;
    uint32_t end = n > 1000 && i + 300 < n ? i + 300 : i + 1;
    for (; i < end; i++)
        node_store(&w->c, node, i, r->word == NULL ? NULL : r);
}

static void name(struct worker *w, struct sh_ref *r)
{
    char text = (char)('a' + rng_below(&w->rng, NAMES));
    enum sh_status status;
    if (r->word == NULL) {
        got(w, sh_root_get(&w->c, &text, 1, 10000, r), r);
        return;
    }
    status = rng_below(&w->rng, 9) == 0 ? sh_root_clear(&w->c, &text, 1, 10000)
                                        : sh_root_set(&w->c, &text, 1, r, 10000);
    while (status == SH_DEFERRED || status == SH_BUSY)
        status = sh_flush(&w->c, 10000);
    CHECK(status == SH_OK || status == SH_ABSENT || status == SH_FULL);
}

/* A handle of what was let go: garbage comes back by it, but what is condemned does not. */
static void open_known(struct worker *w, struct sh_ref *r)
{
    const struct handle *h = &w->known[rng_below(&w->rng, HELD)];
    enum sh_status status = h->gen == 0 && h->off == 0 ? SH_ABSENT : handle_open(&w->c, h, r);
    atomic_fetch_add(&w->play->opened, status == SH_OK);
    atomic_fetch_add(&w->play->stale, status == SH_STALE);
    got(w, status, r);
}

static void take(struct worker *w, struct sh_ref *r)
{
    struct sh_ref *node = &w->held[rng_below(&w->rng, HELD)];
    uint32_t what = rng_below(&w->rng, 100);
    if (node->word != NULL && is_node(node) && what < 35)
        load(w, node, r);
    else if (what < 55)
        name(w, r);
    else if (what < 65)
        open_known(w, r);
    else if (what < 93)
        make_node(w, r);
    else
        make_leaf(w, r);
}

static void step(struct worker *w)
{
    struct sh_ref *r = &w->held[rng_below(&w->rng, HELD)];
    uint32_t what = rng_below(&w->rng, 100);
    if (r->word == NULL)
        take(w, r);
    else if (what < 10)
        name(w, r);
    else if (what < 60 && is_node(r))
        store(w, r, &w->held[rng_below(&w->rng, HELD)]);
    else
        drop(w, r);
}

/* Gone with everything in its hands; another takes its place. */
static void die(struct worker *w)
{
    arena_die(&w->c);
    memset(w->held, 0, sizeof w->held);
    join_play(&w->c, w->play);
    atomic_fetch_add(&w->play->deaths, 1);
}

static void *work(void *arg)
{
    struct worker *w = arg;
    for (uint64_t i = 0; i < w->play->steps; i++) {
        if (w->play->mortal && rng_below(&w->rng, 3000) == 0)
            die(w);
        step(w);
    }
    CHECK_OK(sh_flush(&w->c, 10000));
    atomic_fetch_sub(&w->play->working, 1);
    return NULL;
}

/* The coordinator */

static void succeed(struct play *p)
{
    uint32_t phase;
    arena_die(&p->lead);
    CHECK_OK(sh_map(&p->lead, dup(p->fd), true));
    arena_share(&p->lead, &p->anchor);
    CHECK_OK(sh_attach_coordinator(&p->lead, 10000));
    CHECK_OK(sh_begin(&p->lead, &phase));
    p->successions++;
    if (phase == SH_SWEEP)
        end_collection(&p->lead);
    else if (phase != SH_IDLE)
        collect(&p->lead);
}

/* True: it died, and another has done the rest. */
static bool dies_here(struct play *p)
{
    bool dies = p->mortal && p->chances++ % 5 == 3;
    if (dies)
        succeed(p);
    return dies;
}

static void collect_or_die(struct play *p)
{
    uint64_t blocks;
    CHECK_OK(sh_start_cycle(&p->lead));
    if (dies_here(p))
        return;
    CHECK_OK(sh_mark(&p->lead, &blocks));
    if (dies_here(p))
        return;
    CHECK_OK(sh_finish_mark(&p->lead, &blocks));
    if (!dies_here(p))
        p->swept += end_collection(&p->lead);
}

static void must_be_without_violations(struct sh_ctx *c)
{
    uint32_t violations = 0;
    CHECK_OK(sh_check(c, test_say, &violations));
    CHECK(violations == 0);
}

static void lead_round(struct play *p)
{
    uint64_t bytes, runs;
    if (p->mortal)
        reap_dead(&p->lead, UINT64_MAX);
    collect_or_die(p);
    CHECK_OK(sh_release(&p->lead, SH_STAMP_MAX, 1 << 19, &p->page, &bytes, &runs));
    if (rng_below(&p->rng, 16) == 0)
        must_be_without_violations(&p->lead); /* at any moment, not only at a quiet one */
}

/* The marker. By word number: what was reached, and the way there. */

struct reached {
    struct sh_ctx *c;
    bool *seen;
    uint64_t *todo, ntodo, n;
};

static void reach(struct reached *m, uint64_t cell)
{
    struct sh_ref r;
    if (cell == 0)
        return;
    CHECK(sh_find_cell(m->c, cell, &r) && "what can be reached lives");
    uint64_t number = SH_CELL_WORD(cell);
    if (!m->seen[number]) {
        m->seen[number] = true;
        m->todo[m->ntodo++] = number;
        m->n++;
    }
}

static void reach_from_roots(struct reached *m)
{
    const struct sh_root *roots = (const struct sh_root *)(m->c->base + m->c->geo.roots);
    uint32_t used = (uint32_t)atomic_load(&m->c->hdr->used_pages);
    for (uint64_t i = 0; i < m->c->hdr->roots_used; i++)
        reach(m, roots[i].cell);
    for (uint32_t page = 0; page < used; page += SH_SPAN_NPAGES(sh_span(m->c, page))) {
        const uint64_t *cells = (const uint64_t *)sh_data(m->c, page);
        if (SH_SPAN_STATE(sh_span(m->c, page)) == SH_PINS)
            for (uint32_t i = 0; i < m->c->kinds[SH_KIND_PINS].nblocks; i++)
                reach(m, cells[i]);
    }
}

static void reach_all(struct reached *m, struct sh_ctx *c)
{
    struct sh_ref r;
    *m = (struct reached){.c = c, .seen = calloc(c->geo.data / 8, sizeof(bool))};
    m->todo = malloc(c->geo.data / 8 * sizeof *m->todo);
    CHECK(m->seen != NULL && m->todo != NULL);
    reach_from_roots(m);
    while (m->ntodo != 0) {
        CHECK(sh_locate(c, m->todo[--m->ntodo], &r));
        const struct sh_node *n = (const struct sh_node *)r.data;
        for (uint32_t i = 0; is_node(&r) && i < SH_NODE_NREFS(n->head); i++)
            reach(m, n->ref[i]);
    }
    free(m->todo);
}

/* All stand still. What can be reached lives, before and after; after two collections nothing else
 * does, and each count is that of the holders. */
static uint64_t must_be_exact(struct play *p)
{
    struct reached before, after;
    reap_dead(&p->lead, UINT64_MAX);
    reach_all(&before, &p->lead);
    p->swept += collect(&p->lead);
    p->swept += collect(&p->lead);
    reach_all(&after, &p->lead);
    CHECK(before.n == after.n &&
          memcmp(before.seen, after.seen, p->lead.geo.data / 8 * sizeof(bool)) == 0);
    CHECK(live_blocks(&p->lead) == after.n);
    must_be_sound(&p->lead, EXACT_COUNTS);
    free(before.seen);
    free(after.seen);
    return after.n;
}

static uint64_t play_round(struct play *p)
{
    pthread_t thread[WORKERS];
    p->working = WORKERS;
    for (uint32_t i = 0; i < WORKERS; i++)
        CHECK(pthread_create(&thread[i], NULL, work, &p->worker[i]) == 0);
    do
        lead_round(p);
    while (atomic_load(&p->working) != 0);
    for (uint32_t i = 0; i < WORKERS; i++)
        CHECK(pthread_join(thread[i], NULL) == 0);
    return must_be_exact(p);
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
    p->rng.state = test_seed() + 1;
    for (uint32_t i = 0; i < WORKERS; i++) {
        p->worker[i].play = p;
        p->worker[i].rng.state = test_seed() + 7919 * (i + 1);
        join_play(&p->worker[i].c, p);
    }
    return p;
}

static void play_end(struct play *p)
{
    for (uint32_t i = 0; i < NAMES; i++) {
        char text = (char)('a' + i);
        enum sh_status status = sh_root_clear(&p->worker[0].c, &text, 1, 1000);
        CHECK(status == SH_OK || status == SH_ABSENT || status == SH_DEFERRED);
        CHECK_OK(sh_flush(&p->worker[0].c, 1000));
    }
    for (uint32_t i = 0; i < WORKERS; i++) {
        drop_all(&p->worker[i]);
        arena_leave(&p->worker[i].c);
    }
    nothing_must_be_left(&p->lead);
    arena_leave(&p->lead);
    sh_unmap(&p->anchor);
    close(p->fd);
    free(p);
}

static void play(uint64_t steps, bool mortal)
{
    struct play *p = play_new(steps / ROUNDS, mortal);
    uint64_t lived = 0;
    for (uint32_t i = 0; i < ROUNDS; i++)
        lived += play_round(p);
    printf("   %llu blocks lived in %u looks, %llu swept in %llu collections, %llu handles opened, "
           "%llu stale, %llu times full, %llu and %llu deaths\n",
           (unsigned long long)lived, ROUNDS, (unsigned long long)p->swept,
           (unsigned long long)p->lead.hdr->num_gc, (unsigned long long)p->opened,
           (unsigned long long)p->stale, (unsigned long long)p->full, (unsigned long long)p->deaths,
           (unsigned long long)p->successions);
    CHECK(lived > 0 && p->swept > 0 && p->opened > 0 && p->stale > 0);
    CHECK(!mortal || (p->deaths > 0 && p->successions > 0));
    play_end(p);
}

static void test_a_graph(void)
{
    play(test_scale(200000), false);
}

static void test_a_graph_of_mortals(void)
{
    play(test_scale(200000), true);
}

int main(void)
{
    static const struct test tests[] = {
        {"a_graph", test_a_graph},
        {"a_graph_of_mortals", test_a_graph_of_mortals},
    };
    return test_main("graphs", tests, sizeof tests / sizeof tests[0]);
}
