/*
 * Shared dicts: a hash table of records, in the order of insertion.
 *
 *     index   hash -> place          open addressing, half empty, never changes an entry
 *     places  references to records  in the order of insertion; 0: deleted
 *
 * Looking up takes no lock but the own process's, and writes nothing. Replacing a value is one
 * compare-and-swap of its place. New keys, deletions and growth take the collection's lock:
 *
 *     insert   record -> place -> index (from here on it is found) -> used
 *     delete   place -> 0
 *
 * A death in the middle of an insertion is put right by who takes the lock next (repair): what is
 * in the index has happened, what is not has not.
 *
 * A table that was replaced is never changed again, and its places become 0 one by one. So what is
 * not found counts only if the table is still the dict's; what is found was there when it was.
 */
#include "core.h"

#define MIN_ROOM 8u
#define MAX_ROOM (UINT32_MAX / 8) /* words of a table have numbers of 32 bits */

static struct sh_table *tail(const struct sh_use *u)
{
    return u->tail;
}

static _Atomic uint64_t *place_at(const struct sh_use *u, uint64_t i)
{
    return &sh_body(u)->ref[i];
}

static uint64_t index_bytes(uint64_t room)
{
    uint64_t n = 1;
    while (n < 2 * room)
        n *= 2;
    return sizeof(struct sh_table) + 8 * n;
}

static enum sh_status table_new(struct sh_ctx *c, uint64_t room, int wait_ms, struct sh_ref *r)
{
    room = room < MIN_ROOM ? MIN_ROOM : room;
    if (room > MAX_ROOM)
        return SH_FULL;
    return sh_node_new(c, SH_NODE_TABLE, (uint32_t)room, index_bytes(room), wait_ms, r);
}

enum sh_status sh_dict_new(struct sh_ctx *c, int wait_ms, struct sh_ref *r)
{
    struct sh_ref body;
    enum sh_status status = table_new(c, 0, wait_ms, &body);
    return status == SH_OK ? sh_coll_new(c, SH_NODE_DICT, &body, 60000, r) : status;
}

/* Looking up. Locked by the process lock */

struct spot {
    uint64_t place, cell; /* what is there, without SH_REF_FROZEN */
    bool frozen;
    struct sh_ref r; /* the record */
    struct sh_label label;
};

static bool unchanged(const struct sh_use *u, const struct spot *s)
{
    uint64_t now = atomic_load_explicit(place_at(u, s->place), ACQ);
    return (now & ~SH_REF_FROZEN) == s->cell;
}

static bool look_at(struct sh_ctx *c, struct spot *s)
{
    return sh_find_cell(c, s->cell, &s->r) && sh_record_label(&s->r, &s->label);
}

/* Whether the key is at a place. What is read there counts if the place has not changed since. */
static bool is_at(struct sh_ctx *c, const struct sh_use *u, uint64_t place,
                  const struct sh_key *key, struct spot *s)
{
    s->place = place;
    for (;;) {
        uint64_t ref = atomic_load_explicit(place_at(u, place), ACQ);
        s->cell = ref & ~SH_REF_FROZEN;
        s->frozen = ref != s->cell;
        if (s->cell == 0)
            return false;
        bool same = look_at(c, s) && sh_label_is(&s->label, key);
        if (unchanged(u, s))
            return same;
    }
}

static bool find(struct sh_ctx *c, const struct sh_use *u, const struct sh_key *key, struct spot *s)
{
    uint64_t i = key->hash, probes = 0;
    for (; probes <= u->mask; i++, probes++) {
        uint64_t at = atomic_load_explicit(&tail(u)->index[i & u->mask], ACQ);
        if (at == 0)
            return false;
        if (SH_HI(at) == (uint32_t)(key->hash >> 32) && SH_LO(at) <= u->room && SH_LO(at) != 0 &&
            is_at(c, u, SH_LO(at) - 1, key, s))
            return true;
    }
    return false;
}

