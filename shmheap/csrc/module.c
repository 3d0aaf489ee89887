/*
 * The border: the only file that knows Python. Types:
 *
 *     HeapBase   a process's use of an arena (base of shmheap.Heap)      Block     a handle
 *     Steward    the coordinator's hold on an arena                      Observer  a look from
 * outside
 *
 * Everything of an arena is in a box, which heap and blocks share and which lives until the last of
 * them is gone. A closed box is detached and unmapped when the last exported buffer is released and
 * no call is inside it. Nobody waits for a shared lock with the GIL: what cannot be had at once is
 * done without it, in slices between which signals are served.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core.h"

#define SLICE_MS          50
#define SUCCESSION_SLICES 2 /* who waits for a coordinator that died looks for it this often */

/* Boxes */

struct box {
    struct sh_ctx ctx;
    Py_ssize_t refs, exports, calls; /* heaps and blocks; exported buffers; threads inside */
    bool closed, attached, keep;     /* keep: the last user does not close the heap */
    const char *left_behind;         /* why a fork that is under way does not take the heap along */
    PyObject *path, *bell;           /* str; callable that rings the doorbell */
    struct box *next;
};

typedef struct {
    PyTypeObject *block_type;
    PyObject *HeapError, *HeapFull, *StaleHandle, *UntrustedArena, *HeapCorrupt;
    PyObject *rebuild, *lease_type, *copy_bytes, *make_room; /* of shmheap.block */
    PyObject *spare[64];                                     /* memory of dead Block objects */
    int nspare;
} State;

static struct PyModuleDef moduledef;
static State *state; /* one interpreter: the module refuses a second one */

/* Those that a fork takes along: attached ones. The lock is held through a fork; a thread that
 * waits for it may hold the GIL, so whoever has it neither runs Python nor waits for the GIL. */
static struct box *boxes;
static pthread_mutex_t boxes_lock = PTHREAD_MUTEX_INITIALIZER;

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

static void box_enter_list(struct box *b)
{
    pthread_mutex_lock(&boxes_lock);
    b->next = boxes;
    boxes = b;
    pthread_mutex_unlock(&boxes_lock);
}

static void box_leave_list(struct box *b)
{
    pthread_mutex_lock(&boxes_lock);
    for (struct box **at = &boxes; *at != NULL; at = &(*at)->next)
        if (*at == b) {
            *at = b->next;
            break;
        }
    pthread_mutex_unlock(&boxes_lock);
}

