"""Bytes that cannot be: typed errors in every process, no signal, no hang; what everybody is told.

`tests/c/test_bytes.c` does the same to the core alone, a million times.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from by_hand import HeapByHand

import shmheap
from shmheap import Heap, HeapCorrupt, UntrustedArena, _core, arena
from shmheap.cli.deep import MEANS, look_deep

SUPPORT = Path(__file__).resolve().parents[1] / "support"
COMMAND = [sys.executable, "-P", "-m", "shmheap"]

PAGE_RECORD_BYTES = 32
PAGE_RECORDS = -(-_core.HEADER_BYTES // 4096) * 4096 + (1024 + 65536) * 256 + 65536 * 128
"""Where the tables of pages begin: behind header, slots, names and sites."""

IDENTITY_BYTES = 80
VALUES = (0, 1, 0x7F, 0x80, 0xFF)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60)


def damage_records(path: str, first: int, count: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, b"\xff" * PAGE_RECORD_BYTES * count, PAGE_RECORDS + first * PAGE_RECORD_BYTES)
    finally:
        os.close(fd)


@pytest.mark.parametrize("part", range(3))
def test_header_bytes(heap_name: str, part: int) -> None:
    """Every byte of the identity, and a share of the others: they are for tests/c/test_bytes.c."""
    offsets = [*range(IDENTITY_BYTES), *range(IDENTITY_BYTES, _core.HEADER_BYTES, 211)][part::3]
    done = subprocess.run(
        [sys.executable, "-P", str(SUPPORT / "bad_bytes.py"), heap_name]
        + [f"{offset}:{value}" for offset in offsets for value in VALUES],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    became = ast.literal_eval(done.stdout)
    assert sum(became.values()) == len(offsets) * len(VALUES)
    assert became["UntrustedArena"] > 50
    assert became[""] > 50


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"SHMHEAP\0", b"SHMHEAP\0" * 10_000, os.urandom(1 << 16)]
)
def test_files_that_are_no_heap(heap_name: str, content: bytes) -> None:
    path = Path(arena.file_path(heap_name))
    path.touch(mode=0o600)
    path.write_bytes(content)
    try:
        for call in (shmheap.open, Heap.attach):
            with pytest.raises(UntrustedArena):
                call(heap_name)
        for options in (["verify", "--deep", heap_name], ["stat", heap_name], ["run", heap_name]):
            done = run(*options)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    finally:
        path.unlink()


USER = """
import sys, shmheap
heap = shmheap.Heap.attach(sys.argv[1])
block = heap.put(b"what was there before")
print("ready", flush=True)
sys.stdin.readline()
try:
    heap.put(b"more")
except shmheap.HeapCorrupt as error:
    print(error, flush=True)
