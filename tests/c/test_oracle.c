/*
 * The core against a naive oracle: one operation after another, chosen at random from a seed, by
 * contexts that play processes, come, fork, leave and die, and by a coordinator that collects a
 * step at a time, releases, reaps, dies and is followed. The oracle knows of each block where it
 * is, how long, its generation, its bytes and its holders, and so what each operation must say.
 *
 * All contexts share one mapping, and under the address sanitizer everything in it that is neither
 * a block nor cells is poisoned: whoever touches free memory, the core too, ends the run.
 *
 * A run that fails prints its seed, its step and the last operations. SH_TEST_SEED chooses the
 * seed, SH_TEST_SCALE=67 makes it 10^7 operations.
 */
#include "support.h"

#include <sanitizer/asan_interface.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

#define STEPS      50000u /* a test */
#define PLAYERS    5u
#define NAMES      24u
#define LETTERS    256u
#define MOST_PINS  1500u
#define MOST_LEASE 300u
#define ROOM       8192u /* of the oracle's tables: more than there can be */
#define TAIL       48u   /* operations printed */
#define BETWEEN    1000u /* steps from one look at everything to the next */

/* Poisoning. What the core's rooms ask of each other is overheard (the linker's --wrap): which
 * bytes are somebody's from now on, and which are nobody's. */

static void poison_run(struct sh_ctx *c, uint32_t page)
{
    uint64_t bytes = (uint64_t)SH_SPAN_NPAGES(sh_span(c, page)) << c->geo.page_shift;
    ASAN_POISON_MEMORY_REGION(sh_data(c, page), bytes);
}

int64_t __real_sh_pspan_pop(struct sh_ctx *, uint32_t, struct sh_pspan **);
int64_t __wrap_sh_pspan_pop(struct sh_ctx *c, uint32_t kind, struct sh_pspan **out)
{
    int64_t index = __real_sh_pspan_pop(c, kind, out);
    uint64_t size = c->kinds[kind].size;
    if (index >= 0)
        ASAN_UNPOISON_MEMORY_REGION(sh_data(c, (*out)->page) + (uint64_t)index * size, size);
    return index;
}

void __real_sh_span_freed(struct sh_ctx *, uint32_t, uint64_t, const _Atomic uint64_t *);
void __wrap_sh_span_freed(struct sh_ctx *c, uint32_t page, uint64_t span,
                          const _Atomic uint64_t *word)
{
    const struct sh_kind *k = &c->kinds[SH_SPAN_KIND(span)];
    uint64_t index = (uint64_t)(word - sh_words(c, page, k->tier));
    ASAN_POISON_MEMORY_REGION(sh_data(c, page) + index * k->size, k->size);
    __real_sh_span_freed(c, page, span, word);
}

/* Runs that are used whole: large blocks and cells. */
enum sh_status __real_sh_pages_commit(struct sh_ctx *, uint32_t, uint32_t);
enum sh_status __wrap_sh_pages_commit(struct sh_ctx *c, uint32_t page, uint32_t npages)
{
    enum sh_status status = __real_sh_pages_commit(c, page, npages);
    if (status == SH_OK)
        ASAN_UNPOISON_MEMORY_REGION(sh_data(c, page), (uint64_t)npages << c->geo.page_shift);
    return status;
}

void __real_sh_defer(struct sh_ctx *, uint32_t);
void __wrap_sh_defer(struct sh_ctx *c, uint32_t page)
{
    poison_run(c, page);
    __real_sh_defer(c, page);
}

enum sh_status __real_sh_pages_give(struct sh_ctx *, const uint32_t *, uint32_t, int);
enum sh_status __wrap_sh_pages_give(struct sh_ctx *c, const uint32_t *pages, uint32_t n,
                                    int wait_ms)
{
    for (uint32_t i = 0; i < n; i++)
        poison_run(c, pages[i]);
    return __real_sh_pages_give(c, pages, n, wait_ms);
}

/* What the oracle knows */

struct block {
    uint64_t off, gen, nbytes;
    uint64_t room; /* bytes that nobody else has */
    uint64_t seed; /* of its bytes */
    _Atomic uint64_t *word;
    uint32_t holders, lost; /* lost: counted, and then it died before it wrote the holder (I-6) */
    uint32_t touched;       /* the epoch */
    bool marked;
};

struct hold {
    struct block *block;
    uint32_t who;         /* the player who made it, who may be dead */
    struct sh_ref ref;    /* a pin's */
    struct handle handle; /* a lease's */
};

