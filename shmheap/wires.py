"""The two ends of the pipes between a pool and one worker.

    Channel (the pool's)                 Line (the worker's)
    send(task)    --- packet: a call -->  get()
    take_half()   <-- the same --         (of calls that it has not read)
    receive()     <-- stream: results --  put()

A frame is a length, a job, a place in it, and a parcel's body. The pipe of calls is in packet mode:
each read takes one whole frame, whoever reads. So the pool can queue calls ahead, and can take some
back that the worker has not read, without any lock: there is none that a process could die with.
A call of more bytes than a packet has is sent alone, to a worker that has nothing else to do.

The pool's ends never block.
"""

from __future__ import annotations

import fcntl
import importlib
import mmap
import os
import select
import struct
import sys
import threading
from collections import deque
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing.connection import Connection
from multiprocessing.pool import (  # type: ignore[attr-defined]
    ExceptionWithTraceback,
    _helper_reraises_exception,
)
from typing import TYPE_CHECKING, Any

from shmheap.block import Block, Lease
from shmheap.errors import HeapFull
from shmheap.payload import LENGTH, Carried, Packer, Parcel, release_all, unpack

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

__all__ = [
    "COUNT_BYTES",
    "HEAD",
    "STREAM_BYTES",
    "Allocation",
    "Channel",
    "Frame",
    "Line",
    "Result",
    "Task",
    "head_of",
    "keeps_from_forking",
    "no_fork",
]

no_fork = threading.RLock()
"""Held where a pipe is made or closed, and by who forks: a child finds each end either open and
listed or closed, and so can close what is not its own. An end that it kept would be a worker's that
never hears of the end of its calls."""
os.register_at_fork(
    before=no_fork.acquire, after_in_child=no_fork.release, after_in_parent=no_fork.release
)


def keeps_from_forking() -> bool:
    """Whether this thread does."""
    return no_fork._is_owned()  # type: ignore[attr-defined, no-any-return]


HEAD = struct.Struct("<QqQ")
READY = -1
"""The job of the frame with which a worker says that its initializer is done."""
PACKET_BYTES = select.PIPE_BUF
BODY_BYTES = PACKET_BYTES - HEAD.size
"""The largest body of a call that can be queued ahead."""
STREAM_BYTES = BODY_BYTES - LENGTH.size
ALONE_BYTES = 1 << 20
"""A call with more bytes of copies is not queued ahead: arguments are not copied in long before
their turn."""
COUNT_BYTES = 8
DEPTH = 64
"""So many calls can be queued ahead: each packet takes a page of a pipe."""
READ_BYTES = 65536
"""A pipe has no more at a time."""

Frame = bytes | bytearray | memoryview
Result = tuple[int, int, tuple[bool, Any]]
"""Job, place in it, and success and value: what the standard library's pool calls a task, too."""


class Task:
    """A packed call, and what it is to the pool."""

    __slots__ = ("alone", "is_large", "job", "parcel", "place")

    def __init__(self, job: int, place: int, parcel: Parcel) -> None:
        self.job = job
        self.place = place
        self.parcel = parcel
        self.is_large = len(parcel.body) > BODY_BYTES
        """Than a packet."""
        self.alone = self.is_large or parcel.counts.copied_bytes > ALONE_BYTES
        """It is for an idle worker only."""


def head_of(frame: Frame) -> tuple[int, int]:
    """Return job and place. The body begins at HEAD.size."""
    _, job, place = HEAD.unpack_from(frame)
    return job, place


def frame_bytes(read: Frame, start: int) -> int:
    """Return how long the frame is that begins there, or more than there is."""
    if len(read) - start < HEAD.size:
        return HEAD.size
    nbytes: int = HEAD.unpack_from(read, start)[0]
    return HEAD.size + nbytes


