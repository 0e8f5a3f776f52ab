"""Adam's step and the L-BFGS iteration beside torch's and others', and the memory's limit.

The first table holds the project's targets, each met or missed; the others all sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import memory
from benchmarks.harness import (
    command,
    iteration_adam,
    iteration_dense,
    iteration_lbfgs,
    iteration_limits,
    machine,
    saving,
)
from benchmarks.harness.iteration_adam import AdamRow
from benchmarks.harness.iteration_dense import DenseRow
from benchmarks.harness.iteration_lbfgs import IN_CACHE, SEARCHED_ITERATIONS, LbfgsRow
from benchmarks.harness.iteration_limits import ROW_BYTES, Limit
from benchmarks.harness.pictures import COLORS, style
from benchmarks.harness.rounds import Spread
from benchmarks.harness.tables import count, number, table
from benchmarks.harness.workloads import history_dtypes

ROUNDS = (25, 11)
HISTORY = {"fp32": "fp32 history", "bf16": "bf16 history", "int8": "8-bit history"}
MEMORY_NUMEL = 10**7
PASSES = "the two passes over the history, fp32, d = 2e7, m = 10"
PASSES_SHARE = 0.9  # of the read bandwidth
HEADERS = ("target", "peer", "wanted", "measured", "verdict")
# What "about half" and "about a quarter" of torch's state may be at most.
SHARES = {"fp32": 1.01, "bf16": 0.56, "int8": 0.34}


@dataclass(frozen=True)
class Condition:
    """One number that a target asks for.

    Attributes:
        name: What it is.
        value: Measured.
        bound: To be reached, or not to be exceeded.
        at_most: Which of the two.
        spread: Over the rounds.
    """

    name: str
    value: float
    bound: float
    at_most: bool = False
    spread: Spread | None = None

    @property
    def met(self) -> bool:
        """Whether the median does."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        spread = f" ({self.spread.range()})" if self.spread else ""
        return f"{self.name} {number(self.value)}{spread}"

    @property
    def wanted(self) -> str:
        """The bound as text."""
        return f"{self.name} {'<=' if self.at_most else '>='} {self.bound:g}"


@dataclass(frozen=True)
class Target:
    """One line of the project's targets.

    Attributes:
        work: What is done.
        peer: Whom it is compared with.
        conditions: All must be met; empty where it was not measured.
        why_not: Why it was not.
    """

    work: str
    peer: str
    conditions: tuple[Condition, ...] = ()
    why_not: str = ""

    @property
    def verdict(self) -> str:
        """As the table says it."""
        if not self.conditions:
            return f"not measured: {self.why_not}"
        return "met" if all(c.met for c in self.conditions) else "**missed**"

    def cells(self) -> list[str]:
        """A line of the table."""
        wanted = "; ".join(c.wanted for c in self.conditions)
        return [self.work, self.peer, wanted, "; ".join(map(str, self.conditions)), self.verdict]


def _times(spread: Spread, bound: float, name: str = "times as fast") -> Condition:
    return Condition(name, spread.median, bound, spread=spread)


def _share(spread: Spread | None, bound: float, name: str) -> tuple[Condition, ...]:
    return () if spread is None else (_times(spread, bound, name),)


def _find(rows: list[Any], numel: int, tensors: int) -> Any:
    chosen = [row for row in rows if (row.numel, row.tensors) == (numel, tensors)]
    return next((row for row in chosen if row.dtype == "float32"), None)


def _work(row: LbfgsRow, name: str) -> str:
    """What the target of an L-BFGS row with such a history is called; there may be none."""
    size = f"d = {count(row.numel)}"
    if row.evaluations:
        return f"strong Wolfe, outside closures, an iteration, {size}" if name == "fp32" else ""
    if row.numel == 10**4:
        small = f"L-BFGS iteration, {size} in {row.tensors} tensors, m = {row.history_size}"
        return small if name == "fp32" else ""
    return f"L-BFGS iteration, {size}, m = {row.history_size}, {HISTORY[name]}"


