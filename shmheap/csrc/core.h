/*
 * What the core's files share among themselves: access to the shared tables by number, and the
 * functions of each room. Bounds are checked where a number comes out of shared memory.
 */
#ifndef SHMHEAP_CORE_H
#define SHMHEAP_CORE_H

#include "shmheap.h"

#include <stddef.h>

/* Named points, for the C tests alone: they bring what happens there, such as a death. All of them:
 * docs/reference/crash-points.md. */
#ifdef SH_CRASH_POINTS
void sh_crash_point(const char *name);
#define SH_CRASH(name) sh_crash_point(name)
#else
#define SH_CRASH(name) ((void)0)
#endif

#define ACQ  memory_order_acquire
#define REL  memory_order_release
#define RLX  memory_order_relaxed
#define ACQR memory_order_acq_rel

/* Span records */

#define SH_OWNER_NONE     0ull /* slot 0 with incarnation 0: nobody */
#define SH_SPAN_STATE(s)  ((uint32_t)((s) >> 60))
#define SH_SPAN_KIND(s)   ((uint32_t)((s) >> 53) & 0x7fu)
#define SH_SPAN_OWNER(s)  ((s) & SH_OWNER_MASK)
#define SH_SPAN_SLOT(s)   ((uint32_t)((s) >> 43) & 0x3ffu)
#define SH_SPAN_NPAGES(s) ((uint32_t)((s) & 0xfffffffu))
#define SH_OWNER_MASK     (0x1ffffffull << 28)
#define SH_OWNER(slot, incarnation) \
    ((uint64_t)(slot) << 43 | (uint64_t)((incarnation) & 0x7fffu) << 28)
#define SH_SPAN(state, kind, owner, n) \
    ((uint64_t)(state) << 60 | (uint64_t)(kind) << 53 | (owner) | (uint64_t)(n))

#define SH_PAIR(hi, lo) ((uint64_t)(hi) << 32 | (uint32_t)(lo))
#define SH_HI(pair)     ((uint32_t)((pair) >> 32))
#define SH_LO(pair)     ((uint32_t)(pair))

static inline struct sh_page *sh_page(const struct sh_ctx *c, uint32_t page)
{
    return (struct sh_page *)(c->base + c->geo.pages) + page;
}

static inline uint64_t sh_span(const struct sh_ctx *c, uint32_t page)
{
    return atomic_load_explicit(&sh_page(c, page)->span, ACQ);
}

static inline void sh_set_span(struct sh_ctx *c, uint32_t page, uint64_t span)
{
    atomic_store_explicit(&sh_page(c, page)->span, span, REL);
}

static inline uint32_t sh_slots_used(const struct sh_ctx *c)
{
    uint32_t n = atomic_load_explicit(&c->hdr->slots_used, ACQ);
    return n < SH_MAX_SLOTS ? n : SH_MAX_SLOTS;
}

static inline _Atomic uint32_t *sh_unit(const struct sh_ctx *c, uint64_t unit)
{
    return (_Atomic uint32_t *)(c->base + c->geo.units) + unit;
}

static inline uint32_t sh_units_per_page(const struct sh_ctx *c)
{
    return 1u << (c->geo.page_shift - c->geo.unit_shift);
}

static inline uint64_t sh_unit_of_page(const struct sh_ctx *c, uint32_t page)
{
    return (uint64_t)page << (c->geo.page_shift - c->geo.unit_shift);
}

static inline uint8_t *sh_data(const struct sh_ctx *c, uint32_t page)
{
    return c->base + c->geo.data + ((uint64_t)page << c->geo.page_shift);
}

static inline struct sh_slot *sh_slot(const struct sh_ctx *c, uint32_t slot)
{
    return (struct sh_slot *)(c->base + c->geo.slots) + slot;
}

/* The bytes of the file whose locks say that a coordinator is starting (I-9), and that the slot's
 * process lives (I-8). */
#define SH_START_BYTE offsetof(struct sh_header, started)

static inline uint64_t sh_slot_byte(const struct sh_ctx *c, uint32_t slot)
{
    return c->geo.slots + slot * sizeof(struct sh_slot);
}

/* Bytes of block words that a page has in a tier, and their logarithm. */
static inline uint32_t sh_stride_shift(const struct sh_ctx *c, uint32_t tier)
{
    return c->geo.page_shift - 1 - 2 * tier;
}

