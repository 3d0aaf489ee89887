/* The module: types, constants and functions that shmheap._core has. */

#include "coll.h"

static PyMethodDef module_methods[] = {{"format", core_format, METH_VARARGS, NULL},
                                       {"read_config", core_read_config, METH_VARARGS, NULL},
                                       {"spawn_detached", core_spawn_detached, METH_VARARGS, NULL},
                                       {"after_fork", core_after_fork, METH_NOARGS, NULL},
                                       {NULL, NULL, 0, NULL}};

static int add_type(PyObject *m, PyType_Spec *spec, PyTypeObject **keep)
{
    PyObject *type = PyType_FromModuleAndSpec(m, spec, NULL);
    if (type == NULL)
        return -1;
    if (keep != NULL)
        *keep = (PyTypeObject *)Py_NewRef(type);
    int rc = PyModule_AddType(m, (PyTypeObject *)type);
    Py_DECREF(type);
    return rc;
}

/* Numbers that Python uses, too: each stands in one place, a header of the core. */
static const struct {
    const char *name;
    long value;
} constants[] = {
    {"LAYOUT_VERSION", SH_VERSION},
    {"HEADER_BYTES", sizeof(struct sh_header)},
    {"MAX_CONFIG_BYTES", SH_CONFIG_BYTES},
    {"MAX_SMALL_BYTES", SH_MAX_SMALL},
    {"MAX_ROOT_NAME_BYTES", SH_ROOT_NAME_MAX},
    {"MAX_SITE_BYTES", SH_SITE_MAX},
    {"MAX_PROCESSES", SH_MAX_SLOTS - 1},
    {"MAX_VALUE_BYTES", SH_VALUE_MAX},
    {"MAX_KEY_BYTES", SH_KEY_MAX},
    {"MAX_VALUE_BLOCKS", SH_REFS_MAX},
    {"NODE_DICT", SH_NODE_DICT},
    {"NODE_LIST", SH_NODE_LIST},
    {"NODE_RECORD", SH_NODE_RECORD},
    {"FULL", SH_FULL},
    {"LIMIT", SH_LIMIT},
    {"NOSPACE", SH_NOSPACE},
    {"SLOT_FREE", SH_SLOT_FREE},
    {"SLOT_LIVE", SH_SLOT_LIVE},
    {"SLOT_DETACHED", SH_SLOT_DETACHED},
    {"SLOT_DEAD", SH_SLOT_DEAD},
    {"PHASE_IDLE", SH_IDLE},
    {"PHASE_MARK", SH_MARK},
    {"PHASE_FINAL", SH_FINAL},
    {"PHASE_SWEEP", SH_SWEEP},
    {"WANT_GC", SH_WANT_GC},
    {"WANT_SCAVENGE", SH_WANT_SCAVENGE},
    {"WANT_MEMORY", SH_WANT_MEMORY},
    {"WANT_REAP", SH_WANT_REAP},
    {"WANT_LEAVE", SH_WANT_LEAVE},
    {"WANT_LIMIT", SH_WANT_LIMIT},
    {"ASK_GC", SH_REQ_GC},
    {"ASK_SCAVENGE_AGED", SH_REQ_SCAVENGE},
    {"ASK_SCAVENGE_ALL", SH_REQ_SCAVENGE_ALL},
};

static int add_constants(PyObject *m)
{
    for (size_t i = 0; i < sizeof constants / sizeof constants[0]; i++)
        if (PyModule_AddIntConstant(m, constants[i].name, constants[i].value) != 0)
            return -1;
    return 0;
}

static int module_exec(PyObject *m)
{
    if (state != NULL) {
        PyErr_SetString(PyExc_ImportError,
                        "shmheap._core can be loaded into one interpreter of a process");
        return -1;
    }
    State *st = PyModule_GetState(m);
    if (!load_errors(st) || add_type(m, &block_spec, &st->block_type) != 0 ||
        add_type(m, &heap_spec, &st->heap_type) != 0 || add_type(m, &dict_spec, NULL) != 0 ||
        add_type(m, &list_spec, NULL) != 0 || add_type(m, &steward_spec, NULL) != 0 ||
        add_type(m, &observer_spec, NULL) != 0 || add_constants(m) != 0)
        return -1;
    state = st;
    PyObject *memory = memory_capsule();
    if (memory == NULL || PyModule_AddObjectRef(m, "_memory", memory) != 0)
        return -1;
    Py_DECREF(memory);
    if (fork_handlers())
        return 0;
    PyErr_NoMemory();
    return -1;
}

/* Py_mod_gil with Py_MOD_GIL_USED: names that headers of the stable ABI of 3.11 do not have. */
#define MOD_GIL     4
#define MOD_GIL_MIN 0x030d0000ul
static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {MOD_GIL, NULL}, {0, NULL}};

static struct PyModuleDef moduledef = {
    PyModuleDef_HEAD_INIT,
    "shmheap._core",
    "The core of shmheap: whatever runs under a shared lock, "
    "and whatever runs once per allocation. It takes no decision.",
    sizeof(State),
    module_methods,
    module_slots,
    NULL,
    NULL,
    NULL};

PyMODINIT_FUNC PyInit__core(void)
{
    if (Py_Version < MOD_GIL_MIN) /* which refuses a slot that it does not know */
        module_slots[1] = (PyModuleDef_Slot){0, NULL};
    return PyModuleDef_Init(&moduledef);
}