/* bell(alive, over): is there a coordinator, and is the heap closed for ever? */
static int call_bell(struct box *b, bool over)
{
    PyObject *alive = sh_alive(&b->ctx, 0) ? Py_True : Py_False;
    PyObject *done = PyObject_CallFunctionObjArgs(b->bell, alive, over ? Py_True : Py_False, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Whether a signal's handler raised the error that is set: the bell's own has an errno. */
static bool is_a_handlers(void)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyObject *number = value ? PyObject_GetAttrString(value, "errno") : NULL;
    bool own = number != NULL && number != Py_None;
    PyErr_Clear();
    Py_XDECREF(number);
    PyErr_Restore(type, value, trace);
    return !own;
}

/* Calls the bell if there is something new for the coordinator. */
static int ring(struct box *b)
{
    if (__builtin_expect(!b->ctx.ring, 1) || b->bell == NULL)
        return 0;
    b->ctx.ring = false;
    if (call_bell(b, false) == 0)
        return 0;
    b->ctx.ring = is_a_handlers(); /* it came in between: the next call rings again */
    return -1;
}

static int raise_again(void *error)
{
    PyErr_SetObject((PyObject *)Py_TYPE((PyObject *)error), error);
    Py_DECREF((PyObject *)error);
    return -1;
}

/* Handlers run in the main thread, and so do pending calls: what one raised where nothing can be
 * raised arrives a moment later. The bell's own errors go: the coordinator looks again at its next
 * turn. */
static void raise_later(void)
{
    PyObject *type, *value, *trace;
    if (!is_a_handlers()) {
        PyErr_Clear();
        return;
    }
    PyErr_Fetch(&type, &value, &trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    if (value == NULL || Py_AddPendingCall(raise_again, value) != 0)
        Py_XDECREF(value);
}

/* The same where nobody could be told of an error. */
static void ring_quietly(struct box *b, bool over)
{
    PyObject *type, *value, *trace;
    if ((!b->ctx.ring && !over) || b->bell == NULL)
        return;
    b->ctx.ring = false;
    PyErr_Fetch(&type, &value, &trace);
    if (call_bell(b, over) != 0) {
        b->ctx.ring = is_a_handlers();
        raise_later();
    }
    PyErr_Restore(type, value, trace);
}

/* Detaches once nobody can be inside or look at the memory. */
static bool box_can_settle(const struct box *b)
{
    return b->closed && b->attached && b->exports == 0 && b->calls == 0;
}

static void box_settle(struct box *b)
{
    if (box_can_settle(b)) {
        b->attached = false;
        box_leave_list(b);
        if (b->ctx.slot != NULL && !sh_is_forked(&b->ctx)) { /* else the slot is our parent's */
            bool over;
            Py_BEGIN_ALLOW_THREADS over = sh_detach(&b->ctx, b->keep);
            Py_END_ALLOW_THREADS b->ctx.ring =
                true; /* who leaves looks whether there is a coordinator (I-9) */
            ring_quietly(b, over);
        }
        sh_unmap(&b->ctx);
    }
}

static void box_drop(struct box *b)
{
    if (--b->refs != 0)
        return;
    b->closed = true;
    box_settle(b);
    Py_XDECREF(b->path);
    Py_XDECREF(b->bell);
    PyMem_Free(b);
}

static bool is_short(enum sh_status s)
{
    return s == SH_FULL || s == SH_LIMIT || s == SH_NOSPACE;
}

/* HeapFull where there is no heap yet that could say more. */
static void fail_short(enum sh_status s)
{
    const char *limit = s == SH_FULL ? "capacity" : s == SH_LIMIT ? "memory_limit" : "tmpfs";
    PyObject *error = PyObject_CallFunction(state->HeapFull, "s", limit);
    if (error != NULL)
        PyErr_SetObject(state->HeapFull, error);
    Py_XDECREF(error);
}

static void fail_forked(const struct box *b)
{
    if (b->left_behind != NULL)
        PyErr_Format(
            state->HeapError,
            "this process was forked while it could not be given a place in the heap: %s. It holds "
            "nothing there; attach again by name",
            b->left_behind);
    else
        PyErr_SetString(state->HeapError,
                        "this process was forked without libc's fork(), so it holds nothing "
                        "in the heap: use os.fork or multiprocessing, or attach again by name");
}

/* What was found first, by whichever process, or None. */
static PyObject *fault_of(const struct sh_ctx *c)
{
    uint64_t poisoned = atomic_load(&c->hdr->poisoned);
    if (poisoned == 0)
        return Py_NewRef(Py_None);
    return PyUnicode_FromFormat("%s %llu", sh_fault_text(SH_FAULT_OF(poisoned)),
                                (unsigned long long)SH_FAULT_AT(poisoned));
}

static void fail_corrupt(const struct box *b)
{
    PyObject *fault = fault_of(&b->ctx);
    if (fault != NULL)
        PyErr_Format(state->HeapCorrupt,
                     "the heap %U is corrupt: %S. Every operation of every process is refused "
                     "from now on; what you hold can still be read. `shmheap verify --deep NAME` "
                     "says all that is wrong, please report it; `shmheap rm NAME` removes the "
                     "heap, and a new one can have its name",
                     b->path, fault);
    Py_XDECREF(fault);
}

static PyObject *fail(struct box *b, enum sh_status s)
{
    switch (s) {
    case SH_CLOSED:
        PyErr_SetString(PyExc_ValueError, "the heap is closed");
        break;
    case SH_FORKED:
        fail_forked(b);
        break;
    case SH_STALE:
        PyErr_SetString(state->StaleHandle, "the block is gone: its last holder dropped it");
        break;
    case SH_CORRUPT:
        fail_corrupt(b);
        break;
    case SH_UNTRUSTED:
        PyErr_Format(state->UntrustedArena, "not a usable arena: %s", b->ctx.why);
        break;
    case SH_NOSLOT:
        PyErr_Format(state->HeapError, "the heap has %u processes already", SH_MAX_SLOTS - 1);
        break;
    case SH_NOROOTS:
        PyErr_Format(state->HeapError, "the heap has %u named roots already", SH_MAX_ROOTS);
        break;
    case SH_NOMEM:
        PyErr_NoMemory();
        break;
    case SH_SYSTEM:
        PyErr_SetFromErrno(PyExc_OSError);
        break;
    case SH_BUSY:
        PyErr_SetString(PyExc_TimeoutError,
                        "a process that was stopped inside an operation holds its lock");
        break;
    case SH_FULL:
    case SH_LIMIT:
    case SH_NOSPACE:
        fail_short(s);
        break;
    default:
        PyErr_Format(state->HeapError, "%s", sh_status_text(s));
    }
    return NULL;
}

static bool box_is_forked(struct box *b)
{
    return b->attached && sh_is_forked(&b->ctx);
}

static bool box_usable(struct box *b)
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
static void box_enter(struct box *b)
{
    b->calls++;
}

static void box_leave(struct box *b)
{
    b->calls--;
    if (b->closed)
        box_settle(b);
}

/* Calls `op` without the GIL until it is not BUSY; signals are served in between. */
#define WAITING(b, s, op)                                                  \
    do {                                                                   \
        box_enter(b);                                                      \
        for (;;) {                                                         \
            Py_BEGIN_ALLOW_THREADS s = op;                                 \
            Py_END_ALLOW_THREADS if (s != SH_BUSY && s != SH_AGAIN) break; \
            if (s == SH_AGAIN)                                             \
                ring_quietly(b, false);                                    \
            if (PyErr_CheckSignals() != 0) {                               \
                s = SH_REFUSED;                                            \
                break;                                                     \
            }                                                              \
        }                                                                  \
        box_leave(b);                                                      \
    } while (0)

static bool load_python_side(void)
{
    if (state->rebuild != NULL)
        return true;
    PyObject *m = PyImport_ImportModule("shmheap.block");
    if (m == NULL)
        return false;
    state->lease_type = PyObject_GetAttrString(m, "Lease");
    state->copy_bytes = PyObject_GetAttrString(m, "copy_bytes");
    state->make_room = PyObject_GetAttrString(m, "make_room");
    state->rebuild = PyObject_GetAttrString(m, "rebuild");
    Py_DECREF(m);
    return !PyErr_Occurred();
}

/* Pins, leases and names take memory, too. Where there is none Python asks the coordinator for
 * some, once, and then says why not. True: try again. */
static bool make_room(struct box *b, enum sh_status s, bool *asked)
{
    if (!is_short(s) || PyErr_Occurred() || !box_usable(b) || !load_python_side())
        return false;
    PyObject *done = PyObject_CallFunction(state->make_room, "OKii", b->path,
                                           (unsigned long long)b->ctx.hdr->nonce, (int)s, *asked);
    bool again = done != NULL && box_usable(b);
    Py_XDECREF(done);
    *asked = true;
    return again;
}

/* The same for what may need memory for a cell. */
#define WAITING_FOR_ROOM(b, s, op)       \
    do {                                 \
        bool asked = false;              \
        do                               \
            WAITING(b, s, op);           \
        while (make_room(b, s, &asked)); \
    } while (0)

/* Blocks */

static Block *block_new(struct box *b)
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
static void block_discard(Block *self)
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

/* Drops the pin. Cannot fail: it waits as long as it takes, without the GIL. Nobody else may have
 * the block in hand by then. */
static void block_release(Block *self, struct box *b)
{
    if (!b->attached || sh_is_forked(&b->ctx))
        return; /* detached: the reaper has it */
    enum sh_status s = sh_unpin(&b->ctx, &self->ref, 0);
    if (__builtin_expect(s != SH_OK, 0)) {
        b->calls++;
        Py_BEGIN_ALLOW_THREADS while (s == SH_BUSY) s = sh_unpin(&b->ctx, &self->ref, SLICE_MS);
        while (s == SH_DEFERRED || s == SH_BUSY)
            s = sh_flush(&b->ctx, SLICE_MS);
        Py_END_ALLOW_THREADS b->calls--;
        if (b->closed)
            box_settle(b);
    }
    ring_quietly(b, false);
}

static void block_dealloc(Block *self)
{
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs((PyObject *)self);
    if (self->box != NULL)
        block_release(self, self->box);
    block_discard(self);
}

static bool block_usable(Block *self)
{
    if (self->box == NULL) {
        PyErr_SetString(state->StaleHandle, "this Block was freed");
        return false;
    }
    return (self->exports > 0 && !box_is_forked(self->box)) || box_usable(self->box);
}

static int block_getbuffer(Block *self, Py_buffer *view, int flags)
{
    if (!block_usable(self)) {
        view->obj = NULL;
        return -1;
    }
    if (PyBuffer_FillInfo(view, (PyObject *)self, self->ref.data, (Py_ssize_t)self->ref.nbytes, 0,
                          flags) != 0)
        return -1;
    self->exports++;
    self->box->exports++;
    return 0;
}

static void block_releasebuffer(Block *self, Py_buffer *view)
{
    (void)view;
    self->exports--;
    if (--self->box->exports == 0 && self->box->closed)
        box_settle(self->box);
}

static PyObject *block_free(Block *self, PyObject *unused)
{
    (void)unused;
    if (self->box == NULL)
        Py_RETURN_NONE;
    if (self->exports > 0) {
        PyErr_Format(
            PyExc_BufferError,
            "cannot free: %zd exported buffer(s) (memoryview, NumPy array) still use the block; "
            "release them first",
            self->exports);
        return NULL;
    }
    if (self->box->attached && !box_usable(self->box))
        return NULL;
    struct box *b = self->box;
    self->box = NULL; /* first: other threads may run while this one waits */
    block_release(self, b);
    box_drop(b);
    Py_RETURN_NONE;
}

static Py_ssize_t block_len(Block *self)
{
    return block_usable(self) ? (Py_ssize_t)self->ref.nbytes : -1;
}

static PyObject *block_subscript(Block *self, PyObject *key)
{
    PyObject *view = PyMemoryView_FromObject((PyObject *)self);
    PyObject *item = view ? PyObject_GetItem(view, key) : NULL;
    Py_XDECREF(view);
    return item;
}

static int block_ass_subscript(Block *self, PyObject *key, PyObject *value)
{
    if (value == NULL) {
        PyErr_SetString(PyExc_TypeError, "a Block has a fixed size");
        return -1;
    }
    PyObject *view = PyMemoryView_FromObject((PyObject *)self);
    int rc = view ? PyObject_SetItem(view, key, value) : -1;
    Py_XDECREF(view);
    return rc;
}

static PyObject *block_bytes(Block *self, PyObject *unused)
{
    (void)unused;
    if (!block_usable(self))
        return NULL;
    return PyBytes_FromStringAndSize((const char *)self->ref.data, (Py_ssize_t)self->ref.nbytes);
}

static uint64_t block_offset(Block *self)
{
    return sh_data_offset(&self->box->ctx, &self->ref);
}

static PyObject *block_repr(Block *self)
{
    if (self->box == NULL)
        return PyUnicode_FromString("<shmheap.Block: freed>");
    if (!self->box->attached)
        return PyUnicode_FromString("<shmheap.Block: its heap is closed>");
    return PyUnicode_FromFormat(
        "<shmheap.Block: %zd bytes at offset %llu, generation %llu, of %R%s>",
        (Py_ssize_t)self->ref.nbytes, (unsigned long long)block_offset(self),
        (unsigned long long)self->ref.gen, self->box->path, self->exports ? ", exported" : "");
}

static PyObject *block_get_nbytes(Block *self, void *unused)
{
    (void)unused;
    return block_usable(self) ? PyLong_FromUnsignedLongLong(self->ref.nbytes) : NULL;
}

static PyObject *block_get_offset(Block *self, void *unused)
{
    (void)unused;
    return block_usable(self) ? PyLong_FromUnsignedLongLong(block_offset(self)) : NULL;
}

static PyObject *block_get_generation(Block *self, void *unused)
{
    (void)unused;
    return block_usable(self) ? PyLong_FromUnsignedLongLong(self->ref.gen) : NULL;
}

static PyObject *block_get_freed(Block *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->box == NULL);
}

static PyObject *make_lease(Block *self, struct box *b)
{
    enum sh_status s;
    uint64_t cell = 0;
    uint32_t seq = 0;
    unsigned long long nonce = b->ctx.hdr->nonce, offset = block_offset(self);
    WAITING_FOR_ROOM(b, s, sh_lease_make(&b->ctx, &self->ref, SLICE_MS, &cell, &seq));
    if (PyErr_Occurred())
        return NULL;
    if (s != SH_OK)
        return fail(b, s);
    return Py_BuildValue("(OKKKKI)", b->path, nonce, offset, (unsigned long long)self->ref.gen,
                         (unsigned long long)cell, (unsigned int)seq);
}

/* What another process needs: (path, nonce, offset, generation, lease's cell, lease's number). */
static PyObject *block_make_lease(Block *self, PyObject *unused)
{
    (void)unused;
    if (!block_usable(self) || !box_usable(self->box))
        return NULL;
    struct box *b = self->box;
    b->refs++; /* another thread may free the block, and with it the heap, while this one waits */
    PyObject *handle = make_lease(self, b);
    box_drop(b);
    return handle;
}

static PyObject *block_reduce(Block *self, PyObject *unused)
{
    if (!load_python_side())
        return NULL;
    PyObject *handle = block_make_lease(self, unused);
    return handle ? Py_BuildValue("(ON)", state->rebuild, handle) : NULL;
}

static PyObject *block_lease(Block *self, PyObject *unused)
{
    if (!load_python_side())
        return NULL;
    PyObject *handle = block_make_lease(self, unused);
    if (handle == NULL)
        return NULL;
    PyObject *lease = PyObject_CallFunctionObjArgs(state->lease_type, handle, NULL);
    Py_DECREF(handle);
    return lease;
}

static PyObject *block_copy(Block *self, PyObject *unused)
{
    (void)unused;
    enum sh_status s;
    if (!block_usable(self) || !box_usable(self->box))
        return NULL;
    struct box *b = self->box;
    Block *other = block_new(b);
    if (other == NULL)
        return NULL;
    WAITING_FOR_ROOM(b, s, sh_repin(&b->ctx, &self->ref, SLICE_MS, &other->ref));
    if (s == SH_OK)
        return (PyObject *)other;
    if (!PyErr_Occurred())
        fail(b, s);
    block_discard(other); /* last: it may be what keeps the box */
    return NULL;
}

static PyObject *block_deepcopy(Block *self, PyObject *memo)
{
    (void)memo; /* copy.deepcopy enters the copy there itself */
    if (!block_usable(self) || !box_usable(self->box) || !load_python_side())
        return NULL;
    return PyObject_CallFunction(state->copy_bytes, "OOK", (PyObject *)self, self->box->path,
                                 (unsigned long long)self->box->ctx.hdr->nonce);
}

static PyObject *block_richcompare(PyObject *x, PyObject *y, int op)
{
    if ((op != Py_EQ && op != Py_NE) || Py_TYPE(x) != Py_TYPE(y))
        Py_RETURN_NOTIMPLEMENTED;
    Block *a = (Block *)x, *b = (Block *)y;
    bool same = a == b || (a->box != NULL && b->box != NULL && a->box->attached &&
                           b->box->attached && a->box->ctx.hdr->nonce == b->box->ctx.hdr->nonce &&
                           block_offset(a) == block_offset(b) && a->ref.gen == b->ref.gen);
    return PyBool_FromLong(same == (op == Py_EQ));
}

static Py_hash_t block_hash(Block *self)
{
    /* Of what stays the same when the handle is freed, and in every mapping of the heap. */
    uint64_t place = (uint64_t)self->ref.page << 12 | ((uintptr_t)self->ref.data & 0xfffu);
    Py_hash_t h = (Py_hash_t)(place * 1000003u ^ self->ref.gen);
    return h == -1 ? -2 : h;
}

static PyMethodDef block_methods[] = {
    {"free", (PyCFunction)block_free, METH_NOARGS,
     "Drop this handle's hold on the block now instead of when the handle goes.\n\n"
     "The memory is free when no process holds it any more. A second call does nothing.\n\n"
     "Raises:\n    BufferError: a buffer exported from this handle is still in use."},
    {"lease", (PyCFunction)block_lease, METH_NOARGS,
     "Return a Lease: keeps the block alive on its way to another process, until taken or "
     "released.\n\n"
     "Pickling a Block makes one by itself. Cost: the process lock."},
    {"__reduce__", (PyCFunction)block_reduce, METH_NOARGS, "Pickle as a handle, with a lease."},
    {"__copy__", (PyCFunction)block_copy, METH_NOARGS, "Another handle of the same block."},
    {"__deepcopy__", (PyCFunction)block_deepcopy, METH_O, "A new block with a copy of the bytes."},
    {"__bytes__", (PyCFunction)block_bytes, METH_NOARGS, "A copy of the bytes."},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef block_getset[] = {
    {"nbytes", (getter)block_get_nbytes, NULL, "Size in bytes, as asked for.", NULL},
    {"offset", (getter)block_get_offset, NULL, "Where in the data area it starts, in bytes.", NULL},
    {"generation", (getter)block_get_generation, NULL, "How often this place was used before.",
     NULL},
    {"freed", (getter)block_get_freed, NULL, "Whether free() was called on this handle.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyMemberDef block_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Block, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL}};

static PyType_Slot block_slots[] = {
    {Py_tp_doc,
     "Shared memory that this process holds: made by Heap.alloc and Heap.put.\n\n"
     "Has the buffer protocol (memoryview, numpy.frombuffer); an exported buffer keeps the\n"
     "block alive. Pickles as a handle to any process of the host. Freed when the last\n"
     "holder in any process drops it."},
    {Py_tp_dealloc, block_dealloc},
    {Py_tp_repr, block_repr},
    {Py_tp_hash, block_hash},
    {Py_tp_richcompare, block_richcompare},
    {Py_tp_methods, block_methods},
    {Py_tp_getset, block_getset},
    {Py_tp_members, block_members},
    {Py_bf_getbuffer, block_getbuffer},
    {Py_bf_releasebuffer, block_releasebuffer},
    {Py_mp_length, block_len},
    {Py_mp_subscript, block_subscript},
    {Py_mp_ass_subscript, block_ass_subscript},
    {0, NULL}};

static PyType_Spec block_spec = {"shmheap._core.Block", sizeof(Block), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                 block_slots};

/* Heaps */

static PyObject *heap_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if ((args != NULL && PyTuple_Size(args) != 0) || (kwargs != NULL && PyDict_Size(kwargs) != 0))
        return PyErr_Format(PyExc_TypeError,
                            "a heap is made by shmheap.open(), Heap.create() or Heap.attach()");
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return alloc(type, 0);
}

static struct box *box_new(int fd, PyObject *path, bool writable)
{
    struct box *b = PyMem_Calloc(1, sizeof *b);
    if (b == NULL)
        return (struct box *)PyErr_NoMemory();
    int own = dup(fd);
    enum sh_status s = own < 0 ? SH_SYSTEM : sh_map(&b->ctx, own, writable);
    if (s == SH_OK) {
        b->refs = 1;
        b->attached = true;
        b->path = Py_NewRef(path);
        return b;
    }
    fail(b, s);
    if (own >= 0)
        close(own);
    PyMem_Free(b);
    return NULL;
}

/* _attach(fd, path, bell) -> bool; False: the heap is closing, look for its name again. */
static PyObject *heap_attach(Heap *self, PyObject *args)
{
    int fd;
    PyObject *path, *bell;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "iUO:_attach", &fd, &path, &bell))
        return NULL;
    if (self->box != NULL)
        return PyErr_Format(PyExc_RuntimeError, "attached already");
    struct box *b = box_new(fd, path, true);
    if (b == NULL)
        return NULL;
    WAITING(b, s, sh_attach(&b->ctx, SLICE_MS));
    if (s != SH_OK) {
        if (!PyErr_Occurred() && s != SH_CLOSED)
            fail(b, s);
        sh_unmap(&b->ctx);
        b->attached = false;
        box_drop(b);
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    }
    b->bell = Py_NewRef(bell);
    b->keep = true; /* until we know */
    box_enter_list(b);
    self->box = b;
    return ring(b) == 0 ? Py_NewRef(Py_True) : NULL;
}

static void heap_dealloc(Heap *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs((PyObject *)self);
    if (self->box != NULL)
        box_drop(self->box);
    release(self);
    Py_DECREF(type);
}

static PyObject *heap_close(Heap *self, PyObject *unused)
{
    (void)unused;
    if (self->box != NULL) {
        self->box->closed = true;
        box_settle(self->box);
    }
    Py_RETURN_NONE;
}

/* Says how many bytes: 0 < n. -1 with an error set otherwise. */
static Py_ssize_t parse_nbytes(PyObject *arg)
{
    Py_ssize_t n = PyLong_Check(arg) ? PyLong_AsSsize_t(arg) : PyNumber_AsSsize_t(arg, NULL);
    if (n == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return -1;
        PyErr_Clear();
        n = PyNumber_AsSsize_t(arg, NULL); /* the nearest that there is */
    }
    if (n <= 0) {
        PyErr_Format(PyExc_ValueError, "a block has at least 1 byte, not %zd", n);
        return -1;
    }
    return n;
}

/* The slow path: without the GIL. NULL without an error: *s says why. */
static PyObject *alloc_slow(Heap *self, Block *block, uint64_t n, bool zero, enum sh_status *s)
{
    struct box *b = self->box;
    WAITING(b, *s, sh_alloc(&b->ctx, n, zero, SLICE_MS, &block->ref));
    if (*s == SH_OK && ring(b) == 0)
        return (PyObject *)block;
    if (*s == SH_OK) { /* the bell's own error */
        Py_DECREF(block);
        return NULL;
    }
    block_discard(block);
    if (!PyErr_Occurred() && !is_short(*s))
        fail(b, *s);
    return NULL;
}

/* The common path: no lock that another process wants, no system call, nothing in Python. */
static PyObject *alloc_block(Heap *self, Py_ssize_t n, bool zero, enum sh_status *s)
{
    struct box *b = self->box;
    Block *block = block_new(b);
    if (block == NULL)
        return NULL;
    if (n <= (Py_ssize_t)SH_MAX_SMALL) {
        *s = sh_alloc_fast(&b->ctx, sh_class_of((uint32_t)n), (uint64_t)n, &block->ref);
        if (__builtin_expect(*s == SH_OK, 1)) {
            if (zero)
                memset(block->ref.data, 0, (size_t)n);
            return (PyObject *)block;
        }
    }
    return alloc_slow(self, block, (uint64_t)n, zero, s);
}

/* Memory is short: Python asks the coordinator, waits as long as it may, and says why if it fails.
 */
static PyObject *alloc_when_short(Heap *self, Py_ssize_t n, bool zero, PyObject *timeout,
                                  enum sh_status s)
{
    return PyObject_CallMethod((PyObject *)self, "_alloc_when_short", "niOi", n, (int)zero,
                               timeout ? timeout : Py_False, (int)s);
}

/* None: for ever. A bad one is refused also where it would not be needed. */
static bool is_timeout(PyObject *timeout)
{
    double seconds = timeout == Py_None ? 0 : PyFloat_AsDouble(timeout);
    if (PyErr_Occurred())
        return false;
    if (seconds >= 0)
        return true;
    PyErr_Format(PyExc_ValueError, "a timeout is a number of seconds from 0 on, or None: not %R",
                 timeout);
    return false;
}

static PyObject *heap_alloc(Heap *self, PyObject *const *args, Py_ssize_t nargs, PyObject *kwnames)
{
    PyObject *timeout = NULL;
    enum sh_status s = SH_OK;
    bool zero = true;
    if (nargs != 1)
        return PyErr_Format(PyExc_TypeError,
                            "alloc() takes 1 positional argument (nbytes), not %zd", nargs);
    for (Py_ssize_t i = 0; kwnames != NULL && i < PyTuple_Size(kwnames); i++) {
        PyObject *name = PyTuple_GetItem(kwnames, i);
        if (PyUnicode_CompareWithASCIIString(name, "zero") == 0) {
            int truth = PyObject_IsTrue(args[nargs + i]);
            if (truth < 0)
                return NULL;
            zero = truth != 0;
        } else if (PyUnicode_CompareWithASCIIString(name, "timeout") == 0) {
            timeout = args[nargs + i];
            if (!is_timeout(timeout))
                return NULL;
        } else {
            return PyErr_Format(PyExc_TypeError, "alloc() got an unexpected keyword argument %R",
                                name);
        }
    }
    Py_ssize_t n = parse_nbytes(args[0]);
    if (n < 0 || !box_usable(self->box))
        return NULL;
    PyObject *block = alloc_block(self, n, zero, &s);
    return block != NULL || PyErr_Occurred() ? block : alloc_when_short(self, n, zero, timeout, s);
}

/* _alloc_once(nbytes, zero) -> Block, or the status as an int if memory is short. */
static PyObject *heap_alloc_once(Heap *self, PyObject *args)
{
    Py_ssize_t n;
    int zero;
    enum sh_status s = SH_OK;
    if (!PyArg_ParseTuple(args, "np:_alloc_once", &n, &zero) || !box_usable(self->box))
        return NULL;
    PyObject *block = alloc_block(self, n, zero, &s);
    return block != NULL || PyErr_Occurred() ? block : PyLong_FromLong((long)s);
}

static PyObject *put_view(Heap *self, Py_buffer *view)
{
    enum sh_status s = SH_OK;
    if (view->len == 0)
        return PyErr_Format(PyExc_ValueError, "a block has at least 1 byte, not 0");
    if (view->format != NULL && strchr(view->format, 'O') != NULL)
        return PyErr_Format(PyExc_ValueError, "Python objects cannot be shared, only bytes");
    PyObject *block = alloc_block(self, view->len, false, &s);
    if (block == NULL && !PyErr_Occurred())
        block = alloc_when_short(self, view->len, false, NULL, s);
    if (block != NULL &&
        PyBuffer_ToContiguous(((Block *)block)->ref.data, view, view->len, 'C') != 0)
        Py_CLEAR(block);
    return block;
}

static PyObject *heap_put(Heap *self, PyObject *data)
{
    Py_buffer view;
    if (!box_usable(self->box) || PyObject_GetBuffer(data, &view, PyBUF_FULL_RO) != 0)
        return NULL;
    struct box *b = self->box;
    box_enter(b);
    PyObject *block = put_view(self, &view);
    PyBuffer_Release(&view);
    box_leave(b);
    return block;
}

/* _adopt(offset, generation, cell, seq) -> Block */
static PyObject *heap_adopt(Heap *self, PyObject *args)
{
    unsigned long long off, gen, cell;
    unsigned int seq;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "KKKI:_adopt", &off, &gen, &cell, &seq) || !box_usable(self->box))
        return NULL;
    struct box *b = self->box;
    Block *block = block_new(b);
    if (block == NULL)
        return NULL;
    WAITING_FOR_ROOM(b, s, sh_adopt(&b->ctx, off, gen, cell, seq, SLICE_MS, &block->ref));
    if (s == SH_OK)
        return (PyObject *)block;
    block_discard(block);
    return PyErr_Occurred() ? NULL : fail(b, s);
}

