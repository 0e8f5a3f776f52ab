"""What sharded state saves: resumed bit for bit on as many ranks, and on others or whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import MODES, continued, make, on_ranks, spread
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import prepare_to_load

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)

SAVED_AT, STEPS = 25, 8
# Those whose state can be cut anew for other ranks without a loss, and those with something that is
# of the shards alone.
FREE = ["adam", "lbfgs search", "pairs", "living diagonal", "fuse"]
BOUND = ["living", "lbfgs int8"]
TO_FSDP = ["pairs", "living diagonal", "living"]


def begun(mode: str, layout: str | None, weights: Any = None) -> tuple[nn.Module, nn.Module, Any]:
    """A network, perhaps with these weights, the same under DDP, and an optimizer."""
    kind, options, _ = MODES[mode]
    inner = make()
    # torch wants a state of all that ask for gradients, and takes none of others.
    inner.idle.requires_grad_(mode != "adam")
    if weights is not None:
        inner.load_state_dict(weights)
    model: nn.Module = inner
    more: dict[str, Any] = {}
    if layout is not None:
        model, more["process_group"] = spread(layout, inner)
        more["shard_state"] = layout == "zero"
    return inner, model, kind(inner.parameters(), **options, **more)


def save_on_four(rank: int, folder: str) -> dict[str, Any]:
    """Trains and saves, as a rank can by itself and with torch.distributed.checkpoint."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
    )

    found = {}
    for mode in [*FREE, *BOUND]:
        inner, model, optimizer = begun(mode, "zero")
        continued(model, optimizer, mode, 0, SAVED_AT)
        written = io.BytesIO()
        torch.save((optimizer.state_dict(), inner.state_dict()), written)
        name = f"{folder}/{mode}"
        state = {"optimizer": get_optimizer_state_dict(inner, optimizer)}
        checkpoint.save({**state, "model": inner.state_dict()}, checkpoint_id=name)
        all_of_it = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_optimizer_state_dict(inner, optimizer, options=all_of_it)
        if rank == 0:
            torch.save((full, inner.state_dict()), f"{name}.full.pt")
        goes_on = continued(model, optimizer, mode, SAVED_AT, STEPS)
        written.seek(0)
        saved, weights = torch.load(written)
        _, twin, fresh = begun(mode, "zero", weights)
        fresh.load_state_dict(saved)
        found[mode] = goes_on, continued(twin, fresh, mode, SAVED_AT, STEPS)
    return found


