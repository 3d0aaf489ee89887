"""The tool that runs CPython's tests against ours: that it runs ours, and that it tells apart."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "stdlib_tests.py"
HAS_TESTS = importlib.util.find_spec("test._test_multiprocessing") is not None


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    return importlib.import_module("stdlib_tests")


@pytest.mark.skipif(not HAS_TESTS, reason="this CPython came without its tests")
def test_a_handful() -> None:
    command = [sys.executable, "-P", str(TOOL), "--part", "pool", "--method", "fork"]
    command += ["--only", "TestPool.test_map", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert row["run"] >= 5
    assert row["made"] >= 1
    assert (row["failed_control"], row["meant"], row["ours_alone"]) == ([], [], {})


def test_what_fails_with_ours_alone(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    meant = f"module.Class.{next(iter(tool.DELIBERATE))}"
    failed = {
        "stdlib": {"module.Class.both": "a"},
        "shmheap": {"module.Class.both": "a", "module.Class.ours": "b", meant: "c"},
    }

    def in_child(subject: str, *_: str) -> dict[str, Any]:
        return {"run": 3, "skipped": 0, "made": 1, "failed": failed[subject]}

    monkeypatch.setattr(tool, "in_child", in_child)
    row = tool.compared("pool", "fork", "", quiet=True)
    assert row["failed_control"] == ["module.Class.both"]
    assert row["meant"] == [meant]
    assert row["ours_alone"] == {"module.Class.ours": "b"}
    assert tool.main(["--part", "pool", "--method", "fork", "--json"]) == 1


def test_a_python_without_tests(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"run": 0, "skipped": 0, "made": 0, "failed": {}}
    monkeypatch.setattr(tool, "in_child", lambda *_: nothing)
    assert tool.main(["--part", "executor", "--json"]) == 2


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ProcessPoolForkExecutorDeadlockTest", "fork"),
        ("ProcessPoolForkserverWaitTests", "forkserver"),
        ("ProcessPoolSpawnWaitTests", "spawn"),
    ],
)
def test_classes_of_executors_by_method(tool: Any, name: str, method: str) -> None:
    assert [m for m in tool.METHODS if tool.is_of_executors(name, m)] == [method]
