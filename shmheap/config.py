"""What a heap can be told, and why each default is what it is.

A Config is frozen, written into the heap's header as JSON when the heap is created, and read from
there by everybody else: all processes of a heap follow the same one.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields

__all__ = ["Config", "parse_size"]

# Ages of pages are kept in tenths of a second: a shorter limit could not be told from none.
SHORTEST_S = 0.1

_UNITS = {
    "": 1,
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", re.ASCII)


def parse_size(size: int | str) -> int:
    """Return a size in bytes from an int of bytes or a string such as "256MiB", "1.5 GB", "4096".

    Units are KiB, MiB, GiB, TiB (powers of 1024), kB, MB, GB, TB (powers of 1000), B or none.

    Raises:
        ValueError: a negative size, a string of another form, an unknown unit.
        TypeError: neither int nor str.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(f"a size is an int of bytes or a str, not {type(size).__name__}")
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"a size cannot be negative: {size}")
        return size
    match = _SIZE.fullmatch(size.strip())
    if match is None or match[2] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ValueError(f"not a size: {size!r} (a number and one of {units}, or bytes)")
    number, unit = match[1], _UNITS[match[2]]
    return round(float(number) * unit) if "." in number else int(number) * unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one heap. Seconds are floats, sizes are bytes or strings like "256MiB".

    Attributes:
        forced_gc_s: a collection is forced when none ran for so long. Two minutes, as in the Go
            runtime: only a collection notices what has gone unused, so this bounds how late.
        scavenge_after_s: a page that stayed unused for so long after a collection saw it goes
            back to the operating system. Five minutes, as in the Go runtime: to give a page back
            and take it again costs microseconds, which a program whose load comes and goes by the
            minute should not pay each time.
        gc_percent: a collection starts when ``heap_alloc`` has grown by so much since the last
            one; negative: growth starts none (the forced ones stay, since ages come from them).
        memory_limit: bytes that the heap may hold of the machine; None: what its cgroup and its
            file system allow, which also bound any limit given here. When the limit is met
            everything idle is released at once, whatever its age, and only then refused.
        lease_grace_s: how long a pickled handle outlives the process that sent it. Thirty
            seconds: long enough for a pipe to be drained, short enough not to be a leak.
        lease_max_s: a pickled handle that nobody unpickled for so long keeps its block no longer,
            from the next collection on, although its sender lives; whoever unpickles it later gets
            StaleHandle if nothing else kept the block. None: for as long as the sender lives, as
            handles may wait in a file or a queue for any time.
        keep: the heap stays when its last user leaves, until it is unlinked.
        directory: where the heap's file is; None: /dev/shm. Any tmpfs will do, and nothing else.
        trace: print the scavenger's trace to the coordinator's stderr, as SHMHEAP_TRACE=1 does.
        log: file that the coordinator logs to; None: nowhere.
        python: interpreter that runs the coordinator; None: the creator's own.
        dump: the heap's memory belongs into the core dumps of its processes. Not by default: a
            dump would hold what all other processes keep there, and be as large.

    Raises:
        ValueError: a number out of range, or not finite.
        TypeError: a value of the wrong type.
    """

    forced_gc_s: float = 120.0
    scavenge_after_s: float = 300.0
    gc_percent: int = 100
    memory_limit: int | str | None = None
    lease_grace_s: float = 30.0
    lease_max_s: float | None = None
    keep: bool = False
    directory: str | None = None
    trace: bool = False
    log: str | None = None
    python: str | None = None
    dump: bool = False

    def __post_init__(self) -> None:
        self._set_seconds("forced_gc_s", at_least=SHORTEST_S)
        self._set_seconds("scavenge_after_s", at_least=SHORTEST_S)
        self._set_seconds("lease_grace_s", at_least=0.0)
        if self.lease_max_s is not None:
            self._set_seconds("lease_max_s", at_least=SHORTEST_S)
        _require("gc_percent", self.gc_percent, int)
        _require("keep", self.keep, bool)
        _require("trace", self.trace, bool)
        _require("dump", self.dump, bool)
        if self.memory_limit is not None:
            self._set("memory_limit", _positive("memory_limit", parse_size(self.memory_limit)))
        # The coordinator runs in another working directory than the heap's creator.
        for name in ("directory", "log"):
            self._set_path(name, absolute=True)
        self._set_path("python", absolute=False)

    @property
    def tick_s(self) -> float:
        """How often the coordinator looks, seconds: no limit is overrun by more than its half.

        Derived, never configured.
        """
        return min(self.forced_gc_s, self.scavenge_after_s) / 2

    @property
    def memory_limit_bytes(self) -> int | None:
        """``memory_limit`` as bytes; None: no limit."""
        return None if self.memory_limit is None else parse_size(self.memory_limit)

    def to_json(self) -> str:
        """Return the JSON that ``from_json`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Config:
        """Return the Config that ``to_json`` wrote. ValueError: it is not the JSON of a Config."""
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError("the JSON of a Config is flat") from None
        if not isinstance(values, dict):
            raise ValueError("the JSON of a Config is an object")
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"Config has no {', '.join(sorted(unknown))}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen: only while it is being made

    def _set_seconds(self, name: str, *, at_least: float) -> None:
        value = getattr(self, name)
        _require(name, value, int, float)
        if not (math.isfinite(value) and value >= at_least):
            raise ValueError(f"{name} must be at least {at_least} seconds and finite, not {value}")
        self._set(name, float(value))

    def _set_path(self, name: str, *, absolute: bool) -> None:
        value = getattr(self, name)
        if value is None:
            return
        _require(name, value, str)
        if not value or "\0" in value:
            raise ValueError(f"{name} is not a path: {value!r}")
        if absolute:
            self._set(name, os.path.abspath(value))


def _require(name: str, value: object, *types: type) -> None:
    # bool is an int to Python, and never one to whoever wrote gc_percent=True.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join(t.__name__ for t in types)
        raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}")


def _positive(name: str, value: int) -> int:
    if value <= 0:
        raise ValueError(f"{name} must be positive, not {value}")
    return value
