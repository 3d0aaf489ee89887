"""Who has which task: what depends on the order of events, which threads would decide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shmheap import Heap, HeapFull
from shmheap.dispatch import Dispatcher
from shmheap.payload import MIN_BYTES, Packer


@pytest.fixture
def dispatcher(heap: Heap) -> Iterator[Dispatcher]:
    made = Dispatcher(heap, MIN_BYTES, False, False, 1, Packer)
    yield made
    made.close()


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
