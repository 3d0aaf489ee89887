#!/usr/bin/env python3
"""Measure shmheap beside its peers: costs in one run and as ratios, memory by an outside witness.

    bench.py alloc [--json] [--quick] [--plot FILE.png]
    bench.py memory [--json] [--quick] [--plot FILE.png]
    bench.py takeover [--json] [--quick] [--plot FILE.png]
    bench.py lock [--json] [--quick] [--plot FILE.png]
    bench.py gc [--json] [--quick] [--plot FILE.png]
    bench.py collections [--json] [--quick] [--plot FILE.png]
    bench.py arrays [--json] [--quick] [--plot FILE.png]
    bench.py pool [--peers NAME...] [--json] [--quick] [--plot FILE.png]

What each command measures and how to read it: docs/reference/bench.md. A benchmark is not a test:
the exit status says whether it ran, not whether the figures are good.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))  # also under python -P

import bench_alloc
import bench_arrays
import bench_colls
import bench_common
import bench_gc
import bench_lock
import bench_memory
import bench_pool
import bench_takeover

COMMANDS: dict[str, bench_common.Command] = {
    "alloc": bench_alloc.Alloc(),
    "memory": bench_memory.Memory(),
    "takeover": bench_takeover.Takeover(),
    "lock": bench_lock.Lock(),
    "gc": bench_gc.Gc(),
    "collections": bench_colls.Collections(),
    "arrays": bench_arrays.Arrays(),
    "pool": bench_pool.Pool(),
}
"""A further command is a line here and a module in tools/bench/."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(argv)
    command = COMMANDS[args.command]
    machine = bench_common.machine()
    own = {name: getattr(args, name) for name in _options(command)}
    result = command.run(quick=args.quick, **own)
    if args.json:
        print(json.dumps({"command": args.command, "machine": machine, **result}))
    else:
        bench_common.show_machine(machine)
        command.show(result)
    if args.plot:
        command.plot(result, args.plot)
    return 0


def _options(command: bench_common.Command) -> dict[str, Any]:
    """What a command takes beside what all take: names, and what argparse is told of them."""
    return getattr(command, "options", {})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=command.summary)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.add_argument("--quick", action="store_true", help="small sizes, few rounds")
        sub.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it, too")
        for option, settings in _options(command).items():
            sub.add_argument(f"--{option}", **settings)
    return parser


if __name__ == "__main__":
    sys.exit(main())
