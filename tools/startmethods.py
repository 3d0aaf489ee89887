#!/usr/bin/env python3
"""Which start method works in which situation, on every CPython of this machine.

    startmethods.py                      every CPython from 3.11 up: pyenv's, and those on PATH
    startmethods.py --python PATH ...    these; one that has shmheap is taken as it is
    startmethods.py --json               the cells, as one JSON object

An interpreter without shmheap gets a temporary virtual environment, into which the wheel of this
source tree is installed: one wheel for all of them. Each cell is a check in processes of its own
(tests/support/start_cells.py): contents are compared, and the heap is sound and empty at the end.
Exit status 1 if a cell is not what it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CELLS = ROOT / "tests" / "support" / "start_cells.py"
sys.path.insert(0, str(CELLS.parent))

OLDEST = (3, 11)
LIMIT_S = 180
"""A cell ends itself earlier, with its stacks, if it hangs."""


@dataclass(frozen=True)
class Cell:
    """What one check said.

    Attributes:
        python: version of the interpreter.
        outcome: "ok", "refused" or "FAILED".
        why: the error's type if refused; what went wrong if failed.
        right: whether it is what it must be.
    """

    python: str
    method: str
    situation: str
    outcome: str
    why: str
    right: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 all as it must be, 1 not, 2 could not look."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--python", nargs="+", metavar="PATH", help="the interpreters to try")
    options = parser.parse_args(argv)
    found = options.python or list(pythons())
    try:
        with tempfile.TemporaryDirectory() as folder:
            ready = [prepared(python, Path(folder)) for python in found]
            cells = [cell for python in ready for cell in cells_of(python, quiet=options.json)]
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"startmethods: {error}", file=sys.stderr)
        return 2
    wrong = sum(not cell.right for cell in cells)
    if options.json:
        print(json.dumps({"cells": [asdict(cell) for cell in cells], "wrong": wrong}, indent=1))
    else:
        print(f"{len(cells) - wrong} of {len(cells)} cells are as they must be")
    return 1 if wrong or not cells else 0


def pythons() -> Iterator[str]:
    """One CPython of each version, from `OLDEST` up, that has a stable ABI."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    paths = [str(path) for path in sorted(pyenv.glob("versions/*/bin/python3"))]
    paths += filter(None, (shutil.which(f"python3.{minor}") for minor in range(OLDEST[1], 31)))
    seen: set[tuple[int, ...]] = set()
    for path in [*paths, sys.executable]:
        version = usable_version(path)
        if version is not None and version[:2] not in seen:
            seen.add(version[:2])
            yield path


def usable_version(python: str) -> tuple[int, ...] | None:
    """The version of an interpreter; None if it is older, another Python, or free-threaded."""
    code = (
        "import sys, sysconfig, json; print(json.dumps([sys.implementation.name,"
        "bool(sysconfig.get_config_var('Py_GIL_DISABLED')), *sys.version_info[:3]]))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        return None
    name, free_threaded, *version = json.loads(done.stdout)
    usable = name == "cpython" and not free_threaded and tuple(version) >= OLDEST
    return tuple(version) if usable else None


def prepared(python: str, folder: Path) -> str:
    """An interpreter that has shmheap: this one, or that of a new virtual environment."""
    if has_shmheap(python):
        return python
    venv = folder / f"venv-{abs(hash(python))}"
    run(python, "-m", "venv", str(venv))
    wheels = folder / "wheels"
    ours = str(venv / "bin" / "python")
    if not wheels.exists():
        pip(ours, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT))
    pip(ours, "install", *map(str, wheels.glob("*.whl")))
    return ours


def has_shmheap(python: str) -> bool:
    """Whether it has the package with its core: the source folder alone has none."""
    command = [python, "-P", "-c", "import shmheap"]
    return subprocess.run(command, capture_output=True).returncode == 0


def pip(python: str, *args: str) -> None:
    """Run an interpreter's pip."""
    run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", *args)


def run(*command: str) -> None:
    """Run a command whose output belongs to nobody's JSON."""
    subprocess.run(command, check=True, stdout=sys.stderr)


def cells_of(python: str, *, quiet: bool) -> list[Cell]:
    """Every cell of one interpreter; shown as a table unless quiet."""
    from start_cells import METHODS, RAW_FORKS, SITUATIONS

    version = ".".join(map(str, usable_version(python) or ()))
    table = Table("method", *SITUATIONS, title=f"CPython {version}")
    cells: list[Cell] = []
    for method in (*METHODS, *RAW_FORKS):
        row = [look(python, version, method, situation) for situation in SITUATIONS]
        table.add_row(method, *(f"{cell.outcome} {cell.why}".strip() for cell in row))
        cells += row
    if not quiet:
        Console().print(table)
    return cells


def look(python: str, version: str, method: str, situation: str) -> Cell:
    """Run one cell."""
    from start_cells import expected

    done = subprocess.run(
        [python, "-P", str(CELLS), method, situation],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    try:
        said = json.loads(done.stdout)
    except ValueError:
        said = {"outcome": "FAILED", "why": f"status {done.returncode}: {done.stderr[-2000:]}"}
    outcome, why = said["outcome"], said["why"]
    right = f"{outcome} {why}".strip() == expected(method, situation)
    return Cell(version, method, situation, outcome, why, right)


if __name__ == "__main__":
    sys.exit(main())
