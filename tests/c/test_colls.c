/*
 * Collections: shared dicts and lists against plain arrays, from two processes, and deaths in the
 * middle of every change.
 */
#include "support.h"

#include <string.h>

#define KEYS 300u

/* Process a is the one that may die, b the witness. */
struct scene {
    struct cast *cast;
    struct sh_ctx *c, *witness, *lead;
    struct sh_use of_c, of_witness;
};

static struct scene *scene_new(bool list)
{
    struct scene *s = calloc(1, sizeof *s);
    s->cast = cast_new(64 << 20, NO_LIMIT);
    s->c = &s->cast->a;
    s->witness = &s->cast->b;
    s->lead = &s->cast->lead;
    CHECK_OK((list ? sh_list_new : sh_dict_new)(s->witness, 1000, &s->of_witness.coll));
    struct handle h = handle_of(s->witness, &s->of_witness.coll);
    CHECK_OK(handle_open(s->c, &h, &s->of_c.coll));
    return s;
}

static void done(struct sh_ctx *c, enum sh_status status)
{
    while (status == SH_DEFERRED || status == SH_BUSY)
        status = sh_flush(c, 1000);
    CHECK_OK(status);
}

static void let_go(struct sh_ctx *c, struct sh_use *u)
{
    done(c, sh_use_end(c, u, 1000));
    block_drop(c, &u->coll);
}

static void scene_end(struct scene *s)
{
    if (s->c->slot != NULL)
        let_go(s->c, &s->of_c);
    let_go(s->witness, &s->of_witness);
    cast_end(s->cast);
    free(s);
}

/* Keys and values are numbers; a large value has many bytes of one kind. */

static struct sh_key key_of(const uint32_t *number)
{
    return (struct sh_key){.hash = sh_hash(number, 4, 0), .kind = 3, .nbytes = 4, .bytes = number};
}

static const uint8_t *filled(uint32_t number)
{
    static uint8_t bytes[400];
    memset(bytes, (int)number, sizeof bytes);
    return bytes;
}

/* The number says what kind of value it is: in a word of a list, small, or pinned to be read. */
static struct sh_value value_of(const uint32_t *number)
{
    if (*number % 3 == 0)
        return (struct sh_value){
            .kind = 5, .nbytes = 200 + *number % 200, .bytes = filled(*number)};
    return (struct sh_value){.kind = *number % 3 == 1 ? 1 : 21, .nbytes = 4, .bytes = number};
}

static bool is_value(struct sh_ctx *c, struct sh_found *f, uint32_t number)
{
    struct sh_value want = value_of(&number);
    bool same = f->kind == want.kind && f->nbytes == want.nbytes &&
                memcmp(f->value, want.bytes, want.nbytes) == 0;
    if (f->pinned)
        block_drop(c, &f->record);
    return same;
}

static enum sh_status got(enum sh_status status, struct sh_ctx *c)
{
    if (status == SH_DEFERRED)
        done(c, status);
    return status == SH_DEFERRED ? SH_OK : status;
}

/* Takes out what was found; hard values in two steps, as their readers do. */

static enum sh_status dict_pop(struct sh_ctx *c, struct sh_use *u, const struct sh_key *k,
                               struct sh_found *f)
{
    enum sh_status status = got(sh_dict_pop(c, u, k, 0, 1000, f), c);
    return status == SH_CHANGED ? got(sh_dict_pop(c, u, k, f->cell, 1000, NULL), c) : status;
}

static enum sh_status list_pop(struct sh_ctx *c, struct sh_use *u, struct sh_found *f)
{
    enum sh_status status = got(sh_list_pop(c, u, 0, 1000, f), c);
    return status == SH_CHANGED ? got(sh_list_pop(c, u, f->cell, 1000, NULL), c) : status;
}

/* Dicts */

static void dict_put(struct sh_ctx *c, struct sh_use *u, uint32_t key, uint32_t number)
{
    struct sh_key k = key_of(&key);
    struct sh_value v = value_of(&number);
    done(c, sh_dict_set(c, u, &k, &v, false, 1000));
}

/* 0: it has none. */
static uint32_t dict_number(struct sh_ctx *c, struct sh_use *u, uint32_t key, uint32_t want)
{
    struct sh_found f;
    struct sh_key k = key_of(&key);
    enum sh_status status = got(sh_dict_get(c, u, &k, 1000, &f), c);
    if (status == SH_ABSENT)
        return 0;
    CHECK_OK(status);
    CHECK(is_value(c, &f, want));
    return want;
}

