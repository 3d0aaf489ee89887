/*
 * Shared dicts and lists: what is in one before a death, and what its survivors must find.
 *
 * An item is known by one byte, of which its value is full, or the block that it names: item i of a
 * list, or what stands under key i of a dict; 0 is none.
 */
#include "killpoints.h"

#include <string.h>

#define EXTRA (MAX_ITEMS - 1) /* the survivors' own: to change something takes the lock */

static struct sh_key key_of(const uint32_t *number)
{
    return (struct sh_key){.hash = sh_hash(number, 4, 0), .kind = 3, .nbytes = 4, .bytes = number};
}

/* A record to be pinned, a word of a list, or a record that is copied. */
struct sh_value item_value(uint8_t byte)
{
    static uint8_t bytes[300];
    static const uint32_t sizes[] = {300, 4, 30};
    memset(bytes, byte, sizeof bytes);
    return (struct sh_value){.kind = 1, .nbytes = sizes[byte % 3], .bytes = bytes};
}

static uint8_t byte_of_named(struct sh_ctx *c, struct sh_found *f)
{
    struct sh_ref r;
    CHECK(f->nrefs == 1 && f->pinned);
    CHECK_OK(sh_record_ref(c, f, 0, 1000, &r));
    uint8_t byte = r.data[0];
    block_must_be_whole(&r, byte);
    block_drop(c, &r);
    block_drop(c, &f->record);
    return byte;
}

static uint8_t byte_of(struct sh_ctx *c, struct sh_found *f)
{
    if (f->nrefs != 0)
        return byte_of_named(c, f);
    struct sh_value want = item_value(f->value[0]);
    uint8_t byte = f->value[0];
    CHECK(f->kind == want.kind && f->nbytes == want.nbytes);
    CHECK(memcmp(f->value, want.bytes, want.nbytes) == 0);
    if (f->pinned)
        block_drop(c, &f->record);
    return byte;
}

static enum sh_status settled(struct sh_ctx *c, enum sh_status status)
{
    bool done = status == SH_DEFERRED;
    while (status == SH_DEFERRED || (done && status == SH_BUSY))
        status = sh_flush(c, 1000);
    return status;
}

static bool is_list(const struct sh_use *u)
{
    return SH_NODE_KIND(atomic_load(&sh_coll_of(u)->head)) == SH_NODE_LIST;
}

static enum sh_status put(struct sh_ctx *c, struct sh_use *u, uint32_t i, const struct sh_value *v)
{
    struct sh_key k = key_of(&i);
    return is_list(u) ? sh_list_append(c, u, v, 1000) : sh_dict_set(c, u, &k, v, false, 1000);
}

enum sh_status item_put(struct sh_ctx *c, struct sh_use *u, uint32_t i, uint8_t byte)
{
    struct sh_value v = item_value(byte);
    return put(c, u, i, &v);
}

/* A value that names a block. */
enum sh_status item_put_named(struct sh_ctx *c, struct sh_use *u, uint32_t i,
                              const struct sh_ref *r)
{
    struct sh_value v = {.kind = 40, .nrefs = 1, .refs = r, .bytes = ""};
    return put(c, u, i, &v);
}

static enum sh_status pop(struct sh_ctx *c, struct sh_use *u, uint32_t i, uint64_t only,
                          struct sh_found *f)
{
    struct sh_key k = key_of(&i);
    return is_list(u) ? sh_list_pop(c, u, only, 1000, f) : sh_dict_pop(c, u, &k, only, 1000, f);
}

/* What names a block is hard to read: it is read first. */
enum sh_status item_pop(struct sh_ctx *c, struct sh_use *u, uint32_t i, struct sh_found *f)
{
    enum sh_status status = pop(c, u, i, 0, f);
    return status == SH_CHANGED ? pop(c, u, i, f->cell, NULL) : status;
}

enum sh_status item_get(struct sh_ctx *c, struct sh_use *u, uint32_t i, struct sh_found *f)
{
    struct sh_key k = key_of(&i);
    return is_list(u) ? sh_list_get(c, u, i, 1000, f) : sh_dict_get(c, u, &k, 1000, f);
}

