"""Accelerate: prepare(FusePV(...)); unwrap() reaches what its wrapper hides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fuse_ext import FusePV, unwrap


def data() -> DataLoader:
    """Batches of sin of sums."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.sin(x.sum(1, keepdim=True))), batch_size=32)


def repeated(loader: DataLoader, epochs: int) -> Iterator[list[Tensor]]:
    """The batches of so many epochs."""
    for _ in range(epochs):
        yield from loader


def train(epochs: int = 20, **accelerator_options: Any) -> tuple[float, Any]:
    """The mean loss of the last epoch, and the wrapped optimizer."""
    accelerator = Accelerator(cpu=True, **accelerator_options)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = FusePV(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data())
    losses = []
    for x, y in repeated(loader, epochs):
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-len(loader) :]) / len(loader), optimizer


if __name__ == "__main__":
    loss, optimizer = train()
    print(unwrap(optimizer).report())
    print(f"\nmean loss of the last epoch {loss:.2e}")
