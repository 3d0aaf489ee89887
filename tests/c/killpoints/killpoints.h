/*
 * Death at every instruction: what the files of this folder share. tools/killpoints.py builds and
 * runs them; docs/reference/killpoints.md says how it works and what it does not show.
 *
 *     main.c     one row: step a victim through an operation, and what is done at each point
 *     scenes.c   the operations, and the heaps that they find
 *     colls.c    shared dicts and lists: what is in them before, and must be in them after
 *     victim.c   a process that is stepped; its arena as others see it; the copy at its death
 *     recover.c  what survivors do in the copy
 */
#ifndef SHMHEAP_KILLPOINTS_H
#define SHMHEAP_KILLPOINTS_H

#include <sys/types.h>

#include "../support.h"

/* Scenes */

enum stage {
    EMPTY,
    HALF_FULL,
    NEARLY_FULL,
    NSTAGES
};
extern const char *const stage_names[NSTAGES];

enum {
    LEADS = 1,       /* the victim is the coordinator */
    COMES = 2,       /* ... or becomes a user or the coordinator by the operation */
    TAKES_LEASE = 4, /* the witness's lease on scene.taken may be gone afterwards */
    MAX_KEPT = 64,
    MAX_ITEMS = 160
};

struct scene;

/* `before` runs in the process that plays the survivors, `ready` and `act` in the victim. */
struct op {
    const char *name;
    uint32_t flags;
    void (*before)(struct scene *);
    void (*ready)(struct scene *);
    void (*act)(struct scene *);
};
extern const struct op ops[];
extern const size_t nops;

struct scene {
    const struct op *op;
    enum stage stage;
    int fd;
    struct sh_ctx witness;        /* the survivor */
    struct sh_ref kept[MAX_KEPT]; /* its blocks, each full of one byte */
    uint32_t nkept;
    struct handle leased;      /* its lease on kept[0] */
    struct sh_ctx victim;      /* known in the victim's process only */
    struct sh_ref mine, other; /* blocks of the victim */
    struct handle taken;       /* a handle that the victim opens */
    uint32_t dead_slot, page[4];
    struct sh_use coll, use; /* a collection: the witness's handle, and the victim's */
    struct sh_splice part;
    uint8_t was[MAX_ITEMS], will[MAX_ITEMS]; /* what is in it before and after the operation */
};

void scene_make(struct scene *, const struct op *, enum stage);
void scene_end(struct scene *);
void fill_block(struct sh_ref *, uint8_t byte);
void block_must_be_whole(const struct sh_ref *, int byte); /* -1: any one byte */

/* Collections */

struct sh_value item_value(uint8_t byte);
enum sh_status item_put(struct sh_ctx *, struct sh_use *, uint32_t i, uint8_t byte);
enum sh_status item_pop(struct sh_ctx *, struct sh_use *, uint32_t i, struct sh_found *);
enum sh_status item_get(struct sh_ctx *, struct sh_use *, uint32_t i, struct sh_found *);
enum sh_status item_put_named(struct sh_ctx *, struct sh_use *, uint32_t i, const struct sh_ref *);
void coll_make(struct scene *, bool list, uint32_t n);
void coll_must_be_whole(struct scene *, bool reaped);
void coll_end(struct scene *);

/* Victims */

#define NMUTEXES 3u /* registry, roots, heap */

/* An arena as it is at this instruction. The bytes are compared with those of the last look. */
struct view {
    int fd;
    uint64_t npages;
    const uint8_t *base; /* read only where the kernel holds a page: a look must not make one */
    uint8_t *last;       /* what the last look saw */
    bool *held;
    uint64_t nheld;
    bool at_each;  /* there is a look after each instruction */
    uint32_t died; /* mutexes that the kernel would mark if the victim died now, a bit each */
};
void view_open(struct view *, int fd, bool at_each);
void view_close(struct view *);
bool view_look(struct view *, uint32_t died); /* true: something is new */
int view_copy(const struct view *);           /* the arena as the victim's death would leave it */
struct sh_header *view_header(const struct view *);
uint64_t view_differs(const struct view *, const struct view *); /* pages that are not the same */

struct victim {
    pid_t pid;
    struct shared_with_victim *shared;
    uint64_t instructions;
    bool at_end;
};
struct shared_with_victim {
    uint64_t base;  /* of its mapping of the arena */
    uint64_t owner; /* of its slot; 0: it has none yet */
};
void victim_start(struct victim *, struct scene *, void (*act)(struct scene *));
bool victim_step(struct victim *); /* false: it is at its end */
uint32_t victim_mutexes(const struct victim *, const struct view *);
void victim_kill(struct victim *);

/* Recovery */

extern char failure[512]; /* what the last failed recovery said */
bool survives(struct scene *, const struct view *, bool successor);
void recover_alone(struct scene *); /* an act: the recovery as the thing that is stepped */
void *hold_witness(const struct scene *, int fd);

#endif
