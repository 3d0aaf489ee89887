/* What the files of shared dicts and lists share: values and keys, and a handle on a collection. */
#ifndef SH_PY_COLL_H
#define SH_PY_COLL_H

#include "py.h"

/* What the bytes of a record mean. Those from SH_KIND_OTHER on are Python's (shmheap.values). */
enum {
    SH_V_NONE,
    SH_V_FALSE,
    SH_V_TRUE,
    SH_V_INT,   /* little-endian, signed, without the bytes that only repeat the sign */
    SH_V_FLOAT, /* big-endian, without the zeros at its end */
    SH_V_STR,   /* UTF-8 */
    SH_V_BYTES,
    SH_V_COMPLEX, /* of a key: two doubles */
    SH_V_TUPLE,   /* a small one; of each item a byte, kind:4 length:4, and its bytes; a length from
                     15 on has a byte of its own */
    SH_V_OTHER = SH_KIND_HARD
};

/* The handle: its collection and the body seen last, both pinned. */
typedef struct {
    PyObject_HEAD struct box *box; /* NULL: not made */
    PyObject *weakrefs;
    struct sh_use use;
} Coll;

#define TUPLE_MAX 100u /* bytes */

struct value {
    struct sh_value v;
    uint8_t bytes[TUPLE_MAX];
    struct sh_ref refs[4], *more; /* of what it names */
    PyObject *owner;              /* keeps bytes and blocks */
};
/* container: a collection, or the named roots; Python is told */
bool value_from(PyObject *container, struct box *, PyObject *, struct value *);
void value_end(struct value *);
PyObject *value_decode(PyObject *container, struct box *, struct sh_found *); /* ends the find */

struct key {
    struct sh_key k;
    uint8_t bytes[16];
    PyObject *owner;
};
bool key_from(PyObject *, struct key *);
PyObject *key_decode(const struct sh_found *);
void found_end(struct box *, struct sh_found *);

/* Once with the GIL, where it is the common case that nothing is in the way; then without. */
#define DO(b, s, op)                                      \
    do {                                                  \
        int wait = 0;                                     \
        s = op;                                           \
        if (s == SH_BUSY || is_short(s)) {                \
            wait = SLICE_MS;                              \
            WAITING_FOR_ROOM(b, s, op);                   \
        }                                                 \
        while (s == SH_DEFERRED)                          \
            WAITING(b, s, sh_flush(&(b)->ctx, SLICE_MS)); \
        if (__builtin_expect((b)->ctx.ring, 0))           \
            box_ring_quietly(b);                          \
    } while (0)

PyObject *coll_new(PyTypeObject *, PyObject *args, PyObject *kwargs, uint32_t kind);
void coll_dealloc(Coll *);
bool coll_usable(Coll *);
Py_ssize_t coll_len(Coll *);
PyObject *coll_stamp(Coll *, PyObject *unused);
PyObject *coll_try_lock(Coll *, PyObject *unused);
PyObject *coll_unlock(Coll *, PyObject *unused);
PyObject *coll_get_block(Coll *, void *unused);
PyObject *coll_get_place(Coll *, void *unused);
extern PyMemberDef coll_members[];

extern PyType_Spec dict_spec, list_spec;

#endif
