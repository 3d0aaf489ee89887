/*
 * The page heap: against an oracle that is an array, and at the death of its user after every entry
 * of the undo log (I-1, I-3).
 */
#include "support.h"

#include <string.h>
#include <unistd.h>

#define PAGES 4096u
#define RUNS  256u

static uint64_t operations = 1000000;

/* Oracle: who has each page, and whether each unit is released */

struct oracle {
    struct sh_ctx c;
    struct rng rng;
    uint32_t owner[PAGES]; /* 0: nobody, else number of the run + 1 */
    uint8_t released[2 * PAGES];
    uint32_t page[RUNS], n[RUNS]; /* runs that are taken; n 0: none */
    uint64_t used, full, grown, merged;
};

static uint32_t longest_free(const struct oracle *o, uint64_t end)
{
    uint32_t longest = 0, run = 0;
    for (uint64_t p = 0; p < end; p++) {
        run = o->owner[p] == 0 ? run + 1 : 0;
        longest = run > longest ? run : longest;
    }
    return longest;
}

static uint32_t random_length(struct rng *rng)
{
    switch (rng_below(rng, 20)) {
    case 0:
        return 1 + rng_below(rng, 600);
    case 1:
    case 2:
        return 1 + rng_below(rng, 80);
    default:
        return 1 + rng_below(rng, 13);
    }
}

static void take(struct oracle *o, uint32_t run)
{
    uint32_t n = random_length(&o->rng), page;
    enum sh_status status = sh_pages_take(&o->c, n, 1000, &page);
    if (status == SH_FULL) {
        o->full++;
        CHECK(longest_free(o, PAGES) < n);
        return;
    }
    CHECK_OK(status);
    uint64_t used = atomic_load(&o->c.hdr->used_pages);
    if (used != o->used) { /* only for want of a run that is long enough */
        CHECK(used > o->used && page + n == used && longest_free(o, o->used) < n);
        o->grown++;
    }
    CHECK(page + (uint64_t)n <= used);
    for (uint32_t p = page; p < page + n; p++) {
        CHECK(o->owner[p] == 0);
        o->owner[p] = run + 1;
    }
    o->used = used;
    o->page[run] = page;
    o->n[run] = n;
}

/* What commit and punch leave behind, without the system calls. */
static void set_some_units(struct oracle *o, uint32_t page, uint32_t n)
{
    uint64_t first = sh_unit_of_page(&o->c, page),
             end = first + (uint64_t)n * sh_units_per_page(&o->c);
    bool whole = rng_below(&o->rng, 2);
    uint32_t state = rng_below(&o->rng, 2) ? SH_UNIT_COMMITTED : SH_UNIT_RELEASED;
    for (uint64_t u = first; u < end; u++) {
        if (!whole && rng_below(&o->rng, 3) == 0)
            continue;
        sh_set_units(&o->c, u, 1, state);
        o->released[u] = state == SH_UNIT_RELEASED;
    }
}

static void give(struct oracle *o, uint32_t run)
{
    uint32_t page = o->page[run], n = o->n[run];
    set_some_units(o, page, n);
    CHECK_OK(sh_pages_give(&o->c, &page, 1, 1000));
    memset(&o->owner[page], 0, n * sizeof o->owner[0]);
    o->n[run] = 0;
    o->merged +=
        (page > 0 && o->owner[page - 1] == 0) || (page + n < o->used && o->owner[page + n] == 0);
}

/* As the coordinator: a piece of one particular run is taken, released and given back. */
static void release(struct oracle *o)
{
    uint32_t page = rng_below(&o->rng, (uint32_t)o->used + 1);
    uint64_t span;
    if (page == o->used || o->owner[page] != 0)
        return;
    CHECK_OK(sh_heap_lock(&o->c, 1000));
    uint32_t head = sh_head_of(&o->c, page);
    CHECK(head != SH_NIL);
    span = sh_span(&o->c, head);
    uint32_t n = 1 + rng_below(&o->rng, head + SH_SPAN_NPAGES(span) - page);
    CHECK(sh_pages_take_at(&o->c, head, span, page, n));
    CHECK(!sh_pages_take_at(&o->c, page, span, page, n));
    sh_heap_unlock(&o->c);
    set_some_units(o, page, n);
    CHECK_OK(sh_pages_give(&o->c, &page, 1, 1000));
}

