"""`shmheap verify --deep`: every invariant, from outside, and what it means if one does not hold.

The walk is over a copy of the heap's tables, made without a lock: so it goes also where every lock
is refused (a corrupt heap) or none works, and by somebody who may only read. On a heap in use the
copy is of no one moment, so only what several looks find alike counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

__all__ = ["DeepReport", "Finding", "look_deep"]

LOOKS = 4

MEANS = {
    "I-1": "the books of the page heap or of the names contradict themselves",
    "I-2": "the bytes of a lock are not a lock",
    "I-3": "an operation was left half done and cannot be undone",
    "I-5": "memory is used that may not be there, or is kept and not used",
    "I-6": "somebody holds a block that is gone, or that others believe free",
}
"""What a violation of each invariant means; docs/invariants.md has the rules."""

REMEDY = (
    "What to do: copy what you need out of the blocks that you hold, stop the processes, "
    "`shmheap rm` the heap and make it anew. If no process writes to the heap's memory but through "
    "shmheap, this is a bug of shmheap: please report all of the above. Else look for a stray "
    "pointer of a C extension, or a process that was stopped in the middle of an operation."
)

AT_MOST = 50
"""Findings of one invariant that are printed; --json has them all."""


class Inspector(Protocol):
    """Whoever can check a copy of a heap, such as `_core.Observer`."""

    def check(self) -> list[str]:
        """Return the violations, each as "I-n: what is wrong where"."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An invariant that does not hold, and where."""

    invariant: str
    what: str


@dataclass(frozen=True, slots=True)
class DeepReport:
    """What every one of `looks` looks found."""

    looks: int
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """True if nothing was found."""
        return not self.findings

    def as_json(self) -> dict[str, object]:
        """All of it; json.dumps takes it."""
        rows = [
            {"invariant": f.invariant, "what": f.what, "means": MEANS.get(f.invariant, "")}
            for f in self.findings
        ]
        return {
            "sound": self.sound,
            "looks": self.looks,
            "violations": rows,
            "remedy": None if self.sound else REMEDY,
        }

    def __str__(self) -> str:
        if self.sound:
            return "every invariant holds"
        lines = []
        for invariant, n in sorted(Counter(f.invariant for f in self.findings).items()):
            lines.append(f"{invariant}, {MEANS.get(invariant, 'see docs/invariants.md')}:")
            found = [f.what for f in self.findings if f.invariant == invariant]
            lines += [f"  {what}" for what in found[:AT_MOST]]
            if n > AT_MOST:
                lines.append(f"  and {n - AT_MOST} more")
        return "\n".join([*lines, REMEDY])


def look_deep(inspector: Inspector, looks: int = LOOKS) -> DeepReport:
    """Look until nothing is left that every look has found, at most `looks` times.

    Cost: a copy of the heap's tables and a walk over it, for each look; a heap that is sound and
    quiet takes one.
    """
    found = inspector.check()
    done = 1
    while found and done < looks:
        again = set(inspector.check())
        found = [what for what in found if what in again]
        done += 1
    parts = (text.split(": ", 1) for text in found)
    return DeepReport(done, tuple(Finding(invariant, what) for invariant, what in parts))
