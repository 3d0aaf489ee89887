"""The coordinator's loop: one turn whenever somebody rings, somebody dies, or something is due.

    workers                         coordinator
    -------                         -----------
    ask, wait, attach, leave --.    .--> wait ------ timeout: tick, leases, somebody on the way out
                               |    |     |
                 doorbell (0 -> 1) -+     v
    exit ----- pidfd ---------------'   take wants, read tickets      what is asked after this rings
                                          |                           again, so nothing is missed
                                          v
                                        reap                          the liveness lock decides
                                          |
                                          v
                                        plan                          pacing: pure
                                          |
                                          v
                                        collect ---> stamps           pages begin to age
                                          |
                                          v
                                        scavenge --> the kernel
                                          |
                                          v
    HeapFull <------- refuse ---------- nothing found, all wait?      rule 16, S15
    reports  <------- finish ---------- answer tickets
                                          |
                                          v
                                        users left? --- no ---> close the heap, leave

The first turn comes before the first wait: wants and deaths may date from a coordinator that was
killed. Steps of one turn run in this order because each gives the next one more to find: reaping
drops pins, collecting frees blocks, scavenging gives their pages back.

A process that was stopped inside an operation stalls what needs its lock: that is put off, and the
rest is done (`pacing`).

Its own ticks keep nothing alive and hide nothing (S15): it leaves with the last user, and that it
will look again is no reason to let anybody wait.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import TYPE_CHECKING

from shmheap.coordinator import (
    ASK_GC,
    ASK_SCAVENGE_AGED,
    ASK_SCAVENGE_ALL,
    ASKS,
    WANT_GC,
    WANT_LEAVE,
    WANT_MEMORY,
    WANT_REAP,
    pacing,
)
from shmheap.coordinator.collector import collect, resume
from shmheap.coordinator.pacing import Plan, Seen
from shmheap.coordinator.reaper import Reaper
from shmheap.coordinator.scavenger import scavenge
from shmheap.limits import limit_and_look_bytes
from shmheap.stats import HeapStats

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Collection, Mapping

    from shmheap.config import Config
    from shmheap.coordinator import Clock, SlotKey, Steward, Wakeup
    from shmheap.coordinator.reaper import Reaped
    from shmheap.coordinator.trace import Trace
    from shmheap.stats import GCReport, ScavengeReport


class Outcome(enum.Enum):
    """What becomes of the coordinator after a turn."""

    STAYS = "stays"
    LEAVES = "leaves"  # and the heap stays as it is: another may take over
    CLOSED = "closed"  # the heap had no users left and can get none any more


class Coordinator:
    """Serves one heap until its last user has left.

    Args:
        steward: the hold on the arena; nobody else has one.
        config: the heap's.
        clock: the time.
        wakeup: sleeps.
        trace: told of each wake-up that collected or scavenged.
        log: told of deaths, refusals, and leases that pile up.
        linger: stay on a heap that has no users until it has had one.
        left_bytes: says what this process's cgroup has left; None: the heap's limit is not ours.
    """

    def __init__(
        self,
        steward: Steward,
        config: Config,
        clock: Clock,
        wakeup: Wakeup,
        trace: Trace,
        log: logging.Logger,
        *,
        linger: bool = False,
        left_bytes: Callable[[], int | None] | None = None,
    ) -> None:
        self._steward = steward
        self._config = config
        self._clock = clock
        self._wakeup = wakeup
        self._trace = trace
        self._log = log
        self._linger = linger
        self._left_bytes = left_bytes
        self._reaper = Reaper(steward, config, log)
        self._started_ns = clock.monotonic_ns()
        self._next_tick_ns = pacing.next_tick_ns(self._started_ns, config)
        self._dead_bytes = self._lease_bytes = 0  # reaped since the last collection
        self._look_again = False  # memory was found for who waits, who may still be waiting
        self._stalled: TimeoutError | None = None  # this turn: a process keeps its lock
        self._stalls = 0  # turns in a row that were
        self._retry_ns = 0
        self._unfinished: Plan | None = None  # what a stalled turn had planned
        self._warned = False
        self._stopping = False

    def run(self) -> Outcome:
        """Take over, and serve until it is time to leave: LEAVES or CLOSED."""
        outcome = self._take_over()
        while outcome is Outcome.STAYS:
            outcome = self.turn(self._wakeup.wait(self.wait_s(), self._reaper.watched))
        return outcome

    def _take_over(self) -> Outcome:
        while not self._begin():
            if self._stopping:
                return Outcome.LEAVES
            self._wakeup.wait(self.wait_s(), {})
        return self.turn()

    def _begin(self) -> bool:
        """Finish what a dead coordinator left; False: a stopped process is in the way."""
        self._be_patient()
        try:
            phase = self._steward.begin()
        except TimeoutError as error:
            self._stalled = error
        self._count_stall()
        if self._stalls:
            return False
        try:
            resume(self._steward, self._clock, phase, self._config.gc_percent)
        except TimeoutError:
            self._unfinished = Plan(collect="forced")
        return True

    def stop(self) -> None:
        """Leave after the next turn. To be called from a signal handler, which also rings."""
        self._stopping = True

    def wait_s(self) -> float:
        """Return how long to sleep, seconds, if nobody rings."""
        now_ns = self._clock.monotonic_ns()
        dues_ns = [self._next_tick_ns, *self._reaper.dues_ns]
        if self._stalls:  # what is overdue waits for the next try
            dues_ns = [self._retry_ns, *(due for due in dues_ns if due > now_ns)]
        return pacing.wait_s(now_ns, dues_ns, soon=self._reaper.soon or self._look_again)

    def turn(self, exited: Collection[SlotKey] = ()) -> Outcome:
        """Do all that is due now; `exited` are the processes that are known to have ended."""
        self._be_patient()
        wants = self._steward.take_wants()
        tickets = {kind: self._steward.pending(kind) for kind in ASKS}
        reaped = self._reap(exited)
        if wants & (WANT_REAP | WANT_LEAVE):  # somebody came, and may be gone again
            self._linger = False
        stats = HeapStats(**self._steward.stats())
        plan = pacing.plan(self._seen(wants, tickets, stats, reaped), self._config)
        plan = pacing.with_unfinished(plan, self._unfinished)
        gc, scavenged = self._collect_and_scavenge(plan, stats.committed_bytes)
        if wants & WANT_GC and plan.collect is None:  # from which on to ask was a guess
            self._steward.set_next_gc(stats.next_gc)
        # While stalled nobody can say that there is no memory.
        short = plan.short and not self._stalled
        self._look_again = short and self._serve_waiters(reaped, gc, scavenged)
        self._answer(tickets, gc, scavenged)
        self._tell(gc, scavenged, stats)
        outcome = self._outcome()
        self._count_stall()
        return outcome

    def _reap(self, exited: Collection[SlotKey]) -> list[Reaped]:
        reaped = self._reaper.reap(exited, self._clock.monotonic_ns())
        self._stalled = self._reaper.stalled
        self._dead_bytes += sum(one.dead_bytes for one in reaped)
        self._lease_bytes += sum(one.lease_bytes for one in reaped)
        return reaped

    def _seen(
        self, wants: int, tickets: Mapping[int, int], stats: HeapStats, reaped: list[Reaped]
    ) -> Seen:
        now_ns = self._clock.monotonic_ns()
        ticked = now_ns >= self._next_tick_ns
        if ticked:
            self._next_tick_ns = pacing.next_tick_ns(now_ns, self._config)
        # Who came to wait has rung. That all others wait too, or are dead, may come true silently.
        still_waiting = self._reaper.waiting and (ticked or bool(reaped) or self._look_again)
        return Seen(
            now_ns=now_ns,
            started_ns=self._started_ns,
            stats=stats,
            ticked=ticked,
            limit_bytes=self._set_limit(stats.committed_bytes),
            memory=bool(wants & WANT_MEMORY) or still_waiting,
            asked_gc=tickets[ASK_GC] > 0,
            asked_aged=tickets[ASK_SCAVENGE_AGED] > 0,
            asked_all=tickets[ASK_SCAVENGE_ALL] > 0,
        )

    def _set_limit(self, held_bytes: int) -> int:
        """Say anew what the heap may hold, bytes: what the cgroup has left has changed."""
        left_bytes = self._left_bytes() if self._left_bytes else None
        limit_bytes, look_bytes = limit_and_look_bytes(held_bytes, left_bytes, self._config)
        if self._left_bytes:
            self._steward.set_limit(limit_bytes, look_bytes)
        return limit_bytes

    def _collect_and_scavenge(
        self, plan: Plan, held_bytes: int
    ) -> tuple[GCReport | None, ScavengeReport | None]:
        """Do what is planned. A stopped process stalls it: what was asked for stays asked for."""
        gc = scavenged = self._unfinished = None
        try:
            gc = self._collect(plan)
            scavenged = self._scavenge(plan, held_bytes)
        except TimeoutError as error:
            self._stalled = error
            self._unfinished = replace(plan, collect=None) if gc else plan
        return gc, scavenged

    def _be_patient(self) -> None:
        self._stalled = None
        self._steward.set_patience(pacing.patience_ms(self._stalls))

    def _count_stall(self) -> None:
        """Say when to try again, and tell the log when it begins and when it is over."""
        if self._stalled is None:
            if self._stalls:
                self._log.info("goes on, after %d tries in vain", self._stalls)
            self._stalls = 0
            return
        if not self._stalls:
            self._log.warning("stalled: %s", self._stalled)
        self._stalls += 1
        self._retry_ns = pacing.retry_ns(self._clock.monotonic_ns(), self._stalls)

    def _collect(self, plan: Plan) -> GCReport | None:
        if plan.collect is None:
            return None
        expire_pause_ns = self._expire_leases()
        report = collect(
            self._steward,
            self._clock,
            plan.collect,
            self._config.gc_percent,
            freed_dead_bytes=self._dead_bytes,
            freed_lease_bytes=self._lease_bytes,
            pause_ns=expire_pause_ns,
        )
        self._dead_bytes = self._lease_bytes = 0
        return report

    def _expire_leases(self) -> int:
        """End the leases that are older than any may be; return the pause."""
        cutoff_ns = pacing.old_lease_cutoff_ns(self._clock.monotonic_ns(), self._config)
        if cutoff_ns == 0:
            return 0
        leases, freed_bytes, pause_ns = self._steward.expire_leases(cutoff_ns)
        self._lease_bytes += freed_bytes
        if leases:
            self._log.warning(
                "%d pickled handles were not unpickled within %g s (lease_max_s): whoever does so "
                "now may find the block gone",
                leases,
                self._config.lease_max_s,
            )
        return pause_ns

    def _scavenge(self, plan: Plan, held_bytes: int) -> ScavengeReport | None:
        if plan.release is None:
            return None
        now_stamp = self._steward.now_stamp()
        aged = pacing.stamp_cutoff(now_stamp, self._config.scavenge_after_s)
        return scavenge(
            self._steward,
            self._clock,
            plan.release,
            stamp_le=pacing.EVERYTHING if plan.everything else aged,
            goal_bytes=held_bytes,
        )

    def _serve_waiters(
        self, reaped: list[Reaped], gc: GCReport | None, scavenged: ScavengeReport | None
    ) -> bool:
        """Refuse who waits if nothing was found for them; return whether to look again soon."""
        found = (
            any(one.found for one in reaped)
            or (gc is not None and gc.swept > 0)
            or (scavenged is not None and scavenged.released_bytes > 0)
        )
        if found:
            return self._reaper.waiting
        refused = self._steward.refuse_waiters()
        if refused:
            self._log.warning("refused %d waiters: no collection can free memory", refused)
        return False

    def _answer(
        self, tickets: Mapping[int, int], gc: GCReport | None, scavenged: ScavengeReport | None
    ) -> None:
        for kind, ticket in tickets.items():
            report = gc if kind == ASK_GC else scavenged
            if ticket and report is not None:
                self._steward.finish(kind, ticket, report.as_fields())

    def _tell(
        self, gc: GCReport | None, scavenged: ScavengeReport | None, stats: HeapStats
    ) -> None:
        if self._trace.on and (gc or scavenged):
            self._trace.wakeup(
                forced=gc is not None and gc.trigger == "forced",
                released_bytes=scavenged.released_bytes if scavenged else 0,
                stats=HeapStats(**self._steward.stats()),
            )
        if not self._warned and pacing.leases_pile_up(stats):
            self._warned = True
            self._log.warning(
                "%d pickled handles are on their way, the oldest for %.0f s: each keeps its block "
                "until it is unpickled or its sender ends",
                stats.leases,
                stats.oldest_lease_s,
            )

    def _outcome(self) -> Outcome:
        users = self._steward.users()
        if users:
            self._linger = False
            if self._stopping:
                self._log.info("stopped with %d users: whoever needs a successor starts it", users)
                return Outcome.LEAVES
            return Outcome.STAYS
        if self._linger and not self._stopping:
            return Outcome.STAYS
        if self._config.keep:
            return Outcome.LEAVES  # not closed: the next user starts a successor
        if self._close():
            return Outcome.CLOSED
        return Outcome.LEAVES if self._stopping else Outcome.STAYS

    def _close(self) -> bool:
        try:
            return self._steward.try_close()
        except TimeoutError as error:
            self._stalled = error
            return False
