"""Boundary values that the network has by construction, so that the loss is the equation alone.

u_xx + u_yy = 0 on the unit square; u = sin(pi x) above and 0 on the other sides. The network's
output is multiplied by x (1 - x) y (1 - y), which is 0 on the edge, and added to y sin(pi x), which
has the values there.
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
    width, points, evaluations = (8, 6, 200) if args.quick else (24, 16, 1500)
    inner = network(2, width, width, 1)

    def model(at: Tensor) -> Tensor:
        x, y = at.unbind(1)
        boundary = y * torch.sin(math.pi * x)
        return boundary + x * (1 - x) * y * (1 - y) * inner(at)[:, 0]

    inside, _ = square(points)
    optimizer = FusePV(inner.parameters(), lr=3e-3, deterministic=True)
    log = train(optimizer, lambda: laplacian(model, inside).square().mean(), evaluations)
    x = np.linspace(0, 1, 61)
    exact = np.outer(np.sin(np.pi * x), np.sinh(np.pi * x) / np.sinh(np.pi))
    found = on_grid(model, x, x)
    tell("Laplace, hard constraints", log, error_of(found, exact), optimizer)
    draw(args.out / "pinn_hard_constraints.png", {"x": x, "y": x}, found, exact, log, inside)


if __name__ == "__main__":
    main()
