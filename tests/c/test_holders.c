/*
 * What holds a block, which are the largest, who holds how much, and where a block was made: as the
 * books say it at a quiet moment, and in heaps with bad bytes, where the answer may be wrong and
 * must come.
 */
#include "support.h"

#include <string.h>
#include <unistd.h>

#define CAPACITY (16ull << 20)

struct stage {
    int fd;
    struct sh_ctx a, b, lead;
    struct sh_found_holders found;
    struct sh_node *outer, *dying; /* of populate */
};

static struct stage *stage_new(void)
{
    struct stage *s = calloc(1, sizeof *s);
    s->fd = arena_new(CAPACITY, NO_LIMIT);
    arena_lead(&s->lead, s->fd);
    arena_join(&s->a, s->fd);
    arena_join(&s->b, s->fd);
    return s;
}

static void stage_end(struct stage *s)
{
    arena_leave(&s->a);
    if (s->b.slot != NULL)
        arena_leave(&s->b);
    reap_dead(&s->lead, UINT64_MAX);
    collect(&s->lead);
    must_be_sound(&s->lead, EXACT_COUNTS);
    arena_leave(&s->lead);
    close(s->fd);
    free(s->found.list);
    free(s);
}

static struct sh_ref shared(struct sh_ctx *c, const struct sh_ctx *of, const struct sh_ref *r)
{
    struct handle h = handle_of(of, r);
    struct sh_ref got;
    CHECK_OK(handle_open(c, &h, &got));
    return got;
}

static void put_into(struct sh_ctx *c, const struct sh_ref *node, uint32_t i, struct sh_ref *r)
{
    node_store(c, node, i, r);
    block_drop(c, r);
}

static void name(struct sh_ctx *c, const char *text, const struct sh_ref *r)
{
    CHECK_OK(sh_root_set(c, text, (uint32_t)strlen(text), r, 1000));
}

/* What holds a block */

static const struct sh_found_holders *holders_of(struct stage *s, const struct sh_ref *r)
{
    uint64_t offset = sh_data_offset(&s->a, r);
    CHECK_OK(sh_holders_of(&s->a, &offset, 1, &s->found));
    return &s->found;
}

/* How many of these hold the block: of a slot, or, references, in a node. */
static uint32_t count(struct stage *s, const struct sh_ref *r, enum sh_holder_kind kind,
                      const struct sh_ctx *whose, const struct sh_ref *node)
{
    const struct sh_found_holders *found = holders_of(s, r);
    uint32_t n = 0;
    for (uint64_t i = 0; i < found->n; i++) {
        const struct sh_holder *h = &found->list[i];
        CHECK(h->held == sh_data_offset(&s->a, r));
        n += h->kind == kind &&
             (node != NULL ? h->node == sh_data_offset(&s->a, node) : h->slot == whose->slot_index);
    }
    return n;
}

static void test_pins_and_leases(void)
{
    struct stage *s = stage_new();
    struct sh_ref x = block_new(&s->a, 100), other = block_new(&s->a, 100), again;
    struct sh_ref of_b = shared(&s->b, &s->a, &x);
    uint64_t before = sh_os_now_ns();
    struct handle h = handle_lease(&s->b, &of_b);
    CHECK_OK(sh_repin(&s->a, &x, 1000, &again));
    CHECK(holders_of(s, &x)->n == 4);
    CHECK(count(s, &x, SH_HOLDER_PIN, &s->a, NULL) == 2);
    CHECK(count(s, &x, SH_HOLDER_PIN, &s->b, NULL) == 1);
    CHECK(count(s, &x, SH_HOLDER_LEASE, &s->b, NULL) == 1);
    CHECK(count(s, &other, SH_HOLDER_PIN, &s->a, NULL) == 1);
    for (uint64_t i = 0; i < holders_of(s, &x)->n; i++) {
        const struct sh_holder *one = &s->found.list[i];
        bool lease = one->kind == SH_HOLDER_LEASE;
        CHECK(lease ? one->made_ns >= before && one->made_ns <= sh_os_now_ns() : one->made_ns == 0);
    }
    CHECK_OK(sh_lease_drop(&s->a, h.off, h.gen, h.cell, h.seq, 1000));
    name(&s->a, "x", &x); /* names are told by roots.c */
    CHECK(holders_of(s, &x)->n == 3);
    stage_end(s);
}

