"""The change of task: other data from half of a run on, and the loss 1,000 steps later."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import optimizers
from benchmarks.harness.cells import Cell
from benchmarks.harness.comparison import Results, Sample, verdict
from benchmarks.harness.tables import number, table
from benchmarks.stochastic import methods
from benchmarks.stochastic.image_task import SEEN
from benchmarks.stochastic.methods import METHODS, Entry
from benchmarks.stochastic.tasks import IMAGES, USUAL
from benchmarks.stochastic.tournament import TRAINING

# Nothing is tuned: at such rates an optimizer that has settled must be able to begin again.
RATES = (0.01, 0.001)
AFTER = (10, 100, 1000)  # steps after the change
TAKING_PART = ("adamw", "fuse_pv", "control")
SEEDS = range(5)
CHANGES = {
    "labels": "its labels permuted",
    "inputs": "its pixels permuted",
    "kmnist": "KMNIST",
}
QUICK_CHANGES = ("labels", "inputs")  # digits have no second set of their size


def changes(quick: bool) -> tuple[str, ...]:
    """Keys of ``CHANGES``."""
    return QUICK_CHANGES if quick else (*CHANGES,)


def seeds(quick: bool) -> range:
    """Those reported."""
    return SEEDS[:2] if quick else SEEDS


def half(quick: bool) -> int:
    """After how many steps the data changes."""
    return 60 if quick else 1000


def options(change: str, quick: bool, root: str | None) -> dict[str, Any]:
    """The task's."""
    if quick:
        data: dict[str, Any] = {"dataset": "digits", "images": 320, "batch": 32}
    else:
        data = {"dataset": "mnist", "batch": 64, "data_root": root}
    return {**data, "network": "mlp", "change": change}


def cell(change: str, method: str, rate: float, seed: int, quick: bool, root: str | None) -> Cell:
    """A run of :func:`benchmarks.stochastic.training.train`."""
    steps = 2 * half(quick)
    optimizer = methods.describe(Entry(method, "constant"), rate, USUAL, steps)
    call = {
        "task": IMAGES,
        "options": options(change, quick, root),
        "optimizer": optimizer,
        "steps": steps,
        "seed": seed,
    }
    key = f"stochastic/change/{change}/{method}-{rate:g}/compared/{seed}"
    also = (IMAGES, optimizers.module_of(optimizer["name"]))
    return Cell(key, f"{TRAINING}:train", call, also)


def about(change: str, quick: bool, root: str | None) -> Cell:
    """The cell that finds the data, before all others of a change."""
    call = {"task": IMAGES, "options": options(change, quick, root), "steps": 2 * half(quick)}
    return Cell(f"stochastic/change/{change}/about/0", f"{TRAINING}:describe", call, (IMAGES,))


def cells(quick: bool, root: str | None, done: Results) -> list[Cell]:
    """The runs, as far as they are known: of the changes that have data."""
    known = [about(change, quick, root) for change in changes(quick)]
    for change in changes(quick):
        if about(change, quick, root).key in done:
            known += [
                cell(change, method, rate, seed, quick, root)
                for rate in RATES
                for method in TAKING_PART
                for seed in seeds(quick)
            ]
    return known


def losses(runs: list[Results], step: int) -> Sample:
    """Training losses on the data of that time, after so many steps; infinite where diverged."""
    found = []
    for run in runs:
        at = len(run["step"]) - 1
        for i, of in enumerate(run["step"]):
            if of is not None and of >= step:
                at = i
                break
        loss = run["train_loss"][at]
        found.append(float("inf") if loss is None else loss)
    return Sample(tuple(found))


def rows(results: Results, quick: bool) -> list[dict[str, Any]]:
    """A row for each change and rate whose runs are all there."""
    found = []
    for change in changes(quick):
        for rate in RATES:
            runs = {
                method: [
                    results.get(cell(change, method, rate, seed, quick, None).key)
                    for seed in seeds(quick)
                ]
                for method in TAKING_PART
            }
            if any(None in of for of in runs.values()):
                continue
            start, last = half(quick), AFTER[-1]
            after = sorted({min(steps, start) for steps in AFTER})
            at = {
                method: {steps: losses(of, start + steps) for steps in after}  # type: ignore[arg-type]
                for method, of in runs.items()
            }
            ends = {method: of[min(last, start)].negated for method, of in at.items()}
            found.append(
                {
                    "change": f"{'digits' if quick else 'MNIST'}, then {CHANGES[change]}",
                    "rate": rate,
                    "losses": at,
                    "verdicts": {
                        name: verdict(ends["fuse_pv"], ends[name])
                        for name in TAKING_PART
                        if name != "fuse_pv"
                    },
                }
            )
    return found


def text(found: list[dict[str, Any]]) -> str:
    """The rows as a table, and how FusePV fares in a sentence."""
    shown = []
    for row in found:
        for i, (method, of) in enumerate(row["losses"].items()):
            told = row["verdicts"].get(method)
            shown.append(
                [
                    f"{row['change']}, lr = {row['rate']:g}" if i == 0 else "",
                    METHODS[method].title,
                    *(number(sample.mean, 3) for sample in list(of.values())[:-1]),
                    list(of.values())[-1].show() + (f", {told}" if told else ""),
                ]
            )
    after = [*found[0]["losses"]["adamw"]]
    heads = ["from half of the run on", "", *(f"{steps:,} steps later" for steps in after)]
    heads[-1] += ", FusePV's verdict"
    terms = (
        f"An MLP, one constant learning rate for all, nothing told of the change; losses on "
        f"{SEEN:,} training images of the new data at most, means over the seeds."
    )
    return f"{terms}\n\n{sentence(found)}\n\n{table(heads, shown)}"


def sentence(found: list[dict[str, Any]]) -> str:
    """How FusePV fares beside AdamW."""
    after = [*found[0]["losses"]["adamw"]][-1]
    parts = []
    for word, told in (("win", "below"), ("draw", "level with"), ("loss", "above")):
        of = [
            f"{row['change']} at {row['rate']:g}"
            for row in found
            if row["verdicts"]["adamw"] == word
        ]
        parts.append(f"{told} AdamW's: {'; '.join(of) or 'nowhere'}")
    return f"{after:,} steps after the change FusePV's training loss is {'. It is '.join(parts)}."


def json(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as JSON has them."""
    return [
        {
            **row,
            "losses": {
                method: {str(steps): sample.json() for steps, sample in of.items()}
                for method, of in row["losses"].items()
            },
        }
        for row in found
    ]
