"""Does an installed fuse_ext work at all? Run from any folder: python smoke.py."""

from __future__ import annotations

import torch

import fuse_ext
from fuse_ext import Adam, AfterSteps, FusePV


def problem() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A small regression and a network for it, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model, x, x.sin().sum(1, keepdim=True)


def train(optimizer: torch.optim.Optimizer, model: torch.nn.Module, steps: int) -> float:
    _, x, y = problem()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        loss = optimizer.step(closure)
    return loss.item()


print(f"torch {torch.__version__}, fuse_ext {fuse_ext.build_info()}")

ours, theirs = problem()[0], problem()[0]
train(Adam(ours.parameters(), lr=1e-2), ours, 10)
train(torch.optim.Adam(theirs.parameters(), lr=1e-2), theirs, 10)
for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(p, q)
print("Adam: ten steps beside torch.optim.Adam agree")

model = problem()[0]
optimizer = FusePV(model.parameters(), lr=1e-2, switch=AfterSteps(20))
adam_loss = train(optimizer, model, 20)
loss = train(optimizer, model, 60)
assert optimizer.phase == "lbfgs", optimizer.phase
assert loss < 0.1 * adam_loss, (adam_loss, loss)
print(f"FusePV: loss {adam_loss:.2e} after Adam, {loss:.2e} after L-BFGS")
print(optimizer.report())
