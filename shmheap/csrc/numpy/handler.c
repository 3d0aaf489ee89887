/*
 * NumPy's arrays in a heap, by a data-allocation handler of NumPy's (NEP 49).
 *
 *     a new array      the handler in force -> the heap, if it is asked for min_bytes or more
 *                                           -> whoever was in force outside, else
 *     an array's end   its own handler      -> of these two the one whose memory it is
 *
 * Built without NumPy: its struct is restated here, and its functions are found at run time, by
 * their numbers in its C API. Both are what they are since NumPy 1.22, and are checked.
 *
 * NumPy's own handler wants the GIL; what is served by the heap needs none, and nothing of Python.
 * A handler is a capsule that each of its arrays keeps: with the last of them it lets the heap go.
 */

#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <assert.h>
#include <string.h>

#include "../py/memory.h"

/* Of NumPy */

#define CAPSULE         "mem_handler"
#define HANDLER_VERSION 1
#define ABI_1           0x01000009u
#define ABI_2           0x02000000u
#define FEATURES_MIN    0x0fu /* NumPy 1.22, the first to have handlers */
#define API_ABI         0
#define API_FEATURES    211
#define API_SET_HANDLER 304
#define API_GET_HANDLER 305

struct npy_handler {
    char name[127];
    uint8_t version;
    void *ctx;
    void *(*malloc)(void *ctx, size_t nbytes);
    void *(*calloc)(void *ctx, size_t n, size_t size);
    void *(*realloc)(void *ctx, void *data, size_t nbytes);
    void (*free)(void *ctx, void *data, size_t nbytes);
};
static_assert(offsetof(struct npy_handler, version) == 127, "as NumPy has it");
static_assert(offsetof(struct npy_handler, ctx) == 128, "as NumPy has it");

typedef unsigned int npy_number(void);
typedef PyObject *npy_get_handler(void);
typedef PyObject *npy_set_handler(PyObject *);

/* A handler */

struct handler {
    struct npy_handler npy;
    struct box *heap;
    const uint8_t *first, *end; /* of the heap's bytes */
    size_t min_bytes;
    bool zeros;
    PyObject *outside; /* whose capsule */
    const struct npy_handler *outer;
};

static const struct sh_memory *memory;

/* What is not, is most often not the heap's at a glance. */
static bool may_be_heaps(const struct handler *h, const void *data)
{
    return (const uint8_t *)data >= h->first && (const uint8_t *)data < h->end;
}

static void *heap_malloc(void *ctx, size_t nbytes)
{
    struct handler *h = ctx;
    void *data = nbytes >= h->min_bytes ? memory->take(h->heap, nbytes, false) : NULL;
    return data != NULL ? data : h->outer->malloc(h->outer->ctx, nbytes);
}

static void *heap_calloc(void *ctx, size_t n, size_t size)
{
    struct handler *h = ctx;
    size_t nbytes;
    void *data = NULL;
    if (h->zeros && !__builtin_mul_overflow(n, size, &nbytes) && nbytes >= h->min_bytes)
        data = memory->take(h->heap, nbytes, true);
    return data != NULL ? data : h->outer->calloc(h->outer->ctx, n, size);
}

static void heap_free(void *ctx, void *data, size_t nbytes)
{
    struct handler *h = ctx;
    if (!may_be_heaps(h, data) || !memory->give(h->heap, data))
        h->outer->free(h->outer->ctx, data, nbytes);
}

/* What is outside stays there: it may be of objects, as what NumPy asks for zeroed. */
static void *heap_realloc(void *ctx, void *data, size_t nbytes)
{
    struct handler *h = ctx;
    size_t had = may_be_heaps(h, data) ? memory->size(h->heap, data) : 0;
    if (had == 0)
        return h->outer->realloc(h->outer->ctx, data, nbytes);
    if (nbytes <= had && nbytes >= had / 2)
        return data;
    void *other = heap_malloc(ctx, nbytes);
    if (other != NULL) {
        memcpy(other, data, nbytes < had ? nbytes : had);
        memory->give(h->heap, data);
    }
    return other;
}

static void handler_end(PyObject *capsule)
{
    struct handler *h = PyCapsule_GetPointer(capsule, CAPSULE);
    PyObject *outside = h->outside;
    memory->let(h->heap);
    PyMem_Free(h);
    Py_DECREF(outside);
}

