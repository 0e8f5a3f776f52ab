"""FusePV beside SGD, Adam and Adam then SGD on the paper's four test functions.

Rosenbrock, Rastrigin, Ackley and Himmelblau in two dimensions, as in Figures 1 to 4 of
arXiv 2503.04204, from one start each, with the same number of evaluations for all. The learning
rates of SGD and Adam are the best of a grid for that very start, and FusePV takes over Adam's. The
switch is set by hand, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import STYLES, SWITCH_MARK, Relay, arguments, best, save, table
from torch import Tensor
from tqdm import tqdm

from fuse_ext import FusePV

SWITCH = 100
SGD_GRID = (1e-4, 1e-3, 1e-2, 1e-1)  # the paper: 0.01
ADAM_GRID = (1e-3, 1e-2, 1e-1, 1.0)  # the paper: 0.001
METHODS = ("SGD", "Adam", "Adam then SGD", "FusePV")
SMALLEST = 1e-16  # what the plots call zero


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def rastrigin(x: Tensor, y: Tensor) -> Tensor:
    return sum(z**2 - 10 * torch.cos(2 * math.pi * z) + 10 for z in (x, y))


def ackley(x: Tensor, y: Tensor) -> Tensor:
    waves = torch.exp((torch.cos(2 * math.pi * x) + torch.cos(2 * math.pi * y)) / 2)
    return 20 - 20 * torch.exp(-0.2 * torch.sqrt((x**2 + y**2) / 2)) + math.e - waves


def himmelblau(x: Tensor, y: Tensor) -> Tensor:
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


@dataclass(frozen=True)
class Problem:
    """A function to minimise; its global minimum is 0.

    Attributes:
        f: Of two tensors.
        start: Where every method begins.
        minima: All global minima.
        window: What the picture shows: least and greatest x, then y.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, float]
    minima: Sequence[tuple[float, float]]
    window: tuple[float, float, float, float]


PROBLEMS = {
    "Rosenbrock": Problem(rosenbrock, (-1.5, 2.0), [(1, 1)], (-2.5, 2.5, -1, 4)),
    "Rastrigin": Problem(rastrigin, (1.6, -2.3), [(0, 0)], (-3.5, 3.5, -3.5, 3.5)),
    "Ackley": Problem(ackley, (-1.5, 3.0), [(0, 0)], (-3.5, 3.5, -3.5, 3.5)),
    "Himmelblau": Problem(
        himmelblau,
        (0.0, 0.0),
        [(3, 2), (-2.805118, 3.131313), (-3.779310, -3.283186), (3.584428, -1.848127)],
        (-5, 5, -5, 5),
    ),
}


@dataclass
class Run:
    """One run; the lists have an entry before every step and one for the end.

    Attributes:
        evaluations: Closure calls so far.
        losses: Values of the function.
        points: Where.
        switch: FusePV's Adam steps, or None.
    """

    evaluations: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)
    switch: int | None = None


def minimise(problem: Problem, make: Callable[[list[Tensor]], Any], budget: int) -> Run:
    x = torch.tensor(problem.start, dtype=torch.float64, requires_grad=True)
    optimizer, calls, run = make([x]), 0, Run()

    def record() -> None:
        run.evaluations.append(calls)
        run.losses.append(problem.f(*x.detach()).item())
        run.points.append(x.tolist())

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        x.grad = None
        loss = problem.f(*x)
        loss.backward()
        return loss

    record()
    while calls < budget:
        optimizer.step(closure)
        record()
        if isinstance(optimizer, FusePV) and optimizer.report().converged:
            break
    if isinstance(optimizer, FusePV):
        run.switch = optimizer.report().switch_step
    return run