static void test_references_through_nodes(void)
{
    struct stage *s = stage_new();
    struct sh_ref inner = node_new(&s->a, 700), outer = node_new(&s->a, 2);
    struct sh_ref x = block_new(&s->a, 100000), kept = x;
    node_store(&s->a, &inner, 3, &x);
    node_store(&s->a, &inner, 699, &x);
    node_store(&s->a, &outer, 1, &x);
    block_drop(&s->a, &x);
    CHECK(holders_of(s, &kept)->n == 3);
    CHECK(count(s, &kept, SH_HOLDER_REFERENCE, NULL, &inner) == 2);
    CHECK(count(s, &kept, SH_HOLDER_REFERENCE, NULL, &outer) == 1);
    CHECK(s->found.list[0].node_kind == SH_NODE_PLAIN);
    node_store(&s->a, &outer, 0, &inner);
    CHECK(count(s, &inner, SH_HOLDER_REFERENCE, NULL, &outer) == 1);
    node_store(&s->a, &inner, 3, NULL);
    node_store(&s->a, &inner, 699, NULL);
    CHECK(holders_of(s, &kept)->n == 1);
    stage_end(s);
}

static void test_several_at_once_and_none(void)
{
    struct stage *s = stage_new();
    struct sh_ref x = block_new(&s->a, 100), y = block_new(&s->a, 3 << 20), gone = x;
    uint64_t at[] = {sh_data_offset(&s->a, &y), 1ull << 60, sh_data_offset(&s->a, &x),
                     sh_data_offset(&s->a, &x) + 1, CAPACITY - 1};
    CHECK_OK(sh_holders_of(&s->a, at, 5, &s->found));
    CHECK(s->found.n == 2);
    CHECK_OK(sh_holders_of(&s->a, at, 0, &s->found));
    CHECK(s->found.n == 0);
    block_drop(&s->a, &x);
    CHECK(holders_of(s, &gone)->n == 0);
    stage_end(s);
}

/* A dying node holds what it still names, in a dead process's list too. */
static void test_dying_nodes_hold(void)
{
    struct stage *s = stage_new();
    uint32_t n = 5000;
    struct sh_ref wide = node_new(&s->b, n), x = block_new(&s->a, 64);
    struct sh_ref of_b = shared(&s->b, &s->a, &x), at = shared(&s->a, &s->b, &wide);
    for (uint32_t i = 0; i < n; i++)
        node_store(&s->b, &wide, i, &of_b);
    block_drop(&s->b, &of_b);
    CHECK_OK(sh_unpin(&s->a, &at, 1000));
    CHECK_IS(sh_unpin(&s->b, &wide, 0), SH_DEFERRED);
    uint32_t left = count(s, &x, SH_HOLDER_REFERENCE, NULL, &at);
    CHECK(0 < left && left < n);
    CHECK(SH_COUNT(atomic_load(x.word)) == left + 1);
    arena_die(&s->b);
    CHECK(count(s, &x, SH_HOLDER_REFERENCE, NULL, &at) == left);
    reap_dead(&s->lead, UINT64_MAX);
    CHECK(holders_of(s, &x)->n == 1);
    stage_end(s);
}

/* The largest blocks */

static void test_largest(void)
{
    struct stage *s = stage_new();
    static const uint64_t sizes[] = {100, 3 << 20, 70000, 16, 5000, 70000};
    struct sh_sized list[8];
    struct sh_ref r[6], freed = block_new(&s->a, 4 << 20);
    uint32_t n = 0;
    CHECK_OK(sh_largest(&s->a, list, &n));
    CHECK(n == 0);
    for (uint32_t i = 0; i < 6; i++)
        r[i] = block_new(i % 2 ? &s->a : &s->b, sizes[i]);
    struct sh_ref node = node_new(&s->a, 1000);
    block_drop(&s->a, &freed);
    CHECK_OK(sh_largest(&s->b, list, &(uint32_t){(n = 4)}));
    CHECK(list[0].nbytes == 3 << 20 && list[0].offset == sh_data_offset(&s->a, &r[1]));
    CHECK(list[1].nbytes == 70000 && list[2].nbytes == 70000 && list[1].offset != list[2].offset);
    CHECK(list[3].offset == sh_data_offset(&s->a, &node) && list[3].node_kind == SH_NODE_PLAIN);
    CHECK(list[3].nbytes == node.nbytes && list[0].node_kind == 0);
    n = 8;
    CHECK_OK(sh_largest(&s->b, list, &n));
    CHECK(n == 7 && list[6].nbytes == 16);
    stage_end(s);
}

/* Who holds how much */

static struct sh_shares shares_of(struct stage *s)
{
    struct sh_shares shares;
    CHECK_OK(sh_shares(&s->a, &shares));
    return shares;
}

