"""The protocol's models hold, and notice each rule that is broken on purpose."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOCOL = Path(__file__).parent / "protocol"
PATIENCE_S = 900.0
"""Bounds how long a broken run hangs, and decides no test's outcome."""


def run(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ if path is None else os.environ | {"PATH": path}
    return subprocess.run(
        [sys.executable, str(PROTOCOL / "run.py"), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_undo_log() -> None:
    subprocess.run([sys.executable, str(PROTOCOL / "undo.py")], check=True, capture_output=True)


def test_says_what_to_install(tmp_path: Path) -> None:
    done = run("--quick", path=str(tmp_path))
    assert done.returncode == 2
    assert "apt install spin" in done.stderr


needs_spin = pytest.mark.skipif(
    shutil.which("spin") is None or shutil.which("gcc") is None,
    reason="the model checker is not installed: needs spin 6.5 (apt install spin) and gcc",
)


@needs_spin
@pytest.mark.parametrize(
    ("model", "flags"),
    [("gc.pml", ["-DINIT=3", "-DFORK", "-DOPS=1"]), ("pages.pml", ["-DINIT=5"])],
)
def test_a_model_holds(model: str, flags: list[str]) -> None:
    """One instance of each: .ci/run searches all of them, with their controls."""
    done = run("--one", model, "--json", *flags)
    assert done.returncode == 0, done.stderr
    assert [row["verdict"] for row in json.loads(done.stdout)] == ["holds"]


@needs_spin
def test_a_control_that_holds_is_a_failure() -> None:
    """A control without its rule's reason: a death is needed for it to show."""
    done = run("--one", "pages.pml", "--json", "-DBUG_NO_ROLLBACK", "-DINIT=1", "-DOPS=0")
    assert done.returncode == 1, done.stderr
    assert [row["verdict"] for row in json.loads(done.stdout)] == ["holds"]
