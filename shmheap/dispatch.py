"""Who has which task, and what a death means.

    task thread                    |  a channel per worker  |  worker
    put: pack, give to a worker --------- call -----------> get: unpack, run
    result thread                  |                        |
    get: wait for any of them <---------- result ---------- put: pack

Small tasks are queued ahead in a worker's pipe, so that it need not wait for this process. None
waits there for long while another worker is idle: that one is given half of what the first has not
read yet. Tasks that hold much memory wait here, packed one at a time, for an idle worker.

Each worker counts in the heap the tasks that it has begun with. When one dies, that tells what goes
to other workers, and which task is lost, and fails.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
import weakref
from collections import deque
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from shmheap.errors import HeapFull
from shmheap.heap import Heap, temporary
from shmheap.payload import NONE, Carried, Packer, Parcel, discard, unpack
from shmheap.tally import ARGUMENTS, RESULTS, Tally
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

    from shmheap.stats import PoolStats

__all__ = ["Dispatcher"]

FEW_TASKS = 32
"""Where all pipes are full (64 packets each), the thread of tasks sleeps until they have so many on
average: the two threads take turns once for several tasks."""
UNFAIR_S = 0.001
"""So long a worker may be idle while tasks wait for another one. Where tasks are shorter, looking
for them costs more than waiting for the next."""

WHY_NOT_READY = (
    "Its stderr says why. Where workers are spawned they import the main module, whose own work "
    '(such as making this pool) must stand under `if __name__ == "__main__":`'
)

_dispatchers: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


Arrival = tuple[Channel, Frame]
"""A result that is not unpacked yet, and whose it is."""


class Dispatcher:
    """Gives tasks to workers and collects their results: the queues of a pool.

    `put` is for the pool's thread of tasks, `get` for its thread of results; `connect`, `started`
    and `not_started` are for whoever starts workers.

    Two locks, so that the threads rarely meet: `_pipes` is held around what is done to the pipes
    of calls, mostly by the thread of tasks; `_state` for a moment only, and never around a system
    call. Their order is `_pipes`, `no_fork`, `_state`.
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
        self.on_death: Callable[[], object] | None = None
        """Called when workers are missing; None: the pool is still being made."""
        self._closing = threading.Lock()
        self._pipes = threading.Lock()
        self._state = threading.Lock()
        """Guards what follows, and who has which task. Read without it, for a guess, are _idle,
        _given and the length of _ring; and _events, before the look at what they count."""
        self._changed = threading.Condition(self._state)
        """Wakes the thread of tasks."""
        self._channels: set[Channel] = set()
        self._ring: deque[Channel] = deque()
        """Those that take tasks, in turn."""
        self._idle: list[Channel] = []
        self._given = 0
        """Tasks that workers have."""
        self._events = 0
        """Results that came and workers that are new: there may be room."""
        self._waiting = False
        """The thread of tasks is."""
        self._finished = self._stopped = False
        """There will be no more tasks; nobody wants any more."""
        self._broken = ""
        """Why there will be no worker, as it seems."""
        self._ending = False
        """The thread of results was woken to end."""
        # Of the thread of results alone; of close(), when there is none any more.
        self._results: deque[Result | Arrival | None] = deque()
        self._returned: deque[Task] = deque()
        """Tasks that were taken from workers: they go first."""
        self._stillborn = 0
        """Workers in a row that died before they were ready."""
        self._unfair_since = math.inf
        """Since when a worker is idle while tasks wait for another one."""
        # Of all threads: one operation at a time is one for everybody.
        self._tally = Tally()
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
        self._tally.tasks += 1
        if task.parcel.counts is not NONE:
            self._tally.add(ARGUMENTS, task.parcel.counts)
        while True:
            seen = self._events
            with self._pipes:
                if self._give(task):
                    return
            if not self._wait_for_room(seen, task.alone):
                task.parcel.release()
                self._ask_for_workers()
                raise BrokenProcessPool(self._broken or "the pool was terminated")

    def _pack(self, call: tuple[Any, ...]) -> Parcel:
        seen = self._events
        try:
            return self._packer.pack(call, strict=True)
        except HeapFull as full:
            if full.requested_bytes <= full.capacity_bytes and not self._idle:
                # Tasks that end free memory, and nobody could run this one before.
                self._wait_for_room(seen, True)
        return self._packer.pack(call)

    def _wait_for_room(self, seen: int, alone: bool) -> bool:
        """Wait until there is room for a task, or an idle worker if it is to be alone with it.

        Returns whether there may be by now, or False if there will be none.
        """
        with self._state:
            while not (self._stopped or self._broken):
                few = not alone and self._given <= FEW_TASKS * len(self._ring)
                if self._events != seen and (self._idle or few):
                    return True
                self._waiting = True
                self._changed.wait()
                self._waiting = False
            return False

    def _give(self, task: Task) -> bool:
        """Give a task to a worker, to an idle one if there is one; whether one has room."""
        while (channel := self._reserve(task)) is not None:
            if channel.send(task):
                if channel.unsent:
                    self._listen(channel.to, partial(self._send_more, channel), select.EPOLLOUT)
                return True
            with self._state:
                channel.refuse(task)
                self._given -= 1
        return False

    def _reserve(self, task: Task) -> Channel | None:
        with self._state:
            if self._idle:
                channel = self._idle.pop()
            elif task.alone:
                return None
            else:
                for _ in range(len(self._ring)):
                    self._ring.rotate(-1)
                    channel = self._ring[-1]
                    if len(channel.tasks) < channel.room and not channel.has_large:
                        break
                else:
                    return None
            channel.tasks.append(task)
            channel.has_large = task.is_large
            self._given += 1
            return channel

    def _finish(self) -> None:
        with self._pipes:
            with self._state:
                self._finished = True
                self._idle.clear()
                self._ring.clear()
                channels = list(self._channels)
            for channel in channels:
                self._hang_up(channel)

    # The thread of results

    def get(self) -> Result | None:
        """Return the next result; None when woken."""
        while not self._results:
            events = self._poll.poll(self._patience())
            # All of them now: one may close what another is about, and its number be used again.
            for handle in [self._handlers.get(fd) for fd, _ in events]:
                if handle is not None:
                    handle()
        result = self._results.popleft()
        return self._opened(*result) if result is not None and len(result) == 2 else result

    def wake(self, _nothing: None = None) -> None:
        """Have get return None."""
        self._ending = True
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _woken(self) -> None:
        os.eventfd_read(self._wake)
        if self._broken:
            self._lose_waiting()
        if self._ending:
            self._results.append(None)

    def _opened(self, channel: Channel, frame: Frame) -> Result:
        try:
            outcome, counts = unpack(frame, HEAD.size)
        except BaseException as error:  # also that of a result which exits: this thread goes on
            outcome, counts = (False, error), NONE
        channel.unopened -= 1
        if channel.left == 0 and not channel.unopened:
            with self._pipes:
                self._hang_up(channel)
        if counts is not NONE:
            self._tally.add(RESULTS, counts)
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
        if frames:
            self._arrived(channel, frames)
        return True

    def _arrived(self, channel: Channel, frames: list[Frame]) -> None:
        with self._state:
            if not channel.ready:
                frames = frames[1:]
                self._became_ready(channel)
            done = channel.finish(len(frames))
            self._given -= len(done)
            self._events += 1
            if channel in self._ring:
                self._has_room(channel)
        self._results.extend([(channel, frame) for frame in frames])
        for task in done:
            task.parcel.release()
        if self._returned:
            self._give_returned()

    def _became_ready(self, channel: Channel) -> None:
        channel.ready = True
        self._stillborn, self._broken = 0, ""
        if channel.to >= 0 and not self._finished:
            self._ring.append(channel)

    def _has_room(self, channel: Channel) -> None:
        if channel.left == 0:
            self._ring.remove(channel)
        elif not channel.tasks:
            self._idle.append(channel)
        if self._waiting and (self._idle or self._given <= FEW_TASKS * len(self._ring)):
            self._changed.notify()

    def _give_returned(self) -> None:
        with self._pipes:
            while self._returned and self._give(self._returned[0]):
                self._returned.popleft()

    def _send_more(self, channel: Channel) -> None:
        with self._pipes:
            if channel.unsent:
                channel.send_more()
            if not channel.unsent:
                self._ignore(channel.to)

    def _hang_up(self, channel: Channel) -> None:
        self._ignore(channel.to)
        channel.hang_up()

    # No worker is idle while tasks wait for another one

    def _patience(self) -> float | None:
        """How long to wait for events: not at all if somebody is idle for no reason, after a while.

        Not at once: where tasks are short, more of them are on their way to whoever is idle.
        """
        if not self._idle or self._given <= len(self._ring) - len(self._idle):
            self._unfair_since = math.inf
            return None
        now = time.monotonic()
        self._unfair_since = min(self._unfair_since, now)
        if now - self._unfair_since >= UNFAIR_S:
            self._rob()
        return UNFAIR_S

    def _rob(self) -> None:
        """Give idle workers what waits behind another one's task: half of it."""
        with self._pipes:
            if not self._ring:  # by now: there will be no more tasks
                return
            taken = max(self._ring, key=lambda channel: len(channel.tasks)).take_half()
            with self._state:
                self._given -= len(taken)
            self._returned.extend(taken)
        self._give_returned()
        self._unfair_since = math.inf

    # Workers come and go

    def connect(self, max_tasks: int | None, initargs: tuple[Any, ...]) -> tuple[Channel, Line]:
        """Make both ends for a worker that is about to be started."""
        packer = self._packer
        carried = Carried(initargs, packer)
        begun = None
        with suppress(HeapFull):  # a worker is worth more than knowing what it had not begun with
            begun = packer.heap.alloc(COUNT_BYTES)
        with no_fork:
            channel = Channel(max_tasks, begun, carried)
            with self._state:
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
        self._ignore(channel.back)
        channel.close_others()
        channel.release()
        self._forget(channel)

    def _forget(self, channel: Channel) -> None:
        channel.close()
        with self._state:  # now: a child that is forked before closes it, too
            self._channels.discard(channel)

    def goes_on_without(self, error: Exception) -> bool:
        """Whether it does without a worker that could not be started: not while it is being made.

        Without any worker, what waits for one fails; who comes later has it tried again.
        """
        if self.on_death is None:
            return False
        with self._state:
            if not self._channels:
                self._break(f"no worker can be started: {error!r}")
        os.eventfd_write(self._wake, 1)
        return True

    def _ask_for_workers(self) -> None:
        if self.on_death is not None:
            self.on_death()

    def _bury(self, channel: Channel) -> None:
        """A worker has ended: take what it had sent, and see what becomes of its tasks."""
        with self._pipes:
            with self._state:
                for listed in (self._ring, self._idle):
                    if channel in listed:
                        listed.remove(channel)
            self._hang_up(channel)
        while self._receive(channel):
            pass
        self._ignore(channel.back)
        self._ignore(channel.end)
        end = how_it_ended(channel)
        with self._state:
            self._given -= len(channel.tasks)
        self._returned.extendleft(reversed(channel.take_waiting()))
        channel.release()
        self._forget(channel)
        for task in channel.tasks:
            self._lose(task, f"the worker that ran this task {end}")
        if not channel.ready:
            self._still(end)
        self._give_returned()
        self._ask_for_workers()

    def _still(self, end: str) -> None:
        self._stillborn += 1
        if self._stillborn > self._processes:
            why = f"workers end before they can work; the last one {end}. {WHY_NOT_READY}"
            with self._state:
                self._break(why)
            self._lose_waiting()

    def _break(self, why: str) -> None:
        self._broken = why
        self._changed.notify()

    def _lose_waiting(self) -> None:
        while self._returned:
            self._lose(self._returned.popleft(), self._broken)

    def _lose(self, task: Task, why: str) -> None:
        self._tally.lost += 1
        self._results.append((task.job, task.place, (False, BrokenProcessPool(why))))
        task.parcel.release()

    # Ending

    def stop(self) -> None:
        """Nobody wants results any more: put returns at once."""
        with self._state:
            self._stopped = True
            self._changed.notify()

    def close(self) -> None:
        """End what is on its way, once no thread and no worker uses this any more. Idempotent."""
        with self._closing:  # one joins, another one terminates
            self._close()

    def _close(self) -> None:
        self._finish()
        for channel in self._channels:
            while self._receive(channel):
                pass
            self._returned.extend(channel.tasks)
            channel.release()
        for task in self._returned:
            task.parcel.release()
        for result in self._results:
            if result is not None and len(result) == 2:
                discard(result[1], HEAD.size)
        self._returned.clear()
        self._results.clear()
        self.leave()
        if self._owns and hasattr(self, "_packer"):
            self.heap.unlink()
            self._packer.close()
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
        self._handlers.clear()  # they refer to this: it would keep what it has until a collection

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
