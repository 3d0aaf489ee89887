/*
 * The page heap: runs of pages, free or in use.
 *
 * Problem: find, split and merge runs in a time that does not depend on how many there are, and
 * lose none when a process dies in the middle. Goal: O(1) logged words per operation under the heap
 * lock, and no system call there.
 *
 * Free runs are kept by length, one list per page count up to 64 and eight per doubling beyond.
 * What is wholly or partly committed goes to the head of its list and is used first; what is wholly
 * released goes to the end. A search takes the first list whose every run is long enough:
 *
 *     FREE --take--> RESERVED(owner) --commit--> in use --> RESERVED(owner) --give--> FREE
 *
 * A run that is not FREE is its owner's alone: commit and cut need no lock. Which units of it are
 * released is a fact per unit, so splitting and merging lose nothing (DESIGN section 4, fault 2).
 */
#include "core.h"

#include <errno.h>
#include <string.h>

#define EXACT_BINS   64u
#define TABLE_STEP   512u /* pages whose tables are committed at a time: 28 KiB */
#define SCAN_AT_MOST 4096u

enum sh_status sh_status_of_errno(int error)
{
    switch (error) {
    case 0:
        return SH_OK;
    case ENOSPC:
        return SH_NOSPACE;
    case ENOMEM:
        return SH_NOMEM;
    default:
        errno = error;
        return SH_SYSTEM;
    }
}

/* Lists */

uint32_t sh_bin_of(uint32_t n)
{
    if (n <= EXACT_BINS)
        return n - 1;
    uint32_t log = 31u - (uint32_t)__builtin_clz(n);
    return EXACT_BINS + (log - 6) * 8 + ((n >> (log - 3)) & 7);
}

/* The first bin in which every run has at least n pages. */
static uint32_t bin_that_fits(uint32_t n)
{
    if (n <= EXACT_BINS)
        return n - 1;
    uint32_t log = 31u - (uint32_t)__builtin_clz(n);
    return sh_bin_of(n + (1u << (log - 3)) - 1);
}

static uint64_t link_of(struct sh_ctx *c, uint32_t page)
{
    return atomic_load_explicit(&sh_page(c, page)->link, RLX);
}

static void set_link(struct sh_ctx *c, uint32_t page, uint32_t next, uint32_t prev)
{
    sh_set(c, &c->hdr->heap, &sh_page(c, page)->link, SH_PAIR(next, prev));
}

/* Links are pages below the high-water mark, and neighbours name each other. Where they do not,
 * somebody has written what is not theirs: no step is taken along such a link, so no list is walked
 * in a circle and nothing outside the records is touched. */

static bool torn(struct sh_ctx *c, uint64_t page)
{
    sh_corrupt(c, SH_FAULT_LIST, page);
    return false;
}

static bool is_used(const struct sh_ctx *c, uint64_t page)
{
    return page < atomic_load_explicit(&c->hdr->used_pages, RLX); /* see sh_marks_fit */
}

bool sh_link(struct sh_ctx *c, uint64_t *list, uint32_t page, bool at_end)
{
    uint64_t first = *list;
    if (first == SH_NIL) {
        set_link(c, page, page, page);
        sh_set(c, &c->hdr->heap, list, page);
        return true;
    }
    if (!is_used(c, first) || first == page)
        return torn(c, first);
    uint32_t head = (uint32_t)first;
    uint64_t of_head = link_of(c, head);
    uint32_t last = SH_LO(of_head);
    if (!is_used(c, last) || last == page)
        return torn(c, head);
    uint64_t of_last = link_of(c, last);
    if (SH_HI(of_last) != head)
        return torn(c, last);
    set_link(c, page, head, last);
    if (last == head) {
        set_link(c, head, page, page);
    } else {
        set_link(c, last, page, SH_LO(of_last));
        set_link(c, head, SH_HI(of_head), page);
    }
    if (!at_end)
        sh_set(c, &c->hdr->heap, list, page);
    return true;
}

