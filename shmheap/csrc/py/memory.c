/*
 * Bytes of a heap that C holds by their address (memory.h). What a Block object is to Python, an
 * entry of the box's table is here: a pin.
 *
 * Whoever takes and gives may have the GIL, or may not, and here nobody asks. So no lock is waited
 * for long: a hold that cannot be dropped at once is dropped by a later call. A fork takes the
 * table along, and the child's pins are where its parent's are (slots.c): what is given back there
 * is the child's own hold.
 */

#include "memory.h"

#include "py.h"

#include <stdlib.h>

#define PATIENCE_MS 20
#define ASK_NS      1000000000ull /* the coordinator is asked for memory once in this time */

/* Of all tables. Nobody calls anything that locks while he has it; in a fork it comes last. */
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;

/* The table: open addressing, one probe after the other */

static size_t home_of(const struct held *h, const uint8_t *data)
{
    return (size_t)((uintptr_t)data / 16 * 0x9e3779b97f4a7c15ull >> 20) & (h->room - 1);
}

/* Where it is, or would be. */
static size_t place_of(const struct held *h, const uint8_t *data)
{
    size_t i = home_of(h, data);
    while (h->refs[i].data != NULL && h->refs[i].data != data)
        i = (i + 1) & (h->room - 1);
    return i;
}

static bool grow(struct held *h)
{
    struct held more = *h;
    more.room = h->room ? 2 * h->room : 64;
    more.refs = calloc(more.room, sizeof *more.refs);
    if (more.refs == NULL)
        return false;
    for (size_t i = 0; i < h->room; i++)
        if (h->refs[i].data != NULL)
            more.refs[place_of(&more, h->refs[i].data)] = h->refs[i];
    free(h->refs);
    *h = more;
    return true;
}

static bool add(struct held *h, const struct sh_ref *ref)
{
    pthread_mutex_lock(&table_lock);
    bool room = 2 * (h->n + 1) <= h->room || grow(h);
    if (room) {
        h->refs[place_of(h, ref->data)] = *ref;
        h->n++;
        h->late += ref->nbytes == 0;
    }
    pthread_mutex_unlock(&table_lock);
    return room;
}

/* What could not be at home because of it moves up. */
static void clear(struct held *h, size_t hole)
{
    size_t mask = h->room - 1;
    for (size_t i = (hole + 1) & mask; h->refs[i].data != NULL; i = (i + 1) & mask) {
        if (((i - home_of(h, h->refs[i].data)) & mask) < ((i - hole) & mask))
            continue;
        h->refs[hole] = h->refs[i];
        hole = i;
    }
    h->refs[hole].data = NULL;
    h->n--;
}

static bool find(struct held *h, const void *data, bool take_out, struct sh_ref *ref)
{
    pthread_mutex_lock(&table_lock);
    size_t i = h->room ? place_of(h, data) : 0;
    bool found = h->room && h->refs[i].data != NULL && h->refs[i].nbytes != 0;
    if (found) {
        *ref = h->refs[i];
        if (take_out)
            clear(h, i);
    }
    pthread_mutex_unlock(&table_lock);
    return found;
}

static bool take_out_late(struct held *h, struct sh_ref *ref)
{
    bool found = false;
    pthread_mutex_lock(&table_lock);
    for (size_t i = 0; !found && h->late != 0 && i < h->room; i++) {
        found = h->refs[i].data != NULL && h->refs[i].nbytes == 0;
        if (found) {
            *ref = h->refs[i];
            clear(h, i);
            h->late--;
        }
    }
    pthread_mutex_unlock(&table_lock);
    return found;
}

/* The doorbell is Python's: rung in the main thread, soon */

static _Atomic bool told;

static int ring_later(void *unused)
{
    (void)unused;
    told = false;
    boxes_tell();
    return 0;
}

/* Of all of Python, this may be called by anybody. */
static void tell(struct box *b)
{
    if (((b->ctx.ring && !b->closed) || box_can_settle(b)) && Py_IsInitialized() &&
        !atomic_exchange(&told, true) && Py_AddPendingCall(ring_later, NULL) != 0)
        told = false;
}

