"""The coordinator on fake time: what DESIGN's rows S4 to S15 promise about when and why."""

from __future__ import annotations

import logging

import pytest
from fake_steward import UNIT, Block, Process, World

from shmheap.config import Config
from shmheap.coordinator import (
    ASK_GC,
    ASK_SCAVENGE_AGED,
    ASK_SCAVENGE_ALL,
    DEAD,
    FREE,
    IDLE,
    LIVE,
    MARK,
    SWEEP,
    WANT_GC,
    WANT_LEAVE,
    WANT_REAP,
)
from shmheap.coordinator.loop import Outcome
from shmheap.coordinator.pacing import (
    LONGEST_RETRY_S,
    NEVER,
    PATIENCE_MS,
    RETRY_PATIENCE_MS,
    SOON_S,
)
from shmheap.stats import GCReport, ScavengeReport

STEPS = {"reap", "start_cycle", "sweep", "release", "refuse"}


def steps(world: World) -> list[str]:
    """What the coordinator did that tests are about, in order."""
    return [call for call in world.heap.calls if call in STEPS]


def idle(world: World, process: Process, units: int = 8) -> Block:
    """Leave pages idle that no collection has seen yet."""
    block = world.heap.alloc(process, units)
    world.heap.drop(process, block)
    return block


def gc_reports(world: World) -> list[GCReport]:
    return [GCReport.from_fields(fields) for _, fields in world.heap.answers[ASK_GC]]


def scavenge_reports(world: World, kind: int) -> list[ScavengeReport]:
    return [ScavengeReport.from_fields(fields) for _, fields in world.heap.answers[kind]]


# Forced collections (S6, S8)


def test_a_collection_is_forced_after_two_minutes() -> None:
    world = World()
    world.heap.attach()
    world.run_for(119)
    assert world.heap.num_forced == 0
    world.run_for(1)
    assert world.heap.num_forced == 1
    world.run_for(3600 - 120)
    assert world.heap.num_forced == 30


def test_any_collection_postpones_the_forced_one() -> None:
    world = World()
    world.heap.attach()
    world.run_for(100)
    world.heap.ask(ASK_GC)
    world.turn()
    world.run_for(79)  # to 179: the look at 120 finds a collection of 100
    assert world.heap.num_forced == 0
    world.run_for(61)
    assert world.heap.num_forced == 1


def test_it_looks_every_half_of_the_shorter_limit() -> None:
    world = World(Config(forced_gc_s=10, scavenge_after_s=4))
    world.heap.attach()
    assert world.coordinator.wait_s() == 2
    world.run_for(1)
    assert world.coordinator.wait_s() == 1
    world.turn()  # somebody rings: no tick, and the next is when it was
    assert world.coordinator.wait_s() == 1


# The age rule (S4, S7, S10)


def test_a_page_goes_back_five_minutes_after_a_collection_saw_it_unused() -> None:
    world = World()
    process = world.heap.attach()
    world.run_for(1)
    idle(world, process)
    world.heap.ask(ASK_GC)
    world.turn()
    world.clock.advance(299)
    world.turn()
    world.heap.ask(ASK_SCAVENGE_AGED)
    world.turn()
    assert world.heap.held_bytes == 8 * UNIT
    world.clock.advance(2)
    world.heap.ask(ASK_SCAVENGE_AGED)
    world.turn()
    assert world.heap.held_bytes == 0


def test_nobody_needs_to_ask() -> None:
    world = World()
    process = world.heap.attach()
    idle(world, process)
    world.run_for(120)  # forced, and dates the pages
    world.run_for(300)
    assert world.heap.held_bytes == 8 * UNIT
    world.run_for(60)  # the next tick
    assert world.heap.held_bytes == 0
    assert steps(world).count("start_cycle") == 4


def test_a_page_that_no_collection_has_seen_has_no_age() -> None:
    world = World(Config(forced_gc_s=100_000, scavenge_after_s=10))
    process = world.heap.attach()
    idle(world, process)
    world.run_for(1000)
    assert world.heap.held_bytes == 8 * UNIT


