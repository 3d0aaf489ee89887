"""The independent witness: what the kernel says about a shared-memory file and its processes.

An allocator that counts its own released bytes proves nothing; this module asks the kernel instead.
It imports nothing else of shmheap, so no mistake in the books can hide in it, and it never reads
file contents: a load on a hole brings a page back, and the look would change what it sees.

Page by page there are two witnesses on Linux, and they differ in one thing (measured on tmpfs; the
row about swap is read from mm/filemap.c):

=======================================  ===================  =========================
a page of the file is                    cachestat(2)         SEEK_DATA / SEEK_HOLE
=======================================  ===================  =========================
written                                  held                 data
fallocated, not touched yet              held                 hole (not "up to date")
swapped out                              held ("evicted")     data
never touched, or punched                absent               hole
=======================================  ===================  =========================

So `cachestat` (Linux 6.5) is exact and is used where the kernel has it; SEEK_DATA names only pages
that are certainly held, a lower bound, and says so in `Witness.exact`. `mincore` has the blind spot
of SEEK_DATA and needs a mapping too; it is not used. `held_bytes` counts everything on every
kernel, but cannot say where it is.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PAGE_BYTES = mmap.PAGESIZE
_BLOCK_BYTES = 512  # of st_blocks, whatever the block size of the file system
_KIB = 1024  # of the "kB" in /proc

# --------------------------------------------------------------------------------------------------
# The file: what is held, and where


def held_bytes(fd: int) -> int:
    """Bytes of memory and swap that the kernel holds for the whole file `fd`. An fstat, 0.3 us."""
    return os.fstat(fd).st_blocks * _BLOCK_BYTES


class Witness(Protocol):
    """Says how many bytes of a range of one file the kernel holds.

    `name` is the system call that is asked. `exact` is True if every held page is seen, False if
    what is seen is certain but more may be held.
    """

    name: str
    exact: bool

    def held(self, offset: int, nbytes: int) -> int:
        """Bytes held of the range. `offset` and `nbytes` are bytes, multiples of the OS page."""


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("nr_cache", "nr_dirty", "nr_writeback", "nr_evicted", "nr_recently_evicted")
    )


_SYS_CACHESTAT = 451  # on every architecture but alpha
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)


class CachestatWitness:
    """The exact witness, cachestat(2): one call answers for a range of any length.

    For a shared-memory file nr_cache counts the pages in memory, touched or not, and nr_evicted
    those in swap: the page cache of such a file remembers an evicted page only by its swap entry
    (Linux, mm/filemap.c). A call costs about 1 us and 34 ns for each page held (1 GiB full: 9 ms;
    empty: 1 us). Use one object from one thread at a time.
    """

    name = "cachestat"
    exact = True

    def __init__(self, fd: int) -> None:
        """Raises OSError if cachestat does not answer for `fd`: see `witness_for`."""
        self._fd = fd
        self._range = _Range()
        self._stat = _Cachestat()
        self._range_address = ctypes.addressof(self._range)
        self._stat_address = ctypes.addressof(self._stat)
        self.held(0, PAGE_BYTES)

    def held(self, offset: int, nbytes: int) -> int:
        """See `Witness.held`."""
        if nbytes <= 0:
            return 0  # cachestat takes a length of 0 for "to the end of the file"
        self._range.off, self._range.len = offset, nbytes
        if _syscall(_SYS_CACHESTAT, self._fd, self._range_address, self._stat_address, 0):
            code = ctypes.get_errno()
            raise OSError(code, f"cachestat: {os.strerror(code)}")
        pages: int = self._stat.nr_cache + self._stat.nr_evicted
        return pages * PAGE_BYTES


class SeekWitness:
    """The witness of kernels without cachestat: SEEK_DATA and SEEK_HOLE.

    Pages that were fallocated and never touched look like holes to it. It walks the file once, when
    it is made, and answers from that: SEEK_DATA cannot be told where to stop, so to ask it range by
    range is quadratic. Two system calls a run of data (1 GiB in one run: 12 ms); moves the file
    position of `fd`.
    """

    name = "seek"
    exact = False

    def __init__(self, fd: int) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._before = [0]  # bytes of data before the run of the same index
        for start, end in _data(fd):
            self._starts.append(start)
            self._ends.append(end)
            self._before.append(self._before[-1] + end - start)

    def held(self, offset: int, nbytes: int) -> int:
        """See `Witness.held`; a lower bound, as of when the witness was made."""
        return self._below(offset + nbytes) - self._below(offset)

    def _below(self, offset: int) -> int:
        runs = bisect(self._starts, offset)
        beyond = max(0, self._ends[runs - 1] - offset) if runs else 0
        return self._before[runs] - beyond


def _data(fd: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of data in the file."""
    end = 0
    try:
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, end
    except OSError as error:
        if error.errno != errno.ENXIO:  # ENXIO: only a hole is left, up to the end of the file
            raise