bool sh_unlink(struct sh_ctx *c, uint64_t *list, uint32_t page)
{
    uint64_t link = link_of(c, page), of_next, of_prev;
    uint32_t next = SH_HI(link), prev = SH_LO(link);
    if (!is_used(c, *list) || !is_used(c, next) || !is_used(c, prev))
        return torn(c, page);
    of_next = link_of(c, next);
    of_prev = link_of(c, prev);
    if (SH_LO(of_next) != page || SH_HI(of_prev) != page)
        return torn(c, page);
    if (next == page) {
        if (*list != page)
            return torn(c, page);
        sh_set(c, &c->hdr->heap, list, SH_NIL);
        return true;
    }
    if (next == prev) {
        set_link(c, next, next, next);
    } else {
        set_link(c, prev, next, SH_LO(of_prev));
        set_link(c, next, SH_HI(of_next), prev);
    }
    if (*list == page)
        sh_set(c, &c->hdr->heap, list, next);
    return true;
}

static void set_bin_bit(struct sh_ctx *c, uint32_t bin)
{
    uint64_t *bits = &c->hdr->bin_bits[bin / 64];
    uint64_t bit = 1ull << (bin % 64);
    uint64_t want = c->hdr->bins[bin] == SH_NIL ? *bits & ~bit : *bits | bit;
    if (want != *bits)
        sh_set(c, &c->hdr->heap, bits, want);
}

static bool bin_insert(struct sh_ctx *c, uint32_t page, uint32_t n, uint64_t released)
{
    uint32_t bin = sh_bin_of(n);
    bool untouched = released == (uint64_t)n * sh_units_per_page(c);
    if (!sh_link(c, &c->hdr->bins[bin], page, untouched))
        return false;
    set_bin_bit(c, bin);
    return true;
}

static bool bin_remove(struct sh_ctx *c, uint32_t page, uint32_t n)
{
    uint32_t bin = sh_bin_of(n);
    if (!sh_unlink(c, &c->hdr->bins[bin], page))
        return false;
    set_bin_bit(c, bin);
    return true;
}

/* Free runs. All of this with the heap lock held */

static void set_span(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    sh_set(c, &c->hdr->heap, &sh_page(c, page)->span, span);
}

static void set_head(struct sh_ctx *c, uint32_t page, uint32_t head, uint64_t released)
{
    sh_set(c, &c->hdr->heap, &sh_page(c, page)->head, SH_PAIR(head, released));
}

static uint64_t released_of(struct sh_ctx *c, uint32_t page)
{
    return SH_LO(atomic_load_explicit(&sh_page(c, page)->head, RLX));
}

static bool is_free(struct sh_ctx *c, uint32_t page, uint32_t *n)
{
    uint64_t span = sh_span(c, page);
    *n = SH_SPAN_NPAGES(span);
    return SH_SPAN_STATE(span) == SH_FREE && *n != 0 && is_used(c, (uint64_t)page + *n - 1);
}

static bool put_free(struct sh_ctx *c, uint32_t page, uint32_t n, uint64_t released)
{
    set_span(c, page, SH_SPAN(SH_FREE, 0, 0, n));
    set_head(c, page, page, released);
    if (n > 1)
        set_head(c, page + n - 1, page, 0);
    return bin_insert(c, page, n, released);
}

/* The free run that ends just before a page, SH_NIL if that page is in use. */
static uint32_t free_run_before(struct sh_ctx *c, uint32_t page)
{
    uint32_t n;
    if (page == 0)
        return SH_NIL;
    uint32_t head = SH_HI(atomic_load_explicit(&sh_page(c, page - 1)->head, RLX));
    if (head < page && is_free(c, head, &n) && head + n == page)
        return head;
    return SH_NIL;
}

/* The length of a run that is ours to give back; 0: it is not, and everybody knows. */
static uint32_t run_of_ours(struct sh_ctx *c, uint32_t page)
{
    uint64_t used = atomic_load_explicit(&c->hdr->used_pages, RLX);
    uint64_t span = page < used && page < c->geo.npages ? sh_span(c, page) : 0;
    uint32_t state = SH_SPAN_STATE(span), n = SH_SPAN_NPAGES(span);
    if ((state == SH_RESERVED || state == SH_RELEASING) && SH_SPAN_OWNER(span) == c->owner &&
        sh_span_fits(c, page, span, used))
        return n;
    sh_corrupt(c, SH_FAULT_GIVEN, page);
    return 0;
}

