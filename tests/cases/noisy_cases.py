"""A quadratic whose batches differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHAPES = ((3, 5), (7,), (2, 2, 2))


class Noisy:
    """A quadratic 0.5 x.A x - b.x whose b is drawn anew for every batch; a closure to call."""

    def __init__(self, dtype: torch.dtype = torch.float64, noise: float = 0.3) -> None:
        self.params = [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]
        n = sum(p.numel() for p in self.params)
        root = torch.randn(n, n, dtype=torch.float64) / math.sqrt(n)
        self.hessian = (root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)).to(dtype)
        self.noise, self.batches = noise, torch.Generator().manual_seed(1)

    @property
    def x(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.params])

    def __call__(self) -> Tensor:
        for p in self.params:
            p.grad = None
        x = torch.cat([p.flatten() for p in self.params])
        b = self.noise * torch.randn(x.numel(), generator=self.batches, dtype=x.dtype)
        loss = 0.5 * x @ self.hessian @ x - b @ x
        loss.backward()
        return loss

    def grad(self) -> Tensor:
        """The next batch's gradient, at the parameters."""
        self()
        return torch.cat([p.grad.flatten() for p in self.params])