static PyObject *heap_drop_lease(Heap *self, PyObject *args)
{
    unsigned long long off, gen, cell;
    unsigned int seq;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "KKKI:_drop_lease", &off, &gen, &cell, &seq) ||
        !box_usable(self->box))
        return NULL;
    struct box *b = self->box;
    WAITING(b, s, sh_lease_drop(&b->ctx, off, gen, cell, seq, SLICE_MS));
    while (s == SH_DEFERRED)
        WAITING(b, s, sh_flush(&b->ctx, SLICE_MS));
    return PyErr_Occurred() ? NULL : PyBool_FromLong(s == SH_OK);
}

/* Roots. Names are UTF-8, checked by the caller. */

static PyObject *heap_root_get(Heap *self, PyObject *args)
{
    const char *name;
    Py_ssize_t len;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "y#:_root_get", &name, &len) || !box_usable(self->box))
        return NULL;
    struct box *b = self->box;
    Block *block = block_new(b);
    if (block == NULL)
        return NULL;
    WAITING_FOR_ROOM(b, s, sh_root_get(&b->ctx, name, (uint32_t)len, SLICE_MS, &block->ref));
    if (s == SH_OK)
        return (PyObject *)block;
    block_discard(block);
    if (PyErr_Occurred())
        return NULL;
    return s == SH_ABSENT ? Py_NewRef(Py_None) : fail(b, s);
}

