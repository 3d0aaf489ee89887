"""The coordinator's process: one per heap, from start to end.

    open, create ---------.
    who finds it dead --- ensure_running -- detached --.
    shmheap run NAME, in the foreground --------------- main
                                                         |    Steward: is there another already?
    workers -- doorbell, a semaphore -- thread - eventfd |
    SIGTERM, SIGINT ---------------------------- eventfd +--> Watcher --> Coordinator.run
    exits ------------------------------------- pidfds   |
                                                         v
                                  the heap's last user gone: unlink the arena and the doorbell

The doorbell is a POSIX semaphore: anybody of the heap can ring it without a connection, and it
outlives whoever rings and whoever listens. It cannot be polled, so a thread sleeps on it.

What this module imports is what every coordinator costs: it imports nothing that is only nice to
have, and a test holds it to that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import stat
import sys
import threading
import time
from typing import TYPE_CHECKING, Final

from shmheap import _core
from shmheap.arena import bell_name, make_bell, open_arena, read_config, remove
from shmheap.coordinator.loop import Coordinator, Outcome
from shmheap.coordinator.pacing import PATIENCE_MS, next_gc_bytes
from shmheap.coordinator.reaper import Watcher
from shmheap.coordinator.stale import remove_stale
from shmheap.coordinator.trace import Trace
from shmheap.errors import CoordinatorLost, HeapError
from shmheap.limits import Cgroup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

    from shmheap.config import Config
    from shmheap.coordinator import Steward

    Handler = Callable[[int, FrameType | None], object] | signal.Handlers

LOG_FORMAT: Final = "%(asctime)s %(process)d %(levelname)s %(message)s"


def ensure_running(heap: str, config: Config, arena_fd: int = -1) -> None:
    """Start a coordinator for a heap, detached from this process; if there is one, it leaves again.

    Args:
        heap: name or path of the arena's file.
        config: the heap's, for the interpreter and the log.
        arena_fd: an open file of the arena, which may have lost its name by then, or lose it now;
            -1: the coordinator opens it by that name.

    Returns when the interpreter runs, which takes two turns of the scheduler; not when it has
    become the coordinator.

    Raises CoordinatorLost if the interpreter cannot be run, or the log not be opened.
    """
    line = command(heap, config)
    try:
        _core.spawn_detached(line, config.log, arena_fd)
    except OSError as error:
        what = "its log" if error.filename == config.log else "its interpreter"
        raise CoordinatorLost(
            f"the heap's coordinator cannot be started: {what} {error.filename}: {error.strerror} "
            f"(tried: {shlex.join(line)})"
        ) from error


def command(heap: str, config: Config) -> list[str]:
    """Return the command line of a heap's coordinator.

    -P: else `python -m` would find a folder `shmheap` in the working directory first.
    """
    return [config.python or sys.executable, "-P", "-m", "shmheap", "run", heap]


def is_detached() -> bool:
    """Return whether this process has nobody to talk to, as one that `ensure_running` started."""
    return _is_null_device(1) and (_is_null_device(0) or _is_given())


def main(heap: str, *, foreground: bool, steward: Steward | None = None) -> int:
    """Be a heap's coordinator until its last user has left, or until SIGTERM or SIGINT.

    Args:
        heap: name or path of the arena's file.
        foreground: started by hand: talks on stderr, and waits for a first user.
        steward: the coordinator's place, if the caller has taken it.

    Returns the exit status: 0, also if the heap has a coordinator already; 1 if it failed.

    Raises HeapNotFound, UntrustedArena as `open_arena` does. To be called in the main thread.
    """
    arena_fd, path = _open(heap)
    config = read_config(arena_fd, path)
    try:
        steward = steward or _take_place(arena_fd)
    except BlockingIOError:
        if foreground:
            print(f"{heap} has a coordinator already", file=sys.stderr)
        return 0
    if steward.closing():  # whoever closed it may have died before it removed the names
        remove(path, os.fstat(arena_fd), steward.nonce)
        return 0
    with _logger(config, foreground=foreground) as log:
        with contextlib.suppress(OSError):  # of the directory, which need not be readable
            for stale in remove_stale(config.directory, ensure_running):
                log.info("removed the stale heap %s: its processes were killed", stale)
        try:
            outcome = _serve(steward, config, log, linger=foreground)
        except Exception:
            log.exception("%s: the coordinator failed", path)
            if (file := os.fstat(arena_fd)).st_nlink == 0:  # nobody else removes the doorbell
                remove(path, file, steward.nonce)
            return 1
        log.info("%s: %s", path, outcome.value)
    if outcome is Outcome.CLOSED or _gone_for_good(steward, arena_fd):
        remove(path, os.fstat(arena_fd), steward.nonce)
    return 0


def _open(heap: str) -> tuple[int, str]:
    """Open the arena: the one that we were given, whatever its name is now, or that of the name."""
    if not (is_detached() and _is_given()):
        return open_arena(heap)
    arena_fd, _ = open_arena("/proc/self/fd/0")
    with contextlib.suppress(HeapError):
        named_fd, _ = open_arena(heap)
        if os.path.samestat(os.fstat(named_fd), os.fstat(arena_fd)):
            _replace(arena_fd, named_fd)  # opened by its name it shows that to `shmheap ls`
        else:
            os.close(named_fd)
    return arena_fd, heap


def _replace(fd: int, by_fd: int) -> None:
    os.dup2(by_fd, fd, inheritable=False)
    os.close(by_fd)


def _take_place(arena_fd: int) -> Steward:
    """Become the coordinator, which must wait for a process that was stopped in attaching."""
    try:
        while True:
            with contextlib.suppress(TimeoutError):  # after ten seconds
                return _core.Steward(arena_fd)
    finally:
        if is_detached():  # what we were given says that somebody is starting
            _replace(0, os.open(os.devnull, os.O_RDONLY))


def _serve(steward: Steward, config: Config, log: logging.Logger, *, linger: bool) -> Outcome:
    trace = Trace(sys.stderr if config.trace or _environment_says_trace() else None)
    with doorbell(bell_name(steward.nonce)) as bell_fd:
        watcher = Watcher(bell_fd)
        if steward.stats()["num_gc"] == 0:
            steward.set_next_gc(next_gc_bytes(0, config.gc_percent))
        left = Cgroup().left_bytes
        coordinator = Coordinator(
            steward, config, time, watcher, trace, log, linger=linger, left_bytes=left
        )

        def stop(_signal: int, _frame: FrameType | None) -> None:
            coordinator.stop()
            os.eventfd_write(bell_fd, 1)

        with (
            contextlib.closing(watcher),
            _handling({signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: signal.SIG_IGN}),
        ):
            return coordinator.run()


@contextlib.contextmanager
def doorbell(name: str) -> Iterator[int]:
    """Open or create a heap's doorbell; give an eventfd that is written whenever it rings.

    Raises UntrustedArena if its name is another's.
    """
    bell = make_bell(name)
    bell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    leaving = threading.Event()

    def listen() -> None:
        # A signal is the main thread's: it would end the wait here with an error.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not leaving.is_set():
            bell.acquire()
            os.eventfd_write(bell_fd, 1)

    listener = threading.Thread(target=listen, name="doorbell", daemon=True)
    listener.start()
    try:
        yield bell_fd
    finally:
        # The thread must be gone before the fd is: the number may be another file's next.
        leaving.set()
        bell.release()
        listener.join()
        bell.close()
        os.close(bell_fd)


@contextlib.contextmanager
def _handling(handlers: Mapping[signal.Signals, Handler]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _logger(config: Config, *, foreground: bool) -> Iterator[logging.Logger]:
    """Log to `Config.log`, and to stderr in the foreground; else to nowhere."""
    log = logging.Logger("shmheap.coordinator", logging.INFO)
    handlers: list[logging.Handler] = [logging.NullHandler()]
    if config.log is not None:
        handlers.append(logging.FileHandler(config.log))
    if foreground:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        log.addHandler(handler)
    try:
        yield log
    finally:
        for handler in handlers:
            handler.close()


def _environment_says_trace() -> bool:
    return os.environ.get("SHMHEAP_TRACE", "") not in ("", "0")


def _gone_for_good(steward: Steward, arena_fd: int) -> bool:
    """Return whether a heap that was to be kept was unlinked and has no users either.

    Who closed it may have removed the doorbell before we made it.
    """
    if steward.closing():
        return True
    if os.fstat(arena_fd).st_nlink > 0:
        return False
    steward.set_patience(PATIENCE_MS)
    try:
        return steward.try_close()
    except TimeoutError:
        return False  # whoever was stopped in attaching is about to be its user


def _is_given() -> bool:
    """Return whether stdin is a file: `ensure_running` passes the arena so."""
    try:
        return stat.S_ISREG(os.fstat(0).st_mode)
    except OSError:
        return False


def _is_null_device(fd: int) -> bool:
    try:
        return os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev
    except OSError:
        return True  # closed: nobody there either
