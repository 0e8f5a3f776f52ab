"""FusePV on minibatches beside SGD, Adam, AdamW with schedules, Muon, Schedule-Free and SOAP.

Images at printed and at tuned learning rates, a schedule for everyone, FusePV in Adam's own
metric, what may go wrong (dropout, wrong labels, batches of all sizes, a change of task), and a
transformer on text. Every run is stored as it ends and is not repeated unless its code changes; the
page shows all that is stored, and the sections that it showed before, marked as of earlier code, so
that the full mode, which takes hours, can be run in pieces: --sections, --only, --methods,
--minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.harness import cells, command, machine, saving
from benchmarks.harness.cells import Cell
from benchmarks.harness.comparison import RATES, Outcome, Plan, Results, at_the_edge, staged
from benchmarks.harness.comparison_pictures import draw
from benchmarks.harness.schedules import SCHEDULES
from benchmarks.stochastic import ablation, change, duels, images, page, pictures, tasks
from benchmarks.stochastic.methods import METHODS, RUN_SCHEDULES
from benchmarks.stochastic.page import Played
from benchmarks.stochastic.sections import PLAYED, SECTIONS, Section, before, document
from benchmarks.stochastic.tournament import Tournament

# In quick mode one problem shows of each section that it works.
QUICK_PROBLEMS = ("kmnist",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The module's own."""
    listed = {
        "sections": [*SECTIONS],
        "only": [*tasks.PROBLEM_NAMES],
        "methods": [*METHODS],
        "schedules": [*SCHEDULES],
    }
    about = {
        "sections": "what to run",
        "only": "image problems to run in the first three sections (quick: kmnist)",
        "methods": "methods of the tournaments to run",
        "schedules": f"their schedules ({','.join(RUN_SCHEDULES)})",
    }
    for name, known in listed.items():
        text = f"{about[name]}, of {','.join(known)}"
        parser.add_argument(f"--{name}", default="", help=text)
    parser.add_argument("--minutes", type=float, default=math.inf, help="then no run begins")
    parser.add_argument("--text", type=Path, help="a file (Python's own help topics)")
    parser.add_argument(
        "--data-root", help="folder for torchvision's downloads (else .npz files in FUSE_EXT_DATA)"
    )
    workers = machine.cores()
    parser.add_argument(
        "--workers", type=int, default=workers, help="processes (%(default)s); 0: this one alone"
    )
    parser.add_argument("--cells", type=Path, help="folder of the stored runs (in build, or --out)")


def chosen(args: argparse.Namespace) -> None:
    """Checks the lists among the arguments and makes tuples of them; an empty one is all."""
    problems = QUICK_PROBLEMS if args.quick else tasks.PROBLEM_NAMES
    for name, known, usual in (
        ("sections", (*SECTIONS,), (*SECTIONS,)),
        ("only", tasks.PROBLEM_NAMES, problems),
        ("methods", (*METHODS,), (*METHODS,)),
        ("schedules", (*SCHEDULES,), RUN_SCHEDULES),
    ):
        found = tuple(filter(None, getattr(args, name).split(","))) or usual
        for choice in found:
            if choice not in known:
                raise SystemExit(f"--{name} has {choice!r}, which is none of {', '.join(known)}")
        setattr(args, name, found)
    # What is shown, whatever is run.
    args.problems = args.only if args.quick else tasks.PROBLEM_NAMES


