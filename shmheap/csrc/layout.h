/*
 * The bytes that processes share, and nothing else.
 *
 * Every field says its unit, who writes it and what guards it. Positions are offsets from the start
 * of the file, page numbers, or word numbers, never addresses. What a process keeps for itself (its
 * mapping, its bitmaps of free blocks) is struct sh_ctx in shmheap.h.
 *
 *   header | slots | roots | sites | page records | unit words | block words, tier 4..0 | data area
 *
 * The tables are as long as the capacity asks for and sparse: a table page is committed before its
 * first use and costs nothing until then.
 *
 * "W: x" is who writes a field, "L: y" the lock that guards it. Fields without L are atomics with
 * an order of their own, described in docs/invariants.md.
 */
#ifndef SHMHEAP_LAYOUT_H
#define SHMHEAP_LAYOUT_H

#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "size_classes.h"

#define SH_MAGIC   "SHMHEAP"
#define SH_VERSION 1u
/* The build hashes this file, core.h and size_classes.h: who was built from others is refused. What
 * else two builds must agree on (the padding of blocks, their tiers) is SH_VERSION's. */
#ifndef SH_LAYOUT
#define SH_LAYOUT 0u
#endif
#define SH_MAX_SLOTS    1024u            /* slot 0 is the coordinator's */
#define SH_MAX_PAGES    ((1u << 28) - 1) /* a span record has 28 bits for them */
#define SH_NIL          0xffffffffu      /* no page, no root entry */
#define SH_CONFIG_BYTES 2048u
#define SH_LINE         64

/* Phases of a collection (DESIGN section 6, rules 10 to 13). */
enum sh_phase {
    SH_IDLE,
    SH_MARK,
    SH_FINAL,
    SH_SWEEP
};

/* Lock and undo log (I-2, I-3) */

#define SH_UNDO_MAX 64u

struct sh_undo {
    uint64_t off; /* bytes from the start of the file, a multiple of 8 */
    uint64_t old; /* the word there before the operation */
};

/* A lock with the log of the operation that holds it. Registry, roots and heap have one each. */
struct sh_lock {
    _Alignas(SH_LINE) pthread_mutex_t mutex; /* robust, error-checking, process-shared */
    uint32_t rank;                           /* order of acquisition, SH_RANK_; W: creation */
    _Alignas(SH_LINE) _Atomic uint32_t len;  /* entries published; W: holder, or whoever recovers */
    _Atomic uint32_t rebuild; /* 1: the log was bad, the caches are to be rebuilt; W: holder */
    struct sh_undo log[SH_UNDO_MAX]; /* W: holder */
};

/* A process (I-7, I-8). Its lock has no log: pins, leases, references and block words have write
 * orders of their own, so whoever finds its holder dead has nothing to repair (I-3). The lock is
 * one word, 0 or its holder (owner and incarnation as in a span record, and 1), because it is taken
 * twice per allocation; whether a holder lives is what its liveness lock says. */

enum sh_slot_state {
    SH_SLOT_FREE,
    SH_SLOT_LIVE,
    SH_SLOT_DETACHED,
    SH_SLOT_DEAD
};

struct sh_slot {
    _Alignas(SH_LINE) _Atomic uint64_t lock; /* held from reading the phase to the last step */
    _Atomic uint32_t state; /* enum sh_slot_state; L: registry, but for the last step of leaving */
    _Atomic uint32_t incarnation; /* uses of this slot so far; L: registry */
    _Atomic uint32_t pid;         /* L: registry; a forked child writes its own */
    uint32_t unused0;

    _Alignas(SH_LINE) _Atomic uint32_t phase; /* phase | epoch << 8; W: coordinator; L: lock */
    _Atomic uint32_t waiting;                 /* threads that wait for memory; W: owner, reaper */
    _Atomic uint32_t wait_seen;               /* hdr.freed that the last waiter saw; W: owner */
    _Atomic uint32_t refused;   /* wait_seen + 1 that was refused, 0: none; W: coordinator, owner */
    _Atomic uint64_t remote[2]; /* classes others freed into, a bit each; W: anybody */
    _Atomic uint32_t leases_taken; /* 1: cells of ours were cleared; W: anybody */
    uint32_t unused1;
    _Atomic uint64_t ended_ns; /* when its end was noticed, 0 = not; W: coordinator */

