/*
 * Shared lists: an array of items. An item is one word: a small value itself, or a reference to the
 * record of a larger one.
 *
 * Reading takes no lock but the own process's, and a copy that is not all of one moment is made
 * again. All changes take the collection's lock:
 *
 *     append   item -> len             a death in between: the item is not there yet
 *     pop      len -> item 0           a death in between: the item is not there any more
 *     splice   another array, with a part of the old one replaced: insert, delete, extend, ...
 *
 * An item at or behind len is nobody's: whoever puts another one there drops it.
 */
#include "core.h"

#include <stdlib.h>
#include <string.h>

#define MIN_ROOM 8u
#define SLICE    128u

static struct sh_array *tail(const struct sh_use *u)
{
    return u->tail;
}

static _Atomic uint64_t *item_at(const struct sh_use *u, uint64_t i)
{
    return &sh_body(u)->ref[i];
}

static uint64_t len_of(const struct sh_use *u)
{
    uint64_t len = atomic_load_explicit(&tail(u)->len, ACQ);
    return len < u->room ? len : u->room;
}

static enum sh_status array_new(struct sh_ctx *c, uint64_t room, int wait_ms, struct sh_ref *r)
{
    room = room < MIN_ROOM ? MIN_ROOM : room;
    if (room > UINT32_MAX / 2)
        return SH_FULL;
    return sh_node_new(c, SH_NODE_ARRAY, (uint32_t)room, sizeof(struct sh_array), wait_ms, r);
}

enum sh_status sh_list_new(struct sh_ctx *c, int wait_ms, struct sh_ref *r)
{
    struct sh_ref body;
    enum sh_status status = array_new(c, 0, wait_ms, &body);
    return status == SH_OK ? sh_coll_new(c, SH_NODE_LIST, &body, 60000, r) : status;
}

/* Nothing is half done that shows. */
static void repair(struct sh_ctx *c, struct sh_use *u)
{
    (void)c;
    sh_coll_changed(u);
}

/* Small values in a word: kind:4 bytes:3 and the bytes, 55 bits of the 62 that a word has which is
 * no reference. */

#define IN_WORD 6u

static bool fits_word(const struct sh_value *v)
{
    return v->kind < 16 && v->nbytes <= IN_WORD && v->nrefs == 0;
}

static uint64_t word_of(const struct sh_value *v)
{
    uint64_t bits = v->kind | (uint64_t)v->nbytes << 4;
    for (uint32_t i = 0; i < v->nbytes; i++)
        bits |= (uint64_t)((const uint8_t *)v->bytes)[i] << (7 + 8 * i);
    return bits >> 23 << 24 | SH_REF_VALUE | (bits & SH_CELL_LOW_MASK);
}

static void read_word(uint64_t word, struct sh_found *f, uint8_t *to)
{
    uint64_t bits = word >> 24 << 23 | (word & SH_CELL_LOW_MASK);
    uint32_t nbytes = (uint32_t)(bits >> 4) & 7u;
    f->kind = bits & 15u;
    f->nbytes = nbytes < IN_WORD ? nbytes : IN_WORD;
    f->key_kind = f->key_form = f->key_bytes = f->nrefs = 0;
    f->pinned = false;
    for (uint32_t i = 0; i < f->nbytes; i++)
        to[i] = (uint8_t)(bits >> (7 + 8 * i));
    f->key = f->value = to;
}

/* An item that nobody holds yet. Locked by the process lock. SH_SLOW: refill for a record. */
static enum sh_status make_item(struct sh_ctx *c, const struct sh_value *v, uint64_t *item)
{
    struct sh_ref r;
    if (fits_word(v)) {
        *item = word_of(v);
        return SH_OK;
    }
    enum sh_status status = sh_record_take(c, NULL, v, v->nrefs != 0, &r);
    if (status == SH_OK)
        *item = sh_cell_of(c, &r);
    return status;
}

/* Puts an item where another one may be. Nobody else writes there. */
static void put(struct sh_ctx *c, _Atomic uint64_t *at, uint64_t item)
{
    sh_swap_ref(c, at, atomic_load_explicit(at, ACQ), item);
}

/* Reading. Locked by the process lock */

