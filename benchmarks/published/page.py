"""The page, from the JSON alone: each published value beside ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.harness import machine, tables
from benchmarks.harness.pictures import COLORS, style
from benchmarks.published import compare
from benchmarks.published.compare import METHODS, Row, shown
from benchmarks.published.rows import SOLVED

MARK = " \u2020"
EARLIER = f"{MARK.strip()} Run with an earlier state of the code."
BUSY = 1.2  # wall time over processor time that is worth a warning
LINES = {
    "adam": (COLORS["other"], "-"),
    "adam_lbfgs": (COLORS["torch"], "-"),
    "silent": (COLORS["ours bf16"], "--"),
    "pairs": (COLORS["ours int8"], "-"),
    "dense": (COLORS["ours"], "-"),
}
ABOUT = """Every method gets the same number of evaluations of the loss with its gradient, counted \
in the closure, those of line searches included; from the same starts, on the same points and with \
the same code for the residuals. What is judged is the least loss so far (where points are \
resampled: on the present points). Seconds are of processor time on one core, in which judging and \
setting up do not count. Adam is torch's, at the best of a few learning rates or at the source's; \
L-BFGS is torch's with 100 pairs and strong Wolfe in one long step, after Adam. FusePV is \
`FusePV(params, lr)` where it is told nothing, and else has `deterministic=True` with \
`curvature="pairs"` or `"dense"` and is told of new points by `batch_id`; it leaves Adam when it \
sees fit. A difference below a factor of 2 counts as none. Published values are facts from the \
sources named, mostly of the best of several runs; ours are medians over seeds at one setting."""


def write(document: dict[str, Any], out: Path) -> None:
    """README.md and a picture for each row.

    Args:
        document: As the JSON holds it.
        out: Folder.
    """
    rows: dict[str, Row] = document["rows"]
    parts = [
        "# Published rows and ours",
        "Written by `python -m benchmarks.published` from [published.json](published.json).",
        _summary(rows),
    ]
    if any(_mark(row, method) for row in rows.values() for method in row["methods"]):
        parts.append(EARLIER)
    for name, row in rows.items():
        figure = draw(row)
        figure.savefig(out / f"{name}.png", dpi=110, facecolor="white")
        plt.close(figure)
        parts.append(_section(name, row))
    facts = {**document["machine"], "share_of_others": None}
    parts += [
        "## How it is measured",
        ABOUT,
        f"Machine of the last runs: {machine.sentence(facts)}",
    ]
    if document["left_out"]:
        parts.append(f"Not measured: {', '.join(document['left_out'])}.")
    (out / "README.md").write_text("\n\n".join(parts) + "\n")


def _summary(rows: dict[str, Row]) -> str:
    """One line for each row."""
    lines = []
    for row in rows.values():
        name = min(row["published"], key=row["published"].__getitem__)
        values = [
            shown(compare.value(row, method)) + _mark(row, method)
            if method in row["methods"]
            else ""
            for method in METHODS
        ]
        aims = " ".join(compare.aims(row))
        met = "" if not aims else f"{aims.count(': reached')} of {len(row['aims'])}"
        lines.append([row["title"], f"{shown(row['published'][name])} ({name})", *values, met])
    return tables.table(["", "best published", *METHODS.values(), "aims reached"], lines)


def _mark(row: Row, method: str) -> str:
    return MARK if any(run.get("earlier") for run in row["methods"][method]) else ""


def _section(name: str, row: Row) -> str:
    time = compare.equal_time(row)
    lines = []
    for method in row["methods"]:
        lines.append(
            [
                METHODS[method] + _mark(row, method),
                shown(compare.value(row, method)),
                shown(compare.value(row, method, "cpu_seconds", time)),
                f"{compare.loss(row, method):.1e}",
                f"{compare.spent(row, method, 'evaluations'):,.0f}",
                tables.number(compare.spent(row, method, "cpu_seconds")),
                _range(row, method),
            ]
        )
    theirs = [
        [f"published: {method}", shown(value), *[""] * 5]
        for method, value in row["published"].items()
    ]
    heads = [
        row["measure"],
        "in the end",
        f"after {tables.number(time)} s",
        "least loss",
        "evaluations",
        "seconds",
        "runs, and range",
    ]
    parameters = sorted({run["parameters"] for of in row["methods"].values() for run in of})
    cpus = sorted({run["cpu"] for of in row["methods"].values() for run in of})
    sizes = f"{parameters[0]:,}" + (f" to {parameters[-1]:,}" if len(parameters) > 1 else "")
    adam = f"Adam alone has a learning rate of {row['adam_lr']:g}"
    if row["adam_steps"]:
        steps = min(row["adam_steps"], row["budget"] // 3)
        adam += f", before L-BFGS {row['lr']:g}, by hand for {steps:,} steps"
    words = compare.sentences(row)
    if (times := compare.busy(row)) > BUSY:
        words.append(
            f"**Not an idle machine, distrust the seconds**: a run took {tables.number(times, 2)} "
            "times its processor time."
        )
    return "\n\n".join(
        [
            f"## {row['title']}",
            f"- Published ([source]({row['source']})): {row['their_settings']}.\n"
            f"- Ours: {row['our_settings']}; {sizes} parameters; seeds "
            f"{', '.join(map(str, row['seeds']))}; {row['budget']:,} evaluations on one core of "
            f"{' or '.join(cpus)}. "
            f"{adam}.",
            tables.table(heads, [*theirs, *lines]),
            *([" ".join(words)] if words else []),
            f"![{row['title']}]({name}.png)",
        ]
    )


def _range(row: Row, method: str) -> str:
    runs = row["methods"][method]
    if row["measure"] == SOLVED or len(runs) == 1:
        return str(len(runs))
    errors = [math.inf if run["error"][-1] is None else run["error"][-1] for run in runs]
    return f"{len(runs)}: {shown(min(errors))} to {shown(max(errors))}"


def draw(row: Row) -> Figure:
    """The measure against evaluations and against time."""
    with style():
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
        for panel, axis, label in zip(
            panels,
            ("evaluations", "cpu_seconds"),
            ("evaluations", "seconds of one core"),
            strict=True,
        ):
            for method, runs in row["methods"].items():
                color, line = LINES[method]
                end = max(run[axis][-1] for run in runs)
                begin = max(run[axis][0] for run in runs)
                at = np.geomspace(max(begin, end * 1e-4), end, 120)
                curve = [compare.value(row, method, axis, limit) for limit in at]
                panel.plot(at, curve, line, color=color, label=METHODS[method])
            if row["published"]:
                panel.axhline(
                    min(row["published"].values()),
                    color=COLORS["grey"],
                    lw=1,
                    ls=":",
                    label="best published",
                )
            panel.set(xscale="log", xlabel=label)
            if row["measure"] != SOLVED:
                panel.set(yscale="log")
        panels[0].set(ylabel=row["measure"], title=row["title"])
        panels[1].legend(loc="best")
    return figure
