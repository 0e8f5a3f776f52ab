"""Functions to minimise, each of one vector, with start and least value known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A smooth function of a vector, for any floating dtype.

    Attributes:
        f: The function; a scalar of the vector's dtype.
        x0: Where to start, in float64.
        least: The least value f*.
        solution: Where it is taken, if known.
    """

    name: str
    f: Callable[[Tensor], Tensor]
    x0: Tensor
    least: float = 0.0
    solution: Tensor | None = None

    def __str__(self) -> str:
        return self.name


class Objective:
    """A problem with a parameter of its own, its closure, and a count of the calls."""

    def __init__(
        self, problem: Problem, dtype: torch.dtype = torch.float64, weight_decay: float = 0.0
    ) -> None:
        self.problem = problem
        self.x = problem.x0.to(dtype, copy=True).requires_grad_()
        self.weight_decay = weight_decay
        self.calls = 0
        self.least_seen = math.inf

    def closure(self) -> Tensor:
        self.calls += 1
        self.x.grad = None
        loss = self.problem.f(self.x)
        if self.weight_decay:
            loss = loss + 0.5 * self.weight_decay * self.x.square().sum()
        loss.backward()
        self.least_seen = min(self.least_seen, loss.item())
        return loss

    @property
    def value(self) -> float:
        """f where the parameter stands, in float64."""
        return self.problem.f(self.x.detach().double()).item()

    @property
    def gap(self) -> float:
        """f - f* there."""
        return self.value - self.problem.least


def rosenbrock(n: int) -> Problem:
    """Sum of n / 2 Rosenbrock valleys, from the usual start."""

    def f(x: Tensor) -> Tensor:
        a, b = x[0::2], x[1::2]
        return (100.0 * (b - a.square()).square() + (1.0 - a).square()).sum()

    start = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(n // 2)
    return Problem(f"rosenbrock-{n}", f, start, 0.0, torch.ones_like(start))


def quadratic(condition: float, n: int = 50, seed: int = 0) -> Problem:
    """(x - x*)^T A (x - x*) / 2 with eigenvalues from 1 to ``condition``, equally spaced in log."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(0.0, math.log10(condition), n, dtype=torch.float64)
    root = eigenvalues.sqrt()[:, None] * basis.T
    solution = torch.randn(n, generator=generator, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        # As a sum of squares: rounding is relative to f, not to |x|^2 condition.
        return 0.5 * (root.to(x.dtype) @ (x - solution.to(x.dtype))).square().sum()

    return Problem(f"quadratic-1e{math.log10(condition):.0f}", f, 0.0 * solution, 0.0, solution)


def logistic(n: int = 20, samples: int = 200, seed: int = 0, decay: float = 1e-3) -> Problem:
    """Logistic regression with an L2 penalty; features of different scale."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    features *= torch.logspace(-1.0, 1.0, n, dtype=torch.float64)
    true = torch.randn(n, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, generator=generator, dtype=torch.float64)
    labels = torch.sign(features @ true + noise)

    def f(x: Tensor) -> Tensor:
        margins = labels.to(x.dtype) * (features.to(x.dtype) @ x)
        return torch.nn.functional.softplus(-margins).mean() + 0.5 * decay * x.square().sum()

    start = torch.zeros(n, dtype=torch.float64)
    solution = _newton(f, start)
    return Problem("logistic", f, start, f(solution).item(), solution)


def log_barrier() -> Problem:
    """10 sum a (x - log x) of pytorch#5953: NaN for negative x, least at 1."""

    def f(x: Tensor) -> Tensor:
        a = torch.tensor([1.0, 5.0, 25.0, 125.0], dtype=x.dtype)
        return 10.0 * (a * (x - x.log())).sum()

    one = torch.ones(4, dtype=torch.float64)
    return Problem("log-barrier", f, 3.0 * one, f(one).item(), one)


def nan_wall() -> Problem:
    """Finite at the start only, with a gradient that points away from it."""

    def f(x: Tensor) -> Tensor:
        return x.square().sum() if bool((x == 2.0).all()) else x.sum() * math.nan

    start = torch.full((4,), 2.0, dtype=torch.float64)
    return Problem("nan-wall", f, start, 16.0, start)


def _newton(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    for _ in range(50):
        gradient = torch.autograd.functional.jacobian(f, x)
        hessian = torch.autograd.functional.hessian(f, x)
        x = x - torch.linalg.solve(hessian, gradient)
    return x


def problem_set() -> list[Problem]:
    """The problems on which L-BFGS is held to its peers."""
    return [
        *(rosenbrock(n) for n in (2, 10, 100)),
        *(quadratic(10.0**e) for e in (2, 3, 4, 5, 6)),
        logistic(),
    ]
