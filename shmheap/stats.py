"""What a heap tells about itself: frozen values, named as in the Go runtime where it has a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "GCReport",
    "GCTrigger",
    "HeapStats",
    "PoolStats",
    "ScavengeReport",
    "ScavengeTrigger",
    "Traffic",
]

GCTrigger = Literal["asked", "heap", "forced", "memory"]
ScavengeTrigger = Literal["asked", "aged", "memory"]

# Reports travel through the heap as integers: a trigger is its place in these. Append only.
_GC_TRIGGERS: tuple[GCTrigger, ...] = ("asked", "heap", "forced", "memory")
_SCAVENGE_TRIGGERS: tuple[ScavengeTrigger, ...] = ("asked", "aged", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeapStats:
    """One look at a heap, from ``heap.stats()``. Bytes unless said, times CLOCK_MONOTONIC ns.

    Attributes:
        heap_sys: high-water mark of the data area: ``heap_idle + heap_inuse``.
        heap_idle: in free spans, released or not.
        heap_inuse: in spans in use.
        heap_released: not held by the kernel below the high-water mark: given back, or never
            touched. May include holes inside spans in use.
        heap_objects: number of live blocks.
        heap_alloc: in live blocks.
        mallocs: number of blocks ever allocated.
        frees: number of blocks ever freed.
        next_gc: a collection starts when ``heap_alloc`` reaches this; 2**63 - 1: never.
        last_gc: when the last collection ended, ns; 0: never.
        num_gc: number of collections.
        num_forced_gc: number of them that were forced because none had run for long.
        pause_total_ns: sum of ``pause_ns`` over all collections.
        pause_ns: for each of the last 256 collections, oldest first, the longest that it can have
            kept a process waiting.
        leases: number of pickled handles on their way.
        oldest_lease_s: age of the oldest that the last collection saw, seconds; 0 if there is none.
        capacity: size of the data area.
        committed_bytes: of the data area that the kernel holds.
        metadata_bytes: of tables (records, page map, block words) that the kernel holds; pins are
            spans of the data area and in heap_inuse.
        pins: number of handles, over all processes.
        processes: number of processes that use the heap.
    """

    heap_sys: int
    heap_idle: int
    heap_inuse: int
    heap_released: int
    heap_objects: int
    heap_alloc: int
    mallocs: int
    frees: int
    next_gc: int
    last_gc: int
    num_gc: int
    num_forced_gc: int
    pause_total_ns: int
    pause_ns: tuple[int, ...]
    leases: int
    oldest_lease_s: float
    capacity: int
    committed_bytes: int
    metadata_bytes: int
    pins: int
    processes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GCReport:
    """What one collection did, from ``heap.gc()``.

    Attributes:
        cycle: number of the collection, from 1.
        trigger: why it ran: "asked", "heap" (``heap_alloc`` reached ``next_gc``), "forced" (none
            had run for ``Config.forced_gc_s``), "memory" (somebody met a limit).
        marked: number of blocks found in use.
        swept: number of blocks that nobody held any more.
        freed_bytes: bytes of the blocks swept: cycles, and what deaths had left.
        freed_dead_bytes: bytes freed since the collection before, because their holders had died.
        freed_lease_bytes: the same, because a lease ran out: that of a dead sender, or one older
            than ``Config.lease_max_s``.
        pause_max_ns: the longest that it can have kept a process waiting: by that process's lock
            or one of all, or, if that unpickled a handle without a lease, by the end of marking.
        duration_ns: from its start to its end.
    """

    cycle: int
    trigger: GCTrigger
    marked: int
    swept: int
    freed_bytes: int
    freed_dead_bytes: int
    freed_lease_bytes: int
    pause_max_ns: int
    duration_ns: int

    def as_fields(self) -> tuple[int, ...]:
        """Return the report as the integers that ``from_fields`` reads."""
        return (
            self.cycle,
            _GC_TRIGGERS.index(self.trigger),
            self.marked,
            self.swept,
            self.freed_bytes,
            self.freed_dead_bytes,
            self.freed_lease_bytes,
            self.pause_max_ns,
            self.duration_ns,
        )

    @classmethod
    def from_fields(cls, numbers: Sequence[int]) -> GCReport:
        """Return the report that ``as_fields`` wrote. ValueError: another number of fields."""
        cycle, trigger, marked, swept, freed, dead, lease, pause, duration = numbers
        return cls(
            cycle=cycle,
            trigger=_GC_TRIGGERS[trigger],
            marked=marked,
            swept=swept,
            freed_bytes=freed,
            freed_dead_bytes=dead,
            freed_lease_bytes=lease,
            pause_max_ns=pause,
            duration_ns=duration,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScavengeReport:
    """What one walk of the scavenger gave back, from ``heap.scavenge()``.

    Attributes:
        released_bytes: bytes given back to the operating system.
        runs: number of runs of pages that they were in, a system call each.
        duration_ns: from its start to its end.
        trigger: why it ran: "asked", "aged" (the regular walk), "memory" (a limit was met).
    """

    released_bytes: int
    runs: int
    duration_ns: int
    trigger: ScavengeTrigger

    def as_fields(self) -> tuple[int, ...]:
        """Return the report as the integers that ``from_fields`` reads."""
        trigger = _SCAVENGE_TRIGGERS.index(self.trigger)
        return (self.released_bytes, self.runs, self.duration_ns, trigger)

    @classmethod
    def from_fields(cls, numbers: Sequence[int]) -> ScavengeReport:
        """Return the report that ``as_fields`` wrote. ValueError: another number of fields."""
        released, runs, duration, trigger = numbers
        return cls(
            released_bytes=released,
            runs=runs,
            duration_ns=duration,
            trigger=_SCAVENGE_TRIGGERS[trigger],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What became of the buffers of all arguments, or of all results, of a pool.

    Attributes:
        handle_bytes: lay in a heap already, and were sent by handle.
        copied_bytes: were copied into the heap first; pickles of many bytes, too.
        small_buffers, small_bytes: had fewer than ``min_bytes``: through the pipe.
        refused_bytes: through the pipe, because the heap had no room.
    """

    handle_bytes: int = 0
    copied_bytes: int = 0
    small_buffers: int = 0
    small_bytes: int = 0
    refused_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """What a pool did so far, from ``pool.stats()``.

    Attributes:
        arguments, results: what became of their buffers.
        tasks: number of tasks that were sent to workers; a chunk is one.
        lost: number of those that failed because their worker died.
    """

    arguments: Traffic
    results: Traffic
    tasks: int
    lost: int
