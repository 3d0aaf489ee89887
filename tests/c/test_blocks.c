/*
 * Blocks: sizes, generations, handles, leases, names, frees from other processes, what the dead
 * leave, holes, limits, and counts and generations at their ends.
 */
#include "support.h"

#include <string.h>
#include <unistd.h>

static bool all_are(const struct sh_ref *r, uint8_t value)
{
    for (uint64_t i = 0; i < r->nbytes; i++)
        if (r->data[i] != value)
            return false;
    return true;
}

/* Sizes */

static void check_size(struct cast *s, uint64_t nbytes)
{
    struct sh_ref r = block_new(&s->a, nbytes), again;
    CHECK(((uintptr_t)r.data & 15) == 0);
    if (nbytes < 2000 || nbytes % 64 < 3)
        CHECK(all_are(&r, 0));
    memset(r.data, 0xff, nbytes); /* whatever the user writes, the size stays */
    struct handle h = handle_of(&s->a, &r);
    CHECK_OK(handle_open(&s->b, &h, &again));
    CHECK(again.nbytes == nbytes && again.gen == r.gen && again.data[nbytes - 1] == 0xff);
    block_drop(&s->a, &r);
    block_drop(&s->b, &again);
    CHECK_IS(handle_open(&s->b, &h, &again), SH_STALE);
}

static void test_every_size(void)
{
    struct cast *s = cast_new(64 << 20, NO_LIMIT);
    uint64_t step = test_scale(8) >= 8 ? 1 : 7;
    for (uint64_t n = 1; n <= SH_MAX_SMALL; n += step)
        check_size(s, n);
    for (uint32_t k = 0; k < SH_NCLASSES; k++) {
        check_size(s, sh_classes[k].size);
        check_size(s, sh_classes[k].size + 1);
        check_size(s, sh_classes[k].size - 1);
    }
    for (uint64_t n = SH_MAX_SMALL + 1; n < 4 << 20; n += 8191 + n / 7)
        check_size(s, n);
    must_be_sound(&s->a, EXACT_COUNTS);
    cast_end(s);
}

/* Every block of several spans at once, of every class: none overlaps another. */
static void test_full_spans(void)
{
    struct cast *s = cast_new(64 << 20, NO_LIMIT);
    struct sh_ref *r = calloc(3 * SH_CLASS_NBLOCKS_MAX, sizeof *r);
    for (uint32_t k = 0; k < SH_NCLASSES; k++) {
        uint32_t n = 2 * sh_classes[k].nblocks + 1;
        for (uint32_t i = 0; i < n; i++) {
            r[i] = block_new(&s->a, sh_classes[k].size);
            memset(r[i].data, (uint8_t)(i + 1), r[i].nbytes);
        }
        for (uint32_t i = 0; i < n; i++)
            CHECK(all_are(&r[i], (uint8_t)(i + 1)));
        must_be_sound(&s->a, EXACT_COUNTS);
        for (uint32_t i = 0; i < n; i++)
            block_drop(&s->a, &r[i]);
        must_be_sound(&s->a, EXACT_COUNTS);
    }
    free(r);
    cast_end(s);
}

/* Generations */

static void test_generations_never_repeat(void)
{
    enum {
        N = 400
    };
    static const uint32_t sizes[] = {64, 8192, 16, 300, 70000, 4096, 65536, 1024};
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct handle old[8 * N];
    uint32_t n = 0;
    for (uint32_t round = 0; round < 8; round++) { /* the same pages, cut anew each time */
        struct sh_ref r[N], stale;
        uint32_t m = 0;
        while (m < N && m * (uint64_t)sizes[round] < 2 << 20)
            r[m++] = block_new(&s->a, sizes[round]);
        for (uint32_t i = 0; i < n; i++)
            CHECK_IS(handle_open(&s->b, &old[i], &stale), SH_STALE);
        for (uint32_t i = 0; i < m; i++) {
            old[n++] = handle_of(&s->a, &r[i]);
            block_drop(&s->a, &r[i]);
        }
        collect(&s->lead);
        release_all(&s->lead);
    }
    cast_end(s);
}

/* What is no handle of a block is refused, whatever it says. */
static void test_senseless_handles(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct rng rng = {test_seed()};
    struct sh_ref small = block_new(&s->a, 100), large = block_new(&s->a, 100000), r;
    struct handle good[2] = {handle_lease(&s->a, &small), handle_lease(&s->a, &large)};
    for (uint32_t i = 0; i < 20000; i++) {
        struct handle h = good[i % 2];
        uint64_t noise = (uint64_t)rng_below(&rng, ~0u) << rng_below(&rng, 32);
        switch (rng_below(&rng, 3)) {
        case 0:
            h.off ^= noise;
            break;
        case 1:
            h.gen ^= noise;
            break;
        default:
            h.off += 1 + rng_below(&rng, 200000);
        }
        if (h.off == good[i % 2].off && h.gen == good[i % 2].gen)
            continue;
        h.cell = rng_below(&rng, 2) ? h.cell : noise;
        CHECK_IS(handle_open(&s->b, &h, &r), SH_STALE);
    }
    CHECK_OK(handle_open(&s->b, &good[0], &r));
    block_drop(&s->b, &r);
    CHECK_OK(handle_open(&s->b, &good[1], &r));
    block_drop(&s->b, &r);
    block_drop(&s->a, &small);
    block_drop(&s->a, &large);
    must_be_sound(&s->a, EXACT_COUNTS);
    cast_end(s);
}

/* Leases */

static void test_leases(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 1000), got, again;
    struct handle h = handle_lease(&s->a, &r);
    block_drop(&s->a, &r); /* only the lease holds it now */
    CHECK(live_blocks(&s->a) == 1 && sh_leases(s->a.slot) == 1);
    collect(&s->lead);
    CHECK_OK(handle_open(&s->b, &h, &got));
    CHECK(sh_leases(s->a.slot) == 0);
    must_be_sound(&s->a, EXACT_COUNTS);
    CHECK_OK(handle_open(&s->a, &h, &again)); /* the lease is gone, the block lives */
    CHECK(again.nbytes == 1000);
    CHECK_IS(sh_lease_drop(&s->a, h.off, h.gen, h.cell, h.seq, 1000), SH_STALE);
    block_drop(&s->b, &got);
    block_drop(&s->a, &again);
    CHECK_IS(handle_open(&s->a, &h, &again), SH_STALE);
    must_be_empty(&s->a);
    cast_end(s);
}

/* Dropped by its maker; made again and again over several pages of cells. */
static void test_many_leases(void)
{
    enum {
        N = 1500
    };
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct handle *h = calloc(N, sizeof *h);
    struct sh_ref r = block_new(&s->a, 10), got;
    for (int round = 0; round < 3; round++) {
        for (uint32_t i = 0; i < N; i++)
            h[i] = handle_lease(&s->a, &r);
        must_be_sound(&s->a, EXACT_COUNTS);
        for (uint32_t i = 0; i < N; i++) {
            if (i % 2) {
                CHECK_OK(sh_lease_drop(&s->a, h[i].off, h[i].gen, h[i].cell, h[i].seq, 1000));
                CHECK_IS(sh_lease_drop(&s->a, h[i].off, h[i].gen, h[i].cell, h[i].seq, 1000),
                         SH_STALE);
            } else {
                CHECK_OK(handle_open(&s->b, &h[i], &got));
                block_drop(&s->b, &got);
            }
        }
        must_be_sound(&s->a, EXACT_COUNTS);
    }
    uint64_t used = atomic_load(&s->a.hdr->inuse_pages);
    CHECK(used < 16); /* cells are used again */
    block_drop(&s->a, &r);
    free(h);
    cast_end(s);
}

