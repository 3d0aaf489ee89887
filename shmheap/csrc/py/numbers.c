/* What the books say, as Python objects: statistics, findings, holders, configuration. */

#include "py.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

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

PyObject *stats_of(const struct sh_ctx *c)
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

/* Findings */

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

PyObject *check_of(struct box *b)
{
    struct findings f = {0};
    enum sh_status s;
    box_enter(b);
    Py_BEGIN_ALLOW_THREADS
        s = sh_check(&b->ctx, collect_report, &f);
    Py_END_ALLOW_THREADS
    box_leave(b);
    return findings_or_fail(b, &f, s);
}

/* The same as a user's, of a copy: also where every lock is refused. */
PyObject *inspect_of(struct box *b)
{
    struct findings f = {0};
    struct sh_ctx *copy = PyMem_Malloc(sizeof *copy);
    enum sh_status s;
    if (copy == NULL)
        return PyErr_NoMemory();
    box_enter(b);
    Py_BEGIN_ALLOW_THREADS
        s = sh_inspect(copy, b->ctx.fd, collect_report, &f);
    Py_END_ALLOW_THREADS
    b->ctx.why = copy->why;
    box_leave(b);
    PyMem_Free(copy);
    return findings_or_fail(b, &f, s);
}

/* Processes and configuration */

static int append(PyObject *list, PyObject *row)
{
    int rc = row != NULL ? PyList_Append(list, row) : -1;
    Py_XDECREF(row);
    return rc;
}

static int append_shares(PyObject *list, const struct sh_ctx *c, const char *kind,
                         const uint64_t bytes[SH_MAX_SLOTS])
{
    int rc = 0;
    for (uint32_t i = 1; rc == 0 && i < SH_MAX_SLOTS; i++)
        if (bytes[i] != 0)
            rc = append(list,
                        Py_BuildValue("(sIK)", kind, (unsigned int)atomic_load(&sh_slot(c, i)->pid),
                                      (unsigned long long)bytes[i]));
    return rc;
}

static int append_names(PyObject *list, const struct sh_shares *shares)
{
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && i < SH_TOP_NAMES && shares->names[i].bytes != 0; i++) {
        const struct sh_share *s = &shares->names[i];
        rc = append(list,
                    Py_BuildValue("(sNK)", "root", PyUnicode_DecodeUTF8(s->name, s->len, "replace"),
                                  (unsigned long long)s->bytes));
    }
    return rc;
}

/* (kind, name or pid, bytes) of every slot that holds any, and of the names that hold most. */
PyObject *shares_of(struct box *b)
{
    enum sh_status s;
    struct sh_shares *shares = PyMem_Malloc(sizeof *shares);
    if (shares == NULL)
        return PyErr_NoMemory();
    PyObject *list = PyList_New(0);
    box_enter(b);
    WAITING(b, s, sh_shares(&b->ctx, shares));
    if (s == SH_OK && list != NULL &&
        (append_names(list, shares) != 0 ||
         append_shares(list, &b->ctx, "pin", shares->pins) != 0 ||
         append_shares(list, &b->ctx, "lease", shares->leases) != 0))
        Py_CLEAR(list);
    box_leave(b);
    PyMem_Free(shares);
    if (PyErr_Occurred() || (s != SH_OK && fail(b, s) == NULL))
        Py_CLEAR(list);
    return list;
}

/* What a reference is in, and what a block is. */
static const char *node_name(uint32_t kind)
{
    static const char *const names[SH_NODE_KINDS] = {"block", "node",  "dict",  "list",
                                                     "table", "array", "record"};
    return kind < SH_NODE_KINDS ? names[kind] : "node";
}

/* (offset of the block, kind, pid or offset of the node, what node or "", when made, ns) */
static PyObject *holder_row(const struct sh_ctx *c, const struct sh_holder *h)
{
    static const char *const kinds[] = {"pin", "lease", "reference"};
    bool reference = h->kind == SH_HOLDER_REFERENCE;
    unsigned long long who =
        reference ? h->node : atomic_load(&sh_slot(c, h->slot % SH_MAX_SLOTS)->pid);
    return Py_BuildValue("(KsKsK)", (unsigned long long)h->held, kinds[h->kind], who,
                         reference ? node_name(h->node_kind) : "", (unsigned long long)h->made_ns);
}

