"""The scavenger: gives idle pages back to the operating system, in batches.

The problem: a page that is being given back is nobody's, and the call that frees it takes a
fifth of a second for a gigabyte (of 4 KiB pages). Taken in one piece, all the idle memory of
a heap would be out of the workers' reach for so long, just when they may want it.

The goal: everything that is old enough goes back, at the speed of the system call, and at no moment
is more than a piece of it out of reach (4 MiB: `PIECE_BYTES` in csrc/coord.c). And it ends: pages
that the workers free behind its back, as fast as it gives back, are the next walk's.

Which pages are old enough is decided in `pacing`; which of them are still idle is found out, run by
run, by the core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shmheap.stats import ScavengeReport

if TYPE_CHECKING:
    from shmheap.coordinator import Clock, Steward
    from shmheap.stats import ScavengeTrigger

BATCH_BYTES: Final = 64 << 20
"""About 13 ms of the system call. What each piece of it costs besides, one handshake with every
process (microseconds), is lost in that."""


def scavenge(
    steward: Steward,
    clock: Clock,
    trigger: ScavengeTrigger,
    *,
    stamp_le: int,
    goal_bytes: int,
) -> ScavengeReport:
    """Give back idle pages, oldest stamp to `stamp_le`, until there are no more or the goal is met.

    Args:
        steward: the arena.
        clock: for the report's duration.
        trigger: why, for the report.
        stamp_le: see `pacing.stamp_cutoff` and `pacing.EVERYTHING`; below 1 gives back nothing.
        goal_bytes: when to stop. What the heap held at the start bounds the walk.
    """
    started_ns = clock.monotonic_ns()
    released_bytes = runs = page = 0
    while stamp_le >= 1 and released_bytes < goal_bytes:
        batch = min(BATCH_BYTES, goal_bytes - released_bytes)
        nbytes, nruns, page = steward.release(stamp_le, batch, page)
        released_bytes += nbytes
        runs += nruns
        if page == 0:
            break
    return ScavengeReport(
        released_bytes=released_bytes,
        runs=runs,
        duration_ns=clock.monotonic_ns() - started_ns,
        trigger=trigger,
    )