def resumed(mode: str, folder: str, layout: str | None, form: str) -> tuple[Tensor, Any]:
    """Goes on from a checkpoint, sharded or full."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    full, weights = torch.load(f"{folder}/{mode}.full.pt", weights_only=False)
    inner, model, optimizer = begun(mode, layout, weights)
    if form == "full":
        prepare_to_load(inner, optimizer, full)
        whole_one = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(inner, optimizer, full, options=whole_one)
    else:
        reader = checkpoint.FileSystemReader(f"{folder}/{mode}")
        prepare_to_load(inner, optimizer, reader.read_metadata(), under="optimizer")
        state = {"optimizer": get_optimizer_state_dict(inner, optimizer)}
        checkpoint.load(state, storage_reader=reader)
        set_optimizer_state_dict(inner, optimizer, state["optimizer"])
    params = continued(model, optimizer, mode, SAVED_AT, STEPS)
    return params, optimizer.report() if hasattr(optimizer, "report") else None


WAYS = [(layout, form) for layout in ("zero", "ddp", "fsdp") for form in ("full", "sharded")]


def resume_on_two(rank: int, folder: str, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode in [*FREE, *BOUND]:
        for layout, form in WAYS:
            if layout != "fsdp" or mode in TO_FSDP:
                found[f"{mode} {layout} {form}"] = resumed(mode, where, layout, form)
        found[f"{mode} begun whole"] = begun_whole(mode)
    return found


def begun_whole(mode: str) -> tuple[Tensor, Tensor, Any]:
    """Begins with all state on all ranks, and goes on with and without sharding it."""
    inner, model, optimizer = begun(mode, "ddp")
    continued(model, optimizer, mode, 0, SAVED_AT)
    saved, weights = optimizer.state_dict(), {k: v.clone() for k, v in inner.state_dict().items()}
    _, twin, fresh = begun(mode, "zero", weights)
    fresh.load_state_dict(saved)
    goes_on = continued(model, optimizer, mode, SAVED_AT, STEPS)
    report = fresh.report() if hasattr(fresh, "report") else None
    return goes_on, continued(twin, fresh, mode, SAVED_AT, STEPS), report


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], str]:
    folder = tmp_path_factory.mktemp("four")
    return on_ranks(4, folder, f"{__name__}:save_on_four"), str(folder)


@pytest.fixture(scope="module")
def two(four: tuple[list[Any], str], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("two")
    return on_ranks(2, folder, f"{__name__}:resume_on_two", four[1])


@pytest.mark.parametrize("mode", [*FREE, *BOUND])
def test_as_many_ranks_resume_bit_for_bit(four: Any, mode: str) -> None:
    for found in four[0]:
        goes_on, resumed_there = found[mode]
        assert torch.equal(goes_on, resumed_there)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process loads
@pytest.mark.parametrize("mode", FREE)
def test_other_ranks_resume_as_they_would(four: Any, two: Any, mode: str) -> None:
    goes_on = four[0][0][mode][0]
    for found in two:
        for layout, form in WAYS:
            if layout == "fsdp" and mode not in TO_FSDP:
                continue
            params, _ = found[f"{mode} {layout} {form}"]
            torch.testing.assert_close(params, goes_on, rtol=0, atol=1e-6)
    for form in ("full", "sharded"):
        alone, report = resumed(mode, four[1], None, form)
        torch.testing.assert_close(alone, goes_on, rtol=0, atol=1e-6)
        other = two[0][f"{mode} zero {form}"][1]
        assert report is None or report.pairs_held == other.pairs_held


@pytest.mark.parametrize("mode", BOUND)
def test_what_is_of_the_shards_begins_anew(four: Any, two: Any, mode: str) -> None:
    for layout, form in WAYS:
        if layout == "fsdp" and mode not in TO_FSDP:
            continue
        (first, report), (second, _) = (found[f"{mode} {layout} {form}"] for found in two)
        assert torch.equal(first, second)
        assert first.isfinite().all()
        if mode == "lbfgs int8":
            assert 0 < report.pairs_held <= STEPS  # all of them made since
        else:
            assert report.curvature == "kronecker"


@pytest.mark.parametrize("mode", FREE)
def test_whole_state_can_be_shared_out(two: Any, mode: str) -> None:
    for found in two:
        goes_on, shared, report = found[f"{mode} begun whole"]
        torch.testing.assert_close(shared, goes_on, rtol=0, atol=1e-9)
        assert mode not in ("lbfgs search", "pairs") or report.pairs_held > 0


@pytest.mark.parametrize("mode", BOUND)
def test_what_is_of_whole_parameters_begins_anew(two: Any, mode: str) -> None:
    (_, first, report), (_, second, _) = (found[f"{mode} begun whole"] for found in two)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert mode != "lbfgs int8" or report.pairs_held == 0


def test_a_checkpoint_of_other_parameters_is_refused(four: Any) -> None:
    full, _ = torch.load(Path(four[1]) / "pairs.full.pt", weights_only=False)
    inner, _, optimizer = begun("pairs", None)
    names = [name for name, _ in inner.named_parameters()]
    state = {i: dict(full["state"][name]) for i, name in enumerate(names)}
    state[1]["history"] = state[1]["history"][..., :-1]
    groups = [{**full["param_groups"][0], "params": list(range(len(names)))}]
    with pytest.raises(ValueError, match=r"history of params\[1\]"):
        optimizer.load_state_dict({"state": state, "param_groups": groups})
