/*
 * The operations of the core, and the heaps in which they are tried.
 *
 * One process lives through everything: the witness. Its blocks are full of a byte each, so that a
 * block which was given to somebody else shows. Who dies is the victim; some scenes have processes
 * that died before it ("the dead").
 */
#include "killpoints.h"

#include <string.h>
#include <unistd.h>

#define CAPACITY (1ull << 20) /* 128 pages: small, because it is copied at each point */
#define ROOM     32u          /* pages left in a nearly full heap: each operation must have room */

const char *const stage_names[NSTAGES] = {"empty", "half", "full"}; /* full: nearly */

void fill_block(struct sh_ref *r, uint8_t byte)
{
    memset(r->data, byte, r->nbytes);
}

void block_must_be_whole(const struct sh_ref *r, int byte)
{
    uint8_t want = byte < 0 ? r->data[0] : (uint8_t)byte;
    for (uint64_t i = 0; i < r->nbytes; i++)
        CHECK(r->data[i] == want);
}

static struct sh_ref filled(struct sh_ctx *c, uint64_t nbytes, uint8_t byte)
{
    struct sh_ref r = block_new(c, nbytes);
    fill_block(&r, byte);
    return r;
}

/* Room may be short in a nearly full heap; nothing else may go wrong. */
static void may_be_full(enum sh_status status)
{
    CHECK(status == SH_OK || status == SH_DEFERRED || status == SH_FULL || status == SH_BUSY);
}

/* Stages */

static void keep(struct scene *s, uint64_t nbytes)
{
    CHECK(s->nkept < MAX_KEPT);
    s->kept[s->nkept] = filled(&s->witness, nbytes, (uint8_t)(s->nkept + 1));
    s->nkept++;
}

static uint64_t pages_left(const struct scene *s)
{
    return s->witness.geo.npages - atomic_load(&s->witness.hdr->inuse_pages);
}

/* Blocks of many sizes with gaps between them, until so many pages are left. */
static void fill_heap(struct scene *s, uint32_t pages)
{
    static const uint32_t sizes[] = {100, 700, 4000, 20000, 70000};
    struct sh_ref gap[4];
    for (uint32_t i = 0; i < 4; i++) {
        keep(s, sizes[i]);
        gap[i] = block_new(&s->witness, 5000 + 7000 * i);
    }
    for (uint32_t i = 0; i < 4; i++)
        block_drop(&s->witness, &gap[i]);
    for (uint32_t i = 0; pages_left(s) > pages && s->nkept < MAX_KEPT; i++)
        keep(s, pages_left(s) - pages > 13 ? sizes[i % 5] + i : 66000 + i);
    s->leased = handle_lease(&s->witness, &s->kept[0]);
    CHECK_OK(sh_root_set(&s->witness, "kept", 4, &s->kept[1], 1000));
}

void scene_make(struct scene *s, const struct op *op, enum stage stage)
{
    memset(s, 0, sizeof *s);
    s->op = op;
    s->stage = stage;
    s->fd = arena_new(CAPACITY, NO_LIMIT);
    arena_join(&s->witness, s->fd);
    if (stage != EMPTY)
        fill_heap(s, stage == HALF_FULL ? s->witness.geo.npages / 2 : ROOM);
    if (op->before != NULL)
        op->before(s);
}

void scene_end(struct scene *s)
{
    arena_die(&s->witness);
    close(s->fd);
}

/* Users: allocating and freeing */

#define V (&s->victim)
#define W (&s->witness)

static void have_two_small(struct scene *s)
{
    s->mine = filled(V, 100, 90);
    s->other = filled(V, 100, 91);
}
static void have_room_for_small(struct scene *s)
{
    have_two_small(s);
    block_drop(V, &s->other);
}
static void have_small(struct scene *s)
{
    s->mine = filled(V, 100, 90);
}
static void have_large(struct scene *s)
{
    s->mine = filled(V, 70000, 90);
}
static void alloc_small(struct scene *s)
{
    may_be_full(sh_alloc(V, 100, true, 1000, &s->other));
}
static void alloc_other_class(struct scene *s)
{
    may_be_full(sh_alloc(V, 1500, true, 1000, &s->other));
}
static void alloc_large(struct scene *s)
{
    may_be_full(sh_alloc(V, 70000, true, 1000, &s->other));
}
static void drop_mine(struct scene *s)
{
    may_be_full(sh_unpin(V, &s->mine, 1000));
}

static void meet_the_limit(struct scene *s)
{
    have_small(s);
    atomic_store(&V->hdr->limit_units, sh_committed_units(V));
}
static void alloc_over_limit(struct scene *s)
{
    CHECK_IS(sh_alloc(V, 70000, true, 1000, &s->other), SH_LIMIT);
}

/* Two spans of one class, the second with one block. */
static void have_two_spans(struct scene *s)
{
    struct sh_ref r, first = filled(V, 4096, 90);
    uint32_t n = V->kinds[first.kind].nblocks;
    for (uint32_t i = 1; i < n; i++)
        filled(V, 4096, 91);
    s->mine = filled(V, 4096, 92);
    r = first;
    block_drop(V, &r); /* so that the first span has room, too, and the second is not kept */
}

