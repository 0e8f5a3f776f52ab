"""What the examples of physics-informed networks share: a network, the loop, the picture."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # common.py and resampling.py

import matplotlib.pyplot as plt
import numpy as np
import resampling
import torch
from common import arguments, save
from torch import Tensor, nn

import fuse_ext

# What the scripts take from here, besides what follows.
__all__ = ["arguments", "resampling"]


def network(*widths: int) -> nn.Sequential:
    """Layers of these widths with tanh between them, in float64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def gradients(u: Tensor, at: Tensor) -> list[Tensor]:
    """The derivatives of u by each coordinate, where ``at`` asks for gradients."""
    return list(torch.autograd.grad(u.sum(), at, create_graph=True)[0].unbind(1))


def laplacian(model: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """u_xx + u_yy at the points."""
    at = points.detach().requires_grad_()
    first = gradients(model(at), at)
    return sum(gradients(d, at)[i] for i, d in enumerate(first))


def square(points: int) -> tuple[Tensor, Tensor]:
    """A grid inside of the unit square, and points on its edge."""
    inside = torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1]
    along = torch.linspace(0, 1, 2 * points, dtype=torch.float64)
    zero, one = torch.zeros_like(along), torch.ones_like(along)
    sides = [(along, zero), (along, one), (zero, along), (one, along)]
    edge = torch.cat([torch.stack(side, 1) for side in sides])
    return torch.cartesian_prod(inside, inside), edge


def train(
    optimizer: fuse_ext.FusePV,
    loss_of: Callable[[], Tensor],
    evaluations: int,
    before: Callable[[int], None] = lambda step: None,
) -> fuse_ext.Log:
    """Steps until the report says that nothing is left to gain, or the evaluations are spent.

    Args:
        optimizer: Of all that is trained.
        loss_of: The loss, at the points as they are.
        evaluations: Calls of the closure at most, but for those of the last step.
        before: Called with the number of each step before it, to change points or weights.
    """
    log = fuse_ext.Log(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    while not len(log) or log[-1].evaluations < evaluations:
        before(len(log))
        optimizer.step(closure)
        if optimizer.report().converged:
            break
    return log


def on_grid(model: Callable[[Tensor], Tensor], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """u [x, y]."""
    grid = torch.tensor(np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2))
    with torch.no_grad():
        return model(grid).reshape(len(x), len(y)).numpy()


def error_of(found: np.ndarray, exact: np.ndarray) -> float:
    """The relative l2 error."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def tell(name: str, log: fuse_ext.Log, error: float, optimizer: fuse_ext.FusePV) -> None:
    """Prints the error, and what the optimizer says first."""
    report = optimizer.report()
    print(
        f"{name}: relative error {error:.1e}, loss {log.losses[-1]:.1e} after "
        f"{report.evaluations} evaluations; switch after {report.switch_step} steps, "
        f"{report.second_phase}"
    )


def draw(
    path: Path,
    axes: dict[str, np.ndarray],
    found: np.ndarray,
    exact: np.ndarray,
    log: fuse_ext.Log,
    points: Tensor | None = None,
) -> None:
    """The solution, its error, and the loss with the switch marked."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    (across, a), (up, b) = axes.items()
    most = float(np.abs(found).max())
    for ax, values, title, colours in (
        (left, found, "solution", {"cmap": "RdBu_r", "vmin": -most, "vmax": most}),
        (middle, np.abs(found - exact), "|error|", {"cmap": "magma"}),
    ):
        drawn = ax.pcolormesh(a, b, values.T, **colours, rasterized=True, shading="gouraud")
        ax.set(xlabel=across, ylabel=up, title=title, xlim=(a[0], a[-1]), ylim=(b[0], b[-1]))
        figure.colorbar(drawn, ax=ax)
    if points is not None:
        middle.plot(
            *points.T, ".", color="white", markersize=1.5, alpha=0.7, scalex=False, scaley=False
        )
    log.plot(right)
    right.set(title="loss")
    right.grid(alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)
    save(figure, path)
