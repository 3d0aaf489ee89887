"""Where blocks were made: noted for who tracks, kept as long as the block, in nobody's way else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmheap import Heap, HeapFull, _core, sites
from shmheap.sites import Site, find_sites, is_tracking, track


class Tracking(Heap):
    """A heap as of a process with SHMHEAP_TRACK=1."""


track(Tracking)


@pytest.fixture
def heap() -> Iterator[Tracking]:
    with Tracking.create(capacity="64MiB") as made:
        yield made


def here() -> str:
    """The line that calls this."""
    frame = sys._getframe(1)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def sites_of(heap: Heap) -> set[str]:
    return {site.where for site in find_sites(heap)}


MAKE: dict[str, Callable[[Tracking], tuple[object, str]]] = {
    "alloc": lambda heap: (heap.alloc(10), here()),
    "alloc large": lambda heap: (heap.alloc(200_000, zero=False), here()),
    "put": lambda heap: (heap.put(b"x"), here()),
    "ndarray": lambda heap: (heap.ndarray(10), here()),
    "dict": lambda heap: (heap.dict(value={"a": 1}), here()),
    "list": lambda heap: (heap.list(), here()),
    "a named dict": lambda heap: (heap.dict("d"), here()),
    "a named value": lambda heap: (heap.roots.setdefault("n", (1, 2)), here()),
    "bytes in a list": lambda heap: (heap.list("l", [bytes(100_000)]), here()),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_whatever_makes_a_block_notes_its_caller(
    heap: Tracking, make: Callable[[Tracking], tuple[object, str]]
) -> None:
    kept, line = make(heap)
    assert sites_of(heap) == {line}
    assert kept is not None


def test_a_note_goes_with_its_block(heap: Tracking) -> None:
    block, line = heap.put(bytes(5000)), here()
    assert find_sites(heap) == [Site(block.offset, 5000, line)]
    assert heap.holders(block)[0].allocated_at == line
    offset = block.offset
    block.free()
    assert find_sites(heap) == []
    again = Heap.put(heap, bytes(5000))
    assert again.offset == offset
    assert heap.holders(again)[0].allocated_at == "", "of another block at that place"


def test_who_does_not_track_reads_what_others_noted(heap: Tracking) -> None:
    block, line = heap.put(b"x"), here()
    with Heap.attach(heap.name) as other:
        unnoted = other.put(b"y")
        assert other.holders(block)[0].allocated_at == line
        assert other.holders(unnoted)[0].allocated_at == ""
        assert sites_of(other) == {line}


def test_nothing_is_in_the_way_of_who_does_not_track() -> None:
    assert not vars(Heap).keys() & set(sites.MAKERS)
    with Heap.create(capacity="8MiB") as heap:
        kept = heap.put(b"x")
        metadata_bytes = heap.stats().metadata_bytes
        assert find_sites(heap) == []
        assert heap.stats().metadata_bytes == metadata_bytes, "not even read"
        assert kept


def test_of_a_long_name_the_end_is_kept(heap: Tracking) -> None:
    code = compile("block = heap.put(b'x')", "/" + "é" * 100 + "/end.py", "exec")
    kept: dict[str, Any] = {"heap": heap}
    exec(code, kept)
    [site] = find_sites(heap)
    assert site.where.startswith("...")
    assert site.where.endswith("é/end.py:1")
    assert len(site.where.encode(errors="replace")) <= _core.MAX_SITE_BYTES + 2


def test_the_table_is_bounded_and_keeps_the_newest(heap: Tracking) -> None:
    block = heap.put(b"x")
    others = [Heap.alloc(heap, 16, zero=False) for _ in range(70_000)]
    for other in others:
        heap._set_site(other, b"other:1")
    heap._set_site(block, b"newest:1")
    found = find_sites(heap)
    assert 60_000 < len(found) <= 65_536
    assert [site.offset for site in found if site.where == "newest:1"] == [block.offset]
    heap.check()


def test_full_says_where_most_was_allocated(heap: Tracking) -> None:
    many, line = [heap.alloc(2 << 20) for _ in range(3)], here()
    few, other = heap.alloc(1 << 20), here()
    with pytest.raises(HeapFull) as caught:
        heap.alloc(60 << 20)
    assert caught.value.allocated_at == ((line, 6 << 20), (other, 1 << 20))
    assert f"; allocated at: {line} 6.0 MiB, {other} 1.0 MiB; " in str(caught.value)
    assert few
    assert many


def test_what_is_no_handle_of_the_heap_is_refused(heap: Tracking) -> None:
    with Heap.create(capacity="8MiB") as other, pytest.raises(ValueError, match="another heap"):
        heap._set_site(other.put(b"x"), b"here:1")
    with pytest.raises(TypeError):
        heap._set_site("no block", b"here:1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_the_environment_says_who_tracks(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    monkeypatch.delenv("SHMHEAP_TRACK", raising=False)
    if value is not None:
        monkeypatch.setenv("SHMHEAP_TRACK", value)
    assert is_tracking() is expected


def test_own_frames_are_those_of_the_package() -> None:
    assert Path(sites._OURS) == Path(sites.__file__).parent
