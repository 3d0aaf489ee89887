"""What every test can use. The tests run on the installed package, never on the source folder."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import shmheap

pytest_plugins = ["leak_guard", "pytester"]

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the working directory on the path, and in it the package without its core.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


def pytest_configure() -> None:
    """Have Ctrl-C end what tests start: a shell's background jobs inherit that it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def heap(heap_name: str) -> Iterator[shmheap.Heap]:
    """A small heap of this test alone, with a coordinator."""
    import shmheap  # here: the tests of tools and layers need no core

    with shmheap.Heap.create(heap_name, capacity="64MiB") as made:
        yield made
        made.unlink()


@pytest.fixture
def folder() -> Iterator[str]:
    """A directory for heaps of this test alone, in the file system in which they lie."""
    path = tempfile.mkdtemp(dir="/dev/shm", prefix="shmheap-test.")
    yield path
    shutil.rmtree(path)