/* RESERVED or RELEASING becomes FREE, merged with free neighbours. */
static bool give(struct sh_ctx *c, uint32_t page, uint64_t released)
{
    uint32_t n = run_of_ours(c, page), more, after = page + n;
    uint64_t used = atomic_load_explicit(&c->hdr->used_pages, RLX);
    if (n == 0)
        return false;
    if (after < used && !sh_span_fits(c, after, sh_span(c, after), used)) {
        sh_corrupt(c, SH_FAULT_SPAN, after); /* or ours is not as long as it says */
        return false;
    }
    sh_set(c, &c->hdr->heap, &c->hdr->inuse_pages,
           atomic_load_explicit(&c->hdr->inuse_pages, RLX) - n);
    if (after < used && is_free(c, after, &more)) {
        if (!bin_remove(c, after, more))
            return false;
        released += released_of(c, after);
        set_span(c, after, 0);
        n += more;
    }
    uint32_t before = free_run_before(c, page);
    if (before != SH_NIL) {
        more = page - before;
        if (!bin_remove(c, before, more))
            return false;
        released += released_of(c, before);
        set_span(c, page, 0);
        page = before;
        n += more;
    }
    return put_free(c, page, n, released);
}

/* Whether all units of ours are COMMITTED and dirty and were not seen idle, as those of a large
 * block are that comes and goes. If so that is found at the speed of memcmp, each like the next. */
bool sh_units_steady(const struct sh_ctx *c, uint64_t unit, uint64_t n)
{
    const _Atomic uint32_t *u = sh_unit(c, unit);
    return n != 0 && atomic_load_explicit(u, RLX) == (SH_UNIT_COMMITTED | SH_UNIT_DIRTY) &&
           memcmp((const void *)u, (const void *)(u + 1), (n - 1) * sizeof *u) == 0;
}

uint64_t sh_units_released(const struct sh_ctx *c, uint64_t unit, uint64_t n)
{
    const _Atomic uint32_t *u = sh_unit(c, unit);
    uint64_t released = 0;
    if (sh_units_steady(c, unit, n))
        return 0;
    for (uint64_t i = 0; i < n; i++)
        released += SH_UNIT_STATE(atomic_load_explicit(&u[i], RLX)) == SH_UNIT_RELEASED;
    return released;
}

/* How many of a free run's released units are in its first n pages: counted only in a mixed run,
 * and on the shorter side. */
static uint64_t released_in_front(struct sh_ctx *c, uint32_t page, uint32_t n, uint32_t whole)
{
    uint64_t per = sh_units_per_page(c), total = released_of(c, page);
    uint64_t unit = sh_unit_of_page(c, page);
    if (total == 0 || n == whole)
        return total;
    if (total == whole * per)
        return n * per;
    if (n <= whole - n)
        return sh_units_released(c, unit, n * per);
    return total - sh_units_released(c, unit + n * per, (whole - n) * per);
}

/* Takes n pages of a free run; what is before and behind them stays free. */
static bool carve(struct sh_ctx *c, uint32_t head, uint32_t page, uint32_t n, uint64_t span)
{
    uint32_t whole, before = page - head;
    if (!is_used(c, head) || !is_free(c, head, &whole) || whole < before + n)
        return torn(c, head);
    uint64_t released = released_of(c, head);
    uint64_t front = released_in_front(c, head, before, whole);
    uint64_t until = released_in_front(c, head, before + n, whole);
    if (!bin_remove(c, head, whole))
        return false;
    if (before != 0 && !put_free(c, head, before, front))
        return false;
    if (whole > before + n && !put_free(c, page + n, whole - before - n, released - until))
        return false;
    set_head(c, page, page, 0);
    set_span(c, page, span);
    sh_set(c, &c->hdr->heap, &c->hdr->inuse_pages,
           atomic_load_explicit(&c->hdr->inuse_pages, RLX) + n);
    return true;
}

