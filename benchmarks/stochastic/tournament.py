"""Which runs a task needs: each entry tuned alike, then compared at equal steps and equal cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import optimizers
from benchmarks.harness.cells import Cell
from benchmarks.harness.comparison import EXTENSIONS, Results, Sample
from benchmarks.harness.rate_search import Search, search
from benchmarks.stochastic import methods
from benchmarks.stochastic.methods import GRID, METHODS, Entry
from benchmarks.stochastic.tasks import Spec

TRAINING = "benchmarks.stochastic.training"
BASES = {
    "steps": "equal steps",
    "gradients": "equal gradients",
    "cpu_seconds": "equal CPU time",
}
CLOSE = 0.03  # costs that differ by less are equal: the clock is no better


@dataclass(frozen=True)
class Standing:
    """An entry on a task.

    Attributes:
        entry: Who.
        measure: "accuracy" or "loss".
        search: For its learning rate.
        tuned: The mean held-out value of the best one; higher is better.
        runs: One a seed, at equal steps.
        at_cost: Others, at equal "gradients" and "cpu_seconds" to those of its counterpart.
    """

    entry: Entry
    measure: str
    search: Search
    tuned: float
    runs: list[Results]
    at_cost: dict[str, list[Results]]

    def sample(self, basis: str = "steps") -> Sample:
        """What is compared, one value a seed; higher is better."""
        runs = self.at_cost.get(basis, self.runs)
        return Sample(tuple(value(run, self.measure) for run in runs))

    def spent(self, quantity: str) -> float:
        """Mean gradients or CPU seconds at equal steps; over what was done of a run cut short."""
        return statistics.fmean(_last(run[quantity]) for run in self.runs)


def value(run: Results, measure: str) -> float:
    """Of a run's end; higher is better, and minus infinity where it diverged."""
    if run["loss"][-1] is None:
        return float("-inf")
    return -run["loss"][-1] if measure == "loss" else run[measure][-1]


def _last(values: list[Any]) -> float:
    return [value for value in values if value is not None][-1]


