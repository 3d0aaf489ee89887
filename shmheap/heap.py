"""Heap: create, attach, open, alloc, put, close, unlink.

One allocation, all the way down:

    heap.alloc(64)                       csrc/py/heap.c a method of the C base class, no Python
      size class, a spare Block object   csrc/py/py.h, size_classes.h
      own process lock                   csrc/lock.c    nobody else wants it but the coordinator
      a bit of the private bitmap        csrc/span.c    a hint
      CAS of the block word FREE -> LIVE csrc/block.c   the arbiter
      a pin: this process holds it       csrc/block.c
    no free block is known:
      freed by others, pages given back  csrc/span.c
      a run of pages, under the heap lock csrc/pages.c
      committed before use               csrc/os.c
    no memory: _alloc_when_short below asks the coordinator, waits as it may, and says why not

Freeing goes the same way back: drop the pin, count down, and whoever brings the count to 0 frees.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import math
import os
import shlex
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import posix_ipc

from shmheap import _core, arena, block, values
from shmheap._core import Block, DictBase, ListBase
from shmheap.arrays import ArrayHeap, block_under
from shmheap.config import Config, parse_size
from shmheap.containers import SharedDict, SharedList
from shmheap.coordinator import ASK_GC, ASK_SCAVENGE_AGED, ASK_SCAVENGE_ALL, WANT_MEMORY
from shmheap.errors import (
    CoordinatorLost,
    HeapCorrupt,
    HeapError,
    HeapFull,
    HeapNotFound,
    StaleHandle,
    UntrustedArena,
)
from shmheap.holders import Holder, find_holders
from shmheap.roots import Roots
from shmheap.sites import find_sites, is_tracking, track
from shmheap.stats import GCReport, HeapStats, ScavengeReport

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import NDArray

    from shmheap.values import AnyCodec

__all__ = ["Heap", "open", "unlink"]

ANSWER_S = 60.0
"""How long gc() and scavenge() wait for the coordinator unless told otherwise."""

RECLAIM_S = 10.0
"""How long an allocation waits for one collection before it is refused: a coordinator that is alive
answers in milliseconds, one that must be started first in tenths of a second, and on a machine that
has no time for it in seconds. Refusing memory that is idle would be worse than waiting."""

LARGEST = 5
"""How many holders, and how many places that made blocks, an error names."""

CELLS = "the books of a further handle, lease or name"
CELLS_BYTES = 8192
"""What a process takes at a time for its handles and leases: a page of the heap."""

STARTING_S = 1.0
"""How long this process waits for a start of its own to be over: of an interpreter, not of what it
does then. Not for ever: it may lie on a disk that does not answer."""

T = TypeVar("T")
C = TypeVar("C", SharedDict[Any, Any], SharedList[Any])

_open_heaps: weakref.WeakValueDictionary[int, Heap] = weakref.WeakValueDictionary()
"""Every open heap of this process, by its id()."""
_found_heaps: dict[int, Heap] = {}
"""Those that were attached because a handle of theirs was unpickled, by nonce."""
_finding = threading.RLock()
"""Held while one is attached. Never around a loop: CPython 3.12 and 3.13 leave a `with` that a
signal's handler interrupts where a loop turns back without releasing it."""


