"""How long a step is beside Adam's of the same learning rate."""

from __future__ import annotations

from typing import Any

from fuse_ext.curvature.metric import longest

# Steps over which the factor rises from Adam's own length; the metric is measured meanwhile.
RISE = 20
# The factor falls as (FALL_FROM / (FALL_FROM + k))^FALL, k steps after the switch: the rate that
# stochastic approximation asks for, beginning after what used to be the first phase.
FALL_FROM, FALL = 50.0, 0.5
# Gradients that have grown so much over those of the last block of so many steps are no noise: the
# task has changed, or steps are too long. The factor is halved then, but not below Adam's own.
JUMP, RETREAT, BLOCK = 3.0, 0.5, 10

NAMES = (
    "living_steps",
    "fall_steps",
    "share",
    "held",
    "peak",
    "norm_sum",
    "block_norms",
    "last_norm",
)


class Lengths:
    """The factor on Adam's step, kept in the optimizer's state entry.

    Where nobody schedules lr, it rises to ``step_cap`` (less for rates above 1e-3, see
    :func:`~fuse_ext.curvature.metric.longest`) and falls as one over the root of the steps, which
    is a schedule that knows no horizon. Where lr has been seen to change, by a scheduler or by
    hand, its meaning is theirs: if that was in the Adam phase steps are Adam's, and if it was later
    the factor falls no further than to 1, or to what it was if that was less.

    Args:
        entry: Holds ``NAMES``: steps; those since the fall began; what jumps have left of the
            factor; the least that it may be, None while nobody schedules; its peak, of the last lr
            that nobody had changed; and of the gradient's norm the sum over a block, its steps, and
            the mean of the last block.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        self._entry = entry

    def begin(self, scheduled: bool) -> None:
        """Nothing has been stepped; ``scheduled``: lr has changed in the Adam phase."""
        self._entry.update(
            living_steps=0,
            fall_steps=0,
            share=0.0 if scheduled else 1.0,  # the least is all there is
            held=1.0 if scheduled else None,
            peak=1.0,
        )
        self.restart()

    def restart(self) -> None:
        """What was seen of gradients says nothing of the next ones."""
        self._entry.update(norm_sum=0.0, block_norms=0, last_norm=0.0)

    def hold(self, step_cap: float, lr: float) -> None:
        """lr has changed from this one: whoever changes it sees to the fall."""
        if self._entry["held"] is None:
            self._entry["held"] = min(1.0, self.factor(step_cap, lr))

    def factor(self, step_cap: float, lr: float) -> float:
        """Of the step to come, at this lr."""
        entry = self._entry
        if entry["held"] is None:
            entry["peak"] = max(longest(step_cap, lr), min(step_cap, 1.0))
        risen = min(1.0, entry["living_steps"] / RISE)
        fallen = (FALL_FROM / (FALL_FROM + entry["fall_steps"])) ** FALL
        own = (1.0 + (entry["peak"] - 1.0) * risen) * entry["share"] * fallen
        return float(max(own, entry["held"] or 0.0))

    def count(self, norm: float, step_cap: float, lr: float) -> None:
        """A step was taken on a gradient of this norm."""
        entry = self._entry
        if entry["last_norm"] and norm > JUMP * entry["last_norm"]:
            self._retreat(step_cap, lr)
        entry["living_steps"] += 1
        entry["fall_steps"] += 1
        entry["norm_sum"] += norm
        entry["block_norms"] += 1
        if entry["block_norms"] == BLOCK:
            entry.update(last_norm=entry["norm_sum"] / BLOCK, norm_sum=0.0, block_norms=0)

    def _retreat(self, step_cap: float, lr: float) -> None:
        """Half the factor, or Adam's own length from below, and the fall begins anew."""
        entry = self._entry
        self.restart()
        factor = self.factor(step_cap, lr)
        if entry["held"] is not None and factor <= 1.0:
            return
        wanted = max(1.0, RETREAT * factor)
        entry.update(fall_steps=0, share=1.0)
        entry["share"] = wanted / self.factor(step_cap, lr)
