"""What the demo loads: which files, how often, and how much that may be."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass

from shmheap.cli.show import size

__all__ = ["Load", "find_files", "plan_load"]

LEAST_BYTES = 256 << 20
SHARE = 4
"""At most one part in so many of what is free: results need room, and so do others."""


@dataclass(frozen=True, slots=True)
class Load:
    """Files, and how many blocks are made of each."""

    copies: tuple[tuple[str, int], ...]
    nbytes: int
    limit_bytes: int

    @property
    def blocks(self) -> int:
        """How many blocks there will be."""
        return sum(count for _, count in self.copies)

    def __str__(self) -> str:
        counts = [count for _, count in self.copies]
        least, most = min(counts), max(counts)
        times = f"{most}" if least == most else f"{least} or {most}"
        return (
            f"files: {len(counts):,}, times over: {times}, blocks: {self.blocks:,}, together "
            f"{size(self.nbytes)}; a quarter of what is free would be {size(self.limit_bytes)}"
        )


def find_files(directory: str | None) -> list[tuple[str, int]]:
    """Find what to load: (path, bytes) of each file that is neither empty nor a link.

    Args:
        directory: All files below it; None: the .py files of the standard library.

    Raises ValueError if there is none.
    """
    if directory is None:
        found = _files(sysconfig.get_path("stdlib"), ".py", ("site-packages", "dist-packages"))
    else:
        found = _files(directory)
    files = sorted(found)
    if not files:
        raise ValueError(f"nothing to load: no file that is not empty in {directory!r}")
    return files


def _files(top: str, suffix: str = "", skip: tuple[str, ...] = ()) -> Iterator[tuple[str, int]]:
    for directory, below, names in os.walk(top, onerror=_refuse):
        below[:] = [name for name in below if name not in skip]
        for name in names:
            path = os.path.join(directory, name)
            if not name.endswith(suffix) or os.path.islink(path) or not os.path.isfile(path):
                continue
            if (nbytes := os.path.getsize(path)) and os.access(path, os.R_OK):
                yield path, nbytes


def _refuse(error: OSError) -> None:
    raise error


def plan_load(files: list[tuple[str, int]], want_bytes: int | None, free_bytes: int) -> Load:
    """Say how often to load each file.

    Args:
        files: (path, bytes) of each.
        want_bytes: How much to load; None: all of them, and at least 256 MiB.
        free_bytes: What the file system has.

    Raises ValueError if not one of them fits.
    """
    limit = free_bytes // SHARE
    total = sum(nbytes for _, nbytes in files)
    goal = min(limit, max(LEAST_BYTES, total) if want_bytes is None else want_bytes)
    rounds = goal // total
    loaded = rounds * total
    copies = []
    for path, nbytes in files:
        more = loaded < goal and loaded + nbytes <= limit
        loaded += nbytes * more
        if rounds + more:
            copies.append((path, rounds + more))
    if not copies:
        raise ValueError(f"nothing fits into {size(goal)}, with {size(free_bytes)} free")
    return Load(tuple(copies), loaded, limit)
