"""What tool and workers share beside the heap: a board of figures, and a post that survives kills.

The board is a file without a name, mapped by all. Each worker has a row of 64-bit words that nobody
else writes, so whatever moment it is killed at, the row says how far it was. The post is one pipe
in packet mode: the kernel puts a whole letter in and takes a whole letter out, or nothing, so a
sender or reader that is killed loses its letter at most, and there is no lock that it could keep.
"""

from __future__ import annotations

import enum
import fcntl
import mmap
import os
import select
import time

ROW_WORDS = 16
ROWS = 4096
LETTER_BYTES = select.PIPE_BUF
"""A longer one would be cut in two packets."""
POST_BYTES = 1 << 20


class Field(enum.IntEnum):
    """The words of a row. Times are CLOCK_MONOTONIC ns, and ns."""

    PID = 0
    STEPS = 1
    OP = 2  # what it is doing, a number of `Op`
    SINCE = 3  # when that began
    DELAY_THEN = 4  # its run delay so far, at that moment
    LONGEST_NS = 5
    LONGEST_OP = 6
    STALLS = 7
    CONTROL_NS = 8  # longest step of those that touch no heap
    CHECKED = 9  # blocks whose bytes were looked at
    OPENED = 10  # letters
    STALE = 11  # letters whose block was gone, as it may be
    FULL = 12  # refusals
    FORKING = 13  # set before it forks a child, which has the next row


class Op(enum.IntEnum):
    """What a worker does in one step."""

    NONE = 0
    ATTACH = 1
    CHURN_SMALL = 2
    CHURN_LARGE = 3
    KEEP_SMALL = 4
    KEEP_LARGE = 5
    DROP = 6
    POST = 7
    OPEN = 8
    LEASE = 9
    ROOT_SET = 10
    ROOT_GET = 11
    ROOT_CLEAR = 12
    VIEW = 13
    ASK = 14
    FORK = 15
    CLOSE = 16
    CONTROL = 17
    HAND_OVER = 18


CONTROLS = (Op.CONTROL, Op.HAND_OVER)
"""What touches no heap: how long these take is the machine's doing."""


class Board:
    """The shared rows.

    Args:
        fd: of the file; made by `new`.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._words = memoryview(mmap.mmap(fd, ROWS * ROW_WORDS * 8)).cast("Q")

    @classmethod
    def new(cls) -> Board:
        """Make an empty one."""
        fd = os.memfd_create("soak-board")
        os.ftruncate(fd, ROWS * ROW_WORDS * 8)
        return cls(fd)

    def row(self, number: int) -> memoryview:
        """Return one row, a memoryview of `ROW_WORDS` integers."""
        return self._words[number * ROW_WORDS : (number + 1) * ROW_WORDS]

    def clear(self, number: int) -> None:
        """Make a row that of nobody."""
        row = self.row(number)
        for i in range(ROW_WORDS):
            row[i] = 0


class Post:
    """Letters on their way, in no order that anybody may count on.

    Args:
        fds: the pipe's two ends; made by `new`.
    """

    def __init__(self, fds: tuple[int, int]) -> None:
        self.fds = fds

    @classmethod
    def new(cls) -> Post:
        """Make an empty one."""
        fds = os.pipe2(os.O_DIRECT | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(fds[1], fcntl.F_SETPIPE_SZ, POST_BYTES)
        return cls(fds)

    def send(self, letter: bytes) -> bool:
        """Put a letter in; False: there is no room. ValueError: it is too long."""
        if len(letter) > LETTER_BYTES:
            raise ValueError(f"a letter has at most {LETTER_BYTES} bytes, not {len(letter)}")
        try:
            os.write(self.fds[1], letter)
        except BlockingIOError:
            return False
        return True

    def take(self) -> bytes | None:
        """Take a letter out; None: there is none."""
        try:
            return os.read(self.fds[0], LETTER_BYTES)
        except BlockingIOError:
            return None


class Meter:
    """Times the steps of this process into its row of the board.

    A step's wait is its time on the wall less its run delay: how long this process could have run
    and had no CPU, as the kernel counts it (schedstat). A busy machine is no stall. What is left is
    the CPU time that the step took and the time that it was blocked.
    """

    def __init__(self, row: memoryview, stall_ns: int) -> None:
        self._row = row
        self._stall_ns = stall_ns
        self._fd = open_schedstat("self")

    def begin(self, op: Op) -> None:
        """Start the step."""
        row = self._row
        row[Field.DELAY_THEN] = run_delay_ns(self._fd)
        row[Field.SINCE] = time.monotonic_ns()
        row[Field.OP] = op

    def end(self) -> None:
        """End it and write down how long it took."""
        row = self._row
        now_ns = time.monotonic_ns()
        wait_ns = waited_ns(row[Field.SINCE], now_ns, row[Field.DELAY_THEN], run_delay_ns(self._fd))
        op = row[Field.OP]
        row[Field.STEPS] += 1
        if op in CONTROLS:
            row[Field.CONTROL_NS] = max(row[Field.CONTROL_NS], wait_ns)
            return
        row[Field.STALLS] += wait_ns > self._stall_ns
        if wait_ns > row[Field.LONGEST_NS]:
            row[Field.LONGEST_OP] = op
            row[Field.LONGEST_NS] = wait_ns

    def close(self) -> None:
        """Forget the process that it measures: a forked child has one of its own."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def waited_ns(since_ns: int, now_ns: int, delay_then_ns: int, delay_now_ns: int) -> int:
    """Return a step's wait: see `Meter`. Not below 0: the two clocks are not read at once."""
    return max(0, now_ns - since_ns - max(0, delay_now_ns - delay_then_ns))


def open_schedstat(pid: int | str) -> int | None:
    """Open the kernel's account of a process; None: it keeps none, or the process is gone."""
    try:
        return os.open(f"/proc/{pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def run_delay_ns(fd: int | None) -> int:
    """Return how long the process was ready to run and did not, ns; 0 if nobody counts."""
    return 0 if fd is None else int(os.pread(fd, 96, 0).split()[1])
