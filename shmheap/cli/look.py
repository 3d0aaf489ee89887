"""`shmheap ls`, `stat`, `verify`: look at heaps from outside; `deep` has verify --deep.

All three are observers: they map a heap read-only, take no slot and no lock, wake nobody, and keep
no heap alive.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from shmheap import _core, arena
from shmheap.cli.deep import look_deep
from shmheap.cli.show import print_json, print_pairs, print_table, size
from shmheap.errors import HeapError
from shmheap.rss import held_bytes, process_memory
from shmheap.stats import HeapStats
from shmheap.verify import VerifyReport, verify_quiet

__all__ = ["ls", "stat", "verify"]

PHASES = {
    _core.PHASE_IDLE: "idle",
    _core.PHASE_MARK: "mark",
    _core.PHASE_FINAL: "final",
    _core.PHASE_SWEEP: "sweep",
}
"""Of a collection; a damaged header may say another number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeapRow:
    """A heap as `ls` shows it. Bytes unless said.

    Attributes:
        path: Its file; of an unlinked one, a process's open file of it.
        held_bytes: What the kernel holds for the whole file.
        processes: pids of those that use it.
        coordinator_pid: None if no coordinator lives.
        unlinked: Its name is gone, or about to go.
        orphan: No process uses it, and no coordinator is there to remove it.
        stale: An orphan that was not to be kept: its processes were all killed at once.
        problem: Why it cannot be used; None if it can. Of what is no heap the numbers are 0.
    """

    name: str
    path: str
    uid: int
    capacity: int = 0
    in_use_bytes: int = 0
    released_bytes: int = 0
    held_bytes: int = 0
    processes: tuple[int, ...] = ()
    coordinator_pid: int | None = None
    unlinked: bool = False
    orphan: bool = False
    stale: bool = False
    problem: str | None = None


@contextmanager
def observed(path: str) -> Iterator[tuple[int, _core.Observer]]:
    """Open an arena to look at; gives its fd and the observer. Raises what open_arena raises."""
    fd, _ = arena.open_arena(path, read_only=True)
    try:
        arena.read_config(fd, path)  # whoever uses it must be able to
        observer = _core.Observer(fd)
        try:
            yield fd, observer
        finally:
            observer.close()
    finally:
        os.close(fd)


def live_pids(fd: int, observer: _core.Observer) -> list[int]:
    """The pids of the heap's slots that still are processes with the heap's file open."""
    return [pid for pid, _, _ in observer.processes() if _has_open(pid, fd)]


def ls(options: argparse.Namespace) -> int:
    """List the heaps of this host: those that have a name, and unlinked ones of this user."""
    named = [_row(file) for file in arena.find_arenas(options.directory)]
    unlinked = [_row(file, unlinked=True) for file in _unlinked(options.directory)]
    rows = [row for row in named + unlinked if row is not None]
    if options.json:
        print_json({"heaps": [asdict(row) for row in rows]})
    elif rows:
        headings = ("name", "capacity", "in use", "released", "held", "users", "coordinator", "")
        print_table(headings, [_cells(row) for row in rows if row.problem is None])
        for row in rows:
            if row.problem is not None:
                print(f"{row.name} is not usable: {row.problem}")
    else:
        print(f"no heaps in {options.directory or arena.DIRECTORY}")
    return 0


def _row(file: arena.ArenaFile, *, unlinked: bool = False) -> HeapRow | None:
    """None if it has gone meanwhile."""
    try:
        with observed(file.path) as (fd, observer):
            stats, header = HeapStats(**observer.stats()), observer.header()
            users = tuple(live_pids(fd, observer))
            coordinator = header["coordinator_pid"] if header["coordinator_alive"] else None
            return HeapRow(
                name=file.name,
                path=file.path,
                uid=file.uid,
                capacity=stats.capacity,
                in_use_bytes=stats.heap_inuse,
                released_bytes=stats.heap_released,
                held_bytes=held_bytes(fd),
                processes=users,
                coordinator_pid=coordinator,
                unlinked=unlinked or header["unlinked"],
                orphan=(orphan := not users and coordinator is None),
                stale=orphan and not arena.read_config(fd, file.path).keep,
                problem=_corrupt(file.path, header["fault"]),
            )
    except FileNotFoundError:
        return None
    except (HeapError, OSError) as error:
        return HeapRow(name=file.name, path=file.path, uid=file.uid, problem=str(error))


def _corrupt(path: str, fault: str | None) -> str | None:
    return fault and f"{path} is corrupt: {fault}"


def _cells(row: HeapRow) -> tuple[object, ...]:
    words = (("unlinked", row.unlinked), ("stale" if row.stale else "kept", row.orphan))
    remarks = [word for word, true in words if true]
    return (
        row.name,
        size(row.capacity),
        size(row.in_use_bytes),
        size(row.released_bytes),
        size(row.held_bytes),
        len(row.processes),
        "dead" if row.coordinator_pid is None else row.coordinator_pid,
        ", ".join(remarks),
    )


