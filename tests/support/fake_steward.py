"""A heap in plain Python behind the coordinator's `Steward`, and a world of fake time around it.

The model is as simple as the words of the design: units that are held by the kernel or not, with a
stamp; blocks that lie in units; processes with pins and leases. It knows nothing of pacing.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shmheap.config import Config
from shmheap.coordinator import (
    DEAD,
    DETACHED,
    FREE,
    IDLE,
    LIVE,
    MARK,
    SWEEP,
    WANT_MEMORY,
    SlotKey,
    pacing,
)
from shmheap.coordinator.loop import Coordinator, Outcome
from shmheap.coordinator.trace import Trace
from shmheap.testing import FakeClock

MIB = 1 << 20
UNIT = MIB
"""One unit of the model; a real one is an OS page. The trace counts in this."""


@dataclass(eq=False)
class Block:
    units: list[Unit]


@dataclass(eq=False)
class Unit:
    held: bool = False
    stamp: int = 0
    block: Block | None = None

    @property
    def idle(self) -> bool:
        return self.held and self.block is None


@dataclass(eq=False)
class Process:
    number: int
    pid: int
    incarnation: int
    state: int = LIVE
    locked: bool = True
    """It has its liveness lock."""
    pins: list[Block] = field(default_factory=list)
    leases: list[tuple[Block, int]] = field(default_factory=list)
    """With the time each was made, ns."""
    waits_on: int | None = None
    """The free counter it saw before it went to sleep."""
    refused: bool = False

    @property
    def key(self) -> SlotKey:
        return (self.number, self.incarnation)


class FakeSteward:
    """The model: what processes do to it, and the coordinator's `Steward` over it."""

    def __init__(self, clock: FakeClock, config: Config, units: int = 64) -> None:
        self.clock = clock
        self.units = [Unit() for _ in range(units)]
        self.high_water = 0
        self.processes: list[Process] = []
        self.lost: list[Block] = []
        self.free_counter = 0
        self.wants = 0
        self.asked = [0, 0, 0]
        self.answers: dict[int, list[tuple[int, tuple[int, ...]]]] = {0: [], 1: [], 2: []}
        self.phase = IDLE
        self.marked: set[int] = set()
        self.calls: list[str] = []
        self.stuck: set[str] = set()
        """Calls that need the lock of a process which was stopped inside an operation."""
        self.patience_ms: list[int] = []
        self.closed = False
        self.limit: tuple[int, int] | None = None
        self.next_gc = pacing.next_gc_bytes(0, config.gc_percent)
        self.last_gc = 0
        self.pauses: list[int] = []
        self.num_forced = 0
        self.lease_flood = (0, 0.0)
        """(leases, oldest_lease_s) that stats() tells besides the real ones."""
        self._config = config

    # What processes do

    def attach(self, pid: int = 100) -> Process:
        assert not self.closed
        process = Process(len(self.processes), pid, incarnation=1)
        self.processes.append(process)
        return process

    def alloc(self, process: Process, units: int = 1) -> Block:
        free = [unit for unit in self.units if unit.block is None][:units]
        if len(free) < units:
            raise MemoryError
        block = Block(free)
        for unit in free:
            unit.block, unit.held, unit.stamp = block, True, 0
            self.high_water = max(self.high_water, self.units.index(unit) + 1)
        process.pins.append(block)
        return block

    def drop(self, process: Process, block: Block) -> None:
        process.pins.remove(block)
        self._free_unless_held(block)

    def lose(self, process: Process, block: Block) -> None:
        """Drop a block's last holder without a count: only a collection finds it."""
        process.pins.remove(block)
        self.lost.append(block)

    def lease(self, process: Process, block: Block) -> None:
        process.leases.append((block, self.clock.monotonic_ns()))

    def die(self, process: Process) -> None:
        process.locked = False
        process.waits_on = None

    def leave(self, process: Process) -> None:
        process.state = DETACHED if process.leases else FREE
        process.locked = False

    def wait(self, process: Process) -> None:
        process.waits_on = self.free_counter
        self.wants |= WANT_MEMORY

    def ask(self, kind: int) -> int:
        self.asked[kind] += 1
        self.wants |= 1 << min(kind, 1)
        return self.asked[kind]

    # What the tests look at

    @property
    def held_bytes(self) -> int:
        return UNIT * sum(unit.held for unit in self.units)

    @property
    def blocks(self) -> set[Block]:
        return {unit.block for unit in self.units if unit.block is not None}

    # Steward

    nonce = 0xBE11

    def closing(self) -> bool:
        return self.closed

    def set_next_gc(self, nbytes: int) -> None:
        self.calls.append("set_next_gc")
        self.next_gc = nbytes

    def set_limit(self, limit_bytes: int, look_bytes: int, /) -> None:
        self.limit = limit_bytes, look_bytes

    def config(self) -> bytes:
        return self._config.to_json().encode()

    def stats(self) -> dict[str, Any]:
        in_use = UNIT * sum(unit.block is not None for unit in self.units)
        system = UNIT * self.high_water
        users = [process for process in self.processes if process.state == LIVE]
        leases, oldest_lease_s = self.lease_flood
        return {
            "heap_sys": system,
            "heap_idle": system - in_use,
            "heap_inuse": in_use,
            "heap_released": system - self.held_bytes,
            "heap_objects": len(self.blocks),
            "heap_alloc": in_use,
            "mallocs": 0,
            "frees": self.free_counter,
            "next_gc": self.next_gc,
            "last_gc": self.last_gc,
            "num_gc": len(self.pauses),
            "num_forced_gc": self.num_forced,
            "pause_total_ns": sum(self.pauses),
            "pause_ns": tuple(self.pauses[-256:]),
            "leases": leases + sum(len(process.leases) for process in self.processes),
            "oldest_lease_s": oldest_lease_s,
            "capacity": UNIT * len(self.units),
            "committed_bytes": self.held_bytes,
            "metadata_bytes": 0,
            "pins": sum(len(process.pins) for process in users),
            "processes": len(users),
        }

    def set_patience(self, ms: int, /) -> None:
        self.patience_ms.append(ms)

    def begin(self) -> int:
        self._call("begin")
        return self.phase

    def now_stamp(self) -> int:
        return self.clock.monotonic_ns() // 100_000_000 + 1

    def slots(self) -> Sequence[tuple[int, int, int, int, int, int, int]]:
        return [
            (
                process.number,
                process.state,
                process.pid,
                process.incarnation,
                len(process.pins),
                len(process.leases),
                int(process.waits_on is not None),
            )
            for process in self.processes
        ]

    def alive(self, index: int, /) -> bool:
        return self.processes[index].locked

    def reap(self, index: int, lease_cutoff_ns: int, /) -> tuple[int, int, int, int, int, bool]:
        assert self.phase == IDLE or self.stuck, "reaping is not for the middle of a cycle"
        process = self.processes[index]
        assert not process.locked, "it lives"
        self._call("reap")
        pins, process.pins = process.pins, []
        dead_bytes = sum(self._free_unless_held(block) for block in pins)
        old = [lease for lease in process.leases if lease[1] < lease_cutoff_ns]
        process.leases = [lease for lease in process.leases if lease not in old]
        lease_bytes = sum(self._free_unless_held(block) for block, _ in old)
        process.state = DEAD if process.leases else FREE
        return len(pins), len(old), 0, dead_bytes, lease_bytes, process.state == FREE

    def expire_leases(self, cutoff_ns: int, /) -> tuple[int, int, int]:
        assert self.phase == IDLE or self.stuck, "leases end outside a cycle"
        self._call("expire")
        old = [
            (process, lease)
            for process in self.processes
            for lease in process.leases
            if lease[1] < cutoff_ns
        ]
        for process, lease in old:
            process.leases.remove(lease)
        return len(old), sum(self._free_unless_held(block) for _, (block, _) in old), 7

    def users(self) -> int:
        return sum(process.state == LIVE or bool(process.leases) for process in self.processes)

    def try_close(self) -> bool:
        self._call("try_close")
        self.closed = self.users() == 0
        return self.closed

    def refuse_waiters(self) -> int:
        """Rule 16: all that allocate wait, and none of them has missed that something was freed."""
        self.calls.append("refuse")
        living = [process for process in self.processes if process.state == LIVE]
        holders = [process for process in living if process.pins or process.waits_on is not None]
        if any(process.waits_on != self.free_counter for process in holders):
            return 0
        for process in holders:
            process.refused, process.waits_on = True, None
        return len(holders)

    def take_wants(self) -> int:
        wants, self.wants = self.wants, 0
        return wants

    def pending(self, kind: int, /) -> int:
        answered = self.answers[kind][-1][0] if self.answers[kind] else 0
        return self.asked[kind] if self.asked[kind] > answered else 0

    def finish(self, kind: int, ticket: int, fields: Sequence[int], /) -> None:
        self.answers[kind].append((ticket, tuple(fields)))

    def start_cycle(self) -> int:
        self._call("start_cycle")
        self.phase = MARK
        return 10

    def mark(self) -> tuple[int, int]:
        assert self.phase == MARK
        self.calls.append("mark")
        self.marked = {id(block) for block in self._rooted()}
        return len(self.marked), 20

    def finish_mark(self) -> tuple[int, int]:
        self.calls.append("finish_mark")
        self.phase = SWEEP
        return 0, 30

    def sweep(self) -> tuple[int, int, int]:
        assert self.phase == SWEEP
        self._call("sweep")
        dead = [block for block in self.blocks if id(block) not in self.marked]
        self.lost = [block for block in self.lost if block not in dead]
        return len(dead), sum(self._free(block) for block in dead), 25

    def stamp(self, stamp: int, /) -> int:
        self.calls.append("stamp")
        new = [unit for unit in self.units if unit.idle and unit.stamp == 0]
        for unit in new:
            unit.stamp = stamp
        return len(new)

    def end_cycle(self, next_gc_bytes: int, forced: bool, pause_ns: int, /) -> int:
        self.calls.append("end_cycle")
        self.phase = IDLE
        self.next_gc = next_gc_bytes
        self.last_gc = self.clock.monotonic_ns()
        self.num_forced += forced
        self.pauses.append(max(pause_ns, 15))
        return 15

    def release(self, stamp_le: int, max_bytes: int, page: int, /) -> tuple[int, int, int]:
        self._call("release")
        rest = range(page, len(self.units))
        fits = [i for i in rest if self.units[i].idle and _old(self.units[i], stamp_le)]
        taken = fits[: max(1, max_bytes // UNIT)]
        for i in taken:
            self.units[i].held, self.units[i].stamp = False, 0
        runs = sum(i - 1 not in taken for i in taken)
        return UNIT * len(taken), runs, taken[-1] + 1 if len(fits) > len(taken) else 0

    # The model's own

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.stuck:
            raise TimeoutError("a process that was stopped inside an operation holds its lock")

    def _rooted(self) -> list[Block]:
        blocks = [block for process in self.processes for block in process.pins]
        return blocks + [block for process in self.processes for block, _ in process.leases]

    def _free_unless_held(self, block: Block) -> int:
        held = [*self._rooted(), *self.lost]
        return 0 if block in held or block not in self.blocks else self._free(block)

    def _free(self, block: Block) -> int:
        for unit in block.units:
            unit.block = None
        self.free_counter += 1
        return UNIT * len(block.units)


def _old(unit: Unit, stamp_le: int) -> bool:
    return stamp_le == pacing.EVERYTHING or 1 <= unit.stamp <= stamp_le


class NoSleep:
    """Time passes while the coordinator sleeps; at set times something happens that wakes it.

    Args:
        clock: the time.
        script: (when, seconds; what happens: it may return who has exited), in order.
    """

    def __init__(self, clock: FakeClock, script: list[tuple[float, Any]]) -> None:
        self.clock = clock
        self.script = script

    def wait(self, timeout_s: float, _processes: Mapping[SlotKey, int], /) -> Collection[SlotKey]:
        left = self.script[0][0] - self.clock.monotonic() if self.script else float("inf")
        if left > timeout_s:
            self.clock.advance(timeout_s)
            return ()
        self.clock.advance(max(left, 0.0))
        return self.script.pop(0)[1]() or ()


class World:
    """A heap, its coordinator, and the time; `turn` and `run_for` are all that makes it go.

    Args:
        config: the heap's.
        units: capacity of the heap.
        linger: see `Coordinator`.
        script: see `NoSleep`, for `coordinator.run()`.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        units: int = 64,
        linger: bool = False,
        script: list[tuple[float, Any]] | None = None,
        left_bytes: Callable[[], int | None] | None = None,
    ) -> None:
        config = config or Config()
        self.clock = FakeClock()
        self.heap = FakeSteward(self.clock, config, units)
        self.logged: list[logging.LogRecord] = []
        self.printed = io.StringIO()
        self.coordinator = Coordinator(
            self.heap,
            config,
            self.clock,
            NoSleep(self.clock, script or []),
            Trace(self.printed if config.trace else None),
            self._log(),
            linger=linger,
            left_bytes=left_bytes,
        )
        self.outcome = Outcome.STAYS

    def turn(self, *exited: Process) -> Outcome:
        """Somebody has rung, or these have exited."""
        self.outcome = self.coordinator.turn([process.key for process in exited])
        return self.outcome

    def run_for(self, seconds: float) -> None:
        """Let time pass, with every turn that comes due in it."""
        end = self.clock.monotonic() + seconds
        while self.outcome is Outcome.STAYS and self._due() <= end + 1e-6:
            self.clock.advance(max(0.0, self._due() - self.clock.monotonic()))
            self.turn()
        self.clock.advance(max(0.0, end - self.clock.monotonic()))

    def messages(self, level: int) -> list[str]:
        return [record.getMessage() for record in self.logged if record.levelno == level]

    def _due(self) -> float:
        return self.clock.monotonic() + self.coordinator.wait_s()

    def _log(self) -> logging.Logger:
        log = logging.Logger("world")
        handler = logging.Handler()
        handler.emit = self.logged.append  # type: ignore[method-assign]
        log.addHandler(handler)
        return log
