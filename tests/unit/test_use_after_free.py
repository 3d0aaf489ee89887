"""Use after free: some pins, and the control. 10^9 are for tools/use_after_free.py by hand."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "use_after_free.py"
PINS = 2_000_000


@pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "gcc")) is None, reason="there is no C compiler"
)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the control relies on its pause")
def test_no_pin_shows_a_wrong_byte_unless_check_and_count_are_apart() -> None:
    command = [sys.executable, "-P", str(TOOL), "--json", "--pins", str(PINS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    run, control = found["run"], found["control"]
    assert run["wrong_bytes"] == 0, run["said"]
    assert run["pins"] >= PINS
    for what in ("stale", "renewed", "kills", "cycles", "punched_bytes"):
        assert run[what] > 0, what
    assert control["wrong_bytes"] > 0
    assert found["ok"]
