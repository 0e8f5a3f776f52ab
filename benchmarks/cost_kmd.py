"""The paper's O(K m d) for L-BFGS: time against iterations K, history size m and parameters d.

Each of the three is varied alone and fitted (slope in log-log, R^2). Then: at which batch size one
forward and backward pass of some networks costs as much as an L-BFGS iteration.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.harness import command, machine, pinn, saving
from benchmarks.harness.iteration_lbfgs import FIXED_LR, enough_memory, optimizers, set_up
from benchmarks.harness.pictures import COLORS, style
from benchmarks.harness.rounds import Spread, clocked, interleaved, repeated, show_time
from benchmarks.harness.tables import count, number, table, time_unit
from benchmarks.harness.workloads import Iterations, split

ROUNDS = (15, 5)
TENSORS = 8
AT = {"m": 10, "d": 10**6}  # where they are not varied
VALUES = {
    True: {
        "K": (4, 8, 16, 32),
        "m": (2, 4, 8, 16, 32),
        "d": (10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7),
    },
    False: {
        "K": (4, 8, 16, 32, 64, 128),
        "m": (2, 4, 8, 16, 32, 64),
        "d": (10**4, 10**5, 3 * 10**5, 10**6, 3 * 10**6, 10**7, 2 * 10**7),
    },
}
MEANING = {"K": "iterations K", "m": "history size m", "d": "parameters d"}
LONGEST_PASS = {True: 0.15, False: 0.6}  # seconds: no larger batches after such a pass
BATCHES = tuple(4**k for k in range(8))
LOOKS = {
    "torch": ("torch.optim.LBFGS", COLORS["torch"], "s"),
    "fp32": ("fuse_ext.LBFGS", COLORS["ours"], "o"),
    "bf16": ("  bf16 history", COLORS["ours bf16"], "^"),
    "int8": ("  8-bit history", COLORS["ours int8"], "v"),
}
LABELS = {
    "torch": "torch.optim.LBFGS",
    "fp32": "fuse_ext.LBFGS",
    "bf16": "fuse_ext.LBFGS, bf16 history",
    "int8": "fuse_ext.LBFGS, 8-bit history",
}


@dataclass(frozen=True)
class Fit:
    """T = c x^slope by least squares in log-log, and beside it a straight line T = a + b x.

    Attributes:
        slope: 1 where the cost is proportional, less where a part of it is fixed.
        r2: Of the logarithms.
        scale: c
        line_r2: Of the straight line, weighted so that relative errors count.
    """

    slope: float
    r2: float
    scale: float
    line_r2: float

    @staticmethod
    def of(x: Sequence[float], y: Sequence[float]) -> Fit:
        """The fit of some points."""
        log_x, log_y = np.log(x), np.log(y)
        slope, intercept = np.polyfit(log_x, log_y, 1)
        line = np.polyval(np.polyfit(x, y, 1, w=1 / np.asarray(y)), x)
        r2 = _r2(log_y, intercept + slope * log_x)
        return Fit(float(slope), r2, math.exp(intercept), _r2(np.asarray(y), line))


def _r2(values: Any, fitted: Any) -> float:
    return float(1 - ((values - fitted) ** 2).sum() / ((values - values.mean()) ** 2).sum())


@dataclass(frozen=True)
class Axis:
    """One of K, m, d varied alone.

    Attributes:
        name: Which.
        values: Its values.
        held: The others.
        seconds: For each optimizer, at each value: of K iterations for K, else of one.
    """

    name: str
    values: tuple[int, ...]
    held: dict[str, int]
    seconds: dict[str, list[Spread]]

    @property
    def conditions(self) -> str:
        """What is held."""
        return ", ".join(f"{name} = {count(value)}" for name, value in self.held.items())

    def fit(self, optimizer: str) -> Fit:
        """Over all values."""
        return Fit.of(self.values, [spread.median for spread in self.seconds[optimizer]])


def measure_axis(args: argparse.Namespace, name: str) -> Axis:
    """Times an iteration (or K of them) at every value of one of K, m, d."""
    values = VALUES[args.quick][name]
    if name == "d":
        values = tuple(d for d in values if d <= args.largest)
        while values and not enough_memory(sum(values), AT["m"]):
            values = values[:-1]
        if len(values) < 2:
            values = (int(args.largest) // 10, int(args.largest))
    held = {"m": AT["m"], "d": int(min(AT["d"], args.largest))}
    held.pop(name, None)
    runs: dict[str, Callable[[], float]] = {}
    shared: dict[str, Iterations] | None = None
    for value in values:
        at = {**held, name: value}
        if name != "K" or shared is None:
            shared = _iterating(at["m"], split(at["d"], TENSORS))
        for optimizer, case in shared.items():
            once = _several(case, value) if name == "K" else repeated(case.run)
            runs[f"{optimizer} {value}"] = once
    seconds = interleaved(runs, args.rounds, f"cost against {name}")
    names = sorted({run.partition(" ")[0] for run in runs}, key=list(LOOKS).index)
    by_optimizer = {o: [seconds[f"{o} {value}"] for value in values] for o in names}
    return Axis(name, values, held, by_optimizer)


def _iterating(history_size: int, sizes: list[int]) -> dict[str, Iterations]:
    made = optimizers(history_size, torch.float32, FIXED_LR, 1, None)
    return set_up(made, sizes, torch.float32, history_size)


def _several(case: Iterations, iterations: int) -> Callable[[], float]:
    return lambda: sum(case.run() for _ in range(iterations))


# --- the crossover --------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network and what one batch of it is.

    Attributes:
        name: For the tables.
        model: Called by ``loss``.
        loss: Of a batch of so many examples.
    """

    name: str
    model: nn.Module
    loss: Callable[[int], Tensor]

    @property
    def sizes(self) -> list[int]:
        """Of its parameter tensors."""
        return [p.numel() for p in self.model.parameters()]


