"""Names and files: what a heap may be called, and which files are believed."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from by_hand import HeapByHand
from machine import is_tmpfs, mounted

import shmheap
from shmheap import Config, Heap, HeapError, HeapNotFound, UntrustedArena, _core, arena
from shmheap.coordinator import process

MIB = 1 << 20

# Offsets of fields in the header, bytes; see csrc/layout.h.
VERSION, HEADER_BYTES, CAPACITY, FILE_BYTES, PID_NAMESPACE = 8, 12, 24, 32, 40
PAGE_SHIFT, UNIT_SHIFT, CONFIG_BYTES, CONFIG = 56, 60, 64, 72

BAD_NAMES = [
    "",
    "/",
    "a/b",
    "../etc/passwd",
    "/dev/shm/x",
    "a\0b",
    "\0",
    "a\nb",
    "a\x1b[31m",
    "\x7f",
    "a\u200bb",
    "a\u202eb",
    "x" * 201,
    "é" * 101,
    "\ud800",
]


@pytest.fixture
def hand(heap_name: str) -> Iterator[HeapByHand]:
    with HeapByHand(heap_name, MIB) as hand:
        yield hand


@contextlib.contextmanager
def no_system_calls() -> Iterator[None]:
    """Whatever touches the system in here fails the test."""

    def called(*_: object, **__: object) -> None:
        raise AssertionError("a system call")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "link", "unlink", "stat", "statvfs", "fstat"):
            patch.setattr(os, name, called)
        patch.setattr(_core, "format", called)
        yield


# Names


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
@pytest.mark.parametrize("use", [Heap.create, Heap.attach, shmheap.open, shmheap.unlink])
def test_bad_names_are_refused_before_any_system_call(
    name: str, use: Callable[[str], object]
) -> None:
    with pytest.raises(ValueError, match="name"), no_system_calls():
        use(name)


@pytest.mark.parametrize("name", [b"x", 3, Path("x")])
@pytest.mark.parametrize("use", [Heap.create, Heap.attach, shmheap.open, shmheap.unlink])
def test_a_name_is_a_str(name: str, use: Callable[[str], object]) -> None:
    with pytest.raises(TypeError, match="str"), no_system_calls():
        use(name)


@pytest.mark.parametrize("tail", [".", "..", " ", "a b", "é", "-x", "%s", ".bell", "x" * 150])
def test_any_other_name_will_do(heap_name: str, tail: str) -> None:
    with HeapByHand(heap_name + tail, MIB) as hand:
        with Heap.attach(heap_name + tail) as again:
            assert again.name == heap_name + tail
        found = {file.path: file for file in arena.find_arenas()}
        assert found[hand.path].name == heap_name + tail
        assert found[hand.path].uid == os.geteuid()


def test_the_longest_name(heap_name: str) -> None:
    name = heap_name.ljust(arena.MAX_NAME_BYTES, "x")
    with HeapByHand(name, MIB):
        Heap.attach(name).close()
    with pytest.raises(ValueError, match="201"):
        arena.check_name(name + "x")


# Sizes and configurations


@pytest.mark.parametrize(
    "capacity", [0, -1, 1, 8191, 1 << 62, 1 << 64, 1 << 80, "0", "x", "1 XB", ""]
)
def test_bad_capacities(heap_name: str, capacity: int | str) -> None:
    for make in (Heap.create, shmheap.open):
        with pytest.raises(ValueError, match=r"capacity|size"):
            make(heap_name, capacity=capacity)
    assert not Path(arena.file_path(heap_name)).exists()


@pytest.mark.parametrize("capacity", [1.5, b"1", [], True])
def test_a_capacity_is_an_int_or_a_str(heap_name: str, capacity: int) -> None:
    with pytest.raises(TypeError):
        Heap.create(heap_name, capacity=capacity)
    assert not Path(arena.file_path(heap_name)).exists()


def test_a_configuration_that_is_too_long(heap_name: str) -> None:
    with pytest.raises(ValueError, match="config"):
        Heap.create(heap_name, capacity=MIB, config=Config(log="/tmp/" + "x" * 3000))
    assert not Path(arena.file_path(heap_name)).exists()


def test_a_directory_that_is_not_there(heap_name: str, tmp_path: Path) -> None:
    config = Config(directory=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        Heap.create(heap_name, capacity=MIB, config=config)
    with pytest.raises(HeapNotFound):
        Heap.attach(heap_name, directory=config.directory)


def test_a_directory_on_a_disk_was_accepted_and_verify_cried_wolf(heap_name: str) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as disk:
        if is_tmpfs(disk):
            pytest.skip("/var/tmp is a tmpfs here")
        with pytest.raises(ValueError, match=r"Config\.directory.*tmpfs"):
            Heap.create(heap_name, capacity=MIB, config=Config(directory=disk))
        assert os.listdir(disk) == []


def test_ramfs_gives_nothing_back_and_is_refused(heap_name: str, tmp_path: Path) -> None:
    with mounted("ramfs", tmp_path), pytest.raises(ValueError, match="tmpfs"):
        Heap.create(heap_name, capacity=MIB, config=Config(directory=str(tmp_path)))


def test_a_tmpfs_without_a_size_made_the_default_capacity_nothing(
    heap_name: str, tmp_path: Path
) -> None:
    config = Config(directory=str(tmp_path))
    with (
        mounted("tmpfs", tmp_path, "size=0"),
        Heap.create(heap_name, config=config) as heap,
    ):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
        assert 0 <= memory - heap.capacity < 8192
        heap.unlink()


# Files that are not to be believed


def put_number(path: str, offset: int, number: int, size: int = 4) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(number.to_bytes(size, "little"))


def get_number(path: str, offset: int, size: int = 4) -> int:
    with open(path, "rb") as file:
        file.seek(offset)
        return int.from_bytes(file.read(size), "little")


def cut(nbytes: int) -> Callable[[str], None]:
    return lambda path: os.truncate(path, nbytes)


def number(offset: int, value: int, size: int = 4) -> Callable[[str], None]:
    return lambda path: put_number(path, offset, value, size)


def longer(path: str) -> None:
    os.truncate(path, os.stat(path).st_size + 4096)


def shorter(path: str) -> None:
    os.truncate(path, os.stat(path).st_size - 1)


def another_capacity(path: str) -> None:
    put_number(path, CAPACITY, get_number(path, CAPACITY, 8) * 2, 8)


def both_page_sizes(path: str) -> None:
    put_number(path, UNIT_SHIFT, 16)
    put_number(path, PAGE_SHIFT, 16)


def config(json: bytes) -> Callable[[str], None]:
    def write(path: str) -> None:
        put_number(path, CONFIG_BYTES, len(json))
        with open(path, "r+b") as file:
            file.seek(CONFIG)
            file.write(json)

    return write


def text(path: str) -> None:
    Path(path).write_bytes(b"not a heap" * 1_000_000)


SPOILT = {
    "empty": (cut(0), "too short"),
    "a few bytes": (cut(100), "too short"),
    "cut in the tables": (cut(65536), "cut off"),
    "cut at the end": (shorter, "cut off or too long"),
    "too long": (longer, "cut off or too long"),
    "text": (text, "not a shmheap arena"),
    "magic": (number(0, 0), "not a shmheap arena"),
    "older version": (number(VERSION, 0), "another version"),
    "newer version": (number(VERSION, _core.LAYOUT_VERSION + 1), "another version"),
    "another compiler": (number(HEADER_BYTES, _core.HEADER_BYTES + 64), "another version"),
    "OS page": (number(UNIT_SHIFT, 16), "page size"),
    "huge shift": (number(UNIT_SHIFT, 200), "page size"),
    "shift that wraps": (number(UNIT_SHIFT, 64 + 12), "page size"),
    "heap page": (number(PAGE_SHIFT, 14), "page size"),
    "page sizes of another machine": (both_page_sizes, "page size"),
    "capacity": (another_capacity, "layout"),
    "no capacity": (number(CAPACITY, 0, 8), "capacity"),
    "endless capacity": (number(CAPACITY, (1 << 64) - 1, 8), "capacity"),
    "file size": (number(FILE_BYTES, 4096, 8), "layout"),
    "configuration": (number(CONFIG_BYTES, 1 << 20), "configuration"),
    "configuration of nothing": (number(CONFIG_BYTES, 0), "damaged configuration"),
    "configuration cut off": (number(CONFIG_BYTES, 20), "damaged configuration"),
    "configuration not Unicode": (config(b"{\xff}"), "damaged configuration"),
    "configuration of another kind": (config(b"[]"), "damaged configuration"),
    "configuration too deep": (config(b"[" * 2000), "damaged configuration"),
    "configuration with another field": (config(b'{"colour": 1}'), "damaged configuration"),
    "configuration of wrong type": (config(b'{"keep": 1}'), "damaged configuration"),
    "configuration out of range": (config(b'{"forced_gc_s": -1}'), "damaged configuration"),
    "configuration not finite": (config(b'{"forced_gc_s": NaN}'), "damaged configuration"),
    "PID namespace": (number(PID_NAMESPACE, 1, 8), "PID namespace"),
    "mode": (lambda path: os.chmod(path, 0o644), "mode 644"),
    "group may read": (lambda path: os.chmod(path, 0o640), "mode 640"),
}


@pytest.fixture
def kept(heap_name: str) -> Iterator[HeapByHand]:
    """To be kept: else its last user removes it, or another test's coordinator as stale."""
    with HeapByHand(heap_name, config=Config(keep=True)) as hand:
        yield hand


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_file_is_not_used(kept: HeapByHand, how: str) -> None:
    hand = kept
    hand.heap.close()
    hand.steward.close()
    spoil, said = SPOILT[how]
    spoil(hand.path)
    before = Path(hand.path).stat()
    for use in (Heap.attach, shmheap.open):
        with pytest.raises(UntrustedArena, match=said) as caught:
            use(hand.heap.name)
        assert isinstance(caught.value, HeapError)
    after = Path(hand.path).stat()
    assert (before.st_size, before.st_blocks, before.st_mtime_ns) == (
        after.st_size,
        after.st_blocks,
        after.st_mtime_ns,
    ), "it was left alone"
    with pytest.raises(UntrustedArena, match=said):
        process.main(hand.path, foreground=True)
    for kind in (_core.Steward, _core.Observer):
        # Others are Python's to see, not the core's.
        if not said.startswith(("mode", "damaged")):
            with pytest.raises(UntrustedArena, match=said):
                kind(hand.fd)


