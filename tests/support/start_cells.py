"""The table of start methods: each cell is one check, in a process of its own.

    start_cells.py METHOD SITUATION     prints {"outcome": "ok" | "refused" | "FAILED", "why": ...}

A cell starts children by the method, has them use the heap, compares contents, and at its end finds
the heap sound and empty. Steps are ordered by messages; a cell that hangs dies with its stacks.

"refused" is an outcome where refusing is right: what cannot be sent to another process
(`TypeError`), and a fork that shmheap does not see (`HeapError`), which must leave the parent's
blocks as they are. `EXPECTED` says which cells those are.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

import shmheap

PATIENCE_S = 60
"""Bounds how long a broken cell hangs, and decides no cell's outcome."""

METHODS = ("fork", "spawn", "forkserver")
RAW_FORKS = ("libc fork", "fork syscall")
"""Forks that Python is not told of: by the C library's function, and past the C library too."""

UNSEEN = {"libc fork": False, "fork syscall": True}
"""Which of them shmheap cannot see either, and so refuses. The one place that says so."""

SITUATIONS = (
    "handle",
    "live view",
    "busy thread",
    "exec",
    "child outlives parent",
    "parent outlives child",
)

FORK_NUMBERS = {"x86_64": 57}
"""The fork system call; newer machines have only clone, whose arguments differ."""


def expected(method: str, situation: str) -> str:
    """What the cell must say: "ok", or "refused" and the error's type."""
    if UNSEEN.get(method, False) and situation != "exec":
        return "refused HeapError"
    if situation == "live view" and method in ("spawn", "forkserver"):
        return "refused TypeError"
    return "ok"


class RefusedError(Exception):
    """The heap, or Python, refused what the cell did. Says the error's type."""


class Process(Protocol):
    """A child."""

    pid: Any

    def join(self) -> None:
        """Wait for its end."""


