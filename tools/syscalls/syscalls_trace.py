"""Make one chosen system call of a process fail, with ptrace; x86-64 only.

The process tells where it begins and ends to count by two calls that no kernel has. Counted are the
calls of its main thread, or of the first child that it forks meanwhile. A call that is to fail is
not carried out; but close is, because the kernel has let go of the descriptor when it says no.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

BEGIN: Final = 50_000
END: Final = 50_001

NAMES: Final = {
    0: "read", 1: "write", 2: "open", 3: "close", 4: "stat", 5: "fstat", 7: "poll", 8: "lseek",
    9: "mmap", 10: "mprotect", 11: "munmap", 12: "brk", 13: "rt_sigaction", 14: "rt_sigprocmask",
    16: "ioctl", 17: "pread64", 23: "select", 24: "sched_yield", 25: "mremap", 28: "madvise",
    32: "dup", 33: "dup2", 35: "nanosleep", 38: "setitimer", 39: "getpid", 56: "clone", 57: "fork",
    58: "vfork", 59: "execve", 61: "wait4", 62: "kill", 72: "fcntl", 77: "ftruncate", 83: "mkdir",
    86: "link", 87: "unlink", 89: "readlink", 90: "chmod", 91: "fchmod", 102: "getuid",
    107: "geteuid", 110: "getppid", 112: "setsid", 137: "statfs", 138: "fstatfs", 157: "prctl",
    186: "gettid", 202: "futex", 217: "getdents64", 218: "set_tid_address", 228: "clock_gettime",
    230: "clock_nanosleep", 232: "epoll_wait", 233: "epoll_ctl", 247: "waitid", 257: "openat",
    262: "newfstatat", 263: "unlinkat", 265: "linkat", 267: "readlinkat", 271: "ppoll",
    273: "set_robust_list", 285: "fallocate", 290: "eventfd2", 291: "epoll_create1", 293: "pipe2",
    302: "prlimit64", 318: "getrandom", 332: "statx", 334: "rseq", 434: "pidfd_open",
    435: "clone3", 436: "close_range", 439: "faccessat2",
}  # fmt: skip

# What never fails, and futex: of what it cannot say libc ends the process, by design.
UNFAILING: Final = {
    24, 39, 60, 102, 107, 110, 186, 202, 218, 228, 231, 273, 334, BEGIN, END
}  # fmt: skip
CLOSE: Final = 3
BRK: Final = 12
"""Says failure by the break that there is, which asking for address 0 gives."""

_TRACEME, _SYSCALL, _GETREGS, _SETREGS, _SETOPTIONS, _GETEVENTMSG = 0, 24, 12, 13, 0x4200, 0x4201
_SYSGOOD, _FORKS, _EXITKILL = 1, 2 | 4, 0x100000
_FORK_EVENTS = (signal.SIGTRAP | 1 << 8, signal.SIGTRAP | 2 << 8)
_RAX, _RDI, _ORIG_RAX = 10, 14, 15
_Registers = ctypes.c_ulonglong * 27

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def name_of(call: int) -> str:
    """Return a call's name, of those that shmheap meets."""
    return NAMES.get(call, f"call {call}")


def can_fail_with(call: int, error: int) -> bool:
    """Whether to try."""
    return call not in UNFAILING and (call != BRK or error == errno.ENOMEM)


def mark(which: int) -> None:
    """Say to the tracer where its counting begins or ends."""
    _libc.syscall(which)


def be_traced() -> None:
    """Let the parent trace this process from here on."""
    _ptrace(_TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass
class Traced:
    """What a traced process did: its calls between the marks, and how it ended."""

    calls: list[int] = field(default_factory=list)
    status: int = 0
    injected: bool = False


def trace(pid: int, *, child: bool, wanted: Callable[[int, int], int]) -> Traced:
    """Step a process that has called `be_traced` to its end.

    Args:
        pid: of a child of this thread.
        child: count the calls of the first child that it forks between the marks, not its own.
        wanted: given number and kind of a call, which errno it is to return; 0: carry it out.
    """
    os.waitpid(pid, 0)
    _ptrace(_SETOPTIONS, pid, data=_SYSGOOD | _EXITKILL | (_FORKS if child else 0))
    return _Tracer(pid, child, wanted).run()


class _Tracer:
    def __init__(self, pid: int, child: bool, wanted: Callable[[int, int], int]) -> None:
        self.found = Traced()
        self._main = pid
        self._target = 0 if child else pid
        self._of_child = child
        self._wanted = wanted
        self._counting = False
        self._entered: dict[int, int] = {}
        """By process that is in a call: which error it is to get, 0: what the kernel says."""

    def run(self) -> Traced:
        _ptrace(_SYSCALL, self._main)
        while True:
            pid, status = os.waitpid(-1, 0x40000000)  # __WALL
            if not os.WIFSTOPPED(status):
                if pid == self._main:
                    self.found.status = status
                    return self.found
                continue
            _ptrace(_SYSCALL, pid, data=self._look(pid, status))

    def _look(self, pid: int, status: int) -> int:
        """What happened at a stop; returns the signal to hand on."""
        stop = status >> 8
        if stop == signal.SIGTRAP | 0x80:
            self._at_call(pid)
            return 0
        if stop in _FORK_EVENTS:
            born = ctypes.c_ulong()
            _ptrace(_GETEVENTMSG, pid, data=ctypes.addressof(born))
            if self._of_child and self._counting and not self._target:
                self._target = born.value
            return 0
        return 0 if stop in (signal.SIGSTOP, signal.SIGTRAP) else stop & 0x7F

    def _at_call(self, pid: int) -> None:
        registers = _Registers()
        _ptrace(_GETREGS, pid, data=ctypes.addressof(registers))
        if pid in self._entered:
            error = self._entered.pop(pid)
            if error:
                registers[_RAX] = -error & (1 << 64) - 1
                _ptrace(_SETREGS, pid, data=ctypes.addressof(registers))
            return
        call = registers[_ORIG_RAX]
        self._entered[pid] = error = self._error_for(pid, call)
        if error:
            self.found.injected = True
            if call == BRK:
                registers[_RDI] = self._entered[pid] = 0
            elif call != CLOSE:
                registers[_ORIG_RAX] = (1 << 64) - 1
            _ptrace(_SETREGS, pid, data=ctypes.addressof(registers))

    def _error_for(self, pid: int, call: int) -> int:
        if call in (BEGIN, END) and pid in (self._main, self._target):
            self._counting = call == BEGIN
            return 0
        if not self._counting or pid != self._target:
            return 0
        self.found.calls.append(call)
        return self._wanted(len(self.found.calls) - 1, call)


def _ptrace(request: int, pid: int, *, data: int = 0) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        number = ctypes.get_errno()
        if number != errno.ESRCH:  # it was killed meanwhile: its status comes next
            raise OSError(number, os.strerror(number))
