"""Whether a closure is one function after all, found out by calling it twice at one point."""

from __future__ import annotations

import math
from typing import Any

import torch

from fuse_ext.kernels.ops import Ops
from fuse_ext.search.one_function import Values, agree
from fuse_ext.vector.flat import FlatParams
from fuse_ext.vector.gradients import GradStats, grad_stats_into


class Watch:
    """Compares two calls at one point: the loss and the norms of the gradient.

    Args:
        flat: The parameters, which must not move between the two calls.
        ops: Kernels to use.
        entry: The optimizer's state entry: holds ``watched_loss`` (NaN before the first call) while
            there is something to find out, and ``watched_grad``.
    """

    NAMES = ("watched_loss", "watched_grad")

    def __init__(self, flat: FlatParams, ops: Ops, entry: dict[str, Any]) -> None:
        self._flat, self._ops, self._entry = flat, ops, entry

    def begin(self) -> None:
        """The next two calls are compared."""
        self._entry["watched_loss"] = math.nan

    def give_up(self) -> None:
        """There is no finding out."""
        self._entry.pop("watched_loss", None)

    @property
    def on(self) -> bool:
        """Whether it is not known yet."""
        return "watched_loss" in self._entry

    def tell(self, loss: float) -> bool | None:
        """Takes in a call; whether it is one function, None while that is not known."""
        entry, flat = self._entry, self._flat
        stats = torch.zeros(len(GradStats._fields), dtype=torch.float64, device=flat.device)
        grad_stats_into(flat, self._ops, stats)
        norms = GradStats(*stats.tolist())
        now = Values(loss, norms.square, norms.abs_sum)
        before = Values(entry["watched_loss"], *entry.get("watched_grad", (math.nan, math.nan)))
        if not before.finite and now.finite:
            entry["watched_loss"], entry["watched_grad"] = now.loss, [now.square, now.abs_sum]
            return None
        del entry["watched_loss"]
        entry.pop("watched_grad", None)
        return bool(now.finite and agree(before, now))
