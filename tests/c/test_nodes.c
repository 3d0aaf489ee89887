/*
 * Nodes: references between blocks, what dies with them, cycles, what is marked through them, and
 * deaths in the middle of all that.
 */
#include "support.h"

#include <string.h>
#include <unistd.h>

/* Another process's hold on a block. */
static struct sh_ref shared(struct sh_ctx *c, const struct sh_ctx *of, const struct sh_ref *r)
{
    struct handle h = handle_of(of, r);
    struct sh_ref got;
    CHECK_OK(handle_open(c, &h, &got));
    return got;
}

/* Into a node, and nowhere else. */
static void put_into(struct sh_ctx *c, const struct sh_ref *node, uint32_t i, struct sh_ref *r)
{
    node_store(c, node, i, r);
    block_drop(c, r);
}

static uint64_t count_of(const struct sh_ref *r)
{
    return SH_COUNT(atomic_load(r->word));
}

static void test_store_and_load(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref n = node_new(&s->a, 3), leaf = block_new(&s->a, 100), got;
    CHECK_IS(sh_node_load(&s->a, &n, 0, 1000, &got), SH_ABSENT);
    node_store(&s->a, &n, 0, &leaf);
    node_store(&s->a, &n, 2, &leaf);
    CHECK(count_of(&leaf) == 3);
    CHECK_OK(sh_node_load(&s->a, &n, 2, 1000, &got));
    CHECK(got.data == leaf.data && got.gen == leaf.gen && got.nbytes == 100);
    block_drop(&s->a, &got);
    must_be_sound(&s->a, EXACT_COUNTS);
    node_store(&s->a, &n, 0, NULL);
    block_drop(&s->a, &leaf);
    CHECK_OK(sh_node_load(&s->a, &n, 2, 1000, &got)); /* the node keeps it */
    block_drop(&s->a, &got);
    CHECK_IS(sh_node_load(&s->a, &n, 3, 1000, &got), SH_CORRUPT); /* it has three */
    block_drop(&s->a, &n);
    counters_must_be(&s->a, 0, 0);
    cast_end(s);
}

/* A store replaces what was there, which goes if nobody else has it. */
static void test_replacing_frees(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref n = node_new(&s->a, 1), n_of_b = shared(&s->b, &s->a, &n);
    struct handle h[5];
    for (uint32_t i = 0; i < 5; i++) {
        struct sh_ref leaf = block_new(&s->b, 30000 * i + 1), got;
        h[i] = handle_of(&s->b, &leaf);
        put_into(&s->b, &n_of_b, 0, &leaf);
        CHECK(i == 0 || handle_open(&s->a, &h[i - 1], &got) == SH_STALE);
        CHECK(live_blocks(&s->a) == 2);
    }
    block_drop(&s->a, &n);
    block_drop(&s->b, &n_of_b);
    cast_end(s);
}

/* A store of what is gone changes nothing. */
static void test_a_reference_to_a_freed_block_is_stale(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref n = node_new(&s->a, 1), leaf = block_new(&s->a, 100), old = leaf, got;
    block_drop(&s->a, &leaf);
    CHECK_IS(sh_node_store(&s->a, &n, 0, &old, 1000), SH_STALE);
    CHECK_IS(sh_node_load(&s->a, &n, 0, 1000, &got), SH_ABSENT);
    block_drop(&s->a, &n);
    cast_end(s);
}

/* node -> node -> ... : nothing is recursive. Each has a leaf, too. */
static struct sh_ref chain_new(struct sh_ctx *c, uint32_t n)
{
    struct sh_ref head = node_new(c, 2);
    for (uint32_t i = 1; i < n; i++) {
        struct sh_ref next = node_new(c, 2), leaf = block_new(c, i % 500 + 1);
        put_into(c, &next, 1, &leaf);
        put_into(c, &next, 0, &head);
        head = next;
    }
    return head;
}

static void test_long_chains_die(void)
{
    struct cast *s = cast_new(256 << 20, NO_LIMIT);
    uint32_t n = (uint32_t)test_scale(100000);
    struct sh_ref head = chain_new(&s->a, n);
    CHECK(live_blocks(&s->a) == 2ull * n - 1);
    block_drop(&s->a, &head);
    counters_must_be(&s->a, 0, 0);
    CHECK(live_blocks(&s->a) == 0);
    cast_end(s);
}

