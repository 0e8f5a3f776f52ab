"""Bytes a parameter, measured: state and peak of each optimizer, beside fuse_ext.estimate_memory.

Every case runs in a process of its own (memory_case.py) and is judged by what the system says of
that process: the resident set before the optimizer is made, when its history is full, and at the
worst moment of one more step.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import fuse_ext
from benchmarks.harness import command, machine, rounds, saving
from benchmarks.harness.machine import available_memory
from benchmarks.harness.memory_case import DTYPE_OPTIONS, rehearse_and_measure
from benchmarks.harness.pictures import COLORS, style
from benchmarks.harness.tables import count, table
from benchmarks.harness.workloads import HISTORY_DTYPES, history_dtypes, split

NUMEL = 10**7
TENSORS = 8
TOLERANCE = 0.02  # of estimate_memory
SEARCH = {"line_search_fn": "strong_wolfe"}
# FusePV leaves Adam after so many steps; and its search is made to need several trials.
SWITCH = 3
PV = {"switch": SWITCH, "lbfgs_lr": 0.05, "deterministic": True}
BATCHES = {"switch": SWITCH, "deterministic": False}


@dataclass(frozen=True)
class Case:
    """What to measure.

    Attributes:
        label: For the tables.
        optimizer: "torch.optim.NAME" or "fuse_ext.NAME".
        options: As JSON holds them: dtypes by name.
        after: Steps before the one whose peak is taken.
        phase: Of the estimate; None for the only one.
        at_switch: Whether the step measured is the one that leaves Adam.
    """

    label: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    after: int = 4
    phase: str | None = None
    at_switch: bool = False

    @property
    def ours(self) -> bool:
        """Whether there is an estimate for it."""
        return self.optimizer.startswith("fuse_ext")


@dataclass(frozen=True)
class Measured:
    """Bytes of one case; see :func:`benchmarks.harness.memory_case.measure`.

    Attributes:
        case: Which.
        numel: Parameters.
        state: Tensors in the optimizer's state.
        held: Growth of the resident set up to the full state.
        peak: The same, at the worst moment of a step.
        evaluations: In that step.
        expected: State, and the most held at once, by fuse_ext.estimate_memory; None for torch's.
    """

    case: Case
    numel: int
    state: int
    held: int
    peak: int
    evaluations: int
    expected: tuple[int, int] | None

    @property
    def extra_vectors(self) -> float:
        """Peak of a step over the state, in float32 vectors of the parameters' length."""
        return (self.peak - self.state) / (4 * self.numel)

    @property
    def errors(self) -> tuple[float, float] | None:
        """Relative error of the estimate, of the state and of the peak."""
        if self.expected is None:
            return None
        state, peak = self.expected
        return state / self.state - 1, peak / self.peak - 1

    @property
    def agrees(self) -> bool:
        """Whether the estimate is within 2% of both."""
        return self.errors is None or max(map(abs, self.errors)) <= TOLERANCE


def lbfgs_cases(searched: bool, history_size: int = 10) -> list[Case]:
    """torch.optim.LBFGS, and ours with each history dtype."""
    options = {"history_size": history_size, **(SEARCH if searched else {})}
    label = f"LBFGS, m = {history_size}, " + ("strong Wolfe" if searched else "fixed step")
    after = history_size + 4
    cases = [Case(f"torch {label}", "torch.optim.LBFGS", options, after)]
    for name in history_dtypes():
        chosen = {"history_dtype": str(HISTORY_DTYPES[name])} if name != "fp32" else {}
        cases.append(
            Case(f"fuse_ext {label}, {name}", "fuse_ext.LBFGS", {**options, **chosen}, after)
        )
    return cases


def all_cases(quick: bool) -> list[Case]:
    """Every optimizer and option of the mode."""
    cases = [
        Case("torch Adam", "torch.optim.Adam", {"fused": True}),
        Case("fuse_ext Adam", "fuse_ext.Adam"),
        Case("torch Adam, amsgrad", "torch.optim.Adam", {"fused": True, "amsgrad": True}),
        Case("fuse_ext Adam, amsgrad", "fuse_ext.Adam", {"amsgrad": True}),
        Case("fuse_ext Adam, bf16 moments", "fuse_ext.Adam", {"moment_dtype": "torch.bfloat16"}),
        *lbfgs_cases(searched=False),
        *lbfgs_cases(searched=True),
        Case("FusePV, Adam phase", "fuse_ext.FusePV", {**PV, "switch": 1000}, phase="adam"),
        Case("FusePV, at the switch", "fuse_ext.FusePV", PV, SWITCH - 1, "lbfgs", at_switch=True),
        Case("FusePV, L-BFGS phase", "fuse_ext.FusePV", PV, SWITCH + 14, phase="lbfgs"),
        Case("FusePV, on minibatches", "fuse_ext.FusePV", BATCHES, SWITCH + 19, phase="lbfgs"),
        Case("Fuse", "fuse_ext.Fuse", after=14),
    ]
    if not quick:
        cases += lbfgs_cases(searched=False, history_size=5)
        cases += lbfgs_cases(searched=False, history_size=20)
        searched = {"line_search": "strong_wolfe", "lbfgs_lr": 0.05}
        cases.append(Case("Fuse, strong Wolfe", "fuse_ext.Fuse", searched, 14))
    return cases


