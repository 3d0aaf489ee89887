"""What the gunicorn of test_gunicorn.py serves. Loaded once, by the master, before it forks."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

import shmheap

heap = shmheap.open(os.environ["SHMHEAP_TEST_NAME"])
of_the_master = heap.put(b"m" * 70_000)


def hang(_key: str, _body: bytes) -> bytes:
    """As a worker does whose timeout is to end it: by SIGABRT, which it handles."""
    held = [heap.alloc(5000) for _ in range(100)]
    threading.Event().wait()
    return b"%d" % len(held)


def hang_deaf(key: str, body: bytes) -> bytes:
    """Ended by SIGKILL, which follows."""
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    return hang(key, body)


def put(key: str, body: bytes) -> bytes:
    heap.roots[key] = heap.put(body)
    return b"ok"


def get(key: str, _body: bytes) -> bytes:
    return bytes(heap.roots[key])


def who(_key: str, _body: bytes) -> bytes:
    return b"%d %s" % (os.getpid(), bytes(of_the_master[:1]))


ANSWERS: dict[str, Callable[[str, bytes], bytes]] = {
    "hang": hang,
    "hang_deaf": hang_deaf,
    "put": put,
    "get": get,
    "who": who,
}


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    answer = ANSWERS[environ["PATH_INFO"][1:]]
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    text = answer(environ["QUERY_STRING"], body)
    start_response("200 OK", [("Content-Length", str(len(text)))])
    return [text]
