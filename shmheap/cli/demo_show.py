"""How the demo shows itself: progress on stderr, a table on stdout, a plot in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from shmheap.cli.demo_meter import Phase, Sample
from shmheap.cli.show import print_table

__all__ = ["Screen", "draw", "print_phases", "require_plot"]

MIB = 1 << 20
HEADINGS = (
    "MiB",
    "in use",
    "idle",
    "released",
    "kernel\nholds",
    "meta-\ndata",
    "PSS of\nall",
    "bystander\nRssShmem",
    "pages\nwrong",
)


class Screen:
    """Tells on stderr what is going on; with `quiet` nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, markup=False)

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def bar(self, text: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
        """Show a bar while the context lasts; gives the function that moves it on, by bytes.

        Where stderr is no terminal there is no bar.
        """
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
        )
        hidden = self._console.quiet or not self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=hidden) as progress:
            task = progress.add_task(text, total=total_bytes)
            yield lambda nbytes: progress.advance(task, nbytes)


def print_phases(phases: Sequence[Phase]) -> None:
    """Print the table, in MiB."""
    print_table(HEADINGS, map(_row, phases))


def _row(row: Phase) -> list[str]:
    sizes = (
        row.in_use_bytes,
        row.idle_bytes,
        row.released_bytes,
        row.held_bytes,
        row.metadata_bytes,
        row.pss_bytes,
        row.bystander_rss_shmem_bytes,
    )
    return [row.phase, *(f"{nbytes / MIB:.1f}" for nbytes in sizes), str(row.mismatched_pages)]


def require_plot(file: str) -> None:
    """See that a plot can be made, before there is anything to draw. ImportError, ValueError."""
    if find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'shmheap[plot]'")
    from matplotlib.backend_bases import FigureCanvasBase

    path = Path(file).absolute()
    if not path.parent.is_dir():
        raise ValueError(f"--plot: there is no directory {path.parent}")
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise ValueError(f"--plot: {path.suffix} is none of {', '.join(sorted(known))}")


def draw(file: str, samples: Sequence[Sample], phases: Sequence[Phase]) -> None:
    """Draw held, in use and released over time, with a mark at each phase."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="time in s", ylabel="memory in MiB", title="shmheap demo: the data area over time"
    )
    at = [one.at_s for one in samples]
    axes.plot(at, [one.held_bytes / MIB for one in samples], label="held by the kernel", lw=2)
    axes.plot(at, [one.in_use_bytes / MIB for one in samples], label="in use", ls="--")
    axes.plot(at, [one.released_bytes / MIB for one in samples], label="released", ls=":")
    top = axes.get_ylim()[1]
    for i, row in enumerate(phases):
        side: Literal["left", "right"] = "left" if i % 2 else "right"  # some are close together
        axes.axvline(row.at_s, color="0.8", lw=1, zorder=0)
        axes.text(row.at_s, top, f"{row.phase} ", rotation=90, va="top", ha=side, color="0.4")
    axes.legend(loc="center right")
    figure.savefig(file)
