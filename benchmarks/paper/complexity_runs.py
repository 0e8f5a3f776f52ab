"""Runs to a gradient of given norm, for Table I.

Softmax regression on scikit-learn's digits with an L2 penalty is strongly convex; a small tanh
network in its place is not convex. All in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fuse_ext

EPSILONS = tuple(10.0 ** (-k / 4) for k in range(4, 33))  # 1e-1 to 1e-8
WIDTHS = {"convex": (64, 10), "non-convex": (64, 16, 10)}
DECAY = 1e-3  # the penalty is DECAY / 2 |x|^2
BATCH = 64
LOOK = 10  # steps on batches between two looks at the whole gradient
POINTS = 200  # of a curve that is kept
Params = list[Tensor]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 images of 8 x 8 pixels in [0, 1], and their digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.as_tensor(data.data) / 16, torch.as_tensor(data.target)


class Task:
    """The loss of a network on all images, or on some of them.

    Args:
        kind: Of ``WIDTHS``.
        seed: Of the start.
        size: Of the data: the first so many images.

    Attributes:
        params: In float64.
        count: Of the images.
    """

    def __init__(self, kind: str, seed: int, size: int) -> None:
        images, labels = digits()
        self.images, self.labels = images[:size], labels[:size]
        self.count = len(self.images)
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(WIDTHS[kind]):
            layers += [nn.Linear(fan_in, fan_out, dtype=torch.float64), nn.Tanh()]
        self._model = nn.Sequential(*layers[:-1])
        self.params: Params = list(self._model.parameters())

    def loss(self, rows: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of all images or those in ``rows``, and the penalty."""
        x, y = (
            (self.images, self.labels) if rows is None else (self.images[rows], self.labels[rows])
        )
        penalty = torch.stack([p.square().sum() for p in self.params]).sum()
        return nn.functional.cross_entropy(self._model(x), y) + 0.5 * DECAY * penalty

    def evaluate(self, rows: Tensor | None = None) -> Tensor:
        """The loss, with its gradients set."""
        for param in self.params:
            param.grad = None
        loss = self.loss(rows)
        loss.backward()
        return loss

    def norm(self) -> float:
        """Of the gradients at hand."""
        return float(torch.linalg.vector_norm(torch.cat([p.grad.view(-1) for p in self.params])))


