from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from shmheap.stats import GCReport, GCTrigger, HeapStats, ScavengeReport, ScavengeTrigger

GO_2012 = ["heap_sys", "heap_idle", "heap_inuse", "heap_objects", "heap_released", "last_gc"]
OURS = [
    "heap_alloc",
    "mallocs",
    "frees",
    "next_gc",
    "num_gc",
    "num_forced_gc",
    "pause_total_ns",
    "pause_ns",
    "leases",
]


def test_stats_have_the_names_of_2012_and_ours() -> None:  # S1, S16
    assert {*GO_2012, *OURS} <= {field.name for field in dataclasses.fields(HeapStats)}


@pytest.mark.parametrize("kind", [HeapStats, GCReport, ScavengeReport])
def test_they_are_frozen(kind: type) -> None:
    value = kind(**{field.name: 0 for field in dataclasses.fields(kind)})
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, 1)


@pytest.mark.parametrize("trigger", get_args(GCTrigger))
def test_a_gc_report_travels_as_integers(trigger: GCTrigger) -> None:
    report = GCReport(
        cycle=1,
        trigger=trigger,
        marked=2,
        swept=3,
        freed_bytes=4,
        freed_dead_bytes=5,
        freed_lease_bytes=6,
        pause_max_ns=7,
        duration_ns=8,
    )
    fields = report.as_fields()
    assert all(type(number) is int for number in fields)
    assert GCReport.from_fields(fields) == report


@pytest.mark.parametrize("trigger", get_args(ScavengeTrigger))
def test_a_scavenge_report_travels_as_integers(trigger: ScavengeTrigger) -> None:
    report = ScavengeReport(released_bytes=10, runs=20, duration_ns=30, trigger=trigger)
    fields = report.as_fields()
    assert all(type(number) is int for number in fields)
    assert ScavengeReport.from_fields(fields) == report


@pytest.mark.parametrize("kind", [GCReport, ScavengeReport])
@pytest.mark.parametrize("fields", [(), (1,) * 20])
def test_another_number_of_fields_is_refused(
    kind: type[GCReport] | type[ScavengeReport], fields: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="values to unpack"):
        kind.from_fields(fields)
