/*
 * The core's C interface. No Python here: the C tests and the crash tools run it alone, and threads
 * can play processes, because all state is in struct sh_ctx.
 *
 * A context is one process's use of one arena. Its private part is guarded by the lock of its slot
 * (the "process lock"), so threads of a process may share it. Functions return one of enum
 * sh_status. `wait_ms`: how long to wait for a lock that another holds; 0 tries only. SH_BUSY means
 * that the operation changed nothing and may be repeated.
 */
#ifndef SHMHEAP_H
#define SHMHEAP_H

#include <stdbool.h>
#include <stddef.h>

#include "layout.h"

enum sh_status {
    SH_OK,
    SH_BUSY,      /* a lock was held; nothing changed */
    SH_SLOW,      /* the fast path has nothing; call the slow one */
    SH_DEFERRED,  /* done, but a span waits to be given back: call sh_flush */
    SH_AGAIN,     /* the collector is about to decide; try again at once */
    SH_FULL,      /* no run of pages is long enough and the capacity is used up */
    SH_LIMIT,     /* the memory limit */
    SH_NOSPACE,   /* the file system has no room */
    SH_NOSLOT,    /* too many processes */
    SH_NOROOTS,   /* too many named roots */
    SH_STALE,     /* the handle's block is gone */
    SH_ABSENT,    /* no such root */
    SH_CHANGED,   /* compare-and-set found another value */
    SH_CLOSED,    /* the heap is closing, or this context is */
    SH_FORKED,    /* this process was forked without the hooks */
    SH_CORRUPT,   /* an invariant does not hold */
    SH_UNTRUSTED, /* not an arena that can be used; see sh_ctx.why */
    SH_REFUSED,   /* waiting for memory that nobody can free */
    SH_TIMEOUT,
    SH_NOMEM, /* this process's own memory */
    SH_SYSTEM /* errno says */
};

const char *sh_status_text(enum sh_status);
const char *sh_fault_text(uint32_t fault); /* enum sh_fault, or whatever stands there */

/* The blocks of one span that its owner knows to be free, or the free cells of a pin or lease span.
 */
enum sh_ring {
    SH_AVAIL,
    SH_HOLEY,
    SH_ALL,
    SH_NRINGS
}; /* with free bits; with holes; every one */

struct sh_pspan {
    struct sh_pspan *next[SH_NRINGS], *prev[SH_NRINGS];
    uint64_t span;       /* what the record says as long as the span is ours */
    uint32_t page, kind; /* kind: class, or SH_KIND_ */
    uint32_t nblocks, nfree;
    uint32_t rings;  /* the rings it is in, a bit each */
    uint32_t first;  /* no bit is set in words of bits[] before this one */
    uint32_t number; /* pins: its place in pin_spans */
    uint64_t bits[];
};

#define SH_KIND_PINS   SH_NCLASSES
#define SH_KIND_LEASES (SH_NCLASSES + 1)
#define SH_NKINDS      (SH_NCLASSES + 2)
#define SH_KIND_LARGE  127u

struct sh_shelf {
    struct sh_pspan *ring[SH_NRINGS]; /* the first of each; allocated from ring[SH_AVAIL] */
    struct sh_pspan *cursor;          /* where the walk for blocks that others freed goes on */
};

struct sh_kind {
    uint32_t size, npages, nblocks, tier;
};