/* One large node with a great many children, which die in slices: its owner does other things in
 * between, and dies in the middle. */
static void test_the_dead_leave_a_death_half_done(void)
{
    struct cast *s = cast_new(64 << 20, NO_LIMIT);
    uint32_t n = 20000;
    struct sh_ref wide = node_new(&s->a, n), kept = block_new(&s->b, 64);
    struct sh_ref of_a = shared(&s->a, &s->b, &kept);
    for (uint32_t i = 0; i < n; i++) {
        struct sh_ref leaf = i % 2 ? of_a : block_new(&s->a, 48);
        node_store(&s->a, &wide, i, &leaf);
        if (i % 2 == 0)
            block_drop(&s->a, &leaf);
    }
    block_drop(&s->a, &of_a);
    CHECK(count_of(&kept) == n / 2 + 1);
    CHECK_IS(sh_unpin(&s->a, &wide, 0), SH_DEFERRED);
    CHECK(s->a.slot->dying != 0);
    arena_die(&s->a);
    collect(&s->lead); /* it is a root of what it still names, until it is reaped */
    CHECK(count_of(&kept) > 1);
    reap_dead(&s->lead, UINT64_MAX);
    CHECK(count_of(&kept) == 1);
    CHECK(live_blocks(&s->b) == 1);
    block_drop(&s->b, &kept);
    cast_end(s);
}

/* What is freed with the dead is counted whole, by what held it. */
static void test_reports_say_what_went_with_the_dead(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref held = node_new(&s->a, 2), sent = node_new(&s->a, 1), half = node_new(&s->a, 300);
    struct sh_ref leaf = block_new(&s->a, 1000), large = block_new(&s->a, 200000);
    struct sh_reaped r;
    put_into(&s->a, &held, 0, &leaf);
    put_into(&s->a, &sent, 0, &large);
    handle_lease(&s->a, &sent);
    block_drop(&s->a, &sent);
    for (uint32_t i = 0; i < 300; i++) {
        leaf = block_new(&s->a, 16);
        put_into(&s->a, &half, i, &leaf);
    }
    uint64_t half_bytes = half.nbytes;
    CHECK_IS(sh_unpin(&s->a, &half, 0), SH_DEFERRED); /* it dies in the middle of that */
    half_bytes -= atomic_load(&s->a.slot->freed_bytes);
    uint32_t slot = s->a.slot_index;
    arena_die(&s->a);
    CHECK_OK(sh_reap(&s->lead, slot, 0, &r));
    CHECK(!r.done && r.lease_bytes == 0);
    CHECK(r.pin_bytes == held.nbytes + 1000 + half_bytes + 300 * 16);
    CHECK_OK(sh_reap(&s->lead, slot, UINT64_MAX, &r));
    CHECK(r.done && r.pin_bytes == 0 && r.lease_bytes == 24 + 200000);
    cast_end(s);
}

/* A lease ends although its sender lives: who comes late, comes too late; its cell is used again.
 */
static void test_a_lease_ends_with_its_time(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref sent = node_new(&s->a, 1), large = block_new(&s->a, 200000), got;
    uint64_t dropped, bytes;
    put_into(&s->a, &sent, 0, &large);
    struct handle old = handle_lease(&s->a, &sent), taken = handle_lease(&s->a, &sent);
    CHECK_OK(handle_open(&s->b, &taken, &got));
    block_drop(&s->a, &sent);
    block_drop(&s->b, &got);
    CHECK(count_of(&sent) == 1);
    CHECK_OK(sh_expire_leases(&s->lead, 0, &dropped, &bytes)); /* it is younger */
    CHECK(dropped == 0 && bytes == 0);
    CHECK_OK(sh_expire_leases(&s->lead, UINT64_MAX, &dropped, &bytes));
    CHECK(dropped == 1 && bytes == 24 + 200000);
    CHECK_IS(handle_open(&s->b, &old, &got), SH_STALE);
    CHECK(sh_leases(s->a.slot) == 0);
    cast_end(s);
}

/* Collection */