@pytest.mark.parametrize("how", ["text", "empty", "newer version"])
def test_what_cannot_be_used_can_be_unlinked(kept: HeapByHand, how: str) -> None:
    kept.heap.close()
    kept.steward.close()
    SPOILT[how][0](kept.path)
    shmheap.unlink(kept.heap.name)
    assert not Path(kept.path).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user(hand: HeapByHand) -> None:
    os.chown(hand.path, 65534, -1)
    with pytest.raises(UntrustedArena, match="user 65534"):
        Heap.attach(hand.heap.name)
    with pytest.raises(UntrustedArena, match="user 65534"):
        shmheap.unlink(hand.heap.name)
    assert Path(hand.path).exists()


def make_directory(path: str) -> None:
    os.mkdir(path, 0o700)


def make_link(path: str) -> None:
    os.symlink("/dev/null", path)


def make_dangling_link(path: str) -> None:
    os.symlink("/nowhere/at/all", path)


def make_fifo(path: str) -> None:
    os.mkfifo(path, 0o600)


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        os.chmod(path, 0o600)


def make_device(path: str) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))


KINDS = [make_directory, make_link, make_dangling_link, make_fifo, make_socket, make_device]


@pytest.mark.parametrize("make", KINDS)
def test_what_is_no_regular_file_is_not_used(
    folder: str, make: Callable[[str], None], heap_name: str
) -> None:
    path = arena.file_path(heap_name, folder)
    try:
        make(path)
    except PermissionError:
        pytest.skip("not permitted here")
    config = Config(directory=folder)
    with pytest.raises(UntrustedArena):
        Heap.attach(heap_name, directory=folder)
    with pytest.raises(UntrustedArena):
        shmheap.open(heap_name, capacity=MIB, config=config)
    with pytest.raises(shmheap.HeapExists):
        Heap.create(heap_name, capacity=MIB, config=config)
    assert os.path.lexists(path)