/* SH_ABSENT counts if the table was the dict's. SH_AGAIN: it is another's, or the record went. */
static enum sh_status look_up(struct sh_ctx *c, const struct sh_use *u, const struct sh_key *key,
                              struct spot *s)
{
    if (find(c, u, key, s))
        return SH_OK;
    return sh_coll_current(u) ? SH_ABSENT : SH_AGAIN;
}

static enum sh_status found(struct sh_ctx *c, const struct sh_use *u, const struct spot *s,
                            struct sh_found *f)
{
    enum sh_status status = sh_record_found(c, &s->r, &s->label, f, f->small, sizeof f->small);
    f->cell = s->cell;
    if (status != SH_OK)
        f->pinned = false;
    else if (!f->pinned && !unchanged(u, s))
        return SH_AGAIN;
    return status;
}

/* SH_ABSENT: no such key. Cost: the process lock. */
enum sh_status sh_dict_get(struct sh_ctx *c, struct sh_use *u, const struct sh_key *key,
                           int wait_ms, struct sh_found *f)
{
    enum sh_status status;
    uint32_t tries = 0;
    do {
        struct spot s;
        status = sh_coll_enter(c, u, wait_ms);
        if (status != SH_OK)
            return status;
        status = look_up(c, u, key, &s);
        if (status == SH_OK)
            status = found(c, u, &s, f);
        status = sh_coll_leave(c, status);
    } while (sh_coll_again(c, wait_ms, &status, &tries));
    return status;
}

/* Places and index. Both locks held */

/* NULL: the index is full, which it cannot be. */
static _Atomic uint64_t *free_entry(const struct sh_use *u, uint64_t hash)
{
    for (uint64_t i = hash, n = 0; n <= u->mask; i++, n++)
        if (atomic_load_explicit(&tail(u)->index[i & u->mask], RLX) == 0)
            return &tail(u)->index[i & u->mask];
    return NULL;
}

static enum sh_status torn(struct sh_ctx *c, const struct sh_use *u)
{
    return sh_corrupt(c, SH_FAULT_NODE, sh_word_number(c, u->body.word));
}

static void index_place(_Atomic uint64_t *entry, uint64_t hash, uint64_t place)
{
    atomic_store_explicit(entry, SH_PAIR((uint32_t)(hash >> 32), place + 1), REL);
}

static bool is_indexed(const struct sh_use *u, uint64_t hash, uint64_t place)
{
    for (uint64_t i = hash, n = 0; n <= u->mask; i++, n++) {
        uint64_t at = atomic_load_explicit(&tail(u)->index[i & u->mask], ACQ);
        if (at == 0 || SH_LO(at) == place + 1)
            return at != 0;
    }
    return false;
}

static uint64_t used_of(const struct sh_use *u)
{
    uint64_t used = atomic_load_explicit(&tail(u)->used, ACQ);
    return used < u->room ? used : u->room;
}

/* So many entries, and one more as long as the word is not 0: who asks for their number in the
 * middle of a change, or after a death there, finds what is true (sh_coll_live). */
static void count(const struct sh_use *u, uint64_t n, const _Atomic uint64_t *word)
{
    uint64_t at = word == NULL ? 0 : (uint64_t)(word - place_at(u, 0)) + 1;
    atomic_store_explicit(&tail(u)->live, SH_PAIR(at, n), REL);
}

static void use_place(struct sh_use *u, uint64_t place)
{
    atomic_store_explicit(&tail(u)->used, place + 1, REL);
    atomic_store_explicit(&tail(u)->last, place + 1, RLX);
}

/* A new key. SH_SLOW: refill for its record. */
static enum sh_status insert(struct sh_ctx *c, struct sh_use *u, const struct sh_key *key,
                             const struct sh_value *v)
{
    struct sh_ref r;
    uint64_t place = used_of(u), n = sh_coll_live(u);
    _Atomic uint64_t *entry = free_entry(u, key->hash);
    if (entry == NULL)
        return torn(c, u);
    enum sh_status status = sh_record_take(c, key, v, v->nrefs != 0, &r);
    if (status != SH_OK)
        return status;
    atomic_store_explicit(place_at(u, place), sh_cell_of(c, &r), REL); /* its holder */
    SH_CRASH("dict:placed");
    count(u, n, entry);
    index_place(entry, key->hash, place);
    SH_CRASH("dict:indexed");
    use_place(u, place);
    count(u, n + 1, NULL);
    sh_coll_changed(u);
    return SH_OK;
}

