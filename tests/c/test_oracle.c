/*
 * The core against a naive oracle: one operation after another, chosen at random from a seed, by
 * contexts that play processes, come, fork, leave and die, and by a coordinator that collects a
 * step at a time, releases, reaps, dies and is followed. The oracle (oracle.h) knows of each block
 * where it is, how long, its generation, its bytes or references and its holders, and so what each
 * operation must say.
 *
 * All contexts share one mapping, and under the address sanitizer everything in it that is neither
 * a block nor cells is poisoned: whoever touches free memory, the core too, ends the run.
 *
 * A run that fails prints its seed, its step and the last operations. SH_TEST_SEED chooses the
 * seed, SH_TEST_SCALE=67 makes it 10^7 operations.
 */
#include "oracle.h"

#include <string.h>
#include <unistd.h>

#define STEPS       50000u /* a test */
#define MOST_PINS   1500u
#define MOST_LEASE  300u
#define MOST_BLOCKS 3000u /* that others are made to hold */
#define BETWEEN     1000u /* steps from one look at everything to the next */

/* Players */

static struct player *somebody(struct oracle *o)
{
    uint32_t i = pick(o, PLAYERS);
    while (o->player[i].id == 0)
        i = (i + 1) % PLAYERS;
    return &o->player[i];
}

/* A pin of somebody who lives. */
static struct hold *some_pin(struct oracle *o, struct player **p)
{
    for (uint32_t tries = 0; tries < 8 && o->pins.n != 0; tries++) {
        struct hold *one = &o->pins.at[pick(o, o->pins.n)];
        if ((*p = player_of(o, one->who)) != NULL)
            return one;
    }
    return NULL;
}

static void join(struct oracle *o)
{
    struct player *p = player_of(o, 0);
    if (p == NULL)
        return;
    p->id = ++o->last_id;
    did(o, "join", p->id, 0, 0, 0);
    map_shared(o, &p->c);
    CHECK_OK(sh_attach(&p->c, 1000));
}

/* One at least stays. */
static struct player *who_may_go(struct oracle *o)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < PLAYERS; i++)
        n += o->player[i].id != 0;
    return n > 1 ? somebody(o) : NULL;
}

static void leave(struct oracle *o)
{
    struct player *p = who_may_go(o);
    if (p == NULL)
        return;
    did(o, "leave", p->id, 0, 0, 0);
    arena_leave(&p->c);
    p->id = 0;
}

static void die(struct oracle *o)
{
    struct player *p = who_may_go(o);
    if (p == NULL)
        return;
    did(o, "die", p->id, 0, 0, 0);
    arena_die(&p->c);
    p->id = 0;
}

/* What an operation has put off is done, too. */
static enum sh_status worked_off(struct player *p, enum sh_status status)
{
    while (status == SH_DEFERRED || status == SH_BUSY)
        status = sh_flush(&p->c, 1000);
    return status;
}

/* No room: is that so? */

static uint64_t longest_run(const struct sh_ctx *c)
{
    uint64_t longest = 0, last = 0, used = atomic_load(&c->hdr->used_pages);
    for (uint64_t page = 0, n; page < used; page += n) {
        uint64_t span = sh_span(c, (uint32_t)page);
        n = SH_SPAN_NPAGES(span);
        last = SH_SPAN_STATE(span) == SH_FREE ? n : 0;
        longest = last > longest ? last : longest;
    }
    last += c->geo.npages - used;
    return last > longest ? last : longest;
}

/* What the process would find if it looked everywhere: a block of the class in a span of its own or
 * of nobody's. Without room for more pages it must have found it, also if others freed it. */