def networks(quick: bool) -> list[Network]:
    """From hundreds to millions of parameters."""
    chosen = [_pinn(), _classifier("LeNet-5 on 28 x 28", _lenet(), (1, 28, 28))]
    chosen.append(_classifier("MLP 784-512-256-10", _mlp(784, 512, 256, 10), (784,)))
    chosen.append(_classifier("MLP 784-2048-2048-10", _mlp(784, 2048, 2048, 10), (784,)))
    if not quick:
        chosen.append(_transformer())
    return chosen


def _pinn() -> Network:
    model = pinn.Mlp(2, 20, 20, 20, 20, 20, 20, 20, 20, 1)
    problems: dict[int, pinn.Problem] = {}

    def loss(points: int) -> Tensor:
        """Its "batch" is the number of collocation points; the boundary comes on top."""
        if points not in problems:
            problems[points] = pinn.burgers(max(points, 8))
        return problems[points].loss(model)

    return Network("PINN of Raissi et al. for Burgers, 8 x 20", model, loss)


def _classifier(name: str, model: nn.Module, shape: tuple[int, ...]) -> Network:
    data: dict[int, tuple[Tensor, Tensor]] = {}

    def loss(batch: int) -> Tensor:
        if batch not in data:
            data[batch] = torch.randn(batch, *shape), torch.randint(10, (batch,))
        x, y = data[batch]
        return nn.functional.cross_entropy(model(x), y)

    return Network(name, model, loss)


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def _transformer() -> Network:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4)
    data: dict[int, Tensor] = {}

    def loss(batch: int) -> Tensor:
        x = data.setdefault(batch, torch.randn(batch, 64, 256))
        return model(x).square().mean()

    return Network("Transformer, 4 layers of 256, 64 tokens", model, loss)