def compare(problem: Problem, budget: int, bar: tqdm) -> tuple[dict[str, Run], dict[str, str]]:
    """A run of every method, and their learning rates."""

    def sgd(params: list[Tensor], lr: float) -> torch.optim.SGD:
        return torch.optim.SGD(params, lr=lr)

    def adam(params: list[Tensor], lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(params, lr=lr)

    def adam_then_sgd(params: list[Tensor], lr: float, adam_lr: float) -> Relay:
        return Relay(adam(params, adam_lr), sgd(params, lr), SWITCH)

    def fuse_pv(params: list[Tensor], lr: float) -> FusePV:
        return FusePV(params, lr=lr, switch=SWITCH, deterministic=True)

    def tune(make: Callable[..., Any], grid: Sequence[float]) -> tuple[float, Run]:
        def run(lr: float) -> Run:
            bar.update()
            return minimise(problem, partial(make, lr=lr), budget)

        return best(grid, run)

    lr_sgd, run_sgd = tune(sgd, SGD_GRID)
    lr_adam, run_adam = tune(adam, ADAM_GRID)
    lr_then, run_then = tune(partial(adam_then_sgd, adam_lr=lr_adam), SGD_GRID)
    run_fuse = minimise(problem, partial(fuse_pv, lr=lr_adam), budget)
    runs = dict(zip(METHODS, (run_sgd, run_adam, run_then, run_fuse), strict=True))
    rates = f"{lr_sgd:g}", f"{lr_adam:g}", f"{lr_adam:g}, {lr_then:g}", f"{lr_adam:g}, 1"
    return runs, dict(zip(METHODS, rates, strict=True))


def summary(results: dict[str, tuple[dict[str, Run], dict[str, str]]]) -> str:
    rows = []
    for name, (runs, rates) in results.items():
        for method, run in runs.items():
            distance = min(math.dist(run.points[-1], x) for x in PROBLEMS[name].minima)
            rows.append(
                [
                    name,
                    method,
                    rates[method],
                    f"{run.losses[-1]:.1e}",
                    f"{distance:.1e}",
                    str(run.evaluations[-1]),
                ]
            )
    return table(["function", "optimizer", "lr", "f", "to a minimum", "evaluations"], rows, 2)


def draw(results: dict[str, tuple[dict[str, Run], dict[str, str]]], budget: int) -> plt.Figure:
    """A column for each function: the paths over the contours, and f over the evaluations."""
    figure, axes = plt.subplots(2, len(results), figsize=(13, 6.6), layout="constrained")
    for (name, (runs, _)), (path_ax, loss_ax) in zip(results.items(), axes.T, strict=True):
        problem = PROBLEMS[name]
        left, right, bottom, top = problem.window
        x, y = np.meshgrid(np.linspace(left, right, 300), np.linspace(bottom, top, 300))
        f = np.log1p(problem.f(torch.from_numpy(x), torch.from_numpy(y)).numpy())
        path_ax.contour(x, y, f, levels=16, cmap="Greys", alpha=0.6, linewidths=0.7)
        for method, run in runs.items():
            points, losses = np.array(run.points), np.maximum(run.losses, SMALLEST)
            path_ax.plot(*points.T, label=method, **STYLES[method])
            loss_ax.plot(run.evaluations, losses, **STYLES[method])
            if run.switch is not None:
                path_ax.plot(*points[run.switch], **SWITCH_MARK)
                loss_ax.plot(run.switch, losses[run.switch], **SWITCH_MARK)
        path_ax.plot(*problem.start, "ks", markersize=6, label="start")
        path_ax.plot(*zip(*problem.minima, strict=True), "k*", markersize=12, label="minimum")
        path_ax.set(title=name, xlim=(left, right), ylim=(bottom, top), aspect="equal")
        least = min(min(run.losses) for run in runs.values())
        bottom = max(least / 10, SMALLEST)
        loss_ax.set(xlabel="evaluations", yscale="log", xlim=(0, budget), ylim=(bottom, None))
        loss_ax.grid(alpha=0.3)
        loss_ax.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_ylabel("f")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
    return figure


def main() -> None:
    args = arguments(__doc__.partition("\n")[0])
    names, budget = (list(PROBLEMS)[:2], 150) if args.quick else (list(PROBLEMS), 500)
    per_problem = 2 * len(SGD_GRID) + len(ADAM_GRID)
    with tqdm(total=per_problem * len(names), unit="run") as bar:
        results = {}
        for name in names:
            bar.set_description(name)
            results[name] = compare(PROBLEMS[name], budget, bar)
    print(
        f"\nTest functions: at most {budget} evaluations from one start; switch after {SWITCH}.\n"
    )
    print(summary(results))
    save(draw(results, budget), args.out / "functions.png")


if __name__ == "__main__":
    main()