static uint32_t first_bin_from(struct sh_ctx *c, uint32_t bin)
{
    for (uint32_t w = bin / 64; w < (SH_NBINS + 63) / 64; w++) {
        uint64_t bits = c->hdr->bin_bits[w];
        if (w == bin / 64)
            bits &= ~0ull << (bin % 64);
        if (bits != 0)
            return w * 64 + (uint32_t)__builtin_ctzll(bits);
    }
    return SH_NBINS;
}

/* A run of n pages or more in the bin whose runs may be too short; looks at `at_most` of them. What
 * it names, carve looks at. */
static uint64_t search_bin(struct sh_ctx *c, uint32_t n, uint32_t at_most)
{
    uint64_t first = c->hdr->bins[sh_bin_of(n)], page = first;
    for (uint32_t i = 0; page != SH_NIL && i < at_most; i++) {
        if (!is_used(c, page) || SH_SPAN_NPAGES(sh_span(c, (uint32_t)page)) >= n)
            return page;
        page = SH_HI(link_of(c, (uint32_t)page));
        if (page == first)
            break;
    }
    return SH_NIL;
}

static uint64_t find(struct sh_ctx *c, uint32_t n)
{
    uint64_t page = search_bin(c, n, 1); /* most often the run of this length that was freed last */
    if (page != SH_NIL)
        return page;
    uint32_t bin = first_bin_from(c, bin_that_fits(n));
    return bin < SH_NBINS ? c->hdr->bins[bin] : SH_NIL;
}

/* Raises the high-water mark so that a run of n pages ends there. SH_SLOW: *tables says for how
 * many pages the tables must be committed first. */
static enum sh_status grow(struct sh_ctx *c, uint32_t n, uint64_t *tables)
{
    uint64_t used = atomic_load_explicit(&c->hdr->used_pages, RLX);
    uint32_t before = free_run_before(c, (uint32_t)used);
    uint32_t there = before == SH_NIL ? 0 : SH_SPAN_NPAGES(sh_span(c, before));
    if (there >= n)
        return SH_OK;
    uint64_t need = n - there;
    if (used + need > c->geo.npages)
        return SH_FULL;
    if (used + need > atomic_load_explicit(&c->hdr->table_pages, RLX)) {
        *tables = used + need;
        return SH_SLOW;
    }
    sh_set(c, &c->hdr->heap, &c->hdr->used_pages, used + need);
    sh_set(c, &c->hdr->heap, &c->hdr->inuse_pages,
           atomic_load_explicit(&c->hdr->inuse_pages, RLX) + need);
    set_span(c, (uint32_t)used, SH_SPAN(SH_RESERVED, 0, c->owner, need));
    if (!give(c, (uint32_t)used, need * sh_units_per_page(c)))
        return SH_CORRUPT;
    sh_commit(&c->hdr->heap); /* whole in itself */
    return SH_OK;
}

/* Tables of pages below `pages`: records, units, and the sparsest tier of block words. */
static enum sh_status commit_tables(struct sh_ctx *c, uint64_t pages, int wait_ms)
{
    uint64_t to = (pages + TABLE_STEP - 1) / TABLE_STEP * TABLE_STEP;
    if (to > c->geo.npages)
        to = c->geo.npages;
    uint64_t from = atomic_load_explicit(&c->hdr->table_pages, RLX), n = to - from;
    if (to <= from)
        return SH_OK;
    int error =
        sh_os_commit(c, c->geo.pages + from * sizeof(struct sh_page), n * sizeof(struct sh_page));
    if (error == 0)
        error = sh_os_commit(c, c->geo.units + sh_unit_of_page(c, (uint32_t)from) * 4,
                             n * sh_units_per_page(c) * 4);
    if (error == 0)
        error = sh_os_commit(c, c->geo.words[SH_LARGE_TIER] + from * sh_stride(c, SH_LARGE_TIER),
                             n * sh_stride(c, SH_LARGE_TIER));
    if (error != 0)
        return sh_status_of_errno(error);
    enum sh_status s = sh_heap_lock(c, wait_ms);
    if (s != SH_OK)
        return s;
    if (to > atomic_load_explicit(&c->hdr->table_pages, RLX))
        sh_set(c, &c->hdr->heap, &c->hdr->table_pages, to);
    sh_heap_unlock(c);
    return SH_OK;
}

