"""Processes that do what a test tells them, one step at a time, so that events have an order.

    test                                   Worker's process
    worker.do("alloc", "x", 100)  ---->    actions.alloc(kept, "x", 100)
                                  <----    what it returned or raised

What a step leaves behind stays in the process under a name (`kept`), until it is dropped or killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import multiprocessing
import operator
import os
import signal
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import shmheap

CLONE_NEWPID = 0x20000000
METHODS = ("fork", "spawn", "forkserver")
PATIENCE_S = 60.0
"""Bounds how long a broken test hangs, and decides no test's outcome."""

Kept = dict[str, Any]


class Worker:
    """A process that serves steps until it is told to end, is killed, or its parent is gone.

    Args:
        method: how it is started: fork, spawn or forkserver.
        kept: what it has at the start; under fork inherited, else pickled.
    """

    def __init__(self, method: str = "spawn", **kept: Any) -> None:
        context = multiprocessing.get_context(method)
        self.connection, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, kept), daemon=True)
        self.process.start()
        there.close()

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return pid

    def start(self, action: str, *args: Any) -> None:
        """Begin a step without waiting for its end: see `result`."""
        self.connection.send((action, args))

    def result(self) -> Any:
        """What the step that was started returned; raises what it raised."""
        if not self.connection.poll(PATIENCE_S):
            raise TimeoutError("the worker does not answer")
        failed, value = self.connection.recv()
        if failed:
            raise value
        return value

    def do(self, action: str, *args: Any) -> Any:
        """One whole step."""
        self.start(action, *args)
        return self.result()

    def end(self) -> None:
        """Let it leave as a program does that comes to its end."""
        self.connection.send(None)
        self.process.join(PATIENCE_S)
        assert self.process.exitcode == 0

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.join(PATIENCE_S)
        assert self.process.exitcode == -signal.SIGKILL

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.connection.close()
        if self.process.is_alive():  # the test has failed
            self.process.kill()
        self.process.join(PATIENCE_S)
        self.process.close()


def serve(connection: Connection, kept: Kept) -> None:
    """What a worker's process runs."""
    with contextlib.suppress(EOFError, ConnectionError):
        while (step := connection.recv()) is not None:
            connection.send(_outcome(kept, *step))
            del step
    kept.clear()
    gc.collect()


