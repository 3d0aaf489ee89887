from __future__ import annotations

import dataclasses
import io
import re

import pytest

from shmheap.coordinator.trace import Trace, lines
from shmheap.stats import HeapStats

MIB = 1 << 20


def stats(**values: int) -> HeapStats:
    fields = dict.fromkeys((field.name for field in dataclasses.fields(HeapStats)), 0)
    return HeapStats(**{**fields, "pause_ns": (), **values})  # type: ignore[arg-type]


HEAP = stats(
    heap_inuse=2 * MIB + 1,
    heap_idle=62 * MIB - 1,
    heap_sys=64 * MIB,
    heap_released=61 * MIB + MIB // 2,
)


def test_the_three_forms() -> None:  # S14
    assert list(lines(3, forced=True, released_bytes=20 * MIB + 5, stats=HEAP)) == [
        "scvg3: GC forced",
        "scvg3: 20 MB released",
        "scvg3: inuse: 2, idle: 61, sys: 64, released: 61, consumed: 2 (MB)",
    ]


def test_what_did_not_happen_is_not_printed() -> None:
    [summary] = lines(0, forced=False, released_bytes=0, stats=HEAP)
    assert summary.startswith("scvg0: inuse:")


def test_less_than_a_megabyte_was_released_too() -> None:
    assert "scvg0: 0 MB released" in lines(0, forced=False, released_bytes=4096, stats=HEAP)


def test_numbers_are_decimal() -> None:
    big = stats(heap_sys=5000 * MIB, heap_released=1000 * MIB)
    text = list(lines(11, forced=False, released_bytes=1000 * MIB, stats=big))
    assert text[0] == "scvg11: 1000 MB released"
    assert "sys: 5000, released: 1000, consumed: 4000 (MB)" in text[1]


def test_programs_that_read_the_traces_of_2012_read_this() -> None:
    reader = re.compile(
        r"scvg\d+: inuse: (\d+), idle: (\d+), sys: (\d+), released: (\d+), consumed: (\d+) \(MB\)"
    )
    [summary] = lines(0, forced=False, released_bytes=0, stats=HEAP)
    assert reader.fullmatch(summary)


def test_wake_ups_are_numbered_from_0() -> None:
    out = io.StringIO()
    trace = Trace(out)
    for forced in (False, True):
        trace.wakeup(forced=forced, released_bytes=0, stats=HEAP)
    assert [line.split(":")[0] for line in out.getvalue().splitlines()] == [
        "scvg0",
        "scvg1",
        "scvg1",
    ]


@pytest.mark.parametrize("out", [None, io.StringIO()])
def test_without_somewhere_to_print_it_is_off(out: io.StringIO | None) -> None:
    trace = Trace(out)
    assert trace.on is (out is not None)
    trace.wakeup(forced=True, released_bytes=0, stats=HEAP)
    assert out is None or out.getvalue().count("\n") == 2