static PyObject *heap_root_set(Heap *self, PyObject *args)
{
    const char *name;
    Py_ssize_t len;
    Block *block;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "y#O!:_root_set", &name, &len, state->block_type, &block) ||
        !box_usable(self->box) || !block_usable(block))
        return NULL;
    struct box *b = self->box;
    if (block->box->ctx.hdr->nonce != b->ctx.hdr->nonce)
        return PyErr_Format(PyExc_ValueError,
                            "the block belongs to another heap; copy it with heap.put()");
    struct sh_ref ref =
        block->ref; /* the block may be another Heap object's: as this one maps it */
    ref.data += b->ctx.base - block->box->ctx.base;
    ref.word = (void *)((uint8_t *)ref.word + (b->ctx.base - block->box->ctx.base));
    WAITING_FOR_ROOM(b, s, sh_root_set(&b->ctx, name, (uint32_t)len, &ref, SLICE_MS));
    while (s == SH_DEFERRED)
        WAITING(b, s, sh_flush(&b->ctx, SLICE_MS));
    if (PyErr_Occurred())
        return NULL;
    return s == SH_OK ? Py_NewRef(Py_None) : fail(b, s);
}

static PyObject *heap_root_clear(Heap *self, PyObject *args)
{
    const char *name;
    Py_ssize_t len;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "y#:_root_clear", &name, &len) || !box_usable(self->box))
        return NULL;
    struct box *b = self->box;
    WAITING(b, s, sh_root_clear(&b->ctx, name, (uint32_t)len, SLICE_MS));
    while (s == SH_DEFERRED)
        WAITING(b, s, sh_flush(&b->ctx, SLICE_MS));
    if (PyErr_Occurred())
        return NULL;
    return s == SH_OK || s == SH_ABSENT ? PyBool_FromLong(s == SH_OK) : fail(b, s);
}

static PyObject *heap_root_names(Heap *self, PyObject *unused)
{
    (void)unused;
    char name[SH_ROOT_NAME_MAX];
    uint32_t entry = 0, len = 0;
    enum sh_status s = SH_OK;
    if (!box_usable(self->box))
        return NULL;
    struct box *b = self->box;
    PyObject *names = PyList_New(0);
    box_enter(b);
    while (names != NULL && s == SH_OK) {
        WAITING(b, s, sh_root_name(&b->ctx, &entry, name, &len, SLICE_MS));
        PyObject *one = s == SH_OK ? PyBytes_FromStringAndSize(name, (Py_ssize_t)len) : NULL;
        if (one != NULL && PyList_Append(names, one) != 0)
            Py_CLEAR(names);
        Py_XDECREF(one);
    }
    box_leave(b);
    if (PyErr_Occurred() || (s != SH_ABSENT && fail(b, s) == NULL))
        Py_CLEAR(names);
    return names;
}

/* Statistics */

static int put_number(PyObject *dict, const char *key, uint64_t value)
{
    PyObject *n = PyLong_FromUnsignedLongLong(value);
    int rc = n ? PyDict_SetItemString(dict, key, n) : -1;
    Py_XDECREF(n);
    return rc;
}

static int put_pauses(PyObject *dict, const struct sh_header *h)
{
    uint64_t n = atomic_load(&h->num_gc), from = n > SH_PAUSES ? n - SH_PAUSES : 0;
    PyObject *pauses = PyTuple_New((Py_ssize_t)(n - from));
    for (uint64_t i = from; pauses != NULL && i < n; i++)
        PyTuple_SetItem(pauses, (Py_ssize_t)(i - from),
                        PyLong_FromUnsignedLongLong(atomic_load(&h->pause_ns[i % SH_PAUSES])));
    int rc = pauses ? PyDict_SetItemString(dict, "pause_ns", pauses) : -1;
    Py_XDECREF(pauses);
    return rc;
}

static double lease_age_s(const struct sh_ctx *c, uint64_t leases)
{
    uint64_t oldest = atomic_load(&c->hdr->oldest_lease_ns);
    return oldest && leases ? (double)(sh_os_now_ns() - oldest) / 1e9 : 0.0;
}

static PyObject *stats_of(const struct sh_ctx *c)
{
    const struct sh_header *h = c->hdr;
    struct sh_sums sum = sh_sum(c);
    struct stat st;
    uint64_t sys = atomic_load(&h->used_pages) << c->geo.page_shift;
    uint64_t borrowed = atomic_load(&h->borrowed_pages), pages = atomic_load(&h->inuse_pages);
    uint64_t inuse = (pages > borrowed ? pages - borrowed : 0) << c->geo.page_shift;
    uint64_t committed = sh_committed_units(c) << c->geo.unit_shift;
    bool ours = sh_os_fd_is_ours(c) && fstat(c->fd, &st) == 0;
    uint64_t held = ours ? (uint64_t)st.st_blocks * 512 : committed;
    committed = committed < sys ? committed : sys;
    PyObject *d = PyDict_New(), *age = PyFloat_FromDouble(lease_age_s(c, sum.leases));
    const struct {
        const char *key;
        uint64_t value;
    } fields[] = {
        {"heap_sys", sys},
        {"heap_idle", sys - inuse},
        {"heap_inuse", inuse},
        {"heap_released", sys - committed},
        {"heap_objects", sh_heap_objects(&sum)},
        {"heap_alloc", sh_heap_alloc(&sum)},
        {"mallocs", sum.mallocs},
        {"frees", sum.frees},
        {"next_gc", atomic_load(&h->next_gc)},
        {"last_gc", atomic_load(&h->last_gc)},
        {"num_gc", atomic_load(&h->num_gc)},
        {"num_forced_gc", atomic_load(&h->num_forced_gc)},
        {"pause_total_ns", atomic_load(&h->pause_total_ns)},
        {"leases", sum.leases},
        {"capacity", c->geo.capacity},
        {"committed_bytes", committed},
        {"metadata_bytes", held > committed ? held - committed : 0},
        {"pins", sum.pins},
        {"processes", sum.processes},
    };
    bool ok = d != NULL && age != NULL && put_pauses(d, h) == 0 &&
              PyDict_SetItemString(d, "oldest_lease_s", age) == 0;
    for (size_t i = 0; ok && i < sizeof fields / sizeof fields[0]; i++)
        ok = put_number(d, fields[i].key, fields[i].value) == 0;
    Py_XDECREF(age);
    if (!ok)
        Py_CLEAR(d);
    return d;
}

static PyObject *heap_stats(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? stats_of(&self->box->ctx) : NULL;
}

/* What sh_check found, kept without Python: it reports under locks. */
struct findings {
    char *text; /* lines, each ended by a newline */
    size_t n, room;
};

static void collect_report(void *arg, const char *invariant, const char *what)
{
    struct findings *f = arg;
    size_t need = f->n + strlen(invariant) + strlen(what) + 4;
    if (need > f->room) {
        char *text = realloc(f->text, 2 * need);
        if (text == NULL)
            return;
        f->text = text;
        f->room = 2 * need;
    }
    f->n += (size_t)snprintf(f->text + f->n, f->room - f->n, "%s: %s\n", invariant, what);
}

