"""What tests have the workers of pools do."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

import shmheap

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

PATIENCE_S = 60.0
"""Bounds how long a broken test hangs, and decides no test's outcome."""

started: list[Any] = []
"""What the initializer was called with in this worker."""


def wait_for_ends() -> None:
    """Wait until pools have ended that do so in a thread of its own."""
    for thread in threading.enumerate():
        if thread.name == "shmheap-pool-end":
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def remember(*args: Any) -> None:
    started.append(args)


def what_was_remembered(_: object = None) -> list[Any]:
    return started


def quiet() -> None:
    """Warn nobody."""
    warnings.simplefilter("ignore")


def fail_to_start() -> NoReturn:
    sys.stderr = None
    raise RuntimeError("no worker can start")


def same(value: Any) -> Any:
    return value


def square(number: int) -> int:
    return number * number


def add(*numbers: int, extra: int = 0) -> int:
    return sum(numbers) + extra


def fail(number: int) -> NoReturn:
    raise ValueError(f"no {number}")


def raise_error(error: BaseException) -> NoReturn:
    raise error


def fail_at_three(number: int) -> int:
    return fail(number) if number == 3 else number


def pid(_: object = None) -> int:
    return os.getpid()


def lambda_of(_: object = None) -> Any:
    return lambda: None


def exit_with(status: int) -> NoReturn:
    os._exit(status)


def leave_with(status: int) -> NoReturn:
    sys.exit(status)


def die(_: object = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_three(number: int) -> int:
    if number == 3:
        die()
    return number


def block_on(connection: Connection) -> str:
    """Say that it has begun, and end when it is told to."""
    connection.send(os.getpid())
    return str(connection.recv())


def write_when_told(connection: Connection, fifo: str, marker: str) -> None:
    """Say that it has begun, and write a file once it is told to by somebody who opens a fifo."""
    connection.send(os.getpid())
    Path(fifo).read_bytes()
    Path(marker).touch()


def tell_and_wait(connection: Connection, *_kept: Any) -> None:
    """Say that it has begun, and never end."""
    connection.send(os.getpid())
    threading.Event().wait()


# Arrays


def double(array: NDArray[Any]) -> None:
    array *= 2


def doubled(array: NDArray[Any]) -> NDArray[Any]:
    return array * 2  # type: ignore[no-any-return]


def like(array: NDArray[Any]) -> NDArray[Any]:
    return np.full_like(array, 7)


def ones(n: int) -> NDArray[Any]:
    return np.ones(n)


def first_ten(n: int) -> NDArray[Any]:
    return np.ones(n)[:10]


def total(array: Any) -> float:
    return float(np.sum(array))


def total_of_list(arrays: list[NDArray[Any]]) -> float:
    return sum(total(array) for array in arrays)


def try_to_write(array: NDArray[Any]) -> str:
    try:
        array[...] = 0
    except ValueError as error:
        return str(error)
    return "written"


@dataclass
class Batch:
    """What a program has of its own, with arrays somewhere in it."""

    pixels: NDArray[Any]
    labels: dict[str, NDArray[Any]]
    about: pd.DataFrame


def brighter(batch: Batch) -> Batch:
    batch.pixels += 1
    batch.about["mean"] *= 2
    return Batch(batch.pixels * 2, batch.labels, batch.about)


def upper_half(table: pa.Table) -> pa.Table:
    """A view of it."""
    return table.slice(table.num_rows // 2)


def reversed_bytes(data: Any) -> Any:
    return type(data)(data[::-1])


def fill(block: shmheap.Block, byte: int) -> shmheap.Block:
    block[:] = bytes([byte]) * len(block)
    return block


def set_key(shared: Any, key: str, value: Any) -> None:
    shared[key] = value


class Unpicklable:
    """Can be sent, and not be received."""

    def __reduce__(self) -> Any:
        return fail, (1,)


def unpicklable(_: object = None) -> Unpicklable:
    return Unpicklable()


class Raises:
    """Raises where it is received."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return raise_error, (self.error(),)


def raises_when_unpickled(error: type[BaseException]) -> Raises:
    return Raises(error)


class Stale:
    """A block's handle that was sent before."""

    def __init__(self, message: bytes) -> None:
        self.message = message

    def __reduce__(self) -> Any:
        return pickle.loads, (self.message,)


def gone(pid: int) -> None:
    """Return once that process is dead."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert wait([fd], PATIENCE_S)
    os.close(fd)


def parent(script: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start a script that has workers, and talks by its stdin and stdout."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore::DeprecationWarning", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
    )