def test_a_page_that_was_used_in_between_starts_again() -> None:  # S12, S13
    world = World()
    process = world.heap.attach()
    block = idle(world, process)
    world.heap.ask(ASK_GC)
    world.turn()
    world.clock.advance(200)
    again = world.heap.alloc(process, 8)
    assert again.units == block.units
    world.heap.drop(process, again)
    world.clock.advance(150)
    world.heap.ask(ASK_SCAVENGE_AGED)
    world.turn()
    assert world.heap.held_bytes == 8 * UNIT


def test_churn_beside_it_keeps_no_page_young() -> None:  # section 4, fault 1
    world = World()
    process = world.heap.attach()
    edge = world.heap.alloc(process)
    idle(world, process)
    for _ in range(9):
        world.run_for(60)
        world.heap.drop(process, edge)
        edge = world.heap.alloc(process)
    assert world.heap.held_bytes == UNIT


def test_in_seconds_instead_of_minutes() -> None:
    world = World(Config(forced_gc_s=0.4, scavenge_after_s=0.6))
    process = world.heap.attach()
    idle(world, process)
    world.run_for(1.0)
    assert world.heap.held_bytes == 8 * UNIT
    world.run_for(0.4)
    assert world.heap.held_bytes == 0


# Growth


def test_growth_starts_a_collection() -> None:
    world = World()
    process = world.heap.attach()
    world.heap.lose(process, world.heap.alloc(process, 3))
    world.turn()
    assert "start_cycle" not in steps(world)
    world.heap.lose(process, world.heap.alloc(process, 1))  # 4 MiB
    world.turn()
    assert steps(world).count("start_cycle") == 1
    assert world.heap.blocks == set()


def test_who_asked_for_one_too_early_is_told_from_when_on() -> None:
    """A heap that stayed just below next_gc woke the coordinator at each large allocation."""
    world = World()
    process = world.heap.attach()
    world.heap.alloc(process, 3)
    world.heap.wants |= WANT_GC
    world.turn()
    world.turn()
    assert world.heap.calls.count("set_next_gc") == 1
    world.heap.alloc(process, 1)
    world.heap.wants |= WANT_GC
    world.turn()
    assert steps(world).count("start_cycle") == 1
    assert world.heap.calls.count("set_next_gc") == 1


# Asking


def test_a_collection_that_was_asked_for_is_reported() -> None:
    world = World()
    process = world.heap.attach()
    world.heap.lose(process, world.heap.alloc(process, 2))
    ticket = world.heap.ask(ASK_GC)
    world.turn()
    [report] = gc_reports(world)
    assert (report.trigger, report.cycle, report.freed_bytes) == ("asked", 1, 2 * UNIT)
    assert world.heap.pending(ASK_GC) == 0
    assert world.heap.answers[ASK_GC][0][0] == ticket
    world.turn()
    assert len(world.heap.answers[ASK_GC]) == 1


def test_many_who_ask_at_once_share_one_collection() -> None:
    world = World()
    world.heap.attach()
    for _ in range(5):
        last = world.heap.ask(ASK_GC)
    world.turn()
    assert [ticket for ticket, _ in world.heap.answers[ASK_GC]] == [last]
    assert steps(world).count("start_cycle") == 1


def test_who_asks_during_a_turn_is_answered_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.heap.attach()
    world.heap.ask(ASK_GC)
    mark = world.heap.mark

    def mark_and_be_asked() -> tuple[int, int]:
        world.heap.ask(ASK_GC)  # its caller must see what it dropped before being collected
        return mark()

    with monkeypatch.context() as patch:
        patch.setattr(world.heap, "mark", mark_and_be_asked)
        world.turn()
    assert [ticket for ticket, _ in world.heap.answers[ASK_GC]] == [1]
    assert world.heap.wants
    world.turn()
    assert [ticket for ticket, _ in world.heap.answers[ASK_GC]] == [1, 2]


def test_scavenging_everything_ignores_age() -> None:
    world = World()
    process = world.heap.attach()
    idle(world, process)
    world.heap.ask(ASK_SCAVENGE_AGED)
    world.turn()
    assert scavenge_reports(world, ASK_SCAVENGE_AGED)[0].released_bytes == 0
    world.heap.ask(ASK_SCAVENGE_ALL)
    world.turn()
    [report] = scavenge_reports(world, ASK_SCAVENGE_ALL)
    assert (report.trigger, report.released_bytes) == ("asked", 8 * UNIT)
    assert world.heap.held_bytes == 0
    assert "start_cycle" not in steps(world)