static inline uint64_t sh_stride(const struct sh_ctx *c, uint32_t tier)
{
    return 1ull << sh_stride_shift(c, tier);
}

/* The words of the span that starts at a page run on from that page's slot in the tier. */
static inline _Atomic uint64_t *sh_words(const struct sh_ctx *c, uint32_t page, uint32_t tier)
{
    return (_Atomic uint64_t *)(c->base + c->geo.words[tier] + page * sh_stride(c, tier));
}

static inline uint64_t sh_word_number(const struct sh_ctx *c, const _Atomic uint64_t *word)
{
    return (uint64_t)((const uint8_t *)word - c->base) / 8;
}

/* Block words for what is larger than a size class: one, in the sparsest tier. */
#define SH_LARGE_TIER (SH_NTIERS - 1)

static inline uint64_t sh_add(_Atomic uint64_t *counter, uint64_t n)
{
    return atomic_fetch_add_explicit(counter, n, RLX);
}

/* Adds to a counter that only this holder of a lock writes. */
static inline void sh_bump(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, RLX) + n, RLX);
}

/* os.c: the only mmap, madvise, fallocate, futex and fork */
int sh_os_resize(int fd, uint64_t bytes); /* 0, or -1 and errno */
void *sh_os_map(int fd, uint64_t bytes, bool writable);
void sh_os_dumped(struct sh_ctx *);
void sh_os_unmap(void *at, uint64_t bytes);
int sh_os_copy(int fd, uint64_t off, uint64_t bytes, uint8_t *to); /* 0 or errno */
void *sh_os_private(uint64_t bytes);
void *sh_os_wiped_on_fork(void);
int sh_os_commit(struct sh_ctx *, uint64_t off, uint64_t bytes); /* 0 or errno */
int sh_os_unused(struct sh_ctx *, uint64_t off, uint64_t bytes); /* 0 or errno */
bool sh_os_fd_is_ours(const struct sh_ctx *);
void sh_os_close(const struct sh_ctx *);
void *sh_os_hold_byte(const struct sh_ctx *, uint64_t byte,
                      bool inherited); /* NULL and errno EAGAIN: another has it */
void sh_os_not_inherited(void *held);
void sh_os_let_go(void *held);
bool sh_os_byte_is_held(const struct sh_ctx *, uint64_t byte);
uint64_t sh_os_now_ns(void);
uint64_t sh_os_pid_namespace(void);
int sh_os_wait(_Atomic uint32_t *word, uint32_t seen, int wait_ms); /* 0 or errno */
void sh_os_wake(_Atomic uint32_t *word);
#define SH_LOG_FAILED 0x80
int sh_os_spawn_detached(char *const argv[], const char *log_path, int input); /* 0 or errno */
void sh_os_nap(long ns);
bool sh_os_may_hold(const struct sh_ctx *, uint32_t thread); /* has it the arena mapped? */
static inline void sh_os_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* The count of a slot's leases: one more, one less, and what it says. */
#define SH_LEASE_MADE  ((1ull << 32) + 1)
#define SH_LEASE_TAKEN ((1ull << 32) - 1)
static inline uint32_t sh_leases(struct sh_slot *s)
{
    return (uint32_t)atomic_load(&s->leases);
}

/* lock.c */
enum {
    SH_RANK_REGISTRY = 1,
    SH_RANK_ROOTS,
    SH_RANK_HEAP,
    SH_RANK_COLLECTION,
    SH_RANK_PROCESS
};
int sh_mutex_init(pthread_mutex_t *);
int sh_mutex_kind(void);
void sh_lock_init(struct sh_lock *, uint32_t rank);
/* SH_OK, SH_BUSY, SH_CORRUPT; SH_CHANGED: held, but its log was bad and the caller must rebuild
 * what it guards and then call sh_lock_rebuilt. */
