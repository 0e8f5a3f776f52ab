"""The command line that the benchmarks share, and where their results go."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import machine

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
README = HERE / "README.md"


def arguments(
    name: str,
    description: str,
    rounds: tuple[int, int] | None = None,
    threads: int | None = None,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The command line that all benchmarks share.

    Args:
        name: Of the module.
        description: For --help.
        rounds: How often each case is repeated: in full and in quick mode; None where nothing
            is timed.
        threads: Where nothing else is asked for; None for torch's default.
        add: Adds the module's own options, which then take the place of --threads and --largest.

    Returns:
        quick, rounds, threads, largest, out, and readme: the file to rewrite the tables in, or
        None where the results go elsewhere than beside it.
    """
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repeats")
    if rounds is not None:
        usual = f"repeats ({rounds[0]}; --quick {rounds[1]})"
        parser.add_argument("--rounds", type=int, help=usual)
    if add is not None:
        parser.set_defaults(threads=threads)
        add(parser)
    else:
        usual = "torch's default" if threads is None else str(threads)
        parser.add_argument(
            "--threads", type=int, default=threads, help=f"for torch and for us ({usual})"
        )
        parser.add_argument(
            "--largest", type=float, default=math.inf, help="leave out cases of more parameters"
        )
    if name in ("time_to_loss", "robustness", "minimize", "switching"):
        parser.add_argument("--budget", type=int, help="gradient evaluations a run")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results (benchmarks/results, whose tables go into README.md too)",
    )
    args = parser.parse_args()
    if rounds is None:
        args.rounds = None
    elif args.rounds is None:
        args.rounds = rounds[args.quick]
    elif args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    if args.threads is not None:
        if args.threads < 1:
            parser.error(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    args.started = machine.cpu_clock()
    args.readme = README if args.out is None else None
    args.out = args.out or RESULTS
    args.out.mkdir(parents=True, exist_ok=True)
    return args
