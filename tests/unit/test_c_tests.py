"""The C tests of the core, built without sanitizers; `.ci/run` runs them with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "gcc")) is None, reason="there is no C compiler"
)
@pytest.mark.parametrize(
    "test",
    ["pages", "blocks", "nodes", "graphs", "colls", "threads", "death", "bytes", "oracle"],
)
def test_the_core_without_python(test: str) -> None:
    run = subprocess.run(
        [ROOT / "tests" / "c" / "run.sh", "plain", test],
        env={**os.environ, "SH_TEST_SCALE": "0.3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert re.search(r"^[1-9]\d* passed, 0 failed$", run.stdout, re.MULTILINE), run.stdout