enum sh_status sh_lock(struct sh_ctx *, struct sh_lock *, int wait_ms);
void sh_unlock(struct sh_ctx *, struct sh_lock *);
void sh_lock_rebuilt(struct sh_lock *);
enum sh_status sh_registry(struct sh_ctx *, int wait_ms);
enum sh_status sh_process_lock(struct sh_ctx *, struct sh_slot *, int wait_ms);
void sh_process_unlock(struct sh_slot *);
enum sh_status sh_word_lock(struct sh_ctx *, _Atomic uint64_t *lock, int wait_ms, uint64_t *dead);
void sh_word_unlock(_Atomic uint64_t *lock, uint64_t dead);
int sh_word_try(struct sh_ctx *, _Atomic uint64_t *lock);
bool sh_word_let(struct sh_ctx *, _Atomic uint64_t *lock);
/* Refused by everybody from now on, and told by what was found here. SH_CORRUPT, for its caller. */
enum sh_status sh_corrupt(struct sh_ctx *, enum sh_fault, uint64_t where);
void sh_kept_waiting(struct sh_ctx *, uint64_t since_ns);
void sh_fork_ranks(void);
uint32_t sh_ranks_held(void); /* by this thread, a bit each; debug builds know */
#define SH_SPENT_MS 1 /* what is left of a patience that was spent: plenty for one that runs */

/* Changes a plain word under a lock: first its old value goes into the log (I-3). Without the log
 * (SH_NO_UNDO) tools/killpoints.py must find deaths that are not survived: its negative control;
 * and tools/bench.py says what the log costs. */
static inline void sh_set(struct sh_ctx *c, struct sh_lock *l, void *word, uint64_t value)
{
    _Atomic uint64_t *at = word;
#ifndef SH_NO_UNDO
    uint32_t n = atomic_load_explicit(&l->len, RLX);
    assert(n < SH_UNDO_MAX);
    l->log[n].off = (uint64_t)((uint8_t *)word - c->base);
    l->log[n].old = atomic_load_explicit(at, RLX);
    atomic_store_explicit(&l->len, n + 1, REL);
    atomic_signal_fence(memory_order_seq_cst);
#endif
    SH_CRASH("log:entry");
    atomic_store_explicit(at, value, REL);
}

/* What was changed so far is whole: forget how to undo it. */
static inline void sh_commit(struct sh_lock *l)
{
#ifndef SH_NO_UNDO
    atomic_store_explicit(&l->len, 0, REL);
#endif
}

/* pages.c: the page heap */
enum sh_status sh_heap_lock(struct sh_ctx *, int wait_ms);
static inline void sh_heap_unlock(struct sh_ctx *c)
{
    sh_unlock(c, &c->hdr->heap);
}
bool sh_marks_fit(const struct sh_ctx *); /* the high-water marks are within the tables */
/* A record as it can be, of a span that ends below the high-water mark. */
bool sh_span_fits(const struct sh_ctx *, uint32_t page, uint64_t span, uint64_t used);
enum sh_status sh_pages_take(struct sh_ctx *, uint32_t npages, int wait_ms, uint32_t *page);
/* Heap locked. */
bool sh_pages_take_at(struct sh_ctx *, uint32_t head, uint64_t span, uint32_t page, uint32_t n);
enum sh_status sh_pages_give(struct sh_ctx *, const uint32_t *pages, uint32_t n, int wait_ms);
void sh_tell_waiters(struct sh_ctx *);
enum sh_status sh_pages_commit(struct sh_ctx *, uint32_t page, uint32_t npages);
enum sh_status sh_pages_longest(struct sh_ctx *, int wait_ms, uint32_t *longest);
enum sh_status sh_pages_rebuild(struct sh_ctx *);
bool sh_units_steady(const struct sh_ctx *, uint64_t unit, uint64_t n);
uint64_t sh_units_released(const struct sh_ctx *, uint64_t unit, uint64_t n);
bool sh_budget(struct sh_ctx *, uint64_t units);
static inline uint64_t sh_committed_units(const struct sh_ctx *c)
{
    return atomic_load_explicit(&c->hdr->committed, RLX) & SH_COMMITTED_MASK;
}
static inline uint64_t sh_committed_now(uint64_t before, uint64_t units)
{
    return (before & ~SH_COMMITTED_MASK) + SH_COMMITTED_MASK + 1 + units;
}
void sh_unbudget(struct sh_ctx *, uint64_t units);
void sh_set_units(struct sh_ctx *, uint64_t unit, uint64_t n, uint32_t value);
enum sh_status sh_status_of_errno(int error);
uint32_t sh_head_of(const struct sh_ctx *,
                    uint32_t page); /* SH_NIL: not inside a span with a head */
