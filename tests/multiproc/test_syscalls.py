"""System calls that fail: a few of each operation. tools/syscalls.py tries all of them."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shmheap import Heap, arena

TOOL = Path(__file__).resolve().parents[2] / "tools" / "syscalls.py"

x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the tracer knows x86-64 only")


def run_tool(*arguments: str) -> Any:
    command = [sys.executable, "-P", str(TOOL), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert [failure for row in found["rows"] for failure in row["failures"]] == []
    assert found["ok"]
    assert found["tried"] == found["passed"]
    return found


@x86_64
def test_a_share_of_all_system_calls_fails_and_does_no_harm() -> None:
    found = run_tool("--share", "1/50")
    assert found["tried"] >= 40
    assert len(found["rows"]) >= 25


@x86_64
def test_the_tool_finds_what_is_broken_on_purpose() -> None:
    command = [sys.executable, "-P", str(TOOL), "--controls"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(": found\n") == 4


@x86_64
@pytest.mark.parametrize("operation", ["attach", "unlink"])
def test_a_descriptor_stayed_open_where_fstat_failed(operation: str) -> None:
    run_tool("--op", operation, "--error", "ENOMEM", "--call", "fstat", "--call", "newfstatat")


@x86_64
def test_a_heap_stayed_whose_maker_could_not_look_at_it() -> None:
    run_tool("--op", "create", "--error", "EACCES", "--call", "fstat", "--call", "newfstatat")


def test_a_bell_that_could_not_be_looked_at_failed_what_was_done(
    heap_name: str,
) -> None:
    def refuse(_name: str) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with Heap.create(heap_name, capacity="16MiB") as heap:
        while not heap._coordinator_alive():
            heap.gc()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arena, "open_bell", refuse)
            with Heap.attach(heap_name) as again:
                assert bytes(again.put(b"x" * 100_000)[:1]) == b"x"
        heap.unlink()
