"""The coordinator's process: one per heap, replaceable, and gone with the heap's last user."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from processes import PATIENCE_S, Worker

import shmheap
from shmheap import Config, CoordinatorLost, Heap, HeapNotFound, StaleHandle, _core, arena
from shmheap.coordinator import process
from shmheap.verify import verify_quiet

MIB = 1 << 20


def header(heap: Heap) -> dict[str, object]:
    return _core.Observer(heap._fileno()).header()


def coordinator(heap: Heap) -> int:
    """The pid of the coordinator; it lives, and has done a turn."""
    heap.gc()
    found = header(heap)
    assert found["coordinator_alive"]
    pid = found["coordinator_pid"]
    assert isinstance(pid, int)
    return pid


@contextmanager
def leaves(pid: int) -> Iterator[None]:
    """In here something happens after which that process ends; its end is waited for."""
    pidfd = os.pidfd_open(pid)
    try:
        yield
        ready, _, _ = select.select([pidfd], [], [], PATIENCE_S)
        assert ready, "the process is still there"
    finally:
        os.close(pidfd)


def kill(pid: int) -> None:
    with leaves(pid):
        os.kill(pid, signal.SIGKILL)


def until(heap: Heap, happened: Callable[[], bool]) -> None:
    """Collect until it has happened: each collection begins with a look at who has died."""
    for _ in range(1000):
        if happened():
            heap.gc()  # and what belongs to it is done
            return
        heap.gc()
    pytest.fail("it does not happen")


def bell(nonce: int) -> Path:
    return Path("/dev/shm/sem." + arena.bell_name(nonce)[1:])


def assert_whole(heap: Heap) -> None:
    heap.check()
    report = verify_quiet(heap._fileno(), _core.Observer(heap._fileno()))
    assert report.agrees, [str(wrong) for wrong in report.mismatches[:8]]


def coordinators_of(path: str) -> list[psutil.Process]:
    running = psutil.process_iter(["cmdline"])
    return [found for found in running if (found.info["cmdline"] or [])[-1:] == [path]]


# It cannot be started

NO_START = [
    ({"python": "/nope"}, "its interpreter /nope: No such file"),
    ({"python": "/etc/passwd"}, "its interpreter /etc/passwd: Permission denied"),
    ({"log": "/nope/log"}, "its log /nope/log: No such file"),
]


def install(python: Path) -> None:
    """Make a command that is this interpreter."""
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)


@pytest.mark.parametrize(("config", "said"), NO_START)
@pytest.mark.parametrize("keep", [False, True])
def test_a_heap_was_made_whose_coordinator_cannot_start(
    heap_name: str, config: dict[str, str], said: str, keep: bool
) -> None:
    for make in (Heap.create, shmheap.open):
        with pytest.raises(CoordinatorLost, match=re.escape(said)) as caught:
            make(heap_name, capacity=MIB, config=Config(**config, keep=keep))  # type: ignore[arg-type]
        assert "-m shmheap run" in str(caught.value)
        assert not Path(arena.file_path(heap_name)).exists()


def test_a_heap_was_attached_to_whose_coordinator_cannot_start(
    heap_name: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    install(python)
    config = Config(python=str(python), keep=True)
    with Heap.create(heap_name, capacity=MIB, config=config) as heap:
        heap.roots["a"] = heap.put(b"abc")
        pid = coordinator(heap)
        with leaves(pid):
            heap.close()
    python.unlink()
    with pytest.raises(CoordinatorLost, match=re.escape(str(python))):
        Heap.attach(heap_name)
    install(python)
    with Heap.attach(heap_name) as heap:
        assert bytes(heap.roots["a"]) == b"abc"
    python.unlink()
    shmheap.unlink(heap_name)
    assert not Path(arena.file_path(heap_name)).exists()


def test_whoever_found_it_dead_and_could_start_none_was_told_nothing(
    heap_name: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    install(python)
    with Heap.create(heap_name, capacity=MIB, config=Config(python=str(python))) as heap:
        pid = coordinator(heap)
        python.unlink()
        kill(pid)
        block = heap.alloc(100_000)
        heap._bell.settle()
        with pytest.warns(RuntimeWarning, match=re.escape(str(python))):
            heap._bell.ring(starts=False, waits=True)
        with pytest.raises(CoordinatorLost, match=re.escape(str(python))):
            heap.gc(timeout=None)
        block.free()
    assert not Path(arena.file_path(heap_name)).exists()


def test_a_coordinator_that_ends_at_once_was_not_named(heap_name: str) -> None:
    with Heap.create(heap_name, capacity=MIB, config=Config(python="/bin/false")) as heap:
        with pytest.raises(CoordinatorLost, match="none is running; tried: /bin/false -P -m"):
            heap.gc(timeout=0.01)
        heap.unlink()


# One, and it can be replaced


def test_there_is_exactly_one(heap: Heap) -> None:
    first = coordinator(heap)
    for _ in range(5):
        process.ensure_running(heap._path, heap.config)
    others = [
        subprocess.run(process.command(heap._path, heap.config), capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [other.returncode for other in others] == [0, 0]
    psutil.wait_procs([p for p in coordinators_of(heap._path) if p.pid != first], PATIENCE_S)
    assert [p.pid for p in coordinators_of(heap._path)] == [first]
    assert coordinator(heap) == first


def attach(heap: Heap) -> None:
    Heap.attach(heap.name).close()


def close(heap: Heap) -> None:
    heap._other.close()  # type: ignore[attr-defined]


def ring(heap: Heap) -> None:
    heap._request(0)


def refill(heap: Heap) -> None:
    heap._kept = heap.alloc(3 * MIB)  # type: ignore[attr-defined]


@pytest.mark.parametrize("use", [attach, close, ring, refill])
def test_whoever_finds_it_dead_starts_a_successor(
    heap: Heap, use: Callable[[Heap], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    ensure_running = process.ensure_running

    def start(path: str, config: Config, arena_fd: int) -> None:
        started.append(path)
        ensure_running(path, config, arena_fd)

    first = coordinator(heap)
    monkeypatch.setattr(process, "ensure_running", start)
    heap._other = Heap.attach(heap.name)  # type: ignore[attr-defined]
    block = heap.put(b"abc")
    kill(first)
    assert started == []
    use(heap)
    heap._bell.settle()
    assert started == [heap._path]
    assert coordinator(heap) != first
    assert bytes(block) == b"abc"
    heap._other.close()  # type: ignore[attr-defined]
    assert_whole(heap)


def test_of_all_who_find_none_one_starts_one(
    heap: Heap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A start takes an interpreter's time, and all go on finding none until it is over."""
    started: list[str] = []
    ensure_running = process.ensure_running
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\necho $$ > {pids}\nread x < {pids}\n")
    slow.chmod(0o755)

    def start(path: str, config: Config, arena_fd: int) -> None:
        started.append(path)
        ensure_running(path, replace(config, python=str(slow)), arena_fd)

    others = [Heap.attach(heap.name) for _ in range(5)]
    first = coordinator(heap)
    monkeypatch.setattr(process, "ensure_running", start)
    kill(first)
    for user in (heap, *others):
        user._held = [user.alloc(300_000) for _ in range(2)]  # type: ignore[attr-defined]
        user._bell.settle()
    late = Heap.attach(heap.name)
    assert started == [heap._path]
    for user in (late, *others):
        user.close()
    monkeypatch.undo()
    assert not heap._may_start()  # it is being started
    kill(int(pids.read_text()))
    while not heap._may_start():  # it has died before it began: see test_blocks.c for how soon
        os.sched_yield()
    process.ensure_running(heap._path, heap.config)
    assert coordinator(heap) != first
    assert heap._may_start()  # should that one die, too


