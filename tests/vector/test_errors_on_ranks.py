"""What goes wrong on one rank alone is told to all: none waits for the others until a timeout."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import on_ranks
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import FusePV
from fuse_ext.phase import succession

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)
SIZE, SWITCH = 2, 3
WITHIN = 30.0  # seconds for all of it, of 60 until gloo gives up


class Bowl:
    """A quartic bowl, as every rank has it."""

    def __init__(self, zeroes: bool = True, **options: Any) -> None:
        self.param, self.zeroes = nn.Parameter(torch.linspace(1.0, 2.0, 12)), zeroes
        self.weights = torch.linspace(0.1, 1.0, 12)
        options["process_group"] = dist.group.WORLD
        self.optimizer = FusePV([self.param], 1e-2, **options)

    def closure(self) -> Tensor:
        if self.zeroes:
            self.optimizer.zero_grad()
        loss = (self.weights * self.param.square() + 0.1 * self.param**4).sum()
        loss.backward()
        return loss.detach()

    def step(self, count: int = 1) -> float:
        return [float(self.optimizer.step(self.closure)) for _ in range(count)][-1]

    @property
    def kept(self) -> str:
        return str(self.optimizer._phase.history.kind)  # type: ignore[union-attr]


@contextmanager
def no_memory(on: bool) -> Iterator[None]:
    """There is none for L-BFGS on this rank."""
    made = succession.make_lbfgs

    def fails(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no more\nat all")

    succession.make_lbfgs = fails if on else made
    try:
        yield
    finally:
        succession.make_lbfgs = made


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def at_once(rank: int) -> list[Any]:
    bowl = Bowl(switch=0, deterministic=True)
    with no_memory(rank == 1):
        said = error_of(bowl.step)
    return [said, bowl.step() > bowl.step(9)]  # and it goes on where there is memory again


def growing(rank: int, options: dict[str, Any]) -> list[Any]:
    """What is kept before, without memory on rank 1, and when there is memory again."""
    bowl = Bowl(switch=SWITCH, **options)
    bowl.step(SWITCH)
    succession.STAY = 4  # so that it has not arrived before it tries again
    with no_memory(rank == 1), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        losses = [bowl.step(5), bowl.step(5)]
        kept = bowl.kept
    # A ring has 10 pairs and a matrix is wanted: as it was before it was taken for one function.
    size = bowl.optimizer.param_groups[0]["history_size"]
    bowl.step(10)
    warned = sum("no memory for the phase of one function" in str(w.message) for w in said)
    return [kept, size, warned, bowl.kept, losses[1] < losses[0], bowl.param.detach().clone()]


def adding(rank: int) -> str:
    """A closure that adds to gradients, which on rank 1 alone are there before the step."""
    bowl = Bowl(zeroes=False, switch=SWITCH, deterministic=True)

    def run() -> None:
        for _ in range(SWITCH + 4):
            bowl.optimizer.zero_grad()
            if rank == 1 and bowl.optimizer.phase == "lbfgs":
                bowl.param.square().sum().backward()
            bowl.step()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return error_of(run)


def errors(rank: int, folder: str) -> dict[str, Any]:
    begun = time.monotonic()
    found: dict[str, Any] = {
        "at once": at_once(rank),
        "from batches": growing(rank, {}),
        "from pairs": growing(rank, {"line_search": "strong_wolfe"}),
        "adding": adding(rank),
    }
    return {**found, "seconds": time.monotonic() - begun}


def test_every_rank_raises_or_stays_where_one_of_them_has_to(tmp_path: Path) -> None:
    first, second = on_ranks(SIZE, tmp_path, f"{__name__}:errors")
    assert max(first["seconds"], second["seconds"]) < WITHIN
    said = "OutOfMemoryError: no memory for the phase that begins, on another rank"
    assert first["at once"] == [said, True]
    assert second["at once"] == ["OutOfMemoryError: no more\nat all", True]
    for kind, kept in (("from batches", "diagonal"), ("from pairs", "pairs")):
        for found in (first[kind], second[kind]):
            assert found[:5] == [kept, 10, 1, "dense", True], kind
        assert torch.equal(first[kind][5], second[kind][5])
    assert "accumulated before step" in first["adding"]
    assert first["adding"] == second["adding"]
