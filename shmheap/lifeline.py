"""A worker that ends when the process does that started it, however that one ends.

    that process    keeps the writing end of a pipe, and nobody else does
    a worker        has the reading end: while it is idle, the kernel kills it once nobody can write

The standard library's executor leaves its workers behind where it is killed. Each has both ends of
their queue, waits there for ever, and keeps all memory that it has. A worker that is busy finishes
its task, as those of a pool do.

No thread waits: of a process that has two, Python warns when it forks.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
from multiprocessing.connection import Connection, Pipe

from shmheap.wires import no_fork

__all__ = ["Lifeline", "reading_end"]

_pipe: tuple[Connection, Connection] | None = None
"""This process's, for all its workers: reading and writing end. Open until it ends."""


def reading_end() -> Connection:
    """Return what this process's workers are to be given. Cost: at first a pipe."""
    global _pipe
    with no_fork:
        if _pipe is None:
            _pipe = Pipe(duplex=False)
        return _pipe[0]


def _let_go() -> None:
    """In a forked child: who has the writing end lives, for the workers."""
    global _pipe
    if _pipe is not None:
        _pipe[1].close()
        _pipe = None


os.register_at_fork(after_in_child=_let_go)


class Lifeline:
    """A worker's. It is busy at first.

    Args:
        end: The reading end that the worker was given.
    """

    def __init__(self, end: Connection) -> None:
        # Opened anew: to whom a signal goes is a matter of the open file, which workers share.
        path = f"/proc/self/fd/{end.fileno()}"
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self._fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self._fd, fcntl.F_SETSIG, signal.SIGKILL)

    def idle(self) -> None:
        """Die from now on when the other end goes; at once if it has gone. Cost: 2 system calls."""
        fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        if select.select([self._fd], [], [], 0)[0]:  # nobody ever writes: this is the end
            os.kill(os.getpid(), signal.SIGKILL)

    def busy(self) -> None:
        """Live on until idle again. Cost: a system call."""
        fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_NONBLOCK)