static void test_a_dict_is_one(void)
{
    struct scene *s = scene_new(false);
    uint32_t want[KEYS] = {0}, live = 0, number = 0;
    struct rng rng = {test_seed()};
    uint64_t n, stamp;
    for (uint64_t step = 0; step < test_scale(60000); step++) {
        bool mine = rng_below(&rng, 2);
        struct sh_ctx *c = mine ? s->c : s->witness;
        struct sh_use *u = mine ? &s->of_c : &s->of_witness;
        uint32_t key = rng_below(&rng, step / 5000 % 2 ? KEYS : 20), op = rng_below(&rng, 100);
        struct sh_key k = key_of(&key);
        struct sh_found f;
        if (op < 45) {
            live += want[key] == 0;
            want[key] = ++number;
            dict_put(c, u, key, number);
        } else if (op < 70) {
            CHECK(dict_number(c, u, key, want[key]) == want[key]);
        } else if (op < 98) {
            enum sh_status status = dict_pop(c, u, &k, &f);
            CHECK_IS(status, want[key] ? SH_OK : SH_ABSENT);
            CHECK(status != SH_OK || is_value(c, &f, want[key]));
            live -= want[key] != 0;
            want[key] = 0;
        } else if (op < 99) {
            struct sh_value v = value_of(&number);
            CHECK_IS(got(sh_dict_set(c, u, &k, &v, true, 1000), c), want[key] ? SH_CHANGED : SH_OK);
            live += want[key] == 0;
            want[key] = want[key] ? want[key] : number;
        } else if (rng_below(&rng, 20) == 0) {
            done(c, sh_dict_clear(c, u, 1000));
            memset(want, 0, sizeof want);
            live = 0;
        }
        done(c, sh_coll_size(c, u, 1000, &n, &stamp));
        CHECK(n == live);
        if (step % 5000 == 0)
            must_be_sound(s->lead, EXACT_COUNTS);
        if (step % 3000 == 0)
            collect(s->lead);
    }
    scene_end(s);
}

/* The order of insertion, and who iterates is told of a change. */
static void test_a_dict_has_an_order(void)
{
    struct scene *s = scene_new(false);
    struct sh_found f;
    uint64_t place = 0, n, stamp;
    for (uint32_t key = 0; key < 100; key++)
        dict_put(s->c, &s->of_c, key * 7 % 101, key + 1);
    uint32_t gone = 7;
    struct sh_key k = key_of(&gone);
    done(s->c, sh_dict_pop(s->c, &s->of_c, &k, 0, 1000, NULL));
    done(s->witness, sh_coll_size(s->witness, &s->of_witness, 1000, &n, &stamp));
    CHECK(n == 99);
    for (uint32_t i = 0; i < 100; i++) {
        if (i == 1)
            continue;
        uint32_t key;
        done(s->witness, sh_dict_next(s->witness, &s->of_witness, &place, stamp, 1000, &f));
        memcpy(&key, f.key, 4);
        CHECK(key == i * 7 % 101 && is_value(s->witness, &f, i + 1));
    }
    CHECK_IS(sh_dict_next(s->witness, &s->of_witness, &place, stamp, 1000, &f), SH_ABSENT);
    dict_put(s->c, &s->of_c, 1000, 1);
    CHECK_IS(sh_dict_next(s->witness, &s->of_witness, &place, stamp, 1000, &f), SH_CHANGED);
    CHECK_OK(dict_pop(s->witness, &s->of_witness, NULL, &f));
    CHECK(is_value(s->witness, &f, 1));
    scene_end(s);
}

/* Values that name blocks keep them, and let them go. */
static void test_values_name_blocks(void)
{
    struct scene *s = scene_new(false);
    struct sh_ref leaf = block_new(s->c, 5000), again;
    struct handle h = handle_of(s->c, &leaf);
    uint32_t key = 5;
    struct sh_key k = key_of(&key);
    struct sh_value v = {.kind = 40, .nrefs = 1, .refs = &leaf, .bytes = ""};
    struct sh_found f;
    done(s->c, sh_dict_set(s->c, &s->of_c, &k, &v, false, 1000));
    block_drop(s->c, &leaf);
    done(s->witness, sh_dict_get(s->witness, &s->of_witness, &k, 1000, &f));
    CHECK(f.pinned && f.nrefs == 1);
    CHECK_OK(sh_record_ref(s->witness, &f, 0, 1000, &again));
    block_drop(s->witness, &f.record);
    CHECK(again.nbytes == 5000);
    block_drop(s->witness, &again);
    dict_put(s->witness, &s->of_witness, key, 1);
    CHECK_IS(handle_open(s->c, &h, &again), SH_STALE);
    scene_end(s);
}

