"""A worker: does anything at random to the heap, and looks at every byte that it may know.

Each block is written once, before anybody else knows of it, with a piece of one long pattern; those
of 16 bytes and more say in their first 8 bytes where the piece begins and how long they are. An
overlap, a use after free, a page given back under its user, shows as a wrong byte.

Imports little: it is also started as a program, again and again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pickle
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under python -P

from soak_board import Board, Field, Meter, Op, Post

import shmheap
from shmheap.coordinator import ASK_GC, ASK_SCAVENGE_AGED, ASK_SCAVENGE_ALL

TRUE = "/bin/true"
STALL_NS = 100_000_000
PATTERN = random.Random("soak").randbytes(1 << 21)
LONGEST = 1 << 20
STAMP_BYTES = 8
TELLING_BYTES = 2 * STAMP_BYTES
HELD_BLOCKS, HELD_BYTES = 64, 4 << 20
NAMES = tuple(f"name {i}" for i in range(12))
ASKS = (ASK_GC, ASK_SCAVENGE_AGED, ASK_SCAVENGE_ALL)

WEIGHTS = {
    Op.CHURN_SMALL: 180,
    Op.CHURN_LARGE: 120,
    Op.KEEP_SMALL: 200,
    Op.KEEP_LARGE: 30,
    Op.DROP: 200,
    Op.POST: 80,
    Op.OPEN: 90,
    Op.LEASE: 30,
    Op.ROOT_SET: 30,
    Op.ROOT_GET: 40,
    Op.ROOT_CLEAR: 15,
    Op.VIEW: 30,
    Op.ASK: 2,
    Op.FORK: 1,
    Op.CLOSE: 1,
    Op.CONTROL: 10,
    Op.HAND_OVER: 1,
}


class WrongError(Exception):
    """A check failed: the heap has not kept a promise."""


class Order(NamedTuple):
    """What a worker is told at its start; all of it goes through JSON."""

    seed: int
    name: str
    heap: str
    row: int
    board_fd: int
    post_fds: tuple[int, int]
    reports: str
    grace_s: float
    nice: int


ENVELOPE = struct.Struct("<qqd")
"""Of a letter: where the piece begins, bytes, and until when (CLOCK_MONOTONIC, s) the pickled
handle that follows must be good; 0 if it need not."""


class Kept(NamedTuple):
    """A block in hand, and where its piece of the pattern begins."""

    block: shmheap.Block | memoryview
    start: int
    nbytes: int


# --------------------------------------------------------------------------------------------------
# Content


def content(start: int, nbytes: int) -> bytes:
    """Return what is in a block whose piece of the pattern begins at `start`."""
    piece = PATTERN[start : start + nbytes]
    if nbytes < TELLING_BYTES:
        return piece
    return (start << 40 | nbytes).to_bytes(STAMP_BYTES, "little") + piece[STAMP_BYTES:]


def require_content(data: shmheap.Block | memoryview, start: int, nbytes: int) -> None:
    """Raise WrongError unless the block has the bytes that were written to it."""
    found, wanted = bytes(data), content(start, nbytes)
    if found == wanted:
        return
    if len(found) != nbytes:
        raise WrongError(f"a block of {nbytes} bytes has {len(found)}: {data!r}")
    at = next(i for i in range(nbytes) if found[i] != wanted[i])
    differing = sum(a != b for a, b in zip(found, wanted, strict=True))
    raise WrongError(
        f"wrong bytes: {differing} of {nbytes}, from byte {at} on: {found[at : at + 16].hex()} "
        f"is not {wanted[at : at + 16].hex()}, in {data!r}"
    )


def stamp_of(block: shmheap.Block) -> tuple[int, int]:
    """Return what a block says of itself: where its piece begins, and its length. Or WrongError."""
    word = int.from_bytes(bytes(block[:STAMP_BYTES]), "little")
    start, nbytes = word >> 40, word & (1 << 40) - 1
    if nbytes != block.nbytes or start + nbytes > len(PATTERN):
        raise WrongError(f"wrong bytes: {block!r} says that it has {nbytes} bytes from {start}")
    return start, nbytes


# --------------------------------------------------------------------------------------------------
# Steps


class Worker:
    """One process that works until it is killed, or until a check fails."""

    def __init__(self, order: Order, heap: shmheap.Heap | None) -> None:
        self._order = order
        self._mail = Post(order.post_fds)
        self._board = Board(order.board_fd)
        self._become(order, heap)

    def _become(self, order: Order, heap: shmheap.Heap | None) -> None:
        self._order = order
        self._random = random.Random(f"{order.seed}/{order.name}")
        self._row = self._board.row(order.row)
        self._row[Field.PID] = os.getpid()
        self._meter = Meter(self._row, STALL_NS)
        self._may_fork = order.row % 2 == 0
        if heap is not None:
            self._heap = heap
        else:
            self._attach()
            self._meter.end()
        self._held: list[Kept] = []
        self._bytes = 0

    def work(self) -> None:
        """Step after step, for ever."""
        steps: dict[Op, Callable[[], None]] = {
            op: getattr(self, f"_{op.name.lower()}") for op in WEIGHTS
        }
        ops, weights = list(WEIGHTS), list(WEIGHTS.values())
        while True:
            for op in self._random.choices(ops, weights, k=64):
                self._meter.begin(op)
                try:
                    steps[op]()
                except shmheap.HeapFull:
                    self._row[Field.FULL] += 1
                self._meter.end()

    # Memory

    def _size(self) -> int:
        return int(2 ** self._random.uniform(0, 15))

    def _large_size(self) -> int:
        return int(2 ** self._random.uniform(15, 20))

    def _churn_small(self) -> None:
        alloc, n = self._heap.alloc, self._size()
        for _ in repeat(None, 400):
            alloc(n, zero=False)

    def _churn_large(self) -> None:
        alloc, n = self._heap.alloc, self._large_size()
        for _ in repeat(None, 4):
            alloc(n, zero=False)

    def _keep_small(self) -> None:
        self._keep(self._size())

    def _keep_large(self) -> None:
        self._keep(self._large_size())

    def _keep(self, nbytes: int) -> None:
        while self._held and (len(self._held) >= HELD_BLOCKS or self._bytes > HELD_BYTES):
            self._drop()
        zero = self._random.random() < 0.5
        block = self._heap.alloc(nbytes, zero=zero)
        if zero and bytes(block) != bytes(nbytes):
            raise WrongError(f"not zeroed: {block!r}")
        start = self._random.randrange(len(PATTERN) - LONGEST)
        memoryview(block)[:] = content(start, nbytes)
        self._hold(block, start, nbytes)

    def _hold(self, block: shmheap.Block | memoryview, start: int, nbytes: int) -> None:
        self._held.append(Kept(block, start, nbytes))
        self._bytes += nbytes

    def _drop(self) -> None:
        if not self._held:
            return
        kept = self._held.pop(self._random.randrange(len(self._held)))
        self._bytes -= kept.nbytes
        self._look(kept)

    def _look(self, kept: Kept) -> None:
        require_content(*kept)
        self._row[Field.CHECKED] += 1

    def _view(self) -> None:
        """A handle is dropped while a buffer of it lives on."""
        if found := self._some_block():
            block, kept = found
            self._held.remove(kept)
            self._held.append(kept._replace(block=memoryview(block)))

    def _some_block(self) -> tuple[shmheap.Block, Kept] | None:
        """Choose something in hand that is a handle, not only a buffer."""
        kept = self._random.choice(self._held) if self._held else None
        if kept is None or not isinstance(kept.block, shmheap.Block):
            return None
        return kept.block, kept

    # Handles

    def _post(self) -> None:
        found = self._some_block()
        if found is None:
            return
        block, kept = found
        if self._random.random() < 0.2:
            self._post_and_recall(block.lease(), kept)
            return
        sure_until_s = time.monotonic() + self._order.grace_s
        letter = ENVELOPE.pack(kept.start, kept.nbytes, sure_until_s) + pickle.dumps(block)
        if not self._mail.send(letter):
            self._open_letter(letter)  # or else its lease would last as long as we do

    def _post_and_recall(self, lease: shmheap.Lease, kept: Kept) -> None:
        """Send a lease, and end it when it may be taken, or not."""
        letter = ENVELOPE.pack(kept.start, kept.nbytes, 0.0) + pickle.dumps(lease)
        if not self._mail.send(letter) or self._random.random() < 0.5:
            lease.release()

    def _open(self) -> None:
        letter = self._mail.take()
        opened = None if letter is None else self._open_letter(letter)
        if letter is None or opened is None:
            return
        if self._random.random() < 0.2:  # the same handle once more: good while the block lives
            envelope = ENVELOPE.pack(opened.start, opened.nbytes, 0.0)
            self._mail.send(envelope + letter[ENVELOPE.size :])
        if self._random.random() < 0.5 and len(self._held) < HELD_BLOCKS:
            self._hold(*opened)

    def _open_letter(self, letter: bytes) -> Kept | None:
        opened = open_letter(letter)
        self._row[Field.OPENED if opened else Field.STALE] += 1
        return opened

    def _lease(self) -> None:
        found = self._some_block()
        if found is None:
            return
        block, kept = found
        with block.lease() as lease:
            if self._random.random() < 0.5:
                self._look(kept._replace(block=lease.take()))

    # Names

    def _root_set(self) -> None:
        found = self._some_block()
        if found and found[1].nbytes >= TELLING_BYTES:
            self._heap.roots[self._random.choice(NAMES)] = found[0]

    def _root_get(self) -> None:
        block = self._heap.roots.get(self._random.choice(NAMES))
        if block is not None:
            self._look(Kept(block, *stamp_of(block)))

    def _root_clear(self) -> None:
        self._heap.roots.pop(self._random.choice(NAMES), None)

    # Life

    def _ask(self) -> None:
        """Ask the coordinator for something, and do not wait for it."""
        self._heap._request(self._random.choice(ASKS))

    def _fork(self) -> None:
        """A child that outlives its parent: which of the two is killed first is chance."""
        if not self._may_fork:
            return
        self._may_fork = False
        self._row[Field.FORKING] = 1
        if os.fork() != 0:
            return
        self._meter.close()
        order = self._order
        held, nbytes = self._held, self._bytes
        self._become(order._replace(row=order.row + 1, name=order.name + "'"), self._heap)
        self._held, self._bytes = held, nbytes
        for kept in held:
            self._look(kept)
        self._meter.begin(Op.FORK)

    def _close(self) -> None:
        """Leave in order, and come again; a forked worker so becomes one that has attached."""
        for kept in self._held:
            self._look(kept)
        self._held.clear()
        self._bytes = 0
        self._heap.close()
        self._meter.end()
        self._attach()

    def _attach(self) -> None:
        self._meter.begin(Op.ATTACH)
        self._heap = shmheap.Heap._attach_path(self._order.heap, "soak")

    def _control(self) -> None:
        """Touches no heap: what the machine does to a step."""
        require_content(memoryview(content(4096, 65536)), 4096, 65536)

    def _hand_over(self) -> None:
        """Touches no heap and waits for another process, which may have no CPU either."""
        os.waitpid(os.posix_spawn(TRUE, [TRUE], {}), 0)


def open_letter(letter: bytes) -> Kept | None:
    """Return what is in it, its bytes looked at; None if the block is gone, as it may be by now.

    Raises WrongError if it was promised to be there, or is not what was sent.
    """
    start, nbytes, sure_until_s = ENVELOPE.unpack_from(letter)
    try:
        block: shmheap.Block = pickle.loads(letter[ENVELOPE.size :])
    except shmheap.StaleHandle as error:
        if time.monotonic() < sure_until_s:
            raise WrongError(f"a handle was refused within the grace: {error}") from error
        return None
    require_content(block, start, nbytes)
    return Kept(block, start, nbytes)


# --------------------------------------------------------------------------------------------------
# The process


def run(order: Order, heap: shmheap.Heap | None) -> NoReturn:
    """Be a worker until killed; after a failed check say so and stop, with all that is held."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(PermissionError):  # not our parent's rank: see soak_proc.go_first
        os.setpriority(os.PRIO_PROCESS, 0, order.nice)
    faults = open(Path(order.reports, f"{os.getpid()}.fault"), "w")  # noqa: SIM115
    faulthandler.enable(faults)
    try:
        Worker(order, heap).work()
    except BaseException as error:
        report(order, error)
        os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(1)


def report(order: Order, error: BaseException) -> None:
    """Say what was wrong, in a file that is there whole or not at all."""
    rows = Board(order.board_fd)
    row = next(
        (row for row in map(rows.row, (order.row, order.row + 1)) if row[Field.PID] == os.getpid()),
        rows.row(order.row),
    )
    found = {
        "seed": order.seed,
        "worker": order.name,
        "pid": os.getpid(),
        "step": row[Field.STEPS],
        "operation": Op(row[Field.OP]).name,
        "error": f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exc(),
    }
    part = Path(order.reports, f"{os.getpid()}.part")
    part.write_text(json.dumps(found))
    part.rename(part.with_suffix(".json"))


def main(argument: str) -> NoReturn:
    """Be a worker that was started as a program, with its order as JSON."""
    fields = json.loads(argument)
    run(Order(**fields), None)


if __name__ == "__main__":
    main(sys.argv[1])