def _adam_work(numel: int, tensors: int) -> str:
    return f"Adam step, d = {count(numel)} in {tensors} tensor{'s' * (tensors > 1)}"


def lbfgs_targets(rows: list[LbfgsRow]) -> list[Target]:
    """Those of the iteration with a fixed step."""
    peer = "torch.optim.LBFGS"
    targets = []
    large = _find(rows, 2 * 10**7, 1)
    for name, bound in (("fp32", 5.0), ("bf16", 8.0), ("int8", 8.0)):
        work = f"L-BFGS iteration, d = 2e7, m = 10, {HISTORY[name]}"
        if large is None or name not in large.seconds:
            why = "the size was left out" if large is None else "this build has no such history"
            targets.append(Target(work, peer, why_not=why))
            continue
        conditions = [_times(large.speedup(name), bound)]
        if name == "int8":
            conditions.append(Condition("state, bytes a parameter", large.state[name], 30, True))
        targets.append(Target(work, peer, tuple(conditions), large.unequal))
    fraction = large and large.fraction(large.bytes_moved)
    targets.append(
        Target(
            PASSES,
            "best way to read the same buffer",
            _share(fraction, PASSES_SHARE, "of the read bandwidth"),
            "the size was left out",
        )
    )
    small = _find(rows, 10**4, 8)
    work = "L-BFGS iteration, d = 1e4 in 8 tensors, m = 10"
    speedup = (_times(small.speedup(), 8.0),) if small else ()
    return [*targets, Target(work, peer, speedup, "the size was left out")]


def adam_targets(rows: list[AdamRow]) -> list[Target]:
    """Those of Adam's step."""
    targets = []
    for numel, tensors, bound in ((2 * 10**7, 1, 1.0), (10**6, 300, 4.0), (10**4, 8, 3.0)):
        row = _find(rows, numel, tensors)
        work = _adam_work(numel, tensors)
        conditions: tuple[Condition, ...] = ()
        if row is not None:
            conditions = (_times(row.speedup(), bound),)
            conditions += _share(row.fraction(), 0.95, "of the memory's limit")
        peer = "torch.optim.Adam(fused=True)"
        targets.append(Target(work, peer, conditions, "the size was left out"))
    return targets


def searched_targets(rows: list[LbfgsRow]) -> list[Target]:
    """Those of the iteration with a strong Wolfe search."""
    targets = []
    for numel in (10**5, 10**7):
        row = _find(rows, numel, 8)
        targets.append(
            Target(
                f"strong Wolfe, outside closures, an iteration, d = {count(numel)}",
                "torch.optim.LBFGS strong_wolfe",
                (_times(row.speedup(), 4.0, "times less"),) if row else (),
                "the size was left out",
            )
        )
    return targets


def dense_targets(rows: list[DenseRow]) -> list[Target]:
    """Those of the iteration with a matrix."""
    targets = []
    for numel in (2000, 5000):
        row = next((row for row in rows if row.numel == numel), None)
        conditions: tuple[Condition, ...] = ()
        if row is not None:
            passes = row.passes()
            once = Condition("of reading and writing it once", passes.median, 1.3, True, passes)
            numpy, scipy = row.speedup(iteration_dense.NUMPY), row.speedup(iteration_dense.SCIPY)
            conditions = (once, *_share(numpy, 4.0, "times as fast as numpy"))
            conditions += _share(scipy, 4.0, "times as fast as scipy")
        work = f"dense iteration, d = {count(numel)}"
        targets.append(Target(work, "numpy, scipy's BFGS", conditions, "the size was left out"))
    return targets


