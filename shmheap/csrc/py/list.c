/* The type ListBase: a handle on a shared list. */

#include "coll.h"

#include <stdlib.h>

static PyObject *list_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    return coll_new(type, args, kwargs, SH_NODE_LIST);
}

static PyObject *result(Coll *self, enum sh_status s, struct sh_found *f, const char *absent)
{
    if (s == SH_OK)
        return value_decode((PyObject *)self, self->box, f);
    if (s == SH_ABSENT && !PyErr_Occurred())
        PyErr_SetString(PyExc_IndexError, absent);
    return PyErr_Occurred() ? NULL : fail(self->box, s);
}

static PyObject *get(Coll *self, Py_ssize_t i)
{
    struct sh_found f;
    enum sh_status s;
    struct box *b = self->box;
    box_enter(b);
    DO(b, s, sh_list_get(&b->ctx, &self->use, i, wait, &f));
    PyObject *value = result(self, s, &f, "list index out of range");
    box_leave(b);
    return value;
}

static PyObject *items_of(Coll *self, struct sh_copy *copy)
{
    struct sh_found f;
    Py_ssize_t i = 0;
    PyObject *list = PyList_New((Py_ssize_t)copy->n), *value;
    while (list != NULL && sh_copy_next(copy, &f)) {
        if ((value = value_decode((PyObject *)self, self->box, &f)) == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i++, value);
    }
    return list;
}

/* A part of what there was at one moment, as a list. */
static PyObject *part_of(Coll *self, Py_ssize_t start, Py_ssize_t stop)
{
    enum sh_status s;
    struct box *b = self->box;
    struct sh_copy copy = {.start = start, .stop = stop};
    struct sh_found f;
    PyObject *list = NULL;
    box_enter(b);
    DO(b, s, sh_list_copy(&b->ctx, &self->use, &copy, wait));
    if (s == SH_OK)
        list = items_of(self, &copy);
    else if (!PyErr_Occurred())
        fail(b, s);
    while (sh_copy_next(&copy, &f)) /* after an error */
        found_end(b, &f);
    box_leave(b);
    free(copy.bytes);
    return list;
}

/* _snapshot() -> list of what there was at one moment */
static PyObject *list_snapshot(Coll *self, PyObject *unused)
{
    (void)unused;
    return coll_usable(self) ? part_of(self, 0, PY_SSIZE_T_MAX) : NULL;
}

static PyObject *slice_of(Coll *self, PyObject *slice)
{
    Py_ssize_t start, stop, step;
    if (PySlice_Unpack(slice, &start, &stop, &step) != 0)
        return NULL;
    if (step == 1)
        return part_of(self, start, stop);
    PyObject *all = part_of(self, 0, PY_SSIZE_T_MAX);
    PyObject *part = all ? PyObject_GetItem(all, slice) : NULL;
    Py_XDECREF(all);
    return part;
}

static PyObject *list_subscript(Coll *self, PyObject *key)
{
    if (!coll_usable(self))
        return NULL;
    if (PyIndex_Check(key)) {
        Py_ssize_t i = PyNumber_AsSsize_t(key, PyExc_IndexError);
        return i == -1 && PyErr_Occurred() ? NULL : get(self, i);
    }
    if (Py_TYPE(key) == &PySlice_Type)
        return slice_of(self, key);
    return PyErr_Format(PyExc_TypeError, "list indices must be integers or slices, not %R",
                        (PyObject *)Py_TYPE(key));
}

static PyObject *list_item(Coll *self, Py_ssize_t i)
{
    return coll_usable(self) ? get(self, i) : NULL;
}