    /* Statistics, W: owner, and the reaper of a dead one; L: lock. Hints: the collector's walk is
     * the truth. */
    _Alignas(SH_LINE) _Atomic uint64_t mallocs; /* blocks */
    _Atomic uint64_t frees;                     /* blocks, whoever allocated them */
    _Atomic uint64_t alloc_bytes;
    _Atomic uint64_t freed_bytes;
    _Atomic uint64_t pins; /* cells in use */
    /* leases that nobody took:32, and above them how often that changed; W: owner adds, anybody
     * subtracts, after the cell and under the process lock. A death may leave it too high until the
     * next collection. */
    _Atomic uint64_t leases;
    /* Nodes that are DYING by this slot, word numbers, 0 = none: the first of the list, and the one
     * on its way into it or out of it (rule 9). W: owner, reaper; L: lock. */
    _Atomic uint64_t dying;
    _Atomic uint64_t transit;
    uint64_t unused2[8]; /* the line beside the next slot's lock stays ours */
};
static_assert(sizeof(struct sh_slot) == 256, "a slot is four lines");

/* A named root. cell: block cell as in a pin, 0 = absent; W: anybody under its own process lock and
 * the roots lock. The rest L: roots. */
#define SH_ROOT_NAME_MAX 224u
#define SH_ROOT_BUCKETS  2048u
#define SH_MAX_ROOTS     65536u

struct sh_root {
    _Atomic uint64_t cell;
    uint64_t next; /* entry in the same bucket, or in the free list; SH_NIL = none */
    uint32_t hash; /* FNV-1a of the name */
    uint32_t len;  /* bytes of the name */
    uint64_t unused;
    char name[SH_ROOT_NAME_MAX];
};
static_assert(sizeof(struct sh_root) == 256, "a root entry is four lines");

/* An allocation site: where in a program a block was made (SHMHEAP_TRACK). It is that of the block
 * with this word and generation, and nobody's once that is gone. A cache that nothing is rebuilt
 * from: who finds an entry senseless passes over it. L: roots */
#define SH_NSITES   65536u
#define SH_SITE_MAX 108u /* bytes of text */

struct sh_site {
    _Atomic uint64_t word; /* number, 0 = none; written last */
    uint64_t gen;
    uint32_t len; /* bytes of the text */
    char text[SH_SITE_MAX];
};
static_assert(sizeof(struct sh_site) == 128, "a site is two lines");

/* A page (I-1). The record of a span is that of its first page. */

enum sh_page_state {
    SH_NONE,      /* inside a span, or never used */
    SH_FREE,      /* in a free list */
    SH_RESERVED,  /* the owner's: being committed, cut, or on its way to be freed */
    SH_RELEASING, /* the coordinator's: being punched */
    SH_SMALL,     /* blocks of one class; allocated from by the owner; no owner: an orphan */
    SH_LARGE,     /* one block */
    SH_PINS,      /* the owner's pin cells, 8 bytes each */
    SH_LEASES,    /* the owner's leases, 16 bytes each */
    SH_RETIRED    /* generations exhausted; never used again */
};

struct sh_page {
    /* state:4 class:7 owner:10 incarnation:15 npages:28. Of a FREE span L: heap; of any other W:
     * owner, or the coordinator under the owner's process lock, in one store. */
    _Atomic uint64_t span;
    /* FREE and orphans: next:32 prev:32 in a circular list (L: heap). LARGE: bytes asked for. */
    _Atomic uint64_t link;
    /* head:32 released:32. head: first page of the span this page lies in, kept for every page of a
     * SMALL, PINS or LEASES span and for the last page of a FREE one. released: of the first page
     * of a FREE span, how many of its units are RELEASED, "npreleased" (L: heap). */
    _Atomic uint64_t head;
    /* generation:40, the next one that no block starting in this page had ("watermark"; W: whoever
     * holds the span RESERVED or RELEASING). Bits 56..60: tiers whose words here may be committed
     * (likewise). Bit 63: a block was freed by another process than the owner (W: anybody). */
    _Atomic uint64_t mark;
};
static_assert(sizeof(struct sh_page) == 32, "records are packed");

