/* The oracle's coordinator: what each step of a collection must find. */
#include "oracle.h"

/* A sweep leaves no span without blocks, unless it had passed it when the last one there went with
 * garbage that held it. */
static void no_span_is_empty(struct oracle *o)
{
    struct sh_ctx *c = &o->lead;
    uint64_t used = atomic_load(&c->hdr->used_pages);
    for (uint64_t page = 0; page < used; page += SH_SPAN_NPAGES(sh_span(c, (uint32_t)page))) {
        uint64_t span = sh_span(c, (uint32_t)page);
        CHECK(SH_SPAN_STATE(span) != SH_SMALL || !sh_span_is_empty(c, (uint32_t)page, span));
    }
}

/* Marking: what can be reached from pins, leases and names, and from what was touched. */

static void reach(struct oracle *o, struct block *b)
{
    if (b->marked)
        return;
    b->marked = true;
    o->marked++;
    o->todo[o->ntodo++] = b;
}

static void see(struct oracle *o, struct block *b)
{
    if (b == NULL)
        return;
    b->seen++;
    reach(o, b);
}

static void look_into_all(struct oracle *o)
{
    while (o->ntodo != 0) {
        const struct block *b = o->todo[--o->ntodo];
        for (uint32_t i = 0; i < b->nrefs; i++)
            see(o, b->ref[i]);
    }
}

/* Touched blocks are marked too, and have no holder by that. Returns how many are marked. */
static uint64_t mark_touched(struct oracle *o)
{
    for (uint32_t i = 0; i < o->nblocks; i++)
        if (o->block[i]->touched == o->epoch)
            reach(o, o->block[i]);
    look_into_all(o);
    return o->marked;
}

static void start_cycle(struct oracle *o)
{
    CHECK_OK(sh_start_cycle(&o->lead));
    o->phase = SH_MARK;
    o->epoch = o->epoch == 63 ? 1 : o->epoch + 1;
    o->marked = 0;
    for (uint32_t i = 0; i < o->nblocks; i++) {
        o->block[i]->marked = false;
        o->block[i]->touched = o->block[i]->seen = 0;
    }
}

static void mark(struct oracle *o)
{
    uint64_t marked;
    for (uint32_t i = 0; i < o->pins.n; i++)
        see(o, o->pins.at[i].block);
    for (uint32_t i = 0; i < o->leases.n; i++)
        see(o, o->leases.at[i].block);
    for (uint32_t i = 0; i < NAMES; i++)
        see(o, o->root[i]);
    look_into_all(o);
    o->sees_holders = o->lead.recount_holders;
    CHECK_OK(sh_mark(&o->lead, &marked));
    CHECK(marked == mark_touched(o));
}

static void finish_mark(struct oracle *o)
{
    uint64_t late, before = o->marked;
    CHECK_OK(sh_finish_mark(&o->lead, &late));
    CHECK(late == mark_touched(o) - before);
    o->phase = SH_SWEEP;
}

/* Sweeping */

/* Garbage holds garbage, and what it held that is kept is held less. Nobody touches it by that. */
static void let_go_of_garbage(struct oracle *o, struct block *const *gone, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < gone[i]->nrefs; k++) {
            struct block *to = gone[i]->ref[k];
            if (to != NULL && is_kept(o, to))
                let_go(o, to, false);
            else if (to != NULL)
                to->holders--;
        }
}

/* Returns how much there was, without what went with it. */
static uint32_t free_garbage(struct oracle *o)
{
    struct block **gone = calloc(o->nblocks + 1, sizeof *gone);
    uint32_t n = 0;
    CHECK(gone != NULL);
    for (uint32_t i = 0; i < o->nblocks; i++)
        if (!is_kept(o, o->block[i]))
            gone[n++] = o->block[i];
    let_go_of_garbage(o, gone, n);
    for (uint32_t i = 0; i < n; i++) {
        CHECK(gone[i]->holders == 0);
        forget_block(o, gone[i]);
    }
    free(gone);
    return n;
}

/* Counts that a death left too high come down to the holders that were seen, if nothing touched the
 * block since, and by the coordinator that marked it. */
static void lower_counts(struct oracle *o)
{
    for (uint32_t i = 0; o->sees_holders && i < o->nblocks; i++) {
        struct block *b = o->block[i];
        if (b->touched == o->epoch || b->holders + b->lost <= b->seen)
            continue;
        o->lost -= b->holders + b->lost - b->seen;
        b->lost = b->seen - b->holders;
    }
    o->sees_holders = false;
}

static void sweep(struct oracle *o)
{
    uint64_t blocks, bytes, nblocks = o->nblocks, nbytes = o->bytes;
    uint32_t garbage = free_garbage(o);
    lower_counts(o);
    CHECK_OK(sh_sweep(&o->lead, &blocks, &bytes));
    CHECK(blocks == nblocks - o->nblocks && bytes == nbytes - o->bytes);
    o->swept += blocks;
    if (blocks == garbage)
        no_span_is_empty(o);
}

void cycle(struct oracle *o)
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

void release(struct oracle *o)
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
void reap(struct oracle *o)
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

void succeed(struct oracle *o)
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
