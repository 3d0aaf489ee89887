/* The type HeapBase, the base of shmheap.Heap: a process's use of an arena. */

#include "coll.h"

#include <string.h>

#define COPY_WITH_GIL     65536 /* fewer bytes take less than handing the GIL to and fro */
#define SUCCESSION_SLICES 2     /* who waits for a coordinator that died looks for it this often */

PyObject *heap_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if ((args != NULL && PyTuple_Size(args) != 0) || (kwargs != NULL && PyDict_Size(kwargs) != 0))
        return PyErr_Format(PyExc_TypeError,
                            "a heap is made by shmheap.open(), Heap.create() or Heap.attach()");
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    return alloc(type, 0);
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
    b->ctx.ring = false; /* Python does, when the bell is ready */
    b->keep = true;      /* until we know */
    box_enter_list(b);
    self->box = b;
    Py_RETURN_TRUE;
}

void heap_dealloc(Heap *self)
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

PyObject *heap_close(Heap *self, PyObject *unused)
{
    (void)unused;
    if (self->box != NULL) {
        self->box->closed = true;
        box_settle(self->box);
    }
    Py_RETURN_NONE;
}

/* Allocating */

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
    if (*s == SH_OK && box_ring(b) == 0)
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

/* Large ones without the GIL. */
static int copy_in(Block *block, Py_buffer *view)
{
    if (view->len < COPY_WITH_GIL || !PyBuffer_IsContiguous(view, 'C'))
        return PyBuffer_ToContiguous(block->ref.data, view, view->len, 'C');
    Py_BEGIN_ALLOW_THREADS
        memcpy(block->ref.data, view->buf, (size_t)view->len);
    Py_END_ALLOW_THREADS
    return 0;
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
    if (block != NULL && copy_in((Block *)block, view) != 0)
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

/* Leases */

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

/* Of all that map this arena, the one in whose mapping the byte is. */
static struct box *box_at(const struct box *own, const uint8_t *byte)
{
    pthread_mutex_lock(&boxes_lock);
    struct box *b = boxes;
    while (b != NULL &&
           (b->closed || b->ctx.hdr->nonce != own->ctx.hdr->nonce ||
            byte < b->ctx.base + b->ctx.geo.data || byte >= b->ctx.base + b->ctx.geo.end))
        b = b->next;
    pthread_mutex_unlock(&boxes_lock);
    return b != NULL && !sh_is_forked(&b->ctx) ? b : NULL;
}

/* The Block whose bytes those are, or None. It is as that mapping of the arena has it in which they
 * lie. */
static PyObject *block_at(Heap *self, const uint8_t *byte, Py_ssize_t nbytes)
{
    enum sh_status s;
    struct box *b = nbytes > 0 ? box_at(self->box, byte) : NULL;
    if (b == NULL)
        Py_RETURN_NONE;
    Block *block = block_new(b);
    if (block == NULL)
        return NULL;
    uint64_t off = (uint64_t)(byte - b->ctx.base) - b->ctx.geo.data;
    WAITING_FOR_ROOM(b, s, sh_block_at(&b->ctx, off, (uint64_t)nbytes, SLICE_MS, &block->ref));
    if (s == SH_OK)
        return (PyObject *)block;
    if (!PyErr_Occurred() && s != SH_STALE)
        fail(b, s);
    block_discard(block);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* _block_at(address, nbytes) -> Block or None */
static PyObject *heap_block_at(Heap *self, PyObject *args)
{
    Py_ssize_t address, nbytes;
    if (!PyArg_ParseTuple(args, "nn:_block_at", &address, &nbytes) || !box_usable(self->box))
        return NULL;
    return block_at(self, (const uint8_t *)address, nbytes);
}

/* _block_of(buffer) -> (Block, where in it the buffer begins) or None */
static PyObject *heap_block_of(Heap *self, PyObject *buffer)
{
    Py_buffer view;
    if (!box_usable(self->box) || PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE) != 0)
        return NULL;
    PyObject *found = block_at(self, view.buf, view.len);
    if (found != NULL && found != Py_None) {
        Py_ssize_t start = (const uint8_t *)view.buf - ((Block *)found)->ref.data;
        found = Py_BuildValue("(Nn)", found, start);
    }
    PyBuffer_Release(&view);
    return found;
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
    box_enter(b);
    WAITING(b, s, sh_lease_drop(&b->ctx, off, gen, cell, seq, SLICE_MS));
    while (s == SH_DEFERRED)
        WAITING(b, s, sh_flush(&b->ctx, SLICE_MS));
    box_leave(b);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(s == SH_OK);
}

/* Nodes */

typedef enum sh_status make_node(struct sh_ctx *, int wait_ms, struct sh_ref *);

static PyObject *new_node(Heap *self, make_node *make)
{
    struct box *b = self->box;
    enum sh_status s;
    if (!box_usable(b))
        return NULL;
    Block *block = block_new(b);
    if (block == NULL)
        return NULL;
    DO(b, s, make(&b->ctx, wait, &block->ref));
    if (s == SH_OK)
        return (PyObject *)block;
    block_discard(block);
    return PyErr_Occurred() ? NULL : fail(b, s);
}

static PyObject *heap_dict_new(Heap *self, PyObject *unused)
{
    (void)unused;
    return new_node(self, sh_dict_new);
}

static PyObject *heap_list_new(Heap *self, PyObject *unused)
{
    (void)unused;
    return new_node(self, sh_list_new);
}

/* _box_new(value, home) -> Block: a value that stands alone, as in a collection; home is what
 * shmheap.values is told of where it is */
static PyObject *heap_box_new(Heap *self, PyObject *args)
{
    struct box *b = self->box;
    PyObject *object, *home;
    struct value value;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "OO:_box_new", &object, &home) || !box_usable(b) ||
        !value_from(home, b, object, &value))
        return NULL;
    Block *block = block_new(b);
    if (block != NULL) {
        DO(b, s, sh_record_new(&b->ctx, &value.v, wait, &block->ref));
        if (s != SH_OK) {
            block_discard(block);
            block = NULL;
            if (!PyErr_Occurred())
                fail(b, s);
        }
    }
    value_end(&value);
    return (PyObject *)block;
}

