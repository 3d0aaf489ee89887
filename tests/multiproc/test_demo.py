"""`shmheap demo`: its numbers, its plan, its end."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from shmheap import arena
from shmheap.cli import demo as demo_module
from shmheap.cli import demo_show, main
from shmheap.cli.demo_files import find_files, plan_load

MIB = 1 << 20
PHASES = ["empty", "loaded", "computed", "dropped", "collected", "scavenged"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small input: text, noise, an empty file, one of one byte, and a link."""
    files = tmp_path / "input"
    (files / "below").mkdir(parents=True)
    (files / "text").write_bytes(b"the quick brown fox\n" * 20_000)
    (files / "below" / "noise").write_bytes(os.urandom(300_000))
    (files / "below" / "byte").write_bytes(b"x")
    (files / "empty").touch()
    (files / "link").symlink_to(files / "text")
    return files


def command(name: str, folder: Path, *more: str) -> list[str]:
    options = ["--name", name, "--input", str(folder), "--size", "4MiB", *more]
    return [sys.executable, "-P", "-m", "shmheap", "demo", *options]


def run(name: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(name, folder, *more), capture_output=True, text=True, timeout=120)


# The whole of it


def test_the_memory_comes_back_and_the_results_are_right(heap_name: str, folder: Path) -> None:
    done = run(heap_name, folder, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["results_correct"] is True
    assert found["results"] == found["input"]["blocks"] > 3
    assert found["input"]["files"] == 3
    assert 4 * MIB <= found["input"]["bytes"] <= 5 * MIB
    assert found["mismatched_pages"] == 0
    assert found["returned_ratio"] > 0.9
    rows = {row["phase"]: row for row in found["phases"]}
    assert list(rows) == PHASES
    assert rows["loaded"]["held_bytes"] >= found["input"]["bytes"]
    assert rows["computed"]["in_use_bytes"] > rows["loaded"]["in_use_bytes"]
    assert rows["dropped"]["held_bytes"] >= found["input"]["bytes"]
    last = rows["scavenged"]
    sys_bytes = last["in_use_bytes"] + last["idle_bytes"]
    assert last["held_bytes"] == sys_bytes - last["released_bytes"]  # I-10
    see_that_the_bystander_had_everything_and_lost_it(rows)


def see_that_the_bystander_had_everything_and_lost_it(rows: dict[str, dict[str, Any]]) -> None:
    seen = {phase: row["bystander_rss_shmem_bytes"] for phase, row in rows.items()}
    # The kernel keeps RssShmem with a slack of some pages per CPU.
    slack = MIB
    assert seen["empty"] < slack
    for phase in ("loaded", "computed", "dropped"):
        assert seen[phase] > rows[phase]["held_bytes"] - slack
    assert seen["scavenged"] < slack


def test_it_shows_a_table_and_a_plot_and_leaves_no_heap(
    heap_name: str, folder: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "plot.png"
    drawn = find_spec("matplotlib") is not None
    done = run(heap_name, folder, "--workers", "1", *(["--plot", str(plot)] if drawn else []))
    assert done.returncode == 0
    assert plot.exists() == drawn
    assert not drawn or plot.read_bytes().startswith(b"\x89PNG")
    lines = done.stdout.splitlines()
    assert [phase for phase in PHASES for line in lines if line.split()[:1] == [phase]] == PHASES
    assert "pages on which books and kernel disagree: 0" in lines
    assert "a quarter of what is free" in done.stderr
    assert not Path(arena.file_path(heap_name)).exists()


def test_wrong_results_are_told_and_are_status_1(
    heap_name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(demo_module, "digest", lambda _data: next(numbers))
    assert main(command(heap_name, folder, "--json")[4:]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["results_correct"] is False
    assert found["wrong_results"] == found["results"]


def test_ctrl_c_ends_all_processes_and_the_heap(heap_name: str, folder: Path) -> None:
    options = command(heap_name, folder, "--workers", "3")
    with subprocess.Popen(
        options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        assert "blocks" in process.stderr.readline()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # of one that has ended: nothing
    assert (process.returncode, out, err) == (130, "", "shmheap: interrupted\n")
    assert not Path(arena.file_path(heap_name)).exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--workers", "0"), "1 to 16"),
        (("--workers", "17"), "1 to 16"),
        (("--size", "much"), "not a size"),
        (("--size", "0"), "nothing fits"),
        (("--input", "/nowhere"), "/nowhere"),
        (("--directory", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_options_are_told_in_a_line(
    heap_name: str, folder: Path, more: tuple[str, str], says: str
) -> None:
    done = run(heap_name, folder, *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("file", "says"), [("/nowhere/plot.png", "no directory /nowhere"), ("plot.foo", "none of")]
)
def test_a_plot_that_cannot_be_written_was_refused_at_the_end(
    file: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["demo", "--plot", file]) == 2
    assert "shmheap: --plot: " in (said := capsys.readouterr().err)
    assert says in said
    assert "files" not in said, "nothing was loaded"


def test_without_matplotlib_a_plot_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_show, "find_spec", lambda _name: None)
    assert main(["demo", "--plot", "plot.png"]) == 2
    assert "pip install 'shmheap[plot]'" in capsys.readouterr().err


# What is loaded


def test_the_default_is_the_standard_library() -> None:
    found = dict(find_files(None))
    assert os.__file__ in found
    assert all(path.endswith(".py") and nbytes for path, nbytes in found.items())
    assert not any("site-packages" in path for path in found)


def test_empty_files_and_links_are_not_loaded(folder: Path) -> None:
    found = {Path(path).name for path, _ in find_files(str(folder))}
    assert found == {"text", "noise", "byte"}


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to load"):
        find_files(str(tmp_path))


@pytest.mark.parametrize(
    ("sizes", "want", "free", "copies", "nbytes"),
    [
        pytest.param([64, 64], None, 4096, [2, 2], 256, id="several times over"),
        pytest.param([100, 60], None, 4096, [2, 1], 260, id="at least 256 MiB, of whole files"),
        pytest.param([300, 100], None, 4096, [1, 1], 400, id="all, if it is more"),
        pytest.param([64, 64], None, 800, [2, 1], 192, id="at most a quarter"),
        pytest.param([300, 100, 50], None, 800, [0, 1, 1], 150, id="what fits, of more"),
        pytest.param([10, 10], 25, 4096, [2, 1], 30, id="as much as wanted"),
        pytest.param([10, 10], 9999, 120, [2, 1], 30, id="wanted more than a quarter"),
    ],
)
def test_the_plan(
    sizes: list[int], want: int | None, free: int, copies: list[int], nbytes: int
) -> None:
    files = [(str(i), size * MIB) for i, size in enumerate(sizes)]
    load = plan_load(files, None if want is None else want * MIB, free * MIB)
    assert load.copies == tuple((str(i), count) for i, count in enumerate(copies) if count)
    assert load.nbytes == nbytes * MIB
    assert load.limit_bytes == free * MIB // 4


def test_where_nothing_fits_it_says_so() -> None:
    with pytest.raises(ValueError, match="nothing fits"):
        plan_load([("a", MIB)], None, 3 * MIB)
