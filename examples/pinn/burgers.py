"""Burgers' equation, whose points go where the residual is large.

u_t + u u_x = (0.03 / pi) u_xx on [-1, 1] x [0, 1] from u = -sin(pi x). Points are drawn anew every
so many steps; another batch_id would do, or, as here, new_objective() says so.
"""

from __future__ import annotations

import torch
from shared import arguments, draw, error_of, network, on_grid, resampling, tell, train
from torch import Tensor

from fuse_ext import FusePV


def main() -> None:
    args = arguments(__doc__.partition("\n")[0])
    width, count, every, evaluations = (8, 60, 40, 200) if args.quick else (20, 400, 100, 2500)
    model = network(2, width, width, width, 1)
    boundary, given = resampling.edge()
    points = resampling.Resample(
        resampling.draw_inside, count, every, lambda at: resampling.residual_of(model, at)
    )
    optimizer = FusePV(model.parameters(), lr=3e-3, deterministic=True)

    def loss() -> Tensor:
        equation = resampling.residual_of(model, points.points).square().mean()
        return equation + (model(boundary)[:, 0] - given).square().mean()

    def before(step: int) -> None:
        held = points.points
        points.renew(step)
        if points.points is not held:
            optimizer.new_objective()

    log = train(optimizer, loss, evaluations, before)
    x, t, exact = resampling.solution(257, 101)
    found = on_grid(model, x, t)
    tell("Burgers", log, error_of(found, exact), optimizer)
    shown = torch.stack([points.points[:, 0], points.points[:, 1]], 1)
    draw(args.out / "pinn_burgers.png", {"x": x, "t": t}, found, exact, log, shown)


if __name__ == "__main__":
    main()
