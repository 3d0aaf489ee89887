/*
 * What the core lends to plugins in C: bytes of a heap that this process holds by their address.
 *
 * A plugin finds the functions by PyCapsule_Import(SH_MEMORY_CAPSULE, 0). It is built with the core
 * and comes in the same wheel, so they need no version.
 */
#ifndef SH_PY_MEMORY_H
#define SH_PY_MEMORY_H

#include <Python.h>

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SH_MEMORY_CAPSULE "shmheap._core._memory"

struct box; /* a heap that is held */

struct sh_memory {
    /* With the GIL. All that is taken will be in [*first, *end), though not only that: what is
     * taken keeps the heap mapped, as an exported buffer does, and nothing else. NULL: an exception
     * is set. */
    struct box *(*hold)(PyObject *heap, const uint8_t **first, const uint8_t **end);
    void (*let)(struct box *);

    /* With the GIL or without, in any thread; nothing waits long. */
    void *(*take)(struct box *, size_t nbytes, bool zero); /* NULL: the heap has none now */
    size_t (*size)(struct box *, const void *);            /* 0: nothing that was taken */
    bool (*give)(struct box *, void *);                    /* false: likewise */
};

#endif