/* A lease's cell and number may come round: the generation still tells whose block it is. */
static void test_lease_of_another_block(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 64), got;
    struct handle old = handle_of(&s->a, &r);
    block_drop(&s->a, &r);
    r = block_new(&s->a, 64);
    CHECK(sh_data_offset(&s->a, &r) == old.off && r.gen != old.gen);
    struct handle fresh = handle_lease(&s->a, &r);
    old.cell = fresh.cell; /* as from a process that had these pages before */
    old.seq = fresh.seq;
    CHECK_IS(handle_open(&s->b, &old, &got), SH_STALE);
    CHECK_OK(handle_open(&s->b, &fresh, &got));
    CHECK(sh_leases(s->a.slot) == 0);
    block_drop(&s->b, &got);
    block_drop(&s->a, &r);
    must_be_sound(&s->a, EXACT_COUNTS);
    cast_end(s);
}

/* Names */

static void test_names(void)
{
    enum {
        N = 3000
    };
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    char name[SH_ROOT_NAME_MAX];
    struct sh_ref r, got;
    uint32_t len;
    for (uint32_t i = 0; i < N; i++) {
        r = block_new(&s->a, 16 + i);
        memcpy(r.data, &i, sizeof i);
        len = (uint32_t)snprintf(name, sizeof name, "name %u", i);
        CHECK_OK(sh_root_set(&s->a, name, len, &r, 1000));
        block_drop(&s->a, &r);
    }
    must_be_sound(&s->a, EXACT_COUNTS);
    collect(&s->lead);
    CHECK(live_blocks(&s->a) == N);
    for (uint32_t i = 0; i < N; i++) {
        len = (uint32_t)snprintf(name, sizeof name, "name %u", i);
        CHECK_OK(sh_root_get(&s->b, name, len, 1000, &got));
        CHECK(memcmp(got.data, &i, sizeof i) == 0 && got.nbytes == 16 + i);
        if (i % 3 == 0) /* by another process */
            CHECK_OK(sh_root_clear(&s->b, name, len, 1000));
        else if (i % 3 == 1)
            CHECK_OK(sh_root_set(&s->b, name, len, &got, 1000)); /* the same again */
        block_drop(&s->b, &got);
        CHECK_IS(sh_root_get(&s->a, name, len, 1000, &got), i % 3 ? SH_OK : SH_ABSENT);
        if (i % 3)
            block_drop(&s->a, &got);
    }
    must_be_sound(&s->a, EXACT_COUNTS);
    CHECK(live_blocks(&s->a) == N - N / 3);
    uint32_t entry = 0, n = 0;
    while (sh_root_name(&s->a, &entry, name, &len, 1000) == SH_OK)
        n++;
    CHECK(n == N - N / 3);
    memset(name, 'x', sizeof name);
    CHECK_IS(sh_root_clear(&s->a, name, sizeof name, 1000), SH_ABSENT);
    for (uint32_t i = 0; i < N; i++) {
        len = (uint32_t)snprintf(name, sizeof name, "name %u", i);
        CHECK_IS(sh_root_clear(&s->a, name, len, 1000), i % 3 ? SH_OK : SH_ABSENT);
    }
    must_be_empty(&s->a);
    cast_end(s);
}

/* Frees by others */

struct held {
    struct sh_ref *mine, *theirs;
    uint32_t n;
};

/* n blocks of a, each also held by b; then a lets go: b is the last. */
static struct held hand_over(struct cast *s, uint64_t nbytes, uint32_t n)
{
    struct held h = {calloc(n, sizeof *h.mine), calloc(n, sizeof *h.theirs), n};
    for (uint32_t i = 0; i < n; i++) {
        h.mine[i] = block_new(&s->a, nbytes);
        struct handle handle = handle_of(&s->a, &h.mine[i]);
        CHECK_OK(handle_open(&s->b, &handle, &h.theirs[i]));
    }
    for (uint32_t i = 0; i < n; i++)
        block_drop(&s->a, &h.mine[i]);
    return h;
}

static void drop_theirs(struct cast *s, struct held *h)
{
    for (uint32_t i = 0; i < h->n; i++)
        block_drop(&s->b, &h->theirs[i]);
    free(h->mine);
    free(h->theirs);
}

static void test_remote_free(void)
{
    struct cast *s = cast_new(32 << 20, NO_LIMIT);
    for (int round = 0; round < 5; round++) {
        for (uint32_t k = 0; k < SH_NCLASSES; k += 3) {
            uint32_t n = 4 * sh_classes[k].nblocks;
            struct held h = hand_over(s, sh_classes[k].size, n);
            drop_theirs(s, &h);
        }
    }
    must_be_empty(&s->a);
    uint64_t pages = 0;
    for (uint32_t k = 0; k < SH_NCLASSES; k += 3)
        pages += 4 * sh_classes[k].npages;
    /* five rounds need the memory of one and a little: the owner finds what others freed */
    CHECK(atomic_load(&s->a.hdr->used_pages) < pages + 100);
    must_be_sound(&s->a, EXACT_COUNTS);
    cast_end(s);
}

/* Classes that are 64 apart share a bit of the slot's hint: neither may lose the other's. */
static void test_remote_free_of_classes_64_apart(void)
{
    struct cast *s = cast_new(64 << 20, NO_LIMIT);
    for (uint32_t k = 0; k + 64 < SH_NCLASSES; k++) {
        uint32_t sizes[2] = {sh_classes[k].size, sh_classes[k + 64].size};
        struct held low = hand_over(s, sizes[0], 3 * sh_classes[k].nblocks);
        struct held high = hand_over(s, sizes[1], 8 * sh_classes[k + 64].nblocks);
        uint64_t inuse = atomic_load(&s->a.hdr->inuse_pages);
        drop_theirs(s, &low);
        drop_theirs(s, &high);
        low = hand_over(s, sizes[0], 3 * sh_classes[k].nblocks);
        high = hand_over(s, sizes[1], 8 * sh_classes[k + 64].nblocks);
        CHECK(atomic_load(&s->a.hdr->inuse_pages) <= inuse + 1); /* perhaps a page of pins */
        drop_theirs(s, &low);
        drop_theirs(s, &high);
        collect(&s->lead);
    }
    cast_end(s);
}

/* Empty spans */

static void test_empty_spans_go_back(void)
{
    struct cast *s = cast_new(64 << 20, NO_LIMIT);
    for (uint32_t k = 0; k < SH_NCLASSES; k++) {
        uint32_t n = 10 * sh_classes[k].nblocks;
        struct sh_ref *r = calloc(n, sizeof *r);
        uint64_t before = atomic_load(&s->a.hdr->inuse_pages);
        for (uint32_t i = 0; i < n; i++)
            r[i] = block_new(&s->a, sh_classes[k].size);
        for (uint32_t i = 0; i < n; i++)
            block_drop(&s->a, &r[i]);
        uint64_t after = atomic_load(&s->a.hdr->inuse_pages);
        CHECK(after <=
              before + sh_classes[k].npages + 1); /* one span is kept, and a page of pins */
        free(r);
    }
    must_be_sound(&s->a, EXACT_COUNTS);
    collect(&s->lead); /* now also those, of a process that does nothing */
    CHECK(atomic_load(&s->a.hdr->inuse_pages) <= 2);
    must_be_sound(&s->a, EXACT_COUNTS);
    struct sh_ref r = block_new(&s->a, 100); /* and it finds out */
    block_drop(&s->a, &r);
    cast_end(s);
}

