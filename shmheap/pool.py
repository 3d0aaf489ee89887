"""Pool: multiprocessing's, whose arguments and results stay where they are.

Pool                the standard library's threads, results and workers' loop
  queues  dispatch  who has which task; what a death means
  pipes   wires     a pair for each worker
  bytes   payload   what is large stays in the heap, or goes there once
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.pool
import multiprocessing.process
import os
import threading
import weakref
from collections.abc import Sized
from functools import partial
from multiprocessing.pool import CLOSE, RUN, TERMINATE
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from shmheap.config import parse_size
from shmheap.dispatch import Dispatcher
from shmheap.heap import Heap
from shmheap.payload import MIN_BYTES, Packer
from shmheap.wires import Channel, Line, keeps_from_forking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from multiprocessing.process import BaseProcess

    from shmheap.stats import PoolStats

__all__ = ["Pool"]

S = TypeVar("S")
T = TypeVar("T")

LOG = logging.getLogger("shmheap")

_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


class Pool(multiprocessing.pool.Pool):
    """multiprocessing.Pool, to which and from which large buffers go without being copied.

    Has its whole interface and behaviour. What lies in a heap goes to a task as a handle: shared,
    and writable by all unless sent as `readonly(array)`. Any other array, frame or table is copied
    into the heap once, and the copy is the task's own. Results are the caller's. A task whose
    worker dies fails with BrokenProcessPool, and the pool goes on with a new worker.

    Args:
        processes: Number of workers; None: one for each CPU.
        initializer: Called in each worker as it starts, with initargs.
        initargs: Its arguments; what is large in them goes as that of a task does, to each worker.
        maxtasksperchild: Tasks after which a worker is replaced; None: never.
        context: From multiprocessing.get_context: how workers are started.
        heap: Where arguments and results are copied to; None: the pool makes one, and removes it
            when it ends. Results stay valid as long as somebody has them.
        min_bytes: Buffers of fewer bytes go through a pipe.
        strict: Raise HeapFull where the heap has no room, instead of using the pipe with a warning.
        allocator: In workers, arrays that NumPy makes are made in the heap.

    Raises what multiprocessing.Pool and Heap.create raise.

    Cost: that of multiprocessing.Pool, and a heap's, if it makes one.
    """

    # The standard library's own, which its stubs do not tell of.
    _inqueue: Dispatcher
    _outqueue: Any
    _quick_put: Any
    _quick_get: Any
    _change_notifier: Any
    _taskqueue: Any
    _pool: list[BaseProcess]
    _worker_handler: Any
    _cache: Any
    _processes: int

    _new_packer: Callable[..., Packer] = Packer
    """For one that pickles otherwise."""

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        heap: Heap | None = None,
        min_bytes: int | str = MIN_BYTES,
        strict: bool = False,
        allocator: bool = True,
    ) -> None:
        self._terms = heap, min_bytes, strict, allocator, processes or os.cpu_count() or 1
        try:
            super().__init__(processes, initializer, initargs, maxtasksperchild, context)
        except BaseException:
            self._abandon()
            raise
        tell = partial(_tell_if_it_ends, self._worker_handler, self._change_notifier)
        self._cache.notifier = SimpleNamespace(put=tell)
        _pools.add(self)

    def _abandon(self) -> None:
        """End what runs of a pool whose making failed, or was interrupted at any point."""
        named = (getattr(self, f"_{name}_handler", None) for name in ("worker", "task", "result"))
        threads = [thread for thread in named if thread is not None and thread.ident is not None]
        if threads:
            for thread in threads:
                thread._state = TERMINATE
            self._inqueue.stop()
            self._inqueue.wake()
            self._change_notifier.put(None)
            self._taskqueue.put(None)
            for thread in threads:
                thread.join()
            for process in self._pool:
                process.terminate()
                process.join()
        if hasattr(self, "_inqueue"):
            self._inqueue.close()

    @property
    def heap(self) -> Heap:
        """The heap of arguments and results. ValueError when the pool has ended, if it made it."""
        return self._inqueue.heap

    def stats(self) -> PoolStats:
        """Return what became of the buffers of arguments and results so far. Cost: O(1)."""
        return self._inqueue.stats()

    def map(
        self,
        func: Callable[[S], T],
        iterable: Iterable[S],
        chunksize: int | None = None,
        *,
        progress: bool = False,
    ) -> list[T]:
        """Return the results of func for each item, as multiprocessing.Pool does.

        Args:
            func: What is called.
            iterable: The items.
            chunksize: Items in one task; None: a quarter of a worker's share.
            progress: Show a bar meanwhile, on stderr.
        """
        return self._watched(self.map_async, func, iterable, chunksize, progress)

    def starmap(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        *,
        progress: bool = False,
    ) -> list[T]:
        """Return the results of func for each tuple of arguments.

        Args:
            func: What is called.
            iterable: Tuples of arguments.
            chunksize: Tuples in one task; None: a quarter of a worker's share.
            progress: Show a bar meanwhile, on stderr.
        """
        return self._watched(self.starmap_async, func, iterable, chunksize, progress)

    def _watched(
        self,
        start: Callable[..., Any],
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None,
        progress: bool,
    ) -> list[T]:
        items = iterable if isinstance(iterable, Sized) else list(iterable)
        result = start(func, items, chunksize)
        if progress:
            from shmheap.progress import watch

            watch(result, len(items))
        found: list[T] = result.get()
        return found

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> multiprocessing.pool.ApplyResult[T]:
        """Have a worker call func(*args, **kwds); see multiprocessing.Pool.

        Args:
            func: What is called.
            args: Its arguments.
            kwds: Those by name.
            callback: Called with the result. What it raises is logged, and nobody else's matter.
            error_callback: Called with the error instead.
        """
        return super().apply_async(func, args, kwds, _logged(callback), _logged(error_callback))

    def _map_async(
        self,
        func: Any,
        iterable: Any,
        mapper: Any,
        chunksize: Any = None,
        callback: Any = None,
        error_callback: Any = None,
    ) -> Any:
        items = iterable if isinstance(iterable, Sized) else list(iterable)
        if chunksize is None:  # not by how many workers there are: none, where all just died
            chunksize = -(-len(items) // (self._processes * 4))
        callbacks = _logged(callback), _logged(error_callback)
        return super()._map_async(func, items, mapper, chunksize, *callbacks)  # type: ignore[misc]

    def join(self) -> None:
        """Wait for the workers' end, after close() or terminate()."""
        super().join()
        self._inqueue.close()

    # What the standard library's pool calls

    def _setup_queues(self) -> None:
        heap, min_bytes, strict, allocator, processes = self._terms
        self._inqueue = dispatcher = Dispatcher(
            heap, parse_size(min_bytes), strict, allocator, processes, self._new_packer
        )
        del self._terms  # the dispatcher alone keeps the heap
        self._outqueue = SimpleNamespace(put=dispatcher.wake)
        self._quick_put = dispatcher.put
        self._quick_get = dispatcher.get

    def _get_sentinels(self) -> list[Any]:
        # Not the results: the thread that looks after the workers need not wake for each of them.
        self._inqueue.on_death = partial(self._change_notifier.put, None)
        return [self._change_notifier._reader]

    @staticmethod
    def Process(ctx: Any, *, target: Any, args: Any) -> Any:  # noqa: N802
        """Make a worker that will have a channel of its own. What it is to do comes from `args`."""
        dispatcher, _, initializer, initargs, max_tasks, wrap = args
        process: BaseProcess = ctx.Process(target=_work)
        work = target, initializer, max_tasks, wrap
        connect = partial(dispatcher.connect, max_tasks, initargs)
        process.start = partial(_start, process, dispatcher, connect, work)  # type: ignore[method-assign]
        return process

    @staticmethod
    def _help_stuff_finish(inqueue: Dispatcher, _task_handler: Any, _size: int) -> None:
        inqueue.stop()

    @classmethod
    def _terminate_pool(cls, *parts: Any) -> None:
        # Who collects garbage comes here from wherever he stands. He cannot wait for himself, nor
        # for threads that want to fork while he keeps all from it.
        if threading.current_thread() in parts or keeps_from_forking():
            threading.Thread(target=cls._end, args=parts, name="shmheap-pool-end").start()
        else:
            cls._end(*parts)

    @classmethod
    def _end(cls, taskqueue: Any, inqueue: Dispatcher, *rest: Any) -> None:
        super()._terminate_pool(taskqueue, inqueue, *rest)  # type: ignore[misc]
        inqueue.close()
        while not taskqueue.empty():  # who keeps the pool need not keep arguments
            taskqueue.get()
        taskqueue.put(None)  # that was for the thread of tasks, if it is this one: it ends now


