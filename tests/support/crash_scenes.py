"""Operations that make system calls, and what must hold when somebody dies at one of them.

A `Scene` is a heap in a directory of its own in /dev/shm, with its coordinator and a witness: a
process that lives through it with blocks of its own. An `Operation` is done by one more process,
the actor, which is stepped from one system call to the next (`stepper`). While it stands there, it
is killed, or its peer, or both (`crash_points`):

    actor                   its peer
    -----                   --------
    a user of the heap      the coordinator
    the coordinator         the user: the witness
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import processes
from processes import Kept, Worker
from stepper import WALL, Stepped, pause

import shmheap
from shmheap import Config, CoordinatorLost, Heap, HeapError, _core, arena
from shmheap.coordinator import ASK_GC, ASK_SCAVENGE_ALL
from shmheap.coordinator.loop import Coordinator
from shmheap.coordinator.process import ensure_running, main
from shmheap.coordinator.reaper import Watcher
from shmheap.coordinator.stale import remove_stale
from shmheap.coordinator.trace import Trace
from shmheap.verify import verify_quiet

MIB: Final = 1 << 20
CAPACITY: Final = 16 * MIB
NAME: Final = "scene"
ANSWER_S: Final = 30.0
"""Bounds how long a broken case hangs, and decides no outcome."""
GONE: Final = 2
"""Exit status of a coordinator that comes when the heap has gone with its last user."""
NAP_S: Final = 0.0005
BLOCKS: Final = [50, 700, 4000, 30_000, 200_000]
"""Sizes of the witness's blocks, bytes."""


