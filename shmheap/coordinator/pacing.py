"""Pacing: when to collect, what to give back, when to look again. Pure functions on plain values.

The problem: reference counts free most blocks at once, but neither cycles nor what the dead left;
and pages that are free still belong to the heap until somebody gives them back. To do either too
often costs the workers: a collection takes each process's lock for a moment, and a page that was
given back is taken again at microseconds apiece. To do it too seldom is a leak.

The goal: memory that nobody uses goes back to the operating system after a bounded time, and at
once when memory is short; and a heap at rest costs a look now and then.

A collection is due, and its trigger is the first of these that holds:

    asked     somebody asked for one
    memory    somebody waits for memory, or the heap holds all that it may, or more: see `limits`
    heap      heap_alloc >= next_gc, where the collection before has set
                  next_gc = max(heap_alloc * (1 + gc_percent / 100), 4 MiB * gc_percent / 100)
    forced    now - last_gc >= forced_gc_s

Pages are given back if

    aged      a collection saw them unused, and so they stayed for scavenge_after_s
    memory    memory is short: then all that are unused, whatever their age

The coordinator looks when the doorbell rings, and every

    tick = min(forced_gc_s, scavenge_after_s) / 2

so that the sampling is correct: no limit is overrun by more than its half.

A process that was stopped inside an operation (a debugger, SIGSTOP) keeps its lock, and what needs
it cannot be done. A turn waits for it `PATIENCE_MS`, gives up, and is made again after 0.05, 0.1,
... and at last every `LONGEST_RETRY_S`, with `RETRY_PATIENCE_MS` each.

A page's age is a stamp of 0.1 s, given by the first collection that found it unused (S4). It goes
back when the stamp is more than scavenge_after_s old, not equal: both ends are rounded down, and a
page must never go early.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shmheap.config import Config
    from shmheap.stats import GCTrigger, HeapStats, ScavengeTrigger

NEVER: Final = 2**63 - 1
"""A `next_gc` that no heap reaches."""

EVERYTHING: Final = 2**29 - 1
"""The stamp cutoff that takes every idle page, those without a stamp too."""

STAMPS_PER_S: Final = 10

MIN_HEAP_BYTES: Final = 4 << 20
"""Growth of a heap smaller than this (at 100 percent) starts no collection. As in the Go runtime: a
few megabytes are not worth the workers' pauses."""

SOON_S: Final = 0.05
"""When to look again at something that is overdue but not ready, such as a process whose last
thread is still leaving. Twenty looks a second, for as long as that lasts, are no load."""

PATIENCE_MS: Final = 1000
"""How long a turn waits for a process that keeps its lock, all in all. Locks are held for less than
a microsecond as a rule, and over a fork for some 10 ms for each GB of the process: who does not let
go in a second was stopped, or is on a machine so busy that to give up does no harm, since what was
begun is begun again. Until it gives up, nobody is reaped and nobody answered."""

RETRY_PATIENCE_MS: Final = 50
"""The same for a process that did not let go before. If it runs again, this is plenty."""

LONGEST_RETRY_S: Final = 1.0
"""How late a process that goes on is noticed, at most. Waiting takes a processor's time, and so a
twentieth of one at most for as long as the process is stopped."""

