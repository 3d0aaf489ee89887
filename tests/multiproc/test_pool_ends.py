"""Pools that end where nobody asked them to: when garbage is collected, in whatever thread."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from typing import Any

import pool_work as work
import pytest

from shmheap import Pool, dispatch
from shmheap.wires import Channel

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed running multiprocessing pool:ResourceWarning"
)


@pytest.fixture(autouse=True)
def by_hand() -> Iterator[None]:
    """Garbage is collected when a test says so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


def let_go_of(pool: Any) -> Any:
    """Make it garbage; return its worker."""
    pool.itself = pool
    return pool._pool[0]


def assert_ends(worker: Any) -> None:
    worker.join(work.PATIENCE_S)
    assert worker.exitcode is not None
    work.wait_for_ends()


def test_while_another_one_makes_its_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may fork then, and the pool that ends waits for a thread that may be about to."""
    worker = let_go_of(Pool(1, context=FORK))

    def make(*args: Any) -> Channel:
        gc.collect()
        return Channel(*args)

    monkeypatch.setattr(dispatch, "Channel", make)
    with Pool(1, context=FORK) as other:
        assert other.apply(work.square, (3,)) == 9
        assert_ends(worker)


def test_in_its_own_thread_that_holds_its_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = multiprocessing.Pipe()
    worker = let_go_of(Pool(1, work.block_on, (there,), context=FORK))
    here.recv()
    finish = Channel.finish

    def finish_late(channel: Channel, n: int) -> Any:
        gc.collect()
        return finish(channel, n)

    monkeypatch.setattr(Channel, "finish", finish_late)
    here.send("go on")
    assert_ends(worker)
