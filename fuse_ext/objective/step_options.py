"""What one step of the L-BFGS engine is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fuse_ext.vector.flat import FlatParams


@dataclass(frozen=True)
class LbfgsOptions:
    """What one step needs to know; see :class:`fuse_ext.LBFGS` for the meanings.

    Attributes:
        lr: First trial step (the step itself without a line search).
        lr_scale: Share of each parameter in a step; empty for 1.
        weight_decay: L2 coefficient of each parameter; empty for 0.
        maximize: Ascend.
        ascends: Instead, whether to ascend in each parameter, where not all do alike; only on
            averages.
        max_iter, max_eval: Budget of one call of ``step``. Where it begins counts as one
            evaluation, made or remembered.
        tolerance_grad, tolerance_change, rtol: When to stop; 0 for never.
        line_search: Name, or None for a fixed step.
        curvature_tol: Pairs need s.y > curvature_tol |s| |y|.
        deterministic: The closure is the same function at every call.
        same_batch_pairs: Without a line search, evaluate the closure once more after the last
            step, so that no pair mixes two batches.
        pairs_elsewhere: The caller completes the pairs.
        zero_freezes: A parameter with share 0 takes no part in a step, as if it had no gradient.
            False where something else moves it as well (Fuse).
    """

    lr: float = 1.0
    lr_scale: list[float] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)
    maximize: bool = False
    ascends: list[bool] = field(default_factory=list)
    max_iter: int = 1
    max_eval: int = 25
    tolerance_grad: float = 0.0
    tolerance_change: float = 0.0
    rtol: float = 0.0
    line_search: str | None = "strong_wolfe"
    curvature_tol: float = 1e-8
    deterministic: bool = False
    same_batch_pairs: bool = True
    pairs_elsewhere: bool = False
    zero_freezes: bool = True

    @cached_property
    def freezing(self) -> list[float] | None:
        """Shares of which those that are 0 freeze a parameter; None where none is.

        With lr = 0 for all nothing moves, and nothing else changes.
        """
        freezes = self.zero_freezes and self.lr != 0.0 and 0.0 in self.lr_scale
        return self.lr_scale if freezes else None

    @cached_property
    def needs_loss(self) -> str:
        """What needs the closure's loss, in words; empty where nothing does."""
        if self.line_search is not None:
            return f"the line search {self.line_search!r}"
        return f"rtol={self.rtol:g}" if self.rtol else ""

    @cached_property
    def objective(self) -> tuple[Any, ...]:
        """The options that the objective depends on."""
        frozen = None if self.freezing is None else [share == 0.0 for share in self.freezing]
        return self.maximize, self.weight_decay, frozen


def spread_lr(flat: FlatParams, lrs: list[float]) -> tuple[float, list[float]]:
    """One step length for all groups, and each parameter's share of it."""
    largest = max(lrs)
    shares = [lr / largest if largest > 0.0 else 0.0 for lr in lrs]
    return largest, flat.per_segment(shares, 1.0)
