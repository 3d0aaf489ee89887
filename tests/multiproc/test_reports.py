"""What collections and statistics tell: bytes by reason, triggers, leases and their ages.

The loop is the coordinator's own, on the heap's real books; its clock can be put forward.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator

import pytest
from by_hand import HeapByHand
from processes import Worker

from shmheap import Config, GCReport, StaleHandle
from shmheap.coordinator import WANT_MEMORY, loop, pacing

MIB = 1 << 20


class Ahead:
    """The real clock, put forward."""

    seconds = 0

    def monotonic_ns(self) -> int:
        return time.monotonic_ns() + self.seconds * 10**9


class Said(logging.Handler):
    """The warnings of a log."""

    def __init__(self, hand: HeapByHand) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        hand.log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def clock() -> Ahead:
    return Ahead()


@pytest.fixture
def hand(heap_name: str, clock: Ahead) -> Iterator[HeapByHand]:
    config = Config(lease_grace_s=0, lease_max_s=60)
    with HeapByHand(heap_name, config=config, clock=clock) as made:
        yield made
        made.assert_sound()


# Reports


def test_bytes_are_told_by_reason(hand: HeapByHand, clock: Ahead) -> None:
    """A cycle, what the dead held and had sent, and a handle that nobody took."""
    kept = hand.heap.put(b"kept")
    before = hand.stats.heap_alloc
    circle = hand.heap.dict()
    circle["self"] = circle
    circle["block"] = hand.heap.put(bytes(5000))
    circle_bytes = hand.stats.heap_alloc - before
    circle_blocks = hand.stats.heap_objects - 1
    del circle
    lost = hand.heap.put(bytes(300_000))
    lost_bytes = pickle.dumps(lost)
    del lost
    with Worker("forkserver") as worker:
        worker.do("attach", hand.heap.name)
        worker.do("alloc", "held", 100_000)
        worker.do("put", "sent", bytes(20_000))
        worker.do("reduce", "sent")
        worker.do("drop", "sent")
        worker.kill()
    hand.turns_until(lambda: hand.stats.processes == 1)
    clock.seconds = 61
    report = hand.gc()
    assert report.trigger == "asked"
    assert (report.marked, report.swept) == (1, circle_blocks)
    assert report.freed_bytes == circle_bytes
    assert report.freed_dead_bytes == 100_000
    assert report.freed_lease_bytes == 20_000 + 300_000
    assert report.pause_max_ns > 0
    assert report.duration_ns > 0
    assert hand.stats.pause_ns == (report.pause_max_ns,)
    assert hand.stats.pause_total_ns == report.pause_max_ns
    again = hand.gc()
    assert (again.cycle, again.marked) == (report.cycle + 1, 1)
    assert again.swept + again.freed_bytes == 0
    assert again.freed_dead_bytes + again.freed_lease_bytes == 0
    with pytest.raises(StaleHandle):
        pickle.loads(lost_bytes)
    assert bytes(kept) == b"kept"


def grow(hand: HeapByHand, clock: Ahead) -> None:
    """Beyond next_gc: gc_percent more than the last collection left, and 4 MiB at least."""
    assert hand.stats.next_gc == 6 * MIB, "3 MiB, and 100 percent more"
    hand.heap.roots["more"] = hand.heap.alloc(3 * MIB)


def be_late(hand: HeapByHand, clock: Ahead) -> None:
    clock.seconds += 121


def be_short(hand: HeapByHand, clock: Ahead) -> None:
    hand.heap._want(WANT_MEMORY)


def ask(hand: HeapByHand, clock: Ahead) -> None:
    hand.heap._request(loop.ASK_GC)


@pytest.mark.parametrize(
    ("cause", "trigger"),
    [(ask, "asked"), (grow, "heap"), (be_late, "forced"), (be_short, "memory")],
)
def test_what_starts_a_collection(
    hand: HeapByHand,
    clock: Ahead,
    monkeypatch: pytest.MonkeyPatch,
    cause: Callable[[HeapByHand, Ahead], None],
    trigger: str,
) -> None:
    reports: list[GCReport] = []
    collect = loop.collect

    def noted(*args: object, **kwargs: object) -> GCReport:
        reports.append(collect(*args, **kwargs))  # type: ignore[arg-type]
        return reports[-1]

    block = hand.heap.alloc(3 * MIB)
    hand.gc()
    monkeypatch.setattr(loop, "collect", noted)
    hand.turn()
    assert reports == [], "without a cause there is none"
    cause(hand, clock)
    hand.turn()
    assert [report.trigger for report in reports] == [trigger]
    assert hand.stats.num_gc == 2
    assert hand.stats.num_forced_gc == (trigger == "forced")
    assert block


# Leases


def test_leases_are_counted_and_the_oldest_has_an_age(hand: HeapByHand) -> None:
    block = hand.heap.put(b"x")
    hand.gc()
    assert (hand.stats.leases, hand.stats.oldest_lease_s) == (0, 0)
    made_s = time.monotonic()
    first, second = block.lease(), block.lease()
    young_s = hand.stats.oldest_lease_s
    hand.gc()
    assert hand.stats.leases == 2
    assert young_s == 0, "its age is that of the last collection's look"
    assert 0 < hand.stats.oldest_lease_s <= time.monotonic() - made_s
    first.release()
    hand.gc()
    assert hand.stats.leases == 1
    second.release()
    assert (hand.stats.leases, hand.stats.oldest_lease_s) == (0, 0)


def test_a_pile_of_leases_is_told_once(hand: HeapByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "MANY_LEASES", 3)
    monkeypatch.setattr(pacing, "OLD_LEASE_S", 0.0)
    said = Said(hand)
    block = hand.heap.put(b"x")
    leases = [block.lease() for _ in range(2)]
    hand.gc()
    hand.turn()
    assert said.texts == []
    leases.append(block.lease())
    for _ in range(3):
        hand.gc()
    [text] = said.texts
    assert text.startswith("3 pickled handles are on their way, the oldest for 0 s")
    for lease in leases:
        lease.release()


def test_a_lease_lasts_as_long_as_it_may(hand: HeapByHand, clock: Ahead) -> None:
    """lease_max_s: the next collection ends it, and the program is told in the log."""
    said = Said(hand)
    old = pickle.dumps(hand.heap.put(bytes(100_000)))
    hand.gc()
    assert hand.stats.leases == 1
    clock.seconds = 61
    assert hand.gc().freed_lease_bytes == 100_000
    assert (hand.stats.leases, hand.stats.heap_objects) == (0, 0)
    with pytest.raises(StaleHandle):
        pickle.loads(old)
    [text] = said.texts
    assert text.startswith("1 pickled handles were not unpickled within 60 s (lease_max_s)")


def test_one_pickle_for_many_at_once(hand: HeapByHand) -> None:
    """The same bytes, read by three at the same time, and again as long as the block lives."""
    data = pickle.dumps(hand.heap.put(b"abc"))
    with Worker("forkserver") as one, Worker("forkserver") as two, Worker("forkserver") as three:
        workers = (one, two, three)
        for worker in workers:
            worker.do("attach", hand.heap.name)
            worker.do("keep", "bytes", data)
        for worker in workers:
            worker.start("work", "bytes", "load_many", 200)
        for worker in workers:
            assert worker.result() == 200
        assert (hand.stats.leases, hand.stats.heap_objects) == (0, 1)
        again = pickle.loads(data)
        assert bytes(again) == b"abc"
        for worker in workers:
            worker.end()
    hand.turns_until(lambda: hand.stats.processes == 1)
    again.free()
    assert hand.stats.heap_objects == 0
    with pytest.raises(StaleHandle):
        pickle.loads(data)
