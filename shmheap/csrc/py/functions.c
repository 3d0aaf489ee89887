/* The module's functions: a new file, a file's configuration, a daemon. */

#include "py.h"

#include <errno.h>

PyObject *core_format(PyObject *self, PyObject *args)
{
    int fd;
    unsigned long long capacity, nonce, limit;
    const char *config;
    Py_ssize_t n;
    struct box b = {.closed = true};
    (void)self;
    if (!PyArg_ParseTuple(args, "iKKKy#:format", &fd, &capacity, &nonce, &limit, &config, &n))
        return NULL;
    enum sh_status s = sh_format(fd, capacity, nonce, limit, config, (size_t)n);
    if (s == SH_NOSPACE) {
        errno = ENOSPC;
        s = SH_SYSTEM;
    }
    return s == SH_OK ? Py_NewRef(Py_None) : fail(&b, s);
}

PyObject *core_read_config(PyObject *self, PyObject *args)
{
    int fd;
    uint32_t n;
    char config[SH_CONFIG_BYTES];
    struct box b = {.closed = true};
    (void)self;
    if (!PyArg_ParseTuple(args, "i:read_config", &fd))
        return NULL;
    enum sh_status s = sh_read_config(fd, config, &n, &b.ctx.why);
    return s == SH_OK ? PyBytes_FromStringAndSize(config, (Py_ssize_t)n) : fail(&b, s);
}

PyObject *core_spawn_detached(PyObject *self, PyObject *args)
{
    int input;
    PyObject *list, *log;
    char *argv[32] = {0};
    PyObject *kept[32] = {0};
    (void)self;
    if (!PyArg_ParseTuple(args, "O!Oi:spawn_detached", &PyList_Type, &list, &log, &input))
        return NULL;
    Py_ssize_t n = PyList_Size(list);
    int error = n >= 1 && n < 32 ? 0 : E2BIG;
    for (Py_ssize_t i = 0; error == 0 && i < n; i++) {
        if (!PyUnicode_FSConverter(PyList_GetItem(list, i), &kept[i]))
            error = -1;
        else
            argv[i] = PyBytes_AsString(kept[i]);
    }
    PyObject *path = NULL;
    if (error == 0 && log != Py_None && !PyUnicode_FSConverter(log, &path))
        error = -1;
    if (error == 0) {
        Py_BEGIN_ALLOW_THREADS
            error = sh_os_spawn_detached(argv, path ? PyBytes_AsString(path) : NULL, input);
        Py_END_ALLOW_THREADS
    }
    for (Py_ssize_t i = 0; i < 32; i++)
        Py_XDECREF(kept[i]);
    Py_XDECREF(path);
    if (error > 0) {
        errno = error & ~SH_LOG_FAILED;
        PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError,
                                             error & SH_LOG_FAILED ? log : PyList_GetItem(list, 0));
    }
    return error ? NULL : Py_NewRef(Py_None);
}