def witness_for(fd: int) -> Witness:
    """The best witness that this kernel grants for the file `fd`: cachestat, or else SEEK_DATA.

    Made anew for every look, since the second one sees the file as it is now. Cost: one system
    call, or a `SeekWitness`.
    """
    try:
        return CachestatWitness(fd)
    except OSError as error:
        # ENOSYS: before Linux 6.5. EPERM: a seccomp filter that does not know the call, or a caller
        # who neither owns the file nor may write it. EOPNOTSUPP: hugetlbfs.
        if error.errno in (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP):
            return SeekWitness(fd)
        raise


@dataclass(frozen=True, slots=True)
class Run:
    """Units that the kernel holds: several in full, or one in full or in part. Fields in bytes."""

    offset: int
    nbytes: int
    held_bytes: int

    @property
    def end(self) -> int:
        """The offset just beyond the run."""
        return self.offset + self.nbytes

    @property
    def full(self) -> bool:
        """True if every byte of the run is held."""
        return self.held_bytes == self.nbytes


def resident_runs(
    fd: int,
    offset: int,
    nbytes: int,
    unit_bytes: int = PAGE_BYTES,
    *,
    witness: Witness | None = None,
) -> list[Run]:
    """The units of `fd` that the kernel holds within a range, as maximal runs in file order.

    `offset`, `nbytes` and `unit_bytes` are bytes; `unit_bytes` is a multiple of the OS page and
    `nbytes` of `unit_bytes`, else ValueError. A unit larger than an OS page that is held in part is
    a run of its own with `held_bytes < nbytes`. `witness` defaults to `witness_for(fd)`.

    The range is halved only where it is neither empty nor full, and only left halves are asked for:
    the right half holds the rest. So R runs cost about R * log2(units / R) system calls, and a full
    or an empty file costs one. On a file that changes meanwhile the answer mixes several moments;
    see `verify.verify_quiet`.
    """
    whole = unit_bytes > 0 and not (offset % PAGE_BYTES or unit_bytes % PAGE_BYTES)
    if not whole or nbytes < 0 or nbytes % unit_bytes:
        raise ValueError(f"not whole units: {offset=}, {nbytes=}, {unit_bytes=}")
    runs: list[Run] = []
    for piece in _pieces(witness or witness_for(fd), offset, offset + nbytes, unit_bytes):
        last = runs[-1] if runs else None
        if last and last.full and piece.full and last.end == piece.offset:
            both = last.nbytes + piece.nbytes
            runs[-1] = Run(last.offset, both, both)
        else:
            runs.append(piece)
    return runs


def _pieces(witness: Witness, start: int, end: int, unit_bytes: int) -> Iterator[Run]:
    """Full pieces, and units held in part, in file order; neighbours are not joined yet."""
    stack = [(start, end, witness.held(start, end - start))]
    while stack:
        start, end, held = stack.pop()
        if held <= 0:
            continue
        units = (end - start) // unit_bytes
        if held >= end - start or units == 1:
            yield Run(start, end - start, min(held, end - start))
            continue
        middle = start + units // 2 * unit_bytes
        left = witness.held(start, middle - start)
        stack += ((middle, end, held - left), (start, middle, left))


# --------------------------------------------------------------------------------------------------
# The processes: who has how much of it in its page tables


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """One process, in bytes.

    `rss_shmem` is every shared page in its page tables, counted whole; the kernel keeps this number
    with a slack of some pages per CPU. `pss` counts a page shared by n processes as 1/n, so the sum
    over all of them is honest; `pss_shmem` is its shared memory alone. `uss` is what only this
    process has: what its exit would free, but for pages that a tmpfs file holds anyway.
    """

    rss_shmem: int
    pss: int
    pss_shmem: int
    uss: int


@dataclass(frozen=True, slots=True)
class MappingMemory:
    """What one process has of one file, in bytes; `mappings` is a count."""

    mappings: int
    rss: int
    pss: int
    private: int
    swap: int


