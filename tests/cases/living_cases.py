"""Parameters of all kinds on batches, for the phase in a living metric, and its lengths."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_ext import FusePV
from fuse_ext.phase.living.lengths import FALL_FROM, RISE
from fuse_ext.phase.living.metric.kronecker import GATHER, MEASURE

SWITCH = 4
READY = GATHER + MEASURE - 1  # steps of this phase that Adam still takes
CAP = 7.0


class Batches:
    """Noisy least squares of correlated inputs: a matrix, a bias, a convolution's weight.

    Another batch at each call.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mix = torch.randn(5, 5, generator=generator, dtype=torch.float64).to(dtype)
        self.truth = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype)
        self.params = [
            torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(3, 2, 2, 2, generator=generator, dtype=torch.float64).to(dtype),
        ]
        for param in self.params:
            param.requires_grad_()
        self.calls = 0
        options = {"deterministic": False, "switch": SWITCH, **options}
        self.optimizer = FusePV(self.params, options.pop("lr", 0.01), **options)

    def closure(self) -> Tensor:
        """Of the batch that belongs to this call."""
        generator = torch.Generator().manual_seed(1000 + self.calls)
        self.calls += 1
        self.optimizer.zero_grad()
        weight, bias, kernel = self.params
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64).to(weight.dtype) @ self.mix
        image = torch.randn(8, 2, 3, 3, generator=generator, dtype=torch.float64).to(weight.dtype)
        loss = (x @ (weight - self.truth).T + bias).square().mean()
        loss = loss + torch.nn.functional.conv2d(image, kernel).sub(0.3).square().mean()
        loss.backward()
        return loss

    def step(self, count: int = 1) -> list[float]:
        """So many steps."""
        return [float(self.optimizer.step(self.closure).detach()) for _ in range(count)]

    def step_untold(self, count: int) -> None:
        """So many steps of which the optimizer sees gradients, and no loss."""
        for _ in range(count):
            self.closure()
            self.optimizer.step()

    @property
    def flat(self) -> Tensor:
        """All parameters."""
        return torch.cat([param.detach().flatten() for param in self.params])


def correlated(param: Tensor) -> Tensor:
    """A random gradient whose columns have much in common, so that bases are worth having."""
    if param.ndim < 2:
        return torch.randn_like(param)
    columns = param.shape[1]
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(0))
    return (torch.randn(param.shape) @ mix).to(param.dtype)


def factor_at(k: int, cap: float = CAP, lr: float = 0.01) -> float:
    """Of the k-th step after the switch where no loss is known, as the docstring has it."""
    peak = max(1.0, cap * 1e-3 / lr)
    return (1 + (peak - 1) * min(1, k / RISE)) * math.sqrt(FALL_FROM / (FALL_FROM + k))
