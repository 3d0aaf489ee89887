/* What the module keeps: its types, the exceptions, what it imports of shmheap.block. */

#include "py.h"

State *state;

bool load_errors(State *st)
{
    PyObject *m = PyImport_ImportModule("shmheap.errors");
    if (m == NULL)
        return false;
    st->HeapError = PyObject_GetAttrString(m, "HeapError");
    st->HeapFull = PyObject_GetAttrString(m, "HeapFull");
    st->StaleHandle = PyObject_GetAttrString(m, "StaleHandle");
    st->UntrustedArena = PyObject_GetAttrString(m, "UntrustedArena");
    st->HeapCorrupt = PyObject_GetAttrString(m, "HeapCorrupt");
    Py_DECREF(m);
    return !PyErr_Occurred();
}

bool load_python_side(void)
{
    if (state->rebuild != NULL)
        return true;
    PyObject *m = PyImport_ImportModule("shmheap.block");
    if (m == NULL)
        return false;
    state->lease_type = PyObject_GetAttrString(m, "Lease");
    state->copy_bytes = PyObject_GetAttrString(m, "copy_bytes");
    state->make_room = PyObject_GetAttrString(m, "make_room");
    state->rebuild = PyObject_GetAttrString(m, "rebuild");
    Py_DECREF(m);
    return !PyErr_Occurred();
}