/* Heap locked, logged. False: the list is torn, and now everybody knows. */
bool sh_link(struct sh_ctx *, uint64_t *list, uint32_t page, bool at_end);
bool sh_unlink(struct sh_ctx *, uint64_t *list, uint32_t page);
uint32_t sh_bin_of(uint32_t npages);

/* Heads of spans in page order, a batch at a time; the batch is a snapshot under the heap lock. */
struct sh_walk {
    uint32_t next; /* page at which the following batch starts */
    uint32_t n, i;
    uint32_t page[128];
    uint64_t span[128];
};
enum sh_status sh_walk_next(struct sh_ctx *, struct sh_walk *, uint32_t *page, uint64_t *span);

/* span.c: spans of one class, and who knows which of their blocks are free. "Locked": by the
 * process lock of c. */
void sh_kinds_init(struct sh_ctx *);
enum sh_status sh_refill(struct sh_ctx *, uint32_t kind, int wait_ms); /* not locked */
struct sh_pspan *sh_pspan_new(struct sh_ctx *, uint32_t page, uint32_t kind);
void sh_pspan_add(struct sh_ctx *, struct sh_pspan *, uint64_t span);     /* locked */
int64_t sh_pspan_pop(struct sh_ctx *, uint32_t kind, struct sh_pspan **); /* locked; -1: none */
bool sh_pspan_push(struct sh_ctx *, struct sh_pspan *,
                   uint32_t index);                /* locked; empty, given up? */
bool sh_pspan_any(struct sh_ctx *, uint32_t kind); /* locked */
void sh_pspans_forget(struct sh_ctx *);
void sh_pspans_prune(struct sh_ctx *, uint32_t kind); /* locked */
enum sh_status sh_pins_reserve(struct sh_ctx *, int wait_ms);
void sh_pins_publish(struct sh_ctx *);
void sh_span_freed(struct sh_ctx *, uint32_t page, uint64_t span, const _Atomic uint64_t *word);
void sh_span_keep_generations(struct sh_ctx *, uint32_t page, uint64_t span);
bool sh_span_is_empty(struct sh_ctx *, uint32_t page, uint64_t span);
bool sh_span_give_up(struct sh_ctx *, uint32_t page, uint64_t span, uint32_t state);
void sh_defer(struct sh_ctx *, uint32_t page);                           /* locked */
uint32_t sh_undefer(struct sh_ctx *, uint32_t *pages, uint32_t at_most); /* locked */
#define SH_GIVE_MAX 64u /* runs given back in one section under the heap lock */
void sh_hint_remote(struct sh_ctx *, uint32_t page, uint64_t span);
void sh_block_units(const struct sh_ctx *, uint32_t kind, uint32_t index, uint32_t *first,
                    uint32_t *last);

/* word.c */
bool sh_count_up(_Atomic uint64_t *word, uint64_t gen, uint32_t phase);
void sh_touch(_Atomic uint64_t *word, uint64_t gen, uint32_t phase);
void sh_write_padding(uint8_t *end, uint64_t padding);
uint64_t sh_block_bytes(const struct sh_ctx *, const struct sh_ref *, uint64_t word);
bool sh_page_in_use(const struct sh_ctx *, uint64_t page);
void sh_fill_ref(const struct sh_ctx *, struct sh_ref *, uint32_t head, uint64_t span,
                 uint32_t index);
bool sh_locate(const struct sh_ctx *, uint64_t word_number, struct sh_ref *);
bool sh_locate_inside(const struct sh_ctx *, uint64_t off, struct sh_ref *);
bool sh_locate_data(const struct sh_ctx *, uint64_t off, struct sh_ref *);
uint64_t sh_cell_of(const struct sh_ctx *, const struct sh_ref *);
bool sh_find_cell(const struct sh_ctx *, uint64_t cell, struct sh_ref *);

/* drop.c. Locked, but for the last two */
enum sh_drop {
    SH_DROPPED,
    SH_FREED,
    SH_GONE
};
enum sh_drop sh_count_down(struct sh_ctx *, const struct sh_ref *, uint32_t phase);
bool sh_end_life(struct sh_ctx *, const struct sh_ref *, uint64_t *word);
void sh_block_freed(struct sh_ctx *, const struct sh_ref *);
bool sh_bury(struct sh_ctx *, uint32_t slot, uint32_t n, uint32_t phase);
enum sh_status sh_after_free(struct sh_ctx *);

