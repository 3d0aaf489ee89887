"""The guard of the test runs: it names, cleans up and fails what a run leaves behind.

Each test starts an inner pytest run, which has an id, workers and a guard of its own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import leak_guard
import psutil
import pytest

FAKE_COORDINATOR = """
import subprocess, sys

def start(name):
    code = "import signal; print(flush=True); signal.pause()"
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code, "-m", "shmheap", "run", name],
        stdout=subprocess.PIPE, start_new_session=True,
    )
    child.stdout.readline()
    child.returncode = 0  # it is meant to be left
    return child.pid
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder for an inner run that finds the guard."""
    monkeypatch.setenv("PYTHONPATH", str(Path(leak_guard.__file__).parent))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(fake_coordinator=FAKE_COORDINATOR)
    return pytester


def run(inner: pytest.Pytester, *args: str, leave_s: float = 20) -> pytest.RunResult:
    return inner.runpytest_subprocess(
        "-p", "leak_guard", "-p", "no:cacheprovider", "-o", f"shmheap_leave_s={leave_s}", *args
    )


def run_id(result: pytest.RunResult) -> str:
    found = re.search(r"by run ([0-9a-f]{8})", result.stdout.str())
    assert found, result.stdout.str()
    return found[1]


def assert_clean(result: pytest.RunResult) -> None:
    """Nothing of the inner run is on the machine any more."""
    assert leak_guard.arenas(run_id(result)) == []
    assert leak_guard.processes(run_id(result)) == []


@pytest.mark.parametrize("args", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_clean_run_passes_and_says_so(inner: pytest.Pytester, args: tuple[str, ...]) -> None:
    inner.makepyfile("def test(heap_name): assert heap_name")
    result = run(inner, *args)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["shmheap: nothing left behind by run *"])


def test_names_are_unique_and_workers_share_the_run_id(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import pathlib, pytest

        @pytest.mark.parametrize("n", range(4))
        def test(heap_name, new_heap_name, n):
            with open("names", "a") as file:
                print(heap_name, new_heap_name(), sep="\\n", file=file)
    """)
    result = run(inner, "-n", "2", "--dist", "each")
    names = (inner.path / "names").read_text().split()
    assert len(names) == len(set(names)) == 16
    assert {name.split("-")[0] for name in names} == {f"t{run_id(result)}"}
    assert {name.split("-")[1] for name in names} == {"gw0", "gw1"}


@pytest.mark.parametrize("args", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_left_arena_fails_the_run(inner: pytest.Pytester, args: tuple[str, ...]) -> None:
    inner.makepyfile("""
        import os

        def test(heap_name):
            open(f"/dev/shm/shmheap.{os.getuid()}.{heap_name}", "w").close()
    """)
    result = run(inner, *args)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*left behind by run *", "file /dev/shm/shmheap.*"])
    assert_clean(result)


def test_a_doorbell_that_nobody_can_ring_fails_the_run(inner: pytest.Pytester) -> None:
    bell = leak_guard.SHM / f"sem.shmheap.{os.getuid()}.{os.urandom(8).hex()}.bell"
    inner.makepyfile(f"def test(): open('{bell}', 'w').close()")
    result = run(inner)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"file {bell}"])
    assert not bell.exists()


def test_a_doorbell_of_a_living_arena_stays(
    inner: pytest.Pytester, heap_name: str, request: pytest.FixtureRequest
) -> None:
    nonce = os.urandom(8)
    arena = leak_guard.SHM / f"shmheap.{os.getuid()}.{heap_name}"
    bell = leak_guard.SHM / f"sem.shmheap.{os.getuid()}.{nonce.hex()}.bell"
    request.addfinalizer(lambda: leak_guard.remove([arena, bell]))
    arena.write_bytes(b"header" + nonce[::-1])
    inner.makepyfile(f"def test(): open('{bell}', 'w').close()")
    run(inner)
    assert bell.exists()


def test_a_coordinator_that_stays_is_ended_and_fails_the_run(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import fake_coordinator

        def test(heap_name):
            fake_coordinator.start(heap_name)
    """)
    result = run(inner, "-n", "1", leave_s=0)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["process *-m shmheap run t*"])
    assert_clean(result)


def test_somebody_who_still_maps_an_arena_is_ended(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import os, subprocess, sys

        CODE = '''
        import mmap, signal, sys
        with open(sys.argv[1], "w+b") as file:
            file.truncate(4096)
            arena = mmap.mmap(file.fileno(), 4096)
        print(flush=True)
        signal.pause()
        '''.replace("\\n        ", "\\n")

        def test(heap_name):
            arena = f"/dev/shm/shmheap.{os.getuid()}.{heap_name}"
            child = subprocess.Popen(
                [sys.executable, "-c", CODE, arena], stdout=subprocess.PIPE, start_new_session=True
            )
            child.stdout.readline()
            child.returncode = 0  # it is meant to be left
            print("pid", child.pid)
    """)
    result = run(inner, "-s", leave_s=0)
    [left] = (int(pid) for pid in re.findall(r"pid (\d+)", result.stdout.str()))
    result.stdout.fnmatch_lines([f"process {left}: *", "file /dev/shm/shmheap.*"])
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
    assert_clean(result)


def test_a_killed_worker_leaves_nothing(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import os, pathlib, signal
        import leak_guard, shmheap

        def test(heap_name):
            heap = shmheap.Heap.create(heap_name, capacity="16MiB")
            block = heap.alloc(1 << 20)
            heap.gc()  # the coordinator has answered, so it has its doorbell
            bell = leak_guard.SHM / f"sem.{shmheap.arena.bell_name(heap.nonce)[1:]}"
            assert bell in leak_guard.doorbells()
            pathlib.Path("bells").write_text(f"{bell}\\n")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    result = run(inner, "-n", "1")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*worker 'gw0' crashed*", "shmheap: nothing left behind by run *"])
    assert_clean(result)
    bells = (inner.path / "bells").read_text().split()
    assert len(bells) == 1
    assert not Path(bells[0]).exists()


def test_only_its_own_runs_coordinators_are_the_guards() -> None:
    command = ["python", "-P", "-m", "shmheap", "run"]
    assert leak_guard.is_coordinator([*command, "t1234abcd-gw0-1"], "1234abcd")
    assert leak_guard.is_coordinator([*command, "/tmp/x/shmheap.0.t1234abcd-gw0-1"], "1234abcd")
    assert not leak_guard.is_coordinator([*command, "t99999999-gw0-1"], "1234abcd")
    assert not leak_guard.is_coordinator(["vi", "t1234abcd-gw0-1"], "1234abcd")
    assert not leak_guard.is_coordinator([], "1234abcd")
