"""A small full-batch regression whose points or targets can change, and what changes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuse_ext import FusePV

POINTS, HIDDEN = 60, 24


class Regression:
    """A tanh network on a curve, whose points or targets can change; counts calls.

    ``make`` is given the parameters and the options.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        make: Callable[..., Any] = FusePV,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

        self.params = [normal(HIDDEN, 1), normal(HIDDEN), normal(HIDDEN), normal(1)]
        for param in self.params:
            param.mul_(0.5).requires_grad_()
        self.x = torch.linspace(-2, 2, POINTS, dtype=dtype)[:, None]
        self.shift, self.constant, self.calls = 0.0, 0.0, 0
        if make is FusePV:
            options.setdefault("lr", 1e-2)
        self.optimizer = make(self.params, **options)

    def loss(self) -> Tensor:
        w, b, v, c = self.params
        y = torch.sin(3 * self.x[:, 0] + self.shift)
        return (torch.tanh(self.x @ w.T + b) @ v + c - y).square().mean() + self.constant

    def closure(self) -> Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.optimizer.step(self.closure)

    def value(self) -> float:
        with torch.no_grad():
            return float(self.loss())

    @property
    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])


def new_targets(run: Regression) -> None:
    run.shift += 0.7


def new_points(run: Regression) -> None:
    run.x = run.x + 0.013


def new_constant(run: Regression) -> None:
    run.constant += 1.0


def moved_by_hand(run: Regression) -> None:
    run.params[0].data.add_(0.5)  # a write that autograd does not count


CHANGES = (new_targets, new_points, new_constant, moved_by_hand)
