"""A heap whose coordinator is the test: each step of a collection or release is one call.

No process is started, and stamps are numbers that the test chooses, so what becomes of which page
is exact.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from shmheap import Config, GCReport, Heap, HeapStats, _core, arena, rss
from shmheap.coordinator import ASK_GC, FREE, Clock, SlotKey
from shmheap.coordinator.loop import Coordinator, Outcome
from shmheap.coordinator.trace import Trace
from shmheap.verify import VerifyReport, verify

PAGE = 8192
"""A page of the heap, bytes, where the OS page is 4 KiB."""

EVERYTHING = 2**29 - 1
"""The stamp that takes every idle unit, those without a stamp too."""

PLENTY = 1 << 40


SLOTS = -(-_core.HEADER_BYTES // 4096) * 4096
SLOT_BYTES = 256
"""Where the slots of processes are in the file; see csrc/layout.h."""

PATIENCE_S = 60.0
"""Bounds how long a broken test hangs, and decides no test's outcome."""


class _NeverWaits:
    """The test makes the coordinator's turns, so it never sleeps."""

    def wait(self, _timeout_s: float, _processes: Mapping[SlotKey, int], /) -> Collection[SlotKey]:
        return ()


class HeapByHand:
    """A heap of the calling process with a `Steward` beside it; a context manager.

    Args:
        name: of the heap.
        capacity: bytes.
        config: the heap's; the test does what it says.
        clock: of the coordinator's loop.
    """

    def __init__(
        self,
        name: str,
        capacity: int = 64 << 20,
        config: Config | None = None,
        clock: Clock = time,
    ) -> None:
        config = config or Config()
        self.path = arena.file_path(name, config.directory)
        self.fd = arena.make_file(self.path, capacity, config)
        self.steward = _core.Steward(self.fd)  # first: the heap would start a coordinator
        arena.give_name(self.fd, self.path)
        self.steward.begin()
        heap = Heap._attached(os.dup(self.fd), self.path, name)
        assert heap is not None
        self.heap = heap
        self.observer = _core.Observer(self.fd)
        self.log = logging.Logger("by hand")
        self._coordinator = Coordinator(
            self.steward, config, clock, _NeverWaits(), Trace(None), self.log, linger=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.heap.close()
        self.observer.close()
        self.steward.close()
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self.fd), os.stat(self.path)):
                os.unlink(self.path)
        os.close(self.fd)

    def turn(self) -> Outcome:
        """One turn of the real coordinator's loop."""
        return self._coordinator.turn()

    def gc(self) -> GCReport:
        """What heap.gc() returns, from the loop's next turn."""
        ticket = self.heap._request(ASK_GC)
        self.turn()
        fields = self.heap._await(ASK_GC, ticket, 0)
        assert fields is not None
        return GCReport.from_fields(fields[:9])

    def turns_until(self, happened: Callable[[], object]) -> None:
        """Be the coordinator until something has happened in another process."""
        given_up = time.monotonic() + PATIENCE_S
        while not happened():
            assert time.monotonic() < given_up, "it does not happen"
            self.turn()

    @property
    def waiting(self) -> int:
        """How many processes wait for memory."""
        return sum(bool(slot[-1]) for slot in self.steward.slots())

    @property
    def stats(self) -> HeapStats:
        return self.heap.stats()

    def succeed(self) -> int:
        """The coordinator is gone, and another takes over; returns the phase it found."""
        self.steward.close()
        self.steward = _core.Steward(self.fd)
        return self.steward.begin()

    def collect(self, stamp: int = 1) -> tuple[int, int]:
        """A whole cycle, whose stamp is `stamp`. Returns blocks and bytes freed."""
        self.steward.start_cycle()
        self.steward.mark()
        self.steward.finish_mark()
        blocks, nbytes, _ = self.steward.sweep()
        self.steward.stamp(stamp)
        self.steward.end_cycle(1 << 40, False, 0)
        return blocks, nbytes

    def release(self, stamp_le: int = EVERYTHING, max_bytes: int = PLENTY) -> int:
        """Give back all that is due, in steps of about `max_bytes`. Returns bytes."""
        total, _, page = self.steward.release(stamp_le, max_bytes, 0)
        while page:
            nbytes, _, page = self.steward.release(stamp_le, max_bytes, page)
            total += nbytes
        return total

    def reap(self, lease_cutoff_ns: int | None = None) -> int:
        """Take what the dead held; by default their leases too. Returns how many are done with."""
        cutoff_ns = time.monotonic_ns() if lease_cutoff_ns is None else lease_cutoff_ns
        gone = [
            slot[0]
            for slot in self.steward.slots()
            if slot[1] != FREE and not self.steward.alive(slot[0])
        ]
        return sum(self.steward.reap(number, cutoff_ns)[-1] for number in gone)

    def verify(self) -> VerifyReport:
        """Hold the books against the kernel; nothing else is going on."""
        return verify(self.fd, self.observer.books())

    def held(self, offset: int, nbytes: int) -> int:
        """What the kernel holds of a range of the data area, bytes."""
        data_offset = self.observer.books()[1]
        return rss.witness_for(self.fd).held(data_offset + offset, nbytes)

    def assert_sound(self) -> None:
        """Books agree with the kernel page by page (I-10), the sums with both; all invariants."""
        report = self.verify()
        assert report.agrees, [str(wrong) for wrong in report.mismatches[:8]]
        stats = self.stats
        assert stats.heap_idle + stats.heap_inuse == stats.heap_sys
        assert stats.heap_sys - stats.heap_released == report.books_held_bytes
        if report.exact:
            assert report.books_held_bytes == report.kernel_held_bytes
        assert self.heap._check() == []


@contextmanager
def stopped(hand: HeapByHand, slot: int) -> Iterator[None]:
    """The process of that slot is inside an operation, and stays there."""
    (incarnation,) = (row[3] for row in hand.steward.slots() if row[0] == slot)
    holder = slot << 43 | (incarnation & 0x7FFF) << 28 | 1
    os.pwrite(hand.fd, struct.pack("<Q", holder), SLOTS + slot * SLOT_BYTES)
    try:
        yield
    finally:
        os.pwrite(hand.fd, struct.pack("<Q", 0), SLOTS + slot * SLOT_BYTES)