/* The place behind the last: what is in the index is found, and others may replace it while we
 * look. */
static void repair_place(struct sh_ctx *c, struct sh_use *u, uint64_t place)
{
    struct spot s;
    while ((s.cell = atomic_load_explicit(place_at(u, place), ACQ)) != 0) {
        SH_CRASH("dict:repairing");
        if (look_at(c, &s) && is_indexed(u, s.label.hash, place)) {
            use_place(u, place);
            return;
        }
        sh_swap_ref(c, place_at(u, place), s.cell, 0);
    }
}

/* Who had the lock died. */
static void repair(struct sh_ctx *c, struct sh_use *u)
{
    uint64_t place = used_of(u), live = 0;
    sh_thaw(u);
    if (place < u->room)
        repair_place(c, u, place);
    for (uint64_t i = 0; i < used_of(u); i++)
        live += atomic_load_explicit(place_at(u, i), ACQ) != 0;
    count(u, live, NULL);
    atomic_store_explicit(&tail(u)->last, used_of(u), RLX);
    sh_coll_changed(u);
}

/* Growing. The collection's lock is held */

#define SLICE 128u

/* A place of the old table gets into the new one, as *to. False: it has room for fewer. */
static bool copy_place(struct sh_ctx *c, _Atomic uint64_t *from, const struct sh_use *new,
                       uint64_t *to)
{
    struct sh_ref r;
    struct sh_label label;
    uint64_t cell = sh_freeze(from);
    SH_CRASH("dict:frozen");
    if (cell == 0 || !sh_hold_cell(c, cell, &r))
        return true;
    uint64_t hash = sh_record_label(&r, &label) ? label.hash : 0;
    _Atomic uint64_t *entry = *to < new->room ? free_entry(new, hash) : NULL;
    if (entry == NULL) {
        sh_count_down(c, &r, sh_phase(c));
        return false;
    }
    atomic_store_explicit(place_at(new, *to), cell, REL);
    index_place(entry, hash, (*to)++);
    return true;
}

/* Fills the new table. Both locks are held, and again at the end; the process lock is left between
 * slices. */
static enum sh_status fill(struct sh_ctx *c, const struct sh_use *old, const struct sh_use *new,
                           bool empty)
{
    uint64_t to = 0;
    for (uint64_t from = 0; from < used_of(old); from++) {
        if (empty)
            sh_freeze(place_at(old, from));
        else if (!copy_place(c, place_at(old, from), new, &to))
            return torn(c, old);
        if (from % SLICE == SLICE - 1)
            sh_coll_breathe(c);
    }
    atomic_store_explicit(&tail(new)->used, to, RLX);
    count(new, to, NULL);
    atomic_store_explicit(&tail(new)->last, to, RLX);
    return SH_OK;
}

/* The new table, which is filled, in the place of the old one, which is *fresh then. */
static enum sh_status move_into(struct sh_ctx *c, struct sh_use *u, struct sh_ref *fresh,
                                bool empty)
{
    struct sh_use new = {.body = *fresh, .kind = SH_NODE_TABLE};
    sh_coll_measure(&new);
    enum sh_status status = fill(c, u, &new, empty);
    if (status == SH_OK)
        sh_coll_publish(c, u, fresh);
    return status;
}

/* A larger table, or one without the places of what was deleted, or an empty one. SH_BUSY without
 * waiting: it may take long. */
