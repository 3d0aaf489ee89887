from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import posix_ipc
import pytest
from fake_steward import FakeSteward

from shmheap import HeapCorrupt, _core, arena
from shmheap.config import Config
from shmheap.coordinator import SlotKey, process
from shmheap.coordinator.reaper import Watcher
from shmheap.testing import FakeClock

HEAVY = {
    "asyncio",
    "concurrent.futures",
    "ctypes",
    "email",
    "http",
    "multiprocessing",
    "numpy",
    "pathlib",
    "psutil",
    "rich",
    "secrets",
    "ssl",
    "unittest",
}


@pytest.fixture
def bell() -> Iterator[str]:
    """The name of a doorbell, removed at the end."""
    name = f"/shmheap.{os.getuid()}.{secrets.token_hex(8)}.bell"
    yield name
    try:
        posix_ipc.unlink_semaphore(name)
    except posix_ipc.ExistentialError:
        return


def exists(bell: str) -> bool:
    return Path("/dev/shm", f"sem.{bell[1:]}").exists()


# What it loads


def test_it_loads_nothing_that_is_only_nice_to_have() -> None:
    # Less what site loads: an editable install's finder, say.
    code = "import sys; site = set(sys.modules); import shmheap.coordinator.process; "
    code += "print(*sys.modules.keys() - site)"
    loaded = subprocess.check_output([sys.executable, "-P", "-c", code], text=True).split()
    assert "shmheap.coordinator.loop" in loaded
    assert HEAVY.intersection(loaded) == set()


