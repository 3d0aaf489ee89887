"""Ctrl-C where half of something would stay behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["INTERRUPTED", "uninterrupted"]

INTERRUPTED = 130
"""Exit status; as a shell says that SIGINT ended a command."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the context is left."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
