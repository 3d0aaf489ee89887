"""What shared dicts and lists cost: beside their peers, and with two processes at one dict."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.shared_memory import ShareableList, SharedMemory
from pathlib import Path
from types import FunctionType
from typing import Any

from bench_common import (
    MIB,
    Calls,
    Case,
    Loop,
    Result,
    Row,
    console,
    figure_axes,
    measure,
    one_cpu,
    progress,
    ratio,
    show_rows,
    together,
    workers,
)
from rich.table import Table

import shmheap
from shmheap import _core

SIZE = 1000
"""Entries of each collection."""

VALUES: dict[str, Any] = {
    "int": 12345,
    "str": "short one",
    "bytes of 100": bytes(range(100)),
    "nested": {"a": 1, "b": {"c": "deep"}},
}
UNIT, UNIT_NS = "bytearray(64)", 75
"""Nanoseconds are those of a machine where this takes so long."""

LIMITS = {
    ("dict get", "int"): (300, 150),
    ("dict get", "str"): (300, 150),
    ("dict set", "int"): (500, 250),
    ("list append", "int"): (400, 150),
}
PEER_LIMITS = {"Manager": (50, 200), "UltraDict": (4, 10)}
"""How many times faster shmheap is, with values of 100 bytes."""


class Collections:
    """The command `collections`."""

    summary = "dicts and lists: get, set, append, iterate beside peers; two processes at one dict"

    def run(self, *, quick: bool) -> Result:
        """Measure everything; some minutes, `quick` some seconds."""
        rounds, slice_ms = (3, 0.5) if quick else (41, 4)
        with ExitStack() as stack:
            stack.enter_context(one_cpu())
            peers = stack.enter_context(_peers())
            jobs = [(do, value) for do in OPERATIONS for value in VALUES]
            cases = {
                f"{do} {value}": measure_one(do, value, peers, rounds, slice_ms)
                for do, value in progress(jobs, "beside peers")
            }
        scaling = measure_scaling(rounds=3 if quick else 25, window_ms=5 if quick else 40)
        rows = [row.as_json() for row in _rows(cases, scaling)]
        return {"cases": cases, "scaling": scaling, "rows": rows}

    def show(self, result: Result) -> None:
        """Print tables."""
        console().print(_case_table(result["cases"]))
        if "skipped" in result["scaling"]:
            console().print(f"two processes: skipped, {result['scaling']['skipped']}")
        else:
            console().print(_scaling_table(result["scaling"]))
        show_rows(result["rows"])

    def plot(self, result: Result, file: Path) -> None:
        """Draw what each operation costs."""
        figure, axes = figure_axes()
        for name in _names(result["cases"]):
            points = {what: one["ns"].get(name) for what, one in result["cases"].items()}
            axes.plot(list(points), list(points.values()), "o", label=name)
        axes.set(yscale="log", ylabel="ns")
        axes.tick_params(axis="x", rotation=90)
        axes.legend()
        figure.savefig(file, dpi=120)


def _rows(cases: Result, scaling: Result) -> Iterator[Row]:
    for (do, value), (must, aim) in LIMITS.items():
        scaled = cases[f"{do} {value}"]["scaled_ns"].get("shmheap")
        if scaled is not None:
            yield Row(f"{do}, {value}", scaled, must, aim, unit="ns, scaled")
    for do in ("dict get", "dict set"):
        for peer, (must, aim) in PEER_LIMITS.items():
            times = cases[f"{do} bytes of 100"]["ratios"].get(peer)
            if times is not None:
                yield Row(f"{peer} / {do}, 100 bytes", times, must, aim, at_least=True)
    for name, one in scaling.items():
        if name.startswith("shmheap"):
            what = f"two processes / one, {name.removeprefix('shmheap ')} in one dict"
            yield Row(what, one["wall"], 1.6, 2.0, at_least=True)
            yield Row(f"{what}, by CPU time", one["cpu"], at_least=True)


# --------------------------------------------------------------------------------------------------
# Who takes part


@dataclass(frozen=True, slots=True)
class Peer:
    """Where dicts and lists come from. None: it has no such thing."""

    new_dict: Callable[[], Any] | None
    new_list: Callable[[], Any] | None
    clock: Callable[[], int] = time.thread_time_ns
    grows: bool = True
    """False: its size is that of the beginning, or each new entry costs as much as all."""


class PickledDict:
    """A dict as one pickle in shared memory: each get reads all of it, each set writes all."""

    def __init__(self, memory: SharedMemory) -> None:
        self._bytes: Any = memory.buf
        self._write({})

    def _read(self) -> dict[Any, Any]:
        found: dict[Any, Any] = pickle.loads(self._bytes)
        return found

    def _write(self, content: dict[Any, Any]) -> None:
        data = pickle.dumps(content)
        self._bytes[: len(data)] = data

    def __getitem__(self, key: Any) -> Any:
        return self._read()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._write(self._read() | {key: value})

    def update(self, content: dict[Any, Any]) -> None:
        self._write(self._read() | content)

    def items(self) -> Iterable[tuple[Any, Any]]:
        return self._read().items()


@contextmanager
def _peers() -> Iterator[dict[str, Peer]]:
    with ExitStack() as stack:
        heap = stack.enter_context(_heap())
        manager = stack.enter_context(multiprocessing.Manager())
        server = time.thread_time_ns, _clock_of(manager._process.pid)  # type: ignore[attr-defined]
        memory = SharedMemory(create=True, size=4 * MIB)
        stack.callback(memory.unlink)
        stack.callback(memory.close)
        peers = {
            "shmheap": Peer(heap.dict, heap.list),
            "dict, list": Peer(dict, list),
            "Manager": Peer(manager.dict, manager.list, lambda: sum(clock() for clock in server)),
            "ShareableList": Peer(None, lambda: _shareable(stack), grows=False),
            "pickled": Peer(lambda: PickledDict(memory), None, grows=False),
        }
        if importlib.util.find_spec("UltraDict"):
            peers["UltraDict"] = Peer(lambda: _ultra(stack), None, grows=False)
        yield peers


def _clock_of(pid: int) -> Callable[[], int]:
    """CPU time of another process: that of a manager's server belongs to what a call costs."""
    clock = ~pid << 3 | 2  # as clock_getcpuclockid(3) makes it
    return lambda: time.clock_gettime_ns(clock)


