"""Physics-informed networks (Raissi et al. 2019) on the full batch: Burgers and Poisson."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]


class Mlp(nn.Sequential):
    """Layers of these widths with tanh between them; Glorot's initialisation, as usual here."""

    def __init__(self, *widths: int) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layer = nn.Linear(fan_in, fan_out)
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.Tanh()]
        super().__init__(*layers[:-1])


@dataclass(frozen=True)
class Problem:
    """A boundary value problem as a loss.

    Attributes:
        name: For tables.
        loss: Of a network: mean squared residual plus mean squared boundary error.
        error: Of a network: relative l2 error of the solution on a grid.
        levels: Losses whose first crossing is worth a line in a table.
    """

    name: str
    loss: Loss
    error: Callable[[nn.Module], float]
    levels: tuple[float, ...]


def _derivative(values: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), at, create_graph=True)[0]


def _relative_error(model: nn.Module, points: Tensor, exact: Tensor) -> float:
    with torch.no_grad():
        found = model(points).squeeze(1)
    return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


def burgers(points: int, seed: int = 0) -> Problem:
    r"""u_t + u u_x = (0.01 / pi) u_xx on x in [-1, 1], t in [0, 1]; u = -sin(pi x) at t = 0.

    Args:
        points: Collocation points inside; a quarter as many on the boundary.
        seed: Of the points; the same for all optimizers and networks.
    """
    viscosity = 0.01 / math.pi
    random = torch.Generator().manual_seed(seed)
    inside = torch.rand(points, 2, generator=random)
    inside[:, 0] = 2 * inside[:, 0] - 1
    edge = points // 8
    start = torch.stack([torch.linspace(-1, 1, edge), torch.zeros(edge)], 1)
    sides = torch.stack(
        [torch.ones(edge).where(torch.arange(edge) % 2 == 0, -1.0), torch.linspace(0, 1, edge)], 1
    )
    boundary = torch.cat([start, sides])
    wanted = torch.cat([-torch.sin(math.pi * start[:, :1]), torch.zeros(edge, 1)])

    def loss(model: nn.Module) -> Tensor:
        at = inside.detach().requires_grad_()
        u = model(at)
        gradient = _derivative(u, at)
        u_x, u_t = gradient[:, :1], gradient[:, 1:]
        u_xx = _derivative(u_x, at)[:, :1]
        residual = u_t + u * u_x - viscosity * u_xx
        return residual.square().mean() + (model(boundary) - wanted).square().mean()

    grid, exact = _burgers_solution(viscosity)
    return Problem(
        "Burgers, 1-D",
        loss,
        lambda model: _relative_error(model, grid, exact),
        (1e-2, 3e-3, 1e-3, 3e-4),
    )


def _burgers_solution(viscosity: float) -> tuple[Tensor, Tensor]:
    """Cole and Hopf's solution on a grid: two integrals against a Gaussian, by quadrature."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    x, t = np.meshgrid(np.linspace(-0.99, 0.99, 100), np.linspace(0.05, 1.0, 20), indexing="ij")
    from_x = x[..., None] - np.sqrt(4 * viscosity * t)[..., None] * nodes
    exponent = -np.cos(np.pi * from_x) / (2 * np.pi * viscosity)
    kernel = weights * np.exp(exponent - exponent.max(-1, keepdims=True))
    u = -(np.sin(np.pi * from_x) * kernel).sum(-1) / kernel.sum(-1)
    grid = torch.tensor(np.stack([x.ravel(), t.ravel()], 1), dtype=torch.float32)
    return grid, torch.tensor(u.ravel(), dtype=torch.float32)


def poisson(points: int, seed: int = 0) -> Problem:
    r"""-(u_xx + u_yy) = 2 pi^2 sin(pi x) sin(pi y) on the unit square, u = 0 on its boundary.

    Args:
        points: Collocation points inside; a quarter as many on the boundary.
        seed: Of the points; the same for all optimizers and networks.
    """
    random = torch.Generator().manual_seed(seed)
    inside = torch.rand(points, 2, generator=random)
    along = torch.rand(points // 4, generator=random)
    which = torch.arange(points // 4) % 4
    far = (which % 2).float()
    boundary = torch.where(
        (which < 2)[:, None], torch.stack([along, far], 1), torch.stack([far, along], 1)
    )

    def solution(at: Tensor) -> Tensor:
        return torch.sin(math.pi * at[:, 0]) * torch.sin(math.pi * at[:, 1])

    source = 2 * math.pi**2 * solution(inside)[:, None]

    def loss(model: nn.Module) -> Tensor:
        at = inside.detach().requires_grad_()
        gradient = _derivative(model(at), at)
        laplacian = _derivative(gradient[:, 0], at)[:, :1] + _derivative(gradient[:, 1], at)[:, 1:]
        return (laplacian + source).square().mean() + model(boundary).square().mean()

    side = torch.linspace(0, 1, 50)
    grid = torch.cartesian_prod(side, side)
    exact = solution(grid)
    return Problem(
        "Poisson, 2-D",
        loss,
        lambda model: _relative_error(model, grid, exact),
        (1.0, 1e-1, 1e-2, 1e-3),
    )