def test_a_request_that_a_killed_coordinator_left_is_answered_first_thing() -> None:
    world = World(script=[(1, lambda: world.coordinator.stop())])
    world.heap.attach()
    world.heap.ask(ASK_GC)
    world.heap.wants = 0  # the ring was heard
    world.coordinator.run()
    assert len(world.heap.answers[ASK_GC]) == 1
    assert world.clock.monotonic() == 1


# Memory is short (section 4, fault 4)


def test_a_memory_limit_releases_at_once_whatever_the_age() -> None:
    world = World(Config(memory_limit=16 * UNIT))
    process = world.heap.attach()
    world.heap.alloc(process, 8)
    idle(world, process, 7)
    world.turn()
    assert world.heap.held_bytes == 15 * UNIT
    idle(world, process, 8)
    world.turn()
    assert world.heap.held_bytes == 8 * UNIT
    assert world.clock.monotonic() == 0


def test_what_the_cgroup_has_left_is_looked_at_in_each_turn() -> None:
    left = iter([16 * UNIT, UNIT, 0, 0])
    world = World(left_bytes=lambda: next(left))
    process = world.heap.attach()
    world.turn()
    assert world.heap.limit == (16 * UNIT, UNIT)
    world.heap.alloc(process, 3)
    world.turn()
    assert world.heap.limit == (4 * UNIT, 3 * UNIT + UNIT // 16)
    assert steps(world) == []
    idle(world, process, 1)
    world.turn()  # nothing is left: what is idle goes back at once
    assert world.heap.limit == (4 * UNIT, 4 * UNIT)
    assert steps(world) == ["start_cycle", "sweep", "release"]
    world.turn()  # and does not come back: it was given to the cgroup
    assert world.heap.limit == (3 * UNIT, 3 * UNIT)


def test_a_heap_whose_limit_is_not_the_coordinators_keeps_it() -> None:
    world = World()
    world.heap.attach()
    world.turn()
    assert world.heap.limit is None


def test_who_waits_gets_what_a_collection_frees() -> None:
    world = World(units=8)
    process = world.heap.attach()
    world.heap.lose(process, world.heap.alloc(process, 8))
    world.heap.wait(process)
    world.turn()
    assert steps(world) == ["start_cycle", "sweep", "release"]
    assert not process.refused
    assert world.heap.blocks == set()


# Waiting for memory that no collection can free (rule 16, S15)


def test_who_waits_in_vain_is_refused() -> None:
    world = World(units=8)
    process = world.heap.attach()
    world.heap.alloc(process, 8)
    world.heap.wait(process)
    world.turn()
    assert process.refused
    assert steps(world) == ["start_cycle", "sweep", "release", "refuse"]
    assert world.messages(logging.WARNING) == ["refused 1 waiters: no collection can free memory"]


def test_nobody_is_refused_while_another_who_holds_memory_runs() -> None:
    world = World(units=8)
    one, other = world.heap.attach(), world.heap.attach()
    world.heap.alloc(one, 4)
    held = world.heap.alloc(other, 4)
    world.heap.wait(one)
    world.turn()
    world.run_for(3600)  # however long: the coordinator's own ticks are no reason either
    assert not one.refused
    world.heap.drop(other, held)
    world.turn()
    assert not one.refused


def test_when_the_last_one_comes_to_wait_all_are_refused() -> None:
    world = World(units=8)
    one, other = world.heap.attach(), world.heap.attach()
    for process in (one, other):
        world.heap.alloc(process, 4)
    world.heap.wait(one)
    world.turn()
    world.heap.wait(other)
    world.turn()
    assert one.refused
    assert other.refused


def test_reaping_what_another_held_comes_before_refusing() -> None:
    world = World(units=8)
    one, other = world.heap.attach(), world.heap.attach()
    world.heap.alloc(one, 4)
    world.heap.alloc(other, 4)
    world.heap.wait(one)
    world.heap.die(other)
    world.turn()
    assert "refuse" not in steps(world)
    assert not one.refused


def test_when_the_last_hope_dies_in_silence_the_waiter_is_refused() -> None:
    world = World(units=8)
    one, other = world.heap.attach(), world.heap.attach()
    block = world.heap.alloc(one, 8)
    other.pins.append(block)  # it holds the same, so its death frees nothing
    world.heap.wait(one)
    world.turn()
    assert not one.refused
    world.heap.die(other)
    world.turn(other)
    assert not one.refused  # a pin was taken: that might have freed something
    assert world.coordinator.wait_s() == pytest.approx(SOON_S)
    world.run_for(SOON_S)
    assert one.refused


def test_when_the_last_hope_lets_go_in_silence_the_next_look_refuses_the_waiter() -> None:
    world = World(units=8)
    one, other = world.heap.attach(), world.heap.attach()
    block = world.heap.alloc(one, 8)
    other.pins.append(block)
    world.heap.wait(one)
    world.turn()
    other.pins.remove(block)  # and holds nothing now that could be freed
    world.run_for(59)
    assert not one.refused
    world.run_for(1)
    assert one.refused


def test_who_has_missed_that_memory_was_freed_is_not_refused() -> None:
    world = World(units=8)
    process = world.heap.attach()
    held = world.heap.alloc(process, 4)
    world.heap.wait(process)
    world.heap.drop(process, held)  # another thread of it; the waiter has not woken up yet
    world.turn()
    assert not process.refused


def test_the_coordinator_at_rest_refuses_nobody() -> None:
    world = World()
    process = world.heap.attach()
    world.heap.alloc(process, 1)
    world.run_for(3600)
    assert "refuse" not in steps(world)


# Deaths


def test_the_dead_are_reaped_before_the_collection() -> None:
    world = World()
    user, dead = world.heap.attach(), world.heap.attach()
    world.heap.alloc(user)
    world.heap.alloc(dead, 2)
    world.heap.die(dead)
    world.heap.ask(ASK_GC)
    world.turn(dead)
    assert steps(world) == ["reap", "start_cycle", "sweep"]
    [report] = gc_reports(world)
    assert (report.freed_dead_bytes, report.freed_bytes) == (2 * UNIT, 0)


def test_a_report_counts_what_was_reaped_since_the_one_before() -> None:
    world = World()
    world.heap.attach()
    for units in (2, 3):
        dead = world.heap.attach()
        world.heap.alloc(dead, units)
        world.heap.die(dead)
        world.turn(dead)
    for _ in range(2):
        world.heap.ask(ASK_GC)
        world.turn()
    assert [report.freed_dead_bytes for report in gc_reports(world)] == [5 * UNIT, 0]


def test_who_is_on_the_way_out_is_probed_again_soon() -> None:
    world = World()
    world.heap.attach()
    leaving = world.heap.attach()
    world.turn(leaving)
    assert "reap" not in steps(world)
    assert world.coordinator.wait_s() == pytest.approx(SOON_S)
    world.heap.die(leaving)
    world.run_for(SOON_S)
    assert leaving.state == FREE
    assert world.coordinator.wait_s() > 1


def test_leases_of_the_dead_go_when_their_grace_ends() -> None:
    world = World(Config(lease_grace_s=30))
    world.heap.attach()
    sender = world.heap.attach()
    world.heap.lease(sender, world.heap.alloc(sender, 2))
    world.run_for(10)
    world.heap.die(sender)
    world.turn(sender)
    assert world.coordinator.wait_s() == pytest.approx(30)  # sooner than the tick at 60
    world.run_for(29)
    assert sender.state == DEAD
    assert len(world.heap.blocks) == 1
    world.run_for(1)
    assert sender.state == FREE
    world.heap.ask(ASK_GC)
    world.turn()
    assert gc_reports(world)[0].freed_lease_bytes == 2 * UNIT


def test_while_a_grace_lasts_every_ring_is_no_death() -> None:
    world = World(units=8)
    user, runs, sender = (world.heap.attach() for _ in range(3))
    for process in (user, runs, sender):
        world.heap.alloc(process)
    world.heap.lease(sender, sender.pins[0])
    world.heap.die(sender)
    world.turn(sender)
    world.heap.wait(user)
    world.turn()
    collections = steps(world).count("start_cycle")
    world.turn()
    assert steps(world).count("start_cycle") == collections


def test_a_living_sender_s_leases_never_expire() -> None:
    world = World(Config(lease_grace_s=1))
    sender = world.heap.attach()
    block = world.heap.alloc(sender)
    world.heap.lease(sender, block)
    world.heap.drop(sender, block)
    world.run_for(24 * 3600)
    assert world.heap.blocks == {block}


def test_a_lease_that_is_too_old_ends_at_the_next_collection() -> None:
    world = World(Config(lease_max_s=60, forced_gc_s=1000))
    sender = world.heap.attach()
    old, young = world.heap.alloc(sender, 2), world.heap.alloc(sender)
    world.heap.lease(sender, old)
    world.heap.drop(sender, old)
    world.run_for(61)
    world.heap.lease(sender, young)
    assert len(sender.leases) == 2  # no collection has run
    world.heap.ask(ASK_GC)
    world.turn()
    assert [block for block, _ in sender.leases] == [young]
    assert world.heap.blocks == {young}
    [report] = gc_reports(world)
    assert (report.freed_lease_bytes, report.freed_bytes) == (2 * UNIT, 0)
    assert steps(world)[-2:] == ["start_cycle", "sweep"]
    assert world.messages(logging.WARNING) == [
        "1 pickled handles were not unpickled within 60 s (lease_max_s): whoever does so now may "
        "find the block gone"
    ]


def test_leases_that_pile_up_are_told_once() -> None:
    world = World()
    world.heap.attach()
    world.run_for(600)
    assert world.messages(logging.WARNING) == []
    world.heap.lease_flood = (20_000, 90.4)
    world.run_for(600)
    assert world.messages(logging.WARNING) == [
        "20000 pickled handles are on their way, the oldest for 90 s: each keeps its block until "
        "it is unpickled or its sender ends"
    ]


# Coming and going (S5, S15)


def test_it_leaves_with_the_last_user() -> None:
    world = World()
    one, other = world.heap.attach(), world.heap.attach()
    world.heap.leave(one)
    assert world.turn() is Outcome.STAYS
    world.heap.leave(other)
    assert world.turn() is Outcome.CLOSED
    assert world.heap.closed


def test_its_own_ticks_keep_nothing_alive() -> None:
    world = World()
    process = world.heap.attach()
    world.run_for(1000)
    world.heap.die(process)  # and nobody rings
    world.run_for(60)
    assert world.outcome is Outcome.CLOSED


def test_it_stays_while_a_handle_of_the_last_user_is_on_its_way() -> None:
    world = World()
    sender = world.heap.attach()
    world.heap.lease(sender, world.heap.alloc(sender))
    world.heap.die(sender)
    assert world.turn(sender) is Outcome.STAYS
    world.run_for(29)
    assert world.outcome is Outcome.STAYS
    world.run_for(1)
    assert world.outcome is Outcome.CLOSED


def test_who_attaches_in_the_last_moment_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.heap.leave(world.heap.attach())
    monkeypatch.setattr(world.heap, "try_close", lambda: False)
    assert world.turn() is Outcome.STAYS


def test_a_heap_to_be_kept_is_left_open() -> None:
    world = World(Config(keep=True))
    process = world.heap.attach()
    assert world.turn() is Outcome.STAYS
    world.heap.leave(process)
    assert world.turn() is Outcome.LEAVES
    assert not world.heap.closed


def test_on_a_heap_without_users_it_leaves_at_once() -> None:
    world = World()
    assert world.coordinator.run() is Outcome.CLOSED
    assert world.clock.monotonic() == 0


def test_started_by_hand_it_waits_for_the_first_user_and_leaves_with_the_last() -> None:
    world = World(linger=True)
    world.run_for(10_000)
    assert world.outcome is Outcome.STAYS
    process = world.heap.attach()
    world.turn()
    world.heap.leave(process)
    assert world.turn() is Outcome.CLOSED


def test_a_first_user_who_came_and_went_between_two_turns_was_waited_for_for_ever() -> None:
    world = World(linger=True)
    world.run_for(100)
    world.heap.wants |= WANT_REAP | WANT_LEAVE  # it attached, and left
    assert world.turn() is Outcome.CLOSED


def test_stopped_it_leaves_the_heap_to_its_users() -> None:
    world = World()
    world.heap.attach()
    world.coordinator.stop()
    assert world.turn() is Outcome.LEAVES
    assert not world.heap.closed
    assert world.messages(logging.INFO) == [
        "stopped with 1 users: whoever needs a successor starts it"
    ]


def test_stopped_while_it_waits_for_a_first_user_it_closes_the_heap() -> None:
    world = World(linger=True, script=[(90, lambda: world.coordinator.stop())])
    assert world.coordinator.run() is Outcome.CLOSED
    assert world.clock.monotonic() == 90


@pytest.mark.parametrize(("phase", "cycles"), [(MARK, 1), (SWEEP, 0)])
def test_a_successor_ends_the_cycle_and_goes_on(phase: int, cycles: int) -> None:
    world = World(script=[(61, lambda: world.coordinator.stop())])
    process = world.heap.attach()
    block = world.heap.alloc(process)
    world.heap.phase = phase
    world.heap.marked = {id(block)}
    assert world.coordinator.run() is Outcome.LEAVES
    assert steps(world).count("start_cycle") == cycles
    assert world.heap.calls[0] == "begin"
    assert world.heap.stats()["num_gc"] == 1


# A process that was stopped inside an operation


def test_a_process_stopped_while_another_is_reaped_ended_the_coordinator() -> None:
    world = World()
    world.heap.attach()
    dead = world.heap.attach()
    world.heap.alloc(dead)
    world.heap.die(dead)
    world.heap.stuck = {"reap"}
    assert world.turn(dead) is Outcome.STAYS
    assert world.heap.blocks
    world.run_for(10)
    world.heap.stuck.clear()
    world.run_for(LONGEST_RETRY_S)
    assert not world.heap.blocks
    assert dead.state == FREE


def test_one_that_cannot_be_reaped_kept_the_others_from_it() -> None:
    world = World()
    first, second = world.heap.attach(), world.heap.attach()
    for process in (first, second):
        world.heap.die(process)
    reap = world.heap.reap

    def reap_second_only(index: int, cutoff_ns: int, /) -> tuple[int, int, int, int, int, bool]:
        if index == first.number:
            raise TimeoutError("stopped")
        return reap(index, cutoff_ns)

    world.heap.reap = reap_second_only  # type: ignore[method-assign]
    world.turn(first, second)
    assert (first.state, second.state) == (LIVE, FREE)


def test_a_process_stopped_while_a_successor_takes_over_ended_it() -> None:
    world = World()
    world.heap.attach()
    world.heap.stuck = {"begin"}
    world.coordinator._wakeup.script = [  # type: ignore[attr-defined]
        (5, lambda: world.heap.stuck.clear()),
        (61, lambda: world.coordinator.stop()),
    ]
    assert world.coordinator.run() is Outcome.LEAVES
    assert world.heap.calls.count("begin") > 2
    assert "goes on" in world.messages(logging.INFO)[0]


def test_a_successor_that_cannot_begin_could_not_be_stopped() -> None:
    world = World(script=[(5, lambda: world.coordinator.stop())])
    world.heap.attach()
    world.heap.stuck = {"begin"}
    assert world.coordinator.run() is Outcome.LEAVES


def test_a_cycle_that_a_successor_could_not_resume_was_never_ended() -> None:
    world = World(script=[(5, lambda: world.heap.stuck.clear())])
    world.heap.attach()
    world.heap.phase = MARK
    world.heap.stuck = {"start_cycle"}
    world.coordinator._take_over()
    assert world.heap.phase == MARK
    world.heap.stuck.clear()
    world.run_for(LONGEST_RETRY_S)
    assert world.heap.phase == IDLE


@pytest.mark.parametrize("step", ["start_cycle", "sweep"])
def test_a_stalled_collection_was_not_tried_again(step: str) -> None:
    world = World(Config(forced_gc_s=100_000, scavenge_after_s=100_000))
    process = world.heap.attach()
    world.heap.lose(process, world.heap.alloc(process, 5))
    world.heap.stuck = {step}
    world.heap.next_gc = 1
    world.turn()
    world.heap.next_gc = NEVER  # what made it due is over, but it was begun
    assert world.heap.blocks
    world.run_for(60)
    world.heap.stuck.clear()
    world.run_for(LONGEST_RETRY_S)
    assert not world.heap.blocks
    assert world.heap.phase == IDLE


def test_the_coordinator_waited_in_full_for_the_same_process_over_and_over() -> None:
    world = World()
    world.heap.attach()
    world.heap.ask(ASK_GC)
    world.heap.stuck = {"start_cycle"}
    world.turn()
    assert world.heap.patience_ms == [PATIENCE_MS]
    world.run_for(600)
    retries = world.heap.patience_ms[1:]
    assert set(retries) == {RETRY_PATIENCE_MS}
    assert 600 / LONGEST_RETRY_S <= len(retries) <= 610 / LONGEST_RETRY_S
    assert len(world.messages(logging.WARNING)) == 1
    world.heap.stuck.clear()
    world.run_for(LONGEST_RETRY_S)
    assert len(gc_reports(world)) == 1
    assert world.coordinator.wait_s() > LONGEST_RETRY_S
    world.turn()
    assert world.heap.patience_ms[-1] == PATIENCE_MS


def test_waiters_were_refused_though_a_collection_could_not_be_made() -> None:
    world = World(units=8)
    waiter = world.heap.attach()
    world.heap.lose(waiter, world.heap.alloc(waiter, 8))
    world.heap.wait(waiter)
    world.heap.stuck = {"start_cycle"}
    world.turn()
    world.run_for(10)
    assert not waiter.refused
    world.heap.stuck.clear()
    world.run_for(LONGEST_RETRY_S)
    assert not waiter.refused
    assert world.heap.alloc(waiter, 8)


def test_a_finished_collection_was_forgotten_when_scavenging_stalled() -> None:
    world = World()
    idle(world, world.heap.attach())
    world.heap.ask(ASK_GC)
    world.heap.ask(ASK_SCAVENGE_ALL)
    world.heap.stuck = {"release"}
    world.turn()
    assert len(gc_reports(world)) == 1
    world.run_for(10)
    assert steps(world).count("start_cycle") == 1
    assert scavenge_reports(world, ASK_SCAVENGE_ALL) == []
    world.heap.stuck.clear()
    world.run_for(LONGEST_RETRY_S)
    assert len(scavenge_reports(world, ASK_SCAVENGE_ALL)) == 1


def test_a_process_stopped_in_attaching_ended_the_coordinator_that_wanted_to_close() -> None:
    world = World()
    world.heap.stuck = {"try_close"}
    assert world.turn() is Outcome.STAYS
    world.heap.stuck.clear()
    world.run_for(LONGEST_RETRY_S)
    assert world.outcome is Outcome.CLOSED


# The trace (S14)


def test_the_trace_of_a_heap_whose_memory_comes_back() -> None:
    world = World(Config(trace=True))
    process = world.heap.attach()
    world.heap.alloc(process, 2)
    idle(world, process, 30)
    world.run_for(480)
    held = "inuse: 2, idle: 30, sys: 32, released: 0, consumed: 32 (MB)"
    assert world.printed.getvalue().splitlines() == [
        f"scvg0: {held}",
        "scvg1: GC forced",
        f"scvg1: {held}",
        f"scvg2: {held}",
        "scvg3: GC forced",
        f"scvg3: {held}",
        f"scvg4: {held}",
        "scvg5: GC forced",
        f"scvg5: {held}",
        f"scvg6: {held}",
        "scvg7: GC forced",
        "scvg7: 30 MB released",
        "scvg7: inuse: 2, idle: 30, sys: 32, released: 30, consumed: 2 (MB)",
    ]


def test_a_collection_that_was_asked_for_was_not_forced() -> None:
    world = World(Config(trace=True))
    world.heap.attach()
    world.heap.ask(ASK_GC)
    world.turn()
    world.turn()  # somebody rings, and there is nothing to do
    assert world.printed.getvalue() == (
        "scvg0: inuse: 0, idle: 0, sys: 0, released: 0, consumed: 0 (MB)\n"
    )