class Heap(ArrayHeap):
    """This process's use of a heap that many processes share.

    Made by `create`, `attach` or `shmheap.open`. A context manager: leaving it closes, and never
    unlinks. A heap lives until its last user leaves, or until unlinked with Config(keep=True).
    Can be pickled: the receiver attaches. Safe to use from several threads, and after os.fork.
    """

    name: str = ""
    _path: str
    _config: Config
    _nonce: int
    _bell: _Bell

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        capacity: int | str | None = None,
        config: Config | None = None,
    ) -> Self:
        """Make a new heap and start its coordinator.

        Args:
            name: How others find it; None: a name that nobody has. At most 200 bytes, no slash.
            capacity: Bytes that blocks can have together ("4GiB" or an int). Costs nothing until
                touched. None: the size of the file system.
            config: How it behaves; stored with it.

        Raises:
            CoordinatorLost: Its coordinator cannot be started: Config.python or Config.log will
                not do. Nothing is left behind.
            HeapExists: There is a heap of that name.
            HeapFull: The file system has not even room for a heap's tables.
            ValueError: No heap can have that name or capacity, or Config.directory is in no tmpfs.

        Cost: some 20 system calls, and the start of the coordinator: 2 ms on an idle machine.
        """
        config = config or Config()
        name = arena.random_name() if name is None else arena.check_name(name)
        path = arena.file_path(name, config.directory)
        nbytes = arena.capacity_of(config.directory) if capacity is None else parse_size(capacity)
        if nbytes <= 0:
            raise ValueError(f"a heap's capacity is at least one page, not {nbytes} bytes")
        fd = arena.make_file(path, nbytes, config)
        try:
            file = os.fstat(fd)
        except OSError:
            os.close(fd)
            raise
        try:
            heap = cls._attached(fd, path, name, new=True)
        except BaseException:
            arena.unlink_same(path, file)  # nobody was told of it
            raise
        if heap is None:
            raise HeapNotFound(2, "the heap was closed by somebody else", path)
        return heap

    @classmethod
    def attach(cls, name: str, *, directory: str | None = None) -> Self:
        """Use a heap that exists.

        Args:
            name: Its name.
            directory: Where it lies, if it was made with Config(directory=...).

        Raises:
            HeapNotFound: There is none of that name, or it is being unlinked.
            UntrustedArena: Its file is not one of this user's heaps, or of another version.
            CoordinatorLost: It has no coordinator, and none can be started.

        Cost: some 15 system calls, and the start of a coordinator if there is none.
        """
        return cls._attach_path(arena.file_path(name, directory), name)

    @classmethod
    def _attach_path(cls, path: str, name: str) -> Self:
        fd, path = arena.open_arena(path)
        heap = cls._attached(fd, path, name)
        if heap is None:
            raise HeapNotFound(2, "the heap is being unlinked", path)
        return heap

    @classmethod
    def _attached(cls, fd: int, path: str, name: str, *, new: bool = False) -> Self | None:
        """Take a slot in the arena; None if it is closing. Closes the fd.

        Args:
            fd: the arena's.
            path: its name, which a new one is given here: by a user, who is seen to die.
            name: the heap's.
            new: it was just made.
        """
        heap = cls()
        heap.name = name
        heap._path = path
        try:
            bell = _Bell(path, os.fstat(fd))
            heap._config = arena.read_config(fd, path)  # before anything is changed
            if not heap._attach(fd, path, bell.ring):
                _finish_closing(fd, path)
                return None
            if new:
                arena.give_name(fd, path)
        finally:
            os.close(fd)
        heap._nonce = heap.nonce
        heap._bell = bell
        heap._keep(heap._config.keep)
        if heap._config.dump:
            heap._dump()
        bell.fd = heap._fileno()
        bell.serve(heap.nonce, heap._config)
        try:
            if heap._coordinator_alive():
                bell.ring(False)
                bell.require_service()
            elif heap._may_start():
                bell.require_successor()
        except CoordinatorLost:
            heap._keep(True)  # it is as it was before
            heap._give_up()
            raise
        bell.warns = True
        _open_heaps[id(heap)] = heap
        return heap

    @property
    def config(self) -> Config:
        """How the heap behaves, as stored with it."""
        return self._config

    @property
    def roots(self) -> Roots:
        """The named roots: blocks that live because they have a name."""
        return Roots(self)

    # Memory

    def _alloc_when_short(
        self, nbytes: int, zero: bool, timeout: float | None, status: int
    ) -> Block:
        """Go on where the core found no memory: reclaim, wait, or say why not (rule 16)."""
        if nbytes > self.capacity:
            raise self._full(nbytes, status)
        deadline = math.inf if timeout is None else time.monotonic() + float(timeout)
        self._reclaim(min(RECLAIM_S, max(deadline - time.monotonic(), 0) or RECLAIM_S))
        try:  # around both: a signal's handler may raise as soon as the first has returned
            self._waiting(True)
            return self._alloc_or_wait(nbytes, zero, deadline)
        finally:
            self._waiting(False)

    def _alloc_or_wait(self, nbytes: int, zero: bool, deadline: float) -> Block:
        """Try whenever memory came free; whoever is refused tries once more before it raises."""
        told = -1
        refused = False
        while True:
            seen = self._freed()
            found = self._alloc_once(nbytes, zero)
            if isinstance(found, Block):
                return found
            if refused or time.monotonic() >= deadline:
                raise self._full(nbytes, found, waiting=refused)
            refused = not self._wait_memory(seen)
            # Once for each state of the heap, the coordinator looks what it can do about it.
            if seen != told or not self._coordinator_alive():
                self._want(WANT_MEMORY)
                told = seen

    def _reclaim(self, timeout_s: float = RECLAIM_S) -> None:
        """Have the dead reaped, garbage collected and idle pages given back, once."""
        tickets = [(kind, self._request(kind)) for kind in (ASK_GC, ASK_SCAVENGE_ALL)]
        for kind, ticket in tickets:
            if self._await(kind, ticket, timeout_s) is None:
                return  # nobody answers: do not wait a second time

    def _full(self, nbytes: int, status: int, *, waiting: bool = False, what: str = "") -> HeapFull:
        stats = self.stats()
        free = stats.capacity - stats.heap_inuse
        allowed, unit, longest = self._room()
        own = self._config.memory_limit_bytes
        limit_bytes = 0
        if waiting:
            limit = "waiting"
        elif status == _core.LIMIT and own is not None and own < allowed + unit:
            limit, limit_bytes = "memory_limit", own
        elif status == _core.LIMIT:
            limit, limit_bytes = "cgroup", allowed
        elif status == _core.NOSPACE:
            limit, limit_bytes = "tmpfs", arena.capacity_of(self._config.directory)
        elif nbytes <= free:
            limit = "fragmentation"
        else:
            limit, limit_bytes = "capacity", stats.capacity
        return HeapFull(
            limit,  # type: ignore[arg-type]
            requested_bytes=nbytes,
            limit_bytes=limit_bytes,
            capacity_bytes=stats.capacity,
            in_use_bytes=stats.heap_inuse,
            idle_bytes=stats.heap_idle,
            free_bytes=free,
            largest_free_bytes=longest,
            holders=self._largest_holders(),
            allocated_at=self._largest_sites(),
            what=what,
        )

    def _largest_holders(self) -> Iterator[tuple[str, int | str, int]]:
        held_by: Counter[tuple[str, int | str]] = Counter()
        with contextlib.suppress(MemoryError):  # this process's own, to count in
            for kind, who, held in self._shares():
                held_by[kind, who] += held
        return ((*who, held) for who, held in held_by.most_common(LARGEST))

    def _largest_sites(self) -> Iterable[tuple[str, int]]:
        made_at: Counter[str] = Counter()
        for site in find_sites(self):
            made_at[site.where] += site.nbytes
        return made_at.most_common(LARGEST)

    def _make_room(self, status: int, asked: bool) -> None:
        """Reclaim for the cells in which handles, leases and names are kept, or say why not."""
        if asked:
            raise self._full(CELLS_BYTES, status, what=CELLS)
        self._reclaim()

    def dict(
        self,
        name: str | None = None,
        value: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = (),
        *,
        codec: AnyCodec = None,
    ) -> SharedDict[Any, Any]:
        """Return a dict that all processes share: a new one, or that of a name.

        Args:
            name: The named root that it is, made if there is none; None: a new one without a name.
            value: What is in it if it is made now: what dict takes.
            codec: Takes values that have no form of their own: "pickle", which runs code of
                whoever may write to the heap when it reads, or an object with name, dumps, loads.

        Raises TypeError if the name is that of something else, or the value cannot be shared.

        Cost: the roots lock if it has a name; two blocks and filling it if it is made.
        """
        return self._collection(SharedDict, name, value, codec)

    def list(
        self, name: str | None = None, value: Iterable[Any] = (), *, codec: AnyCodec = None
    ) -> SharedList[Any]:
        """Return a list that all processes share: a new one, or that of a name.

        Args:
            name: The named root that it is, made if there is none; None: a new one without a name.
            value: What is in it if it is made now: what list takes.
            codec: As for dict.

        Raises TypeError if the name is that of something else, or the value cannot be shared.

        Cost: that of dict.
        """
        return self._collection(SharedList, name, value, codec)

    def _collection(self, kind: type[C], name: str | None, value: Any, codec: AnyCodec) -> C:
        named = Roots(self, values.check_codec(codec))
        if name is not None and name in named:
            with contextlib.suppress(KeyError):
                return _checked(named[name], kind, name)
        made = kind._new(self, codec)
        made._fill(value)
        return made if name is None else _checked(named.setdefault(name, made), kind, name)

    # The coordinator's services

    def gc(self, timeout: float | None = ANSWER_S) -> GCReport:
        """Run a whole collection now and wait for it.

        Args:
            timeout: Seconds to wait; None: for ever. A process that is stopped inside an operation
                stalls a collection.

        Raises CoordinatorLost if no answer comes in time.

        Cost: the coordinator's pass over all pages and block words, and a way there and back.
        """
        return GCReport.from_fields(self._ask(ASK_GC, timeout)[:9])

    def scavenge(self, *, all: bool = False, timeout: float | None = ANSWER_S) -> ScavengeReport:
        """Give memory that is idle for Config.scavenge_after_s back to the system now.

        Args:
            all: Give back everything that is idle, however short a time.
            timeout: Seconds to wait; None: for ever.

        Raises CoordinatorLost if no answer comes in time.

        Cost: the coordinator's; a fifth of a second for a GiB of pages of 4 KiB.
        """
        kind = ASK_SCAVENGE_ALL if all else ASK_SCAVENGE_AGED
        return ScavengeReport.from_fields(self._ask(kind, timeout)[:4])

    def _ask(self, kind: int, timeout: float | None) -> tuple[int, ...]:
        seconds = math.inf if timeout is None else float(timeout)
        if not seconds >= 0:
            raise ValueError(f"a timeout is a number of seconds from 0 on, or None: not {timeout}")
        ticket = self._request(kind)
        self._require_coordinator()
        fields = self._await(kind, ticket, seconds)
        if fields is None:
            raise CoordinatorLost(
                f"the coordinator of {self.name!r} did not answer within {timeout} s; "
                + self._why_no_answer()
            )
        return fields

    def _require_coordinator(self) -> None:
        """Have one, alive or just started. Raises CoordinatorLost if that cannot be."""
        if self._coordinator_alive():
            self._bell.require_service()
        else:
            self._bell.require_successor()

    def _why_no_answer(self) -> str:
        log = self._config.log
        hint = f"see its log {log}" if log else "set Config.log to see why"
        if self._coordinator_alive():
            return hint
        from shmheap.coordinator.process import command

        return f"none is running; tried: {shlex.join(command(self._path, self._config))}; {hint}"

    def stats(self) -> HeapStats:
        """Return the heap's numbers now. Cost: one system call, no lock."""
        return HeapStats(**self._stats())

    def check(self) -> None:
        """Walk every invariant of the heap, with its locks held one after the other.

        Raises HeapCorrupt that names each one that does not hold. Cost: a pass over all records.
        """
        found = self._check()
        if found:
            raise HeapCorrupt(
                f"the heap {self.name!r} is corrupt, in {len(found)} places:\n"
                + "\n".join(found)
                + f"\n`shmheap verify --deep {self.name}` says what that means and what to do"
            )

    def holders(self, block: Block | DictBase | ListBase | NDArray[Any]) -> tuple[Holder, ...]:
        """Return who keeps a block alive: names, processes by their handles, leases, other blocks.

        Args:
            block: One of this heap, a shared dict or list, or an array that lies in the heap. Its
                handle here is among those who keep it alive.

        Raises StaleHandle if the handle was freed, ValueError if it is another heap's or lies in
        none, and TypeError for anything else.
        Cost: a pass over the heap, and one more for each level of blocks between this one and the
        nearest name.
        """
        offset = self._offset_of(block)
        return find_holders(self, [offset])[offset]

    def _offset_of(self, held: Block | DictBase | ListBase | NDArray[Any]) -> int:
        if isinstance(held, (Block, DictBase, ListBase)):
            block: Block | None = held if isinstance(held, Block) else held._block
        elif hasattr(held, "__array_interface__"):
            block = block_under(held, self)
        else:
            raise TypeError(
                f"it needs a Block, a shared dict or list, or an array, not {type(held).__name__!r}"
            )
        if block is None:
            raise ValueError("the array does not lie in this heap")
        if block._nonce != self.nonce:
            raise ValueError("the block is another heap's")
        return block.offset

    # Ending

    def unlink(self) -> None:
        """Remove the heap's name: nobody attaches any more, and it goes with its last user.

        Idempotent; also of a heap that is closed. Cost: some system calls.
        """
        if not self.closed:
            self._mark_unlinked()
        _unlink_path(self._path, self._nonce)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _find, (self._path, self.nonce)

    def __repr__(self) -> str:
        try:
            stats = self.stats()
        except (ValueError, HeapError):  # closed, maybe just now; or a fork left it behind
            return f"<shmheap.Heap {self.name!r}: {'closed' if self.closed else 'not usable'}>"
        return (
            f"<shmheap.Heap {self.name!r}: {stats.heap_alloc} bytes in {stats.heap_objects} "
            f"blocks, capacity {self.capacity}>"
        )


