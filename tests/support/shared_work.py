"""What several processes do at once with a shared list or dict, or with named roots."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import MutableMapping
from typing import Any

import shmheap

Dict = shmheap.SharedDict[Any, Any]
List = shmheap.SharedList[Any]
Values = MutableMapping[str, Any]


def set_keys(shared: Dict, who: int, count: int) -> None:
    """Keys of this process alone, each with a value that says whose it is."""
    for number in range(count):
        shared[f"{who} {number}"] = [who, number]


def set_pairs(shared: Values, who: int, count: int) -> None:
    """One key of all: values whose parts belong together, short, long, and with a block."""
    forms = (str, lambda n: str(n) * 2000, lambda n: memoryview(str(n).encode() * 3))
    for number in range(count):
        value = forms[number % 3]((who + 1) * 10_000 + number)
        shared["pair"] = (value, value)


def see_pairs(shared: Values, count: int) -> int:
    """How many of so many looks saw halves of two values."""
    pairs = (shared["pair"] for _ in range(count))
    return sum(first != second for first, second in pairs)


def claim_keys(shared: Dict, who: int, count: int) -> int:
    """How many keys this process was first to set."""
    return sum(shared.setdefault(number, who) == who for number in range(count))


def take_items(shared: Dict) -> list[Any]:
    """Each item that this process got."""
    taken = []
    while True:
        try:
            taken.append(shared.popitem()[0])
        except KeyError:
            return taken


def churn(shared: Dict, who: int, rounds: int) -> None:
    """Whatever makes tables grow, shrink and move."""
    for number in range(rounds):
        shared[f"{who} {number}"] = {"list": [number], "self": shared, "text": "x" * (number % 300)}
        if number >= 20:
            del shared[f"{who} {number - 20}"]


def append_own(shared: List, who: int, count: int) -> None:
    for number in range(count):
        shared.append((who, number))


def extend_own(shared: List, who: int, count: int) -> None:
    for number in range(count):
        shared.extend([(who, number)] * 5)


def take_values(shared: List) -> list[Any]:
    """Each value that this process got, from both ends."""
    taken: list[Any] = []
    while True:
        try:
            taken.append(shared.pop(-(len(taken) % 2)))
        except IndexError:
            return taken


def turn(shared: List, count: int) -> None:
    """Whatever moves all values, and loses and doubles none."""
    for number in range(count):
        (shared.reverse, shared.sort)[number % 2]()
        shared.insert(0, shared.pop())


def count_up(shared: Dict, count: int) -> None:
    """What is only right under the lock."""
    for _ in range(count):
        with shared.lock():
            shared["n"] = shared["n"] + 1


def count_root(heap: shmheap.Heap, count: int) -> None:
    for _ in range(count):
        while not heap.roots.compare_and_set("n", now := heap.roots["n"], now + 1):
            pass


def die_with_lock(shared: Dict) -> None:
    with shared.lock():
        shared["half"] = "done"
        os.kill(os.getpid(), signal.SIGKILL)


def make_cycles(heap: shmheap.Heap, count: int) -> None:
    """Garbage that counting never frees."""
    for number in range(count):
        mapping = heap.dict(value={"number": number, "bytes": bytes(1000)})
        mapping["list"] = [mapping, (mapping,), {"again": mapping}]


def set_root_pairs(heap: shmheap.Heap, count: int) -> None:
    set_pairs(heap.roots, 0, count)


def see_root_pairs(heap: shmheap.Heap, count: int) -> int:
    return see_pairs(heap.roots, count)


def add_one(heap: shmheap.Heap, count: int) -> None:
    """Add 1 so many times to a root by compare-and-set."""
    for _ in range(count):
        while not heap.roots.compare_and_set("n", now := heap.roots["n"], now + 1):
            pass


def rename(heap: shmheap.Heap, rounds: int) -> None:
    """From "a" to "b" and back: one of them is there at any moment."""
    for _ in range(rounds):
        for new, old in ("ba", "ab"):
            heap.roots[new] = 1
            del heap.roots[old]


def see_no_name(heap: shmheap.Heap, count: int) -> int:
    """How many of so many looks saw neither name."""
    return sum(not {"a", "b"} & set(heap.roots) for _ in range(count))


_loaded: list[shmheap.Block] = []


def load_many(data: bytes, count: int) -> int:
    """Unpickle one handle so often, and keep what came; returns how many have its bytes."""
    _loaded.extend(pickle.loads(data) for _ in range(count))
    return sum(bytes(block) == b"abc" for block in _loaded)
