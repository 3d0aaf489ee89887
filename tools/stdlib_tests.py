#!/usr/bin/env python3
"""CPython's own tests of pools and executors, run against shmheap's.

    stdlib_tests.py                          Pool, ProcessPoolExecutor, and plain multiprocessing
                                             after install(); all start methods
    stdlib_tests.py --part pool --method fork
    stdlib_tests.py --only PATTERN           tests whose name contains it
    stdlib_tests.py --json                   one JSON object

Each part runs twice, in processes of its own: as it is, as the control, and with ours in place of
the standard library's. What fails with ours alone is shown, and is the exit status 1, unless it is
a difference that is meant. A CPython that comes without its tests has nothing to run: exit status
2. What each part is: docs/reference/stdlib-tests.md.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
import unittest
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

METHODS = ("fork", "spawn", "forkserver")
SUBJECTS = ("stdlib", "shmheap")
LIMIT_S = 300
"""Of one part: a hang is cut."""

IMPORT = ("from concurrent.futures import ProcessPool", "from shmheap import ProcessPool")
WIRES = "Queue", "Connection", "Picklable", "Manager", "Pool", "Listener"
OUTCOME = "outcome.json"
COLUMNS = "part", "by", "run", "skipped", "of ours made", "fail with both", "meant", "ours alone"
EXECUTORS = "test.test_concurrent_futures"
DELIBERATE = {
    "test_error_at_task_unpickle": "an argument that cannot be unpickled is its task's error",
    "test_exit_at_task_unpickle": "the same: it does not break the executor",
}
"""What is to fail with ours, and why: docs/explanation/pools.md."""
EXECUTOR_MODULES = ("process_pool", "init", "shutdown", "deadlock", "wait", "as_completed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--only", default="", metavar="PATTERN", help="part of a test's name")
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.subject:
        return run_part(options.subject, options.part[0], options.method[0], options.only)
    rows = [
        compared(part, method, options.only, quiet=options.json)
        for part in options.part
        for method in options.method
    ]
    if options.json:
        print(json.dumps({"python": sys.version.split()[0], "rows": rows}, indent=1))
    else:
        show(rows)
    if not any(row["run"] for row in rows):
        print("stdlib_tests: this Python came without tests of these", file=sys.stderr)
        return 2
    return 1 if any(row["ours_alone"] for row in rows) else 0


# One part, with both


def compared(part: str, method: str, only: str, *, quiet: bool) -> dict[str, Any]:
    """Run one part with the standard library's class and with ours."""
    control, ours = (in_child(subject, part, method, only) for subject in SUBJECTS)
    known = set(control["failed"])
    alone = {name: why for name, why in ours["failed"].items() if name not in known}
    meant = {name for name in alone if name.rpartition(".")[2] in DELIBERATE}
    row = {
        "part": part,
        "method": method,
        **{count: ours[count] for count in ("run", "skipped", "made")},
        "failed_control": sorted(known),
        "meant": sorted(meant),
        "ours_alone": {name: why for name, why in alone.items() if name not in meant},
    }
    if not quiet:
        print(f"{part}, {method}: {row['run']} run, {len(row['ours_alone'])} fail with ours alone")
        for name, why in row["ours_alone"].items():
            print(f"--- {name}\n{why}")
    return row


def in_child(subject: str, part: str, method: str, only: str) -> dict[str, Any]:
    """Run one part in a process of its own, in an empty folder: it writes files."""
    command = [sys.executable, __file__, "--subject", subject]
    command += ["--part", part, "--method", method, "--only", only]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(command, stdout=sys.stderr, cwd=folder, timeout=LIMIT_S, check=True)
        except subprocess.SubprocessError as error:
            return {"run": 0, "skipped": 0, "made": 0, "failed": {f"{part}, {method}": str(error)}}
        found: dict[str, Any] = json.loads(Path(folder, OUTCOME).read_bytes())
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"CPython {sys.version.split()[0]}'s tests")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        failed = (len(row[kind]) for kind in ("failed_control", "meant", "ours_alone"))
        counts = row["run"], row["skipped"], row["made"], *failed
        table.add_row(row["part"], row["method"], *map(str, counts))
    Console().print(table)


# In the child


made: list[int] = []
"""One for each pool or executor of ours that a test made."""