struct holds {
    struct hold at[ROOM];
    uint32_t n;
};

struct player {
    struct sh_ctx c;
    uint32_t id; /* 0: nobody is here */
};

enum cycle {
    START,
    MARK,
    FINISH,
    SWEEP,
    STAMP,
    END
};

struct did {
    uint64_t step;
    const char *what;
    uint64_t with[4];
};

struct oracle {
    int fd;
    struct rng rng;
    struct sh_ctx anchor, lead; /* anchor: the mapping that all share */
    struct player player[PLAYERS];
    uint32_t last_id;

    struct block *block[ROOM]; /* by offset */
    uint32_t nblocks;
    uint64_t bytes;
    uint32_t lost;
    bool sees_holders; /* the coordinator counts them while it marks */
    struct holds pins, leases;
    struct block *root[NAMES];
    struct handle letter[LETTERS]; /* also of blocks that are long gone */
    uint64_t *next_gen;            /* of each place of 16 bytes, the least that may come */

    enum cycle next;
    uint32_t phase, epoch, stamp, page;
    uint32_t target; /* pins to be reached */

    uint64_t step;
    struct did tail[TAIL];
    uint64_t opened, stale, full, swept;
};

static struct oracle *running;

static void say_tail(void)
{
    const char *seed = getenv("SH_TEST_SEED");
    for (uint64_t i = running->step > TAIL ? running->step - TAIL : 0; i <= running->step; i++) {
        const struct did *d = &running->tail[i % TAIL];
        if (d->what != NULL && d->step == i)
            fprintf(stderr, "  %8llu %-10s %llu %llu %llu %llu\n", (unsigned long long)d->step,
                    d->what, (unsigned long long)d->with[0], (unsigned long long)d->with[1],
                    (unsigned long long)d->with[2], (unsigned long long)d->with[3]);
    }
    fprintf(stderr, "failed at step %llu of seed %s\n", (unsigned long long)running->step,
            seed == NULL ? "0" : seed);
    fflush(stderr);
}

static void say_tail_and_die(int number)
{
    say_tail();
    signal(number, SIG_DFL);
    raise(number);
}

static void did(struct oracle *o, const char *what, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    o->tail[o->step % TAIL] = (struct did){o->step, what, {a, b, c, d}};
}

static uint32_t pick(struct oracle *o, uint32_t n)
{
    return rng_below(&o->rng, n);
}

static uint64_t pick_64(struct oracle *o)
{
    uint64_t high = pick(o, UINT32_MAX);
    return high << 32 | pick(o, UINT32_MAX);
}

/* Blocks */

