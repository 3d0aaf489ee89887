"""Deaths at system calls: a few of what tools/crashpoints.py tries, and that none is forgotten."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "crash-points.md"


def run_tool(*arguments: str) -> Any:
    command = [sys.executable, "-P", str(ROOT / "tools" / "crashpoints.py"), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def run_script(script: str) -> str:
    """A process of its own, in which no other thread runs and no heap is open."""
    path = f"import sys; sys.path.append({str(ROOT / 'tests' / 'support')!r})\n"
    command = [sys.executable, "-P", "-c", path + script]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


ATTACH = """
import json, os
from crash_points import PEER, Case, play
cases = [Case("attach", PEER, at) for at in range(26, 29)]
print(json.dumps([(done.call, done.failure) for _, done in play(cases, os.cpu_count())]))
"""


def test_deaths_of_a_share_are_survived() -> None:
    found = run_tool("--op", "create", "--op", "close", "--share", "1/30")
    assert [failure for row in found["rows"] for failure in row["failures"]] == []
    assert found["calls"] > 50, "they are counted, each of them"
    assert found["tried"] == found["survived"] >= 4


def test_attaching_asked_for_its_pid_under_the_registry_lock() -> None:
    """Who was stopped there kept a successor of the coordinator from collecting (I-4)."""
    played = json.loads(run_script(ATTACH))
    assert "getpid" in [call for call, _ in played]
    assert [failure for _, failure in played if failure] == []


def test_every_named_point_is_on_the_page_and_somebody_dies_or_acts_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "shmheap" / "csrc").rglob("*.c"))
    sources += (ROOT / "shmheap" / "csrc" / "core.h").read_text()
    named = set(re.findall(r'SH_CRASH\("([^"]+)"\)', sources))
    tests = "".join(path.read_text() for path in (ROOT / "tests" / "c").glob("test_*.c"))
    page = PAGE.read_text()
    assert len(named) > 20
    assert {point for point in named if f"`{point}`" not in page} == set()
    assert {point for point in named if f'"{point}"' not in tests} == set()
    assert set(re.findall(r"`(\w+:\w+)`", page)) == named


def test_every_operation_is_on_the_page() -> None:
    listed = run_script("import crash_scenes; print(*crash_scenes.OPERATIONS)").split()
    page = PAGE.read_text()
    assert {name for name in listed if f"`{name}`" not in page} == set()
