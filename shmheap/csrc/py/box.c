/*
 * Boxes. Everything of an arena is in a box, which heap and blocks share and which lives until the
 * last of them is gone. A closed box is detached and unmapped when the last exported buffer is
 * released and no call is inside it.
 */

#include "py.h"

#include <stdlib.h>
#include <unistd.h>

struct box *boxes;
pthread_mutex_t boxes_lock = PTHREAD_MUTEX_INITIALIZER;

void box_enter_list(struct box *b)
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

/* The doorbell */

/* bell(starts, leaves, over): is there no coordinator, and we are to start one; is this our last
 * use of the heap; is it closed for ever? */
static int call_bell(struct box *b, bool leaves, bool over)
{
    bool alive = sh_alive(&b->ctx, 0);
    bool starts = !alive && !over && sh_may_start(&b->ctx);
    if (!alive && !starts && !leaves)
        return 0; /* somebody is starting one, and it looks at everything then */
    PyObject *done = PyObject_CallFunction(b->bell, "NNN", PyBool_FromLong(starts),
                                           PyBool_FromLong(leaves), PyBool_FromLong(over));
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
int box_ring(struct box *b)
{
    if (__builtin_expect(!b->ctx.ring, 1) || b->bell == NULL)
        return 0;
    b->ctx.ring = false;
    if (call_bell(b, false, false) == 0)
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

static void call_bell_quietly(struct box *b, bool leaves, bool over)
{
    PyObject *type, *value, *trace;
    if (b->bell == NULL)
        return;
    b->ctx.ring = false;
    PyErr_Fetch(&type, &value, &trace);
    if (call_bell(b, leaves, over) != 0) {
        b->ctx.ring = is_a_handlers();
        raise_later();
    }
    PyErr_Restore(type, value, trace);
}

/* The same as box_ring where nobody could be told of an error. */
void box_ring_quietly(struct box *b)
{
    if (b->ctx.ring)
        call_bell_quietly(b, false, false);
}

/* From the first use to the last */

struct box *box_new(int fd, PyObject *path, bool writable)
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

/* Detaches once nobody can be inside or look at the memory. */
bool box_can_settle(const struct box *b)
{
    return b->closed && b->attached && b->exports == 0 && b->calls == 0 && b->held.users == 0;
}

void box_settle(struct box *b)
{
    if (box_can_settle(b)) {
        b->attached = false;
        box_leave_list(b);
        if (b->ctx.slot != NULL && !sh_is_forked(&b->ctx)) { /* else the slot is our parent's */
            bool over;
            Py_BEGIN_ALLOW_THREADS
                over = sh_detach(&b->ctx, b->keep);
            Py_END_ALLOW_THREADS
            call_bell_quietly(b, true, over); /* there may be no coordinator (I-9) */
        }
        sh_unmap(&b->ctx);
    }
}

void box_free(struct box *b)
{
    b->closed = true;
    box_settle(b);
    free(b->held.refs);
    Py_XDECREF(b->path);
    Py_XDECREF(b->bell);
    PyMem_Free(b);
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

/* The coordinators learn what is new, of heaps of which no call says it. */
void boxes_tell(void)
{
    for (struct box *b; (b = box_to_tell()) != NULL; box_drop(b)) {
        box_ring_quietly(b);
        box_settle(b);
    }
}

/* Pins, leases and names take memory, too. Where there is none Python asks the coordinator for
 * some, once, and then says why not. True: try again. */
bool box_make_room(struct box *b, enum sh_status s, bool *asked)
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
