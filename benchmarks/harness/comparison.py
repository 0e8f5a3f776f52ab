"""The optimizers compared on minibatches: which runs, with which learning rates, and who wins.

Shared by ``benchmarks.stochastic`` and by the sections of ``benchmarks.paper`` on real data, which
therefore share their runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.harness import optimizers
from benchmarks.harness.cells import Cell
from benchmarks.harness.rate_search import Search, search
from benchmarks.harness.tables import number

Results = dict[str, Any]

# Names of the methods, in keys and for people. The numbers are iterations on each batch.
METHODS = {
    "sgd": "SGD",
    "adam": "Adam",
    "adam_cosine": "Adam, cosine decay",
    "adam_averaged": "Adam, averaged",
    "adam_sgd": "Adam+SGD",
    "torch_1": "Adam, torch's L-BFGS (1)",
    "torch_20": "Adam, torch's L-BFGS (20)",
    "fuse_pv": "FusePV",
}
FIRST_ORDER = ("sgd", "adam", "adam_sgd")

# The one setting of FusePV with which it is compared, beside its learning rate; the criterion has
# no time to decide in quick mode.
FUSE_PV: dict[str, Any] = {"switch": "auto"}
QUICK_FUSE_PV = {**FUSE_PV, "switch": 1}

# Learning rates: those of the paper, and where the search for tuned ones begins, as wide for all;
# it goes on for as long as the best is at an edge. Adam+SGD and the L-BFGS of torch have Adam's
# tuned one for their first phase.
PRINTED = {
    "sgd": 0.01,
    "adam": 0.001,
    "adam_cosine": 0.001,
    "adam_averaged": 0.001,
    "adam_sgd": 0.01,
    "fuse_pv": 0.001,
}
ADAM_GRID = (0.001, 0.003, 0.01, 0.03)
SGD_GRID = (0.03, 0.1, 0.3, 1.0)  # the printed 0.01 has rows of its own
GRIDS = {
    "sgd": SGD_GRID,
    "adam": ADAM_GRID,
    "adam_cosine": ADAM_GRID,
    "adam_averaged": ADAM_GRID,
    "adam_sgd": SGD_GRID,
    "fuse_pv": ADAM_GRID,
}
EXTENSIONS = 10  # of a grid, at most
# Not reported. Neighbouring rates differ by a few of some hundred images held out, about as much as
# one seed from the next.
TUNING_SEEDS = (1000, 1001, 1002)
RATES = ("printed", "tuned")


@dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Attributes:
        quick: Two seeds and two learning rates, on a few hundred digits.
        data_root: As in :func:`benchmarks.harness.datasets.load`.
    """

    quick: bool = False
    data_root: str | None = None

    @property
    def seeds(self) -> range:
        """Those reported."""
        return range(2 if self.quick else 5)

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        """Those that learning rates are tuned on."""
        return TUNING_SEEDS[: 1 if self.quick else None]

    def grid(self, method: str) -> tuple[float, ...]:
        """The learning rates that are tried first."""
        return GRIDS[method][1:3] if self.quick else GRIDS[method]

    @property
    def extensions(self) -> int:
        """How often a grid may grow by one."""
        return 1 if self.quick else EXTENSIONS

    def fuse_pv(self, lr: float, **options: Any) -> dict[str, Any]:
        """FusePV's description; ``options`` replace those of its one setting."""
        setting = QUICK_FUSE_PV if self.quick else FUSE_PV
        return {"name": "fuse_pv", "lr": lr, **setting, **options}

    @property
    def setting(self) -> str:
        """What FusePV is here, in Markdown."""
        options = {**(QUICK_FUSE_PV if self.quick else FUSE_PV)}
        factor, switch = options.pop("batch_factor", 1), options.pop("switch")
        listed = "".join(f", {name}={value!r}" for name, value in options.items())
        text = f"`FusePV(params, lr{listed})`"
        if factor != 1:
            text += f" with batches {factor} times as large in its L-BFGS phase"
        if switch == "auto":
            return f"{text}, which switches by itself"
        return f"{text}, which switches after {switch} epoch{'s' if switch != 1 else ''}"

    def describe(self, problem: str) -> Cell:
        """The cell that finds the data, before all others of a problem."""
        options = {"problem": problem, "quick": self.quick, "data_root": self.data_root}
        return Cell(f"minibatch/{problem}/data", "benchmarks.harness.minibatch:describe", options)

    def cell(
        self, problem: str, name: str, optimizer: dict[str, Any], seed: int, **options: Any
    ) -> Cell:
        """A run of :func:`benchmarks.harness.minibatch.train`."""
        options = {
            "problem": problem,
            "optimizer": optimizer,
            "seed": seed,
            "quick": self.quick,
            "data_root": self.data_root,
            **options,
        }
        key = f"minibatch/{problem}/{name}/{seed}"
        also = (optimizers.module_of(optimizer["name"]),)
        return Cell(key, "benchmarks.harness.minibatch:train", options, also)


