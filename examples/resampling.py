"""A physics-informed network whose points and loss weights change on the way.

Burgers' equation u_t + u u_x = (0.03 / pi) u_xx has a front at x = 0, where few of a few hundred
points lie. FusePV trains the same network four times: with points that stay; with points that are
drawn anew every so many steps, uniformly; with more of them where the residual is large (Wu, Zhu,
Tan, Kartha and Lu, 2023); and with a weight of the boundary's loss, too, that follows the
gradients' norms (after Wang, Teng and Perdikaris, 2021). Each change makes another function of the
loss, of which the optimizer is told. Everyone gets the same number of gradient evaluations.

To copy: ``Resample``, ``Balance``, and the loop in ``train``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import arguments, save, table
from torch import Tensor, nn
from tqdm import tqdm

from fuse_ext import FusePV

VISCOSITY = 0.03 / math.pi
POINTS, EDGE = 300, 60
STYLES = {
    "fixed points": {"color": "#000000", "linestyle": (0, (5, 1.5))},
    "uniform, drawn anew": {"color": "#0072B2", "linestyle": "-"},
    "adaptive, drawn anew": {"color": "#D55E00", "linestyle": "-"},
    "adaptive, weights too": {"color": "#009E73", "linestyle": "-."},
}

Residual = Callable[[Tensor], Tensor]
Draw = Callable[[int], Tensor]

# --- to copy --------------------------------------------------------------------------------


class Resample:
    """Points that are drawn anew every so many steps, more of them where the residual is large.

    Args:
        draw: Makes so many points uniformly.
        count: Points held.
        every: Steps between two draws; 0 keeps the first points.
        residual: Of points, one number each. None draws uniformly. Otherwise points are chosen
            among ``candidates`` uniform ones, each with probability proportional to
            |residual|^power / (its mean) + floor.
        power, floor: k and c of residual-based adaptive sampling. A larger power goes nearer to the
            largest residuals, a larger floor nearer to uniform.
        candidates: How many to choose from.

    Attributes:
        points: The present ones.
        version: How often they have changed.
    """

    def __init__(
        self,
        draw: Draw,
        count: int,
        every: int,
        residual: Residual | None = None,
        *,
        power: float = 1.0,
        floor: float = 1.0,
        candidates: int = 4000,
    ) -> None:
        self.draw, self.count, self.every, self.residual = draw, count, every, residual
        self.power, self.floor, self.candidates = power, floor, candidates
        self.points, self.version = draw(count), 0

    def renew(self, step: int) -> None:
        """Draws, if it is time."""
        if not self.every or step == 0 or step % self.every:
            return
        self.version += 1
        if self.residual is None:
            self.points = self.draw(self.count)
            return
        candidates = self.draw(self.candidates)
        size = self.residual(candidates).detach().abs() ** self.power
        chance = size / size.mean() + self.floor
        self.points = candidates[torch.multinomial(chance, self.count)]


class Balance:
    """A loss's weight, set anew so that its gradient is as long as another loss's.

    Args:
        losses: Returns the two losses, of which the second is weighted.
        params: Of the network.
        every: Steps between two settings; 0 keeps the weight at 1.
        memory: Share of the old weight in the new one.
        most: The largest weight. Where both gradients are small their ratio says little.

    Attributes:
        weight: The present one.
        version: How often it has changed.
    """

    def __init__(
        self,
        losses: Callable[[], tuple[Tensor, Tensor]],
        params: list[Tensor],
        every: int,
        memory: float = 0.5,
        most: float = 10.0,
    ) -> None:
        self.losses, self.params, self.every = losses, params, every
        self.memory, self.most = memory, most
        self.weight, self.version = 1.0, 0

    def renew(self, step: int) -> None:
        """Sets the weight, if it is time."""
        if not self.every or step == 0 or step % self.every:
            return
        self.version += 1
        first, second = map(self._norm, self.losses())
        balanced = min(first / max(second, 1e-300), self.most)
        self.weight = self.memory * self.weight + (1 - self.memory) * balanced

    def _norm(self, loss: Tensor) -> float:
        grads = torch.autograd.grad(loss, self.params, allow_unused=True)
        return math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))


# --- the problem ----------------------------------------------------------------------------


def draw_inside(count: int) -> Tensor:
    """So many points (x, t) of [-1, 1] x [0, 1]."""
    x, t = torch.rand(2, count, dtype=torch.float64)
    return torch.stack([2 * x - 1, t], 1)


def edge() -> tuple[Tensor, Tensor]:
    """Points where the solution is given, and its values: -sin(pi x) at t = 0, 0 at the sides."""
    x = torch.linspace(-1, 1, EDGE, dtype=torch.float64)
    t = torch.linspace(0, 1, EDGE, dtype=torch.float64)
    side = torch.where(torch.arange(EDGE) % 2 == 0, 1.0, -1.0)
    points = torch.cat([torch.stack([x, 0 * x], 1), torch.stack([side, t], 1)])
    return points, torch.cat([-torch.sin(math.pi * x), 0 * t])


def residual_of(model: nn.Module, points: Tensor) -> Tensor:
    """u_t + u u_x - nu u_xx at each point."""
    at = points.detach().requires_grad_()
    u = model(at)
    u_x, u_t = torch.autograd.grad(u.sum(), at, create_graph=True)[0].unbind(1)
    u_xx = torch.autograd.grad(u_x.sum(), at, create_graph=True)[0][:, 0]
    return u_t + u[:, 0] * u_x - VISCOSITY * u_xx


def solution(points: int = 129, times: int = 41) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cole and Hopf's u on a grid, by Gauss and Hermite's quadrature: x, t and u [x, t]."""
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    x, t = np.linspace(-0.999, 0.999, points), np.linspace(0.01, 1.0, times)
    width = np.sqrt(4 * VISCOSITY * t)[None, :, None]
    begin = x[:, None, None] - width * nodes
    exponent = -np.cos(np.pi * begin) / (2 * np.pi * VISCOSITY)
    kernel = weights * np.exp(exponent - exponent.max(-1, keepdims=True))
    return x, t, -(np.sin(np.pi * begin) * kernel).sum(-1) / kernel.sum(-1)


