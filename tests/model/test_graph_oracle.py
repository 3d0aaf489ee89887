"""A graph changed by processes while it is collected, against a marker of its own; and the control.

10^7 mutations are for tools/graphs.py by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "graphs.py"


def graphs(*options: str) -> Any:
    command = [sys.executable, "-P", str(TOOL), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_just_what_can_be_reached_lives() -> None:
    found = graphs("--no-control", "--mutations", "250000")
    run = found["run"]
    assert found["ok"], f"seed {found['seed']}: {run['failures']}"
    assert run["mutations"] >= 250000
    for what in ("looks", "stale", "reopened", "collections", "rounds", "reached"):
        assert run[what] > 0, what


@pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "gcc")) is None, reason="there is no C compiler"
)
def test_a_collector_without_barrier_is_found() -> None:
    found = graphs("--control")
    assert found["control"]["failures"]
    assert found["ok"]