#define SH_PAGE_TIER(t) (1ull << (56 + (t)))
#define SH_PAGE_TIERS   (0x1full << 56)
#define SH_PAGE_REMOTE  (1ull << 63)

/* A unit: an OS page of the data area. state:2 dirty:1 stamp:29. Written only by whoever holds its
 * span RESERVED or RELEASING; the stamp, of a FREE span, by the coordinator under the heap lock;
 * inside a SMALL span by the owner or the coordinator, each under the
 * owner's process lock, or, from RESERVED to COMMITTED and from RELEASING to RELEASED, by whom the
 * first half of that step made its keeper. All zero: never touched. */
enum sh_unit_state {
    SH_UNIT_RELEASED,
    SH_UNIT_COMMITTED,
    SH_UNIT_RESERVED,
    SH_UNIT_RELEASING
};

#define SH_UNIT_STATE(u) ((u) & 3u)
#define SH_UNIT_DIRTY    4u
#define SH_UNIT_STAMP(u) ((u) >> 3) /* 0.1 s since creation + 1; 0 = not seen idle yet */
#define SH_STAMP_MAX     ((1u << 29) - 1)

/* A block word: state:2 node:1 mark:1 padded:1 touched:6 count:16 generation:37. Changed by CAS
 * only (DESIGN section 6). Of a DYING node, count is the slot that works it off, and generation the
 * one that the next block there will have. */
enum sh_block_state {
    SH_BLOCK_FREE,
    SH_BLOCK_LIVE,
    SH_BLOCK_DYING,
    SH_BLOCK_HOLE
};

#define SH_GEN_BITS     37
#define SH_GEN_MAX      ((1ull << SH_GEN_BITS) - 1) /* a block that reaches it is retired */
#define SH_GEN(w)       ((w) & SH_GEN_MAX)
#define SH_COUNT_SHIFT  SH_GEN_BITS
#define SH_COUNT_MAX    0xffffull /* sticks: only the collector frees such a block */
#define SH_COUNT_ONE    (1ull << SH_COUNT_SHIFT)
#define SH_COUNT(w)     (((w) >> SH_COUNT_SHIFT) & SH_COUNT_MAX)
#define SH_TOUCH_SHIFT  (SH_COUNT_SHIFT + 16)
#define SH_TOUCH_MASK   (0x3full << SH_TOUCH_SHIFT)
#define SH_TOUCHED(w)   (((w) & SH_TOUCH_MASK) >> SH_TOUCH_SHIFT)
#define SH_PADDED       (1ull << 59) /* fewer bytes were asked for than the class has */
#define SH_MARKED       (1ull << 60)
#define SH_NODE         (1ull << 61)
#define SH_BSTATE_SHIFT 62
#define SH_BSTATE(w)    ((w) >> SH_BSTATE_SHIFT)
#define SH_BLOCK_WORD(state, gen) (((uint64_t)(state) << SH_BSTATE_SHIFT) | (gen))

/* A cell that holds a block: frozen:1 (of a reference), word number:39 (offset of the block word /
 * 8), lease:1, and 23 bits of the generation, or of the lease's number. Never 0. The one bit keeps
 * a late taker of a lease off the pin that came to lie where the lease was. */
#define SH_CELL_LOW_MASK            0x7fffffu
#define SH_PIN_CELL(word, gen)      ((uint64_t)(word) << 24 | ((gen) & SH_CELL_LOW_MASK))
#define SH_LEASE_CELL(word, number) (SH_PIN_CELL(word, number) | 1u << 23)
#define SH_CELL_WORD(cell)          ((cell) >> 24 & ((1ull << 39) - 1))
#define SH_CELL_LOW(cell)           ((uint32_t)((cell) & SH_CELL_LOW_MASK))

/* A node: a block that holds others (rules 5 to 9). Its references are cells as of pins, or 0, or,
 * with the lease's bit, 63 bits of something else that are no reference. What is behind them
 * belongs to the node's kind (containers). nbytes of the block say how much that is. */
