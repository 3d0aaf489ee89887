"""For tests, also those of programs that use shmheap: time that stands still, steps in order.

Tests that sleep are slow where they pass and wrong where the machine is busy. So time is injected
(`FakeClock`), and threads and processes that shall meet in one order are told it (`Sequencer`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

__all__ = ["FakeClock", "Sequencer"]


class FakeClock:
    """A clock that goes only when told to; it has the methods of `time` that shmheap uses.

    Args:
        start_s: what it shows at first, seconds.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_ns = round(start_s * 1e9)

    def monotonic_ns(self) -> int:
        """Return the time in ns."""
        return self._now_ns

    def monotonic(self) -> float:
        """Return the time in seconds."""
        return self._now_ns / 1e9

    def advance(self, seconds: float) -> None:
        """Let time pass. ValueError: backwards."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock does not go back: {seconds}")
        self._now_ns += round(seconds * 1e9)


_STEP: Final = struct.Struct("<q")
_GO: Final = b"g"
_TAKEN: Final = b"t"


class Sequencer:
    """Makes blocks of code in threads and processes run in one order, as trio's of this name does.

    Block 0 starts at once, block N when block N-1 has been left: in whatever way, also by SIGKILL.

        def child(seq):
            with seq(1):
                ...                # after the parent's first block, before its second

        with Sequencer() as seq:
            Process(target=child, args=(seq,)).start()
            with seq(0):
                ...
            with seq(2):
                ...

    It can be pickled and inherited: what travels is the address of a socket of the process that
    made it, so nothing is shared that a killed process could leave locked.

    Args:
        timeout_s: how long a block waits for its turn before it says that nobody came. It bounds
            how long a broken test hangs, and decides no test's outcome.
    """

    def __init__(self, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self._turns: _Turns | None = _Turns()
        self._address = self._turns.address
        self._maker = os.getpid()

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Return a context that is entered when all steps before this one have been left.

        Raises:
            ValueError: the step is negative, or was claimed before.
            TimeoutError: the step before was not left in time.
            RuntimeError: the sequencer was closed in the meantime.
        """
        with socket.socket(socket.AF_UNIX) as conn:
            conn.settimeout(self._timeout_s)
            answer = self._claim(conn, step)
            if answer == _TAKEN:
                raise ValueError(f"step {step} is negative, or was claimed before")
            if answer != _GO:
                raise RuntimeError(f"step {step}: the sequencer is closed")
            try:
                yield
            finally:
                # A child forked in the block has the socket too: closing this end is not enough.
                conn.shutdown(socket.SHUT_RDWR)

    def _claim(self, conn: socket.socket, step: int) -> bytes:
        """Wait for the step's turn; return what is answered, nothing if nobody answers any more."""
        try:
            conn.connect(self._address)
            conn.sendall(_STEP.pack(step))
            return conn.recv(1)
        except TimeoutError:
            raise TimeoutError(f"step {step}: no turn for {self._timeout_s} s") from None
        except ConnectionError:
            return b""

    def close(self) -> None:
        """End what gives the turns, in the process that made it; nothing elsewhere. Idempotent."""
        if self._turns is not None and os.getpid() == self._maker:
            self._turns.close()
            self._turns = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __getstate__(self) -> tuple[bytes, float]:
        return (self._address, self._timeout_s)

    def __setstate__(self, state: tuple[bytes, float]) -> None:
        self._address, self._timeout_s = state
        self._turns = None
        self._maker = 0


class _Turns:
    """The side that gives the turns: a thread that accepts, and one for each block claimed."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("")  # Linux: a fresh address in no directory, gone with the socket
        self._listener.listen(128)
        self.address: bytes = self._listener.getsockname()
        self._changed = threading.Condition()
        self._turn = 0
        self._claimed: set[int] = set()
        self._closed = False
        self._givers: list[tuple[threading.Thread, socket.socket]] = []
        self._acceptor = threading.Thread(target=self._accept, name="sequencer", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        _shut(self._listener)
        self._acceptor.join()
        self._listener.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for giver, conn in self._givers:
            _shut(conn)
            giver.join()
            conn.close()

    def _accept(self) -> None:
        while True:
            try:
                conn, _ = self._listener.accept()
            except OSError:
                return
            giver = threading.Thread(target=self._give, args=(conn,), daemon=True)
            self._givers.append((giver, conn))
            giver.start()

    def _give(self, conn: socket.socket) -> None:
        """Give one block its turn, and take it back when its end of the socket is gone."""
        step = _step_from(conn)
        if step is None:
            return
        if not self._claim(step):
            _send(conn, _TAKEN)
            return
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._turn == step)
            if self._closed:
                return
        _send(conn, _GO)
        with contextlib.suppress(OSError):
            conn.recv(1)
        with self._changed:
            self._turn += 1
            self._changed.notify_all()

    def _claim(self, step: int) -> bool:
        """Take a step; False if it was taken, or is none."""
        with self._changed:
            free = step >= 0 and step not in self._claimed
            self._claimed.add(step)
        return free


def _step_from(conn: socket.socket) -> int | None:
    with contextlib.suppress(OSError, struct.error):  # killed before it had claimed anything
        return int(_STEP.unpack(conn.recv(_STEP.size))[0])
    return None


def _send(conn: socket.socket, answer: bytes) -> None:
    with contextlib.suppress(OSError):  # killed while it waited: its block has been left, too
        conn.sendall(answer)


def _shut(sock: socket.socket) -> None:
    """End whoever is blocked on a socket, which closing it would not."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