static bool has_block(const struct sh_ctx *c, uint32_t kind, uint32_t state)
{
    uint64_t used = atomic_load(&c->hdr->used_pages);
    for (uint64_t page = 0; page < used; page += SH_SPAN_NPAGES(sh_span(c, (uint32_t)page))) {
        uint64_t span = sh_span(c, (uint32_t)page);
        if (SH_SPAN_STATE(span) != SH_SMALL || SH_SPAN_KIND(span) != kind ||
            (SH_SPAN_OWNER(span) != c->owner && SH_SPAN_OWNER(span) != SH_OWNER_NONE))
            continue;
        const _Atomic uint64_t *words = sh_words(c, (uint32_t)page, c->kinds[kind].tier);
        for (uint32_t i = 0; i < c->kinds[kind].nblocks; i++)
            if (SH_BSTATE(atomic_load(&words[i])) == state)
                return true;
    }
    return false;
}

static void must_lack_room(struct oracle *o, enum sh_status status, uint64_t npages)
{
    o->full++;
    if (status == SH_LIMIT) {
        uint64_t units = sh_committed_units(&o->lead) + npages * sh_units_per_page(&o->lead);
        CHECK(units > atomic_load(&o->lead.hdr->limit_units));
    } else {
        CHECK_IS(status, SH_FULL);
        CHECK(longest_run(&o->lead) < npages);
    }
}

/* Two processes fork in one: what the hooks do on both sides, but that both go on here. */
static void fork_one(struct oracle *o)
{
    struct player *p = somebody(o), *child = player_of(o, 0);
    if (child == NULL)
        return;
    did(o, "fork", p->id, o->last_id + 1, 0, 0);
    enum sh_status status = sh_fork_prepare(&p->c);
    if (status != SH_OK) {
        must_lack_room(o, status, 1);
        return;
    }
    child->id = ++o->last_id;
    child->c = *p->c.child;
    child->c.fd = dup(o->fd);
    child->c.forked = sh_os_wiped_on_fork();
    free(p->c.child);
    p->c.child = NULL;
    sh_leave(&p->c);
    for (uint32_t i = 0, n = o->pins.n; i < n; i++) {
        struct hold one = o->pins.at[i];
        if (one.who != p->id)
            continue;
        one.who = child->id;
        held(o, one.block);
        add_hold(&o->pins, one);
    }
}

/* Allocating and dropping */

static uint64_t random_size(struct oracle *o)
{
    uint32_t kind = pick(o, 100);
    if (kind < 50)
        return 1 + pick(o, 600);
    if (kind < 65) /* one less, exact, one more */
        return sh_classes[pick(o, SH_NCLASSES)].size - 1 + pick(o, 3);
    if (kind < 90)
        return 1 + pick(o, 12000);
    if (kind < 97)
        return 1 + pick(o, SH_MAX_SMALL + 10);
    return SH_MAX_SMALL + 1 + pick(o, 200000);
}

/* The smallest class that holds so many bytes, by looking at all of them. */
static uint32_t class_of(uint64_t nbytes)
{
    uint32_t kind = 0;
    while (kind < SH_NCLASSES && sh_classes[kind].size < nbytes)
        kind++;
    return kind < SH_NCLASSES ? kind : SH_KIND_LARGE;
}

/* Blocks of a power of two begin at a multiple of it, up to a page; the others at what divides
 * their class. */
static uint64_t alignment_of(uint64_t room, uint64_t page_bytes)
{
    uint64_t power = room & -room;
    return power < page_bytes ? power : page_bytes;
}

static void check_ref(const struct oracle *o, const struct sh_ref *r, const struct block *b)
{
    CHECK(r->data == data_of(o, b));
    CHECK(r->nbytes == b->nbytes);
    CHECK(r->gen == b->gen);
    CHECK(r->word == b->word);
    CHECK(is_right(o, b));
}

/* A pin of a block that was there. */
static void got(struct oracle *o, const struct player *p, const struct sh_ref *r, struct block *b)
{
    check_ref(o, r, b);
    held(o, b);
    add_hold(&o->pins, (struct hold){.block = b, .who = p->id, .ref = *r});
}