struct sh_ctx {
    uint8_t *base;
    struct sh_header *hdr;
    struct sh_slot *slot; /* NULL: not a user */
    struct sh_geometry geo;
    struct sh_kind kinds[SH_NKINDS];
    uint64_t owner; /* owner and incarnation, as in a span record */
    uint32_t slot_index;
    int fd;
    uint64_t dev, ino;
    void *alive;                /* page mapped through the open file that holds the liveness lock */
    _Atomic uint32_t *forked;   /* 1 here, 0 in a process forked without the hooks (WIPEONFORK) */
    struct sh_pspan **pspan_at; /* by first page; private, sparse */
    struct sh_shelf shelves[SH_NKINDS];
    struct sh_pspan **pin_spans; /* by number; private, sparse: see sh_pin_cell */
    uint32_t npin_spans;
    bool keep_pins; /* empty spans of pins are not given up: they are needed at once */
    uint32_t
        deferred; /* runs RESERVED by us that wait for the heap lock: the first, chained by link */
    _Atomic uint32_t ndeferred; /* how many */
    uint32_t lease_seq;
    int mutex_kind;  /* of every mutex of ours, as this libc writes it */
    int patience_ms; /* coordinator: how long it waits for one that was stopped in an operation;
                        spent by the first wait that was in vain, given anew each turn */
    /* coordinator: when it took the process lock that it holds, and the shared one */
    uint64_t held_since_ns, locked_since_ns;
    _Atomic bool ring_waiters; /* something was freed while others wait for memory */
    _Atomic bool ring;         /* the coordinator has something new to do: ring its bell */
    /* coordinator: somebody died since they were put right */
    bool recount_blocks, recount_units, recount_leases, recount_holders;
    struct sh_trace *trace; /* coordinator: from marking to the end of the sweep */
    uint64_t longest_ns;    /* longest that the coordinator let anybody wait: sh_pauses_begin */
    _Atomic uint32_t roots_committed; /* entries below are known to be committed */
    const char *why;                  /* SH_UNTRUSTED: what is wrong */
    struct sh_ctx *child;             /* between the hooks of a fork */
};

/* A block as its holder sees it. */
struct sh_ref {
    _Atomic uint64_t *word;
    uint8_t *data;
    uint64_t nbytes;
    uint64_t gen;
    uint32_t page; /* first of its span */
    uint32_t kind; /* class, or SH_KIND_LARGE */
    uint32_t pin;  /* number of the pin span, index in it */
};

/* arena.c: making and opening */
void sh_geometry(struct sh_geometry *, uint64_t capacity, uint32_t page_shift, uint32_t unit_shift);
enum sh_status sh_format(int fd, uint64_t capacity, uint64_t nonce, uint64_t limit_bytes,
                         const char *config, size_t config_bytes);
enum sh_status sh_read_config(int fd, char config[SH_CONFIG_BYTES], uint32_t *bytes,
                              const char **why);
enum sh_status sh_map(struct sh_ctx *, int fd, bool writable);
void sh_unmap(struct sh_ctx *);

/* slots.c: processes, pins, leases */
enum sh_status sh_attach(struct sh_ctx *, int wait_ms);
enum sh_status sh_attach_coordinator(struct sh_ctx *, int wait_ms);
bool sh_detach(struct sh_ctx *, bool keep); /* true: the heap is closed for ever, unlink it */
bool sh_alive(struct sh_ctx *, uint32_t slot);
enum sh_status sh_fork_prepare(struct sh_ctx *);
void sh_fork_parent(struct sh_ctx *);
enum sh_status sh_fork_child(struct sh_ctx *);
enum sh_status sh_enter(struct sh_ctx *, int wait_ms);
void sh_leave(struct sh_ctx *);
static inline bool sh_is_forked(struct sh_ctx *c)
{
    return atomic_load_explicit(c->forked, memory_order_relaxed) == 0;
}

/* block.c: what users do with blocks. sh_alloc_fast takes the process lock only. */
enum sh_status sh_alloc_fast(struct sh_ctx *, uint32_t kind, uint64_t nbytes, struct sh_ref *);
enum sh_status sh_alloc(struct sh_ctx *, uint64_t nbytes, bool zero, int wait_ms, struct sh_ref *);
enum sh_status sh_node_new(struct sh_ctx *, uint32_t kind, uint32_t nrefs, uint64_t more,
                           int wait_ms, struct sh_ref *);
enum sh_status sh_unpin(struct sh_ctx *, struct sh_ref *, int wait_ms);
enum sh_status sh_flush(struct sh_ctx *, int wait_ms);
enum sh_status sh_repin(struct sh_ctx *, const struct sh_ref *, int wait_ms, struct sh_ref *);
enum sh_status sh_lease_make(struct sh_ctx *, const struct sh_ref *, int wait_ms,
                             uint64_t *cell_off, uint32_t *seq);