static void have_three_runs(struct scene *s)
{
    for (uint32_t i = 0; i < 3; i++)
        CHECK_OK(sh_pages_take(V, 2, 1000, &s->page[i]));
    CHECK_OK(sh_pages_give(V, &s->page[0], 1, 1000));
    CHECK_OK(sh_pages_give(V, &s->page[2], 1, 1000));
}
static void take_pages(struct scene *s)
{
    may_be_full(sh_pages_take(V, 3, 1000, &s->page[0]));
}
static void give_pages(struct scene *s)
{
    CHECK_OK(sh_pages_give(V, &s->page[1], 1, 1000));
}

/* A coordinator for a moment, beside the victim. */
static void lead_for_a_moment(struct scene *s, void (*act)(struct sh_ctx *))
{
    struct sh_ctx lead;
    arena_lead(&lead, s->fd);
    act(&lead);
    arena_die(&lead);
}
static void collect_and_release(struct sh_ctx *lead)
{
    collect(lead);
    release_all(lead);
}
static void begin_marking(struct sh_ctx *lead)
{
    uint64_t blocks;
    CHECK_OK(sh_start_cycle(lead));
    CHECK_OK(sh_mark(lead, &blocks));
}
static void begin_sweeping(struct sh_ctx *lead)
{
    uint64_t blocks;
    begin_marking(lead);
    CHECK_OK(sh_finish_mark(lead, &blocks));
}

/* A span whose units were given back, but for those of one block. */
static void have_holes(struct scene *s)
{
    struct sh_ref r[8];
    for (uint32_t i = 0; i < 8; i++)
        r[i] = filled(V, 4096, 90);
    for (uint32_t i = 1; i < 8; i++)
        block_drop(V, &r[i]);
    s->mine = r[0];
    lead_for_a_moment(s, collect_and_release);
}
static void alloc_in_hole(struct scene *s)
{
    may_be_full(sh_alloc(V, 4096, true, 1000, &s->other));
}

/* The victim's span is full, and another process frees in it. */
static void have_remote_frees(struct scene *s)
{
    struct sh_ctx peer;
    struct sh_ref first = filled(V, 4096, 90), theirs;
    for (uint32_t i = 1; i < V->kinds[first.kind].nblocks; i++)
        filled(V, 4096, 91);
    struct handle h = handle_of(V, &first);
    arena_join(&peer, s->fd);
    CHECK_OK(handle_open(&peer, &h, &theirs));
    block_drop(V, &first);
    block_drop(&peer, &theirs);
    arena_leave(&peer);
}

static void hold_last_of_witness(struct scene *s)
{
    CHECK_OK(handle_open(V, &s->taken, &s->mine));
}
static void lease_and_forget(struct scene *s)
{
    struct sh_ref r = filled(W, 300, 93);
    s->taken = handle_lease(W, &r);
    block_drop(W, &r);
}

/* An orphan with room: its owner is dead and reaped, and the witness holds one of its blocks. */
static void reap_all(struct sh_ctx *lead)
{
    reap_dead(lead, UINT64_MAX);
}
static void reap_in_grace(struct sh_ctx *lead)
{
    reap_dead(lead, 0);
}
static void leave_orphan(struct scene *s)
{
    struct sh_ctx dead;
    struct sh_ref r, kept;
    arena_join(&dead, s->fd);
    r = filled(&dead, 1500, 94);
    struct handle h = handle_of(&dead, &r);
    CHECK_OK(handle_open(W, &h, &kept));
    CHECK_OK(sh_root_set(W, "orphan", 6, &kept, 1000));
    block_drop(W, &kept);
    arena_die(&dead);
    lead_for_a_moment(s, reap_all);
}

/* Users: handles and roots */

