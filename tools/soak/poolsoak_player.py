"""A player: one process that makes a pool, uses it in all ways, ends it, looks, and begins again.

Each round has a pool or an executor of its own, of random terms. A thread kills workers and the
coordinator meanwhile. Whatever comes back must be right to the byte, or an error that there is a
reason for; and after the round nothing may be left: no lease, no block, no thread, no process, no
descriptor. What it does is told as lines of JSON on standard output.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.pool import MaybeEncodingError
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also under python -P

import poolsoak_values as tasks
from poolsoak_values import Stale, Unsendable, Values, digest, value_of
from soak_proc import is_coordinator

import shmheap
from shmheap import lifeline
from shmheap._core import Observer

HUNG_S = 60.0
"""What takes so long hangs."""
METHODS = (*["fork"] * 8, "spawn", "forkserver")
MIN_BYTES = (1, 4096, 32768, 32768, 32768, 1 << 20)
SMALL_HEAP = "2MiB"
HEAP = "256MiB"
GRACE_S = 5.0


class WrongError(Exception):
    """A pool has not kept a promise."""


class Call(NamedTuple):
    """A task, and what is to come of it."""

    number: int
    task: Callable[..., Any]
    value: Any
    seed: int
    sent: str
    """The value's digest."""
    errors: tuple[type[BaseException], ...]
    """One of these is to come of it; empty: a result."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.number, self.value, self.seed

    @property
    def kills(self) -> bool:
        """Whether it ends its worker."""
        return self.task in (tasks.die, tasks.end, tasks.leave)


class Killer(threading.Thread):
    """Kills workers, idle, busy and starting, and the coordinator, until told to stop."""

    def __init__(self, source: random.Random, rate: float, workers: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._random = source
        self._rate = rate
        self._workers = workers
        self._over = threading.Event()
        self.coordinators_of: shmheap.Heap | None = None
        self.kills: Counter[str] = Counter()

    def run(self) -> None:
        while not self._over.wait(self._random.expovariate(self._rate)):
            if self.coordinators_of is not None and self._random.random() < 0.2:
                self._kill_coordinator(self.coordinators_of)
            elif workers := self._workers():
                self.kills["worker"] += 1  # before anybody can notice
                with suppress(ValueError, AttributeError, OSError):
                    self._random.choice(workers).kill()

    def _kill_coordinator(self, heap: shmheap.Heap) -> None:
        pid = Observer(heap._fileno()).header()["coordinator_pid"]
        if is_coordinator(pid, heap._path):
            self.kills["coordinator"] += 1
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kill nobody from now on."""
        self._over.set()
        if self.ident is not None:
            self.join()