def _checked(found: object, kind: type[C], name: str) -> C:
    if not isinstance(found, kind):
        raise TypeError(f"the root {name!r} is a {type(found).__name__}, no {kind.__name__}")
    return found


class _Bell:
    """Rings the coordinator's doorbell, and starts a successor where there is none (I-9)."""

    def __init__(self, path: str, file: os.stat_result) -> None:
        self._path = path
        self._file = file
        self.fd = -1
        """The arena's, as long as this process uses it: an unlinked heap has no other name."""
        self._semaphore: posix_ipc.Semaphore | None = None
        self._bell_name = ""
        """As of now, when this process is the user that the heap is of."""
        self._serving: tuple[int, Config] | None = None
        self._starting: _thread.LockType | None = None
        """Released once the successor that this process started last runs, or could not be run."""
        self.problem: str | None = None
        """Why none could be started, or woken, when that was last tried. Whoever needs no answer
        goes on."""
        self._told: str | None = None
        """The problem of which the program was warned; once for several in a row."""
        self.warns = False

    def serve(self, nonce: int, config: Config) -> None:
        """Say whose bell it is: known only once the arena is mapped."""
        self._bell_name = arena.bell_name(nonce)
        self._serving = nonce, config

    def ring(self, starts: bool, waits: bool = False, over: bool = False) -> None:
        """Wake the coordinator.

        Args:
            starts: There is none, and of all who found that out it is us to start a successor.
            waits: Return only once it runs: this process may end now. Else nobody waits for it.
            over: The heap is closed for ever, by us: remove its names, should the coordinator not.
        """
        if self._serving is None:
            return
        nonce, config = self._serving
        if starts:
            self._start(config, waits)
        elif waits:
            self.settle()
        self._tell()
        if not starts:
            self._starting = self.problem = None
            self._release()
        if over:
            arena.remove(self._path, self._file, nonce)

    def require_successor(self) -> None:
        """Return once this process has started a successor, whoever else does so at this moment.

        Raises CoordinatorLost if none can be started.
        """
        if self._serving is not None and self._starting is None:
            self._start(self._serving[1], True)
        self.settle()
        self.require_service()

    def require_service(self) -> None:
        """Raise CoordinatorLost if nobody could be started or woken when that was last tried."""
        self._told = self.problem
        if self.problem is not None:
            raise CoordinatorLost(self.problem)

    def _start(self, config: Config, waits: bool) -> None:
        """Start a successor, which looks at everything then.

        In a thread: until it runs, the kernel may have to give four others their turn.
        """
        from shmheap.coordinator import process  # here: forked while it is imported is for ever

        done = _thread.allocate_lock()
        done.acquire()

        def start() -> None:
            try:
                arena.check_bell(self._bell_name)
                process.ensure_running(self._path, config, self._arena_fd())
            except (CoordinatorLost, UntrustedArena) as error:
                self.problem = str(error)
            else:
                self.problem = None
            finally:
                done.release()

        self._starting = done
        if waits:
            start()
            return
        try:
            _thread.start_new_thread(start, ())
        except RuntimeError:  # no more threads
            start()

    def _tell(self) -> None:
        problem, told = self.problem, self._told
        self._told = problem
        if self.warns and problem is not None and told is None:
            warnings.warn(problem, RuntimeWarning, stacklevel=3)

    def settle(self) -> None:
        """Return once the last start by this process is over."""
        if self._starting is not None and self._starting.acquire(timeout=STARTING_S):
            self._starting.release()

    def _arena_fd(self) -> int:
        """The arena's, or -1: a daemonizer has closed it, and its number may be another file's."""
        try:
            return self.fd if os.path.samestat(os.fstat(self.fd), self._file) else -1
        except OSError:
            return -1

    def _release(self) -> None:
        try:
            if self._semaphore is None:
                self._semaphore = arena.open_bell(self._bell_name)
            self._semaphore.release()
        except UntrustedArena as error:
            self.problem = str(error)
        except (posix_ipc.Error, OSError):
            # It is about to start, and looks at everything then; or this process can open nothing
            # now, and it looks at its next tick: no reason to fail what has been done.
            self._semaphore = None