enum sh_node_kind {
    SH_NODE_PLAIN = 1, /* references alone */
    SH_NODE_DICT,      /* struct sh_coll; its body is a table */
    SH_NODE_LIST,      /* struct sh_coll; its body is an array */
    SH_NODE_TABLE,     /* references to records in the order of insertion, struct sh_table */
    SH_NODE_ARRAY,     /* items, struct sh_array */
    SH_NODE_RECORD,    /* what a value names, struct sh_record */
    SH_NODE_KINDS
};

struct sh_node {
    /* references:32 and above them kind:8. W: who makes the node, before it lives; when it dies,
     * who works it off, down to 0 references. */
    _Atomic uint64_t head;
    _Atomic uint64_t next; /* of a DYING node: the next one in its slot's list. W: that slot */
    _Atomic uint64_t ref[];
};
#define SH_NODE_HEAD(kind, nrefs) ((uint64_t)(kind) << 32 | (uint32_t)(nrefs))
#define SH_NODE_NREFS(head)       ((uint32_t)(head))
#define SH_NODE_KIND(head)        ((uint32_t)((head) >> 32) & 0xffu)
#define SH_REF_VALUE              (1u << 23)   /* no reference */
#define SH_REF_FROZEN             (1ull << 63) /* may be read, and not be changed any more */
#define SH_REF_IS_CELL(ref)       (((ref) & ~SH_REF_FROZEN) != 0 && !((ref) & SH_REF_VALUE))

/* Collections: shared dicts and lists. A collection is one node, which is what its holders hold;
 * what is in it is its body, a node of its own, which is replaced as a whole when it is too small.
 */

struct sh_coll {
    _Atomic uint64_t head, next; /* as of struct sh_node; one reference */
    _Atomic uint64_t body;       /* W: holder of lock */
    _Atomic uint64_t lock;       /* who is changing it, as in a process lock; 0 = nobody; W: they */
    _Atomic uint64_t held;       /* who has it by lock() in Python, likewise; guards nothing here */
    /* How often size or order changed; of a list below 2^32, and above how often an item was set.
     * W: holder of lock */
    _Atomic uint64_t stamp;
};

/* Behind a table's references: a hash table of their places, open addressing, twice as long. A
 * place is used once; deleted ones are 0 until the table is replaced. A value is replaced by one
 * compare-and-swap of its place, without the lock, unless the place is frozen: then the table is
 * about to be. All else L: lock of the collection. */
struct sh_table {
    _Atomic uint64_t used; /* places */
    /* entries:32, and above them 0, or, while one comes or goes, the number + 1 of the word of the
     * body by which it does: there is one entry more as long as that one is not 0. */
    _Atomic uint64_t live;
    _Atomic uint64_t last;    /* no place at or behind this one is in use: a hint */
    _Atomic uint64_t index[]; /* hash's upper half:32 place + 1:32, 0 = free */
};

/* Behind an array's references. W: holder of the collection's lock */
struct sh_array {
    _Atomic uint64_t len; /* items */
};

/* A value, with the key it stands under, if it is a dict's. Never changes. Without references it is
 * a leaf, else it lies behind those of a node. */
struct sh_record {
    _Atomic uint64_t hash;  /* of the key */
    _Atomic uint64_t sizes; /* bytes of the key:32, of the value:32; they are behind this */
    _Atomic uint64_t kinds; /* key's:8 form of the key:8 value's:8; what they mean: py/value.c */
    uint8_t bytes[];
};
#define SH_RECORD_KINDS(key, form, kind) \
    ((uint64_t)(key) | (uint64_t)(form) << 8 | (uint64_t)(kind) << 16)
#define SH_RECORD_FORM(kinds) ((uint32_t)((kinds) >> 8) & 0xffu)

struct sh_lease {
    _Atomic uint64_t cell;    /* 0 = none; W: owner sets, taker or reaper clears by CAS */
    _Atomic uint64_t made_ns; /* CLOCK_MONOTONIC; W: owner, before the cell */
};

