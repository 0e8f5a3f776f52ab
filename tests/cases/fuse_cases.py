"""A function for Fuse to minimise, on parameters of many shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = [(4,), (2, 3), (), (0,), (3,)]


def loss_of(params: Sequence[Tensor], curvature: float = 1.0) -> Tensor:
    """Smooth, convex, coupling all parameters; in the dtype of the first."""
    x = torch.cat([p.reshape(-1).to(params[0].dtype) for p in params])
    weight = torch.arange(1, x.numel() + 1, dtype=x.dtype)
    return (curvature * weight * x.square()).sum() / 8 + (x.sum() - 1).square() / 4 + x.cosh().sum()


def closure_of(
    optimizer: torch.optim.Optimizer,
    params: Sequence[Tensor],
    calls: list[float] | None = None,
    curvature: float = 1.0,
) -> Callable[[], Tensor]:
    """The closure; the losses it returns go into ``calls``."""

    def closure():
        optimizer.zero_grad()
        loss = loss_of(params, curvature)
        loss.backward()
        if calls is not None:
            calls.append(loss.item())
        return loss

    return closure
