"""The commands, each run as a process of its own."""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import shmheap
from shmheap import _core, arena
from shmheap.stats import HeapStats

COMMAND = [sys.executable, "-P", "-m", "shmheap"]
PAGE = mmap.PAGESIZE


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60)


def asked(*options: str, status: int = 0) -> dict[str, Any]:
    """The one JSON object that a command prints."""
    done = run(*options, "--json")
    assert done.returncode == status, done.stderr
    [line] = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def row_of(name: str) -> dict[str, Any]:
    [row] = [row for row in asked("ls")["heaps"] if row["name"] == name]
    return row


def file_of(name: str) -> Path:
    return Path(arena.file_path(name))


def bell_of(nonce: int) -> Path:
    return Path(f"/dev/shm/sem.{arena.bell_name(nonce)[1:]}")


def kill(pid: int) -> None:
    """Kill a process that may not be a child, and wait until it is dead."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        select.select([pidfd], [], [])
    finally:
        os.close(pidfd)


@contextmanager
def user(code: str, *args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that runs the code, which prints one line, then waits for its stdin to end."""
    code = f"import sys, shmheap\n{code}\nsys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()


MAKE = """
heap = shmheap.Heap.create(sys.argv[1], capacity="64MiB")
block = heap.put(bytes(100_000))
heap.gc()  # so that the coordinator is there
print(heap.nonce, flush=True)
"""


@pytest.fixture
def dead(heap_name: str) -> Iterator[int]:
    """A heap whose processes were all killed; gives its nonce.

    To be kept: else another test's coordinator removes it as stale.
    """
    make = MAKE.replace('"64MiB"', '"64MiB", config=shmheap.Config(keep=True)')
    with user(make, heap_name) as (process, line):
        kill(row_of(heap_name)["coordinator_pid"])
        kill(process.pid)
    yield int(line)
    file_of(heap_name).unlink(missing_ok=True)
    bell_of(int(line)).unlink(missing_ok=True)


# ls


def test_ls_shows_a_heap_in_use(heap: shmheap.Heap) -> None:
    heap.gc()
    block = heap.put(bytes(100_000))
    row = row_of(heap.name)
    assert row["capacity"] == heap.capacity
    assert row["in_use_bytes"] == heap.stats().heap_inuse >= len(block)
    assert row["held_bytes"] >= len(block)
    assert row["processes"] == [os.getpid()]
    assert row["coordinator_pid"] > 0
    assert (row["unlinked"], row["orphan"], row["problem"]) == (False, False, None)
    line = next(line for line in run("ls").stdout.splitlines() if line.startswith(f" {heap.name} "))
    assert "64.0 MiB" in line


def test_ls_shows_a_heap_that_was_unlinked(heap: shmheap.Heap) -> None:
    heap.gc()
    heap.unlink()
    row = row_of(heap.name)
    assert row["unlinked"] is True
    assert row["processes"] == [os.getpid()]


def test_ls_shows_an_orphan(dead: int, heap_name: str) -> None:
    row = row_of(heap_name)
    assert (row["orphan"], row["processes"], row["coordinator_pid"]) == (True, [], None)


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [(b"", 0o600, "too short"), (bytes(1 << 20), 0o600, "not"), (b"", 0o644, "others")],
)
def test_ls_gives_the_reason_where_a_file_is_no_heap(
    heap_name: str, content: bytes, mode: int, says: str
) -> None:
    file_of(heap_name).write_bytes(content)
    file_of(heap_name).chmod(mode)
    assert says in row_of(heap_name)["problem"]
    assert says in run("ls").stdout
    assert f"{heap_name} is not usable" in run("ls").stdout
    assert run("rm", "--force", heap_name).returncode == 0


def test_ls_of_another_directory(tmp_path: Path) -> None:
    assert asked("ls", "--directory", str(tmp_path)) == {"heaps": []}
    assert "no heaps" in run("ls", "--directory", str(tmp_path)).stdout


def test_ls_of_a_directory_that_is_not_there_said_there_are_no_heaps(tmp_path: Path) -> None:
    done = run("ls", "--directory", f"{tmp_path}/none")
    assert done.returncode == 2
    assert done.stderr == f"shmheap: No such file or directory: {tmp_path}/none\n"


def test_version() -> None:
    assert run("--version").stdout == f"shmheap {shmheap.__version__}\n"


