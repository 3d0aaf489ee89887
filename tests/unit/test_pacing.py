from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shmheap.config import Config
from shmheap.coordinator import pacing
from shmheap.coordinator.pacing import NEVER, SOON_S, Plan, Seen, plan
from shmheap.limits import NO_LIMIT
from shmheap.stats import HeapStats

MIB = 1 << 20
S = 10**9


def stats(**values: Any) -> HeapStats:
    fields = dict.fromkeys((field.name for field in dataclasses.fields(HeapStats)), 0)
    return HeapStats(**{**fields, "pause_ns": (), "next_gc": NEVER, **values})


def seen(now_s: float = 0, *, started_s: float = 0, **values: Any) -> Seen:
    known: dict[str, Any] = {"stats": stats(), "ticked": False, "memory": False, **values}
    known.setdefault("limit_bytes", NO_LIMIT)
    return Seen(now_ns=round(now_s * S), started_ns=round(started_s * S), **known)


# How much heap until the next collection


@pytest.mark.parametrize(
    ("heap_alloc", "gc_percent", "next_gc"),
    [
        (100 * MIB, 100, 200 * MIB),
        (100 * MIB, 50, 150 * MIB),
        (100 * MIB, 0, 100 * MIB),
        (0, 100, 4 * MIB),
        (MIB, 100, 4 * MIB),
        (2 * MIB, 100, 4 * MIB),
        (3 * MIB, 100, 6 * MIB),
        (0, 200, 8 * MIB),
        (0, 25, MIB),
        (100 * MIB, -1, NEVER),
        (0, -1, NEVER),
    ],
)
def test_next_gc(heap_alloc: int, gc_percent: int, next_gc: int) -> None:
    assert pacing.next_gc_bytes(heap_alloc, gc_percent) == next_gc


# Whether a collection is due


def test_at_rest_nothing_is_done() -> None:
    assert plan(seen(119), Config()) == Plan()


@pytest.mark.parametrize(("now_s", "trigger"), [(119.9, None), (120, "forced"), (500, "forced")])
def test_a_collection_is_forced_two_minutes_after_the_last(  # S6
    now_s: float, trigger: str | None
) -> None:
    assert plan(seen(now_s), Config()).collect == trigger
    ran_at_1000 = seen(1000 + now_s, stats=stats(last_gc=1000 * S))
    assert plan(ran_at_1000, Config()).collect == trigger


def test_where_none_ran_two_minutes_count_from_the_coordinator_s_start() -> None:
    assert plan(seen(1119, started_s=1000), Config()).collect is None
    assert plan(seen(1120, started_s=1000), Config()).collect == "forced"


def test_a_heap_without_growth_limit_is_still_collected_by_force() -> None:
    config = Config(gc_percent=-1)
    assert plan(seen(120, stats=stats(heap_alloc=1 << 40)), config).collect == "forced"


@pytest.mark.parametrize(("heap_alloc", "trigger"), [(9, None), (10, "heap"), (11, "heap")])
def test_a_collection_is_due_when_the_heap_has_grown(heap_alloc: int, trigger: str | None) -> None:
    grown = seen(stats=stats(heap_alloc=heap_alloc, next_gc=10))
    assert plan(grown, Config()).collect == trigger


def test_triggers_have_an_order() -> None:
    all_at_once = seen(120, asked_gc=True, memory=True, stats=stats(heap_alloc=10, next_gc=10))
    order = []
    for taken_away in ({}, {"asked_gc": False}, {"memory": False}, {"stats": stats()}):
        all_at_once = dataclasses.replace(all_at_once, **taken_away)
        order.append(plan(all_at_once, Config()).collect)
    assert order == ["asked", "memory", "heap", "forced"]


# What is released


@pytest.mark.parametrize(
    ("what", "release", "everything"),
    [
        ({}, None, False),
        ({"ticked": True}, "aged", False),
        ({"asked_aged": True}, "asked", False),
        ({"asked_all": True}, "asked", True),
        ({"memory": True}, "memory", True),
        ({"memory": True, "ticked": True}, "memory", True),
        ({"memory": True, "asked_aged": True}, "asked", True),
    ],
)
def test_what_is_released_and_why(
    what: dict[str, bool], release: str | None, everything: bool
) -> None:
    decided = plan(seen(**what), Config())
    assert (decided.release, decided.everything) == (release, everything)