/* _unbox(block, home) -> the value that _box_new put into it */
static PyObject *heap_unbox(Heap *self, PyObject *args)
{
    struct box *b = self->box;
    struct sh_found f;
    struct sh_ref ref;
    enum sh_status s;
    Block *block;
    PyObject *home;
    if (!PyArg_ParseTuple(args, "O!O:_unbox", state->block_type, &block, &home) || !box_usable(b) ||
        !handle_usable(block))
        return NULL;
    if (!ref_here(b, block, &ref) || node_kind(&ref) != SH_NODE_RECORD)
        return PyErr_Format(PyExc_TypeError, "the block holds no value");
    box_enter(b);
    DO(b, s, sh_record_get(&b->ctx, &ref, wait, &f));
    PyObject *value = s == SH_OK ? value_decode(home, b, &f) : NULL;
    if (s != SH_OK && !PyErr_Occurred())
        fail(b, s);
    box_leave(b);
    return value;
}

/* _node_new(nrefs) -> Block: references alone, for tests */
static PyObject *heap_node_new(Heap *self, PyObject *args)
{
    struct box *b = self->box;
    unsigned int nrefs;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "I:_node_new", &nrefs) || !box_usable(b))
        return NULL;
    Block *block = block_new(b);
    if (block == NULL)
        return NULL;
    DO(b, s, sh_node_new(&b->ctx, SH_NODE_PLAIN, nrefs, 0, wait, &block->ref));
    if (s == SH_OK)
        return (PyObject *)block;
    block_discard(block);
    return PyErr_Occurred() ? NULL : fail(b, s);
}