def open(name: str, *, capacity: int | str | None = None, config: Config | None = None) -> Heap:
    """Attach to the heap of that name, or create it and start its coordinator.

    Args:
        name: At most 200 bytes, no slash.
        capacity: Bytes, for creating; see Heap.create.
        config: How it behaves. A heap that exists must have been made with the same.

    Raises ValueError if the heap exists and was made with another config or capacity, and what
    Heap.create and Heap.attach raise.

    Cost: theirs.
    """
    directory = config.directory if config else None
    while True:
        try:
            heap = Heap.attach(name, directory=directory)
        except HeapNotFound:
            try:
                return Heap.create(name, capacity=capacity, config=config)
            except FileExistsError:
                time.sleep(0.001)  # somebody else was faster, or is about to remove an old one
                continue
        _require_same(heap, capacity, config)
        return heap


def _require_same(heap: Heap, capacity: int | str | None, config: Config | None) -> None:
    problem = None
    if config is not None and config != heap.config:
        made, asked = asdict(heap.config), asdict(config)
        other = [name for name in made if made[name] != asked[name]]
        problem = "was made with " + ", ".join(f"{n}={made[n]!r}, not {asked[n]!r}" for n in other)
    elif capacity is not None and not _is_capacity_of(heap, parse_size(capacity)):
        problem = f"has a capacity of {heap.capacity} bytes, not {capacity}"
    if problem is not None:
        heap.close()
        raise ValueError(f"the heap {heap.name!r} exists and {problem}")


