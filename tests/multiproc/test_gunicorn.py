"""A real gunicorn that loads its application first and forks workers, which come and go.

What happens is told by gunicorn's own hooks, a line each through a pipe; the server listens on a
Unix socket.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from processes import PATIENCE_S

from shmheap import Heap, _core

pytest.importorskip("gunicorn", reason="gunicorn is not installed: pip install '.[test]'")

WORKERS = 2
SETTINGS = """
import os
bind = "unix:{socket}"
workers = {workers}
preload_app = True
timeout = 2
graceful_timeout = 2
control_socket_disable = True

def tell(word, pid=0):
    os.write({fd}, f"{{word}} {{pid}}\\n".encode())

def post_worker_init(worker):
    tell("serves", worker.pid)

def child_exit(server, worker):
    tell("gone", worker.pid)
"""


class UnixConnection(http.client.HTTPConnection):
    """To a server on a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self.path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(self.path)


class Server:
    """A gunicorn, and what its hooks tell."""

    def __init__(self, path: Path, events: IO[str], process: subprocess.Popen[str]) -> None:
        self.path = path
        self.events = events
        self.process = process

    def ask(self, action: str, key: str = "", body: bytes = b"") -> bytes:
        connection = UnixConnection(self.path)
        try:
            connection.request("POST", f"/{action}?{key}", body)
            response = connection.getresponse()
            if response.status != 200:
                raise http.client.HTTPException(response.status)
            return response.read()
        finally:
            connection.close()

    def until(self, **wanted: int) -> dict[str, set[int]]:
        """Read what is told until so many workers serve and are gone; gives their pids."""
        told: dict[str, set[int]] = {word: set() for word in ("serves", "gone")}
        while any(len(told[word]) < number for word, number in wanted.items()):
            line = self.events.readline()
            assert line, "gunicorn has ended"
            word, pid = line.split()
            told[word].add(int(pid))
        return told


@pytest.fixture
def server(heap: Heap, tmp_path: Path) -> Iterator[Server]:
    reader, writer = os.pipe()
    path = tmp_path / "socket"
    settings = tmp_path / "gunicorn.conf.py"
    settings.write_text(SETTINGS.format(socket=path, workers=WORKERS, fd=writer))
    folder = Path(__file__).parents[1] / "support"
    command = [sys.executable, "-P", "-m", "gunicorn", "-c", str(settings), "gunicorn_app:app"]
    with (
        (tmp_path / "log").open("w") as log,
        os.fdopen(reader) as events,
        subprocess.Popen(
            [*command, "--pythonpath", str(folder)],
            cwd=tmp_path,
            env=os.environ | {"SHMHEAP_TEST_NAME": heap.name},
            pass_fds=[writer],
            stdout=log,
            stderr=log,
            text=True,
        ) as process,
    ):
        os.close(writer)
        try:
            yield Server(path, events, process)
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
            print((tmp_path / "log").read_text())


def coordinator(heap: Heap) -> int:
    header = _core.Observer(heap._fileno()).header()
    assert header["coordinator_alive"]
    return header["coordinator_pid"]


def test_a_heap_outlives_gunicorns_workers(heap: Heap, server: Server) -> None:
    heap.gc()
    first = coordinator(heap)
    workers = server.until(serves=WORKERS)["serves"]
    assert server.ask("put", "thumb", b"t" * 9000) == b"ok"

    for action in ("hang", "hang_deaf"):
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            server.ask(action)
        told = server.until(serves=1, gone=1)
        assert told["gone"] <= workers
        workers = workers - told["gone"] | told["serves"]
        assert server.ask("get", "thumb") == b"t" * 9000
        heap.gc()
        assert heap.stats().heap_objects == 2, "the master's and the one that has a name"
        heap.check()

    os.kill(server.process.pid, signal.SIGHUP)
    told = server.until(serves=WORKERS, gone=WORKERS)
    assert told["gone"] == workers
    for number in range(10):
        pid, master = server.ask("who").split()
        assert int(pid) in told["serves"]
        assert master == b"m"
        assert server.ask("put", f"key{number % 3}", b"%d" % number) == b"ok"
    assert [bytes(heap.roots[f"key{n}"]) for n in range(3)] == [b"9", b"7", b"8"]

    server.process.terminate()
    assert server.process.wait(PATIENCE_S) == 0
    for name in list(heap.roots):
        del heap.roots[name]
    heap.gc()
    stats = heap.stats()
    assert (stats.heap_objects, stats.pins, stats.leases, stats.processes) == (0, 0, 0, 1)
    heap.check()
    assert coordinator(heap) == first, "it lives on"