def run_part(subject: str, name: str, method: str, only: str) -> int:
    """Run the tests of one part, and write what came of them."""
    faulthandler.dump_traceback_later(LIMIT_S - 30, exit=True)
    part = PARTS[name]
    if subject == "shmheap":
        part.put_in_place()
    chosen = unittest.TestSuite()
    for module in part.modules(method):
        tests = flat(unittest.defaultTestLoader.loadTestsFromModule(module))
        chosen.addTest(
            unittest.TestSuite(
                test
                for test in tests
                if part.has(type(test).__name__, method) and only in test.id()
            )
        )
    result = unittest.TextTestRunner(sys.stderr).run(chosen)
    outcome = {
        "run": result.testsRun,
        "skipped": len(result.skipped),
        "failed": {test.id(): why for test, why in (*result.failures, *result.errors)},
        "made": len(made),
    }
    Path(OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def flat(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    """Iterate over the tests of a suite."""
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flat(test)
        else:
            yield test


class Part(NamedTuple):
    """Some tests, and what is changed for them."""

    modules: Callable[[str], Iterator[types.ModuleType]]
    """Where the tests are, by start method."""
    has: Callable[[str, str], bool]
    """Whether a class of that name is one of them, by start method."""
    put_in_place: Callable[[], object]


def put_in_place() -> None:
    """Have the names of the standard library mean ours."""
    import concurrent.futures.process
    import multiprocessing.context

    from test.support import script_helper  # type: ignore[import-not-found]

    import shmheap

    class ProcessPoolExecutor(shmheap.ProcessPoolExecutor):
        def __init__(self, *args: Any, **named: Any) -> None:
            made.append(1)
            super().__init__(*args, **named)

    def pool(self: Any, *args: Any, **named: Any) -> shmheap.Pool:
        made.append(1)
        named["context"] = self.get_context()
        return shmheap.Pool(*args, **named)

    def assert_python_ok(*args: str, **named: Any) -> Any:
        """A test that starts an interpreter of its own."""
        return original(*(arg.replace(*IMPORT) for arg in args), **named)

    names: Any = multiprocessing
    names.context.BaseContext.Pool = pool
    names.Pool = names.context._default_context.Pool
    names = concurrent.futures
    names.ProcessPoolExecutor = names.process.ProcessPoolExecutor = ProcessPoolExecutor
    original = script_helper.assert_python_ok
    script_helper.assert_python_ok = assert_python_ok


def install() -> None:
    """Have plain multiprocessing send what lies in a heap as handles."""
    import shmheap

    shmheap.install()


def is_of_pools(name: str, _method: str) -> bool:
    """Whether a class tests multiprocessing.Pool."""
    others = name.startswith(("WithThreads", "WithManager"))
    return ("Pool" in name and not others) or name == "TestInitializers"


def is_of_executors(name: str, method: str) -> bool:
    """Whether a class tests ProcessPoolExecutor by this start method."""
    of = [m for m in METHODS if name.startswith("ProcessPool" + m.capitalize())]
    return max(of, key=len, default=None) == method


def is_of_wires(name: str, _method: str) -> bool:
    """Whether a class tests what pickles by multiprocessing's reducers."""
    return any(word in name for word in WIRES)


def multiprocessing_modules(method: str) -> Iterator[types.ModuleType]:
    """Return a module with the tests of multiprocessing: a file, for spawned workers."""
    if importlib.util.find_spec("test._test_multiprocessing") is None:
        return
    name = f"tests_by_{method}"
    Path(f"{name}.py").write_text(
        "from test import _test_multiprocessing\n"
        f"_test_multiprocessing.install_tests_in_module_dict(globals(), {method!r})\n",
        encoding="utf-8",
    )
    sys.path.insert(0, str(Path.cwd()))
    yield importlib.import_module(name)


def executor_modules(_method: str) -> Iterator[types.ModuleType]:
    """Return the modules with tests of ProcessPoolExecutor."""
    for name in EXECUTOR_MODULES:
        try:
            yield importlib.import_module(f"{EXECUTORS}.test_{name}")
        except ModuleNotFoundError:
            continue


PARTS = {
    "pool": Part(multiprocessing_modules, is_of_pools, put_in_place),
    "executor": Part(executor_modules, is_of_executors, put_in_place),
    "install": Part(multiprocessing_modules, is_of_wires, install),
}


if __name__ == "__main__":
    sys.exit(main())