static PyObject *findings_or_fail(struct box *b, struct findings *f, enum sh_status s)
{
    PyObject *text = PyUnicode_FromStringAndSize(f->text, (Py_ssize_t)f->n);
    PyObject *found = text && s == SH_OK ? PyUnicode_Splitlines(text, 0) : NULL;
    Py_XDECREF(text);
    free(f->text);
    return s == SH_OK ? found : fail(b, s);
}

static PyObject *check_of(struct box *b)
{
    struct findings f = {0};
    enum sh_status s;
    box_enter(b);
    Py_BEGIN_ALLOW_THREADS s = sh_check(&b->ctx, collect_report, &f);
    Py_END_ALLOW_THREADS box_leave(b);
    return findings_or_fail(b, &f, s);
}

/* check() -> as a user's, of a copy: also where every lock is refused */
static PyObject *observer_check(Heap *self, PyObject *unused)
{
    struct findings f = {0};
    struct sh_ctx *copy = self->box && self->box->attached ? PyMem_Malloc(sizeof *copy) : NULL;
    enum sh_status s;
    (void)unused;
    if (copy == NULL)
        return self->box && self->box->attached ? PyErr_NoMemory() : fail(self->box, SH_CLOSED);
    struct box *b = self->box;
    box_enter(b);
    Py_BEGIN_ALLOW_THREADS s = sh_inspect(copy, b->ctx.fd, collect_report, &f);
    Py_END_ALLOW_THREADS b->ctx.why = copy->why;
    box_leave(b);
    PyMem_Free(copy);
    return findings_or_fail(b, &f, s);
}

static PyObject *heap_check(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? check_of(self->box) : NULL;
}

/* (pid, bytes, pins) of every process, the largest first is the caller's business. */
static PyObject *holders_of(const struct sh_ctx *c)
{
    PyObject *list = PyList_New(0);
    uint32_t used = atomic_load(&c->hdr->slots_used);
    for (uint32_t i = 1; list != NULL && i < used && i < SH_MAX_SLOTS; i++) {
        struct sh_slot *s = sh_slot(c, i);
        if (atomic_load(&s->state) == SH_SLOT_FREE)
            continue;
        int64_t bytes = (int64_t)(atomic_load(&s->alloc_bytes) - atomic_load(&s->freed_bytes));
        PyObject *row = Py_BuildValue("(ILK)", (unsigned int)atomic_load(&s->pid),
                                      (long long)(bytes < 0 ? 0 : bytes),
                                      (unsigned long long)atomic_load(&s->pins));
        if (row == NULL || PyList_Append(list, row) != 0)
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

static PyObject *heap_holders(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? holders_of(&self->box->ctx) : NULL;
}

/* Asking and waiting */

static PyObject *heap_request(Heap *self, PyObject *args)
{
    int kind;
    if (!PyArg_ParseTuple(args, "i:_request", &kind) || !box_usable(self->box))
        return NULL;
    if (kind < 0 || kind >= SH_NREQUESTS)
        return PyErr_Format(PyExc_ValueError, "no such request: %d", kind);
    uint32_t ticket = sh_request(&self->box->ctx, (enum sh_request)kind);
    self->box->ctx.ring = true; /* also if a dead coordinator was told before */
    return ring(self->box) == 0 ? PyLong_FromUnsignedLong(ticket) : NULL;
}

/* _await(kind, ticket, timeout_s or None) -> fields, or None when the time is up. */
static PyObject *heap_await(Heap *self, PyObject *args)
{
    int kind;
    unsigned int ticket;
    double timeout;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "iId:_await", &kind, &ticket, &timeout) || !box_usable(self->box))
        return NULL;
    if (kind < 0 || kind >= SH_NREQUESTS)
        return PyErr_Format(PyExc_ValueError, "no such request: %d", kind);
    struct box *b = self->box;
    uint64_t until =
        timeout > 1e9 ? UINT64_MAX : sh_os_now_ns() + (uint64_t)(timeout > 0 ? timeout * 1e9 : 0);
    for (uint32_t slice = 1;; slice++) {
        WAITING(b, s, sh_await(&b->ctx, (enum sh_request)kind, ticket, SLICE_MS));
        if (PyErr_CheckSignals() != 0)
            return NULL;
        if (!b->attached)
            return fail(b, SH_CLOSED);
        if (s != SH_TIMEOUT || sh_os_now_ns() >= until)
            break;
        b->ctx.ring = slice % SUCCESSION_SLICES == 0 && !sh_alive(&b->ctx, 0);
        if (ring(b) != 0)
            return NULL;
    }
    if (s == SH_CORRUPT)
        return fail(b, s);
    if (s != SH_OK)
        Py_RETURN_NONE;
    PyObject *fields = PyTuple_New(SH_REPORT_FIELDS);
    for (uint32_t i = 0; fields != NULL && i < SH_REPORT_FIELDS; i++)
        PyTuple_SetItem(
            fields, (Py_ssize_t)i,
            PyLong_FromUnsignedLongLong(atomic_load(&b->ctx.hdr->requests[kind].fields[i])));
    return fields;
}

/* _freed() -> the counter to give to _wait_memory: read before trying to allocate again. */
static PyObject *heap_freed(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? PyLong_FromUnsignedLong(atomic_load(&self->box->ctx.hdr->freed))
                                 : NULL;
}

/* _waiting(begins) */
static PyObject *heap_waiting(Heap *self, PyObject *args)
{
    int begins;
    if (!PyArg_ParseTuple(args, "p:_waiting", &begins))
        return NULL;
    if (self->box != NULL && self->box->attached)
        sh_waiting(&self->box->ctx, begins != 0);
    Py_RETURN_NONE;
}

/* _wait_memory(seen) -> True: try again, False: refused. Sleeps at most one slice. */
static PyObject *heap_wait_memory(Heap *self, PyObject *args)
{
    unsigned int seen;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "I:_wait_memory", &seen) || !box_usable(self->box))
        return NULL;
    struct box *b = self->box;
    WAITING(b, s, sh_wait_memory(&b->ctx, seen, SLICE_MS));
    if (PyErr_CheckSignals() != 0)
        return NULL;
    return PyBool_FromLong(s != SH_REFUSED);
}

static PyObject *heap_want(Heap *self, PyObject *args)
{
    unsigned int bits;
    if (!PyArg_ParseTuple(args, "I:_want", &bits) || !box_usable(self->box))
        return NULL;
    sh_want(&self->box->ctx, bits);
    self->box->ctx.ring = true;
    return ring(self->box) == 0 ? Py_NewRef(Py_None) : NULL;
}

static PyObject *heap_coordinator_alive(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? PyBool_FromLong(sh_alive(&self->box->ctx, 0)) : NULL;
}

static PyObject *heap_mark_unlinked(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!box_usable(self->box))
        return NULL;
    atomic_store(&self->box->ctx.hdr->unlinked, 1);
    Py_RETURN_NONE;
}

static PyObject *heap_fileno(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? PyLong_FromLong(self->box->ctx.fd) : NULL;
}

static PyObject *heap_keep(Heap *self, PyObject *args)
{
    int keep;
    if (!PyArg_ParseTuple(args, "p:_keep", &keep) || !box_usable(self->box))
        return NULL;
    self->box->keep = keep != 0;
    Py_RETURN_NONE;
}

/* _dump(): the arena belongs into this process's core dumps. */
static PyObject *heap_dump(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!box_usable(self->box))
        return NULL;
    sh_os_dumped(&self->box->ctx);
    Py_RETURN_NONE;
}

static PyObject *header_number(struct box *b, uint64_t value)
{
    return b != NULL && b->attached ? PyLong_FromUnsignedLongLong(value) : fail(b, SH_CLOSED);
}

static PyObject *heap_get_capacity(Heap *self, void *unused)
{
    (void)unused;
    return header_number(self->box, self->box ? self->box->ctx.geo.capacity : 0);
}

static PyObject *heap_get_nonce(Heap *self, void *unused)
{
    (void)unused;
    bool there = self->box != NULL && self->box->attached;
    return header_number(self->box, there ? self->box->ctx.hdr->nonce : 0);
}

static PyObject *heap_get_closed(Heap *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->box == NULL || self->box->closed);
}

static PyObject *config_of(const struct sh_ctx *c)
{
    uint32_t n =
        c->hdr->config_bytes; /* once: it was checked when we mapped it, and may be bad now */
    return PyBytes_FromStringAndSize(c->hdr->config,
                                     (Py_ssize_t)(n < SH_CONFIG_BYTES ? n : SH_CONFIG_BYTES));
}

