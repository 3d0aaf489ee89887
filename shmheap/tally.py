"""What became of the buffers of tasks, and a hint at what can be better."""

from __future__ import annotations

import logging
from typing import Final

from shmheap.payload import NONE, Counts
from shmheap.stats import PoolStats, Traffic

__all__ = ["ARGUMENTS", "RESULTS", "Tally"]

ARGUMENTS: Final = 0
RESULTS: Final = 1
"""The two directions."""

LARGE_BYTES = 1 << 20
"""A copy of so many bytes is worth a hint."""

LOG = logging.getLogger("shmheap")
HINTS = (
    "%d bytes of an argument were copied into the heap. What lies there is not copied: make it "
    "with pool.heap.empty() or pool.heap.put(), or with shmheap.plugins.numpy.allocator(pool.heap)",
    "%d bytes of a result were copied into the heap. What lies there is not copied: write it into "
    "an array that was an argument, or have NumPy make it, in a pool with allocator=True",
)


class Tally:
    """Counts what became of buffers, and gives a hint at the first large copy."""

    def __init__(self) -> None:
        self._sums = [0] * len(NONE), [0] * len(NONE)
        self._hinted = False
        self.tasks = self.lost = 0

    def add(self, direction: int, counts: Counts) -> None:
        """Count what one value had. Each direction by one thread only."""
        self._sums[direction][:] = map(sum, zip(self._sums[direction], counts, strict=True))
        if counts.copied_bytes >= LARGE_BYTES and not self._hinted:
            self._hinted = True
            LOG.info(HINTS[direction], counts.copied_bytes)

    def stats(self) -> PoolStats:
        """Return the sums so far."""
        arguments, results = (Traffic(**Counts(*sums)._asdict()) for sums in self._sums)
        return PoolStats(arguments=arguments, results=results, tasks=self.tasks, lost=self.lost)
