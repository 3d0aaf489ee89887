"""The soak: workers that do everything, and one who kills them and counts.

The one who kills is a user of the heap too: it calls check() while the others work, and it is the
parent from which most workers are forked. It adopts every orphan, so nobody escapes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soak_worker
from soak_board import (
    CONTROLS,
    ROWS,
    Board,
    Field,
    Op,
    Post,
    open_schedstat,
    run_delay_ns,
    waited_ns,
)
from soak_look import Locks
from soak_proc import (
    adopt_orphans,
    children,
    go_first,
    is_coordinator,
    is_ours,
    is_over,
    own_session,
    stop,
    threads_of,
)
from soak_worker import STALL_NS, Order

import shmheap
from shmheap import arena
from shmheap._core import Observer

CAPACITY = 1 << 30
GRACE_S = 2.0
CHECK_EVERY_S = 1.0
HUNG_S = 20.0
SPAWNED_ONE_IN = 12
COORDINATORS_ONE_IN = 8
SUMMED = (Field.STEPS, Field.STALLS, Field.CHECKED, Field.OPENED, Field.STALE, Field.FULL)
CONFIG = {
    "keep": True,  # it outlives its users, to be looked at
    "forced_gc_s": 0.5,
    "scavenge_after_s": 0.5,
    "lease_grace_s": GRACE_S,
}


@dataclass(slots=True)
class Plan:
    """What is to be done. `kills` 0: as many as there is time for."""

    seconds: float
    workers: int
    seed: int
    rate: float
    kills: int = 0


@dataclass(slots=True)
class Tally:
    """What has happened so far."""

    kills: Counter[str] = field(default_factory=Counter)  # worker, coordinator
    inside: Counter[str] = field(default_factory=Counter)  # by lock
    kills_inside: Counter[str] = field(default_factory=Counter)  # worker, coordinator
    started: Counter[str] = field(default_factory=Counter)  # fork, spawn, child
    figures: Counter[str] = field(default_factory=Counter)  # sums over the rows of the dead
    longest_ns: int = 0
    longest_op: str = ""
    control_ns: int = 0
    stopped_ns: int = 0  # the longest that a victim was held still before it was killed
    checks: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Living:
    """A worker as its killer sees it."""

    pid: int
    row: int
    steps: int = -1
    seen_s: float = 0.0  # when its steps last went on


class Soak:
    """One run. A context manager; leaving it ends every process that it started.

    Args:
        plan: what is to be done.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tally = Tally()
        self.random = random.Random(plan.seed)
        self.reports = Path(tempfile.mkdtemp(prefix="shmheap-soak-"))
        self.log = self.reports / "coordinator.log"
        self.living: dict[int, Living] = {}  # by pid
        self._dying: list[Living] = []
        self._board = Board.new()
        # First in, first out: a row comes to be used again long after its last user is gone.
        self._pairs = deque(range(0, ROWS, 2))
        self._expected: dict[int, float] = {}  # rows of children whose parent died, and when
        self._mail = Post.new()
        for fd in (self._board.fd, *self._mail.fds):
            os.set_inheritable(fd, True)
        adopt_orphans()
        self._nice = os.nice(0)
        own_session()
        self.goes_first = go_first()
        config = shmheap.Config(log=str(self.log), **CONFIG)  # type: ignore[arg-type]
        self.heap = shmheap.Heap.create(capacity=CAPACITY, config=config)
        self.path = self.heap._path
        self.arena_fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        self.observer = Observer(self.arena_fd)
        self._locks = Locks(self.path)
        self._adopted: set[int] = set()  # rows of children that are known
        self._started = 0
        self._next_kill_s = self._next_check_s = time.monotonic()

    def __enter__(self) -> Soak:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_everybody()
        self.heap.close()
        end_children()
        arena.remove(self.path, os.fstat(self.arena_fd), self.observer.nonce)
        os.close(self.arena_fd)
        if not self.tally.failures:
            shutil.rmtree(self.reports, ignore_errors=True)

    # Turns

    def turns(self) -> Iterator[None]:
        """Do one turn after another until it is time, or something is wrong."""
        began_s = time.monotonic()
        self._next_kill_s = began_s + 0.2
        while not self.tally.failures and not self._is_done(time.monotonic() - began_s):
            self.turn()
            yield
            time.sleep(max(0.0, min(0.02, self._next_kill_s - time.monotonic())))

    def _is_done(self, after_s: float) -> bool:
        if self.plan.kills:
            return self.tally.kills.total() >= self.plan.kills
        return after_s >= self.plan.seconds

    def turn(self) -> None:
        """Replace who is missing, kill who is due, check what is due."""
        self._bury()
        self._adopt_children()
        while len(self.living) < self.plan.workers and not self.tally.failures:
            self._start()
        now_s = time.monotonic()
        if now_s >= self._next_kill_s:
            self._kill_one()
            self._next_kill_s += self.random.expovariate(self.plan.rate)
            self._next_kill_s = max(self._next_kill_s, now_s - 1.0)  # who was late hurries, a bit
        if now_s >= self._next_check_s:
            self.check()
            self._next_check_s = time.monotonic() + CHECK_EVERY_S
            self._look_for_hung(now_s)
        self._read_reports()

    def check(self) -> None:
        """Walk every invariant."""
        self.tally.checks += 1
        try:
            self.heap.check()
        except shmheap.HeapCorrupt as error:
            self.fail("check()", str(error))

    def fail(self, what: str, text: str, **more: Any) -> None:
        """Write down that something is wrong, and make everything stand still as it is."""
        if not self.tally.failures:
            for pid in [*filter(is_ours, self.living), *self._coordinators()]:
                stop(pid)
        more = {"seed": self.plan.seed, "operation": what, "error": text} | more
        self.tally.failures.append(more)

    # Workers

    def _start(self) -> None:
        pair = self._pairs.popleft()
        self._board.clear(pair)
        self._board.clear(pair + 1)
        self._adopted.discard(pair + 1)
        self._started += 1
        order = Order(
            seed=self.plan.seed,
            name=str(self._started),
            heap=self.path,
            row=pair,
            board_fd=self._board.fd,
            post_fds=self._mail.fds,
            reports=str(self.reports),
            grace_s=GRACE_S,
            nice=self._nice,
        )
        spawned = self.random.randrange(SPAWNED_ONE_IN) == 0
        pid = spawn(order) if spawned else self._fork(order)
        self.tally.started["spawn" if spawned else "fork"] += 1
        self.living[pid] = Living(pid, pair, seen_s=time.monotonic())

    def _fork(self, order: Order) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                soak_worker.run(order, self.heap)
            finally:
                os._exit(2)
        return pid

    def _adopt_children(self) -> None:
        """Take the children that workers have forked for workers like any other."""
        now_s = time.monotonic()
        self._expected = {row: s for row, s in self._expected.items() if now_s - s < HUNG_S}
        parents = [one.row for one in [*self.living.values(), *self._dying] if one.row % 2 == 0]
        for row in [*(parent + 1 for parent in parents), *self._expected]:
            pid = self._board.row(row)[Field.PID]
            if pid and row not in self._adopted and is_ours(pid):
                self._adopted.add(row)
                self._expected.pop(row, None)
                self.living[pid] = Living(pid, row, seen_s=now_s)
                self.tally.started["child"] += 1

    # Killing

    def _kill_one(self) -> None:
        coordinators = self._coordinators()
        kills = self.tally.kills
        behind = kills["coordinator"] * COORDINATORS_ONE_IN < kills.total()
        # By chance, and not as soon as there is one: they are to be killed at any age.
        if coordinators and behind and self.random.random() < 0.4:
            self._kill(self.random.choice(coordinators), "coordinator")
        elif self.living:
            pid = self.random.choice(sorted(self.living))
            if self._kill(pid, "worker"):
                self._dying.append(self.living.pop(pid))

    def _kill(self, pid: int, role: str) -> bool:
        from_ns, delay_ns = time.monotonic_ns(), _run_delay_ns(pid)
        if not (role == "coordinator" or is_ours(pid)) or not stop(pid):
            return False
        held = self._locks.held_by(pid, threads_of(pid), role == "coordinator")
        if role == "worker" and delay_ns is not None:
            self._count_unfinished(self.living[pid], from_ns, delay_ns)
        os.kill(pid, signal.SIGKILL)
        tally = self.tally
        tally.stopped_ns = max(tally.stopped_ns, time.monotonic_ns() - from_ns)
        tally.kills[role] += 1
        tally.inside.update(held)
        tally.kills_inside[role] += bool(held)
        return True

    def _count_unfinished(self, victim: Living, until_ns: int, delay_ns: int) -> None:
        """The step in which it dies may have been long: it can no longer say so itself.

        Counted until it was told to stop: from then on its wait is our doing.
        """
        row = self._board.row(victim.row)
        if row[Field.PID] != victim.pid or row[Field.SINCE] == 0:
            return
        wait_ns = waited_ns(row[Field.SINCE], until_ns, row[Field.DELAY_THEN], delay_ns)
        if row[Field.OP] not in (Op.NONE, *CONTROLS) and wait_ns > row[Field.LONGEST_NS]:
            row[Field.LONGEST_NS], row[Field.LONGEST_OP] = wait_ns, row[Field.OP]
            row[Field.STALLS] += wait_ns > STALL_NS

    def _coordinators(self) -> list[int]:
        """Who serves, or is on the way to."""
        known = self.living.keys() | {one.pid for one in self._dying}
        return [
            pid
            for pid in children()
            if pid not in known and is_coordinator(pid, self.path) and not is_over(pid)
        ]

    # The dead

    def _bury(self) -> None:
        """Wait for whoever has ended; none may that was not killed, but coordinators in order."""
        ended: dict[int, int] = {}
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0] != 0:
                ended[found[0]] = found[1]
        for pid in [pid for pid in self.living if is_over(pid)]:
            self._lose(self.living.pop(pid), ended.pop(pid, None))
        for pid, status in ended.items():
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
                self.fail("coordinator", f"process {pid} ended with status {status}")
        for one in [one for one in self._dying if is_over(one.pid)]:
            self._dying.remove(one)
            self._sum_up(one.row)

    def _lose(self, lost: Living, status: int | None) -> None:
        row = self._board.row(lost.row)
        fault = self.reports / f"{lost.pid}.fault"
        self._dying.append(lost)
        self.fail(
            Op(row[Field.OP]).name,
            f"worker {lost.pid} ended by itself, status {status}",
            step=row[Field.STEPS],
            fault=fault.read_text() if fault.exists() else "",
        )

    def _sum_up(self, number: int) -> None:
        """Add the figures of one who is dead, and let its rows be used again."""
        row, tally = self._board.row(number), self.tally
        for name in SUMMED:
            tally.figures[name.name.lower()] += row[name]
        if row[Field.LONGEST_NS] > tally.longest_ns:
            tally.longest_ns = row[Field.LONGEST_NS]
            tally.longest_op = Op(row[Field.LONGEST_OP]).name
        tally.control_ns = max(tally.control_ns, row[Field.CONTROL_NS])
        if number % 2 == 0:
            if row[Field.FORKING] and number + 1 not in self._adopted:
                self._expected[number + 1] = time.monotonic()
            self._pairs.append(number)

    # What is wrong

    def _look_for_hung(self, now_s: float) -> None:
        for one in self.living.values():
            row = self._board.row(one.row)
            if row[Field.STEPS] != one.steps:
                one.steps, one.seen_s = row[Field.STEPS], now_s
            elif now_s - one.seen_s > HUNG_S:
                what = Op(row[Field.OP]).name
                self.fail(what, f"worker {one.pid} stands still for {HUNG_S:.0f} s")
                return

    def _read_reports(self) -> None:
        for file in sorted(self.reports.glob("*.json")):
            found = json.loads(file.read_text())
            file.unlink()
            self.fail(found.pop("operation"), found.pop("error"), **found)

    # The end

    def kill_everybody(self) -> None:
        """SIGKILL to all but coordinators; returns when they are dead, their figures summed up."""
        while self.living or self._dying:
            for pid in list(self.living):
                if is_ours(pid):
                    os.kill(pid, signal.SIGKILL)
                self._dying.append(self.living.pop(pid))
            self._bury()
            self._adopt_children()
            time.sleep(0.005)

    def letters(self) -> Iterator[bytes]:
        """Take every letter that is still under way."""
        while (letter := self._mail.take()) is not None:
            yield letter


def _run_delay_ns(pid: int) -> int | None:
    """Return how long a process was ready to run and did not, ns; None: it is gone."""
    fd = open_schedstat(pid)
    if fd is None:
        return None
    try:
        return run_delay_ns(fd)
    except OSError:
        return None
    finally:
        os.close(fd)


def spawn(order: Order) -> int:
    """Start a worker as a program of its own; returns its pid."""
    program = str(Path(soak_worker.__file__).resolve())
    argv = [sys.executable, "-P", program, json.dumps(order._asdict())]
    return os.posix_spawn(sys.executable, argv, dict(os.environ))


def end_children() -> None:
    """Kill and wait for every process that is still a child of this one."""
    while pids := children():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
