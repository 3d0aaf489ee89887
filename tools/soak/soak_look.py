"""Who is inside a critical section: a look at an arena's locks, read-only and from outside.

The places are those of csrc/layout.h, written down here once more. That they still fit is looked
at: each lock's rank stands beside it, and the process that looks must find its own slot.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Collection, Iterator

from shmheap import _core

LOCKS_AT = 2176
LOCK_BYTES = 1152
RANK_AT = 40
MUTEXES = ("registry", "roots", "heap")
PROCESS = "process"

SLOT = struct.Struct("<QIII")  # lock, state, incarnation, pid
SLOT_BYTES = 256
SLOTS = 1024
SLOTS_USED_AT = LOCKS_AT + 3 * LOCK_BYTES + 8
LIVE = 1

TID_MASK = 0x3FFFFFFF
"""Of a robust mutex's word; the kernel's own: FUTEX_TID_MASK."""


class Locks:
    """The locks of one arena.

    Args:
        path: of the file of an arena that this process uses.

    Raises ValueError if the arena has another layout than this file knows.
    """

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._slots_at = -(-_core.HEADER_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
            self._bytes = mmap.mmap(fd, self._slots_at + SLOTS * SLOT_BYTES, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        for i in range(len(MUTEXES)):
            (rank,) = struct.unpack_from("<I", self._bytes, LOCKS_AT + i * LOCK_BYTES + RANK_AT)
            if rank != i + 1:
                raise ValueError("soak_look.py does not know this layout of the header")
        if not any(pid == os.getpid() for *_, pid in self._slots()):
            raise ValueError("soak_look.py does not find this process's slot")

    def held_by(self, pid: int, tids: Collection[int], coordinator: bool) -> list[str]:
        """Name the locks that a stopped process holds; empty: it is outside."""
        held = [name for name, word in self._mutexes() if word & TID_MASK in tids]
        slots = list(self._slots())
        own = {
            owner_word(number, incarnation)
            for number, (_, state, incarnation, user) in enumerate(slots)
            if state == LIVE and user == pid and coordinator == (number == 0)
        }
        if any(lock in own for lock, *_ in slots):
            held.append(PROCESS)
        return held

    def _mutexes(self) -> Iterator[tuple[str, int]]:
        for i, name in enumerate(MUTEXES):
            (word,) = struct.unpack_from("<I", self._bytes, LOCKS_AT + i * LOCK_BYTES)
            yield name, word

    def _slots(self) -> Iterator[tuple[int, int, int, int]]:
        """Give lock, state, incarnation and pid of every slot that was ever used."""
        (used,) = struct.unpack_from("<I", self._bytes, SLOTS_USED_AT)
        for number in range(min(used, SLOTS)):
            yield SLOT.unpack_from(self._bytes, self._slots_at + number * SLOT_BYTES)


def owner_word(slot: int, incarnation: int) -> int:
    """Return what a process lock contains while the process of that slot holds it."""
    return slot << 43 | (incarnation & 0x7FFF) << 28 | 1
