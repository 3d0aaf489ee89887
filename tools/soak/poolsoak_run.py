"""The pools' soak: players, one after the other; some end, some are killed; what they leave.

The one who starts them adopts every orphan, so that no worker, coordinator or server of forks
escapes it: once a player is gone, all of its processes are to go by themselves, and its heaps.
"""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import poolsoak_player
from poolsoak_player import HUNG_S
from soak_end import files_left
from soak_proc import adopt_orphans, children, command_of
from soak_run import end_children

ROUNDS = 12
"""A player plays at most so many."""
KILLED = 0.4
"""Of so many players the life ends before."""
LONGEST_LIFE_S = 10.0


@dataclass(slots=True)
class Plan:
    """What is to be done. `rounds` 0: as many as there is time for, from the first on."""

    seconds: float
    seed: int
    first: int = 0
    rounds: int = 0


@dataclass(slots=True)
class Tally:
    """What has happened so far."""

    rounds: int = 0
    players: int = 0
    players_killed: int = 0
    figures: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)


class PoolSoak:
    """One run. A context manager; leaving it ends every process that it started."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tally = Tally()
        self._random = random.Random(plan.seed)
        self._next = plan.first
        self._heaps: list[tuple[str, int]] = []
        """Path and nonce of those that the player has told of."""
        self._round: dict[str, Any] = {}
        """The one that is played: its number and terms."""
        self._until_s = 0.0
        adopt_orphans()

    def __enter__(self) -> PoolSoak:
        return self

    def __exit__(self, *_: object) -> None:
        end_children()

    def turns(self) -> Iterator[None]:
        """Have one player after another, until it is time or something is wrong."""
        self._until_s = time.monotonic() + self.plan.seconds
        while not self.tally.failures and not self._is_done():
            yield from self._player()

    def _is_done(self) -> bool:
        if self.plan.rounds:
            return self._next >= self.plan.first + self.plan.rounds
        return time.monotonic() >= self._until_s

    def _player(self) -> Iterator[None]:
        rounds = self._random.randint(1, ROUNDS)
        killed = not self.plan.rounds and self._random.random() < KILLED
        life_s = self._random.random() * LONGEST_LIFE_S if killed else float("inf")
        if self.plan.rounds:
            rounds = min(rounds, self.plan.first + self.plan.rounds - self._next)
        order: dict[str, Any] = {"seed": self.plan.seed, "first": self._next, "rounds": rounds}
        order["killed"] = killed
        order["until_s"] = None if self.plan.rounds else self._until_s
        self._next += rounds
        self.tally.players += 1
        with tempfile.TemporaryFile() as errors:
            program = str(Path(poolsoak_player.__file__).resolve())
            argv = [sys.executable, "-P", program, json.dumps(order)]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors) as player:
                yield from self._follow(player, time.monotonic() + life_s)
            if not self.tally.failures and player.returncode and not killed:
                self._fail(f"the player ended with status {player.returncode}")
            self._look_at_what_is_left()
            if self.tally.failures:
                errors.seek(0)
                self.tally.failures[0]["stderr"] = errors.read().decode(errors="replace")

    def _follow(self, player: subprocess.Popen[bytes], dies_at_s: float) -> Iterator[None]:
        """Read what the player tells, until its end; kill it when its time has come."""
        assert player.stdout is not None
        out, rest = player.stdout.fileno(), b""
        heard_s = time.monotonic()
        while True:
            if select.select([out], [], [], 0.05)[0]:
                read = os.read(out, 1 << 16)
                if not read:
                    return
                heard_s = time.monotonic()
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
            elif player.poll() is not None:  # whoever it left may have that end of the pipe, too
                return
            now_s = time.monotonic()
            if now_s > dies_at_s:
                dies_at_s = float("inf")
                self.tally.players_killed += 1
                player.kill()
            elif now_s - heard_s > 4 * HUNG_S:
                self._fail("the player hangs")
                player.kill()
            yield

    def _hear(self, told: dict[str, Any]) -> None:
        if "heap" in told:
            self._heaps.append((told["heap"], told["nonce"]))
        elif "terms" in told:
            self._round = told
        elif "done" in told:
            self.tally.rounds += 1
            self.tally.figures.update(told["tally"])
        elif "failure" in told:
            self._fail(told.pop("failure"), **told)

    def _look_at_what_is_left(self) -> None:
        given_up_s = time.monotonic() + HUNG_S
        while pids := [pid for pid in children() if not reap(pid)]:
            if time.monotonic() > given_up_s:
                self._fail("processes are left", processes=[str(command_of(pid)) for pid in pids])
                end_children()
                break
            time.sleep(0.01)
        left = [name for path, nonce in self._heaps for name in files_left(path, nonce)]
        self._heaps.clear()
        if left:
            self._fail("files are left", files=left)

    def _fail(self, error: str, **more: Any) -> None:
        self.tally.failures.append({"seed": self.plan.seed, **self._round, "error": error, **more})


def reap(pid: int) -> bool:
    """Whether it has ended; if so, it is waited for."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True
