"""The soak: a short one, that it notices what is wrong, and its own arithmetic."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import shmheap
from shmheap import _core

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of tools/soak."""
    monkeypatch.syspath_prepend(str(TOOLS / "soak"))
    return importlib.import_module


@pytest.fixture
def board(load: Any) -> ModuleType:
    module: ModuleType = load("soak_board")
    return module


def soak(*options: str, before: str = "") -> dict[str, Any]:
    """What a soak of its own process prints, after `before` was done to its modules."""
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import soak\n{before}\n"
    code += "sys.exit(soak.main(sys.argv[1:]))"
    argv = [sys.executable, "-P", "-c", code, "--json", *options]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nothing_comes_of_some_dozens_of_kills(tmp_path: Path) -> None:
    found = soak("--kills", "40", "--workers", "4", "--seed", "1", "--keep", str(tmp_path))
    assert found["failures"] == []
    assert not any(value for key, value in found["left"].items() if key != "file_names")
    assert found["kills"] == 40
    assert found["killed"]["worker"] > 0
    assert found["checks"] > 0
    assert found["steps"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_byte_is_told_with_its_seed_and_the_arena_kept(tmp_path: Path) -> None:
    wrong = """
import soak_worker
right = soak_worker.content
seen = 0
def content(start, nbytes):
    global seen
    seen += 1
    return right(start, nbytes) if seen % 50 else bytes(nbytes)
soak_worker.content = content
"""
    found = soak("--kills", "500", "--seed", "7", "--keep", str(tmp_path), before=wrong)
    assert not found["ok"]
    failure = found["failures"][0]
    assert failure["seed"] == 7
    assert failure["worker"]
    assert "wrong bytes" in failure["error"]
    kept = Path(failure["arena"])
    assert list(tmp_path.iterdir()) == [kept]
    with kept.open("rb") as file:
        observer = _core.Observer(file.fileno())
        assert observer.stats()["mallocs"] > 0
        observer.close()


@pytest.mark.parametrize(
    ("delay_then", "delay_now", "waited"),
    [(0, 0, 100), (40, 40, 100), (40, 70, 70), (0, 100, 0), (0, 130, 0), (70, 40, 100)],
)
def test_a_wait_is_what_is_left_of_the_time_without_the_run_delay(
    board: ModuleType, delay_then: int, delay_now: int, waited: int
) -> None:
    assert board.waited_ns(1000, 1100, delay_then, delay_now) == waited


def test_a_letter_is_taken_whole_and_by_one(board: ModuleType) -> None:
    post = board.Post.new()
    try:
        assert post.take() is None
        assert post.send(b"a" * 100)
        assert post.send(b"b" * 50)
        assert [post.take(), post.take(), post.take()] == [b"a" * 100, b"b" * 50, None]
        with pytest.raises(ValueError, match="at most"):
            post.send(bytes(board.LETTER_BYTES + 1))
    finally:
        for fd in post.fds:
            os.close(fd)


def test_a_full_post_refuses_a_letter(board: ModuleType) -> None:
    post = board.Post.new()
    try:
        while post.send(b"x"):
            pass
        assert post.take() == b"x"
    finally:
        for fd in post.fds:
            os.close(fd)


def test_who_holds_a_lock_is_inside(heap: shmheap.Heap, load: Any) -> None:
    look = load("soak_look")
    locks, me = look.Locks(heap._path), os.getpid()
    assert locks.held_by(me, {me}, False) == []
    locks._bytes = copy = bytearray(locks._bytes)
    slots = list(locks._slots())
    [(number, slot)] = [(i, slot) for i, slot in enumerate(slots) if i and slot[3] == me]
    word = look.owner_word(number, slot[2])
    struct.pack_into("<Q", copy, locks._slots_at + number * look.SLOT_BYTES, word)
    assert locks.held_by(me, {me}, False) == ["process"]
    assert locks.held_by(os.getppid(), {os.getppid()}, False) == []
    waited_for = 1 << 31 | me
    struct.pack_into("<I", copy, look.LOCKS_AT + 2 * look.LOCK_BYTES, waited_for)
    assert locks.held_by(me, {me}, False) == ["heap", "process"]


def test_blocks_say_what_is_in_them(heap: shmheap.Heap, load: Any) -> None:
    worker = load("soak_worker")
    block = heap.put(worker.content(1234, 500))
    assert worker.stamp_of(block) == (1234, 500)
    worker.require_content(block, 1234, 500)
    memoryview(block)[300:301] = bytes([block[300] ^ 1])
    with pytest.raises(worker.WrongError, match="1 of 500, from byte 300 on"):
        worker.require_content(block, 1234, 500)