static void test_cycles_are_collected(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref x = node_new(&s->a, 2), y = node_new(&s->a, 2), self = node_new(&s->a, 1);
    struct sh_ref leaf = block_new(&s->a, 1000), y_of_b = shared(&s->b, &s->a, &y);
    node_store(&s->a, &x, 0, &y);
    node_store(&s->a, &y, 0, &x);
    node_store(&s->a, &self, 0, &self);
    put_into(&s->a, &y, 1, &leaf);
    CHECK(collect(&s->lead) == 0);
    block_drop(&s->a, &x);
    block_drop(&s->a, &y);
    block_drop(&s->a, &self);
    CHECK(collect(&s->lead) == 1); /* self; y is held */
    block_drop(&s->b, &y_of_b);
    CHECK(live_blocks(&s->a) == 3);
    CHECK(collect(&s->lead) == 3);
    counters_must_be(&s->a, 0, 0);
    cast_end(s);
}

/* Epochs come round: a touch is of the collection that it was made in, and of no later one. */

#define RING   20u
#define EPOCHS 63u

static void test_an_old_touch_keeps_nothing(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref ring[RING], next;
    uint64_t blocks;
    for (uint32_t i = 0; i < RING; i++)
        ring[i] = node_new(&s->a, 1);
    for (uint32_t i = 0; i < RING; i++)
        node_store(&s->a, &ring[i], 0, &ring[(i + 1) % RING]);
    for (uint32_t i = 0; i < EPOCHS; i++) { /* each is touched in another one */
        CHECK_OK(sh_start_cycle(&s->lead));
        CHECK_OK(sh_mark(&s->lead, &blocks));
        if (i < RING) {
            CHECK_OK(sh_node_load(&s->a, &ring[i], 0, 1000, &next));
            block_drop(&s->a, &next);
        }
        CHECK_OK(sh_finish_mark(&s->lead, &blocks));
        CHECK(end_collection(&s->lead) == 0);
    }
    for (uint32_t i = 0; i < RING; i++)
        block_drop(&s->a, &ring[i]);
    CHECK(collect(&s->lead) == RING);
    cast_end(s);
}

/* What garbage names and others hold stays, with its count put right. */
static void test_garbage_lets_go(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref x = node_new(&s->a, 4), kept = block_new(&s->a, 3000);
    node_store(&s->a, &x, 0, &x);
    node_store(&s->a, &x, 1, &kept);
    node_store(&s->a, &x, 3, &kept);
    block_drop(&s->a, &x);
    CHECK(count_of(&kept) == 3);
    CHECK(collect(&s->lead) == 1);
    CHECK(count_of(&kept) == 1);
    must_be_sound(&s->a, EXACT_COUNTS);
    block_drop(&s->a, &kept);
    cast_end(s);
}

/* After a death the counters are put right by what is there. A block that the sweep has passed,
 * kept because it was touched, may go later with the garbage that held it; and a node that is dying
 * is counted as freed at its end. */
static void test_a_recount_beside_deaths_of_nodes(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref kept = block_new(&s->a, 100), garbage = node_new(&s->a, 30);
    struct sh_ref wide = node_new(&s->a, 600), leaf = block_new(&s->a, 300);
    uint64_t blocks;
    for (uint32_t i = 0; i < 600; i++)
        node_store(&s->a, &wide, i, &leaf);
    node_store(&s->a, &garbage, 0, &garbage);
    node_store(&s->a, &garbage, 1, &kept);
    block_drop(&s->a, &leaf);
    block_drop(&s->a, &garbage);
    CHECK(kept.page < garbage.page);
    s->lead.recount_blocks = true;
    CHECK_OK(sh_start_cycle(&s->lead));
    block_drop(&s->a, &kept); /* touched */
    CHECK_IS(sh_unpin(&s->a, &wide, 1000), SH_DEFERRED);
    CHECK_OK(sh_mark(&s->lead, &blocks));
    CHECK_OK(sh_finish_mark(&s->lead, &blocks));
    CHECK(end_collection(&s->lead) == 2);
    counters_must_be(&s->a, 2, wide.nbytes + 300);
    CHECK_OK(sh_flush(&s->a, 1000));
    counters_must_be(&s->a, 0, 0);
    cast_end(s);
}