static enum sh_status take_locked(struct sh_ctx *c, uint32_t n, uint32_t *page, uint64_t *tables)
{
    uint64_t at = find(c, n);
    if (at == SH_NIL) {
        enum sh_status s = grow(c, n, tables);
        if (s != SH_OK && s != SH_FULL)
            return s;
        uint32_t end = (uint32_t)atomic_load_explicit(&c->hdr->used_pages, RLX);
        at = s == SH_OK ? free_run_before(c, end) : search_bin(c, n, SCAN_AT_MOST);
        if (at == SH_NIL)
            return SH_FULL;
    }
    if (at > SH_MAX_PAGES)
        return sh_corrupt(c, SH_FAULT_LIST, at);
    *page = (uint32_t)at;
    return carve(c, *page, *page, n, SH_SPAN(SH_RESERVED, 0, c->owner, n)) ? SH_OK : SH_CORRUPT;
}

/* Idle runs that the coordinator releases come back at once; for a moment a heap that has
 * room may look full. */
#define BORROW_NAP_NS 500000
#define BORROW_NAPS   2000u /* a second: longer only if the coordinator was stopped */

static bool runs_are_borrowed(struct sh_ctx *c)
{
    return c->slot_index != 0 && atomic_load(&c->hdr->borrowed_pages) != 0 && sh_alive(c, 0);
}

/* A run of n pages, RESERVED by us. Committed or not: see sh_pages_commit. */
enum sh_status sh_pages_take(struct sh_ctx *c, uint32_t n, int wait_ms, uint32_t *page)
{
    uint32_t naps = 0;
    for (;;) {
        uint64_t tables = 0;
        enum sh_status s = sh_heap_lock(c, wait_ms);
        if (s != SH_OK)
            return s;
        s = take_locked(c, n, page, &tables);
        bool gc = atomic_load_explicit(&c->hdr->inuse_pages, RLX) >=
                  atomic_load_explicit(&c->hdr->gc_trigger_pages, RLX);
        sh_heap_unlock(c);
        if (s == SH_OK && gc)
            sh_want(c, SH_WANT_GC);
        if (s == SH_FULL && naps++ < BORROW_NAPS && runs_are_borrowed(c)) {
            sh_os_nap(BORROW_NAP_NS);
            continue;
        }
        if (s != SH_SLOW)
            return s;
        s = commit_tables(c, tables, wait_ms);
        if (s != SH_OK)
            return s;
    }
}

/* Takes n pages of one particular run if it still is what `span` says, RELEASING. For the
 * coordinator. */
bool sh_pages_take_at(struct sh_ctx *c, uint32_t head, uint64_t span, uint32_t page, uint32_t n)
{
    if (sh_span(c, head) != span || SH_SPAN_STATE(span) != SH_FREE)
        return false;
    return carve(c, head, page, n, SH_SPAN(SH_RELEASING, 0, c->owner, n));
}

void sh_tell_waiters(struct sh_ctx *c)
{
    if (atomic_load_explicit(&c->hdr->waiters, memory_order_seq_cst) != 0) {
        atomic_fetch_add(&c->hdr->freed, 1);
        sh_os_wake(&c->hdr->freed);
    }
}

/* Gives back runs that are RESERVED or RELEASING by us. The counting is done before the lock. */
enum sh_status sh_pages_give(struct sh_ctx *c, const uint32_t *pages, uint32_t n, int wait_ms)
{
    uint64_t released[SH_GIVE_MAX];
    for (uint32_t from = 0; from < n; from += SH_GIVE_MAX) {
        uint32_t some = n - from < SH_GIVE_MAX ? n - from : SH_GIVE_MAX;
        for (uint32_t i = 0; i < some; i++) {
            uint32_t length = run_of_ours(c, pages[from + i]);
            if (length == 0)
                return SH_CORRUPT;
            released[i] = sh_units_released(c, sh_unit_of_page(c, pages[from + i]),
                                            (uint64_t)length * sh_units_per_page(c));
        }
        enum sh_status s = sh_heap_lock(c, wait_ms);
        if (s != SH_OK)
            return s;
        for (uint32_t i = 0; i < some && s == SH_OK; i++) {
            if (give(c, pages[from + i], released[i]))
                sh_commit(&c->hdr->heap);
            else
                s = SH_CORRUPT;
        }
        sh_heap_unlock(c);
        if (s != SH_OK)
            return s;
    }
    sh_tell_waiters(c);
    return SH_OK;
}

