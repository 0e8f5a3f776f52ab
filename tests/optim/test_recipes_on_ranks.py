"""What people do around a large model, on two ranks and in both phases, beside one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rank_cases import on_ranks
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import FusePV

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)
SIZE, SWITCH, STEPS, ROWS, BATCH = 2, 10, 40, 96, 24
BATCHES: dict[str, Any] = {"deterministic": False, "metric": "diagonal"}  # bases are of shards
FULL: dict[str, Any] = {"deterministic": True, "curvature": "pairs"}
# Steps whose loss is infinite on the last rank alone: one in each phase.
INFINITE = (5, 20)


class Recipe(NamedTuple):
    """A training loop with its changes.

    Attributes:
        parts: Of it: "decay", "cosine", "clip", "accumulate", "autocast", "scaler", "inf" and
            "ddp", which is fully_shard elsewhere.
        full: Whether on the full batch, with a closure.
        apart: By how much parameters may differ from those of one process. None: a clipped
            gradient is none of the loss, and searches on it go where rounding leads them.
    """

    parts: tuple[str, ...]
    full: bool = False
    apart: float | None = 1e-6


RECIPES = [
    Recipe(("decay", "cosine")),
    Recipe(("clip",)),
    Recipe(("accumulate",)),
    Recipe(("autocast",), apart=2e-3),  # each rank rounds the products of its own rows
    Recipe(("scaler",)),
    Recipe(("scaler", "inf")),
    Recipe(("scaler", "clip", "inf")),
    Recipe(("ddp", "scaler", "inf")),
    Recipe(("ddp", "scaler", "clip")),
    Recipe(("clip",), full=True, apart=None),
    Recipe(("accumulate",), full=True, apart=1e-4),
    Recipe(("cosine",), full=True, apart=1e-4),
]


class Loop:
    """A network on this rank's rows; ``rank`` None for one process with all of them."""

    def __init__(self, recipe: Recipe, rank: int | None) -> None:
        self.recipe, self.rank, parts = recipe, rank, recipe.parts
        torch.manual_seed(0)
        self.model: Any = nn.Sequential(nn.Linear(8, 15), nn.GELU(), nn.Linear(15, 4))
        self.params = list(self.model.parameters())
        self.sharded = rank is not None and "ddp" not in parts
        group: Any = None
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            for layer in (self.model[0], self.model[2], self.model):
                fully_shard(layer)
            self.params = list(self.model.parameters())
        elif rank is not None:
            self.model, group = nn.parallel.DistributedDataParallel(self.model), dist.group.WORLD
        groups: Any = self.params
        if "decay" in parts:
            groups = [
                {"params": [p for p in self.params if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in self.params if p.ndim < 2]},
            ]
        told = {"switch": SWITCH, "decoupled_weight_decay": True, "process_group": group}
        kind = FULL if recipe.full else BATCHES
        self.optimizer = FusePV(groups, lr=3e-3, **told, **kind)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(ROWS, 8, generator=generator)
        self.y = (self.x[:, :4] * self.x[:, 4:]).tanh()
        self.scaler = None
        if "scaler" in parts:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=20)

    def backward(self, step: int) -> Tensor:
        """The gradients of a step; the loss."""
        parts, full = self.recipe.parts, self.recipe.full
        rows = torch.arange(ROWS) if full else (torch.arange(BATCH) + 17 * step) % ROWS
        mine = rows if self.rank is None else rows[self.rank :: SIZE]
        self.optimizer.zero_grad()
        total = torch.zeros(())
        pieces = mine.chunk(2) if "accumulate" in parts else (mine,)
        for number, piece in enumerate(pieces, 1):
            if self.sharded:
                self.model.set_requires_gradient_sync(number == len(pieces))
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in parts):
                out = self.model(self.x[piece])
            loss = (out.float() - self.y[piece]).square().mean() / len(pieces)
            if "inf" in parts and self.rank in (None, SIZE - 1) and step in INFINITE:
                loss = loss * torch.inf
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total += loss.detach()
        if "clip" in parts:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.params, 0.05)
        return total

    def run(self) -> dict[str, Any]:
        """All parameters at the end, the phase, and GradScaler's scale."""
        rates = None
        if "cosine" in self.recipe.parts:
            rates = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 60)
        for step in range(STEPS):
            if self.recipe.full:
                self.optimizer.step(lambda step=step: self.backward(step))
            else:
                self.backward(step)
                self.optimizer.step() if self.scaler is None else self.scaler.step(self.optimizer)
                if self.scaler is not None:
                    self.scaler.update()
            if rates is not None:
                rates.step()
        wholes = [p.full_tensor() if self.sharded else p for p in self.params]
        return {
            "params": torch.cat([p.detach().reshape(-1) for p in wholes]),
            "phase": self.optimizer.phase,
            "scale": None if self.scaler is None else self.scaler.get_scale(),
        }


def recipes(rank: int | None, folder: str = "") -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps that are not taken, and of rates
        return [Loop(recipe, rank).run() for recipe in RECIPES]


def test_recipes_on_two_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    first, second = on_ranks(SIZE, tmp_path, f"{__name__}:recipes")
    alone = recipes(None)
    for recipe, ours, theirs, one in zip(RECIPES, first, second, alone, strict=True):
        assert torch.equal(ours["params"], theirs["params"]), recipe
        assert ours["params"].isfinite().all(), recipe
        assert ours["phase"] == theirs["phase"] == one["phase"] == "lbfgs", recipe
        # An infinity on one rank lowers the scale of all.
        assert ours["scale"] == theirs["scale"] == one["scale"], recipe
        if recipe.apart is not None:
            apart = float((ours["params"] - one["params"]).abs().max())
            assert apart <= recipe.apart, (recipe, apart)