static void compare(struct oracle *o)
{
    uint64_t inuse = 0;
    struct sh_walk walk = {0};
    uint32_t page, at = 0;
    uint64_t span;
    while (sh_walk_next(&o->c, &walk, &page, &span) == SH_OK) {
        CHECK(page == at);
        for (at = page; at < page + SH_SPAN_NPAGES(span); at++)
            CHECK((SH_SPAN_STATE(span) == SH_FREE) == (o->owner[at] == 0));
        if (SH_SPAN_STATE(span) == SH_RESERVED)
            CHECK(o->page[o->owner[page] - 1] == page &&
                  o->n[o->owner[page] - 1] == SH_SPAN_NPAGES(span));
        inuse += SH_SPAN_STATE(span) == SH_FREE ? 0 : SH_SPAN_NPAGES(span);
    }
    CHECK(at == o->used && at == atomic_load(&o->c.hdr->used_pages));
    CHECK(inuse == atomic_load(&o->c.hdr->inuse_pages));
    for (uint64_t u = 0; u < o->used * sh_units_per_page(&o->c); u++)
        CHECK((SH_UNIT_STATE(atomic_load(sh_unit(&o->c, u))) == SH_UNIT_RELEASED) ==
              o->released[u]);
    /* committed_units is not kept here: nothing was committed */
    atomic_store(&o->c.hdr->committed,
                 o->used * sh_units_per_page(&o->c) -
                     sh_units_released(&o->c, 0, o->used * sh_units_per_page(&o->c)));
    must_be_sound(&o->c, EXACT_COUNTS);
}

static void step(struct oracle *o)
{
    uint32_t run = rng_below(&o->rng, RUNS);
    if (rng_below(&o->rng, 16) == 0)
        release(o);
    else if (o->n[run] != 0)
        give(o, run);
    else
        take(o, run);
}

static void test_oracle(void)
{
    struct oracle *o = calloc(1, sizeof *o);
    uint64_t n = test_scale(operations);
    int fd = arena_new((uint64_t)PAGES << 13, NO_LIMIT);
    arena_join(&o->c, fd);
    o->rng.state = test_seed();
    memset(o->released, 1, sizeof o->released);
    for (uint64_t i = 1; i <= n; i++) {
        step(o);
        if (i % 10000 == 0 || i == n || i == 100)
            compare(o);
    }
    CHECK(o->full > 0 && o->grown > 0 && o->merged > 0); /* it met what it is for */
    for (uint32_t run = 0; run < RUNS; run++)
        if (o->n[run] != 0)
            give(o, run);
    compare(o);
    CHECK(SH_SPAN_NPAGES(sh_span(&o->c, 0)) == o->used); /* one run again */
    arena_leave(&o->c);
    free(o);
}

/* The same with memory: what is committed and released is what the kernel has */
static void test_kernel(void)
{
    struct sh_ctx c, lead;
    uint32_t page[64] = {0}, n[64] = {0};
    struct rng rng = {test_seed()};
    int fd = arena_new(32 << 20, NO_LIMIT);
    arena_join(&c, fd);
    arena_lead(&lead, fd);
    for (uint64_t i = 0; i < test_scale(8000); i++) {
        uint32_t run = rng_below(&rng, 64);
        if (n[run] != 0) {
            CHECK_OK(sh_pages_give(&c, &page[run], 1, 1000));
            n[run] = 0;
        } else {
            uint32_t want = 1 + rng_below(&rng, 30);
            enum sh_status status = sh_pages_take(&c, want, 1000, &page[run]);
            if (status == SH_FULL)
                continue;
            CHECK_OK(status);
            CHECK_OK(sh_pages_commit(&c, page[run], want));
            memset(sh_data(&c, page[run]), 1, (uint64_t)want << 13);
            n[run] = want;
        }
        if (i % 500 == 499) {
            uint64_t units;
            CHECK_OK(sh_stamp(&lead, sh_now_stamp(&lead), &units));
            release_all(&lead);
            kernel_must_agree(&c);
            must_be_sound(&c, EXACT_COUNTS);
            uint64_t inuse = atomic_load(&c.hdr->inuse_pages) * sh_units_per_page(&c);
            CHECK(sh_committed_units(&c) == inuse);
        }
    }
    arena_leave(&lead);
    arena_leave(&c);
}

