/* From statuses of the core to exceptions. */

#include "py.h"

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
PyObject *fault_text(const struct sh_ctx *c)
{
    uint64_t poisoned = atomic_load(&c->hdr->poisoned);
    if (poisoned == 0)
        return Py_NewRef(Py_None);
    return PyUnicode_FromFormat("%s %llu", sh_fault_text(SH_FAULT_OF(poisoned)),
                                (unsigned long long)SH_FAULT_AT(poisoned));
}

static void fail_corrupt(const struct box *b)
{
    PyObject *fault = fault_text(&b->ctx);
    if (fault != NULL)
        PyErr_Format(state->HeapCorrupt,
                     "the heap %U is corrupt: %S. Every operation of every process is refused "
                     "from now on; what you hold can still be read. `shmheap verify --deep NAME` "
                     "says all that is wrong, please report it; `shmheap rm NAME` removes the "
                     "heap, and a new one can have its name",
                     b->path, fault);
    Py_XDECREF(fault);
}

PyObject *fail(struct box *b, enum sh_status s)
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
        if (b->ctx.hdr == NULL) /* closed meanwhile */
            return fail(b, SH_CLOSED);
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
