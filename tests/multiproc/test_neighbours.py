"""Neighbours: other users, other PID namespaces, and what anybody may put where heaps lie.

What each of them can do, and what becomes of it, is in docs/explanation/security.md, row by row.
Users and namespaces are real; whoever may not make them skips those tests.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pickle
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import posix_ipc
import pytest
from by_hand import HeapByHand
from processes import Worker

import shmheap
from shmheap import (
    Config,
    CoordinatorLost,
    Heap,
    HeapExists,
    UntrustedArena,
    _core,
    arena,
)
from shmheap.cli import main
from shmheap.cli.look import live_pids
from shmheap.coordinator import process
from shmheap.coordinator.stale import remove_orphaned_bells, remove_stale

MIB = 1 << 20
NOBODY = 65534
ME = os.geteuid()

as_root = pytest.mark.skipif(ME != 0, reason="only root can be another user")

SIZE_CLASSES = Path(__file__).resolve().parents[2] / "shmheap" / "csrc" / "size_classes.h"


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A process that was forked before there was a heap, so it has not inherited one."""
    with Worker("fork") as worker:
        yield worker


@pytest.fixture
def hand(worker: Worker, heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name, 64 * MIB) as hand:
        yield hand


@pytest.fixture
def stranger(worker: Worker) -> Worker:
    """A process of another user."""
    worker.do("become", NOBODY)
    return worker