def test_a_corrupt_heaps_doorbell_stayed_if_its_name_was_removed_before_its_coordinator_failed(
    heap_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = arena.file_path(heap_name)
    fd = arena.make_file(path, 1 << 20, Config())
    arena.give_name(fd, path)
    os.close(fd)
    bells: list[str] = []

    def serve(steward: _core.Steward, *_: object, linger: bool) -> process.Outcome:
        bells.append(arena.bell_name(steward.nonce))
        with process.doorbell(bells[0]):
            os.unlink(path)
            raise HeapCorrupt("a list of spans is torn")

    monkeypatch.setattr(process, "_serve", serve)
    assert process.main(path, foreground=False) == 1
    assert not exists(bells[0])


# Starting one


@pytest.mark.parametrize("python", [None, "/opt/python"])
def test_how_it_is_started(monkeypatch: pytest.MonkeyPatch, python: str | None) -> None:
    started = []
    spawn = SimpleNamespace(spawn_detached=lambda *args: started.append(args))
    monkeypatch.setattr(process, "_core", spawn)
    process.ensure_running("/dev/shm/x", Config(python=python, log="/dev/null"))
    command = [python or sys.executable, "-P", "-m", "shmheap", "run", "/dev/shm/x"]
    assert started == [(command, "/dev/null", -1)]


@pytest.mark.parametrize(
    ("stdout", "detached"), [(subprocess.DEVNULL, "True"), (subprocess.PIPE, "False")]
)
def test_whether_it_has_somebody_to_talk_to(stdout: int, detached: str) -> None:
    code = (
        "import sys; from shmheap.coordinator.process import is_detached; "
        "print(is_detached(), file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert ran.stderr.strip() == detached


# The doorbell


def test_a_ring_arrives(bell: str) -> None:
    with process.doorbell(bell) as bell_fd:
        posix_ipc.Semaphore(bell).release()
        assert select.select([bell_fd], [], [], 60)[0] == [bell_fd]
    assert exists(bell)  # a successor listens to the same


def test_a_ring_that_nobody_heard_is_heard_by_the_successor(bell: str) -> None:
    posix_ipc.Semaphore(bell, posix_ipc.O_CREAT, mode=0o600, initial_value=1)
    with process.doorbell(bell) as bell_fd:
        assert select.select([bell_fd], [], [], 60)[0] == [bell_fd]


def test_the_doorbell_is_its_user_s_alone(bell: str) -> None:
    with process.doorbell(bell):
        assert Path("/dev/shm", f"sem.{bell[1:]}").stat().st_mode & 0o777 == 0o600


# From start to end


class Machine:
    """Stands in for the core and the arena's file: `main` finds a fake heap at `path`."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.heap = FakeSteward(FakeClock(), config)
        path.write_text("the arena")

    def steward(self, _fd: int) -> FakeSteward:
        return self.heap

    def read_config(self, _fd: int, _path: str) -> Config:
        return Config.from_json(self.heap.config())

    def open_arena(self, _name: str) -> tuple[int, str]:
        self.fd = os.open(self.path, os.O_RDWR)
        return self.fd, str(self.path)


@pytest.fixture
def config() -> Config:
    return Config()


@pytest.fixture
def machine(
    tmp_path: Path, bell: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    machine = Machine(tmp_path / "arena", config)
    monkeypatch.setattr(process, "_core", SimpleNamespace(Steward=machine.steward))
    monkeypatch.setattr(process, "open_arena", machine.open_arena)
    monkeypatch.setattr(process, "read_config", machine.read_config)
    for module in (process, arena):
        monkeypatch.setattr(module, "bell_name", lambda _nonce: bell)
    yield machine
    os.close(machine.fd)


def test_the_last_one_out_removes_arena_and_doorbell(machine: Machine, bell: str) -> None:
    assert process.main("x", foreground=False) == 0
    assert machine.heap.closed
    assert not machine.path.exists()
    assert not exists(bell)


def test_another_heap_of_the_same_name_is_spared(
    machine: Machine, bell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_close = machine.heap.try_close

    def replaced_meanwhile() -> bool:
        machine.path.unlink()
        machine.path.write_text("somebody else's")
        return try_close()

    monkeypatch.setattr(machine.heap, "try_close", replaced_meanwhile)
    process.main("x", foreground=False)
    assert machine.path.read_text() == "somebody else's"
    assert not exists(bell)


@pytest.mark.parametrize("config", [Config(keep=True)])
def test_a_heap_to_be_kept_keeps_its_doorbell_too(machine: Machine, bell: str) -> None:
    assert process.main("x", foreground=False) == 0
    assert machine.path.exists()
    assert exists(bell)


@pytest.mark.parametrize("config", [Config(keep=True)])
def test_a_heap_that_was_to_be_kept_and_was_unlinked_goes(
    machine: Machine, bell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.heap, "begin", lambda: (machine.path.unlink(), 0)[1])
    assert process.main("x", foreground=False) == 0
    assert machine.heap.closed
    assert not exists(bell)


@pytest.mark.parametrize("foreground", [False, True])
def test_beside_another_coordinator_it_leaves_quietly(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    foreground: bool,
) -> None:
    def taken(_fd: int) -> FakeSteward:
        raise BlockingIOError

    monkeypatch.setattr(process, "_core", SimpleNamespace(Steward=taken))
    assert process.main("x", foreground=foreground) == 0
    assert ("x has a coordinator already" in capsys.readouterr().err) is foreground
    assert machine.path.exists()


def signal_at_work(machine: Machine, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal arrive in the coordinator's first turn."""
    take_wants = machine.heap.take_wants

    def be_signalled() -> int:
        os.kill(os.getpid(), number)
        return take_wants()

    monkeypatch.setattr(machine.heap, "take_wants", be_signalled)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_leaves_the_heap_to_its_users(
    machine: Machine, bell: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = signal.getsignal(number)
    machine.heap.attach(pid=os.getpid())
    signal_at_work(machine, number, monkeypatch)
    assert process.main("x", foreground=False) == 0
    assert machine.path.exists()
    assert exists(bell)
    assert signal.getsignal(number) is before


def test_a_signal_ends_its_sleep(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.heap.attach(pid=os.getpid())
    wait = Watcher.wait

    def be_signalled(watcher: Watcher, timeout_s: float, processes: Any) -> set[SlotKey]:
        os.kill(os.getpid(), signal.SIGTERM)
        return wait(watcher, timeout_s, processes)

    monkeypatch.setattr(Watcher, "wait", be_signalled)
    assert process.main("x", foreground=False) == 0
    assert machine.path.exists()


def test_a_terminal_that_hangs_up_does_not_stop_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = machine.heap.attach(pid=os.getpid())
    signal_at_work(machine, signal.SIGHUP, monkeypatch)

    def hear_the_user_leave(*_: object) -> set[SlotKey]:
        machine.heap.leave(user)
        return set()

    monkeypatch.setattr(Watcher, "wait", hear_the_user_leave)
    assert process.main("x", foreground=False) == 0
    assert machine.heap.closed


def test_a_failure_is_logged_and_told_by_the_exit_status(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise RuntimeError("the arena is broken")

    monkeypatch.setattr(machine.heap, "begin", fail)
    assert process.main("x", foreground=True) == 1
    assert "the arena is broken" in capsys.readouterr().err
    assert machine.path.exists()


@pytest.mark.parametrize("foreground", [False, True])
def test_it_logs_to_the_file_and_in_the_foreground_to_stderr(
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    foreground: bool,
) -> None:
    log = tmp_path / "log"
    monkeypatch.setattr(machine.heap, "config", Config(log=str(log)).to_json)
    dead = machine.heap.attach(pid=4711)
    machine.heap.alloc(dead)
    machine.heap.die(dead)
    signal_at_work(machine, signal.SIGTERM, monkeypatch)
    assert process.main("x", foreground=foreground) == 0
    assert "process 4711 is gone" in log.read_text()
    assert ("process 4711 is gone" in capsys.readouterr().err) is foreground


@pytest.mark.parametrize(
    ("environment", "traced"),
    [({}, False), ({"SHMHEAP_TRACE": "0"}, False), ({"SHMHEAP_TRACE": "1"}, True)],
)
def test_the_environment_switches_the_trace_on(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    traced: bool,
) -> None:
    monkeypatch.delenv("SHMHEAP_TRACE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    machine.heap.ask(0)
    process.main("x", foreground=False)
    assert ("scvg0: inuse: 0" in capsys.readouterr().err) is traced
