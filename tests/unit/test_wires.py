"""The pipes between a pool and a worker, both ends in one process."""

from __future__ import annotations

import errno
import gc
import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from by_hand import HeapByHand

from shmheap.payload import Carried, Packer, unpack
from shmheap.wires import DEPTH, HEAD, PACKET_BYTES, Channel, Line, Task, head_of, run


@pytest.fixture
def hand(hand: HeapByHand) -> Iterator[HeapByHand]:
    yield hand
    gc.collect()
    assert (hand.stats.heap_objects, hand.stats.leases) == (0, 0)


@pytest.fixture
def packer(hand: HeapByHand) -> Packer:
    return Packer(hand.heap)


@pytest.fixture
def channel(hand: HeapByHand) -> Iterator[Channel]:
    made = Channel(None, hand.heap.alloc(8), Carried(()))
    yield made
    made.release()
    made.close()
    made.close_others()


@pytest.fixture
def line(channel: Channel, packer: Packer) -> Iterator[Line]:
    made = Line(channel.calls, channel.results, channel.lease, channel.initargs, packer, False)
    yield made
    if made.count is not None:
        made.count.release()


def task(packer: Packer, place: int, argument: Any = None) -> Task:
    return Task(1, place, packer.pack((abs, (argument,), {})))


def give(channel: Channel, task: Task) -> bool:
    channel.tasks.append(task)
    sent = channel.send(task)
    if not sent:
        channel.refuse(task)
    return sent


def place_of(call: tuple[Any, ...]) -> int:
    return int(call[1])


def frames(channel: Channel) -> list[Any]:
    """What arrives now."""
    found: list[Any] = []
    with suppress(BlockingIOError):
        while True:
            found += channel.receive()
    return found


def test_calls_are_queued_ahead(channel: Channel, line: Line, packer: Packer) -> None:
    given = [give(channel, task(packer, n, -n)) for n in range(DEPTH + 1)]
    assert given == [True] * DEPTH + [False]
    for n in range(DEPTH):
        job, place, func, args, kwds = line.get()
        assert (job, place) == (1, n)
        assert func is run
        assert func(*args, **kwds) == n
        assert channel.begun is not None
        assert channel.begun[0] == n + 1
    assert give(channel, task(packer, 99))


def test_half_can_be_taken_back(channel: Channel, line: Line, packer: Packer) -> None:
    for n in range(10):
        give(channel, task(packer, n))
    assert place_of(line.get()) == 0
    taken = channel.take_half()
    assert [one.place for one in taken] == [1, 2, 3, 4, 5]
    assert [one.place for one in channel.tasks] == [0, 6, 7, 8, 9]
    assert place_of(line.get()) == 6
    assert [one.place for one in channel.take_half()] == [7, 8]
    assert place_of(line.get()) == 9
    assert channel.take_half() == [], "all has been read"


def test_what_is_larger_than_a_packet(channel: Channel, packer: Packer) -> None:
    large = b"x" * 600_000
    whole = Task(1, 0, Packer(packer.heap, 1 << 30, stream_bytes=1 << 30).pack((len, (large,), {})))
    assert whole.is_large
    assert whole.alone
    assert give(channel, whole)
    assert channel.unsent
    assert channel.take_half() == []
    packets = []
    with suppress(BlockingIOError):
        while True:
            packets.append(os.read(channel.unread, PACKET_BYTES))
            channel.send_more()
    assert max(map(len, packets)) == PACKET_BYTES
    assert unpack(b"".join(packets), HEAD.size)[0] == (len, (large,), {})


def test_what_holds_much_memory_is_for_an_idle_worker(packer: Packer) -> None:
    for nbytes in (1 << 19, 1 << 21):
        call = task(packer, 0, bytearray(nbytes))
        assert call.alone == (nbytes > 1 << 20)
        call.parcel.release()


def test_how_many_tasks_a_channel_can_have(hand: HeapByHand) -> None:
    channel = Channel(100, hand.heap.alloc(8), Carried(()))
    assert channel.room == DEPTH
    channel.finish(0)
    channel.left = 50
    channel.finish(0)
    assert channel.room == 50
    channel.release()
    channel.close()
    channel.close_others()


def test_results(channel: Channel, line: Line) -> None:
    for n in range(100):
        line.put((1, n, (True, n)))
    found = frames(channel)
    assert [head_of(frame) for frame in found] == [(1, n) for n in range(100)]
    assert [unpack(frame, HEAD.size)[0] for frame in found] == [(True, n) for n in range(100)]


@pytest.mark.parametrize("step", [1, 5, HEAD.size, 30])
def test_results_that_come_in_pieces(channel: Channel, line: Line, step: int) -> None:
    for n in range(3):
        line.put((1, n, (True, "x" * n)))
    stream = os.read(channel.back, 65536)
    found: list[bytes] = []
    for start in range(0, len(stream), step):
        os.write(channel.results.fileno(), stream[start : start + step])
        found += map(bytes, channel.receive())
    assert [head_of(frame) for frame in found] == [(1, 0), (1, 1), (1, 2)]
    assert b"".join(found) == stream


def test_what_a_dead_worker_has_not_begun(channel: Channel, line: Line, packer: Packer) -> None:
    for n in range(5):
        give(channel, task(packer, n, 1))
    line.get()
    line.put((1, 0, (True, 1)))
    line.get()
    os.read(channel.calls.fileno(), PACKET_BYTES)  # it was killed before it began
    assert len(frames(channel)) == 2, "that it is ready, and a result"
    channel.finish(1)
    assert [one.place for one in channel.take_waiting()] == [2, 3, 4]
    assert [one.place for one in channel.tasks] == [1]


def test_a_call_that_cannot_be_unpacked(channel: Channel, line: Line, packer: Packer) -> None:
    parcel = packer.pack((abs, (-1,), {}))
    give(channel, Task(1, 0, parcel._replace(body=parcel.body[:-3])))
    _, _, func, args, kwds = line.get()
    with pytest.raises((pickle.UnpicklingError, EOFError)):
        func(*args, **kwds)


def test_the_end(channel: Channel, line: Line, packer: Packer) -> None:
    give(channel, task(packer, 0))
    channel.hang_up()
    assert place_of(line.get()) == 0, "what is in the pipe comes first"
    with pytest.raises(EOFError):
        line.get()
    line.end()
    frames(channel)
    channel.close_others()
    with pytest.raises(EOFError):
        channel.receive()


def test_no_pipe_is_left_where_not_all_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.listdir("/proc/self/fd")
    pipe2, calls = os.pipe2, []
    for working in range(2):
        calls.clear()

        def one_fails(flags: int, working: int = working) -> tuple[int, int]:
            calls.append(flags)
            if len(calls) > working:
                raise OSError(errno.EMFILE, "too many")
            return pipe2(flags)

        monkeypatch.setattr(os, "pipe2", one_fails)
        with pytest.raises(OSError, match="too many"):
            Channel(None, None, Carried(()))
    assert os.listdir("/proc/self/fd") == before
