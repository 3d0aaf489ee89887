"""Who has which task, and what a death means.

    task thread                    |  a channel per worker  |  worker
    put: pack, give to a worker --------- call -----------> get: unpack, run
    result thread                  |                        |
    get: wait for any of them <---------- result ---------- put: pack

Small tasks are queued ahead in a worker's pipe, so that it need not wait for this process. No task
waits while a worker is idle: one that comes free is given what another one has not read yet. Tasks
that hold much memory wait here, packed one at a time, for an idle worker.

Each worker counts in the heap the tasks that it has begun with. When one dies, that tells what goes
to other workers, and which task is lost, and fails.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import weakref
from collections import deque
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from shmheap.errors import HeapFull
from shmheap.heap import Heap, temporary
from shmheap.payload import NONE, Carried, Counts, Packer, Parcel, discard, unpack
from shmheap.stats import PoolStats, Traffic
from shmheap.wires import (
    COUNT_BYTES,
    HEAD,
    STREAM_BYTES,
    Channel,
    Frame,
    Line,
    Result,
    Task,
    head_of,
    no_fork,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.process import BaseProcess
    from typing import Any

__all__ = ["Dispatcher"]

FEW_TASKS = 32
"""Where all pipes are full (64 packets each), the thread of tasks sleeps until they have so many on
average: the two threads take turns once for several tasks."""
LARGE_BYTES = 1 << 20
"""A copy of so many bytes is worth a hint."""

LOG = logging.getLogger("shmheap")
HINTS = (
    "%d bytes of an argument were copied into the heap. What lies there is not copied: make it "
    "with pool.heap.empty() or pool.heap.put(), or with shmheap.plugins.numpy.allocator(pool.heap)",
    "%d bytes of a result were copied into the heap. What lies there is not copied: write it into "
    "an array that was an argument, or have NumPy make it, in a pool with allocator=True",
)

_dispatchers: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


class Arrival(NamedTuple):
    """A result that is not unpacked yet, and whose it is."""

    channel: Channel
    frame: Frame


class Dispatcher:
    """Gives tasks to workers and collects their results: the queues of a pool.

    `put` is for the pool's thread of tasks, `get` for its thread of results; `connect`, `started`
    and `not_started` are for whoever starts workers.
    """

    def __init__(
        self,
        heap: Heap | None,
        min_bytes: int,
        strict: bool,
        allocator: bool,
        processes: int,
        new_packer: Callable[..., Packer],
    ) -> None:
        self._owns = heap is None
        self._packer = new_packer(
            heap or temporary(), min_bytes, strict=strict, stream_bytes=STREAM_BYTES
        )
        self._allocator = allocator
        self._processes = processes
        self.on_death: Callable[[], object] = bool
        """Called after a death; the pool says what it needs."""
        self._changed = threading.Condition(threading.Lock())
        """Guards what follows, and wakes the thread of tasks."""
        self._channels: set[Channel] = set()
        self._ring: deque[Channel] = deque()
        """Those that take tasks, in turn."""
        self._idle: list[Channel] = []
        self._given = 0
        """Tasks that workers have."""
        self._returned: deque[Task] = deque()
        """Tasks that were taken from workers: they go first."""
        self._waiting = False
        """The thread of tasks is."""
        self._finished = self._stopped = False
        """There will be no more tasks; nobody wants any more."""
        self._stillborn = 0
        """Workers in a row that died before they were ready."""
        self._broken = ""
        """Why there will be no worker, as it seems."""
        self._results: deque[Result | Arrival | None] = deque()
        self._tally = _Tally()
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], object]] = {}
        self._wake = os.eventfd(0)
        self._listen(self._wake, self._woken)
        _dispatchers.add(self)

    # The thread of tasks

    def put(self, call: tuple[Any, ...] | None) -> None:
        """Send a call to a worker as soon as one has room; None: there will be no more.

        Raises what packing it raises, and BrokenProcessPool if no worker can be started.
        """
        if call is None:
            self._finish()
            return
        job, place, *rest = call
        task = Task(job, place, self._pack(tuple(rest)))
        self._tally.sent(task.parcel.counts)
        with self._changed:
            while not (given := self._give(task)) and self._may_wait():
                self._wait()
        if not given:
            task.parcel.release()
            raise BrokenProcessPool(self._broken)

    def _pack(self, call: tuple[Any, ...]) -> Parcel:
        try:
            return self._packer.pack(call, strict=True)
        except HeapFull as full:
            if full.requested_bytes <= full.capacity_bytes:
                # Tasks that end free memory, and nobody could run this one before.
                with self._changed:
                    while not self._idle and self._may_wait():
                        self._wait()
        return self._packer.pack(call)

    def _may_wait(self) -> bool:
        return not self._stopped and not self._broken

    def _wait(self) -> None:
        self._waiting = True
        self._changed.wait()
        self._waiting = False

    def _give(self, task: Task) -> bool:
        """Give a task to a worker, to an idle one if there is one; whether one has room."""
        if self._idle:
            return self._give_to(self._idle.pop(), task)
        if task.alone:
            return False
        for _ in range(len(self._ring)):
            self._ring.rotate(-1)
            if self._give_to(self._ring[-1], task):
                return True
        return False

    def _give_to(self, channel: Channel, task: Task) -> bool:
        given = channel.give(task)
        self._given += given
        if channel.unsent:
            self._listen(channel.to, partial(self._send_more, channel), select.EPOLLOUT)
        return given

    def _finish(self) -> None:
        with self._changed:
            self._finished = True
            self._idle.clear()
            self._ring.clear()
            for channel in self._channels:
                self._hang_up(channel)

    # The thread of results

    def get(self) -> Result | None:
        """Return the next result; None when woken. Raises EOFError once this is closed."""
        while not self._results:
            if self._wake < 0:
                raise EOFError  # by this thread, which was the last to know the pool
            for fd, _ in self._poll.poll():
                if (handle := self._handlers.get(fd)) is not None:
                    handle()
        result = self._results.popleft()
        return self._opened(result) if isinstance(result, Arrival) else result

    def wake(self, _nothing: None = None) -> None:
        """Have get return None."""
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _woken(self) -> None:
        os.eventfd_read(self._wake)
        self._results.append(None)

    def _opened(self, arrival: Arrival) -> Result:
        channel, frame = arrival
        try:
            outcome, counts = unpack(frame, HEAD.size)
        except Exception as error:
            outcome, counts = (False, error), NONE
        channel.unopened -= 1
        if channel.left == 0 and not channel.unopened:
            with self._changed:
                self._hang_up(channel)
        self._tally.received(counts)
        return *head_of(frame), outcome

    def _receive(self, channel: Channel) -> bool:
        """Take what a worker sent; whether there was anything."""
        try:
            frames = channel.receive()
        except BlockingIOError:
            return False
        except (EOFError, OSError):
            self._ignore(channel.back)
            return False
        self._arrived(channel, frames)
        return True

    def _arrived(self, channel: Channel, frames: list[Frame]) -> None:
        with self._changed:
            if frames and not channel.ready:
                frames = frames[1:]
                self._became_ready(channel)
            done = channel.finish(len(frames))
            self._given -= len(done)
            if channel in self._ring:
                self._find_work(channel)
        self._results.extend(Arrival(channel, frame) for frame in frames)
        for task in done:
            task.parcel.release()

    def _became_ready(self, channel: Channel) -> None:
        channel.ready = True
        self._stillborn, self._broken = 0, ""
        if channel in self._channels and not self._finished:
            self._ring.append(channel)

    def _find_work(self, channel: Channel) -> None:
        """It has room now, or is idle."""
        if channel.left == 0:
            self._ring.remove(channel)
            return
        if not channel.tasks:
            self._idle.append(channel)
        if self._returned:
            self._give_returned()
        if not channel.tasks and len(self._ring) > 1:
            self._rob_for(channel)
        if self._waiting and (self._idle or self._given <= FEW_TASKS * len(self._ring)):
            self._changed.notify()

    def _give_returned(self) -> None:
        while self._returned and self._give(self._returned[0]):
            self._returned.popleft()

    def _rob_for(self, channel: Channel) -> None:
        """Give an idle worker what waits behind another one's task: half of it."""
        taken = max(self._ring, key=lambda other: len(other.tasks)).take_half()
        if taken:
            self._given -= len(taken)
            self._idle.remove(channel)
            self._returned.extend(task for task in taken if not self._give_to(channel, task))

    def _send_more(self, channel: Channel) -> None:
        with self._changed:
            if channel.unsent:
                channel.send_more()
            if not channel.unsent:
                self._ignore(channel.to)

    def _hang_up(self, channel: Channel) -> None:
        self._ignore(channel.to)
        channel.hang_up()

    # Workers come and go

    def connect(self, max_tasks: int | None, initargs: tuple[Any, ...]) -> tuple[Channel, Line]:
        """Make both ends for a worker that is about to be started."""
        packer = self._packer
        carried = Carried(initargs, packer)
        begun = packer.heap.alloc(COUNT_BYTES)
        with self._changed, no_fork:
            channel = Channel(max_tasks, begun, carried)
            self._channels.add(channel)
        results = type(packer)(packer.heap, packer.min_bytes, strict=packer.strict, views=False)
        return channel, Line(
            channel.calls, channel.results, channel.lease, carried, results, self._allocator
        )

    def started(self, channel: Channel, process: BaseProcess) -> None:
        """The channel's worker runs."""
        channel.started(process)
        self._listen(channel.back, partial(self._receive, channel))
        self._listen(channel.end, partial(self._bury, channel))

    def not_started(self, channel: Channel) -> None:
        """It could not be started."""
        with self._changed:
            self._channels.discard(channel)
        channel.close_others()
        channel.release()
        channel.close()

    def _bury(self, channel: Channel) -> None:
        """A worker has ended: take what it had sent, and see what becomes of its tasks."""
        with self._changed:
            self._channels.discard(channel)
            for listed in (self._ring, self._idle):
                if channel in listed:
                    listed.remove(channel)
        while self._receive(channel):
            pass
        with self._changed:
            self._given -= len(channel.tasks)
            self._returned.extendleft(reversed(channel.take_waiting()))
            self._give_returned()
            self._hang_up(channel)
            self._ignore(channel.back)
            self._ignore(channel.end)
            end = how_it_ended(channel)
            channel.release()
            channel.close()
            if not channel.ready:
                self._stillborn += 1
            if self._stillborn > self._processes:
                self._give_up(f"workers end before they can work; the last one {end}")
        for task in channel.tasks:
            self._lose(task, f"the worker that ran this task {end}")
        self.on_death()

    def _lose(self, task: Task, why: str) -> None:
        self._tally.lost += 1
        self._results.append((task.job, task.place, (False, BrokenProcessPool(why))))
        task.parcel.release()

    def _give_up(self, why: str) -> None:
        """Nobody can run what waits."""
        self._broken = why
        self._changed.notify()
        while self._returned:
            self._lose(self._returned.popleft(), why)

    # Ending

    def stop(self) -> None:
        """Nobody wants results any more: put returns at once."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def close(self) -> None:
        """End what is on its way, once no thread and no worker uses this any more. Idempotent."""
        for channel in self._channels:
            while self._receive(channel):
                pass
            self._returned.extend(channel.tasks)
            channel.release()
        for task in self._returned:
            task.parcel.release()
        for result in self._results:
            if isinstance(result, Arrival):
                discard(result.frame, HEAD.size)
        self._returned.clear()
        self._results.clear()
        self.leave()
        if self._owns and hasattr(self, "_packer"):
            self.heap.unlink()
            del self._packer  # and the heap with it; results keep what they need of it

    def leave(self) -> None:
        """Close what is open; in a forked child, too, to whom none of it belongs."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
        self._poll.close()

    # What it needs

    @property
    def heap(self) -> Heap:
        """Where arguments and results are copied to."""
        if not hasattr(self, "_packer"):
            raise ValueError("the pool has ended, and the heap that it made with it")
        return self._packer.heap

    def stats(self) -> PoolStats:
        """Return what it did so far."""
        return self._tally.stats()

    def _listen(self, fd: int, handle: Callable[[], object], events: int = select.EPOLLIN) -> None:
        self._handlers[fd] = handle
        self._poll.register(fd, events)

    def _ignore(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            with suppress(OSError):
                self._poll.unregister(fd)


class _Tally:
    """Counts what became of buffers, and gives a hint at the first large copy."""

    def __init__(self) -> None:
        self._sums = [0] * len(NONE), [0] * len(NONE)
        self._hinted = False
        self.tasks = self.lost = 0

    def sent(self, counts: Counts) -> None:
        self.tasks += 1
        self._add(0, counts)

    def received(self, counts: Counts) -> None:
        self._add(1, counts)

    def _add(self, direction: int, counts: Counts) -> None:
        if counts is NONE:
            return
        self._sums[direction][:] = map(sum, zip(self._sums[direction], counts, strict=True))
        if counts.copied_bytes >= LARGE_BYTES and not self._hinted:
            self._hinted = True
            LOG.info(HINTS[direction], counts.copied_bytes)

    def stats(self) -> PoolStats:
        arguments, results = (Traffic(**Counts(*sums)._asdict()) for sums in self._sums)
        return PoolStats(arguments=arguments, results=results, tasks=self.tasks, lost=self.lost)


def how_it_ended(channel: Channel) -> str:
    """In words, as far as can be known: somebody else may have asked first."""
    try:
        status = os.waitid(os.P_PIDFD, channel.end, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except OSError:
        status = None
    name = f"(process {channel.process.pid})"
    if status is None:
        return f"{name} died"
    if status.si_code == os.CLD_EXITED:
        return f"{name} exited with status {status.si_status}"
    return f"{name} was killed by {signal.Signals(status.si_status).name}"


def _leave_all() -> None:
    """In a forked child: the ends of its parent's pipes are not its own. A worker shall see the end
    of its pipe when its pool dies, whoever else was forked meanwhile."""
    for dispatcher in list(_dispatchers):
        dispatcher.leave()


os.register_at_fork(after_in_child=_leave_all)
