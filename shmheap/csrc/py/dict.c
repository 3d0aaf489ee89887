/* The types DictBase and ListBase have a handle on a collection in common; and the type DictBase.
 */

#include "coll.h"

#include <string.h>

/* Handles on collections */

static PyObject *hold(Coll *self, Block *block, uint32_t kind)
{
    struct box *b = block->box;
    enum sh_status s;
    if (node_kind(&block->ref) != kind || block->ref.nbytes < sizeof(struct sh_coll))
        return PyErr_Format(PyExc_TypeError, "the block is no such collection");
    DO(b, s, sh_repin(&b->ctx, &block->ref, wait, &self->use.coll));
    if (s != SH_OK)
        return PyErr_Occurred() ? NULL : fail(b, s);
    self->box = b;
    b->refs++;
    return (PyObject *)self;
}

PyObject *coll_new(PyTypeObject *type, PyObject *args, PyObject *kwargs, uint32_t kind)
{
    Block *block;
    (void)kwargs; /* a subclass's */
    if (!PyArg_ParseTuple(args, "O!", state->block_type, &block) || !handle_usable(block) ||
        !box_usable(block->box))
        return NULL;
    Coll *self = (Coll *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL || hold(self, block, kind) != NULL)
        return (PyObject *)self;
    Py_DECREF(self);
    return NULL;
}

/* Lets go of body and collection. Cannot fail: it waits as long as it takes, without the GIL. */
static void let_go(Coll *self, struct box *b)
{
    enum sh_status s = SH_BUSY, done = SH_BUSY;
    if (!b->attached || sh_is_forked(&b->ctx))
        return; /* detached: the reaper has it */
    b->calls++;
    Py_BEGIN_ALLOW_THREADS
        while (s == SH_BUSY)
            s = sh_use_end(&b->ctx, &self->use, SLICE_MS);
        while (done == SH_BUSY)
            done = sh_unpin(&b->ctx, &self->use.coll, SLICE_MS);
        for (s = SH_BUSY; s == SH_BUSY || s == SH_DEFERRED;)
            s = sh_flush(&b->ctx, SLICE_MS);
    Py_END_ALLOW_THREADS
    b->calls--;
    if (b->closed)
        box_settle(b);
}

void coll_dealloc(Coll *self)
{
    PyTypeObject *type = Py_TYPE((PyObject *)self);
    if (PyType_GetFlags(type) & Py_TPFLAGS_HAVE_GC)
        PyObject_GC_UnTrack(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs((PyObject *)self);
    if (self->box != NULL) {
        let_go(self, self->box);
        box_drop(self->box);
    }
    release(self);
    Py_DECREF(type);
}

bool coll_usable(Coll *self)
{
    return box_usable(self->box);
}

Py_ssize_t coll_len(Coll *self)
{
    struct box *b = self->box;
    uint64_t n = 0, stamp;
    enum sh_status s;
    if (!coll_usable(self))
        return -1;
    DO(b, s, sh_coll_size(&b->ctx, &self->use, wait, &n, &stamp));
    if (s == SH_OK)
        return (Py_ssize_t)n;
    if (!PyErr_Occurred())
        fail(b, s);
    return -1;
}

PyObject *coll_stamp(Coll *self, PyObject *unused)
{
    struct box *b = self->box;
    uint64_t n, stamp = 0;
    enum sh_status s;
    (void)unused;
    if (!coll_usable(self))
        return NULL;
    DO(b, s, sh_coll_size(&b->ctx, &self->use, wait, &n, &stamp));
    if (s == SH_OK)
        return PyLong_FromUnsignedLongLong(stamp);
    return PyErr_Occurred() ? NULL : fail(b, s);
}

PyObject *coll_try_lock(Coll *self, PyObject *unused)
{
    (void)unused;
    return coll_usable(self) ? PyLong_FromLong(sh_coll_try(&self->box->ctx, &self->use)) : NULL;
}

PyObject *coll_unlock(Coll *self, PyObject *unused)
{
    (void)unused;
    if (!coll_usable(self))
        return NULL;
    if (!sh_coll_let(&self->box->ctx, &self->use))
        return PyErr_Format(PyExc_RuntimeError, "the lock is not this process's");
    Py_RETURN_NONE;
}

/* A further hold on the collection, as a Block: what is pickled, and put under a name. */
PyObject *coll_get_block(Coll *self, void *unused)
{
    struct box *b = self->box;
    enum sh_status s;
    (void)unused;
    if (!coll_usable(self))
        return NULL;
    Block *block = block_new(b);
    if (block == NULL)
        return NULL;
    DO(b, s, sh_repin(&b->ctx, &self->use.coll, wait, &block->ref));
    if (s == SH_OK)
        return (PyObject *)block;
    block_discard(block);
    return PyErr_Occurred() ? NULL : fail(b, s);
}

/* (path, nonce) of its heap */
PyObject *coll_get_place(Coll *self, void *unused)
{
    (void)unused;
    if (!coll_usable(self))
        return NULL;
    return Py_BuildValue("OK", self->box->path, (unsigned long long)self->box->ctx.hdr->nonce);
}

PyMemberDef coll_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Coll, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL}};