def memory_target(args: argparse.Namespace) -> Target:
    """Peak and state of a strong Wolfe step, each in a process of its own."""
    numel = int(min(MEMORY_NUMEL, args.largest))
    rows = memory.measure(memory.lbfgs_cases(searched=True), numel, "peak memory")
    theirs, ours = rows[0], rows[1:]
    conditions = [Condition("vectors over the state", ours[0].extra_vectors, 2.05, True)]
    for row, name in zip(ours, history_dtypes(), strict=True):
        share = row.state / theirs.state
        conditions.append(Condition(f"state {name} / torch's", share, SHARES[name], True))
    return Target(
        f"memory of a strong Wolfe step, d = {count(numel)}, m = 10",
        f"torch.optim.LBFGS: {theirs.extra_vectors:.1f} vectors over its state",
        tuple(conditions),
    )


# --- what limits them -----------------------------------------------------------------------


def bounds(
    targets: list[Target], fixed: list[LbfgsRow], searched: list[LbfgsRow], adam: list[AdamRow]
) -> list[Limit]:
    """The bound of every target that is a time and was measured."""
    wanted = {
        target.work: next((c.bound for c in target.conditions if c.name.startswith("times")), None)
        for target in targets
        if target.conditions
    }
    large = next((row.read_limit for row in fixed if row.read_limit is not None), None)
    found = []
    for row in [*fixed, *searched]:
        for name in HISTORY:
            work = _work(row, name)
            if work not in wanted or name not in row.seconds:
                continue
            common = (row.seconds[name], row.seconds["torch"], wanted[work])
            evaluations = row.evaluations.get(name)
            if row.bare:
                found.append(iteration_limits.ops_limit(work, row.bare, _calls(row), *common))
            elif large is not None:
                moved = iteration_limits.bytes_of_iteration(
                    row.history_size, ROW_BYTES[name], evaluations
                )
                found.append(
                    iteration_limits.memory_limit(work, moved, row.numel, large[1], *common)
                )
            if name in row.in_cache:
                share = IN_CACHE / row.numel
                found.append(
                    iteration_limits.instructions_limit(work, row.in_cache[name], share, *common)
                )
        if row.passes is not None and row.side_by_side is not None and large is not None:
            found.append(
                iteration_limits.streams_limit(
                    PASSES, row.bytes_moved, row.side_by_side, large[1], row.passes, PASSES_SHARE
                )
            )
    for row in adam:
        work = _adam_work(row.numel, row.tensors)
        if row.dtype != "float32" or work not in wanted:
            continue
        common = (row.seconds["fuse_ext"], row.seconds["torch fused"], wanted[work])
        if row.limit is not None:
            moved = float(iteration_adam.BYTES_A_PARAMETER)
            limit = iteration_limits.memory_limit(work, moved, row.numel, row.limit[1], *common)
        else:
            alone = {"adam_step": row.bare}
            limit = iteration_limits.ops_limit(work, alone, {"adam_step": 1.0}, *common)
        found.append(limit)
    return found


def _calls(row: LbfgsRow) -> dict[str, float]:
    """Of each op in an iteration; a search closes the last pair of a call of step as well."""
    trials = row.evaluations.get("fp32", 1.0)
    extra = 1.0 / SEARCHED_ITERATIONS if row.evaluations else 0.0
    counts = {
        "grad_stats": trials,
        iteration_limits.UPDATE_AND_SET_OUT: 1.0,
        "lbfgs_update": extra,
        "lbfgs_move": trials - 1.0,
    }
    return {name: counts.get(name, 0.0) for name in row.bare}


# --- pictures -------------------------------------------------------------------------------


def draw(targets: list[Target], fixed: list[LbfgsRow], adam: list[AdamRow]) -> Figure:
    """Left the targets that are ratios, right the times that they come from."""
    with style():
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(13, 4.6), layout="constrained", width_ratios=(1.35, 1, 1)
        )
        _draw_targets(left, targets)
        _draw_lbfgs(middle, fixed)
        _draw_adam(right, adam)
    return figure