/* Committing */

/* Never over the limit, not for a moment: whoever is refused takes nothing from anybody else. */
bool sh_budget(struct sh_ctx *c, uint64_t units)
{
    uint64_t limit = atomic_load_explicit(&c->hdr->limit_units, RLX);
    uint64_t was = atomic_load_explicit(&c->hdr->committed, RLX), now;
    do {
        now = (was & SH_COMMITTED_MASK) + units;
        if (now > limit)
            return false;
    } while (!atomic_compare_exchange_weak_explicit(&c->hdr->committed, &was,
                                                    sh_committed_now(was, now), RLX, RLX));
    if (now > atomic_load_explicit(&c->hdr->look_units, RLX))
        sh_want(c, SH_WANT_LIMIT);
    return true;
}

void sh_unbudget(struct sh_ctx *c, uint64_t units)
{
    uint64_t was = atomic_load_explicit(&c->hdr->committed, RLX);
    while (!atomic_compare_exchange_weak_explicit(
        &c->hdr->committed, &was, sh_committed_now(was, (was & SH_COMMITTED_MASK) - units), RLX,
        RLX)) {
    }
}

void sh_set_units(struct sh_ctx *c, uint64_t unit, uint64_t n, uint32_t value)
{
    for (uint64_t i = 0; i < n; i++)
        atomic_store_explicit(sh_unit(c, unit + i), value, REL);
}

/* Budget and words together, so that the recount sees both or neither. */
static enum sh_status reserve_units(struct sh_ctx *c, uint64_t unit, uint64_t n)
{
    enum sh_status status = sh_enter(c, 1000);
    if (status != SH_OK)
        return status;
    status = sh_budget(c, n) ? SH_OK : SH_LIMIT;
    SH_CRASH("commit:budgeted");
    if (status == SH_OK)
        sh_set_units(c, unit, n, SH_UNIT_RESERVED);
    sh_leave(c);
    return status;
}

static void unreserve_units(struct sh_ctx *c, uint64_t unit, uint64_t n)
{
    while (sh_enter(c, 1000) == SH_BUSY) {
    } /* the units are ours: nothing is left half done */
    sh_set_units(c, unit, n, SH_UNIT_RELEASED);
    sh_unbudget(c, n);
    sh_leave(c);
}

static enum sh_status commit_units(struct sh_ctx *c, uint64_t unit, uint64_t n)
{
    enum sh_status status = reserve_units(c, unit, n);
    if (status != SH_OK)
        return status;
    if (!sh_alive(c, 0))
        c->ring = true; /* whoever finds the coordinator dead starts a successor (I-9) */
    int error = sh_os_commit(c, c->geo.data + (unit << c->geo.unit_shift), n << c->geo.unit_shift);
    if (error != 0) { /* what was committed before the error goes back */
        sh_os_unused(c, c->geo.data + (unit << c->geo.unit_shift), n << c->geo.unit_shift);
        unreserve_units(c, unit, n);
        return sh_status_of_errno(error);
    }
    sh_set_units(c, unit, n, SH_UNIT_COMMITTED);
    return SH_OK;
}