static enum sh_status replace_table(struct sh_ctx *c, struct sh_use *u, bool empty, int wait_ms)
{
    if (wait_ms == 0)
        return SH_BUSY;
    struct sh_ref fresh;
    uint64_t live, stamp;
    enum sh_status status = sh_coll_size(c, u, wait_ms, &live, &stamp);
    if (status == SH_OK || status == SH_DEFERRED)
        status = table_new(c, empty ? 0 : 2 * live, wait_ms, &fresh);
    if (status != SH_OK)
        return status;
    status = sh_coll_lock(c, u, repair, wait_ms);
    if (status == SH_OK) {
        live = sh_coll_live(u);
        bool fits = SH_NODE_NREFS(((struct sh_node *)fresh.data)->head) > live;
        if (empty || (fits && used_of(u) == u->room)) /* else somebody was faster */
            status = move_into(c, u, &fresh, empty);
        status = sh_coll_done(c, u, status);
    }
    enum sh_status retired = sh_coll_retire(c, &fresh, 1000);
    return status == SH_OK ? retired : status;
}

enum sh_status sh_dict_clear(struct sh_ctx *c, struct sh_use *u, int wait_ms)
{
    return replace_table(c, u, true, wait_ms);
}

/* Setting */

/* The value of a key that is there, without the collection's lock. SH_AGAIN: it is not there as it
 * was any more. SH_CHANGED: the place is frozen. */
static enum sh_status replace(struct sh_ctx *c, struct sh_use *u, const struct sh_key *key,
                              const struct sh_value *v, const struct spot *s)
{
    struct sh_ref r;
    struct sh_key kept = *key;
    kept.form =
        SH_RECORD_FORM(s->label.kinds); /* as in a dict, the key stays that was there first */
    enum sh_status status = sh_record_take(c, &kept, v, v->nrefs != 0, &r);
    if (status != SH_OK)
        return status;
    if (!s->frozen && sh_swap_found(c, place_at(u, s->place), s->cell, &s->r, sh_cell_of(c, &r)))
        return SH_OK;
    sh_count_down(c, &r, sh_phase(c)); /* nobody ever held it */
    return s->frozen ? SH_CHANGED : SH_AGAIN;
}

static enum sh_status try_replace(struct sh_ctx *c, struct sh_use *u, const struct sh_key *key,
                                  const struct sh_value *v, bool must_be_new, int wait_ms)
{
    struct spot s;
    enum sh_status status = sh_coll_enter(c, u, wait_ms);
    if (status != SH_OK)
        return status;
    status = look_up(c, u, key, &s);
    if (status == SH_OK)
        status = must_be_new ? SH_CHANGED : replace(c, u, key, v, &s);
    else if (status == SH_ABSENT)
        status = SH_ABSENT;
    return sh_coll_leave(c, status);
}

/* With the collection's lock. SH_ABSENT: there is no place left. */
static enum sh_status set_locked(struct sh_ctx *c, struct sh_use *u, const struct sh_key *key,
                                 const struct sh_value *v, bool must_be_new, int wait_ms)
{
    struct spot s;
    enum sh_status status = sh_coll_lock(c, u, repair, wait_ms);
    if (status != SH_OK)
        return status;
    if (find(c, u, key, &s))
        status = must_be_new ? SH_CHANGED : replace(c, u, key, v, &s);
    else if (used_of(u) == u->room)
        status = SH_ABSENT;
    else
        status = insert(c, u, key, v);
    return sh_coll_done(c, u, status);
}

/* The key stands for the value from now on; with must_be_new: unless it stands for one already
 * (SH_CHANGED). Atomic. Cost: of a key that is there the process lock, an allocation and a
 * compare-and-swap; of a new one the collection's lock, and now and then a larger table. */