/* _node_load(node, i) -> Block or None; _node_store(node, i, block or None) */
static PyObject *heap_node_load(Heap *self, PyObject *args)
{
    struct box *b = self->box;
    struct sh_ref ref;
    unsigned int i;
    enum sh_status s;
    Block *node;
    if (!PyArg_ParseTuple(args, "O!I:_node_load", state->block_type, &node, &i) || !box_usable(b) ||
        !handle_usable(node))
        return NULL;
    if (!ref_here(b, node, &ref) || node_kind(&ref) != SH_NODE_PLAIN || i >= node_refs(&ref))
        return PyErr_Format(PyExc_IndexError, "the block has no such reference");
    Block *block = block_new(b);
    if (block == NULL)
        return NULL;
    DO(b, s, sh_node_load(&b->ctx, &ref, i, wait, &block->ref));
    if (s == SH_OK)
        return (PyObject *)block;
    block_discard(block);
    if (PyErr_Occurred())
        return NULL;
    return s == SH_ABSENT ? Py_NewRef(Py_None) : fail(b, s);
}

static PyObject *heap_node_store(Heap *self, PyObject *args)
{
    struct box *b = self->box;
    struct sh_ref ref, to = {0};
    unsigned int i;
    enum sh_status s;
    Block *node;
    PyObject *object;
    if (!PyArg_ParseTuple(args, "O!IO:_node_store", state->block_type, &node, &i, &object) ||
        !box_usable(b) || !handle_usable(node))
        return NULL;
    if (!ref_here(b, node, &ref) || node_kind(&ref) != SH_NODE_PLAIN || i >= node_refs(&ref))
        return PyErr_Format(PyExc_IndexError, "the block has no such reference");
    if (object != Py_None &&
        (Py_TYPE(object) != state->block_type || !handle_usable((Block *)object) ||
         !ref_here(b, (Block *)object, &to)))
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "a Block of this heap");
    DO(b, s, sh_node_store(&b->ctx, &ref, i, object == Py_None ? NULL : &to, wait));
    if (s == SH_OK)
        Py_RETURN_NONE;
    return PyErr_Occurred() ? NULL : fail(b, s);
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

static enum sh_status set_root(struct box *b, const char *name, uint32_t len,
                               const struct sh_ref *ref, bool must_be_new,
                               const struct sh_ref *only)
{
    if (only != NULL)
        return sh_root_replace(&b->ctx, name, len, only, ref, SLICE_MS);
    return (must_be_new ? sh_root_add : sh_root_set)(&b->ctx, name, len, ref, SLICE_MS);
}

/* _root_set(name, block, must_be_new=False, only=None) -> whether it is set; only: that block is
 * what the name must stand for */
static PyObject *heap_root_set(Heap *self, PyObject *args)
{
    const char *name;
    Py_ssize_t len;
    Block *block, *only = NULL;
    int must_be_new = 0;
    struct sh_ref ref, old;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "y#O!|pO!:_root_set", &name, &len, state->block_type, &block,
                          &must_be_new, state->block_type, &only) ||
        !box_usable(self->box) || !handle_usable(block) || (only != NULL && !handle_usable(only)))
        return NULL;
    struct box *b = self->box;
    if (!ref_here(b, block, &ref))
        return PyErr_Format(PyExc_ValueError,
                            "the block belongs to another heap; copy it with heap.put()");
    if (only != NULL && !ref_here(b, only, &old))
        Py_RETURN_FALSE;
    box_enter(b);
    WAITING_FOR_ROOM(b, s, set_root(b, name, (uint32_t)len, &ref, must_be_new, only ? &old : NULL));
    while (s == SH_DEFERRED)
        WAITING(b, s, sh_flush(&b->ctx, SLICE_MS));
    box_leave(b);
    if (PyErr_Occurred())
        return NULL;
    return s == SH_OK || s == SH_CHANGED ? PyBool_FromLong(s == SH_OK) : fail(b, s);
}