static void new_block(struct oracle *o, struct player *p, const struct sh_ref *r, uint64_t nbytes,
                      uint32_t nrefs)
{
    struct block *b = calloc(1, sizeof *b + nrefs * sizeof *b->ref);
    uint64_t page_bytes = 1ull << o->anchor.geo.page_shift;
    uint32_t kind = class_of(nbytes);
    CHECK(b != NULL && r->kind == kind && r->nbytes == nbytes);
    b->off = sh_data_offset(&p->c, r);
    b->gen = r->gen;
    b->nbytes = nbytes;
    b->room = kind == SH_KIND_LARGE ? (nbytes + page_bytes - 1) / page_bytes * page_bytes
                                    : sh_classes[kind].size;
    b->word = r->word;
    b->nrefs = nrefs;
    b->seed = pick_64(o);
    CHECK(b->off % alignment_of(b->room, page_bytes) == 0);
    enter_block(o, b);
    content_write(r->data, bytes_from(b), nbytes, b->seed);
    got(o, p, r, b);
}

/* There was no room for it, and for a pin where the process has none: nor is there a block that it
 * might have. */
static void must_lack_block(struct oracle *o, struct player *p, enum sh_status status,
                            uint64_t nbytes)
{
    uint32_t kind = class_of(nbytes);
    bool large = kind == SH_KIND_LARGE, has_pin = sh_pspan_any(&p->c, SH_KIND_PINS);
    uint64_t npages = large ? (nbytes >> o->anchor.geo.page_shift) + 1 : p->c.kinds[kind].npages;
    must_lack_room(o, status, has_pin ? npages : npages + 1);
    if (large || !has_pin)
        return;
    CHECK(!has_block(&p->c, kind, SH_BLOCK_FREE));
    CHECK(status == SH_LIMIT || !has_block(&p->c, kind, SH_BLOCK_HOLE));
}

static void make_leaf(struct oracle *o)
{
    struct player *p = somebody(o);
    uint64_t nbytes = random_size(o);
    bool zero = pick(o, 2);
    struct sh_ref r;
    did(o, "alloc", p->id, nbytes, zero, 0);
    enum sh_status status = sh_alloc(&p->c, nbytes, zero, 1000, &r);
    if (status != SH_OK) {
        must_lack_block(o, p, status, nbytes);
        return;
    }
    CHECK(!zero || content_is_zero(r.data, nbytes));
    new_block(o, p, &r, nbytes, 0);
}

/* Few references, as a rule; so many now and then that they go in slices. */
static void make_node(struct oracle *o)
{
    struct player *p = somebody(o);
    uint32_t nrefs = 1 + pick(o, pick(o, 30) == 0 ? 600 : 6), more = pick(o, 9);
    uint64_t nbytes = sizeof(struct sh_node) + 8ull * nrefs + more;
    struct sh_ref r;
    did(o, "node", p->id, nrefs, more, 0);
    enum sh_status status = sh_node_new(&p->c, SH_NODE_PLAIN, nrefs, more, 1000, &r);
    if (status != SH_OK) {
        must_lack_block(o, p, status, nbytes);
        return;
    }
    CHECK(content_is_zero(r.data + sizeof(struct sh_node), nbytes - sizeof(struct sh_node)));
    new_block(o, p, &r, nbytes, nrefs);
}

static void make_block(struct oracle *o)
{
    (pick(o, 3) == 0 ? make_node : make_leaf)(o);
}

static void drop_pin(struct oracle *o)
{
    struct player *p;
    struct hold *one = some_pin(o, &p);
    if (one == NULL)
        return;
    did(o, "drop", p->id, one->block->off, one->block->gen, one->block->holders);
    check_ref(o, &one->ref, one->block);
    block_drop(&p->c, &one->ref);
    dropped(o, take_hold(&o->pins, (uint32_t)(one - o->pins.at)).block);
}

static void make(struct oracle *o)
{
    (o->pins.n < o->target ? make_block : drop_pin)(o);
}

static void drop(struct oracle *o)
{
    (o->pins.n > o->target ? drop_pin : make_block)(o);
}