/* DictBase. Each operation is inside box_enter and box_leave, so that what was found is there until
 * it is a Python object. */

static PyObject *dict_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    return coll_new(type, args, kwargs, SH_NODE_DICT);
}

/* What was found, as an object, or NULL with an error, or NULL without: there is no such key. */
static PyObject *result(Coll *self, enum sh_status s, struct sh_found *f)
{
    if (s == SH_OK)
        return value_decode((PyObject *)self, self->box, f);
    if (!PyErr_Occurred() && s != SH_ABSENT)
        fail(self->box, s);
    return NULL;
}

static PyObject *lookup(Coll *self, PyObject *key_object)
{
    struct key key;
    struct sh_found f;
    enum sh_status s;
    struct box *b = self->box;
    if (!coll_usable(self) || !key_from(key_object, &key))
        return NULL;
    box_enter(b);
    DO(b, s, sh_dict_get(&b->ctx, &self->use, &key.k, wait, &f));
    PyObject *value = result(self, s, &f);
    box_leave(b);
    Py_XDECREF(key.owner);
    return value;
}

static PyObject *dict_subscript(Coll *self, PyObject *key)
{
    PyObject *value = lookup(self, key);
    if (value == NULL && !PyErr_Occurred())
        PyErr_SetObject(PyExc_KeyError, key);
    return value;
}

static PyObject *dict_get(Coll *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 1 || nargs > 2)
        return PyErr_Format(PyExc_TypeError, "get() takes a key and a default, not %zd arguments",
                            nargs);
    PyObject *value = lookup(self, args[0]);
    if (value == NULL && !PyErr_Occurred())
        return Py_NewRef(nargs == 2 ? args[1] : Py_None);
    return value;
}

static int dict_contains(Coll *self, PyObject *key_object)
{
    struct key key;
    struct sh_found f;
    enum sh_status s;
    struct box *b = self->box;
    if (!coll_usable(self) || !key_from(key_object, &key))
        return -1;
    box_enter(b);
    DO(b, s, sh_dict_get(&b->ctx, &self->use, &key.k, wait, &f));
    if (s == SH_OK)
        found_end(b, &f);
    else if (s != SH_ABSENT && !PyErr_Occurred())
        fail(b, s);
    box_leave(b);
    Py_XDECREF(key.owner);
    return PyErr_Occurred() ? -1 : s == SH_OK;
}

/* 1: set. 0: there is such a key, and must not be. -1: an error. */
static int set(Coll *self, PyObject *key_object, PyObject *object, bool must_be_new)
{
    struct key key;
    struct value value;
    enum sh_status s = SH_NOMEM;
    struct box *b = self->box;
    if (!coll_usable(self) || !key_from(key_object, &key))
        return -1;
    if (value_from((PyObject *)self, self->box, object, &value)) {
        box_enter(b);
        DO(b, s, sh_dict_set(&b->ctx, &self->use, &key.k, &value.v, must_be_new, wait));
        value_end(&value);
        if (s != SH_OK && s != SH_CHANGED && !PyErr_Occurred())
            fail(b, s);
        box_leave(b);
    }
    Py_XDECREF(key.owner);
    return PyErr_Occurred() ? -1 : s == SH_OK;
}