class Scene:
    """A heap, its coordinator and its witness, in a directory of its own."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(dir=arena.DIRECTORY, prefix="shmheap-points.")
        self.errors = os.memfd_create("errors")
        self.config = Config(directory=self.folder, lease_grace_s=0.0)
        self.path = arena.file_path(NAME, self.folder)
        self.witness: Worker | None = None
        self.coordinator = 0
        self.actor = 0
        self.asked = False
        self.call = ""
        self.nonces: set[int] = set()

    # Who plays

    def populate(self, *, witness: bool = True, limit: str | None = None) -> None:
        """Make the heap, its coordinator, and a witness with blocks."""
        if limit:
            self.config = Config(directory=self.folder, lease_grace_s=0.0, memory_limit=limit)
        fd = arena.make_file(self.path, CAPACITY, self.config)
        steward = _core.Steward(fd)
        arena.give_name(fd, self.path)
        os.close(fd)
        steward.close()
        self.coordinator = self.fork(lambda: main(self.path, foreground=True))
        self.wait_for_coordinator(self.coordinator)
        if witness:
            self.witness = Worker("fork")
            self.tell("join", self.folder)

    def fork(self, body: Callable[[], object]) -> int:
        """A process that runs `body`, on its own; returns its pid."""
        child = Stepped(body, self.errors)
        child.let_go()
        return child.pid

    def ask(self) -> None:
        """Have the witness ask for everything; the answer is waited for when it goes on."""
        assert self.witness is not None
        self.witness.start("ask")
        self.asked = True

    def tell(self, action: str, *args: Any) -> Any:
        """Have the witness take a step."""
        assert self.witness is not None
        return self.witness.do(action, *args)

    def seen(self) -> dict[str, Any] | None:
        """The heap's header; None: it has no name."""
        try:
            fd, _ = arena.open_arena(self.path, read_only=True)
        except HeapError:
            return None
        try:
            observer = _core.Observer(fd)
            self.nonces.add(observer.nonce)
            return observer.header()
        finally:
            os.close(fd)

    def wait_for_coordinator(self, pid: int) -> None:
        """Until it has taken its place, or ended, or the heap has no name any more."""
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            seen = self.seen()
            if seen is None or (seen["coordinator_alive"] and seen["coordinator_pid"] == pid):
                return
            time.sleep(NAP_S)

    def kill_coordinator(self) -> bool:
        """Whoever it is now; False: nobody has been started."""
        started = [pid for pid in children() if is_coordinator(pid) and pid != self.actor]
        for pid in started or filter(None, [self.coordinator]):
            self.wait_for_coordinator(pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        found = bool(started or self.coordinator)
        self.coordinator = 0
        return found

    def kill_witness(self) -> bool:
        assert self.witness is not None
        self.witness.kill()
        self.witness = None
        return True

    def stop_actor(self) -> None:
        os.kill(self.actor, signal.SIGTERM)

    def clear(self) -> None:
        """End what is left of the case."""
        while left := children():
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                with suppress(ChildProcessError):  # another one's, and traced
                    os.waitpid(pid, WALL)
        self.seen()
        shutil.rmtree(self.folder)
        for nonce in self.nonces:
            bell_file(nonce).unlink(missing_ok=True)

    # What must hold

    def must_go_on(self, *, elsewhere: bool = False) -> None:
        """The witness finds everything as it was, and when it leaves nothing stays.

        Without a witness, see `must_begin_anew`.
        """
        self.seen()
        if self.witness is None:
            self.must_begin_anew(elsewhere=elsewhere)
            return
        if self.asked:
            self.witness.result()
        wait_for({pid for pid in children() if not is_coordinator(pid)} - self.staying())
        self.tell("look", [self.witness.pid])
        self.tell("empty")
        self.tell("close")
        self.witness.end()
        self.witness = None
        self.nothing_must_be_left()

    def must_begin_anew(self, *, elsewhere: bool = False) -> None:
        """Nobody is left who could see to it: the next who comes does.

        Args:
            elsewhere: who comes opens another heap of the directory.
        """
        wait_for_all()
        if elsewhere:
            with Heap.create("other", capacity=MIB, config=self.config) as heap:
                heap.gc(ANSWER_S)  # its coordinator serves: it has looked for stale ones before
                assert os.listdir(self.folder) == [os.path.basename(heap._path)], "stale"
        else:
            with shmheap.open(NAME, capacity=CAPACITY, config=self.config) as heap:
                self.nonces.add(heap.nonce)
                use(heap)
                for name in list(heap.roots):
                    del heap.roots[name]
                look({"heap": heap, "mine": []}, [os.getpid()])
        self.nothing_must_be_left()

    def nothing_must_be_left(self) -> None:
        wait_for_all()
        assert os.listdir(self.folder) == [], "files are left"
        left = [str(bell_file(nonce)) for nonce in self.nonces if bell_file(nonce).exists()]
        assert left == [], "doorbells are left"

    def staying(self) -> set[int]:
        """Who does not leave before the witness does."""
        witness = {self.witness.pid} if self.witness else set()
        return witness | {self.coordinator}


def children() -> list[int]:
    """The children of this process, and whoever was left to it."""
    return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]


def is_coordinator(pid: int) -> bool:
    with suppress(OSError):
        return b"shmheap\0run\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def wait_for(pids: Iterable[int]) -> None:
    """Until they have left by themselves, as they should."""
    for pid in pids:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL, GONE), f"process {pid} ended with {code}"


def wait_for_all() -> None:
    """Until every process of the case has left."""
    while left := children():
        wait_for(left)


def bell_file(nonce: int) -> Path:
    return Path(arena.DIRECTORY, f"sem.{arena.bell_name(nonce)[1:]}")


# Steps of the witness


def join(kept: Kept, folder: str) -> None:
    kept["heap"] = heap = Heap.attach(NAME, directory=folder)
    kept["mine"] = [heap.put(bytes([n + 1]) * size) for n, size in enumerate(BLOCKS)]
    heap.roots["witness"] = kept["mine"][0]


def look(kept: Kept, users: list[int]) -> None:
    """Everything works, everybody agrees, and nobody but these uses the heap."""
    heap = kept["heap"]
    use(heap)
    heap.gc(ANSWER_S)
    heap.scavenge(all=True, timeout=ANSWER_S)
    for number, block in enumerate(kept["mine"]):
        assert bytes(block) == bytes([number + 1]) * len(block), "bytes have changed"
    heap.check()
    observer = _core.Observer(heap._fileno())
    report = verify_quiet(heap._fileno(), observer, 3)
    assert report.agrees, [str(wrong) for wrong in report.mismatches[:8]]
    found = sorted(row[0] for row in observer.processes())
    assert found == sorted(users), f"{found} use the heap, not {users}"