/* What is hard to read is there until it has been read, and what came in its place then stays. */
static void test_hard_values_are_taken_out_last(void)
{
    struct scene *s = scene_new(false);
    struct sh_found f;
    uint32_t key = 1;
    struct sh_key k = key_of(&key);
    dict_put(s->c, &s->of_c, key, 2); /* of kind 21 */
    CHECK_IS(got(sh_dict_pop(s->c, &s->of_c, &k, 0, 1000, &f), s->c), SH_CHANGED);
    CHECK(dict_number(s->witness, &s->of_witness, key, 2) == 2 && is_value(s->c, &f, 2));
    dict_put(s->witness, &s->of_witness, key, 5);
    CHECK_IS(got(sh_dict_pop(s->c, &s->of_c, &k, f.cell, 1000, NULL), s->c), SH_CHANGED);
    CHECK_IS(got(sh_dict_pop(s->c, &s->of_c, NULL, f.cell, 1000, NULL), s->c), SH_CHANGED);
    CHECK_OK(dict_pop(s->c, &s->of_c, &k, &f));
    CHECK_IS(got(sh_dict_pop(s->c, &s->of_c, &k, f.cell, 1000, NULL), s->c), SH_ABSENT);
    CHECK(is_value(s->c, &f, 5) && dict_number(s->c, &s->of_c, key, 0) == 0);
    scene_end(s);
}

/* Lists */

static void part_must_be(struct sh_ctx *c, struct sh_use *u, int64_t start, int64_t stop,
                         const uint32_t *want, uint64_t n)
{
    struct sh_copy copy = {.start = start, .stop = stop};
    struct sh_found f;
    done(c, sh_list_copy(c, u, &copy, 1000));
    CHECK(copy.n == n);
    for (uint64_t i = 0; i < n; i++)
        CHECK(sh_copy_next(&copy, &f) && is_value(c, &f, want[i]));
    CHECK(!sh_copy_next(&copy, &f));
    free(copy.bytes);
}

static void list_fill(struct sh_ctx *c, struct sh_use *u, uint32_t *want, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        struct sh_value v = value_of(&i);
        done(c, sh_list_append(c, u, &v, 1000));
        want[i] = i;
    }
}

static void list_check(struct scene *s, struct sh_ctx *c, struct sh_use *u, const uint32_t *want,
                       uint64_t n)
{
    part_must_be(c, u, 0, INT64_MAX, want, n);
    must_be_sound(s->lead, EXACT_COUNTS);
}

static void list_splice(struct sh_ctx *c, struct sh_use *u, uint32_t *want, uint64_t *n,
                        struct rng *rng, uint32_t *number)
{
    uint64_t len, start, stop;
    struct sh_splice part = {0};
    struct sh_ref stage;
    uint32_t more = rng_below(rng, 6);
    done(c, sh_coll_size(c, u, 1000, &len, &part.stamp));
    CHECK(len == *n);
    part.start = start = rng_below(rng, (uint32_t)len + 1);
    part.stop = stop = start + rng_below(rng, (uint32_t)(len - start) + 1);
    done(c, sh_list_stage_new(c, more, 1000, &stage));
    memmove(want + start + more, want + stop, (len - stop) * sizeof *want);
    for (uint32_t i = 0; i < more; i++) {
        want[start + i] = ++*number;
        struct sh_value v = value_of(number);
        done(c, sh_list_stage(c, &stage, &v, 1000));
    }
    part.stage = &stage;
    done(c, sh_list_splice(c, u, &part, 1000));
    block_drop(c, &stage);
    *n = len - (stop - start) + more;
    part.stamp--; /* of a list that was */
    CHECK_IS(got(sh_list_splice(c, u, &part, 1000), c), SH_CHANGED);
}