/* Free lists: one per page count up to 64, then eight per doubling. */
#define SH_NBINS 240u

/* Things that can be asked of the coordinator, by ticket. */
enum sh_request {
    SH_REQ_GC,
    SH_REQ_SCAVENGE,
    SH_REQ_SCAVENGE_ALL,
    SH_NREQUESTS
};
#define SH_REPORT_FIELDS 12u

struct sh_request_line {
    _Alignas(SH_LINE) _Atomic uint32_t wanted; /* newest ticket; W: anybody */
    _Atomic uint32_t done;                     /* newest ticket answered, a futex; W: coordinator */
    _Atomic uint64_t fields[SH_REPORT_FIELDS]; /* the answer; W: coordinator, before done */
};

/* What made somebody poison the arena, and, in brackets, where. */
enum sh_fault {
    SH_FAULT_NONE,
    SH_FAULT_LOCK,  /* the bytes of a lock (its rank) */
    SH_FAULT_LOG,   /* what cannot be rebuilt, and the log is bad (rank of the lock) */
    SH_FAULT_USED,  /* the high-water mark, or that of the tables (pages) */
    SH_FAULT_SPAN,  /* the record of a span (its page) */
    SH_FAULT_LIST,  /* a list of free runs or orphans, or its link (page) */
    SH_FAULT_GIVEN, /* a run on its way back to the page heap (page) */
    SH_FAULT_CELLS, /* a span of pins that are in use is its owner's no more (page) */
    SH_FAULT_NAMES, /* the table of named roots (entry) */
    SH_FAULT_ROOT,  /* a named root whose block is gone (entry) */
    SH_FAULT_DYING, /* a list of dying nodes (word number) */
    SH_FAULT_NODE, /* a node: more references than bytes, or one that leads nowhere (word number) */
    SH_NFAULTS
};

#define SH_FAULT(fault, where) ((uint64_t)(fault) | (uint64_t)(where) << 8)
#define SH_FAULT_OF(poisoned)  ((uint32_t)(poisoned) & 0xffu)
#define SH_FAULT_AT(poisoned)  ((poisoned) >> 8)

/* Why the coordinator was woken. */
enum {
    SH_WANT_GC = 1,
    SH_WANT_SCAVENGE = 2,
    SH_WANT_MEMORY = 4,
    SH_WANT_REAP = 8,
    SH_WANT_LEAVE = 16,
    SH_WANT_LIMIT = 32
};

#define SH_PAUSES 256u

#define SH_COMMITTED_MASK ((1ull << 40) - 1)

struct sh_header {
    /* Identity; W: creation */
    char magic[8];
    uint32_t version;
    uint32_t header_bytes; /* sizeof(struct sh_header): another compiler or libc is refused */
    uint64_t nonce;        /* random; names the arena for ever */
    uint64_t capacity;     /* bytes of the data area, whole pages */
    uint64_t file_bytes;
    uint64_t pid_namespace; /* inode: robust mutexes hold thread ids of one namespace (I-8) */
    uint64_t created_ns;    /* CLOCK_MONOTONIC */
    uint32_t page_shift;
    uint32_t unit_shift;
    uint32_t config_bytes;
    uint32_t layout;              /* SH_LAYOUT */
    char config[SH_CONFIG_BYTES]; /* JSON */

    struct sh_lock registry; /* rank 1: slots, closing */
    struct sh_lock roots;    /* rank 2: root names */
    struct sh_lock heap;     /* rank 3: free lists, high-water mark */

    /* L: registry */
    _Alignas(SH_LINE) _Atomic uint32_t closing; /* 1: nobody may attach any more */
    _Atomic uint32_t unlinked;   /* 1: the name is gone; W: whoever unlinked it; no lock */
    _Atomic uint32_t slots_used; /* slots 0..n-1 were used at some time */
    /* 1: the table of sites is committed, for ever; W: who writes the first; no lock */
    _Atomic uint32_t sites_committed;
    /* 0, or what was found that cannot be: enum sh_fault:8 where:56; W: whoever finds one first, by
     * CAS, for ever; no L (I-3) */
    _Atomic uint64_t poisoned;