def _draw_targets(axes: Axes, targets: list[Target]) -> None:
    lines = [
        (target.work, condition)
        for target in targets
        for condition in target.conditions
        if condition.name.startswith("times")
    ]
    for at, (_, condition) in enumerate(lines):
        color = COLORS["ours"] if condition.met else COLORS["grey"]
        axes.barh(at, condition.value, color=color, height=0.6)
        axes.plot([condition.bound] * 2, [at - 0.42, at + 0.42], color="k", lw=1.8)
        assert condition.spread is not None
        ends = [condition.spread.low, condition.spread.high]
        axes.plot(ends, [at, at], color="k", lw=1, alpha=0.6)
        right = max(ends[1], condition.bound)
        axes.text(right, at, f"  {number(condition.value)}x", va="center")
    axes.axvline(1, color=COLORS["torch"], lw=1.2)
    axes.set_yticks(range(len(lines)), [_short(*line) for line in lines])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_xlabel("times as fast as torch's, or as whom it says (blue line); black: the target")
    axes.set_title("Targets")


def _short(work: str, condition: Condition) -> str:
    _, _, peer = condition.name.partition("times as fast as ")
    work = f"{work}, beside {peer}" if peer else work
    work = work.replace("strong Wolfe, outside closures, an iteration", "L-BFGS, strong Wolfe")
    return work.replace(" iteration", "").replace(" step", "").replace(", m = 10", "")


def _draw_lbfgs(axes: Axes, rows: list[LbfgsRow]) -> None:
    chosen = [row for row in rows if row.history_size == 10 and row.dtype == "float32"]
    by_size = {row.numel: row for row in sorted(chosen, key=lambda row: -row.tensors)}
    sizes = sorted(by_size)
    looks = {
        "torch": ("torch.optim.LBFGS", COLORS["torch"], "s"),
        "fp32": ("fuse_ext.LBFGS", COLORS["ours"], "o"),
        "bf16": ("  bf16 history", COLORS["ours bf16"], "^"),
        "int8": ("  8-bit history", COLORS["ours int8"], "v"),
    }
    for name, (label, color, marker) in looks.items():
        known = [size for size in sizes if name in by_size[size].seconds]
        spreads = [by_size[size].seconds[name] for size in known]
        _line(axes, known, spreads, label, color, marker)
    _finish(axes, "L-BFGS iteration, m = 10, fixed step")


def _draw_adam(axes: Axes, rows: list[AdamRow]) -> None:
    by_size: dict[tuple[int, bool], AdamRow] = {
        (row.numel, row.tensors > 8): row for row in rows if row.dtype == "float32"
    }
    looks = {
        "torch for-loop": ("torch, for-loop", COLORS["other"], "D"),
        "torch foreach": ("torch, foreach", COLORS["torch alone"], "v"),
        "torch fused": ("torch, fused", COLORS["torch"], "s"),
        "fuse_ext": ("fuse_ext.Adam", COLORS["ours"], "o"),
        iteration_adam.NARROW: ("  bf16 moments", COLORS["ours bf16"], "^"),
    }
    for name, (label, color, marker) in looks.items():
        for many in (False, True):
            sizes = sorted(numel for numel, is_many in by_size if is_many == many)
            spreads = [by_size[numel, many].seconds[name] for numel in sizes]
            line = "--" if many else "-"
            _line(axes, sizes, spreads, "" if many else label, color, marker, line, not many)
    _finish(axes, "Adam step (hollow: many tensors)")


def _line(
    axes: Axes,
    sizes: list[int],
    spreads: list[Spread],
    label: str,
    color: str,
    marker: str,
    line: str = "-",
    filled: bool = True,
) -> None:
    if not sizes:
        return
    axes.plot(
        sizes,
        [spread.median for spread in spreads],
        line,
        marker=marker,
        color=color,
        markerfacecolor=color if filled else "white",
        label=label or None,
    )
    low, high = [spread.low for spread in spreads], [spread.high for spread in spreads]
    axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)


