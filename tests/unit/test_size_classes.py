"""The size classes: what they waste, and that header and generator say the same."""

from __future__ import annotations

import bisect
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gen_size_classes.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gen_size_classes", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


gen = load_tool()
CLASSES = gen.size_classes()
COARSE = [c for c in CLASSES if c.size >= gen.FINE_MAX_BYTES]


def test_the_committed_header_is_what_the_tool_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert gen.main(["--check"]) == 0, capsys.readouterr().err


def test_a_header_that_differs_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = tmp_path / "size_classes.h"
    assert gen.main(["--check", "--header", str(header)]) == 1
    assert gen.main(["--header", str(header)]) == 0
    assert gen.main(["--check", "--header", str(header)]) == 0
    header.write_text(header.read_text().replace("65536", "65535"))
    assert gen.main(["--check", "--header", str(header)]) == 1
    assert "run it" in capsys.readouterr().err


def test_every_size_gets_the_smallest_class_that_fits() -> None:
    sizes = [c.size for c in CLASSES]
    for nbytes in range(1, gen.SMALL_MAX_BYTES + 1):
        assert gen.class_of(nbytes) == bisect.bisect_left(sizes, nbytes)


def test_sizes_are_multiples_of_16_with_eight_to_a_doubling() -> None:
    sizes = [c.size for c in CLASSES]
    assert sizes == sorted(set(sizes))
    assert all(size % 16 == 0 for size in sizes)
    assert sizes[:8] == [16, 32, 48, 64, 80, 96, 112, 128]
    for doubling in range(7, 16):
        assert sum(1 << doubling < size <= 2 << doubling for size in sizes) == 8


def test_rounding_and_tail_waste_at_most_an_eighth() -> None:
    assert max(c.worst_waste for c in COARSE) <= 1 / 8
    assert max(c.tail_waste for c in CLASSES) <= 1 / 8


def test_spans_are_short_unless_the_waste_forbids_it() -> None:
    assert max(c.nblocks for c in CLASSES) <= gen.BLOCKS_MAX
    for c in CLASSES:
        if c.npages > gen.SPAN_PAGES_MAX:
            shorter = [
                gen.SizeClass(c.size, c.smallest, n) for n in range(1, gen.SPAN_PAGES_MAX + 1)
            ]
            assert min(other.worst_waste for other in shorter) > 1 / 8


def test_blocks_of_whole_pages_fill_their_span() -> None:
    whole = [c for c in CLASSES if c.size % gen.PAGE_BYTES == 0]
    assert 16384 in [c.size for c in whole]
    assert all(c.nblocks * c.size == c.span_bytes for c in whole)


def test_division_by_the_size_is_exact_at_every_edge() -> None:
    for c in CLASSES:
        for start in range(0, gen.OFFSET_MAX_BYTES, c.size):
            last = min(start + c.size, gen.OFFSET_MAX_BYTES) - 1
            assert c.index(start) == c.index(last) == start // c.size


def test_a_wrong_table_is_not_proved() -> None:
    wasteful = gen.SizeClass(size=4608, smallest=4097, npages=1)
    with pytest.raises(AssertionError, match="wastes"):
        gen.prove_class(wasteful)
    with pytest.raises(AssertionError, match="class_of"):
        gen.prove(CLASSES[1:])
