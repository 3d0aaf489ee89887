"""The witness against the kernel it asks: real files, real mappings, real processes.

Every file is made with O_TMPFILE, so nothing stays in /dev/shm whatever happens to a test.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from shmheap import rss

PAGE = rss.PAGE_BYTES
MIB = 1 << 20


@pytest.fixture
def fd() -> Iterator[int]:
    file = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    yield file
    os.close(file)


@pytest.fixture
def exact(fd: int) -> None:
    """Skips a test of what only cachestat can see."""
    if not rss.witness_for(fd).exact:
        pytest.skip("this kernel has no cachestat")


@contextmanager
def mapped(fd: int, nbytes: int) -> Iterator[mmap.mmap]:
    os.ftruncate(fd, nbytes)
    with mmap.mmap(fd, nbytes) as memory:
        yield memory


def touch(memory: mmap.mmap, start: int, nbytes: int) -> None:
    for offset in range(start, start + nbytes, PAGE):
        memory[offset] = 1


def pages_held(fd: int, pages: int) -> list[bool]:
    """One call a page: the slow oracle."""
    witness = rss.witness_for(fd)
    return [witness.held(page * PAGE, PAGE) == PAGE for page in range(pages)]


# --------------------------------------------------------------------------------------------------
# What frees and what does not


def test_madv_dontneed_lowers_rss_and_frees_nothing(fd: int) -> None:
    size = 16 * MIB
    with mapped(fd, size) as memory:
        touch(memory, 0, size)
        assert rss.mapping_memory(os.getpid(), fd).rss == size
        memory.madvise(mmap.MADV_DONTNEED)
        assert rss.mapping_memory(os.getpid(), fd).rss == 0
        assert rss.held_bytes(fd) == size
        assert rss.witness_for(fd).held(0, size) == size
        assert memory[size - PAGE] == 1, "the content is still there"


def test_madv_remove_frees_for_everybody(fd: int) -> None:
    size = 4 * MIB
    with mapped(fd, size) as memory, mapped(fd, size) as other:
        touch(memory, 0, size)
        touch(other, 0, size)
        memory.madvise(mmap.MADV_REMOVE, MIB, MIB)
        assert rss.mapping_memory(os.getpid(), fd).rss == 2 * (size - MIB)
        assert rss.held_bytes(fd) == size - MIB
        runs = rss.resident_runs(fd, 0, size)
    assert runs == [rss.Run(0, MIB, MIB), rss.Run(2 * MIB, 2 * MIB, 2 * MIB)]


@pytest.mark.usefixtures("exact")
def test_fallocated_and_untouched_pages_are_held_though_in_nobodys_rss(fd: int) -> None:
    with mapped(fd, 64 * PAGE):
        os.posix_fallocate(fd, 8 * PAGE, 16 * PAGE)
        assert rss.mapping_memory(os.getpid(), fd).rss == 0
        assert rss.resident_runs(fd, 0, 64 * PAGE) == [rss.Run(8 * PAGE, 16 * PAGE, 16 * PAGE)]
        assert rss.held_bytes(fd) == 16 * PAGE


def test_seek_witness_is_a_lower_bound_and_says_so(fd: int) -> None:
    os.ftruncate(fd, 64 * PAGE)
    os.posix_fallocate(fd, 0, 16 * PAGE)
    os.pwrite(fd, b"x", 4 * PAGE)
    os.pwrite(fd, b"x" * PAGE, 9 * PAGE)
    witness = rss.SeekWitness(fd)
    assert not witness.exact
    runs = rss.resident_runs(fd, 0, 64 * PAGE, witness=witness)
    assert runs == [rss.Run(4 * PAGE, PAGE, PAGE), rss.Run(9 * PAGE, PAGE, PAGE)]
    assert witness.held(5 * PAGE, 4 * PAGE) == 0
    assert rss.held_bytes(fd) == 16 * PAGE, "st_blocks misses nothing, but cannot say where"


def test_pages_in_swap_count_as_held(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer is made up, so that the machine needs no swap."""

    def answer(_number: int, _fd: int, _range: int, stat: int, _flags: int) -> int:
        cache, dirty, writeback, evicted, recently = 5, 5, 1, 3, 2
        numbers = (ctypes.c_uint64 * 5).from_address(stat)
        numbers[:] = [cache, dirty, writeback, evicted, recently]
        return 0

    monkeypatch.setattr(rss, "_syscall", answer)
    assert rss.CachestatWitness(fd).held(0, 16 * PAGE) == 8 * PAGE


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP])
def test_without_cachestat_the_witness_is_seek(
    fd: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(rss, "_syscall", refuse)
    assert rss.witness_for(fd).name == "seek"


def test_a_witness_that_fails_otherwise_is_an_error(fd: int) -> None:
    closed = os.dup(fd)
    os.close(closed)
    with pytest.raises(OSError, match="cachestat") as caught:
        rss.witness_for(closed)
    assert caught.value.errno == errno.EBADF


# --------------------------------------------------------------------------------------------------
# Where: runs of units


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("seed", range(12))
def test_runs_of_a_random_pattern_are_exact(fd: int, seed: int) -> None:
    """Against what was done, and against an oracle of one call a page."""
    dice = random.Random(seed)
    pages = dice.randint(1, 400)
    held = [dice.random() < dice.choice((0.02, 0.5, 0.98)) for _ in range(pages)]
    with mapped(fd, pages * PAGE) as memory:
        for page in (page for page, wanted in enumerate(held) if wanted):
            os.posix_fallocate(fd, page * PAGE, PAGE)
            if dice.random() < 0.5:
                memory[page * PAGE] = 1
    runs = rss.resident_runs(fd, 0, pages * PAGE)
    found = [False] * pages
    for run in runs:
        assert run.full
        found[run.offset // PAGE : run.end // PAGE] = [True] * (run.nbytes // PAGE)
    assert found == held == pages_held(fd, pages)
    assert all(left.end < right.offset for left, right in pairwise(runs))


@pytest.mark.usefixtures("exact")
def test_a_unit_held_in_part_is_a_run_of_its_own(fd: int) -> None:
    unit = 8 * PAGE
    os.ftruncate(fd, 10 * unit)
    os.posix_fallocate(fd, 2 * unit, 2 * unit)
    os.posix_fallocate(fd, 4 * unit, 3 * PAGE)
    os.posix_fallocate(fd, 9 * unit + 7 * PAGE, PAGE)
    assert rss.resident_runs(fd, unit, 9 * unit, unit) == [
        rss.Run(2 * unit, 2 * unit, 2 * unit),
        rss.Run(4 * unit, unit, 3 * PAGE),
        rss.Run(9 * unit, unit, PAGE),
    ]


@pytest.mark.parametrize(
    ("offset", "nbytes", "unit"),
    [
        (1, PAGE, PAGE),
        (0, PAGE + 1, PAGE),
        (0, -PAGE, PAGE),
        (0, PAGE, 2 * PAGE),
        (0, PAGE, 1),
        (0, PAGE, 0),
        (0, PAGE, -PAGE),
    ],
)
def test_ranges_that_are_not_whole_units_are_refused(
    fd: int, offset: int, nbytes: int, unit: int
) -> None:
    with pytest.raises(ValueError, match="whole units"):
        rss.resident_runs(fd, offset, nbytes, unit)


def test_an_empty_range_and_what_lies_beyond_the_end_are_absent(fd: int) -> None:
    os.ftruncate(fd, PAGE)
    os.pwrite(fd, b"x", 0)
    assert rss.resident_runs(fd, 0, 0) == []
    assert rss.witness_for(fd).held(0, 0) == 0
    assert rss.resident_runs(fd, PAGE, 8 * PAGE) == []


class CountingWitness:
    """Counts the system calls of the witness behind it."""

    def __init__(self, fd: int) -> None:
        self._witness = rss.witness_for(fd)
        self.name = self._witness.name
        self.exact = self._witness.exact
        self.calls = 0

    def held(self, offset: int, nbytes: int) -> int:
        self.calls += 1
        return self._witness.held(offset, nbytes)


@pytest.mark.usefixtures("exact")
def test_a_sparse_gibibyte_takes_few_calls_and_no_page(fd: int) -> None:
    """One call for what is empty or full; log2(units) for a page in the middle of nothing."""
    size = 1024 * MIB
    os.ftruncate(fd, size)
    witness = CountingWitness(fd)
    assert rss.resident_runs(fd, 0, size, witness=witness) == []
    assert witness.calls == 1
    places = [size // 3 // PAGE * PAGE, size - PAGE]
    for place in places:
        os.posix_fallocate(fd, place, PAGE)
    witness.calls = 0
    found = rss.resident_runs(fd, 0, size, witness=witness)
    assert found == [rss.Run(place, PAGE, PAGE) for place in places]
    assert witness.calls <= 1 + len(places) * (size // PAGE).bit_length()
    assert rss.held_bytes(fd) == len(places) * PAGE


def test_looking_touches_nothing(fd: int) -> None:
    with mapped(fd, 64 * PAGE) as memory:
        touch(memory, 10 * PAGE, 5 * PAGE)
        before = (rss.held_bytes(fd), rss.mapping_memory(os.getpid(), fd))
        for witness in (rss.witness_for(fd), rss.SeekWitness(fd)):
            rss.resident_runs(fd, 0, 64 * PAGE, witness=witness)
        assert (rss.held_bytes(fd), rss.mapping_memory(os.getpid(), fd)) == before


# --------------------------------------------------------------------------------------------------
# Processes and machine

BYSTANDER = """
import mmap, sys
memory = mmap.mmap(int(sys.argv[1]), 0)
for offset in range(0, len(memory), mmap.PAGESIZE):
    memory[offset]
print("touched", flush=True)
sys.stdin.read()
"""


@contextmanager
def bystander(fd: int) -> Iterator[int]:
    """The pid of a process that maps the file and has touched all of it."""
    command = [sys.executable, "-I", "-c", BYSTANDER, str(fd)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd], text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "touched\n"
        yield process.pid
        process.communicate()


def test_a_bystander_keeps_its_rss_until_the_pages_are_really_freed(fd: int) -> None:
    size = 8 * MIB
    with mapped(fd, size) as memory:
        touch(memory, 0, size)
        with bystander(fd) as pid:
            assert rss.mapping_memory(pid, fd).pss == size // 2, "two processes share each page"
            assert rss.process_memory(pid).rss_shmem > 0
            memory.madvise(mmap.MADV_DONTNEED)
            assert rss.mapping_memory(pid, fd) == rss.MappingMemory(1, size, size, size, 0)
            memory.madvise(mmap.MADV_REMOVE)
            assert rss.mapping_memory(pid, fd) == rss.MappingMemory(1, 0, 0, 0, 0)


def test_sum_of_pss_counts_a_shared_page_once(fd: int) -> None:
    size = 32 * MIB
    with mapped(fd, size) as memory, bystander(fd) as pid:
        alone = rss.sum_pss([os.getpid(), pid])
        for offset in range(0, size, PAGE):
            memory[offset]
        together = rss.sum_pss([os.getpid(), pid])
        memory_of_one = rss.process_memory(pid)
        assert size // 2 <= memory_of_one.pss_shmem < memory_of_one.pss < memory_of_one.rss_shmem
    assert abs(together - alone) < size // 4


def test_uss_is_what_only_this_process_has() -> None:
    before = rss.process_memory(os.getpid()).uss
    private = mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE)
    touch(private, 0, 16 * MIB)
    after = rss.process_memory(os.getpid())
    private.close()
    assert after.uss - before >= 15 * MIB
    assert after.pss >= after.uss


@contextmanager
def zombie() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-I", "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    yield process.pid
    process.wait()


def test_a_process_that_is_gone_is_a_lookup_error_and_counts_nothing() -> None:
    with zombie() as pid:
        with pytest.raises(ProcessLookupError):
            rss.process_memory(pid)
        assert rss.sum_pss([pid]) == 0
    with pytest.raises(ProcessLookupError, match=str(pid)):
        rss.process_memory(pid)
    assert rss.sum_pss([pid]) == 0


def test_a_file_that_a_process_does_not_map_has_nothing_there(fd: int) -> None:
    assert rss.mapping_memory(os.getpid(), fd) == rss.MappingMemory(0, 0, 0, 0, 0)


CGROUP_2 = (
    ["0::/app/web"],
    "30 24 0:27 / {root} rw,nosuid - cgroup2 cgroup2 rw",
    "app/web/memory.stat",
    "anon 1\nshmem 8192\n",
)
CGROUP_2_IN_A_CONTAINER = (
    ["0::/docker/abc"],
    "30 24 0:27 /docker/abc {root} ro shared:1 - cgroup2 cgroup rw",
    "memory.stat",
    "shmem 8192\n",
)
CGROUP_1 = (
    ["9:name=systemd:/", "4:cpu,memory:/app", "0::/"],
    "31 24 0:28 / {root} rw - cgroup cgroup rw,memory",
    "app/memory.stat",
    "shmem 0\ntotal_shmem 8192\n",
)


@pytest.mark.parametrize("kind", [CGROUP_2, CGROUP_2_IN_A_CONTAINER, CGROUP_1])
def test_cgroup_shmem_reads_both_versions(
    kind: tuple[list[str], str, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups, mount, place, numbers = kind
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(numbers)
    mounts = ["29 24 0:26 / /none rw - cgroup2 none rw", mount.format(root=tmp_path)]
    real = Path.read_text
    fakes = {"/proc/7/cgroup": groups, "/proc/self/mountinfo": mounts}

    def read_text(path: Path) -> str:
        return "\n".join(fakes[str(path)]) if str(path) in fakes else real(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert rss.cgroup_shmem(7) == 8192
    (tmp_path / place).unlink()
    assert rss.cgroup_shmem(7) is None


def test_cgroup_shmem_counts_what_this_process_committed(fd: int) -> None:
    if rss.cgroup_shmem() is None:
        pytest.skip("no memory controller to read")
    size = 64 * MIB
    os.posix_fallocate(fd, 0, size)
    assert (rss.cgroup_shmem() or 0) >= size


def test_shm_free_is_what_the_file_system_grants() -> None:
    """Other tests share the file system, so only bounds can be told."""
    numbers = os.statvfs("/dev/shm")
    assert 0 < rss.shm_free() <= numbers.f_blocks * numbers.f_frsize
    with pytest.raises(FileNotFoundError):
        rss.shm_free("/dev/shm/there-is-no-such-directory")


def test_looking_needs_no_write_permission(fd: int) -> None:
    os.ftruncate(fd, 2 * PAGE)
    os.pwrite(fd, b"x", 0)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        assert rss.held_bytes(read_only) == PAGE
        assert rss.resident_runs(read_only, 0, 2 * PAGE) == [rss.Run(0, PAGE, PAGE)]
    finally:
        os.close(read_only)