@contextmanager
def _heap() -> Iterator[shmheap.Heap]:
    with shmheap.Heap.create(capacity=256 * MIB) as heap:
        try:
            yield heap
        finally:
            heap.unlink()


def _shareable(stack: ExitStack) -> Any:
    made = ShareableList([bytes(100)] * SIZE)
    stack.callback(made.shm.unlink)
    stack.callback(made.shm.close)
    return made


def _ultra(stack: ExitStack) -> Any:
    made = importlib.import_module("UltraDict").UltraDict(buffer_size=MIB)
    stack.callback(made.unlink)
    stack.callback(made.close)
    return made


# --------------------------------------------------------------------------------------------------
# What is done. Each loop has a code object of its own, see new_loop


def _get(collection: Any, n: Any, times: int) -> None:
    for key in islice(cycle(n[0]), times):
        collection[key]


def _get_deep(collection: Any, n: Any, times: int) -> None:
    for key in islice(cycle(n[0]), times):
        collection[key]["b"]["c"]


def _set(collection: Any, n: Any, times: int) -> None:
    keys, value = n
    for key in islice(cycle(keys), times):
        collection[key] = value


def _fill(collection: Any, n: Any, times: int) -> None:
    keys, value = n
    for _ in range(times):
        collection.clear()
        for key in keys:
            collection[key] = value


def _append(collection: Any, n: Any, times: int) -> None:
    keys, value = n
    for _ in range(times):
        del collection[:]
        for _ in keys:
            collection.append(value)


def _iterate(collection: Any, n: Any, times: int) -> None:
    for _ in range(times):
        deque(collection, 0)


def _iterate_items(collection: Any, n: Any, times: int) -> None:
    for _ in range(times):
        deque(collection.items(), 0)


@dataclass(frozen=True, slots=True)
class Operation:
    """A loop, and how many entries it works through each time."""

    loop: Loop
    of: str
    entries: int = 1
    grows: bool = False


OPERATIONS = {
    "dict get": Operation(_get, "dict"),
    "dict set": Operation(_set, "dict"),
    "dict set new": Operation(_fill, "dict", SIZE, grows=True),
    "dict iterate": Operation(_iterate_items, "dict", SIZE),
    "list get": Operation(_get, "list"),
    "list set": Operation(_set, "list"),
    "list append": Operation(_append, "list", SIZE, grows=True),
    "list iterate": Operation(_iterate, "list", SIZE),
}


def _own(loop: Any) -> Loop:
    made: Any = FunctionType(loop.__code__.replace(), globals())
    return made  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------
# Beside the peers


