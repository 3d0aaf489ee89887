"""What is left when everybody is killed at once, and who removes it.

Each test has a directory of its own: elsewhere another test's coordinator may be the first to find
what is stale.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shmheap import Config, Heap, _core, arena
from shmheap import open as open_heap
from shmheap.coordinator.process import ensure_running
from shmheap.coordinator.stale import remove_stale

CYCLES = 5
MIB = 1 << 20

USE = """
import pickle, sys
import shmheap
name, directory, config, then = sys.argv[1:]
config = shmheap.Config(directory=directory, **eval(config))
heap = shmheap.open(name, capacity="16MiB", config=config)
heap.gc()  # so that the coordinator is there
blocks = [heap.put(bytes([n]) * 10_000) for n in range(1, 50)]
heap.roots["first"] = blocks[0]
if then == "unlink":
    heap.unlink()
print(heap.nonce, shmheap._core.Observer(heap._fileno()).header()["coordinator_pid"],
      pickle.dumps(blocks[1]).hex() if then == "send" else "-", flush=True)
sys.stdin.read()
"""


class Killed(NamedTuple):
    """A heap whose processes were all killed."""

    bell: Path
    handle: str


def bell_file(nonce: int) -> Path:
    return Path(arena.DIRECTORY, f"sem.{arena.bell_name(nonce)[1:]}")


def end(pid: int) -> None:
    """Kill it; returns when it is gone."""
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    wait([pidfd])
    os.close(pidfd)


def killed(folder: str, name: str, then: str = "", users: int = 2, **config: Any) -> Killed:
    """Make a heap, have it used, kill its coordinator and all who use it."""
    command = [sys.executable, "-P", "-c", USE, name, folder, repr(config)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # The last one to come says who the coordinator is, and does what else is to be done.
    processes: list[subprocess.Popen[str]] = []
    for number in range(users):
        last = number == users - 1
        processes.append(subprocess.Popen([*command, then if last else ""], **pipes))  # type: ignore[call-overload]
        out = processes[-1].stdout
        assert out is not None
        nonce, coordinator, handle = out.readline().split()
    end(int(coordinator))
    for process in processes:
        process.kill()
        process.communicate()
    return Killed(bell_file(int(nonce)), handle)


def shmheap(*arguments: str) -> Any:
    """What a command's JSON says."""
    command = [sys.executable, "-P", "-m", "shmheap", *arguments, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_nothing_is_left_once_somebody_opens_a_heap(
    folder: str, new_heap_name: Callable[[], str]
) -> None:
    left: list[Killed] = []
    for _ in range(CYCLES):
        left.append(killed(folder, new_heap_name()))
        assert len(os.listdir(folder)) == 1, "the next one's coordinator removes the last one"
        assert [one.bell.exists() for one in left] == [False] * (len(left) - 1) + [True]
    with Heap.create(new_heap_name(), capacity=MIB, config=Config(directory=folder)) as heap:
        heap.gc()  # its coordinator serves: it has looked for stale ones before
        assert os.listdir(folder) == [os.path.basename(heap._path)]
        assert not any(one.bell.exists() for one in left)
        heap.unlink()


def test_ls_shows_stale_heaps_and_rm_stale_removes_them(
    folder: str, new_heap_name: Callable[[], str]
) -> None:
    stale, kept, unlinked, used = (new_heap_name() for _ in range(4))
    left = killed(folder, stale)
    killed(folder, kept, keep=True)
    nameless = killed(folder, unlinked, "unlink", users=1)
    with Heap.create(used, capacity=MIB, config=Config(directory=folder, keep=True)) as heap:
        heap.gc()
        # This heap's coordinator has removed what was stale before.
        assert not left.bell.exists()
        left = killed(folder, stale)
        rows = {row["name"]: row for row in shmheap("ls", "--directory", folder)["heaps"]}
        assert {name: row["stale"] for name, row in rows.items()} == {
            stale: True,
            kept: False,
            used: False,
        }
        assert {name for name, row in rows.items() if row["orphan"]} == {stale, kept}
        assert left.bell.exists(), "looking removes nothing"
        removed = shmheap("rm", "--stale", "--directory", folder)
        assert [row["name"] for row in removed["removed"]] == [stale]
        assert removed["failed"] == []
        assert not left.bell.exists()
        assert not nameless.bell.exists()
        assert bell_file(heap.nonce).exists()
        assert {file.name for file in arena.find_arenas(folder)} == {kept, used}
        heap.gc()
        heap.unlink()
    shmheap("rm", kept, "--directory", folder)


def test_a_stale_heap_whose_user_lives_stays(folder: str, heap_name: str) -> None:
    config = Config(directory=folder)
    with Heap.create(heap_name, capacity=MIB, config=config) as heap:
        heap.gc()
        block = heap.put(b"abc")
        end(_core.Observer(heap._fileno()).header()["coordinator_pid"])
        assert list(remove_stale(folder, ensure_running)) == []
        assert bytes(block) == b"abc"
        heap.gc()
        heap.unlink()


def test_a_heap_whose_maker_died_before_it_used_it_is_removed(
    folder: str, heap_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had its name before it had a user: who looked for stale ones took it for one being made,
    for ever."""
    give_name = arena.give_name

    def die(fd: int, path: str) -> None:
        give_name(fd, path)
        assert list(remove_stale(folder, ensure_running)) == [], "its maker lives"
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(arena, "give_name", die)
    maker = os.fork()
    if maker == 0:
        try:
            Heap.create(heap_name, capacity=MIB, config=Config(directory=folder))
        finally:
            os._exit(1)
    assert os.waitpid(maker, 0)[1] == signal.SIGKILL
    assert [file.name for file in arena.find_arenas(folder)] == [heap_name]
    assert list(remove_stale(folder, ensure_running)) == [heap_name]
    assert os.listdir(folder) == []


@pytest.mark.parametrize("before", ["bell_name", "unlink_same"])
def test_a_last_user_who_dies_while_it_removes_its_heap_leaves_no_doorbell(
    folder: str, heap_name: str, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """The name went first: after a death behind it nobody knew of the doorbell. Who found the name
    of a closed heap removed that alone."""
    config = Config(directory=folder)
    reader, writer = os.pipe()
    last = os.fork()
    if last == 0:
        try:
            heap = Heap.create(heap_name, capacity=MIB, config=config)
            heap.gc()
            os.write(writer, heap.nonce.to_bytes(8))
            end(_core.Observer(heap._fileno()).header()["coordinator_pid"])
            monkeypatch.setattr(arena, before, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            heap.close()
        finally:
            os._exit(1)
    assert os.waitpid(last, 0)[1] == signal.SIGKILL
    bell = bell_file(int.from_bytes(os.read(reader, 8)))
    os.close(reader)
    os.close(writer)
    with open_heap(heap_name, capacity=MIB, config=config) as heap:
        heap.gc()
        assert not bell.exists()
        heap.unlink()


def test_a_handle_on_its_way_keeps_a_stale_heap(folder: str, heap_name: str) -> None:
    left = killed(folder, heap_name, "send")
    assert shmheap("rm", "--stale", "--directory", folder)["removed"] == []
    with Heap.attach(heap_name, directory=folder) as heap:
        block = pickle.loads(bytes.fromhex(left.handle))
        assert bytes(block) == bytes([2]) * 10_000
        heap.gc()
        heap.check()
        del block
        heap.unlink()


def test_a_handle_whose_grace_is_over_keeps_nothing(folder: str, heap_name: str) -> None:
    left = killed(folder, heap_name, "send", lease_grace_s=0.0)
    assert [row["name"] for row in shmheap("rm", "--stale", "--directory", folder)["removed"]] == [
        heap_name
    ]
    assert os.listdir(folder) == []
    assert not left.bell.exists()


def test_opening_a_stale_heap_takes_it_over_or_makes_a_new_one(folder: str, heap_name: str) -> None:
    killed(folder, heap_name)
    with Heap.attach(heap_name, directory=folder) as heap:
        assert bytes(heap.roots["first"]) == bytes([1]) * 10_000
        assert list(remove_stale(folder, ensure_running)) == []
        heap.gc()
        heap.check()
        heap.unlink()


def test_rm_wants_names_or_stale() -> None:
    for arguments in ([], ["--stale", "name"]):
        command = [sys.executable, "-P", "-m", "shmheap", "rm", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, "shmheap: rm wants names, or --stale\n")
