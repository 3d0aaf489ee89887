"""The operations whose system calls are made to fail, and what must hold afterwards.

Each try has a process and a heap of its own. The process that meets the error is the heap's
coordinator too, by hand, so nothing else happens meanwhile; but those of the coordinator's own
operations begin a coordinator. It looks whether the heap is whole and whether it can go on, and
leaves without cleaning up. Then the tracer's process takes over as a successor, reaps, collects,
checks, and uses the heap as another process.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import posix_ipc
from by_hand import PATIENCE_S, HeapByHand

import shmheap.heap
from shmheap import Block, Config, Heap, HeapError, _core, arena
from shmheap.coordinator import process

MIB = 1 << 20
CAPACITY = 16 * MIB
CONFIG = Config(python="/bin/true", keep=True)
"""Whoever starts a coordinator starts a program that ends at once: we are the coordinator."""

shmheap.heap.RECLAIM_S = 0.01  # nobody answers

TYPED = (HeapError, OSError, MemoryError)

Act = Callable[[], object]


class Scene:
    """A heap with some of everything, in the process that is to meet an error."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hand = HeapByHand(name, CAPACITY, CONFIG)
        posix_ipc.Semaphore(arena.bell_name(self.hand.steward.nonce), posix_ipc.O_CREAT).close()
        self.heap = self.hand.heap
        self.small = [self.heap.put(b"s" * 100) for _ in range(200)]
        self.large = self.heap.put(b"l" * 300_000)
        self.heap.roots["there"] = self.small[0]
        self.kept: list[Any] = []

    def after(self) -> None:
        """The same process goes on."""
        assert self.heap._check() == [], self.heap._check()[:3]
        assert all(bytes(block) == b"s" * 100 for block in self.small if not block.freed)
        assert self.large.freed or bytes(self.large) == b"l" * 300_000
        for nbytes in (40, 5000, 200_000):
            assert bytes(self.heap.put(b"n" * nbytes)) == b"n" * nbytes
        self.hand.assert_sound()


OPERATIONS: dict[str, Callable[[Scene], Act]] = {}
OF_CHILD: set[str] = set()
"""Those in which the calls of a child count that is forked."""


def operation(name: str, *, child: bool = False) -> Callable[[Any], Any]:
    """Name an operation; what is decorated prepares a scene for it and returns the act."""

    def add(make: Callable[[Scene], Act]) -> Callable[[Scene], Act]:
        OPERATIONS[name] = make
        if child:
            OF_CHILD.add(name)
        return make

    return add


def simple(name: str, act: Callable[[Scene], object]) -> None:
    """An operation that needs nothing but a scene."""
    OPERATIONS[name] = lambda scene: lambda: scene.kept.append(act(scene))


simple("alloc small, a new span", lambda scene: scene.heap.alloc(3000))
simple("alloc large, committing", lambda scene: scene.heap.alloc(3 * MIB))
simple("put", lambda scene: scene.heap.put(bytes(500_000)))
simple("free large", lambda scene: scene.large.free())
simple("root set", lambda scene: scene.heap.roots.__setitem__("new", scene.small[1]))
simple("root get", lambda scene: scene.heap.roots["there"])
simple("root delete", lambda scene: scene.heap.roots.__delitem__("there"))
simple("lease", lambda scene: scene.small[1].lease())
simple("pickle and back", lambda scene: pickle.loads(pickle.dumps(scene.small[1])))
simple("stats", lambda scene: scene.heap.stats())
simple("check", lambda scene: scene.heap.check())
simple("holders", lambda scene: scene.heap._shares())
simple("attach", lambda scene: Heap.attach(scene.name).close())
simple("unlink", lambda scene: scene.heap.unlink())
simple("close", lambda scene: scene.heap.close())
simple("steward: a collection", lambda scene: scene.hand.collect())
simple("steward: a turn", lambda scene: scene.hand.turn())


@operation("handles, a new span")
def grow_handles(scene: Scene) -> Act:
    """One handle more than the spans of this process have room for."""
    block = scene.small[0]
    scene.kept.extend(copy.copy(block) for _ in range(1024 - scene.hand.stats.pins % 1024))
    return lambda: scene.kept.append(copy.copy(block))


@operation("alloc in holes, committing")
def fill_holes(scene: Scene) -> Act:
    """Blocks where whole pages inside of spans were given back."""
    spread = [scene.heap.alloc(1000) for _ in range(160)]
    scene.kept.append(spread[::40])
    del spread
    scene.hand.collect()
    scene.hand.release()
    return lambda: scene.kept.append([scene.heap.alloc(1000) for _ in range(160)])


@operation("steward: release")
def release(scene: Scene) -> Act:
    """Give back runs that are not neighbours."""
    blocks = [scene.heap.alloc(200_000) for _ in range(8)]
    scene.kept.append(blocks[::2])
    del blocks
    scene.hand.collect()
    return lambda: scene.kept.append(scene.hand.release())


@operation("steward: succession")
def succeed(scene: Scene) -> Act:
    """Take over as coordinator."""
    scene.hand.steward.close()

    def act() -> None:
        scene.hand.steward = _core.Steward(scene.hand.fd)
        scene.hand.steward.begin()

    return act


@operation("alloc without a coordinator, starting one")
def start_one(scene: Scene) -> Act:
    """A span, and nobody is coordinator."""
    scene.hand.steward.close()
    return lambda: scene.kept.append(scene.heap.alloc(3000))


@operation("start a coordinator")
def start_detached(scene: Scene) -> Act:
    """What whoever finds no coordinator does."""
    return lambda: process.ensure_running(scene.hand.path, CONFIG)