static void repin(struct oracle *o)
{
    struct player *p;
    struct hold *one = some_pin(o, &p), again;
    if (one == NULL || o->pins.n > 2 * MOST_PINS)
        return;
    again = *one;
    did(o, "repin", p->id, one->block->off, one->block->gen, one->block->holders);
    enum sh_status status = sh_repin(&p->c, &one->ref, 1000, &again.ref);
    if (status != SH_OK) {
        must_lack_room(o, status, 1);
        return;
    }
    held(o, one->block);
    add_hold(&o->pins, again);
}

static void rewrite(struct oracle *o)
{
    struct player *p;
    struct hold *one = some_pin(o, &p);
    if (one == NULL)
        return;
    did(o, "write", p->id, one->block->off, 0, 0);
    check_ref(o, &one->ref, one->block);
    one->block->seed = pick_64(o);
    content_write(one->ref.data, bytes_from(one->block), one->block->nbytes, one->block->seed);
}

/* References */

static struct hold *some_node(struct oracle *o, struct player **p)
{
    struct hold *one = some_pin(o, p);
    for (uint32_t tries = 0; one != NULL && one->block->nrefs == 0; tries++)
        one = tries < 8 ? some_pin(o, p) : NULL;
    return one;
}

static struct hold *some_pin_of(struct oracle *o, const struct player *p)
{
    for (uint32_t tries = 0; tries < 8; tries++) {
        struct hold *one = &o->pins.at[pick(o, o->pins.n)];
        if (one->who == p->id)
            return one;
    }
    return NULL;
}

static void store_one(struct oracle *o, struct player *p, const struct hold *node, uint32_t i,
                      const struct hold *to)
{
    struct block **place = &node->block->ref[i], *before = *place;
    node_store(&p->c, &node->ref, i, to == NULL ? NULL : &to->ref);
    *place = to == NULL ? NULL : to->block;
    if (to != NULL)
        held(o, to->block);
    if (before != NULL)
        dropped(o, before);
}

/* One place, or a part of a wide node, names another block that its holder has, the node itself, or
 * none. */
static void store(struct oracle *o)
{
    struct player *p;
    const struct hold *node = some_node(o, &p), *to;
    if (node == NULL)
        return;
    uint32_t n = node->block->nrefs, i = pick(o, n), end = n > 100 && i + 300 < n ? i + 300 : i + 1;
    to = pick(o, 8) == 0 ? node : some_pin_of(o, p);
    if (pick(o, 4) == 0 || o->nblocks > MOST_BLOCKS)
        to = NULL;
    did(o, "store", p->id, node->block->off, i, to == NULL ? 0 : to->block->off);
    check_ref(o, &node->ref, node->block);
    for (; i < end; i++)
        store_one(o, p, node, i, to);
}

static void load(struct oracle *o)
{
    struct player *p;
    const struct hold *node = some_node(o, &p);
    struct sh_ref r;
    if (node == NULL || o->pins.n > 2 * MOST_PINS)
        return;
    uint32_t i = pick(o, node->block->nrefs);
    struct block *b = node->block->ref[i];
    did(o, "load", p->id, node->block->off, i, b == NULL ? 0 : b->off);
    enum sh_status status = sh_node_load(&p->c, &node->ref, i, 1000, &r);
    if (status == SH_FULL || status == SH_LIMIT) {
        must_lack_room(o, status, 1);
        return;
    }
    CHECK_IS(status, b != NULL ? SH_OK : SH_ABSENT);
    if (b != NULL)
        got(o, p, &r, b);
}

/* A process dies between counting up and writing the holder: the block stays until a collection. */
static void lose_count(struct oracle *o)
{
    struct player *p;
    struct hold *one = some_pin(o, &p);
    if (one == NULL || o->step / (8 * BETWEEN) % 2 == 0)
        return;
    did(o, "lose", p->id, one->block->off, one->block->gen, one->block->holders);
    CHECK(sh_count_up(one->ref.word, one->ref.gen, atomic_load(&p->c.slot->phase)));
    touch(o, one->block);
    one->block->lost++;
    o->lost++;
}

/* Handles */