/* An item; its value gets there, if it has at most so many bytes and names nothing. */
static enum sh_status look_into(struct sh_ctx *c, const struct sh_use *u, uint64_t i,
                                struct sh_found *f, uint8_t *to, uint32_t room)
{
    struct sh_ref r;
    struct sh_label l;
    uint64_t item = atomic_load_explicit(item_at(u, i), ACQ);
    f->cell = item;
    if (item == 0)
        return SH_AGAIN; /* taken out meanwhile */
    if (item & SH_REF_VALUE) {
        read_word(item, f, to);
        return SH_OK;
    }
    if (!sh_find_cell(c, item, &r) || !sh_record_label(&r, &l))
        return SH_AGAIN;
    enum sh_status status = sh_record_found(c, &r, &l, f, to, room);
    if (status != SH_OK)
        f->pinned = false;
    else if (!f->pinned && atomic_load_explicit(item_at(u, i), ACQ) != item)
        return SH_AGAIN;
    return status;
}

static enum sh_status look(struct sh_ctx *c, const struct sh_use *u, uint64_t i, struct sh_found *f)
{
    return look_into(c, u, i, f, f->small, sizeof f->small);
}

/* -1 is the last item, and so on. False: there is none. */
static bool index_of(int64_t i, uint64_t len, uint64_t *at)
{
    *at = i < 0 ? (uint64_t)i + len : (uint64_t)i;
    return *at < len;
}

/* Once more, with a free block for the record of the value, if there is one. */
static bool once_more(struct sh_ctx *c, const struct sh_value *v, int wait_ms,
                      enum sh_status *status, uint32_t *tries)
{
    if (*status != SH_SLOW || v == NULL)
        return sh_coll_again(c, wait_ms, status, tries);
    *status = sh_record_refill(c, NULL, v, v->nrefs != 0, wait_ms);
    return *status == SH_OK;
}

/* SH_ABSENT: there is no such item. Cost: the process lock. */
enum sh_status sh_list_get(struct sh_ctx *c, struct sh_use *u, int64_t i, int wait_ms,
                           struct sh_found *f)
{
    enum sh_status status;
    uint32_t tries = 0;
    do {
        uint64_t at;
        status = sh_coll_enter(c, u, wait_ms);
        if (status != SH_OK)
            return status;
        status = index_of(i, len_of(u), &at) ? look(c, u, at, f) : SH_ABSENT;
        status = sh_coll_leave(c, status);
    } while (sh_coll_again(c, wait_ms, &status, &tries));
    return status;
}

/* Changing one item. Both locks */

struct change {
    enum sh_status (*make)(struct sh_ctx *, struct sh_use *, const struct change *);
    int64_t i;
    const struct sh_value *v;
    uint64_t only;
    struct sh_found *f;
};

static inline enum sh_status change(struct sh_ctx *c, struct sh_use *u, const struct change *one,
                                    int wait_ms)
{
    enum sh_status status;
    uint32_t tries = 0;
    do {
        status = sh_coll_lock(c, u, repair, wait_ms);
        if (status != SH_OK)
            return status;
        status = sh_coll_done(c, u, one->make(c, u, one));
    } while (once_more(c, one->v, wait_ms, &status, &tries));
    return status;
}

/* A list's stamp: below, how often size or order changed; above, how often an item was set. */
#define SET_ONE (1ull << 32)

static enum sh_status set(struct sh_ctx *c, struct sh_use *u, const struct change *one)
{
    uint64_t at, item;
    if (!index_of(one->i, len_of(u), &at))
        return SH_ABSENT;
    enum sh_status status = make_item(c, one->v, &item);
    if (status != SH_OK)
        return status;
    put(c, item_at(u, at), item);
    sh_bump(&sh_coll_of(u)->stamp, SET_ONE);
    return SH_OK;
}

enum sh_status sh_list_set(struct sh_ctx *c, struct sh_use *u, int64_t i, const struct sh_value *v,
                           int wait_ms)
{
    return change(c, u, &(struct change){.make = set, .i = i, .v = v}, wait_ms);
}

static enum sh_status add(struct sh_ctx *c, struct sh_use *u, const struct change *one)
{
    uint64_t item, len = len_of(u);
    if (len == u->room)
        return SH_ABSENT;
    enum sh_status status = make_item(c, one->v, &item);
    if (status != SH_OK)
        return status;
    put(c, item_at(u, len), item);
    SH_CRASH("list:put");
    atomic_store_explicit(&tail(u)->len, len + 1, REL);
    sh_coll_changed(u);
    return SH_OK;
}

/* SH_BUSY without waiting: it may take long. Cost: the collection's lock, and the process lock; now
 * and then a larger array. */