static void have_two_pins(struct scene *s)
{
    s->mine = filled(V, 100, 90);
    CHECK_OK(sh_repin(V, &s->mine, 1000, &s->other));
}
static void repin(struct scene *s)
{
    may_be_full(sh_repin(V, &s->mine, 1000, &s->other));
}
static void make_lease(struct scene *s)
{
    may_be_full(sh_lease_make(V, &s->mine, 1000, &s->taken.cell, &s->taken.seq));
}
static void have_lease(struct scene *s)
{
    have_small(s);
    s->taken = handle_lease(V, &s->mine);
    block_drop(V, &s->mine);
}
static void drop_lease(struct scene *s)
{
    const struct handle *h = &s->taken;
    CHECK_OK(sh_lease_drop(V, h->off, h->gen, h->cell, h->seq, 1000));
}
static void open_taken(struct scene *s)
{
    const struct handle *h = &s->taken;
    enum sh_status status = sh_adopt(V, h->off, h->gen, h->cell, h->seq, 1000, &s->mine);
    CHECK(status == SH_OK || status == SH_FULL || status == SH_AGAIN || status == SH_STALE);
}
static void name_handle(struct scene *s)
{
    struct sh_ref r = filled(W, 300, 95);
    s->taken = handle_of(W, &r);
    CHECK_OK(sh_root_set(W, "there", 5, &r, 1000));
    block_drop(W, &r);
}
static void open_unleased(struct scene *s)
{
    struct handle h = {s->taken.off, s->taken.gen, 0, 0};
    CHECK_OK(sh_adopt(V, h.off, h.gen, h.cell, h.seq, 1000, &s->mine));
}
static void open_by_address(struct scene *s)
{
    may_be_full(sh_block_at(V, s->taken.off + 100, 50, 1000, &s->mine));
}
static void note_site(struct scene *s)
{
    may_be_full(sh_site_set(V, &s->mine, "job.py:7", 8, 1000));
}
static void have_site(struct scene *s)
{
    have_small(s);
    note_site(s); /* the table is committed once, and all of it is compared at each point */
}
static void set_root(struct scene *s)
{
    CHECK_OK(sh_root_set(V, "there", 5, &s->mine, 1000));
}
static void set_new_root(struct scene *s)
{
    CHECK_OK(sh_root_set(V, "fresh", 5, &s->mine, 1000));
}
static void clear_root(struct scene *s)
{
    may_be_full(sh_root_clear(V, "there", 5, 1000));
}
static void get_root(struct scene *s)
{
    may_be_full(sh_root_get(V, "there", 5, 1000, &s->mine));
}

/* Users: coming, going, waiting, forking */

static void attach(struct scene *s)
{
    CHECK_OK(sh_attach(V, 1000));
}
static void have_all_sorts(struct scene *s)
{
    have_two_pins(s);
    filled(V, 70000, 92);
    make_lease(s);
}
static void detach(struct scene *s)
{
    sh_detach(V, true);
}
static void wait_for_memory(struct scene *s)
{
    sh_waiting(V, true);
    sh_waiting(V, false);
}
static void prepare_fork(struct scene *s)
{
    CHECK_OK(sh_fork_prepare(V));
    sh_fork_parent(V);
}
/* The child's side, in the process that would be the parent: both die here. */
static void have_fork(struct scene *s)
{
    have_two_pins(s);
    CHECK_OK(sh_fork_prepare(V));
}
static void be_fork_child(struct scene *s)
{
    sh_fork_child(V);
}
static void request(struct scene *s)
{
    sh_request(V, SH_REQ_GC);
}

/* Users: in the middle of a collection whose coordinator is gone (its successor starts anew) */

static void have_two_in_mark(struct scene *s)
{
    have_two_small(s);
    lead_for_a_moment(s, begin_marking);
}
static void have_two_in_sweep(struct scene *s)
{
    have_two_small(s);
    lead_for_a_moment(s, begin_sweeping);
}
static void have_one_in_mark(struct scene *s)
{
    have_small(s);
    lead_for_a_moment(s, begin_marking);
}

/* Users: nodes. What is behind the name "node" is the witness's: a leaf, nothing, and a tree. */

#define WIDE 300u /* references: more than a slice of a death */

static void put_into(struct sh_ctx *c, const struct sh_ref *node, uint32_t i, struct sh_ref r)
{
    node_store(c, node, i, &r);
    block_drop(c, &r);
}
/* A node that holds a node, which holds what is given, and two leaves, small and large. */
static struct sh_ref tree(struct sh_ctx *c, const struct sh_ref *shared)
{
    struct sh_ref top = node_new(c, 2), low = node_new(c, 3);
    if (shared != NULL)
        node_store(c, &low, 1, shared);
    put_into(c, &low, 2, filled(c, 9000, 98));
    put_into(c, &top, 0, filled(c, 300, 97));
    put_into(c, &top, 1, low);
    return top;
}
static void name_node(struct scene *s)
{
    struct sh_ref n = node_new(W, 3);
    put_into(W, &n, 0, filled(W, 300, 95));
    put_into(W, &n, 2, tree(W, NULL));
    CHECK_OK(sh_root_set(W, "node", 4, &n, 1000));
    block_drop(W, &n);
}
static struct sh_ref named_leaf(struct sh_ctx *c)
{
    struct sh_ref n, leaf;
    CHECK_OK(sh_root_get(c, "node", 4, 1000, &n));
    CHECK_OK(sh_node_load(c, &n, 0, 1000, &leaf));
    block_drop(c, &n);
    return leaf;
}
/* Most of its references lead to one block, which others hold, too. */
static struct sh_ref wide(struct sh_ctx *c)
{
    struct sh_ref n = node_new(c, WIDE), leaf = named_leaf(c);
    for (uint32_t i = 0; i < WIDE; i++) {
        if (i % 4 == 0)
            put_into(c, &n, i, filled(c, 16, 99));
        else
            node_store(c, &n, i, &leaf);
    }
    block_drop(c, &leaf);
    return n;
}
static void have_node_freed(struct scene *s)
{
    s->other = node_new(V, 5);
    have_small(s);
    s->mine = node_new(V, 5);
    block_drop(V, &s->other);
}
static void have_node(struct scene *s)
{
    CHECK_OK(sh_root_get(V, "node", 4, 1000, &s->mine));
    s->other = filled(V, 200, 91);
}
static void have_tree(struct scene *s)
{
    struct sh_ref leaf = named_leaf(V);
    s->mine = tree(V, &leaf);
    block_drop(V, &leaf);
}
static void have_wide(struct scene *s)
{
    s->mine = wide(V);
}
static void have_node_in_mark(struct scene *s)
{
    have_node(s);
    lead_for_a_moment(s, begin_marking);
}
static void have_tree_in_mark(struct scene *s)
{
    have_tree(s);
    lead_for_a_moment(s, begin_marking);
}
static void have_tree_in_sweep(struct scene *s)
{
    have_tree(s);
    lead_for_a_moment(s, begin_sweeping);
}
static void new_node(struct scene *s)
{
    may_be_full(sh_node_new(V, SH_NODE_PLAIN, 5, 0, 1000, &s->other));
}
static void new_large_node(struct scene *s)
{
    may_be_full(sh_node_new(V, SH_NODE_PLAIN, 9000, 0, 1000, &s->other));
}
static void load(struct scene *s)
{
    CHECK_OK(sh_node_load(V, &s->mine, 2, 1000, &s->other));
}
static void store(struct scene *s)
{
    CHECK_OK(sh_node_store(V, &s->mine, 1, &s->other, 1000));
}
static void replace_tree(struct scene *s)
{
    may_be_full(sh_node_store(V, &s->mine, 2, &s->other, 1000));
}
static void drop_a_slice(struct scene *s)
{
    CHECK_IS(sh_unpin(V, &s->mine, 1000), SH_DEFERRED);
}