static void post(struct oracle *o)
{
    struct player *p;
    struct hold *one = some_pin(o, &p);
    if (one == NULL)
        return;
    did(o, "post", p->id, one->block->off, one->block->gen, 0);
    o->letter[pick(o, LETTERS)] = handle_of(&p->c, &one->ref);
}

static void drop_lease(struct oracle *o)
{
    struct player *p = somebody(o);
    struct handle h = o->letter[pick(o, LETTERS)];
    struct block *b = find_block(o, h.off, h.gen);
    struct hold *lease = find_lease(o, &h, b);
    did(o, "recall", p->id, h.off, h.gen, lease != NULL);
    enum sh_status status = worked_off(p, sh_lease_drop(&p->c, h.off, h.gen, h.cell, h.seq, 1000));
    CHECK_IS(status, lease != NULL ? SH_OK : SH_STALE);
    if (lease != NULL)
        dropped(o, take_hold(&o->leases, (uint32_t)(lease - o->leases.at)).block);
}

static void lease(struct oracle *o)
{
    struct player *p;
    struct hold *one = some_pin(o, &p), made;
    if (one == NULL || o->leases.n >= MOST_LEASE) {
        drop_lease(o);
        return;
    }
    made = (struct hold){.block = one->block, .who = p->id, .handle = handle_of(&p->c, &one->ref)};
    did(o, "lease", p->id, one->block->off, one->block->gen, one->block->holders);
    enum sh_status status =
        sh_lease_make(&p->c, &one->ref, 1000, &made.handle.cell, &made.handle.seq);
    if (status != SH_OK) {
        must_lack_room(o, status, 1);
        return;
    }
    held(o, one->block);
    add_hold(&o->leases, made);
    o->letter[pick(o, LETTERS)] = made.handle;
}

static void open_handle(struct oracle *o, const char *what, const struct handle *h)
{
    struct player *p = somebody(o);
    struct block *b = find_block(o, h->off, h->gen);
    struct hold *lease = find_lease(o, h, b);
    bool condemned = b != NULL && lease == NULL && o->phase == SH_SWEEP && !is_kept(o, b);
    struct sh_ref r;
    if (o->pins.n > 2 * MOST_PINS)
        return;
    did(o, what, p->id, h->off, h->gen, lease != NULL);
    enum sh_status status = handle_open(&p->c, h, &r);
    if (status == SH_FULL || status == SH_LIMIT) {
        must_lack_room(o, status, 1);
        return;
    }
    CHECK_IS(status, b != NULL && !condemned ? SH_OK : SH_STALE);
    o->opened += status == SH_OK;
    o->stale += status == SH_STALE;
    if (status != SH_OK)
        return;
    got(o, p, &r, b);
    if (lease != NULL)
        dropped(o, take_hold(&o->leases, (uint32_t)(lease - o->leases.at)).block);
}

static void open_letter(struct oracle *o)
{
    struct handle h = o->letter[pick(o, LETTERS)];
    open_handle(o, "open", &h);
}

/* Handles that nobody gave out, most of them close to one that somebody did. */
static void forge(struct oracle *o)
{
    struct handle h = o->letter[pick(o, LETTERS)];
    switch (pick(o, 8)) {
    case 0:
        h.gen++;
        break;
    case 1:
        h.gen--;
        break;
    case 2:
        h.gen |= 1ull << (SH_GEN_BITS + pick(o, 64 - SH_GEN_BITS));
        break;
    case 3:
        h.off += 16;
        break;
    case 4:
        h.off += 1ull << pick(o, 64);
        break;
    case 5:
        h.cell += 16 * (pick(o, 5) - 2ull);
        break;
    case 6:
        h.seq++;
        break;
    default:
        h = (struct handle){pick_64(o), pick(o, 100), pick_64(o), pick(o, 1u << 23)};
    }
    open_handle(o, "forged", &h);
}

/* Names */

static void text_of(uint32_t number, char text[8])
{
    snprintf(text, 8, "name%02u", number % 100);
}