enum sh_status sh_list_append(struct sh_ctx *c, struct sh_use *u, const struct sh_value *v,
                              int wait_ms)
{
    struct sh_splice larger = {.always = true}; /* the same items */
    enum sh_status status;
    while ((status = change(c, u, &(struct change){.make = add, .v = v}, wait_ms)) == SH_ABSENT) {
        status = sh_list_splice(c, u, &larger, wait_ms);
        if (status != SH_OK && status != SH_DEFERRED)
            break;
    }
    return status;
}

static enum sh_status take_last(struct sh_ctx *c, struct sh_use *u, const struct change *one)
{
    uint64_t len = len_of(u);
    if (len == 0)
        return SH_ABSENT;
    if (one->only != 0 && atomic_load_explicit(item_at(u, len - 1), ACQ) != one->only)
        return SH_CHANGED;
    enum sh_status status = one->f ? look(c, u, len - 1, one->f) : SH_OK;
    if (status == SH_OK && one->f != NULL && one->f->kind >= SH_KIND_HARD)
        return SH_CHANGED;
    if (status != SH_OK)
        return status;
    atomic_store_explicit(&tail(u)->len, len - 1, REL);
    SH_CRASH("list:shorter");
    put(c, item_at(u, len - 1), 0);
    sh_coll_changed(u);
    return SH_OK;
}

/* Takes out the last item. SH_ABSENT: there is none. SH_CHANGED, and only: as of sh_dict_pop. */
enum sh_status sh_list_pop(struct sh_ctx *c, struct sh_use *u, uint64_t only, int wait_ms,
                           struct sh_found *f)
{
    return change(c, u, &(struct change){.make = take_last, .only = only, .f = f}, wait_ms);
}

/* Copies: a part of one moment, in memory of this process's own, because reading must not need any
 * of the heap's. No lock is taken for it: if anything changed meanwhile, it is made again. */

#define PATIENCE 16u /* copies in vain, before one keeps others from changing the list */

/* An item of a copy. Behind it are the value's bytes, or, of one that names blocks: */
struct copied {
    uint32_t kind, nbytes, nrefs, pinned;
    uint8_t bytes[];
};
struct pinned {
    struct sh_ref record;
    const uint8_t *value;
};
#define COPIED_MAX (sizeof(struct copied) + SH_VALUE_MAX)

static uint64_t length_of(const struct copied *one)
{
    uint64_t n = one->pinned ? sizeof(struct pinned) : one->nbytes;
    return sizeof *one + ((n + 7) & ~7ull);
}

/* The next item of a copy; if it is pinned, the caller's to unpin. False: that was all. */
bool sh_copy_next(struct sh_copy *copy, struct sh_found *f)
{
    struct pinned held;
    if (copy->at == copy->used)
        return false;
    const struct copied *one = (const struct copied *)(copy->bytes + copy->at);
    f->key_kind = f->key_form = f->key_bytes = 0;
    f->kind = one->kind;
    f->nbytes = one->nbytes;
    f->nrefs = one->nrefs;
    f->pinned = one->pinned;
    f->value = one->bytes;
    if (f->pinned) {
        memcpy(&held, one->bytes, sizeof held);
        f->record = held.record;
        f->value = held.value;
    }
    f->key = f->value;
    copy->at += length_of(one);
    return true;
}

/* SH_NOMEM: the copy has no room for another one. Locked. */
static enum sh_status copy_item(struct sh_ctx *c, const struct sh_use *u, uint64_t i,
                                struct sh_copy *copy)
{
    struct sh_found f;
    if (copy->room - copy->used < COPIED_MAX)
        return SH_NOMEM;
    struct copied *one = (struct copied *)(copy->bytes + copy->used);
    enum sh_status status = look_into(c, u, i, &f, one->bytes, SH_VALUE_MAX);
    if (status != SH_OK)
        return status;
    *one = (struct copied){f.kind, f.nbytes, f.nrefs, f.pinned};
    if (f.pinned)
        memcpy(one->bytes, &(struct pinned){f.record, f.value}, sizeof(struct pinned));
    copy->used += length_of(one);
    copy->n++;
    SH_CRASH("list:copying");
    return SH_OK;
}

/* What has been copied is of one moment still: nothing was changed since. */
static bool is_whole(const struct sh_use *u, const struct sh_copy *copy)
{
    return u->cell == copy->cell && sh_coll_current(u) &&
           atomic_load_explicit(&sh_coll_of(u)->stamp, ACQ) == copy->stamp;
}