enum sh_status sh_lease_drop(struct sh_ctx *, uint64_t data_off, uint64_t gen, uint64_t cell_off,
                             uint32_t seq, int wait_ms);
enum sh_status sh_adopt(struct sh_ctx *, uint64_t data_off, uint64_t gen, uint64_t cell_off,
                        uint32_t seq, int wait_ms, struct sh_ref *);
enum sh_status sh_block_at(struct sh_ctx *, uint64_t off, uint64_t nbytes, int wait_ms,
                           struct sh_ref *);
void sh_waiting(struct sh_ctx *, bool begins);
enum sh_status sh_wait_memory(struct sh_ctx *, uint32_t seen, int wait_ms);
uint64_t sh_data_offset(const struct sh_ctx *, const struct sh_ref *);

/* record.c: values, and the keys they stand under. What their kinds mean is the caller's. */
struct sh_value {
    uint32_t kind, nbytes, nrefs;
    const void *bytes;
    const struct sh_ref *refs; /* blocks that the value names, held by the caller */
};
struct sh_key {
    uint64_t hash;
    uint32_t kind, form, nbytes; /* two keys are one if kind and bytes are the same */
    const void *bytes;
};
#define SH_VALUE_MAX 16384u /* bytes */
#define SH_KEY_MAX   8192u
#define SH_REFS_MAX  255u
#define SH_KIND_HARD 16u  /* kinds from here on: reading one may fail */
#define SH_COPY_MAX  128u /* key and value together */

/* What was found: copied, if it is small and names nothing; else its record is pinned, and the
 * caller's to unpin. */
struct sh_found {
    const uint8_t *key, *value;
    uint32_t key_kind, key_form, key_bytes, kind, nbytes, nrefs;
    uint64_t cell; /* the word where it was found */
    bool pinned;
    struct sh_ref record;
    uint8_t small[SH_COPY_MAX];
};

uint64_t sh_hash(const void *bytes, uint64_t n, uint64_t seed);
enum sh_status sh_record_new(struct sh_ctx *, const struct sh_value *, int wait_ms,
                             struct sh_ref *);
enum sh_status sh_record_get(struct sh_ctx *, const struct sh_ref *, int wait_ms,
                             struct sh_found *);
enum sh_status sh_record_ref(struct sh_ctx *, const struct sh_found *, uint32_t i, int wait_ms,
                             struct sh_ref *);

/* coll.c, table.c, list.c: collections. A use is one handle's: the collection and its body as last
 * seen, both pinned; changed under the process lock. SH_DEFERRED: done, call sh_flush. */
struct sh_use {
    struct sh_ref coll, body;
    uint64_t cell; /* what names the body in the collection; 0: none seen yet */
    uint32_t kind; /* of the body: enum sh_node_kind */
    uint64_t room; /* places of the body */
    void *tail;    /* struct sh_table or sh_array */
    uint64_t mask; /* of a table's index */
};
enum sh_status sh_dict_new(struct sh_ctx *, int wait_ms, struct sh_ref *);
enum sh_status sh_list_new(struct sh_ctx *, int wait_ms, struct sh_ref *);
enum sh_status sh_use_end(struct sh_ctx *, struct sh_use *, int wait_ms); /* the body only */
int sh_coll_try(struct sh_ctx *, struct sh_use *);
bool sh_coll_let(struct sh_ctx *, struct sh_use *);
enum sh_status sh_coll_size(struct sh_ctx *, struct sh_use *, int wait_ms, uint64_t *n,
                            uint64_t *stamp);
enum sh_status sh_dict_get(struct sh_ctx *, struct sh_use *, const struct sh_key *, int wait_ms,
                           struct sh_found *);
enum sh_status sh_dict_set(struct sh_ctx *, struct sh_use *, const struct sh_key *,
                           const struct sh_value *, bool must_be_new, int wait_ms);
enum sh_status sh_dict_pop(struct sh_ctx *, struct sh_use *, const struct sh_key *, uint64_t only,
                           int wait_ms, struct sh_found *);
