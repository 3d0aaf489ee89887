#!/usr/bin/env python3
"""Generate the size classes of small blocks, and print what they cost.

Problem: a small block is rounded up to its class, and a span of one class ends in a tail too short
for another block. Both are memory that nobody asked for.

Goal: from 128 bytes on, rounding and tail together waste at most one eighth of a span in the worst
case, in spans that are small enough to come back whole and large enough that a process seldom goes
to the page heap.

Sizes: multiples of 16 up to 128, then eight to a doubling up to 64 KiB. A size that is the first of
its doubling, 9/8 of a power of two, wastes at most 1/9 by rounding; that leaves the tail little.

Pages of a span, by these rules in order:

1. the fewest pages that hold ENOUGH_BLOCKS blocks within the waste allowed;
2. if no span of SPAN_PAGES_MAX pages holds so many, the most blocks such a span can hold within
   the waste allowed (fewest pages among equals);
3. if none is within it, the fewest pages that are: four blocks of 18 KiB in nine pages.

No span has a header, so blocks of whole pages start on page boundaries, and their pages can be
given back one by one.

Run without arguments to rewrite the header and print the table; ``--check`` writes nothing and
exits with status 1 if the committed header is not what this tool makes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HEADER = Path(__file__).resolve().parent.parent / "shmheap" / "csrc" / "size_classes.h"

PAGE_BYTES = 8192
"""The page of the page heap where OS pages are 4 KiB."""

GRANULE_BYTES = 16
"""Every size is a multiple of it: the alignment that C promises for any type."""

FINE_MAX_BYTES = 128
"""Up to here the classes are one granule apart."""

STEPS_PER_DOUBLING = 8
"""Eight keep rounding at 1/9; four would waste 1/5, sixteen double the spans a process owns."""

SMALL_MAX_BYTES = 65536
"""The largest small block; beyond it a block is a page run of its own."""

SPAN_PAGES_MAX = 8
"""64 KiB: what a process holds of a class that it used once. Exceeded only by rule 3."""

ENOUGH_BLOCKS = 32
"""A refill from the page heap takes locks; 32 blocks make its share of an allocation small."""

BLOCKS_MAX = 512
"""No span has more, so that its bitmap is at most one cache line."""

WASTE_MAX = 0.125
"""Rounding and tail together, for sizes of at least FINE_MAX_BYTES."""

INDEX_BITS = 31
"""The magic of one granule is 2**31: the highest power of two that every magic can be scaled by and
still fit 32 bits."""

OFFSET_MAX_BYTES = 2 << 20
"""Offsets below this are divided exactly: the longest span is one huge page."""


@dataclass(frozen=True, slots=True)
class SizeClass:
    """One class: blocks of `size` bytes, `nblocks` of them in a span of `npages` pages.

    `smallest` is the smallest request that is rounded up to `size`.
    """

    size: int
    smallest: int
    npages: int

    @property
    def span_bytes(self) -> int:
        return self.npages * PAGE_BYTES

    @property
    def nblocks(self) -> int:
        return self.span_bytes // self.size

    @property
    def tail_bytes(self) -> int:
        return self.span_bytes - self.nblocks * self.size

    @property
    def rounding_waste(self) -> float:
        """Share of a block that its smallest request does not use."""
        return (self.size - self.smallest) / self.size

    @property
    def tail_waste(self) -> float:
        """Share of the span behind its last block."""
        return self.tail_bytes / self.span_bytes

    @property
    def worst_waste(self) -> float:
        """Share of the span that nobody asked for when every block is a smallest request."""
        return 1 - self.nblocks * self.smallest / self.span_bytes

    @property
    def magic(self) -> int:
        """ceil(2**INDEX_BITS / granules): multiplying by it and shifting divides by the size."""
        return -(-(1 << INDEX_BITS) // (self.size // GRANULE_BYTES))

    def index(self, offset_bytes: int) -> int:
        """The block that an offset into the span lies in, as the C header computes it."""
        return (offset_bytes // GRANULE_BYTES * self.magic) >> INDEX_BITS


def block_sizes() -> list[int]:
    """All sizes in bytes, ascending."""
    sizes = list(range(GRANULE_BYTES, FINE_MAX_BYTES + 1, GRANULE_BYTES))
    while sizes[-1] < SMALL_MAX_BYTES:
        base = sizes[-1]
        step = base // STEPS_PER_DOUBLING
        sizes += range(base + step, 2 * base + 1, step)
    return sizes


def within_waste(c: SizeClass) -> bool:
    """Whether the class keeps to WASTE_MAX; below FINE_MAX_BYTES only its tail can."""
    waste = c.worst_waste if c.size >= FINE_MAX_BYTES else c.tail_waste
    return c.nblocks > 0 and waste <= WASTE_MAX


def choose_span(size: int, smallest: int) -> SizeClass:
    """Pick the span of one size by the rules at the top of this file."""
    spans = [SizeClass(size, smallest, n) for n in range(1, SPAN_PAGES_MAX + 1)]
    good = [c for c in spans if within_waste(c)]
    enough = [c for c in good if c.nblocks >= ENOUGH_BLOCKS]
    if enough:
        return enough[0]
    if good:
        return max(good, key=lambda c: c.nblocks)
    npages = SPAN_PAGES_MAX + 1
    while not within_waste(c := SizeClass(size, smallest, npages)):
        npages += 1
    return c


def size_classes() -> list[SizeClass]:
    """The whole table, ascending by size."""
    sizes = block_sizes()
    smallest = [1, *(size + 1 for size in sizes[:-1])]
    return [choose_span(size, least) for size, least in zip(sizes, smallest, strict=True)]


def class_of(nbytes: int) -> int:
    """Index of the smallest class that holds `nbytes` (from 1 on), computed as in the header."""
    last = nbytes - 1
    if nbytes <= FINE_MAX_BYTES:
        return last // GRANULE_BYTES
    doubling = last.bit_length() - 1  # 2**doubling <= last < 2**(doubling + 1)
    return (doubling - 7) * STEPS_PER_DOUBLING + (last >> (doubling - 3))


def prove(classes: Sequence[SizeClass]) -> None:
    """Check every promise the header makes, by exhaustion. Raises AssertionError."""
    wanted = [i for i, c in enumerate(classes) for _ in range(c.smallest, c.size + 1)]
    assert [class_of(n) for n in range(1, SMALL_MAX_BYTES + 1)] == wanted, "class_of"
    for c in classes:
        prove_class(c)


def prove_class(c: SizeClass) -> None:
    """Check one class: waste, limits, and its division at every block's first and last byte."""
    assert within_waste(c), f"{c.size}: wastes {c.worst_waste:.1%}"
    assert c.nblocks <= BLOCKS_MAX, f"{c.size}: {c.nblocks} blocks"
    assert c.magic < 1 << 32, f"{c.size}: its magic needs more than 32 bits"
    assert c.size % PAGE_BYTES or c.tail_bytes == 0, f"{c.size}: whole pages leave a tail"
    for start in range(0, OFFSET_MAX_BYTES, c.size):
        last = min(start + c.size, OFFSET_MAX_BYTES) - 1
        assert c.index(start) == c.index(last) == start // c.size, f"{c.size}: index of {start}"