/* Goes on copying. Locked, but for moments between slices. */
static enum sh_status copy_part(struct sh_ctx *c, const struct sh_use *u, uint64_t start,
                                uint64_t stop, struct sh_copy *copy)
{
    enum sh_status status = SH_OK;
    while (status == SH_OK && start + copy->n < stop) {
        status = is_whole(u, copy) ? copy_item(c, u, start + copy->n, copy) : SH_AGAIN;
        if (status == SH_OK && copy->n % SLICE == 0 && start + copy->n < stop)
            sh_coll_breathe(c);
    }
    return status == SH_OK && !is_whole(u, copy) ? SH_AGAIN : status;
}

/* Begins anew. What the copy has is let go, but not the spans of its pins: as many are needed
 * again. Locked, but for moments between slices. */
static void begin_copy(struct sh_ctx *c, const struct sh_use *u, struct sh_copy *copy)
{
    struct sh_found f;
    c->keep_pins = true;
    for (uint64_t n = 0; sh_copy_next(copy, &f); n++) {
        if (n > 0 && n % SLICE == 0)
            sh_coll_breathe(c);
        if (f.pinned)
            sh_unpin_locked(c, &f.record);
    }
    c->keep_pins = false;
    copy->n = copy->used = copy->at = 0;
    copy->cell = u->cell;
    copy->stamp = atomic_load_explicit(&sh_coll_of(u)->stamp, ACQ);
}

static uint64_t bound(int64_t i, uint64_t len)
{
    if (i < 0)
        return -(uint64_t)i < len ? len + (uint64_t)i : 0;
    return (uint64_t)i < len ? (uint64_t)i : len;
}

static enum sh_status try_copy(struct sh_ctx *c, struct sh_use *u, struct sh_copy *copy, bool lock,
                               int wait_ms)
{
    enum sh_status status =
        lock ? sh_coll_lock(c, u, repair, wait_ms) : sh_coll_enter(c, u, wait_ms);
    if (status != SH_OK)
        return status;
    if (!is_whole(u, copy))
        begin_copy(c, u, copy);
    uint64_t len = len_of(u), start = bound(copy->start, len), stop = bound(copy->stop, len);
    if (wait_ms == 0 && stop > start + SLICE)
        status = SH_BUSY; /* it may take long */
    else
        status = copy_part(c, u, start, stop, copy);
    return lock ? sh_coll_done(c, u, status) : sh_coll_leave(c, status);
}

static bool grow(struct sh_copy *copy)
{
    uint64_t room = copy->room != 0 ? 2 * copy->room : 4 * COPIED_MAX;
    uint8_t *bytes = realloc(copy->bytes, room);
    if (bytes == NULL)
        return false;
    copy->bytes = bytes;
    copy->room = room;
    return true;
}

/* The items of a part, of one moment. The caller reads copy to its end, and frees copy->bytes,
 * whatever happened. SH_BUSY without waiting: it may take long. Cost: reads them; the process lock.
 */
enum sh_status sh_list_copy(struct sh_ctx *c, struct sh_use *u, struct sh_copy *copy, int wait_ms)
{
    enum sh_status status;
    uint32_t tries = 0;
    do {
        status = try_copy(c, u, copy, tries > PATIENCE, wait_ms);
        if (status == SH_NOMEM && grow(copy))
            status = SH_AGAIN;
    } while (sh_coll_again(c, wait_ms, &status, &tries));
    return status;
}

/* Many at once */

/* Copies n items; what they name is held once more. The process lock is left between slices. */
static void hold_items(struct sh_ctx *c, _Atomic uint64_t *from, _Atomic uint64_t *to, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        struct sh_ref r;
        uint64_t item = atomic_load_explicit(&from[i], ACQ);
        if (SH_REF_IS_CELL(item) && !sh_hold_cell(c, item, &r))
            item = 0;
        put(c, &to[i], item);
        if (i % SLICE == SLICE - 1)
            sh_coll_breathe(c);
    }
}

/* An array for some items that are to come, pinned: filled by sh_list_stage, one after the other.
 */
enum sh_status sh_list_stage_new(struct sh_ctx *c, uint64_t room, int wait_ms, struct sh_ref *r)
{
    return array_new(c, room, wait_ms, r);
}