/* The numbers of a sequence, and how many; NULL with the exception set. */
static uint64_t *numbers_of(PyObject *sequence, uint64_t *n)
{
    Py_ssize_t len = PySequence_Size(sequence);
    uint64_t *numbers = len < 0 ? NULL : PyMem_Malloc(((size_t)len + 1) * sizeof *numbers);
    if (numbers == NULL)
        return len < 0 ? NULL : (uint64_t *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < len; i++) {
        PyObject *item = PySequence_GetItem(sequence, i);
        numbers[i] = item ? PyLong_AsUnsignedLongLong(item) : 0;
        Py_XDECREF(item);
        if (PyErr_Occurred()) {
            PyMem_Free(numbers);
            return NULL;
        }
    }
    *n = (uint64_t)len;
    return numbers;
}

PyObject *holders_of(struct box *b, PyObject *offsets)
{
    struct sh_found_holders found = {0};
    enum sh_status s;
    uint64_t n = 0, *numbers = numbers_of(offsets, &n);
    PyObject *list = numbers ? PyList_New(0) : NULL;
    if (list == NULL)
        goto end;
    box_enter(b);
    WAITING(b, s, sh_holders_of(&b->ctx, numbers, n, &found));
    for (uint64_t i = 0; s == SH_OK && list != NULL && i < found.n; i++)
        if (append(list, holder_row(&b->ctx, &found.list[i])) != 0)
            Py_CLEAR(list);
    box_leave(b);
    if (PyErr_Occurred() || (s != SH_OK && fail(b, s) == NULL))
        Py_CLEAR(list);
end:
    free(found.list);
    PyMem_Free(numbers);
    return list;
}

/* (offset, bytes, what) of the largest blocks, n at most. */
PyObject *largest_of(struct box *b, uint32_t n)
{
    enum sh_status s;
    struct sh_sized *found = PyMem_Malloc(((size_t)n + 1) * sizeof *found);
    if (found == NULL)
        return PyErr_NoMemory();
    uint32_t got = 0;
    PyObject *list = PyList_New(0);
    WAITING(b, s, (got = n, sh_largest(&b->ctx, found, &got)));
    for (uint32_t i = 0; s == SH_OK && list != NULL && i < got; i++)
        if (append(list, Py_BuildValue("(KKs)", (unsigned long long)found[i].offset,
                                       (unsigned long long)found[i].nbytes,
                                       node_name(found[i].node_kind))) != 0)
            Py_CLEAR(list);
    PyMem_Free(found);
    if (PyErr_Occurred() || (s != SH_OK && fail(b, s) == NULL))
        Py_CLEAR(list);
    return list;
}

/* (offset, bytes, where it was made) of every block of which that is known. */
PyObject *sites_of(struct box *b)
{
    struct sh_made_at made;
    uint32_t entry = 0;
    enum sh_status s = SH_OK;
    PyObject *list = PyList_New(0);
    box_enter(b);
    while (list != NULL && s == SH_OK) {
        WAITING(b, s, sh_site_next(&b->ctx, &entry, &made, SLICE_MS));
        if (s == SH_OK && append(list, Py_BuildValue("(KKy#)", (unsigned long long)made.offset,
                                                     (unsigned long long)made.nbytes, made.text,
                                                     (Py_ssize_t)made.len)) != 0)
            Py_CLEAR(list);
    }
    box_leave(b);
    if (PyErr_Occurred() || (s != SH_ABSENT && fail(b, s) == NULL))
        Py_CLEAR(list);
    return list;
}

/* (pid, bytes of the blocks it made less those it freed, pins) of every process. */
PyObject *processes_of(const struct sh_ctx *c)
{
    PyObject *list = PyList_New(0);
    uint32_t used = atomic_load(&c->hdr->slots_used);
    for (uint32_t i = 1; list != NULL && i < used && i < SH_MAX_SLOTS; i++) {
        struct sh_slot *s = sh_slot(c, i);
        if (atomic_load(&s->state) == SH_SLOT_FREE)
            continue;
        int64_t bytes = (int64_t)(atomic_load(&s->alloc_bytes) - atomic_load(&s->freed_bytes));
        if (append(list, Py_BuildValue("(ILK)", (unsigned int)atomic_load(&s->pid),
                                       (long long)(bytes < 0 ? 0 : bytes),
                                       (unsigned long long)atomic_load(&s->pins))) != 0)
            Py_CLEAR(list);
    }
    return list;
}

PyObject *config_of(const struct sh_ctx *c)
{
    uint32_t n =
        c->hdr->config_bytes; /* once: it was checked when we mapped it, and may be bad now */
    return PyBytes_FromStringAndSize(c->hdr->config,
                                     (Py_ssize_t)(n < SH_CONFIG_BYTES ? n : SH_CONFIG_BYTES));
}