def _is_capacity_of(heap: Heap, nbytes: int) -> bool:
    """Whether a heap made with that capacity, of which it takes whole pages, is like this one."""
    page_bytes: int = _core.Observer(heap._fileno()).header()["page_bytes"]
    return nbytes - nbytes % page_bytes == heap.capacity


def unlink(name: str, *, directory: str | None = None) -> None:
    """Remove a heap's name: nobody attaches any more, and it goes with its last user.

    Args:
        name: The heap's.
        directory: Where it lies, if it was made with Config(directory=...).

    Raises HeapNotFound if there is none, UntrustedArena if it is another user's.

    Cost: Heap.attach's.
    """
    path = arena.file_path(name, directory)
    fd, _ = arena.open_arena(path, read_only=True)
    file = os.fstat(fd)
    os.close(fd)
    try:
        with Heap.attach(name, directory=directory) as heap:
            heap._require_coordinator()  # which removes the doorbell once nobody is there
            heap.unlink()
    except (CoordinatorLost, HeapCorrupt):
        _remove_name_and_bell(path)
    except UntrustedArena:
        arena.unlink_same(path, file)  # this user's, and no heap that this version can use


def _remove_name_and_bell(path: str) -> None:
    fd, _ = arena.open_arena(path, read_only=True)
    try:
        arena.remove(path, os.fstat(fd), _core.Observer(fd).nonce)
    finally:
        os.close(fd)