/* How many begin before an offset. */
static uint32_t place_of(const struct oracle *o, uint64_t off)
{
    uint32_t low = 0, high = o->nblocks;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (o->block[middle]->off < off)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct block *find(const struct oracle *o, uint64_t off, uint64_t gen)
{
    uint32_t i = place_of(o, off);
    bool found = i < o->nblocks && o->block[i]->off == off && o->block[i]->gen == gen;
    return found ? o->block[i] : NULL;
}

static uint8_t *data_of(const struct oracle *o, const struct block *b)
{
    return o->anchor.base + o->anchor.geo.data + b->off;
}

static void touch(const struct oracle *o, struct block *b)
{
    if (o->phase != SH_IDLE)
        b->touched = o->epoch;
}

/* A collection that is under way does not free it. */
static bool is_kept(const struct oracle *o, const struct block *b)
{
    return b->marked || b->touched == o->epoch;
}

static void enter_block(struct oracle *o, struct block *b)
{
    uint32_t i = place_of(o, b->off);
    CHECK(b->off + b->room <= o->anchor.geo.capacity);
    CHECK(i == 0 || o->block[i - 1]->off + o->block[i - 1]->room <= b->off);
    CHECK(i == o->nblocks || b->off + b->room <= o->block[i]->off);
    CHECK(b->gen >= o->next_gen[b->off / 16]);
    CHECK(o->nblocks < ROOM);
    memmove(&o->block[i + 1], &o->block[i], (o->nblocks++ - i) * sizeof *o->block);
    o->block[i] = b;
    o->bytes += b->nbytes;
}

static void forget_block(struct oracle *o, struct block *b)
{
    uint32_t i = place_of(o, b->off);
    CHECK(o->block[i] == b);
    memmove(&o->block[i], &o->block[i + 1], (--o->nblocks - i) * sizeof *o->block);
    o->bytes -= b->nbytes;
    o->lost -= b->lost;
    o->next_gen[b->off / 16] = b->gen + 1;
    free(b);
}

static void held(struct oracle *o, struct block *b)
{
    touch(o, b);
    b->holders++;
}

/* The last one frees it, unless a death has left its count too high. */
static void dropped(struct oracle *o, struct block *b)
{
    touch(o, b);
    if (--b->holders == 0 && b->lost == 0)
        forget_block(o, b);
}

static void add_hold(struct holds *h, struct hold one)
{
    CHECK(h->n < ROOM);
    h->at[h->n++] = one;
}

static struct hold take_hold(struct holds *h, uint32_t i)
{
    struct hold one = h->at[i];
    h->at[i] = h->at[--h->n];
    return one;
}

static struct hold *find_lease(struct oracle *o, const struct handle *h, const struct block *b)
{
    for (uint32_t i = 0; b != NULL && i < o->leases.n; i++) {
        struct hold *one = &o->leases.at[i];
        if (one->block == b && one->handle.cell == h->cell && one->handle.seq == h->seq)
            return one;
    }
    return NULL;
}

/* Players */

static struct player *player_of(struct oracle *o, uint32_t id)
{
    for (uint32_t i = 0; i < PLAYERS; i++)
        if (o->player[i].id == id)
            return &o->player[i];
    return NULL;
}

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

static void map_shared(struct oracle *o, struct sh_ctx *c)
{
    CHECK_OK(sh_map(c, dup(o->fd), true));
    arena_share(c, &o->anchor);
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
    CHECK(content_is(r->data, 0, b->nbytes, b->seed));
}

static void new_block(struct oracle *o, struct player *p, const struct sh_ref *r, uint64_t nbytes)
{
    struct block *b = calloc(1, sizeof *b);
    uint64_t page_bytes = 1ull << o->anchor.geo.page_shift;
    uint32_t kind = class_of(nbytes);
    CHECK(b != NULL && r->kind == kind && r->nbytes == nbytes);
    b->off = sh_data_offset(&p->c, r);
    b->gen = r->gen;
    b->nbytes = nbytes;
    b->room = kind == SH_KIND_LARGE ? (nbytes + page_bytes - 1) / page_bytes * page_bytes
                                    : sh_classes[kind].size;
    b->word = r->word;
    b->seed = pick_64(o);
    CHECK(b->off % alignment_of(b->room, page_bytes) == 0);
    enter_block(o, b);
    content_write(r->data, 0, nbytes, b->seed);
    held(o, b);
    add_hold(&o->pins, (struct hold){.block = b, .who = p->id, .ref = *r});
}

static void make_block(struct oracle *o)
{
    struct player *p = somebody(o);
    uint64_t nbytes = random_size(o);
    bool zero = pick(o, 2);
    struct sh_ref r;
    did(o, "alloc", p->id, nbytes, zero, 0);
    enum sh_status status = sh_alloc(&p->c, nbytes, zero, 1000, &r);
    if (status == SH_OK) {
        CHECK(!zero || content_is_zero(r.data, nbytes));
        new_block(o, p, &r, nbytes);
        return;
    }
    uint32_t kind = class_of(nbytes);
    bool large = kind == SH_KIND_LARGE;
    must_lack_room(o, status,
                   large ? (nbytes >> o->anchor.geo.page_shift) + 1 : p->c.kinds[kind].npages);
    if (large || !sh_pspan_any(&p->c, SH_KIND_PINS))
        return;
    CHECK(!has_block(&p->c, kind, SH_BLOCK_FREE));
    CHECK(status == SH_LIMIT || !has_block(&p->c, kind, SH_BLOCK_HOLE));
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
    content_write(one->ref.data, 0, one->block->nbytes, one->block->seed);
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
    struct block *b = find(o, h.off, h.gen);
    struct hold *lease = find_lease(o, &h, b);
    did(o, "recall", p->id, h.off, h.gen, lease != NULL);
    enum sh_status status = sh_lease_drop(&p->c, h.off, h.gen, h.cell, h.seq, 1000);
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
    struct block *b = find(o, h->off, h->gen);
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
    check_ref(o, &r, b);
    held(o, b);
    add_hold(&o->pins, (struct hold){.block = b, .who = p->id, .ref = r});
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
    CHECK_OK(sh_root_set(&p->c, name, 6, &one->ref, 1000));
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
    if (b == NULL)
        return;
    check_ref(o, &r, b);
    held(o, b);
    add_hold(&o->pins, (struct hold){.block = b, .who = p->id, .ref = r});
}

static void clear_name(struct oracle *o, uint32_t number)
{
    struct player *p = somebody(o);
    struct block *b = o->root[number];
    char name[8];
    text_of(number, name);
    did(o, "clear", p->id, number, 0, 0);
    CHECK_IS(sh_root_clear(&p->c, name, 6, 1000), b != NULL ? SH_OK : SH_ABSENT);
    o->root[number] = NULL;
    if (b != NULL)
        dropped(o, b);
}

static void clear_root(struct oracle *o)
{
    clear_name(o, pick(o, NAMES));
}

/* The coordinator */

/* A collection leaves no span without blocks. */
static void no_span_is_empty(struct oracle *o)
{
    struct sh_ctx *c = &o->lead;
    uint64_t used = atomic_load(&c->hdr->used_pages);
    for (uint64_t page = 0; page < used; page += SH_SPAN_NPAGES(sh_span(c, (uint32_t)page))) {
        uint64_t span = sh_span(c, (uint32_t)page);
        CHECK(SH_SPAN_STATE(span) != SH_SMALL || !sh_span_is_empty(c, (uint32_t)page, span));
    }
}

/* Counts that a death left too high come down to the holders, if nothing touched the block since it
 * was marked, and by the coordinator that marked it. */
static void lower_counts(struct oracle *o)
{
    for (uint32_t i = 0; o->sees_holders && i < o->nblocks; i++) {
        struct block *b = o->block[i];
        if (!is_kept(o, b) || b->touched == o->epoch)
            continue;
        o->lost -= b->lost;
        b->lost = 0;
    }
    o->sees_holders = false;
}

static void sweep(struct oracle *o)
{
    uint64_t blocks, bytes, want_blocks = 0, want_bytes = 0;
    for (uint32_t i = o->nblocks; i-- > 0;) {
        struct block *b = o->block[i];
        if (is_kept(o, b))
            continue;
        CHECK(b->holders == 0);
        want_blocks++;
        want_bytes += b->nbytes;
        forget_block(o, b);
    }
    lower_counts(o);
    CHECK_OK(sh_sweep(&o->lead, &blocks, &bytes));
    CHECK(blocks == want_blocks && bytes == want_bytes);
    o->swept += blocks;
    no_span_is_empty(o);
}

static void start_cycle(struct oracle *o)
{
    CHECK_OK(sh_start_cycle(&o->lead));
    o->phase = SH_MARK;
    o->epoch = o->epoch == 63 ? 1 : o->epoch + 1;
    for (uint32_t i = 0; i < o->nblocks; i++) {
        o->block[i]->marked = false;
        o->block[i]->touched = 0;
    }
}

static void mark(struct oracle *o)
{
    uint64_t marked, want = 0;
    for (uint32_t i = 0; i < o->nblocks; i++)
        want += o->block[i]->marked = o->block[i]->holders != 0 || is_kept(o, o->block[i]);
    o->sees_holders = o->lead.recount_holders;
    CHECK_OK(sh_mark(&o->lead, &marked));
    CHECK(marked == want);
}

static void finish_mark(struct oracle *o)
{
    uint64_t touched, want = 0;
    for (uint32_t i = 0; i < o->nblocks; i++) {
        bool late = !o->block[i]->marked && is_kept(o, o->block[i]);
        want += late;
        o->block[i]->marked |= late;
    }
    CHECK_OK(sh_finish_mark(&o->lead, &touched));
    CHECK(touched == want);
    o->phase = SH_SWEEP;
}

static void cycle(struct oracle *o)
{
    uint64_t units;
    did(o, "cycle", o->next, o->epoch, 0, 0);
    switch (o->next) {
    case START:
        start_cycle(o);
        break;
    case MARK:
        mark(o);
        break;
    case FINISH:
        finish_mark(o);
        break;
    case SWEEP:
        sweep(o);
        break;
    case STAMP:
        CHECK_OK(sh_stamp(&o->lead, ++o->stamp, &units));
        break;
    case END:
        CHECK_OK(sh_end_cycle(&o->lead, 4 << 20, false, 0));
        o->phase = SH_IDLE;
    }
    o->next = o->next == END ? START : o->next + 1;
}

static void release(struct oracle *o)
{
    uint64_t bytes, runs;
    uint32_t stamp = pick(o, 2) ? SH_STAMP_MAX : 1 + pick(o, o->stamp + 1);
    uint64_t at_most = 1ull << pick(o, 24);
    if (o->phase != SH_IDLE)
        return;
    did(o, "release", stamp, at_most, o->page, 0);
    CHECK_OK(sh_release(&o->lead, stamp, at_most, &o->page, &bytes, &runs));
}

static void drop_holds_of_the_dead(struct oracle *o, struct holds *h)
{
    for (uint32_t i = h->n; i-- > 0;)
        if (player_of(o, h->at[i].who) == NULL)
            dropped(o, take_hold(h, i).block);
}

/* With or without the leases that may still be on their way. */
static void reap(struct oracle *o)
{
    bool expired = pick(o, 2);
    if (o->phase != SH_IDLE)
        return;
    did(o, "reap", expired, 0, 0, 0);
    reap_dead(&o->lead, expired ? UINT64_MAX : 0);
    drop_holds_of_the_dead(o, &o->pins);
    if (expired)
        drop_holds_of_the_dead(o, &o->leases);
}

static void succeed(struct oracle *o)
{
    uint32_t phase;
    did(o, "succeed", o->phase, 0, 0, 0);
    arena_die(&o->lead);
    map_shared(o, &o->lead);
    CHECK_OK(sh_attach_coordinator(&o->lead, 1000));
    CHECK_OK(sh_begin(&o->lead, &phase));
    CHECK(phase == o->phase);
    o->next = phase == SH_SWEEP ? SWEEP : START; /* rule 13 */
    o->sees_holders = false;
}

/* A look at everything */

static void poison_what_is_free(struct oracle *o)
{
    struct sh_ctx *c = &o->anchor;
    uint64_t used = atomic_load(&c->hdr->used_pages);
    ASAN_POISON_MEMORY_REGION(sh_data(c, 0), c->geo.capacity);
    for (uint32_t i = 0; i < o->nblocks; i++)
        ASAN_UNPOISON_MEMORY_REGION(data_of(o, o->block[i]), o->block[i]->room);
    for (uint64_t page = 0; page < used; page += SH_SPAN_NPAGES(sh_span(c, (uint32_t)page))) {
        uint32_t state = SH_SPAN_STATE(sh_span(c, (uint32_t)page));
        if (state == SH_PINS || state == SH_LEASES)
            ASAN_UNPOISON_MEMORY_REGION(sh_data(c, (uint32_t)page), 1ull << c->geo.page_shift);
    }
}

static void check_blocks(struct oracle *o)
{
    for (uint32_t i = 0; i < o->nblocks; i++) {
        struct block *b = o->block[i];
        uint64_t word = atomic_load(b->word);
        CHECK(SH_BSTATE(word) == SH_BLOCK_LIVE && SH_GEN(word) == b->gen);
        CHECK(SH_COUNT(word) == b->holders + b->lost);
        CHECK(content_is(data_of(o, b), 0, b->nbytes, b->seed));
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

static struct oracle *oracle_new(uint64_t capacity, uint64_t limit)
{
    struct oracle *o = running = calloc(1, sizeof *o);
    uint32_t phase;
    CHECK(o != NULL);
    signal(SIGABRT, say_tail_and_die);
    signal(SIGALRM, say_tail_and_die);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_set_death_callback(say_tail);
#else
    signal(SIGSEGV, say_tail_and_die);
    signal(SIGBUS, say_tail_and_die);
#endif
    o->fd = arena_new(capacity, limit);
    o->rng.state = test_seed();
    o->next_gen = calloc(capacity / 16, sizeof *o->next_gen);
    CHECK(o->next_gen != NULL);
    CHECK_OK(sh_map(&o->anchor, dup(o->fd), true));
    poison_what_is_free(o);
    map_shared(o, &o->lead);
    CHECK_OK(sh_attach_coordinator(&o->lead, 1000));
    CHECK_OK(sh_begin(&o->lead, &phase));
    join(o);
    return o;
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
    ASAN_UNPOISON_MEMORY_REGION(sh_data(&o->anchor, 0), o->anchor.geo.capacity);
    arena_leave(&o->lead);
    sh_unmap(&o->anchor);
    close(o->fd);
    while (o->nblocks != 0)
        free(o->block[--o->nblocks]);
    free(o->next_gen);
    free(o);
}

/* How often there was no room. */
static uint64_t run(uint64_t capacity, uint64_t limit)
{
    struct oracle *o = oracle_new(capacity, limit);
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