def test_a_child_waited_for_a_start_that_a_thread_of_its_parent_was_about(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_running = process.ensure_running
    may_run = threading.Event()

    def start(path: str, config: Config, arena_fd: int) -> None:
        assert may_run.wait(PATIENCE_S)
        ensure_running(path, config, arena_fd)

    kill(coordinator(heap))
    monkeypatch.setattr(process, "ensure_running", start)
    heap._want(0)
    parents = heap._bell._starting
    assert parents is not None
    child = os.fork()
    if child == 0:  # it may be about a start of its own, if it was long until it ran
        os._exit(heap._bell._starting is parents)
    assert os.waitpid(child, 0)[1] == 0
    may_run.set()
    coordinator(heap)


def test_a_heap_that_lost_its_name_before_its_coordinator_came_had_none(
    new_heap_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes a heap for itself alone unlinks it at once."""
    ensure_running = process.ensure_running
    may_run = threading.Event()

    def start(path: str, config: Config, arena_fd: int) -> None:
        assert may_run.wait(PATIENCE_S)
        ensure_running(path, config, arena_fd)

    with Heap.create(new_heap_name(), capacity=64 * MIB) as heap:
        kill(coordinator(heap))
        monkeypatch.setattr(process, "ensure_running", start)
        heap._want(0)
        heap.unlink()
        bell = Path(arena.bell_path(arena.bell_name(heap.nonce)))
        may_run.set()
        assert heap.gc().trigger == "asked"
        assert bell.exists()
        pid = coordinator(heap)
        with leaves(pid):
            heap.close()
    assert not bell.exists()


def test_who_allocated_waited_until_a_successor_ran(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_running = process.ensure_running
    may_run = threading.Event()

    def start(path: str, config: Config, arena_fd: int) -> None:
        assert may_run.wait(PATIENCE_S)
        ensure_running(path, config, arena_fd)

    monkeypatch.setattr(process, "ensure_running", start)
    first = coordinator(heap)
    kill(first)
    blocks = [heap.alloc(300_000) for _ in range(20)]  # returns though nobody runs
    assert not heap._coordinator_alive()
    may_run.set()
    heap.gc()  # waits, as does a close
    del blocks


def test_the_heap_goes_on_while_there_is_none(heap: Heap, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [heap.put(bytes([n]) * 1000) for n in range(100)]
    first = coordinator(heap)
    monkeypatch.setattr(process, "ensure_running", lambda *_: None)
    kill(first)
    with Worker() as worker:
        # It starts a successor, which this process does not.
        worker.do("keep", "blocks", kept)
        more = [heap.alloc(size) for size in (10, 5000, 100_000, MIB)]
        del more
        assert all(bytes(block) == bytes([n]) * 1000 for n, block in enumerate(kept))
        worker.do("drop", "blocks")
        worker.end()
    monkeypatch.undo()
    assert coordinator(heap) != first
    assert_whole(heap)


def test_many_successors_in_a_row(heap: Heap) -> None:
    block = heap.put(b"abc")
    seen = set()
    for _ in range(5):
        garbage = [heap.alloc(MIB) for _ in range(5)]
        del garbage
        pid = coordinator(heap)
        assert pid not in seen
        seen.add(pid)
        heap._request(2)  # it may be killed in the middle of giving back
        kill(pid)
    assert heap.scavenge(all=True) is not None
    assert bytes(block) == b"abc"
    assert_whole(heap)
    stats = heap.stats()
    assert stats.heap_sys - stats.heap_released <= 4 * 8192


def test_sigterm_makes_room_for_a_successor(heap: Heap) -> None:
    first = coordinator(heap)
    with leaves(first):
        os.kill(first, signal.SIGTERM)
    assert Path(heap._path).exists(), "the heap has users"
    assert coordinator(heap) != first


def test_it_does_not_hold_a_pipeline(heap_name: str) -> None:
    """`cmd | cat` ends when cmd does, though the coordinator that cmd started lives on."""
    script = (
        "import sys, shmheap\n"
        f"heap = shmheap.open({heap_name!r}, capacity='1MiB')\n"
        "heap.gc()\n"
        "print('made', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    command = f'"{sys.executable}" -P -c "$SCRIPT" 2>&1 | cat'
    with subprocess.Popen(
        ["sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"SCRIPT": script},
        text=True,
    ) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "made\n"
        with Heap.attach(heap_name) as heap:
            pid = coordinator(heap)
            rest, _ = shell.communicate("\n", timeout=PATIENCE_S)
            assert rest == ""
            assert coordinator(heap) == pid, "it lives"


def test_it_is_detached(heap: Heap) -> None:
    pid = coordinator(heap)
    found = psutil.Process(pid)
    assert os.getsid(pid) != os.getsid(0)
    assert found.ppid() != os.getpid()
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    open_files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    strangers = [
        path for path in open_files if path.startswith(("pipe:", "socket:", "/")) and
        not path.startswith(("/dev/null", "/dev/shm/", "/proc/"))
    ]  # fmt: skip
    assert strangers == [], "nothing of its starter's is open in it"


# Leaving


def test_it_leaves_with_the_last_user_and_cleans_up(heap_name: str) -> None:
    one = Heap.create(heap_name, capacity=MIB)
    two = Heap.attach(heap_name)
    nonce, path = one.nonce, Path(arena.file_path(heap_name))
    pid = coordinator(one)
    assert bell(nonce).exists()
    one.close()
    assert coordinator(two) == pid
    assert path.exists()
    with leaves(pid):
        two.close()
    assert not path.exists()
    assert not bell(nonce).exists()
    with pytest.raises(HeapNotFound):
        Heap.attach(heap_name)


def test_it_leaves_when_the_last_user_is_killed(heap_name: str) -> None:
    heap = Heap.create(heap_name, capacity=MIB, config=Config(lease_grace_s=0))
    nonce, path = heap.nonce, Path(arena.file_path(heap_name))
    with Worker() as worker:
        worker.do("attach", heap_name)
        worker.do("alloc_many", "blocks", 100, 1000)
        pid = coordinator(heap)
        heap.close()
        with leaves(pid):
            worker.kill()
    assert not path.exists()
    assert not bell(nonce).exists()


def test_what_is_to_be_kept_stays_until_unlinked(heap_name: str) -> None:
    config = Config(keep=True)
    heap = Heap.create(heap_name, capacity=MIB, config=config)
    path, nonce = Path(arena.file_path(heap_name)), heap.nonce
    heap.roots["a"] = heap.put(b"abc")
    heap.put(b"dropped").free()
    pid = coordinator(heap)
    with leaves(pid):
        heap.close()
    assert path.exists()
    with shmheap.open(heap_name, config=config) as again:
        assert again.nonce == nonce
        assert bytes(again.roots["a"]) == b"abc"
        pid = coordinator(again)
        assert again.stats().heap_objects == 1
        again.unlink()
        assert not path.exists()
        assert bytes(again.roots["a"]) == b"abc"
    # A coordinator of a heap without a name leaves with it.
    psutil.wait_procs([p for p in coordinators_of(str(path)) if p.pid == pid], PATIENCE_S)
    assert not bell(nonce).exists()


def test_unlink_of_a_kept_heap_that_nobody_uses(heap_name: str) -> None:
    heap = Heap.create(heap_name, capacity=MIB, config=Config(keep=True))
    pid, nonce = coordinator(heap), heap.nonce
    with leaves(pid):
        heap.close()
    shmheap.unlink(heap_name)
    assert not Path(arena.file_path(heap_name)).exists()
    for left in coordinators_of(arena.file_path(heap_name)):
        left.wait(PATIENCE_S)
    assert not bell(nonce).exists()


def test_an_unlinked_heap_works_on_for_its_users(heap: Heap) -> None:
    pid = coordinator(heap)
    with Worker() as worker:
        worker.do("attach", heap.name)
        heap.unlink()
        worker.do("put", "block", b"abc")
        block = worker.do("get", "block")
        assert bytes(block) == b"abc"
        assert coordinator(heap) == pid
        heap.alloc(MIB).free()
        assert heap.scavenge(all=True).released_bytes >= MIB
        kill(pid)
        assert coordinator(heap) != pid, "an unlinked heap finds a successor, too"
        worker.do("drop", "block")
        assert bytes(block) == b"abc"
        worker.end()
    assert_whole(heap)


def test_a_new_heap_of_that_name_is_left_alone(heap_name: str) -> None:
    old = Heap.create(heap_name, capacity=MIB)
    pid = coordinator(old)
    old.unlink()
    with Heap.create(heap_name, capacity=MIB) as new:
        with leaves(pid):
            old.close()
        assert Path(new._path).exists()
        Heap.attach(heap_name).close()


# What the dead leave


def test_what_a_killed_worker_held_is_freed(heap: Heap) -> None:
    with Worker() as worker:
        worker.do("attach", heap.name)
        for size in (16, 1000, 20_000, 200_000):
            worker.do("alloc_many", f"blocks {size}", 20, size)
        worker.do("put", "root", b"abc")
        worker.do("root_set", "name", "root")
        shared = worker.do("get", "root")
        assert heap.stats().heap_objects == 81
        worker.kill()
    until(heap, lambda: heap.stats().processes == 1)
    assert heap.stats().heap_objects == 1
    assert bytes(shared) == b"abc"
    report = heap.gc()
    assert report.swept == 0
    heap.scavenge(all=True)
    stats = heap.stats()
    assert stats.heap_inuse <= 4 * 8192, "its spans went back"
    assert bytes(heap.roots["name"]) == b"abc"
    heap.roots.clear()
    assert_whole(heap)


def test_the_report_says_what_the_dead_held(heap: Heap) -> None:
    with Worker() as worker:
        worker.do("attach", heap.name)
        worker.do("alloc", "block", MIB)
        worker.kill()
    freed: list[int] = []

    def found() -> bool:
        freed.append(heap.gc().freed_dead_bytes)
        return sum(freed) == MIB

    until(heap, found)
    assert heap.stats().heap_objects == 0


def test_orphaned_spans_are_used_by_others(heap: Heap) -> None:
    """Blocks that we hold in a span of a dead process stay; the rest of the span serves us."""
    with Worker() as worker:
        worker.do("attach", heap.name)
        worker.do("alloc_many", "blocks", 3000, 1000)
        blocks = worker.do("get", "blocks")
        kept = blocks[::50]
        del blocks
        worker.kill()
    until(heap, lambda: heap.stats().processes == 1)
    assert heap.stats().heap_objects == len(kept)
    before = heap.stats().heap_sys
    more = [heap.alloc(1000) for _ in range(2500)]
    assert heap.stats().heap_sys - before <= 10 * 8192, "pins"
    assert all(bytes(block) == bytes(1000) for block in [*more, *kept])
    assert_whole(heap)


def test_leases_of_the_dead_expire(heap_name: str) -> None:
    with Heap.create(heap_name, capacity=MIB, config=Config(lease_grace_s=0)) as heap:
        with Worker() as worker:
            worker.do("attach", heap_name)
            worker.do("put", "block", b"abc")
            handle = worker.do("reduce", "block")
            worker.do("drop", "block")
            until(heap, lambda: heap.stats().num_gc > 3)
            assert heap.stats().leases == 1, "its sender lives"
            worker.kill()
        until(heap, lambda: heap.stats().leases == 0)
        assert heap.stats().heap_objects == 0
        with pytest.raises(StaleHandle):
            shmheap.Lease(handle).take()
        until(heap, lambda: heap.stats().processes == 1)


def test_a_handle_of_the_dead_arrives_within_the_grace(heap_name: str) -> None:
    with Heap.create(heap_name, capacity=MIB, config=Config(lease_grace_s=10_000)) as heap:
        with Worker() as worker:
            worker.do("attach", heap_name)
            worker.do("put", "block", b"abc")
            handle = worker.do("reduce", "block")
            worker.kill()
        until(heap, lambda: heap.stats().processes == 1)
        assert heap.stats().leases == 1
        block = shmheap.Lease(handle).take()
        assert bytes(block) == b"abc"
        assert heap.stats().leases == 0
        until(heap, lambda: len(heap._shares()) == 1)
        heap.unlink()


def test_a_process_that_was_killed_in_the_middle_of_anything(heap: Heap) -> None:
    """Ten workers are killed while they allocate, hand over and free, wherever they are."""
    kept = [heap.put(bytes([n]) * 500) for n in range(50)]
    for size in (16, 3000, 100_000):
        workers = [Worker("fork", heap=heap) for _ in range(3)]
        for worker in workers:
            worker.start("churn", 1 << 30, size)
        for _ in range(5):
            heap.alloc(size).free()
            heap.gc()
        for worker in workers:
            worker.kill()
            worker.connection.close()
            worker.process.close()
    until(heap, lambda: heap.stats().processes == 1)
    heap.gc()
    heap.scavenge(all=True)
    assert all(bytes(block) == bytes([n]) * 500 for n, block in enumerate(kept))
    assert heap.stats().heap_objects == 50
    assert_whole(heap)


# S14: the trace


@pytest.mark.parametrize("way", ["config", "environment"])
def test_s14_the_trace_has_the_forms_of_2012(
    heap_name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    if way == "environment":
        monkeypatch.setenv("SHMHEAP_TRACE", "1")
    config = Config(trace=way == "config", log=str(log))
    with Heap.create(heap_name, capacity=16 * MIB, config=config) as heap:
        heap.alloc(5 * MIB).free()
        assert heap.scavenge(all=True).released_bytes >= 5 * MIB
        pid = coordinator(heap)
        with leaves(pid):
            heap.close()
    lines = [line for line in log.read_text().splitlines() if line.startswith("scvg")]
    summary = r"scvg(\d+): inuse: \d+, idle: \d+, sys: \d+, released: \d+, consumed: \d+ \(MB\)"
    assert all(re.fullmatch(summary + r"|scvg\d+: (GC forced|\d+ MB released)", s) for s in lines)
    released = next(
        at for at, line in enumerate(lines) if re.fullmatch(r"scvg\d+: 5 MB released", line)
    )
    after = lines[released + 1]
    assert after.endswith("inuse: 0, idle: 5, sys: 5, released: 5, consumed: 0 (MB)")


def test_s5_s6_it_collects_and_gives_back_by_itself(heap_name: str, tmp_path: Path) -> None:
    """With tenths of seconds for minutes; its trace, which comes through a pipe, is the event."""
    log = tmp_path / "log"
    os.mkfifo(log)
    config = Config(forced_gc_s=0.1, scavenge_after_s=0.1, trace=True, log=str(log))
    done = re.compile(rb"GC forced\n(?s:.*)5 MB released\n.*\n")
    said = b""
    with (
        open(os.open(log, os.O_RDWR), "rb", buffering=0) as trace,
        Heap.create(heap_name, capacity=16 * MIB, config=config) as heap,
    ):
        heap.alloc(5 * MIB).free()
        while not done.search(said):
            assert select.select([trace], [], [], PATIENCE_S)[0], "it does nothing by itself"
            said += trace.read(1 << 16)
        assert heap.stats().heap_released >= 5 * MIB
        assert_whole(heap)
        with leaves(coordinator(heap)):
            heap.close()
