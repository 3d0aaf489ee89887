"""Values of all kinds for a pool's tasks, what tells whether they arrived, and the tasks.

A value is known by its digest: type, form and every byte. Tasks say the digest of what reached them
and send something back, so that both ways are looked at. Workers import this module.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import pickle
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import numpy.ma

import shmheap
from shmheap.payload import MIN_BYTES
from shmheap.wires import ALONE_BYTES, BODY_BYTES, READ_BYTES

warnings.simplefilter("ignore", RuntimeWarning)  # of a heap that is too small, in workers too
faulthandler.register(signal.SIGUSR1, all_threads=True)  # "where are you?"

PATTERN = random.Random("poolsoak").randbytes(1 << 22)
STREAM_HEAD_BYTES = 120
"""About what a task's pickle has besides its argument's bytes."""
EDGES = (16, BODY_BYTES - STREAM_HEAD_BYTES, MIN_BYTES, READ_BYTES, ALONE_BYTES)
"""Sizes at which a value begins to go another way."""
DTYPES = ("u1", "<i4", ">i4", "f8", ">f8", "c16", "?", "M8[us]", "m8[D]", "S3", "f2", "V5")
FIELDS = [("a", "<i4"), ("b", ">f8"), ("c", "S3")]
LONGEST_LINGER_S = 0.02


# --------------------------------------------------------------------------------------------------
# Values


class Values:
    """Makes values at random.

    Args:
        source: decides which.
        heap: where some of them lie; None: nowhere.
        min_bytes: the pool's, around which sizes are chosen, too.
    """

    def __init__(self, source: random.Random, heap: shmheap.Heap | None, min_bytes: int) -> None:
        self._random = source
        self._heap = heap
        self._edges = (*EDGES, min_bytes)

    def any(self, depth: int = 0) -> Any:
        """Return a value of any kind."""
        kinds: list[Callable[[], Any]] = [self._plain] * 3 + [self._bytes] * 3 + [self._array] * 6
        kinds += [self._odd_array, self._view]
        if self._heap is not None:
            kinds += [self._heap_array] * 3 + [self._block, self._shared]
        if depth < 2:
            kinds += [lambda: self._several(depth)]
        if self._random.random() < 0.01:
            kinds = [self._frame]
        return self._random.choice(kinds)()

    def nbytes(self) -> int:
        """Return a size: around an edge, or small."""
        edge = self._random.choice(self._edges)
        if self._random.random() < 0.4:
            return self._random.randrange(64)
        return max(0, edge + self._random.randint(-40, 40))

    def _data(self) -> bytes:
        nbytes = self.nbytes()
        start = self._random.randrange(len(PATTERN) - nbytes)
        return PATTERN[start : start + nbytes]

    def _plain(self) -> Any:
        number = self._random.randrange(1 << 70)
        return self._random.choice([number, -1.5 * number, str(number), None, True, {number: ()}])

    def _bytes(self) -> Any:
        data = self._data()
        return self._random.choice([bytes, bytearray, lambda data: data.decode("latin1")])(data)

    def _array(self) -> Any:
        """A plain array: of any dtype, form, order; read-only or not."""
        dtype = np.dtype(self._random.choice([*DTYPES, FIELDS]))
        data = self._data()
        usable = len(data) // dtype.itemsize * dtype.itemsize
        raw = np.frombuffer(bytearray(data[:usable]), "u1")
        if dtype.kind == "?":
            raw = raw & 1
        return self._formed(raw.view(dtype))

    def _formed(self, array: Any) -> Any:
        if len(array) % 6 == 0 and self._random.random() < 0.6:
            array = array.reshape(2, 3, -1)
        forms: list[Callable[[Any], Any]] = [lambda a: a] * 3
        forms += [lambda a: a.T, lambda a: a[::-1], lambda a: a[..., ::2], lambda a: a[:1]]
        forms += [shmheap.readonly, np.asfortranarray, lambda a: np.broadcast_to(a, (2, *a.shape))]
        if array.size:
            forms += [lambda a: a.reshape(-1)[:1].reshape(())]  # no dimension
        return self._random.choice(forms)(array)

    def _odd_array(self) -> Any:
        """What NumPy pickles in ways of its own."""
        n = self._random.choice([0, 5, 6000])
        return self._random.choice(
            [
                lambda: np.array([None, "a", 3] * n, dtype=object),
                lambda: np.ma.masked_array(np.arange(n), np.arange(n) % 3 == 0),
                lambda: np.matrix(np.arange(2 * n).reshape(2, -1)),
                lambda: np.rec.array(np.zeros(n, FIELDS)),
                lambda: np.array(["text", "\N{SNOWMAN}"] * n),
                lambda: np.arange(n)[::2].astype("M8[s]"),
            ]
        )()

    def _view(self) -> Any:
        data = self._data()
        usable = len(data) // 8 * 8
        return memoryview(data if self._random.random() < 0.5 else bytearray(data[:usable]))

    def _heap_array(self) -> Any:
        assert self._heap is not None
        try:
            return self._formed(self._heap.array(self._array().reshape(-1)))
        except shmheap.HeapFull:
            return self._array()

    def _block(self) -> Any:
        assert self._heap is not None
        try:
            block = self._heap.put(self._data() or b"x")
        except shmheap.HeapFull:
            return None
        return block if self._random.random() < 0.5 else memoryview(block)[1:]

    def _shared(self) -> Any:
        assert self._heap is not None
        try:
            made: Any = self._heap.list()
            made.extend([1, "two", 3.0])
        except shmheap.HeapFull:
            return None
        return made

    def _several(self, depth: int) -> Any:
        values = [self.any(depth + 1) for _ in range(self._random.randrange(4))]
        if values and self._random.random() < 0.3:
            values.append(values[0])  # the same object
        return self._random.choice([list, tuple, lambda values: dict(enumerate(values))])(values)

    def _frame(self) -> Any:
        try:
            import pandas as pd
        except ImportError:
            return None
        n = self._random.choice([0, 10, 6000])
        return pd.DataFrame({"a": np.arange(n), "b": np.arange(n) / 7, "c": ["x", "yz"] * (n // 2)})


def value_of(seed: int) -> Any:
    """Return the value that a task makes: both sides know it by its seed."""
    return Values(random.Random(seed), None, MIN_BYTES).any()


def digest(value: Any) -> str:
    """Return what two values have in common if they are the same to every byte."""
    found = hashlib.blake2b(digest_size=12)
    _feed(found.update, value)
    return found.hexdigest()


def _feed(update: Callable[[bytes], object], value: Any) -> None:
    update(type(value).__qualname__.encode())
    if isinstance(value, np.ma.MaskedArray):
        _feed(update, value.filled(0))
        _feed(update, np.ma.getmaskarray(value))
    elif isinstance(value, np.ndarray):
        if not value.dtype.hasobject:  # NumPy's pickles come in the machine's order of bytes
            value = value.astype(value.dtype.newbyteorder("="))
        update(repr((value.dtype, value.shape)).encode())
        update(repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes())
    elif isinstance(value, (bytes, bytearray, shmheap.Block)):
        update(bytes(value))
    elif isinstance(value, memoryview):
        update(repr((value.format, value.shape)).encode() + value.tobytes())
    elif isinstance(value, (list, tuple, shmheap.SharedList)):
        for item in list(value):
            _feed(update, item)
    elif isinstance(value, dict):
        _feed(update, list(value.items()))
    elif type(value).__name__ == "DataFrame":
        _feed(update, [(name, value[name].to_numpy()) for name in value.columns])
    else:
        update(repr(value).encode())


# --------------------------------------------------------------------------------------------------
# Tasks: (number, value, seed) -> (number, digest of the value, what is sent back)

Answer = tuple[int, str, Any]


def same(number: int, value: Any, seed: int) -> Answer:
    """Send it back."""
    return number, digest(value), value


def look(number: int, value: Any, seed: int) -> Answer:
    """Send nothing back."""
    return number, digest(value), None


def make(number: int, value: Any, seed: int) -> Answer:
    """Send something else back: arrays that this process has made."""
    return number, digest(value), value_of(seed)


def linger(number: int, value: Any, seed: int) -> Answer:
    """Take a while, in which somebody may be killed."""
    time.sleep(random.Random(seed).random() * LONGEST_LINGER_S)
    return same(number, value, seed)


def scribble(number: int, value: Any, seed: int) -> Answer:
    """Write over a copy that is the task's own."""
    found = digest(value)
    if isinstance(value, np.ndarray) and value.flags.writeable and value.dtype == np.uint8:
        value[...] = 7
    return number, found, None


