"""An inverse problem: the heat equation's coefficient from a few values of its solution.

u_t = a u_xx on [0, 1] x [0, 1] with u = 0 at the ends; 40 values of u are known, a = 0.3 is not.
log a is trained beside the network, in a group of its own, with a larger rate for Adam.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from shared import arguments, draw, error_of, gradients, network, on_grid, tell, train
from torch import Tensor

from fuse_ext import FusePV

TRUE = 0.3


def truth(at: Tensor) -> Tensor:
    """u of (x, t): two modes, so that its shape changes."""
    x, t = at.unbind(-1)
    first = torch.exp(-TRUE * math.pi**2 * t) * torch.sin(math.pi * x)
    return first + 0.5 * torch.exp(-4 * TRUE * math.pi**2 * t) * torch.sin(2 * math.pi * x)


def main() -> None:
    args = arguments(__doc__.partition("\n")[0])
    width, count, evaluations = (8, 60, 200) if args.quick else (20, 300, 2000)
    model = network(2, width, width, 1)
    log_a = torch.zeros((), dtype=torch.float64, requires_grad=True)  # a = 1 to begin with
    points, known = torch.rand(count, 2, dtype=torch.float64), torch.rand(40, 2).double()
    values = truth(known)
    t = torch.linspace(0, 1, 40, dtype=torch.float64)
    ends = torch.cat([torch.stack([0 * t, t], 1), torch.stack([0 * t + 1, t], 1)])
    groups = [{"params": model.parameters()}, {"params": [log_a], "lr": 2e-2}]
    optimizer = FusePV(groups, lr=3e-3, deterministic=True)

    def loss() -> Tensor:
        at = points.detach().requires_grad_()
        u_x, u_t = gradients(model(at), at)
        u_xx = gradients(u_x, at)[0]
        equation = (u_t - log_a.exp() * u_xx).square().mean()
        data = (model(known)[:, 0] - values).square().mean()
        return equation + 10 * (data + model(ends).square().mean())

    log = train(optimizer, loss, evaluations)
    x = np.linspace(0, 1, 61)
    exact = truth(torch.tensor(np.stack(np.meshgrid(x, x, indexing="ij"), -1))).numpy()
    found = on_grid(model, x, x)
    tell("Heat, inverse", log, error_of(found, exact), optimizer)
    a = log_a.exp().item()
    print(f"a = {a:.8f}, where {TRUE} is true: error {abs(a - TRUE) / TRUE:.1e}")
    draw(args.out / "pinn_inverse.png", {"x": x, "t": x}, found, exact, log, known)


if __name__ == "__main__":
    main()