/* Makes every unit of a run that is RESERVED by us usable: committed and without a stamp (I-5). */
enum sh_status sh_pages_commit(struct sh_ctx *c, uint32_t page, uint32_t npages)
{
    uint64_t unit = sh_unit_of_page(c, page), end = unit + (uint64_t)npages * sh_units_per_page(c);
    if (sh_units_steady(c, unit, end - unit))
        return SH_OK;
    while (unit < end) {
        uint32_t u = atomic_load_explicit(sh_unit(c, unit), RLX);
        if (SH_UNIT_STATE(u) == SH_UNIT_COMMITTED) {
            if (SH_UNIT_STAMP(u) != 0)
                atomic_store_explicit(sh_unit(c, unit), u & 7u, RLX);
            unit++;
            continue;
        }
        uint64_t run = 1;
        while (unit + run < end &&
               SH_UNIT_STATE(atomic_load_explicit(sh_unit(c, unit + run), RLX)) == SH_UNIT_RELEASED)
            run++;
        enum sh_status s = commit_units(c, unit, run);
        if (s != SH_OK)
            return s;
        unit += run;
    }
    return SH_OK;
}

/* The longest free run, in pages: also of those that no high-water mark has reached. A hint: of
 * more than SCAN_AT_MOST runs about as long, not all are looked at. */
enum sh_status sh_pages_longest(struct sh_ctx *c, int wait_ms, uint32_t *longest)
{
    enum sh_status s = sh_heap_lock(c, wait_ms);
    if (s != SH_OK)
        return s;
    uint32_t used = (uint32_t)atomic_load_explicit(&c->hdr->used_pages, RLX);
    uint32_t last = free_run_before(c, used);
    *longest = c->geo.npages - used + (last == SH_NIL ? 0 : used - last);
    uint32_t bin = SH_NBINS;
    while (bin > 0 && c->hdr->bins[bin - 1] == SH_NIL)
        bin--;
    uint64_t first = bin > 0 ? c->hdr->bins[bin - 1] : SH_NIL, page = first;
    for (uint32_t i = 0; i < SCAN_AT_MOST && is_used(c, page); i++) {
        uint32_t n = SH_SPAN_NPAGES(sh_span(c, (uint32_t)page));
        *longest = n > *longest ? n : *longest;
        page = SH_HI(link_of(c, (uint32_t)page));
        if (page == first)
            break;
    }
    sh_heap_unlock(c);
    return SH_OK;
}

/* Recovery and walking */

/* The head of the span that a page lies in. Interior records are not all kept: where the hint does
 * not hold, look for the nearest head below. Heap locked. */
uint32_t sh_head_of(const struct sh_ctx *c, uint32_t page)
{
    uint64_t hint = SH_HI(atomic_load_explicit(&sh_page(c, page)->head, RLX));
    if (hint <= page && page - hint < SH_SPAN_NPAGES(sh_span(c, (uint32_t)hint)) &&
        SH_SPAN_STATE(sh_span(c, (uint32_t)hint)) != SH_NONE)
        return (uint32_t)hint;
    uint32_t head = page;
    while (SH_SPAN_STATE(sh_span(c, head)) == SH_NONE)
        if (head-- == 0)
            return SH_NIL;
    return page - head < SH_SPAN_NPAGES(sh_span(c, head)) ? head : SH_NIL;
}

/* Inline as sh_count_up is: each look at a reference asks it. */
inline bool sh_span_fits(const struct sh_ctx *c, uint32_t page, uint64_t span, uint64_t used)
{
    uint32_t state = SH_SPAN_STATE(span), kind = SH_SPAN_KIND(span), n = SH_SPAN_NPAGES(span);
    uint64_t end = (uint64_t)page + n;
    if (state == SH_NONE || state > SH_RETIRED || n == 0 || end > used || used > c->geo.npages)
        return false;
    if (state == SH_SMALL)
        return kind < SH_NCLASSES && n == c->kinds[kind].npages;
    if (state == SH_PINS || state == SH_LEASES)
        return kind == (state == SH_PINS ? SH_KIND_PINS : SH_KIND_LEASES) && n == 1 &&
               SH_SPAN_OWNER(span) != SH_OWNER_NONE;
    return true;
}