static uint64_t pins_of(struct stage *s, const struct sh_ctx *c)
{
    return shares_of(s).pins[c->slot_index];
}

static void name_must_have(struct stage *s, uint32_t place, const char *text, uint64_t bytes)
{
    struct sh_shares shares = shares_of(s);
    const struct sh_share *one = &shares.names[place];
    CHECK(one->bytes == bytes);
    CHECK(one->len == strlen(text) && memcmp(one->name, text, one->len) == 0);
}

/* Of a block that several have each has its part; the dead too, until they are reaped. */
static void test_parts(void)
{
    struct stage *s = stage_new();
    struct sh_ref own = block_new(&s->a, 1001), large = block_new(&s->a, 3 << 20), again;
    struct handle h = handle_lease(&s->a, &own);
    struct sh_ref of_b = shared(&s->b, &s->a, &large);
    CHECK_OK(sh_repin(&s->b, &of_b, 1000, &again));
    struct sh_shares shares = shares_of(s);
    CHECK(shares.pins[s->a.slot_index] == 1001 / 2 + (3 << 20) / 3);
    CHECK(shares.leases[s->a.slot_index] == 1001 / 2);
    CHECK(shares.pins[s->b.slot_index] == 2 * ((3 << 20) / 3));
    CHECK(shares.pins[s->lead.slot_index] == 0 && shares.names[0].bytes == 0);
    CHECK_OK(sh_lease_drop(&s->a, h.off, h.gen, h.cell, h.seq, 1000));
    uint32_t dead = s->b.slot_index;
    arena_die(&s->b);
    block_drop(&s->a, &large);
    CHECK(pins_of(s, &s->a) == 1001 && shares_of(s).pins[dead] == 3 << 20);
    reap_dead(&s->lead, UINT64_MAX);
    block_drop(&s->a, &own);
    shares = shares_of(s);
    CHECK(shares.pins[s->a.slot_index] == 0 && shares.pins[dead] == 0);
    stage_end(s);
}

/* Whatever a name leads to is the name's, once, and its users' no more; without a name a process's
 * that has the node. */
static void test_names_come_first(void)
{
    struct stage *s = stage_new();
    struct sh_ref outer = node_new(&s->a, 3), inner = node_new(&s->a, 3000);
    struct sh_ref x = block_new(&s->a, 100000), y = block_new(&s->a, 50000), of_b;
    uint64_t nodes = outer.nbytes + inner.nbytes;
    node_store(&s->a, &outer, 0, &inner);
    node_store(&s->a, &inner, 2999, &outer); /* a circle */
    node_store(&s->a, &inner, 5, &x);
    node_store(&s->a, &outer, 2, &x);
    CHECK(pins_of(s, &s->a) == nodes + 150000);
    of_b = shared(&s->b, &s->a, &x);
    CHECK(pins_of(s, &s->a) == nodes + 150000 && pins_of(s, &s->b) == 0);
    name(&s->a, "settings", &outer);
    CHECK(pins_of(s, &s->a) == 50000 && pins_of(s, &s->b) == 0);
    name_must_have(s, 0, "settings", nodes + 100000);
    name(&s->a, "again", &inner); /* all of it has its name */
    name(&s->a, "y", &y);
    name_must_have(s, 0, "settings", nodes + 100000);
    name_must_have(s, 1, "y", 50000);
    CHECK(pins_of(s, &s->a) == 0);
    block_drop(&s->b, &of_b);
    node_store(&s->a, &inner, 2999, NULL);
    stage_end(s);
}

static void test_the_names_that_hold_most(void)
{
    struct stage *s = stage_new();
    char text[] = "name 0";
    for (uint32_t i = 0; i < 9; i++) {
        struct sh_ref r = block_new(&s->a, 1000 * ((i * 5) % 9 + 1));
        text[5] = (char)('1' + (i * 5) % 9);
        name(&s->a, text, &r);
        block_drop(&s->a, &r);
    }
    for (uint32_t i = 0; i < SH_TOP_NAMES; i++) {
        text[5] = (char)('9' - i);
        name_must_have(s, i, text, 1000 * (9 - i));
    }
    stage_end(s);
}