static int delete(Coll *self, PyObject *key_object)
{
    struct key key;
    enum sh_status s;
    struct box *b = self->box;
    if (!coll_usable(self) || !key_from(key_object, &key))
        return -1;
    box_enter(b);
    DO(b, s, sh_dict_pop(&b->ctx, &self->use, &key.k, 0, wait, NULL));
    if (s == SH_ABSENT && !PyErr_Occurred())
        PyErr_SetObject(PyExc_KeyError, key_object);
    else if (s != SH_OK && !PyErr_Occurred())
        fail(b, s);
    box_leave(b);
    Py_XDECREF(key.owner);
    return PyErr_Occurred() ? -1 : 0;
}

static int dict_ass_subscript(Coll *self, PyObject *key, PyObject *value)
{
    if (value == NULL)
        return delete(self, key);
    return set(self, key, value, false) < 0 ? -1 : 0;
}

static PyObject *value_of(Coll *self, struct sh_found *f)
{
    return value_decode((PyObject *)self, self->box, f);
}

static PyObject *pair_of(Coll *self, struct sh_found *f)
{
    PyObject *key = key_decode(f);
    PyObject *value = value_of(self, f);
    PyObject *both = key && value ? PyTuple_Pack(2, key, value) : NULL;
    Py_XDECREF(key);
    Py_XDECREF(value);
    return both;
}

/* Takes out a key, or the last one (NULL), when it has been read. NULL without an error: there is
 * none. */
static PyObject *take_out(Coll *self, const struct sh_key *key,
                          PyObject *(*read)(Coll *, struct sh_found *))
{
    struct sh_found f;
    enum sh_status s, out = SH_CHANGED;
    struct box *b = self->box;
    PyObject *what = NULL;
    while (out == SH_CHANGED) {
        Py_CLEAR(what);
        DO(b, s, sh_dict_pop(&b->ctx, &self->use, key, 0, wait, &f));
        if (s != SH_OK && s != SH_CHANGED)
            return PyErr_Occurred() || s == SH_ABSENT ? NULL : fail(b, s);
        uint64_t cell = f.cell;
        what = read(self, &f);
        if (s == SH_OK || what == NULL)
            return what;
        DO(b, out, sh_dict_pop(&b->ctx, &self->use, key, cell, wait, NULL));
        out = out == SH_ABSENT ? SH_CHANGED : out;
    }
    if (out != SH_OK)
        Py_CLEAR(what);
    if (out != SH_OK && !PyErr_Occurred())
        fail(b, out);
    return what;
}

static PyObject *dict_pop(Coll *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct key key;
    struct box *b = self->box;
    if (nargs < 1 || nargs > 2)
        return PyErr_Format(PyExc_TypeError, "pop() takes a key and a default, not %zd arguments",
                            nargs);
    if (!coll_usable(self) || !key_from(args[0], &key))
        return NULL;
    box_enter(b);
    PyObject *value = take_out(self, &key.k, value_of);
    box_leave(b);
    Py_XDECREF(key.owner);
    if (value != NULL || PyErr_Occurred())
        return value;
    if (nargs == 2)
        return Py_NewRef(args[1]);
    PyErr_SetObject(PyExc_KeyError, args[0]);
    return NULL;
}

static PyObject *dict_setdefault(Coll *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 1 || nargs > 2)
        return PyErr_Format(PyExc_TypeError,
                            "setdefault() takes a key and a default, not %zd arguments", nargs);
    for (;;) { /* what is there may go before it is read */
        PyObject *value = lookup(self, args[0]);
        if (value != NULL || PyErr_Occurred())
            return value;
        if (set(self, args[0], nargs == 2 ? args[1] : Py_None, true) < 0)
            return NULL;
    }
}

static PyObject *dict_popitem(Coll *self, PyObject *unused)
{
    struct box *b = self->box;
    (void)unused;
    if (!coll_usable(self))
        return NULL;
    box_enter(b);
    PyObject *item = take_out(self, NULL, pair_of);
    box_leave(b);
    if (item == NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_KeyError, "popitem(): dictionary is empty");
    return item;
}

