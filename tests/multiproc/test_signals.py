"""Signals every millisecond while the heap is used: no deadlock, nothing lost, nothing half made.

Every test is bounded by a count of signals that were delivered, never by time: the work goes on
until so many handlers have run. A handler that raises does so only while the test says that it
may (`armed`), so that the error cannot arrive in the test's own bookkeeping.
"""

from __future__ import annotations

import dis
import gc
import os
import pickle
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

import pytest
from by_hand import HeapByHand
from processes import Worker

import shmheap.heap as heap_module
from shmheap import Heap, HeapFull, StaleHandle, _core

SIGNALS = 300
EVERY_S = 0.001
MIB = 1 << 20


class InterruptedHereError(Exception):
    """What the handler of a test raises."""


class Storm:
    """Signals that keep coming: a timer's, or SIGINT sent by another process of the same pace.

    Args:
        number: SIGALRM comes from the timer itself. SIGINT is sent to the process by its handler.
        raises: what the handler raises where it may; None: it only counts.
    """

    def __init__(self, number: signal.Signals, raises: type[BaseException] | None) -> None:
        self.number = number
        self.raises = raises
        self.armed = False
        self.delivered = 0
        self.raised = 0

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        self.delivered += 1
        if self.armed and self.raises is not None:
            self.armed = False
            self.raised += 1
            raise self.raises

    def forward(self, _number: int, _frame: FrameType | None) -> None:
        os.kill(os.getpid(), self.number)

    def __enter__(self) -> Storm:
        self.before = {number: signal.getsignal(number) for number in (signal.SIGALRM, self.number)}
        signal.signal(signal.SIGALRM, self.forward)
        signal.signal(self.number, self.handle)
        signal.setitimer(signal.ITIMER_REAL, EVERY_S, EVERY_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def attempt(self, action: Callable[[], object]) -> None:
        """Do something that the handler may interrupt."""
        try:
            self.armed = True
            action()
            self.armed = False
        finally:
            self.armed = False

    def enough(self) -> bool:
        """Whether enough signals came, and raised if they may."""
        return self.delivered >= SIGNALS and (self.raises is None or self.raised >= SIGNALS // 3)

    def until_enough(self, action: Callable[[], object]) -> None:
        """Attempt it again and again. What was raised where nothing may be, arrives later."""
        while True:
            try:
                if self.enough():
                    return
                self.attempt(action)
            except (InterruptedHereError, KeyboardInterrupt):
                pass


STORMS = [
    pytest.param(signal.SIGALRM, None, id="SIGALRM"),
    pytest.param(signal.SIGALRM, InterruptedHereError, id="SIGALRM raises"),
    pytest.param(signal.SIGINT, KeyboardInterrupt, id="SIGINT raises"),
]


@contextmanager
def others_at_work(heap: Heap) -> Iterator[None]:
    """Two threads that allocate, check and free meanwhile."""
    stop = threading.Event()
    wrong: list[int] = []

    def work(size: int) -> None:
        number = 0
        while not stop.is_set():
            number = number % 255 + 1
            block = heap.put(bytes([number]) * size)
            if block[0] != number or block[size - 1] != number:
                wrong.append(number)
            del block

    threads = [threading.Thread(target=work, args=(size,)) for size in (100, 100_000)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def assert_nothing_left(heap: Heap) -> None:
    gc.collect()
    heap.gc()
    stats = heap.stats()
    assert (stats.heap_objects, stats.pins, stats.leases) == (0, 0, 0), stats
    heap.check()


def alloc(heap: Heap) -> None:
    for size in (16, 5000, 70_000, 2 * MIB):
        blocks = [heap.alloc(size) for _ in range(3)]
        assert not any(bytes(block[:16]).strip(b"\0") for block in blocks)


def put(heap: Heap) -> None:
    data = b"x" * 70_000
    assert bytes(heap.put(data)) == data
    assert bytes(heap.put(memoryview(data)[::2])) == data[::2]


def unpickle(heap: Heap) -> None:
    block = heap.put(b"abc")
    lease = block.lease()
    with lease:
        again = pickle.loads(pickle.dumps(lease))
        assert bytes(again) == b"abc"


def collect(heap: Heap) -> None:
    heap.gc()
    heap.scavenge(all=True)


def name(heap: Heap) -> None:
    heap.roots["name"] = heap.put(b"named")
    assert bytes(heap.roots["name"]) == b"named"
    assert list(heap.roots) == ["name"]


ACTIONS = [alloc, put, unpickle, collect, name]


@pytest.mark.parametrize(("number", "raises"), STORMS)
@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
def test_signals_during(
    heap: Heap,
    action: Callable[[Heap], None],
    number: signal.Signals,
    raises: type[BaseException] | None,
) -> None:
    with others_at_work(heap), Storm(number, raises) as storm:
        storm.until_enough(lambda: action(heap))
    heap.roots.pop("name", None)
    # A lease that was made and whose number never arrived is its process's until that ends.
    if action is unpickle and raises is not None:
        gc.collect()
        heap.gc()
        stats = heap.stats()
        assert stats.pins == 0
        assert stats.heap_objects == stats.leases
        heap.check()
        return
    assert_nothing_left(heap)


@pytest.mark.parametrize(("number", "raises"), STORMS)
def test_signals_while_waiting_for_memory(
    heap_name: str, number: signal.Signals, raises: type[BaseException] | None
) -> None:
    with HeapByHand(heap_name, capacity=8 * MIB) as hand, Worker() as holder:
        holder.do("attach", hand.heap.name)
        holder.do("alloc_many", "held", 7, MIB)
        served = threading.Event()

        def serve() -> None:  # the coordinator; it asks nobody to wait
            while not served.is_set():
                hand.turn()

        steward = threading.Thread(target=serve)
        steward.start()
        try:
            with Storm(number, raises) as storm:

                def wait() -> None:
                    with pytest.raises(HeapFull):
                        hand.heap.alloc(4 * MIB, timeout=0.05)

                storm.until_enough(wait)
        finally:
            served.set()
            steward.join()
        assert hand.waiting == 0, "who was interrupted does not wait any more"
        holder.do("drop", "held")
        assert len(hand.heap.alloc(4 * MIB, timeout=None)) == 4 * MIB
        holder.end()


@pytest.mark.filterwarnings(  # Python's own: a handler may raise in a weak reference's callback
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize(("number", "raises"), STORMS)
def test_signals_during_close(
    heap: Heap, number: signal.Signals, raises: type[BaseException] | None
) -> None:
    def use_and_close() -> None:
        with Heap.attach(heap.name) as other:
            other.put(b"abc")

    with others_at_work(heap), Storm(number, raises) as storm:
        storm.until_enough(use_and_close)
    gc.collect()
    heap.gc()
    assert heap.stats().processes == 1
    assert_nothing_left(heap)


def test_a_wait_that_ctrl_c_ended_at_its_beginning_was_counted_for_ever(heap_name: str) -> None:
    with HeapByHand(heap_name, capacity=MIB) as hand:
        heap = hand.heap

        class InterruptedOnce:
            """Stands for a signal that arrives as the call that says "I wait" returns."""

            calls = 0

            def __call__(self, begins: bool) -> None:
                Heap._waiting(heap, begins)
                self.calls += 1
                if begins:
                    raise KeyboardInterrupt

        waiting = InterruptedOnce()
        heap._reclaim = lambda _timeout_s: None  # type: ignore[method-assign]
        heap._waiting = waiting  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            heap.alloc(MIB, timeout=None)
        assert waiting.calls == 2
        assert hand.waiting == 0
        del heap._waiting, heap._reclaim


@pytest.mark.parametrize("error", [KeyboardInterrupt, InterruptedHereError, TimeoutError])
def test_an_error_that_a_handler_raised_in_the_bell_was_lost(
    heap: Heap, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    ring = heap_module._Bell.ring

    def interrupted_ring(bell: heap_module._Bell, *how: bool) -> None:
        ring(bell, *how)
        signal.raise_signal(signal.SIGUSR1)

    def handle(_number: int, _frame: FrameType | None) -> None:
        raise error("by a handler")

    other = Heap.attach(heap.name)
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    monkeypatch.setattr(heap_module._Bell, "ring", interrupted_ring)
    late = Heap.attach(heap.name)
    signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(error, match="by a handler"):
            _close(late)
        monkeypatch.undo()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert late.closed
    other.close()
    heap.gc()
    assert heap.stats().processes == 1


def _close(heap: Heap) -> None:
    heap.close()
    assert heap.closed  # the error may arrive a step later
    pytest.fail("it did not arrive")


@pytest.mark.filterwarnings(  # also interrupted: the callback of a weak reference
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_an_interrupt_where_a_loop_turned_back_left_the_lock_of_handles_held(heap: Heap) -> None:
    with Heap.create() as other, Heap.create() as third:  # so that looking for one takes turns
        for where in ((heap._path, heap.nonce), (heap._path, 1)):  # open, and to be attached
            attempts = 0
            while _interrupted_at(attempts, lambda where=where: heap_module._find(*where)):
                attempts += 1
                free = ThreadPoolExecutor(1)
                with free:
                    locked = free.submit(heap_module._finding.acquire, blocking=False).result()
                    assert locked, f"held after an interrupt at {attempts}"
                    free.submit(heap_module._finding.release).result()
            assert attempts > 0
        assert not other.closed
        assert not third.closed


def _interrupted_at(place: int, call: Callable[[], object]) -> bool:
    """Raise where a signal's handler may, the place-th time; False if the call has fewer of them.

    Handlers run where a function begins and where a loop turns back, and after calls.
    """
    names: dict[CodeType, dict[int, str]] = {}
    places = 0

    def turns_back(frame: FrameType) -> bool:
        if frame.f_code not in names:
            steps = dis.get_instructions(frame.f_code)
            names[frame.f_code] = {step.offset: step.opname for step in steps}
        return names[frame.f_code][frame.f_lasti].startswith("JUMP_BACKWARD")

    def trace(frame: FrameType, event: str, _argument: object) -> Callable[..., object]:
        nonlocal places
        frame.f_trace_opcodes = True
        if event == "call" or (event == "opcode" and turns_back(frame)):
            places += 1
            if places > place:
                sys.settrace(None)
                raise InterruptedHereError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except InterruptedHereError:
        return True
    except StaleHandle:
        pass
    finally:
        sys.settrace(before)
    return False


def test_a_ring_that_a_handler_cut_short_was_not_made_up_for(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    heap.gc()  # the coordinator lives: nobody rings to start one
    rung: list[str] = []
    cut_short = False

    def ring(_bell: heap_module._Bell, *_how: bool) -> None:
        if cut_short:
            raise InterruptedHereError
        rung.append("rung")

    monkeypatch.setattr(heap_module._Bell, "ring", ring)
    other = Heap.attach(heap.name)
    cut_short = True
    with pytest.raises(InterruptedHereError):
        other._want(0)
    cut_short = False
    rung.clear()
    other.alloc(MIB).free()
    assert rung == ["rung"]
    other.close()


def test_a_coordinator_inherited_the_blocked_signals_of_who_started_it(
    new_heap_name: Callable[[], str],
) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with Heap.create(new_heap_name(), capacity=MIB) as heap:
            heap.gc()
            pid = _core.Observer(heap._fileno()).header()["coordinator_pid"]
            status = Path(f"/proc/{pid}/status").read_text()
            assert re.search(r"^SigBlk:\t0+$", status, re.MULTILINE), status
            os.kill(pid, signal.SIGTERM)
            heap.unlink()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
