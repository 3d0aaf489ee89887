/* See hammer.h. */
#include "hammer.h"

#include <string.h>

#define NAMES 8u

/* Content */

static void write_content(struct sh_ref *r, uint64_t seed)
{
    memcpy(r->data, &seed, sizeof seed);
    content_write(r->data, sizeof seed, r->nbytes, seed);
}

static void check_content(const struct sh_ref *r)
{
    uint64_t seed;
    memcpy(&seed, r->data, sizeof seed);
    CHECK(seed >> 20 == r->nbytes);
    CHECK(content_is(r->data, sizeof seed, r->nbytes, seed));
}

/* Steps. No room is not a fault: while the coordinator has free runs in hand, others do not see
 * them. */

static bool without_room(struct user *u, enum sh_status status)
{
    bool full = status == SH_FULL || status == SH_LIMIT;
    atomic_fetch_add(&u->mail->full, full);
    return full || status == SH_BUSY;
}

static void flush(struct sh_ctx *c)
{
    while (sh_flush(c, 10000) == SH_BUSY) {
    }
}

static void drop(struct user *u, struct sh_ref *r)
{
    check_content(r);
    block_drop(u->c, r);
    r->nbytes = 0;
}

static uint64_t random_size(struct rng *rng)
{
    uint32_t kind = rng_below(rng, 100);
    if (kind < 70)
        return 8 + rng_below(rng, 600);
    if (kind < 90)
        return 8 + rng_below(rng, 12000);
    if (kind < 97)
        return 8 + rng_below(rng, 66000);
    return 66000 + rng_below(rng, 200000);
}

static void make(struct user *u, struct sh_ref *r)
{
    uint64_t nbytes = random_size(&u->rng);
    bool zero = rng_below(&u->rng, 4) == 0;
    enum sh_status status = sh_alloc(u->c, nbytes, zero, 1000, r);
    if (status != SH_OK) {
        CHECK(without_room(u, status));
        r->nbytes = 0;
        return;
    }
    CHECK(!zero || content_is_zero(r->data, nbytes));
    write_content(r, nbytes << 20 | (++u->count & 0xfffff));
}

static void copy(struct user *u, const struct sh_ref *from, struct sh_ref *to)
{
    enum sh_status status = sh_repin(u->c, from, 10000, to);
    CHECK(status == SH_OK || without_room(u, status));
    if (status != SH_OK)
        to->nbytes = 0;
}

/* Letters */

static struct letter *take_letter(struct user *u)
{
    struct letter *l = &u->mail->letter[rng_below(&u->rng, LETTERS)];
    uint32_t state = atomic_load(&l->state);
    return state <= 1 && atomic_compare_exchange_strong(&l->state, &state, u->id) ? l : NULL;
}

static void open_handle(struct user *u, const struct handle *h, uint64_t nbytes, struct sh_ref *r)
{
    enum sh_status status = handle_open(u->c, h, r);
    if (status == SH_OK) {
        atomic_fetch_add(&u->mail->opened, 1);
        CHECK(r->nbytes == nbytes);
        check_content(r);
        return;
    }
    CHECK(status == SH_STALE || without_room(u, status));
    atomic_fetch_add(&u->mail->stale, status == SH_STALE);
    r->nbytes = 0;
}

static void open_letter(struct user *u, struct sh_ref *r)
{
    struct letter *l = take_letter(u);
    if (l == NULL)
        return;
    bool again = rng_below(&u->rng, 2); /* it stays for others */
    struct handle h = l->handle;
    uint64_t nbytes = l->nbytes;
    if (!again)
        l->nbytes = 0;
    atomic_store(&l->state, l->nbytes != 0);
    if (nbytes != 0)
        open_handle(u, &h, nbytes, r);
}

