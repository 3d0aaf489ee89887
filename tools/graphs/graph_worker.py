"""A worker: changes a graph that others change too, and looks at what it comes by.

The first reference of each node leads to its label, a leaf that says the node's number and fills
itself with it. The number tells how many more references the node has. So whoever gets to a node
knows what it must find there: a node that was freed while it could be reached, or whose place is
another block's, has no label, or another one.
"""

from __future__ import annotations

import pickle
import random
import struct
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

from soak_board import Post

import shmheap

HANDS = 32
KNOWN = 64
NAMES = tuple(b"root %d" % i for i in range(24))
LABEL_BYTES = 8
WIDTH_BITS, WORKER_BITS = 12, 4
MOST_REFS, MANY_REFS = 8, 300
"""Of a node; so many now and then that its end takes the core several slices."""

LETTER = struct.Struct("<QQQ")
"""What comes before a pickled handle: offset and generation of the node, and its number."""

WEIGHTS = {
    "make": 14,
    "load": 20,
    "store": 25,
    "replace": 10,
    "clear": 8,
    "drop": 6,
    "ring": 2,
    "root_set": 3,
    "root_get": 4,
    "root_clear": 1,
    "send": 3,
    "take": 3,
    "reopen": 3,
}
MANY_ONE_IN = 400
"""Of the nodes that are made, one has so many references."""


class WrongError(Exception):
    """A check failed: the heap has not kept a promise."""


class Held(NamedTuple):
    """A node in hand, and the number that its label must say."""

    node: shmheap.Block
    number: int


Place = tuple[int, int, int]
"""Offset, generation and number of a node."""


class Report(NamedTuple):
    """What a worker says when it stands still."""

    held: list[Place]
    counts: dict[str, int]


# --------------------------------------------------------------------------------------------------
# Labels


def label(number: int) -> bytes:
    """Return what is in the leaf of the node of that number."""
    return number.to_bytes(LABEL_BYTES, "little") * (1 + number % 5)


def number_of(heap: shmheap.Heap, node: shmheap.Block) -> int:
    """Return a node's number. Raises WrongError if what is there is no label."""
    leaf = heap._node_load(node, 0)
    data = b"" if leaf is None else bytes(leaf)
    number = int.from_bytes(data[:LABEL_BYTES], "little")
    if leaf is None or data != label(number):
        raise WrongError(f"{node!r} has no label, but {leaf!r}: {data.hex()}")
    return number


def require_number(heap: shmheap.Heap, held: Held) -> None:
    """Raise WrongError unless the node is the one it was."""
    found = number_of(heap, held.node)
    if found != held.number:
        raise WrongError(f"{held.node!r} was node {held.number:#x} and is {found:#x}")


def width_of(number: int) -> int:
    """Return how many references a node has behind its label."""
    return number & (1 << WIDTH_BITS) - 1


def place_of(held: Held) -> Place:
    """Return what finds the node again."""
    return held.node.offset, held.node.generation, held.number


# --------------------------------------------------------------------------------------------------
# Steps


