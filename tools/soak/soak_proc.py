"""Processes seen from outside: state, threads, children; and one that inherits all orphans."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable

PR_SET_CHILD_SUBREAPER = 36
PATIENCE_S = 20.0


def adopt_orphans() -> None:
    """Become the parent of every descendant that loses its own: coordinators, forked children."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def own_session() -> None:
    """Lead a session, so that `is_ours` can tell; if we lead a process group, it is ours alone."""
    with contextlib.suppress(PermissionError):
        os.setsid()


def is_ours(pid: int) -> bool:
    """Whether it is a process of our session, and not one that has come to have its number."""
    try:
        return pid > 1 and pid != os.getpid() and os.getsid(pid) == os.getsid(0)
    except ProcessLookupError:
        return False


def go_first(tids: Iterable[int] = (0,)) -> bool:
    """Let threads (0: this process) have the CPU before all others, if we may; children do not.

    Else, on a busy machine, one that is to stop does so only when its turn comes, and one that has
    stopped inside a lock keeps it until the turn of whoever wants to kill it.
    """
    try:
        for tid in tids:
            policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(tid, policy, os.sched_param(1))
    except (PermissionError, ProcessLookupError):
        return False
    return True


def state_of(pid: int) -> str:
    """Return the letter of /proc/PID/stat: T stopped, Z dead and not waited for; "" if gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return chr(file.read().rpartition(b") ")[2][0])
    except (OSError, IndexError):
        return ""


def is_over(pid: int) -> bool:
    """Whether no thread of the process runs any more."""
    return state_of(pid) in ("", "Z", "X")


def stop(pid: int) -> bool:
    """Send SIGSTOP and wait until the process stands still; False: it has ended instead."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        go_first(threads_of(pid))
        given_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < given_up:
            state = state_of(pid)
            if state == "T":
                return True
            if state in ("", "Z", "X"):
                return False
            time.sleep(0.0001)
    return False


def threads_of(pid: int) -> set[int]:
    """Return the ids of its threads."""
    try:
        return {int(name) for name in os.listdir(f"/proc/{pid}/task")}
    except OSError:
        return set()


def children() -> list[int]:
    """Return the pids of this process's children, adopted ones too, also the dead ones."""
    with open(f"/proc/self/task/{os.getpid()}/children", "rb") as file:
        return [int(pid) for pid in file.read().split()]


def command_of(pid: int) -> list[bytes]:
    """Return its command line, empty if it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def is_coordinator(pid: int, path: str) -> bool:
    """Whether the process was started as a coordinator of that arena, however far it has come."""
    command = command_of(pid)
    return b"run" in command and path.encode() in command