static void test_a_list_is_one(void)
{
    struct scene *s = scene_new(true);
    static uint32_t want[100000];
    uint64_t n = 0;
    uint32_t number = 0;
    struct rng rng = {test_seed()};
    struct sh_found f;
    for (uint64_t step = 0; step < test_scale(30000); step++) {
        bool mine = rng_below(&rng, 2);
        struct sh_ctx *c = mine ? s->c : s->witness;
        struct sh_use *u = mine ? &s->of_c : &s->of_witness;
        uint32_t op = rng_below(&rng, 100), at = n ? rng_below(&rng, (uint32_t)n) : 0;
        struct sh_value v = value_of(&number);
        if (op < 40) {
            want[n++] = number;
            done(c, sh_list_append(c, u, &v, 1000));
        } else if (op < 60) {
            enum sh_status status =
                got(sh_list_get(c, u, (int64_t)at - (mine ? (int64_t)n : 0), 1000, &f), c);
            CHECK_IS(status, n ? SH_OK : SH_ABSENT);
            CHECK(n == 0 || is_value(c, &f, want[at]));
        } else if (op < 75) {
            enum sh_status status = got(sh_list_set(c, u, at, &v, 1000), c);
            CHECK_IS(status, n ? SH_OK : SH_ABSENT);
            want[at] = number;
        } else if (op < 97) {
            enum sh_status status = list_pop(c, u, &f);
            CHECK_IS(status, n ? SH_OK : SH_ABSENT);
            CHECK(n == 0 || is_value(c, &f, want[--n]));
        } else {
            list_splice(c, u, want, &n, &rng, &number);
        }
        number++;
        if (step % 2000 == 0)
            list_check(s, c, u, want, n);
        if (step % 3000 == 0)
            collect(s->lead);
    }
    scene_end(s);
}

static void test_parts_of_a_list(void)
{
    static const int64_t ends[] = {INT64_MIN, -301, -300, -2, 0, 7, 299, 300, 301, INT64_MAX};
    struct scene *s = scene_new(true);
    uint32_t want[300];
    list_fill(s->c, &s->of_c, want, 300);
    for (uint32_t i = 0; i < 10; i++)
        for (uint32_t k = 0; k < 10; k++) {
            int64_t from = ends[i] < -300 ? 0 : ends[i] < 0 ? ends[i] + 300 : ends[i];
            int64_t to = ends[k] < -300 ? 0 : ends[k] < 0 ? ends[k] + 300 : ends[k];
            from = from < 300 ? from : 300;
            to = to < 300 ? to : 300;
            part_must_be(s->c, &s->of_c, ends[i], ends[k], want + from,
                         to > from ? (uint64_t)(to - from) : 0);
        }
    scene_end(s);
}

/* The witness changes it while the other one copies. */

static bool set_ends(struct scene *s)
{
    static const uint32_t numbers[] = {1001, 1002};
    enum sh_status status = SH_OK;
    for (uint32_t i = 0; i < 2 && status == SH_OK; i++) {
        struct sh_value v = value_of(&numbers[i]);
        status = sh_list_set(s->witness, &s->of_witness, i == 0 ? 0 : -1, &v, 0);
    }
    return status == SH_OK;
}

static void set_once(void *arg)
{
    CHECK(set_ends(arg));
}

static void set_always(void *arg)
{
    if (set_ends(arg)) /* else it is locked */
        at_moment("list:copying", set_always, arg);
}

static void put_thousand(void *arg)
{
    struct scene *s = arg;
    uint32_t more[1000];
    list_fill(s->witness, &s->of_witness, more, 1000);
}

static void copy_while(void (*act)(void *), uint32_t more)
{
    struct scene *s = scene_new(true);
    uint32_t want[1200];
    list_fill(s->witness, &s->of_witness, want, 200);
    for (uint32_t i = 0; i < more; i++)
        want[200 + i] = i;
    if (more == 0) {
        want[0] = 1001;
        want[199] = 1002;
    }
    at_moment("list:copying", act, s);
    part_must_be(s->c, &s->of_c, 0, INT64_MAX, want, 200 + more);
    MOMENT_CAME("list:copying");
    scene_end(s);
}

/* The old first item and the new last one were never in it together. */
static void test_a_copy_is_of_one_moment(void)
{
    copy_while(set_once, 0);
}

/* Another array has the items by then, and those of the old one went. */
static void test_a_list_grows_while_it_is_copied(void)
{
    copy_while(put_thousand, 1000);
}

/* Who copies comes to an end, however often others change the list. */
static void test_a_list_that_always_changes_is_copied(void)
{
    copy_while(set_always, 0);
}

/* Deaths */