class Line:
    """A worker's ends: what the standard library's worker takes for its queues."""

    def __init__(
        self,
        calls: Connection,
        results: Connection,
        begun: Block | Lease | None,
        initargs: Carried,
        packer: Packer,
        allocator: bool,
    ) -> None:
        self.begun = begun
        self.initargs = initargs
        self.calls = calls
        self.results = results
        self.packer = packer
        self.allocation = Allocation(packer, allocator)
        self.count: memoryview | None = None
        """Of calls that this worker has begun with: in shared memory, it outlives this process."""

    def get(self) -> tuple[Any, ...]:
        """Return the next call. Raises EOFError when there will be none."""
        if self.count is None:
            begun = self.begun.take() if isinstance(self.begun, Lease) else self.begun
            self.count = memoryview(begun or bytearray(COUNT_BYTES)).cast("Q")
            write_all(self.results.fileno(), READY, 0, b"")
        frame = read_frame(self.calls.fileno())
        self.count[0] += 1
        try:
            call, _ = unpack(frame, HEAD.size)
        except Exception as error:
            call = reraise, (error,), {}
        if call[0] is not _helper_reraises_exception:
            call = run, ([call],), {}
        self.allocation.begin()
        return *head_of(frame), *call

    def put(self, result: Result) -> None:
        """Send a result. Raises what packing it raises."""
        job, place, outcome = result
        if not outcome[0]:  # whose frames have all that the task had
            error = outcome[1]
            error = error.exc if isinstance(error, ExceptionWithTraceback) else error
            error.__traceback__ = None
        try:
            body = self.packer.pack(outcome).body
        except HeapFull as full:
            body = self.packer.pack((False, full)).body
        write_all(self.results.fileno(), job, place, body)

    def end(self) -> None:
        """End as a worker; once the pool has taken the last result, whose handles need a sender."""
        self.allocation.end()
        with suppress(OSError):
            os.read(self.calls.fileno(), 1)


class Allocation:
    """Has NumPy make its arrays in the heap, from the moment on at which NumPy is there."""

    def __init__(self, packer: Packer, wanted: bool) -> None:
        self.packer = packer
        self.wanted = wanted
        self.context: AbstractContextManager[None] = nullcontext()
        if wanted and "numpy" in sys.modules:
            with suppress(ImportError):  # now: each child that is forked would have to
                importlib.import_module("shmheap.plugins.numpy")

    def begin(self) -> None:
        """Do so, if it is wanted and not done yet."""
        if self.wanted and "numpy" in sys.modules:
            self.wanted = False
            from shmheap.plugins.numpy import allocator

            context = allocator(self.packer.heap, min_bytes=self.packer.min_bytes)
            with suppress(ImportError):  # a NumPy that it does not know: results are copied
                context.__enter__()
                self.context = context

    def end(self) -> None:
        """Leave it."""
        self.context.__exit__(None, None, None)


def run(calls: list[Any]) -> Any:
    """Call, and keep nothing of the call: its memory is free when the result is sent."""
    func, args, kwds = calls.pop()
    return func(*args, **kwds)


def reraise(error: Exception) -> None:
    """Fail as a task does whose arguments could not be unpacked."""
    raise error


def read_frame(fd: int) -> bytes:
    """Read one call, however long that takes. Raises EOFError at the end."""
    frame = _read_packet(fd)
    missing = HEAD.size + HEAD.unpack_from(frame)[0] - len(frame)
    if not missing:
        return frame
    packets = [frame]
    while missing:
        packets.append(_read_packet(fd))
        missing -= len(packets[-1])
    return b"".join(packets)


def _read_packet(fd: int) -> bytes:
    packet = os.read(fd, PACKET_BYTES)
    if not packet:
        raise EOFError
    return packet


def write_all(fd: int, job: int, place: int, body: bytes) -> None:
    """Write one frame, however long that takes."""
    rest = write_some(fd, job, place, body)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_some(fd: int, job: int, place: int, body: bytes) -> bytes | memoryview:
    """Begin to write a frame; return the bytes that are left."""
    head = HEAD.pack(len(body), job, place)
    n = os.writev(fd, (head, body))
    return b"" if n == len(head) + len(body) else memoryview(head + body)[n:]


