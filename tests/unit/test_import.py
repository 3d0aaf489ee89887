"""Where shmheap cannot be used, importing it says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import shmheap

ROOT = Path(__file__).parents[2]


def said(code: str, *options: str, cwd: Path | None = None) -> str:
    """What the last line of a failed import says."""
    done = subprocess.run(
        [sys.executable, *options, "-c", f"import sys; {code}; import shmheap"],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("system", ["darwin", "win32", "freebsd14"])
def test_on_another_system_it_says_that_it_supports_linux_only(system: str) -> None:
    expected = f"ImportError: shmheap supports Linux only, not {system}"
    assert said(f"sys.platform = {system!r}", "-P").startswith(expected)


def test_a_free_threaded_build_says_why_it_cannot() -> None:
    expected = "ImportError: shmheap does not support free-threaded builds"
    assert said("sys.abiflags = 't'", "-P").startswith(expected)


def test_the_source_without_its_core_says_where_that_is(tmp_path: Path) -> None:
    package = tmp_path / "shmheap"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "shmheap/__init__.py").read_text())
    assert said("0", "-S", cwd=tmp_path).startswith(f"ImportError: {package} is shmheap's source")


def test_what_is_imported_when_asked_for_is_listed() -> None:
    """Shells complete names by it."""
    code = "import shmheap; print('shmheap.pool' in sys.modules, *dir(shmheap))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; {code}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    loaded, *names = done.stdout.split()
    assert loaded == "False"
    assert set(shmheap.__all__) <= set(names)