class Work:
    """Runs what was asked for, and reads what else is stored.

    Args:
        args: From the command line.
        workers: From :func:`benchmarks.harness.cells.pool`.
    """

    def __init__(self, args: argparse.Namespace, workers: Executor | None) -> None:
        self.args, self.workers = args, workers
        shared = cells.ROOT / "build" / f"paper-cells{'-quick' if args.quick else ''}"
        self.folder = args.cells or (shared if args.readme else args.out / "cells")
        self.until = time.time() + 60 * args.minutes
        self.failures: dict[str, BaseException] = {}

    def section(self, name: str, known: Callable[[Results], list[Cell]]) -> Results:
        """The results of a section's runs."""

        def get(todo: list[Cell]) -> Results:
            if name not in self.args.sections:
                return cells.results_of(todo, self.folder)
            wanted = [cell for cell in todo if self._wanted(name, cell.key.split("/"))]
            rest = [cell for cell in todo if not self._wanted(name, cell.key.split("/"))]
            return cells.results_of(rest, self.folder) | self._run(name, wanted)

        return staged(known, get)

    def _wanted(self, section: str, key: list[str]) -> bool:
        # stochastic/SECTION/TASK/METHOD-SCHEDULE/..., and minibatch/PROBLEM/...
        if key[0] == "minibatch":
            return key[1] in self.args.only
        if section == "schedules" and key[2] not in self.args.only:
            return False
        method = key[3].partition("-")[0]
        return section not in PLAYED or method == "about" or method in self.args.methods

    def _run(self, name: str, todo: list[Cell]) -> Results:
        try:
            return cells.run(todo, self.folder, name, self.workers, until=self.until)
        except cells.CellError as error:
            self.failures |= error.failures
            return error.results


def play(work: Work, section: str) -> list[Tournament]:
    """A section's tournaments, with all the results that there are."""
    args, schedules = work.args, work.args.schedules
    specs = {
        "schedules": lambda: tasks.images(args.problems, schedules, args.quick, args.data_root),
        "robustness": lambda: tasks.robustness(schedules, args.quick, args.data_root),
        "text": lambda: tasks.text(schedules, args.quick, args.text and str(args.text.resolve())),
    }[section]()
    found = [Tournament(spec, {}, args.quick) for spec in specs]

    def known(done: Results) -> list[Cell]:
        for of in found:
            of.done = done
        return [cell for of in found for cell in of.cells()]

    results = work.section(section, known)
    for of in found:
        of.done = results
    return found


# --- parts of the page ------------------------------------------------------------------------


def images_part(outcomes: list[Outcome], plan: Plan) -> list[str]:
    """Table II, and the same with tuned learning rates."""
    targets = [row for outcome in outcomes for row in outcome.targets()]
    parts = [images.conditions(outcomes, plan), at_the_edge(outcomes), images.target_text(targets)]
    for kind in RATES:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        parts.append(f"**With {kind} learning rates**")
        parts += [images.count_text(of_kind), images.outcome_text(of_kind)]
    return parts


def played_part(tournaments: list[Tournament], played: Played) -> list[str]:
    """A section's tables."""
    parts = [page.conditions(tournaments), page.edges(played), page.results(played)]
    parts.append(page.costs(played))
    left = [line for of in tournaments for line in of.missing()]
    return [*parts, f"Left out: {'; '.join(left)}."] if left else parts


def played_json(played: Played) -> dict[str, Any]:
    """Every entry's learning rates and results."""
    return {
        spec.name: {
            entry.title: {
                "optimizer": standing.runs[0]["optimizer"],
                "tried": standing.search.tried,
                "best": standing.search.best,
                spec.measure: standing.sample().json(),
                "at_equal": {
                    basis: {"steps": runs[0]["steps"], spec.measure: standing.sample(basis).json()}
                    for basis, runs in standing.at_cost.items()
                },
                "switch_step": [run["switch_step"] for run in standing.runs],
                "cpu_seconds": [run["cpu_seconds"][-1] for run in standing.runs],
                "gradients": [run["gradients"][-1] for run in standing.runs],
                "course": {
                    "step": standing.runs[0]["step"],
                    "loss": [run["loss"] for run in standing.runs],
                },
            }
            for entry, standing in standings.items()
        }
        for spec, standings in played
    }


