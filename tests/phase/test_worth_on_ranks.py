"""Whether a weight's bases are worth having is decided by all ranks that have a part of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import on_ranks
from torch import distributed as dist
from torch import nn

from fuse_ext import FusePV
from fuse_ext.phase.living.metric.kronecker import GATHER, MEASURE
from fuse_ext.phase.living.metric.worth import LEAST_GAIN, gain_of

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)

SWITCH, HERE, COLUMNS = 3, 12, 20
# How much rows have in common on the two ranks, of each weight; and who keeps its bases.
COMMON = {"both": (0.5, 0.5), "one": (0.0, 0.5), "too little": (0.0, 0.17), "none": (0.0, 0.0)}
KEEPS = {"both": True, "one": True, "too little": False, "none": False}


def job(rank: int, folder: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    params = {
        name: nn.Parameter(distribute_tensor(torch.randn(2 * HERE, COLUMNS), mesh, [Shard(0)]))
        for name in COMMON
    }
    torch.manual_seed(rank)
    mixes = {
        name: torch.eye(HERE) + strength[rank] * torch.randn(HERE, HERE)
        for name, strength in COMMON.items()
    }
    optimizer = FusePV(params.values(), lr=1e-3, switch=SWITCH, deterministic=False)

    def step() -> None:
        for name, param in params.items():
            mine = mixes[name] @ torch.randn(HERE, COLUMNS)
            param.grad = DTensor.from_local(mine, mesh, [Shard(0)])
        optimizer.step()

    for _ in range(SWITCH + GATHER + MEASURE - 2):
        step()
    gains = {}
    for name, param in params.items():
        entry = optimizer.state[param]
        gain, count = gain_of(entry["own_sq"], entry["rotated_sq"]).tolist()
        gains[name] = gain / count
    for _ in range(4):
        step()
    kept = {name: "row_basis" in optimizer.state[param] for name, param in params.items()}
    finite = all(math.isfinite(float(p.detach().full_tensor().sum())) for p in params.values())
    return {"gains": gains, "kept": kept, "finite": finite}


def test_all_ranks_keep_the_same_ones(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, "test_worth_on_ranks:job")
    assert first["finite"] and second["finite"]
    assert first["kept"] == second["kept"] == KEEPS
    for name, (own, other) in COMMON.items():
        for strength, found in ((own, first["gains"][name]), (other, second["gains"][name])):
            assert (found > LEAST_GAIN) == (strength > 0.0), (name, found)