static PyMethodDef heap_methods[] = {
    {"_attach", (PyCFunction)heap_attach, METH_VARARGS, NULL},
    {"close", (PyCFunction)heap_close, METH_NOARGS,
     "Leave the heap: this process drops what it holds. Exported buffers stay valid until "
     "released.\n\n"
     "Idempotent. Blocks of this Heap object cannot be used any more. Never unlinks."},
    {"alloc", (PyCFunction)(void (*)(void))heap_alloc, METH_FASTCALL | METH_KEYWORDS,
     "alloc($self, nbytes, /, *, zero=True, timeout=0)\n--\n\n"
     "Return a new Block of nbytes bytes, which this process holds.\n\n"
     "Args:\n"
     "    nbytes: Size in bytes, at least 1.\n"
     "    zero: Whether the bytes are zeroed; otherwise they are arbitrary.\n"
     "    timeout: Seconds to wait for memory: 0 fails at once, None waits for ever.\n\n"
     "Raises:\n"
     "    HeapFull: No memory, and waiting did not help. Says which limit, who holds most, what to "
     "do.\n"
     "    ValueError: nbytes < 1, or the heap is closed.\n\n"
     "Cost: about that of bytearray(nbytes) up to 64 KiB: no system call, no lock that another\n"
     "process wants. Larger blocks take the heap lock, and pages not in memory are committed."},
    {"put", (PyCFunction)heap_put, METH_O,
     "put($self, data, /)\n--\n\nReturn a new Block with a copy of a bytes-like object's bytes.\n\n"
     "Raises what alloc raises; ValueError for empty data."},
    {"_alloc_once", (PyCFunction)heap_alloc_once, METH_VARARGS, NULL},
    {"_adopt", (PyCFunction)heap_adopt, METH_VARARGS, NULL},
    {"_drop_lease", (PyCFunction)heap_drop_lease, METH_VARARGS, NULL},
    {"_root_get", (PyCFunction)heap_root_get, METH_VARARGS, NULL},
    {"_root_set", (PyCFunction)heap_root_set, METH_VARARGS, NULL},
    {"_root_clear", (PyCFunction)heap_root_clear, METH_VARARGS, NULL},
    {"_root_names", (PyCFunction)heap_root_names, METH_NOARGS, NULL},
    {"_stats", (PyCFunction)heap_stats, METH_NOARGS, NULL},
    {"_check", (PyCFunction)heap_check, METH_NOARGS, NULL},
    {"_holders", (PyCFunction)heap_holders, METH_NOARGS, NULL},
    {"_request", (PyCFunction)heap_request, METH_VARARGS, NULL},
    {"_await", (PyCFunction)heap_await, METH_VARARGS, NULL},
    {"_freed", (PyCFunction)heap_freed, METH_NOARGS, NULL},
    {"_waiting", (PyCFunction)heap_waiting, METH_VARARGS, NULL},
    {"_wait_memory", (PyCFunction)heap_wait_memory, METH_VARARGS, NULL},
    {"_want", (PyCFunction)heap_want, METH_VARARGS, NULL},
    {"_coordinator_alive", (PyCFunction)heap_coordinator_alive, METH_NOARGS, NULL},
    {"_keep", (PyCFunction)heap_keep, METH_VARARGS, NULL},
    {"_dump", (PyCFunction)heap_dump, METH_NOARGS, NULL},
    {"_fileno", (PyCFunction)heap_fileno, METH_NOARGS, NULL},
    {"_mark_unlinked", (PyCFunction)heap_mark_unlinked, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef heap_getset[] = {
    {"capacity", (getter)heap_get_capacity, NULL, "Bytes that blocks can have together, at most.",
     NULL},
    {"nonce", (getter)heap_get_nonce, NULL, "Random number that names this arena for ever.", NULL},
    {"closed", (getter)heap_get_closed, NULL, "Whether close() was called.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyMemberDef heap_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Heap, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL}};

static PyType_Slot heap_slots[] = {
    {Py_tp_doc, "A process's use of an arena; the base of shmheap.Heap."},
    {Py_tp_new, heap_new},
    {Py_tp_dealloc, heap_dealloc},
    {Py_tp_methods, heap_methods},
    {Py_tp_getset, heap_getset},
    {Py_tp_members, heap_members},
    {0, NULL}};

static PyType_Spec heap_spec = {"shmheap._core.HeapBase", sizeof(Heap), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, heap_slots};

/* The coordinator's side. One thread; long walks are done without the GIL. */

#define STEWARD(s, op)             \
    struct box *b = self->box;     \
    struct sh_ctx *c = &b->ctx;    \
    enum sh_status s;              \
    Py_BEGIN_ALLOW_THREADS s = op; \
    Py_END_ALLOW_THREADS if (s != SH_OK) return fail(b, s)

static PyObject *steward_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int fd;
    (void)kwargs;
    if (!PyArg_ParseTuple(args, "i:Steward", &fd))
        return NULL;
    PyObject *path = PyUnicode_FromString("");
    struct box *b = path ? box_new(fd, path, true) : NULL;
    Py_XDECREF(path);
    if (b == NULL)
        return NULL;
    enum sh_status s;
    Py_BEGIN_ALLOW_THREADS s = sh_attach_coordinator(&b->ctx, b->ctx.patience_ms);
    Py_END_ALLOW_THREADS if (s != SH_OK)
    {
        if (s == SH_CHANGED)
            PyErr_SetString(PyExc_BlockingIOError, "another coordinator of this heap lives");
        else
            fail(b, s);
        sh_unmap(&b->ctx);
        b->attached = false;
        box_drop(b);
        return NULL;
    }
    Heap *self = (Heap *)heap_new(type, NULL, NULL);
    if (self == NULL)
        box_drop(b);
    else
        self->box = b;
    return (PyObject *)self;
}

static bool steward_open(Heap *self)
{
    bool open = self->box->attached;
    if (!open)
        PyErr_SetString(PyExc_ValueError, "the steward is closed");
    return open;
}

static PyObject *steward_begin(Heap *self, PyObject *unused)
{
    uint32_t phase;
    (void)unused;
    if (!steward_open(self))
        return NULL;
    STEWARD(s, sh_begin(c, &phase));
    return PyLong_FromUnsignedLong(phase);
}

static PyObject *steward_set_patience(Heap *self, PyObject *args)
{
    int ms;
    if (!steward_open(self) || !PyArg_ParseTuple(args, "i:set_patience", &ms))
        return NULL;
    self->box->ctx.patience_ms = ms > SH_SPENT_MS ? ms : SH_SPENT_MS;
    Py_RETURN_NONE;
}

static PyObject *steward_now_stamp(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!steward_open(self))
        return NULL;
    return PyLong_FromUnsignedLong(sh_now_stamp(&self->box->ctx));
}

static PyObject *steward_slots(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!steward_open(self))
        return NULL;
    struct sh_ctx *c = &self->box->ctx;
    PyObject *list = PyList_New(0);
    uint32_t used = atomic_load(&c->hdr->slots_used);
    for (uint32_t i = 1; list != NULL && i < used && i < SH_MAX_SLOTS; i++) {
        struct sh_slot *s = sh_slot(c, i);
        if (atomic_load(&s->state) == SH_SLOT_FREE)
            continue;
        PyObject *row = Py_BuildValue(
            "(IIIIKKI)", i, (unsigned int)atomic_load(&s->state),
            (unsigned int)atomic_load(&s->pid), (unsigned int)atomic_load(&s->incarnation),
            (unsigned long long)atomic_load(&s->pins), (unsigned long long)sh_leases(s),
            (unsigned int)atomic_load(&s->waiting));
        if (row == NULL || PyList_Append(list, row) != 0)
            Py_CLEAR(list);
        Py_XDECREF(row);
    }
    return list;
}

static PyObject *steward_alive(Heap *self, PyObject *args)
{
    unsigned int slot;
    if (!steward_open(self) || !PyArg_ParseTuple(args, "I:alive", &slot))
        return NULL;
    return PyBool_FromLong(slot < SH_MAX_SLOTS && sh_alive(&self->box->ctx, slot));
}

static PyObject *steward_reap(Heap *self, PyObject *args)
{
    unsigned int slot;
    unsigned long long cutoff;
    struct sh_reaped r;
    if (!steward_open(self) || !PyArg_ParseTuple(args, "IK:reap", &slot, &cutoff))
        return NULL;
    STEWARD(s, sh_reap(c, slot, cutoff, &r));
    return Py_BuildValue("(KKKKKN)", (unsigned long long)r.pins, (unsigned long long)r.leases,
                         (unsigned long long)r.spans, (unsigned long long)r.pin_bytes,
                         (unsigned long long)r.lease_bytes, PyBool_FromLong(r.done));
}

static PyObject *steward_users(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!steward_open(self))
        return NULL;
    return PyLong_FromUnsignedLong(sh_users(&self->box->ctx));
}

static PyObject *steward_try_close(Heap *self, PyObject *unused)
{
    bool closed;
    (void)unused;
    if (!steward_open(self))
        return NULL;
    STEWARD(s, sh_try_close(c, &closed));
    return PyBool_FromLong(closed);
}

static PyObject *steward_refuse_waiters(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!steward_open(self))
        return NULL;
    return PyLong_FromUnsignedLong(sh_refuse_waiters(&self->box->ctx));
}

static PyObject *steward_take_wants(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!steward_open(self))
        return NULL;
    return PyLong_FromUnsignedLong(atomic_exchange(&self->box->ctx.hdr->wants, 0));
}

static struct sh_request_line *request_line(Heap *self, int kind)
{
    if (kind >= 0 && kind < SH_NREQUESTS)
        return &self->box->ctx.hdr->requests[kind];
    PyErr_Format(PyExc_ValueError, "no such request: %d", kind);
    return NULL;
}

static PyObject *steward_pending(Heap *self, PyObject *args)
{
    int kind;
    struct sh_request_line *line;
    if (!steward_open(self) || !PyArg_ParseTuple(args, "i:pending", &kind) ||
        (line = request_line(self, kind)) == NULL)
        return NULL;
    uint32_t wanted = atomic_load(&line->wanted);
    return PyLong_FromUnsignedLong(wanted == atomic_load(&line->done) ? 0 : wanted);
}

static PyObject *steward_finish(Heap *self, PyObject *args)
{
    int kind;
    unsigned int ticket;
    PyObject *fields;
    struct sh_request_line *line;
    if (!steward_open(self) || !PyArg_ParseTuple(args, "iIO:finish", &kind, &ticket, &fields) ||
        (line = request_line(self, kind)) == NULL)
        return NULL;
    Py_ssize_t n = PySequence_Size(fields);
    if (n < 0 || n > (Py_ssize_t)SH_REPORT_FIELDS)
        return n < 0 ? NULL : PyErr_Format(PyExc_ValueError, "too many fields: %zd", n);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *field = PySequence_GetItem(fields, i);
        unsigned long long value = field ? PyLong_AsUnsignedLongLong(field) : 0;
        Py_XDECREF(field);
        if (PyErr_Occurred())
            return NULL;
        atomic_store(&line->fields[i], value);
    }
    atomic_store(&line->done, ticket);
    sh_os_wake(&line->done);
    Py_RETURN_NONE;
}

static PyObject *pause_of(struct sh_ctx *c)
{
    return PyLong_FromUnsignedLongLong(c->longest_ns);
}

static PyObject *steward_start_cycle(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!steward_open(self))
        return NULL;
    STEWARD(s, sh_start_cycle(c));
    return pause_of(c);
}

