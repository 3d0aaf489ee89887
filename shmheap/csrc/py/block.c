/* The type Block: a handle, which holds a block for this process. */

#include "py.h"

/* Drops the pin. Cannot fail: it waits as long as it takes, without the GIL. Nobody else may have
 * the block in hand by then. */
static void block_release(Block *self, struct box *b)
{
    if (!b->attached || sh_is_forked(&b->ctx))
        return; /* detached: the reaper has it */
    enum sh_status s = sh_unpin(&b->ctx, &self->ref, 0);
    if (__builtin_expect(s != SH_OK, 0)) {
        b->calls++;
        Py_BEGIN_ALLOW_THREADS
            while (s == SH_BUSY)
                s = sh_unpin(&b->ctx, &self->ref, SLICE_MS);
            while (s == SH_DEFERRED || s == SH_BUSY)
                s = sh_flush(&b->ctx, SLICE_MS);
        Py_END_ALLOW_THREADS
        b->calls--;
        if (b->closed)
            box_settle(b);
    }
    if (__builtin_expect(b->ctx.ring, 0))
        box_ring_quietly(b);
}

static void block_dealloc(Block *self)
{
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs((PyObject *)self);
    if (self->box != NULL)
        block_release(self, self->box);
    block_discard(self);
}

bool handle_usable(Block *self)
{
    if (self->box == NULL) {
        PyErr_SetString(state->StaleHandle, "this Block was freed");
        return false;
    }
    return (self->exports > 0 && !box_is_forked(self->box)) || box_usable(self->box);
}

/* The buffer protocol, and what is read through it */

static int block_getbuffer(Block *self, Py_buffer *view, int flags)
{
    if (!handle_usable(self)) {
        view->obj = NULL;
        return -1;
    }
    if (node_kind(&self->ref) != 0) {
        PyErr_SetString(PyExc_BufferError, "a collection has no bytes of its own");
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

static Py_ssize_t block_len(Block *self)
{
    return handle_usable(self) ? (Py_ssize_t)self->ref.nbytes : -1;
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
    if (!handle_usable(self))
        return NULL;
    if (node_kind(&self->ref) != 0)
        return PyErr_Format(PyExc_TypeError, "a collection has no bytes of its own");
    return PyBytes_FromStringAndSize((const char *)self->ref.data, (Py_ssize_t)self->ref.nbytes);
}

/* The handle */

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
    return handle_usable(self) ? PyLong_FromUnsignedLongLong(self->ref.nbytes) : NULL;
}

static PyObject *block_get_offset(Block *self, void *unused)
{
    (void)unused;
    return handle_usable(self) ? PyLong_FromUnsignedLongLong(block_offset(self)) : NULL;
}

static PyObject *block_get_generation(Block *self, void *unused)
{
    (void)unused;
    return handle_usable(self) ? PyLong_FromUnsignedLongLong(self->ref.gen) : NULL;
}

static PyObject *block_get_node_kind(Block *self, void *unused)
{
    (void)unused;
    return handle_usable(self) ? PyLong_FromUnsignedLong(node_kind(&self->ref)) : NULL;
}

static PyObject *block_get_nonce(Block *self, void *unused)
{
    (void)unused;
    return handle_usable(self) ? PyLong_FromUnsignedLongLong(self->box->ctx.hdr->nonce) : NULL;
}

static PyObject *block_get_freed(Block *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->box == NULL);
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

/* To other processes, and copies */

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
    if (!handle_usable(self) || !box_usable(self->box))
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
    if (!handle_usable(self) || !box_usable(self->box))
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
    if (!handle_usable(self) || !box_usable(self->box) || !load_python_side())
        return NULL;
    return PyObject_CallFunction(state->copy_bytes, "OOK", (PyObject *)self, self->box->path,
                                 (unsigned long long)self->box->ctx.hdr->nonce);
}

/* The type */

static PyMethodDef block_methods[] = {
    {"free", (PyCFunction)block_free, METH_NOARGS,
     "free($self, /)\n--\n\n"
     "Drop this handle's hold on the block now instead of when the handle goes.\n\n"
     "The memory is free when no process holds it any more. A second call does nothing.\n\n"
     "Raises:\n    BufferError: a buffer exported from this handle is still in use.\n\n"
     "Cost: the process lock; of the last holder of a block larger than 64 KiB the heap lock, "
     "too."},
    {"lease", (PyCFunction)block_lease, METH_NOARGS,
     "lease($self, /)\n--\n\n"
     "Return a Lease: keeps the block alive on its way to another process, until taken or "
     "released.\n\n"
     "Pickling a Block makes one by itself.\n\n"
     "Raises:\n"
     "    HeapFull: no memory for the lease itself, some bytes.\n"
     "    StaleHandle: this handle was freed.\n\n"
     "Cost: the process lock."},
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
    {"_node_kind", (getter)block_get_node_kind, NULL, NULL, NULL},
    {"freed", (getter)block_get_freed, NULL, "Whether free() was called on this handle.", NULL},
    {"_nonce", (getter)block_get_nonce, NULL, "Its heap's.", NULL},
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

PyType_Spec block_spec = {"shmheap._core.Block", sizeof(Block), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, block_slots};