enum sh_status sh_dict_clear(struct sh_ctx *, struct sh_use *, int wait_ms);
enum sh_status sh_dict_next(struct sh_ctx *, struct sh_use *, uint64_t *place, uint64_t stamp,
                            int wait_ms, struct sh_found *);

/* Of a list: what is replaced, and by what. */
struct sh_splice {
    uint64_t start, stop, stamp; /* of the list that they are meant for */
    bool always;                 /* at its end, whatever it is */
    bool exact;                  /* nor may an item have been set */
    const struct sh_ref *stage;  /* items to come, or NULL */
};
/* Of a list: items of one moment, to be read one after the other. */
struct sh_copy {
    int64_t start, stop; /* of which part, as of a slice */
    uint64_t n;
    uint8_t *bytes; /* malloc'ed */
    uint64_t room, used, at;
    uint64_t cell, stamp; /* of the list that it is of */
};
enum sh_status sh_list_get(struct sh_ctx *, struct sh_use *, int64_t i, int wait_ms,
                           struct sh_found *);
enum sh_status sh_list_set(struct sh_ctx *, struct sh_use *, int64_t i, const struct sh_value *,
                           int wait_ms);
enum sh_status sh_list_append(struct sh_ctx *, struct sh_use *, const struct sh_value *,
                              int wait_ms);
enum sh_status sh_list_pop(struct sh_ctx *, struct sh_use *, uint64_t only, int wait_ms,
                           struct sh_found *);
enum sh_status sh_list_splice(struct sh_ctx *, struct sh_use *, const struct sh_splice *,
                              int wait_ms);
enum sh_status sh_list_copy(struct sh_ctx *, struct sh_use *, struct sh_copy *, int wait_ms);
bool sh_copy_next(struct sh_copy *, struct sh_found *);
enum sh_status sh_list_stage_new(struct sh_ctx *, uint64_t room, int wait_ms, struct sh_ref *);
enum sh_status sh_list_stage(struct sh_ctx *, const struct sh_ref *, const struct sh_value *,
                             int wait_ms);

/* node.c: references between blocks */
enum sh_status sh_node_load(struct sh_ctx *, const struct sh_ref *node, uint32_t i, int wait_ms,
                            struct sh_ref *);
enum sh_status sh_node_store(struct sh_ctx *, const struct sh_ref *node, uint32_t i,
                             const struct sh_ref *, int wait_ms);

/* roots.c: named roots */
enum sh_status sh_root_get(struct sh_ctx *, const char *name, uint32_t len, int wait_ms,
                           struct sh_ref *);
enum sh_status sh_root_set(struct sh_ctx *, const char *name, uint32_t len, const struct sh_ref *,
                           int wait_ms);
enum sh_status sh_root_add(struct sh_ctx *, const char *name, uint32_t len, const struct sh_ref *,
                           int wait_ms);
enum sh_status sh_root_replace(struct sh_ctx *, const char *name, uint32_t len,
                               const struct sh_ref *old, const struct sh_ref *, int wait_ms);
enum sh_status sh_root_clear(struct sh_ctx *, const char *name, uint32_t len, int wait_ms);
enum sh_status sh_root_clear_of(struct sh_ctx *, const char *name, uint32_t len,
                                const struct sh_ref *only, int wait_ms);
struct sh_name {
    uint32_t len;
    char text[SH_ROOT_NAME_MAX];
};
enum sh_status sh_root_names(struct sh_ctx *, struct sh_name *names, uint32_t *n, int wait_ms);
enum sh_status sh_root_name(struct sh_ctx *, uint32_t *entry, char name[SH_ROOT_NAME_MAX],
                            uint32_t *len, int wait_ms);

/* sites.c: where blocks were made */
struct sh_made_at {
    uint64_t offset, nbytes; /* of the block */
    uint32_t len;
    char text[SH_SITE_MAX];
};
enum sh_status sh_site_set(struct sh_ctx *, const struct sh_ref *, const char *text, uint32_t len,
                           int wait_ms);
enum sh_status sh_site_next(struct sh_ctx *, uint32_t *entry, struct sh_made_at *, int wait_ms);