def methods(kind: str) -> list[str]:
    """Those compared; 20 iterations a batch take too long to be had twice."""
    return [name for name in METHODS if kind == "printed" or name != "torch_20"]


def baseline(method: str, rates: dict[str, float], switch_step: int) -> dict[str, Any]:
    """A description for :func:`benchmarks.harness.minibatch.train`.

    Args:
        method: A key of ``METHODS``, not FusePV's.
        rates: Learning rates by method.
        switch_step: Where those that begin with Adam leave it.
    """
    if method in ("sgd", "adam", "adam_averaged"):
        return {"name": method, "lr": rates[method]}
    if method == "adam_cosine":
        return {"name": "adam", "lr": rates[method], "schedule": "cosine"}
    second: dict[str, Any] = {"name": "adam_sgd", "sgd_lr": rates["adam_sgd"]}
    if method != "adam_sgd":
        second = {"name": "adam_torch_lbfgs", "max_iter": int(method.removeprefix("torch_"))}
    return {**second, "lr": rates["adam"], "switch_step": switch_step}


def _alone(method: str, lr: float) -> dict[str, Any]:
    return baseline(method, {method: lr}, 0)


def switch_step(run: Results) -> int:
    """Adam steps before the switch; half the budget's where there was none."""
    if run["switch_step"] is None or run["switch_epoch"] > run["epochs"]:
        return run["steps"][run["epochs"]] // 2
    return run["switch_step"]


# --- which runs -------------------------------------------------------------------------------


def tuning(problem: str, plan: Plan, done: Results) -> tuple[list[Cell], dict[str, Search]]:
    """The runs that tune, as far as they are known, and what the searches have come to.

    The best learning rate has the highest mean accuracy on the held-out images at the end of the
    budget, on seeds that are not reported; the lower of equals.
    """
    known: list[Cell] = []
    found: dict[str, Search] = {}

    def look(method: str, describe: Callable[[float], dict[str, Any]]) -> None:
        def value_of(rate: float) -> float | None:
            runs = [done.get(cell.key) for cell in cells_at(rate)]
            there = [run["test_accuracy"][-1] for run in runs if run is not None]
            return statistics.fmean(there) if len(there) == len(runs) else None

        def cells_at(rate: float) -> list[Cell]:
            name, description = f"tuning/{method}-{rate:g}", describe(rate)
            return [
                plan.cell(problem, name, description, seed, held_out=True)
                for seed in plan.tuning_seeds
            ]

        found[method] = search(plan.grid(method), value_of, plan.extensions)
        known.extend(cell for rate in found[method].tried for cell in cells_at(rate))

    for name in ("sgd", "adam", "adam_cosine", "adam_averaged"):
        look(name, partial(_alone, name))
    look("fuse_pv", plan.fuse_pv)
    best = best_rates(found)
    if {"adam", "fuse_pv"} <= best.keys():
        key = f"minibatch/{problem}/tuning/fuse_pv-{best['fuse_pv']:g}/{plan.tuning_seeds[0]}"
        step = switch_step(done[key])
        look("adam_sgd", lambda lr: baseline("adam_sgd", {**best, "adam_sgd": lr}, step))
    return known, found


def best_rates(found: dict[str, Search]) -> dict[str, float]:
    """Of the searches that have ended."""
    return {method: of.best for method, of in found.items() if of.best is not None}


def at_the_edge(outcomes: Sequence[Outcome]) -> str:
    """Which tuned learning rates are the least or the largest that were tried, in a sentence."""
    found = [
        f"{METHODS[method]} on {outcome.about['title']} ({outcome.rates[method]:g})"
        for outcome in outcomes
        for method, of in outcome.searches.items()
        if of.at_edge
    ]
    if not found:
        return "No tuned learning rate is at the edge of what was tried."
    return f"Tuned learning rates at the edge of what was tried: {'; '.join(found)}."