/* Users: collections. The victim puts NEW somewhere; the old body is pinned by the witness, too,
 * except where that says otherwise. */

#define NEW  200u
#define FEW  5u
#define FULL 8u   /* as many as the first body has room for */
#define MANY 155u /* as many as a list's has room for that is copied in two slices */

static void dict_to_add(struct scene *s)
{
    coll_make(s, false, FEW);
    s->will[FEW] = NEW;
}
static void dict_to_replace(struct scene *s)
{
    coll_make(s, false, FEW);
    s->will[2] = NEW;
}
static void dict_to_delete(struct scene *s)
{
    coll_make(s, false, FEW);
    s->will[2] = 0;
}
static void dict_to_pop_last(struct scene *s)
{
    coll_make(s, false, FEW);
    s->will[FEW - 1] = 0;
}
/* Key 2 stands for a value that names a block. */
static void dict_that_names(struct scene *s)
{
    coll_make(s, false, FEW);
    struct sh_ref r = filled(W, 700, NEW + 2);
    CHECK_OK(item_put_named(W, &s->coll, 2, &r));
    block_drop(W, &r);
    s->was[2] = NEW + 2;
    s->will[2] = NEW;
}
static void list_that_names(struct scene *s)
{
    coll_make(s, true, FEW - 1);
    struct sh_ref r = filled(W, 700, NEW + 2);
    CHECK_OK(item_put_named(W, &s->coll, FEW - 1, &r));
    block_drop(W, &r);
    s->was[FEW - 1] = NEW + 2;
}
static void list_to_copy(struct scene *s)
{
    list_that_names(s);
    memcpy(s->will, s->was, sizeof s->will);
}
/* A table of two slices, nearly all of whose keys were deleted: the next key makes a small one. Of
 * fewer places, where there is no room. */
static void dict_to_shrink(struct scene *s)
{
    struct sh_found f;
    uint32_t n = FEW;
    dict_to_add(s);
    while (n < 256 && pages_left(s) > ROOM / 2 && item_put(W, &s->coll, 1000 + n, 1) == SH_OK)
        n++;
    while (n-- > FEW)
        CHECK_OK(item_pop(W, &s->coll, 1000 + n, &f));
    CHECK_OK(sh_use_end(W, &s->coll, 1000));
}
static void dict_held_by_dead(struct scene *s)
{
    struct sh_ctx dead;
    struct sh_use u = {0};
    coll_make(s, false, FEW);
    arena_join(&dead, s->fd);
    CHECK_OK(handle_open(&dead, &s->taken, &u.coll));
    CHECK(sh_coll_try(&dead, &u) == 1);
    arena_die(&dead);
}
static void dict_to_grow(struct scene *s)
{
    coll_make(s, false, FULL);
    s->will[FULL] = NEW;
}
static void dict_to_clear(struct scene *s)
{
    coll_make(s, false, FEW);
    memset(s->will, 0, sizeof s->will);
    CHECK_OK(sh_use_end(W, &s->coll, 1000)); /* the victim alone has the old body */
}
static void dict_to_get(struct scene *s)
{
    coll_make(s, false, FEW);
}
static void list_to_append(struct scene *s)
{
    coll_make(s, true, FEW);
    s->will[FEW] = NEW;
}
static void list_to_grow(struct scene *s)
{
    coll_make(s, true, FULL);
    s->will[FULL] = NEW;
}
static void list_to_grow_far(struct scene *s)
{
    coll_make(s, true, MANY);
    s->will[MANY] = NEW;
    CHECK_OK(sh_use_end(W, &s->coll, 1000));
}
static void list_to_set(struct scene *s)
{
    coll_make(s, true, FEW);
    s->will[2] = NEW;
}
static void list_to_pop(struct scene *s)
{
    coll_make(s, true, FEW);
    s->will[FEW - 1] = 0;
}
/* Items 1 to 3 become two. */
static void list_to_splice(struct scene *s)
{
    coll_make(s, true, FEW);
    memcpy(s->will, (const uint8_t[FEW]){1, NEW, NEW + 1, FEW}, FEW);
    CHECK_OK(sh_use_end(W, &s->coll, 1000));
}
/* Who had the lock died when a key was placed and not yet in the index, and another place frozen.
 */