/* coord.c: what the coordinator does outside a collection */
struct sh_reaped {
    uint64_t pins, leases, spans, pin_bytes, lease_bytes;
    bool done;
};
enum sh_status sh_begin(struct sh_ctx *, uint32_t *phase);
enum sh_status sh_reap(struct sh_ctx *, uint32_t slot, uint64_t lease_cutoff_ns,
                       struct sh_reaped *);
enum sh_status sh_expire_leases(struct sh_ctx *, uint64_t cutoff_ns, uint64_t *dropped,
                                uint64_t *bytes);
uint32_t sh_users(struct sh_ctx *);
enum sh_status sh_try_close(struct sh_ctx *, bool *closed);
uint32_t sh_refuse_waiters(struct sh_ctx *);
uint32_t sh_now_stamp(const struct sh_ctx *);
enum sh_status sh_stamp(struct sh_ctx *, uint32_t stamp, uint64_t *units);
enum sh_status sh_release(struct sh_ctx *, uint32_t stamp_le, uint64_t max_bytes, uint32_t *from,
                          uint64_t *bytes, uint64_t *runs);

/* mark.c: a collection */
enum sh_status sh_start_cycle(struct sh_ctx *);
enum sh_status sh_mark(struct sh_ctx *, uint64_t *blocks);
enum sh_status sh_finish_mark(struct sh_ctx *, uint64_t *blocks);
enum sh_status sh_sweep(struct sh_ctx *, uint64_t *blocks, uint64_t *bytes);
void sh_set_next_gc(struct sh_ctx *, uint64_t next_gc);
enum sh_status sh_end_cycle(struct sh_ctx *, uint64_t next_gc, bool forced, uint64_t pause_ns);

/* check.c: walks every invariant. Each violation is reported by name. */
typedef void sh_report(void *arg, const char *invariant, const char *what);
enum sh_status sh_check(struct sh_ctx *, sh_report *, void *arg);
enum sh_status sh_inspect(struct sh_ctx *, int fd, sh_report *, void *arg); /* inspect.c */

/* shares.c: who holds how much, bytes */
#define SH_TOP_NAMES 5u
struct sh_shares {
    uint64_t pins[SH_MAX_SLOTS], leases[SH_MAX_SLOTS]; /* by slot */
    struct sh_share {
        uint64_t bytes; /* 0: no more */
        uint32_t len;
        char name[SH_ROOT_NAME_MAX];
    } names[SH_TOP_NAMES]; /* those that hold most, the largest first */
};
enum sh_status sh_shares(struct sh_ctx *, struct sh_shares *);

/* holders.c: what holds a block; the largest blocks */
enum sh_holder_kind {
    SH_HOLDER_PIN,
    SH_HOLDER_LEASE,
    SH_HOLDER_REFERENCE
};
struct sh_holder {
    uint64_t cell;
    uint64_t held; /* data offset of the block that it names */
    enum sh_holder_kind kind;
    uint32_t slot;      /* of a pin or lease: whose */
    uint32_t node_kind; /* of a reference: its node's, and the data offset of that */
    uint64_t node;
    uint64_t made_ns; /* of a lease: CLOCK_MONOTONIC */
};
struct sh_found_holders {
    struct sh_holder *list;
    uint64_t n, room;
};
struct sh_sized {
    uint64_t offset, nbytes;
    uint32_t node_kind; /* 0: a leaf */
};
enum sh_status sh_holders_of(struct sh_ctx *, const uint64_t *offsets, uint64_t n,
                             struct sh_found_holders *);
enum sh_status sh_largest(struct sh_ctx *, struct sh_sized *, uint32_t *n);

/* Asking the coordinator */
bool sh_may_start(struct sh_ctx *);
void sh_start_failed(struct sh_ctx *);
uint32_t sh_request(struct sh_ctx *, enum sh_request);
enum sh_status sh_await(struct sh_ctx *, enum sh_request, uint32_t ticket, int wait_ms);
void sh_want(struct sh_ctx *, uint32_t bits);

#endif