    /* Read on many paths, written rarely */
    _Alignas(SH_LINE) _Atomic uint32_t phase; /* phase | epoch << 8; W: coordinator */
    _Atomic uint32_t waiters;                 /* threads that wait for memory; W: they, reaper */
    _Atomic uint64_t limit_units;             /* soft limit of committed units; W: coordinator */
    /* with more of them the coordinator is woken to look at the limit; W: coordinator */
    _Atomic uint64_t look_units;
    _Atomic uint64_t gc_trigger_pages; /* pages in use that want a GC; W: coordinator */

    _Alignas(SH_LINE) _Atomic uint32_t
        freed; /* futex: goes up when memory comes free for a waiter; W: anybody */
    _Alignas(
        SH_LINE) _Atomic uint32_t wants; /* SH_WANT_ bits; W: anybody sets, coordinator clears */
    /* How often a successor was started since the last one began:16, and above them when that was
     * last, CLOCK_MONOTONIC, ms; 0 since one began. The byte here is locked by one that starts,
     * until it is the coordinator (I-9). W: whoever starts one, by CAS; coordinator */
    _Atomic uint64_t started;

    /* units:40, and above them how often they changed. Units RESERVED, COMMITTED or RELEASING: what
     * the kernel holds of the data area. A death may leave it too high until the next collection.
     * W: whoever moves a unit to or from RELEASED, under its process lock, or the coordinator. */
    _Alignas(SH_LINE) _Atomic uint64_t committed;
    /* Pages of idle runs that the coordinator has out of the page heap at this moment, to release
     * them; W: coordinator. inuse_pages counts them, heap_inuse does not. */
    _Atomic uint64_t borrowed_pages;

    /* L: heap, logged. 64 bits each, for the log. */
    _Alignas(SH_LINE) _Atomic uint64_t
        used_pages;                          /* high-water mark: no page at or above was used */
    _Atomic uint64_t inuse_pages;            /* pages of spans that are not FREE */
    _Atomic uint64_t table_pages;            /* tables are committed for pages below this */
    uint64_t bin_bits[(SH_NBINS + 63) / 64]; /* non-empty bins */
    uint64_t bins[SH_NBINS];                 /* first page of the list, SH_NIL = empty */
    uint64_t orphans[SH_NCLASSES];           /* SMALL spans without owner; first page */

    /* L: roots, logged */
    _Alignas(SH_LINE) uint64_t roots_used; /* entries 0..n-1 were used */
    uint64_t roots_free;                   /* first of the free list */
    uint64_t root_buckets[SH_ROOT_BUCKETS];

    /* W: coordinator. Statistics of slots that are no more, and of collections */
    _Alignas(SH_LINE) _Atomic uint64_t past_mallocs;
    _Atomic uint64_t past_frees;
    _Atomic uint64_t past_alloc_bytes;
    _Atomic uint64_t past_freed_bytes;
    _Atomic uint64_t next_gc; /* heap_alloc at which a GC is due, bytes */
    _Atomic uint64_t last_gc; /* CLOCK_MONOTONIC ns, 0 = never */
    _Atomic uint64_t num_gc;
    _Atomic uint64_t num_forced_gc;
    _Atomic uint64_t oldest_lease_ns; /* CLOCK_MONOTONIC at the last marking, 0 = none */
    _Atomic uint64_t pause_total_ns;
    _Atomic uint64_t pause_ns[SH_PAUSES]; /* ring, num_gc mod SH_PAUSES */

    struct sh_request_line requests[SH_NREQUESTS];
};

static_assert(sizeof(pthread_mutex_t) <= 48, "a mutex leaves room on its line");
static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "64-bit atomics are lock-free");

/* Where everything lies; computed from capacity and shifts, never read from the file. */
#define SH_NTIERS 5u /* block words of blocks of 16 * 4^t bytes and more */

struct sh_geometry {
    uint64_t capacity;
    uint64_t slots, roots, sites, pages, units, words[SH_NTIERS], data, end; /* offsets, bytes */
    uint32_t page_shift, unit_shift;
    uint32_t npages;
};

#endif