@pytest.fixture
def bell() -> Iterator[str]:
    """The name of a doorbell that there is not; what has it at the end is removed."""
    name = arena.bell_name(int.from_bytes(os.urandom(7)))
    yield name
    path = Path(arena.bell_path(name))
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def shmheap_command(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-m", "shmheap", *arguments]
    return subprocess.run(command, capture_output=True, timeout=60)


def coordinator_of(heap: Heap) -> int:
    """The pid of a heap's coordinator, once there is one."""
    heap.gc()
    found: int = _core.Observer(heap._fileno()).header()["coordinator_pid"]
    return found


def wait_for_end(pid: int) -> None:
    """Returns when a process that need not be our child has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with open(pidfd, "rb") as file:
        select.select([file], [], [])


# Names that anybody may put into the directory


IMPOSSIBLE = [
    "shmheap.².x",
    "shmheap.٣.x",
    "shmheap.0.\x1b[2Jgone",
    "shmheap.0.a\nb",
    "shmheap.0.\udcff\udcfe",
    "shmheap.0." + "x" * 201,
]


def test_a_file_with_an_odd_name_ended_every_coordinator_and_wrote_to_the_terminal(
    folder: str, heap_name: str
) -> None:
    for name in IMPOSSIBLE:
        Path(folder, name).touch()
    with Heap.create(heap_name, capacity=MIB, config=Config(directory=folder)) as heap:
        coordinator = coordinator_of(heap)
        assert [file.name for file in arena.find_arenas(folder)] == [heap_name]
        listed = shmheap_command("ls", "--directory", folder)
        assert listed.returncode == 0, listed.stderr
        text = listed.stdout.decode()
        assert heap_name in text
        assert all(line.isprintable() for line in text.splitlines())
        heap.unlink()
    wait_for_end(coordinator)
    assert sorted(os.listdir(folder)) == sorted(IMPOSSIBLE)


# Files that have a heap's name and are no heap


def test_a_hard_link_to_a_heap_was_a_second_heap(
    folder: str, new_heap_name: Callable[[], str]
) -> None:
    name, other = new_heap_name(), new_heap_name()
    with HeapByHand(name, MIB, Config(directory=folder)) as hand:
        os.link(hand.path, arena.file_path(other, folder))
        for each in (name, other):
            for use in (Heap.attach, shmheap.unlink):
                with pytest.raises(UntrustedArena, match=r"hard link: remove that .*-inum"):
                    use(each, directory=folder)
        os.unlink(arena.file_path(other, folder))
        Heap.attach(name, directory=folder).close()
        hand.assert_sound()


def test_a_file_of_a_heaps_size_that_is_all_hole_stays_one(folder: str, heap_name: str) -> None:
    with HeapByHand(heap_name, MIB, Config(directory=folder)) as hand:
        nbytes = os.stat(hand.path).st_size
    path = Path(arena.file_path(heap_name, folder))
    path.touch(0o600)
    os.truncate(path, nbytes)
    for use in (Heap.attach, shmheap.Heap.attach):
        with pytest.raises(UntrustedArena, match="not a shmheap arena"):
            use(heap_name, directory=folder)
    assert path.stat().st_blocks == 0


@pytest.mark.parametrize("umask", [0, 0o027, 0o777])
def test_the_mode_is_0600_whatever_the_umask(heap_name: str, bell: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        with HeapByHand(heap_name, MIB) as hand, process.doorbell(bell):
            for path in (hand.path, arena.bell_path(bell)):
                assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            arena.open_bell(bell).close()
        assert os.umask(umask) == umask, "it is as it was"
    finally:
        os.umask(before)


# Files that change between the look and the use


def test_unlink_removed_what_had_taken_the_name_meanwhile(
    heap_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = Heap.attach

    def swapped(name: str, **where: Any) -> Heap:
        os.unlink(hand.path)
        os.mkfifo(hand.path, 0o600)
        return attach(name, **where)

    with HeapByHand(heap_name, MIB) as hand:
        monkeypatch.setattr(Heap, "attach", swapped)
        shmheap.unlink(heap_name)
        assert stat.S_ISFIFO(os.stat(hand.path).st_mode)
        os.unlink(hand.path)


def test_what_was_looked_at_is_what_is_used(
    heap_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_config = arena.read_config

    def swapped(fd: int, path: str) -> Config:
        Path(f"{path}.other").write_bytes(b"other")
        os.rename(f"{path}.other", path)
        return read_config(fd, path)

    with HeapByHand(heap_name, MIB) as hand:
        monkeypatch.setattr(arena, "read_config", swapped)
        with Heap.attach(heap_name) as heap:
            assert heap.nonce == hand.heap.nonce
            assert bytes(heap.put(b"abc")) == b"abc"
            heap.unlink()
        assert Path(hand.path).read_bytes() == b"other"
        os.unlink(hand.path)


def test_a_name_that_became_another_files_is_left_to_it(folder: str, heap_name: str) -> None:
    """Also by a successor of the coordinator, which then finds the heap without its name."""
    path = Path(arena.file_path(heap_name, folder))
    with Heap.create(heap_name, capacity=MIB, config=Config(directory=folder)) as heap:
        first = coordinator_of(heap)
        bell = Path(arena.bell_path(arena.bell_name(heap.nonce)))
        Path(folder, "other").write_bytes(b"other")
        os.rename(Path(folder, "other"), path)
        os.kill(first, signal.SIGKILL)
        wait_for_end(first)
        second = coordinator_of(heap)
        assert second != first
        assert bell.exists()
    wait_for_end(second)
    assert path.read_bytes() == b"other"
    assert not bell.exists()


# What `rm --stale`, and each coordinator at its start, leaves alone


def make_stale(name: str, directory: str) -> Path:
    """A heap whose only process was killed."""
    child = os.fork()
    if child == 0:
        with HeapByHand(name, MIB, Config(directory=directory)):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    return Path(arena.file_path(name, directory))


def start_nothing(path: str, _config: Config) -> None:
    raise AssertionError(f"a coordinator was to be started for {path}")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    path.chmod(0o600)


def look(path: Path) -> tuple[int, int, int, int]:
    found = path.lstat()
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns


def test_removing_stale_heaps_leaves_what_is_no_heap_of_ours(
    folder: str, new_heap_name: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    def named(name: str) -> Path:
        return Path(arena.file_path(name, folder))

    elsewhere = Path(folder, "elsewhere")
    elsewhere.mkdir()
    hidden = make_stale(new_heap_name(), str(elsewhere))
    named("link").symlink_to(hidden)
    named("dangling").symlink_to("/nowhere/at/all")
    named("loop").symlink_to(named("loop"))
    named("directory").mkdir()
    os.mkfifo(named("fifo"), 0o600)
    make_socket(named("socket"))
    named("text").write_bytes(b"not a heap" * 10_000)
    named("text").chmod(0o600)
    make_stale("open", folder).chmod(0o660)
    os.link(make_stale("twice", folder), elsewhere / "again")
    if ME == 0:
        os.chown(make_stale("foreign", folder), NOBODY, NOBODY)
    before = {path: look(path) for path in [*Path(folder).iterdir(), hidden]}
    stale = make_stale(new_heap_name(), folder)
    removed = list(remove_stale(folder, start_nothing))
    assert removed == [stale.name.split(".", 2)[2]], "what is stale goes, so the others could have"
    assert not stale.exists()
    assert main(["ls", "--json", "--directory", folder]) == 0
    rows = json.loads(capsys.readouterr().out)["heaps"]
    assert len(rows) == len(before) - 2, "all but the directory and what is in it"
    assert all(row["problem"] for row in rows)
    assert {path: look(path) for path in [*Path(folder).iterdir(), hidden]} == before


def test_rm_stale_failed_at_what_had_a_doorbells_name(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "DIRECTORY", folder)
    paths = [Path(arena.bell_path(arena.bell_name(number))) for number in range(7)]
    ours, fifo, directory, link, loop, foreign, elsewhere = paths
    ours.write_bytes(bytes(arena.BELL_BYTES))
    os.mkfifo(fifo)
    directory.mkdir()
    link.symlink_to(Path(folder, "target"))
    loop.symlink_to(loop)
    foreign.write_bytes(bytes(arena.BELL_BYTES))
    if ME == 0:
        os.chown(foreign, NOBODY, NOBODY)
    else:
        foreign.unlink()
    # Who has it mapped cannot be seen from here: it is in another PID namespace.
    elsewhere = Path(re.sub(r"\.\d+\.bell$", ".1.bell", str(elsewhere)))
    elsewhere.write_bytes(bytes(arena.BELL_BYTES))
    Path(folder, "target").write_bytes(b"target")
    before = {path: look(path) for path in Path(folder).iterdir() if path != ours}
    assert list(remove_orphaned_bells(folder)) == [arena.bell_name(0)]
    assert {path: look(path) for path in Path(folder).iterdir()} == before
    for number in range(1, 6):
        assert not arena.remove_bell(arena.bell_name(number))
    assert {path: look(path) for path in Path(folder).iterdir()} == before


# Squatted doorbells


def semaphore(path: Path) -> None:
    posix_ipc.Semaphore(path.name.replace("sem.", "/"), posix_ipc.O_CREX, mode=0o600).close()


def foreign_semaphore(path: Path) -> None:
    semaphore(path)
    path.chmod(0o666)
    os.chown(path, NOBODY, NOBODY)


def open_semaphore(path: Path) -> None:
    semaphore(path)
    path.chmod(0o666)


def empty_file(path: Path) -> None:
    path.touch(0o600)


def link_to_a_semaphore(path: Path) -> None:
    real = path.with_name(path.name.replace(".bell", "-real.bell"))
    semaphore(real)
    path.symlink_to(real)


SQUATS: dict[str, tuple[Callable[[Path], None], str]] = {
    "foreign": (foreign_semaphore, f"belongs to user {NOBODY}"),
    "open": (open_semaphore, "mode 666"),
    "empty": (empty_file, "no semaphore"),
    "fifo": (lambda path: os.mkfifo(path, 0o600), "not a regular file"),
    "directory": (lambda path: path.mkdir(0o700), "not a regular file"),
    "link": (link_to_a_semaphore, "not a regular file"),
    "dangling": (lambda path: path.symlink_to("/nowhere/at/all"), "not a regular file"),
}


@pytest.mark.parametrize("how", SQUATS)
def test_a_squatted_doorbell_was_served_or_ended_the_coordinator(bell: str, how: str) -> None:
    if how == "foreign" and ME != 0:
        pytest.skip("only root can give a file away")
    squat, said = SQUATS[how]
    path = Path(arena.bell_path(bell))
    squat(path)
    before = look(path)
    try:
        with pytest.raises(UntrustedArena, match=said), process.doorbell(bell):
            pass
        with pytest.raises(UntrustedArena, match=said):
            arena.open_bell(bell)
        assert look(path) == before
    finally:
        path.with_name(path.name.replace(".bell", "-real.bell")).unlink(missing_ok=True)


@as_root
@pytest.mark.filterwarnings("ignore:the doorbell:RuntimeWarning")
def test_a_heap_whose_doorbell_is_squatted_goes_on_without(hand: HeapByHand) -> None:
    path = Path(arena.bell_path(arena.bell_name(hand.heap.nonce)))
    foreign_semaphore(path)
    try:
        block = hand.heap.put(b"abc")
        with pytest.raises(CoordinatorLost, match=f"the doorbell {path} belongs to user {NOBODY}"):
            hand.heap.gc()
        with pytest.raises(CoordinatorLost, match="have it removed"):
            Heap.attach(hand.heap.name)
        hand.steward.close()  # nor is one started who could not serve
        with pytest.raises(CoordinatorLost, match=f"belongs to user {NOBODY}"):
            hand.heap.gc()
        assert bytes(block) == b"abc"
        assert look(path)[1] == stat.S_IFREG | 0o666
    finally:
        path.unlink()


def test_a_log_that_is_a_fifo_nobody_reads_kept_the_maker_waiting(
    folder: str, heap_name: str
) -> None:
    log = Path(folder, "log")
    os.mkfifo(log)
    config = Config(directory=folder, log=str(log))
    with pytest.raises(CoordinatorLost, match=f"its log {log}: No such device"):
        Heap.create(heap_name, capacity=MIB, config=config)
    assert os.listdir(folder) == ["log"]


# Another user


@as_root
def test_another_user_gets_nothing(stranger: Worker, heap_name: str) -> None:
    refused = "UntrustedArena: .*Permission denied|PermissionError|PermissionsError"
    with HeapByHand(heap_name, MIB) as hand:
        hand.heap.roots["secret"] = hand.heap.put(b"secret")
        name = arena.bell_name(hand.heap.nonce)
        with process.doorbell(name):
            path, bell, pid = hand.path, arena.bell_path(name), os.getpid()
            for call in (
                ("shmheap:Heap._attach_path", path, heap_name),
                ("posix_ipc:Semaphore", name),
                *(("os:open", file, os.O_RDONLY) for file in (path, bell, f"/proc/{pid}/maps")),
                *(("os:truncate", file, 0) for file in (path, bell)),
                *(("os:rename", file, f"{file}-mine") for file in (path, bell)),
                *(("os:unlink", file) for file in (path, bell)),
                ("os:listdir", f"/proc/{pid}/fd"),
                ("os:kill", pid, signal.SIGSTOP),
            ):
                assert re.match(refused, said := stranger.do("attempt", *call)), (call, said)
            said = stranger.do("attempt", "shmheap:Heap.attach", heap_name)
            assert said.startswith("HeapNotFound"), "the names of theirs are others"
        hand.assert_sound()
        assert bytes(hand.heap.roots["secret"]) == b"secret"
    stranger.end()


@as_root
@pytest.mark.parametrize(
    "call", ["os:mkfifo", "os:symlink", "os:mkdir", "pathlib:Path.write_bytes"]
)
def test_a_name_that_another_user_took_first(
    stranger: Worker, folder: str, heap_name: str, call: str
) -> None:
    os.chmod(folder, 0o1777)
    path = Path(arena.file_path(heap_name, folder))
    mine = Path(folder, "mine")
    mine.write_bytes(b"mine")
    arguments: dict[str, tuple[object, ...]] = {
        "os:mkfifo": (path, 0o666),
        "os:symlink": (mine, path),
        "os:mkdir": (path, 0o777),
        "pathlib:Path.write_bytes": (path, b"x" * MIB),
    }
    assert stranger.do("attempt", call, *arguments[call]).startswith("returned")
    before = look(path)
    config = Config(directory=folder)
    for use in (
        lambda: shmheap.open(heap_name, capacity=MIB, config=config),
        lambda: Heap.attach(heap_name, directory=folder),
        lambda: shmheap.unlink(heap_name, directory=folder),
    ):
        with pytest.raises(UntrustedArena):
            use()
    with pytest.raises(HeapExists):
        Heap.create(heap_name, capacity=MIB, config=config)
    assert list(remove_stale(folder, start_nothing)) == []
    assert look(path) == before
    assert mine.read_bytes() == b"mine"
    if path.is_dir():
        path.rmdir()


@as_root
@pytest.mark.filterwarnings("ignore:the doorbell:RuntimeWarning")
def test_who_becomes_another_user_keeps_what_it_has_and_is_told_why_nobody_answers(
    worker: Worker, hand: HeapByHand
) -> None:
    worker.do("attach", hand.heap.name)
    worker.do("put", "block", b"abc")
    with process.doorbell(arena.bell_name(hand.heap.nonce)):
        worker.do("become", NOBODY)
        assert worker.do("read", "block") == b"abc"
        worker.do("alloc", "more", 100_000)
        said = worker.do("attempt", "heap:gc")
        assert re.match(f"CoordinatorLost: the doorbell .* to user 0, not to {NOBODY}", said), said
        worker.do("attempt", "heap:unlink")
        assert os.path.exists(hand.path), "no longer its to remove"
        worker.end()
    hand.reap()
    assert hand.stats.heap_objects == 0


# Another PID namespace

IN_ANOTHER_NAMESPACE = """
import sys
import shmheap
from shmheap import _core, arena
from shmheap.cli import main
from shmheap.coordinator.stale import remove_stale

name, folder = sys.argv[1:]
path = arena.file_path(name, folder)
config = shmheap.Config(directory=folder)
fd, _ = arena.open_arena(path)
for use in (
    lambda: shmheap.Heap.attach(name, directory=folder),
    lambda: shmheap.open(name, config=config),
    lambda: _core.Steward(fd),
    lambda: _core.Observer(fd),
):
    try:
        print("returned", use())
    except shmheap.UntrustedArena as error:
        print(error)
print(main(["rm", "--stale", "--directory", folder]), main(["rm", name, "--directory", folder]))
print(list(remove_stale(folder, None)))
"""


def test_another_pid_namespace_is_refused_and_removes_nothing(folder: str, heap_name: str) -> None:
    """It sees the files, and none of the processes: a container with the host's /dev/shm."""
    elsewhere = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*elsewhere, "true"]).returncode != 0:
        pytest.skip("no PID namespace can be made here")
    with Heap.create(heap_name, capacity=MIB, config=Config(directory=folder)) as heap:
        heap.gc()
        bell = Path(arena.bell_path(arena.bell_name(heap.nonce)))
        command = [*elsewhere, sys.executable, "-P", "-c", IN_ANOTHER_NAMESPACE, heap_name, folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        *refused, removed, stale = done.stdout.splitlines()
        assert len(refused) == 4
        assert all("another PID namespace (run both sides in one: docker" in one for one in refused)
        assert (removed, stale) == ("0 2", "[]")
        assert "another PID namespace" in done.stderr, "what `rm NAME` said"
        assert bell.exists()
        heap.gc()
        heap.check()
        heap.unlink()


def test_a_fork_into_another_pid_namespace_took_the_heap_along(
    worker: Worker, hand: HeapByHand
) -> None:
    worker.do("attach", hand.heap.name)
    worker.do("put", "block", b"abc")
    try:
        said = worker.do("fork_elsewhere")
    except PermissionError:
        pytest.skip("no PID namespace can be made here")
    uses = said[:4]
    assert all(one.startswith("HeapError") for one in uses), said
    assert all("another PID namespace than the heap" in one for one in uses)
    assert worker.do("read", "block") == b"abc"
    worker.end()
    hand.reap()
    assert [slot[0] for slot in hand.steward.slots()] == [1], "what was prepared for it went too"
    assert hand.stats.heap_objects == 0
    hand.assert_sound()


# Stopped: alive. Zombie: dead. The same pid: somebody else


def test_a_stopped_process_is_alive(worker: Worker, hand: HeapByHand) -> None:
    worker.do("attach", hand.heap.name)
    worker.do("put", "block", b"abc" * 10_000)
    os.kill(worker.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
    hand.turn()
    hand.collect()
    assert hand.reap() == 0
    assert hand.stats.heap_objects == 1
    assert live_pids(hand.fd, hand.observer) == [os.getpid(), worker.pid]
    os.kill(worker.pid, signal.SIGCONT)
    assert worker.do("read", "block") == b"abc" * 10_000
    worker.end()


def test_a_stopped_coordinator_is_alive(heap: Heap) -> None:
    coordinator = coordinator_of(heap)
    os.kill(coordinator, signal.SIGSTOP)
    try:
        while "\nState:\tT" not in Path(f"/proc/{coordinator}/status").read_text():
            os.sched_yield()
        with pytest.raises(CoordinatorLost, match="did not answer"):
            heap.gc(timeout=0.01)
        with Heap.attach(heap.name) as again:
            assert bytes(again.put(b"abc")) == b"abc"
    finally:
        os.kill(coordinator, signal.SIGCONT)
    assert coordinator_of(heap) == coordinator, "nobody has taken its place"


def test_a_zombie_is_dead(worker: Worker, hand: HeapByHand) -> None:
    worker.do("attach", hand.heap.name)
    worker.do("put", "block", b"abc" * 10_000)
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    os.kill(worker.pid, 0)  # there it is
    assert live_pids(hand.fd, hand.observer) == [os.getpid()]
    assert hand.reap() == 1
    assert hand.stats.heap_objects == 0
    assert [slot[0] for slot in hand.steward.slots()] == [1]


ATTACH = """
import os, sys, shmheap
heap = shmheap.Heap.attach(sys.argv[1])
block = heap.put(b"second" * 1000)
print(os.getpid(), flush=True)
sys.stdin.read()
assert bytes(block) == b"second" * 1000
"""


def run_as(pid: int, argv: list[str], stdin: int, stdout: int) -> None:
    """Start a program in a process that has this pid."""
    wanted = (ctypes.c_int32 * 1)(pid)
    arguments = (ctypes.c_uint64 * 10)()  # struct clone_args
    arguments[4] = signal.SIGCHLD  # exit_signal
    arguments[8], arguments[9] = ctypes.addressof(wanted), 1  # set_tid, set_tid_size
    size = ctypes.sizeof(arguments)
    child = ctypes.PyDLL(None, use_errno=True).syscall(435, arguments, ctypes.c_size_t(size))
    if child == 0:
        try:
            os.dup2(stdin, 0)
            os.dup2(stdout, 1)
            os.execv(argv[0], argv)
        finally:
            os._exit(127)
    if child < 0:
        number = ctypes.get_errno()
        if number in (errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EEXIST):
            pytest.skip(f"no process can be given that pid: {os.strerror(number)}")
        raise OSError(number, "clone3")
    assert child == pid


def test_a_pid_that_is_used_again_is_another_process(worker: Worker, hand: HeapByHand) -> None:
    """And here one that uses the heap, too."""
    worker.do("attach", hand.heap.name)
    worker.do("put", "block", b"first" * 1000)
    pid = worker.pid
    worker.kill()
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    argv = [sys.executable, "-P", "-c", ATTACH, hand.heap.name]
    run_as(pid, argv, from_parent, to_parent)
    os.close(from_parent)
    os.close(to_parent)
    with open(from_child) as out, open(to_child, "w"):
        assert int(out.readline()) == pid
        slots = {slot[0]: slot[2] for slot in hand.steward.slots()}
        assert slots == {1: os.getpid(), 2: pid, 3: pid}
        assert [hand.steward.alive(number) for number in (1, 2, 3)] == [True, False, True]
        assert hand.reap() == 1
        hand.collect()
        assert [slot[0] for slot in hand.steward.slots()] == [1, 3]
        assert hand.stats.heap_objects == 1
    assert os.waitpid(pid, 0)[1] == 0, "what it has is as it wrote it"
    hand.reap()
    hand.assert_sound()


# Memory that is used again

PATTERN = 0xA5
SIZES = [
    *(int(size) for size in re.findall(r"^    \{ *(\d+),", SIZE_CLASSES.read_text(), re.MULTILINE)),
    _core.MAX_SMALL_BYTES + 1,
    100_000,
    MIB - 1,
    MIB,
    3 * MIB + 5,
]


def dirty(worker: Worker, hand: HeapByHand, how: str) -> list[range]:
    """Have another process write to blocks of every size and lose them; says where they lay."""
    worker.do("attach", hand.heap.name)
    for nbytes in SIZES:
        worker.do("put", f"block {nbytes}", bytes([PATTERN]) * nbytes)
    lay = [
        range(block.offset, block.offset + nbytes)
        for nbytes in SIZES
        for block in [worker.do("get", f"block {nbytes}")]
    ]
    if how == "freed":
        for nbytes in SIZES:
            worker.do("free", f"block {nbytes}")
    if how == "killed":
        worker.kill()
    else:
        worker.end()
    hand.reap()
    hand.collect()
    assert hand.stats.heap_objects == 0
    return lay


@pytest.mark.parametrize("how", ["freed", "left", "killed"])
def test_memory_that_is_used_again_is_zeroed(worker: Worker, hand: HeapByHand, how: str) -> None:
    lay = dirty(worker, hand, how)
    for given_back in (False, True):
        if given_back:
            hand.collect()
            hand.release()
        blocks = [hand.heap.alloc(size) for size in SIZES for _ in range(1 + (size < MIB))]
        arrays = [hand.heap.ndarray(size, "u1") for size in SIZES]
        assert all(bytes(block).count(0) == block.nbytes for block in blocks)
        assert not any(array.any() for array in arrays)
        now = [range(block.offset, block.offset + block.nbytes) for block in blocks]
        met = sum(any(a.start < b.stop and b.start < a.stop for b in now) for a in lay)
        assert met > len(SIZES) / 2, "it was not their memory"
        for block in blocks:
            block[:] = bytes([PATTERN]) * block.nbytes
        del block, blocks, arrays
    hand.assert_sound()


def test_memory_that_is_not_to_be_zeroed_shows_what_was_there(
    worker: Worker, hand: HeapByHand
) -> None:
    """What zero=False is documented to do; and the control of the test above."""
    dirty(worker, hand, "killed")
    shown = [size for size in SIZES if PATTERN in bytes(hand.heap.alloc(size, zero=False))]
    assert len(shown) > len(SIZES) / 2


def test_what_lies_behind_the_data_of_a_block_is_not_shown(hand: HeapByHand) -> None:
    """A block of 1000 bytes has room for 1024: what was there before stays there, out of reach."""
    first = hand.heap.put(bytes([PATTERN]) * 1024)
    offset = first.offset
    first.free()
    block = hand.heap.put(b"x" * 1000)
    assert block.offset == offset
    data = hand.observer.books()[1]
    assert PATTERN in os.pread(hand.fd, 24, data + offset + 1000), "the file has it"
    assert bytes(block) == bytes(memoryview(block)) == b"x" * 1000
    assert block[990:2000] == b"x" * 10
    with pytest.raises(ValueError, match="buffer"):
        np.frombuffer(block, "u1", count=1001)
    block.free()
    assert bytes(hand.heap.alloc(1024)) == bytes(1024)


# Pickles


class Planted:
    """A pickle of one of these makes a directory when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


READ_EVERYTHING = """
import os, sys

def told(event, args):
    if event == "pickle.find_class":
        os.write(2, b"a pickle was read")
        os._exit(99)

sys.addaudithook(told)
import shmheap
from shmheap import _core, arena
from shmheap.cli import main

name, folder = sys.argv[1:]
if name == "control":
    import pickle
    pickle.loads(bytes.fromhex(folder))
where = ["--directory", folder]
heap = shmheap.Heap.attach(name, directory=folder)
for root, block in heap.roots.items():
    print(root, block, bytes(block), memoryview(block)[0], block == b"x", block[:5], len(block))
    heap.put(block)
print(heap, heap.config, heap.stats())
heap.check()
for command in ("ls", "stat", "verify", "gc", "scavenge"):
    names = [] if command == "ls" else [name]
    for json in ([], ["--json"]):
        assert main([command, *names, *where, *json]) == 0, command
assert main(["verify", "--deep", name, *where]) == 0
heap.close()
"""


def test_no_pickle_is_read_from_the_arena(folder: str, heap_name: str) -> None:
    payload = pickle.dumps(Planted("planted"), 0)
    text = payload.decode()

    def read(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", READ_EVERYTHING, *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)

    # In all that has text: the configuration, names, what they stand for.
    config = Config(directory=folder, log=f"{folder}/{text}")
    with Heap.create(heap_name, capacity=MIB, config=config) as heap:
        for number in range(pickle.HIGHEST_PROTOCOL + 1):
            block = heap.put(pickle.dumps(Planted("planted"), number))
            heap.roots[f"{text}{number}"] = block
        done = read(heap_name, folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("planted") > 5
        heap.unlink()
    # And instead of the configuration.
    with HeapByHand(heap_name, MIB, Config(directory=folder)) as hand:
        os.pwrite(hand.fd, payload, os.pread(hand.fd, 4096, 0).index(b'{"'))
        done = read(heap_name, folder)
        assert (done.returncode, "damaged configuration" in done.stderr) == (1, True)
    assert not Path(folder, "planted").exists()
    control = read("control", payload.hex())
    assert (control.returncode, control.stderr) == (99, "a pickle was read")