# --- the comparison -------------------------------------------------------------------------


@dataclass
class Run:
    """What one run did.

    Attributes:
        evaluations: At which the errors were taken.
        errors: Relative l2 error of the solution on the grid.
        loss: The last one, on the run's own points and with its own weight.
        points: The last ones.
        weight: The last one.
        seconds: Of processor time, drawing and balancing included, the errors not.
        found: The network's solution on the grid.
    """

    evaluations: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    loss: float = math.nan
    points: Tensor | None = None
    weight: float = 1.0
    seconds: float = 0.0
    found: np.ndarray | None = None


def train(name: str, seed: int, budget: int, every: int) -> Run:
    """One run from the seed's start and points, of so many evaluations."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((2, 20), (20, 20), (20, 20), (20, 1)):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    params = list(model.parameters())
    optimizer = FusePV(params, lr=3e-3, deterministic=True)
    points = Resample(
        draw_inside,
        POINTS,
        0 if "fixed" in name else every,
        (lambda at: residual_of(model, at)) if "adaptive" in name else None,
    )
    boundary, given = edge()

    def losses() -> tuple[Tensor, Tensor]:
        equation = residual_of(model, points.points).square().mean()
        return equation, (model(boundary)[:, 0] - given).square().mean()

    balance = Balance(losses, params, every if "weights" in name else 0)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        equation, at_boundary = losses()
        loss = equation + balance.weight * at_boundary
        loss.backward()
        return loss

    x, t, exact = solution()
    grid = torch.tensor(np.stack(np.meshgrid(x, t, indexing="ij"), -1).reshape(-1, 2))
    run, step = Run(), 0
    while calls < budget:
        start = time.process_time()
        points.renew(step)
        balance.renew(step)
        # Another batch_id says that this is another function, as optimizer.new_objective() does.
        run.loss = optimizer.step(closure, batch_id=points.version + balance.version).item()
        run.seconds += time.process_time() - start
        if step % 20 == 0 or calls >= budget:
            with torch.no_grad():
                run.found = model(grid).reshape(exact.shape).numpy()
            run.evaluations.append(calls)
            run.errors.append(float(np.linalg.norm(run.found - exact) / np.linalg.norm(exact)))
        step += 1
    run.points, run.weight = points.points, balance.weight
    return run


def summary(runs: dict[str, list[Run]]) -> str:
    rows = []
    for name, of in runs.items():
        errors = [run.errors[-1] for run in of]
        rows.append(
            [
                name,
                f"{np.median(errors):.1e}",
                f"{min(errors):.1e} to {max(errors):.1e}",
                f"{np.median([run.loss for run in of]):.1e}",
                f"{np.median([run.weight for run in of]):.3g}",
                f"{np.mean([run.seconds for run in of]):.1f}",
            ]
        )
    return table(["points", "error", "range", "own loss", "weight", "CPU s"], rows)


def draw(runs: dict[str, list[Run]], budget: int) -> plt.Figure:
    """Errors over evaluations, the points where the residual was large, and u at the end."""
    figure, (errors, where, end) = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained")
    x, t, exact = solution()
    at = np.linspace(0, budget, 200)
    for name, of in runs.items():
        curves = np.array([np.interp(at, run.evaluations, run.errors) for run in of])
        errors.fill_between(
            at, curves.min(0), curves.max(0), color=STYLES[name]["color"], alpha=0.15, lw=0
        )
        errors.plot(at, np.median(curves, 0), label=name, **STYLES[name])
        end.plot(x, of[0].found[:, -1], **STYLES[name])
    end.plot(x, exact[:, -1], color="0.6", linewidth=5, alpha=0.6, zorder=1, label="exact")
    where.pcolormesh(t, x, exact, cmap="RdBu_r", alpha=0.6, rasterized=True)
    where.plot(*runs["fixed points"][0].points.T.flip(0), "k.", markersize=2.5)
    where.plot(*runs["adaptive, drawn anew"][0].points.T.flip(0), ".", color="#D55E00", ms=4)
    errors.set(yscale="log", xlabel="evaluations", title="relative error", xlim=(0, budget))
    where.set(xlabel="t", ylabel="x", title="the exact u; fixed and adaptive points")
    end.set(xlabel="x", title="u at t = 1, first start", xlim=(-0.4, 0.4))
    for ax in (errors, end):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = errors.get_legend_handles_labels()
    more = end.get_legend_handles_labels()
    figure.legend(
        handles + more[0], labels + more[1], loc="outside lower center", ncols=5, frameon=False
    )
    return figure


def main() -> None:
    args = arguments(__doc__.partition("\n")[0])
    seeds, budget, every = (1, 150, 30) if args.quick else (3, 1200, 100)
    runs: dict[str, list[Run]] = {name: [] for name in STYLES}
    with tqdm(total=seeds * len(STYLES), unit="run") as bar:
        for seed in range(seeds):
            for name in STYLES:
                bar.set_description(f"{name}, start {seed}")
                runs[name].append(train(name, seed, budget, every))
                bar.update()
    print(
        f"\nBurgers: {POINTS} points, {budget} evaluations, changes every {every} steps; medians "
        f"of the starts, of which there are {seeds}.\n"
    )
    print(summary(runs))
    save(draw(runs, budget), args.out / "resampling.png")


if __name__ == "__main__":
    main()