static void change_dict(void *arg)
{
    struct scene *s = arg;
    struct sh_found f;
    for (uint32_t key = 0; key < 40; key++)
        dict_put(s->c, &s->of_c, key, key + 1000);
    for (uint32_t key = 0; key < 40; key += 3) {
        struct sh_key k = key_of(&key);
        done(s->c, sh_dict_pop(s->c, &s->of_c, &k, 0, 1000, NULL));
    }
    CHECK_OK(dict_pop(s->c, &s->of_c, NULL, &f));
    if (f.pinned)
        block_drop(s->c, &f.record);
    done(s->c, sh_dict_clear(s->c, &s->of_c, 1000));
}

static void change_list(void *arg)
{
    struct scene *s = arg;
    struct sh_found f;
    for (uint32_t i = 0; i < 40; i++) {
        struct sh_value v = value_of(&i);
        done(s->c, sh_list_append(s->c, &s->of_c, &v, 1000));
    }
    for (uint32_t i = 0; i < 10; i++) {
        CHECK_OK(list_pop(s->c, &s->of_c, &f));
        if (f.pinned)
            block_drop(s->c, &f.record);
    }
    struct sh_splice part = {.always = true, .stage = NULL};
    done(s->c, sh_coll_size(s->c, &s->of_c, 1000, &part.stop, &part.stamp));
    part.always = false;
    part.stop = 20;
    done(s->c, sh_list_splice(s->c, &s->of_c, &part, 1000));
}

static uint64_t keys_met(struct sh_ctx *c, struct sh_use *u, uint64_t stamp)
{
    struct sh_found f;
    uint64_t place = 0, met = 0;
    for (; got(sh_dict_next(c, u, &place, stamp, 1000, &f), c) == SH_OK; met++)
        if (f.pinned)
            block_drop(c, &f.record);
    return met;
}

/* Who lives on finds a whole dict: each key has its old value or its new one. */
static void dict_must_be_whole(struct scene *s)
{
    struct sh_ctx *c = s->witness;
    struct sh_use *u = &s->of_witness;
    struct sh_found f;
    uint64_t n, stamp;
    for (uint32_t key = 0; key < 40; key++) { /* takes the lock of the dead */
        struct sh_key k = key_of(&key);
        enum sh_status status = got(sh_dict_get(c, u, &k, 1000, &f), c);
        CHECK(status == SH_ABSENT || is_value(c, &f, key + 1000));
    }
    dict_put(c, u, 77, 5);
    CHECK(dict_number(c, u, 77, 5) == 5);
    done(c, sh_coll_size(c, u, 1000, &n, &stamp));
    CHECK(keys_met(c, u, stamp) == n);
    while (dict_pop(c, u, NULL, &f) == SH_OK)
        if (f.pinned)
            block_drop(c, &f.record);
    done(c, sh_coll_size(c, u, 1000, &n, &stamp));
    CHECK(n == 0);
}

static void list_must_be_whole(struct scene *s)
{
    struct sh_ctx *c = s->witness;
    struct sh_use *u = &s->of_witness;
    struct sh_found f;
    uint64_t n, stamp;
    uint32_t more = 500;
    struct sh_value v = value_of(&more);
    done(c, sh_list_append(c, u, &v, 1000)); /* takes the lock of the dead */
    done(c, sh_coll_size(c, u, 1000, &n, &stamp));
    CHECK_OK(list_pop(c, u, &f));
    CHECK(is_value(c, &f, more));
    bool spliced = false; /* 20 to 29 are left, of 0 to 29 */
    for (uint64_t i = 0; i + 1 < n; i++) {
        done(c, sh_list_get(c, u, (int64_t)i, 1000, &f));
        struct sh_found first = f;
        uint32_t number = (uint32_t)i, later = number + 20;
        first.pinned = false;
        spliced |= i == 0 && !is_value(c, &first, 0);
        CHECK(is_value(c, &f, spliced ? later : number));
    }
    CHECK(!spliced || n == 11);
}

static void die_everywhere(bool list, const char *const *points, uint32_t npoints)
{
    for (uint32_t p = 0; p < npoints; p++)
        for (uint32_t n = 1;; n += 1 + n / 8) {
            struct scene *s = scene_new(list);
            bool survived = child_survives(list ? change_list : change_dict, s, points[p], n);
            arena_die(s->c);
            (list ? list_must_be_whole : dict_must_be_whole)(s);
            arena_die(s->lead);
            arena_lead(s->lead, s->cast->fd);
            reap_dead(s->lead, UINT64_MAX);
            collect(s->lead);
            must_be_sound(s->lead, EXACT_COUNTS);
            scene_end(s);
            if (survived)
                break;
            CHECK(n < 100000);
        }
}

