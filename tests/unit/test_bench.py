"""The benchmark tool: what its JSON has. Not what it measures: a benchmark is not a test."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def run_bench(*arguments: str) -> Any:
    command = [sys.executable, "-P", str(TOOLS / "bench.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS / "bench"))
    return importlib.import_module("bench_common")


def check_frame(found: Any, command: str) -> None:
    assert found["command"] == command
    assert {"cpus", "kernel", "python", "numpy", "shmheap", "load"} <= found["machine"].keys()
    fields = {"what", "value", "unit", "must", "aim", "at_least", "reached"}
    assert found["rows"]
    assert all(fields == row.keys() for row in found["rows"])


def test_alloc_has_every_part() -> None:
    found = run_bench("alloc", "--quick", "--json")
    check_frame(found, "alloc")
    assert list(found["peers"]) == ["64", "1024", "4096", "65536", "1048576"]
    for peer in found["peers"].values():
        names = {"shmheap", "shmheap dirty", "bytearray", "multiprocessing.heap", "SharedMemory"}
        assert names <= peer["ns"].keys() == peer["best_ns"].keys()
        assert "shmheap / bytearray" in peer["ratios"]
    scaling = found["scaling"]
    assert "skipped" in scaling or {"quotient", "quotient_cpu", "blocked"} <= scaling.keys()
    for points in found["free_spans"].values():
        assert [point["free_spans"] for point in points] == [10, 100]
        assert points[0]["ratio"] == 1
    pages = found["free_spans_c"]
    assert "skipped" in pages or [run["free_spans"] for run in pages["runs"]] == [10, 100]


def test_memory_has_every_part() -> None:
    found = run_bench("memory", "--quick", "--json")
    check_frame(found, "memory")
    assert len(found["held"]) == 3
    for part in found["held"]:
        assert part["filled_bytes"] >= found["total_bytes"]
        assert 0 <= part["share"] < 1
    assert {"bytearray (malloc)", "multiprocessing.heap"} == {
        peer["name"] for peer in found["peers_held"]
    }
    assert found["release"]["released_bytes"] >= found["total_bytes"]
    assert found["metadata"]["in_use_bytes"] == found["total_bytes"]
    assert found["create"]["ms"] > 0
    assert found["mismatched_pages"] == 0


def test_a_command_is_needed() -> None:
    command = [sys.executable, str(TOOLS / "bench.py")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_each_loop_has_its_own_code(common: Any) -> None:
    assert common.new_loop().__code__ is not common.new_loop().__code__


def test_a_loop_calls_as_often_as_asked(common: Any) -> None:
    seen: list[object] = []
    common.new_loop()(seen.append, 7, 3)
    common.new_loop(dirty=True)(lambda n, zero: seen.append((n, zero)), 8, 2)
    assert seen == [7, 7, 7, (8, False), (8, False)]


def test_a_ratio_is_the_median_of_the_rounds(common: Any) -> None:
    assert common.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == 3.0


@pytest.mark.parametrize(
    ("value", "must", "at_least", "reached"),
    [
        (1.0, 1.3, False, True),
        (1.4, 1.3, False, False),
        (21, 20, True, True),
        (9, None, True, None),
    ],
)
def test_a_row_says_whether_it_is_reached(
    common: Any, value: float, must: float | None, at_least: bool, reached: bool | None
) -> None:
    row = common.Row("what", value, must, at_least=at_least)
    assert row.as_json()["reached"] is reached


def test_takeover_has_every_part() -> None:
    found = run_bench("takeover", "--quick", "--json")
    check_frame(found, "takeover")
    [takeover] = found["takeovers"]
    assert takeover["spans"] == 1000
    for key in ("holds_ms", "answered_ms", "asked_before_it_was_dead_ms"):
        assert takeover[key].keys() == {"p50", "p99", "max"}
    assert takeover["worker"]["operations"] > 0
    begin = found["begin_in_c"]
    assert "skipped" in begin or [run["spans"] for run in begin["runs"]] == [1000, 10000]


def test_lock_has_every_part() -> None:
    found = run_bench("lock", "--quick", "--json")
    check_frame(found, "lock")
    assert len(found["cases"]) == 5
    for case in found["cases"].values():
        assert case.keys() == {"whole_ns", "without_ns", "difference_ns"}
        assert case["whole_ns"] > 0
        assert case["without_ns"] > 0
    assert [row["must"] for row in found["rows"]] == [10, 10, 10, None, None]


def test_gc_has_every_part() -> None:
    found = run_bench("gc", "--quick", "--json")
    check_frame(found, "gc")
    assert [one["shape"] for one in found["cycles"]] == ["graph", "tree"]
    for one in found["cycles"]:
        assert one["blocks"] == 10_000
        assert one["marked_per_s"] > 0
        assert one["swept_garbage_per_s"] > 0
        assert one["go"] == {} or one["go"]["marked_per_s"] > 0
    quantiles = {"p50_ns", "p99_ns", "p9999_ns", "max_ns"}
    assert found["waits"]["idle"].keys() == found["waits"]["cycle"].keys() == quantiles
    assert len(found["barrier"]) == 4
    limits = {(row["must"], row["aim"]) for row in found["rows"]}
    assert {(5, 20), (1000, 100), (5, 1)} <= limits


def test_quantiles_of_few_values_are_values(common: Any) -> None:
    quantiles = importlib.import_module("bench_takeover").quantiles
    assert quantiles([3.0]) == {"p50": 3.0, "p99": 3.0, "max": 3.0}
    assert quantiles([float(n) for n in range(200, 0, -1)]) == {
        "p50": 100.5,
        "p99": 198,
        "max": 200,
    }
    assert quantiles([1.0, 2.0, 9.0])["p99"] == 9.0


def test_collections_has_every_part() -> None:
    found = run_bench("collections", "--quick", "--json")
    check_frame(found, "collections")
    kinds = ("int", "str", "bytes of 100", "nested")
    assert len(found["cases"]) == 8 * len(kinds)
    for one in found["cases"].values():
        assert {"dict, list", "Manager"} <= one["ns"].keys() == one["scaled_ns"].keys()
    for kind in ("int", "str", "bytes of 100"):
        assert found["cases"][f"dict get {kind}"]["ratios"]["shmheap"] == 1
        assert "shmheap" in found["cases"][f"list append {kind}"]["ns"]
    scaling = found["scaling"]
    assert "skipped" in scaling or len(scaling) == 4
    limits = {(row["must"], row["aim"]) for row in found["rows"]}
    assert {(300, 150), (500, 250), (400, 150), (50, 200)} <= limits


def test_arrays_has_every_part() -> None:
    found = run_bench("arrays", "--quick", "--json")
    check_frame(found, "arrays")
    assert len(found["arrays"]) == 6
    for one in found["arrays"].values():
        assert list(one["ns"]) == ["numpy.empty", "in the block", "heap.empty"]
    assert {(row["must"], row["aim"]) for row in found["rows"]} == {(1.1, 1.0), (50, 10)}


def test_the_clock_of_another_process_is_its_own(common: Any) -> None:
    clock = importlib.import_module("bench_colls")._clock_of(os.getpid())
    before = time.process_time_ns()
    assert before <= clock() <= time.process_time_ns()


def test_pool_has_every_part() -> None:
    found = run_bench("pool", "--quick", "--json", "--peers", "Pool")
    check_frame(found, "pool")
    assert found["left_out"] == []
    assert len({one["nbytes"] for one in found["transfers"]}) > 1
    for one in found["transfers"]:
        names = {"shmheap, heap arrays", "shmheap, plain arrays", "Pool", "memcpy each way"}
        assert names <= one["ms"].keys() == one["memcpys"].keys()
        assert one["best_peer"] == "Pool"
    kinds = {(one["how"], one["tasks"], one["chunks"]) for one in found["small"]}
    assert len(kinds) == len(found["small"]) == 9
    assert {"shmheap, heap arrays", "Pool"} <= found["shared"].keys()
    assert found["peaks"].keys() == found["transfers"][0]["ms"].keys() - {
        "memcpy each way",
        "shmheap, 1 byte",
    }
    assert found["peaks"]["shmheap, heap arrays"]["pss_shmem"] > 1
    assert found["left"]["used_bytes"] > found["left"]["held_bytes"]
    assert all(one["us"].keys() == {"heap", "pipe"} for one in found["threshold"])
    assert {name: one["count"] for name, one in found["deaths"].items()} == {
        "Pool": 2,
        "ProcessPoolExecutor": 2,
    }
