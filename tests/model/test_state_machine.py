"""A heap against a plain dict: whatever is done in whatever order, both say the same.

Two users of one heap, and a coordinator that is killed and replaced, in one process; Hypothesis
chooses what they do. After each step every invariant is walked (`csrc/check.c`), the books are held
against the kernel page by page, and the number of blocks must be that of the model's.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from by_hand import HeapByHand
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shmheap import Block, Heap, StaleHandle
from shmheap.block import Handle

MIB = 1 << 20
SIZES = st.one_of(
    st.integers(1, 600),
    st.sampled_from([1024, 4096, 5000, 8192, 16384, 40_000, 65535, 65536]),
    st.integers(65537, 300_000),
)
NAMES = st.sampled_from(["a", "b", "c", "long " * 40])
PICK = st.integers(0, 1 << 20)


@dataclass(eq=False)
class Model:
    """A block as it ought to be."""

    data: bytearray


@dataclass(eq=False)
class Held:
    """A handle of a user."""

    block: Block
    model: Model
    user: int


@dataclass(eq=False)
class Message:
    """A pickled handle; its lease is there until somebody takes it or its sender ends."""

    handle: Handle
    model: Model
    sender: int
    leased: bool = True


@dataclass
class Machine(RuleBasedStateMachine):
    """The rules; `name` is the heap's."""

    name: str
    held: list[Held] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    roots: dict[str, Model] = field(default_factory=dict)
    stamp: int = 1

    def __post_init__(self) -> None:
        super().__init__()
        self.hand = HeapByHand(self.name, 6 * MIB)
        self.users: list[Heap] = [self.hand.heap, Heap.attach(self.name)]

    def __hash__(self) -> int:
        return id(self)

    def teardown(self) -> None:
        with self.hand:
            assert all(bytes(one.block) == one.model.data for one in self.held)
            self.held.clear()
            self.hand.heap.roots.clear()
            self._end_of_user_1()
            for message in self.messages:
                self._drop_lease(message)
            self.hand.collect(self.stamp)
            self.hand.release()
            assert self.hand.stats.heap_objects == 0
            self.hand.assert_sound()

    # What the model says

    def alive(self) -> set[Model]:
        models = {one.model for one in self.held} | set(self.roots.values())
        return models | {message.model for message in self.messages if message.leased}

    @invariant()
    def both_say_the_same(self) -> None:
        stats = self.hand.stats
        alive = self.alive()
        assert stats.heap_objects == len(alive)
        assert stats.heap_alloc == sum(len(model.data) for model in alive)
        assert stats.leases == sum(message.leased for message in self.messages)
        assert sorted(self.hand.heap.roots) == sorted(self.roots)
        assert stats.processes == 2

    @invariant()
    def nothing_is_torn(self) -> None:
        self.hand.assert_sound()

    # Blocks

    @rule(user=st.integers(0, 1), size=SIZES, fill=st.integers(0, 255))
    def alloc(self, user: int, size: int, fill: int) -> None:
        block = self.users[user]._alloc_once(size, True)
        if not isinstance(block, Block):
            assert self.hand.stats.heap_inuse > 4 * MIB, "it says that it is full"
            return
        assert block.nbytes == size
        assert bytes(block) == bytes(size)
        if fill:
            block[:] = bytes([fill]) * size
        self.held.append(Held(block, Model(bytearray([fill]) * size), user))

    @rule(user=st.integers(0, 1), size=st.sampled_from([16, 100, 256, 1000]), count=st.just(200))
    def alloc_many(self, user: int, size: int, count: int) -> None:
        for number in range(count):
            self.alloc(user, size, number % 256)

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def look(self, pick: int) -> None:
        one = self.held[pick % len(self.held)]
        assert bytes(one.block) == one.model.data

    @precondition(lambda self: self.held)
    @rule(pick=PICK, at=PICK, byte=st.integers(0, 255))
    def write(self, pick: int, at: int, byte: int) -> None:
        one = self.held[pick % len(self.held)]
        at %= len(one.model.data)
        one.block[at] = byte
        one.model.data[at] = byte

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def copy(self, pick: int) -> None:
        one = self.held[pick % len(self.held)]
        self.held.append(Held(one.block.__copy__(), one.model, one.user))

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def free(self, pick: int) -> None:
        one = self.held.pop(pick % len(self.held))
        one.block.free()

    @precondition(lambda self: self.held)
    @rule(step=st.integers(1, 7))
    def drop_many(self, step: int) -> None:
        del self.held[::step]

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def hold_a_view_over_a_collection(self, pick: int) -> None:
        one = self.held.pop(pick % len(self.held))
        view = memoryview(one.block)
        with pytest.raises(BufferError):
            one.block.free()
        self.hand.collect(self.stamp)
        assert view == one.model.data
        view.release()

    # Roots

    @precondition(lambda self: self.held)
    @rule(user=st.integers(0, 1), name=NAMES, pick=PICK)
    def root_set(self, user: int, name: str, pick: int) -> None:
        one = self.held[pick % len(self.held)]
        self.users[user].roots[name] = one.block
        self.roots[name] = one.model

    @rule(user=st.integers(0, 1), name=NAMES)
    def root_get(self, user: int, name: str) -> None:
        block = self.users[user].roots.get(name)
        assert (block is None) == (name not in self.roots)
        if block is not None:
            assert bytes(block) == self.roots[name].data
            self.held.append(Held(block, self.roots[name], user))

    @rule(user=st.integers(0, 1), name=NAMES)
    def root_del(self, user: int, name: str) -> None:
        assert (self.users[user].roots.pop(name, None) is None) == (name not in self.roots)
        self.roots.pop(name, None)

    # Messages

    @precondition(lambda self: self.held)
    @rule(pick=PICK)
    def send(self, pick: int) -> None:
        one = self.held[pick % len(self.held)]
        handle = pickle.loads(pickle.dumps(one.block.lease().handle))
        self.messages.append(Message(handle, one.model, one.user))

    @precondition(lambda self: self.messages)
    @rule(user=st.integers(0, 1), pick=PICK)
    def receive(self, user: int, pick: int) -> None:
        message = self.messages[pick % len(self.messages)]
        there = message.model in self.alive()
        message.leased = False
        try:
            block = self.users[user]._adopt(*message.handle[2:])
        except StaleHandle:
            assert not there
            return
        assert there
        assert bytes(block) == message.model.data
        self.held.append(Held(block, message.model, user))

    @precondition(lambda self: self.messages)
    @rule(pick=PICK)
    def take_back(self, pick: int) -> None:
        self._drop_lease(self.messages.pop(pick % len(self.messages)))

    def _drop_lease(self, message: Message) -> None:
        assert self.hand.heap._drop_lease(*message.handle[2:]) == message.leased

    # Users and coordinator

    @rule()
    def another_user_leaves_and_comes(self) -> None:
        self._end_of_user_1()
        self.users[1] = Heap.attach(self.name)

    def _end_of_user_1(self) -> None:
        """What it held goes, and with the reaper that knows no grace its leases."""
        self.users[1].close()
        self.held = [one for one in self.held if one.user == 0]
        assert self.hand.reap() == 1
        for message in self.messages:
            message.leased &= message.sender == 0

    @rule()
    def collect(self) -> None:
        self.stamp += 1
        assert self.hand.collect(self.stamp) == (0, 0), "counts had freed everything"

    @rule(back=st.integers(0, 4), step=st.sampled_from([1, 100_000, 1 << 40]))
    def release_the_aged(self, back: int, step: int) -> None:
        self.hand.release(max(1, self.stamp - back), step)

    @rule()
    def release_everything(self) -> None:
        self.hand.release()

    @rule(steps=st.integers(0, 4), user=st.integers(0, 1), size=SIZES)
    def coordinator_dies_in_a_cycle(self, steps: int, user: int, size: int) -> None:
        for step in ("start_cycle", "mark", "finish_mark", "sweep")[:steps]:
            getattr(self.hand.steward, step)()
            self.alloc(user, size, 7)  # in whatever phase
            with contextlib.suppress(IndexError):
                self.held.pop(0).block.free()
        phase = self.hand.succeed()
        assert phase == (0, 1, 1, 3, 3)[steps]
        if phase == 3:
            self.hand.steward.sweep()
            self.hand.steward.end_cycle(1 << 40, False, 0)
        else:
            self.hand.collect(self.stamp)


def test_a_heap_is_a_dict(new_heap_name: Callable[[], str]) -> None:
    run_state_machine_as_test(
        lambda: Machine(new_heap_name()),
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
