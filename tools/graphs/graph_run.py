"""Rounds: workers change the graph while one collection follows another, and then all stand still.

Who is in charge then marks the graph as one would on paper: from what the workers say that they
hold, the letters under way and the names, by reading references; it knows nothing of counts,
touches, epochs and phases. What can be reached lives, with its label, before a collection and after
it; and as all stood still when it began, nothing else does.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import graph_worker
from graph_worker import (
    LETTER,
    NAMES,
    Held,
    Place,
    Report,
    WrongError,
    let_go,
    number_of,
    require_number,
    width_of,
)
from soak_board import Post

import shmheap
from shmheap import arena

CAPACITY = 1 << 30
STEPS = 50_000
"""Of a worker, between two moments at which all stand still."""
MOST_BLOCKS = 20_000
"""That can be reached. If there are more, the workers let go of names and nodes."""
HUNG_S = 300.0
"""Bounds how long a broken run hangs, and decides nothing else."""
COUNTS = ("mutations", "looks", "stale", "reopened")
"""What workers count."""


@dataclass(slots=True)
class Plan:
    """What is to be done. `seconds` 0: however long it takes."""

    mutations: int
    seconds: float
    workers: int
    seed: int


@dataclass(slots=True)
class Tally:
    """What has happened so far."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    rounds: int = 0
    collections: int = 0
    swept: int = 0  # blocks, by collections
    reached: int = 0  # blocks, when all stood still
    garbage: int = 0  # blocks that lived and could not be reached then
    failures: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the fields, and each count."""
        found = asdict(self)
        return {**found.pop("counts"), **found}


class Run:
    """One run. A context manager; leaving it ends every process that it started.

    Args:
        plan: what is to be done.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tally = Tally()
        self._reached = 0
        self._post = Post.new()
        self._workers: list[multiprocessing.process.BaseProcess] = []
        self._ends: list[Connection] = []
        for number in range(plan.workers):
            self._start(number)
        config = shmheap.Config(lease_grace_s=0)  # nobody waits for what the killed had sent
        self._heap = shmheap.Heap.create(capacity=CAPACITY, config=config)
        self._file, self._nonce = os.stat(self._heap._path), self._heap.nonce
        for end in self._ends:
            end.send(self._heap)

    def _start(self, number: int) -> None:
        context = multiprocessing.get_context("fork")
        end, there = context.Pipe()
        args = (there, number, self.plan.seed, self._post)
        worker = context.Process(target=graph_worker.work, args=args, daemon=True)
        worker.start()
        there.close()
        self._workers.append(worker)
        self._ends.append(end)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()
        for fd in self._post.fds:
            os.close(fd)
        self._heap.close()
        arena.remove(self._heap._path, self._file, self._nonce)

    # Rounds

    def rounds(self) -> Iterator[None]:
        """Do one round after another until it is enough, or something is wrong."""
        until_s = time.monotonic() + (self.plan.seconds or float("inf"))
        while self.tally.counts["mutations"] < self.plan.mutations and time.monotonic() < until_s:
            self.round()
            yield
        self.end()

    def round(self) -> None:
        """Let the workers work, and collect meanwhile; then see that all is as it must be."""
        for end in self._ends:
            end.send((STEPS, self._reached > MOST_BLOCKS))
        held: list[Place] = []
        waited_for, until_s = set(self._ends), time.monotonic() + HUNG_S
        while waited_for:
            if time.monotonic() > until_s:
                raise RuntimeError(f"{len(waited_for)} workers stand still")
            self._collect()
            for end in filter(Connection.poll, list(waited_for)):
                held += self._report(end)
                waited_for.remove(end)
        self._require_exact(held)
        self.tally.rounds += 1

    def end(self) -> None:
        """Let all leave, and see that nothing is left."""
        let_go(self._heap, self._post)
        for end, worker in zip(self._ends, self._workers, strict=True):
            end.send(None)
            worker.join()
        self._require_exact([])

    def _report(self, end: Connection) -> list[Place]:
        """Add up what a worker says; returns what it holds."""
        try:
            report: Report | str = end.recv()
        except EOFError:
            raise RuntimeError("a worker has ended") from None
        if isinstance(report, str):
            raise RuntimeError(f"a worker failed:\n{report}")
        for name, n in report.counts.items():
            self.tally.counts[name] += n
        return report.held

    def _collect(self) -> None:
        report = self._heap.gc(timeout=HUNG_S)
        self.tally.collections += 1
        self.tally.swept += report.swept

    # All stand still

    def _require_exact(self, held: list[Place]) -> None:
        """Raise WrongError unless a collection leaves just what can be reached.

        What lives is found twice, by a walk over all blocks and by the statistics.
        """
        holders = held + self._on_their_way()
        reached, lived = self._reach(holders), self._heap.stats().heap_objects
        self._collect()
        require_same("reached before and after", reached, self._reach(holders))
        alive = {offset for offset, *_ in self._heap._largest(len(reached) + 1)}
        require_same("reached and alive", {offset for offset, _ in reached}, alive)
        require_same("alive and counted", {len(alive)}, {self._heap.stats().heap_objects})
        self._heap.check()
        self._reached = len(reached)
        self.tally.reached += len(reached)
        self.tally.garbage += lived - len(reached)

    def _on_their_way(self) -> list[Place]:
        """Look at each letter, and put it back; its lease stays as it is."""
        letters = list(iter(self._post.take, None))
        for letter in letters:
            self._post.send(letter)
        return [LETTER.unpack_from(letter) for letter in letters]

    def _reach(self, holders: Iterable[Place]) -> set[tuple[int, int]]:
        """Return offset and generation of each block that can be reached."""
        heap = self._heap
        todo = [Held(heap._adopt(offset, gen, 0, 0), number) for offset, gen, number in holders]
        for held in todo:
            require_number(heap, held)
        named = filter(None, map(heap._root_get, NAMES))
        todo += [Held(node, number_of(heap, node)) for node in named]
        seen: set[tuple[int, int]] = set()
        while todo:
            node, number = todo.pop()
            if (node.offset, node.generation) in seen:
                continue
            seen.add((node.offset, node.generation))
            found = (heap._node_load(node, ref) for ref in range(1 + width_of(number)))
            label, *refs = (block for block in found if block is not None)
            seen.add((label.offset, label.generation))
            todo += [Held(ref, number_of(heap, ref)) for ref in refs]
        return seen


def require_same(what: str, wanted: set[Any], found: set[Any]) -> None:
    """Raise WrongError unless both sets are the same."""
    if wanted != found:
        missing, more = sorted(wanted - found), sorted(found - wanted)
        raise WrongError(
            f"{what}: {len(missing)} missing, {missing[:4]}; {len(more)} more, {more[:4]}"
        )