print(bytes(block).decode(), flush=True)
"""


def test_every_process_is_told_what_was_found(heap_name: str) -> None:
    with (
        Heap.create(heap_name, capacity="64MiB") as heap,
        subprocess.Popen(
            [sys.executable, "-P", "-c", USER, heap_name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as user,
    ):
        assert user.stdout is not None
        assert user.stdout.readline() == "ready\n"
        kept = heap.put(b"abc")
        heap.gc()
        pages = heap.stats().heap_sys // 8192
        damage_records(arena.file_path(heap_name), 0, pages)
        with pytest.raises(HeapCorrupt, match=r"I-1: no span starts at page 0"):
            heap.check()
        with pytest.raises(HeapCorrupt) as asked:  # the coordinator found it
            heap.gc()
        with pytest.raises(HeapCorrupt) as allocated:
            heap.put(bytes(1 << 20))
        with pytest.raises(HeapCorrupt) as attached:
            Heap.attach(heap_name)
        told, _ = user.communicate("go\n")
        texts = [str(caught.value) for caught in (asked, allocated, attached)] + told.split("\n")
        for text in texts[:4]:
            assert f"shmheap.{os.geteuid()}.{heap_name} is corrupt" in text
            assert "the record of a span is damaged, page" in text
            assert "shmheap verify --deep" in text
            assert "shmheap rm" in text
        assert texts[4] == "what was there before"
        assert bytes(kept) == b"abc"

        done = run("verify", "--deep", heap_name)
        assert done.returncode == 1, done.stderr
        assert "corrupt: the record of a span is damaged, page" in done.stdout
        assert "I-1, the books of the page heap" in done.stdout
        assert "no span starts at page 0" in done.stdout
        assert "What to do" in done.stdout

        assert run("verify", heap_name).returncode == 1
        [row] = [
            row
            for row in json.loads(run("ls", "--json").stdout)["heaps"]
            if row["name"] == heap_name
        ]
        assert "is corrupt: the record of a span is damaged" in row["problem"]
        assert run("rm", heap_name).returncode == 0
        assert not os.path.exists(arena.file_path(heap_name))


def test_unlink_removes_a_corrupt_heap(heap_name: str) -> None:
    with HeapByHand(heap_name) as hand:
        block = hand.heap.put(b"abc")
        damage_records(hand.path, 0, 1)
        with pytest.raises(HeapCorrupt):
            hand.collect()
        shmheap.unlink(heap_name)
        assert not os.path.exists(hand.path)
        assert bytes(block) == b"abc"


def test_its_maker_leaves_no_doorbell(heap_name: str) -> None:
    with Heap.create(heap_name, capacity="64MiB") as heap:
        bell = arena.bell_path(arena.bell_name(heap.nonce))
        kept = heap.put(b"abc")
        heap.gc()
        damage_records(arena.file_path(heap_name), 0, heap.stats().heap_sys // 8192)
        for _ in range(2):  # found; the coordinator has left
            with pytest.raises(HeapCorrupt):
                heap.gc()
        assert os.path.exists(bell)
        heap.unlink()
        assert not os.path.exists(bell)
        assert bytes(kept) == b"abc"


def test_a_sound_heap_is_sound_to_the_depth(heap_name: str) -> None:
    with HeapByHand(heap_name) as hand:
        blocks = [hand.heap.put(bytes(n)) for n in (10, 1000, 100_000)]
        hand.heap.roots["name"] = blocks.pop()
        lease = blocks[0].lease()
        assert hand.observer.check() == []
        hand.assert_sound()  # looking made no page come back
        done = run("verify", "--deep", heap_name, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["fault"] is None
        assert found["deep"] == {"sound": True, "looks": 1, "violations": [], "remedy": None}
        assert lease.release()


def test_a_damaged_heap_that_nobody_has_used_since(heap_name: str) -> None:
    """The observer finds what no process has come across yet, and writes nothing."""
    with HeapByHand(heap_name) as hand:
        block = hand.heap.put(b"abc")
        damage_records(hand.path, 1, 1)
        done = run("verify", "--deep", heap_name, "--json")
        assert done.returncode == 1, done.stderr
        found = json.loads(done.stdout)
        assert found["fault"] is None
        assert found["deep"]["looks"] == 4
        assert {row["invariant"] for row in found["deep"]["violations"]} == {"I-1"}
        assert all(row["means"] for row in found["deep"]["violations"])
        assert "shmheap rm" in found["deep"]["remedy"]
        assert bytes(block) == b"abc"


class Inspector:
    def __init__(self, *looks: list[str]) -> None:
        self.looks = list(looks)

    def check(self) -> list[str]:
        return self.looks.pop(0)


def test_only_what_every_look_finds_is_there() -> None:
    moving = Inspector(["I-1: a", "I-1: b"], ["I-1: b", "I-6: c"], [])
    report = look_deep(moving)
    assert (report.sound, report.looks) == (True, 3)
    assert str(report) == "every invariant holds"
    still = Inspector(*[["I-6: c: d", f"I-1: {n}"] for n in range(4)])
    report = look_deep(still)
    assert [(f.invariant, f.what) for f in report.findings] == [("I-6", "c: d")]
    assert MEANS["I-6"] in str(report)


def test_many_findings_are_counted_not_printed() -> None:
    found = [f"I-1: page {n}" for n in range(60)]
    text = str(look_deep(Inspector(*[found] * 4)))
    assert "page 49" in text
    assert "page 50" not in text
    assert "and 10 more" in text