static void set_root(struct oracle *o)
{
    struct player *p;
    struct hold *one = some_pin(o, &p);
    uint32_t number = pick(o, NAMES);
    struct block *before = o->root[number];
    char name[8];
    if (one == NULL)
        return;
    text_of(number, name);
    did(o, "set", p->id, number, one->block->off, one->block->gen);
    CHECK_OK(worked_off(p, sh_root_set(&p->c, name, 6, &one->ref, 1000)));
    held(o, one->block);
    o->root[number] = one->block;
    if (before != NULL)
        dropped(o, before);
}

static void get_root(struct oracle *o)
{
    struct player *p = somebody(o);
    uint32_t number = pick(o, NAMES);
    struct block *b = o->root[number];
    struct sh_ref r;
    char name[8];
    text_of(number, name);
    did(o, "get", p->id, number, 0, 0);
    enum sh_status status = sh_root_get(&p->c, name, 6, 1000, &r);
    if (status == SH_FULL || status == SH_LIMIT) {
        must_lack_room(o, status, 1);
        return;
    }
    CHECK_IS(status, b != NULL ? SH_OK : SH_ABSENT);
    if (b != NULL)
        got(o, p, &r, b);
}

static void clear_name(struct oracle *o, uint32_t number)
{
    struct player *p = somebody(o);
    struct block *b = o->root[number];
    char name[8];
    text_of(number, name);
    did(o, "clear", p->id, number, 0, 0);
    CHECK_IS(worked_off(p, sh_root_clear(&p->c, name, 6, 1000)), b != NULL ? SH_OK : SH_ABSENT);
    o->root[number] = NULL;
    if (b != NULL)
        dropped(o, b);
}

static void clear_root(struct oracle *o)
{
    clear_name(o, pick(o, NAMES));
}

/* A look at everything */

static void check_blocks(struct oracle *o)
{
    for (uint32_t i = 0; i < o->nblocks; i++) {
        struct block *b = o->block[i];
        uint64_t word = atomic_load(b->word);
        CHECK(SH_BSTATE(word) == SH_BLOCK_LIVE && SH_GEN(word) == b->gen);
        CHECK(SH_COUNT(word) == b->holders + b->lost);
        CHECK(is_right(o, b));
    }
}

static void check_players(struct oracle *o)
{
    for (uint32_t i = 0; i < PLAYERS; i++) {
        struct player *p = &o->player[i];
        uint64_t pins = 0, leases = 0;
        for (uint32_t k = 0; p->id != 0 && k < o->pins.n; k++)
            pins += o->pins.at[k].who == p->id;
        for (uint32_t k = 0; p->id != 0 && k < o->leases.n; k++)
            leases += o->leases.at[k].who == p->id;
        CHECK(p->id == 0 || atomic_load(&p->c.slot->pins) == pins);
        CHECK(p->id == 0 || sh_leases(p->c.slot) == leases);
    }
}

static void check_names(struct oracle *o)
{
    char name[SH_ROOT_NAME_MAX];
    uint32_t entry = 0, len, n = 0, want = 0;
    struct sh_ctx *c = &somebody(o)->c;
    while (sh_root_name(c, &entry, name, &len, 1000) == SH_OK) {
        CHECK(len == 6 && o->root[(name[4] - '0') * 10 + name[5] - '0'] != NULL);
        n++;
    }
    for (uint32_t i = 0; i < NAMES; i++)
        want += o->root[i] != NULL;
    CHECK(n == want);
}

static void check_all(struct oracle *o)
{
    alarm(300); /* a hang is no progress, however long the run */
    CHECK(sh_phase_of(atomic_load(&o->lead.hdr->phase)) == o->phase);
    check_blocks(o);
    check_players(o);
    check_names(o);
    poison_what_is_free(o);
    must_be_sound(&o->lead, o->lost == 0 ? EXACT_COUNTS : 0);
    if (o->step % (16 * BETWEEN) == 0)
        kernel_must_agree(&o->lead);
    o->target = pick(o, MOST_PINS);
}

