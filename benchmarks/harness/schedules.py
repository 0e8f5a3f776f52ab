"""Learning-rate schedules over a run of known length, the same for every optimizer."""

from __future__ import annotations

import math
from typing import Any

SCHEDULES = {
    "constant": "constant",
    "cosine": "cosine",
    "cosine_10": "cosine to 10%",
    "warmup_cosine": "warm-up, cosine",
}
WARM_UP = 0.05  # of the steps


def factor(name: str, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at a step, counted from 0; the last value stays.

    Args:
        name: A key of ``SCHEDULES``. The warm-up is linear and takes ``WARM_UP`` of the steps.
        step: From 0.
        steps: Of the run.

    Raises:
        ValueError: No such schedule.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule must be one of {sorted(SCHEDULES)}, got {name!r}")
    if name == "constant":
        return 1.0
    warm = warm_up_steps(steps) if name == "warmup_cosine" else 0
    if step < warm:
        return (step + 1) / warm
    end = 0.1 if name == "cosine_10" else 0.0
    share = min((step - warm) / max(1, steps - warm), 1)
    return end + (1 - end) * (1 + math.cos(math.pi * share)) / 2


def warm_up_steps(steps: int) -> int:
    """Those of a run of so many that a warm-up takes."""
    return round(WARM_UP * steps)


class Schedule:
    """Sets the learning rates of an optimizer, whichever object it is, before each step.

    Args:
        optimizer: Anything with ``param_groups``.
        name: A key of ``SCHEDULES``.
        steps: Of the run.
    """

    def __init__(self, optimizer: Any, name: str, steps: int) -> None:
        self.optimizer, self.name, self.steps = optimizer, name, steps
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> None:
        """For the step of this number, from 0."""
        times = factor(self.name, step, self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * times
