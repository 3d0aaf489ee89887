"""A heap against a plain dict: whatever is done in whatever order, both say the same.

Three users of one heap, the third a process that is killed and started again, and a coordinator
that collects a step at a time, is killed and replaced; Hypothesis chooses what they do. After each
step every invariant is walked (`csrc/check.c`), the books are held against the kernel page by page,
and blocks, bytes, leases and names must be those of the model.

`SH_TEST_SCALE=50` makes it 50 times as many examples.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import pytest
from by_hand import EVERYTHING, HeapByHand
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from processes import Worker

from shmheap import Block, Heap, StaleHandle
from shmheap.block import Handle

EXAMPLES = max(1, int(30 * float(os.environ.get("SH_TEST_SCALE", "1"))))
PROCESSES = 2
"""How many of them, one after another, may be killed in an example."""
MIB = 1 << 20
SIZES = st.one_of(
    st.integers(1, 600),
    st.sampled_from([1024, 4096, 5000, 8192, 16384, 40_000, 65535, 65536]),
    st.integers(65537, 300_000),
)
NAMES = st.sampled_from(["a", "b", "c", "long " * 40])
PICK = st.integers(0, 1 << 20)
USERS = st.integers(0, 2)

IDLE, MARK, SWEEP = 0, 1, 3
CYCLE = ("start_cycle", "mark", "finish_mark", "sweep", "stamp", "end_cycle")
PHASES = (MARK, MARK, SWEEP, SWEEP, SWEEP, IDLE)
"""The phase after each step of a collection."""


class User(Protocol):
    """What a process does with a heap; its blocks are known by whatever it says."""

    def alloc(self, size: int) -> Any: ...  # None: no room
    def read(self, block: Any) -> bytes: ...
    def write(self, block: Any, at: int, data: bytes) -> None: ...
    def copy(self, block: Any) -> Any: ...
    def free(self, block: Any) -> None: ...
    def send(self, block: Any) -> Handle: ...
    def receive(self, handle: Handle) -> Any: ...
    def root_set(self, name: str, block: Any) -> None: ...
    def root_get(self, name: str) -> Any: ...  # KeyError
    def root_pop(self, name: str) -> bool: ...


class Here:
    """A user in this process."""

    def __init__(self, heap: Heap) -> None:
        self.heap = heap

    def alloc(self, size: int) -> Block | None:
        block = self.heap._alloc_once(size, True)
        return block if isinstance(block, Block) else None

    def read(self, block: Block) -> bytes:
        return bytes(block)

    def write(self, block: Block, at: int, data: bytes) -> None:
        block[at : at + len(data)] = data

    def copy(self, block: Block) -> Block:
        return block.__copy__()

    def free(self, block: Block) -> None:
        block.free()

    def send(self, block: Block) -> Handle:
        handle: Handle = pickle.loads(pickle.dumps(block.lease().handle))
        return handle

    def receive(self, handle: Handle) -> Block:
        return self.heap._adopt(*handle[2:])

    def root_set(self, name: str, block: Block) -> None:
        self.heap.roots[name] = block

    def root_get(self, name: str) -> Block:
        return self.heap.roots[name]

    def root_pop(self, name: str) -> bool:
        return self.heap.roots.pop(name, None) is not None


class There:
    """A user in a process of its own, where each block has a key."""

    def __init__(self, worker: Worker, name: str) -> None:
        self.worker = worker
        self.worker.do("attach", name)
        self._keys = map(str, count())

    def alloc(self, size: int) -> str | None:
        key = next(self._keys)
        return key if self.worker.do("alloc_once", key, size) else None

    def read(self, key: str) -> bytes:
        data: bytes = self.worker.do("read", key)
        return data

    def write(self, key: str, at: int, data: bytes) -> None:
        self.worker.do("write", key, at, data)

    def copy(self, key: str) -> str:
        self.worker.do("copy", key, again := next(self._keys))
        return again

    def free(self, key: str) -> None:
        self.worker.do("free", key)

    def send(self, key: str) -> Handle:
        return Handle(*self.worker.do("reduce", key))

    def receive(self, handle: Handle) -> str:
        self.worker.do("rebuild", key := next(self._keys), tuple(handle))
        return key

    def root_set(self, name: str, key: str) -> None:
        self.worker.do("root_set", name, key)

    def root_get(self, name: str) -> str:
        self.worker.do("root_get", key := next(self._keys), name)
        return key

    def root_pop(self, name: str) -> bool:
        there: bool = self.worker.do("root_pop", name)
        return there


@dataclass(eq=False)
class Model:
    """A block as it ought to be."""

    data: bytearray


@dataclass(eq=False)
class Held:
    """A handle of a user, who may be dead and not yet reaped."""

    block: Any
    model: Model
    user: User


@dataclass(eq=False)
class Message:
    """A pickled handle; its lease is there until taken, or its sender ended and was reaped."""

    handle: Handle
    model: Model
    sender: User
    leased: bool = True


@dataclass
class Machine(RuleBasedStateMachine):
    """The rules; `name` is the heap's. `spare`: processes that have nothing, used again."""

    name: str
    spare: list[Worker]
    held: list[Held] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    roots: dict[str, Model] = field(default_factory=dict)
    dead: int = 0  # killed, and not yet reaped
    stamp: int = 1
    phase: int = IDLE
    steps: int = 0  # of a collection that were taken

    def __post_init__(self) -> None:
        super().__init__()
        while len(self.spare) < PROCESSES:
            self.spare.append(Worker("fork"))  # before there is a heap that it would inherit
        self.hand = HeapByHand(self.name, 6 * MIB)
        self.here = Here(self.hand.heap)
        self.second = Here(Heap.attach(self.name))
        self.there: There | None = There(self.spare.pop(), self.name)

    def __hash__(self) -> int:
        return id(self)

    def teardown(self) -> None:
        try:
            with self.hand:
                self._end()
        finally:
            if self.there is not None:  # the test has failed
                self.there.worker.__exit__(None, None, None)

    def _end(self) -> None:
        """Everything goes, and nothing is left."""
        assert all(one.user.read(one.block) == one.model.data for one in self.living())
        self.hand.heap.roots.clear()
        self.held.clear()
        self.second.heap.close()
        if self.there is not None:
            self.the_process_ends(killed=False)
        self._finish_the_cycle()
        self.hand.reap()
        for message in self.messages:
            self.hand.heap._drop_lease(*message.handle[2:])
        self.hand.collect(self.stamp)
        self.hand.release()
        assert self.hand.stats.heap_objects == 0
        self.hand.assert_sound()

    # What the model says

    def users(self) -> list[User]:
        return [self.here, self.second, self.there or self.here]

    def living(self) -> list[Held]:
        """Handles of users who are there."""
        return [one for one in self.held if one.user in self.users()]

    def pick(self, number: int) -> Held | None:
        living = self.living()
        return living[number % len(living)] if living else None

    def alive(self) -> set[Model]:
        models = {one.model for one in self.held} | set(self.roots.values())
        return models | {message.model for message in self.messages if message.leased}

    @invariant()
    def both_say_the_same(self) -> None:
        stats = self.hand.stats
        alive = self.alive()
        assert stats.heap_objects == len(alive)
        assert stats.heap_alloc == sum(len(model.data) for model in alive)
        assert stats.pins == len(self.held)
        assert stats.leases == sum(message.leased for message in self.messages)
        assert sorted(self.hand.heap.roots) == sorted(self.roots)
        assert stats.processes == 2 + (self.there is not None) + self.dead

    @invariant()
    def nothing_is_torn(self) -> None:
        self.hand.assert_sound()

    # Blocks

    @rule(user=USERS, size=SIZES, fill=st.integers(0, 255))
    def alloc(self, user: int, size: int, fill: int) -> None:
        who = self.users()[user]
        block = who.alloc(size)
        if block is None:
            assert self.hand.stats.heap_inuse > 4 * MIB, "it says that it is full"
            return
        assert who.read(block) == bytes(size)
        if fill:
            who.write(block, 0, bytes([fill]) * size)
        self.held.append(Held(block, Model(bytearray([fill]) * size), who))

    @rule(user=USERS, size=st.sampled_from([16, 100, 256, 1000]), number=st.just(100))
    def alloc_many(self, user: int, size: int, number: int) -> None:
        for fill in range(number):
            self.alloc(user, size, fill)

    @rule(pick=PICK, at=PICK, byte=st.integers(0, 255))
    def look_and_write(self, pick: int, at: int, byte: int) -> None:
        if one := self.pick(pick):
            assert one.user.read(one.block) == one.model.data
            at %= len(one.model.data)
            one.user.write(one.block, at, bytes([byte]))
            one.model.data[at] = byte

    @rule(pick=PICK)
    def copy(self, pick: int) -> None:
        if one := self.pick(pick):
            self.held.append(Held(one.user.copy(one.block), one.model, one.user))

    @rule(pick=PICK)
    def free(self, pick: int) -> None:
        if one := self.pick(pick):
            self._free(one)

    def _free(self, one: Held) -> None:
        one.user.free(one.block)
        self.held.remove(one)

    @rule(step=st.integers(1, 7))
    def free_many(self, step: int) -> None:
        for one in self.living()[::step]:
            self._free(one)

    @precondition(lambda self: self.phase == IDLE)
    @rule(pick=PICK)
    def hold_a_view_over_a_collection(self, pick: int) -> None:
        one = self.pick(pick)
        if one is None or isinstance(one.user, There):
            return
        view = memoryview(one.block)
        with pytest.raises(BufferError):
            one.block.free()
        self.held.remove(one)
        block, one.block = one.block, None
        del block  # the view alone keeps it
        self.collect()
        assert view == one.model.data
        view.release()

    # Roots

    @rule(name=NAMES, pick=PICK)
    def root_set(self, name: str, pick: int) -> None:
        if one := self.pick(pick):
            one.user.root_set(name, one.block)
            self.roots[name] = one.model

    @rule(user=USERS, name=NAMES)
    def root_get(self, user: int, name: str) -> None:
        who = self.users()[user]
        if name not in self.roots:
            with pytest.raises(KeyError):
                who.root_get(name)
            return
        block = who.root_get(name)
        assert who.read(block) == self.roots[name].data
        self.held.append(Held(block, self.roots[name], who))

    @rule(user=USERS, name=NAMES)
    def root_pop(self, user: int, name: str) -> None:
        assert self.users()[user].root_pop(name) == (self.roots.pop(name, None) is not None)

    # Messages

    @rule(pick=PICK)
    def send(self, pick: int) -> None:
        if one := self.pick(pick):
            self.messages.append(Message(one.user.send(one.block), one.model, one.user))

    @precondition(lambda self: self.messages)
    @rule(user=USERS, pick=PICK)
    def receive(self, user: int, pick: int) -> None:
        who = self.users()[user]
        message = self.messages[pick % len(self.messages)]
        if message.model not in self.alive():
            with pytest.raises(StaleHandle):
                who.receive(message.handle)
            return
        block = who.receive(message.handle)
        message.leased = False
        assert who.read(block) == message.model.data
        self.held.append(Held(block, message.model, who))

    @precondition(lambda self: self.messages)
    @rule(pick=PICK)
    def take_back(self, pick: int) -> None:
        message = self.messages.pop(pick % len(self.messages))
        assert self.hand.heap._drop_lease(*message.handle[2:]) == message.leased

    # Users

    @rule()
    def another_user_leaves_and_comes(self) -> None:
        self.second.heap.close()
        self.second = Here(Heap.attach(self.name))

    @precondition(lambda self: self.there is not None)
    @rule(killed=st.booleans())
    def the_process_ends(self, killed: bool) -> None:
        assert self.there is not None
        worker, self.there = self.there.worker, None
        if killed:
            with worker:
                worker.kill()
            self.dead += 1
        else:
            worker.do("close_and_forget")
            self.spare.append(worker)

    @precondition(lambda self: self.there is None and self.spare)
    @rule()
    def a_process_comes(self) -> None:
        self.there = There(self.spare.pop(), self.name)

    @precondition(lambda self: self.phase == IDLE)
    @rule(grace_is_over=st.booleans())
    def reap(self, grace_is_over: bool) -> None:
        self.hand.reap(None if grace_is_over else 0)
        self.held = self.living()
        for message in self.messages:
            message.leased &= message.sender in self.users() or not grace_is_over
        self.dead = 0

    # Coordinator

    @rule()
    def collect_a_step(self) -> None:
        step = CYCLE[self.steps]
        self.stamp += step == "start_cycle"
        args = {"stamp": (self.stamp,), "end_cycle": (1 << 40, False, 0)}.get(step, ())
        result = getattr(self.hand.steward, step)(*args)
        if step == "sweep":
            assert result[:2] == (0, 0), "counts had freed everything"
        self.phase = PHASES[self.steps]
        self.steps = (self.steps + 1) % len(CYCLE)

    @rule()
    def collect(self) -> None:
        self._finish_the_cycle()
        self.collect_a_step()
        self._finish_the_cycle()

    def _finish_the_cycle(self) -> None:
        while self.steps or self.phase != IDLE:
            self.collect_a_step()

    @precondition(lambda self: self.phase == IDLE)
    @rule(back=st.integers(-1, 4), step=st.sampled_from([1, 100_000, 1 << 40]))
    def release(self, back: int, step: int) -> None:
        self.hand.release(EVERYTHING if back < 0 else max(1, self.stamp - back), step)

    @rule()
    def coordinator_dies(self) -> None:
        """Its successor sweeps on, or starts again."""
        assert self.hand.succeed() == self.phase
        self.steps = CYCLE.index("sweep") if self.phase == SWEEP else 0


@pytest.fixture
def spare() -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    yield workers
    for worker in workers:
        with worker:
            worker.end()


def test_a_heap_is_a_dict(new_heap_name: Callable[[], str], spare: list[Worker]) -> None:
    run_state_machine_as_test(
        lambda: Machine(new_heap_name(), spare),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