/* However many shorter runs share a list with it, a run that is long enough is found or made. */
static void test_crowded_bin(void)
{
    struct sh_ctx c;
    uint32_t n = 5000, page, *pages = calloc(n, sizeof *pages);
    int fd = arena_new((uint64_t)n * 72 << 13, NO_LIMIT);
    arena_join(&c, fd);
    for (uint32_t i = 0; i < n; i++) {
        CHECK_OK(sh_pages_take(&c, 65, 1000, &pages[i]));
        CHECK_OK(sh_pages_take(&c, 1, 1000, &page));
    }
    CHECK_OK(sh_pages_give(&c, pages, n, 1000));
    CHECK(sh_bin_of(65) == sh_bin_of(70));
    uint64_t used = atomic_load(&c.hdr->used_pages);
    CHECK_OK(sh_pages_take(&c, 70, 1000, &page));
    CHECK(atomic_load(&c.hdr->used_pages) == used + 70);
    CHECK_OK(sh_pages_take(&c, 71, 1000, &page));
    CHECK(atomic_load(&c.hdr->used_pages) == used + 141);
    must_be_sound(&c, 0);
    free(pages);
    arena_leave(&c);
}

/* A run at the end is part of the growth, and one that suffices is taken though it is not the first
 * of its list. */
static void test_growth_uses_the_tail(void)
{
    struct sh_ctx c;
    uint32_t a, b, tail, page;
    int fd = arena_new((uint64_t)400 << 13, NO_LIMIT);
    arena_join(&c, fd);
    CHECK_OK(sh_pages_take(&c, 66, 1000, &a));
    CHECK_OK(sh_pages_take(&c, 1, 1000, &b));
    CHECK_OK(sh_pages_take(&c, 71, 1000, &tail));
    CHECK_OK(sh_pages_give(&c, &tail, 1, 1000));
    CHECK_OK(sh_pages_commit(&c, a, 66)); /* so that it is the first of the list */
    CHECK_OK(sh_pages_give(&c, &a, 1, 1000));
    CHECK_OK(sh_pages_take(&c, 70, 1000, &page));
    CHECK(page == tail);
    CHECK_OK(sh_pages_give(&c, &page, 1, 1000));
    CHECK_OK(sh_pages_take(&c, 300, 1000, &page));
    CHECK(page == tail);
    CHECK_IS(sh_pages_take(&c, 400 - 66 - 1 - 300 + 34, 1000, &page), SH_FULL);
    must_be_sound(&c, 0);
    arena_leave(&c);
}

static void test_bins(void)
{
    uint32_t before = sh_bin_of(1);
    CHECK(before == 0);
    for (uint32_t n = 2; n < SH_MAX_PAGES; n += 1 + n / 97) {
        uint32_t bin = sh_bin_of(n);
        CHECK(bin >= before && bin < SH_NBINS);
        before = bin;
    }
    CHECK(sh_bin_of(SH_MAX_PAGES) < SH_NBINS);
}

/* Deaths. The child is a fork of the one process that uses the arena: it dies inside an operation
 * that its parent never heard of, and another context finds the lock. */

struct scene {
    struct sh_ctx c, other;
    uint32_t page[8]; /* runs of 4 pages, neighbours; RESERVED by c */
    struct sh_ref block;
};

struct snapshot {
    uint64_t *words;
    uint64_t heap, heap_n, pages, pages_n, roots, roots_n; /* offsets and lengths, bytes */
};

/* The words that an operation may log. */
static struct snapshot look(const struct sh_ctx *c)
{
    struct snapshot s = {0};
    s.heap = (uint64_t)((uint8_t *)&c->hdr->used_pages - c->base);
    s.heap_n = (uint64_t)((uint8_t *)&c->hdr->past_mallocs - c->base) - s.heap;
    s.pages = c->geo.pages;
    s.pages_n = atomic_load(&c->hdr->table_pages) * sizeof(struct sh_page);
    s.roots = c->geo.roots;
    s.roots_n = 16 * sizeof(struct sh_root);
    s.words = malloc(s.heap_n + s.pages_n + s.roots_n);
    uint8_t *to = (uint8_t *)s.words;
    memcpy(to, c->base + s.heap, s.heap_n);
    memcpy(to + s.heap_n, c->base + s.pages, s.pages_n);
    memcpy(to + s.heap_n + s.pages_n, c->base + s.roots, s.roots_n);
    return s;
}

