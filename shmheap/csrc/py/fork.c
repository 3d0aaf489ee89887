/*
 * fork(): a child gets its own place in every heap that its parent has attached.
 *
 * libc calls the handlers inside fork(), after every hook of Python: what those wait for still
 * finds the heaps open. (Handlers that a library in C registered before us run later, with the
 * heaps locked.) Python cannot be used here.
 */

#include "py.h"

#include <errno.h>
#include <string.h>

/* What was in the way when a child was to be given its own place in the heap; NULL: nothing. */
static const char *obstacle(enum sh_status s)
{
    switch (s) {
    case SH_OK:
        return NULL;
    case SH_NOSLOT:
        return "the heap had no free slot, since it had as many processes as it can have";
    case SH_BUSY:
        return "a process that was stopped kept the heap locked";
    case SH_SYSTEM:
        return errno == EBADF ? "its parent had closed the heap's descriptor" : strerror(errno);
    case SH_UNTRUSTED:
        return "it is in another PID namespace than the heap (run both in one)";
    default:
        return sh_status_text(s);
    }
}

static void before_fork(void)
{
    pthread_mutex_lock(&boxes_lock);
    for (struct box *b = boxes; b != NULL; b = b->next)
        if (!sh_is_forked(&b->ctx))
            b->left_behind = obstacle(sh_fork_prepare(&b->ctx));
    memory_before_fork();
}

static void after_fork_parent(void)
{
    memory_after_fork(false);
    for (struct box *b = boxes; b != NULL; b = b->next) {
        b->left_behind = NULL; /* whoever forks without fork() is to be told so */
        sh_fork_parent(&b->ctx);
    }
    pthread_mutex_unlock(&boxes_lock);
}

static void after_fork_child(void)
{
    memory_after_fork(true);
    for (struct box *b = boxes; b != NULL; b = b->next) {
        b->calls = 0; /* threads inside are not in the child */
        b->held.users = b->held.n - b->held.late;
        enum sh_status s = sh_fork_child(&b->ctx);
        if (s != SH_OK)
            b->left_behind = obstacle(s);
    }
    pthread_mutex_unlock(&boxes_lock);
}

bool fork_handlers(void)
{
    return pthread_atfork(before_fork, after_fork_parent, after_fork_child) == 0;
}

/* Python's hook in parent and child: the coordinators learn of the new process. */
PyObject *core_after_fork(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    boxes_tell();
    Py_RETURN_NONE;
}