def _open_pipes() -> list[int]:
    """Open the pipes of calls and of results, and the first one's end anew to read back from: not
    to block is a matter of the open file, which the worker's end shares. All of them, or none."""
    opened: list[int] = []
    try:
        opened += os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
        opened += os.pipe2(os.O_CLOEXEC)
        opened.append(os.open(f"/proc/self/fd/{opened[0]}", os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        for fd in opened:
            os.close(fd)
        raise
    return opened


class Channel:
    """The pool's ends, and what the worker has been given."""

    def __init__(self, left: int | None, begun: Block | None, initargs: Carried) -> None:
        calls, self.to, self.back, results, self.unread = _open_pipes()
        self.calls = Connection(calls, writable=False)
        self.results = Connection(results, readable=False)
        """The worker's ends."""
        self.end = -1
        """Readable once the process has ended."""
        os.set_blocking(self.to, False)
        with suppress(OSError):  # this user has too many pipes already
            fcntl.fcntl(self.to, fcntl.F_SETPIPE_SZ, DEPTH * mmap.PAGESIZE)
        os.set_blocking(self.back, False)
        self.initargs = initargs
        self.lease: Lease | None = None
        self.begun: memoryview | None = None
        """How many tasks the worker has begun with: it counts."""
        if begun is not None:
            with suppress(HeapFull):
                self.lease = begun.lease()
                self.begun = memoryview(begun).cast("Q")
        self.finished = 0
        """How many results it has sent."""
        self.process: BaseProcess
        self.left = left
        """How many more tasks it takes; None: any number."""
        self.ready = False
        self.room = DEPTH if left is None else min(DEPTH, left)
        """How many tasks it can have."""
        self.tasks: deque[Task] = deque()
        """The oldest may be running; the others wait in the pipe."""
        self.has_large = False
        """Whether it is one that is larger than a packet, and so alone."""
        self.unopened = 0
        """Results that nobody has unpacked yet."""
        self.unsent: Any = b""
        """Of a call that is larger than a packet."""
        self.received = bytearray()

    # Calls

    def send(self, task: Task) -> bool:
        """Send a task that is in `tasks` already; whether the pipe had room."""
        try:
            self.unsent = write_some(self.to, task.job, task.place, task.parcel.body)
        except BlockingIOError:
            return False
        return True

    def refuse(self, task: Task) -> None:
        """The pipe had no room: there is less than we thought."""
        self.tasks.remove(task)
        self.room = len(self.tasks)

    def send_more(self) -> None:
        """Send of what is unsent: the pipe has room again."""
        with suppress(BlockingIOError):
            self.unsent = self.unsent[os.write(self.to, self.unsent) :]

    def take_half(self) -> list[Task]:
        """Take back half of the tasks, the oldest of those that the worker has not read."""
        taken: list[Task] = []
        with suppress(BlockingIOError):
            for _ in range(len(self.tasks) // 2):
                place = head_of(os.read(self.unread, PACKET_BYTES))
                found = next(t for t in self.tasks if (t.job, t.place) == place)
                self.tasks.remove(found)
                taken.append(found)
        return taken

    def take_waiting(self) -> list[Task]:
        """Take what a dead worker has never begun with, after its last results."""
        running = 1 if self.begun is None else self.begun[0] - self.finished
        taken = list(self.tasks)[running:]
        self.tasks = deque(list(self.tasks)[:running])
        return taken

    def finish(self, n: int) -> list[Task]:
        """Return the oldest tasks, of which there are results."""
        if self.left is not None:
            self.left -= n
            self.room = min(self.room, self.left)
        self.has_large = False
        self.finished += n
        self.unopened += n
        return [self.tasks.popleft() for _ in range(n)]

    # Results

    def receive(self) -> list[Frame]:
        """Return the frames that are complete now. Raises EOFError at the end, BlockingIOError."""
        read: Frame = os.read(self.back, READ_BYTES)
        if not read:
            raise EOFError
        if self.received:
            self.received += read
            if frame_bytes(self.received, 0) > len(self.received):
                return []
            read, self.received = self.received, bytearray()
        elif frame_bytes(read, 0) == len(read):
            return [read]
        return self._split(read)

    def _split(self, read: Frame) -> list[Frame]:
        frames: list[Frame] = []
        view, start = memoryview(read), 0
        while start < len(read) and (end := start + frame_bytes(read, start)) <= len(read):
            frames.append(view[start:end])
            start = end
        if start < len(read):
            self.received += view[start:]
        return frames

    # Its life

    def started(self, process: BaseProcess) -> None:
        """Its process runs, and has its ends: those of ours go, so that each end has one owner."""
        self.close_others()
        self.process = process
        try:
            self.end = os.pidfd_open(process.pid)  # type: ignore[arg-type]
        except OSError:  # an old kernel; or it has ended and is reaped, as others reap it
            self.end = os.dup(process.sentinel)

    def close_others(self) -> None:
        """Close the worker's ends."""
        self.calls.close()
        self.results.close()

    def hang_up(self) -> None:
        """Tell the worker that there will be no more. Idempotent."""
        with no_fork:
            if self.to >= 0:
                os.close(self.to)
                self.to = -1
                self.unsent = b""

    def release(self) -> None:
        """End what was for the worker's start, if it has not taken it. Idempotent."""
        if self.lease is not None:
            release_all([self.lease])
        self.initargs.release()

    def close(self) -> None:
        """Close our ends. Idempotent."""
        self.hang_up()
        if self.begun is not None:
            self.begun.release()
        with no_fork:
            for fd in (self.unread, self.back, self.end):
                if fd >= 0:
                    os.close(fd)
            self.unread = self.back = self.end = -1