def _outcome(kept: Kept, action: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
    """Whether the step failed, and what it returned or raised."""
    try:
        return False, ACTIONS[action](kept, *args)
    except Exception as error:
        return True, error


# Steps. Those that make a block or get one keep it under a name.


def attach(kept: Kept, name: str) -> None:
    kept["heap"] = shmheap.Heap.attach(name)


def close(kept: Kept) -> None:
    kept["heap"].close()


def close_and_forget(kept: Kept) -> None:
    """As good as new."""
    close(kept)
    kept.clear()


def alloc(kept: Kept, key: str, nbytes: int) -> tuple[int, int]:
    kept[key] = kept["heap"].alloc(nbytes)
    return kept[key].offset, kept[key].generation


def alloc_once(kept: Kept, key: str, nbytes: int) -> bool:
    """Without asking the coordinator for memory, which a test may be itself. False: no room."""
    block = kept["heap"]._alloc_once(nbytes, True)
    if isinstance(block, shmheap.Block):
        kept[key] = block
    return key in kept


def alloc_waiting(kept: Kept, key: str, nbytes: int, timeout: float | None) -> None:
    kept[key] = kept["heap"].alloc(nbytes, timeout=timeout)


def alloc_many(kept: Kept, key: str, count: int, nbytes: int) -> None:
    kept[key] = [kept["heap"].alloc(nbytes) for _ in range(count)]


def put(kept: Kept, key: str, data: bytes) -> None:
    kept[key] = kept["heap"].put(data)


def keep(kept: Kept, key: str, value: Any) -> None:
    kept[key] = value


def get(kept: Kept, key: str) -> Any:
    return kept[key]


def copy(kept: Kept, key: str, again: str) -> None:
    kept[again] = kept[key].__copy__()


def drop(kept: Kept, key: str) -> None:
    del kept[key]


def free(kept: Kept, key: str) -> None:
    """Free a block, or each of a list: a forked process also has its parent's variables."""
    held = kept.pop(key)
    for block in held if isinstance(held, list) else [held]:
        block.free()


def read(kept: Kept, key: str) -> bytes:
    return bytes(kept[key])


def write(kept: Kept, key: str, at: int, data: bytes) -> None:
    kept[key][at : at + len(data)] = data


def digest(kept: Kept, key: str) -> str:
    return hashlib.sha256(kept[key]).hexdigest()


def root_get(kept: Kept, key: str, name: str) -> None:
    kept[key] = kept["heap"].roots[name]


def root_set(kept: Kept, name: str, key: str) -> None:
    kept["heap"].roots[name] = kept[key]


def root_pop(kept: Kept, name: str) -> bool:
    """Whether there was one."""
    return kept["heap"].roots.pop(name, None) is not None


def reduce(kept: Kept, key: str) -> tuple[Any, ...]:
    """The parts of a pickled handle, with its lease, as plain values."""
    _, handle = kept[key].__reduce__()
    return tuple(handle)


def rebuild(kept: Kept, key: str, handle: tuple[Any, ...]) -> None:
    from shmheap.block import rebuild

    kept[key] = rebuild(*handle)


def stats(kept: Kept) -> shmheap.HeapStats:
    return kept["heap"].stats()


def check(kept: Kept) -> list[str]:
    return kept["heap"]._check()


def churn(kept: Kept, rounds: int, nbytes: int) -> int:
    """Allocate, write, look, drop; returns how many blocks were not as they had been written."""
    wrong = 0
    for number in range(rounds):
        block = kept["heap"].alloc(nbytes)
        wrong += bytes(block) != bytes(nbytes)
        pattern = bytes([number % 255 + 1]) * nbytes
        block[:] = pattern
        wrong += bytes(block) != pattern
    return wrong


def fork_raw(kept: Kept, function: str) -> list[str]:
    """A fork that Python knows nothing of; says what the child got when it used the heap.

    libc's fork() calls the handlers of pthread_atfork, its _Fork() calls nobody.
    """
    heap, block = kept["heap"], kept["block"]
    uses = [lambda: heap.alloc(64), lambda: block[0], lambda: heap.roots["a"], heap.stats]
    ends = [block.free, lambda: kept.pop("block"), heap.close]
    reader, writer = os.pipe()
    child = getattr(ctypes.PyDLL(None), function)()
    if child == 0:
        try:
            said = [_attempt(use) for use in (*uses, *ends)]
            os.write(writer, "\n".join(said).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as said_by_child:
        return said_by_child.read().decode().split("\n")


def fork_elsewhere(kept: Kept) -> list[str]:
    """A fork whose child is the first process of another PID namespace; as fork_raw."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    return fork_raw(kept, "fork")


def become(_kept: Kept, uid: int) -> None:
    """Be another user from now on, for good."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def attempt(kept: Kept, name: str, *args: Any) -> str:
    """Call what a name as "os:kill" or "heap:gc" (of a kept thing) is of; says what came of it."""
    owner, _, path = name.partition(":")
    found = kept[owner] if owner in kept else import_module(owner)
    return _attempt(lambda: operator.attrgetter(path)(found)(*args))


def work(kept: Kept, key: str, name: str, *args: Any) -> Any:
    """Call a function of shared_work, or of "module:function", with what is kept."""
    module, _, function = name.rpartition(":")
    return getattr(import_module(module or "shared_work"), function)(kept[key], *args)


def _attempt(action: Callable[[], object]) -> str:
    try:
        return f"returned {action()!r}".replace("\n", " ")
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")


def fork_and_leave(kept: Kept, by_signal: int) -> int:
    """Go on in a child, and die: returns the child's pid."""
    if os.fork() != 0:
        os.kill(os.getpid(), by_signal)
        os._exit(0)
    return os.getpid()


def fork_twice(kept: Kept, key: str) -> list[int]:
    """Fork children that look at a block, free it and leave; returns how they ended."""
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                right = bytes(kept[key]) == kept["expected"]
                kept.pop(key).free()
                mine = kept["heap"].put(b"child")
                os._exit(0 if right and bytes(mine) == b"child" else 1)
            finally:
                os._exit(2)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def die(_kept: Kept) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def rehash(block: shmheap.Block) -> shmheap.Block:
    """Replace the bytes in place by their hash, repeated. For pools."""
    block[:] = hashlib.sha256(block).digest() * (len(block) // 32)
    return block


ACTIONS: dict[str, Callable[..., Any]] = {
    action.__name__: action
    for action in (
        attach,
        close,
        close_and_forget,
        alloc,
        alloc_once,
        alloc_waiting,
        alloc_many,
        put,
        keep,
        get,
        copy,
        drop,
        free,
        read,
        write,
        digest,
        root_get,
        root_set,
        root_pop,
        reduce,
        rebuild,
        stats,
        check,
        churn,
        fork_raw,
        fork_elsewhere,
        become,
        attempt,
        work,
        fork_and_leave,
        fork_twice,
        die,
    )
}
