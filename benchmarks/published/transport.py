"""Convection, reaction and wave, by which Adam with L-BFGS was judged (arXiv 2402.01868).

Settings of the rows there (Rathore, Lei, Frangella, Lu and Udell): tanh layers with Glorot's normal
initialisation, float32, 10,000 points drawn once from the inside of a grid of 257 x 101 (of t = 0
and the sides it has none), all 257 points at t = 0 and all 101 on either side, mean squares without
weights, and the relative l2 error on a grid of 129 x 101.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.published.networks import Jet
from benchmarks.published.pinns import Equation, Pinn, Residual, Term

GRID, TEST_GRID, INSIDE = (257, 101), (129, 101), 10_000
BETA, RHO, WAVE_BETA, SPEED = 40.0, 5.0, 5.0, 2.0
DTYPE = torch.float32


def _grid(length: float, shape: tuple[int, int]) -> Tensor:
    """All points (x, t), (nx, nt, 2)."""
    x, t = (torch.linspace(0, end, n) for end, n in zip((length, 1.0), shape, strict=True))
    return torch.stack(torch.meshgrid(x, t, indexing="ij"), 2)


def _equation(
    length: float,
    exact: Callable[[Tensor], Tensor],
    residual: Residual,
    seconds: int,
    at_start: tuple[Term, ...],
    at_sides: Callable[[Tensor, Tensor], tuple[Term, ...]],
    seed: int,
) -> Equation:
    grid = _grid(length, GRID)
    inside = grid[1:-1, 1:].reshape(-1, 2)
    random = torch.Generator().manual_seed(seed)
    drawn = inside[torch.randperm(len(inside), generator=random)[:INSIDE]]
    return Equation(
        terms=(
            Term(drawn, residual, (0, 1), seconds),
            *at_start,
            *at_sides(grid[0], grid[-1]),
        ),
        exact=exact,
        test=_grid(length, TEST_GRID).reshape(-1, 2),
        relative=True,
    )


def _start(length: float, exact: Callable[[Tensor], Tensor]) -> Term:
    """The initial values."""
    points = _grid(length, GRID)[:, 0]
    return Term(points, lambda jet, at: jet.value[0] - exact(at))


def _periodic(low: Tensor, high: Tensor) -> tuple[Term, ...]:
    """The same u on both sides."""

    def residual(jet: Jet, points: Tensor) -> Tensor:
        first, last = jet.value[0].tensor_split(2)
        return last - first

    return (Term(torch.cat([low, high]), residual),)


def _zero(low: Tensor, high: Tensor) -> tuple[Term, ...]:
    """u = 0 on each side."""
    return tuple(Term(points, lambda jet, at: jet.value[0]) for points in (low, high))


def convection_solution(points: Tensor) -> Tensor:
    """sin(x - beta t)."""
    x, t = points.unbind(1)
    return torch.sin(x - BETA * t)


def convection_residual(jet: Jet, points: Tensor) -> Tensor:
    """u_t + beta u_x."""
    return jet.first[0, 1] + BETA * jet.first[0, 0]


def convection(seed: int) -> Equation:
    """x in [0, 2 pi], periodic."""
    length = 2 * math.pi
    start = (_start(length, convection_solution),)
    return _equation(length, convection_solution, convection_residual, 0, start, _periodic, seed)


def reaction_solution(points: Tensor) -> Tensor:
    """The logistic curve from a Gaussian at t = 0."""
    x, t = points.unbind(1)
    start = torch.exp(-0.5 * ((x - math.pi) / (math.pi / 4)) ** 2)
    grown = start * torch.exp(RHO * t)
    return grown / (grown + 1 - start)


def reaction_residual(jet: Jet, points: Tensor) -> Tensor:
    """u_t - rho u (1 - u)."""
    u = jet.value[0]
    return jet.first[0, 1] - RHO * u * (1 - u)


def reaction(seed: int) -> Equation:
    """x in [0, 2 pi], periodic."""
    length = 2 * math.pi
    start = (_start(length, reaction_solution),)
    return _equation(length, reaction_solution, reaction_residual, 0, start, _periodic, seed)


def wave_solution(points: Tensor) -> Tensor:
    """Two standing waves."""
    x, t = points.unbind(1)
    low = torch.sin(math.pi * x) * torch.cos(SPEED * math.pi * t)
    high = torch.sin(WAVE_BETA * math.pi * x) * torch.cos(SPEED * WAVE_BETA * math.pi * t)
    return low + high / 2


def wave_residual(jet: Jet, points: Tensor) -> Tensor:
    """u_tt - 4 u_xx."""
    return jet.second[0, 1] - SPEED**2 * jet.second[0, 0]


def wave(seed: int) -> Equation:
    """x in [0, 1], u = 0 on the sides, at rest at t = 0."""
    values = _start(1.0, wave_solution)
    at_rest = Term(values.points, lambda jet, at: jet.first[0, 0], (1,))
    return _equation(1.0, wave_solution, wave_residual, 2, (values, at_rest), _zero, seed)


EQUATIONS = {"convection": convection, "reaction": reaction, "wave": wave}


def build(seed: int, equation: str, hidden: list[int]) -> Pinn:
    """A network of these hidden layers on one of ``EQUATIONS``; the seed is of the points too."""
    return Pinn(EQUATIONS[equation](seed), (2, *hidden, 1), glorot=True, seed=seed)