/* The dead */

static void test_orphans(void)
{
    enum {
        N = 600
    };
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct sh_reaped reaped;
    struct sh_ref kept[N / 10], r;
    char name[16];
    for (uint32_t i = 0; i < N; i++) {
        r = block_new(&s->b, 200);
        memset(r.data, (uint8_t)i, 200);
        uint32_t len = (uint32_t)snprintf(name, sizeof name, "%u", i / 10);
        if (i % 10 == 0)
            CHECK_OK(sh_root_set(&s->b, name, len, &r, 1000));
    }
    struct handle lease = handle_lease(&s->b, &r);
    uint32_t slot = s->b.slot_index;
    uint64_t inuse = atomic_load(&s->a.hdr->inuse_pages);
    CHECK_OK(sh_reap(&s->lead, slot, 0, &reaped));
    CHECK(reaped.pins == 0 && !reaped.done); /* it lives */
    arena_die(&s->b);
    CHECK(!sh_alive(&s->lead, slot));
    CHECK_OK(sh_reap(&s->lead, slot, 0, &reaped)); /* its lease has time left */
    CHECK(reaped.pins == N && reaped.leases == 0 && !reaped.done);
    must_be_sound(&s->a, EXACT_COUNTS);
    CHECK(live_blocks(&s->a) == N / 10 + 1);
    CHECK_OK(sh_reap(&s->lead, slot, UINT64_MAX, &reaped));
    CHECK(reaped.leases == 1 && reaped.done);
    CHECK(atomic_load(&sh_slot(&s->lead, slot)->state) == SH_SLOT_FREE);
    CHECK_IS(handle_open(&s->a, &lease, &r), SH_STALE);
    must_be_sound(&s->a, EXACT_COUNTS);
    CHECK(s->a.hdr->orphans[sh_class_of(200)] != SH_NIL);
    struct sh_ref *again = calloc(N, sizeof *again); /* orphans first, before new pages */
    for (uint32_t i = 0; i < N - N / 10; i++)
        again[i] = block_new(&s->a, 200);
    CHECK(s->a.hdr->orphans[sh_class_of(200)] == SH_NIL);
    CHECK(atomic_load(&s->a.hdr->inuse_pages) <= inuse + 2);
    for (uint32_t i = 0; i < N / 10; i++) {
        uint32_t len = (uint32_t)snprintf(name, sizeof name, "%u", i);
        CHECK_OK(sh_root_get(&s->a, name, len, 1000, &kept[i]));
        CHECK(all_are(&kept[i], (uint8_t)(10 * i)));
        CHECK_OK(sh_root_clear(&s->a, name, len, 1000));
        block_drop(&s->a, &kept[i]);
    }
    for (uint32_t i = 0; i < N - N / 10; i++)
        block_drop(&s->a, &again[i]);
    must_be_sound(&s->a, EXACT_COUNTS);
    free(again);
    cast_end(s);
}

static void collect_now(void *lead)
{
    collect(lead);
}

/* A process takes an orphan that is empty; before it can lock the coordinator out, that one gives
 * it back to the page heap. */
static void test_orphan_taken_by_two(void)
{
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->b, 200), other, kept = block_new(&s->a, 8);
    struct handle lease = handle_lease(&s->b, &r);
    arena_die(&s->b);
    reap_dead(&s->lead, 0); /* the lease has time left, so the span is an orphan */
    CHECK_OK(handle_open(&s->a, &lease, &r));
    block_drop(&s->a, &r);
    CHECK(s->a.hdr->orphans[sh_class_of(200)] != SH_NIL);
    at_moment("adopt:taken", collect_now, &s->lead);
    r = block_new(&s->a, 200);
    MOMENT_CAME("adopt:taken");
    must_be_sound(&s->a, EXACT_COUNTS);
    other = block_new(&s->a, 3000);
    CHECK(r.page != other.page);
    block_drop(&s->a, &other);
    block_drop(&s->a, &r);
    block_drop(&s->a, &kept);
    cast_end(s);
}

/* Cells that the collector took back are nobody's to look at: to read them brought their pages
 * back, and what others had put there was taken for handles. */
static void test_cells_that_were_given_back(void)
{
    enum {
        N = 5000
    };
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 10), *copies = calloc(N, sizeof *copies);
    struct handle *leases = calloc(N, sizeof *leases), last;
    for (uint32_t i = 0; i < N; i++) {
        CHECK_OK(sh_repin(&s->a, &r, 1000, &copies[i]));
        leases[i] = handle_lease(&s->a, &r);
    }
    for (uint32_t i = 0; i < N; i++) {
        block_drop(&s->a, &copies[i]);
        CHECK_OK(sh_lease_drop(&s->a, leases[i].off, leases[i].gen, leases[i].cell, leases[i].seq,
                               1000));
    }
    collect(&s->lead);
    release_all(&s->lead);
    CHECK_OK(sh_fork_prepare(&s->a));
    CHECK(s->a.child->npin_spans == 1 && "what a child has is room for the handles there are");
    sh_fork_parent(&s->a);
    kernel_must_agree(&s->lead);
    last = handle_lease(&s->a, &r);
    CHECK_OK(sh_lease_drop(&s->a, last.off, last.gen, last.cell, last.seq, 1000));
    kernel_must_agree(&s->lead);
    reap_dead(&s->lead, UINT64_MAX);
    block_drop(&s->a, &r);
    free(copies);
    free(leases);
    cast_end(s);
}

/* Leases that end twice at once: each is counted once, to the one who made it */

struct taking {
    struct sh_ctx *c;
    struct handle *handle;
    struct sh_ref got;
};

static void open_now(void *arg)
{
    struct taking *t = arg;
    CHECK_OK(handle_open(t->c, t->handle, &t->got));
}

static void test_lease_taken_while_it_expires(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->b, 1000);
    struct handle h = handle_lease(&s->b, &r);
    struct taking t = {.c = &s->a, .handle = &h};
    struct sh_reaped reaped;
    uint32_t slot = s->b.slot_index;
    arena_die(&s->b);
    CHECK_OK(sh_reap(&s->lead, slot, 0, &reaped));
    at_moment("reap:seen", open_now, &t);
    CHECK_OK(sh_reap(&s->lead, slot, UINT64_MAX, &reaped));
    MOMENT_CAME("reap:seen");
    CHECK(reaped.done && reaped.leases == 0 && sh_leases(sh_slot(&s->lead, slot)) == 0);
    block_drop(&s->a, &t.got);
    cast_end(s);
}

static void sweep_now(void *lead)
{
    uint64_t blocks, bytes;
    CHECK_OK(sh_sweep(lead, &blocks, &bytes));
}

static void test_lease_span_given_back_while_its_last_is_taken(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 1000), got;
    struct handle h = handle_lease(&s->a, &r);
    uint64_t n;
    CHECK_OK(sh_start_cycle(&s->lead));
    CHECK_OK(sh_mark(&s->lead, &n));
    CHECK_OK(sh_finish_mark(&s->lead, &n));
    s->lead.recount_blocks = s->lead.recount_leases = false; /* nobody died */
    s->lead.patience_ms = 1;
    at_moment("lease:taken", sweep_now, &s->lead);
    CHECK_OK(handle_open(&s->b, &h, &got));
    MOMENT_CAME("lease:taken");
    s->lead.patience_ms = 10000;
    CHECK(sh_leases(s->a.slot) == 0 && sh_leases(s->lead.slot) == 0);
    CHECK_OK(sh_end_cycle(&s->lead, 4 << 20, true, 0));
    block_drop(&s->a, &r);
    block_drop(&s->b, &got);
    cast_end(s);
}

