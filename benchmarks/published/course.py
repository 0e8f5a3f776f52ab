"""One run: a closure that counts, and what was known when."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

LOST = 100  # losses in a row that are not finite end a run


class Problem(Protocol):
    """What is minimised.

    Attributes:
        params: To be optimized.
        resample_every: Evaluations after which new points are due, or None.
    """

    params: list[Tensor]
    resample_every: int | None

    def evaluate(self) -> Tensor:
        """The loss, with its gradients in ``params``."""

    def error(self, params: Sequence[Tensor]) -> float:
        """How far other parameters are from the solution."""

    def resample(self) -> None:
        """Draws new points."""


class BudgetSpentError(Exception):
    """The closure was called once too often."""


def checkpoints(budget: int) -> set[int]:
    """Evaluations at which a run is judged: half of them by equal ratios, half by equal steps."""
    half = min(max(budget // 8, 5), 40)
    ratios = np.geomspace(min(10, budget), budget, half)
    return {round(at) for at in (*ratios, *np.linspace(budget / half, budget, half))}


class Course:
    """The closure of a run.

    Args:
        problem: What to solve.
        budget: Calls of the closure; the next one raises :class:`BudgetSpentError`.

    Attributes:
        params: To be optimized.
        count: Evaluations so far, those of line searches included.
    """

    def __init__(self, problem: Problem, budget: int) -> None:
        self.params = problem.params
        self.count = 0
        self._problem, self._budget = problem, budget
        self._judge_at = checkpoints(budget)
        self._least, self._lost, self._drawn_at = math.inf, 0, 0
        self._best = [param.detach().clone() for param in self.params]
        self._known: dict[str, list[float]] = {
            name: [] for name in ("evaluations", "cpu_seconds", "seconds", "loss", "error")
        }
        # What judging takes is not the optimizer's.
        self._start = self._now()

    @staticmethod
    def _now() -> Any:
        return np.array([time.process_time(), time.perf_counter()])

    def __call__(self) -> Tensor:
        """Evaluates; keeps a copy of the best point."""
        if self.count == self._budget or self._lost == LOST:
            raise BudgetSpentError
        loss = self._problem.evaluate()
        value = float(loss)
        self.count += 1
        self._lost = 0 if math.isfinite(value) else self._lost + 1
        if value < self._least:
            self._least = value
            torch._foreach_copy_(self._best, [param.detach() for param in self.params])
        if self.count in self._judge_at:
            self.judge()
        return loss

    def judge(self) -> None:
        """Notes the least loss and the error there; the clock stands still meanwhile."""
        begin = self._now()
        cpu, wall = begin - self._start
        error = self._problem.error(self._best)
        for name, value in zip(
            self._known, (self.count, cpu, wall, self._least, error), strict=True
        ):
            self._known[name].append(float(f"{value:.5g}"))
        self._start += self._now() - begin

    def resample_if_due(self) -> bool:
        """New points, if the last ones have served; from then on the least loss is on the new."""
        every = self._problem.resample_every
        if every is None or self.count - self._drawn_at < every:
            return False
        self._problem.resample()
        self._drawn_at, self._least = self.count, math.inf
        return True

    def record(self) -> dict[str, Any]:
        """What was known when, as JSON can hold it; the last entries are those of the end."""
        if not self._known["evaluations"] or self._known["evaluations"][-1] != self.count:
            self.judge()
        return {**self._known, "parameters": sum(param.numel() for param in self.params)}


def run(
    problem: str, options: dict[str, Any], seed: int, budget: int, train: Callable[[Course], None]
) -> dict[str, Any]:
    """Trains on a problem, and records the run.

    Args:
        problem: "package.module:function", which makes a :class:`Problem` of a seed and options.
        options: Of that function.
        seed: Of initialisation and points.
        budget: Evaluations.
        train: Calls the course until it raises :class:`BudgetSpentError`, or returns earlier.
    """
    module, _, name = problem.partition(":")
    built = getattr(importlib.import_module(module), name)(seed, **options)
    # torch loads parts of itself on first use.
    built.evaluate()
    torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True).step()
    course = Course(built, budget)
    with contextlib.suppress(BudgetSpentError):
        train(course)
    return course.record()