def _expected(case: Case, numel: int) -> tuple[int, int] | None:
    if not case.ours:
        return None
    given = dict(case.options)
    for key in DTYPE_OPTIONS & given.keys():
        given[key] = getattr(torch, given[key].removeprefix("torch."))
    name = case.optimizer.rpartition(".")[2]
    searched = "strong_wolfe" if given.get("deterministic") else "auto"
    searches = {"FusePV": searched, "LBFGS": given.get("line_search_fn")}
    known = ("history_size", *DTYPE_OPTIONS, "amsgrad", "deterministic")
    estimate = fuse_ext.estimate_memory(
        [torch.empty(size, device="meta") for size in split(numel, TENSORS)],
        name,
        line_search=searches.get(name, given.get("line_search")),
        **{key: given[key] for key in known if key in given},
    )
    phase = next(p for p in estimate.phases if case.phase in (None, p.phase))
    return phase.state_bytes, estimate.peak_bytes if case.at_switch else phase.total_bytes


def measure(cases: Sequence[Case], numel: int, title: str) -> list[Measured]:
    """Measures cases, a few processes at a time; nothing is timed here."""
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("the memory of a process is read from /proc, which needs Linux")
    # The largest, torch's with m = 20, is about 60 vectors.
    at_once = max(1, min(machine.cores(), int(available_memory() / (4 * 70 * numel))))
    specs = [
        {
            "optimizer": case.optimizer,
            "options": case.options,
            "after": case.after,
            "numel": numel,
            "tensors": TENSORS,
        }
        for case in cases
    ]
    # Processes are forked from one that has imported torch and done nothing else.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.harness.memory_case", "benchmarks.harness.saving"])
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", OMP_NUM_THREADS="1")
    rows = []
    with (
        rounds.progress(len(cases), title) as bar,
        context.Pool(at_once, maxtasksperchild=1) as pool,
    ):
        found_each = pool.imap(rehearse_and_measure, specs)
        for case, (found, cpu_seconds) in zip(cases, found_each, strict=True):
            machine.note_cpu(cpu_seconds)
            rows.append(Measured(case=case, numel=numel, expected=_expected(case, numel), **found))
            bar.update()
    return rows


def as_table(rows: list[Measured]) -> str:
    """Markdown, in bytes a parameter; extra vectors are float32 and of the parameters' length."""
    lines = []
    for row in rows:
        cells = [row.case.label, f"{row.state / row.numel:.2f}", f"{row.held / row.numel:.2f}"]
        cells += [f"{row.peak / row.numel:.2f}", f"{row.extra_vectors:.2f}", str(row.evaluations)]
        if row.expected is None or row.errors is None:
            cells += ["", ""]
        else:
            cells.append(" / ".join(f"{part / row.numel:.2f}" for part in row.expected))
            verdict = "" if row.agrees else " **off**"
            cells.append(" / ".join(f"{100 * e:+.2f}%" for e in row.errors) + verdict)
        lines.append(cells)
    headers = ["bytes a parameter", "state", "resident", "peak of a step", "extra vectors"]
    headers += ["evaluations", "estimate: state / peak", "off by"]
    return table(headers, lines)


def draw(rows: list[Measured]) -> Figure:
    """A bar for each case: state, and on top of it what a step needs beyond."""
    with style():
        figure, axes = plt.subplots(figsize=(8, 0.33 * len(rows) + 1.2), layout="constrained")
        for at, row in enumerate(rows):
            color = COLORS["ours"] if row.case.ours else COLORS["torch"]
            state, peak = row.state / row.numel, row.peak / row.numel
            axes.barh(at, state, color=color, height=0.62)
            axes.barh(at, peak - state, left=state, color=color, alpha=0.35, height=0.62)
            axes.text(peak + 1, at, f"{state:.1f} + {peak - state:.1f}", va="center", size=8)
            if row.expected is not None:
                axes.plot([row.expected[0] / row.numel] * 2, [at - 0.42, at + 0.42], "k", lw=1.5)
        axes.set_yticks(range(len(rows)), [row.case.label for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.14 * max(row.peak / row.numel for row in rows))
        axes.set_xlabel("bytes a parameter, beside 8 for the parameter and its gradient")
        axes.set_title(f"Optimizer memory, measured, {count(rows[0].numel)} parameters")
        axes.legend(
            handles=[
                Patch(color=COLORS["torch"], label="torch.optim"),
                Patch(color=COLORS["ours"], label="fuse_ext"),
                Patch(color="grey", alpha=0.35, label="more, at the worst moment of a step"),
                Line2D([], [], color="k", lw=1.5, label="estimate_memory: state"),
            ],
            loc="best",
        )
    return figure


def main() -> None:
    """Runs the module."""
    args = command.arguments("memory", __doc__.splitlines()[0], rounds=None)
    facts = machine.facts(args)
    numel = int(min(NUMEL, args.largest))
    rows = measure(all_cases(args.quick), numel, "memory")
    wrong = [row.case.label for row in rows if not row.agrees]
    verdict = (
        f"estimate_memory is **off by more than 2%** for: {', '.join(wrong)}."
        if wrong
        else "estimate_memory is within 2% of state and peak in every case."
    )
    text = f"{count(numel)} parameters in {TENSORS} tensors. {verdict}\n\n{as_table(rows)}"
    results = {"parameters": numel, "cases": [_as_json(row) for row in rows]}
    saving.save(args, "memory", facts, results, text, draw(rows))


def _as_json(row: Measured) -> dict[str, Any]:
    return {
        "label": row.case.label,
        "optimizer": row.case.optimizer,
        "options": row.case.options,
        "state_bytes": row.state,
        "resident_bytes": row.held,
        "peak_bytes": row.peak,
        "extra_vectors": row.extra_vectors,
        "evaluations": row.evaluations,
        "estimate": row.expected and dict(zip(("state", "peak"), row.expected, strict=True)),
        "estimate_agrees": row.agrees,
    }


if __name__ == "__main__":
    main()