def process_memory(pid: int) -> ProcessMemory:
    """RssShmem, Pss and Uss of a process, in bytes.

    Raises ProcessLookupError if it is gone or a zombie, PermissionError if it belongs to somebody
    else. Cost: two files of /proc; the second walks the page tables, 18 us for each MiB that is
    mapped and resident.
    """
    status = _fields(_proc_text(pid, "status"))
    rollup = _fields(_proc_text(pid, "smaps_rollup"))
    private = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")
    return ProcessMemory(
        rss_shmem=status.get("RssShmem", 0),
        pss=rollup.get("Pss", 0),
        pss_shmem=rollup.get("Pss_Shmem", 0),
        uss=sum(rollup.get(name, 0) for name in private),
    )


def sum_pss(pids: Iterable[int]) -> int:
    """Memory of several processes together, in bytes, shared pages counted once.

    A process that has gone meanwhile counts 0. Raises PermissionError. Cost: `process_memory`'s
    for each.
    """
    total = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            total += process_memory(pid).pss
    return total


def mapping_memory(pid: int, fd: int) -> MappingMemory:
    """What process `pid` has of the file that `fd` is open on (told by device and inode), in bytes.

    Exact, for the kernel walks the page tables. Raises ProcessLookupError, PermissionError. Cost:
    /proc/PID/smaps, some milliseconds.
    """
    status = os.fstat(fd)
    wanted = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    smaps = _proc_text(pid, "smaps")
    found = [fields for identity, fields in _mappings(smaps) if identity == wanted]

    def total(*names: str) -> int:
        return sum(fields.get(name, 0) for fields in found for name in names)

    return MappingMemory(
        mappings=len(found),
        rss=total("Rss"),
        pss=total("Pss"),
        private=total("Private_Clean", "Private_Dirty"),
        swap=total("Swap"),
    )


_FIELD = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)
_MAPPING = re.compile(
    r"^[0-9a-f]+-[0-9a-f]+ \S+ [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+).*$", re.MULTILINE
)


def _fields(text: str) -> dict[str, int]:
    """The "Name:  123 kB" lines, in bytes."""
    return {name: int(kib) * _KIB for name, kib in _FIELD.findall(text)}


def _mappings(smaps: str) -> Iterator[tuple[tuple[int, int, int], dict[str, int]]]:
    """((device major, minor, inode), fields) of each mapping."""
    heads = list(_MAPPING.finditer(smaps))
    ends = [head.start() for head in heads[1:]] + [len(smaps)]
    for head, end in zip(heads, ends, strict=True):
        identity = (int(head[1], 16), int(head[2], 16), int(head[3]))
        yield identity, _fields(smaps[head.end() : end])


def _proc_text(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, f"no process {pid}") from None


# --------------------------------------------------------------------------------------------------
# The machine: control group and file system


def cgroup_shmem(pid: int | None = None) -> int | None:
    """Shared memory, tmpfs included, charged to a control group and those below it, in bytes.

    The group is that of process `pid` (default: this one), on version 2 and 1 alike; None where no
    memory controller can be read. A page is charged to whoever touched it first, so pages that a
    process elsewhere filled are missing. Cost: three files of /proc and /sys.
    """
    who = "self" if pid is None else str(pid)
    try:
        groups = Path(f"/proc/{who}/cgroup").read_text().splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for directory in _memory_groups(groups, mounts):
        with suppress(OSError):  # a hybrid set-up: one hierarchy has no memory controller
            numbers = dict(map(str.split, (directory / "memory.stat").read_text().splitlines()))
            # Version 1 has both names, and there "shmem" leaves out the groups below.
            return int(numbers.get("total_shmem") or numbers["shmem"])
    return None


def _memory_groups(groups: list[str], mounts: list[str]) -> Iterator[Path]:
    """Directories of the group that may account for memory, as this mount namespace sees them.

    `groups` are lines of /proc/PID/cgroup, `mounts` lines of /proc/self/mountinfo.
    """
    paths = {}
    for group in groups:
        number, controllers, path = group.split(":", 2)
        if number == "0":
            paths["cgroup2"] = Path(path)
        elif "memory" in controllers.split(","):
            paths["cgroup"] = Path(path)
    for mount in mounts:
        place, _, kind = mount.partition(" - ")
        root, mount_point = place.split()[3:5]
        fs_type, _, options = kind.split(" ", 2)
        ours = paths.get(fs_type)
        counts = fs_type == "cgroup2" or "memory" in options.split(",")
        if ours and counts and ours.is_relative_to(root):
            yield mount_point / ours.relative_to(root)


def shm_free(directory: str | os.PathLike[str] = "/dev/shm") -> int:
    """Bytes that the tmpfs at `directory` still grants. One statvfs; FileNotFoundError."""
    numbers = os.statvfs(directory)
    return numbers.f_bavail * numbers.f_frsize
