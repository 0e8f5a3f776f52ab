"""What a rank sees of its own losses alone decides nothing: all take the same steps."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import on_ranks
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import FusePV

RANKS, STEPS, HARDER = 2, 420, 60


def train(rank: int, group: Any, told: str, event: str) -> tuple[Tensor, Any]:
    """Steps on batches of its own, of which rank 0's come to be harder, or once have no loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = FusePV(parallel.parameters(), lr=3e-3, process_group=group)
    generator = torch.Generator().manual_seed(10 + rank)
    for step in range(STEPS):
        x = torch.randn(16, 4, generator=generator)
        y = x[:, :1].clone()
        if event == "harder" and rank == 0 and step > HARDER:
            y += 3.0 * torch.randn(16, 1, generator=generator)
        infinite = event == "infinite" and rank == 0 and step in (10, 100)

        def closure(x: Tensor = x, y: Tensor = y, infinite: bool = infinite) -> Tensor:
            optimizer.zero_grad()
            loss = (parallel(x) - y).square().mean()
            loss.backward()
            return loss.detach() + (math.inf if infinite else 0.0)

        if told == "closure":
            optimizer.step(closure)
        else:
            optimizer.step(loss=closure())
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach(), optimizer.report()


def job(rank: int, folder: str, cases: list[tuple[bool, str, str]]) -> list[Any]:
    warnings.simplefilter("ignore")  # of steps that were not taken
    found = []
    for says, told, event in cases:
        flat, report = train(rank, dist.group.WORLD if says else None, told, event)
        found.append((flat, report.phase, report.setbacks, report.non_finite))
    return found


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_ranks_go_one_way(tmp_path: Path) -> None:
    cases = [
        (says, told, event)
        for says in (False, True)
        for told in ("closure", "loss")
        for event in ("harder", "infinite")
    ]
    ranks = on_ranks(RANKS, tmp_path, "test_ddp_decisions:job", cases)
    for (says, _, event), first, second in zip(cases, *ranks, strict=True):
        assert torch.equal(first[0], second[0])
        assert first[1:] == second[1:]
        # The mean loss of all ranks has risen where they know of each other.
        if event == "harder":
            assert (first[2] > 0) == says
        elif says:
            assert first[3] == 2