static void dict_to_repair(struct scene *s)
{
    struct sh_ctx dead;
    struct sh_ref r;
    struct sh_use u = {0};
    struct sh_value v = item_value(NEW + 1);
    struct sh_key k = {.hash = 1, .kind = 3, .nbytes = 4, .bytes = v.bytes};
    dict_to_add(s);
    arena_join(&dead, s->fd);
    CHECK_OK(handle_open(&dead, &s->taken, &u.coll));
    CHECK_OK(sh_record_refill(&dead, &k, &v, false, 1000));
    CHECK_OK(sh_coll_lock(&dead, &u, NULL, 1000));
    CHECK_OK(sh_record_take(&dead, &k, &v, false, &r));
    atomic_store(&sh_body(&u)->ref[FEW], sh_cell_of(&dead, &r));
    sh_freeze(&sh_body(&u)->ref[2]);
    arena_die(&dead);
}
static void open_new(struct scene *s)
{
    CHECK_OK(handle_open(V, &s->taken, &s->use.coll));
}
/* With the body seen, and a span for the record of NEW. */
static void open_coll(struct scene *s)
{
    struct sh_found f;
    open_new(s);
    CHECK_OK(item_get(V, &s->use, 1, &f)); /* a record that is copied */
    CHECK(!f.pinned);
    s->mine = filled(V, sizeof(struct sh_record) + 34, 90);
}
static void open_coll_in_mark(struct scene *s)
{
    open_coll(s);
    lead_for_a_moment(s, begin_marking);
}
static void open_coll_in_sweep(struct scene *s)
{
    open_coll(s);
    lead_for_a_moment(s, begin_sweeping);
}
/* With a block of its own to name, and a span for records that do. */
static void open_to_name(struct scene *s)
{
    open_coll(s);
    s->other = filled(V, 700, NEW);
    filled(V, sizeof(struct sh_node) + 8 + sizeof(struct sh_record), 91);
}
static void take_lock(struct scene *s)
{
    CHECK(sh_coll_try(V, &s->use) != 0);
}
static void open_and_lock(struct scene *s)
{
    open_coll(s);
    take_lock(s);
}
static void open_to_splice(struct scene *s)
{
    struct sh_value v;
    uint64_t n;
    open_coll(s);
    CHECK_OK(sh_list_stage_new(V, 2, 1000, &s->other));
    for (uint32_t i = 0; i < 2; i++) {
        v = item_value((uint8_t)(NEW + i));
        CHECK_OK(sh_list_stage(V, &s->other, &v, 1000));
    }
    s->part = (struct sh_splice){.start = 1, .stop = 4, .stage = &s->other};
    CHECK_OK(sh_coll_size(V, &s->use, 1000, &n, &s->part.stamp));
}
static void put_few(struct scene *s)
{
    may_be_full(item_put(V, &s->use, FEW, NEW));
}
static void put_naming(struct scene *s)
{
    may_be_full(item_put_named(V, &s->use, FEW, &s->other));
}
static void put_many(struct scene *s)
{
    may_be_full(item_put(V, &s->use, MANY, NEW));
}
static void put_full(struct scene *s)
{
    may_be_full(item_put(V, &s->use, FULL, NEW));
}
static void put_two(struct scene *s)
{
    may_be_full(item_put(V, &s->use, 2, NEW));
}
static void pop_two(struct scene *s)
{
    struct sh_found f;
    may_be_full(item_pop(V, &s->use, 2, &f));
}
static void pop_last(struct scene *s)
{
    struct sh_found f;
    may_be_full(sh_dict_pop(V, &s->use, NULL, 0, 1000, &f));
}
static void let_lock(struct scene *s)
{
    CHECK(sh_coll_let(V, &s->use));
}
static void get_two(struct scene *s)
{
    struct sh_found f;
    may_be_full(item_get(V, &s->use, 2, &f));
}
static void clear_dict(struct scene *s)
{
    may_be_full(sh_dict_clear(V, &s->use, 1000));
}
static void copy_list(struct scene *s)
{
    struct sh_copy copy = {.stop = INT64_MAX};
    may_be_full(sh_list_copy(V, &s->use, &copy, 1000));
    free(copy.bytes);
}
static void set_item(struct scene *s)
{
    struct sh_value v = item_value(NEW);
    may_be_full(sh_list_set(V, &s->use, 2, &v, 1000));
}
static void splice_list(struct scene *s)
{
    may_be_full(sh_list_splice(V, &s->use, &s->part, 1000));
}

