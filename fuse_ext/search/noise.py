"""What rounding hides from L-BFGS: noise in the loss, the floor, steps too short to be seen."""

from __future__ import annotations

import math
import sys
from typing import Any

# Noise of the loss at the start, in roundings of it: Hager and Zhang's 1e-6 in float32.
FIRST_NOISE = 8
# It grows by at least this factor where a line search fails for it, as in Hager and Zhang's
# CG_DESCENT (Algorithm 851, ACM TOMS 32(1), 2006, pp. 113-137), up to this share of the loss: a
# loss that goes up by more may as well have other slopes than it says.
NOISE_GROWTH = 10.0
UNSEEN_NOISE = 1e-3
# Where trials have shown that it is noise it grows no faster than it must, up to this share. Sums
# of squares that go to 0 are so noisy while their slopes have correct digits: float32 convection
# had 0.5% at 1e-6 where slopes were right to 3%, and fell to 1e-8 by them, with 5% of noise.
LARGEST_NOISE = 0.1
# Beside what was learnt from neighbouring trials the lowest loss is that of the luckiest point so
# far: the others lie above it by so many times the noise, at least.
LUCK = 2.0
# The floor is reached where the loss has not fallen by more than so many roundings of it, nor the
# squared gradient to this share, ...
VISIBLE_FALL, LESS_GRADIENT = 2.0, 0.25
# ... for as many evaluations as it took to get there, but at least and at most so many: fewer are
# spent on a single hard search, and a slow valley shows within the second number.
FLOOR_EVALUATIONS = (20, 200)
# Sums of squares have lost all their digits at so many squared roundings of the loss they began at:
# a residual of the order of 1 is only known to a rounding.
NO_DIGITS = 1e3
# A loss that has come down to so many roundings of where it began goes to 0, as sums of squares of
# exact data do: rounding may then hide all of what is left.
GOES_TO_ZERO = 100.0

# Where rounding ends a run that was still falling, what it fell by in the last of these intervals,
# each so large a share of the run, is compared with the fall in the one before.
TREND_INTERVAL = 1.0 / 8.0
TREND_MARKS = 3

# The state that a Precision keeps in the optimizer's state entry. (The last one is of older
# checkpoints.)
PRECISION_NAMES = (
    "loss_noise",
    "least_loss",
    "least_square",
    "first_loss",
    "lowest_loss",
    "spent",
    "spent_at_least",
    "trend",
    "iterations_since_least",
)
# What the floor's test knows before the first step: nothing.
NEW_FLOOR = {
    "least_loss": math.inf,
    "least_square": math.inf,
    "lowest_loss": math.inf,
    "spent": 0,
    "spent_at_least": 0,
    "trend": [],  # replaced, never changed in place
}