def table_text(classes: Sequence[SizeClass]) -> str:
    """The table with what each class wastes, and the totals, for a person to read."""
    lines = ["class   size  pages  blocks    tail  rounding  tail waste  worst waste"]
    lines += [
        f"{i:5} {c.size:6} {c.npages:6} {c.nblocks:7} {c.tail_bytes:7} {c.rounding_waste:9.2%}"
        f" {c.tail_waste:11.2%} {c.worst_waste:12.2%}"
        for i, c in enumerate(classes)
    ]
    coarse = [c for c in classes if c.size >= FINE_MAX_BYTES]
    worst = max(coarse, key=lambda c: c.worst_waste)
    tail = max(classes, key=lambda c: c.tail_waste)
    own = sum(c.span_bytes for c in classes)
    lines += [
        "",
        f"{len(classes)} classes; one span of each is {own / 1024:.0f} KiB",
        f"worst waste from {FINE_MAX_BYTES} bytes on: {worst.worst_waste:.2%} (size {worst.size})",
        f"worst tail: {tail.tail_waste:.2%} (size {tail.size})",
        f"mean tail: {sum(c.tail_waste for c in classes) / len(classes):.2%}",
        f"longest span: {max(c.npages for c in classes)} pages",
    ]
    return "\n".join(lines)