/* What hangs on a name lives, however long the chain, and nothing else. */
static void test_marking_follows_references(void)
{
    struct cast *s = cast_new(64 << 20, NO_LIMIT);
    struct sh_ref head = chain_new(&s->a, 5000), got, lost = node_new(&s->a, 1);
    CHECK_OK(sh_root_set(&s->a, "chain", 5, &head, 1000));
    node_store(&s->a, &lost, 0, &lost);
    node_store(&s->a, &lost, 0, &lost);
    block_drop(&s->a, &head);
    block_drop(&s->a, &lost);
    CHECK(collect(&s->lead) == 1);
    CHECK(live_blocks(&s->a) == 9999);
    CHECK_OK(sh_root_get(&s->a, "chain", 5, 1000, &got));
    block_drop(&s->a, &got);
    CHECK_OK(sh_root_clear(&s->a, "chain", 5, 1000) == SH_DEFERRED ? sh_flush(&s->a, 1000) : SH_OK);
    CHECK(live_blocks(&s->a) == 0);
    cast_end(s);
}

/* A reference that is moved, while marking, from where the collector has yet to look to where it
 * has looked: rule 6 keeps what it names. */
static void test_a_reference_that_is_moved_while_marking(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref x = node_new(&s->a, 1), y = node_new(&s->a, 1), leaf = block_new(&s->a, 64);
    uint64_t marked, late, swept, bytes;
    struct handle h = handle_of(&s->a, &leaf);
    put_into(&s->a, &y, 0, &leaf);
    CHECK_OK(sh_start_cycle(&s->lead));
    CHECK_OK(sh_mark(&s->lead, &marked));
    CHECK(marked == 3);
    struct sh_ref fresh = node_new(&s->a, 1), got; /* made after the marking: touched */
    CHECK_OK(sh_node_load(&s->a, &y, 0, 1000, &got));
    put_into(&s->a, &fresh, 0, &got);
    node_store(&s->a, &y, 0, NULL);
    put_into(&s->a, &x, 0, &fresh); /* x is black already */
    CHECK_OK(sh_finish_mark(&s->lead, &late));
    CHECK_OK(sh_sweep(&s->lead, &swept, &bytes));
    CHECK(swept == 0);
    CHECK_OK(sh_end_cycle(&s->lead, UINT64_MAX / 2, false, 0));
    CHECK_OK(handle_open(&s->b, &h, &got));
    block_drop(&s->b, &got);
    must_be_sound(&s->a, EXACT_COUNTS);
    block_drop(&s->a, &x);
    block_drop(&s->a, &y);
    CHECK(live_blocks(&s->a) == 0);
    cast_end(s);
}

/* A sweep that is given up has freed some of what it condemned, and the rest names it: brought back
 * by a handle, that rest would lead to what is gone. */
static void test_a_sweep_that_is_given_up_goes_on(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct stopped stopped = {.c = &s->b};
    struct sh_ref x = node_new(&s->a, 2500), y = node_new(&s->a, 2), got;
    struct handle h = handle_of(&s->a, &y);
    uint32_t violations = 0;
    uint64_t n, bytes;
    CHECK(x.page < y.page && "x is swept first, and its span goes back");
    node_store(&s->a, &y, 1, &y);
    put_into(&s->a, &y, 0, &x);
    block_drop(&s->a, &y);
    CHECK_OK(sh_start_cycle(&s->lead));
    CHECK_OK(sh_mark(&s->lead, &n));
    CHECK_OK(sh_finish_mark(&s->lead, &n));
    s->lead.patience_ms = 1;
    at_moment("gc:sweeping", stop_with_heap_lock, &stopped);
    CHECK_IS(sh_sweep(&s->lead, &n, &bytes), SH_BUSY);
    MOMENT_CAME("gc:sweeping");
    CHECK(n == 1 && live_blocks(&s->a) == 1);
    go_on(&stopped);
    CHECK_OK(sh_check(&s->a, test_say, &violations));
    CHECK(violations == 0 && "what is condemned may name what is gone");
    s->lead.patience_ms = 10000;
    CHECK_IS(handle_open(&s->b, &h, &got), SH_STALE);
    CHECK_OK(sh_start_cycle(&s->lead)); /* the next one */
    CHECK_IS(handle_open(&s->b, &h, &got), SH_STALE);
    CHECK_OK(sh_mark(&s->lead, &n));
    end_collection(&s->lead);
    cast_end(s);
}

