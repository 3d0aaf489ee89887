"""A pytest plugin: nothing of a test run stays on the machine, and the run says so at its end.

Every heap of a run has the run's id in its name. The id is chosen once, by the process that the
user started (the controller), and handed to pytest-xdist's workers. When all of them have ended,
killed ones too, the controller

1. waits a bounded time for coordinators and other users of this run's heaps to leave by themselves,
   and ends those that do not;
2. removes this run's arenas, and doorbells that nobody can ever ring again;
3. prints what it found, and fails the run if that was anything.

A doorbell is named after its arena's nonce, not after its heap. Once this run's arenas are gone, a
doorbell made since the run began belongs to nobody if no arena has its nonce and no process has it
mapped, and that lasts. Two runs at a time cannot tell whose it was, so each takes it for its own.
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

SHM = Path("/dev/shm")
COMMAND = ["-m", "shmheap", "run"]
HEADER_BYTES = 4096
TERMINATE_S = 5.0
ROUNDS = 3
"""A process that was just starting when the first list was taken is on the second."""
LOOKS = 20
LOOK_S = 0.1
"""How often, and how far apart, one looks again at what seems to be left by nobody."""

Inode = tuple[int, int]
"""Device and inode: what names a file in every process's maps, also when its name is gone."""


class Names:
    """Heap names that no other test, worker or run has."""

    def __init__(self, run_id: str, worker: str) -> None:
        self.run_id = run_id
        self._prefix = f"t{run_id}-{worker}"
        self._numbers = itertools.count(1)

    def new(self) -> str:
        return f"{self._prefix}-{next(self._numbers)}"


NAMES = pytest.StashKey[Names]()


def arenas(run_id: str | None = None) -> list[Path]:
    """This user's arenas in /dev/shm; of one run only, if given."""
    return sorted(SHM.glob(f"shmheap.{os.getuid()}.{f't{run_id}-' if run_id else ''}*"))


def doorbells() -> list[Path]:
    """The files of this user's doorbells."""
    return sorted(SHM.glob(f"sem.shmheap.{os.getuid()}.*"))


def inode(path: Path) -> Inode | None:
    """What identifies the file; None if it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def mapped_inodes(pid: int) -> Iterator[Inode]:
    """Every file that the process maps; nothing if it is gone or not ours to look at."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, _, device, number, *_ = line.split(maxsplit=5)
        major, minor = (int(part, 16) for part in device.split(":"))
        yield os.makedev(major, minor), int(number)


def is_coordinator(cmdline: Sequence[str], run_id: str) -> bool:
    """Whether this command line is `python -m shmheap run` on a heap of this run."""
    return list(cmdline[-4:-1]) == COMMAND and f"t{run_id}-" in cmdline[-1]


def processes(run_id: str) -> list[psutil.Process]:
    """Coordinators and users of this run's heaps, but for the calling process."""
    files = {inode(path) for path in arenas(run_id)}
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid()
        and (
            is_coordinator(process.info["cmdline"] or (), run_id)
            or not files.isdisjoint(mapped_inodes(process.pid))
        )
    ]


def end_processes(run_id: str, leave_s: float) -> list[str]:
    """Wait until the run's processes left; end those that did not, and name them."""
    ended = []
    for _ in range(ROUNDS):
        found = processes(run_id)
        if not found:
            break
        _, stayed = psutil.wait_procs(found, timeout=leave_s)
        ended += [f"process {p.pid}: {' '.join(p.info['cmdline'] or ['?'])}" for p in stayed]
        end(stayed)
    return ended


def end(found: Sequence[psutil.Process]) -> None:
    """Ask the processes to go, then make them."""
    for process in found:
        _signal(process.terminate)
    _, stayed = psutil.wait_procs(found, timeout=TERMINATE_S)
    for process in stayed:
        _signal(process.kill)
    psutil.wait_procs(stayed, timeout=TERMINATE_S)


def _signal(send: Callable[[], None]) -> None:
    with suppress(psutil.NoSuchProcess):
        send()


def nonce_forms(doorbell: Path) -> list[bytes]:
    """The nonce in a doorbell's name as an arena's header may spell it, whatever its layout."""
    try:
        nonce = int(doorbell.name.split(".")[3], 16)
    except (IndexError, ValueError):
        return []
    size = max(8, (nonce.bit_length() + 7) // 8)
    return [nonce.to_bytes(size, "little"), nonce.to_bytes(size, "big")]


def orphans(since: frozenset[Path]) -> list[Path]:
    """Doorbells made after `since` was taken that no arena names and no process maps."""
    headers = [header(path) for path in arenas()]
    mapped = {found for pid in psutil.pids() for found in mapped_inodes(pid)}
    return [
        bell
        for bell in doorbells()
        if bell not in since
        and (file := inode(bell)) is not None
        and file not in mapped
        and not any(form in head for form in nonce_forms(bell) for head in headers)
    ]


def lasting_orphans(since: frozenset[Path]) -> list[Path]:
    """Those that stay: another run's are about to be named, mapped or removed."""
    found = orphans(since)
    for _ in range(LOOKS if found else 0):
        time.sleep(LOOK_S)
        found = [bell for bell in orphans(since) if bell in found]
    return found


def header(arena: Path) -> bytes:
    """The first bytes of an arena; nothing if it is gone."""
    try:
        with arena.open("rb") as file:
            return file.read(HEADER_BYTES)
    except FileNotFoundError:
        return b""


def remove(paths: Sequence[Path]) -> list[str]:
    """Remove the files and name them."""
    for path in paths:
        path.unlink(missing_ok=True)
    return [f"file {path}" for path in paths]


class LeakGuard:
    """The controller's part: hands out the run's id, and looks when everything has ended."""

    def __init__(self, run_id: str, leave_s: float) -> None:
        self._run_id = run_id
        self._leave_s = leave_s
        self._doorbells = frozenset(doorbells())
        self._left: list[str] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["shmheap_run_id"] = self._run_id

    @pytest.hookimpl(trylast=True)  # pytest-xdist ends its workers in this hook
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._left = end_processes(self._run_id, self._leave_s)
        self._left += remove(arenas(self._run_id))
        self._left += remove(lasting_orphans(self._doorbells))
        if self._left and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._left:
            terminalreporter.write_line(f"shmheap: nothing left behind by run {self._run_id}")
            return
        terminalreporter.section(f"shmheap: left behind by run {self._run_id}, now cleaned up")
        for line in self._left:
            terminalreporter.write_line(line)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "shmheap_leave_s",
        "seconds after a run in which the users of its heaps may leave by themselves",
        default="45",  # more than a dead process's leases live by default
    )


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        config.stash[NAMES] = Names(worker["shmheap_run_id"], worker["workerid"])
        return
    run_id = secrets.token_hex(4)
    config.stash[NAMES] = Names(run_id, "main")
    config.pluginmanager.register(LeakGuard(run_id, float(config.getini("shmheap_leave_s"))))


@pytest.fixture
def new_heap_name(pytestconfig: pytest.Config) -> Callable[[], str]:
    """A function that returns another unique name at each call."""
    return pytestconfig.stash[NAMES].new


@pytest.fixture
def heap_name(new_heap_name: Callable[[], str]) -> str:
    """A heap name that no other test, worker or run has."""
    return new_heap_name()
