"""The collector: one cycle, step by step, in the order that the protocol asks for.

    start_cycle   every process's phase to IDLE, new epoch, marks cleared, phase MARK
    mark          scan named roots, leases and the pins of every slot not reaped, and trace
    finish_mark   phase FINAL, trace what was touched meanwhile, phase SWEEP: marks are frozen
    sweep         free what is neither marked nor touched
    stamp         date the pages that became idle: from now on they age (S4)
    end_cycle     set next_gc, record the cycle, phase IDLE

Nobody is stopped: a step takes one process's lock at a time, or one of all. What it reports as a
pause is the longest that one was kept, and of finish_mark how long FINAL lasted, in which who
unpickles a handle without a lease waits. Reaping is done before, outside the cycle; pins of the
dead who were found too late are roots like any other's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmheap.coordinator import IDLE, SWEEP
from shmheap.coordinator.pacing import next_gc_bytes
from shmheap.stats import GCReport

if TYPE_CHECKING:
    from shmheap.coordinator import Clock, Steward
    from shmheap.stats import GCTrigger


def collect(
    steward: Steward,
    clock: Clock,
    trigger: GCTrigger,
    gc_percent: int,
    *,
    freed_dead_bytes: int = 0,
    freed_lease_bytes: int = 0,
    pause_ns: int = 0,
) -> GCReport:
    """Run one cycle and return its report.

    Args:
        steward: the arena.
        clock: for the report's duration.
        trigger: why.
        gc_percent: see `Config`.
        freed_dead_bytes: what reaping has freed since the cycle before, for the report.
        freed_lease_bytes: the same, of leases.
        pause_ns: the longest that what was done for it before has kept a process waiting.
    """
    started_ns = clock.monotonic_ns()
    start_pause = steward.start_cycle()
    marked, mark_pause = steward.mark()
    marked_late, final_pause = steward.finish_mark()
    swept, freed_bytes, pause_max_ns, cycle = _sweep_and_end(
        steward, trigger, gc_percent, max(pause_ns, start_pause, mark_pause, final_pause)
    )
    return GCReport(
        cycle=cycle,
        trigger=trigger,
        marked=marked + marked_late,
        swept=swept,
        freed_bytes=freed_bytes,
        freed_dead_bytes=freed_dead_bytes,
        freed_lease_bytes=freed_lease_bytes,
        pause_max_ns=pause_max_ns,
        duration_ns=clock.monotonic_ns() - started_ns,
    )


def resume(steward: Steward, clock: Clock, phase: int, gc_percent: int) -> None:
    """End the cycle that a coordinator was in when it died, given the phase that `begin` found.

    Marks are complete and frozen in SWEEP, so there it sweeps on; from an earlier phase it starts
    again, since it cannot know what the other had traced.
    """
    if phase == SWEEP:
        _sweep_and_end(steward, "forced", gc_percent, 0)
    elif phase != IDLE:
        collect(steward, clock, "forced", gc_percent)


def _sweep_and_end(
    steward: Steward, trigger: GCTrigger, gc_percent: int, pause_ns: int
) -> tuple[int, int, int, int]:
    """Do the second half of a cycle; return blocks and bytes freed, longest pause, its number."""
    swept, freed_bytes, sweep_pause = steward.sweep()
    steward.stamp(steward.now_stamp())
    stats = steward.stats()
    pause_ns = max(pause_ns, sweep_pause)
    next_gc = next_gc_bytes(stats["heap_alloc"], gc_percent)
    end_pause = steward.end_cycle(next_gc, trigger == "forced", pause_ns)
    return swept, freed_bytes, max(pause_ns, end_pause), stats["num_gc"] + 1