/* A child's room for pins, empty until its parent's are copied, is not the collector's to take:
 * they were written into pages that were others' by then. */
static void test_pins_of_a_child_are_copied_during_a_sweep(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 1000);
    uint64_t n;
    CHECK_OK(sh_start_cycle(&s->lead));
    CHECK_OK(sh_mark(&s->lead, &n));
    CHECK_OK(sh_finish_mark(&s->lead, &n));
    s->lead.recount_blocks = s->lead.recount_leases = false; /* nobody died */
    s->lead.patience_ms = 1;
    at_moment("fork:reserved", sweep_now, &s->lead);
    CHECK_OK(sh_fork_prepare(&s->a));
    MOMENT_CAME("fork:reserved");
    uint64_t span = sh_span(&s->a, s->a.child->pin_spans[0]->page);
    CHECK(SH_SPAN_STATE(span) == SH_PINS && SH_SPAN_OWNER(span) == s->a.child->owner);
    sh_fork_parent(&s->a);
    s->lead.patience_ms = 10000;
    CHECK_OK(sh_end_cycle(&s->lead, 4 << 20, true, 0));
    reap_dead(&s->lead, UINT64_MAX);
    must_be_sound(&s->a, EXACT_COUNTS);
    block_drop(&s->a, &r);
    cast_end(s);
}

/* What the coordinator has out of the page heap at that moment was lost until its death. */
static void test_runs_that_cannot_be_given_back_yet(void)
{
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct stopped stopped = {.c = &s->b};
    struct sh_ref kept = block_new(&s->a, 100), r = block_new(&s->a, 100000);
    uint64_t bytes, runs;
    uint32_t page = 0;
    block_drop(&s->a, &r);
    s->lead.patience_ms = 5;
    at_moment("release:claimed", stop_with_heap_lock, &stopped);
    CHECK_IS(sh_release(&s->lead, SH_STAMP_MAX, UINT64_MAX, &page, &bytes, &runs), SH_BUSY);
    MOMENT_CAME("release:claimed");
    CHECK(s->lead.patience_ms == SH_SPENT_MS && "the next wait is short");
    go_on(&stopped);
    s->lead.patience_ms = 10000;
    block_drop(&s->a, &kept);
    cast_end(s);
}

static void test_orphan_that_cannot_be_put_back_yet(void)
{
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct stopped stopped = {.c = &s->a};
    struct sh_ref r = block_new(&s->b, 200);
    struct handle lease = handle_lease(&s->b, &r);
    uint64_t units;
    arena_die(&s->b);
    reap_dead(&s->lead, 0);
    CHECK(s->a.hdr->orphans[sh_class_of(200)] != SH_NIL);
    s->lead.patience_ms = 5;
    at_moment("orphan:held", stop_with_heap_lock, &stopped);
    CHECK_IS(sh_stamp(&s->lead, 1, &units), SH_BUSY);
    MOMENT_CAME("orphan:held");
    go_on(&stopped);
    s->lead.patience_ms = 10000;
    CHECK(s->a.hdr->orphans[sh_class_of(200)] == SH_NIL);
    CHECK_OK(sh_stamp(&s->lead, 2, &units));
    CHECK(s->a.hdr->orphans[sh_class_of(200)] != SH_NIL);
    CHECK_OK(handle_open(&s->a, &lease, &r));
    block_drop(&s->a, &r);
    cast_end(s);
}

/* Nearly all of the heap, and back. */
static void need_most_of_it(void *c)
{
    struct sh_ref r;
    CHECK_OK(sh_alloc(c, 48 << 20, false, 1000, &r));
    block_drop(c, &r);
}

static void test_idle_pages_were_out_of_reach_while_they_were_given_back(void)
{
    struct cast *s = cast_new(64 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 63 << 20);
    uint64_t bytes, runs;
    uint32_t page = 0;
    block_drop(&s->a, &r);
    at_moment("release:claimed", need_most_of_it, &s->a);
    CHECK_OK(sh_release(&s->lead, SH_STAMP_MAX, UINT64_MAX, &page, &bytes, &runs));
    MOMENT_CAME("release:claimed");
    cast_end(s);
}

/* Only what nobody can still be looking at is punched: the coordinator takes each process's lock
 * once between claiming and punching, and leaves it if one does not come out of its operation. */
static void test_handshake_before_punching(void)
{
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 1 << 20);
    uint64_t bytes, runs, committed;
    uint32_t page = 0;
    memset(r.data, 7, r.nbytes);
    block_drop(&s->a, &r);
    committed = sh_committed_units(&s->a);
    atomic_store(&s->b.slot->lock, s->b.owner | 1); /* b is inside an operation */
    s->lead.patience_ms = 1;
    CHECK_IS(sh_release(&s->lead, SH_STAMP_MAX, UINT64_MAX, &page, &bytes, &runs), SH_BUSY);
    CHECK(bytes == 0 && all_are(&r, 7));
    CHECK(sh_committed_units(&s->a) == committed);
    must_be_sound(&s->a, EXACT_COUNTS);
    kernel_must_agree(&s->lead);
    atomic_store(&s->b.slot->lock, 0);
    CHECK_OK(sh_release(&s->lead, SH_STAMP_MAX, UINT64_MAX, &page, &bytes, &runs));
    CHECK(bytes >= 1 << 20); /* and reading it would bring it back */
    cast_end(s);
}

/* Nor does a successor punch what the dead coordinator had claimed before that handshake. */
static void test_handshake_of_a_successor(void)
{
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 1 << 20);
    struct sh_walk walk = {0};
    uint32_t page, phase;
    uint64_t span;
    memset(r.data, 7, r.nbytes);
    block_drop(&s->a, &r);
    do
        CHECK_OK(sh_walk_next(&s->lead, &walk, &page, &span));
    while (SH_SPAN_STATE(span) != SH_FREE);
    CHECK_OK(sh_heap_lock(&s->lead, 1000));
    CHECK(sh_pages_take_at(&s->lead, page, span, page, SH_SPAN_NPAGES(span)));
    sh_heap_unlock(&s->lead);
    sh_set_units(&s->lead, sh_unit_of_page(&s->lead, r.page), 1, SH_UNIT_RELEASING);
    arena_die(&s->lead);
    atomic_store(&s->b.slot->lock, s->b.owner | 1); /* b is inside an operation */
    CHECK_OK(sh_map(&s->lead, dup(s->fd), true));
    CHECK_OK(sh_attach_coordinator(&s->lead, 1000));
    s->lead.patience_ms = 1;
    CHECK_IS(sh_begin(&s->lead, &phase), SH_BUSY);
    CHECK(all_are(&r, 7));
    atomic_store(&s->b.slot->lock, 0);
    CHECK_OK(sh_begin(&s->lead, &phase));
    must_be_sound(&s->a, EXACT_COUNTS);
    kernel_must_agree(&s->lead);
    cast_end(s);
}