class Round:
    """One pool or executor, from its making to the look at what is left.

    Args:
        seed: of everything in it.
        killed: whether this process is to be killed. Then no coordinator is killed: if all die
            together, the heap's file stays.
        say: takes what is to be told.
    """

    def __init__(self, seed: str, killed: bool, say: Callable[..., None]) -> None:
        self.tally: Counter[str] = Counter()
        self._random = choose = random.Random(seed)
        self._say = say
        self._is_executor = choose.random() < 0.3
        self._method = choose.choice(METHODS)
        self._small = choose.random() < 0.15
        self._strict = choose.random() < 0.3
        self._min_bytes = choose.choice(MIN_BYTES)
        self._max_tasks = choose.choice([None, None, None, 1, 3, 10])
        self._processes = choose.randint(1, 4)
        # The standard library's own waits for ever now and then when workers end or die.
        self._rate = 0 if self._is_executor else choose.choice([0, 0, 3, 30])
        self._own_heap = choose.random() < 0.2 and not self._small
        self._ending = choose.choice(["close", "close", "terminate", "with", "collect"])
        self._coordinators = not killed
        self._heap: shmheap.Heap | None = None
        self._pool: Any = None
        self._numbers = itertools.count()
        self._killing = 0
        """Calls that kill their worker."""
        self._pending: list[Callable[[], None]] = []
        self._unfetched: list[Any] = []
        self._killer = Killer(random.Random(f"{seed}/killer"), self._rate or 1, self._workers)

    def play(self) -> None:
        """Do it all. Raises WrongError."""
        self._make()
        if self._rate:
            self._killer.start()
        try:
            self._use()
            if self._ending == "close":
                self._settle()
            self._end()
        finally:
            self._killer.stop()
        self._account()
        self._look_at_what_is_left()

    def __str__(self) -> str:
        kind = "executor" if self._is_executor else "pool"
        return (
            f"{kind} {self._method} x{self._processes}, min_bytes {self._min_bytes}, "
            f"max tasks {self._max_tasks}, {'strict, ' * self._strict}{'small, ' * self._small}"
            f"{'own heap, ' * self._own_heap}kills {self._rate} per s, ending {self._ending}"
        )

    # Its pool

    def _make(self) -> None:
        config = shmheap.Config(lease_grace_s=GRACE_S)
        if not self._own_heap:
            capacity = SMALL_HEAP if self._small else HEAP
            self._heap = shmheap.Heap.create(capacity=capacity, config=config)
            self._say(heap=self._heap._path, nonce=self._heap.nonce)
        options: dict[str, Any] = {
            "heap": self._heap,
            "min_bytes": self._min_bytes,
            "strict": self._strict,
            "allocator": self._random.random() < 0.7,
        }
        if self._random.random() < 0.5 and not self._small:
            value = Values(self._random, self._heap, self._min_bytes).any()
            options |= {"initializer": digest, "initargs": (value,)}
        context = multiprocessing.get_context(self._method)
        if self._is_executor:
            self._pool = shmheap.ProcessPoolExecutor(self._processes, context, **options)
        else:
            options |= {"maxtasksperchild": self._max_tasks, "context": context}
            self._pool = shmheap.Pool(self._processes, **options)
        if self._own_heap:
            self._say(heap=self._pool.heap._path, nonce=self._pool.heap.nonce)
        if self._coordinators:
            self._killer.coordinators_of = self._heap
        self._values = Values(self._random, self._heap, self._min_bytes)
        self._plain = Values(self._random, None, self._min_bytes)

    def _workers(self) -> list[Any]:
        pool = self._pool
        if pool is None:
            return []
        return list((pool._processes or {}).values()) if self._is_executor else list(pool._pool)

    # Its use

    def _use(self) -> None:
        ways: list[Callable[[], None]]
        if self._is_executor:
            ways = [self._submit, self._submit, self._executor_map, self._cancel]
        else:
            ways = [self._apply, self._apply, self._map, self._map, self._imap, self._abandon]
            ways += [self._not_fetched]
        for _ in range(self._random.randint(3, 25)):
            self._random.choice(ways)()
            if self._random.random() < 0.3:
                self._settle()

    def _call(self) -> Call:
        number, seed = next(self._numbers), self._random.randrange(1 << 32)
        task, errors = self._random.choices(*self._menu())[0]
        values = self._plain if task is tasks.scribble else self._values
        value = values.any()
        if task is tasks.look and errors:
            value = Unsendable() if errors == (LookupError,) else self._stale()
        self.tally["tasks"] += 1
        sent = "" if errors else digest(value)
        call = Call(number, task, value, seed, sent, errors)
        self._killing += call.kills
        return call

    def _menu(self) -> tuple[list[tuple[Any, tuple[type[BaseException], ...]]], list[float]]:
        unsendable = LookupError if self._is_executor else MaybeEncodingError
        menu: list[tuple[Any, tuple[type[BaseException], ...], float]] = [
            (tasks.same, (), 20),
            (tasks.look, (), 20),
            (tasks.make, (), 10),
            (tasks.linger, (), 10),
            (tasks.scribble, (), 3),
            (tasks.fail, (ZeroDivisionError,), 1),
            (tasks.look, (LookupError,), 0.5),
            (tasks.send_the_unsendable, (unsendable,), 0.5),
            (tasks.look, (shmheap.StaleHandle,), 0.5 if self._heap and not self._small else 0),
        ]
        if not self._is_executor:  # which breaks of these
            menu += [
                (tasks.fail_oddly, (TypeError,), 0.5),
                (tasks.send_a_trap, (LookupError,), 0.5),
                (tasks.die, (BrokenProcessPool,), 0.4),
                (tasks.end, (BrokenProcessPool,), 0.4),
                (tasks.leave, (BrokenProcessPool,), 0.4),
            ]
        return [(task, errors) for task, errors, _ in menu], [weight for *_, weight in menu]

    def _stale(self) -> Stale:
        assert self._heap is not None
        block = self._heap.put(b"stale")
        message = pickle.dumps(block)
        pickle.loads(message).free()
        block.free()
        return Stale(message)

    def _later(self, settle: Callable[[], None]) -> None:
        self._pending.append(settle)

    def _settle(self) -> None:
        while self._pending:
            self._pending.pop(self._random.randrange(len(self._pending)))()

    def _apply(self) -> None:
        call, told = self._call(), list[Any]()
        result = self._pool.apply_async(
            call.task, call.arguments, callback=told.append, error_callback=told.append
        )

        def settle() -> None:
            self._judge([call], lambda: [result.get(HUNG_S)])
            if len(told) != 1:
                raise WrongError(f"a callback was called {len(told)} times")

        self._later(settle)

    def _calls(self) -> list[Call]:
        return [self._call() for _ in range(self._random.choice([0, 1, 3, 10, 40]))]

    def _map(self) -> None:
        calls, chunksize = self._calls(), self._random.choice([None, 1, 3])
        packed = [(call.task, *call.arguments) for call in calls]
        if self._random.random() < 0.5:
            result = self._pool.map_async(tasks.unpacked, packed, chunksize)
        else:
            result = self._pool.starmap_async(tasks.starred, packed, chunksize)
        self._later(lambda: self._judge(calls, lambda: result.get(HUNG_S)))

    def _imap(self) -> None:
        calls = self._calls()
        packed = ((call.task, *call.arguments) for call in calls)
        if ordered := self._random.random() < 0.5:
            results = self._pool.imap(tasks.unpacked, packed)
        else:
            results = self._pool.imap_unordered(tasks.unpacked, packed)

        def settle() -> None:
            for call in calls:
                among = [call] if ordered else calls
                self._judge(among, lambda: [results.next(HUNG_S)], any_one=not ordered)
            with suppress(StopIteration):
                results.next(HUNG_S)
                raise WrongError("one result too many")

        self._later(settle)

    def _abandon(self) -> None:
        calls = self._calls()
        packed = [(call.task, *call.arguments) for call in calls]
        results = self._pool.imap(tasks.unpacked, packed, self._random.choice([1, 3]))
        with suppress(Exception):
            next(results)

    def _not_fetched(self) -> None:
        call = self._call()
        self._unfetched.append(self._pool.apply_async(call.task, call.arguments))

    def _submit(self) -> None:
        call = self._call()
        future = self._pool.submit(call.task, *call.arguments)
        self._later(lambda: self._judge([call], lambda: [future.result(HUNG_S)]))

    def _executor_map(self) -> None:
        calls, chunksize = self._calls(), self._random.choice([1, 3])
        packed = [(call.task, *call.arguments) for call in calls]
        results = self._pool.map(tasks.unpacked, packed, chunksize=chunksize, timeout=HUNG_S)
        self._later(lambda: self._judge(calls, lambda: list(results)))

    def _cancel(self) -> None:
        calls = [self._call() for _ in range(self._random.randint(1, 8))]
        futures = [self._pool.submit(call.task, *call.arguments) for call in calls]
        cancelled = [future.cancel() for future in futures]

        def settle() -> None:
            for call, future, is_cancelled in zip(calls, futures, cancelled, strict=True):
                if not is_cancelled:
                    self._judge([call], lambda future=future: [future.result(HUNG_S)])

        self._later(settle)

    # What came of it

    def _judge(
        self, calls: list[Call], get: Callable[[], list[Any]], *, any_one: bool = False
    ) -> None:
        """Compare what there is with what is to come of the calls.

        Args:
            calls: these.
            get: returns what came of each; one error may come for all.
            any_one: it returns that of one of them.
        """
        try:
            answers = get()
        except (TimeoutError, multiprocessing.TimeoutError):
            self._tell_where_all_are()
            raise WrongError(f"no result after {HUNG_S:.0f} s") from None
        except CancelledError:
            raise
        except Exception as error:
            self._judge_error(calls, error)
            return
        by_number = {call.number: call for call in calls}
        if not any_one and len(answers) != len(calls):
            raise WrongError(f"{len(answers)} results of {len(calls)}")
        for number, arrived, back in answers:
            self._judge_answer(by_number[number], arrived, back)

    def _judge_answer(self, call: Call, arrived: str, back: Any) -> None:
        self.tally["right"] += 1
        if call.errors:
            raise WrongError(f"{call.task.__name__} had a result")
        if arrived != call.sent:
            raise WrongError(f"{describe(call.value)} arrived as something else")
        if digest(call.value) != call.sent:
            raise WrongError(f"{describe(call.value)} was changed by its task")
        if call.task is tasks.make:
            wanted = digest(value_of(call.seed))
        elif call.task in (tasks.same, tasks.linger):
            wanted = call.sent
        else:
            return
        if digest(back) != wanted:
            raise WrongError(
                f"{describe(back)} came back from {call.task.__name__} of {describe(call.value)}"
            )

    def _judge_error(self, calls: list[Call], error: Exception) -> None:
        self.tally[type(error).__name__] += 1
        if any(type(error) in call.errors for call in calls):
            return
        if type(error) is BrokenProcessPool:
            self._require_reason()
        elif not (type(error) is shmheap.HeapFull and self._small and self._strict):
            raise WrongError(
                f"an error that has no reason: {error!r}, for one of "
                f"{[call.task.__name__ for call in calls]}"
            ) from error

    def _require_reason(self) -> None:
        if not self._killer.kills["worker"] and not self._killing:
            raise WrongError("nobody was killed, and a pool says so")

    def _account(self) -> None:
        """No task was lost but one for each worker that was killed."""
        kills = self._killer.kills
        self.tally.update({f"killed_{name}": count for name, count in kills.items()})
        if self._ending != "close":  # of workers that are told to end, too
            return
        lost = self._lost
        self.tally["lost"] += lost
        # More of them, and the pool may have been without workers for so long that it gave up.
        if kills["worker"] <= self._processes and lost > kills["worker"] + self._killing:
            raise WrongError(
                f"{lost} tasks were lost, of {self._killing} that kill, and {kills} kills"
            )

    def _tell_where_all_are(self) -> None:
        for worker in self._workers():
            with suppress(OSError, TypeError):
                os.kill(worker.pid, signal.SIGUSR1)
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(1)

    # Its end

    def _end(self) -> None:
        pool, ending = self._pool, self._ending
        self._lost = 0
        if self._is_executor:
            if ending == "with":
                with pool:
                    pass
            elif ending != "collect":
                pool.shutdown(cancel_futures=ending == "terminate")
        else:
            if ending == "close":
                pool.close()
            elif ending == "with":
                with pool:
                    pass
            elif ending == "terminate":
                pool.terminate()
            if ending != "collect":
                pool.join()
            self._lost = pool.stats().lost
        self._killer.stop()
        self._pending.clear()
        self._unfetched.clear()
        self._pool = self._killer._workers = None  # type: ignore[assignment]

    def _look_at_what_is_left(self) -> None:
        wait_until("threads", lambda: threading.active_count() == 1, threading.enumerate)
        wait_until("processes", lambda: not multiprocessing.active_children(), lambda: "")
        heap = self._heap
        if heap is None:
            return
        self._killer.coordinators_of = self._heap = None
        del self._values

        def is_empty() -> bool:
            gc.collect()
            heap.gc()
            stats = heap.stats()
            return (stats.leases, stats.heap_objects) == (0, 0)

        wait_until("in the heap", is_empty, lambda: (heap.stats(), shmheap.heap.find_holders))
        heap.check()
        heap.unlink()
        heap.close()