@pytest.mark.parametrize(("held", "short"), [(63 * MIB, False), (64 * MIB, True)])
def test_at_the_memory_limit_memory_is_short(held: int, short: bool) -> None:
    decided = plan(seen(stats=stats(committed_bytes=held), limit_bytes=64 * MIB), Config())
    expected = Plan(collect="memory", release="memory", everything=True, short=True)
    assert decided == (expected if short else Plan())


def test_without_a_limit_memory_is_never_short_by_itself() -> None:
    assert plan(seen(stats=stats(committed_bytes=1 << 50)), Config()) == Plan()


def test_a_scavenge_that_was_asked_for_is_no_shortage() -> None:
    assert not plan(seen(asked_all=True, asked_gc=True), Config()).short


@pytest.mark.parametrize(
    ("idle_s", "released"), [(0, False), (299, False), (300, False), (300.2, True), (301, True)]
)
@pytest.mark.parametrize("stamped_s", [0, 1.05, 86_400.99])
def test_a_page_goes_five_minutes_after_a_collection_saw_it(  # S7
    stamped_s: float, idle_s: float, released: bool
) -> None:
    stamp = int(stamped_s * 10) + 1
    now_stamp = int((stamped_s + idle_s) * 10) + 1
    assert (stamp <= pacing.stamp_cutoff(now_stamp, 300)) is released


def test_no_page_goes_early_because_stamps_are_rounded() -> None:
    # Stamped at 0.099 s, and looked at 0.1 s later, less a millisecond: nine stamps in ten agree
    # that it is old enough, and it is not.
    stamp, now_stamp = int(0.099 * 10) + 1, int(0.198 * 10) + 1
    assert now_stamp - stamp == 1
    assert stamp > pacing.stamp_cutoff(now_stamp, 0.1)


def test_in_a_young_heap_no_stamp_is_old_enough() -> None:
    assert pacing.stamp_cutoff(now_stamp=1, scavenge_after_s=300) < 1


# Leases of the dead


@pytest.mark.parametrize(("after_s", "expired"), [(0, False), (29.9, False), (30, True)])
def test_a_dead_sender_s_leases_last_thirty_seconds(after_s: float, expired: bool) -> None:
    died_ns, made_ns = 1000 * S, 999 * S
    cutoff_ns = pacing.lease_cutoff_ns(died_ns, died_ns + round(after_s * S), Config())
    assert (made_ns < cutoff_ns) is expired


def test_grace_of_nothing_ends_at_once() -> None:
    assert pacing.lease_cutoff_ns(5, 5, Config(lease_grace_s=0)) == 5


def test_leases_of_the_living_end_only_if_that_was_said() -> None:
    assert pacing.old_lease_cutoff_ns(1000 * S, Config()) == 0
    assert pacing.old_lease_cutoff_ns(1000 * S, Config(lease_max_s=60)) == 940 * S
    assert pacing.old_lease_cutoff_ns(1000 * S, Config(lease_max_s=2000)) == 0


@pytest.mark.parametrize(
    ("leases", "oldest_lease_s", "pile"),
    [(9_999, 1e6, False), (10_000, 59.0, False), (10_000, 60.0, True)],
)
def test_many_old_leases_are_a_pile(leases: int, oldest_lease_s: float, pile: bool) -> None:
    assert pacing.leases_pile_up(stats(leases=leases, oldest_lease_s=oldest_lease_s)) is pile


# How long to sleep


@pytest.mark.parametrize(
    ("dues_s", "soon", "wait_s"),
    [
        ([60], False, 50),
        ([60, 25], False, 15),
        ([60, 25], True, SOON_S),
        ([10.01], True, 0.01),
        ([10], False, SOON_S),  # overdue: it was just tried
        ([3, 60], False, SOON_S),
    ],
)
def test_sleep_until_the_next_thing_is_due(dues_s: list[float], soon: bool, wait_s: float) -> None:
    dues_ns = [round(due * S) for due in dues_s]
    assert pacing.wait_s(10 * S, dues_ns, soon=soon) == pytest.approx(wait_s)


def test_ticks_are_counted_from_the_last_look() -> None:  # no burst after a suspended night
    assert pacing.next_tick_ns(10_000 * S, Config()) == 10_060 * S