/* A dead holder of a process lock is followed by whoever waits: here by the coordinator. */
static void test_dead_in_an_operation(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->b, 100);
    CHECK_OK(sh_enter(&s->b, 1000));
    sh_pin_clear(&s->b, r.pin); /* dies after its pin was cleared, before the count went down */
    uint32_t index = s->b.slot_index;
    sh_leave(&s->b);
    atomic_store(&sh_slot(&s->lead, index)->lock, s->b.owner | 1);
    arena_die(&s->b);
    CHECK(collect(&s->lead) == 1);
    reap_dead(&s->lead, UINT64_MAX);
    must_be_empty(&s->lead);
    arena_join(&s->b, s->fd);
    CHECK(s->b.slot_index == index);
    r = block_new(&s->b, 100); /* the slot's lock serves its next user */
    block_drop(&s->b, &r);
    cast_end(s);
}

/* Holes: whole OS pages between blocks that live */

static void test_holes(void)
{
    enum {
        N = 4096
    };
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct sh_ref *r = calloc(N, sizeof *r);
    for (uint32_t i = 0; i < N; i++) {
        r[i] = block_new(&s->a, 256);
        memset(r[i].data, (uint8_t)(i | 1), 256);
    }
    for (uint32_t i = 0; i < N; i++)
        if (i % 64 != 0)
            block_drop(&s->a, &r[i]);
    uint64_t before = sh_committed_units(&s->a);
    collect(&s->lead);
    must_be_sound(&s->a, EXACT_COUNTS);
    CHECK(release_all(&s->lead) > 0);
    must_be_sound(&s->a, EXACT_COUNTS);
    kernel_must_agree(&s->a);
    uint64_t after = sh_committed_units(&s->a);
    CHECK(after <= N / 64 + 16 && after < before / 3);
    for (uint32_t i = 0; i < N; i++) { /* into the holes again */
        if (i % 64 == 0)
            continue;
        r[i] = block_new(&s->a, 256);
        CHECK(all_are(&r[i], 0));
        memset(r[i].data, (uint8_t)(i | 1), 256);
        if (i % 512 == 100)
            collect(&s->lead);
        if (i % 512 == 300)
            release_all(&s->lead);
    }
    must_be_sound(&s->a, EXACT_COUNTS);
    kernel_must_agree(&s->a);
    for (uint32_t i = 0; i < N; i++) {
        CHECK(all_are(&r[i], (uint8_t)(i | 1)));
        block_drop(&s->a, &r[i]);
    }
    free(r);
    cast_end(s);
}

/* Blocks that lie across OS pages, of every class: a hole is none of theirs. */
static void test_holes_of_every_class(void)
{
    struct cast *s = cast_new(64 << 20, NO_LIMIT);
    struct rng rng = {test_seed()};
    for (uint32_t k = 0; k < SH_NCLASSES; k++) {
        uint32_t n = 3 * sh_classes[k].nblocks, size = sh_classes[k].size;
        struct sh_ref *r = calloc(n, sizeof *r);
        bool *there = calloc(n, sizeof *there);
        for (int round = 0; round < 3; round++) {
            for (uint32_t i = 0; i < n; i++) {
                if (there[i])
                    continue;
                r[i] = block_new(&s->a, size);
                memset(r[i].data, (uint8_t)(i + 1), size);
                there[i] = true;
            }
            for (uint32_t i = 0; i < n; i++) {
                CHECK(all_are(&r[i], (uint8_t)(i + 1)));
                if (rng_below(&rng, 8) != 0) {
                    block_drop(&s->a, &r[i]);
                    there[i] = false;
                }
            }
            collect(&s->lead);
            release_all(&s->lead);
            kernel_must_agree(&s->a);
            must_be_sound(&s->a, EXACT_COUNTS);
        }
        for (uint32_t i = 0; i < n; i++)
            if (there[i])
                block_drop(&s->a, &r[i]);
        free(r);
        free(there);
    }
    cast_end(s);
}

/* Limits */

static uint32_t fill_up(struct sh_ctx *c, uint64_t nbytes, struct sh_ref *r, enum sh_status *why)
{
    uint32_t n = 0;
    while ((*why = sh_alloc(c, nbytes, false, 1000, &r[n])) == SH_OK)
        n++;
    return n;
}

static void stamp_now(void *arg)
{
    struct cast *s = arg;
    uint64_t units;
    s->lead.recount_units = true;
    s->lead.patience_ms = 1;
    CHECK_OK(sh_stamp(&s->lead, 1, &units));
    CHECK(s->lead.recount_units); /* not now: it would miss what is on its way */
}

/* While units are on the budget and not yet in their words, nobody puts the budget right. */
static void test_recount_while_committing(void)
{
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    uint64_t units;
    at_moment("commit:budgeted", stamp_now, s);
    struct sh_ref r = block_new(&s->a, 1 << 20);
    MOMENT_CAME("commit:budgeted");
    must_be_sound(&s->a, EXACT_COUNTS);
    atomic_fetch_add(&s->a.hdr->committed, 100); /* as a death would leave it */
    CHECK_OK(sh_stamp(&s->lead, 1, &units));
    CHECK(!s->lead.recount_units);
    must_be_sound(&s->a, EXACT_COUNTS);
    block_drop(&s->a, &r);
    cast_end(s);
}

static void alloc_far_up(void *arg)
{
    struct taking *t = arg;
    t->got = block_new(t->c, 1 << 20);
}

/* The high-water mark is read after the budget: what was committed above it in between was taken
 * off the budget, and was given back a second time later. */
static void test_recount_while_growing(void)
{
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct sh_ref kept = block_new(&s->a, 100);
    struct taking t = {.c = &s->a};
    uint64_t units;
    s->lead.recount_units = true;
    at_moment("recount:begins", alloc_far_up, &t);
    CHECK_OK(sh_stamp(&s->lead, 1, &units));
    MOMENT_CAME("recount:begins");
    must_be_sound(&s->a, EXACT_COUNTS);
    block_drop(&s->a, &t.got);
    block_drop(&s->a, &kept);
    cast_end(s);
}

/* In the sum after the recount's walk, and there when it is at the first process's numbers. */
static void alloc_at_the_next_slot(void *arg)
{
    at_moment("sum:counted", alloc_far_up, arg);
}

static void alloc_in_the_next_sum(void *arg)
{
    at_moment("sum:counted", alloc_at_the_next_slot, arg);
}

/* Of a block that is made while the counters are summed, the sum may have the bytes and not the
 * number: then it is not what the walk saw. */
static void test_recount_while_allocating(void)
{
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct sh_ref kept = block_new(&s->a, 100);
    struct taking t = {.c = &s->a};
    uint64_t n;
    s->lead.recount_leases = false;
    CHECK_OK(sh_start_cycle(&s->lead));
    CHECK_OK(sh_mark(&s->lead, &n));
    CHECK_OK(sh_finish_mark(&s->lead, &n));
    s->lead.recount_blocks = true;
    CHECK(s->a.slot_index == 1);
    at_moment("gc:counted", alloc_in_the_next_sum, &t);
    sweep_now(&s->lead);
    MOMENT_CAME("sum:counted");
    CHECK_OK(sh_end_cycle(&s->lead, 4 << 20, true, 0));
    counters_must_be(&s->lead, 2, (1 << 20) + 100);
    block_drop(&s->a, &t.got);
    block_drop(&s->a, &kept);
    cast_end(s);
}