static enum sh_status walk_batch(struct sh_ctx *c, struct sh_walk *w)
{
    enum sh_status s = sh_heap_lock(c, c->patience_ms);
    if (s != SH_OK)
        return s;
    uint64_t used = atomic_load_explicit(&c->hdr->used_pages, RLX);
    w->n = w->i = 0;
    uint32_t page = w->next < used ? sh_head_of(c, w->next) : SH_NIL;
    while (page < used && w->n < 128) {
        uint64_t span = sh_span(c, page);
        if (!sh_span_fits(c, page, span, used)) {
            s = sh_corrupt(c, SH_FAULT_SPAN, page);
            break;
        }
        w->page[w->n] = page;
        w->span[w->n++] = span;
        page += SH_SPAN_NPAGES(span);
    }
    if (page == SH_NIL && w->next < used)
        s = sh_corrupt(c, SH_FAULT_SPAN, w->next);
    w->next = page;
    sh_heap_unlock(c);
    return s;
}

/* SH_OK with the next head, or SH_ABSENT at the high-water mark. Start with a zeroed walk. */
enum sh_status sh_walk_next(struct sh_ctx *c, struct sh_walk *w, uint32_t *page, uint64_t *span)
{
    if (w->i == w->n) {
        enum sh_status s = walk_batch(c, w);
        if (s != SH_OK)
            return s;
        if (w->n == 0)
            return SH_ABSENT;
    }
    *page = w->page[w->i];
    *span = w->span[w->i++];
    return SH_OK;
}

static void clear_lists(struct sh_ctx *c)
{
    for (uint32_t i = 0; i < SH_NBINS; i++)
        c->hdr->bins[i] = SH_NIL;
    for (uint32_t i = 0; i < SH_NCLASSES; i++)
        c->hdr->orphans[i] = SH_NIL;
    for (uint32_t i = 0; i < (SH_NBINS + 63) / 64; i++)
        c->hdr->bin_bits[i] = 0;
}

/* Lists and counters from the records, the truth (I-1). Not logged: the lock stays marked as one
 * whose log is bad until this is done. */
enum sh_status sh_pages_rebuild(struct sh_ctx *c)
{
    uint64_t used = atomic_load_explicit(&c->hdr->used_pages, RLX), inuse = 0;
    clear_lists(c);
    for (uint32_t page = 0; page < used;) {
        uint64_t span = sh_span(c, page);
        uint32_t n = SH_SPAN_NPAGES(span), state = SH_SPAN_STATE(span);
        bool linked = true;
        if (!sh_span_fits(c, page, span, used))
            return sh_corrupt(c, SH_FAULT_SPAN, page);
        sh_commit(
            &c->hdr->heap); /* the list functions log; the mark says that this means nothing */
        if (state == SH_FREE)
            linked = put_free(
                c, page, n,
                sh_units_released(c, sh_unit_of_page(c, page), (uint64_t)n * sh_units_per_page(c)));
        else
            inuse += n;
        if (state == SH_SMALL && SH_SPAN_OWNER(span) == SH_OWNER_NONE)
            linked = sh_link(c, &c->hdr->orphans[SH_SPAN_KIND(span)], page, true);
        if (!linked)
            return SH_CORRUPT;
        page += n;
    }
    atomic_store_explicit(&c->hdr->inuse_pages, inuse, RLX);
    return SH_OK;
}

/* Everything under the lock relies on it: what is not below them is no page. */
bool sh_marks_fit(const struct sh_ctx *c)
{
    uint64_t used =
        atomic_load_explicit(&c->hdr->used_pages, ACQ); /* before the other: it follows */
    uint64_t tables = atomic_load_explicit(&c->hdr->table_pages, ACQ);
    return used <= tables && tables <= c->geo.npages;
}

enum sh_status sh_heap_lock(struct sh_ctx *c, int wait_ms)
{
    enum sh_status s = sh_lock(c, &c->hdr->heap, wait_ms);
    if (s != SH_OK && s != SH_CHANGED)
        return s;
    bool fit = sh_marks_fit(c);
    if (s == SH_OK && fit)
        return SH_OK;
    if (!fit)
        sh_corrupt(c, SH_FAULT_USED, atomic_load_explicit(&c->hdr->used_pages, RLX));
    else if (sh_pages_rebuild(c) == SH_OK) {
        sh_lock_rebuilt(&c->hdr->heap);
        return SH_OK;
    }
    sh_heap_unlock(c);
    return SH_CORRUPT;
}
