"""Where blocks were made, seen from other processes: by a forked one, and of who was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shmheap import Heap
from shmheap.sites import find_sites

MAKER = """
import os, signal, sys
import shmheap

heap = shmheap.Heap.attach(sys.argv[1])
heap.roots["parent"] = bytes(50_000)
if os.fork() == 0:
    heap.roots["child"] = heap.alloc(100_000)
    os._exit(0)
os.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def maker(heap: Heap, tmp_path: Path) -> Path:
    """A program that tracked, forked, and was killed."""
    path = tmp_path / "maker.py"
    path.write_text(MAKER)
    done = subprocess.run(
        [sys.executable, "-P", str(path), heap.name],
        env=os.environ | {"SHMHEAP_TRACK": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -9, done.stderr
    return path


def test_notes_outlive_their_maker_and_forks_track_too(heap: Heap, maker: Path) -> None:
    heap.gc()  # the dead are reaped
    block = heap.roots["child"]
    assert {one.allocated_at for one in heap.holders(block)} == {f"{maker}:8"}
    assert {f"{maker}:6", f"{maker}:8"} == {site.where for site in find_sites(heap)}
    heap.roots.clear()
    del block
    assert find_sites(heap) == []


def test_the_command_shows_them(heap: Heap, maker: Path) -> None:
    command = [sys.executable, "-P", "-m", "shmheap", "holders", heap.name]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "allocated at" in shown
    assert f"{maker}:8" in shown
    [largest, *_] = json.loads(subprocess.check_output([*command, "--json"], timeout=60))["blocks"]
    assert largest["nbytes"] == 100_000
    assert {one["allocated_at"] for one in largest["holders"]} == {f"{maker}:8"}
    heap.roots.clear()