/* Long chains: nothing is recursive. */
static void test_long_chains(void)
{
    struct stage *s = stage_new();
    uint32_t n = (uint32_t)test_scale(20000);
    struct sh_ref head = node_new(&s->a, 1), first = head;
    uint64_t nbytes = head.nbytes;
    for (uint32_t i = 1; i < n; i++) {
        struct sh_ref next = node_new(&s->a, 1);
        nbytes += next.nbytes;
        put_into(&s->a, &next, 0, &head);
        head = next;
    }
    CHECK(pins_of(s, &s->a) == nbytes);
    CHECK(holders_of(s, &first)->n == 1);
    name(&s->a, "chain", &head);
    block_drop(&s->a, &head);
    name_must_have(s, 0, "chain", nbytes);
    stage_end(s);
}

/* Where a block was made */

static bool made_at(struct stage *s, const struct sh_ref *r, const char *text)
{
    struct sh_made_at made;
    uint32_t entry = 0, n = 0;
    while (sh_site_next(&s->lead, &entry, &made, 1000) == SH_OK)
        n += made.offset == sh_data_offset(&s->a, r) && made.nbytes == r->nbytes &&
             made.len == strlen(text) && memcmp(made.text, text, made.len) == 0;
    return n == 1;
}

static void note(struct sh_ctx *c, const struct sh_ref *r, const char *text)
{
    CHECK_OK(sh_site_set(c, r, text, (uint32_t)strlen(text), 1000));
}

static void test_a_site_goes_with_its_block(void)
{
    struct stage *s = stage_new();
    struct sh_ref x = block_new(&s->a, 100), old = x, big = block_new(&s->a, 100000);
    struct sh_made_at made;
    CHECK_IS(sh_site_next(&s->b, &(uint32_t){0}, &made, 1000), SH_ABSENT);
    note(&s->a, &x, "x.py:1");
    note(&s->a, &big, "big.py:2");
    CHECK(made_at(s, &x, "x.py:1") && made_at(s, &big, "big.py:2"));
    note(&s->a, &x, "x.py:33"); /* the last word */
    CHECK(made_at(s, &x, "x.py:33"));
    block_drop(&s->a, &x);
    CHECK(!made_at(s, &old, "x.py:33"));
    x = block_new(&s->a, 100);
    CHECK(x.data == old.data && !made_at(s, &x, "x.py:33"));
    note(&s->a, &x, "y.py:4");
    CHECK(made_at(s, &x, "y.py:4") && made_at(s, &big, "big.py:2"));
    stage_end(s);
}

static void set_some(void *arg)
{
    struct stage *s = arg;
    struct sh_ref r = block_new(&s->b, 100), again = block_new(&s->b, 100);
    note(&s->b, &r, "dead.py:1");
    note(&s->b, &again, "dead.py:2");
}

static void test_a_death_in_the_middle_leaves_no_half_of_one(void)
{
    bool survived = false;
    for (uint32_t n = 1; !survived; n++) {
        struct stage *s = stage_new();
        struct sh_made_at made;
        struct sh_ref x = block_new(&s->a, 100);
        survived = child_survives(set_some, s, "site:written", n);
        arena_die(&s->b);
        uint32_t found = 0;
        for (uint32_t entry = 0; sh_site_next(&s->a, &entry, &made, 1000) == SH_OK; found++)
            CHECK(made.len == 9 && memcmp(made.text, "dead.py:", 8) == 0);
        CHECK(found == n - 1 && survived == (n == 3));
        note(&s->a, &x, "x.py:1"); /* the lock is free */
        CHECK(made_at(s, &x, "x.py:1"));
        stage_end(s);
    }
}

/* Bad bytes: an answer comes, and names no block that cannot be. */

static void populate(struct stage *s)
{
    struct sh_ref outer = node_new(&s->a, 40), wide = node_new(&s->b, 5000);
    for (uint32_t i = 0; i < 38; i++) {
        struct sh_ref r = i % 3 ? block_new(&s->a, 7919 * i + 1) : node_new(&s->a, i + 1);
        if (i % 3 == 0)
            node_store(&s->a, &r, 0, &outer);
        if (i % 4 == 0)
            handle_lease(&s->a, &r);
        note(&s->a, &r, "made.py:1");
        put_into(&s->a, &outer, i, &r);
    }
    struct sh_ref of_b = shared(&s->b, &s->a, &outer);
    node_store(&s->b, &wide, 1, &of_b);
    node_store(&s->b, &wide, 4999, &of_b);
    name(&s->a, "outer", &outer);
    s->outer = (struct sh_node *)outer.data;
    s->dying = (struct sh_node *)wide.data;
    CHECK_IS(sh_unpin(&s->b, &wide, 0), SH_DEFERRED); /* it dies meanwhile */
}