static void post(struct user *u, struct sh_ref *r)
{
    struct handle h = handle_of(u->c, r);
    bool leased = rng_below(&u->rng, 3) != 0;
    enum sh_status status = leased ? sh_lease_make(u->c, r, 10000, &h.cell, &h.seq) : SH_OK;
    CHECK(status == SH_OK || without_room(u, status));
    struct letter *l = status == SH_OK ? take_letter(u) : NULL;
    struct sh_ref lost = {.nbytes = 0};
    if (l != NULL) {
        struct handle before = l->handle;
        uint64_t nbytes = l->nbytes;
        l->handle = h;
        l->nbytes = r->nbytes;
        atomic_store(&l->state, 1);
        if (nbytes != 0) /* nobody else will open that one */
            open_handle(u, &before, nbytes, &lost);
        if (lost.nbytes != 0)
            drop(u, &lost);
    }
    if (status == SH_OK && leased && (l == NULL || rng_below(&u->rng, 4) == 0)) {
        status = sh_lease_drop(u->c, h.off, h.gen, h.cell, h.seq, 10000); /* too late, perhaps */
        CHECK(status == SH_OK || status == SH_DEFERRED || status == SH_STALE);
    }
    flush(u->c);
}

/* Names */

static void name(struct user *u, struct sh_ref *r)
{
    char text[2] = {'n', (char)('0' + rng_below(&u->rng, NAMES))};
    enum sh_status status = SH_OK;
    if (rng_below(&u->rng, 4) == 0)
        status = sh_root_clear(u->c, text, 2, 10000);
    else if (r->nbytes != 0)
        status = sh_root_set(u->c, text, 2, r, 10000);
    else if ((status = sh_root_get(u->c, text, 2, 10000, r)) == SH_OK)
        check_content(r);
    else
        r->nbytes = 0;
    CHECK(status == SH_OK || status == SH_DEFERRED || status == SH_ABSENT ||
          without_room(u, status));
    flush(u->c);
}

void user_step(struct user *u)
{
    struct sh_ref *r = &u->held[rng_below(&u->rng, HELD)],
                  *other = &u->held[rng_below(&u->rng, HELD)];
    uint32_t what = rng_below(&u->rng, 100);
    if (what < 8)
        name(u, r);
    else if (r->nbytes == 0 && what < 25)
        open_letter(u, r);
    else if (r->nbytes == 0)
        make(u, r);
    else if (what < 25)
        post(u, r);
    else if (what < 32 && other->nbytes == 0)
        copy(u, r, other);
    else
        drop(u, r);
}

void user_drop_all(struct user *u)
{
    for (uint32_t i = 0; i < HELD; i++)
        if (u->held[i].nbytes != 0)
            drop(u, &u->held[i]);
}

void mail_forget(struct mail *m, uint32_t id)
{
    for (uint32_t i = 0; i < LETTERS; i++) {
        uint32_t state = id;
        if (atomic_load(&m->letter[i].state) != id)
            continue;
        m->letter[i].nbytes = 0;
        CHECK(atomic_compare_exchange_strong(&m->letter[i].state, &state, 0));
    }
}

void mail_end(struct mail *m, struct sh_ctx *c)
{
    struct user u = {.c = c, .mail = m, .id = 2};
    for (uint32_t i = 0; i < LETTERS; i++) {
        CHECK(atomic_load(&m->letter[i].state) <= 1);
        if (m->letter[i].nbytes != 0)
            open_handle(&u, &m->letter[i].handle, m->letter[i].nbytes, &u.held[0]);
        if (u.held[0].nbytes != 0)
            drop(&u, &u.held[0]);
    }
    for (uint32_t i = 0; i < NAMES; i++) {
        char text[2] = {'n', (char)('0' + i)};
        enum sh_status status = sh_root_clear(c, text, 2, 1000);
        CHECK(status == SH_OK || status == SH_ABSENT || status == SH_DEFERRED);
        flush(c);
    }
}

void mail_say(const struct mail *m, const struct sh_ctx *c, uint64_t deaths)
{
    printf("   %llu letters opened, %llu stale, %llu times full, %llu deaths, %llu collections\n",
           (unsigned long long)m->opened, (unsigned long long)m->stale, (unsigned long long)m->full,
           (unsigned long long)deaths, (unsigned long long)c->hdr->num_gc);
    fflush(stdout);
}
