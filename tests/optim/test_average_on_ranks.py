"""The mean of the weights on ranks: all see it, go on from where they were, and save both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import continued, data, fit, make, on_ranks, whole
from torch import Tensor
from torch import distributed as dist

from fuse_ext import FusePV

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)

MODE, AT, MORE = "living diagonal", 27, 8  # bases of shards are others than those of the whole
LAYOUTS = ("ddp", "zero", "fsdp", "hsdp", "mixed", "columns")


def looked_at(layout: str | None, evaluates: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, weights after it was looked at, and some steps later."""
    done = fit(layout, MODE, None if layout is None else dist.get_rank(), steps=AT)
    model, optimizer = done["model"], done["optimizer"]
    mean = whole(model)
    if evaluates:
        optimizer.eval()
        mean = whole(model)
        if layout != "columns":
            with torch.no_grad():
                model(data()[0])
        for module in model.modules():  # the outermost one stays gathered without a backward
            if hasattr(module, "reshard"):
                module.reshard()
        optimizer.train()
    trained = whole(model)
    for _ in range(MORE):
        optimizer.step(done["closure"])
    return mean, trained, whole(model)


def job(rank: int, folder: str) -> dict[str, Any]:
    return {layout: (looked_at(layout, True), looked_at(layout, False)) for layout in LAYOUTS}


def test_all_ranks_see_the_mean_and_go_on_as_if_they_had_not(tmp_path: Path) -> None:
    alone = looked_at(None, True)
    assert not torch.equal(alone[0], alone[1])
    ranks = on_ranks(4, tmp_path, "test_average_on_ranks:job")
    for found in ranks:
        for layout, (looked, blind) in found.items():
            mean, trained, later = looked
            assert torch.equal(trained, blind[1]) and torch.equal(later, blind[2]), layout
            torch.testing.assert_close(mean, alone[0], rtol=1e-9, atol=1e-9)
            assert torch.equal(mean, ranks[0][layout][0][0]), layout


def save(rank: int, folder: str) -> dict[str, Any]:
    """With the mean in place; loaded into a fresh optimizer of the Adam phase."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    from fuse_ext import prepare_to_load

    found = {}
    for layout in ("zero", "fsdp"):
        done = fit(layout, MODE, rank, steps=AT)
        model, optimizer = done["model"], done["optimizer"]
        optimizer.eval()
        mean = whole(model)
        place = f"{folder}/{layout}"
        inner = getattr(model, "module", model)
        state = {"optimizer": get_optimizer_state_dict(inner, optimizer)}
        checkpoint.save({**state, "model": inner.state_dict()}, checkpoint_id=place)
        optimizer.train()
        goes_on = whole(model), continued(model, optimizer, MODE, AT, MORE)

        fresh = fit(layout, MODE, rank, steps=1)
        model, optimizer = fresh["model"], fresh["optimizer"]
        inner = getattr(model, "module", model)
        reader = checkpoint.FileSystemReader(place)
        prepare_to_load(inner, optimizer, reader.read_metadata(), "optimizer")
        state = {"optimizer": get_optimizer_state_dict(inner, optimizer)}
        state["model"] = inner.state_dict()
        checkpoint.load(state, storage_reader=reader)
        inner.load_state_dict(state["model"])
        set_optimizer_state_dict(inner, optimizer, state["optimizer"])
        again = whole(model)
        optimizer.train()
        resumed = whole(model), continued(model, optimizer, MODE, AT, MORE)
        found[layout] = mean, goes_on, again, resumed
    return found


def test_checkpoints_with_the_mean_in_place(tmp_path: Path) -> None:
    for found in on_ranks(2, tmp_path, "test_average_on_ranks:save"):
        for layout, (mean, goes_on, again, resumed) in found.items():
            assert torch.equal(mean, again), layout
            assert torch.equal(goes_on[0], resumed[0]) and torch.equal(goes_on[1], resumed[1])
            assert not torch.equal(mean, goes_on[0]), layout


def test_a_share_is_what_the_estimate_says() -> None:
    import fuse_ext

    whole_one = fuse_ext.estimate_memory(make()).phases[-1].state_bytes
    without = fuse_ext.estimate_memory(make(), average_weights=False).phases[-1].state_bytes
    numel = sum(param.numel() for param in make().parameters())
    assert whole_one - without == 8 * numel


def thin(spreads: bool) -> tuple[torch.nn.Module, FusePV]:
    """Two weights that have their bases in blocks, one of which ``fully_shard`` may take."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(2, 60), torch.nn.Tanh(), torch.nn.Linear(60, 2))
    model = model.double()
    if spreads:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0])
    return model, FusePV(model.parameters(), 1e-2, switch=3, deterministic=False)


def steps_of(model: torch.nn.Module, optimizer: FusePV, count: int) -> Tensor:
    """The same batches on all ranks; all parameters then."""
    for step in range(count):
        torch.manual_seed(step)
        x = torch.randn(16, 2, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()
    return whole(model)


def take_over(rank: int, folder: str) -> Any:
    """Loads what one process has saved, and goes back to Adam, whose moments tell."""
    weights, state = torch.load(f"{folder}/saved.pt")
    model, optimizer = thin(True)
    for param, saved in zip(model.parameters(), weights.values(), strict=True):
        mine = param if not hasattr(param, "to_local") else param.to_local()
        rows = saved.chunk(2)[rank] if mine.shape != saved.shape else saved
        with torch.no_grad():
            mine.copy_(rows)
    optimizer.load_state_dict(state)
    held = [name for entry in optimizer.state.values() for name in entry if "basis" in str(name)]
    optimizer.switch_back()
    return held, steps_of(model, optimizer, 5)


def test_blocks_of_one_process_become_adams_moments_beside_shards(tmp_path: Path) -> None:
    model, optimizer = thin(False)
    steps_of(model, optimizer, 40)
    assert optimizer.state[model[0].weight]["row_basis"].dim() == 3
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "saved.pt")
    optimizer.switch_back()
    alone = steps_of(model, optimizer, 5)
    for held, found in on_ranks(2, tmp_path, "test_average_on_ranks:take_over"):
        assert not held
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-9)
