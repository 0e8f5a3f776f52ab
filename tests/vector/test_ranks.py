"""Several processes step as one, whatever each of them meets; run on 2 and on 4 with gloo.

All cases of one size run in the same processes: starting them is what takes the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.rank_cases import (
    MODES,
    average_plain,
    data,
    data_of,
    fit,
    loss_of,
    make,
    nan_at,
    on_ranks,
    spread,
    whole,
)
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import LBFGS, Adam, Fuse, FusePV, When, estimate_memory
from fuse_ext.switch.criterion import Observation

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)

HERE = "vector.test_ranks"
# Which layouts are trained in which modes, by the number of processes. Bases of shards are not
# those of whole matrices, nor are blocks of int8 rows: there ranks must agree, with nobody else.
WAYS = {
    2: {"ddp": list(MODES), "fsdp": list(MODES)},
    4: {
        "hsdp": ["lbfgs search", "pairs", "living", "averages"],
        "mixed": ["adam", "lbfgs search", "lbfgs int8", "living diagonal", "averages", "fuse"],
        "columns": ["lbfgs search", "living", "averages"],
    },
}
OWN_WAY = ("living", "lbfgs int8", "matrix")
TRAININGS = [
    (size, layout, mode)
    for size, layouts in WAYS.items()
    for layout, modes in layouts.items()
    for mode in modes
]


def trainings(rank: int, size: int) -> dict[tuple[str, str], Any]:
    return {
        (layout, mode): data_of(fit(layout, mode, rank))
        for layout, modes in WAYS[size].items()
        for mode in modes
    }


def all_jobs(rank: int, folder: str) -> dict[str, Any]:
    """Everything that the tests below look at, from one start of the processes."""
    size = dist.get_world_size()
    found: dict[str, Any] = {"trainings": trainings(rank, size)}
    if size == 2:
        for job in (spoiled, counted, odd_gradients, refusals, raised, criteria, bytes_held):
            found[job.__name__] = job(rank)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    found: dict[int, list[Any]] = {}

    def get(size: int) -> list[Any]:
        if size not in found:
            folder = tmp_path_factory.mktemp(f"ranks{size}")
            found[size] = on_ranks(size, folder, f"{HERE}:all_jobs")
        return found[size]

    return get


# --- the same steps as in one process -------------------------------------------------------


@pytest.mark.parametrize(("size", "layout", "mode"), TRAININGS)
def test_ranks_step_as_one_process(ranks: Any, size: int, layout: str, mode: str) -> None:
    first, *others = (found["trainings"][layout, mode] for found in ranks(size))
    for other in others:
        assert torch.equal(first["params"], other["params"])
        assert first["calls"] == other["calls"]
        assert first["report"] == other["report"] or layout != "ddp"
    alone = data_of(fit(None, mode))
    if mode not in OWN_WAY or (layout == "ddp" and size == 2):
        assert first["calls"] == alone["calls"]
        torch.testing.assert_close(first["params"], alone["params"], rtol=0, atol=1e-6)
    mean = [sum(losses) / len(losses) for losses in zip(first["losses"], strict=True)]
    assert mean[-1] < 0.8 * mean[0]


# --- ranks that meet different things -------------------------------------------------------

SPOILED = ["adam", "lbfgs fixed", "lbfgs search", "pairs", "living", "averages", "fuse search"]


def spoiled(rank: int) -> dict[tuple[str, str], Any]:
    """One rank alone has a NaN for a loss, now and then; and its losses are of another size."""
    found = {}
    for layout in ("ddp", "fsdp"):
        for mode in [*SPOILED, "finds out", "batch search"]:
            nan = nan_at(3, 8, 9, 20)

            def spoils(call: int, nan: Callable[[int], float] = nan) -> float:
                return nan(call) * 3.0 if rank == 1 else 1.0

            found[layout, mode] = data_of(fit(layout, mode, rank, spoils, steps=25))
    return found


@pytest.mark.filterwarnings("ignore:FusePV met a loss")
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", [*SPOILED, "finds out", "batch search"])
def test_a_nan_on_one_rank_is_a_nan_on_all(ranks: Any, layout: str, mode: str) -> None:
    first, second = (found["spoiled"][layout, mode] for found in ranks(2))
    assert torch.equal(first["params"], second["params"])
    assert first["params"].isfinite().all()
    assert first["calls"] == second["calls"]
    if mode != "adam":
        assert first["report"].non_finite == second["report"].non_finite > 0
    assert first["report"] == second["report"] or layout == "fsdp"