def wait_until(what: str, is_so: Callable[[], bool], tell: Callable[[], Any]) -> None:
    """Wait for what must come; raise WrongError if it does not."""
    given_up = time.monotonic() + HUNG_S
    while not is_so():
        if time.monotonic() > given_up:
            raise WrongError(f"left: {what}: {tell()}")
        gc.collect()
        time.sleep(0.002)


def describe(value: Any) -> str:
    """Say what it is, shortly."""
    form = [getattr(value, name, "") for name in ("dtype", "shape", "strides", "format", "nbytes")]
    return f"{type(value).__name__} {form} {repr(value)[:80]}"


def descriptors() -> list[str]:
    """Return what this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)


@contextmanager
def none_left_open() -> Iterator[None]:
    """Raise WrongError if descriptors are open afterwards that were not before."""
    before = descriptors()
    yield
    gc.collect()
    wait_until(
        "descriptors",
        lambda: len(descriptors()) <= len(before),
        lambda: Counter(descriptors()) - Counter(before),
    )


def play(
    seed: int, rounds: Iterable[int], *, killed: bool, out: int, until_s: float | None = None
) -> None:
    """Play rounds, one after the other; tell of each, and stop at the first that is wrong.

    Args:
        seed: of all of them.
        rounds: their numbers.
        killed: whether this process is to be killed meanwhile.
        out: the descriptor to which it is told.
        until_s: when none begins any more, CLOCK_MONOTONIC; None: whenever.
    """

    def say(**what: Any) -> None:
        os.write(out, json.dumps(what).encode() + b"\n")

    faults: list[Any] = []
    threading.excepthook = faults.append
    sys.unraisablehook = faults.append
    with suppress(ImportError):  # now: a child must not be forked while another thread imports it
        importlib.import_module("pandas")
    forkserver.ensure_running()
    lifeline.reading_end()  # once for all executors
    resource_tracker.ensure_running()
    for number in rounds:
        if until_s is not None and time.monotonic() > until_s:
            return
        faulthandler.dump_traceback_later(3 * HUNG_S, exit=True)
        one = Round(f"{seed}/{number}", killed, say)
        say(round=number, terms=str(one))
        try:
            with none_left_open():
                one.play()
            if faults:
                raise WrongError(f"raised where nobody sees it: {faults}")
        except BaseException as error:
            say(failure=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            return
        say(done=number, tally=one.tally)


def main(argument: str) -> NoReturn:
    """Be a player, with its order as JSON."""
    order = json.loads(argument)
    out = os.dup(sys.stdout.fileno())  # workers' prints go where errors go
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    play(
        order["seed"],
        range(order["first"], order["first"] + order["rounds"]),
        killed=order["killed"],
        out=out,
        until_s=order["until_s"],
    )
    sys.exit()


if __name__ == "__main__":
    main(sys.argv[1])
