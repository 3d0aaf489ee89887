/* The oracle's knowledge, and how memory is poisoned that it calls nobody's. */
#include "oracle.h"

#include <sanitizer/asan_interface.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

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

void poison_what_is_free(struct oracle *o)
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

/* A run that fails says what was done last */

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

void did(struct oracle *o, const char *what, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    o->tail[o->step % TAIL] = (struct did){o->step, what, {a, b, c, d}};
}

uint32_t pick(struct oracle *o, uint32_t n)
{
    return rng_below(&o->rng, n);
}

uint64_t pick_64(struct oracle *o)
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

struct block *find_block(const struct oracle *o, uint64_t off, uint64_t gen)
{
    uint32_t i = place_of(o, off);
    bool found = i < o->nblocks && o->block[i]->off == off && o->block[i]->gen == gen;
    return found ? o->block[i] : NULL;
}

uint8_t *data_of(const struct oracle *o, const struct block *b)
{
    return o->anchor.base + o->anchor.geo.data + b->off;
}

uint64_t bytes_from(const struct block *b)
{
    return b->nrefs == 0 ? 0 : sizeof(struct sh_node) + 8ull * b->nrefs;
}

static bool has_its_references(const struct oracle *o, const struct block *b)
{
    const struct sh_node *n = (const struct sh_node *)data_of(o, b);
    bool right = SH_NODE_NREFS(atomic_load(&n->head)) == b->nrefs;
    for (uint32_t i = 0; right && i < b->nrefs; i++) {
        const struct block *to = b->ref[i];
        uint64_t cell = to == NULL ? 0 : SH_PIN_CELL(sh_word_number(&o->anchor, to->word), to->gen);
        right = atomic_load(&n->ref[i]) == cell;
    }
    return right;
}

/* What is in it is what was written to it. */
bool is_right(const struct oracle *o, const struct block *b)
{
    return (b->nrefs == 0 || has_its_references(o, b)) &&
           content_is(data_of(o, b), bytes_from(b), b->nbytes, b->seed);
}

void touch(const struct oracle *o, struct block *b)
{
    if (o->phase != SH_IDLE)
        b->touched = o->epoch;
}

/* A collection that is under way does not free it. */
bool is_kept(const struct oracle *o, const struct block *b)
{
    return b->marked || b->touched == o->epoch;
}

void enter_block(struct oracle *o, struct block *b)
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

void forget_block(struct oracle *o, struct block *b)
{
    uint32_t i = place_of(o, b->off);
    CHECK(o->block[i] == b);
    memmove(&o->block[i], &o->block[i + 1], (--o->nblocks - i) * sizeof *o->block);
    o->bytes -= b->nbytes;
    o->lost -= b->lost;
    o->next_gen[b->off / 16] = b->gen + 1;
    free(b);
}

void held(struct oracle *o, struct block *b)
{
    touch(o, b);
    b->holders++;
}

/* The last one frees it, unless a death has left its count too high, with what hangs on it. */
void let_go(struct oracle *o, struct block *b, bool touches)
{
    o->todo[o->ntodo++] = b;
    while (o->ntodo != 0) {
        b = o->todo[--o->ntodo];
        if (touches)
            touch(o, b);
        if (--b->holders != 0 || b->lost != 0)
            continue;
        CHECK(o->ntodo + b->nrefs < TODO);
        for (uint32_t i = 0; i < b->nrefs; i++)
            if (b->ref[i] != NULL)
                o->todo[o->ntodo++] = b->ref[i];
        forget_block(o, b);
    }
}

void dropped(struct oracle *o, struct block *b)
{
    let_go(o, b, true);
}

void add_hold(struct holds *h, struct hold one)
{
    CHECK(h->n < ROOM);
    h->at[h->n++] = one;
}

struct hold take_hold(struct holds *h, uint32_t i)
{
    struct hold one = h->at[i];
    h->at[i] = h->at[--h->n];
    return one;
}

struct hold *find_lease(struct oracle *o, const struct handle *h, const struct block *b)
{
    for (uint32_t i = 0; b != NULL && i < o->leases.n; i++) {
        struct hold *one = &o->leases.at[i];
        if (one->block == b && one->handle.cell == h->cell && one->handle.seq == h->seq)
            return one;
    }
    return NULL;
}

/* Players */

struct player *player_of(struct oracle *o, uint32_t id)
{
    for (uint32_t i = 0; i < PLAYERS; i++)
        if (o->player[i].id == id)
            return &o->player[i];
    return NULL;
}

void map_shared(struct oracle *o, struct sh_ctx *c)
{
    CHECK_OK(sh_map(c, dup(o->fd), true));
    arena_share(c, &o->anchor);
}

/* An oracle */

struct oracle *oracle_new(uint64_t capacity, uint64_t limit)
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
    return o;
}

void oracle_free(struct oracle *o)
{
    ASAN_UNPOISON_MEMORY_REGION(sh_data(&o->anchor, 0), o->anchor.geo.capacity);
    arena_leave(&o->lead);
    sh_unmap(&o->anchor);
    close(o->fd);
    while (o->nblocks != 0)
        free(o->block[--o->nblocks]);
    free(o->next_gen);
    free(o);
}