def rates_of(problem: str, kind: str, plan: Plan, done: Results) -> dict[str, float]:
    """Learning rates by method, as far as they are known."""
    return PRINTED if kind == "printed" else best_rates(tuning(problem, plan, done)[1])


def cells_of(problem: str, kind: str, plan: Plan, done: Results) -> list[Cell]:
    """The runs of a problem with printed or tuned learning rates, as far as they are known.

    The baselines run on until they have had as many gradient evaluations, and as much time, as
    FusePV in its budget.
    """
    known = [plan.describe(problem)]
    if known[0].key not in done:
        return known
    if kind == "tuned":
        known += tuning(problem, plan, done)[0]
    rates = rates_of(problem, kind, plan, done)
    if rates.keys() < PRINTED.keys():
        return known
    for seed in plan.seeds:
        description = plan.fuse_pv(rates["fuse_pv"])
        ours = plan.cell(problem, f"{kind}/fuse_pv", description, seed)
        known.append(ours)
        if ours.key in done:
            known += _baselines(problem, kind, rates, seed, plan, done[ours.key])
    return known


def _baselines(
    problem: str, kind: str, rates: dict[str, float], seed: int, plan: Plan, ours: Results
) -> list[Cell]:
    until = {name: ours[name][-1] for name in ("evaluations", "cpu_seconds")}
    step = switch_step(ours)
    return [
        plan.cell(problem, f"{kind}/{method}", baseline(method, rates, step), seed, until=until)
        for method in methods(kind)
        if method != "fuse_pv"
    ]


# --- who wins ---------------------------------------------------------------------------------

BASES = {
    "epochs": "equal epochs",
    "evaluations": "equal gradient evaluations",
    "cpu_seconds": "equal CPU time",
}


@dataclass(frozen=True)
class Sample:
    """One value a seed.

    Attributes:
        values: In the order of the seeds.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Their standard deviation, of a sample; infinite if a value is."""
        return statistics.stdev(self.values) if math.isfinite(self.mean) else math.inf

    @property
    def negated(self) -> Sample:
        """Losses, so that higher is better."""
        return Sample(tuple(-value for value in self.values))

    def percent(self) -> str:
        """``mean ± std``, in percent."""
        return f"{100 * self.mean:.2f} ± {100 * self.std:.2f}"

    def show(self) -> str:
        """``mean ± std``."""
        return f"{number(self.mean, 4)} ± {number(self.std, 2)}"

    def json(self) -> Results:
        """For the results."""
        return {"mean": self.mean, "std": self.std, "values": list(self.values)}


def verdict(ours: Sample, theirs: Sample, digits: int = 12) -> str:
    """A win where our mean is higher by more than one standard deviation, a loss where theirs is.

    The standard deviation is the larger one of the two. In between it is a draw.
    """
    if not (math.isfinite(ours.mean) and math.isfinite(theirs.mean)):
        return "win" if ours.mean > theirs.mean else "loss" if ours.mean < theirs.mean else "draw"
    difference = round(ours.mean - theirs.mean, digits)
    margin = round(max(ours.std, theirs.std), digits)
    return "win" if difference > margin else "loss" if difference < -margin else "draw"


def accuracy(run: Results, basis: str) -> float:
    """Test accuracy at the end of FusePV's budget, counted in epochs, evaluations or seconds."""
    if basis == "epochs" or basis not in run["reached"]:
        return run["test_accuracy"][run["epochs"]]
    return run["reached"][basis]["test_accuracy"]


