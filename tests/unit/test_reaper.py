from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from fake_steward import UNIT, FakeSteward

from shmheap.config import Config
from shmheap.coordinator import DEAD, DETACHED, FREE
from shmheap.coordinator.reaper import Reaper, Watcher
from shmheap.testing import FakeClock

S = 10**9
LONG = 60.0
"""Seconds. A bound on how long a broken test hangs: what is waited for here always comes."""


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(start_s=100)


@pytest.fixture
def heap(clock: FakeClock) -> FakeSteward:
    return FakeSteward(clock, Config())


@pytest.fixture
def reaper(heap: FakeSteward) -> Reaper:
    return Reaper(heap, Config(), logging.Logger("reaper"))


# Who is dead


def test_the_living_are_watched_and_kept(heap: FakeSteward, reaper: Reaper) -> None:
    process = heap.attach(pid=7)
    block = heap.alloc(process)
    assert reaper.reap((), 100 * S) == []
    assert reaper.watched == {process.key: 7}
    assert heap.blocks == {block}


def test_who_has_lost_its_liveness_lock_is_dead_though_no_pidfd_said_so(
    heap: FakeSteward, reaper: Reaper
) -> None:
    process = heap.attach()
    heap.alloc(process, 3)
    heap.die(process)
    [reaped] = reaper.reap((), 100 * S)
    assert (reaped.pins, reaped.dead_bytes, reaped.done) == (1, 3 * UNIT, True)
    assert process.state == FREE
    assert reaper.watched == {}


def test_who_has_exited_and_still_has_its_lock_is_not_dead_yet(
    heap: FakeSteward, reaper: Reaper
) -> None:
    process = heap.attach()
    block = heap.alloc(process)
    assert reaper.reap([process.key], 100 * S) == []
    assert heap.blocks == {block}
    assert reaper.watched == {}  # its pidfd would fire for ever
    assert reaper.soon
    assert reaper.reap((), 100 * S) == []
    assert reaper.soon  # remembered
    heap.die(process)
    assert len(reaper.reap((), 100 * S)) == 1
    assert not reaper.soon


def test_who_held_nothing_is_reaped_too(heap: FakeSteward, reaper: Reaper) -> None:
    heap.die(heap.attach())
    [reaped] = reaper.reap((), 100 * S)
    assert reaped.done
    assert not reaped.found


def test_free_slots_are_left_alone(heap: FakeSteward, reaper: Reaper) -> None:
    heap.leave(heap.attach())
    assert reaper.reap((), 100 * S) == []
    assert heap.calls == []


def test_a_slot_s_next_process_is_another(heap: FakeSteward, reaper: Reaper) -> None:
    first = heap.attach(pid=7)
    reaper.reap([first.key], 100 * S)
    first.incarnation, first.pid = 2, 8
    reaper.reap((), 100 * S)
    assert not reaper.soon
    assert reaper.watched == {(0, 2): 8}


def test_what_another_holds_survives(heap: FakeSteward, reaper: Reaper) -> None:
    one, other = heap.attach(), heap.attach()
    block = heap.alloc(one)
    other.pins.append(block)
    heap.die(one)
    [reaped] = reaper.reap((), 100 * S)
    assert (reaped.pins, reaped.dead_bytes) == (1, 0)
    assert heap.blocks == {block}


@pytest.mark.parametrize("waits", [False, True])
def test_it_knows_whether_somebody_living_waits(
    heap: FakeSteward, reaper: Reaper, waits: bool
) -> None:
    living, dead = heap.attach(), heap.attach()
    heap.wait(living if waits else dead)
    dead.locked = False
    reaper.reap((), 100 * S)
    assert reaper.waiting is waits


# What the dead had sent


def test_leases_of_the_dead_last_for_the_grace(heap: FakeSteward, reaper: Reaper) -> None:
    process = heap.attach()
    heap.lease(process, heap.alloc(process, 2))
    heap.die(process)
    [at_death] = reaper.reap((), 100 * S)
    assert (at_death.pins, at_death.leases, at_death.done) == (1, 0, False)
    assert process.state == DEAD
    assert reaper.dues_ns == [130 * S]
    assert reaper.reap((), 130 * S - 1) == []
    [after] = reaper.reap((), 130 * S)
    assert (after.leases, after.lease_bytes, after.dead_bytes) == (1, 2 * UNIT, 0)
    assert after.done
    assert reaper.dues_ns == []


