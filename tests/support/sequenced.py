"""What processes do in the tests of the sequencer; started ones cannot import a test file."""

from __future__ import annotations

from typing import Any

from shmheap.testing import Sequencer


def child(seq: Sequencer, steps: list[int], pipe: Any) -> None:
    for step in steps:
        with seq(step):
            pipe.send(step)
