"""Core dumps have no shared memory, unless it is wanted; read from what the kernel says of maps."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from shmheap import Config, Heap

MIB = 1 << 20


def flags(heap: Heap) -> list[list[str]]:
    """The kernel's flags of each of this process's mappings of the heap's file."""
    inode = str(os.fstat(heap._fileno()).st_ino)
    text = Path("/proc/self/smaps").read_text()
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    return [
        found[1].split()
        for one in maps
        if inode in one.partition("\n")[0].split()
        and (found := re.search(r"^VmFlags: (.*)$", one, re.MULTILINE))
    ]


@pytest.mark.parametrize("dump", [False, True])
def test_arena_in_core_dumps(heap_name: str, dump: bool) -> None:
    with Heap.create(heap_name, capacity=4 * MIB, config=Config(dump=dump)) as made:
        block = made.put(b"secret")
        found = flags(made)
        arena = [one for one in found if "wr" in one]
        assert len(arena) == 1
        assert ("dd" in arena[0]) is not dump
        assert all("dd" in one for one in found if one is not arena[0])
        made.unlink()
        del block