/* Coordinators */

/* Blocks that nobody holds, as a death between count and holder leaves them; idle runs and holes.
 */
static void leave_garbage(struct scene *s)
{
    static const uint32_t sizes[] = {100, 100, 1500, 4096, 4096, 4096, 70000};
    struct sh_ref r[7];
    for (uint32_t i = 0; i < 7; i++)
        r[i] = filled(W, sizes[i], 96);
    for (uint32_t i = 0; i < 7; i++) {
        if (i % 2 == 0)
            CHECK(sh_count_up(r[i].word, r[i].gen, SH_IDLE));
        block_drop(W, &r[i]);
    }
}
static void leave_idle(struct scene *s)
{
    struct sh_ref r[6];
    for (uint32_t i = 0; i < 6; i++)
        r[i] = filled(W, i == 5 ? 70000 : 4096, 96);
    for (uint32_t i = 1; i < 6; i++)
        block_drop(W, &r[i]);
    CHECK_OK(sh_root_set(W, "idle", 4, &r[0], 1000));
    block_drop(W, &r[0]);
}
static void leave_dead(struct scene *s)
{
    struct sh_ctx dead;
    struct sh_ref r, kept;
    uint32_t page;
    arena_join(&dead, s->fd);
    s->dead_slot = dead.slot_index;
    r = filled(&dead, 1500, 94);
    struct handle h = handle_of(&dead, &r);
    CHECK_OK(handle_open(W, &h, &kept));
    CHECK_OK(sh_root_set(W, "orphan", 6, &kept, 1000));
    block_drop(W, &kept);
    r = filled(&dead, 100, 94);
    handle_lease(&dead, &r);
    filled(&dead, 68000, 94);
    CHECK_OK(sh_pages_take(&dead, 2, 1000, &page));
    CHECK_OK(sh_pages_commit(&dead, page, 1));
    arena_die(&dead);
}
static void leave_lease_of_dead(struct scene *s)
{
    struct sh_ctx dead;
    struct sh_ref r;
    arena_join(&dead, s->fd);
    s->dead_slot = dead.slot_index;
    r = filled(&dead, 300, 94);
    s->taken = handle_lease(&dead, &r);
    arena_die(&dead);
    lead_for_a_moment(s, reap_in_grace);
}
/* The coordinator before was killed while it released a run. */
static void leave_half_released(struct scene *s)
{
    struct sh_ctx dead;
    uint32_t page;
    leave_idle(s);
    CHECK_OK(sh_map(&dead, dup(s->fd), true));
    CHECK_OK(sh_attach_coordinator(&dead, 1000));
    CHECK_OK(sh_pages_take(&dead, 2, 1000, &page));
    CHECK_OK(sh_pages_commit(&dead, page, 2));
    sh_set_span(&dead, page, SH_SPAN(SH_RELEASING, 0, dead.owner, 2));
    sh_set_units(&dead, sh_unit_of_page(&dead, page), 2, SH_UNIT_RELEASING);
    arena_die(&dead);
}
static void leave_in_sweep(struct scene *s)
{
    leave_garbage(s);
    lead_for_a_moment(s, begin_sweeping);
}
/* A process that dies in the middle of a node's death. */
static void leave_dying(struct scene *s)
{
    struct sh_ctx dead;
    name_node(s);
    arena_join(&dead, s->fd);
    s->dead_slot = dead.slot_index;
    struct sh_ref n = wide(&dead), leaf = named_leaf(&dead), low = node_new(&dead, 5);
    node_store(&dead, &low, 3, &leaf);
    put_into(&dead, &n, 0, low);
    CHECK_IS(sh_unpin(&dead, &n, 1000), SH_DEFERRED);
    arena_die(&dead);
}
/* Garbage: nodes in a circle, which hold leaves and a tree, and a block that others hold. */
static void leave_circle(struct scene *s)
{
    name_node(s);
    struct sh_ref x = node_new(W, 4), y = node_new(W, 3), leaf = named_leaf(W);
    node_store(W, &x, 0, &y);
    node_store(W, &y, 0, &x);
    node_store(W, &x, 1, &x);
    put_into(W, &x, 3, tree(W, &leaf));
    put_into(W, &y, 2, filled(W, 700, 96));
    node_store(W, &y, 1, &leaf);
    block_drop(W, &leaf);
    block_drop(W, &x);
    block_drop(W, &y);
}
/* The coordinator before was killed while it worked off garbage. */
static void leave_garbage_dying(struct scene *s)
{
    struct sh_ctx dead;
    name_node(s);
    struct sh_ref r, n = wide(W);
    CHECK(sh_count_up(n.word, n.gen, SH_IDLE));
    block_drop(W, &n);
    CHECK_OK(sh_map(&dead, dup(s->fd), true));
    CHECK_OK(sh_attach_coordinator(&dead, 1000));
    CHECK(sh_locate(&dead, sh_word_number(W, n.word), &r));
    uint64_t w = atomic_load(r.word);
    while (!sh_end_life(&dead, &r, &w)) {
    }
    CHECK(sh_bury(&dead, 0, WIDE - 40, SH_IDLE));
    arena_die(&dead);
}
static void leave_counts(struct scene *s)
{
    struct sh_ref n, leaf;
    name_node(s);
    CHECK_OK(sh_root_get(W, "node", 4, 1000, &n));
    leaf = named_leaf(W);
    for (uint32_t i = 0; i < 3; i++)
        CHECK(sh_count_up(i == 0 ? n.word : leaf.word, i == 0 ? n.gen : leaf.gen, SH_IDLE));
    block_drop(W, &leaf);
    block_drop(W, &n);
}
static void let_witness_wait(struct scene *s)
{
    sh_waiting(W, true);
    atomic_store(&W->slot->wait_seen, atomic_load(&W->hdr->freed));
}
static void refuse(struct scene *s)
{
    CHECK(sh_refuse_waiters(V) == 1);
}
static void take_over(struct scene *s)
{
    uint32_t phase;
    CHECK_OK(sh_attach_coordinator(V, 1000));
    CHECK_OK(sh_begin(V, &phase));
}
static void reap(struct scene *s)
{
    struct sh_reaped r;
    CHECK_OK(sh_reap(V, s->dead_slot, UINT64_MAX, &r));
}
static void reap_but_leases(struct scene *s)
{
    struct sh_reaped r;
    CHECK_OK(sh_reap(V, s->dead_slot, 0, &r));
}
static void start_cycle(struct scene *s)
{
    CHECK_OK(sh_start_cycle(V));
}
static void be_in_mark(struct scene *s)
{
    begin_marking(V);
}
static void be_in_sweep(struct scene *s)
{
    begin_sweeping(V);
}
static void mark(struct scene *s)
{
    uint64_t blocks;
    CHECK_OK(sh_mark(V, &blocks));
}
static void finish_mark(struct scene *s)
{
    uint64_t blocks;
    CHECK_OK(sh_finish_mark(V, &blocks));
}
static void sweep(struct scene *s)
{
    uint64_t blocks, bytes;
    CHECK_OK(sh_sweep(V, &blocks, &bytes));
}
/* As a coordinator does that has reaped somebody. */
static void be_in_sweep_with_counts(struct scene *s)
{
    V->recount_holders = true;
    begin_sweeping(V);
}
static void be_swept(struct scene *s)
{
    be_in_sweep(s);
    sweep(s);
}
static void end_cycle(struct scene *s)
{
    CHECK_OK(sh_end_cycle(V, 4 << 20, true, 0));
}
static void stamp(struct scene *s)
{
    uint64_t units;
    CHECK_OK(sh_stamp(V, 7, &units));
}
static void release(struct scene *s)
{
    uint64_t bytes, runs;
    uint32_t page = 0;
    CHECK_OK(sh_release(V, SH_STAMP_MAX, 4 << 20, &page, &bytes, &runs));
}