static void test_memory_limit(void)
{
    static const uint32_t sizes[] = {100, 5000, 65536, 300000};
    const uint64_t LIMIT = 2 << 20;
    struct cast *s = cast_new(64 << 20, LIMIT);
    struct sh_ref *r = calloc(LIMIT / 100, sizeof *r);
    for (uint32_t i = 0; i < 4; i++) {
        enum sh_status why;
        uint32_t n = fill_up(&s->a, sizes[i], r, &why);
        CHECK_IS(why, SH_LIMIT);
        CHECK((n + 6) * (uint64_t)sizes[i] > LIMIT / 2);
        must_be_sound(&s->a, EXACT_COUNTS);
        kernel_must_agree(&s->a);
        CHECK(sh_committed_units(&s->a) << s->a.geo.unit_shift <= LIMIT);
        for (uint32_t j = 0; j < n; j++)
            block_drop(&s->a, &r[j]);
        collect(&s->lead);
        release_all(&s->lead);
        must_be_sound(&s->a, EXACT_COUNTS);
    }
    free(r);
    cast_end(s);
}

static void test_capacity(void)
{
    static const uint32_t sizes[] = {100, 5000, 65536, 300000};
    enum {
        CAPACITY = 2 << 20
    };
    struct cast *s = cast_new(CAPACITY, NO_LIMIT);
    struct sh_ref *r = calloc(CAPACITY / 100, sizeof *r);
    for (uint32_t i = 0; i < 4; i++) {
        enum sh_status why;
        uint32_t n = fill_up(&s->a, sizes[i], r, &why);
        CHECK_IS(why, SH_FULL);
        CHECK((n + 6) * (uint64_t)sizes[i] > CAPACITY / 2);
        CHECK_IS(sh_alloc(&s->a, CAPACITY + 1, false, 1000, &r[n]), SH_FULL);
        must_be_sound(&s->a, EXACT_COUNTS);
        for (uint32_t j = 0; j < n; j++)
            block_drop(&s->a, &r[j]);
        collect(&s->lead); /* what the one process keeps empty is in the other's way */
        must_be_sound(&s->a, EXACT_COUNTS);
    }
    free(r);
    cast_end(s);
}

/* Free blocks that a process would have found sooner or later, and that it did not look for where
 * there was no room for more: it was told that the heap is full. */

static void one_more_of(struct sh_ctx *c, uint32_t nbytes)
{
    struct sh_ref r;
    CHECK_OK(sh_alloc(c, nbytes, false, 1000, &r));
    block_drop(c, &r);
}

/* Full spans of 65,536 bytes, one block each, and the handle of each. */
static struct handle *full_of(struct sh_ctx *c, struct sh_ref *r, uint32_t *n, enum sh_status why)
{
    enum sh_status status;
    *n = fill_up(c, SH_MAX_SMALL, r, &status);
    CHECK_IS(status, why);
    struct handle *h = calloc(*n, sizeof *h);
    for (uint32_t i = 0; i < *n; i++)
        h[i] = handle_of(c, &r[i]);
    return h;
}

/* A refill looks at 32 spans in which others may have freed, and goes on there the next time. */
static void test_full_though_another_freed_in_the_last_of_many_spans(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r[128], theirs;
    uint32_t n;
    one_more_of(&s->b, 100); /* it has pins */
    struct handle *h = full_of(&s->a, r, &n, SH_FULL);
    CHECK(n > 100);
    for (uint32_t i = 0; i < n; i++) {
        CHECK_OK(handle_open(&s->b, &h[i], &theirs));
        block_drop(&s->a, &r[i]);
        block_drop(&s->b, &theirs); /* the last one frees */
        CHECK_OK(sh_alloc(&s->a, SH_MAX_SMALL, false, 1000, &r[i]));
    }
    for (uint32_t i = 0; i < n; i++)
        block_drop(&s->a, &r[i]);
    free(h);
    cast_end(s);
}

/* The first orphan was taken, and if it had nothing free, none of the others. */
static void test_full_though_the_second_orphan_has_a_free_block(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r[128], kept[128];
    uint32_t n, i = 0;
    one_more_of(&s->a, 100);
    struct handle *h = full_of(&s->b, r, &n, SH_FULL);
    for (uint32_t k = 0; k < n; k++)
        CHECK_OK(handle_open(&s->a, &h[k], &kept[k]));
    arena_die(&s->b);
    reap_dead(&s->lead, UINT64_MAX);
    while (kept[i].page == s->a.hdr->orphans[sh_class_of(SH_MAX_SMALL)])
        i++;
    block_drop(&s->a, &kept[i]);
    CHECK_OK(sh_alloc(&s->a, SH_MAX_SMALL, false, 1000, &kept[i]));
    for (uint32_t k = 0; k < n; k++)
        block_drop(&s->a, &kept[k]);
    free(h);
    cast_end(s);
}

/* Without room to fill the holes of its own spans a process did not look at orphans. */
static void test_limit_though_an_orphan_has_a_free_block(void)
{
    enum {
        N = 16, /* blocks of a span */
        LIMIT = 1 << 20
    };
    struct cast *s = cast_new(16 << 20, LIMIT);
    struct sh_ref mine[N], theirs[N], rest[LIMIT / 1024], again;
    enum sh_status why;
    for (uint32_t i = 0; i < N; i++) {
        mine[i] = block_new(&s->a, 4096);
        theirs[i] = block_new(&s->b, 4096);
    }
    for (uint32_t i = 1; i < N; i++)
        block_drop(&s->a, &mine[i]);
    collect(&s->lead);
    release_all(&s->lead);
    uint32_t n = fill_up(&s->a, 1024, rest, &why);
    CHECK_IS(why, SH_LIMIT);
    CHECK_OK(sh_root_set(&s->b, "kept", 4, &theirs[0], 1000));
    arena_die(&s->b);
    reap_dead(&s->lead, UINT64_MAX);
    CHECK_OK(sh_alloc(&s->a, 4096, false, 1000, &again));
    block_drop(&s->a, &again);
    block_drop(&s->a, &mine[0]);
    for (uint32_t i = 0; i < n; i++)
        block_drop(&s->a, &rest[i]);
    CHECK_OK(sh_root_clear(&s->a, "kept", 4, 1000));
    cast_end(s);
}

/* Counts and generations at their ends */

static void test_saturated_count(void)
{
    enum {
        N = SH_COUNT_MAX + 10
    };
    struct cast *s = cast_new(16 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 100), *pins = calloc(N, sizeof *pins);
    for (uint32_t i = 0; i < N; i++)
        CHECK_OK(sh_repin(&s->a, &r, 1000, &pins[i]));
    CHECK(SH_COUNT(atomic_load(r.word)) == SH_COUNT_MAX);
    must_be_sound(&s->a, EXACT_COUNTS);
    for (uint32_t i = 0; i < N; i++)
        block_drop(&s->a, &pins[i]);
    CHECK(SH_COUNT(atomic_load(r.word)) == SH_COUNT_MAX); /* it sticks */
    CHECK(collect(&s->lead) == 0);
    struct handle h = handle_of(&s->a, &r);
    block_drop(&s->a, &r);
    CHECK(live_blocks(&s->a) == 1);
    CHECK(collect(&s->lead) == 1); /* only the collector frees such a block */
    must_be_empty(&s->a);
    CHECK_IS(handle_open(&s->b, &h, &r), SH_STALE);
    free(pins);
    cast_end(s);
}