/* block.c */
/* locked; SH_SLOW: no free block is known. The caller writes a holder before it leaves the lock. */
enum sh_status sh_take(struct sh_ctx *, uint64_t nbytes, uint64_t head, struct sh_ref *);
enum sh_status sh_pin(struct sh_ctx *, struct sh_ref *); /* locked; SH_SLOW: no cell */
void sh_pin_clear(struct sh_ctx *, uint32_t pin);        /* locked: the cell only */
void sh_pin_free(struct sh_ctx *, uint32_t pin);         /* locked: may be taken again */

static inline _Atomic uint64_t *sh_pin_cell(const struct sh_ctx *c, uint32_t pin)
{
    uint32_t shift = c->geo.page_shift - 3;
    return (_Atomic uint64_t *)sh_data(c, c->pin_spans[pin >> shift]->page) +
           (pin & ((1u << shift) - 1));
}
enum sh_status sh_enter_with_pin(struct sh_ctx *, int wait_ms);
void sh_unpin_locked(struct sh_ctx *, const struct sh_ref *); /* locked */

/* node.c. Locked */
bool sh_hold_cell(struct sh_ctx *, uint64_t cell, struct sh_ref *);
bool sh_swap_ref(struct sh_ctx *, _Atomic uint64_t *at, uint64_t old, uint64_t new);
bool sh_swap_found(struct sh_ctx *, _Atomic uint64_t *at, uint64_t old, const struct sh_ref *,
                   uint64_t new);

/* record.c. Locked */
enum sh_status sh_record_refill(struct sh_ctx *, const struct sh_key *, const struct sh_value *,
                                bool node, int wait_ms); /* not locked */
enum sh_status sh_record_take(struct sh_ctx *, const struct sh_key *, const struct sh_value *,
                              bool node, struct sh_ref *);
struct sh_label { /* what a record says of itself */
    uint64_t hash, kinds;
    uint32_t nrefs, key_bytes, nbytes;
    const uint8_t *bytes;
};
bool sh_record_label(const struct sh_ref *, struct sh_label *);
bool sh_label_is(const struct sh_label *, const struct sh_key *);
enum sh_status sh_record_found(struct sh_ctx *, const struct sh_ref *, const struct sh_label *,
                               struct sh_found *, uint8_t *to, uint32_t room);

/* coll.c */
static inline struct sh_coll *sh_coll_of(const struct sh_use *u)
{
    return (struct sh_coll *)u->coll.data;
}
static inline struct sh_node *sh_body(const struct sh_use *u)
{
    return (struct sh_node *)u->body.data;
}
typedef void sh_repair(struct sh_ctx *, struct sh_use *);
enum sh_status sh_coll_new(struct sh_ctx *, uint32_t kind, struct sh_ref *body, int wait_ms,
                           struct sh_ref *);
enum sh_status sh_coll_enter(struct sh_ctx *, struct sh_use *, int wait_ms);
enum sh_status sh_coll_leave(struct sh_ctx *, enum sh_status);
void sh_coll_breathe(struct sh_ctx *);
bool sh_coll_again(struct sh_ctx *, int wait_ms, enum sh_status *, uint32_t *tries);
enum sh_status sh_coll_lock(struct sh_ctx *, struct sh_use *, sh_repair *, int wait_ms);
enum sh_status sh_coll_done(struct sh_ctx *, struct sh_use *, enum sh_status);
bool sh_coll_measure(struct sh_use *);
uint64_t sh_coll_live(const struct sh_use *);
bool sh_coll_current(const struct sh_use *);
void sh_coll_changed(struct sh_use *);
void sh_coll_publish(struct sh_ctx *, struct sh_use *, struct sh_ref *body);
uint64_t sh_freeze(_Atomic uint64_t *place);
void sh_thaw(struct sh_use *);
enum sh_status sh_coll_retire(struct sh_ctx *, struct sh_ref *body, int wait_ms);

