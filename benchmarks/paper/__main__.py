"""Reproduces the results of the paper: pictures, JSON, and a page that puts ours beside theirs.

Every run is stored as it ends (build/paper-cells) and is not repeated unless its code changes, so
that a command that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from benchmarks.harness import cells, command, machine
from benchmarks.paper import authors, complexity, criteria, images, landscapes, page

MODULES: tuple[Any, ...] = (landscapes, complexity, images, authors, criteria)
ORDER = ("fig1", "fig2", "fig3", "fig4", "table1", "table2", "authors", "fig5", "fig6", "fig7")


def sections() -> dict[str, Any]:
    """The module of every section, in the order of the page."""
    found = {name: module for module in MODULES for name in module.SECTIONS}
    return {name: found[name] for name in ORDER if name in found}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    names = list(sections())
    parser = argparse.ArgumentParser("python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--only", default=",".join(names), help="sections, of %(default)s")
    parser.add_argument("--quick", action="store_true", help="smaller everything, in minutes")
    parser.add_argument("--fresh", action="store_true", help="run what is stored again")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="then no further run begins (no limit)"
    )
    parser.add_argument("--data-root", help="folder of the image data; see benchmarks/README.md")
    workers = machine.cores()
    parser.add_argument(
        "--workers", type=int, default=workers, help="processes (%(default)s); 0: this one alone"
    )
    build = cells.ROOT / "build"
    parser.add_argument("--out", type=Path, help="(benchmarks/results/paper; quick: in build)")
    parser.add_argument("--cells", type=Path, help="folder of the stored runs (in build)")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    for name in args.only:
        if name not in names:
            parser.error(f"--only has {name!r}, which is none of {', '.join(names)}")
    for name in ("workers", "minutes"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} must be at least 0, got {getattr(args, name)}")
    suffix = "-quick" if args.quick else ""
    args.out = args.out or (build / "paper-quick" if args.quick else command.RESULTS / "paper")
    args.cells = args.cells or build / f"paper-cells{suffix}"
    args.out.mkdir(parents=True, exist_ok=True)
    args.rounds = None  # nothing is timed in rounds
    return args


def wanted(args: argparse.Namespace, done: dict[str, Any]) -> dict[str, list[cells.Cell]]:
    """The cells of the sections asked for, as far as they are known."""
    modules = sections()
    return {
        name: modules[name].cells(name, args.quick, args.data_root, done)
        for name in modules
        if name in args.only
    }


def run_all(
    args: argparse.Namespace, workers: Executor | None
) -> tuple[dict[str, Any], dict[str, BaseException]]:
    """Results and errors by key, of all cells and of those that depend on them."""
    until = time.time() + 60 * args.minutes
    results: dict[str, Any] = {}
    failures: dict[str, BaseException] = {}
    asked: set[str] = set()
    while True:
        new: dict[str, cells.Cell] = {}
        for of_section in wanted(args, results).values():
            for cell in of_section:
                if cell != new.setdefault(cell.key, cell):
                    raise ValueError(f"two different cells have the key {cell.key!r}")
        todo = [cell for key, cell in new.items() if key not in asked]
        if not todo:
            return results, failures
        asked |= {cell.key for cell in todo}
        try:
            results |= cells.run(todo, args.cells, "paper", workers, args.fresh, until)
        except cells.CellError as error:
            results |= error.results
            failures |= error.failures


def main(argv: list[str] | None = None) -> None:
    """Runs the module."""
    args = arguments(argv)
    modules = sections()
    with cells.pool(args.workers) or contextlib.nullcontext() as workers:
        results, failures = run_all(args, workers)
    facts = {**machine.facts(args), "threads": 1}
    written = {}
    for name, of_section in wanted(args, results).items():
        if any(cell.key in failures for cell in of_section):
            continue
        there = [cell for cell in of_section if cell.key in results]
        own = {cell.key: results[cell.key] for cell in there}
        if len(there) < len(of_section) and not _ready(modules[name], name, own, args.quick):
            continue
        title = modules[name].SECTIONS[name]
        report = modules[name].report(name, own, args.quick)
        work = {"cells": len(own), "seconds": round(cells.seconds(there, args.cells), 1)}
        written[name] = page.write_section(args.out, name, title, report, facts, work)
        print(f"{title}: {report.verdict}. {report.sentence}\n")
    page.write_page(args.out, modules, written)
    print(args.out / "README.md")
    left = ", ".join(name for name in args.only if name not in written)
    if failures:
        raise SystemExit(f"not written: {left}; failed: {', '.join(failures)}")
    if left:
        print(f"not written, since time was up: {left}")


def _ready(module: Any, name: str, results: dict[str, Any], quick: bool) -> bool:
    """Whether a section can be written although some of its runs are missing."""
    return hasattr(module, "ready") and module.ready(name, results, quick)


if __name__ == "__main__":
    main()