static void check_sums(const struct oracle *o)
{
    struct sh_sums sum = sh_sum(&o->lead);
    CHECK(sh_heap_objects(&sum) == o->nblocks);
    CHECK(sh_heap_alloc(&sum) == o->bytes);
    CHECK(sum.pins == o->pins.n);
    CHECK(sum.leases == o->leases.n);
}

/* A run */

static const struct deed {
    void (*act)(struct oracle *);
    uint32_t weight;
    const char *name;
} deeds[] = {
    {make, 240, "make"},
    {drop, 220, "drop"},
    {repin, 60, "repin"},
    {rewrite, 60, "rewrite"},
    {store, 100, "store"},
    {load, 40, "load"},
    {post, 60, "post"},
    {lease, 60, "lease"},
    {open_letter, 100, "open"},
    {drop_lease, 30, "recall"},
    {forge, 30, "forge"},
    {set_root, 30, "set root"},
    {get_root, 20, "get root"},
    {clear_root, 20, "clear root"},
    {lose_count, 10, "lose count"},
    {cycle, 30, "cycle step"},
    {release, 6, "release"},
    {reap, 6, "reap"},
    {join, 4, "join"},
    {leave, 1, "leave"},
    {die, 2, "die"},
    {fork_one, 1, "fork"},
    {succeed, 2, "succession"},
};
#define NDEEDS (sizeof deeds / sizeof deeds[0])

static void one_step(struct oracle *o)
{
    uint32_t sum = 0, at;
    for (size_t i = 0; i < NDEEDS; i++)
        sum += deeds[i].weight;
    at = pick(o, sum);
    for (size_t i = 0; i < NDEEDS; at -= deeds[i++].weight)
        if (at < deeds[i].weight) {
            deeds[i].act(o);
            break;
        }
    check_sums(o);
}

/* Everybody goes, names and leases too; nothing must be left. */
static void oracle_end(struct oracle *o)
{
    check_all(o);
    while (o->next != START)
        cycle(o);
    if (o->phase != SH_IDLE) /* a successor had not started again */
        do
            cycle(o);
        while (o->next != START);
    for (uint32_t i = 0; i < NAMES; i++)
        clear_name(o, i);
    for (uint32_t i = 0; i < PLAYERS; i++)
        if (o->player[i].id != 0)
            arena_leave(&o->player[i].c);
    nothing_must_be_left(&o->lead);
    oracle_free(o);
}

/* How often there was no room. */
static uint64_t run(uint64_t capacity, uint64_t limit)
{
    struct oracle *o = oracle_new(capacity, limit);
    join(o);
    for (uint64_t steps = test_scale(STEPS); o->step < steps; o->step++) {
        if (o->step % BETWEEN == 0)
            check_all(o);
        one_step(o);
    }
    printf("   %llu operations: %llu handles opened, %llu stale, %llu times full, %llu swept, "
           "%u processes, %llu collections\n",
           (unsigned long long)o->step, (unsigned long long)o->opened, (unsigned long long)o->stale,
           (unsigned long long)o->full, (unsigned long long)o->swept, o->last_id,
           (unsigned long long)o->lead.hdr->num_gc);
    fflush(stdout);
    CHECK(o->opened != 0 && o->stale != 0 && o->swept != 0);
    uint64_t full = o->full;
    oracle_end(o);
    return full;
}

static void test_room_enough(void)
{
    CHECK(run(64 << 20, NO_LIMIT) == 0);
}

static void test_too_little_room(void)
{
    CHECK(run(8 << 20, NO_LIMIT) != 0);
}

static void test_a_limit(void)
{
    CHECK(run(64 << 20, 6 << 20) != 0);
}

int main(void)
{
    static const struct test tests[] = {
        {"room_enough", test_room_enough},
        {"too_little_room", test_too_little_room},
        {"a_limit", test_a_limit},
    };
    return test_main("oracle", tests, sizeof tests / sizeof tests[0]);
}
