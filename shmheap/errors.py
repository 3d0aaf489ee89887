"""Every error that shmheap raises on purpose, named by what it means for the caller.

    HeapError
      HeapFull         also MemoryError: no room; names limit, numbers, holders, remedy
      StaleHandle      the block behind a handle is gone
      HeapNotFound     also FileNotFoundError
      HeapExists       also FileExistsError
      UntrustedArena   the file is not a heap of ours, or others can write to it
      CoordinatorLost  no coordinator answers and none can be started
      HeapCorrupt      our bug, never yours: please report it

All of them can be pickled, so they cross a process pool unharmed.
"""

# ruff: noqa: N818 - the names say what happened, and "Error" would say it twice.

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CoordinatorLost",
    "HeapCorrupt",
    "HeapError",
    "HeapExists",
    "HeapFull",
    "HeapNotFound",
    "Limit",
    "StaleHandle",
    "UntrustedArena",
]

Limit = Literal["capacity", "memory_limit", "tmpfs", "cgroup", "fragmentation", "waiting"]

# limit -> (what was met, what helps)
_LIMITS: dict[str, tuple[str, str]] = {
    "capacity": (
        "the heap's capacity is in use",
        "create the heap with a larger capacity (it is sparse: it costs nothing until touched)",
    ),
    "memory_limit": (
        "the heap may not take more memory: Config.memory_limit is reached",
        "raise Config.memory_limit, or drop blocks",
    ),
    "tmpfs": (
        "the file system of the heap is full",
        "enlarge it (docker run --shm-size=1g; Kubernetes: an emptyDir of medium Memory; "
        "mount -o remount,size=1g /dev/shm), or set Config.directory",
    ),
    "cgroup": (
        "the heap has taken all that the memory limit of its cgroup leaves it",
        "raise the container's memory limit, or drop blocks, or use less memory beside the heap",
    ),
    "fragmentation": (
        "there are enough free bytes, but no free run of pages is long enough",
        "allocate smaller blocks, drop long-lived ones, or create the heap with a larger capacity",
    ),
    "waiting": (
        "every process that allocates waits for memory, and no collection can free any",
        "drop handles before waiting, or enlarge the heap",
    ),
}


_HOLDERS = {"root": "root {!r}", "pin": "pid {}", "lease": "leases of pid {}"}


class HeapError(Exception):
    """The base of all errors of shmheap."""


class HeapFull(HeapError, MemoryError):
    """An allocation found no room. Nothing has changed: the heap is as it was before.

    Args:
        limit: which limit was met: one of "capacity", "memory_limit", "tmpfs", "cgroup",
            "fragmentation", "waiting".
        requested_bytes: what was asked for.
        limit_bytes: the limit's own number; with "cgroup" what the heap may hold, since the rest
            is taken by others; 0 if it has none ("fragmentation", "waiting").
        capacity_bytes: size of the heap's data area.
        in_use_bytes: bytes of spans in use (``heap_inuse``).
        idle_bytes: bytes of free spans, released or not (``heap_idle``).
        free_bytes: bytes that could still be handed out; with "fragmentation" not in one piece.
        largest_free_bytes: the longest free run of pages, when the error was made.
        holders: (kind, name or pid, bytes) of those that hold most, largest first: "root" a name,
            with all that can be reached from it; "pin" a process by its handles, "lease" one by
            pickled handles on their way, each with what no name reaches. Of a block that several
            processes hold each has its part.
        allocated_at: (file:line, bytes) of the places whose blocks take most, largest first, of
            those that were made with SHMHEAP_TRACK=1.
        remedy: what helps; chosen by ``limit`` if not given.
        what: what it was for, if not for a block: then it was for ``requested_bytes`` of that.

    Every argument is an attribute of the same name. Unknown limits are a ValueError.
    """

    def __init__(
        self,
        limit: Limit,
        *,
        requested_bytes: int = 0,
        limit_bytes: int = 0,
        capacity_bytes: int = 0,
        in_use_bytes: int = 0,
        idle_bytes: int = 0,
        free_bytes: int = 0,
        largest_free_bytes: int = 0,
        holders: Iterable[tuple[str, int | str, int]] = (),
        allocated_at: Iterable[tuple[str, int]] = (),
        remedy: str | None = None,
        what: str = "",
    ) -> None:
        if limit not in _LIMITS:
            raise ValueError(f"unknown limit {limit!r}; one of {', '.join(_LIMITS)}")
        # args = (limit,) and the rest in __dict__: Exception pickles itself from just these two.
        super().__init__(limit)
        self.limit: Limit = limit
        self.requested_bytes = requested_bytes
        self.limit_bytes = limit_bytes
        self.capacity_bytes = capacity_bytes
        self.in_use_bytes = in_use_bytes
        self.idle_bytes = idle_bytes
        self.free_bytes = free_bytes
        self.largest_free_bytes = largest_free_bytes
        self.holders = tuple(holders)
        self.allocated_at = tuple(allocated_at)
        self.remedy = remedy or _LIMITS[limit][1]
        self.what = what

    def __str__(self) -> str:
        return f"{self._problem()} ({self._numbers()}){self._largest()}; {self.remedy}"

    def _problem(self) -> str:
        wanted = _size(self.requested_bytes)
        if self.what:
            wanted = f"{self.what} ({wanted})"
        if self.requested_bytes > self.capacity_bytes > 0:
            return f"no room for {wanted}: that is more than the whole heap"
        return f"no room for {wanted}: {_LIMITS[self.limit][0]}"

    def _numbers(self) -> str:
        numbers = [
            ("limit", self.limit_bytes),
            ("capacity", self.capacity_bytes),
            ("in use", self.in_use_bytes),
            ("idle", self.idle_bytes),
            ("free", self.free_bytes),
            ("longest free run", self.largest_free_bytes),
        ]
        # A limit and a longest run of 0 were not measured; a 0 elsewhere is a fact.
        optional = ("limit", "longest free run")
        return ", ".join(f"{name} {_size(n)}" for name, n in numbers if n or name not in optional)

    def _largest(self) -> str:
        held = ", ".join(f"{_HOLDERS[k].format(who)} {_size(n)}" for k, who, n in self.holders)
        made = ", ".join(f"{where} {_size(nbytes)}" for where, nbytes in self.allocated_at)
        parts = (("largest holders", held), ("allocated at", made))
        return "".join(f"; {what}: {which}" for what, which in parts if which)


class StaleHandle(HeapError):
    """The block that the handle named was freed: never somebody else's bytes in its place."""


class HeapNotFound(HeapError, FileNotFoundError):
    """There is no heap of that name."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        if self.errno is None:
            self.errno = errno.ENOENT


class HeapExists(HeapError, FileExistsError):
    """There is a heap of that name already."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        if self.errno is None:
            self.errno = errno.EEXIST


class UntrustedArena(HeapError):
    """The file is not a heap of this user: wrong owner, mode, kind, size or contents."""


class CoordinatorLost(HeapError):
    """The heap's coordinator is gone and no successor could be started."""


class HeapCorrupt(HeapError):
    """An invariant of the heap does not hold. This is a bug of shmheap: please report it."""


def _size(nbytes: int) -> str:
    """Format bytes for people: exact up to 64 KiB, then in the largest fitting binary unit."""
    if nbytes < 1 << 16:
        return f"{nbytes} B"
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB")):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.1f} {unit}"
    return f"{nbytes / 1024:.1f} KiB"
