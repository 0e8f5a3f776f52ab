"""A sharded model whose first layer is frozen, saved and resumed by torch's own functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rank_cases import data, loss_of, make, on_ranks, spread, whole
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import FusePV, prepare_to_load

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)

OPTIONS: dict[str, dict[str, Any]] = {
    "pairs": {"deterministic": True, "curvature": "pairs"},
    "living": {"deterministic": False},
}


def steps(model: nn.Module, optimizer: Any, count: int) -> None:
    """So many, on every other row."""
    x, y = (of[dist.get_rank() :: 2] for of in data())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y, None)
        loss.backward()
        return loss.detach()

    for _ in range(count):
        optimizer.step(closure)


def freeze(model: Any, whether: bool) -> None:
    next(iter(model.children())).requires_grad_(not whether)


def resume(rank: int, folder: str) -> dict[str, list[Tensor]]:
    """All parameters of a run that goes on, and of one that was resumed from files."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    found = {}
    for kind, options in OPTIONS.items():
        runs = []
        for _ in range(2):
            model, group = spread("fsdp", make())
            optimizer = FusePV(model.parameters(), 1e-2, switch=5, process_group=group, **options)
            runs.append((model, optimizer))
        (model, optimizer), (twin, fresh) = runs
        steps(model, optimizer, 12)
        freeze(model, True)
        steps(model, optimizer, 4)
        where = f"{folder}/{kind}"
        saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        checkpoint.save(saved, checkpoint_id=where)
        twin.load_state_dict(copy.deepcopy(model.state_dict()))
        freeze(twin, True)
        reader = checkpoint.FileSystemReader(where)
        prepare_to_load(twin, fresh, reader.read_metadata())
        into = {"optimizer": get_optimizer_state_dict(twin, fresh)}
        checkpoint.load(into, storage_reader=reader)
        set_optimizer_state_dict(twin, fresh, into["optimizer"])
        ends = []
        for each, stepper in runs:
            stepper.zero_grad()
            steps(each, stepper, 4)
            freeze(each, False)
            steps(each, stepper, 4)
            ends.append(whole(each))
        found[kind] = ends
    return found


def test_it_goes_on_bit_for_bit(tmp_path: Any) -> None:
    for of_rank in on_ranks(2, tmp_path, f"{__name__}:resume"):
        for kind, (goes_on, resumed) in of_rank.items():
            assert torch.equal(goes_on, resumed), kind