def _unlinked(directory: str | None) -> Iterator[arena.ArenaFile]:
    """Find heaps without a name through processes of this user that have them open.

    What a file was called is known of it where it was opened by that name. The process that made
    the heap did not: there a number stands for it.
    """
    found: dict[tuple[int, int], tuple[str, str]] = {}
    form = rf"{re.escape(directory or arena.DIRECTORY)}/({arena.PREFIX}\.\d+\..+|#\d+) \(deleted\)"
    for link, target in _open_files():
        named = re.fullmatch(form, target, re.DOTALL)
        if named is None:
            continue
        with suppress(OSError, HeapError):  # closed meanwhile; or no heap at all
            status = os.stat(link)
            if status.st_nlink == 0 and _is_heap(link):
                file = (named[1].split(".", 2)[-1], link)
                found[status.st_dev, status.st_ino] = max(
                    file, found.get((status.st_dev, status.st_ino), file)
                )
    for name, link in sorted(found.values()):
        yield arena.ArenaFile(name, os.geteuid(), link)


def _is_heap(path: str) -> bool:
    with observed(path):
        return True


def _open_files() -> Iterator[tuple[str, str]]:
    """(link in /proc, what it points to) of every open file that this user may see."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # gone meanwhile, or another user's
            for number in os.listdir(f"/proc/{pid}/fd"):
                link = f"/proc/{pid}/fd/{number}"
                with suppress(OSError):
                    yield link, os.readlink(link)


def _has_open(pid: int, fd: int) -> bool:
    """Whether a process has the file of `fd` open: its pid may be another process's by now."""
    wanted = os.fstat(fd)
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), wanted):
                    return True
    return False


def stat(options: argparse.Namespace) -> int:
    """Show a heap's numbers, settings and processes."""
    with observed(arena.file_path(options.name, options.directory)) as (fd, observer):
        stats = asdict(HeapStats(**observer.stats()))
        header = observer.header()
        header["config"] = json.loads(header["config"])
        header["phase"] = PHASES.get(header["phase"], header["phase"])
        held = held_bytes(fd)
        alive = live_pids(fd, observer)
        processes = [
            _process(pid, nbytes, pins, alive) for pid, nbytes, pins in observer.processes()
        ]
    if options.json:
        print_json(
            {
                "name": options.name,
                "held_bytes": held,
                "stats": stats,
                "header": header,
                "processes": processes,
            }
        )
        return 0
    config = header.pop("config")
    stats["pause_ns"] = f"{len(stats['pause_ns'])} kept"
    print_pairs([("name", options.name), ("held by the kernel", _number("held_bytes", held))])
    for numbers in (stats, header, config):
        print()
        print_pairs((name, _number(name, value)) for name, value in numbers.items())
    headings = ("pid", "command", "status", "blocks made by it", "handles", "RssShmem", "PSS")
    print_table(headings, map(_process_cells, processes))
    return 0


def _process(pid: int, nbytes: int, pins: int, alive: list[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"pid": pid, "alive": pid in alive, "net_bytes": nbytes, "handles": pins}
    with suppress(OSError, psutil.Error):  # gone meanwhile
        if row["alive"]:
            process = psutil.Process(pid)
            with process.oneshot():
                row |= {"command": process.name(), "status": process.status()}
            memory = process_memory(pid)
            row |= {"rss_shmem_bytes": memory.rss_shmem, "pss_bytes": memory.pss}
    return row


def _process_cells(row: dict[str, Any]) -> tuple[object, ...]:
    memory = [size(row[key]) if key in row else "" for key in ("rss_shmem_bytes", "pss_bytes")]
    status = row.get("status", "gone")
    return (
        row["pid"],
        row.get("command", ""),
        status,
        size(row["net_bytes"]),
        row["handles"],
        *memory,
    )


_SIZES = {"capacity", "next_gc", "heap_sys", "heap_idle", "heap_inuse", "heap_released"}
_NEVER = (1 << 63) - 1


def _number(name: str, value: object) -> str:
    """A value for people; a size also in its unit."""
    if isinstance(value, int) and (name in _SIZES or name.endswith(("_bytes", "_alloc"))):
        return "never" if value == _NEVER else f"{value:,} ({size(value)})"
    return f"{value:,}" if type(value) is int and name.endswith("_ns") else str(value)


def verify(options: argparse.Namespace) -> int:
    """Hold the books against the kernel, and name each page that disagrees; 1 if there is any.

    --deep: also walk every invariant, and say of each that does not hold what that means. 1 also if
    the heap is corrupt, whatever the books say.
    """
    with observed(arena.file_path(options.name, options.directory)) as (fd, observer):
        deep = look_deep(observer) if options.deep else None
        report = verify_quiet(fd, observer)
        fault = observer.header()["fault"]
    if options.json:
        found = {} if deep is None else {"deep": deep.as_json()}
        print_json({"name": options.name, "fault": fault} | found | report.as_json())
    else:
        _print_report(report)
        if fault is not None:
            print(f"corrupt: {fault}")
        if deep is not None:
            print(deep)
    sound = fault is None and (deep is None or deep.sound)
    return 0 if sound and report.agrees else 1


def _print_report(report: VerifyReport) -> None:
    for wrong in report.mismatches:
        print(wrong)
    print_pairs(
        [
            ("pages on which books and kernel disagree", len(report.mismatches)),
            ("pages compared", f"{report.checked_units:,} of {report.unit_bytes} bytes"),
            ("pages in transit, not judged", f"{report.in_transit_units:,}"),
            ("pages that the witness cannot see", f"{report.unjudged_units:,}"),
            ("held by the books", size(report.books_held_bytes)),
            ("held by the kernel", size(report.kernel_held_bytes)),
            ("metadata beside it", size(report.metadata_bytes)),
            ("witness", report.witness if report.exact else f"{report.witness} (a lower bound)"),
        ]
    )