static void test_deaths_in_a_dict(void)
{
    static const char *const points[] = {"coll:locked",  "coll:counted", "coll:published",
                                         "dict:placed",  "dict:indexed", "dict:frozen",
                                         "dict:deleted", "node:stored"};
    die_everywhere(false, points, sizeof points / sizeof points[0]);
}

static void test_deaths_in_a_list(void)
{
    static const char *const points[] = {"coll:locked", "coll:counted", "coll:published",
                                         "list:put",    "list:shorter", "node:stored"};
    die_everywhere(true, points, sizeof points / sizeof points[0]);
}

/* Keys 0 and 1 are in it, and key 2 is found; who put it there has the lock and is dead. */
static struct scene *half_inserted(void)
{
    struct scene *s = scene_new(false);
    CHECK(!child_survives(change_dict, s, "dict:indexed", 3));
    arena_die(s->c);
    return s;
}

static void dict_must_go_on(struct scene *s, uint32_t number)
{
    uint64_t n, stamp;
    dict_put(s->witness, &s->of_witness, 77, 5);
    CHECK(dict_number(s->witness, &s->of_witness, 77, 5) == 5);
    CHECK(dict_number(s->witness, &s->of_witness, 2, number) == number);
    done(s->witness, sh_coll_size(s->witness, &s->of_witness, 1000, &n, &stamp));
    CHECK(n == 4);
    reap_dead(s->lead, UINT64_MAX);
    collect(s->lead);
    must_be_sound(s->lead, EXACT_COUNTS);
}

static void replace_two(void *arg)
{
    struct scene *s = arg;
    struct sh_ctx other;
    struct sh_use u = {0};
    struct handle h = handle_of(s->witness, &s->of_witness.coll);
    arena_join(&other, s->cast->fd);
    CHECK_OK(handle_open(&other, &h, &u.coll));
    dict_put(&other, &u, 2, 9);
    let_go(&other, &u);
    arena_leave(&other);
}

/* Repairing took what it had read of a place for what is there: the key was overwritten by the
 * next one. */
static void test_a_key_is_replaced_while_it_is_repaired(void)
{
    struct scene *s = half_inserted();
    at_moment("dict:repairing", replace_two, s);
    dict_must_go_on(s, 9);
    MOMENT_CAME("dict:repairing");
    scene_end(s);
}

/* No page and no pin is to be had any more. */
#define MANY_PINS 100000u

struct crowd {
    struct sh_ref *pins;
    uint32_t n;
    uint64_t limit;
};

static struct crowd crowd_in(struct sh_ctx *c, const struct sh_ref *r)
{
    struct crowd all = {.pins = calloc(MANY_PINS, sizeof *all.pins)};
    all.limit = atomic_exchange(&c->hdr->limit_units, sh_committed_units(c));
    while (all.n < MANY_PINS && sh_repin(c, r, 1000, &all.pins[all.n]) == SH_OK)
        all.n++;
    CHECK(all.n < MANY_PINS);
    return all;
}

static void crowd_out(struct sh_ctx *c, struct crowd *all)
{
    atomic_store(&c->hdr->limit_units, all->limit);
    while (all->n-- > 0)
        block_drop(c, &all->pins[all->n]);
    free(all->pins);
}

/* Who took the lock of a dead one, and had no room for a pin, let go of it as if there was nothing
 * to repair. */
static void test_a_dead_ones_lock_is_taken_without_room(void)
{
    struct scene *s = half_inserted();
    struct sh_ctx *w = s->witness;
    struct crowd all = crowd_in(w, &s->of_witness.coll);
    uint32_t key = 1;
    struct sh_key k = key_of(&key);
    CHECK_IS(sh_dict_pop(w, &s->of_witness, &k, 0, 1000, NULL), SH_LIMIT);
    atomic_store(&w->hdr->limit_units, all.limit);
    dict_must_go_on(s, 1002);
    crowd_out(w, &all);
    scene_end(s);
}

/* Of what names blocks, more than there are pins: if they are let go before there are more, there
 * are never enough. */
static void test_a_copy_takes_many_pins(void)
{
    struct scene *s = scene_new(true);
    struct sh_ref leaf = block_new(s->witness, 50);
    struct sh_copy copy = {.stop = INT64_MAX};
    struct sh_found f;
    struct sh_value v = {.kind = 40, .nrefs = 1, .refs = &leaf, .bytes = ""};
    uint64_t n = 0;
    for (uint32_t i = 0; i < 3000; i++)
        done(s->witness, sh_list_append(s->witness, &s->of_witness, &v, 1000));
    done(s->c, sh_list_copy(s->c, &s->of_c, &copy, 1000));
    for (; sh_copy_next(&copy, &f); n++) {
        CHECK(f.pinned && f.nrefs == 1);
        block_drop(s->c, &f.record);
    }
    CHECK(n == 3000);
    free(copy.bytes);
    block_drop(s->witness, &leaf);
    scene_end(s);
}

