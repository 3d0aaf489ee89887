"""shmheap: a heap that many processes share, and that gives memory back.

General layout, from the ground up:

    errors, config, stats   words that all rooms share
    rss                     the independent witness: what the kernel says
    _core (csrc/)           the core in C: whatever runs under a lock, or once per allocation
    arena, block            files and their names; handles and leases
    values, arrays          values as bytes and blocks
    containers, roots       shared lists and dicts; named roots
    sites, holders          where a block was made, who keeps it alive
    coordinator/            the one process per heap that reaps, collects and scavenges
    heap                    Heap: its docstring follows one allocation all the way down
    verify                  the books against the witness
    testing                 fake time and ordered events, also for users' tests
    plugins/                numpy: what is done for other packages; joblib, over a pool
    payload, wires          how a value travels; the pipes between a pool and a worker
    dispatch, pool          who has which task; Pool
    executor                ProcessPoolExecutor
    forking                 plain multiprocessing, which sends handles
    progress                a bar
    cli/                    the commands

Imports run one way, upwards; a test holds them to it. docs/invariants.md numbers what must hold.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if not sys.platform.startswith("linux"):
    raise ImportError(
        f"shmheap supports Linux only, not {sys.platform}: it needs MADV_REMOVE, open file "
        "description locks and robust futexes"
    )

if "t" in sys.abiflags:
    raise ImportError(
        "shmheap does not support free-threaded builds of CPython: its core relies on the GIL and "
        "on the stable ABI, which they lack before 3.15; use a build with the GIL"
    )

try:
    import shmheap._core  # noqa: F401  # the first that would be missing
except ModuleNotFoundError as error:
    raise ImportError(
        f"{__path__[0]} is shmheap's source; its core is where `pip install .` put it: "
        "run Python in another folder, or with -P"
    ) from error

from shmheap.block import Block, Lease
from shmheap.config import Config
from shmheap.containers import SharedDict, SharedList
from shmheap.errors import (
    CoordinatorLost,
    HeapCorrupt,
    HeapError,
    HeapExists,
    HeapFull,
    HeapNotFound,
    StaleHandle,
    UntrustedArena,
)
from shmheap.heap import Heap, open, unlink
from shmheap.holders import Holder
from shmheap.roots import Roots
from shmheap.stats import GCReport, HeapStats, PoolStats, ScavengeReport, Traffic

if TYPE_CHECKING:
    from shmheap.executor import ProcessPoolExecutor
    from shmheap.forking import install, uninstall
    from shmheap.payload import readonly
    from shmheap.pool import Pool

__version__ = "0.1.0"

__all__ = [
    "Block",
    "Config",
    "CoordinatorLost",
    "GCReport",
    "Heap",
    "HeapCorrupt",
    "HeapError",
    "HeapExists",
    "HeapFull",
    "HeapNotFound",
    "HeapStats",
    "Holder",
    "Lease",
    "Pool",
    "PoolStats",
    "ProcessPoolExecutor",
    "Roots",
    "ScavengeReport",
    "SharedDict",
    "SharedList",
    "StaleHandle",
    "Traffic",
    "UntrustedArena",
    "install",
    "open",
    "readonly",
    "uninstall",
    "unlink",
]

_LATER = {
    "Pool": "shmheap.pool",
    "ProcessPoolExecutor": "shmheap.executor",
    "install": "shmheap.forking",
    "readonly": "shmheap.payload",
    "uninstall": "shmheap.forking",
}
"""Imported when they are asked for: coordinators, and most programs, need no multiprocessing."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
