"""Tasks that tests give to joblib, in a file that any process can import."""

from __future__ import annotations

import os
import signal
from typing import Any

import joblib


def total_and_writeable(array: Any) -> tuple[float, bool]:
    """What a task can see of an array."""
    return float(array.sum()), bool(array.flags.writeable)


def write(array: Any, place: int) -> None:
    """Write where all can see it."""
    array[place] = place


def pid(_: object = None) -> int:
    """Who works."""
    return os.getpid()


def fail(number: int) -> None:
    """Raise what the caller shall see."""
    raise LookupError(number)


def die() -> None:
    """End without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def never() -> None:
    """Take for ever."""
    while True:
        signal.pause()


def nested(count: int) -> tuple[int, set[int]]:
    """Use joblib in a task: who works on that?"""
    pids = joblib.Parallel(n_jobs=2)(joblib.delayed(pid)() for _ in range(count))
    return os.getpid(), set(pids)
