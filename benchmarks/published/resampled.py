"""Burgers and Helmholtz with residual-adaptive resampling, in float64.

Settings after the codes that hold the published figures (Kiyani et al., arXiv 2501.16371, and
Jnini et al., arXiv 2604.05230, as the figures are reported: second-hand). Burgers: 8,000 points
inside and 500 each at t = 0 and on the sides, those two mean squares five times. Helmholtz: on
inputs cos and sin of pi x and pi y, so that u is periodic and needs no boundary.
Ours: the seeds, and that points are due by evaluations of the loss, not by iterations, which is
the same for every method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.published.networks import Jet
from benchmarks.published.pinns import Equation, Pinn, Resampling, Term

DTYPE = torch.float64
VISCOSITY = 0.01 / math.pi
BURGERS_INSIDE, BURGERS_EDGE, EDGE_WEIGHT = 8000, 500, 5.0
CANDIDATES = 50_000
BURGERS_TEST = (256, 100)
# Standard deviations of the Gaussian. At t = 1, x = 0 the kernel's two humps lie at 12.5 of them.
REACH = 25.0
HELMHOLTZ_TEST = (101, 101)


def _uniform(count: int, low: Sequence[float], high: Sequence[float], seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    corner, end = torch.tensor(low, dtype=DTYPE), torch.tensor(high, dtype=DTYPE)
    return corner + (end - corner) * torch.rand(count, len(low), generator=random, dtype=DTYPE)


def burgers_solution(points: Tensor, nodes: int = 1001) -> Tensor:
    """Cole and Hopf's solution from -sin(pi x) at t = 0: two integrals against a Gaussian.

    By the trapezoidal rule, which on analytic functions converges faster than any power of
    ``nodes``.
    """
    eta = torch.linspace(-REACH, REACH, nodes, dtype=points.dtype)
    return torch.cat([_cole_hopf(some, eta) for some in points.split(1000)])


def _cole_hopf(points: Tensor, eta: Tensor) -> Tensor:
    x, t = points.unbind(1)
    from_x = x[:, None] - torch.sqrt(2 * VISCOSITY * t)[:, None] * eta
    exponent = -torch.cos(math.pi * from_x) / (2 * math.pi * VISCOSITY) - eta.square() / 2
    kernel = torch.softmax(exponent, 1)
    return -(torch.sin(math.pi * from_x) * kernel).sum(1)


def burgers_residual(jet: Jet, points: Tensor) -> Tensor:
    """u_t + u u_x - nu u_xx."""
    u_x, u_t = jet.first[0]
    return u_t + jet.value[0] * u_x - VISCOSITY * jet.second[0, 0]


def burgers(seed: int, every: int) -> Equation:
    """On x in [-1, 1], t in [0, 1]; u = 0 on the sides."""
    low, high = (-1.0, 0.0), (1.0, 1.0)
    start = _uniform(BURGERS_EDGE, low, high, seed + 1000)
    start[:, 1] = 0
    sides = _uniform(BURGERS_EDGE, low, high, seed + 2000)
    sides[:, 0] = torch.where(torch.arange(BURGERS_EDGE) % 2 == 0, 1.0, -1.0)
    x, t = (
        torch.linspace(a, b, n, dtype=DTYPE)
        for a, b, n in zip(low, high, BURGERS_TEST, strict=True)
    )
    return Equation(
        terms=(
            Term(_uniform(BURGERS_INSIDE, low, high, seed), burgers_residual, (0, 1), 1),
            Term(
                start,
                lambda jet, at: jet.value[0] + torch.sin(math.pi * at[:, 0]),
                weight=EDGE_WEIGHT,
            ),
            Term(sides, lambda jet, at: jet.value[0], weight=EDGE_WEIGHT),
        ),
        exact=burgers_solution,
        test=torch.cartesian_prod(x, t),
        relative=True,
        resampling=Resampling(every, CANDIDATES, low, high, k=1.0, c=1.0),
    )


def helmholtz_solution(points: Tensor) -> Tensor:
    """sin(pi x) sin(4 pi y)."""
    x, y = points.unbind(1)
    return torch.sin(math.pi * x) * torch.sin(4 * math.pi * y)


def helmholtz_residual(jet: Jet, points: Tensor) -> Tensor:
    """u_xx + u_yy + u - q, with q from the exact u: (1 - 17 pi^2) u."""
    source = (1 - 17 * math.pi**2) * helmholtz_solution(points)
    return jet.second[0].sum(0) + jet.value[0] - source


def circles(points: Tensor, directions: Sequence[int], seconds: int) -> Jet:
    """cos and sin of pi x and pi y, (x, y) in that order, with their derivatives."""
    n, coordinates = points.shape
    angle = math.pi * points.t()
    cos, sin = torch.cos(angle), torch.sin(angle)
    blocks = torch.zeros(2 * coordinates, 1 + len(directions) + seconds, n, dtype=points.dtype)
    blocks[:coordinates, 0], blocks[coordinates:, 0] = cos, sin
    for i, d in enumerate(directions):
        blocks[d, 1 + i], blocks[coordinates + d, 1 + i] = -math.pi * sin[d], math.pi * cos[d]
    for i, d in enumerate(directions[:seconds], 1 + len(directions)):
        blocks[d, i], blocks[coordinates + d, i] = (
            -(math.pi**2) * cos[d],
            -(math.pi**2) * sin[d],
        )
    return Jet(blocks, len(directions))


def helmholtz(seed: int, every: int, points: int) -> Equation:
    """On the square [-1, 1]^2, periodic."""
    low, high = (-1.0, -1.0), (1.0, 1.0)
    x, y = (torch.linspace(-1, 1, n, dtype=DTYPE) for n in HELMHOLTZ_TEST)
    return Equation(
        terms=(Term(_uniform(points, low, high, seed), helmholtz_residual, (0, 1), 2),),
        exact=helmholtz_solution,
        test=torch.cartesian_prod(x, y),
        relative=True,
        features=circles,
        resampling=Resampling(every, CANDIDATES, low, high, k=1.0, c=0.0),
    )


def build_burgers(seed: int, hidden: list[int], every: int) -> Pinn:
    """A network of these hidden layers."""
    return Pinn(burgers(seed, every), (2, *hidden, 1), glorot=True, seed=seed)


def build_helmholtz(seed: int, hidden: list[int], every: int, points: int) -> Pinn:
    """A network of these hidden layers."""
    return Pinn(helmholtz(seed, every, points), (4, *hidden, 1), glorot=True, seed=seed)