static void test_generations_run_out(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref first = block_new(&s->a, 64), r, more[200];
    block_drop(&s->a, &first);
    uint64_t off = sh_data_offset(&s->a, &first);
    atomic_store(first.word, SH_BLOCK_WORD(SH_BLOCK_FREE, SH_GEN_MAX - 1));
    r = block_new(&s->a, 64);
    CHECK(sh_data_offset(&s->a, &r) == off && r.gen == SH_GEN_MAX - 1);
    block_drop(&s->a, &r); /* the last one that this block can have */
    for (uint32_t i = 0; i < 200; i++) {
        more[i] = block_new(&s->a, 64);
        CHECK(sh_data_offset(&s->a, &more[i]) != off);
    }
    for (uint32_t i = 0; i < 200; i++)
        block_drop(&s->a, &more[i]);
    collect(&s->lead);
    CHECK(SH_SPAN_STATE(sh_span(&s->a, first.page)) == SH_RETIRED);
    must_be_sound(&s->a, EXACT_COUNTS);
    release_all(&s->lead);
    CHECK(atomic_load(&s->a.hdr->inuse_pages) >= 1); /* the page stays out of use for ever */
    for (uint32_t i = 0; i < 200; i++) {
        more[i] = block_new(&s->a, 8192);
        CHECK(more[i].page != first.page);
    }
    arena_leave(&s->a);
    reap_dead(&s->lead, UINT64_MAX);
    must_be_empty(&s->lead);
    must_be_sound(&s->lead, EXACT_COUNTS);
    arena_leave(&s->b);
    arena_leave(&s->lead);
    close(s->fd);
    free(s);
}

static void test_large_generations_run_out(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 100000), small[600];
    uint32_t page = r.page;
    block_drop(&s->a, &r);
    atomic_store(&sh_page(&s->a, page)->mark, SH_GEN_MAX - 1);
    r = block_new(&s->a, 100000);
    CHECK(r.page == page && r.gen == SH_GEN_MAX - 1);
    block_drop(&s->a, &r);
    for (uint32_t i = 0; i < 600; i++) { /* cut into small ones, or not at all */
        small[i] = block_new(&s->a, i % 2 ? 8000 : 16);
        CHECK(small[i].gen < SH_GEN_MAX && small[i].data < sh_data(&s->a, page) + (600 << 13));
    }
    r = block_new(&s->a, 100000);
    CHECK(r.page != page);
    must_be_sound(&s->a, EXACT_COUNTS);
    arena_leave(&s->a);
    arena_leave(&s->b);
    reap_dead(&s->lead, UINT64_MAX);
    must_be_empty(&s->lead);
    arena_leave(&s->lead);
    close(s->fd);
    free(s);
}

/* A large run whose block does not live: a death between the two. */
static void test_lost_large_block(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->b, 100000), kept = block_new(&s->a, 100000);
    struct handle h = handle_of(&s->b, &r);
    uint32_t page = r.page;
    CHECK_OK(sh_enter(&s->b, 1000));
    sh_pin_clear(&s->b, r.pin);
    uint64_t w = atomic_load(r.word);
    CHECK(sh_end_life(&s->b, &r, &w)); /* and dies here */
    sh_leave(&s->b);
    arena_die(&s->b);
    reap_dead(&s->lead, UINT64_MAX);
    CHECK(SH_SPAN_STATE(sh_span(&s->a, page)) == SH_LARGE);
    collect(&s->lead);
    CHECK(SH_SPAN_STATE(sh_span(&s->a, page)) != SH_LARGE);
    must_be_sound(&s->a, EXACT_COUNTS);
    CHECK(live_blocks(&s->a) == 1);
    r = block_new(&s->a, 100000); /* at the same place, not under the same handle */
    CHECK(r.page == page && r.gen > h.gen);
    block_drop(&s->a, &r);
    block_drop(&s->a, &kept);
    cast_end(s);
}

/* A collection, step by step (DESIGN section 6, rules 8 to 13) */

static void lose_pin(struct sh_ctx *c, struct sh_ref *r)
{
    CHECK_OK(sh_enter(c, 1000));
    sh_pin_clear(c, r->pin);
    sh_pin_free(c, r->pin);
    sh_leave(c);
}

static bool is_touched(struct sh_ctx *c, const struct sh_ref *r)
{
    uint32_t phase = atomic_load(&c->slot->phase);
    return (atomic_load(r->word) & SH_TOUCH_MASK) == sh_touch_of(phase);
}

static void test_collection_step_by_step(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref held = block_new(&s->a, 100), lost = block_new(&s->a, 100), got;
    struct sh_ref twice = block_new(&s->a, 100), saved = block_new(&s->a, 100), fresh, other;
    struct handle lost_handle = handle_of(&s->a, &lost), saved_handle = handle_of(&s->a, &saved);
    uint64_t n, bytes;
    CHECK_OK(sh_repin(&s->a, &twice, 1000, &other));
    lose_pin(&s->a, &lost);
    lose_pin(&s->a, &saved);

    CHECK_OK(sh_start_cycle(&s->lead));
    CHECK(sh_phase_of(atomic_load(&s->b.slot->phase)) == SH_MARK);
    CHECK_OK(sh_mark(&s->lead, &n));
    CHECK(n == 2 && (atomic_load(held.word) & SH_MARKED) && !(atomic_load(lost.word) & SH_MARKED));
    fresh = block_new(&s->a, 100); /* after the scan: only its touch says that it lives */
    CHECK(is_touched(&s->a, &fresh) && !(atomic_load(fresh.word) & SH_MARKED));
    CHECK(!is_touched(&s->a, &twice));
    block_drop(&s->a, &other);
    CHECK(is_touched(&s->a, &twice));
    CHECK_OK(handle_open(&s->b, &saved_handle, &got)); /* in MARK a block may still be saved */
    CHECK(is_touched(&s->b, &got));

    uint32_t phase =
        atomic_load(&s->b.slot->phase); /* FINAL: nobody may be saved, nobody is condemned */
    atomic_store(&s->b.slot->phase, phase - SH_MARK + SH_FINAL);
    CHECK_IS(sh_adopt(&s->b, lost_handle.off, lost_handle.gen, 0, 0, 1000, &other), SH_AGAIN);
    atomic_store(&s->b.slot->phase, phase);

    CHECK_OK(sh_finish_mark(&s->lead, &n));
    CHECK(n == 2 && sh_phase_of(atomic_load(&s->b.slot->phase)) == SH_SWEEP);
    CHECK_IS(handle_open(&s->b, &lost_handle, &other), SH_STALE); /* condemned */
    struct handle h = handle_of(&s->a, &held);
    CHECK_OK(handle_open(&s->b, &h, &other)); /* marked */
    block_drop(&s->b, &other);
    h = handle_of(&s->a, &fresh);
    CHECK_OK(handle_open(&s->b, &h, &other)); /* touched */
    block_drop(&s->b, &other);
    CHECK_OK(sh_sweep(&s->lead, &n, &bytes));
    CHECK(n == 1 && bytes == 100);
    CHECK_OK(sh_end_cycle(&s->lead, 1 << 20, false, 0));
    CHECK(sh_phase_of(atomic_load(&s->b.slot->phase)) == SH_IDLE);
    must_be_sound(&s->a, 0);
    block_drop(&s->a, &held);
    block_drop(&s->a, &twice);
    block_drop(&s->a, &fresh);
    block_drop(&s->b, &got); /* its count is one too high since its pin was lost */
    CHECK(live_blocks(&s->a) == 1 && collect(&s->lead) == 1);
    cast_end(s);
}

static void sweep_cycle(struct sh_ctx *lead)
{
    uint64_t n, bytes;
    CHECK_OK(sh_start_cycle(lead));
    CHECK_OK(sh_mark(lead, &n));
    CHECK_OK(sh_finish_mark(lead, &n));
    CHECK_OK(sh_sweep(lead, &n, &bytes));
}

/* A process that missed the end of a collection, because it was stopped or the coordinator was
 * killed, is in SWEEP for long. What was made since then is neither marked nor touched. */