@dataclass(frozen=True)
class Outcome:
    """A problem with one kind of learning rates.

    Attributes:
        problem: A key of ``PROBLEMS``.
        kind: "printed" or "tuned".
        about: From :func:`benchmarks.harness.minibatch.describe`.
        rates: Learning rates by method.
        runs: By method, one a seed.
        searches: For the tuned learning rates, by method.
    """

    problem: str
    kind: str
    about: Results
    rates: dict[str, float]
    runs: dict[str, list[Results]]
    searches: dict[str, Search]

    @staticmethod
    def of(problem: str, kind: str, plan: Plan, results: Results) -> Outcome:
        """From the results of all of :func:`cells_of`."""
        runs = {
            method: [results[f"minibatch/{problem}/{kind}/{method}/{seed}"] for seed in plan.seeds]
            for method in methods(kind)
        }
        about = results[plan.describe(problem).key]
        searches = tuning(problem, plan, results)[1] if kind == "tuned" else {}
        rates = rates_of(problem, kind, plan, results)
        return Outcome(problem, kind, about, rates, runs, searches)

    def accuracies(self, method: str, basis: str = "epochs") -> Sample:
        """Test accuracies."""
        return Sample(tuple(accuracy(run, basis) for run in self.runs[method]))

    def at_end(self, method: str, quantity: str) -> Sample:
        """Train_loss, evaluations or cpu_seconds at the end of the budget's epochs."""
        return Sample(tuple(_or_inf(run[quantity][run["epochs"]]) for run in self.runs[method]))

    def loss_later(self, method: str) -> Sample:
        """A baseline's training loss when it has had FusePV's evaluations."""
        runs = self.runs[method]
        return Sample(tuple(_or_inf(run["reached"]["evaluations"]["train_loss"]) for run in runs))

    def verdict(self, method: str, basis: str = "epochs") -> str:
        """FusePV's, beside a baseline."""
        return verdict(self.accuracies("fuse_pv"), self.accuracies(method, basis))

    def targets(self) -> list[Results]:
        """What FusePV should do here, and whether it does."""
        rows = []
        for method in FIRST_ORDER:
            rows.append(self._target(method, "epochs", "more than one std above"))
        for basis in ("evaluations", "cpu_seconds"):
            rows.append(self._target("adam", basis, "not below"))
        return rows

    def _target(self, method: str, basis: str, wanted: str) -> Results:
        ours, theirs = self.accuracies("fuse_pv"), self.accuracies(method, basis)
        found = self.verdict(method, basis)
        met = ours.mean >= theirs.mean if wanted == "not below" else found == "win"
        return {
            "problem": self.problem,
            "learning rates": self.kind,
            "baseline": METHODS[method],
            "at": BASES[basis],
            "wanted": wanted,
            "difference": ours.mean - theirs.mean,
            "verdict": found,
            "met": met,
        }

    def json(self) -> Results:
        """All of it but the runs' courses."""
        methods = {}
        for method, runs in self.runs.items():
            methods[method] = {
                "test_accuracy": {b: self.accuracies(method, b).json() for b in BASES},
                "verdict": {b: self.verdict(method, b) for b in BASES},
                "train_loss": self.at_end(method, "train_loss").json(),
                "evaluations": self.at_end(method, "evaluations").json(),
                "cpu_seconds": self.at_end(method, "cpu_seconds").json(),
                "switch_step": [run["switch_step"] for run in runs],
                "switch_reason": [run["switch_reason"] for run in runs],
                "optimizer": runs[0]["optimizer"],
            }
        del methods["fuse_pv"]["verdict"]
        tried = {method: of.tried for method, of in self.searches.items()}
        return {
            "about": self.about,
            "learning_rates": self.rates,
            "tried": tried,
            "methods": methods,
        }


def last_losses(runs: Sequence[Results]) -> Sample:
    """Training losses in the end."""
    return Sample(tuple(_or_inf(run["train_loss"][-1]) for run in runs))


def _or_inf(value: float | None) -> float:
    """A loss; None stands for one that is not finite."""
    return math.inf if value is None else value


def curves(runs: Sequence[Results], x: str, y: str) -> tuple[list[float], list[list[float]]]:
    """Means of ``x`` and all values of ``y``, after every epoch of the budget."""
    count = runs[0]["epochs"] + 1
    mean = [statistics.fmean(run[x][i] for run in runs) for i in range(count)]
    values = [[math.nan if run[y][i] is None else run[y][i] for run in runs] for i in range(count)]
    return mean, values


def staged(known: Callable[[Results], list[Cell]], run: Callable[[list[Cell]], Results]) -> Results:
    """Runs cells until no more become known. One that has no result is not asked for again.

    Args:
        known: From the results so far, the cells known.
        run: Runs cells; it may leave some out.
    """
    done: Results = {}
    asked: set[str] = set()
    while True:
        todo = {cell.key: cell for cell in known(done) if cell.key not in asked}
        if not todo:
            return done
        asked |= todo.keys()
        done |= run(list(todo.values()))