/* Copying a list took an array of the heap. */
static void test_a_list_is_copied_without_room(void)
{
    struct scene *s = scene_new(true);
    uint32_t want[1000];
    list_fill(s->witness, &s->of_witness, want, 1000);
    struct crowd all = crowd_in(s->witness, &s->of_witness.coll);
    part_must_be(s->witness, &s->of_witness, 0, INT64_MAX, want, 1000);
    crowd_out(s->witness, &all);
    scene_end(s);
}

static void put_5(void *arg)
{
    struct scene *s = arg;
    dict_put(s->c, &s->of_c, 5, 1);
}

static void pop_1(void *arg)
{
    struct scene *s = arg;
    uint32_t key = 1;
    struct sh_key k = key_of(&key);
    done(s->c, sh_dict_pop(s->c, &s->of_c, &k, 0, 1000, NULL));
}

/* Who asks for the number of keys does not take the lock of the dead. */
static void test_a_dict_is_counted_after_a_death(void)
{
    static const struct {
        void (*act)(void *);
        const char *point;
        uint64_t n;
    } deaths[] = {{put_5, "dict:placed", 5},
                  {put_5, "dict:indexed", 6},
                  {pop_1, "node:stored", 4},
                  {pop_1, "dict:deleted", 4}};
    for (uint32_t i = 0; i < 4; i++) {
        struct scene *s = scene_new(false);
        uint64_t n, stamp, there = 0;
        for (uint32_t key = 0; key < 5; key++)
            dict_put(s->witness, &s->of_witness, key, 1);
        CHECK(!child_survives(deaths[i].act, s, deaths[i].point, 1));
        arena_die(s->c);
        for (uint32_t key = 0; key < 6; key++)
            there += dict_number(s->witness, &s->of_witness, key, 1);
        done(s->witness, sh_coll_size(s->witness, &s->of_witness, 1000, &n, &stamp));
        CHECK(n == there && n == deaths[i].n);
        CHECK(keys_met(s->witness, &s->of_witness, stamp) == n);
        scene_end(s);
    }
}

/* Books that are wrong: the check says so, and of which collection. */

static struct sh_table *table_of(struct sh_use *u)
{
    return u->tail;
}

static _Atomic uint64_t *ref_of(struct sh_use *u, uint32_t i)
{
    return &sh_body(u)->ref[i];
}

/* The word that has it, of those of the index; 0: a free one. */
static _Atomic uint64_t *entry_of(struct sh_use *u, uint32_t place_1)
{
    uint64_t i = 0;
    while (SH_LO(atomic_load(&table_of(u)->index[i])) != place_1)
        i++;
    return &table_of(u)->index[i];
}

static _Atomic uint64_t *used(struct sh_use *u)
{
    return &table_of(u)->used;
}
static _Atomic uint64_t *live(struct sh_use *u)
{
    return &table_of(u)->live;
}
static _Atomic uint64_t *last(struct sh_use *u)
{
    return &table_of(u)->last;
}
static _Atomic uint64_t *entry_3(struct sh_use *u)
{
    return entry_of(u, 3);
}
static _Atomic uint64_t *free_entry(struct sh_use *u)
{
    return entry_of(u, 0);
}
static _Atomic uint64_t *place_2(struct sh_use *u)
{
    return ref_of(u, 2);
}
static _Atomic uint64_t *place_20(struct sh_use *u)
{
    return ref_of(u, 20);
}
static _Atomic uint64_t *head(struct sh_use *u)
{
    return &sh_body(u)->head;
}
static _Atomic uint64_t *body(struct sh_use *u)
{
    return &sh_coll_of(u)->body;
}
static _Atomic uint64_t *len(struct sh_use *u)
{
    return &((struct sh_array *)u->tail)->len;
}

struct damage {
    bool list;
    _Atomic uint64_t *(*at)(struct sh_use *);
    uint64_t to, add; /* added if `to` is 0 */
    const char *found;
};