@operation("start a coordinator, in the child", child=True)
def start_detached_child(scene: Scene) -> Act:
    """The same, seen from the process in between."""
    return start_detached(scene)


def forking(scene: Scene) -> Act:
    """Fork a child that uses the heap, and wait for it."""

    def act() -> None:
        child = os.fork()
        if child == 0:
            status = 3
            with contextlib.suppress(*TYPED):  # it may be without a place in the heap
                scene.heap.alloc(100).free()
                status = 0
            os._exit(status)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) not in (0, 3):
            raise RuntimeError(f"the child ended with {status}")

    return act


operation("fork")(forking)
operation("fork, in the child", child=True)(forking)


@operation("a coordinator, from start to end")
def coordinator(scene: Scene) -> Act:
    """A coordinator of a heap without users."""
    scene.heap.close()
    scene.hand.steward.close()
    return lambda: process.main(scene.hand.path, foreground=False)


# Controls: what is broken on purpose must be found


def _leak(scene: Scene) -> None:
    fd = os.open(scene.hand.path, os.O_RDONLY)
    os.stat(scene.hand.path)
    os.close(fd)


def _not_typed(scene: Scene) -> None:
    try:
        os.stat(scene.hand.path)
    except OSError as error:
        raise LookupError("not typed") from error


def _crash(scene: Scene) -> None:
    try:
        os.stat(scene.hand.path)
    except OSError:
        os.kill(os.getpid(), signal.SIGSEGV)


def _harm(scene: Scene) -> None:
    try:
        os.stat(scene.hand.path)
    except OSError:
        scene.small[0][:] = b"x" * 100


CONTROLS: dict[str, Callable[[Scene], Act]] = {
    "control, descriptors": lambda scene: lambda: _leak(scene),
    "control, not typed": lambda scene: lambda: _not_typed(scene),
    "control, SIGSEGV": lambda scene: lambda: _crash(scene),
    "control, the same process": lambda scene: lambda: _harm(scene),
}
"""By what must be said of them, after the comma."""


# Heaps that the operation makes


class Empty:
    """No heap yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.heap: Heap | None = None

    def after(self) -> None:
        if self.heap is None:
            assert not os.path.exists(arena.file_path(self.name)), (
                "a heap without its maker is left"
            )
            self.heap = Heap.create(self.name, capacity=CAPACITY, config=CONFIG)
        assert bytes(self.heap.put(b"n" * 5000)) == b"n" * 5000
        assert self.heap._check() == []


def create(scene: Any) -> Act:
    """Make a heap."""

    def act() -> None:
        scene.heap = Heap.create(scene.name, capacity=CAPACITY, config=CONFIG)

    return act


def open_new(scene: Any) -> Act:
    """Find that there is none, and make it."""

    def act() -> None:
        scene.heap = shmheap.open(scene.name, capacity=CAPACITY, config=CONFIG)

    return act


EMPTY: dict[str, Callable[[Any], Act]] = {"create": create, "open, creating": open_new}
ENDING = {"close", "a coordinator, from start to end"}
"""After these the same process has no heap to go on with."""
OPENING = {*EMPTY, "steward: succession"}
"""These keep a descriptor, if they manage."""


def names() -> list[str]:
    """Every operation."""
    return [*EMPTY, *OPERATIONS]


def fds() -> set[str]:
    """Return this process's descriptors and what they are."""
    return {
        f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}"
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }


def prepare(operation: str, name: str) -> tuple[Any, Act]:
    """Make a scene for an operation."""
    arena._random_nonce = lambda: nonce_of(name)
    scene: Any = Empty(name) if operation in EMPTY else Scene(name)
    return scene, {**EMPTY, **OPERATIONS, **CONTROLS}[operation](scene)


def after_in_another(name: str) -> None:
    """Another process takes the heap over and uses it; removes it and its bell."""
    path = arena.file_path(name)
    if os.path.exists(path):
        _take_over(name, path)
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_semaphore(arena.bell_name(nonce_of(name)))


def nonce_of(name: str) -> int:
    """What the arena of that name has in place of a random one, so that its bell is known."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) << 1 | 1


def _take_over(name: str, path: str) -> None:
    fd, _ = arena.open_arena(path)
    steward = _core.Steward(fd)
    try:
        steward.begin()
        _reap(steward)
        assert steward.check() == [], steward.check()[:3]
        heap = Heap._attached(os.dup(fd), path, name)
        if heap is not None:
            with heap:
                _use(heap)
    finally:
        arena.remove(path, os.fstat(fd), steward.nonce)
        steward.close()
        os.close(fd)


def _reap(steward: _core.Steward) -> None:
    given_up = time.monotonic() + PATIENCE_S
    for slot in steward.slots():
        # A program that it was starting gives its memory, and the lock, back a moment after exec.
        while slot[0] != 0 and steward.alive(slot[0]) and time.monotonic() < given_up:
            time.sleep(0.001)
        if slot[0] != 0:
            assert not steward.alive(slot[0]), "a process that is gone still looks alive"
            steward.reap(slot[0], 1 << 62)
    steward.start_cycle()
    steward.mark()
    steward.finish_mark()
    steward.sweep()
    steward.end_cycle(1 << 40, False, 0)


def _use(heap: Heap) -> None:
    roots = len(heap.roots)
    left = heap.stats()
    assert left.heap_objects <= roots, f"{left.heap_objects} blocks are nobody's"
    assert left.pins == left.leases == 0, left
    blocks: list[Block] = [heap.put(b"a" * nbytes) for nbytes in (40, 5000, 2 * MIB)]
    assert [bytes(block[:1]) for block in blocks] == [b"a"] * 3
    assert heap._check() == []


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings that no coordinator can be started are what they are for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