@dataclass(frozen=True)
class Crossing:
    """What an L-BFGS iteration costs beside a forward and backward pass.

    Attributes:
        network: Name of the network.
        numel: Its parameters.
        tensors: In so many tensors.
        passes: Seconds of a forward and backward pass, for each batch size.
        iterations: Seconds of an L-BFGS iteration outside the closure, for each optimizer.
    """

    network: str
    numel: int
    tensors: int
    passes: dict[int, Spread]
    iterations: dict[str, Spread]

    def batch(self, optimizer: str) -> float:
        """The batch at which both cost the same, between the two nearest measured.

        0 below the smallest measured, infinity above the largest.
        """
        wanted = self.iterations[optimizer].median
        times = [spread.median for spread in self.passes.values()]
        logs = np.log(list(self.passes))
        found = np.interp(math.log(wanted), np.log(times), logs, left=-math.inf, right=math.inf)
        return float(np.exp(found))

    def show_batch(self, optimizer: str) -> str:
        """As text."""
        batch = self.batch(optimizer)
        if batch == 0:
            return f"< {min(self.passes)}"
        return f"> {max(self.passes)}" if math.isinf(batch) else number(batch, 2)


def measure_crossing(args: argparse.Namespace, network: Network) -> Crossing:
    """Times both in the same rounds."""
    numel = sum(network.sizes)
    cases = _iterating(AT["m"], network.sizes)
    runs: dict[str, Callable[[], float]] = {
        name: repeated(case.run) for name, case in cases.items()
    }
    batches = []
    for batch in BATCHES:

        def step(batch: int = batch) -> None:
            network.model.zero_grad()
            network.loss(batch).backward()

        step()
        batches.append(batch)
        runs[str(batch)] = repeated(clocked(step))
        if runs[str(batch)]() > LONGEST_PASS[args.quick]:
            break
    seconds = interleaved(runs, args.rounds, network.name)
    return Crossing(
        network.name,
        numel,
        len(network.sizes),
        {batch: seconds.pop(str(batch)) for batch in batches},
        seconds,
    )


# --- tables and pictures --------------------------------------------------------------------


def fits_table(axes: list[Axis]) -> str:
    """Markdown: slope and R^2 of each axis for each optimizer."""
    lines = []
    for axis in axes:
        ends = f"{count(axis.values[0])} to {count(axis.values[-1])}"
        title = f"{MEANING[axis.name]} from {ends} ({axis.conditions})"
        for optimizer, spreads in axis.seconds.items():
            fit = axis.fit(optimizer)
            cells = [title, LABELS[optimizer], f"{fit.slope:.3f}", f"{fit.r2:.4f}"]
            cells.append(f"{fit.line_r2:.4f}")
            cells += [show_time(spreads[0]), show_time(spreads[-1])]
            lines.append([*cells, axis.seconds["torch"][-1].over(spreads[-1]).show()])
            title = ""
    headers = ["time against", "optimizer", "slope", "R^2", "R^2 of a line"]
    headers += ["first", "last", "torch / this, last"]
    return table(headers, lines)


def crossings_table(crossings: list[Crossing]) -> str:
    """Markdown: the batch at which an iteration and a pass cost the same."""
    names = list(crossings[0].iterations)
    headers = ["network", "d", "forward + backward at the largest batch"]
    headers += [f"{LABELS[name]}: iteration, break-even batch" for name in names]
    lines = []
    for crossing in crossings:
        batch, spread = list(crossing.passes.items())[-1]
        cells = [crossing.network, f"{crossing.numel:,}", f"{show_time(spread)} at {batch}"]
        for name in names:
            factor, unit = time_unit(crossing.iterations[name].median)
            own = f"{number(factor * crossing.iterations[name].median)} {unit}"
            cells.append(f"{own}, {crossing.show_batch(name)}")
        lines.append(cells)
    return table(headers, lines)


def draw(axes: list[Axis], crossing: Crossing) -> Figure:
    """A panel for each axis, and one for the crossover of one network."""
    with style():
        figure, panels = plt.subplots(1, 4, figsize=(14, 3.9), layout="constrained")
        for panel, axis in zip(panels, axes, strict=False):
            _draw_axis(panel, axis)
        _draw_crossing(panels[-1], crossing)
    return figure


