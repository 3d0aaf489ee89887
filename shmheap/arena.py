"""Names and files of arenas: made without a name, trusted only after a look.

An arena is one POSIX shared-memory object of mode 0600. It is formatted while it has no name
(O_TMPFILE), and linked when it is whole and whoever makes it uses it or leads it: so nobody ever
opens half of one, a death in between leaves nothing behind, and one with a name that nobody alive
uses is stale. Whoever opens one by name checks owner, mode and kind here, and the core
checks the header.

A coordinator imports this, so it imports neither pathlib nor secrets: 10 ms of a successor's start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from typing import NamedTuple

import posix_ipc

from shmheap import _core
from shmheap.config import Config
from shmheap.errors import HeapExists, HeapFull, HeapNotFound, UntrustedArena
from shmheap.limits import first_limit_bytes

__all__ = [
    "DIRECTORY",
    "MAX_NAME_BYTES",
    "ArenaFile",
    "bell_name",
    "bell_path",
    "check_bell",
    "check_name",
    "file_path",
    "find_arenas",
    "find_bells",
    "give_name",
    "is_same",
    "make_bell",
    "make_file",
    "open_arena",
    "open_bell",
    "random_name",
    "read_config",
    "remove",
    "remove_bell",
    "unlink_same",
]

DIRECTORY = "/dev/shm"
PREFIX = "shmheap"
MAX_NAME_BYTES = 200
"""With the prefix, the uid and the doorbell's name it stays below the 255 of a file name."""

BELL_BYTES = 32
"""Of a semaphore's file: sizeof(sem_t) where pointers have 64 bits."""


class ArenaFile(NamedTuple):
    """An arena that lies in a directory."""

    name: str
    uid: int
    path: str


def check_name(name: str) -> str:
    """Return the name if an arena can have it.

    Raises TypeError, or ValueError that says what is wrong; before any system call.
    """
    if not isinstance(name, str):
        raise TypeError(f"a heap's name is a str, not {type(name).__name__}")
    if not name:
        raise ValueError("a heap's name must not be empty")
    if "/" in name:
        raise ValueError(f"a heap's name must not contain a slash: {name!r}")
    if not name.isprintable():
        raise ValueError(f"a heap's name must not contain control characters: {name!r}")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"a heap's name must be valid Unicode: {name!r}") from None
    if size > MAX_NAME_BYTES:
        raise ValueError(f"a heap's name has at most {MAX_NAME_BYTES} bytes, this one {size}")
    return name


def random_name() -> str:
    """Return a name that nobody has."""
    return f"{os.getpid()}-{os.urandom(8).hex()}"


def _random_nonce() -> int:
    return int.from_bytes(os.urandom(8)) >> 1 | 1


def file_path(name: str, directory: str | None = None) -> str:
    """Return where this user's arena of that name lies."""
    return f"{directory or DIRECTORY}/{PREFIX}.{os.geteuid()}.{check_name(name)}"


def bell_name(nonce: int) -> str:
    """Return the name of the semaphore that wakes the coordinator.

    It has the PID namespace in it: who looks for bells that nobody has mapped sees the processes
    of its own only, and a directory may be that of several containers.
    """
    return f"/{PREFIX}.{os.geteuid()}.{nonce:016x}.{_pid_namespace()}.bell"


def bell_path(name: str) -> str:
    """Return where libc keeps the semaphore of that name."""
    return f"{DIRECTORY}/sem.{name[1:]}"


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def capacity_of(directory: str | None) -> int:
    """Return the default capacity: the size of the file system, or the memory if it has none."""
    found = os.statvfs(directory or DIRECTORY)
    return found.f_blocks * found.f_frsize or os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGESIZE"
    )


def make_file(path: str, capacity: int, config: Config) -> int:
    """Make an arena of that many bytes, to be given that name: see `give_name`.

    Returns its fd, for the caller to close. Raises HeapFull (no room even for the header),
    ValueError (a capacity that cannot be, a directory that is in no tmpfs), OSError.
    """
    directory = os.path.dirname(path)
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        _format(fd, capacity, config)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _format(fd: int, capacity: int, config: Config) -> None:
    limit = first_limit_bytes(config)
    text = config.to_json().encode()
    if len(text) > _core.MAX_CONFIG_BYTES:
        raise ValueError(
            f"a config has at most {_core.MAX_CONFIG_BYTES} bytes as JSON, this one {len(text)}"
        )
    try:
        _core.format(fd, capacity, _random_nonce(), limit, text)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HeapFull("tmpfs", requested_bytes=_core.HEADER_BYTES) from error
        if error.errno == errno.EMEDIUMTYPE:
            raise ValueError(
                f"a heap lies in a tmpfs, and {config.directory or DIRECTORY} is in none: set "
                "Config.directory to a directory of one, or mount one (mount -t tmpfs)"
            ) from error
        if error.errno in (errno.EINVAL, errno.EFBIG):
            raise ValueError(f"a heap cannot have a capacity of {capacity} bytes") from error
        raise


def give_name(fd: int, path: str) -> None:
    """Give an arena its name. The caller uses or leads it already: it is never without anybody.

    Raises HeapExists.
    """
    here = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # With a directory fd Python calls linkat and follows the link to the file that has no name.
        os.link(str(fd), path, src_dir_fd=here, follow_symlinks=True)
    except FileExistsError:
        raise HeapExists(17, "there is a heap of that name already", path) from None
    finally:
        os.close(here)