static PyObject *dict_clear(Coll *self, PyObject *unused)
{
    struct box *b = self->box;
    enum sh_status s;
    (void)unused;
    if (!coll_usable(self))
        return NULL;
    box_enter(b);
    DO(b, s, sh_dict_clear(&b->ctx, &self->use, wait));
    if (s != SH_OK && !PyErr_Occurred())
        fail(b, s);
    box_leave(b);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* _next(position, stamp, keys_only=False) -> (position, key, value), or None at the end */
static PyObject *dict_next(Coll *self, PyObject *args)
{
    unsigned long long place, stamp;
    int keys_only = 0;
    struct sh_found f;
    enum sh_status s;
    struct box *b = self->box;
    PyObject *item = NULL;
    if (!PyArg_ParseTuple(args, "KK|p:_next", &place, &stamp, &keys_only) || !coll_usable(self))
        return NULL;
    uint64_t at = place;
    box_enter(b);
    DO(b, s, sh_dict_next(&b->ctx, &self->use, &at, stamp, wait, &f));
    if (s == SH_ABSENT) {
        item = Py_NewRef(Py_None);
    } else if (s == SH_CHANGED) {
        PyErr_SetString(PyExc_RuntimeError, "dictionary changed size during iteration");
    } else if (s == SH_OK) {
        PyObject *key = key_decode(&f), *value = NULL;
        if (keys_only)
            found_end(b, &f);
        else
            value = value_decode((PyObject *)self, b, &f);
        if (key != NULL && (value != NULL || keys_only))
            item = Py_BuildValue("KOO", (unsigned long long)at, key, value ? value : Py_None);
        Py_XDECREF(key);
        Py_XDECREF(value);
    } else if (!PyErr_Occurred()) {
        fail(b, s);
    }
    box_leave(b);
    return item;
}

static PyMethodDef dict_methods[] = {
    {"get", (PyCFunction)(void (*)(void))dict_get, METH_FASTCALL,
     "get($self, key, default=None, /)\n--\n\n"
     "Return the value of a key, or the default. Cost: the process lock."},
    {"setdefault", (PyCFunction)(void (*)(void))dict_setdefault, METH_FASTCALL,
     "setdefault($self, key, default=None, /)\n--\n\n"
     "Return the value of a key; where there is none, the default becomes it. Atomic.\n\n"
     "Raises what setting does. Cost: that of setting a new key, or the process lock."},
    {"pop", (PyCFunction)(void (*)(void))dict_pop, METH_FASTCALL,
     "pop($self, key, default=<unrepresentable>, /)\n--\n\n"
     "Take out a key and return its value, or the default if there is no such key.\n\n"
     "Raises KeyError without a default. Cost: the dict's lock."},
    {"popitem", (PyCFunction)dict_popitem, METH_NOARGS,
     "popitem($self, /)\n--\n\n"
     "Take out the pair that came last, and return it. Raises KeyError if there is none.\n\n"
     "Cost: the dict's lock."},
    {"clear", (PyCFunction)dict_clear, METH_NOARGS,
     "clear($self, /)\n--\n\nTake out everything, at one moment. Cost: the dict's lock."},
    {"_next", (PyCFunction)dict_next, METH_VARARGS, NULL},
    {"_stamp", (PyCFunction)coll_stamp, METH_NOARGS, NULL},
    {"_try_lock", (PyCFunction)coll_try_lock, METH_NOARGS, NULL},
    {"_unlock", (PyCFunction)coll_unlock, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef dict_getset[] = {{"_block", (getter)coll_get_block, NULL, NULL, NULL},
                                    {"_place", (getter)coll_get_place, NULL, NULL, NULL},
                                    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot dict_slots[] = {
    {Py_tp_doc, "A process's handle on a shared dict; the base of shmheap.SharedDict."},
    {Py_tp_new, dict_new},
    {Py_tp_dealloc, coll_dealloc},
    {Py_tp_methods, dict_methods},
    {Py_tp_getset, dict_getset},
    {Py_tp_members, coll_members},
    {Py_mp_length, coll_len},
    {Py_mp_subscript, dict_subscript},
    {Py_mp_ass_subscript, dict_ass_subscript},
    {Py_sq_contains, dict_contains},
    {0, NULL}};

PyType_Spec dict_spec = {"shmheap._core.DictBase", sizeof(Coll), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, dict_slots};
