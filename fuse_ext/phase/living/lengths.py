"""How long a step is beside Adam's of the same learning rate."""

from __future__ import annotations

import math
from typing import Any

from fuse_ext.vector.flat import ParamGroup

# Steps over which the factor rises from Adam's own length; the metric is measured meanwhile.
RISE = 20
# The factor falls as (FALL_FROM / (FALL_FROM + k))^FALL, k steps after the switch: the rate that
# stochastic approximation asks for, beginning after what used to be the first phase.
FALL_FROM, FALL = 50.0, 0.5
# Gradients that are so much longer over a block of steps than they were on average, in logarithms,
# which no single batch can move far, are no noise: the task has changed, or steps are too long.
JUMP, BLOCK = 3.0, 10
# From this lr on the peak does not grow with Adam's steps, until it has come down to their length.
LARGEST_LR = 1e-3
# What that leaves of the peak where steps were longer than Adam's; and the weight of a block.
RETREAT, BLOCK_WEIGHT = 0.5, 0.2

NAMES = (
    "living_steps",
    "fall_steps",
    "share",
    "held",
    "peak",
    "log_sum",
    "block_steps",
    "usual_log",
)


class Lengths:
    """The factor on Adam's step, kept in the optimizer's state entry.

    Where nobody schedules lr, it rises to ``step_cap`` (less for rates above 1e-3, see
    :func:`longest`) and falls as one over the root of the steps, which
    is a schedule that knows no horizon. Where lr has been seen to change, by a scheduler or by
    hand, its meaning is theirs: if that was in the Adam phase steps are Adam's, and if it was later
    the factor falls no further than to 1, or to what it was if that was less.

    Args:
        entry: Holds ``NAMES``: steps since the lengths began; the same for the fall; what jumps
            have left of the rise; the least that the factor may be, None while nobody schedules;
            its peak, of the last lr that nobody had changed; and of the gradient's norm the sum of
            logarithms over a block, its steps, and the usual mean, None before the first.
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
        self._entry.update(log_sum=0.0, block_steps=0, usual_log=None)

    def shorten(self) -> bool:
        """To Adam's own lengths at most; whether steps may have been longer."""
        longer = self._entry["share"] > 0.0
        self._entry["share"] = 0.0
        return longer

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
        own = (1.0 + (entry["peak"] - 1.0) * risen * entry["share"]) * fallen
        return float(max(own, entry["held"] or 0.0))

    def count(self, norm: float, step_cap: float, lr: float, falling: bool = False) -> bool:
        """A step was taken on a gradient of this norm; whether lengths begin anew.

        ``falling``: whether losses fall beyond noise. Then Adam's own length is none too long.
        """
        entry = self._entry
        if not falling or self.factor(step_cap, lr) > 1.0:
            entry["fall_steps"] += 1
        entry["living_steps"] += 1
        if norm > 0.0:
            entry["log_sum"] += math.log(norm)
            entry["block_steps"] += 1
        if entry["block_steps"] < BLOCK:
            return False
        mean, usual = entry["log_sum"] / BLOCK, entry["usual_log"]
        entry.update(log_sum=0.0, block_steps=0)
        if usual is None:
            entry["usual_log"] = mean
        elif mean > usual + math.log(JUMP):
            entry["usual_log"] = mean
            self._begin_anew(step_cap, lr)
            return True
        else:
            entry["usual_log"] = usual + BLOCK_WEIGHT * (mean - usual)
        return False

    def _begin_anew(self, step_cap: float, lr: float) -> None:
        """As after the switch; to half the rise, where steps longer than Adam's may be why."""
        entry = self._entry
        if self.factor(step_cap, lr) > 1.0:
            entry["share"] *= RETREAT
        if entry["held"] is None:
            entry.update(living_steps=0, fall_steps=0)


def longest(step_cap: float, lr: float) -> float:
    """The longest step at this lr, in lengths of Adam's."""
    if lr <= LARGEST_LR:
        return step_cap
    return min(step_cap, max(1.0, step_cap * LARGEST_LR / lr))


def rates(groups: list[ParamGroup]) -> list[float]:
    """The lr of every group. Lengths are of the largest: the others' steps are shorter anyway."""
    return [float(group["lr"]) for group in groups]


def have_changed(before: list[float] | float, now: list[float]) -> bool:
    """Whether a group's lr is another than it was; groups that were added have changed nothing.

    ``before`` is that of the first group alone in checkpoints of before all were looked at.
    """
    known = before if isinstance(before, list) else [before]
    return any(one != other for one, other in zip(known, now, strict=False))
