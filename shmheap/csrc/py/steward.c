/* The type Steward: the coordinator's hold on an arena. One thread; long walks let the GIL go. */

#include "py.h"

/* Does `op` without the GIL, or fails. */
#define STEWARD(op)                    \
    do {                               \
        enum sh_status s;              \
        Py_BEGIN_ALLOW_THREADS         \
            s = op;                    \
        Py_END_ALLOW_THREADS           \
        if (s != SH_OK)                \
            return fail(self->box, s); \
    } while (0)

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
    Py_BEGIN_ALLOW_THREADS
        s = sh_attach_coordinator(&b->ctx, b->ctx.patience_ms);
    Py_END_ALLOW_THREADS
    if (s != SH_OK) {
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

/* NULL, with the exception set: it was closed. */
static struct sh_ctx *steward_ctx(Heap *self)
{
    if (self->box->attached)
        return &self->box->ctx;
    PyErr_SetString(PyExc_ValueError, "the steward is closed");
    return NULL;
}

static PyObject *steward_begin(Heap *self, PyObject *unused)
{
    struct sh_ctx *c = steward_ctx(self);
    uint32_t phase;
    (void)unused;
    if (c == NULL)
        return NULL;
    STEWARD(sh_begin(c, &phase));
    return PyLong_FromUnsignedLong(phase);
}

static PyObject *steward_set_patience(Heap *self, PyObject *args)
{
    struct sh_ctx *c = steward_ctx(self);
    int ms;
    if (c == NULL || !PyArg_ParseTuple(args, "i:set_patience", &ms))
        return NULL;
    c->patience_ms = ms > SH_SPENT_MS ? ms : SH_SPENT_MS;
    Py_RETURN_NONE;
}

static PyObject *steward_now_stamp(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = steward_ctx(self);
    return c ? PyLong_FromUnsignedLong(sh_now_stamp(c)) : NULL;
}

static PyObject *steward_slots(Heap *self, PyObject *unused)
{
    struct sh_ctx *c = steward_ctx(self);
    (void)unused;
    if (c == NULL)
        return NULL;
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
    struct sh_ctx *c = steward_ctx(self);
    unsigned int slot;
    if (c == NULL || !PyArg_ParseTuple(args, "I:alive", &slot))
        return NULL;
    return PyBool_FromLong(slot < SH_MAX_SLOTS && sh_alive(c, slot));
}

static PyObject *steward_reap(Heap *self, PyObject *args)
{
    struct sh_ctx *c = steward_ctx(self);
    unsigned int slot;
    unsigned long long cutoff;
    struct sh_reaped r;
    if (c == NULL || !PyArg_ParseTuple(args, "IK:reap", &slot, &cutoff))
        return NULL;
    STEWARD(sh_reap(c, slot, cutoff, &r));
    return Py_BuildValue("(KKKKKN)", (unsigned long long)r.pins, (unsigned long long)r.leases,
                         (unsigned long long)r.spans, (unsigned long long)r.pin_bytes,
                         (unsigned long long)r.lease_bytes, PyBool_FromLong(r.done));
}

static PyObject *pause_of(struct sh_ctx *c)
{
    return PyLong_FromUnsignedLongLong(c->longest_ns);
}

static PyObject *steward_expire_leases(Heap *self, PyObject *args)
{
    struct sh_ctx *c = steward_ctx(self);
    unsigned long long cutoff;
    uint64_t dropped, bytes;
    if (c == NULL || !PyArg_ParseTuple(args, "K:expire_leases", &cutoff))
        return NULL;
    STEWARD(sh_expire_leases(c, cutoff, &dropped, &bytes));
    return Py_BuildValue("(KKN)", (unsigned long long)dropped, (unsigned long long)bytes,
                         pause_of(c));
}

static PyObject *steward_users(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = steward_ctx(self);
    return c ? PyLong_FromUnsignedLong(sh_users(c)) : NULL;
}

static PyObject *steward_try_close(Heap *self, PyObject *unused)
{
    struct sh_ctx *c = steward_ctx(self);
    bool closed;
    (void)unused;
    if (c == NULL)
        return NULL;
    STEWARD(sh_try_close(c, &closed));
    return PyBool_FromLong(closed);
}

static PyObject *steward_refuse_waiters(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = steward_ctx(self);
    return c ? PyLong_FromUnsignedLong(sh_refuse_waiters(c)) : NULL;
}

static PyObject *steward_take_wants(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = steward_ctx(self);
    return c ? PyLong_FromUnsignedLong(atomic_exchange(&c->hdr->wants, 0)) : NULL;
}

static struct sh_request_line *request_line(struct sh_ctx *c, int kind)
{
    if (kind >= 0 && kind < SH_NREQUESTS)
        return &c->hdr->requests[kind];
    PyErr_Format(PyExc_ValueError, "no such request: %d", kind);
    return NULL;
}

static PyObject *steward_pending(Heap *self, PyObject *args)
{
    struct sh_ctx *c = steward_ctx(self);
    int kind;
    struct sh_request_line *line;
    if (c == NULL || !PyArg_ParseTuple(args, "i:pending", &kind) ||
        (line = request_line(c, kind)) == NULL)
        return NULL;
    uint32_t wanted = atomic_load(&line->wanted);
    return PyLong_FromUnsignedLong(wanted == atomic_load(&line->done) ? 0 : wanted);
}

static PyObject *steward_finish(Heap *self, PyObject *args)
{
    struct sh_ctx *c = steward_ctx(self);
    int kind;
    unsigned int ticket;
    PyObject *fields;
    struct sh_request_line *line;
    if (c == NULL || !PyArg_ParseTuple(args, "iIO:finish", &kind, &ticket, &fields) ||
        (line = request_line(c, kind)) == NULL)
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

static PyObject *steward_start_cycle(Heap *self, PyObject *unused)
{
    struct sh_ctx *c = steward_ctx(self);
    (void)unused;
    if (c == NULL)
        return NULL;
    STEWARD(sh_start_cycle(c));
    return pause_of(c);
}

static PyObject *steward_mark(Heap *self, PyObject *unused)
{
    struct sh_ctx *c = steward_ctx(self);
    uint64_t blocks;
    (void)unused;
    if (c == NULL)
        return NULL;
    STEWARD(sh_mark(c, &blocks));
    return Py_BuildValue("(KN)", (unsigned long long)blocks, pause_of(c));
}

static PyObject *steward_finish_mark(Heap *self, PyObject *unused)
{
    struct sh_ctx *c = steward_ctx(self);
    uint64_t blocks;
    (void)unused;
    if (c == NULL)
        return NULL;
    STEWARD(sh_finish_mark(c, &blocks));
    return Py_BuildValue("(KN)", (unsigned long long)blocks, pause_of(c));
}

static PyObject *steward_sweep(Heap *self, PyObject *unused)
{
    struct sh_ctx *c = steward_ctx(self);
    uint64_t blocks, bytes;
    (void)unused;
    if (c == NULL)
        return NULL;
    STEWARD(sh_sweep(c, &blocks, &bytes));
    return Py_BuildValue("(KKN)", (unsigned long long)blocks, (unsigned long long)bytes,
                         pause_of(c));
}

static PyObject *steward_stamp(Heap *self, PyObject *args)
{
    struct sh_ctx *c = steward_ctx(self);
    unsigned int stamp;
    uint64_t units;
    if (c == NULL || !PyArg_ParseTuple(args, "I:stamp", &stamp))
        return NULL;
    STEWARD(sh_stamp(c, stamp, &units));
    return PyLong_FromUnsignedLongLong(units);
}

static PyObject *steward_end_cycle(Heap *self, PyObject *args)
{
    struct sh_ctx *c = steward_ctx(self);
    unsigned long long next_gc, pause_ns;
    int forced;
    if (c == NULL || !PyArg_ParseTuple(args, "KpK:end_cycle", &next_gc, &forced, &pause_ns))
        return NULL;
    STEWARD(sh_end_cycle(c, next_gc, forced, pause_ns));
    return pause_of(c);
}

static PyObject *steward_release(Heap *self, PyObject *args)
{
    struct sh_ctx *c = steward_ctx(self);
    unsigned int stamp_le;
    unsigned long long max_bytes;
    uint32_t page;
    uint64_t bytes, runs;
    if (c == NULL || !PyArg_ParseTuple(args, "IKI:release", &stamp_le, &max_bytes, &page))
        return NULL;
    STEWARD(sh_release(c, stamp_le, max_bytes, &page, &bytes, &runs));
    return Py_BuildValue("(KKI)", (unsigned long long)bytes, (unsigned long long)runs, page);
}

static PyObject *steward_stats(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = steward_ctx(self);
    return c ? stats_of(c) : NULL;
}

static PyObject *steward_check(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = steward_ctx(self);
    return c ? check_of(self->box) : NULL;
}

static PyObject *steward_unlinked(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = steward_ctx(self);
    return c ? PyBool_FromLong(atomic_load(&c->hdr->unlinked) != 0) : NULL;
}

static PyObject *steward_set_limit(Heap *self, PyObject *args)
{
    struct sh_ctx *c = steward_ctx(self);
    unsigned long long limit, look;
    if (c == NULL || !PyArg_ParseTuple(args, "KK:set_limit", &limit, &look))
        return NULL;
    atomic_store(&c->hdr->limit_units, limit >> c->geo.unit_shift);
    atomic_store(&c->hdr->look_units, look >> c->geo.unit_shift);
    Py_RETURN_NONE;
}

/* closing() -> bool: closed for ever, by us or by its last user. */
static PyObject *steward_closing(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = steward_ctx(self);
    return c ? PyBool_FromLong(atomic_load(&c->hdr->closing) != 0) : NULL;
}

static PyObject *steward_set_next_gc(Heap *self, PyObject *args)
{
    struct sh_ctx *c = steward_ctx(self);
    unsigned long long bytes;
    if (c == NULL || !PyArg_ParseTuple(args, "K:set_next_gc", &bytes))
        return NULL;
    sh_set_next_gc(c, bytes);
    Py_RETURN_NONE;
}

static PyMethodDef steward_methods[] = {
    {"begin", (PyCFunction)steward_begin, METH_NOARGS, NULL},
    {"set_patience", (PyCFunction)steward_set_patience, METH_VARARGS, NULL},
    {"now_stamp", (PyCFunction)steward_now_stamp, METH_NOARGS, NULL},
    {"slots", (PyCFunction)steward_slots, METH_NOARGS, NULL},
    {"alive", (PyCFunction)steward_alive, METH_VARARGS, NULL},
    {"reap", (PyCFunction)steward_reap, METH_VARARGS, NULL},
    {"expire_leases", (PyCFunction)steward_expire_leases, METH_VARARGS, NULL},
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

PyType_Spec steward_spec = {"shmheap._core.Steward", sizeof(Heap), 0, Py_TPFLAGS_DEFAULT,
                            steward_slot_list};