def empty(kept: Kept) -> None:
    """All that anybody held is dropped: no memory is in use but that of a handle."""
    heap = kept["heap"]
    kept["mine"].clear()
    for name in list(heap.roots):
        assert len(heap.roots[name]) > 0
        del heap.roots[name]
    heap.gc(ANSWER_S)
    heap.scavenge(all=True, timeout=ANSWER_S)
    stats = heap.stats()
    assert (stats.heap_objects, stats.heap_alloc, stats.leases, stats.pins) == (0, 0, 0, 0), stats
    assert stats.heap_inuse <= 2 * 8192, stats
    assert stats.heap_sys - stats.heap_released <= stats.heap_inuse, stats


def use(heap: Heap) -> None:
    """Allocate of every kind."""
    for size in (50, 700, 4000, 30_000, 80_000, 2 * MIB):
        block = heap.alloc(size)
        assert not any(block[:: max(size // 50, 1)]), "another's bytes"
        block[:] = b"u" * size


def ask(kept: Kept) -> None:
    """Ask the coordinator for everything, and wait for it."""
    heap = kept["heap"]
    tickets = [(kind, heap._request(kind)) for kind in (ASK_GC, ASK_SCAVENGE_ALL)]
    for kind, ticket in tickets:
        assert heap._await(kind, ticket, ANSWER_S) is not None


processes.ACTIONS.update({step.__name__: step for step in (join, look, empty, ask)})


# Operations


@dataclass(frozen=True)
class Operation:
    """What an actor does.

    `before` sets the scene, in the process of the case; the others are the actor's: `ready` comes
    before the operation, `after` shows that the actor can go on if it was its peer that died.
    """

    name: str
    before: Callable[[Scene], None]
    ready: Callable[[Scene, Kept], None]
    act: Callable[[Scene, Kept], None]
    after: Callable[[Scene, Kept], None]
    leads: bool = False  # the actor is the coordinator
    born: int = 0  # the actor is who the operation forks, 2: and that one's child
    locked: bool = False  # it keeps its process lock: a collection waits for it
    alone: bool = False  # nobody but actor and peer is there
    asks: bool = False  # the witness waits for an answer
    begin: int = 1  # the pause at which the operation begins
    then: Callable[[Scene], object] = lambda _scene: None
    """What happens in the process of the case while the actor stands there."""

    def body(self, scene: Scene) -> None:
        """What the actor's process does."""
        kept: Kept = {}
        self.ready(scene, kept)
        pause()
        self.act(scene, kept)
        if not self.leads and not self.born:
            pause()
        self.after(scene, kept)


def nothing(_scene: Scene, _kept: Kept) -> None:
    pass


def attach(scene: Scene, kept: Kept) -> None:
    kept["heap"] = Heap.attach(NAME, directory=scene.folder)


def leave(_scene: Scene, kept: Kept) -> None:
    """It can go on, and leaves."""
    heap = kept.pop("heap")
    use(heap)
    heap.gc(ANSWER_S)
    heap.check()
    kept.clear()
    heap.close()


def inhabited(scene: Scene) -> None:
    scene.populate()


def inhabited_without_coordinator(scene: Scene) -> None:
    scene.populate()
    scene.kill_coordinator()


def uninhabited(scene: Scene) -> None:
    scene.populate(witness=False)


def stale(scene: Scene) -> None:
    """A heap whose processes were all killed."""
    scene.populate()
    scene.kill_coordinator()
    scene.kill_witness()


def user(
    act: Callable[[Scene, Kept], None],
    before: Callable[[Scene], None] = inhabited,
    ready: Callable[[Scene, Kept], None] = attach,
    after: Callable[[Scene, Kept], None] = leave,
    **more: Any,
) -> Operation:
    """An operation of a user, named after what it does."""
    name = act.__name__.replace("_", "-") + ("-grandchild" if more.get("born") == 2 else "")
    return Operation(name, before, ready, act, after, **more)


def create(scene: Scene, kept: Kept) -> None:
    kept["heap"] = Heap.create(NAME, capacity=CAPACITY, config=scene.config)


def create_when_there_is_none(scene: Scene) -> None:
    pass


def attach_where_nobody_leads(scene: Scene, kept: Kept) -> None:
    attach(scene, kept)


def start_by_attaching(scene: Scene, kept: Kept) -> None:
    """The actor is the process that starts the coordinator, or the one that becomes it."""
    with suppress(CoordinatorLost):
        attach(scene, kept)


def start_by_creating(scene: Scene, kept: Kept) -> None:
    with suppress(CoordinatorLost):
        create(scene, kept)


def leave_if_there(scene: Scene, kept: Kept) -> None:
    if "heap" in kept:
        leave(scene, kept)


def open_stale(scene: Scene, kept: Kept) -> None:
    kept["heap"] = shmheap.open(NAME, capacity=CAPACITY, config=scene.config)


def alloc_small(_scene: Scene, kept: Kept) -> None:
    kept["block"] = kept["heap"].alloc(1000)


def alloc_large(_scene: Scene, kept: Kept) -> None:
    kept["block"] = kept["heap"].alloc(3 * MIB)


def free_large(_scene: Scene, kept: Kept) -> None:
    kept.pop("block").free()


def with_large(scene: Scene, kept: Kept) -> None:
    attach(scene, kept)
    alloc_large(scene, kept)


def with_holes(scene: Scene, kept: Kept) -> None:
    """Spans of which most units were given back."""
    attach(scene, kept)
    heap = kept["heap"]
    blocks = [heap.alloc(1000) for _ in range(400)]
    kept["few"] = blocks[::40]
    del blocks
    heap.gc(ANSWER_S)
    heap.scavenge(all=True, timeout=ANSWER_S)


def alloc_in_holes(_scene: Scene, kept: Kept) -> None:
    kept["block"] = [kept["heap"].alloc(1000) for _ in range(200)]


def with_many_handles(scene: Scene, kept: Kept) -> None:
    attach(scene, kept)
    kept["many"] = [kept["heap"].alloc(16) for _ in range(1020)]


def handles_grow(_scene: Scene, kept: Kept) -> None:
    kept["block"] = [kept["heap"].alloc(16) for _ in range(8)]


def with_block(scene: Scene, kept: Kept) -> None:
    attach(scene, kept)
    kept["block"] = kept["heap"].put(b"block" * 20)


def root_set(_scene: Scene, kept: Kept) -> None:
    kept["heap"].roots["actor"] = kept["block"]


def with_root(scene: Scene, kept: Kept) -> None:
    with_block(scene, kept)
    root_set(scene, kept)


def root_clear(_scene: Scene, kept: Kept) -> None:
    del kept["heap"].roots["actor"]


def send(_scene: Scene, kept: Kept) -> None:
    kept["pickled"] = pickle.dumps(kept["block"])


def with_handle(scene: Scene, kept: Kept) -> None:
    with_block(scene, kept)
    send(scene, kept)


def receive(_scene: Scene, kept: Kept) -> None:
    kept["received"] = pickle.loads(kept["pickled"])


def gc_and_scavenge(_scene: Scene, kept: Kept) -> None:
    kept["heap"].gc(ANSWER_S)
    kept["heap"].scavenge(all=True, timeout=ANSWER_S)


def limited(scene: Scene) -> None:
    scene.populate(limit="4MiB")


def with_idle_memory(scene: Scene, kept: Kept) -> None:
    with_large(scene, kept)
    free_large(scene, kept)


def alloc_when_short(_scene: Scene, kept: Kept) -> None:
    """The limit is met; what is idle elsewhere is given back for it."""
    kept["block"] = [kept["heap"].alloc(16_000) for _ in range(20)]


def fork(scene: Scene, kept: Kept) -> None:
    """The actor is the parent; the child lives, whatever becomes of it."""
    kept["child"] = os.fork()
    if kept["child"] == 0:
        goes_on(scene, kept)
        os._exit(0)


def goes_on(_scene: Scene, kept: Kept) -> None:
    assert bytes(kept["block"]) == b"block" * 20
    leave(_scene, kept)


def leave_with_child(scene: Scene, kept: Kept) -> None:
    assert os.waitpid(kept["child"], 0)[1] == 0
    leave(scene, kept)


def be_forked(scene: Scene, kept: Kept) -> None:
    """The actor is the child, from its first instruction on."""
    kept["child"] = os.fork()
    if kept["child"] == 0:
        pause()
        goes_on(scene, kept)
        os._exit(0)


def leave_after_child(scene: Scene, kept: Kept) -> None:
    status = os.waitpid(kept["child"], 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), status
    leave(scene, kept)


def close(_scene: Scene, kept: Kept) -> None:
    kept.pop("block").free()
    kept.pop("heap").close()


def close_as_last(scene: Scene, kept: Kept) -> None:
    close(scene, kept)


def close_as_last_and_alone(scene: Scene, kept: Kept) -> None:
    close(scene, kept)


def unlink(_scene: Scene, kept: Kept) -> None:
    kept["heap"].unlink()


def unlink_by_name(scene: Scene, _kept: Kept) -> None:
    shmheap.unlink(NAME, directory=scene.folder)


def rm_stale(scene: Scene, _kept: Kept) -> None:
    assert list(remove_stale(scene.folder, ensure_running)) in ([NAME], [])


USERS: Final = (
    user(create, create_when_there_is_none, nothing, alone=True),
    user(attach, ready=nothing),
    user(attach_where_nobody_leads, inhabited_without_coordinator, nothing),
    *(
        user(act, before, nothing, leave_if_there, born=born, alone=alone)
        for act, before, alone in (
            (start_by_attaching, inhabited_without_coordinator, False),
            (start_by_creating, create_when_there_is_none, True),
        )
        for born in (1, 2)
    ),
    user(open_stale, stale, nothing, alone=True),
    user(alloc_small),
    user(alloc_large),
    user(free_large, ready=with_large),
    user(alloc_in_holes, ready=with_holes),
    user(handles_grow, ready=with_many_handles),
    user(root_set, ready=with_block),
    user(root_clear, ready=with_root),
    user(send, ready=with_block),
    user(receive, ready=with_handle),
    user(gc_and_scavenge, ready=with_idle_memory),
    user(alloc_when_short, limited, with_idle_memory),
    user(fork, ready=with_block, after=leave_with_child, locked=True),
    user(be_forked, ready=with_block, after=leave_after_child, born=1, locked=True),
    user(close, ready=with_block, after=nothing),
    user(close_as_last, uninhabited, with_block, nothing, alone=True),
    user(
        close_as_last_and_alone,
        uninhabited,
        with_block,
        nothing,
        then=Scene.kill_coordinator,
        alone=True,
    ),
    user(unlink, ready=with_block),
    user(unlink_by_name, ready=nothing, after=nothing),
    user(rm_stale, stale, nothing, nothing, alone=True),
)


# Coordinators


def lead(scene: Scene, _kept: Kept) -> None:
    """A coordinator, which pauses when it first has nothing to do."""
    wait = Watcher.wait

    def wait_first(*args: Any) -> set[Any]:
        Watcher.wait = wait  # type: ignore[method-assign]
        pause()
        return wait(*args)

    Watcher.wait = wait_first  # type: ignore[method-assign]
    assert main(scene.path, foreground=False) == 0


def turn(scene: Scene, kept: Kept) -> None:
    """One turn of its loop, when the witness has asked for everything."""
    steward = kept["steward"]
    while not (steward.pending(ASK_GC) and steward.pending(ASK_SCAVENGE_ALL)):
        time.sleep(NAP_S)
    pause()
    kept["coordinator"].turn()


NEVER: Final[Any] = None
"""One turn is made, and none is waited for."""


def take_place(scene: Scene, kept: Kept) -> None:
    fd, _ = arena.open_arena(scene.path)
    kept["steward"] = steward = _core.Steward(fd)
    steward.begin()
    log = logging.Logger("points")
    kept["coordinator"] = Coordinator(steward, scene.config, time, NEVER, Trace(None), log)


def leave_place(_scene: Scene, kept: Kept) -> None:
    kept["steward"].close()


def with_dead_user(scene: Scene) -> None:
    """A user died with its coordinator, and held something of every kind."""
    scene.populate()
    user = Stepped(lambda: hold_everything(scene), scene.errors)
    assert user.to_marker()
    scene.kill_coordinator()
    user.kill()


def hold_everything(scene: Scene) -> None:
    kept: Kept = {}
    with_many_handles(scene, kept)
    with_root(scene, kept)
    alloc_large(scene, kept)
    kept["pickled"] = pickle.dumps(kept["many"][5])
    del kept["many"][::2]
    pause()


def predecessor(scene: Scene, work: Callable[[_core.Steward], object]) -> Stepped:
    """A coordinator that does this and pauses; the one before it is killed."""

    def body() -> None:
        fd, _ = arena.open_arena(scene.path)
        steward = _core.Steward(fd)
        steward.begin()
        pause()
        work(steward)
        pause()

    scene.kill_coordinator()
    found = Stepped(body, scene.errors)
    assert found.to_marker()
    return found


def with_garbage(scene: Scene) -> None:
    """Idle memory and blocks that nobody holds."""
    scene.populate()
    user = Stepped(lambda: hold_everything(scene), scene.errors)
    assert user.to_marker()
    user.kill()


def release_everything(steward: _core.Steward) -> None:
    page = 0
    while (page := steward.release(2**29 - 1, MIB, page)[2]) != 0:
        pass


def begin_marking(steward: _core.Steward) -> None:
    steward.start_cycle()
    steward.mark()


def begin_sweeping(steward: _core.Steward) -> None:
    begin_marking(steward)
    steward.finish_mark()


def predecessor_died_releasing(scene: Scene) -> None:
    with_garbage(scene)
    died = predecessor(scene, release_everything)
    while died.step() != "madvise":
        assert died.status is None
    died.step()
    died.kill()


def predecessor_died_marking(scene: Scene) -> None:
    with_garbage(scene)
    died = predecessor(scene, begin_marking)
    died.to_marker()
    died.kill()


def predecessor_died_sweeping(scene: Scene) -> None:
    with_garbage(scene)
    died = predecessor(scene, begin_sweeping)
    died.to_marker()
    died.kill()


def predecessor_died_closing(scene: Scene) -> None:
    scene.populate(witness=False)
    died = predecessor(scene, lambda steward: steward.try_close())
    died.to_marker()
    died.kill()


def leader(name: str, before: Callable[[Scene], None], **more: Any) -> Operation:
    """An operation of the coordinator."""
    return Operation(name, before, nothing, lead, nothing, leads=True, **more)


LEADERS: Final = (
    leader("start", inhabited_without_coordinator),
    leader("start-after-deaths", with_dead_user),
    leader("takeover-in-release", predecessor_died_releasing),
    leader("takeover-in-mark", predecessor_died_marking),
    leader("takeover-in-sweep", predecessor_died_sweeping),
    leader("takeover-in-close", predecessor_died_closing, alone=True),
    Operation(
        "collect-and-release",
        inhabited_without_coordinator,
        take_place,
        turn,
        leave_place,
        leads=True,
        asks=True,
        begin=2,
    ),
    leader("leave", inhabited_without_coordinator, begin=2, then=Scene.kill_witness, alone=True),
    leader("stop", inhabited_without_coordinator, begin=2, then=Scene.stop_actor),
)
OPERATIONS: Final = {operation.name: operation for operation in (*USERS, *LEADERS)}