MANY_LEASES: Final = 10_000
OLD_LEASE_S: Final = 60.0
"""Leases pile up if there are so many and the oldest has been under way for so long. Handles cross
a pipe in milliseconds, and a busy pool has hundreds of them on the way; what is still there after a
minute, in such numbers, was pickled by somebody who never sent it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one turn of the coordinator knows when it decides."""

    now_ns: int
    started_ns: int  # when this coordinator took over: counts as last_gc where there was none
    stats: HeapStats
    ticked: bool  # a regular look, not only the doorbell
    limit_bytes: int  # what the heap may hold of the machine
    memory: bool  # somebody waits for memory, or met the limit
    asked_gc: bool = False
    asked_aged: bool = False
    asked_all: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What one turn does. None: not at all."""

    collect: GCTrigger | None = None
    release: ScavengeTrigger | None = None
    everything: bool = False  # release whatever its age
    short: bool = False  # memory is: if nothing is found, who waits for it may be refused


def plan(seen: Seen, config: Config) -> Plan:
    """Decide what one turn does."""
    short = seen.memory or seen.stats.committed_bytes >= seen.limit_bytes
    return Plan(
        collect=_collect_because(seen, config, short),
        release=_release_because(seen, short),
        everything=short or seen.asked_all,
        short=short,
    )


def _collect_because(seen: Seen, config: Config, short: bool) -> GCTrigger | None:
    if seen.asked_gc:
        return "asked"
    if short:
        return "memory"
    if seen.stats.heap_alloc >= seen.stats.next_gc:
        return "heap"
    last_gc_ns = seen.stats.last_gc or seen.started_ns
    return "forced" if seen.now_ns - last_gc_ns >= _ns(config.forced_gc_s) else None


def _release_because(seen: Seen, short: bool) -> ScavengeTrigger | None:
    if seen.asked_aged or seen.asked_all:
        return "asked"
    if short:
        return "memory"
    return "aged" if seen.ticked else None


def with_unfinished(planned: Plan, before: Plan | None) -> Plan:
    """Add to a turn's plan what an earlier one could not end.

    A cycle that was begun must be ended: processes that were told of its last phase wait for it.
    """
    if before is None:
        return planned
    return Plan(
        collect=planned.collect or before.collect,
        release=planned.release or before.release,
        everything=planned.everything or before.everything,
        short=planned.short or before.short,
    )


def patience_ms(stalls: int) -> int:
    """Return how long a turn waits for a stopped process, after so many that did in vain."""
    return RETRY_PATIENCE_MS if stalls else PATIENCE_MS


def retry_ns(now_ns: int, stalls: int) -> int:
    """Return when to try again after so many turns in a row that waited in vain."""
    return now_ns + _ns(min(SOON_S * 2 ** min(stalls - 1, 10), LONGEST_RETRY_S))


def next_gc_bytes(heap_alloc: int, gc_percent: int) -> int:
    """Return the `heap_alloc` at which to collect next, bytes, given that after a collection.

    With gc_percent 0 that is now: every look collects. Negative: `NEVER`.
    """
    if gc_percent < 0:
        return NEVER
    grown = heap_alloc + heap_alloc * gc_percent // 100
    return max(grown, MIN_HEAP_BYTES * gc_percent // 100)


def stamp_cutoff(now_stamp: int, scavenge_after_s: float) -> int:
    """Return the youngest stamp whose pages are to be given back (S7); below 1: none."""
    return now_stamp - math.ceil(scavenge_after_s * STAMPS_PER_S) - 1


def grace_ends_ns(died_ns: int, config: Config) -> int:
    """Return when the leases of a process that died then run out."""
    return died_ns + _ns(config.lease_grace_s)


def lease_cutoff_ns(died_ns: int, now_ns: int, config: Config) -> int:
    """Return before when a dead process must have made a lease for it to be expired now.

    All or none: it made them all while it lived, so they share the end of the grace.
    """
    return now_ns if now_ns >= grace_ends_ns(died_ns, config) else 0


def old_lease_cutoff_ns(now_ns: int, config: Config) -> int:
    """Return before when a lease must have been made to end although its sender lives; 0: none."""
    if config.lease_max_s is None:
        return 0
    return max(now_ns - _ns(config.lease_max_s), 0)


def leases_pile_up(stats: HeapStats) -> bool:
    """Return whether pickled handles are made and never received."""
    return stats.leases >= MANY_LEASES and stats.oldest_lease_s >= OLD_LEASE_S


def wait_s(now_ns: int, dues_ns: Iterable[int], *, soon: bool) -> float:
    """Return how long to sleep until the first of the times that something is due, seconds.

    What is overdue was tried just now: it, and whatever the caller wants `soon`, waits `SOON_S`.
    """
    waits = [(due - now_ns) / 1e9 if due > now_ns else SOON_S for due in dues_ns]
    return min([*waits, SOON_S] if soon else waits)


def next_tick_ns(now_ns: int, config: Config) -> int:
    """Return when to look next, given that the coordinator looks now."""
    return now_ns + _ns(config.tick_s)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