class RawProcess:
    """A child that was forked behind Python's back. It ends without Python's own ending."""

    def __init__(self, method: str, main: Callable[..., None], args: tuple[Any, ...]) -> None:
        # PyDLL keeps the GIL: without that the child would wait for it for ever.
        libc = ctypes.PyDLL(None, use_errno=True)
        self.pid = libc.fork() if method == "libc fork" else libc.syscall(fork_number())
        if self.pid == 0:
            try:
                main(*args)
                atexit._run_exitfuncs()
            finally:
                os._exit(0)

    def join(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def fork_number() -> int:
    """The number of the fork system call. Raises RefusedError where there is none."""
    if platform.machine() not in FORK_NUMBERS:
        raise RefusedError("NoForkSystemCall")
    return FORK_NUMBERS[platform.machine()]


def start(method: str, main: Callable[..., None], *args: Any) -> Process:
    if method in RAW_FORKS:
        return RawProcess(method, main, args)
    process = multiprocessing.get_context(method).Process(target=main, args=args)
    process.start()
    return process


class Child:
    """A child that does what a cell's function says, and its end of a pipe to talk through."""

    def __init__(self, method: str, does: Callable[..., None], *args: Any) -> None:
        self.connection, there = multiprocessing.Pipe()
        try:
            self.process = start(method, run_child, does, there, *args)
        finally:
            there.close()

    def receive(self) -> Any:
        """What the child sends next; raises RefusedError if the heap refused what it did."""
        received = self.connection.recv()
        if isinstance(received, RefusedError):
            raise received
        return received

    def end(self) -> None:
        """Tell it to go on to its end, and wait for it. Idempotent."""
        with suppress(OSError):  # it is dead, or was told before
            self.connection.send("end")
        self.process.join()
        self.connection.close()


@contextmanager
def child(method: str, does: Callable[..., None], *args: Any) -> Iterator[Child]:
    started = Child(method, does, *args)
    try:
        yield started
    finally:
        started.end()


def die_if_it_hangs() -> None:
    """With the stacks. By a signal: faulthandler's own timer is a thread, which no fork has."""
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(PATIENCE_S)


def run_child(does: Callable[..., None], connection: Connection, *args: Any) -> None:
    die_if_it_hangs()
    try:
        does(connection, *args)
    except shmheap.HeapError as error:
        connection.send(RefusedError(type(error).__name__))
    with suppress(EOFError, ConnectionError):
        connection.recv()  # "end"


def digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


# Handles: a block and a heap as arguments, a block sent back


def use_handle(connection: Connection, heap: shmheap.Heap, block: shmheap.Block) -> None:
    connection.send(digest(block))
    block[0] = ord("!")
    connection.send(heap.put(bytes(block)[::-1]))


def exchange(method: str, heap: shmheap.Heap, size: int = 70_000) -> None:
    """A child reads and writes the parent's block, and the parent a child's."""
    data = b"?" + os.urandom(size)
    block = heap.put(data)
    changed = b"!" + data[1:]
    try:
        with child(method, use_handle, heap, block) as other:
            assert other.receive() == digest(data)
            theirs = other.receive()
            assert bytes(theirs) == changed[::-1]
            assert bytes(block) == changed, "the same bytes, not a copy"
        assert bytes(theirs) == changed[::-1], "it does not go with who made it"
    except RefusedError:
        assert bytes(block) == data, "a child that was refused has changed nothing"
        raise


# A view that is there when the child starts


def use_view(connection: Connection, view: memoryview, heap: shmheap.Heap, size: int) -> None:
    heap.stats()  # refused first, where it is
    connection.recv()  # the parent has released its own
    assert bytes(view) == bytes(size)
    view[:] = b"v" * size
    connection.send(bytes(view[-3:]))
    connection.recv()


def live_view(method: str, heap: shmheap.Heap) -> None:
    size = 9000
    block = heap.alloc(size)
    view = memoryview(block)
    kept = memoryview(view)
    try:
        with child(method, use_view, view, heap, size) as other:
            # A raw fork's child answers that it was refused, instead of waiting for this.
            if UNSEEN.get(method, False):
                other.receive()
            view.release()
            other.connection.send("released")
            assert other.receive() == b"vvv"
            assert bytes(kept) == b"v" * size
            other.connection.send("seen")
    except TypeError as error:  # no view can be sent
        if "pickle" not in str(error) or bytes(kept) != bytes(size):
            raise
        raise RefusedError("TypeError") from None
    except RefusedError:
        assert bytes(kept) == bytes(size)
        raise
    finally:
        kept.release()


# Threads that are inside the heap while children start


def busy_thread(method: str, heap: shmheap.Heap) -> None:
    stop = threading.Event()
    began = threading.Event()
    wrong: list[int] = []

    def work() -> None:
        number = 0
        while not stop.is_set():
            size = (16, 700, 9000, 70_000, 300_000)[number % 5]
            blocks = [heap.put(bytes([number % 255 + 1]) * size) for _ in range(3)]
            wrong.extend(size for one in blocks if one[size - 1] != number % 255 + 1)
            number += 1
            began.set()

    if method in RAW_FORKS:
        # A thread that asks for the GIL asks the child too, which waits for it to take it.
        sys.setswitchinterval(PATIENCE_S)
    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    try:
        for _ in range(3):
            exchange(method, heap)
    finally:
        stop.set()
        thread.join()
    assert not wrong


# exec: the process goes on as another program


PROGRAM = """
import hashlib, pickle, sys
from multiprocessing.connection import Connection
import shmheap
heap = shmheap.Heap.attach(sys.argv[1])
block = pickle.loads(bytes.fromhex(sys.argv[2]))
heap.gc()  # who was reaped before it holds nothing any more
Connection(1).send((hashlib.sha256(block).hexdigest(), heap.stats().heap_objects))
block[0] = 33
"""


def use_exec(
    connection: Connection, heap: shmheap.Heap, block: shmheap.Block, handle: bytes
) -> None:
    held = [block]
    with suppress(shmheap.HeapError):
        held.append(heap.put(b"dropped by exec"))
    os.dup2(connection.fileno(), 1)
    arguments = [sys.executable, "-P", "-c", PROGRAM, heap.name, handle.hex()]
    os.execv(sys.executable, arguments)


def exec_(method: str, heap: shmheap.Heap) -> None:
    data = b"?" + os.urandom(5000)
    block = heap.put(data)
    with child(method, use_exec, heap, block, pickle.dumps(block)) as other:
        found, objects = other.receive()
        assert found == digest(data)
        assert objects == 1, f"{objects} blocks: what the process held before exec is still there"
    assert bytes(block) == b"!" + data[1:]


# Who outlives whom


def use_as_orphan(connection: Connection, heap: shmheap.Heap, block: shmheap.Block) -> None:
    heap.stats()
    connection.send(os.getpid())
    connection.recv()  # the process that started this one is dead and reaped
    connection.send(digest(block))
    connection.send(heap.put(b"orphan"))


def use_and_start(
    connection: Connection, method: str, heap: shmheap.Heap, block: shmheap.Block
) -> None:
    start(method, run_child, use_as_orphan, connection, heap, block)
    signal.pause()


def child_outlives_parent(method: str, heap: shmheap.Heap) -> None:
    data = os.urandom(5000)
    block = heap.put(data)
    with child(method, use_and_start, method, heap, block) as other:
        try:
            orphan = other.receive()
        except RefusedError:
            os.kill(other.process.pid, signal.SIGKILL)
            assert bytes(block) == data
            raise
        gone = os.pidfd_open(orphan)
        os.kill(other.process.pid, signal.SIGKILL)
        other.process.join()
        block.free()
        heap.gc()
        assert heap.stats().heap_objects == 1, "the orphan's"
        other.connection.send("go on")
        assert other.receive() == digest(data)
        theirs = other.receive()
        other.end()
        multiprocessing.connection.wait([gone])
        os.close(gone)
        assert bytes(theirs) == b"orphan"


def use_and_die(connection: Connection, heap: shmheap.Heap, block: shmheap.Block) -> None:
    mine = [heap.alloc(3000) for _ in range(100)]
    view = memoryview(block)
    connection.send(digest(view))
    connection.recv()
    del mine


def parent_outlives_child(method: str, heap: shmheap.Heap) -> None:
    data = os.urandom(5000)
    block = heap.put(data)
    for _ in range(3):
        with child(method, use_and_die, heap, block) as other:
            try:
                assert other.receive() == digest(data)
            finally:
                os.kill(other.process.pid, signal.SIGKILL)
        heap.gc()
        assert heap.stats().heap_objects == 1
        assert bytes(block) == data


CHECKS: dict[str, Callable[[str, shmheap.Heap], None]] = {
    "handle": exchange,
    "live view": live_view,
    "busy thread": busy_thread,
    "exec": exec_,
    "child outlives parent": child_outlives_parent,
    "parent outlives child": parent_outlives_child,
}


def run_cell(method: str, situation: str, name: str | None = None) -> str:
    """One cell: "ok" or "refused" and the type. Raises whatever is not as it must be."""
    # What a dead sender sent goes at once: nothing here is taken after its sender's death.
    config = shmheap.Config(lease_grace_s=0.0)
    with shmheap.Heap.create(name, capacity="64MiB", config=config) as heap:
        said = "ok"
        try:
            CHECKS[situation](method, heap)
        except RefusedError as refused:
            said = f"refused {refused}"
        again = heap.put(b"still")
        assert bytes(again) == b"still"
        del again
        gc.collect()
        heap.gc()
        stats = heap.stats()
        assert (stats.heap_objects, stats.pins, stats.leases) == (0, 0, 0), stats
        assert stats.processes == 1, stats
        heap.check()
        heap.unlink()
    return said


def main() -> None:
    die_if_it_hangs()
    method, situation, *name = sys.argv[1:]
    try:
        outcome, _, why = run_cell(method, situation, *name).partition(" ")
    except BaseException as error:
        outcome, why = "FAILED", f"{type(error).__name__}: {error}"
    print(json.dumps({"outcome": outcome, "why": why}))


if __name__ == "__main__":
    main()
