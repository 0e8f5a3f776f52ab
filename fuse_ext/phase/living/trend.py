"""Whether losses have stayed above those that Adam came with."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

# Losses are averaged over so many steps; the first such block is of Adam's own lengths and metric.
BLOCK = 20
# A mean is above another by more than noise at so many standard errors of their difference; one
# block in 700 would be by chance, if losses were normal, and so many in a row are not.
ERRORS, BLOCKS = 3.0, 5

NAMES = (
    "loss_sum",
    "loss_squares",
    "loss_steps",
    "loss_origin",
    "level",
    "level_variance",
    "blocks_above",
)


class Block(NamedTuple):
    """The losses of ``BLOCK`` steps: their mean, from the first loss of all on, and variance."""

    mean: float
    variance: float


class Trend:
    """The mean loss of block after block beside that of the first one.

    Args:
        entry: The optimizer's state entry; holds ``NAMES``: of the block at hand, sums of losses
            and of their squares, and its steps; what losses are counted from, which is the first
            of them (NaN before); of the first block, mean (NaN before) and variance; and how many
            blocks in a row were above it.

    Attributes:
        block: That has ended with the last loss; None where none has.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        self._entry = entry
        self.block: Block | None = None

    def restart(self) -> None:
        """The next block is the first one."""
        self._entry.update(
            loss_sum=0.0,
            loss_squares=0.0,
            loss_steps=0,
            loss_origin=math.nan,
            level=math.nan,
            level_variance=0.0,
            blocks_above=0,
        )

    def worse(self, loss: float) -> bool:
        """Takes in a loss; whether ``BLOCKS`` blocks in a row were above the first one by now."""
        entry, self.block = self._entry, None
        if math.isnan(entry["loss_origin"]):
            entry["loss_origin"] = loss
        deviation = loss - entry["loss_origin"]
        entry["loss_sum"] += deviation
        entry["loss_squares"] += deviation * deviation
        entry["loss_steps"] += 1
        if entry["loss_steps"] < BLOCK:
            return False
        mean = entry["loss_sum"] / BLOCK
        variance = max(0.0, entry["loss_squares"] / BLOCK - mean * mean) * BLOCK / (BLOCK - 1)
        self.block = Block(mean, variance)
        entry.update(loss_sum=0.0, loss_squares=0.0, loss_steps=0)
        if math.isnan(entry["level"]):
            entry.update(level=mean, level_variance=variance)
            return False
        error = math.sqrt((variance + entry["level_variance"]) / BLOCK)
        above = mean > entry["level"] + ERRORS * error
        entry["blocks_above"] = entry["blocks_above"] + 1 if above else 0
        if entry["blocks_above"] < BLOCKS:
            return False
        entry["blocks_above"] = 0
        return True