/* _root_clear(name, only=None) -> whether the name stood for a block, or for that one */
static PyObject *heap_root_clear(Heap *self, PyObject *args)
{
    const char *name;
    Py_ssize_t len;
    Block *only = NULL;
    struct sh_ref ref;
    enum sh_status s;
    if (!PyArg_ParseTuple(args, "y#|O!:_root_clear", &name, &len, state->block_type, &only) ||
        !box_usable(self->box) || (only != NULL && !handle_usable(only)))
        return NULL;
    struct box *b = self->box;
    if (only != NULL && !ref_here(b, only, &ref))
        Py_RETURN_FALSE;
    box_enter(b);
    WAITING(b, s, sh_root_clear_of(&b->ctx, name, (uint32_t)len, only ? &ref : NULL, SLICE_MS));
    while (s == SH_DEFERRED)
        WAITING(b, s, sh_flush(&b->ctx, SLICE_MS));
    box_leave(b);
    if (PyErr_Occurred())
        return NULL;
    return s == SH_OK || s == SH_ABSENT ? PyBool_FromLong(s == SH_OK) : fail(b, s);
}

static PyObject *name_list(const struct sh_name *names, uint32_t n)
{
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (uint32_t i = 0; list != NULL && i < n; i++) {
        PyObject *one = PyBytes_FromStringAndSize(names[i].text, (Py_ssize_t)names[i].len);
        if (one == NULL || PyList_SetItem(list, (Py_ssize_t)i, one) != 0)
            Py_CLEAR(list);
    }
    return list;
}