static PyObject *steward_mark(Heap *self, PyObject *unused)
{
    uint64_t blocks;
    (void)unused;
    if (!steward_open(self))
        return NULL;
    STEWARD(s, sh_mark(c, &blocks));
    return Py_BuildValue("(KN)", (unsigned long long)blocks, pause_of(c));
}

static PyObject *steward_finish_mark(Heap *self, PyObject *unused)
{
    uint64_t blocks;
    (void)unused;
    if (!steward_open(self))
        return NULL;
    STEWARD(s, sh_finish_mark(c, &blocks));
    return Py_BuildValue("(KN)", (unsigned long long)blocks, pause_of(c));
}

static PyObject *steward_sweep(Heap *self, PyObject *unused)
{
    uint64_t blocks, bytes;
    (void)unused;
    if (!steward_open(self))
        return NULL;
    STEWARD(s, sh_sweep(c, &blocks, &bytes));
    return Py_BuildValue("(KKN)", (unsigned long long)blocks, (unsigned long long)bytes,
                         pause_of(c));
}

static PyObject *steward_stamp(Heap *self, PyObject *args)
{
    unsigned int stamp;
    uint64_t units;
    if (!steward_open(self) || !PyArg_ParseTuple(args, "I:stamp", &stamp))
        return NULL;
    STEWARD(s, sh_stamp(c, stamp, &units));
    return PyLong_FromUnsignedLongLong(units);
}

static PyObject *steward_end_cycle(Heap *self, PyObject *args)
{
    unsigned long long next_gc, pause_ns;
    int forced;
    if (!steward_open(self) ||
        !PyArg_ParseTuple(args, "KpK:end_cycle", &next_gc, &forced, &pause_ns))
        return NULL;
    STEWARD(s, sh_end_cycle(c, next_gc, forced, pause_ns));
    return pause_of(c);
}

static PyObject *steward_release(Heap *self, PyObject *args)
{
    unsigned int stamp_le;
    unsigned long long max_bytes;
    uint32_t page;
    uint64_t bytes, runs;
    if (!steward_open(self) || !PyArg_ParseTuple(args, "IKI:release", &stamp_le, &max_bytes, &page))
        return NULL;
    STEWARD(s, sh_release(c, stamp_le, max_bytes, &page, &bytes, &runs));
    return Py_BuildValue("(KKI)", (unsigned long long)bytes, (unsigned long long)runs, page);
}

static PyObject *steward_stats(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!steward_open(self))
        return NULL;
    return stats_of(&self->box->ctx);
}

static PyObject *steward_check(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!steward_open(self))
        return NULL;
    return check_of(self->box);
}

static PyObject *steward_unlinked(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!steward_open(self))
        return NULL;
    return PyBool_FromLong(atomic_load(&self->box->ctx.hdr->unlinked) != 0);
}

static PyObject *steward_set_limit(Heap *self, PyObject *args)
{
    unsigned long long bytes;
    if (!steward_open(self) || !PyArg_ParseTuple(args, "K:set_limit", &bytes))
        return NULL;
    atomic_store(&self->box->ctx.hdr->limit_units, bytes >> self->box->ctx.geo.unit_shift);
    Py_RETURN_NONE;
}

/* closing() -> bool: closed for ever, by us or by its last user. */
static PyObject *steward_closing(Heap *self, PyObject *unused)
{
    (void)unused;
    if (!steward_open(self))
        return NULL;
    return PyBool_FromLong(atomic_load(&self->box->ctx.hdr->closing) != 0);
}

static PyObject *steward_set_next_gc(Heap *self, PyObject *args)
{
    unsigned long long bytes;
    struct sh_ctx *c = &self->box->ctx;
    if (!steward_open(self) || !PyArg_ParseTuple(args, "K:set_next_gc", &bytes))
        return NULL;
    atomic_store(&c->hdr->next_gc, bytes);
    atomic_store(&c->hdr->gc_trigger_pages, (bytes >> c->geo.page_shift) + 1);
    Py_RETURN_NONE;
}

static PyMethodDef steward_methods[] = {
    {"begin", (PyCFunction)steward_begin, METH_NOARGS, NULL},
    {"set_patience", (PyCFunction)steward_set_patience, METH_VARARGS, NULL},
    {"now_stamp", (PyCFunction)steward_now_stamp, METH_NOARGS, NULL},
    {"slots", (PyCFunction)steward_slots, METH_NOARGS, NULL},
    {"alive", (PyCFunction)steward_alive, METH_VARARGS, NULL},
    {"reap", (PyCFunction)steward_reap, METH_VARARGS, NULL},
    {"users", (PyCFunction)steward_users, METH_NOARGS, NULL},
    {"try_close", (PyCFunction)steward_try_close, METH_NOARGS, NULL},
    {"refuse_waiters", (PyCFunction)steward_refuse_waiters, METH_NOARGS, NULL},
    {"take_wants", (PyCFunction)steward_take_wants, METH_NOARGS, NULL},
    {"pending", (PyCFunction)steward_pending, METH_VARARGS, NULL},
    {"finish", (PyCFunction)steward_finish, METH_VARARGS, NULL},
    {"start_cycle", (PyCFunction)steward_start_cycle, METH_NOARGS, NULL},
    {"mark", (PyCFunction)steward_mark, METH_NOARGS, NULL},
    {"finish_mark", (PyCFunction)steward_finish_mark, METH_NOARGS, NULL},
    {"sweep", (PyCFunction)steward_sweep, METH_NOARGS, NULL},
    {"stamp", (PyCFunction)steward_stamp, METH_VARARGS, NULL},
    {"end_cycle", (PyCFunction)steward_end_cycle, METH_VARARGS, NULL},
    {"release", (PyCFunction)steward_release, METH_VARARGS, NULL},
    {"stats", (PyCFunction)steward_stats, METH_NOARGS, NULL},
    {"check", (PyCFunction)steward_check, METH_NOARGS, NULL},
    {"unlinked", (PyCFunction)steward_unlinked, METH_NOARGS, NULL},
    {"set_limit", (PyCFunction)steward_set_limit, METH_VARARGS, NULL},
    {"closing", (PyCFunction)steward_closing, METH_NOARGS, NULL},
    {"set_next_gc", (PyCFunction)steward_set_next_gc, METH_VARARGS, NULL},
    {"close", (PyCFunction)heap_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyType_Slot steward_slot_list[] = {{Py_tp_doc, "The coordinator's hold on an arena."},
                                          {Py_tp_new, steward_new},
                                          {Py_tp_dealloc, heap_dealloc},
                                          {Py_tp_methods, steward_methods},
                                          {Py_tp_getset, heap_getset},
                                          {Py_tp_members, heap_members},
                                          {0, NULL}};

static PyType_Spec steward_spec = {"shmheap._core.Steward", sizeof(Heap), 0, Py_TPFLAGS_DEFAULT,
                                   steward_slot_list};

/* A look from outside: no slot, no lock, a read-only mapping */

static PyObject *observer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    int fd;
    if (!PyArg_ParseTuple(args, "i:Observer", &fd))
        return NULL;
    PyObject *path = PyUnicode_FromString("");
    struct box *b = path ? box_new(fd, path, false) : NULL;
    Py_XDECREF(path);
    (void)kwargs;
    Heap *self = b ? (Heap *)heap_new(type, NULL, NULL) : NULL;
    if (self != NULL)
        self->box = b;
    else if (b != NULL)
        box_drop(b);
    return (PyObject *)self;
}

/* books() -> (state of each unit below the high-water mark, data offset, unit, capacity; bytes) */
static PyObject *observer_books(Heap *self, PyObject *unused)
{
    (void)unused;
    if (self->box == NULL || !self->box->attached)
        return fail(self->box, SH_CLOSED);
    struct sh_ctx *c = &self->box->ctx;
    uint64_t pages = atomic_load(&c->hdr->used_pages);
    pages = pages < c->geo.npages ? pages : c->geo.npages;
    uint64_t n = pages << (c->geo.page_shift - c->geo.unit_shift);
    PyObject *states = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)n);
    if (states == NULL)
        return NULL;
    char *at = PyBytes_AsString(states);
    for (uint64_t i = 0; i < n; i++)
        at[i] = (char)SH_UNIT_STATE(atomic_load_explicit(sh_unit(c, i), RLX));
    return Py_BuildValue("(NKKK)", states, (unsigned long long)c->geo.data,
                         1ull << c->geo.unit_shift, (unsigned long long)c->geo.capacity);
}

static PyObject *observer_stats(Heap *self, PyObject *unused)
{
    (void)unused;
    return self->box && self->box->attached ? stats_of(&self->box->ctx)
                                            : fail(self->box, SH_CLOSED);
}

static PyObject *observer_processes(Heap *self, PyObject *unused)
{
    (void)unused;
    return self->box && self->box->attached ? holders_of(&self->box->ctx)
                                            : fail(self->box, SH_CLOSED);
}

static PyObject *observer_header(Heap *self, PyObject *unused)
{
    (void)unused;
    if (self->box == NULL || !self->box->attached)
        return fail(self->box, SH_CLOSED);
    const struct sh_ctx *c = &self->box->ctx;
    const struct sh_header *h = c->hdr;
    unsigned int alive = 0;
    for (uint32_t i = 1; i < atomic_load(&h->slots_used) && i < SH_MAX_SLOTS; i++)
        alive += sh_alive(&self->box->ctx, i);
    return Py_BuildValue(
        "{sI sK sI sI sK sK sN sI sI sI sI sN sN}", "version", h->version, "nonce",
        (unsigned long long)h->nonce, "page_bytes", 1u << c->geo.page_shift, "unit_bytes",
        1u << c->geo.unit_shift, "capacity", (unsigned long long)c->geo.capacity, "created_ns",
        (unsigned long long)h->created_ns, "coordinator_alive",
        PyBool_FromLong(sh_alive(&self->box->ctx, 0)), "coordinator_pid",
        (unsigned int)atomic_load(&sh_slot(c, 0)->pid), "users_alive", alive, "phase",
        sh_phase_of(atomic_load(&h->phase)), "unlinked", (unsigned int)atomic_load(&h->unlinked),
        "fault", fault_of(c), "config", config_of(c));
}