/* A count that a death left too high is brought back, so that a later drop frees at once. */
static void test_counts_that_are_too_high_are_lowered(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref n = node_new(&s->a, 2), leaf = block_new(&s->a, 64);
    node_store(&s->a, &n, 0, &leaf);
    CHECK(sh_count_up(leaf.word, leaf.gen, s->b.slot->phase)); /* and dies before its pin */
    CHECK(sh_count_up(n.word, n.gen, s->b.slot->phase));
    arena_die(&s->b);
    reap_dead(&s->lead, UINT64_MAX);
    CHECK(count_of(&leaf) == 3);
    collect(&s->lead);
    CHECK(count_of(&leaf) == 2 && count_of(&n) == 1);
    must_be_sound(&s->a, EXACT_COUNTS);
    block_drop(&s->a, &leaf);
    block_drop(&s->a, &n);
    CHECK(live_blocks(&s->a) == 0); /* without a further collection */
    cast_end(s);
}

/* Pauses */

#define WHILE_NS 2000000u

static void take_a_while(void *unused)
{
    uint64_t until = sh_os_now_ns() + WHILE_NS;
    (void)unused;
    while (sh_os_now_ns() < until)
        sh_os_pause();
}

static uint64_t last_pause(const struct sh_ctx *c)
{
    return atomic_load(&c->hdr->pause_ns[(atomic_load(&c->hdr->num_gc) - 1) % SH_PAUSES]);
}

/* Of the heap lock, which whoever needs pages waits for. */
static void test_a_pause_is_of_any_lock(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref leaf = block_new(&s->b, 100), kept = shared(&s->a, &s->b, &leaf);
    arena_die(&s->b);
    reap_dead(&s->lead, UINT64_MAX);
    at_moment("log:entry", take_a_while, NULL); /* the span is nobody's now */
    collect(&s->lead);
    MOMENT_CAME("log:entry");
    CHECK(last_pause(&s->lead) >= WHILE_NS);
    block_drop(&s->a, &kept);
    cast_end(s);
}

/* In which who opens a handle without a lease waits; also of a marking that is given up. */
static void test_a_pause_is_the_end_of_marking(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct stopped stopped = {.c = &s->b};
    uint64_t n;
    CHECK_OK(sh_start_cycle(&s->lead));
    CHECK_OK(sh_mark(&s->lead, &n));
    at_moment("gc:traced", take_a_while, NULL);
    CHECK_OK(sh_finish_mark(&s->lead, &n));
    MOMENT_CAME("gc:traced");
    end_collection(&s->lead);
    CHECK(last_pause(&s->lead) >= WHILE_NS);

    struct sh_ref leaf = block_new(&s->a, 100);
    CHECK_OK(sh_start_cycle(&s->lead));
    CHECK_OK(sh_mark(&s->lead, &n));
    s->lead.patience_ms = 2;
    at_moment("gc:traced", stop_with_heap_lock, &stopped);
    block_drop(&s->a, &leaf);
    leaf = block_new(&s->a, 100); /* touched, so it takes another pass */
    CHECK_IS(sh_finish_mark(&s->lead, &n), SH_BUSY);
    MOMENT_CAME("gc:traced");
    go_on(&stopped);
    s->lead.patience_ms = 10000;
    collect(&s->lead);
    CHECK(last_pause(&s->lead) >= WHILE_NS);
    block_drop(&s->a, &leaf);
    cast_end(s);
}

/* Deaths at the named points */

struct scene {
    int fd;
    struct sh_ctx witness, c, lead;
    struct sh_ref n, leaf;
};

static void drop_a_tree(void *arg)
{
    struct scene *s = arg;
    struct sh_ref n = node_new(&s->c, 3), m = node_new(&s->c, 2);
    struct sh_ref leaf = shared(&s->c, &s->witness, &s->leaf);
    node_store(&s->c, &n, 0, &leaf);
    node_store(&s->c, &m, 1, &leaf);
    block_drop(&s->c, &leaf);
    put_into(&s->c, &n, 2, &m);
    block_drop(&s->c, &n);
}

/* x names y, which names itself, and both name a leaf that is held. */
static void leave_a_circle(struct scene *s)
{
    struct sh_ref x = node_new(&s->c, 3), y = node_new(&s->c, 2);
    struct sh_ref leaf = shared(&s->c, &s->witness, &s->leaf);
    node_store(&s->c, &x, 0, &x);
    node_store(&s->c, &x, 1, &leaf);
    node_store(&s->c, &y, 0, &y);
    put_into(&s->c, &y, 1, &leaf);
    put_into(&s->c, &x, 2, &y);
    block_drop(&s->c, &x);
}

static void sweep_a_circle(void *arg)
{
    collect(&((struct scene *)arg)->lead);
}