static bool same(const struct snapshot *a, const struct snapshot *b)
{
    return a->pages_n == b->pages_n && memcmp(a->words, b->words, a->heap_n + a->pages_n) == 0;
}

static void set_scene(struct scene *s)
{
    int fd = arena_new(8 << 20, NO_LIMIT);
    arena_join(&s->c, fd);
    arena_join(&s->other, fd);
    s->block = block_new(&s->c, 100);
    for (uint32_t i = 0; i < 8; i++)
        CHECK_OK(sh_pages_take(&s->c, 4, 1000, &s->page[i]));
    CHECK_OK(sh_root_set(&s->c, "old", 3, &s->block, 1000));
    CHECK_OK(sh_root_set(&s->c, "older", 5, &s->block, 1000));
    CHECK_OK(sh_root_clear(&s->c, "old", 3, 1000)); /* an entry in the free list */
    CHECK_OK(sh_pages_give(&s->c, &s->page[1], 1, 1000));
    CHECK_OK(sh_pages_give(&s->c, &s->page[3], 1, 1000));
    CHECK_OK(sh_pages_give(&s->c, &s->page[6], 1, 1000));
}

static void do_take_whole(void *arg)
{
    struct scene *s = arg;
    uint32_t page;
    CHECK_OK(sh_pages_take(&s->c, 4, 1000, &page));
}

static void do_take_part(void *arg)
{
    struct scene *s = arg;
    uint32_t page;
    CHECK_OK(sh_pages_take(&s->c, 3, 1000, &page));
}

static void do_take_and_grow(void *arg)
{
    struct scene *s = arg;
    uint32_t page;
    CHECK_OK(sh_pages_take(&s->c, 70, 1000, &page));
}

static void do_take_at(void *arg)
{
    struct scene *s = arg;
    CHECK_OK(sh_heap_lock(&s->c, 1000));
    CHECK(sh_pages_take_at(&s->c, s->page[3], sh_span(&s->c, s->page[3]), s->page[3],
                           SH_SPAN_NPAGES(sh_span(&s->c, s->page[3]))));
    sh_heap_unlock(&s->c);
}

static void do_give_between(void *arg)
{
    struct scene *s = arg;
    CHECK_OK(sh_pages_give(&s->c, &s->page[2], 1, 1000));
}

static void do_give_beside(void *arg)
{
    struct scene *s = arg;
    CHECK_OK(sh_pages_give(&s->c, &s->page[0], 1, 1000));
}

static void do_give_alone(void *arg)
{
    struct scene *s = arg;
    CHECK_OK(sh_pages_give(&s->c, &s->page[4], 1, 1000));
}

static void recover(void *arg)
{
    struct scene *s = arg;
    enum sh_status status = sh_heap_lock(&s->other, 1000);
    CHECK_OK(status);
    sh_heap_unlock(&s->other);
}

/* Recovers, and dies in the middle of that too, at every entry: just another death. */
static void recover_with_deaths(struct scene *s)
{
    for (uint32_t entry = 1; !child_survives(recover, s, "log:undo", entry); entry++)
        CHECK(entry <= SH_UNDO_MAX);
}

/* Dies at each entry of the log in turn. The heap is as it was before, and works. */
static void die_at_each_entry(void (*operation)(void *), bool in_recovery)
{
    struct scene *s = calloc(1, sizeof *s);
    set_scene(s);
    uint32_t entries = 0;
    for (;; entries++) {
        struct snapshot before = look(&s->c);
        CHECK(entries < 100);
        if (child_survives(operation, s, "log:entry", entries + 1)) {
            free(before.words);
            break;
        }
        if (in_recovery)
            recover_with_deaths(s);
        recover(s);
        struct snapshot after = look(&s->c);
        CHECK(same(&before, &after));
        free(before.words);
        free(after.words);
        must_be_sound(&s->other, 0);
    }
    CHECK(entries >= 2);
    must_be_sound(&s->other, 0);
    uint32_t page; /* allocation goes on */
    CHECK_OK(sh_pages_take(&s->other, 5, 1000, &page));
    CHECK_OK(sh_pages_give(&s->other, &page, 1, 1000));
    must_be_sound(&s->other, 0);
    arena_leave(&s->other);
    arena_leave(&s->c);
    free(s);
}