def _finish(axes: Axes, title: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="seconds", title=title)
    axes.legend(loc="upper left")


# --- the module -----------------------------------------------------------------------------


def _passes_text(rows: list[LbfgsRow]) -> str:
    row = next((row for row in rows if row.passes is not None), None)
    if row is None or row.passes is None or row.read_limit is None:
        return ""
    way, limit = row.read_limit
    moved, read = row.fraction(row.bytes_moved), row.fraction(row.bytes_read)
    assert moved is not None and read is not None
    rate = row.passes.per(row.bytes_moved / 1e9)
    ops = ", ".join(
        f"{name.partition('::')[2]} {1e3 * seconds:.2f} ms" for name, seconds in row.ops.items()
    )
    return (
        f"Where an iteration goes at d = {count(row.numel)} (one round): {ops}. The two passes "
        f"over the history move {row.bytes_moved / row.numel:.0f} bytes a parameter at "
        f"{rate.show()} GB/s, {100 * moved.median:.0f}% of the read limit of "
        f"{limit.scaled(1e-9).show()} GB/s ({way}); its rows alone, {100 * read.median:.0f}%."
    )


def _limit_text(rows: list[AdamRow]) -> str:
    row = next((row for row in rows if row.limit is not None), None)
    if row is None or row.limit is None:
        return ""
    way, limit = row.limit
    shares = {name: row.fraction(name) for name in row.seconds}
    text = ", ".join(f"{name} {100 * share.median:.0f}%" for name, share in shares.items() if share)
    return (
        f"The limit for 28 bytes a parameter is {limit.scaled(1e-9).show()} GB/s ({way}); "
        f"of it reach: {text}."
    )


def main() -> None:
    """Runs the module."""
    assert __doc__ is not None
    args = command.arguments("per_iteration", __doc__, ROUNDS)
    facts = machine.facts(args)
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "adam": iteration_adam.measure,
        "fixed": iteration_lbfgs.measure_fixed,
        "searched": iteration_lbfgs.measure_searched,
        "dense": iteration_dense.measure,
        "memory": memory_target,
    }
    done = {name: part(args) for name, part in parts.items()}
    adam, fixed, searched = done["adam"], done["fixed"], done["searched"]
    targets = [
        *lbfgs_targets(fixed),
        *adam_targets(adam),
        *searched_targets(searched),
        *dense_targets(done["dense"]),
        done["memory"],
    ]
    limits = bounds(targets, fixed, searched, adam)
    lost = sum(target.verdict == "**missed**" for target in targets)
    tables = [
        f"{sum(target.verdict == 'met' for target in targets)} of {len(targets)} targets met, "
        f"{lost} missed. Medians, with quartiles in brackets.",
        table(HEADERS, [target.cells() for target in targets]),
        iteration_limits.as_table(limits),
        _passes_text(fixed),
        fixed and iteration_lbfgs.as_table(fixed, "L-BFGS, fixed step"),
        searched and iteration_lbfgs.as_table(searched, "L-BFGS, strong Wolfe"),
        iteration_dense.as_text(done["dense"]),
        adam and iteration_adam.as_table(adam),
        _limit_text(adam),
    ]
    results = {
        "targets": [dict(zip(HEADERS, target.cells(), strict=True)) for target in targets],
        "limits": iteration_limits.as_json(limits),
        "adam": iteration_adam.as_json(adam),
        "lbfgs": iteration_lbfgs.as_json(fixed),
        "strong_wolfe": iteration_lbfgs.as_json(searched),
        "dense": [row.as_json() for row in done["dense"]],
    }
    text = "\n\n".join(part for part in tables if part)
    saving.save(args, "per_iteration", facts, results, text, draw(targets, fixed, adam))


if __name__ == "__main__":
    main()