static bool survives(void (*act)(void *), const char *point, uint32_t n)
{
    struct scene *s = calloc(1, sizeof *s);
    uint32_t phase;
    s->fd = arena_new(8 << 20, NO_LIMIT);
    arena_lead(&s->lead, s->fd);
    arena_join(&s->witness, s->fd);
    s->leaf = block_new(&s->witness, 64);
    arena_join(&s->c, s->fd);
    if (act == sweep_a_circle)
        leave_a_circle(s);
    bool survived = child_survives(act, s, point, n);
    arena_die(&s->c);
    arena_die(&s->lead);
    CHECK_OK(sh_map(&s->lead, dup(s->fd), true)); /* a successor */
    CHECK_OK(sh_attach_coordinator(&s->lead, 1000));
    CHECK_OK(sh_begin(&s->lead, &phase));
    if (phase == SH_SWEEP)
        end_collection(&s->lead);
    reap_dead(&s->lead, UINT64_MAX);
    collect(&s->lead);
    must_be_sound(&s->witness, EXACT_COUNTS);
    CHECK(live_blocks(&s->witness) == 1 && count_of(&s->leaf) == 1);
    block_drop(&s->witness, &s->leaf);
    CHECK(live_blocks(&s->witness) == 0);
    arena_leave(&s->witness);
    arena_leave(&s->lead);
    close(s->fd);
    free(s);
    return survived;
}

static void test_a_death_at_each_point_of_a_nodes_death(void)
{
    static const struct {
        const char *point;
        void (*act)(void *);
    } cases[] = {
        {"node:dying", drop_a_tree},    {"node:dying", sweep_a_circle},
        {"node:settled", drop_a_tree},  {"node:settled", sweep_a_circle},
        {"node:unlisted", drop_a_tree}, {"node:unlisted", sweep_a_circle},
        {"node:cleared", drop_a_tree},  {"node:cleared", sweep_a_circle},
        {"node:stored", drop_a_tree},
    };
    for (uint32_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint32_t n = 1;
        while (!survives(cases[i].act, cases[i].point, n))
            n++;
        CHECK(n > 2 && "it was passed");
    }
}

/* A coordinator that dies in the middle of a collection */

#define LINKS 40u

struct cycle {
    int fd;
    struct sh_ctx a, lead;
    struct sh_ref x, y, kept;
};

/* A chain that hangs on a name; y names a leaf; garbage that goes round and names what a holds. */
static struct cycle *cycle_new(void)
{
    struct cycle *s = calloc(1, sizeof *s);
    s->fd = arena_new(8 << 20, NO_LIMIT);
    arena_lead(&s->lead, s->fd);
    arena_join(&s->a, s->fd);
    struct sh_ref head = chain_new(&s->a, LINKS), leaf = block_new(&s->a, 300);
    struct sh_ref round = node_new(&s->a, 2), back = node_new(&s->a, 2);
    CHECK_OK(sh_root_set(&s->a, "chain", 5, &head, 1000));
    block_drop(&s->a, &head);
    s->x = node_new(&s->a, 2);
    s->y = node_new(&s->a, 1);
    s->kept = block_new(&s->a, 100000);
    content_write(leaf.data, 0, 300, 7);
    put_into(&s->a, &s->y, 0, &leaf);
    node_store(&s->a, &round, 1, &s->kept);
    node_store(&s->a, &round, 0, &back);
    put_into(&s->a, &back, 0, &round);
    block_drop(&s->a, &back);
    return s;
}

static void collect_once(void *arg)
{
    collect(&((struct cycle *)arg)->lead);
}

/* What others do while nobody leads, in whatever phase they were left: y's leaf goes to x, with a
 * node that is new, and the chain is cut and joined by one. */
static void mutate(struct cycle *s)
{
    struct sh_ref leaf, head, next, fresh = node_new(&s->a, 2);
    CHECK_OK(sh_node_load(&s->a, &s->y, 0, 1000, &leaf));
    node_store(&s->a, &s->y, 0, NULL);
    put_into(&s->a, &fresh, 1, &leaf);
    CHECK_OK(sh_root_get(&s->a, "chain", 5, 1000, &head));
    CHECK_OK(sh_node_load(&s->a, &head, 0, 1000, &next));
    node_store(&s->a, &head, 0, &fresh);
    put_into(&s->a, &fresh, 0, &next);
    put_into(&s->a, &s->x, 0, &fresh);
    block_drop(&s->a, &head);
}