def _unlink_path(path: str, nonce: int) -> None:
    """Remove the name, unless it is that of another file by now."""
    try:
        fd, _ = arena.open_arena(path, read_only=True)
    except (HeapNotFound, UntrustedArena):
        return
    try:
        seen = _core.Observer(fd)
        if seen.nonce == nonce:
            if seen.header()["fault"]:  # its coordinator has left, and removes no doorbell
                arena.remove_bell(arena.bell_name(nonce))
            arena.unlink_same(path, os.fstat(fd))
    except UntrustedArena:
        return
    finally:
        os.close(fd)


def _finish_closing(fd: int, path: str) -> None:
    """A heap that closes for ever: its coordinator removes it, or if that died, whoever sees it."""
    seen = _core.Observer(fd)
    if not seen.header()["coordinator_alive"]:
        arena.remove(path, os.fstat(fd), seen.nonce)


def _find(path: str, nonce: int) -> Heap:
    """Return an open heap of this process with that nonce, or attach to it."""
    found = _known(nonce)
    if found is None:
        with _finding:
            found = _known(nonce) or _attach_found(path, nonce)
    return found


def _known(nonce: int) -> Heap | None:
    for reference in _open_heaps.valuerefs():
        heap = reference()
        if heap is not None and not heap.closed and heap.nonce == nonce:
            return heap
    return None