static PyMethodDef observer_methods[] = {
    {"books", (PyCFunction)observer_books, METH_NOARGS, NULL},
    {"stats", (PyCFunction)observer_stats, METH_NOARGS, NULL},
    {"processes", (PyCFunction)observer_processes, METH_NOARGS, NULL},
    {"header", (PyCFunction)observer_header, METH_NOARGS, NULL},
    {"check", (PyCFunction)observer_check, METH_NOARGS, NULL},
    {"close", (PyCFunction)heap_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyType_Slot observer_slots[] = {
    {Py_tp_doc, "A look at an arena from outside: no user, no lock, read-only."},
    {Py_tp_new, observer_new},
    {Py_tp_dealloc, heap_dealloc},
    {Py_tp_methods, observer_methods},
    {Py_tp_getset, heap_getset},
    {Py_tp_members, heap_members},
    {0, NULL}};

static PyType_Spec observer_spec = {"shmheap._core.Observer", sizeof(Heap), 0, Py_TPFLAGS_DEFAULT,
                                    observer_slots};

/* Module functions */

static PyObject *core_format(PyObject *self, PyObject *args)
{
    int fd;
    unsigned long long capacity, nonce, limit;
    const char *config;
    Py_ssize_t n;
    struct box b = {.closed = true};
    (void)self;
    if (!PyArg_ParseTuple(args, "iKKKy#:format", &fd, &capacity, &nonce, &limit, &config, &n))
        return NULL;
    enum sh_status s = sh_format(fd, capacity, nonce, limit, config, (size_t)n);
    if (s == SH_NOSPACE) {
        errno = ENOSPC;
        s = SH_SYSTEM;
    }
    return s == SH_OK ? Py_NewRef(Py_None) : fail(&b, s);
}

static PyObject *core_read_config(PyObject *self, PyObject *args)
{
    int fd;
    uint32_t n;
    char config[SH_CONFIG_BYTES];
    struct box b = {.closed = true};
    (void)self;
    if (!PyArg_ParseTuple(args, "i:read_config", &fd))
        return NULL;
    enum sh_status s = sh_read_config(fd, config, &n, &b.ctx.why);
    return s == SH_OK ? PyBytes_FromStringAndSize(config, (Py_ssize_t)n) : fail(&b, s);
}

static PyObject *core_spawn_detached(PyObject *self, PyObject *args)
{
    PyObject *list, *log;
    char *argv[32] = {0};
    PyObject *kept[32] = {0};
    (void)self;
    if (!PyArg_ParseTuple(args, "O!O:spawn_detached", &PyList_Type, &list, &log))
        return NULL;
    Py_ssize_t n = PyList_Size(list);
    int error = n >= 1 && n < 32 ? 0 : E2BIG;
    for (Py_ssize_t i = 0; error == 0 && i < n; i++) {
        if (!PyUnicode_FSConverter(PyList_GetItem(list, i), &kept[i]))
            error = -1;
        else
            argv[i] = PyBytes_AsString(kept[i]);
    }
    PyObject *path = NULL;
    if (error == 0 && log != Py_None && !PyUnicode_FSConverter(log, &path))
        error = -1;
    if (error == 0) {
        Py_BEGIN_ALLOW_THREADS error =
            sh_os_spawn_detached(argv, path ? PyBytes_AsString(path) : NULL);
        Py_END_ALLOW_THREADS
    }
    for (Py_ssize_t i = 0; i < 32; i++)
        Py_XDECREF(kept[i]);
    Py_XDECREF(path);
    if (error > 0) {
        errno = error & ~SH_LOG_FAILED;
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError,
                                             error & SH_LOG_FAILED ? log : PyList_GetItem(list, 0));
    }
    return error ? NULL : Py_NewRef(Py_None);
}

/* What was in the way when a child was to be given its own place in the heap; NULL: nothing. */
static const char *obstacle(enum sh_status s)
{
    switch (s) {
    case SH_OK:
        return NULL;
    case SH_NOSLOT:
        return "the heap had no free slot, since it had as many processes as it can have";
    case SH_BUSY:
        return "a process that was stopped kept the heap locked";
    case SH_SYSTEM:
        return errno == EBADF ? "its parent had closed the heap's descriptor" : strerror(errno);
    default:
        return sh_status_text(s);
    }
}

/* libc calls these inside fork(), after every hook of Python: what those wait for still finds the
 * heaps open. (Handlers that a library in C registered before us run later, with the heaps locked.)
 * Python cannot be used here. */

static void before_fork(void)
{
    pthread_mutex_lock(&boxes_lock);
    for (struct box *b = boxes; b != NULL; b = b->next)
        if (!sh_is_forked(&b->ctx))
            b->left_behind = obstacle(sh_fork_prepare(&b->ctx));
}

static void after_fork_parent(void)
{
    for (struct box *b = boxes; b != NULL; b = b->next) {
        b->left_behind = NULL; /* whoever forks without fork() is to be told so */
        sh_fork_parent(&b->ctx);
    }
    pthread_mutex_unlock(&boxes_lock);
}

static void after_fork_child(void)
{
    for (struct box *b = boxes; b != NULL; b = b->next) {
        b->calls = 0; /* threads inside are not in the child */
        sh_fork_child(&b->ctx);
    }
    pthread_mutex_unlock(&boxes_lock);
}

static struct box *box_to_tell(void)
{
    pthread_mutex_lock(&boxes_lock);
    struct box *b = boxes;
    while (b != NULL && !(b->ctx.ring && !sh_is_forked(&b->ctx)) && !box_can_settle(b))
        b = b->next;
    if (b != NULL)
        b->refs++;
    pthread_mutex_unlock(&boxes_lock);
    return b;
}

/* Python's hook in parent and child: the coordinators learn of the new process. */
static PyObject *core_after_fork(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    for (struct box *b; (b = box_to_tell()) != NULL; box_drop(b)) {
        ring_quietly(b, false);
        box_settle(b);
    }
    Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {{"format", core_format, METH_VARARGS, NULL},
                                       {"read_config", core_read_config, METH_VARARGS, NULL},
                                       {"spawn_detached", core_spawn_detached, METH_VARARGS, NULL},
                                       {"after_fork", core_after_fork, METH_NOARGS, NULL},
                                       {NULL, NULL, 0, NULL}};

static bool load_errors(State *st)
{
    PyObject *m = PyImport_ImportModule("shmheap.errors");
    if (m == NULL)
        return false;
    st->HeapError = PyObject_GetAttrString(m, "HeapError");
    st->HeapFull = PyObject_GetAttrString(m, "HeapFull");
    st->StaleHandle = PyObject_GetAttrString(m, "StaleHandle");
    st->UntrustedArena = PyObject_GetAttrString(m, "UntrustedArena");
    st->HeapCorrupt = PyObject_GetAttrString(m, "HeapCorrupt");
    Py_DECREF(m);
    return !PyErr_Occurred();
}

static int add_type(PyObject *m, PyType_Spec *spec, PyTypeObject **keep)
{
    PyObject *type = PyType_FromModuleAndSpec(m, spec, NULL);
    if (type == NULL)
        return -1;
    if (keep != NULL)
        *keep = (PyTypeObject *)Py_NewRef(type);
    int rc = PyModule_AddType(m, (PyTypeObject *)type);
    Py_DECREF(type);
    return rc;
}

static int add_constants(PyObject *m)
{
    return PyModule_AddIntConstant(m, "LAYOUT_VERSION", SH_VERSION) ||
           PyModule_AddIntConstant(m, "HEADER_BYTES", sizeof(struct sh_header)) ||
           PyModule_AddIntConstant(m, "MAX_CONFIG_BYTES", SH_CONFIG_BYTES) ||
           PyModule_AddIntConstant(m, "MAX_SMALL_BYTES", SH_MAX_SMALL) ||
           PyModule_AddIntConstant(m, "MAX_ROOT_NAME_BYTES", SH_ROOT_NAME_MAX) ||
           PyModule_AddIntConstant(m, "MAX_PROCESSES", SH_MAX_SLOTS - 1) ||
           PyModule_AddIntConstant(m, "FULL", SH_FULL) ||
           PyModule_AddIntConstant(m, "LIMIT", SH_LIMIT) ||
           PyModule_AddIntConstant(m, "NOSPACE", SH_NOSPACE);
}

static int module_exec(PyObject *m)
{
    if (state != NULL) {
        PyErr_SetString(PyExc_ImportError,
                        "shmheap._core can be loaded into one interpreter of a process");
        return -1;
    }
    State *st = PyModule_GetState(m);
    if (!load_errors(st) || add_type(m, &block_spec, &st->block_type) != 0 ||
        add_type(m, &heap_spec, NULL) != 0 || add_type(m, &steward_spec, NULL) != 0 ||
        add_type(m, &observer_spec, NULL) != 0 || add_constants(m) != 0)
        return -1;
    state = st;
    if (pthread_atfork(before_fork, after_fork_parent, after_fork_child) == 0)
        return 0;
    PyErr_NoMemory();
    return -1;
}

/* Py_mod_gil with Py_MOD_GIL_USED: names that headers of the stable ABI of 3.11 do not have. */
#define MOD_GIL     4
#define MOD_GIL_MIN 0x030d0000ul
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {MOD_GIL, NULL}, {0, NULL}};

static struct PyModuleDef moduledef = {
    PyModuleDef_HEAD_INIT,
    "shmheap._core",
    "The core of shmheap: whatever runs under a shared lock, "
    "and whatever runs once per allocation. It takes no decision.",
    sizeof(State),
    module_methods,
    module_slots,
    NULL,
    NULL,
    NULL};

PyMODINIT_FUNC PyInit__core(void)
{
    if (Py_Version < MOD_GIL_MIN) /* which refuses a slot that it does not know */
        module_slots[1] = (PyModuleDef_Slot){0, NULL};
    return PyModuleDef_Init(&moduledef);
}
