"""Death at every instruction: a few of each kind. .ci/run tries a share of tools/killpoints.py."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "killpoints.py"

pytestmark = [
    pytest.mark.skipif(
        shutil.which(os.environ.get("CC", "gcc")) is None, reason="there is no C compiler"
    ),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the harness steps x86-64 only"),
]


def run_tool(*arguments: str) -> Any:
    command = [sys.executable, "-P", str(TOOL), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def failures(found: Any) -> list[str]:
    return [failure for row in found["rows"] for failure in row["failures"]]


def test_every_death_of_a_share_is_survived() -> None:
    found = run_tool("--share", "1/400", "--doubles", "0", "--kills", "0")
    total = found["total"]
    assert failures(found) == []
    assert found["ok"]
    assert found["operations"] >= 20
    assert total["tried"] == total["survived"] >= 500


def test_builds_that_break_an_invariant_do_not_survive() -> None:
    found = run_tool("--controls")
    assert [control["found"] for control in found["controls"]] == [True, True]


def test_the_recovery_may_die_too_and_real_deaths_leave_what_copies_have() -> None:
    found = run_tool("--op", "root-replace", "--share", "3/5", "--doubles", "1", "--kills", "5")
    total = found["total"]
    assert failures(found) == []
    assert total["double_tried"] == total["double_survived"] > 1000
    assert total["kills_tried"] == total["kills_survived"] == 15
    assert total["kills_like_copy"] >= 3
    assert found["recovery_us"]["mutex"]["n"] > 0
