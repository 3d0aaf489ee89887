"""How much memory a heap may take: Config.memory_limit, and what the cgroup has left.

The problem: a process that takes more than its cgroup may have gets no error. The kernel kills it,
or another of the cgroup. And what counts there is not the heap alone: the memory of every process,
the tables of the heap, files in tmpfs.

The goal: HeapFull first. So a heap's limit is what it holds now and what the cgroup has left now:

    left  = min over the cgroup and its ancestors of  limit - (usage - file cache) - reserve
    limit = min(Config.memory_limit, held + left)

Read by the coordinator at each of its turns, for the cgroup it runs in itself: memory that has gone
to others since lowers the limit, memory that they gave back raises it. What a program does with a
heap takes memory beside it: a block of 16 bytes, say, 8 of the heap's tables and 70 for its Python
object. So the coordinator is woken to look again whenever a sixteenth of what was left is taken,
and whoever meets the limit has it look before anything is refused. Until a new heap's coordinator
runs, the heap may take such a sixteenth, which its creator looked up. Swap is not counted.

A tmpfs needs none of this: its limit is an error, ENOSPC. What it has left is not read ahead.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

from shmheap.config import Config

__all__ = ["NO_LIMIT", "Cgroup", "first_limit_bytes", "limit_and_look_bytes"]

NO_LIMIT: Final = 1 << 62
"""More than any machine has; cgroup v1 says such a number where there is no limit."""

RESERVE_BYTES: Final = 16 << 20
"""Left for what is no heap's: a coordinator is an interpreter of its own, about as large, and
another must be able to start. At most an eighth of the limit, lest small cgroups have nothing."""


class _Names(NamedTuple):
    """The files of a cgroup's memory controller, and what of memory.stat is cache of files."""

    limit: str
    usage: str
    cache: tuple[str, ...]


_V1 = _Names(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_V2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


LOOK_SHARE: Final = 16
"""After which part of what was left the coordinator looks again: before fifteen times as much can
have been taken beside the heap. To fill 8 GiB takes a hundred looks, of a fifth of a ms each."""


def first_limit_bytes(config: Config) -> int:
    """Return what a new heap may hold until its coordinator looks, for this process's cgroup."""
    limit, look = limit_and_look_bytes(0, Cgroup().left_bytes(), config)
    return min(limit, look)


def limit_and_look_bytes(
    held_bytes: int, left_bytes: int | None, config: Config
) -> tuple[int, int]:
    """Return the most that a heap may hold now, and what it holds when to look at that again.

    Args:
        held_bytes: what it holds.
        left_bytes: what `Cgroup.left_bytes` says.
        config: the heap's.
    """
    own = config.memory_limit_bytes or NO_LIMIT
    if left_bytes is None:
        return own, own
    return min(own, held_bytes + left_bytes), held_bytes + left_bytes // LOOK_SHARE


class Cgroup:
    """The cgroup that this process is in when this is made, and those above it.

    Args:
        root: where /proc and the mounted cgroup file systems are looked for.
    """

    def __init__(self, root: str = "") -> None:
        self._found = tuple(_cgroups(root))

    def left_bytes(self) -> int | None:
        """Return what the cgroup may still take, bytes; None: nothing limits it.

        The file cache can be dropped, so it counts as left. Files that cannot be read limit
        nothing. Cost: some 15 us for each cgroup, 60 us for one that has a limit.
        """
        left: list[int] = []
        for directory, names in self._found:
            with contextlib.suppress(OSError, ValueError):
                left.append(_left_bytes(directory, names))
        return min(left, default=None)


def _left_bytes(directory: str, names: _Names) -> int:
    """Raises ValueError where there is no limit: v2 says "max"."""
    limit = int(_read(f"{directory}/{names.limit}"))
    if limit >= NO_LIMIT:
        raise ValueError("no limit")
    usage = int(_read(f"{directory}/{names.usage}"))
    stat = dict(line.split(" ", 1) for line in _read(f"{directory}/memory.stat").splitlines())
    cache = sum(int(stat.get(name, 0)) for name in names.cache)
    reserve = min(RESERVE_BYTES, limit // 8)
    return max(limit - max(usage - cache, 0) - reserve, 0)


def _cgroups(root: str) -> Iterator[tuple[str, _Names]]:
    """Find the cgroup of this process and those above it, as far as they are mounted."""
    with contextlib.suppress(OSError, ValueError):
        paths = _memory_paths(root)
        for line in _read(f"{root}/proc/self/mountinfo").splitlines():
            mount, _, source = line.partition(" - ")
            within, point = mount.split()[3:5]
            kind, _, options = source.split()[:3]
            is_v1 = kind == "cgroup" and "memory" in options.split(",")
            if (is_v1 or kind == "cgroup2") and is_v1 in paths:
                top = root + point.replace(r"\040", " ")
                for directory in _upwards(top, within, paths[is_v1]):
                    yield directory, _V1 if is_v1 else _V2


def _memory_paths(root: str) -> dict[bool, str]:
    """Return this process's path in the hierarchy that counts memory, by whether that is v1."""
    paths = {}
    for line in _read(f"{root}/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths[bool(controllers)] = path
    return paths


def _upwards(top: str, within: str, path: str) -> Iterator[str]:
    """Walk from a cgroup's directory up to the mount's, which shows the hierarchy from `within`."""
    inside = within == "/" or path == within or path.startswith(within + "/")
    parts = path.removeprefix(within).split("/") if inside and "/.." not in path else []
    names = [name for name in parts if name]
    for depth in range(len(names), -1, -1):
        yield "/".join([top, *names[:depth]])


def _read(path: str) -> str:
    # Not pathlib, and no buffer: a coordinator reads these at each of its turns.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
        return b"".join(parts).decode()
    finally:
        os.close(fd)
