/* The type Observer: a look from outside, with no slot, no lock, a read-only mapping. */

#include "py.h"

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

/* NULL, with the exception set: it was closed. */
static struct sh_ctx *observer_ctx(Heap *self)
{
    if (self->box != NULL && self->box->attached)
        return &self->box->ctx;
    fail(self->box, SH_CLOSED);
    return NULL;
}

/* books() -> (state of each unit below the high-water mark, data offset, unit, capacity; bytes) */
static PyObject *observer_books(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = observer_ctx(self);
    if (c == NULL)
        return NULL;
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
    struct sh_ctx *c = observer_ctx(self);
    return c ? stats_of(c) : NULL;
}

static PyObject *observer_processes(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = observer_ctx(self);
    return c ? processes_of(c) : NULL;
}

static PyObject *observer_header(Heap *self, PyObject *unused)
{
    (void)unused;
    struct sh_ctx *c = observer_ctx(self);
    if (c == NULL)
        return NULL;
    const struct sh_header *h = c->hdr;
    unsigned int alive = 0;
    for (uint32_t i = 1; i < atomic_load(&h->slots_used) && i < SH_MAX_SLOTS; i++)
        alive += sh_alive(c, i);
    return Py_BuildValue(
        "{sI sK sI sI sK sK sN sI sI sI sN sN sN}", "version", h->version, "nonce",
        (unsigned long long)h->nonce, "page_bytes", 1u << c->geo.page_shift, "unit_bytes",
        1u << c->geo.unit_shift, "capacity", (unsigned long long)c->geo.capacity, "created_ns",
        (unsigned long long)h->created_ns, "coordinator_alive", PyBool_FromLong(sh_alive(c, 0)),
        "coordinator_pid", (unsigned int)atomic_load(&sh_slot(c, 0)->pid), "users_alive", alive,
        "phase", sh_phase_of(atomic_load(&h->phase)), "unlinked",
        PyBool_FromLong(atomic_load(&h->unlinked) != 0), "fault", fault_text(c), "config",
        config_of(c));
}

static PyObject *observer_check(Heap *self, PyObject *unused)
{
    (void)unused;
    return observer_ctx(self) ? inspect_of(self->box) : NULL;
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

PyType_Spec observer_spec = {"shmheap._core.Observer", sizeof(Heap), 0, Py_TPFLAGS_DEFAULT,
                             observer_slots};
