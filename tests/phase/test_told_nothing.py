"""The demo's networks on all their data: told nothing, FusePV ends where a promise would lead."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fuse_ext import FusePV

Problem = tuple[nn.Module, Tensor, Tensor, float]
SEEDS, EVALUATIONS = range(5), 500


def digits(seed: int) -> Problem:
    """A 64-32-10 tanh network on handwritten digits, and its weight decay."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    return network, torch.tensor(images / 16).float(), torch.tensor(labels), 1e-3


def regression(seed: int) -> Problem:
    """A 2-24-24-1 tanh network on a smooth function."""
    torch.manual_seed(seed)
    x = 2 * torch.rand(400, 2, dtype=torch.float64) - 1
    y = torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])
    layers = nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)
    return nn.Sequential(*layers).double(), x, y, 0.0


def least_loss(make: Callable[[int], Problem], seed: int, promise: bool | None) -> float:
    """Within the budget; weight decay included."""
    network, x, y, decay = make(seed)
    measure = nn.CrossEntropyLoss() if y.dtype == torch.int64 else nn.MSELoss()
    optimizer = FusePV(network.parameters(), 1e-3, weight_decay=decay, deterministic=promise)
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = measure(network(x), y)
        loss.backward()
        squares = sum(float(p.detach().square().sum()) for p in network.parameters())
        losses.append(float(loss.detach()) + decay / 2 * squares)
        return loss

    while len(losses) < EVALUATIONS and not optimizer.report().converged:
        optimizer.step(closure)
    return min(losses[:EVALUATIONS])


@pytest.mark.parametrize("make", [digits, regression], ids=lambda make: make.__name__)
def test_told_nothing_it_ends_where_a_promise_leads(make: Callable[[int], Problem]) -> None:
    unsaid, promised = (
        statistics.median(least_loss(make, seed, promise) for seed in SEEDS)
        for promise in (None, True)
    )
    assert unsaid <= 2 * promised
