"""torch.func: gradients of a pure function in the closure, or the function itself to minimize()."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

import fuse_ext
from fuse_ext import FusePV


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    x = torch.randn(64, 3, dtype=torch.float64)
    return model, x, torch.sin(x.sum(1, keepdim=True))


def by_closure(steps: int = 300) -> FusePV:
    """FusePV on a dictionary of parameters, whose gradients torch.func makes."""
    model, x, y = problem()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss_of(params: dict[str, Tensor]) -> Tensor:
        return (functional_call(model, params, (x,)) - y).square().mean()

    optimizer = FusePV(params.values(), lr=1e-2, deterministic=True)

    def closure() -> Tensor:
        grads, loss = grad_and_value(loss_of)(params)
        for name, param in params.items():
            param.grad = grads[name]  # anew at every call: nothing to zero
        return loss

    for _ in range(steps):
        optimizer.step(closure)
        if optimizer.report().converged:
            break
    return optimizer


def by_minimize(maxfun: int = 400) -> fuse_ext.Minimum:
    """The same in one call, without Adam."""
    model, x, y = problem()

    def loss_of(params: dict[str, Tensor]) -> Tensor:
        return (functional_call(model, params, (x,)) - y).square().mean()

    return fuse_ext.minimize(loss_of, dict(model.named_parameters()), gtol=1e-7, maxfun=maxfun)


if __name__ == "__main__":
    print(by_closure().report(), "\n")
    found = by_minimize()
    print(f"minimize: loss {found.fun:.3g} after {found.nfev} evaluations; {found.message}")