static PyObject *handler_new(PyObject *heap, Py_ssize_t min_bytes, bool zeros, PyObject *outside)
{
    const struct npy_handler *outer = PyCapsule_GetPointer(outside, CAPSULE);
    if (outer == NULL)
        return NULL;
    if (outer->version != HANDLER_VERSION)
        return PyErr_Format(PyExc_ImportError, "NumPy's handlers are of version %d, not %d",
                            outer->version, HANDLER_VERSION);
    struct handler *h = PyMem_Calloc(1, sizeof *h);
    if (h == NULL)
        return PyErr_NoMemory();
    h->npy = (struct npy_handler){"shmheap",   HANDLER_VERSION, h,        heap_malloc,
                                  heap_calloc, heap_realloc,    heap_free};
    h->heap = memory->hold(heap, &h->first, &h->end);
    h->min_bytes = (size_t)min_bytes;
    h->zeros = zeros;
    h->outer = outer;
    PyObject *capsule = h->heap ? PyCapsule_New(h, CAPSULE, handler_end) : NULL;
    if (capsule != NULL) {
        h->outside = Py_NewRef(outside);
        return capsule;
    }
    if (h->heap != NULL)
        memory->let(h->heap);
    PyMem_Free(h);
    return NULL;
}

/* The module */

/* The functions of a NumPy in which all is as restated here. */
static void **api_of(PyObject *capsule)
{
    void **api = PyCapsule_GetPointer(capsule, NULL);
    if (api == NULL)
        return NULL;
    unsigned int abi = ((npy_number *)api[API_ABI])();
    if (abi != ABI_1 && abi != ABI_2) {
        PyErr_Format(PyExc_ImportError, "shmheap does not know NumPy's ABI 0x%x", abi);
        return NULL;
    }
    if (((npy_number *)api[API_FEATURES])() < FEATURES_MIN) {
        PyErr_SetString(PyExc_ImportError, "NumPy has allocators since 1.22 only");
        return NULL;
    }
    return api;
}

/* enter(api, heap, min_bytes, zeros) -> the handler that was in force: a new one is, in this
 * context, which asks it for what the heap does not serve */
static PyObject *numpy_enter(PyObject *self, PyObject *args)
{
    PyObject *capsule, *heap;
    Py_ssize_t min_bytes;
    int zeros;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOnp:enter", &capsule, &heap, &min_bytes, &zeros))
        return NULL;
    if (min_bytes < 1)
        return PyErr_Format(PyExc_ValueError, "min_bytes is at least 1, not %zd", min_bytes);
    void **api = api_of(capsule);
    PyObject *outside = api ? ((npy_get_handler *)api[API_GET_HANDLER])() : NULL;
    PyObject *own = outside ? handler_new(heap, min_bytes, zeros != 0, outside) : NULL;
    PyObject *was = own ? ((npy_set_handler *)api[API_SET_HANDLER])(own) : NULL;
    Py_XDECREF(own);
    Py_XDECREF(outside);
    return was;
}

/* leave(api, handler): that one is in force again. */
static PyObject *numpy_leave(PyObject *self, PyObject *args)
{
    PyObject *capsule, *handler;
    (void)self;
    if (!PyArg_ParseTuple(args, "OO:leave", &capsule, &handler))
        return NULL;
    void **api = PyCapsule_GetPointer(handler, CAPSULE) ? api_of(capsule) : NULL;
    PyObject *was = api ? ((npy_set_handler *)api[API_SET_HANDLER])(handler) : NULL;
    if (was == NULL)
        return NULL;
    Py_DECREF(was);
    Py_RETURN_NONE;
}

static int module_exec(PyObject *m)
{
    (void)m;
    memory = PyCapsule_Import(SH_MEMORY_CAPSULE, 0);
    return memory != NULL ? 0 : -1;
}

static PyMethodDef module_methods[] = {{"enter", numpy_enter, METH_VARARGS, NULL},
                                       {"leave", numpy_leave, METH_VARARGS, NULL},
                                       {NULL, NULL, 0, NULL}};

/* Py_mod_gil with Py_MOD_GIL_USED, which headers of the stable ABI of 3.11 do not have. */
#define MOD_GIL     4
#define MOD_GIL_MIN 0x030d0000ul
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {MOD_GIL, NULL}, {0, NULL}};

static struct PyModuleDef moduledef = {PyModuleDef_HEAD_INIT,
                                       "shmheap.plugins._numpy",
                                       "NumPy's arrays in a heap.",
                                       0,
                                       module_methods,
                                       module_slots,
                                       NULL,
                                       NULL,
                                       NULL};

PyMODINIT_FUNC PyInit__numpy(void)
{
    if (Py_Version < MOD_GIL_MIN) /* which refuses a slot that it does not know */
        module_slots[1] = (PyModuleDef_Slot){0, NULL};
    return PyModuleDef_Init(&moduledef);
}
