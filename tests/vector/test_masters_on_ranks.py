"""Master weights of sharded parameters, and a rank whose memory ends at the switch."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import BATCH, MODES, ROWS, data, make, on_ranks, spread
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import FusePV
from fuse_ext.phase import succession

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)
BF16, SIZE = torch.bfloat16, 2
KINDS = ("living", "living diagonal")


def train(model: nn.Module, optimizer: Any, steps: range, rank: int | None = None) -> None:
    x, y = data()
    for step in steps:
        rows = (torch.arange(BATCH) + 5 * step) % ROWS
        mine = rows if rank is None else rows[rank::SIZE]
        optimizer.zero_grad()
        (model(x[mine].to(BF16)) - y[mine].to(BF16)).square().mean().backward()
        optimizer.step()


def begun(kind: str, sharded: bool) -> tuple[nn.Module, FusePV]:
    model: Any = make().to(BF16)
    group = None
    if sharded:
        model, group = spread("fsdp", model)
    options = {**MODES[kind][1], "lr": 1e-4, "step_cap": 1.0, "master_weights": True}
    return model, FusePV(model.parameters(), **options, process_group=group)


def masters(optimizer: FusePV) -> list[Tensor]:
    found = []
    for param in optimizer.param_groups[0]["params"]:
        if "master_weight" in optimizer.state.get(param, {}):
            kept = optimizer.state[param]["master_weight"]
            found.append((kept.full_tensor() if hasattr(kept, "full_tensor") else kept).clone())
    return found


def work(rank: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in KINDS:
        model, optimizer = begun(kind, True)
        train(model, optimizer, range(30), rank)
        saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        twin, fresh = begun(kind, True)
        twin.load_state_dict(weights)
        fresh.load_state_dict(saved)
        for each in ((model, optimizer), (twin, fresh)):
            train(*each, range(30, 40), rank)
        assert optimizer.phase == "lbfgs"
        found[kind] = masters(optimizer), masters(fresh)
    found["memory"] = short_of_memory(rank)
    return found


def short_of_memory(rank: int) -> list[str]:
    """On rank 1 alone."""
    model, optimizer = begun("living", True)
    made = succession._made_successor

    def fails(*args: Any) -> Any:
        if rank == 1:
            raise torch.OutOfMemoryError("no more")
        return made(*args)

    succession._made_successor = fails
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, optimizer, range(15), rank)
    succession._made_successor = made
    assert any("no memory for the phase" in str(warning.message) for warning in said)
    phases = [optimizer.phase, optimizer.report().waiting]
    train(model, optimizer, range(15, 115), rank)
    return [*phases, optimizer.phase]


def test_shards_step_as_one_process_and_resume(tmp_path: Path) -> None:
    first, second = on_ranks(SIZE, tmp_path, f"{__name__}:work")
    for kind in KINDS:
        assert len(first[kind][0]) == 5  # nobody has a gradient of the sixth
        for of in (first, second):
            assert all(map(torch.equal, *of[kind]))
            assert all(map(torch.equal, of[kind][0], first[kind][0]))
        if kind != "living":  # whose bases are of shards
            model, optimizer = begun(kind, False)
            train(model, optimizer, range(40))
            # Gradients are rounded to bfloat16 before and after they are averaged.
            torch.testing.assert_close(first[kind][0], masters(optimizer), rtol=0.0, atol=1e-3)
    assert first["memory"] == ["adam", "no memory for the next phase: on another rank", "lbfgs"]
    assert second["memory"] == ["adam", "no memory for the next phase: no more", "lbfgs"]
