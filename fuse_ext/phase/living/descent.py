"""Whether losses on batches still fall beyond noise, and whether they look like batches at all."""

from __future__ import annotations

import math
from typing import Any

from fuse_ext.phase.living.trend import BLOCK, Block

# Losses fall where the last quarter of the steps since lengths began is so many standard errors
# below the quarter before it: one time in 44 by chance. So many means are kept, each of a block of
# steps, and two made one where they are more: quarters grow with the steps, and slow falls show.
LOWER, MEANS = 2.0, 16
# Independent losses turn at two of three, in a block 13 times give or take 1.9; those of one
# function, on which an optimizer makes its way, seldom.
SMOOTH = 6

NAMES = ("falling", "means", "last_loss", "last_change", "turns")


class Descent:
    """Losses of step after step.

    Args:
        entry: The optimizer's state entry; holds ``NAMES``, which checkpoints of before lack: 1
            while losses fall, else 0; mean, variance and number of blocks after blocks; the last
            loss (NaN before), by how much it was above the one before, and how often losses have
            turned in the block at hand.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        self._entry = entry

    def restart(self) -> None:
        """What was seen says nothing of the losses to come, which fall until that is seen."""
        self._entry.update(falling=1, means=[], last_loss=math.nan, last_change=0.0, turns=0)

    def forget(self) -> None:
        """A step whose loss nobody told: those of before are not followed by the next ones."""
        if not math.isnan(self._entry.get("last_loss", math.nan)):
            self.restart()

    @property
    def falling(self) -> bool:
        """Whether losses fall beyond noise; False while none is known."""
        return bool(self._entry.get("falling")) and not math.isnan(self._entry["last_loss"])

    def smooth(self, loss: float, block: Block | None) -> bool:
        """Takes in a loss, and the block that ends with it; whether losses seldom turned in it."""
        entry = self._entry
        if "means" not in entry:
            self.restart()
        change = loss - entry["last_loss"]
        # The same value twice, as losses of few digits have it, is no turn.
        entry["turns"] += change * entry["last_change"] < 0.0
        entry["last_loss"] = loss
        if change < 0.0 or change > 0.0:
            entry["last_change"] = change
        if block is None:
            return False
        self._compare(block)
        turns, entry["turns"] = entry["turns"], 0
        return bool(turns <= SMOOTH)

    def _compare(self, block: Block) -> None:
        entry = self._entry
        means = [*entry["means"], [block.mean, block.variance, 1]]
        width = means[0][2]
        if len(means) > 1 and (last := means[-2])[2] < width:  # not full yet
            means[-2:] = [_merged(last, means[-1])]
        if len(means) == MEANS and means[-1][2] == width:
            means = [_merged(a, b) for a, b in zip(means[::2], means[1::2], strict=True)]
        entry["means"] = means
        if quarter := len(means) // 4:
            late, late_error = _mean_of(means[-quarter:])
            early, early_error = _mean_of(means[-2 * quarter : -quarter])
            entry["falling"] = int(late < early - LOWER * math.hypot(late_error, early_error))


def _merged(a: list[float], b: list[float]) -> list[float]:
    """Mean, mean variance and number of blocks of both."""
    number = a[2] + b[2]
    return [*((x * a[2] + y * b[2]) / number for x, y in zip(a[:2], b[:2], strict=True)), number]


def _mean_of(means: list[list[float]]) -> tuple[float, float]:
    """Of all their losses, with its standard error."""
    whole = means[0]
    for one in means[1:]:
        whole = _merged(whole, one)
    mean, variance, number = whole
    return mean, math.sqrt(variance / (number * BLOCK))