def test_ls_ends_quietly_where_nobody_reads_on(heap: shmheap.Heap) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen(
        [*COMMAND, "ls"], stdout=writing, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(writing)
        _, err = process.communicate(timeout=60)
    assert err == ""


# stat


def test_stat_tells_what_the_heap_tells(heap: shmheap.Heap) -> None:
    heap.gc()
    blocks = [heap.put(bytes(1000)) for _ in range(10)]
    found = asked("stat", heap.name)
    numbers = found["stats"] | {"pause_ns": tuple(found["stats"]["pause_ns"])}
    assert HeapStats(**numbers) == heap.stats()
    header = found["header"]
    assert (header["phase"], header["unlinked"], header["config"]["keep"]) == ("idle", False, False)
    [process] = found["processes"]
    assert (process["pid"], process["alive"]) == (os.getpid(), True)
    assert process["handles"] == len(blocks)
    assert (process["command"], process["status"]) == (psutil.Process().name(), "sleeping")
    text = run("stat", heap.name).stdout
    assert "heap_inuse" in text
    assert str(os.getpid()) in text


# verify


def test_verify_finds_that_books_and_kernel_agree(heap: shmheap.Heap) -> None:
    block = heap.put(bytes(1 << 20))
    found = asked("verify", heap.name)
    assert (found["agrees"], found["mismatched_pages"]) == (True, 0)
    assert found["kernel_held_bytes"] >= len(block)


def test_verify_names_each_page_that_disagrees(heap: shmheap.Heap) -> None:
    block = heap.put(bytes(1 << 20))
    offset = punch(heap.name, 5)
    [wrong] = asked("verify", heap.name, status=1)["mismatches"]
    assert (wrong["unit"], wrong["offset"]) == (5, offset)
    done = run("verify", heap.name)
    assert done.returncode == 1
    assert f"unit 5 at file offset {offset:#x}: books say committed" in done.stdout
    assert bytes(block) == bytes(1 << 20)  # the read has brought the page back


def punch(name: str, unit: int) -> int:
    """Take a page from a heap behind its back; returns where it was in the file."""
    fd, _ = arena.open_arena(name)
    try:
        observer = _core.Observer(fd)
        states, data_offset, unit_bytes, _ = observer.books()
        observer.close()
        assert states[unit] == 1
        offset = data_offset + unit * unit_bytes
        with mmap.mmap(fd, 0) as memory:
            memory.madvise(mmap.MADV_REMOVE, offset, unit_bytes)
    finally:
        os.close(fd)
    return offset


# gc, scavenge


def test_gc_reports_a_cycle(heap: shmheap.Heap) -> None:
    before = heap.gc().cycle
    found = asked("gc", heap.name)
    assert (found["cycle"], found["trigger"]) == (before + 1, "asked")
    assert "blocks freed" in run("gc", heap.name).stdout


def test_scavenge_returns_what_is_idle_only_if_told_so(heap: shmheap.Heap) -> None:
    heap.put(bytes(1 << 20)).free()
    assert asked("scavenge", heap.name)["released_bytes"] == 0  # too young
    assert asked("scavenge", heap.name, "--all")["released_bytes"] >= 1 << 20
    assert "returned to the system" in run("scavenge", heap.name).stdout


# rm


def test_rm_removes_a_heap_in_use_for_others_only(heap: shmheap.Heap) -> None:
    block = heap.put(b"still here")
    assert asked("rm", heap.name) == {
        "removed": [{"name": heap.name, "processes": [os.getpid()]}],
        "failed": [],
    }
    assert not file_of(heap.name).exists()
    assert bytes(block) == b"still here"
    heap.gc()  # the coordinator serves on
    with pytest.raises(shmheap.HeapNotFound):
        shmheap.Heap.attach(heap.name)


def test_rm_removes_a_dead_heap_and_its_doorbell(dead: int, heap_name: str) -> None:
    assert bell_of(dead).exists()
    assert asked("rm", heap_name)["removed"] == [{"name": heap_name, "processes": []}]
    assert not file_of(heap_name).exists()
    assert not bell_of(dead).exists()


def test_rm_of_a_heap_without_coordinator_starts_one_for_its_users(heap_name: str) -> None:
    with user(MAKE, heap_name) as (process, _line):
        kill(row_of(heap_name)["coordinator_pid"])
        [removed] = asked("rm", heap_name)["removed"]
        assert removed == {"name": heap_name, "processes": [process.pid]}
        assert row_of(heap_name)["coordinator_pid"] is not None


def test_rm_goes_on_after_one_that_it_cannot_remove(dead: int, heap_name: str) -> None:
    missing = f"{heap_name}-not"
    done = run("rm", "a/b", heap_name, missing)
    assert done.returncode == 2
    assert done.stdout == f"{heap_name}: removed\n"
    failed = [line.split(": ")[1:3] for line in done.stderr.splitlines()]
    assert failed == [
        ["a/b", "a heap's name must not contain a slash"],
        [missing, "there is no heap of that name"],
    ]


def test_rm_leaves_a_file_that_is_no_heap_unless_forced(heap_name: str) -> None:
    file = file_of(heap_name)
    file.write_bytes(b"somebody's notes")
    file.chmod(0o600)
    assert run("rm", heap_name).returncode == 2
    assert file.read_bytes() == b"somebody's notes"
    assert run("rm", heap_name, "--force").returncode == 0
    assert not file.exists()


# run


@contextmanager
def running(name: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`shmheap run` in the foreground, and the first line that it says."""
    with subprocess.Popen(
        [*COMMAND, "run", name, "--capacity", "64MiB", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            yield process, process.stderr.readline()
        finally:
            process.kill()  # of one that has ended: nothing


def test_run_makes_a_heap_and_ends_with_its_last_user(heap_name: str) -> None:
    with running(heap_name) as (process, line):
        assert line == f"shmheap: made {file_of(heap_name)}\n"
        with shmheap.Heap.attach(heap_name) as heap:
            assert heap.capacity == 64 << 20
            heap.gc()
            pid = row_of(heap_name)["coordinator_pid"]
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out)["made"] is True
    # Attaching may have found no coordinator yet, and have started one that was faster.
    assert pid == process.pid or "already" in err
    if pid == process.pid:
        assert not file_of(heap_name).exists()


def test_run_ends_on_ctrl_c_and_leaves_no_unused_heap(heap_name: str) -> None:
    with running(heap_name) as (process, _line):
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert not file_of(heap_name).exists()


def test_run_leaves_a_heap_that_has_a_coordinator_as_it_is(heap: shmheap.Heap) -> None:
    heap.gc()
    done = run("run", heap.name, "--capacity", "1GiB")
    assert done.returncode == 0
    assert "keeps its capacity" in done.stderr
    assert "has a coordinator already" in done.stderr


def test_run_made_a_heap_of_a_path_that_no_name_has(heap_name: str) -> None:
    odd = Path(f"/dev/shm/{heap_name}")
    done = run("run", str(odd))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"shmheap: there is no heap of that name: {odd}\n"
    assert not odd.exists()


def test_a_coordinator_loads_nothing_that_is_only_nice_to_have(heap: shmheap.Heap) -> None:
    heap.gc()
    code = "import sys; from shmheap.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "run", heap.name], capture_output=True, text=True
    )
    loaded = done.stdout.split()
    assert "already" in done.stderr
    assert "shmheap.coordinator.loop" in loaded
    assert not {"rich", "numpy", "psutil", "multiprocessing", "ctypes"}.intersection(loaded)


def test_a_coordinator_holds_no_pipe_of_who_started_it(heap_name: str) -> None:
    with user(MAKE, heap_name) as (process, _line), shmheap.Heap.attach(heap_name) as heap:
        out, _ = process.communicate(timeout=60)  # ends when nobody has the pipe any more
        heap.gc()
        assert row_of(heap_name)["coordinator_pid"] is not None
        heap.unlink()
    assert out == ""


# Errors


@pytest.mark.parametrize("command", ["stat", "verify", "gc", "scavenge", "rm"])
def test_a_heap_that_is_not_there_is_told_in_a_line(command: str, heap_name: str) -> None:
    done = run(command, heap_name)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("shmheap: ")
    assert "there is no heap of that name" in line


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", "x" * 201])
@pytest.mark.parametrize("command", ["run", "stat", "rm"])
def test_a_name_that_cannot_be_is_told_in_a_line(command: str, name: str) -> None:
    done = run(command, name)
    assert done.returncode == 2
    assert "a heap's name" in done.stderr
    assert "Traceback" not in done.stderr


HOLD = """
import copy
heap = shmheap.Heap.create(sys.argv[1], capacity="64MiB")
block = heap.put(bytes(100_000))
again, lease = copy.copy(block), block.lease()
heap.roots["image"] = block
print(block.offset)
"""


def test_holders_says_who_keeps_a_block_alive(heap_name: str) -> None:
    with user(HOLD, heap_name) as (process, offset):
        found = asked("holders", heap_name, offset)
        [block] = found["blocks"]
        assert (found["name"], block["offset"], block["nbytes"]) == (heap_name, int(offset), None)
        root, pin, lease = block["holders"]
        assert (root["kind"], root["name"], root["path"]) == ("root", "image", ["root 'image'"])
        assert (pin["kind"], pin["pid"], pin["count"]) == ("pin", process.pid, 2)
        assert (lease["kind"], lease["pid"], lease["count"]) == ("lease", process.pid, 1)
        assert lease["age_s"] > 0
        shown = run("holders", heap_name, offset)
        assert shown.returncode == 0, shown.stderr
        assert "root 'image'" in shown.stdout
        assert f"lease of pid {process.pid}" in shown.stdout


def test_holders_shows_the_largest_blocks_if_none_is_named(heap_name: str) -> None:
    with user(HOLD, heap_name) as (_, offset):
        [block] = asked("holders", heap_name)["blocks"]
        assert (block["offset"], block["nbytes"], block["what"]) == (int(offset), 100_000, "block")
        assert len(block["holders"]) == 3
        assert "97.7 KiB" in run("holders", heap_name).stdout


def test_holders_of_what_is_no_block_are_refused(heap_name: str) -> None:
    with user(HOLD, heap_name) as (_, offset):
        failed = run("holders", heap_name, str(int(offset) + 1))
        assert (failed.returncode, failed.stdout) == (2, "")
        assert failed.stderr == f"shmheap: nobody holds a block at {int(offset) + 1}\n"
