"""How the commands show what they found: sizes, tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

__all__ = ["print_json", "print_pairs", "print_table", "size", "table"]

WIDE = 1000


def size(nbytes: float) -> str:
    """Bytes for people: three or four digits, in a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def print_json(value: Mapping[str, object]) -> None:
    """Print one JSON object, on one line."""
    print(json.dumps(value))


def table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """A table; the first column is text, the others are numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(headings):
        justify: JustifyMethod = "right" if i else "left"
        made.add_column(heading, justify=justify, vertical="bottom", overflow="fold")
    for row in rows:
        made.add_row(*map(str, row))
    return made


def print_table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table on stdout."""
    _console().print(table(headings, rows))


def print_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values, a line each."""
    made = Table.grid(padding=(0, 2))
    for name, value in pairs:
        made.add_row(name, str(value))
    _console().print(made)


def _console() -> Console:
    """stdout; where it is no terminal, a program or a file takes lines of any length."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDE
    return console