/* The words that say what is where: of records, of blocks, and of what lies in pages. */
static uint64_t *some_word(struct stage *s, struct rng *rng)
{
    const struct sh_geometry *g = &s->a.geo;
    uint32_t used = (uint32_t)atomic_load(&s->a.hdr->used_pages), page = rng_below(rng, used);
    struct sh_made_at made;
    uint32_t entry = rng_below(rng, SH_NSITES);
    switch (rng_below(rng, 5)) {
    case 0:
        return (uint64_t *)sh_page(&s->a, page) + rng_below(rng, 4);
    case 1: {
        uint32_t kind = SH_SPAN_KIND(sh_span(&s->a, page)) % SH_NCLASSES;
        bool small = SH_SPAN_STATE(sh_span(&s->a, page)) == SH_SMALL;
        return (uint64_t *)sh_words(&s->a, page, small ? s->a.kinds[kind].tier : SH_LARGE_TIER);
    }
    case 2:
        if (sh_site_next(&s->a, &entry, &made, 1000) == SH_OK)
            return (uint64_t *)(s->a.base + g->sites) + 16ull * (entry - 1) + rng_below(rng, 4);
        /* fall through */
    case 3:
        return (uint64_t *)(rng_below(rng, 2) ? s->outer : s->dying) + rng_below(rng, 4);
    default:
        return (uint64_t *)sh_data(&s->a, page) + rng_below(rng, 64);
    }
}

static void ask_everything(struct stage *s, const uint64_t at[3])
{
    struct sh_shares shares;
    struct sh_sized list[8];
    struct sh_made_at made;
    uint32_t n = 8, entry = 0, sites = 0;
    if (sh_holders_of(&s->a, at, 3, &s->found) == SH_OK)
        for (uint64_t i = 0; i < s->found.n; i++)
            CHECK(s->found.list[i].held < CAPACITY && s->found.list[i].node < CAPACITY);
    CHECK(s->found.n <= CAPACITY / 8);
    if (sh_largest(&s->a, list, &n) == SH_OK)
        for (uint32_t i = 0; i < n; i++)
            CHECK(list[i].offset < CAPACITY && list[i].nbytes <= CAPACITY - list[i].offset);
    if (sh_shares(&s->a, &shares) == SH_OK)
        CHECK(shares.names[0].len <= SH_ROOT_NAME_MAX && shares.names[0].bytes <= CAPACITY);
    while (sh_site_next(&s->a, &entry, &made, 1000) == SH_OK && ++sites)
        CHECK(made.offset < CAPACITY && made.len <= SH_SITE_MAX);
    CHECK(sites <= SH_NSITES);
}

static void test_bad_bytes(void)
{
    struct stage *s = stage_new();
    struct rng rng = {test_seed()};
    struct sh_sized list[3] = {{0}};
    uint64_t at[3];
    populate(s);
    CHECK_OK(sh_largest(&s->a, list, &(uint32_t){3}));
    for (uint32_t i = 0; i < 3; i++)
        at[i] = list[i].offset;
    for (uint64_t i = 0; i < test_scale(500); i++) {
        _Atomic uint64_t *word = (_Atomic uint64_t *)some_word(s, &rng);
        uint64_t old = atomic_load(word), bits = 1ull << rng_below(&rng, 64);
        if (rng_below(&rng, 2))
            bits |= (uint64_t)rng_below(&rng, ~0u) << rng_below(&rng, 33);
        atomic_store(word, old ^ bits);
        ask_everything(s, at);
        atomic_store(word, old);
        atomic_store(&s->a.hdr->poisoned, 0);
    }
    CHECK_OK(sh_flush(&s->b, 1000));
    CHECK_OK(sh_root_clear(&s->a, "outer", 5, 1000));
    stage_end(s);
}

int main(void)
{
    static const struct test tests[] = {
        {"pins_and_leases", test_pins_and_leases},
        {"references_through_nodes", test_references_through_nodes},
        {"several_at_once_and_none", test_several_at_once_and_none},
        {"dying_nodes_hold", test_dying_nodes_hold},
        {"largest", test_largest},
        {"parts", test_parts},
        {"names_come_first", test_names_come_first},
        {"the_names_that_hold_most", test_the_names_that_hold_most},
        {"long_chains", test_long_chains},
        {"a_site_goes_with_its_block", test_a_site_goes_with_its_block},
        {"a_death_in_the_middle_leaves_no_half_of_one",
         test_a_death_in_the_middle_leaves_no_half_of_one},
        {"bad_bytes", test_bad_bytes},
    };
    return test_main("holders", tests, sizeof tests / sizeof tests[0]);
}