TEMPLATE = """\
/*
 * Size classes of small blocks. Made by tools/gen_size_classes.py, which prints what each class
 * wastes and proves what is said here; do not edit.
 *
 * Pages are of {page} bytes. A heap with larger pages counts pages and blocks of a span anew; sizes
 * and magics hold for any page of at most {offset_max} bytes.
 */
#ifndef SHMHEAP_SIZE_CLASSES_H
#define SHMHEAP_SIZE_CLASSES_H

#include <stdint.h>

#define SH_NCLASSES          {nclasses}
#define SH_MAX_SMALL         {small_max:<5} /* bytes; a larger block is a page run */
#define SH_CLASS_PAGE_BYTES  {page:<5} /* the page that npages counts */
#define SH_CLASS_NPAGES_MAX  {npages_max:<5} /* longest span of the table */
#define SH_CLASS_NBLOCKS_MAX {nblocks_max:<5} /* most blocks a span of the table has */

struct sh_class {{
    uint32_t size;    /* bytes of a block, a multiple of 16 */
    uint32_t npages;  /* pages of a span */
    uint32_t nblocks; /* blocks of a span */
    uint32_t magic;   /* ceil(2^{bits} / (size / 16)), see sh_block_index */
}};

/* clang-format off */
static const struct sh_class sh_classes[SH_NCLASSES] = {{
{rows}
}};
/* clang-format on */

/* The smallest class that holds n bytes, 1 <= n <= SH_MAX_SMALL. */
static inline uint32_t sh_class_of(uint32_t n)
{{
    uint32_t last = n - 1;
    if (n <= {fine_max})
        return last / {granule};
    uint32_t doubling = 31 - (uint32_t)__builtin_clz(last);
    return (doubling - 7) * {steps} + (last >> (doubling - 3));
}}

/* Which block of its span an offset lies in: offset / size without a division.
 * Exact for every offset below {offset_max}, whichever byte of the block it is. */
static inline uint32_t sh_block_index(const struct sh_class *c, uint64_t offset)
{{
    return (uint32_t)(((offset / {granule}) * c->magic) >> {bits});
}}

#endif
"""


def header_text(classes: Sequence[SizeClass]) -> str:
    """The C header for these classes."""
    rows = [
        f"    {{{c.size:5}, {c.npages:2}, {c.nblocks:3}, {c.magic:#010x}}}, /* {i:2} */"
        for i, c in enumerate(classes)
    ]
    return TEMPLATE.format(
        page=PAGE_BYTES,
        offset_max=OFFSET_MAX_BYTES,
        nclasses=len(classes),
        small_max=SMALL_MAX_BYTES,
        npages_max=max(c.npages for c in classes),
        nblocks_max=max(c.nblocks for c in classes),
        rows="\n".join(rows),
        fine_max=FINE_MAX_BYTES,
        granule=GRANULE_BYTES,
        steps=STEPS_PER_DOUBLING,
        bits=INDEX_BITS,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write or check the header. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate the size classes of small blocks.")
    parser.add_argument("--check", action="store_true", help="only compare with the header")
    parser.add_argument("--header", type=Path, default=HEADER, help="the header to write or check")
    args = parser.parse_args(argv)
    classes = size_classes()
    prove(classes)
    print(table_text(classes))
    text = header_text(classes)
    if not args.check:
        args.header.write_text(text)
    elif not args.header.exists() or args.header.read_text() != text:
        print(f"{args.header} is not what this tool makes: run it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
