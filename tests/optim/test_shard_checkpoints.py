"""The state of sharded parameters: resumed bit for bit on as many ranks, and on fewer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import MODES, continued, make, on_ranks, spread
from torch import Tensor, nn
from torch import distributed as dist

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)

SAVED_AT, STEPS = 25, 8
# Those whose state can be cut anew for other ranks without a loss, and those with something that is
# of the shards alone.
FREE = ["adam", "lbfgs search", "pairs", "living diagonal"]
BOUND = ["living", "lbfgs int8"]


def begun(mode: str, layout: str | None, weights: Any = None) -> tuple[nn.Module, Any]:
    """A model, perhaps with these weights, and an optimizer that has never stepped."""
    kind, options, _ = MODES[mode]
    inner = make()
    if weights is not None:
        inner.load_state_dict(weights)
    model, group = (inner, None) if layout is None else spread(layout, inner)
    return model, kind(model.parameters(), **options, process_group=group)


def save_on_four(rank: int, folder: str) -> dict[str, Any]:
    """Trains, saves, and resumes from what a rank can save by itself."""
    from torch.distributed import checkpoint

    found = {}
    for mode in [*FREE, *BOUND]:
        model, optimizer = begun(mode, "fsdp")
        continued(model, optimizer, mode, 0, SAVED_AT)
        written = io.BytesIO()
        torch.save((optimizer.state_dict(), model.state_dict()), written)
        written.seek(0)
        saved, weights = torch.load(written)
        state = {str(key): entry for key, entry in saved["state"].items()}
        tensors = {"model": weights, "state": state, "groups": saved["param_groups"]}
        checkpoint.save(tensors, checkpoint_id=f"{folder}/{mode}")
        twin, fresh = begun(mode, "fsdp")
        twin.load_state_dict(weights)
        fresh.load_state_dict(saved)
        goes_on = continued(model, optimizer, mode, SAVED_AT, STEPS)
        found[mode] = goes_on, continued(twin, fresh, mode, SAVED_AT, STEPS)
    return found


def resumed(mode: str, folder: str, layout: str | None) -> tuple[Tensor, Any]:
    """Goes on from a checkpoint that was put together from all ranks' parts."""
    saved = torch.load(f"{folder}/{mode}.pt", weights_only=False)
    model, optimizer = begun(mode, layout, saved["model"])
    state = {int(key): entry for key, entry in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": saved["groups"]})
    return continued(model, optimizer, mode, SAVED_AT, STEPS), optimizer.report()


def resume_on_two(rank: int, folder: str, where: str) -> dict[str, Any]:
    return {mode: resumed(mode, where, "fsdp") for mode in [*FREE, *BOUND] if mode != "adam"}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], str]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = tmp_path_factory.mktemp("four")
    found = on_ranks(4, folder, f"{__name__}:save_on_four")
    for mode in [*FREE, *BOUND]:
        dcp_to_torch_save(folder / mode, folder / f"{mode}.pt")
    return found, str(folder)


@pytest.fixture(scope="module")
def two(four: tuple[list[Any], str], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("two")
    return on_ranks(2, folder, f"{__name__}:resume_on_two", four[1])


@pytest.mark.parametrize("mode", [*FREE, *BOUND])
def test_as_many_ranks_resume_bit_for_bit(four: Any, mode: str) -> None:
    for found in four[0]:
        goes_on, resumed_there = found[mode]
        assert torch.equal(goes_on, resumed_there)


@pytest.mark.parametrize("mode", [mode for mode in FREE if mode != "adam"])
def test_fewer_ranks_resume_as_one_would(four: Any, two: Any, mode: str) -> None:
    goes_on = four[0][0][mode][0]
    for found in two:
        torch.testing.assert_close(found[mode][0], goes_on, rtol=0, atol=1e-6)
    alone, report = resumed(mode, four[1], None)
    torch.testing.assert_close(alone, goes_on, rtol=0, atol=1e-6)
    assert report.pairs_held == two[0][mode][1].pairs_held


@pytest.mark.parametrize("mode", BOUND)
def test_what_is_of_the_shards_begins_anew(four: Any, two: Any, mode: str) -> None:
    (first, report), (second, _) = (found[mode] for found in two)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    alone, _ = resumed(mode, four[1], None)
    assert alone.isfinite().all()
    if mode == "lbfgs int8":
        assert 0 < report.pairs_held <= STEPS  # all of them made since
    else:
        assert report.curvature == "kronecker"


def test_a_checkpoint_of_other_parameters_is_refused(four: Any) -> None:
    saved = torch.load(Path(four[1]) / "pairs.pt", weights_only=False)
    state = {int(key): dict(entry) for key, entry in saved["state"].items()}
    state[1]["history"] = state[1]["history"][..., :-1]
    _, optimizer = begun("pairs", None)
    with pytest.raises(ValueError, match=r"history of params\[1\]"):
        optimizer.load_state_dict({"state": state, "param_groups": saved["groups"]})