def open_arena(heap: str, *, read_only: bool = False) -> tuple[int, str]:
    """Open an arena by name or absolute path, and look whether it is ours.

    Returns (fd, path); the fd is the caller's to close.

    Raises:
        HeapNotFound: There is none.
        UntrustedArena: Another user owns it, others may open it, it has a second name, or it is no
            regular file.
        ValueError: No heap can have that name.
    """
    path = heap if heap.startswith("/") else file_path(heap)
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    if not path.startswith(
        "/proc/"
    ):  # an unlinked heap is found through a process that has it open
        flags |= os.O_NOFOLLOW
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise HeapNotFound(2, "there is no heap of that name", path) from None
    except OSError as error:
        raise UntrustedArena(f"{path} cannot be opened: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        _trust(found, path)
        if found.st_nlink > 1:  # two heaps of ours would be one, if a neighbour could do this
            raise UntrustedArena(
                f"{path} has a further name, a hard link: "
                f"remove that (find {os.path.dirname(path)} -inum {found.st_ino})"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd, path


def _trust(found: os.stat_result, what: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UntrustedArena(f"{what} is not a regular file")
    if found.st_uid != os.geteuid():
        raise UntrustedArena(
            f"{what} belongs to user {found.st_uid}, not to {os.geteuid()}: "
            "have it removed, or make another heap"
        )
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise UntrustedArena(f"{what} may be opened by others (mode {mode:o}, not 600)")


def read_config(fd: int, path: str) -> Config:
    """Return the heap's Config from its header. Cost: two system calls; nothing is mapped.

    Raises UntrustedArena: it is no header that this version can use, or the Config is damaged.
    """
    try:
        return Config.from_json(_core.read_config(fd))
    except ValueError as error:
        raise UntrustedArena(f"{path} has a damaged configuration: {error}") from error


def is_same(path: str, file: os.stat_result) -> bool:
    """Whether the path still is that file's."""
    try:
        return os.path.samestat(file, os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def unlink_same(path: str, file: os.stat_result) -> None:
    """Remove the name, unless it is another file's by now. Idempotent."""
    if is_same(path, file):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def remove(path: str, file: os.stat_result, nonce: int) -> None:
    """Remove an arena's name, unless it is another arena's by now, and its doorbell. Idempotent.

    The doorbell first: whoever finds a name whose heap is closed finishes this.
    """
    remove_bell(bell_name(nonce))
    unlink_same(path, file)


# Doorbells. sem_open maps whatever regular file it may open: another user's who then cuts it off
# would have SIGBUS end us. Where nobody can rename another's file (/dev/shm is sticky), what was
# ours when we looked is what sem_open gets.


def make_bell(name: str) -> posix_ipc.Semaphore:
    """Return the semaphore of that name, made if there is none.

    To be called by a process of one thread. Raises UntrustedArena as open_bell does.
    """
    before = os.umask(0o077)  # the mode that is asked for is cut by it
    try:
        while True:
            with contextlib.suppress(posix_ipc.ExistentialError):
                return posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600)
            with contextlib.suppress(posix_ipc.ExistentialError):  # removed in between
                return open_bell(name)
    finally:
        os.umask(before)


def open_bell(name: str) -> posix_ipc.Semaphore:
    """Return the semaphore of that name.

    Raises posix_ipc.ExistentialError if there is none, and what check_bell raises.
    """
    check_bell(name)
    try:
        return posix_ipc.Semaphore(name)
    except (posix_ipc.PermissionsError, OSError) as error:
        raise UntrustedArena(f"the doorbell {bell_path(name)} cannot be opened: {error}") from error


def check_bell(name: str) -> None:
    """Raise UntrustedArena if what has that name is another user's, open to others, no semaphore.

    It may be nothing.
    """
    path = bell_path(name)
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(path, follow_symlinks=False)
        _trust(found, f"the doorbell {path}")
        if found.st_size != BELL_BYTES:
            raise UntrustedArena(f"the doorbell {path} is no semaphore: have it removed")


def remove_bell(name: str) -> bool:
    """Remove a doorbell's name, if it is this user's; return whether it was. Idempotent."""
    path = bell_path(name)
    with contextlib.suppress(FileNotFoundError):
        if _is_our_file(path):
            os.unlink(path)
            return True
    return False


def _is_our_file(path: str) -> bool:
    found = os.stat(path, follow_symlinks=False)
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()


def find_arenas(directory: str | None = None) -> Iterator[ArenaFile]:
    """Find the files of this host that are named like arenas, of every user.

    Anybody may put names there: those that no heap can have are not given, so the others can be
    printed. Raises OSError where there is no such directory.
    """
    directory = directory or DIRECTORY
    form = re.compile(rf"{PREFIX}\.([0-9]+)\.(.+)")
    for found in filter(None, map(form.fullmatch, sorted(os.listdir(directory)))):
        with contextlib.suppress(ValueError):
            yield ArenaFile(check_name(found[2]), int(found[1]), f"{directory}/{found[0]}")


def find_bells() -> Iterator[tuple[str, int]]:
    """Find this user's doorbells of this PID namespace, of whatever heap; names and inodes."""
    form = re.compile(rf"sem\.({PREFIX}\.{os.geteuid()}\.[0-9a-f]{{16}}\.{_pid_namespace()}\.bell)")
    for found in filter(None, map(form.fullmatch, sorted(os.listdir(DIRECTORY)))):
        path = f"{DIRECTORY}/{found[0]}"
        with contextlib.suppress(FileNotFoundError):
            if _is_our_file(path):
                yield f"/{found[1]}", os.stat(path, follow_symlinks=False).st_ino
