"""The pools' soak: a short one, and that it notices what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PLAYER = TOOLS / "soak" / "poolsoak_player.py"


def test_nothing_comes_of_some_rounds() -> None:
    argv = [sys.executable, "-P", TOOLS / "poolsoak.py", "--rounds", "4", "--seed", "12", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert found["rounds"] == 4
    assert found["tasks"] >= found["right"] > 0


def test_a_wrong_byte_is_told_with_its_round() -> None:
    wrong = f"""
import sys; sys.path.insert(0, {str(PLAYER.parent)!r})
import poolsoak_player as player, poolsoak_values as values
values.digest = lambda value, right=values.digest: right(value)[::-1]  # in workers that are forked
player.METHODS = ("fork",)
player.play(1, range(5), killed=True, out=1)
"""
    argv = [sys.executable, "-P", "-c", wrong]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    *_, before, last = map(json.loads, done.stdout.splitlines())
    assert "arrived as something else" in last["failure"]
    assert "heap" in before
