"""Two processes under DistributedDataParallel take the same steps, those of one with all data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_cases import on_ranks
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import FusePV

RANKS, BATCH, STEPS = 2, 8, 90


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    return x, (x[:, :1] * x[:, 1:2]).sin()


def make() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def fit(model: nn.Module, search: str, rank: int | None = None) -> FusePV:
    """STEPS steps on every other row of each batch, or on all of them."""
    x, y = data()
    full = search == "full batch"
    optimizer = FusePV(
        model.parameters(),
        lr=1e-2,
        switch=20,
        deterministic=full or None,
        process_group=None if rank is None else dist.group.WORLD,
    )
    for step in range(STEPS):
        rows = torch.arange(64) if full else (torch.arange(RANKS * BATCH) + 5 * step) % 64
        mine = rows if rank is None else rows[rank::RANKS]

        def closure(mine: Tensor = mine) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x[mine]) - y[mine]).square().mean()
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
    return optimizer


def job(rank: int, folder: str, search: str) -> tuple[Tensor, int]:
    model = nn.parallel.DistributedDataParallel(make())
    optimizer = fit(model, search, rank)
    found = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return found, optimizer.report().pairs_accepted


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("search", ["living metric", "full batch"])
def test_ranks_agree_with_each_other_and_with_one(search: str, tmp_path: Path) -> None:
    (first, pairs), (second, _) = on_ranks(RANKS, tmp_path, "test_ddp:job", search)
    assert torch.equal(first, second)
    assert pairs >= 5 or search == "living metric"
    model = make()
    fit(model, search)
    alone = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    # Sums in another order; the full batch has 70 iterations in which to make more of it.
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-3)
