"""Poisson's equation in two dimensions, its boundary values in the loss.

-(u_xx + u_yy) = 2 pi^2 sin(pi x) sin(pi y) on the unit square, u = 0 on its edge.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from shared import arguments, draw, error_of, laplacian, network, on_grid, square, tell, train
from torch import Tensor

from fuse_ext import FusePV


def main() -> None:
    args = arguments(__doc__.partition("\n")[0])
    width, points, evaluations = (8, 6, 200) if args.quick else (24, 16, 2000)
    model = network(2, width, width, 1)
    inside, edge = square(points)
    force = 2 * math.pi**2 * torch.sin(math.pi * inside).prod(1)
    optimizer = FusePV(model.parameters(), lr=3e-3, deterministic=True)

    def loss() -> Tensor:
        equation = (laplacian(model, inside) + force).square().mean()
        return equation + 100 * model(edge).square().mean()

    log = train(optimizer, loss, evaluations)
    x = np.linspace(0, 1, 61)
    exact = np.outer(np.sin(np.pi * x), np.sin(np.pi * x))
    found = on_grid(model, x, x)
    tell("Poisson", log, error_of(found, exact), optimizer)
    draw(args.out / "pinn_poisson.png", {"x": x, "y": x}, found, exact, log, inside)


if __name__ == "__main__":
    main()