static void (*const operations_that_log[])(void *) = {
    do_take_whole, do_take_part, do_take_at, do_give_between, do_give_beside, do_give_alone,
};

static void test_death_at_each_entry(void)
{
    for (size_t i = 0; i < sizeof operations_that_log / sizeof operations_that_log[0]; i++)
        die_at_each_entry(operations_that_log[i], false);
}

static void test_death_in_recovery(void)
{
    die_at_each_entry(do_give_between, true);
    die_at_each_entry(do_take_part, true);
}

/* Growing is two operations, each whole: the high-water mark stays up. */
static void test_death_while_growing(void)
{
    struct scene *s = calloc(1, sizeof *s);
    set_scene(s);
    uint32_t n = 1;
    for (; !child_survives(do_take_and_grow, s, "log:entry", n); n++) {
        recover(s);
        must_be_sound(&s->other, 0);
    }
    CHECK(n > 8);
    must_be_sound(&s->other, 0);
    arena_leave(&s->other);
    arena_leave(&s->c);
    free(s);
}

/* Names: whatever was being done, the other names stand for what they stood for. Here the child is
 * a process of its own, because it dies with its own process lock held, too. */

struct naming {
    struct scene scene;
    struct handle block;
    bool clear;
    uint32_t entry;
};

static void change_name(void *arg)
{
    struct naming *n = arg;
    struct sh_ctx c;
    struct sh_ref r;
    arena_join(&c, n->scene.c.fd);
    CHECK_OK(handle_open(&c, &n->block, &r));
    CHECK_OK(sh_root_set(&c, "own", 3, &r, 1000)); /* its entry's memory is there */
    CHECK_OK(sh_root_clear(&c, "own", 3, 1000));
    die_when("log:entry", n->entry);
    if (n->clear)
        CHECK_OK(sh_root_clear(&c, "older", 5, 1000));
    else
        CHECK_OK(sh_root_set(&c, "new", 3, &r, 1000));
}

static uint32_t names(struct sh_ctx *c)
{
    char name[SH_ROOT_NAME_MAX];
    uint32_t entry = 0, len, n = 0;
    while (sh_root_name(c, &entry, name, &len, 10000) == SH_OK) {
        CHECK((len == 5 && memcmp(name, "older", 5) == 0) ||
              (len == 3 && memcmp(name, "new", 3) == 0));
        n++;
    }
    return n;
}

static void die_among_names(bool clear)
{
    struct naming *n = calloc(1, sizeof *n);
    struct sh_ctx lead, *other = &n->scene.other;
    set_scene(&n->scene);
    arena_lead(&lead, other->fd);
    n->block = handle_of(&n->scene.c, &n->scene.block);
    n->clear = clear;
    for (n->entry = 1;; n->entry++) {
        bool done = child_survives(change_name, n, NULL, 0);
        CHECK(names(other) == (clear ? 0 : 1u + done)); /* the cell goes before its name */
        reap_dead(&lead, UINT64_MAX);
        must_be_sound(other, clear ? 0 : EXACT_COUNTS);
        if (done)
            break;
        CHECK_OK(sh_root_set(&n->scene.c, "older", 5, &n->scene.block, 1000));
    }
    CHECK(n->entry > 2);
    CHECK_OK(sh_root_set(&n->scene.c, "new", 3, &n->scene.block, 1000));
    must_be_sound(other, 0);
    arena_leave(&lead);
    arena_leave(&n->scene.other);
    arena_leave(&n->scene.c);
    free(n);
}

static void test_death_among_names(void)
{
    die_among_names(false);
    die_among_names(true);
}

/* A log that cannot be believed: the lists are rebuilt from the records. */

static void hold_heap_lock(void *arg)
{
    struct scene *s = arg;
    CHECK_OK(sh_heap_lock(&s->c, 1000));
    sh_crash_point("held");
}

static void spoil_lists(struct sh_ctx *c)
{
    for (uint32_t i = 0; i < SH_NBINS; i++)
        c->hdr->bins[i] = i % 3 ? SH_NIL : i;
    memset(c->hdr->bin_bits, 0xa5, sizeof c->hdr->bin_bits);
    for (uint32_t i = 0; i < SH_NCLASSES; i++)
        c->hdr->orphans[i] = SH_NIL;
    atomic_store(&c->hdr->inuse_pages, 77);
}