def temporary() -> Heap:
    """Make a heap without a name to remember: unlinked when nobody has it any more, or at exit."""
    heap = Heap.create()
    weakref.finalize(heap, _unlink_path, heap._path, heap.nonce)
    return heap


def ask_open_heaps(look: Callable[[Heap], T | None]) -> T | None:
    """Return the first that is not None of what open heaps of this process answer."""
    for reference in _open_heaps.valuerefs():
        heap = reference()
        if heap is not None and not heap.closed:
            try:
                found = look(heap)
            except (HeapError, ValueError):  # a fork left it behind, or it was closed just now
                continue
            if found is not None:
                return found
    return None


def _attach_found(path: str, nonce: int) -> Heap:
    try:
        heap = Heap._attach_path(path, os.path.basename(path).split(".", 2)[-1])
    except HeapNotFound as error:
        raise StaleHandle(f"the heap of this handle is gone: {path}") from error
    if heap.nonce != nonce:
        heap.close()
        raise StaleHandle(f"the heap of this handle is gone, and {path} is another one")
    _found_heaps[nonce] = heap
    return heap


def _close_all() -> None:
    for reference in _open_heaps.valuerefs():
        heap = reference()
        if heap is not None:
            heap.close()
    _found_heaps.clear()


def _forget_starts() -> None:
    """In a forked child: the threads that start coordinators are its parent's."""
    for heap in _open_heaps.values():
        heap._bell._starting = None


if is_tracking():
    track(Heap)
block.find_heaps_with(_find)
atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_starts)  # before it needs a start of its own
os.register_at_fork(after_in_parent=_core.after_fork, after_in_child=_core.after_fork)