def _draw_axis(panel: Axes, axis: Axis) -> None:
    for optimizer, spreads in axis.seconds.items():
        label, color, marker = LOOKS[optimizer]
        fit = axis.fit(optimizer)
        ends = np.array([axis.values[0], axis.values[-1]], dtype=float)
        medians = [spread.median for spread in spreads]
        bars = [
            [spread.median - spread.low for spread in spreads],
            [spread.high - spread.median for spread in spreads],
        ]
        panel.errorbar(axis.values, medians, bars, fmt=marker, color=color, elinewidth=1)
        text = f"{label}: slope {fit.slope:.2f}"
        panel.plot(ends, fit.scale * ends**fit.slope, color=color, lw=1.2, label=text)
    panel.set(xscale="log", yscale="log", xlabel=MEANING[axis.name])
    if axis.name != "d":
        panel.set_xticks(axis.values, list(map(str, axis.values)))
        panel.minorticks_off()
    panel.set_ylabel("seconds for K iterations" if axis.name == "K" else "seconds an iteration")
    panel.set_title(f"{axis.name}  ({axis.conditions})")
    panel.legend(loc="upper left")


def _draw_crossing(panel: Axes, crossing: Crossing) -> None:
    batches = list(crossing.passes)
    medians = [spread.median for spread in crossing.passes.values()]
    panel.plot(batches, medians, "D-", color=COLORS["other"], label="forward + backward")
    for name, spread in crossing.iterations.items():
        label, color, _ = LOOKS[name]
        at = f"batch {crossing.show_batch(name)}"
        panel.axhline(spread.median, color=color, lw=1.5, label=f"{label}: {at}")
        panel.axhspan(spread.low, spread.high, color=color, alpha=0.15, linewidth=0)
        if 0 < crossing.batch(name) < math.inf:
            where = crossing.batch(name), spread.median
            panel.plot(*where, "o", color=color, markeredgecolor="k", zorder=5)
    panel.set(xscale="log", yscale="log", xlabel="batch size", ylabel="seconds")
    panel.set_title(f"{crossing.network}, d = {count(crossing.numel)}")
    panel.legend(loc="upper left")


def main() -> None:
    """Runs the module."""
    assert __doc__ is not None
    args = command.arguments("cost_kmd", __doc__, ROUNDS)
    facts = machine.facts(args)
    axes = [measure_axis(args, name) for name in VALUES[args.quick]]
    chosen = [n for n in networks(args.quick) if sum(n.sizes) <= args.largest]
    crossings = [measure_crossing(args, network) for network in chosen]
    text = "\n\n".join(
        [
            "L-BFGS with a fixed step, outside the closure. Slopes are fitted over all values in "
            "log-log; a slope below 1 with a straight line a + b x that fits means a fixed part a "
            "(for m: the vectors that are read whatever m is).",
            fits_table(axes),
            "At the break-even batch one forward and backward pass costs as much as the rest of "
            "an L-BFGS iteration (m = 10).",
            crossings_table(crossings),
        ]
    )
    results = {
        "axes": [_axis_json(axis) for axis in axes],
        "crossings": [_crossing_json(crossing) for crossing in crossings],
    }
    saving.save(args, "cost_kmd", facts, results, text, draw(axes, crossings[-1]))


def _axis_json(axis: Axis) -> dict[str, Any]:
    return {
        "axis": axis.name,
        "values": axis.values,
        "held": axis.held,
        "seconds": axis.seconds,
        "fits": {name: vars(axis.fit(name)) for name in axis.seconds},
    }


def _crossing_json(crossing: Crossing) -> dict[str, Any]:
    return {
        "network": crossing.network,
        "parameters": crossing.numel,
        "tensors": crossing.tensors,
        "pass_seconds": crossing.passes,
        "iteration_seconds": crossing.iterations,
        "break_even_batch": {name: crossing.show_batch(name) for name in crossing.iterations},
    }


if __name__ == "__main__":
    main()
