"""Who has which task: what depends on the order of events, which threads would decide."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest

from shmheap import Heap, HeapFull
from shmheap.dispatch import Dispatcher
from shmheap.payload import MIN_BYTES, Packer
from shmheap.wires import READY, Channel, Line, write_all


@pytest.fixture
def dispatcher(heap: Heap) -> Iterator[Dispatcher]:
    made = Dispatcher(heap, MIN_BYTES, False, False, 1, Packer)
    yield made
    made.close()


def work_for(dispatcher: Dispatcher) -> tuple[Channel, Line]:
    """Be a worker that is ready."""
    channel, line = dispatcher.connect(None, ())
    line.calls, line.results = (
        Connection(os.dup(end.fileno())) for end in (line.calls, line.results)
    )
    dispatcher.started(channel, SimpleNamespace(pid=os.getpid()))  # type: ignore[arg-type]
    line.count = memoryview(bytearray(8)).cast("Q")
    write_all(line.results.fileno(), READY, 0, b"")
    dispatcher.wake()
    assert dispatcher.get() is None
    return channel, line


def work(line: Line) -> None:
    job, place, func, args, kwds = line.get()
    line.put((job, place, (True, func(*args, **kwds))))


def test_a_task_and_its_result(dispatcher: Dispatcher) -> None:
    _, line = work_for(dispatcher)
    dispatcher.put((7, 0, abs, (-3,), {}))
    work(line)
    assert dispatcher.get() == (7, 0, (True, 3))


def test_what_waits_goes_to_who_is_idle(dispatcher: Dispatcher) -> None:
    (one, _), (_, idle) = work_for(dispatcher), work_for(dispatcher)
    dispatcher._idle.remove(one)
    first = dispatcher._idle.pop()
    dispatcher._ring.remove(first)
    for place in range(3):
        dispatcher.put((1, place, abs, (place,), {}))
    dispatcher._ring.append(first)
    dispatcher._idle.append(first)
    dispatcher._rob()
    work(idle)
    assert dispatcher.get() == (1, 0, (True, 0))


def test_an_event_of_one_that_is_gone_is_not_taken_for_its_heirs(dispatcher: Dispatcher) -> None:
    """The number of a descriptor is used again while its old events are worked off."""
    called: list[str] = []

    def goes(fd: int = 7) -> None:
        called.append("goes")
        handlers.pop(fd)
        handlers[fd + 1] = lambda: called.append("heir")
        dispatcher._results.append(None)

    handlers: dict[int, Callable[[], object]] = {7: goes, 8: lambda: called.append("old")}
    dispatcher._handlers = handlers
    poll, dispatcher._poll = dispatcher._poll, EventsOnce([(7, 1), (8, 1)])  # type: ignore[assignment]
    assert dispatcher.get() is None
    assert called == ["goes", "old"]
    dispatcher._poll = poll


class EventsOnce(list[Any]):
    """An epoll that has these events."""

    def poll(self, _timeout: float | None) -> list[Any]:
        return self


def test_nobody_is_robbed_where_there_will_be_no_more_tasks(dispatcher: Dispatcher) -> None:
    dispatcher._finish()
    dispatcher._rob()


def test_the_last_worker_comes_idle_before_one_waits_for_it(
    dispatcher: Dispatcher, heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for an idle worker and the wait, which no further event would end."""

    class Late(list[Any]):
        def __bool__(self) -> bool:
            seen, self[:] = len(self) > 0, [None]
            if not seen:
                dispatcher._events += 1
            return seen

    def pack(call: Any, *, strict: bool = False) -> Any:
        if strict:
            heap.alloc(heap.capacity)
        return call

    def wait() -> None:
        raise AssertionError("it waits for ever")

    dispatcher._idle = Late()
    monkeypatch.setattr(dispatcher._packer, "pack", pack)
    monkeypatch.setattr(dispatcher._changed, "wait", wait)
    with pytest.raises(HeapFull):
        heap.alloc(heap.capacity)
    assert dispatcher._pack((1,)) == (1,)  # type: ignore[comparison-overlap]