def summary(at: list[int], norms: list[float]) -> dict[str, Any]:
    """What is kept of a run.

    Args:
        at: Gradient evaluations, increasing.
        norms: Of the gradient of the whole loss, then.
    """
    finite = [norm if math.isfinite(norm) else math.inf for norm in norms]
    least = np.minimum.accumulate(finite)
    reached = [
        next((n for n, norm in zip(at, least, strict=True) if norm <= epsilon), None)
        for epsilon in EPSILONS
    ]
    kept = np.unique(np.geomspace(1, len(at), min(len(at), POINTS)).round().astype(int) - 1)
    return {
        "reached": reached,
        "evaluations": at[-1],
        "least": float(least[-1]),
        "level": float(np.median(finite[-max(1, len(at) // 10) :])),  # in the last tenth
        "at": [at[i] for i in kept],
        "norms": [float(finite[i]) for i in kept],
    }


# --- all images at every evaluation ---------------------------------------------------------

# The paper's L-BFGS does not scale itself.
PLAIN = {"deterministic": True, "self_scaling": False}


def lbfgs(params: Params) -> Any:
    return fuse_ext.FusePV(params, switch=fuse_ext.AtOnce(), **PLAIN)


def fuse_pv(params: Params, lr: float) -> Any:
    """All else by default, but told that the closure is the same function at every call."""
    return fuse_ext.FusePV(params, lr=lr, **PLAIN)


FULL: dict[str, Callable[..., Any]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "L-BFGS": lbfgs,
    "FUSE": fuse_pv,
}


class DoneError(Exception):
    """The gradient is as small as was asked for, or the budget is spent."""


def full(
    kind: str, method: str, lrs: list[float], seed: int, size: int, budget: int
) -> dict[str, Any]:
    """One run until the gradient's norm is at most the least epsilon: a cell's part.

    Every evaluation counts, trial points of line searches included, and is looked at.
    """
    task = Task(kind, seed, size)
    optimizer = FULL[method](task.params, *lrs)
    norms: list[float] = []

    def closure() -> Tensor:
        if len(norms) == budget:
            raise DoneError
        loss = task.evaluate()
        norms.append(task.norm())
        if not EPSILONS[-1] < norms[-1] < math.inf:
            raise DoneError
        return loss

    before = -1
    with contextlib.suppress(DoneError):
        while len(norms) > before:
            before = len(norms)
            optimizer.step(closure)
    switch = optimizer.report().switch_step if method == "FUSE" else None
    return {**summary(list(range(1, len(norms) + 1)), norms), "switch": switch}


# --- batches --------------------------------------------------------------------------------


def fixed_step(params: Params, lr: float, lbfgs_lr: float) -> Any:
    """Both phases on small batches, with fixed steps, as the paper's theory has it."""
    return fuse_ext.FusePV(
        params,
        lr=lr,
        switch=fuse_ext.LossPlateau(),
        lbfgs_lr=lbfgs_lr,
        line_search=None,
        deterministic=False,
    )


def fixed_step_lbfgs(params: Params, lbfgs_lr: float) -> Any:
    return fuse_ext.FusePV(
        params,
        switch=fuse_ext.AtOnce(),
        lbfgs_lr=lbfgs_lr,
        line_search=None,
        deterministic=False,
    )


def then_all(params: Params, lr: float) -> Any:
    """Adam on small batches, L-BFGS with a line search on all images."""
    return fuse_ext.FusePV(params, lr=lr, switch=fuse_ext.LossPlateau(), **PLAIN)


BATCHES: dict[str, Callable[..., Any]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "L-BFGS": fixed_step_lbfgs,
    "FUSE": fixed_step,
    "FUSE, then all images": then_all,
}


def batches(
    kind: str, method: str, lrs: list[float], seed: int, size: int, budget: int, shrink: bool
) -> dict[str, Any]:
    """One run on batches.

    Evaluations are counted in batches: one on all images is as many as these make. The whole
    gradient is looked at every ``LOOK`` steps and after each step on all images, uncounted.

    Args:
        kind: Of the task.
        method: Of ``BATCHES``.
        lrs: Its steps.
        seed: Of start and batches.
        size: Of the data.
        budget: Evaluations.
        shrink: Step k is 1 / (1 + k / k0) times as long, k0 a twentieth of the budget.
    """
    task = Task(kind, seed, size)
    optimizer = BATCHES[method](task.params, *lrs)
    draw = _rows(task.count, seed)
    schedule = None
    if shrink:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + 20 * k / budget))
    spent, steps = 0.0, 0
    at: list[int] = []
    norms: list[float] = []
    rows: Tensor | None = None

    def closure() -> Tensor:
        nonlocal spent
        spent += 1.0 if rows is not None else task.count / BATCH
        return task.evaluate(rows)

    while spent < budget:
        whole = method == "FUSE, then all images" and optimizer.phase == "lbfgs"
        rows = None if whole else next(draw)
        optimizer.step(closure)
        if schedule is not None:
            schedule.step()
        steps += 1
        done = method.startswith("FUSE") and optimizer.report().converged
        stopped = done or spent > budget
        if whole or stopped or steps % LOOK == 0:
            task.evaluate()
            at.append(round(spent))
            norms.append(task.norm())
            if stopped or not EPSILONS[-1] < norms[-1] < math.inf:
                break
    switch = optimizer.report().switch_step if method.startswith("FUSE") else None
    return {**summary(at, norms), "switch": switch}


def _rows(count: int, seed: int) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=order)[: count // BATCH * BATCH].split(BATCH)


# --- cells ----------------------------------------------------------------------------------


def run(sees: str, seeds: list[int], **options: Any) -> list[dict[str, Any]]:
    """The method from every seed's start; ``sees`` is "all" or "batches"."""
    one = {"all": full, "batches": batches}[sees]
    return [one(seed=seed, **options) for seed in seeds]


def tune(
    sees: str, seeds: list[int], grid: list[list[float]], **options: Any
) -> list[dict[str, Any]]:
    """The method with every one of the learning rates, without curves."""
    found = []
    for lrs in grid:
        results = run(sees, seeds, lrs=lrs, **options)
        kept = ("reached", "least", "level", "evaluations")
        found.append(
            {"lrs": lrs, "runs": [{name: result[name] for name in kept} for result in results]}
        )
    return found