static void spoil_log(struct sh_ctx *c, uint32_t how)
{
    struct sh_lock *l = &c->hdr->heap;
    atomic_store(&l->len, how == 0 ? SH_UNDO_MAX + 1 : 1);
    l->log[0] = (struct sh_undo){how == 1 ? c->geo.data : how == 2 ? 12345 : c->geo.end + 8, 99};
}

/* A span without an owner, which has a list of its own. */
static void leave_an_orphan(struct scene *s)
{
    struct sh_ctx c, lead;
    arena_join(&c, s->c.fd);
    arena_lead(&lead, s->c.fd);
    struct sh_ref r = block_new(&c, 500);
    CHECK_OK(sh_root_set(&c, "older", 5, &r, 1000));
    arena_die(&c);
    reap_dead(&lead, UINT64_MAX);
    CHECK(s->c.hdr->orphans[sh_class_of(500)] != SH_NIL);
    arena_leave(&lead);
}

static void test_bad_log_is_rebuilt(void)
{
    for (uint32_t how = 0; how < 4; how++) {
        struct scene *s = calloc(1, sizeof *s);
        set_scene(s);
        leave_an_orphan(s);
        CHECK(!child_survives(hold_heap_lock, s, "held", 1));
        spoil_log(&s->c, how);
        spoil_lists(&s->c);
        recover(s);
        must_be_sound(&s->other, EXACT_COUNTS);
        do_take_part(s);
        do_give_between(s);
        must_be_sound(&s->other, EXACT_COUNTS);
        arena_leave(&s->other);
        arena_leave(&s->c);
        free(s);
    }
}

/* A death in the middle of the rebuilding does not end it. */
static void test_death_while_rebuilding(void)
{
    struct scene *s = calloc(1, sizeof *s);
    set_scene(s);
    CHECK(!child_survives(hold_heap_lock, s, "held", 1));
    spoil_log(&s->c, 0);
    spoil_lists(&s->c);
    for (uint32_t n = 1; !child_survives(recover, s, "log:entry", n); n++)
        CHECK(n < 1000);
    recover(s);
    must_be_sound(&s->other, EXACT_COUNTS);
    arena_leave(&s->other);
    arena_leave(&s->c);
    free(s);
}

/* Records that make no sense are refused by everybody. */
static void test_failed_scan_poisons(void)
{
    struct scene *s = calloc(1, sizeof *s);
    struct sh_ctx late;
    uint32_t page;
    set_scene(s);
    CHECK(!child_survives(hold_heap_lock, s, "held", 1));
    spoil_log(&s->c, 0);
    sh_set_span(&s->c, s->page[2], 0);
    CHECK_IS(sh_heap_lock(&s->other, 1000), SH_CORRUPT);
    CHECK_IS(sh_heap_lock(&s->c, 1000), SH_CORRUPT);
    CHECK_IS(sh_pages_take(&s->other, 1, 1000, &page), SH_CORRUPT);
    CHECK_IS(sh_root_set(&s->other, "new", 3, &s->block, 1000), SH_CORRUPT);
    CHECK_OK(sh_map(&late, dup(s->c.fd), true));
    CHECK_IS(sh_attach(&late, 1000), SH_CORRUPT);
    sh_unmap(&late);
    arena_leave(&s->other);
    arena_leave(&s->c);
    free(s);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"oracle", test_oracle},
        {"kernel", test_kernel},
        {"bins", test_bins},
        {"crowded_bin", test_crowded_bin},
        {"growth_uses_the_tail", test_growth_uses_the_tail},
        {"death_at_each_entry", test_death_at_each_entry},
        {"death_in_recovery", test_death_in_recovery},
        {"death_while_growing", test_death_while_growing},
        {"death_among_names", test_death_among_names},
        {"bad_log_is_rebuilt", test_bad_log_is_rebuilt},
        {"death_while_rebuilding", test_death_while_rebuilding},
        {"failed_scan_poisons", test_failed_scan_poisons},
    };
    if (argc > 1)
        operations = strtoull(argv[1], NULL, 10);
    return test_main("pages", tests, sizeof tests / sizeof tests[0]);
}
