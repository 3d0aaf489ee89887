"""A bar for pool.map(..., progress=True). Imported only when asked for."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["watch"]

LOOK_S = 0.1


def watch(result: Any, total: int) -> None:
    """Show how many of a map's items are done, until all are.

    Args:
        result: A MapResult of multiprocessing.pool; its counts are not public, and have been what
            they are since 2008.
        total: How many items there are.
    """
    columns = TextColumn("{task.percentage:>3.0f}%"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=total)
        while not result.ready():
            left = result._number_left * result._chunksize
            progress.update(bar, completed=max(total - left, 0))
            result.wait(LOOK_S)
        progress.update(bar, completed=total)