def image_sections(
    outcomes: list[Outcome], variants: ablation.Ablation, plan: Plan, folder: Path
) -> dict[str, Section]:
    """Those of images, of which there are runs; with a picture of the comparison."""
    found = {}
    if outcomes:
        targets = [row for outcome in outcomes for row in outcome.targets()]
        by_kind = {kind: [o for o in outcomes if o.kind == kind] for kind in RATES}
        data = {
            "targets": targets,
            "outcomes": {kind: {o.problem: o.json() for o in of} for kind, of in by_kind.items()},
        }
        short = [at_the_edge(outcomes), images.target_text(targets)]
        for kind, of in by_kind.items():
            short += [f"Images, with {kind} learning rates", images.count_text(of)]
        _save(draw(outcomes, "evaluations", "test_accuracy"), folder / "stochastic.png")
        drawn = "![Test accuracy against gradient evaluations](stochastic.png)"
        found["images"] = Section([*images_part(outcomes, plan), drawn], data, short)
    if variants:
        switches = ablation.automatic_switch(variants)
        texts = [
            "Printed learning rates, other seeds.",
            ablation.ablation_text(variants),
            ablation.switch_text(switches),
        ]
        data = {"automatic_switch": switches, "ablation": ablation.json(variants)}
        found["ablation"] = Section(texts, data)
    return found


def played_section(name: str, tournaments: list[Tournament], folder: Path) -> Section | None:
    """Of tournaments, with its picture; None while none of their entries has all its runs."""
    played = [(of.spec, standings) for of in tournaments if (standings := of.standings())]
    if not played:
        return None
    _save(pictures.draw(played), folder / f"stochastic-{name}.png")
    drawn = f"![Every method with every schedule](stochastic-{name}.png)"
    asked = [duel for spec, standings in played for duel in duels.duels(spec, standings)]
    return Section(
        [*played_part(tournaments, played), drawn],
        {name: played_json(played)},
        [drawn.replace("(", "(results/")],  # from the README
        asked,
        len(played[0][0].seeds),
    )


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Runs the module."""
    assert __doc__ is not None
    args = command.arguments("stochastic", __doc__, add=add_options)
    chosen(args)
    plan = Plan(args.quick, args.data_root)
    facts = {**machine.facts(args), "threads": 1}
    with cells.pool(args.workers) or contextlib.nullcontext() as workers:
        work = Work(args, workers)
        results = work.section("images", lambda done: images.cells(args.problems, plan, done))
        tried = work.section("ablation", lambda done: ablation.cells(args.problems, plan, done))
        tournaments = {section: play(work, section) for section in PLAYED}
        root = args.data_root
        moved = work.section("change", lambda done: change.cells(args.quick, root, done))

    outcomes = images.collect(args.problems, plan, results)
    variants = ablation.collect(args.problems, plan, tried)
    found: dict[str, Section | None] = {**image_sections(outcomes, variants, plan, args.out)}
    for name, of in tournaments.items():
        found[name] = played_section(name, of, args.out)
    if rows := change.rows(moved, args.quick):
        data = {"change": change.json(rows)}
        found["change"] = Section([change.text(rows)], data, [change.sentence(rows)])

    old = before(args.out / "stochastic.json", facts["mode"])
    there = {name: of for name in SECTIONS if (of := found.get(name) or old.get(name)) is not None}
    asked = [duel for section in there.values() for duel in section.asked]
    counted = f"{duels.counts(asked)}\n\n{duels.sentences(asked)}"
    seeds = {section.seeds for section in there.values() if section.seeds is not None}
    parts = [page.how(seeds)] if seeds else []
    parts += [counted] if asked else []
    for name, section in there.items():
        parts += [f"## {SECTIONS[name]}", *section.shown]
    left = [title for name, title in SECTIONS.items() if name not in there]
    if left:
        parts.append(f"Not here: {'; '.join(left)} (not all runs are stored).")
    reasons = dict.fromkeys(str(error) for error in work.failures.values())
    if reasons:
        parts.append(f"What failed: {'; '.join(reasons)}.")
    short = [counted] if asked else []
    short += [text for section in there.values() for text in section.short]
    tables = "\n\n".join(parts)
    saving.save(args, "stochastic", facts, document(there), tables, None, "\n\n".join(short))
    if work.failures:
        raise SystemExit(f"failed: {', '.join(work.failures)}")


if __name__ == "__main__":
    main()
