/*
 * The border: what the files of this folder share, the only ones that know Python. Types:
 *
 *     HeapBase   a process's use of an arena (base of shmheap.Heap)      Block     a handle
 *     Steward    the coordinator's hold on an arena                      Observer  from outside
 *
 * Nobody waits for a shared lock with the GIL: what cannot be had at once is done without it, in
 * slices between which signals are served. What runs once per allocation is inline here.
 */
#ifndef SH_PY_H
#define SH_PY_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <structmember.h>

#include <pthread.h>

#include "../core.h"

#define SLICE_MS 50

/* What C holds by its address (memory.c) */
struct held {
    struct sh_ref *refs; /* a hash table; data NULL: a free place; nbytes 0: to be dropped */
    size_t n, room;
    _Atomic size_t late;  /* to be dropped */
    _Atomic size_t users; /* of the mapping: what is held, and threads inside */
    _Atomic uint64_t asked_ns;
};

/* Everything of an arena, which heap and blocks share (box.c) */
struct box {
    struct sh_ctx ctx;
    Py_ssize_t refs, exports, calls; /* heaps and blocks; exported buffers; threads inside */
    _Atomic bool closed;
    bool attached, keep;     /* keep: the last user does not close the heap */
    const char *left_behind; /* why a fork that is under way does not take the heap along */
    PyObject *path, *bell;   /* str; callable that rings the doorbell */
    struct held held;
    struct box *next;
};

/* Also a Steward and an Observer */
typedef struct {
    PyObject_HEAD struct box *box;
    PyObject *weakrefs;
} Heap;

typedef struct {
    PyObject_HEAD struct box *box; /* NULL: freed */
    Py_ssize_t exports;
    PyObject *weakrefs;
    struct sh_ref ref;
} Block;

typedef struct {
    PyTypeObject *block_type, *heap_type;
    PyObject *HeapError, *HeapFull, *StaleHandle, *UntrustedArena, *HeapCorrupt;
    PyObject *rebuild, *lease_type, *copy_bytes, *make_room; /* of shmheap.block */
    PyObject *encode_value, *decode_value;                   /* of shmheap.values */
    PyObject *spare[64];                                     /* memory of dead Block objects */
    int nspare;
} State;

/* state.c */
extern State *state; /* one interpreter: the module refuses a second one */
bool load_errors(State *);
bool load_python_side(void);

/* errors.c */
PyObject *fail(struct box *, enum sh_status); /* NULL, with the exception set */
PyObject *fault_text(const struct sh_ctx *);
static inline bool is_short(enum sh_status s)
{
    return s == SH_FULL || s == SH_LIMIT || s == SH_NOSPACE;
}

/* box.c */

/* Those that a fork takes along: attached ones. The lock is held through a fork; a thread that
 * waits for it may hold the GIL, so whoever has it neither runs Python nor waits for the GIL. */
extern struct box *boxes;
extern pthread_mutex_t boxes_lock;
void box_enter_list(struct box *);

struct box *box_new(int fd, PyObject *path, bool writable);
bool box_can_settle(const struct box *);
void box_settle(struct box *);
void box_free(struct box *);
int box_ring(struct box *);
void box_ring_quietly(struct box *);
void boxes_tell(void);
bool box_make_room(struct box *, enum sh_status, bool *asked);

static inline void box_drop(struct box *b)
{
    if (--b->refs == 0)
        box_free(b);
}

static inline bool box_is_forked(struct box *b)
{
    return b->attached && sh_is_forked(&b->ctx);
}

static inline bool box_usable(struct box *b)
{
    if (__builtin_expect(b == NULL || b->closed || !b->attached, 0)) {
        fail(b, SH_CLOSED);
        return false;
    }
    if (__builtin_expect(sh_is_forked(&b->ctx), 0)) {
        fail(b, SH_FORKED);
        return false;
    }
    return true;
}

/* Nobody unmaps the box in between, whatever other threads do. */
static inline void box_enter(struct box *b)
{
    b->calls++;
}

static inline void box_leave(struct box *b)
{
    b->calls--;
    if (b->closed)
        box_settle(b);
}

