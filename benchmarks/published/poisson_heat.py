"""Poisson 2-D and heat 1-D, by which KFAC for PINNs was measured (arXiv 2405.15603).

Settings of the rows there (Dangel, Mueller and Zeinhofer): the exact values on the boundary, 900
points inside and 120 on it, drawn once, a loss of half the two mean squares, float64, torch's
initialisation, and the absolute root mean square error at 9,000 points. Ours: the seeds, and for
heat how the 120 points are shared out (half on the sides, half at t = 0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.published.networks import Jet
from benchmarks.published.pinns import Equation, Pinn, Term

INSIDE, BOUNDARY, TEST = 900, 120, 9000
POINTS_SEED, TEST_SEED = 0, 1
DTYPE = torch.float64


def _uniform(count: int, seed: int) -> Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def poisson_solution(points: Tensor) -> Tensor:
    """sin(pi x) sin(pi y)."""
    return torch.sin(math.pi * points).prod(1)


def poisson_residual(jet: Jet, points: Tensor) -> Tensor:
    """u_xx + u_yy + 2 pi^2 u for the exact u on the right."""
    return jet.second[0].sum(0) + 2 * math.pi**2 * poisson_solution(points)


def poisson_equation() -> Equation:
    """On the unit square, u = 0 on its boundary."""
    edge = _uniform(BOUNDARY, POINTS_SEED + 1000)
    side = torch.arange(BOUNDARY) % 4
    rows = torch.arange(BOUNDARY)
    edge[rows, side // 2] = (side % 2).to(DTYPE)
    return Equation(
        terms=(
            Term(_uniform(INSIDE, POINTS_SEED), poisson_residual, (0, 1), 2, weight=0.5),
            Term(edge, lambda jet, points: jet.value[0], weight=0.5),
        ),
        exact=poisson_solution,
        test=_uniform(TEST, TEST_SEED),
        relative=False,
    )


def heat_solution(points: Tensor) -> Tensor:
    """exp(-pi^2 t / 4) sin(pi x) at points (x, t)."""
    x, t = points.unbind(1)
    return torch.exp(-(math.pi**2) / 4 * t) * torch.sin(math.pi * x)


def heat_residual(jet: Jet, points: Tensor) -> Tensor:
    """u_t - u_xx / 4."""
    return jet.first[0, 1] - jet.second[0, 0] / 4


def heat_equation() -> Equation:
    """On x, t in [0, 1], with the exact values at x = 0, x = 1 and t = 0."""
    edge = _uniform(BOUNDARY, POINTS_SEED + 1000)
    half = BOUNDARY // 2
    edge[:half, 0] = (torch.arange(half) % 2).to(DTYPE)
    edge[half:, 1] = 0
    return Equation(
        terms=(
            Term(_uniform(INSIDE, POINTS_SEED), heat_residual, (0, 1), 1, weight=0.5),
            Term(edge, lambda jet, points: jet.value[0] - heat_solution(points), weight=0.5),
        ),
        exact=heat_solution,
        test=_uniform(TEST, TEST_SEED),
        relative=False,
    )


EQUATIONS = {"poisson": poisson_equation, "heat": heat_equation}


def build(seed: int, equation: str, hidden: list[int]) -> Pinn:
    """A network of these hidden layers on one of ``EQUATIONS``."""
    return Pinn(EQUATIONS[equation](), (2, *hidden, 1), glorot=False, seed=seed)
