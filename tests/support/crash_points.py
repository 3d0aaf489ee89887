"""A death at each system call of an operation: who dies, and what comes of it.

    case = Case("create", ACTOR, 14)     one death
    for case, outcome in play(cases):    each in a process of its own, some at a time

`points_of` lists the cases of an operation: system call x who dies x what comes next.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import selectors
import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Final, NamedTuple, NoReturn

from crash_scenes import OPERATIONS, Operation, Scene
from stepper import Stepped

ACTOR: Final = "actor"
PEER: Final = "peer"
BOTH: Final = "both"
WHO: Final = (ACTOR, PEER, BOTH)
NOBODY: Final = "nobody"
"""Undisturbed: shows that a scene is right, and how many system calls the operation has."""

TO_THE_END: Final = 1 << 30
HANGS_S: Final = 90
"""A case that takes as long has failed: it takes a second."""
PR_SET_CHILD_SUBREAPER: Final = 36


class Case(NamedTuple):
    """A death: who dies where the actor stands before its `at`-th system call, from 0."""

    operation: str
    who: str
    at: int
    elsewhere: bool = False
    """If nobody is left: whoever comes next opens another heap of the directory."""


class Outcome(NamedTuple):
    """What came of a case."""

    call: str = ""
    calls: int = 0
    """What the actor stood before; empty: it had come to the end before."""
    nobody: bool = False
    """There was nobody to be killed: the peer has not been started yet, or has left."""
    alone: bool = False
    """Nobody of the heap was left."""
    failure: str = ""


def run(case: Case) -> Outcome:
    """Play it, in a process of its own: see `play`."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(HANGS_S)
    scene = Scene()
    try:
        return _play(OPERATIONS[case.operation], case, scene)
    except Exception as error:
        said = os.pread(scene.errors, 4000, 0).decode(errors="replace")
        return Outcome(scene.call, failure=f"{type(error).__name__}: {error}\n{said}".strip())
    finally:
        signal.alarm(0)
        scene.clear()


def _play(operation: Operation, case: Case, scene: Scene) -> Outcome:
    operation.before(scene)
    actor = Stepped(lambda: operation.body(scene), scene.errors)
    scene.actor = actor.pid
    assert actor.to_marker()
    if operation.asks:
        scene.ask()
    for _ in range(operation.begin - 1):
        assert actor.to_marker()
    operation.then(scene)
    stepped = actor
    for _ in range(operation.born):
        parent, stepped = stepped, stepped.to_child()
        parent.let_go()
        scene.actor = stepped.pid
    count, scene.call = _advance(stepped, case.at)
    scene.seen()
    if case.who in (PEER, BOTH) and not _kill_peer(operation, scene):
        stepped.kill()
        return Outcome(scene.call, count, nobody=True)
    if case.who in (ACTOR, BOTH):
        stepped.kill()
    else:
        _go_on(operation, case, scene, stepped)
    alone = scene.witness is None
    if operation.leads and operation.begin == 1 and not alone:
        scene.coordinator = actor.pid  # serves on, or is dead
    elif stepped is not actor or not stepped.killed:
        assert actor.end() == 0
    scene.must_go_on(elsewhere=case.elsewhere)
    return Outcome(scene.call, count, alone=alone)


def _advance(actor: Stepped, at: int) -> tuple[int, str]:
    """To its at-th system call, or its end; how many it made, and before which it stands."""
    for count in range(at):
        if actor.step() is None:
            return count, ""
    return at, actor.step() or ""


def _kill_peer(operation: Operation, scene: Scene) -> bool:
    if not operation.leads:
        return scene.kill_coordinator()
    return scene.witness is not None and scene.kill_witness()


def _go_on(operation: Operation, case: Case, scene: Scene, actor: Stepped) -> None:
    """A successor serves while the actor still stands there; then that comes to its end."""
    if case.who == PEER and not (operation.leads or operation.locked) and scene.witness:
        scene.tell("ask")
    if case.at < TO_THE_END and not (operation.leads and operation.begin == 2):
        actor.to_marker()
    actor.let_go()


def _too_long(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise TimeoutError(f"it hangs: nothing came of it in {HANGS_S} s")


def undisturbed(operations: Iterable[str]) -> list[Case]:
    """A case of each in which nobody dies: its outcome has the count of system calls."""
    return [Case(name, NOBODY, TO_THE_END) for name in operations]


def points_of(name: str, count: int) -> list[Case]:
    """The deaths of an operation that makes `count` system calls; the last is at its end."""
    operation = OPERATIONS[name]
    return [
        Case(operation.name, who, at, elsewhere)
        for who in WHO
        for at in range(count + 1)
        for elsewhere in ((False, True) if _leaves_nobody(operation, who) else (False,))
    ]


def _leaves_nobody(operation: Operation, who: str) -> bool:
    """Whether what is left, if anything is, waits for whoever comes next."""
    return who != PEER and (operation.alone or (operation.leads and who == BOTH))


def play(cases: Iterable[Case], at_a_time: int) -> Iterator[tuple[Case, Outcome]]:
    """Run cases in processes of their own; yields each as it ends. Cost: about half a second each.

    To be called where no other thread runs and no heap is open: the processes are forked.
    """
    waiting = iter(cases)
    with selectors.DefaultSelector() as running:
        for _ in range(at_a_time):
            _start(running, next(waiting, None))
        while running.get_map():
            for key, _ in running.select():
                running.unregister(key.fd)
                yield key.data[0], _end(key.fd, key.data[1])
                _start(running, next(waiting, None))


def _start(running: selectors.BaseSelector, case: Case | None) -> None:
    if case is None:
        return
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, pickle.dumps(run(case)))
        finally:
            os._exit(0)
    os.close(writer)
    running.register(reader, selectors.EVENT_READ, (case, pid))


def _end(reader: int, pid: int) -> Outcome:
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if not said:
        return Outcome(failure=f"the case's process ended with status {status}")
    outcome: Outcome = pickle.loads(said)
    return outcome
