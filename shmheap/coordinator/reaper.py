"""The reaper: who has died, and what becomes of what they held.

Two signs, and only one of them is the truth:

- A **pidfd** wakes the coordinator the moment a process exits. It says nothing about the heap: the
  pid may be another process's by now, and whoever reads the dead one's memory map keeps that alive.
- The **liveness lock** (I-8) is lost when the last thread has left the address space. Only that
  permits taking the process's pins and spans. A probe costs 0.3 us, so every turn probes everybody.

A process that has exited and still has its lock is on its way out: it is probed again soon.

What the dead held goes at once, but for the leases: a handle that is in a pipe when its sender
dies shall still arrive, so those stay for `Config.lease_grace_s` after the death was noticed. A
successor of this coordinator counts from when it noticed: later, never earlier.
"""

from __future__ import annotations

import os
import selectors
from typing import TYPE_CHECKING, Final, NamedTuple

from shmheap.coordinator import FREE, Slot
from shmheap.coordinator.pacing import grace_ends_ns, lease_cutoff_ns

if TYPE_CHECKING:
    import logging
    from collections.abc import Collection, Mapping

    from shmheap.config import Config
    from shmheap.coordinator import SlotKey, Steward

LONGEST_SLEEP_S: Final = 86_400.0
"""epoll counts milliseconds in an int: 24 days. One look more a day is nothing."""


class Reaped(NamedTuple):
    """What one call took from one dead process."""

    pins: int
    leases: int
    spans: int
    dead_bytes: int  # freed with the pins
    lease_bytes: int  # freed with the leases
    done: bool

    @property
    def found(self) -> bool:
        """Whether it took anything."""
        return bool(self.pins or self.leases or self.spans)


class Reaper:
    """Takes what the dead held, and remembers who is on the way out.

    Args:
        steward: the arena.
        config: for the leases' grace.
        log: told of each death.
    """

    def __init__(self, steward: Steward, config: Config, log: logging.Logger) -> None:
        self._steward = steward
        self._config = config
        self._log = log
        self._died_ns: dict[SlotKey, int] = {}  # noticed, and leases remain
        self._exiting: set[SlotKey] = set()  # exited, and the liveness lock remains
        self._living: dict[SlotKey, int] = {}
        self.waiting = False
        """Whether a living process waits for memory."""
        self.stalled: TimeoutError | None = None
        """Why the last look could not take all that the dead held."""

    def reap(self, exited: Collection[SlotKey], now_ns: int) -> list[Reaped]:
        """Probe every process and reap the dead; `exited` are those whose pidfd has fired.

        Only outside a cycle. O(slots) probes. Returns what was taken, and who is done with; nothing
        of those whose leases merely wait for the end of their grace.
        """
        slots = [slot for slot in map(Slot._make, self._steward.slots()) if slot.state != FREE]
        dead = [slot for slot in slots if not self._steward.alive(slot.number)]
        gone = {slot.key for slot in dead}
        self._living = {slot.key: slot.pid for slot in slots if slot.key not in gone}
        self.waiting = any(slot.waiting for slot in slots if slot.key in self._living)
        self._exiting = self._living.keys() & (self._exiting | set(exited))
        self.stalled = None
        reaped = [self._reap_slot(slot, now_ns) for slot in dead]
        return [one for one in reaped if one.found or one.done]

    @property
    def watched(self) -> dict[SlotKey, int]:
        """The processes (pids) whose exit is still to come."""
        return {key: pid for key, pid in self._living.items() if key not in self._exiting}

    @property
    def dues_ns(self) -> list[int]:
        """When leases of the dead run out."""
        return [grace_ends_ns(died_ns, self._config) for died_ns in self._died_ns.values()]

    @property
    def soon(self) -> bool:
        """Whether somebody is on the way out."""
        return bool(self._exiting)

    def _reap_slot(self, slot: Slot, now_ns: int) -> Reaped:
        died_ns = self._died_ns.setdefault(slot.key, now_ns)
        cutoff_ns = lease_cutoff_ns(died_ns, now_ns, self._config)
        try:
            reaped = Reaped(*self._steward.reap(slot.number, cutoff_ns))
        except TimeoutError as error:  # a living process was stopped inside an operation
            self.stalled = error
            return Reaped(0, 0, 0, 0, 0, done=False)
        if reaped.done:
            del self._died_ns[slot.key]
        if reaped.found:
            self._log.info(
                "process %d is gone: took %d pins, %d leases, %d spans", slot.pid, *reaped[:3]
            )
        return reaped


class Watcher:
    """Sleeps until the doorbell rings or a watched process exits: a `Wakeup` of the real world.

    Args:
        bell_fd: an eventfd, written when the doorbell rings.
    """

    def __init__(self, bell_fd: int) -> None:
        self._bell_fd = bell_fd
        self._selector = selectors.DefaultSelector()
        self._selector.register(bell_fd, selectors.EVENT_READ)
        self._pidfds: dict[SlotKey, int] = {}

    def wait(self, timeout_s: float, processes: Mapping[SlotKey, int], /) -> set[SlotKey]:
        """Sleep as `Wakeup.wait` says. Costs a system call, and two per process that came or went.

        A process that cannot be watched (no file descriptors left) is left to the regular look.
        """
        exited = self._watch_only(processes)
        for ready, _ in self._selector.select(0 if exited else min(timeout_s, LONGEST_SLEEP_S)):
            if ready.fd == self._bell_fd:
                os.eventfd_read(self._bell_fd)
            else:
                exited.add(ready.data)
        return exited

    def close(self) -> None:
        """Close the pidfds. The eventfd stays its owner's."""
        for key in list(self._pidfds):
            self._forget(key)
        self._selector.close()

    def _watch_only(self, processes: Mapping[SlotKey, int]) -> set[SlotKey]:
        """Watch these and no others; return those that have exited before."""
        for key in self._pidfds.keys() - processes.keys():
            self._forget(key)
        new = processes.keys() - self._pidfds.keys()
        return {key for key in new if self._exited(key, processes[key])}

    def _exited(self, key: SlotKey, pid: int) -> bool:
        """Start to watch a process, unless it has exited before."""
        try:
            self._pidfds[key] = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        self._selector.register(self._pidfds[key], selectors.EVENT_READ, key)
        return False

    def _forget(self, key: SlotKey) -> None:
        pidfd = self._pidfds.pop(key)
        self._selector.unregister(pidfd)
        os.close(pidfd)