enum sh_status sh_dict_set(struct sh_ctx *c, struct sh_use *u, const struct sh_key *key,
                           const struct sh_value *v, bool must_be_new, int wait_ms)
{
    for (;;) {
        enum sh_status status = try_replace(c, u, key, v, must_be_new, wait_ms);
        bool there = status == SH_CHANGED && must_be_new;
        if (status == SH_ABSENT || (status == SH_CHANGED && !there)) {
            status = set_locked(c, u, key, v, must_be_new, wait_ms);
            there = status == SH_CHANGED && must_be_new;
        }
        if (status == SH_ABSENT) { /* no place left */
            status = replace_table(c, u, false, wait_ms);
            if (status == SH_DEFERRED)
                status = sh_flush(c, 1000);
            status = status == SH_OK ? SH_AGAIN : status;
        } else if (status == SH_SLOW) {
            status = sh_record_refill(c, key, v, v->nrefs != 0, wait_ms);
            status = status == SH_OK ? SH_AGAIN : status;
        }
        if (there || status != SH_AGAIN)
            return status;
    }
}

/* Deleting. Both locks held */

/* SH_AGAIN: what is there was replaced meanwhile, without the lock. */
static enum sh_status delete(struct sh_ctx *c, struct sh_use *u, const struct spot *s)
{
    uint64_t n = sh_coll_live(u);
    count(u, n - 1, place_at(u, s->place));
    bool gone = sh_swap_found(c, place_at(u, s->place), s->cell, &s->r, 0);
    SH_CRASH("dict:deleted");
    count(u, n - gone, NULL);
    if (!gone)
        return SH_AGAIN;
    sh_coll_changed(u);
    return SH_OK;
}

static enum sh_status pop_spot(struct sh_ctx *c, struct sh_use *u, const struct spot *s,
                               uint64_t only, struct sh_found *f)
{
    if (only != 0 && s->cell != only)
        return SH_CHANGED;
    enum sh_status status = f ? found(c, u, s, f) : SH_OK;
    if (status == SH_OK && f != NULL && f->kind >= SH_KIND_HARD)
        return SH_CHANGED;
    if (status == SH_OK)
        status = delete(c, u, s);
    if (status == SH_AGAIN && f != NULL && f->pinned)
        sh_unpin_locked(c, &f->record);
    return status;
}

static bool last_spot(struct sh_ctx *c, struct sh_use *u, struct spot *s)
{
    uint64_t last = atomic_load_explicit(&tail(u)->last, RLX);
    for (s->place = last < used_of(u) ? last : used_of(u); s->place-- > 0;) {
        s->cell = atomic_load_explicit(place_at(u, s->place), ACQ) & ~SH_REF_FROZEN;
        if (s->cell == 0 || !look_at(c, s))
            continue;
        atomic_store_explicit(&tail(u)->last, s->place + 1, RLX);
        return true;
    }
    atomic_store_explicit(&tail(u)->last, 0, RLX);
    return false;
}

/* Deletes a key, or that which came last (NULL), and says what it stood for (f may be NULL).
 * SH_ABSENT: there is none. SH_CHANGED: it is hard to read, and is still there. When it has been
 * read, f->cell says what is to be deleted, and nothing else (only; then SH_CHANGED: it is another
 * one by now). So what nobody could read is not lost. */
enum sh_status sh_dict_pop(struct sh_ctx *c, struct sh_use *u, const struct sh_key *key,
                           uint64_t only, int wait_ms, struct sh_found *f)
{
    enum sh_status status;
    uint32_t tries = 0;
    do {
        struct spot s;
        status = sh_coll_lock(c, u, repair, wait_ms);
        if (status != SH_OK)
            return status;
        bool there = key != NULL ? find(c, u, key, &s) : last_spot(c, u, &s);
        status = sh_coll_done(c, u, there ? pop_spot(c, u, &s, only, f) : SH_ABSENT);
    } while (sh_coll_again(c, wait_ms, &status, &tries));
    return status;
}

/* Iterating */

/* The place behind the last one may be a key's already: it is from the index on. */
static enum sh_status next(struct sh_ctx *c, struct sh_use *u, uint64_t *place, struct sh_found *f)
{
    for (uint64_t used = used_of(u); *place <= used && *place < u->room; ++*place) {
        struct spot s = {.place = *place};
        s.cell = atomic_load_explicit(place_at(u, *place), ACQ) & ~SH_REF_FROZEN;
        if (s.cell == 0)
            continue;
        if (!look_at(c, &s))
            return SH_AGAIN;
        if (*place == used && !is_indexed(u, s.label.hash, *place))
            break;
        enum sh_status status = found(c, u, &s, f);
        *place += status == SH_OK;
        return status;
    }
    return SH_ABSENT;
}