/* What many items are about is the subclass's: in Python, in tries. */
static int set_many(Coll *self, PyObject *key, PyObject *object)
{
    PyObject *done = NULL;
    if (object == NULL)
        done = PyObject_CallMethod((PyObject *)self, "_delete", "(O)", key);
    else if (Py_TYPE(key) == &PySlice_Type)
        done = PyObject_CallMethod((PyObject *)self, "_set_slice", "OO", key, object);
    else
        PyErr_Format(PyExc_TypeError, "list indices must be integers or slices, not %R",
                     (PyObject *)Py_TYPE(key));
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static int list_ass_subscript(Coll *self, PyObject *key, PyObject *object)
{
    struct value value;
    enum sh_status s;
    struct box *b = self->box;
    if (object == NULL || !PyIndex_Check(key))
        return set_many(self, key, object);
    Py_ssize_t i = PyNumber_AsSsize_t(key, PyExc_IndexError);
    if (PyErr_Occurred() || !coll_usable(self) ||
        !value_from((PyObject *)self, self->box, object, &value))
        return -1;
    box_enter(b);
    DO(b, s, sh_list_set(&b->ctx, &self->use, i, &value.v, wait));
    value_end(&value);
    if (s == SH_ABSENT && !PyErr_Occurred())
        PyErr_SetString(PyExc_IndexError, "list assignment index out of range");
    else if (s != SH_OK && !PyErr_Occurred())
        fail(b, s);
    box_leave(b);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *list_append(Coll *self, PyObject *object)
{
    struct value value;
    enum sh_status s;
    struct box *b = self->box;
    if (!coll_usable(self) || !value_from((PyObject *)self, self->box, object, &value))
        return NULL;
    box_enter(b);
    DO(b, s, sh_list_append(&b->ctx, &self->use, &value.v, wait));
    value_end(&value);
    if (s != SH_OK && !PyErr_Occurred())
        fail(b, s);
    box_leave(b);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

/* _pop() -> the last item, which is taken out when it has been read */
static PyObject *list_pop(Coll *self, PyObject *unused)
{
    struct sh_found f;
    enum sh_status s, out = SH_CHANGED;
    struct box *b = self->box;
    PyObject *value = NULL;
    (void)unused;
    if (!coll_usable(self))
        return NULL;
    box_enter(b);
    while (out == SH_CHANGED) {
        Py_CLEAR(value);
        DO(b, s, sh_list_pop(&b->ctx, &self->use, 0, wait, &f));
        uint64_t cell = f.cell;
        value = result(self, s == SH_CHANGED ? SH_OK : s, &f, "pop from empty list");
        out = s != SH_CHANGED || value == NULL ? SH_OK : out;
        if (out == SH_CHANGED)
            DO(b, out, sh_list_pop(&b->ctx, &self->use, cell, wait, NULL));
        out = out == SH_ABSENT ? SH_CHANGED : out;
    }
    if (out != SH_OK)
        Py_CLEAR(value);
    if (out != SH_OK && !PyErr_Occurred())
        fail(b, out);
    box_leave(b);
    return value;
}

static void drop(struct box *b, struct sh_ref *r)
{
    struct sh_found held = {.pinned = true, .record = *r};
    found_end(b, &held);
}

/* The items of a sequence, in an array of our own. */
static bool stage_all(Coll *self, PyObject *items, struct sh_ref *stage)
{
    Py_ssize_t n = PyList_Size(items);
    enum sh_status s;
    struct box *b = self->box;
    DO(b, s, sh_list_stage_new(&b->ctx, (uint64_t)n, wait, stage));
    if (s != SH_OK)
        return PyErr_Occurred() ? false : fail(b, s) != NULL;
    for (Py_ssize_t i = 0; i < n && i < PyList_Size(items); i++) {
        struct value value;
        if (value_from((PyObject *)self, b, PyList_GetItem(items, i), &value)) {
            DO(b, s, sh_list_stage(&b->ctx, stage, &value.v, wait));
            value_end(&value);
            if (s != SH_OK && !PyErr_Occurred())
                fail(b, s);
        }
        if (PyErr_Occurred()) {
            drop(b, stage);
            return false;
        }
    }
    return true;
}

/* _splice(start, stop, items, stamp, exact=False) -> whether the list was that of the stamp, and so
 * was changed; exact: nor was an item set since. _splice(-1, -1, items, 0): at its end, whatever it
 * is. */
static PyObject *list_splice(Coll *self, PyObject *args)
{
    Py_ssize_t start, stop;
    int exact = 0;
    PyObject *items;
    unsigned long long stamp;
    struct sh_ref stage;
    enum sh_status s = SH_NOMEM;
    struct box *b = self->box;
    if (!PyArg_ParseTuple(args, "nnO!K|p:_splice", &start, &stop, &PyList_Type, &items, &stamp,
                          &exact) ||
        !coll_usable(self))
        return NULL;
    box_enter(b);
    if (stage_all(self, items, &stage)) {
        struct sh_splice part = {.start = (uint64_t)start,
                                 .stop = (uint64_t)stop,
                                 .stamp = stamp,
                                 .always = start < 0,
                                 .exact = exact,
                                 .stage = &stage};
        DO(b, s, sh_list_splice(&b->ctx, &self->use, &part, wait));
        if (s != SH_OK && s != SH_CHANGED && !PyErr_Occurred())
            fail(b, s);
        drop(b, &stage);
    }
    box_leave(b);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(s == SH_OK);
}

static PyMethodDef list_methods[] = {
    {"append", (PyCFunction)list_append, METH_O,
     "append($self, value, /)\n--\n\n"
     "Add a value at the end. Atomic. Cost: the list's lock; now and then a larger array."},
    {"_pop", (PyCFunction)list_pop, METH_NOARGS, NULL},
    {"_snapshot", (PyCFunction)list_snapshot, METH_NOARGS, NULL},
    {"_splice", (PyCFunction)list_splice, METH_VARARGS, NULL},
    {"_stamp", (PyCFunction)coll_stamp, METH_NOARGS, NULL},
    {"_try_lock", (PyCFunction)coll_try_lock, METH_NOARGS, NULL},
    {"_unlock", (PyCFunction)coll_unlock, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef list_getset[] = {{"_block", (getter)coll_get_block, NULL, NULL, NULL},
                                    {"_place", (getter)coll_get_place, NULL, NULL, NULL},
                                    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot list_slots[] = {
    {Py_tp_doc, "A process's handle on a shared list; the base of shmheap.SharedList."},
    {Py_tp_new, list_new},
    {Py_tp_dealloc, coll_dealloc},
    {Py_tp_methods, list_methods},
    {Py_tp_getset, list_getset},
    {Py_tp_members, coll_members},
    {Py_mp_length, coll_len},
    {Py_mp_subscript, list_subscript},
    {Py_mp_ass_subscript, list_ass_subscript},
    {Py_sq_item, list_item},
    {0, NULL}};

PyType_Spec list_spec = {"shmheap._core.ListBase", sizeof(Coll), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, list_slots};
