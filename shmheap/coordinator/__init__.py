"""The coordinator: the one process of a heap that reaps the dead, collects and scavenges.

General layout:

    pacing       the policy, in pure functions: is it due, how much, how long to sleep
    loop         one turn after another: reap, collect, scavenge, answer, leave
    reaper       who has died, and what becomes of what they held
    collector    one cycle of the garbage collector
    scavenger    one walk that gives idle pages back
    stale        heaps whose processes were all killed at once
    trace        the scavenger's three lines
    process      the process around it: start, singleton, doorbell, signals, end

This file holds the words that these share: what the loop asks of the heap (`Steward`, which
`shmheap._core` implements in C), of the time and of sleep. C takes no decision and Python touches
no shared byte; everything is injected, so that the policy is tested on fake time and a fake heap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from shmheap import _core

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

__all__ = ["Clock", "Slot", "SlotKey", "Steward", "Wakeup"]

# State of a process slot.
FREE: Final = _core.SLOT_FREE
LIVE: Final = _core.SLOT_LIVE
DETACHED: Final = _core.SLOT_DETACHED  # by its process; leases or exported buffers may remain
DEAD: Final = _core.SLOT_DEAD  # being reaped

# Phase of a collection (DESIGN: block words are touched in all but IDLE).
IDLE: Final = _core.PHASE_IDLE
MARK: Final = _core.PHASE_MARK
FINAL: Final = _core.PHASE_FINAL
SWEEP: Final = _core.PHASE_SWEEP

# What wakes the coordinator, a bit each. But for WANT_MEMORY they only ring: tickets, slots and
# stats say what is to be done.
WANT_GC: Final = _core.WANT_GC
WANT_SCAVENGE: Final = _core.WANT_SCAVENGE
WANT_MEMORY: Final = _core.WANT_MEMORY  # somebody waits for memory, or met the limit
WANT_REAP: Final = _core.WANT_REAP
WANT_LEAVE: Final = _core.WANT_LEAVE
WANT_LIMIT: Final = _core.WANT_LIMIT  # much was taken since the limit was looked at

# What can be asked for by ticket.
ASK_GC: Final = _core.ASK_GC
ASK_SCAVENGE_AGED: Final = _core.ASK_SCAVENGE_AGED
ASK_SCAVENGE_ALL: Final = _core.ASK_SCAVENGE_ALL
ASKS: Final = (ASK_GC, ASK_SCAVENGE_AGED, ASK_SCAVENGE_ALL)

SlotKey = tuple[int, int]
"""(number, incarnation): names one use of a slot by one process, unlike a pid, for ever."""


class Slot(NamedTuple):
    """A look at one process slot."""

    number: int
    state: int
    pid: int
    incarnation: int
    pins: int
    leases: int
    waiting: int  # its threads that wait for memory

    @property
    def key(self) -> SlotKey:
        """What names this use of the slot."""
        return (self.number, self.incarnation)


class Clock(Protocol):
    """Where the time comes from; the `time` module is one."""

    def monotonic_ns(self) -> int:
        """Return CLOCK_MONOTONIC in ns."""


class Wakeup(Protocol):
    """How the coordinator sleeps."""

    def wait(self, timeout_s: float, processes: Mapping[SlotKey, int], /) -> Collection[SlotKey]:
        """Sleep until the doorbell rings, one of the processes (pids) exits, or the time is up.

        Returns those that have exited. One that is reported and asked for again may be reported
        again at once.
        """


class Steward(Protocol):
    """The coordinator's hold on an arena. Pauses: the longest that one process's lock was held."""

    @property
    def nonce(self) -> int:
        """The arena's nonce."""

    def close(self) -> None:
        """Let go of the arena."""

    def stats(self) -> dict[str, Any]:
        """Return the fields of `HeapStats`."""

    def begin(self) -> int:
        """Take over: finish what a dead coordinator left half released. Return the phase found."""

    def set_patience(self, ms: int, /) -> None:
        """Say how long to wait for a process that was stopped inside an operation, all in all.

        Each call below raises TimeoutError where that was not long enough; it may be repeated. The
        first wait that was in vain spends it: those after it are short, until it is set again.
        """

    def now_stamp(self) -> int:
        """Return the time as pages are stamped with it: 0.1 s since the heap's creation, + 1."""

    # Processes

    def slots(self) -> Sequence[tuple[int, int, int, int, int, int, int]]:
        """Return every slot, as the fields of `Slot`; those that are FREE may be left out."""

    def alive(self, index: int, /) -> bool:
        """Probe the slot's liveness lock (I-8)."""

    def reap(self, index: int, lease_cutoff_ns: int, /) -> tuple[int, int, int, int, int, bool]:
        """Take from a process that `alive` said is dead its pins and spans, and old leases.

        Leases made before the cutoff (CLOCK_MONOTONIC ns) are expired, younger ones stay. Not in
        the middle of a cycle that goes on. May be repeated until done; what was taken is counted
        once.

        Returns:
            pins, leases, spans, bytes freed by the pins, bytes freed by the leases, and whether the
            slot is FREE now. It is not only while younger leases remain.
        """

    def expire_leases(self, cutoff_ns: int, /) -> tuple[int, int, int]:
        """Drop every lease made before the cutoff (CLOCK_MONOTONIC ns), also of the living.

        Not in the middle of a cycle. Return how many, bytes freed with them, pause.
        """

    def users(self) -> int:
        """Return how many slots are LIVE or have leases."""

    def try_close(self) -> bool:
        """Close the heap for ever if it has no users, under the registry lock."""

    def refuse_waiters(self) -> int:
        """Wake every waiter with an error if rule 16 holds; return how many."""

    # Requests

    def take_wants(self) -> int:
        """Return and clear the WANT bits: the next want rings again."""

    def pending(self, kind: int, /) -> int:
        """Return the newest ticket of the kind that has no answer, 0 if there is none."""

    def finish(self, kind: int, ticket: int, fields: Sequence[int], /) -> None:
        """Answer every ticket of the kind up to this one, and wake who waits for them."""

    # Collecting, in this order

    def start_cycle(self) -> int:
        """Flip all to IDLE, new epoch, clear marks, flip all to MARK. Return the pause, ns."""

    def mark(self) -> tuple[int, int]:
        """Scan roots, leases and pins of every slot not reaped, trace. Return blocks, pause."""

    def finish_mark(self) -> tuple[int, int]:
        """Flip to FINAL, trace what was touched, flip to SWEEP. Return further blocks, pause."""

    def sweep(self) -> tuple[int, int, int]:
        """Free what is neither marked nor touched. Return blocks, bytes, pause."""

    def stamp(self, stamp: int, /) -> int:
        """Give the stamp to every idle unit that has none (S4); return how many."""

    def end_cycle(self, next_gc_bytes: int, forced: bool, pause_ns: int, /) -> int:
        """Record the cycle (last_gc, num_gc, pauses with its own), go IDLE. Return its pause."""

    def closing(self) -> bool:
        """Return whether the heap is closed for ever."""

    def set_next_gc(self, nbytes: int, /) -> None:
        """Say at which heap_alloc a collection is due, and have whoever takes pages ask then."""

    def set_limit(self, limit_bytes: int, look_bytes: int, /) -> None:
        """Say how much the heap may hold, and with how much to ring again (WANT_LIMIT)."""

    # Scavenging

    def release(self, stamp_le: int, max_bytes: int, page: int, /) -> tuple[int, int, int]:
        """Give back runs of idle units with stamps in 1..stamp_le, about max_bytes of them.

        `pacing.EVERYTHING` takes units without a stamp, too. The walk begins at `page`. Returns
        bytes, runs, and the page at which to go on: 0 at the end of the walk.
        """
