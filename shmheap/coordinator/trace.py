"""The scavenger's trace, in the three forms that the Go runtime printed from 2012 on.

For each time that the coordinator collected or scavenged, numbered from 0: what it did, if it did,
and then a summary. MB are 2**20 bytes, rounded down, as they were:

    scvg3: GC forced
    scvg3: 16 MB released
    scvg3: inuse: 2, idle: 61, sys: 64, released: 61, consumed: 3 (MB)

"GC forced" stands for a collection that ran because none had for `Config.forced_gc_s`; "consumed"
is what the kernel still holds of the data area: sys - released.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmheap.stats import HeapStats


def lines(number: int, *, forced: bool, released_bytes: int, stats: HeapStats) -> Iterator[str]:
    """Yield the lines of one wake-up."""
    if forced:
        yield f"scvg{number}: GC forced"
    if released_bytes > 0:
        yield f"scvg{number}: {released_bytes >> 20} MB released"
    yield (
        f"scvg{number}: inuse: {stats.heap_inuse >> 20}, idle: {stats.heap_idle >> 20}, "
        f"sys: {stats.heap_sys >> 20}, released: {stats.heap_released >> 20}, "
        f"consumed: {(stats.heap_sys - stats.heap_released) >> 20} (MB)"
    )


class Trace:
    """Numbers the wake-ups and prints their lines.

    Args:
        out: where to; None: nowhere.
    """

    def __init__(self, out: TextIO | None) -> None:
        self._out = out
        self._number = 0

    @property
    def on(self) -> bool:
        """Whether anything is printed: only then are stats worth reading for it."""
        return self._out is not None

    def wakeup(self, *, forced: bool, released_bytes: int, stats: HeapStats) -> None:
        """Print one wake-up's lines in one write, so that another process's do not cut them up."""
        if self._out is None:
            return
        text = lines(self._number, forced=forced, released_bytes=released_bytes, stats=stats)
        self._out.write("".join(f"{line}\n" for line in text))
        self._out.flush()
        self._number += 1