def test_a_successor_counts_the_grace_anew(heap: FakeSteward, reaper: Reaper) -> None:
    process = heap.attach()
    heap.lease(process, heap.alloc(process))
    heap.die(process)
    reaper.reap((), 100 * S)
    successor = Reaper(heap, Config(), logging.Logger("successor"))
    assert successor.reap((), 130 * S) == []
    assert successor.reap((), 160 * S)[0].done


def test_who_has_closed_the_heap_is_reaped_when_it_is_gone(
    heap: FakeSteward, reaper: Reaper
) -> None:
    process = heap.attach()
    block = heap.alloc(process)
    heap.lease(process, block)
    heap.drop(process, block)
    heap.leave(process)
    process.locked = True  # buffers that it exported still map the arena
    assert process.state == DETACHED
    assert reaper.reap((), 100 * S) == []
    process.locked = False
    assert reaper.reap((), 200 * S) == []
    assert reaper.reap((), 230 * S)[0].done


def test_deaths_are_logged_once(heap: FakeSteward, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.Logger("reaper")
    log.addHandler(caplog.handler)
    reaper = Reaper(heap, Config(), log)
    process = heap.attach(pid=4711)
    heap.lease(process, heap.alloc(process))
    heap.die(process)
    for _ in range(3):
        reaper.reap((), 100 * S)
    assert caplog.messages == ["process 4711 is gone: took 1 pins, 0 leases, 0 spans"]


# Watching real processes


@pytest.fixture
def bell() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def watcher(bell: int) -> Iterator[Watcher]:
    made = Watcher(bell)
    yield made
    made.close()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until its standard input is closed."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as process:
        yield process


def test_an_exit_wakes(watcher: Watcher, child: subprocess.Popen[bytes]) -> None:
    processes = {(3, 1): child.pid, (4, 1): os.getpid()}
    assert watcher.wait(0, processes) == set()
    assert child.stdin is not None
    child.stdin.close()
    assert watcher.wait(LONG, processes) == {(3, 1)}
    assert watcher.wait(0, {(4, 1): os.getpid()}) == set()


def test_who_exited_before_it_could_be_watched_is_told_at_once(
    watcher: Watcher, child: subprocess.Popen[bytes]
) -> None:
    child.communicate()  # waited for: there is no such pid any more
    assert watcher.wait(LONG, {(0, 1): child.pid}) == {(0, 1)}


def test_the_doorbell_wakes_once_a_ring(watcher: Watcher, bell: int) -> None:
    os.eventfd_write(bell, 1)
    assert watcher.wait(LONG, {}) == set()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(bell)


def test_who_is_not_asked_for_is_not_watched(
    watcher: Watcher, bell: int, child: subprocess.Popen[bytes]
) -> None:
    watcher.wait(0, {(0, 1): child.pid})
    child.communicate()
    os.eventfd_write(bell, 1)
    assert watcher.wait(LONG, {}) == set()


def test_without_file_descriptors_processes_are_left_to_the_regular_look(
    watcher: Watcher, bell: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_pid: int) -> int:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(os, "pidfd_open", none_left)
    os.eventfd_write(bell, 1)
    assert watcher.wait(LONG, {(0, 1): os.getpid()}) == set()


def test_it_can_sleep_longer_than_the_system_can_count(watcher: Watcher, bell: int) -> None:
    os.eventfd_write(bell, 1)
    assert watcher.wait(1e12, {}) == set()


def test_it_leaves_no_file_descriptor(bell: int, child: subprocess.Popen[bytes]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    watcher = Watcher(bell)
    watcher.wait(0, {(0, 1): child.pid, (1, 1): os.getpid()})
    watcher.close()
    assert set(os.listdir("/proc/self/fd")) <= before