def _logged(callback: Callable[[T], object] | None) -> Callable[[T], object] | None:
    """A callback whose error is logged. It would end the thread of results, and all would wait for
    ever."""
    if callback is None:
        return None

    def call(value: T) -> None:
        try:
            callback(value)
        except BaseException:
            LOG.exception("a pool's callback raised")

    return call


def _tell_if_it_ends(thread: Any, change_notifier: Any, _nothing: None) -> None:
    """No job is left. Who looks after the workers waits for that once the pool is closed; woken
    each time that it has nothing to do, that thread was half of what a small task cost."""
    if thread._state != RUN:
        change_notifier.put(None)


def _start(
    process: Any,
    dispatcher: Dispatcher,
    connect: Callable[[], tuple[Channel, Line]],
    work: tuple[Any, ...],
) -> None:
    del process.start  # what is sent to a process that is spawned is the process object
    try:
        channel, line = connect()
        process._args = line, *work
        try:
            process.start()
            dispatcher.started(channel, process)
        except BaseException:
            if process.pid is not None:
                process.kill()
            dispatcher.not_started(channel)
            raise
    except Exception as error:
        if not dispatcher.goes_on_without(error):
            raise
        process.__class__ = _NotStarted


class _NotStarted(multiprocessing.process.BaseProcess):
    """What the pool has instead of a worker: one that has ended, so that it tries to replace it.

    An error would end the thread that looks after the workers, and nobody would ever again."""

    exitcode = 1

    @property
    def sentinel(self) -> int:
        """There is nothing to wait for."""
        raise AttributeError

    def join(self, timeout: float | None = None) -> None:
        """Return at once."""


def _work(
    line: Line,
    loop: Callable[..., None],
    initializer: Callable[..., object] | None,
    max_tasks: int | None,
    wrap: bool,
) -> None:
    """A worker: the standard library's loop, whose queues are the line."""
    loop(line, line, initializer, line.initargs.value, max_tasks, wrap)
    line.end()


def _end_pools() -> None:
    """At exit, before heaps are closed."""
    for pool in list(_pools):
        pool.terminate()


atexit.register(_end_pools)


def _close_in_child() -> None:
    """In a forked child, which has none of a pool's threads, its use is an error and no wait."""
    for pool in list(_pools):
        pool._state = CLOSE  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_close_in_child)