/* Calls `op` without the GIL until it is not BUSY; signals are served in between. Another thread
 * may have closed the box by then, and unmapped it: who needs it after, enters it before. */
#define WAITING(b, s, op)                      \
    do {                                       \
        box_enter(b);                          \
        for (;;) {                             \
            Py_BEGIN_ALLOW_THREADS             \
                s = op;                        \
            Py_END_ALLOW_THREADS               \
            if (s != SH_BUSY && s != SH_AGAIN) \
                break;                         \
            if (s == SH_AGAIN)                 \
                box_ring_quietly(b);           \
            if (PyErr_CheckSignals() != 0) {   \
                s = SH_REFUSED;                \
                break;                         \
            }                                  \
        }                                      \
        box_leave(b);                          \
    } while (0)

/* The same for what may need memory for a cell. */
#define WAITING_FOR_ROOM(b, s, op)           \
    do {                                     \
        bool asked = false;                  \
        do                                   \
            WAITING(b, s, op);               \
        while (box_make_room(b, s, &asked)); \
    } while (0)

/* memory.c */
PyObject *memory_capsule(void);
void memory_before_fork(void);
void memory_after_fork(bool child);

/* fork.c */
bool fork_handlers(void);
PyObject *core_after_fork(PyObject *self, PyObject *unused);

/* The block may be another Heap object's of the same arena: as this one maps it. */
static inline bool ref_here(const struct box *b, const Block *block, struct sh_ref *ref)
{
    ptrdiff_t shift = b->ctx.base - block->box->ctx.base;
    *ref = block->ref;
    ref->data += shift;
    ref->word = (void *)((uint8_t *)ref->word + shift);
    return block->box->ctx.hdr->nonce == b->ctx.hdr->nonce;
}

/* enum sh_node_kind, 0 for a leaf */
static inline uint32_t node_kind(const struct sh_ref *r)
{
    uint64_t w = atomic_load_explicit(r->word, memory_order_acquire);
    return w & SH_NODE ? SH_NODE_KIND(atomic_load(&((struct sh_node *)r->data)->head)) : 0;
}
static inline uint32_t node_refs(const struct sh_ref *r)
{
    return SH_NODE_NREFS(atomic_load(&((struct sh_node *)r->data)->head));
}

/* numbers.c */
PyObject *stats_of(const struct sh_ctx *);
PyObject *check_of(struct box *);
PyObject *inspect_of(struct box *);
PyObject *shares_of(struct box *);
PyObject *holders_of(struct box *, PyObject *offsets);
PyObject *largest_of(struct box *, uint32_t n);
PyObject *sites_of(struct box *);
PyObject *processes_of(const struct sh_ctx *);
PyObject *config_of(const struct sh_ctx *);

/* block.c */
extern PyType_Spec block_spec;
bool handle_usable(Block *);

static inline Block *block_new(struct box *b)
{
    Block *self;
    if (state->nspare > 0)
        self = (Block *)PyObject_Init(state->spare[--state->nspare], state->block_type);
    else
        self = PyObject_New(Block, state->block_type);
    if (self == NULL)
        return NULL;
    self->box = b;
    self->exports = 0;
    self->weakrefs = NULL;
    b->refs++;
    return self;
}

/* The memory of a Block that holds nothing (any more). */
static inline void block_discard(Block *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (self->box != NULL)
        box_drop(self->box);
    if (state->nspare < 64)
        state->spare[state->nspare++] = (PyObject *)self;
    else
        PyObject_Free(self);
    Py_DECREF(type);
}

/* heap.c: what Steward and Observer have of it, too */
extern PyType_Spec heap_spec;
extern PyGetSetDef heap_getset[];
extern PyMemberDef heap_members[];
PyObject *heap_new(PyTypeObject *, PyObject *args, PyObject *kwargs);
void heap_dealloc(Heap *);
PyObject *heap_close(Heap *, PyObject *unused);

/* steward.c, observer.c */
extern PyType_Spec steward_spec, observer_spec;

/* functions.c */
PyObject *core_format(PyObject *self, PyObject *args);
PyObject *core_read_config(PyObject *self, PyObject *args);
PyObject *core_spawn_detached(PyObject *self, PyObject *args);

#endif
