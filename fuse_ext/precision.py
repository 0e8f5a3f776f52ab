"""What rounding hides from L-BFGS: noise in the loss, the floor, steps too short to be seen."""

from __future__ import annotations

import math
from typing import Any

# Noise of the loss at the start, in roundings of it: Hager and Zhang's 1e-6 in float32.
FIRST_NOISE = 8
# It grows by at least this factor where a line search fails for it, as in Hager and Zhang's
# CG_DESCENT (Algorithm 851, ACM TOMS 32(1), 2006, pp. 113-137), up to this share of the loss.
NOISE_GROWTH = 10.0
LARGEST_NOISE = 1e-3
# So many iterations in a row without a new least loss or gradient are the floor.
FLOOR_ITERATIONS = 100

# The state that a Precision keeps in the optimizer's state entry.
PRECISION_NAMES = ("loss_noise", "least_loss", "least_square", "iterations_since_least")


class Precision:
    """How exact losses are, learnt from the run; kept in the optimizer's state entry.

    Args:
        entry: Holds ``loss_noise``, relative to the loss, and the least loss and squared gradient.
        eps: Rounding of the parameters' dtype.
    """

    def __init__(self, entry: dict[str, Any], eps: float) -> None:
        self._entry = entry
        entry.setdefault("loss_noise", FIRST_NOISE * eps)
        self._eps = eps
        if "least_loss" not in entry:
            self.forget_least()

    @property
    def noise(self) -> float:
        """Of the loss, relative to it."""
        noise: float = self._entry["loss_noise"]
        return noise

    def learn(self, needed: float) -> bool:
        """Takes in the noise that would explain why a search failed.

        Returns:
            Whether that can be noise, and more of it than was known of: the search may be
            repeated.
        """
        if not self.noise < needed <= LARGEST_NOISE:
            return False
        self._entry["loss_noise"] = min(max(2.0 * needed, NOISE_GROWTH * self.noise), LARGEST_NOISE)
        return True

    def at_floor(self, loss: float, square: float) -> bool:
        """Takes in an iterate; whether loss and gradient have long stopped to fall."""
        entry = self._entry
        entry["iterations_since_least"] += 1
        for name, value in (("least_loss", loss), ("least_square", square)):
            if value < entry[name]:
                entry[name] = value
                entry["iterations_since_least"] = 0
        return bool(entry["iterations_since_least"] >= FLOOR_ITERATIONS)

    def forget_least(self) -> None:
        """Another objective has another floor."""
        self._entry.update(least_loss=math.inf, least_square=math.inf, iterations_since_least=0)

    def visible_step(self, x_max: float, g_max: float, square: float, loss: float | None) -> float:
        """The shortest step along -g whose effect rounding does not hide.

        torch.optim.LBFGS begins with a step of 1-norm 1, which a float32 sum over many parameters
        may lose. As in the first step of Hager and Zhang (2005, I0), the parameters' and the
        loss's own size are the scale: the largest element of the step is sqrt(eps) of the largest
        parameter, where a difference of gradients has the most correct digits (Nocedal and
        Wright, Section 8.1), or more, up to their 0.01, where the loss would change by less than
        100 roundings.

        Args:
            x_max: max |x|.
            g_max: max |g|, positive.
            square: g.g
            loss: f; None if it does not matter.
        """
        step = math.sqrt(self._eps) * x_max / g_max
        if loss is not None:
            longest = 0.01 * x_max / g_max if x_max > 0.0 else math.inf
            step = max(step, min(100.0 * self._eps * abs(loss) / square, longest))
        return step if math.isfinite(step) else 0.0
