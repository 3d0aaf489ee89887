"""A process that stops at each of its system calls, as ptrace has it.

    stepped = Stepped(body)        body runs in a forked child; `pause()` in it is a marker
    stepped.to_marker()            it runs freely until there
    while call := stepped.step():  it stands before that system call, which is not yet made
        ...
    stepped.kill(), stepped.end()

Only the thread that called fork stands; others of the process go on. Linux, any architecture.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

PTRACE_TRACEME: Final = 0
PTRACE_CONT: Final = 7
PTRACE_DETACH: Final = 17
PTRACE_SYSCALL: Final = 24
PTRACE_SETOPTIONS: Final = 0x4200
PTRACE_GETEVENTMSG: Final = 0x4201
PTRACE_GET_SYSCALL_INFO: Final = 0x420E

O_TRACESYSGOOD: Final = 1
O_TRACEFORK: Final = 2
O_TRACEVFORK: Final = 4
O_TRACEEXEC: Final = 16
O_EXITKILL: Final = 1 << 20
OPTIONS: Final = O_TRACESYSGOOD | O_TRACEEXEC | O_EXITKILL
BORN: Final = frozenset({signal.SIGTRAP | 1 << 8, signal.SIGTRAP | 2 << 8})  # fork, vfork
RUNS_PROGRAM: Final = signal.SIGTRAP | 4 << 8
AT_CALL: Final = signal.SIGTRAP | 0x80
ENTRY: Final = 1
WALL: Final = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class _CallInfo(ctypes.Structure):
    """struct ptrace_syscall_info, as far as it is needed."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("args", ctypes.c_uint64 * 6),
    )


def _ptrace(request: int, pid: int, addr: int = 0, data: int = 0) -> int:
    found: int = _libc.ptrace(request, pid, addr, data)
    if found < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x} of {pid}")
    return found


def pause() -> None:
    """Marker in a body: this thread stops here until its tracer lets it go on.

    A signal to the process could be another thread's, which nobody traces: it would stop them all.
    """
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


@cache
def _names() -> dict[int, str]:
    """System calls by number, where the headers are installed."""
    found = {}
    for header in sorted(Path("/usr/include").glob("*/asm/unistd_64.h")):
        for line in header.read_text().splitlines():
            define, _, rest = line.partition(" __NR_")
            name, _, number = rest.partition(" ")
            if define == "#define" and number.isdigit():
                found[int(number)] = name
    return found


class Stepped:
    """A child of this process that runs `body`, stopped before it.

    Args:
        body: what it does; whatever it raises ends it with status 1 and a traceback.
        errors: a descriptor that its stderr goes to.
    """

    def __init__(self, body: Callable[[], object], errors: int = 2) -> None:
        self.status: int | None = None
        """How it ended, as `os.waitpid` says; None while it lives."""
        self._traced = True
        self.pid = os.fork()
        if self.pid == 0:
            _run(body, errors)
        self._wait()
        _ptrace(PTRACE_SETOPTIONS, self.pid, 0, OPTIONS)

    def step(self) -> str | None:
        """Go on to the next system call; returns its name.

        None: it has come to a marker, to another program, or to its end.
        """
        while self.status is None:
            stopped_by = self._go(PTRACE_SYSCALL)
            if stopped_by in (signal.SIGSTOP, RUNS_PROGRAM):
                return None
            if stopped_by == AT_CALL and (info := self._call()).op == ENTRY:
                return _names().get(info.number, f"call {info.number}")
        return None

    def to_marker(self) -> bool:
        """Run to the next `pause`; False: it has ended."""
        while self.status is None:
            if self._go(PTRACE_CONT) == signal.SIGSTOP:
                return True
        return False

    def to_child(self) -> Stepped:
        """Run until it has forked; gives the child, stopped before its first instruction."""
        _ptrace(PTRACE_SETOPTIONS, self.pid, 0, OPTIONS | O_TRACEFORK | O_TRACEVFORK)
        while self._go(PTRACE_CONT) not in BORN:
            assert self.status is None, "it did not fork"
        number = ctypes.c_ulong()
        _ptrace(PTRACE_GETEVENTMSG, self.pid, 0, ctypes.addressof(number))
        child = Stepped.__new__(Stepped)
        child.status = None
        child._traced = True
        child.pid = number.value
        child._wait()
        for one in (self, child):
            _ptrace(PTRACE_SETOPTIONS, one.pid, 0, OPTIONS)
        return child

    def let_go(self) -> None:
        """Trace it no longer: it runs on by itself."""
        if self._traced and self.status is None:
            _ptrace(PTRACE_DETACH, self.pid)
        self._traced = False

    def end(self) -> int:
        """Let it run to its end; returns its exit code, negative for a signal."""
        self.let_go()
        while self.status is None:
            self._wait()
        return os.waitstatus_to_exitcode(self.status)

    @property
    def killed(self) -> bool:
        """Whether it ended by SIGKILL."""
        return self.status == signal.SIGKILL

    def kill(self) -> None:
        """SIGKILL, where it stands; returns when it is gone."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
        while self.status is None:
            self._wait()

    def _call(self) -> _CallInfo:
        info = _CallInfo()
        _ptrace(PTRACE_GET_SYSCALL_INFO, self.pid, ctypes.sizeof(_CallInfo), ctypes.addressof(info))
        return info

    def _go(self, how: int) -> int:
        """Let it run to its next stop; returns what stopped it, with an event in bits 8 and up."""
        stopped_by = 0
        while self.status is None:
            _ptrace(how, self.pid, 0, stopped_by)
            stopped_by = self._wait()
            if stopped_by in (signal.SIGSTOP, AT_CALL) or stopped_by > 0xFF:
                break  # any other signal is for it
        return stopped_by

    def _wait(self) -> int:
        _, status = os.waitpid(self.pid, WALL)
        if os.WIFSTOPPED(status):
            return status >> 8
        self.status = status
        return 0


def _run(body: Callable[[], object], errors: int) -> None:
    code = 1
    try:
        os.dup2(errors, 2)
        _ptrace(PTRACE_TRACEME, 0)
        pause()
        body()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
