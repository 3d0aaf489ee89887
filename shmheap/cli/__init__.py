"""The commands: `shmheap` and `python -m shmheap`.

General layout, a file per group of commands:

    run          be a heap's coordinator
    look         ls, stat, verify: from outside, as an observer; with deep, what verify --deep finds
    holders      holders: who keeps a block alive
    act          gc, scavenge, rm
    demo         the proof that memory comes back, on real files; with demo_files, demo_work,
                 demo_meter and demo_show
    show         tables, sizes, JSON
    signals      Ctrl-C

Every coordinator passes through this file on its way to `run`, so a group is imported only when one
of its commands is given, and nothing here may import what is only nice to look at.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from shmheap import __version__
from shmheap.cli.signals import INTERRUPTED
from shmheap.errors import HeapError

__all__ = ["main", "one_line"]

FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0: done. 1: done, and what was looked at is not as it must be. 2: it could not be done, and one
    line on stderr says why.
    """
    options = _parser().parse_args(argv)
    try:
        group = import_module(f"shmheap.cli.{options.group}")
        status: int = getattr(group, options.command)(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `shmheap ls | head`: nobody reads on, and nobody is to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (HeapError, ValueError, OSError, ImportError) as error:
        print(f"shmheap: {one_line(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("shmheap: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def one_line(error: Exception) -> str:
    """Return what an error says, for a line of its own: no errno, no line breaks."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shmheap", description="A heap that many processes share, and that gives memory back."
    )
    parser.add_argument("--version", action="version", version=f"shmheap {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    run = _add(commands, "run", "run", "be a heap's coordinator, in the foreground")
    run.add_argument("name", metavar="NAME", help="or path; made if there is no such name")
    run.add_argument("--capacity", help='of a heap that is made, such as "4GiB"')
    _add(commands, "ls", "look", "list the heaps of this host")
    for command, group, text in (
        ("stat", "look", "show a heap's numbers, settings and processes"),
        ("verify", "look", "hold a heap's books against the kernel, page by page"),
        ("holders", "holders", "show who keeps a block alive, or the largest blocks"),
        ("gc", "act", "collect garbage now"),
        ("scavenge", "act", "give idle memory back to the system now"),
    ):
        _add(commands, command, group, text).add_argument("name", metavar="NAME")
    commands.choices["verify"].add_argument(
        "--deep", action="store_true", help="also walk every invariant, and say what is wrong"
    )
    commands.choices["holders"].add_argument(
        "offset", metavar="OFFSET", nargs="?", type=int, help="of a block, as Block.offset says"
    )
    commands.choices["scavenge"].add_argument(
        "--all", action="store_true", help="whatever is idle, however short a time"
    )
    rm = _add(commands, "rm", "act", "remove heaps: each goes with its last user")
    rm.add_argument("name", metavar="NAME", nargs="*")
    rm.add_argument(
        "--stale", action="store_true", help="those whose processes were all killed at once"
    )
    rm.add_argument("--force", action="store_true", help="also a file that is no heap")
    return parser


_Commands = argparse._SubParsersAction  # argparse has no public name for it


def _add(
    commands: _Commands[argparse.ArgumentParser], command: str, group: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(command, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(command=command, group=group)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--directory", help="where the heap's file is (default: /dev/shm)")
    return parser


def _add_demo(commands: _Commands[argparse.ArgumentParser]) -> None:
    demo = _add(commands, "demo", "demo", "fill a heap with real files, use it, see memory return")
    demo.add_argument(
        "--workers", type=_workers, default=2, metavar="N", help="processes of the pool, 1 to 16"
    )
    demo.add_argument(
        "--input", metavar="DIR", help="its files (default: every .py of the standard library)"
    )
    demo.add_argument(
        "--size",
        help='of the blocks, such as "64MiB" (default: all of the input, at least 256 MiB); never '
        "more than a quarter of what the file system has free",
    )
    demo.add_argument("--name", help="of the heap, to look at it meanwhile (default: a new one)")
    demo.add_argument("--plot", metavar="FILE.png", help="draw the memory over time")


def _workers(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 16:
        raise argparse.ArgumentTypeError(f"1 to 16, not {text!r}")
    return number