static struct sh_use use_of(const struct sh_ref *array)
{
    struct sh_use u = {.body = *array, .kind = SH_NODE_ARRAY};
    sh_coll_measure(&u);
    return u;
}

enum sh_status sh_list_stage(struct sh_ctx *c, const struct sh_ref *stage, const struct sh_value *v,
                             int wait_ms)
{
    struct sh_use u = use_of(stage);
    enum sh_status status;
    uint32_t tries = 0;
    do {
        uint64_t item, len = len_of(&u);
        status = sh_enter(c, wait_ms);
        if (status != SH_OK)
            return status;
        status = len < u.room ? make_item(c, v, &item) : SH_FULL;
        if (status == SH_OK) {
            put(c, item_at(&u, len), item);
            atomic_store_explicit(&tail(&u)->len, len + 1, REL);
        }
        sh_leave(c);
    } while (once_more(c, v, wait_ms, &status, &tries));
    return status;
}

/* The new array: what is before the part, what comes in its place, what is behind it. */
static void fill(struct sh_ctx *c, struct sh_use *u, const struct sh_splice *s,
                 const struct sh_use *to)
{
    uint64_t len = len_of(u), n = 0;
    hold_items(c, item_at(u, 0), item_at(to, 0), s->start);
    if (s->stage != NULL) {
        struct sh_use from = use_of(s->stage);
        n = len_of(&from);
        hold_items(c, item_at(&from, 0), item_at(to, s->start), n);
    }
    hold_items(c, item_at(u, s->stop), item_at(to, s->start + n), len - s->stop);
    atomic_store_explicit(&tail(to)->len, len - (s->stop - s->start) + n, REL);
}

static uint64_t staged(const struct sh_splice *s)
{
    if (s->stage == NULL)
        return 0;
    struct sh_use from = use_of(s->stage);
    return len_of(&from);
}

/* With both locks. SH_CHANGED: the list is not that of the stamp. SH_AGAIN: it is longer than the
 * new array by now. */
static enum sh_status splice(struct sh_ctx *c, struct sh_use *u, const struct sh_splice *s,
                             struct sh_ref *fresh)
{
    struct sh_use to = use_of(fresh);
    struct sh_splice part = *s;
    uint64_t len = len_of(u), stamp = atomic_load_explicit(&sh_coll_of(u)->stamp, RLX);
    if (s->always)
        part.start = part.stop = len;
    else if ((uint32_t)s->stamp != (uint32_t)stamp || (s->exact && s->stamp != stamp) ||
             s->stop > len || s->start > s->stop)
        return SH_CHANGED;
    if (len - (part.stop - part.start) + staged(s) > to.room)
        return SH_AGAIN;
    if (s->always && s->stage == NULL && len < u->room)
        return SH_OK; /* somebody else was faster */
    fill(c, u, &part, &to);
    sh_coll_publish(c, u, fresh);
    return SH_OK;
}

/* Replaces a part of the list by other items, in one step. */
enum sh_status sh_list_splice(struct sh_ctx *c, struct sh_use *u, const struct sh_splice *s,
                              int wait_ms)
{
    struct sh_ref fresh;
    enum sh_status status = SH_AGAIN;
    while (status == SH_AGAIN) {
        uint64_t len, stamp;
        if (wait_ms == 0)
            return SH_BUSY;
        status = sh_coll_size(c, u, wait_ms, &len, &stamp);
        if (status == SH_OK || status == SH_DEFERRED)
            status = array_new(c, (len + staged(s)) * 5 / 4 + MIN_ROOM, wait_ms, &fresh);
        if (status != SH_OK)
            return status;
        status = sh_coll_lock(c, u, repair, wait_ms);
        if (status == SH_OK)
            status = sh_coll_done(c, u, splice(c, u, s, &fresh));
        enum sh_status retired = sh_coll_retire(c, &fresh, 1000);
        status = status == SH_OK ? retired : status;
    }
    return status;
}

/* What is wrong with the books of an array that nobody changes, or NULL. For the check. */
const char *sh_array_fault(const struct sh_use *u)
{
    if (atomic_load_explicit(&tail(u)->len, ACQ) > u->room)
        return "it is longer than its array";
    for (uint64_t i = 0; i < len_of(u); i++) {
        uint64_t item = atomic_load_explicit(item_at(u, i), ACQ);
        if (item == 0 || item & SH_REF_FROZEN)
            return "an item is missing";
    }
    return NULL;
}
