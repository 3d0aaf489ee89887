/*
 * What the naive oracle of test_oracle.c knows: of each block where it is, how long, its
 * generation, its bytes or references, and its holders; of the collection how far it is.
 */
#ifndef SHMHEAP_TEST_ORACLE_H
#define SHMHEAP_TEST_ORACLE_H

#include "support.h"

#define PLAYERS 5u
#define NAMES   24u
#define LETTERS 256u
#define ROOM    8192u      /* of the oracle's tables: more than there can be */
#define TODO    (1u << 20) /* likewise, of references that are looked at together */
#define TAIL    48u        /* operations printed */

struct block {
    uint64_t off, gen, nbytes;
    uint64_t room; /* bytes that nobody else has */
    uint64_t seed; /* of its bytes */
    _Atomic uint64_t *word;
    uint32_t holders, lost; /* lost: counted, and then it died before it wrote the holder (I-6) */
    uint32_t touched;       /* the epoch */
    uint32_t seen;          /* holders, by who marks */
    bool marked;
    uint32_t nrefs; /* 0: a leaf */
    struct block *ref[];
};

struct hold {
    struct block *block;
    uint32_t who;         /* the player who made it, who may be dead */
    struct sh_ref ref;    /* a pin's */
    struct handle handle; /* a lease's */
};

struct holds {
    struct hold at[ROOM];
    uint32_t n;
};

struct player {
    struct sh_ctx c;
    uint32_t id; /* 0: nobody is here */
};

enum cycle {
    START,
    MARK,
    FINISH,
    SWEEP,
    STAMP,
    END
};

struct did {
    uint64_t step;
    const char *what;
    uint64_t with[4];
};

struct oracle {
    int fd;
    struct rng rng;
    struct sh_ctx anchor, lead; /* anchor: the mapping that all share */
    struct player player[PLAYERS];
    uint32_t last_id;

    struct block *block[ROOM]; /* by offset */
    uint32_t nblocks;
    uint64_t bytes;
    uint32_t lost;
    bool sees_holders; /* the coordinator counts them while it marks */
    struct holds pins, leases;
    struct block *root[NAMES];
    struct handle letter[LETTERS]; /* also of blocks that are long gone */
    uint64_t *next_gen;            /* of each place of 16 bytes, the least that may come */

    struct block *todo[TODO]; /* whose references are to be looked at, or dropped */
    uint32_t ntodo;

    enum cycle next;
    uint32_t phase, epoch, stamp, page;
    uint64_t marked; /* blocks, in this collection */
    uint32_t target; /* pins to be reached */

    uint64_t step;
    struct did tail[TAIL];
    uint64_t opened, stale, full, swept;
};

struct oracle *oracle_new(uint64_t capacity, uint64_t limit);
void oracle_free(struct oracle *);
void map_shared(struct oracle *, struct sh_ctx *);
void poison_what_is_free(struct oracle *);

void did(struct oracle *, const char *what, uint64_t, uint64_t, uint64_t, uint64_t);
uint32_t pick(struct oracle *, uint32_t n);
uint64_t pick_64(struct oracle *);

/* Blocks */
struct block *find_block(const struct oracle *, uint64_t off, uint64_t gen);
uint8_t *data_of(const struct oracle *, const struct block *);
uint64_t bytes_from(const struct block *); /* where those begin that are the users' */
bool is_right(const struct oracle *, const struct block *);
bool is_kept(const struct oracle *, const struct block *);
void enter_block(struct oracle *, struct block *);
void forget_block(struct oracle *, struct block *);
void touch(const struct oracle *, struct block *);
void held(struct oracle *, struct block *);
void dropped(struct oracle *, struct block *);
void let_go(struct oracle *, struct block *, bool touches);

/* Holds, and who has them */
void add_hold(struct holds *, struct hold);
struct hold take_hold(struct holds *, uint32_t i);
struct hold *find_lease(struct oracle *, const struct handle *, const struct block *);
struct player *player_of(struct oracle *, uint32_t id);

/* The coordinator */
void cycle(struct oracle *); /* a step of a collection */
void release(struct oracle *);
void reap(struct oracle *);
void succeed(struct oracle *);

#endif
