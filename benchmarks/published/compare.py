"""What follows from the runs of a row: values at equal evaluations and equal time, and words.

Everything is computed from what the JSON holds, so a sentence says the opposite when the figures
do. A value is the median over the seeds; of NIST's problems it is how many runs are not solved.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.tables import number
from benchmarks.published.rows import SOLVED

METHODS = {
    "adam": "Adam",
    "adam_lbfgs": "Adam, then torch's L-BFGS",
    "silent": "FusePV, told nothing",
    "pairs": "FusePV, pairs",
    "dense": "FusePV, dense",
}
BASELINES, OURS = ("adam", "adam_lbfgs"), ("silent", "pairs", "dense")
DIGITS_WRONG = 1e-4  # relative error of a parameter with 4 digits
LEVEL = 2.0  # times; less is no difference between so few seeds

Run = dict[str, Any]
Row = dict[str, Any]  # of the JSON


def shown(value: float | None) -> str:
    """A value for a table."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "never"
    if value == round(value):
        return f"{value:.0f}"
    return f"{value:.1e}" if value < 0.01 else number(value, 2)


def _last(run: Run, axis: str, limit: float) -> int | None:
    """Index of the last entry at which no more than so much was spent."""
    i = bisect.bisect_right(run[axis], limit) - 1
    return i if i >= 0 else None


def value(row: Row, method: str, axis: str = "evaluations", limit: float = math.inf) -> float:
    """The row's measure when a method had spent so much in each of its runs; infinity for never."""
    found = []
    for run in row["methods"][method]:
        i = _last(run, axis, limit)
        error = None if i is None else run["error"][i]
        found.append(math.inf if error is None else error)
    if row["measure"] == SOLVED:
        return float(sum(not error <= DIGITS_WRONG for error in found))
    return statistics.median(found)


def loss(row: Row, method: str) -> float:
    """The median of the least losses in the end."""
    losses = [run["loss"][-1] for run in row["methods"][method]]
    return statistics.median(math.inf if loss is None else loss for loss in losses)


def spent(row: Row, method: str, axis: str) -> float:
    """The median of what a run spent in all; of NIST's problems, which differ, the mean."""
    middle = statistics.mean if row["measure"] == SOLVED else statistics.median
    return middle(run[axis][-1] for run in row["methods"][method])


def equal_time(row: Row) -> float:
    """CPU seconds after which the first method has spent its budget; who ends early stays level."""
    whole = [
        spent(row, method, "cpu_seconds")
        for method in row["methods"]
        if spent(row, method, "evaluations") >= row["budget"]
    ]
    return min(whole or (spent(row, method, "cpu_seconds") for method in row["methods"]))


def busy(row: Row) -> float:
    """Wall time over processor time, of the worst run of a second or more; 1 on an idle machine."""
    runs = [run for runs in row["methods"].values() for run in runs]
    ratios = [run["seconds"][-1] / run["cpu_seconds"][-1] for run in runs if run["seconds"][-1] > 1]
    return max(ratios, default=1.0)


def reached(row: Row, method: str, aim: float) -> tuple[int, float] | None:
    """Evaluations and CPU seconds a run by which the row's measure came down to an aim.

    Seconds are the median of the runs; of NIST's problems the most that a run takes.
    """
    ends = {at for run in row["methods"][method] for at in run["evaluations"]}
    for at in sorted(ends):
        if value(row, method, limit=at) <= aim:
            times = [
                run["cpu_seconds"][i]
                for run in row["methods"][method]
                if (i := _last(run, "evaluations", at)) is not None
            ]
            middle = max if row["measure"] == SOLVED else statistics.median
            return int(at), middle(times)
    return None


def _best(row: Row, methods: Sequence[str], axis: str, limit: float) -> tuple[str, float] | None:
    there = {m: value(row, m, axis, limit) for m in methods if m in row["methods"]}
    if not there:
        return None
    name = min(there, key=there.__getitem__)
    return name, there[name]


def verdict(row: Row, ours: float, theirs: float) -> str:
    """Who is ahead, and by how much."""
    if row["measure"] == SOLVED:
        if ours == theirs:
            return "level"
        who = "ours is ahead" if ours < theirs else "**ours is behind**"
        return f"{who} by {abs(ours - theirs):.0f}"
    if not (math.isfinite(ours) or math.isfinite(theirs)):
        return "level"
    ratio = math.inf if ours == 0 or math.isinf(theirs) else theirs / ours
    if 1 / LEVEL < ratio < LEVEL:
        return "level, within a factor of 2"
    if ratio >= LEVEL:
        return f"ours is ahead by a factor of {number(ratio, 2)}"
    return f"**ours is behind** by a factor of {number(1 / ratio if ratio else math.inf, 2)}"


def sentences(row: Row) -> list[str]:
    """The row in words."""
    said = []
    budget, time = row["budget"], equal_time(row)
    for what, axis, limit in (
        (f"At equal evaluations ({budget:,})", "evaluations", budget),
        (f"At equal time ({number(time)} s of one core)", "cpu_seconds", time),
    ):
        ours, theirs = (_best(row, names, axis, limit) for names in (OURS, BASELINES))
        if ours is None or theirs is None:
            continue
        said.append(
            f"{what} {METHODS[ours[0]]} is at {shown(ours[1])}, and the best other method that we "
            f"ran, {METHODS[theirs[0]]}, at {shown(theirs[1])}: {verdict(row, ours[1], theirs[1])}."
        )
    ours = _best(row, OURS, "evaluations", math.inf)
    if ours is not None:
        name = min(row["published"], key=row["published"].__getitem__)
        best = row["published"][name]
        said.append(
            f"The best that is published, {name}, is {shown(best)}: {verdict(row, ours[1], best)}."
        )
        if row["measure"] == SOLVED and (left := unsolved(row, ours[0])):
            said.append(f"{METHODS[ours[0]]} leaves {', '.join(left)}.")
    return said + aims(row)


def unsolved(row: Row, method: str) -> list[str]:
    """NIST's problems that a method leaves, with the start: Misra1a/1."""
    return [
        f"{run['case']}/{run['seed']}"
        for run in row["methods"][method]
        if run["error"][-1] is None or not run["error"][-1] <= DIGITS_WRONG
    ]


def aims(row: Row) -> list[str]:
    """Which are reached, by whom and when."""
    said = []
    for aim in row["aims"]:
        times = {
            method: found
            for method in OURS
            if method in row["methods"] and (found := reached(row, method, aim))
        }
        if times:
            method = min(times, key=lambda name: times[name][1])
            evaluations, seconds = times[method]
            said.append(
                f"Aim, at most {shown(aim)}: reached by {METHODS[method]} after {evaluations:,} "
                f"evaluations and {number(seconds)} s of one core."
            )
        elif any(method in row["methods"] for method in OURS):
            said.append(f"Aim, at most {shown(aim)}: **not reached**.")
    return said