/* holders.c. Locked, but for the first */
typedef enum sh_status sh_look(struct sh_ctx *, void *arg, uint32_t page, uint64_t span);
typedef enum sh_status sh_see(struct sh_ctx *, void *arg, const struct sh_holder *);
enum sh_status sh_each_span(struct sh_ctx *, sh_look *, void *arg);
enum sh_status sh_each_cell(struct sh_ctx *, uint32_t page, uint64_t span, sh_see *, void *arg);
bool sh_has_cells(uint64_t span);
bool sh_node_head(const struct sh_ctx *, const struct sh_ref *, uint64_t w, uint64_t *head);

/* table.c, list.c: for the check. Locked */
const char *sh_table_fault(struct sh_ctx *, const struct sh_use *);
const char *sh_array_fault(const struct sh_use *);

/* roots.c */
uint64_t sh_root_cell(const struct sh_ctx *, uint32_t entry);
enum sh_status sh_names_lock(struct sh_ctx *, int wait_ms);
enum sh_status sh_names_enter(struct sh_ctx *, int wait_ms);
void sh_names_leave(struct sh_ctx *);

/* mark.c */
void sh_trace_end(struct sh_ctx *);

/* coord.c */
enum sh_status sh_handshake(struct sh_ctx *, int64_t phase); /* -1: only take every lock once */
void sh_pauses_begin(struct sh_ctx *);
enum sh_status sh_give(struct sh_ctx *, const uint32_t *pages, uint32_t n);
enum sh_status sh_give_all(struct sh_ctx *);
struct sh_sums {
    uint64_t mallocs, frees, alloc_bytes, freed_bytes, pins, leases, processes;
};
struct sh_sums sh_sum(const struct sh_ctx *);
uint64_t sh_heap_alloc(const struct sh_sums *);   /* bytes in live blocks */
uint64_t sh_heap_objects(const struct sh_sums *); /* live blocks */
bool sh_hold_small(struct sh_ctx *, uint32_t page, uint64_t *span);
void sh_let_small(struct sh_ctx *, uint32_t page, uint64_t span);
void sh_let_owner(struct sh_ctx *, uint64_t span);

static inline uint32_t sh_phase_of(uint32_t phase)
{
    return phase & 0xffu;
}
static inline uint64_t sh_touch_of(uint32_t phase)
{
    return (uint64_t)((phase >> 8) & 0x3fu) << SH_TOUCH_SHIFT;
}
/* That of the process. Without the barrier (SH_NO_BARRIER) collections free what is in use:
 * tools/bench.py says what it costs. */
static inline uint32_t sh_phase(const struct sh_ctx *c)
{
#ifdef SH_NO_BARRIER
    (void)c;
    return SH_IDLE;
#else
    return atomic_load_explicit(&c->slot->phase, RLX);
#endif
}

/* A block word, touched if a collection is under way, which is rare. */
static inline uint64_t sh_touched(uint64_t w, uint32_t phase)
{
#ifdef SH_NO_BARRIER
    phase = SH_IDLE;
#endif
    if (__builtin_expect(sh_phase_of(phase) == SH_IDLE, 1))
        return w;
    return (w & ~SH_TOUCH_MASK) | sh_touch_of(phase);
}
static inline bool sh_is_live(uint64_t w, uint64_t gen)
{
    return SH_BSTATE(w) == SH_BLOCK_LIVE && SH_GEN(w) == gen;
}
static inline bool sh_is_node(uint64_t w, uint64_t gen)
{
    bool there = SH_BSTATE(w) == SH_BLOCK_LIVE || SH_BSTATE(w) == SH_BLOCK_DYING;
    return there && w & SH_NODE && SH_GEN(w) == gen;
}
/* In SWEEP: to be freed, and nobody's to use, nor what it names, which may be gone before it. */
static inline bool sh_is_condemned(uint64_t w, uint32_t phase)
{
    return SH_BSTATE(w) == SH_BLOCK_LIVE && !(w & SH_MARKED) &&
           (w & SH_TOUCH_MASK) != sh_touch_of(phase);
}
static inline bool sh_node_fits(uint64_t head, uint64_t nbytes)
{
    return nbytes >= sizeof(struct sh_node) &&
           SH_NODE_NREFS(head) <= (nbytes - sizeof(struct sh_node)) / 8;
}

#endif