class Worker:
    """One process that changes the graph.

    Args:
        heap: the heap, attached.
        number: of the worker, from 0.
        seed: of all that is done at random.
        post: letters from one worker to another.
    """

    def __init__(self, heap: shmheap.Heap, number: int, seed: int, post: Post) -> None:
        self._heap, self._post = heap, post
        self._random = random.Random(f"{seed}/{number}")
        self._bits = self._random.getrandbits
        self._next = number << WIDTH_BITS
        self._known: list[Place] = []
        self._changes = self._looks = self._stale = self._reopened = 0
        self._hands = [self._new_node() for _ in range(HANDS)]

    def work(self, steps: int, cut: bool) -> dict[str, int]:
        """Do so many steps. Returns how often what was done."""
        if cut:
            self._cut()
        self._changes = self._looks = self._stale = self._reopened = 0
        done: dict[str, Callable[[int], None]] = {
            name: getattr(self, f"_{name}") for name in WEIGHTS
        }
        bits = self._bits
        for step in self._random.choices(list(done.values()), list(WEIGHTS.values()), k=steps):
            step(bits(30))
        return {
            "mutations": self._changes,
            "looks": self._looks,
            "stale": self._stale,
            "reopened": self._reopened,
        }

    def places(self) -> list[Place]:
        """Say what is in hand."""
        return [place_of(held) for held in self._hands]

    def _cut(self) -> None:
        """Let go of all names, all letters and what is in hand: most of the graph is garbage."""
        let_go(self._heap, self._post)
        for hand in range(HANDS):
            self._put(hand, self._new_node())

    # A step's argument is random: bits for one hand, another, and a reference.

    def _put(self, hand: int, held: Held) -> None:
        """Take something in hand, and let go of what was in it, which must be what it was."""
        before = self._hands[hand]
        require_number(self._heap, before)
        self._looks += 1
        if len(self._known) < KNOWN:
            self._known.append(place_of(before))
        self._hands[hand] = held

    def _some_ref(self, bits: int) -> tuple[shmheap.Block, int]:
        node, number = self._hands[bits & 31]
        return node, 1 + (bits >> 10) % width_of(number)

    def _new_node(self, refs: int = MOST_REFS) -> Held:
        self._next += 1 << WIDTH_BITS + WORKER_BITS
        number = self._next | refs
        leaf = self._heap.put(label(number))
        node = self._heap._node_new(1 + refs)
        self._heap._node_store(node, 0, leaf)
        self._changes += 1
        return Held(node, number)

    def _make(self, bits: int) -> None:
        many = (bits >> 10) % MANY_ONE_IN == 0
        made = self._new_node(MANY_REFS if many else 1 + (bits >> 10) % MOST_REFS)
        if many:
            self._fill(made, self._hands[bits >> 5 & 31].node)
        self._put(bits & 31, made)

    def _fill(self, held: Held, node: shmheap.Block) -> None:
        for ref in range(1, 1 + MANY_REFS):
            self._heap._node_store(held.node, ref, node)
        self._changes += MANY_REFS

    def _load(self, bits: int) -> None:
        node = self._heap._node_load(*self._some_ref(bits))
        if node is not None:
            self._put(bits >> 5 & 31, Held(node, number_of(self._heap, node)))

    def _store(self, bits: int) -> None:
        """Blindly: who looks at a reference first touches the block."""
        self._heap._node_store(*self._some_ref(bits), self._hands[bits >> 5 & 31].node)
        self._changes += 1

    def _replace(self, bits: int) -> None:
        before = self._heap._node_load(*self._some_ref(bits))
        self._store(bits)
        if before is not None:
            number_of(self._heap, before)

    def _clear(self, bits: int) -> None:
        self._heap._node_store(*self._some_ref(bits), None)
        self._changes += 1

    def _drop(self, bits: int) -> None:
        """In its place the hand holds what another does."""
        self._put(bits & 31, self._hands[bits >> 5 & 31])

    def _ring(self, bits: int) -> None:
        """Nodes that hold each other, held by one reference, or by nothing."""
        ring = [self._new_node() for _ in range(1 + (bits >> 10) % 4)]
        for i, held in enumerate(ring):
            self._heap._node_store(held.node, 1, ring[i - 1].node)
        self._changes += len(ring)
        if bits >> 20 & 1:
            self._heap._node_store(*self._some_ref(bits), ring[0].node)
            self._changes += 1

    # Names

    def _root_set(self, bits: int) -> None:
        self._heap._root_set(NAMES[(bits >> 5) % len(NAMES)], self._hands[bits & 31].node)
        self._changes += 1

    def _root_get(self, bits: int) -> None:
        node = self._heap._root_get(NAMES[(bits >> 5) % len(NAMES)])
        if node is not None:
            self._put(bits & 31, Held(node, number_of(self._heap, node)))

    def _root_clear(self, bits: int) -> None:
        self._changes += self._heap._root_clear(NAMES[(bits >> 5) % len(NAMES)])

    # Handles

    def _send(self, bits: int) -> None:
        """Keep it no longer: perhaps the letter's lease alone holds it."""
        held = self._hands[bits & 31]
        letter = LETTER.pack(*place_of(held)) + pickle.dumps(held.node)
        if not self._post.send(letter):
            open_letter(self._heap, letter)  # or else its lease would last as long as we do
        self._drop(bits)
        self._changes += 1

    def _take(self, bits: int) -> None:
        letter = self._post.take()
        if letter is not None:
            self._put(bits & 31, open_letter(self._heap, letter))
            self._changes += 1

    def _reopen(self, bits: int) -> None:
        """By a handle without a lease, of what was let go: perhaps it is gone."""
        if not self._known:
            return
        offset, generation, number = self._known.pop((bits >> 5) % len(self._known))
        try:
            held = Held(self._heap._adopt(offset, generation, 0, 0), number)
        except shmheap.StaleHandle:
            self._stale += 1
            return
        require_number(self._heap, held)
        self._put(bits & 31, held)
        self._reopened += 1


def open_letter(heap: shmheap.Heap, letter: bytes) -> Held:
    """Take what is in it. Nobody else has read it, so its lease must be there."""
    *_, number = LETTER.unpack_from(letter)
    held = Held(pickle.loads(letter[LETTER.size :]), number)
    require_number(heap, held)
    return held


def let_go(heap: shmheap.Heap, post: Post) -> None:
    """Clear all names, and drop what is under way."""
    for name in NAMES:
        heap._root_clear(name)
    for letter in iter(post.take, None):
        open_letter(heap, letter)


# --------------------------------------------------------------------------------------------------
# The process


def work(connection: Connection, number: int, seed: int, post: Post) -> None:
    """Be a worker: work as told and say what is held, again and again, until told to leave.

    A failure is said instead, as text.
    """
    try:
        heap = connection.recv()
        worker = Worker(heap, number, seed, post)
        while order := connection.recv():
            counts = worker.work(*order)
            connection.send(Report(worker.places(), counts))
        del worker
        heap.close()
    except Exception:
        connection.send(traceback.format_exc())