/* Nobody unmaps the box in between, nor as long as something is held. False: it is closed. */
static bool use(struct box *b)
{
    b->held.users++;
    return !b->closed && !sh_is_forked(&b->ctx);
}

static void use_no_more(struct box *b)
{
    b->held.users--;
    tell(b);
}

/* Waits for nobody: there may be some next time. */
static void ask_for_memory(struct box *b)
{
    uint64_t now = sh_os_now_ns();
    if (now - b->held.asked_ns < ASK_NS)
        return;
    b->held.asked_ns = now;
    sh_want(&b->ctx, SH_WANT_MEMORY);
    b->ctx.ring = true;
}

/* Taking and giving */

/* False: not now. */
static bool drop(struct box *b, struct sh_ref *ref)
{
    if (sh_is_forked(&b->ctx))
        return true; /* the process has no pins */
    enum sh_status s = sh_unpin(&b->ctx, ref, PATIENCE_MS);
    if (s == SH_DEFERRED)
        sh_flush(&b->ctx, PATIENCE_MS); /* what is left then goes with the next one */
    return s != SH_BUSY;
}

static void drop_or_defer(struct box *b, struct sh_ref *ref)
{
    if (drop(b, ref))
        return;
    ref->nbytes = 0;
    add(&b->held, ref);
}

static void drop_late(struct box *b)
{
    struct sh_ref ref;
    if (b->held.late != 0 && take_out_late(&b->held, &ref))
        drop_or_defer(b, &ref);
}

static bool take(struct box *b, size_t nbytes, bool zero, struct sh_ref *ref)
{
    drop_late(b);
    enum sh_status s = sh_alloc(&b->ctx, nbytes, zero, PATIENCE_MS, ref);
    if (is_short(s))
        ask_for_memory(b);
    if (s == SH_OK && add(&b->held, ref))
        return true;
    if (s == SH_OK)
        drop(b, ref);
    return false;
}

static void *memory_take(struct box *b, size_t nbytes, bool zero)
{
    struct sh_ref ref;
    if (nbytes != 0 && use(b) && take(b, nbytes, zero, &ref)) {
        tell(b);
        return ref.data; /* a user from now on */
    }
    if (nbytes != 0)
        use_no_more(b);
    return NULL;
}

static size_t memory_size(struct box *b, const void *data)
{
    struct sh_ref ref;
    return find(&b->held, data, false, &ref) ? ref.nbytes : 0;
}

static bool memory_give(struct box *b, void *data)
{
    struct sh_ref ref;
    if (!find(&b->held, data, true, &ref))
        return false;
    drop_late(b);
    drop_or_defer(b, &ref);
    use_no_more(b);
    return true;
}

/* Holding a heap */

static struct box *memory_hold(PyObject *heap, const uint8_t **first, const uint8_t **end)
{
    if (!PyObject_TypeCheck(heap, state->heap_type)) {
        PyErr_Format(PyExc_TypeError, "a shmheap.Heap is needed, not %R", heap);
        return NULL;
    }
    struct box *b = ((Heap *)heap)->box;
    if (!box_usable(b))
        return NULL;
    *first = b->ctx.base + b->ctx.geo.data;
    *end = b->ctx.base + b->ctx.geo.end;
    b->refs++;
    return b;
}

static void memory_let(struct box *b)
{
    box_drop(b);
}

PyObject *memory_capsule(void)
{
    static const struct sh_memory memory = {memory_hold, memory_let, memory_take, memory_size,
                                            memory_give};
    return PyCapsule_New((void *)&memory, SH_MEMORY_CAPSULE, NULL);
}

/* fork: the table is whole in the child */

void memory_before_fork(void)
{
    pthread_mutex_lock(&table_lock);
}

void memory_after_fork(bool child)
{
    if (child)
        told = false;
    pthread_mutex_unlock(&table_lock);
}