/* The witness's, which the victim opens by s->taken. */
void coll_make(struct scene *s, bool list, uint32_t n)
{
    struct sh_ctx *w = &s->witness;
    CHECK_OK((list ? sh_list_new : sh_dict_new)(w, 1000, &s->coll.coll));
    for (uint32_t i = 0; i < n; i++) {
        s->was[i] = s->will[i] = (uint8_t)(i + 1);
        CHECK_OK(settled(w, item_put(w, &s->coll, i, s->was[i])));
    }
    s->taken = handle_of(w, &s->coll.coll);
}

/* What is found, one by one. */
static void look_up(struct scene *s, uint8_t *has)
{
    struct sh_ctx *w = &s->witness;
    for (uint32_t i = 0; i < MAX_ITEMS; i++) {
        struct sh_found f;
        enum sh_status status = settled(w, item_get(w, &s->coll, i, &f));
        CHECK(status == SH_OK || status == SH_ABSENT);
        has[i] = status == SH_OK ? byte_of(w, &f) : 0;
    }
}

/* What is met in a dict, in order of insertion: that of the keys. */
static uint64_t iterate(struct scene *s, uint64_t stamp, const uint8_t *has)
{
    struct sh_ctx *w = &s->witness;
    struct sh_found f;
    uint64_t place = 0, seen = 0;
    uint32_t key, next = 0;
    enum sh_status status;
    while ((status = settled(w, sh_dict_next(w, &s->coll, &place, stamp, 1000, &f))) == SH_OK) {
        memcpy(&key, f.key, 4);
        CHECK(key >= next && key < MAX_ITEMS && byte_of(w, &f) == has[key]);
        next = key + 1;
        seen++;
    }
    CHECK_IS(status, SH_ABSENT);
    return seen;
}

/* The lock that users have is to be had. */
static void lock_and_let(struct scene *s)
{
    CHECK(sh_coll_try(&s->witness, &s->coll) != 0);
    CHECK(sh_coll_let(&s->witness, &s->coll));
}

static void must_have(struct scene *s, const uint8_t *has)
{
    uint8_t now[MAX_ITEMS];
    uint64_t n, stamp, want = 0;
    look_up(s, now);
    CHECK(memcmp(now, has, MAX_ITEMS) == 0);
    for (uint32_t i = 0; i < MAX_ITEMS; i++)
        want += has[i] != 0;
    CHECK_OK(settled(&s->witness, sh_coll_size(&s->witness, &s->coll, 1000, &n, &stamp)));
    CHECK(n == want);
    CHECK(is_list(&s->coll) || iterate(s, stamp, has) == n);
}

/* All of the change has happened, or nothing. That shows before the dead one's lock is taken, and
 * stays so. Room may be short until the dead are reaped. */
void coll_must_be_whole(struct scene *s, bool reaped)
{
    struct sh_ctx *w = &s->witness;
    struct sh_found f;
    uint8_t has[MAX_ITEMS];
    if (s->coll.coll.word == NULL)
        return;
    look_up(s, has);
    CHECK(memcmp(has, s->was, MAX_ITEMS) == 0 || memcmp(has, s->will, MAX_ITEMS) == 0);
    must_have(s, has);
    lock_and_let(s);
    enum sh_status status = settled(w, item_put(w, &s->coll, EXTRA, EXTRA));
    CHECK(status == SH_OK || (status == SH_FULL && !reaped));
    if (status == SH_OK) {
        CHECK_OK(settled(w, item_pop(w, &s->coll, EXTRA, &f)));
        CHECK(byte_of(w, &f) == EXTRA);
    }
    must_have(s, has);
}

void coll_end(struct scene *s)
{
    if (s->coll.coll.word == NULL)
        return;
    CHECK_OK(settled(&s->witness, sh_use_end(&s->witness, &s->coll, 1000)));
    block_drop(&s->witness, &s->coll.coll);
}
