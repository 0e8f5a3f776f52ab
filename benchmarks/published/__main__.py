"""Published results on physics-informed networks and nonlinear fits beside ours.

Every run is stored as it ends (build/published-cells) and is not repeated unless its code changes;
the page always shows all that is stored, and what it showed before, marked where the code has
changed since. So the full mode, which takes many hours, can be run in pieces: --rows, --methods,
--seeds, --minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import cells, command, machine, saving
from benchmarks.harness.cells import Cell
from benchmarks.published import nist, page, rows
from benchmarks.published.compare import BASELINES, METHODS
from benchmarks.published.rows import Row

HERE = "benchmarks.published"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.published", description=__doc__)
    names = [row.name for row in rows.ALL]
    parser.add_argument("--rows", default=",".join(names), help="of %(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), help="of %(default)s")
    parser.add_argument("--seeds", type=int, help="so many of a row's (all; NIST's starts: all)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then no run begins")
    parser.add_argument("--quick", action="store_true", help="one seed, small budgets, in minutes")
    parser.add_argument("--fresh", action="store_true", help="run what is stored again")
    workers = machine.cores()
    parser.add_argument(
        "--workers", type=int, default=workers, help="processes (%(default)s); 0: this one alone"
    )
    build = cells.ROOT / "build"
    parser.add_argument("--out", type=Path, help="(benchmarks/results/published; quick: in build)")
    parser.add_argument("--cells", type=Path, help="folder of the stored runs (in build)")
    args = parser.parse_args(argv)
    for name, known in (("rows", names), ("methods", [*METHODS])):
        chosen = getattr(args, name).split(",")
        setattr(args, name, chosen)
        for choice in chosen:
            if choice not in known:
                parser.error(f"--{name} has {choice!r}, which is none of {', '.join(known)}")
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {args.seeds}")
    if args.workers < 0:
        parser.error(f"--workers must be at least 0, got {args.workers}")
    suffix = "-quick" if args.quick else ""
    results = build / "published-quick" if args.quick else command.RESULTS / "published"
    args.out = args.out or results
    args.cells = args.cells or build / f"published-cells{suffix}"
    args.out.mkdir(parents=True, exist_ok=True)
    args.rounds = None  # nothing is timed in rounds
    return args


def cells_of(row: Row, method: str, seed: int, quick: bool) -> list[Cell]:
    """The runs of a row by one method from one seed: one, or one for every case."""
    found = []
    for case, options in row.cases.items():
        call = {
            "method": method,
            "problem": row.problem,
            "options": {**options, **(row.quick if quick else {})},
            "seed": seed,
            "budget": row.budget[quick],
            "lr": row.adam_lr if method == "adam" else row.lr,
        }
        if method in BASELINES:
            call["adam_steps"] = row.adam_steps
        else:
            call["at_once"] = row.at_once
        function = f"{HERE}.{'baselines' if method in BASELINES else 'ours'}:solve"
        key = "/".join(part for part in (row.name, method, str(seed), case) if part)
        found.append(Cell(key, function, call, (row.module,)))
    return found


def seeds_of(row: Row, seeds: int | None, quick: bool) -> tuple[int, ...]:
    """A row's seeds; NIST's are its two starts, all of them."""
    if len(row.cases) > 1:
        return row.seeds
    return row.seeds[: 1 if quick else seeds]


def wanted(args: argparse.Namespace) -> list[Cell]:
    """The cells asked for, the first seed of every row first."""
    chosen = [
        (row, seeds_of(row, args.seeds, args.quick))
        for row in rows.ALL
        if row.name in args.rows and not missing(row, args.quick)
    ]
    most = max((len(seeds) for _, seeds in chosen), default=0)
    return [
        cell
        for i in range(most)
        for row, seeds in chosen
        for method in METHODS
        if i < len(seeds) and method in args.methods
        for cell in cells_of(row, method, seeds[i], args.quick)
    ]


def missing(row: Row, quick: bool) -> str:
    """Why a row cannot be run; nothing if it can."""
    if quick and not row.in_quick:
        return "in full mode only"
    if row.module == nist.__name__ and nist.folder() is None:
        return f"its files are not in the folder that {nist.FOLDER} names"
    return ""


def as_json(row: Row, folder: Path, quick: bool, shown: dict[str, Any]) -> dict[str, Any] | None:
    """A row with all its runs that are stored; None if there are none.

    ``shown``: the row as the page has it, for what is not stored.
    """
    methods: dict[str, list[dict[str, Any]]] = {}
    cpu = machine.cpu_model()
    for method in METHODS:
        runs = []
        for seed in seeds_of(row, None, quick):
            of_seed = cells_of(row, method, seed, quick)
            stored = cells.results_of(of_seed, folder)
            found = [
                {"seed": seed, "case": case, "cpu": cpu, **cells.stamp(cell), **stored[cell.key]}
                for cell, case in zip(of_seed, row.cases, strict=True)
                if cell.key in stored
            ]
            # A part of the cases would be no value of the row.
            whole = len(found) == len(of_seed)
            runs += found if whole else _as_shown(row, of_seed, seed, shown, method)
        if runs and {run["seed"] for run in runs} >= set(row.seeds if len(row.cases) > 1 else ()):
            methods[method] = runs
    if not methods:
        return None
    return {
        "title": row.title,
        "measure": row.measure,
        "published": row.published,
        "source": row.source,
        "their_settings": row.their_settings,
        "our_settings": row.our_settings,
        "aims": list(row.aims),
        "seeds": sorted({run["seed"] for runs in methods.values() for run in runs}),
        "budget": row.budget[quick],
        "lr": row.lr,
        "adam_lr": row.adam_lr,
        "adam_steps": row.adam_steps,
        "methods": methods,
    }


def _as_shown(
    row: Row, of_seed: list[Cell], seed: int, shown: dict[str, Any], method: str
) -> list[dict[str, Any]]:
    """The runs that the page has of these cells, if it has all of them."""
    runs = [run for run in shown.get("methods", {}).get(method, ()) if run["seed"] == seed]
    by_case = {run["case"]: run for run in runs}
    found = []
    for cell, case in zip(of_seed, row.cases, strict=True):
        run, stamp = by_case.get(case, {}), cells.stamp(cell)
        if run.get("asked") != stamp["asked"]:
            return []
        found.append({**run, "earlier": run["code"] != stamp["code"]})
    return found


def main(argv: list[str] | None = None) -> None:
    """Runs the module."""
    args = arguments(argv)
    until = time.time() + 60 * args.minutes
    failures: dict[str, BaseException] = {}
    try:
        cells.run(wanted(args), args.cells, "published", args.workers, args.fresh, until)
    except cells.CellError as error:
        failures = error.failures
    file = args.out / "published.json"
    shown = json.loads(file.read_text())["rows"] if file.exists() else {}
    found = {
        row.name: as_json(row, args.cells, args.quick, shown.get(row.name, {})) for row in rows.ALL
    }
    document = saving.plain(
        {
            "benchmark": "published",
            "machine": {**machine.facts(args), "threads": 1},
            "left_out": [
                f"{row.title} ({missing(row, args.quick) or 'not run yet'})"
                for row in rows.ALL
                if found[row.name] is None
            ],
            "rows": {name: row for name, row in found.items() if row is not None},
        }
    )
    text = json.dumps(document, indent=1)
    # A list of numbers on one line.
    file.write_text(
        re.sub(r"\[[^][{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"
    )
    page.write(json.loads(file.read_text()), args.out)
    print(args.out / "README.md")
    if failures:
        raise SystemExit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