def measure_one(
    do: str, value: str, peers: dict[str, Peer], rounds: int, slice_ms: float
) -> Result:
    """One operation with one kind of value by all who can, in turns."""
    operation = OPERATIONS[do]
    unit = Case(UNIT, bytearray, 64)
    cases = [
        Case(name, made, (_keys(operation.of), VALUES[value]), _loop(do, value), peer.clock)
        for name, peer in peers.items()
        if (made := _filled(peer, operation, VALUES[value])) is not None
    ]
    measure([unit, *cases], rounds, slice_ms)
    for case in cases:
        case.ns = [ns / operation.entries for ns in case.ns]
    ours = next((case.ns for case in cases if case.name == "shmheap"), None)
    return {
        "ns": {case.name: statistics.median(case.ns) for case in cases},
        "scaled_ns": {case.name: UNIT_NS * ratio(case.ns, unit.ns) for case in cases},
        "ratios": {case.name: ratio(case.ns, ours) for case in cases} if ours else {},
    }


def _loop(do: str, value: str) -> Loop:
    nested = value == "nested" and do in ("dict get", "list get")
    return _own(_get_deep if nested else OPERATIONS[do].loop)


def _keys(of: str) -> Sequence[Any]:
    return [f"key {i}" for i in range(SIZE)] if of == "dict" else range(SIZE)


def _filled(peer: Peer, operation: Operation, value: Any) -> Any:
    """A collection of SIZE equal values, None: there is none, or it cannot."""
    new = peer.new_dict if operation.of == "dict" else peer.new_list
    if new is None or (operation.grows and not peer.grows):
        return None
    made = new()
    if hasattr(made, "update"):
        made.update(dict.fromkeys(_keys("dict"), value))
    elif operation.of == "dict":
        _set(made, (_keys("dict"), value), SIZE)
    elif hasattr(made, "append"):
        _append(made, (range(SIZE), value), 1)
    elif isinstance(value, dict):
        return None  # a ShareableList has scalars, str and bytes
    else:
        _set(made, (range(SIZE), value), SIZE)
    return made


def _names(cases: Result) -> list[str]:
    return list(dict.fromkeys(name for one in cases.values() for name in one["ns"]))


def _case_table(cases: Result) -> Table:
    title = "ns (times shmheap's), one pinned process, median"
    table, names = Table(f"{SIZE} entries", title=title), _names(cases)
    for name in names:
        table.add_column(name, justify="right")
    for what, one in cases.items():
        texts = (_figure(one["ns"].get(name), one["ratios"].get(name)) for name in names)
        table.add_row(what, *texts)
    return table


def _figure(ns: float | None, times: float | None) -> str:
    if ns is None:
        return ""
    return f"{ns:,.0f}" if times is None else f"{ns:,.0f} ({times:.3g})"


# --------------------------------------------------------------------------------------------------
# Two processes at one dict


def measure_scaling(rounds: int, window_ms: int) -> Result:
    """Throughput of two pinned processes over that of one, on different keys of one dict.

    Beside it the same of two dicts of Python's, each process its own. See bench_alloc.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return {"skipped": "it needs two CPUs"}
    with _heap() as heap:
        shared = heap.dict()
        _set(shared, (_keys("dict"), VALUES["int"]), SIZE)
        halves = (_keys("dict")[::2], _keys("dict")[1::2])
        works = [(_at_work, (heap, shared._block, half)) for half in halves]
        names = ("shmheap get", "shmheap set", "dict get", "dict set")
        with workers(cpus[:2], works) as ends:
            found = together(ends, names, rounds, window_ms)
    for one in found.values():
        del one["ratios"]
    return found


@contextmanager
def _at_work(heap: shmheap.Heap, block: shmheap.Block, keys: Sequence[str]) -> Iterator[Calls]:
    with heap:
        shared, own, n = _core.DictBase(block), dict.fromkeys(keys), (keys, VALUES["int"])
        yield {
            "shmheap get": (shared, n, _own(_get)),
            "shmheap set": (shared, n, _own(_set)),
            "dict get": (own, n, _own(_get)),
            "dict set": (own, n, _own(_set)),
        }


def _scaling_table(scaling: Result) -> Table:
    table = Table("two pinned processes / one", title="scaling, different keys of one dict")
    for name in ("by the wall clock", "by CPU time", "gave up the CPU"):
        table.add_column(name, justify="right")
    for name, one in scaling.items():
        table.add_row(name, f"{one['wall']:.3f}", f"{one['cpu']:.3f}", f"{one['blocked']}")
    return table
