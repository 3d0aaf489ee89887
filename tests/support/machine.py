"""File systems and cgroups that a test makes for itself, where the machine lets it."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

_numbers = itertools.count(1)


@contextlib.contextmanager
def mounted(kind: str, path: Path, options: str = "") -> Iterator[str]:
    """Mount a file system of that kind on a folder; skips where that is not allowed."""
    option = ["-o", options] if options else []
    done = subprocess.run(["mount", "-t", kind, *option, "none", path], capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"mounting a {kind} is not permitted here: {done.stderr.decode().strip()}")
    try:
        yield str(path)
    finally:  # lazily: a coordinator may be on its way out
        subprocess.run(["umount", "--lazy", path], check=True)


def is_tmpfs(path: str) -> bool:
    """Ask `stat`, which is not ours."""
    found = subprocess.run(["stat", "-fc", "%T", path], capture_output=True, check=True)
    return found.stdout.strip() == b"tmpfs"


class Hierarchy(NamedTuple):
    """Where a hierarchy of cgroups that counts memory is mounted, and the file of the limit."""

    top: str
    limit: str


HIERARCHIES = (
    Hierarchy("/sys/fs/cgroup", "memory.max"),
    Hierarchy("/sys/fs/cgroup/unified", "memory.max"),
    Hierarchy("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
)


@contextlib.contextmanager
def cgroup_of(limit_bytes: int) -> Iterator[Path]:
    """Make a cgroup that may have that much memory; write pids to its cgroup.procs.

    Skips where that is not allowed. At the end its processes must be about to leave.
    """
    for top, limit in HIERARCHIES:
        made = Path(top, f"shmheap-test-{os.getpid()}-{next(_numbers)}")
        try:
            made.mkdir()
        except OSError:
            continue
        if not (made / limit).exists():  # a hierarchy that does not count memory, or none at all
            made.rmdir()
            continue
        try:
            (made / limit).write_text(str(limit_bytes))
            yield made
        finally:
            _wait_for(made)
            made.rmdir()
        return
    pytest.skip("no cgroup with a memory limit can be made here")


def _wait_for(cgroup: Path) -> None:
    while pids := (cgroup / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(int(pids[0]))
            select.select([pidfd], [], [])
            os.close(pidfd)