def test_a_link_to_a_heap_is_not_followed(hand: HeapByHand, tmp_path: Path) -> None:
    os.symlink(hand.path, arena.file_path("link", str(tmp_path)))
    with pytest.raises(UntrustedArena):
        Heap.attach("link", directory=str(tmp_path))


def test_a_fifo_with_a_writer_does_not_hang_either(tmp_path: Path) -> None:
    path = arena.file_path("fifo", str(tmp_path))
    os.mkfifo(path, 0o600)
    both = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(UntrustedArena, match="not a regular file"):
            Heap.attach("fifo", directory=str(tmp_path))
    finally:
        os.close(both)


# Half-made heaps


def test_nobody_sees_a_half_made_heap(heap_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    format_core = _core.format

    def look_and_format(*args: object) -> None:
        seen.append(Path(arena.file_path(heap_name)).exists())
        format_core(*args)  # type: ignore[arg-type]
        seen.append(Path(arena.file_path(heap_name)).exists())

    monkeypatch.setattr(_core, "format", look_and_format)
    with HeapByHand(heap_name, MIB):
        assert seen == [False, False]


def test_one_of_many_creators_wins(new_heap_name: Callable[[], str]) -> None:
    name = new_heap_name()
    path = arena.file_path(name)
    start = threading.Barrier(8)
    made: list[int] = []
    lost: list[object] = []

    def create() -> None:
        start.wait()
        try:
            fd = arena.make_file(path, MIB, Config(keep=True))
            arena.give_name(fd, path)
            made.append(fd)
        except shmheap.HeapExists as error:
            lost.append(error)
            os.close(fd)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(lost)) == (1, 7)
    assert os.path.samestat(os.fstat(made[0]), os.stat(path))
    os.close(made[0])
    os.unlink(path)


def test_other_files_are_no_arenas(tmp_path: Path) -> None:
    for name in ("shmheap", "shmheap.x.y", "shmheap.0", "shmheap.0.", "other.0.a", "shmheap.7.a.b"):
        (tmp_path / name).touch()
    assert [file[:2] for file in arena.find_arenas(str(tmp_path))] == [("a.b", 7)]


def test_the_header_says_what_was_asked_for(hand: HeapByHand) -> None:
    header = hand.observer.header()
    assert header["capacity"] == hand.heap.capacity
    assert header["nonce"] == hand.heap.nonce
    assert header["version"] == _core.LAYOUT_VERSION
    assert header["coordinator_alive"]
    assert Config.from_json(header["config"]) == Config()
    assert struct.unpack("<I", os.pread(hand.fd, 4, VERSION)) == (_core.LAYOUT_VERSION,)