static void test_block_from_after_the_sweep(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r, got;
    sweep_cycle(&s->lead);
    atomic_store(&s->b.slot->lock, s->b.owner | 1); /* b is inside an operation */
    s->lead.patience_ms = 1;
    CHECK_IS(sh_end_cycle(&s->lead, 4 << 20, true, 0), SH_BUSY);
    atomic_store(&s->b.slot->lock, 0);
    CHECK(sh_phase_of(atomic_load(&s->a.slot->phase)) == SH_IDLE);
    CHECK(sh_phase_of(atomic_load(&s->b.slot->phase)) == SH_SWEEP);
    r = block_new(&s->a, 100);
    struct handle h = handle_of(&s->a, &r);
    CHECK_OK(handle_open(&s->b, &h, &got));
    s->lead.patience_ms = 10000;
    block_drop(&s->b, &got);
    block_drop(&s->a, &r);
    cast_end(s);
}

/* A process that is stopped inside an operation stalls a collection, not who opens a handle. */
static void test_handle_opened_while_a_collection_is_stalled(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r = block_new(&s->a, 100), got;
    struct handle h = handle_of(&s->a, &r);
    uint64_t n;
    CHECK_OK(sh_start_cycle(&s->lead));
    CHECK_OK(sh_mark(&s->lead, &n));
    atomic_store(&s->a.slot->lock, s->a.owner | 1); /* a is inside an operation */
    s->lead.patience_ms = 1;
    CHECK_IS(sh_finish_mark(&s->lead, &n), SH_BUSY);
    CHECK_IS(sh_adopt(&s->b, h.off, h.gen, 0, 0, 1000, &got), SH_OK);
    atomic_store(&s->a.slot->lock, 0);
    s->lead.patience_ms = 10000;
    collect(&s->lead);
    block_drop(&s->b, &got);
    block_drop(&s->a, &r);
    cast_end(s);
}

/* The epoch comes round after 63 collections: a block that lives all the time stays, garbage goes.
 */
static void test_many_epochs(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref held = block_new(&s->a, 100);
    for (uint32_t i = 0; i < 200; i++) {
        struct sh_ref lost = block_new(&s->a, 100);
        lose_pin(&s->a, &lost);
        CHECK(collect(&s->lead) == 1);
        CHECK(live_blocks(&s->a) == 1);
    }
    block_drop(&s->a, &held);
    cast_end(s);
}

/* Another coordinator goes on where the first one left; what was counted stays counted. */
static void test_succession(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    struct sh_ref r[100];
    for (uint32_t i = 0; i < 100; i++) {
        r[i] = block_new(&s->a, 1000);
        if (i % 2) /* the collector's */
            lose_pin(&s->a, &r[i]);
    }
    CHECK(collect(&s->lead) == 50);
    counters_must_be(&s->lead, 50, 50000);
    struct sh_ctx second;
    CHECK_OK(sh_map(&second, dup(s->fd), true));
    CHECK_IS(sh_attach_coordinator(&second, 1000), SH_CHANGED);
    sh_unmap(&second);
    arena_die(&s->lead);
    arena_lead(&s->lead, s->fd);
    counters_must_be(&s->lead, 50, 50000);
    for (uint32_t i = 0; i < 100; i += 2)
        block_drop(&s->a, &r[i]);
    cast_end(s);
}

/* So many starts, the last of them some time ago. */
static void started_before(const struct sh_ctx *c, uint64_t ms, uint64_t times)
{
    atomic_store(&c->hdr->started, (sh_os_now_ns() / 1000000u - ms) << 16 | times);
}

static void test_a_coordinator_killed_as_it_started_was_missed_for_a_second(void)
{
    struct cast *s = cast_new(8 << 20, NO_LIMIT);
    arena_die(&s->lead);
    CHECK(sh_may_start(&s->a) && !sh_may_start(&s->b));
    void *starting = sh_os_hold_byte(&s->a, SH_START_BYTE, false);
    started_before(&s->b, 100, 1);
    CHECK(!sh_may_start(&s->b)); /* it lives */
    sh_os_let_go(starting);
    CHECK(sh_may_start(&s->b) && !sh_may_start(&s->a));
    started_before(&s->b, 100, 32);
    CHECK(!sh_may_start(&s->b)); /* so often is no chance */
    started_before(&s->b, 1000, 32);
    CHECK(sh_may_start(&s->b));
    arena_lead(&s->lead, s->fd);
    CHECK(atomic_load(&s->a.hdr->started) == 0);
    cast_end(s);
}

int main(void)
{
    static const struct test tests[] = {
        {"every_size", test_every_size},
        {"full_spans", test_full_spans},
        {"generations_never_repeat", test_generations_never_repeat},
        {"senseless_handles", test_senseless_handles},
        {"leases", test_leases},
        {"many_leases", test_many_leases},
        {"lease_of_another_block", test_lease_of_another_block},
        {"names", test_names},
        {"remote_free", test_remote_free},
        {"remote_free_of_classes_64_apart", test_remote_free_of_classes_64_apart},
        {"empty_spans_go_back", test_empty_spans_go_back},
        {"orphans", test_orphans},
        {"orphan_taken_by_two", test_orphan_taken_by_two},
        {"cells_that_were_given_back", test_cells_that_were_given_back},
        {"pins_of_a_child_are_copied_during_a_sweep",
         test_pins_of_a_child_are_copied_during_a_sweep},
        {"lease_taken_while_it_expires", test_lease_taken_while_it_expires},
        {"lease_span_given_back_while_its_last_is_taken",
         test_lease_span_given_back_while_its_last_is_taken},
        {"runs_that_cannot_be_given_back_yet", test_runs_that_cannot_be_given_back_yet},
        {"idle_pages_were_out_of_reach_while_they_were_given_back",
         test_idle_pages_were_out_of_reach_while_they_were_given_back},
        {"orphan_that_cannot_be_put_back_yet", test_orphan_that_cannot_be_put_back_yet},
        {"handshake_before_punching", test_handshake_before_punching},
        {"handshake_of_a_successor", test_handshake_of_a_successor},
        {"dead_in_an_operation", test_dead_in_an_operation},
        {"holes", test_holes},
        {"holes_of_every_class", test_holes_of_every_class},
        {"recount_while_committing", test_recount_while_committing},
        {"recount_while_growing", test_recount_while_growing},
        {"recount_while_allocating", test_recount_while_allocating},
        {"memory_limit", test_memory_limit},
        {"capacity", test_capacity},
        {"full_though_another_freed_in_the_last_of_many_spans",
         test_full_though_another_freed_in_the_last_of_many_spans},
        {"full_though_the_second_orphan_has_a_free_block",
         test_full_though_the_second_orphan_has_a_free_block},
        {"limit_though_an_orphan_has_a_free_block", test_limit_though_an_orphan_has_a_free_block},
        {"saturated_count", test_saturated_count},
        {"generations_run_out", test_generations_run_out},
        {"large_generations_run_out", test_large_generations_run_out},
        {"lost_large_block", test_lost_large_block},
        {"collection_step_by_step", test_collection_step_by_step},
        {"block_from_after_the_sweep", test_block_from_after_the_sweep},
        {"handle_opened_while_a_collection_is_stalled",
         test_handle_opened_while_a_collection_is_stalled},
        {"many_epochs", test_many_epochs},
        {"succession", test_succession},
        {"a_coordinator_killed_as_it_started_was_missed_for_a_second",
         test_a_coordinator_killed_as_it_started_was_missed_for_a_second},
    };
    return test_main("blocks", tests, sizeof tests / sizeof tests[0]);
}