/* _root_names() -> all of them, as they are at one moment */
static PyObject *heap_root_names(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_name *names = NULL, *more;
    uint32_t n = 0;
    enum sh_status s = SH_CHANGED;
    struct box *b = self->box;
    if (!box_usable(b))
        return NULL;
    box_enter(b);
    while (s == SH_CHANGED && (more = PyMem_Realloc(names, (n + 1ull) * sizeof *names)) != NULL) {
        names = more;
        WAITING(b, s, sh_root_names(&b->ctx, names, &n, SLICE_MS));
    }
    box_leave(b);
    PyObject *list = s == SH_OK && !PyErr_Occurred() ? name_list(names, n) : NULL;
    PyMem_Free(names);
    if (list != NULL || PyErr_Occurred())
        return list;
    return s == SH_CHANGED ? PyErr_NoMemory() : fail(b, s);
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
    return box_ring(self->box) == 0 ? PyLong_FromUnsignedLong(ticket) : NULL;
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
        if (box_ring(b) != 0)
            return NULL;
        if (!b->attached)
            return fail(b, SH_CLOSED);
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

/* _room() -> (bytes that the heap may hold now, of what units, bytes of the longest free run) */
static PyObject *heap_room(Heap *self, PyObject *unused)
{
    struct box *b = self->box;
    enum sh_status s;
    uint32_t longest = 0;
    (void)unused;
    if (!box_usable(b))
        return NULL;
    box_enter(b);
    WAITING(b, s, sh_pages_longest(&b->ctx, SLICE_MS, &longest));
    unsigned long long unit = 1ull << b->ctx.geo.unit_shift,
                       limit = atomic_load(&b->ctx.hdr->limit_units) * unit,
                       run = (unsigned long long)longest << b->ctx.geo.page_shift;
    box_leave(b);
    if (s != SH_OK)
        return PyErr_Occurred() ? NULL : fail(b, s);
    return Py_BuildValue("KKK", limit, unit, run);
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
    return box_ring(self->box) == 0 ? Py_NewRef(Py_None) : NULL;
}

/* Looking and telling */

static PyObject *heap_stats(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? stats_of(&self->box->ctx) : NULL;
}

static PyObject *heap_check(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? check_of(self->box) : NULL;
}

static PyObject *heap_shares(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? shares_of(self->box) : NULL;
}

static PyObject *heap_holders_of(Heap *self, PyObject *offsets)
{
    return box_usable(self->box) ? holders_of(self->box, offsets) : NULL;
}

static PyObject *heap_largest(Heap *self, PyObject *args)
{
    unsigned int n;
    if (!PyArg_ParseTuple(args, "I:_largest", &n) || !box_usable(self->box))
        return NULL;
    return largest_of(self->box, n);
}

/* _set_site(block, text) -> whether it could be kept where the block was made */
static PyObject *heap_set_site(Heap *self, PyObject *args)
{
    const char *text;
    Py_ssize_t len;
    struct sh_ref ref;
    enum sh_status s;
    Block *block;
    if (!PyArg_ParseTuple(args, "O!y#:_set_site", state->block_type, &block, &text, &len) ||
        !box_usable(self->box) || !handle_usable(block))
        return NULL;
    struct box *b = self->box;
    if (!ref_here(b, block, &ref))
        return PyErr_Format(PyExc_ValueError, "the block belongs to another heap");
    uint32_t n = len < (Py_ssize_t)SH_SITE_MAX ? (uint32_t)len : SH_SITE_MAX;
    WAITING(b, s, sh_site_set(&b->ctx, &ref, text, n, SLICE_MS));
    if (PyErr_Occurred())
        return NULL;
    return s == SH_OK || is_short(s) ? PyBool_FromLong(s == SH_OK) : fail(b, s);
}

static PyObject *heap_sites(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? sites_of(self->box) : NULL;
}

static PyObject *heap_coordinator_alive(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? PyBool_FromLong(sh_alive(&self->box->ctx, 0)) : NULL;
}

/* _may_start() -> whether it is ours to start a coordinator, of all who find that there is none */
static PyObject *heap_may_start(Heap *self, PyObject *unused)
{
    (void)unused;
    return box_usable(self->box) ? PyBool_FromLong(sh_may_start(&self->box->ctx)) : NULL;
}

/* _give_up(): close, and start no coordinator: none can be. Whoever comes next tries again. */
static PyObject *heap_give_up(Heap *self, PyObject *unused)
{
    if (!box_usable(self->box))
        return NULL;
    Py_CLEAR(self->box->bell);
    sh_start_failed(&self->box->ctx);
    return heap_close(self, unused);
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

/* The type */

static PyMethodDef heap_methods[] = {
    {"_attach", (PyCFunction)heap_attach, METH_VARARGS, NULL},
    {"close", (PyCFunction)heap_close, METH_NOARGS,
     "close($self, /)\n--\n\n"
     "Leave the heap: this process drops what it holds. Exported buffers stay valid until "
     "released.\n\n"
     "Idempotent. Blocks of this Heap object cannot be used any more. Never unlinks.\n\n"
     "Cost: the registry lock, and some system calls."},
    {"alloc", (PyCFunction)(void (*)(void))heap_alloc, METH_FASTCALL | METH_KEYWORDS,
     "alloc($self, nbytes, /, *, zero=True, timeout=0)\n--\n\n"
     "Return a new Block of nbytes bytes, which this process holds.\n\n"
     "Args:\n"
     "    nbytes: Size in bytes, at least 1.\n"
     "    zero: Whether the bytes are zeroed; otherwise they are arbitrary.\n"
     "    timeout: Seconds to wait for memory; None: for ever. 0: only until the coordinator has\n"
     "        looked for some, which takes milliseconds.\n\n"
     "Raises:\n"
     "    HeapFull: No memory, and waiting did not help. Says which limit, who holds most, what to "
     "do.\n"
     "    ValueError: nbytes < 1, or the heap is closed.\n\n"
     "Cost: about that of bytearray(nbytes) up to 64 KiB: no system call, no lock that another\n"
     "process wants. Larger blocks take the heap lock, and pages not in memory are committed."},
    {"put", (PyCFunction)heap_put, METH_O,
     "put($self, data, /)\n--\n\nReturn a new Block with a copy of a bytes-like object's bytes.\n\n"
     "Args:\n"
     "    data: Anything with a buffer, at least 1 byte; of an array the bytes are in C order.\n\n"
     "Raises what alloc raises, and TypeError for what has no buffer.\n\n"
     "Cost: alloc's, and a copy."},
    {"_alloc_once", (PyCFunction)heap_alloc_once, METH_VARARGS, NULL},
    {"_adopt", (PyCFunction)heap_adopt, METH_VARARGS, NULL},
    {"_block_at", (PyCFunction)heap_block_at, METH_VARARGS, NULL},
    {"_block_of", (PyCFunction)heap_block_of, METH_O, NULL},
    {"_drop_lease", (PyCFunction)heap_drop_lease, METH_VARARGS, NULL},
    {"_dict_new", (PyCFunction)heap_dict_new, METH_NOARGS, NULL},
    {"_list_new", (PyCFunction)heap_list_new, METH_NOARGS, NULL},
    {"_box_new", (PyCFunction)heap_box_new, METH_VARARGS, NULL},
    {"_unbox", (PyCFunction)heap_unbox, METH_VARARGS, NULL},
    {"_node_new", (PyCFunction)heap_node_new, METH_VARARGS, NULL},
    {"_node_load", (PyCFunction)heap_node_load, METH_VARARGS, NULL},
    {"_node_store", (PyCFunction)heap_node_store, METH_VARARGS, NULL},
    {"_root_get", (PyCFunction)heap_root_get, METH_VARARGS, NULL},
    {"_root_set", (PyCFunction)heap_root_set, METH_VARARGS, NULL},
    {"_root_clear", (PyCFunction)heap_root_clear, METH_VARARGS, NULL},
    {"_root_names", (PyCFunction)heap_root_names, METH_NOARGS, NULL},
    {"_stats", (PyCFunction)heap_stats, METH_NOARGS, NULL},
    {"_check", (PyCFunction)heap_check, METH_NOARGS, NULL},
    {"_shares", (PyCFunction)heap_shares, METH_NOARGS, NULL},
    {"_holders_of", (PyCFunction)heap_holders_of, METH_O, NULL},
    {"_largest", (PyCFunction)heap_largest, METH_VARARGS, NULL},
    {"_set_site", (PyCFunction)heap_set_site, METH_VARARGS, NULL},
    {"_sites", (PyCFunction)heap_sites, METH_NOARGS, NULL},
    {"_request", (PyCFunction)heap_request, METH_VARARGS, NULL},
    {"_await", (PyCFunction)heap_await, METH_VARARGS, NULL},
    {"_room", (PyCFunction)heap_room, METH_NOARGS, NULL},
    {"_freed", (PyCFunction)heap_freed, METH_NOARGS, NULL},
    {"_waiting", (PyCFunction)heap_waiting, METH_VARARGS, NULL},
    {"_wait_memory", (PyCFunction)heap_wait_memory, METH_VARARGS, NULL},
    {"_want", (PyCFunction)heap_want, METH_VARARGS, NULL},
    {"_coordinator_alive", (PyCFunction)heap_coordinator_alive, METH_NOARGS, NULL},
    {"_may_start", (PyCFunction)heap_may_start, METH_NOARGS, NULL},
    {"_give_up", (PyCFunction)heap_give_up, METH_NOARGS, NULL},
    {"_keep", (PyCFunction)heap_keep, METH_VARARGS, NULL},
    {"_dump", (PyCFunction)heap_dump, METH_NOARGS, NULL},
    {"_fileno", (PyCFunction)heap_fileno, METH_NOARGS, NULL},
    {"_mark_unlinked", (PyCFunction)heap_mark_unlinked, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};

PyGetSetDef heap_getset[] = {
    {"capacity", (getter)heap_get_capacity, NULL, "Bytes that blocks can have together, at most.",
     NULL},
    {"nonce", (getter)heap_get_nonce, NULL, "Random number that names this arena for ever.", NULL},
    {"closed", (getter)heap_get_closed, NULL, "Whether close() was called.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

PyMemberDef heap_members[] = {
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

PyType_Spec heap_spec = {"shmheap._core.HeapBase", sizeof(Heap), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, heap_slots};