/* What is at *place, or the next one behind it; *place is behind that then. SH_ABSENT: nothing
 * more. SH_CHANGED: size or order are not those of the stamp any more. */
enum sh_status sh_dict_next(struct sh_ctx *c, struct sh_use *u, uint64_t *place, uint64_t stamp,
                            int wait_ms, struct sh_found *f)
{
    enum sh_status status;
    uint32_t tries = 0;
    do {
        status = sh_coll_enter(c, u, wait_ms);
        if (status != SH_OK)
            return status;
        if (atomic_load_explicit(&sh_coll_of(u)->stamp, ACQ) != stamp)
            status = SH_CHANGED;
        else
            status = next(c, u, place, f);
        status = sh_coll_leave(c, status);
    } while (sh_coll_again(c, wait_ms, &status, &tries));
    return status;
}

/* The check's. Nobody changes size or order; values may be replaced */

/* Whether the key at a place is found by the i-th entry of the index, the last of a run of so many.
 */
static bool is_found_by(struct sh_ctx *c, const struct sh_use *u, uint64_t i, uint64_t run)
{
    uint64_t at = atomic_load_explicit(&tail(u)->index[i & u->mask], ACQ);
    struct spot s = {.place = SH_LO(at) - 1};
    bool there;
    do {
        s.cell = atomic_load_explicit(place_at(u, s.place), ACQ);
        there = look_at(c, &s);
    } while (!unchanged(u, &s));
    return there && SH_HI(at) == (uint32_t)(s.label.hash >> 32) &&
           ((i - s.label.hash) & u->mask) < run;
}

/* Entries, and those of them that lead to a key. NULL, or what is wrong. */
static const char *index_fault(struct sh_ctx *c, const struct sh_use *u, uint64_t *entries,
                               uint64_t *keys)
{
    uint64_t first = 0, run = 0, i;
    while (first <= u->mask && atomic_load_explicit(&tail(u)->index[first], ACQ) != 0)
        first++;
    for (i = first; i < first + u->mask + 1; i++) { /* no run goes over its end */
        uint64_t at = atomic_load_explicit(&tail(u)->index[i & u->mask], ACQ);
        run = at == 0 ? 0 : run + 1;
        *entries += at != 0;
        if (at == 0)
            continue;
        if (SH_LO(at) == 0 || SH_LO(at) > used_of(u))
            return "its index leads to a place that is not used";
        if (atomic_load_explicit(place_at(u, SH_LO(at) - 1), ACQ) == 0)
            continue;
        if (!is_found_by(c, u, i, run))
            return "its index does not find a key";
        ++*keys;
    }
    return NULL;
}

/* What is wrong with the books of a table, or NULL. Locked. Cost: reads all of it. */
const char *sh_table_fault(struct sh_ctx *c, const struct sh_use *u)
{
    uint64_t used = atomic_load_explicit(&tail(u)->used, ACQ), there = 0, entries = 0, keys = 0;
    uint64_t last = atomic_load_explicit(&tail(u)->last, ACQ);
    if (used > u->room)
        return "it uses more places than it has";
    for (uint64_t i = 0; i < u->room; i++) {
        uint64_t place = atomic_load_explicit(place_at(u, i), ACQ);
        if (place != 0 && (i >= used || i >= last))
            return "a key is at a place behind the last one";
        if (place & SH_REF_FROZEN)
            return "a place is frozen";
        there += place != 0;
    }
    const char *fault = index_fault(c, u, &entries, &keys);
    if (fault != NULL)
        return fault;
    if (entries != used || keys != there)
        return "its index has not one entry for each place";
    return atomic_load_explicit(&tail(u)->live, ACQ) != there ? "its number of keys is wrong"
                                                              : NULL;
}