class Tournament:
    """A task's runs.

    Args:
        spec: The task.
        done: Results by key, which may grow between calls.
        quick: Two learning rates to begin with, and one more at most.
    """

    def __init__(self, spec: Spec, done: Results, quick: bool) -> None:
        self.spec, self.done, self.quick = spec, done, quick

    # --- keys and cells ---

    @property
    def describe(self) -> Cell:
        """The cell that finds the data, before all others."""
        spec = self.spec
        options = {"task": spec.module, "options": spec.options, "steps": spec.steps}
        return Cell(f"{self._prefix}/about/0", f"{TRAINING}:describe", options, (spec.module,))

    @property
    def _prefix(self) -> str:
        return f"stochastic/{self.spec.section}/{self.spec.name}"

    @property
    def about(self) -> Results | None:
        """From the first cell, once it is there."""
        return self.done.get(self.describe.key)

    def entries(self) -> Iterator[Entry]:
        """Those that take part."""
        about = self.about
        if about is None:
            return
        for name in self.spec.methods:
            if methods.left_out(name, about["hidden_matrices"]) is None:
                own = METHODS[name].own_schedule
                schedules = self.spec.schedules if own is None else (own,)
                yield from (Entry(name, schedule) for schedule in schedules)

    def cell(
        self, entry: Entry, kind: str, rate: float, seed: int, steps: int, held_out: bool = False
    ) -> Cell:
        """A run."""
        optimizer = methods.describe(entry, rate, self.spec.common, steps)
        options = {
            "task": self.spec.module,
            "options": self.spec.options,
            "optimizer": optimizer,
            "steps": steps,
            "seed": seed,
            "held_out": held_out,
        }
        key = f"{self._prefix}/{entry.method}-{entry.schedule}/{kind}/{seed}"
        also = (self.spec.module, optimizers.module_of(optimizer["name"]))
        return Cell(key, f"{TRAINING}:train", options, also)

    def cells(self) -> list[Cell]:
        """All runs, as far as they are known."""
        known = [self.describe]
        for entry in self.entries():
            tuning, found = self.tune(entry)
            known += tuning
            if found.best is None:
                continue
            known += self._compared(entry, found.best)
            for basis in self.bases(entry):
                known += self._at_cost(entry, found.best, basis)
        return known

    def tune(self, entry: Entry) -> tuple[list[Cell], Search]:
        """The runs that tune, as far as they are known, and what the search has come to."""
        start = GRID[1:] if self.quick else GRID
        found = search(start, lambda rate: self.tuned(entry, rate), 1 if self.quick else EXTENSIONS)
        cells = [cell for rate in found.tried for cell in self._tuning(entry, rate)]
        return cells, found

    def tuned(self, entry: Entry, rate: float) -> float | None:
        """Mean held-out value of a learning rate; None while it is not known."""
        cells = self._tuning(entry, rate)
        if not all(cell.key in self.done for cell in cells):
            return None
        return statistics.fmean(value(self.done[c.key], self.spec.measure) for c in cells)

    def _tuning(self, entry: Entry, rate: float) -> list[Cell]:
        return [
            self.cell(entry, f"tuning-{rate:g}", rate, seed, self.steps, held_out=True)
            for seed in self.spec.tuning_seeds
        ]

    @property
    def steps(self) -> int:
        """Of a run."""
        assert self.about is not None
        return self.about["steps"]

    def _compared(self, entry: Entry, rate: float) -> list[Cell]:
        return [self.cell(entry, "compared", rate, seed, self.steps) for seed in self.spec.seeds]

    # --- equal cost ---

    def bases(self, entry: Entry) -> dict[str, int]:
        """Steps of the entry that cost as much as its counterpart's, by basis, where they differ.

        None is known before both have run, and none for what is FusePV itself. A run in which a
        rival takes more steps has its schedule over those steps.
        """
        ours = entry.counterpart
        if METHODS[entry.method].ours or ours not in set(self.entries()):
            return {}
        theirs, mine = (self._runs(which, "compared") for which in (entry, ours))
        if not theirs or not mine:
            return {}
        found = {}
        for basis in ("gradients", "cpu_seconds"):
            ratio = _cost(mine, basis) / _cost(theirs, basis)
            steps = max(1, round(self.steps * ratio))
            if abs(ratio - 1) > CLOSE and steps != self.steps:
                found[basis] = steps
        return found

    def _at_cost(self, entry: Entry, rate: float, basis: str) -> list[Cell]:
        steps = self.bases(entry)[basis]
        kind = basis.replace("_", "-")
        return [self.cell(entry, kind, rate, seed, steps) for seed in self.spec.seeds]

    def _runs(self, entry: Entry, kind: str) -> list[Results] | None:
        keys = [
            f"{self._prefix}/{entry.method}-{entry.schedule}/{kind}/{seed}"
            for seed in self.spec.seeds
        ]
        return [self.done[key] for key in keys] if all(k in self.done for k in keys) else None

    # --- results ---

    def standings(self) -> dict[Entry, Standing]:
        """Of the entries that have all their runs."""
        found = {}
        for entry in self.entries():
            tried = self.tune(entry)[1]
            runs = self._runs(entry, "compared")
            if tried.best is None or runs is None:
                continue
            kinds = {basis: basis.replace("_", "-") for basis in self.bases(entry)}
            at_cost = {basis: self._runs(entry, kind) for basis, kind in kinds.items()}
            there = {basis: of for basis, of in at_cost.items() if of is not None}
            tuned = self.tuned(entry, tried.best)
            if len(there) == len(kinds) and tuned is not None:
                found[entry] = Standing(entry, self.spec.measure, tried, tuned, runs, there)
        return found

    def missing(self) -> list[str]:
        """What has no row, and why."""
        about = self.about
        if about is None:
            return [f"{self.spec.title}: not run"]
        found = []
        for name in self.spec.methods:
            reason = methods.left_out(name, about["hidden_matrices"])
            if reason is not None:
                found.append(f"{METHODS[name].title} on {self.spec.title} ({reason})")
        standing = self.standings()
        found += [
            f"{entry.title} on {self.spec.title} (not run yet)"
            for entry in self.entries()
            if entry not in standing
        ]
        return found


def _cost(runs: list[Results], quantity: str) -> float:
    """Of a step."""
    spent = sum(_last(run[quantity]) for run in runs)
    return spent / sum(_last(run["step"]) for run in runs)