const struct op ops[] = {
    {"alloc-first", 0, NULL, NULL, alloc_small},
    {"alloc-small", 0, NULL, have_room_for_small, alloc_small},
    {"free-small", 0, NULL, have_two_small, drop_mine},
    {"alloc-large", 0, NULL, have_small, alloc_large},
    {"alloc-over-limit", 0, NULL, meet_the_limit, alloc_over_limit},
    {"free-large", 0, NULL, have_large, drop_mine},
    {"free-remote", TAKES_LEASE, lease_and_forget, hold_last_of_witness, drop_mine},
    {"span-refill", 0, NULL, have_small, alloc_other_class},
    {"span-refill-remote", 0, NULL, have_remote_frees, alloc_in_hole},
    {"span-hand-back", 0, NULL, have_two_spans, drop_mine},
    {"orphan-adopt", 0, leave_orphan, have_small, alloc_other_class},
    {"pages-split", 0, NULL, have_small, take_pages},
    {"pages-merge", 0, NULL, have_three_runs, give_pages},
    {"commit-holes", 0, NULL, have_holes, alloc_in_hole},
    {"pin", 0, NULL, have_small, repin},
    {"unpin", 0, NULL, have_two_pins, drop_mine},
    {"lease-make", 0, NULL, have_small, make_lease},
    {"lease-take", TAKES_LEASE, lease_and_forget, have_small, open_taken},
    {"lease-drop", 0, NULL, have_lease, drop_lease},
    {"handle-open", 0, name_handle, have_small, open_unleased},
    {"handle-by-address", 0, name_handle, NULL, open_by_address},
    {"site-set", 0, NULL, have_site, note_site},
    {"root-set", 0, NULL, have_small, set_new_root},
    {"root-replace", 0, name_handle, have_small, set_root},
    {"root-clear", 0, name_handle, have_small, clear_root},
    {"root-get", 0, name_handle, have_small, get_root},
    {"attach", COMES, NULL, NULL, attach},
    {"detach", 0, NULL, have_all_sorts, detach},
    {"fork-prepare", 0, NULL, have_two_pins, prepare_fork},
    {"fork-child", 0, NULL, have_fork, be_fork_child},
    {"request", 0, NULL, have_small, request},
    {"wait", 0, NULL, have_small, wait_for_memory},
    {"alloc-in-mark", 0, leave_garbage, have_one_in_mark, alloc_small},
    {"free-in-mark", 0, leave_garbage, have_two_in_mark, drop_mine},
    {"free-in-sweep", 0, leave_garbage, have_two_in_sweep, drop_mine},
    {"root-replace-in-mark", 0, name_handle, have_one_in_mark, set_root},
    {"lease-take-in-sweep", TAKES_LEASE, lease_and_forget, have_two_in_sweep, open_taken},
    {"node-new", 0, NULL, have_node_freed, new_node},
    {"node-new-large", 0, NULL, have_small, new_large_node},
    {"node-load", 0, name_node, have_node, load},
    {"node-store", 0, name_node, have_node, store},
    {"node-replace", 0, name_node, have_node, replace_tree},
    {"node-drop", 0, name_node, have_tree, drop_mine},
    {"node-drop-slice", 0, name_node, have_wide, drop_a_slice},
    {"node-store-in-mark", 0, name_node, have_node_in_mark, store},
    {"node-replace-in-mark", 0, name_node, have_node_in_mark, replace_tree},
    {"node-drop-in-mark", 0, name_node, have_tree_in_mark, drop_mine},
    {"node-drop-in-sweep", 0, name_node, have_tree_in_sweep, drop_mine},
    {"dict-set-new", 0, dict_to_add, open_new, put_few},
    {"dict-replace", 0, dict_to_replace, open_coll, put_two},
    {"dict-delete", 0, dict_to_delete, open_coll, pop_two},
    {"dict-pop-last", 0, dict_to_pop_last, open_coll, pop_last},
    {"dict-set-naming", 0, dict_to_add, open_to_name, put_naming},
    {"dict-replace-naming", 0, dict_that_names, open_coll, put_two},
    {"dict-shrink", 0, dict_to_shrink, open_coll, put_few},
    {"dict-grow", 0, dict_to_grow, open_coll, put_full},
    {"dict-clear", 0, dict_to_clear, open_coll, clear_dict},
    {"dict-get", 0, dict_to_get, open_new, get_two},
    {"dict-repair", 0, dict_to_repair, open_coll, put_few},
    {"list-append", 0, list_to_append, open_coll, put_few},
    {"list-grow", 0, list_to_grow, open_coll, put_full},
    {"list-grow-far", 0, list_to_grow_far, open_coll, put_many},
    {"list-pop-naming", 0, list_that_names, open_new, pop_two},
    {"list-copy", 0, list_to_copy, open_new, copy_list},
    {"list-set", 0, list_to_set, open_coll, set_item},
    {"list-pop", 0, list_to_pop, open_coll, pop_two},
    {"list-splice", 0, list_to_splice, open_to_splice, splice_list},
    {"lock-take", 0, dict_to_get, open_coll, take_lock},
    {"lock-take-over", 0, dict_held_by_dead, open_coll, take_lock},
    {"lock-let", 0, dict_to_get, open_and_lock, let_lock},
    {"dict-grow-in-mark", 0, dict_to_grow, open_coll_in_mark, put_full},
    {"dict-replace-in-sweep", 0, dict_to_replace, open_coll_in_sweep, put_two},
    {"list-grow-in-mark", 0, list_to_grow, open_coll_in_mark, put_full},
    {"reap", LEADS, leave_dead, NULL, reap},
    {"reap-but-leases", LEADS, leave_dead, NULL, reap_but_leases},
    {"reap-dying", LEADS, leave_dying, NULL, reap},
    {"lease-expire", LEADS, leave_lease_of_dead, NULL, reap},
    {"cycle-start", LEADS, leave_garbage, NULL, start_cycle},
    {"mark", LEADS, leave_garbage, be_in_mark, mark},
    {"mark-graph", LEADS, leave_circle, start_cycle, mark},
    {"mark-finish", LEADS, leave_garbage, be_in_mark, finish_mark},
    {"sweep", LEADS, leave_garbage, be_in_sweep, sweep},
    {"sweep-circle", LEADS, leave_circle, be_in_sweep, sweep},
    {"lower-counts", LEADS, leave_counts, be_in_sweep_with_counts, sweep},
    {"cycle-end", LEADS, leave_garbage, be_swept, end_cycle},
    {"stamp", LEADS, leave_idle, NULL, stamp},
    {"release", LEADS, leave_idle, NULL, release},
    {"refuse-waiters", LEADS, let_witness_wait, NULL, refuse},
    {"takeover", LEADS | COMES, leave_half_released, NULL, take_over},
    {"takeover-in-sweep", LEADS | COMES, leave_in_sweep, NULL, take_over},
    {"takeover-dying", LEADS | COMES, leave_garbage_dying, NULL, take_over},
};
const size_t nops = sizeof ops / sizeof ops[0];
