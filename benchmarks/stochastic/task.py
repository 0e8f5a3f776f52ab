"""What an optimizer is put to: a model, a batch for every step, and a judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Task:
    """A task from a seed's start.

    Attributes:
        model: Initialised.
        batch: Draws the next step's batch; returns the loss on it, of this model or of a copy.
        judge: After so many steps: "loss" and what else is measured, each a number.
        marks: After how many steps the judge is asked; the first one is 0, the last one the end.
        note: The data, in words.
    """

    model: nn.Module
    batch: Callable[[], Loss]
    judge: Callable[[int], dict[str, float]]
    marks: tuple[int, ...]
    note: str


def even_marks(steps: int, count: int = 5) -> tuple[int, ...]:
    """The start, and after so many equal parts of the run."""
    return tuple(sorted({round(steps * i / count) for i in range(count + 1)}))