class OddError(Exception):
    """Can be pickled, and not be unpickled."""

    def __init__(self, _one: int, _two: int) -> None:
        super().__init__("odd")


class Trap:
    """Can be sent, and not be received."""

    def __reduce__(self) -> Any:
        return _spring, ()


def _spring() -> NoReturn:
    raise LookupError("a trap")


class Unsendable:
    """Cannot be sent."""

    def __reduce__(self) -> Any:
        raise LookupError("unsendable")


class Stale:
    """A handle of a block that is gone."""

    def __init__(self, message: bytes) -> None:
        self.message = message

    def __reduce__(self) -> Any:
        return pickle.loads, (self.message,)


def fail(number: int, value: Any, seed: int) -> NoReturn:
    """Raise."""
    raise ZeroDivisionError(number)


def fail_oddly(number: int, value: Any, seed: int) -> NoReturn:
    """Raise what arrives as a TypeError."""
    raise OddError(1, 2)


def send_a_trap(number: int, value: Any, seed: int) -> Any:
    """Send what arrives as a LookupError."""
    return value, Trap()


def send_the_unsendable(number: int, value: Any, seed: int) -> Any:
    """Send what cannot be pickled."""
    return value, Unsendable()


def die(number: int, value: Any, seed: int) -> None:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def end(number: int, value: Any, seed: int) -> NoReturn:
    """End without a word."""
    os._exit(3)


def leave(number: int, value: Any, seed: int) -> NoReturn:
    """End in order."""
    sys.exit(4)


def starred(task: Callable[..., Any], *arguments: Any) -> Any:
    """Call a task, for starmap."""
    return task(*arguments)


def unpacked(arguments: tuple[Any, ...]) -> Any:
    """Call a task, for map."""
    return starred(*arguments)