static const struct damage damages[] = {
    {false, used, 1000, 0, "uses more places"},
    {false, used, 0, 1, "not one entry for each place"},
    {false, used, 0, -1ull, "behind the last one"},
    {false, last, 0, -1ull, "behind the last one"},
    {false, live, 0, 1, "number of keys"},
    {false, live, 0, 1ull << 32, "number of keys"},
    {false, entry_3, 1ull << 60 | 3, 0, "does not find a key"},
    {false, entry_3, 31, 0, "not used"},
    {false, free_entry, 3, 0, "does not find a key"},
    {false, place_2, 0, SH_REF_FROZEN, "frozen"},
    {false, place_20, SH_REF_VALUE, 0, "behind the last one"},
    {false, head, SH_NODE_HEAD(SH_NODE_ARRAY, 32), 0, "is none"},
    {false, head, SH_NODE_HEAD(SH_NODE_RECORD, 32), 0, "is none"},
    {false, body, SH_REF_VALUE, 0, "is none"},
    {true, len, 1000, 0, "longer than its array"},
    {true, len, 0, 1, "missing"},
    {true, head, SH_NODE_HEAD(SH_NODE_TABLE, 4), 0, "is none"},
};

struct finding {
    const char *want;
    uint32_t n;
};

static void look_for(void *arg, const char *invariant, const char *what)
{
    struct finding *f = arg;
    f->n += strcmp(invariant, "I-1") == 0 && strstr(what, f->want) != NULL;
}

static void test_wrong_books(void)
{
    for (uint32_t i = 0; i < sizeof damages / sizeof *damages; i++) {
        const struct damage *d = &damages[i];
        struct scene *s = scene_new(d->list);
        uint32_t numbers[20];
        for (uint32_t key = 0; key < 20 && !d->list; key++)
            dict_put(s->c, &s->of_c, key, 1);
        if (d->list)
            list_fill(s->c, &s->of_c, numbers, 20);
        _Atomic uint64_t *at = d->at(&s->of_c);
        uint64_t was = atomic_load(at);
        struct finding f = {.want = d->found};
        atomic_store(at, d->to ? d->to : was + d->add);
        CHECK_OK(sh_check(s->witness, look_for, &f));
        if (f.n == 0)
            fprintf(stderr, "not found: %s\n", d->found);
        CHECK(f.n == 1);
        atomic_store(at, was);
        must_be_sound(s->lead, EXACT_COUNTS);
        scene_end(s);
    }
}

/* The lock that users have outlives nobody. */
static void test_a_lock_whose_holder_died(void)
{
    struct scene *s = scene_new(false);
    CHECK(sh_coll_try(s->c, &s->of_c) == 1);
    CHECK(sh_coll_try(s->witness, &s->of_witness) == 0);
    CHECK(!sh_coll_let(s->witness, &s->of_witness));
    arena_die(s->c);
    CHECK(sh_coll_try(s->witness, &s->of_witness) == 2);
    CHECK(sh_coll_let(s->witness, &s->of_witness));
    scene_end(s);
}

int main(void)
{
    static const struct test tests[] = {
        {"a_dict_is_one", test_a_dict_is_one},
        {"a_dict_has_an_order", test_a_dict_has_an_order},
        {"values_name_blocks", test_values_name_blocks},
        {"hard_values_are_taken_out_last", test_hard_values_are_taken_out_last},
        {"a_list_is_one", test_a_list_is_one},
        {"parts_of_a_list", test_parts_of_a_list},
        {"a_copy_is_of_one_moment", test_a_copy_is_of_one_moment},
        {"a_list_grows_while_it_is_copied", test_a_list_grows_while_it_is_copied},
        {"a_list_that_always_changes_is_copied", test_a_list_that_always_changes_is_copied},
        {"deaths_in_a_dict", test_deaths_in_a_dict},
        {"deaths_in_a_list", test_deaths_in_a_list},
        {"a_key_is_replaced_while_it_is_repaired", test_a_key_is_replaced_while_it_is_repaired},
        {"a_dead_ones_lock_is_taken_without_room", test_a_dead_ones_lock_is_taken_without_room},
        {"a_copy_takes_many_pins", test_a_copy_takes_many_pins},
        {"a_list_is_copied_without_room", test_a_list_is_copied_without_room},
        {"a_dict_is_counted_after_a_death", test_a_dict_is_counted_after_a_death},
        {"wrong_books", test_wrong_books},
        {"a_lock_whose_holder_died", test_a_lock_whose_holder_died},
    };
    return test_main("colls", tests, sizeof tests / sizeof tests[0]);
}