class Precision:
    """How exact losses are, learnt from the run; kept in the optimizer's state entry.

    Args:
        entry: Holds ``loss_noise``, relative to the loss; the loss that the objective was first
            met at; the lowest it has ended a step at, now and at the last ends of intervals; the
            least loss and squared gradient of the floor's test, the evaluations ``spent`` on it,
            and when the least were found. (An evaluation that is remembered counts as spent, so
            that a run that was saved goes on as if it had not been.)
        eps: Rounding of the parameters' dtype.
    """

    def __init__(self, entry: dict[str, Any], eps: float) -> None:
        self._entry = entry
        entry.setdefault("loss_noise", FIRST_NOISE * eps)
        self._eps = eps
        # Of the step under way: one that is not completed has not been.
        self._spending = 0
        if "spent" not in entry:
            self.forget_least()
        entry.setdefault("trend", [])  # of an older checkpoint

    @property
    def noise(self) -> float:
        """Of the loss, relative to it."""
        noise: float = self._entry["loss_noise"]
        return noise

    @property
    def noise_at_a_point(self) -> float:
        """Of calls at one point: what neighbouring points differ by need not be in it."""
        return min(self.noise, UNSEEN_NOISE)

    @property
    def _luck(self) -> float:
        """By how much, relative to it, losses may lie above the lowest for noise alone."""
        return max(min(NOISE_GROWTH * self.noise, NOISE_GROWTH * UNSEEN_NOISE), LUCK * self.noise)

    @property
    def is_double(self) -> bool:
        """Whether no dtype is more exact."""
        return self._eps <= sys.float_info.epsilon

    @property
    def hidden(self) -> float:
        """What rounding may hide of the least loss.

        Its noise, or all of it where it goes to 0. A run in a long valley is ended by rounding
        that is more than an iteration gains, and not more than many gain: where it was still
        falling, the falls of the last intervals continued as a geometric series.
        """
        least, first = abs(self._entry["lowest_loss"]), self._entry["first_loss"]
        if not math.isfinite(least):
            return 0.0
        if least < GOES_TO_ZERO * self._eps * first:
            return least
        return min(max(self.noise * least, self._still_to_fall()), least)

    def _still_to_fall(self) -> float:
        """The sum of that series; 0 where the last fall is no more than noise."""
        lowest, marks = self._entry["lowest_loss"], self._entry["trend"]
        if len(marks) < TREND_MARKS:
            return 0.0
        (_, oldest), (_, newer), _ = marks
        before, last = oldest - newer, newer - lowest
        if not last > self._luck * abs(lowest):
            return 0.0
        return last / (1.0 - last / before) if last < before else math.inf

    def learn(self, needed: float, shown: bool) -> bool:
        """Takes in the noise that would explain why a search failed.

        ``shown``: its trials tell noise from slopes that are wrong.

        Returns:
            Whether that can be noise, and more of it than was known of: the search may be
            repeated.
        """
        largest = LARGEST_NOISE if shown else UNSEEN_NOISE
        if not self.noise < needed <= largest:
            return False
        grown = min(NOISE_GROWTH * self.noise, UNSEEN_NOISE)
        self._entry["loss_noise"] = min(max(2.0 * needed, grown), largest)
        return True

    def doubt(self) -> None:
        """What trials have shown may be another function at each call."""
        self._entry["loss_noise"] = self.noise_at_a_point

    def begin_step(self, spending: int) -> None:
        """So much is spent by its first evaluation, made or remembered, and nothing else yet."""
        self._spending = spending

    def spend(self) -> None:
        """Counts an evaluation."""
        self._spending += 1

    def end_step(self, loss: float) -> None:
        """What was spent has been, and led here (NaN where the loss is not known)."""
        entry = self._entry
        spent = entry["spent"] = entry["spent"] + self._spending
        self._spending = 0
        if loss < entry["lowest_loss"]:
            entry["lowest_loss"] = loss
        marks = entry["trend"]
        if not marks or spent > (1.0 + TREND_INTERVAL) * marks[-1][0]:
            entry["trend"] = [*marks, [spent, entry["lowest_loss"]]][-TREND_MARKS:]

    def is_low(self, loss: float) -> bool:
        """Whether but for noise no lower loss is known."""
        lowest = self._entry["lowest_loss"]
        return math.isinf(lowest) or loss <= lowest + self._luck * abs(lowest)

    def at_floor(self, loss: float, square: float) -> bool:
        """Takes in the point reached; whether loss and gradient have long stopped to fall."""
        entry, spent = self._entry, self._entry["spent"] + self._spending
        visible = VISIBLE_FALL * self._eps * abs(loss)
        if loss < entry["least_loss"] - visible or square < LESS_GRADIENT * entry["least_square"]:
            entry["least_loss"] = min(loss, entry["least_loss"])
            entry["least_square"] = min(square, entry["least_square"])
            entry["spent_at_least"] = spent
            return False
        low, high = FLOOR_EVALUATIONS
        patience = min(max(entry["spent_at_least"], low), high)
        return bool(spent - entry["spent_at_least"] >= patience)

    def without_digits(self, loss: float) -> bool:
        """Whether a sum of squares that has come down to this loss is nothing but rounding."""
        return bool(abs(loss) < NO_DIGITS * self._eps**2 * self._entry["first_loss"])

    def begin(self, loss: float) -> None:
        """Takes in the loss where a step begins."""
        if math.isfinite(loss) and not self._entry["first_loss"]:
            self._entry["first_loss"] = abs(loss)

    def forget_least(self) -> None:
        """Another objective has another floor."""
        self._entry.update(NEW_FLOOR, first_loss=0.0)

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