static void nothing_was_lost(struct cycle *s)
{
    struct sh_ref at, next, leaf;
    enum sh_status status;
    uint32_t links = 1;
    CHECK_OK(sh_root_get(&s->a, "chain", 5, 1000, &at));
    while ((status = sh_node_load(&s->a, &at, 0, 1000, &next)) == SH_OK) {
        links++;
        block_drop(&s->a, &at);
        at = next;
    }
    CHECK_IS(status, SH_ABSENT);
    CHECK(links == LINKS + 1);
    block_drop(&s->a, &at);
    CHECK_OK(sh_node_load(&s->a, &s->x, 0, 1000, &at));
    CHECK_OK(sh_node_load(&s->a, &at, 1, 1000, &leaf));
    CHECK(content_is(leaf.data, 0, 300, 7));
    block_drop(&s->a, &leaf);
    block_drop(&s->a, &at);
}

/* True: it lived, so there are no further points of that name. */
static bool die_in_a_cycle(const char *point, uint32_t n)
{
    struct cycle *s = cycle_new();
    bool survived = child_survives(collect_once, s, point, n);
    arena_die(&s->lead);
    mutate(s);
    arena_lead(&s->lead, s->fd); /* sweeps on, or starts again */
    CHECK(sh_phase_of(atomic_load(&s->lead.hdr->phase)) == SH_IDLE);
    nothing_was_lost(s);
    must_be_sound(&s->a, 0);
    collect(&s->lead);
    collect(&s->lead);
    must_be_sound(&s->a, EXACT_COUNTS); /* also of what the garbage had named */
    CHECK(count_of(&s->kept) == 1);
    CHECK(live_blocks(&s->a) == 2 * LINKS - 1 + 5); /* chain, x, y, kept, leaf, fresh */
    nothing_was_lost(s);
    arena_leave(&s->a);
    arena_leave(&s->lead);
    close(s->fd);
    free(s);
    return survived;
}

static void test_a_coordinator_dies_in_each_phase(void)
{
    static const char *const points[] = {"gc:phase",     "gc:marking",   "gc:traced",
                                         "gc:sweeping",  "node:dying",   "node:settled",
                                         "node:cleared", "node:unlisted"};
    for (uint32_t p = 0; p < sizeof points / sizeof points[0]; p++) {
        uint32_t n = 1;
        while (!die_in_a_cycle(points[p], n))
            CHECK(++n < 200);
        CHECK(n > 1);                                       /* one died */
        CHECK(strcmp(points[p], "gc:phase") != 0 || n > 5); /* IDLE, MARK, FINAL, SWEEP, IDLE */
    }
}

int main(void)
{
    static const struct test tests[] = {
        {"store_and_load", test_store_and_load},
        {"replacing_frees", test_replacing_frees},
        {"a_reference_to_a_freed_block_is_stale", test_a_reference_to_a_freed_block_is_stale},
        {"long_chains_die", test_long_chains_die},
        {"the_dead_leave_a_death_half_done", test_the_dead_leave_a_death_half_done},
        {"reports_say_what_went_with_the_dead", test_reports_say_what_went_with_the_dead},
        {"a_lease_ends_with_its_time", test_a_lease_ends_with_its_time},
        {"cycles_are_collected", test_cycles_are_collected},
        {"an_old_touch_keeps_nothing", test_an_old_touch_keeps_nothing},
        {"garbage_lets_go", test_garbage_lets_go},
        {"a_recount_beside_deaths_of_nodes", test_a_recount_beside_deaths_of_nodes},
        {"marking_follows_references", test_marking_follows_references},
        {"a_reference_that_is_moved_while_marking", test_a_reference_that_is_moved_while_marking},
        {"a_sweep_that_is_given_up_goes_on", test_a_sweep_that_is_given_up_goes_on},
        {"counts_that_are_too_high_are_lowered", test_counts_that_are_too_high_are_lowered},
        {"a_pause_is_of_any_lock", test_a_pause_is_of_any_lock},
        {"a_pause_is_the_end_of_marking", test_a_pause_is_the_end_of_marking},
        {"a_death_at_each_point_of_a_nodes_death", test_a_death_at_each_point_of_a_nodes_death},
        {"a_coordinator_dies_in_each_phase", test_a_coordinator_dies_in_each_phase},
    };
    return test_main("nodes", tests, sizeof tests / sizeof tests[0]);
}
