"""Backtracking to sufficient decrease (the Armijo condition), with cubic interpolation.

Deviations from Nocedal and Wright:
    - They know only finite values. Here a trial that is not finite enters no interpolation, and
      the next one retreats from it as in the other searches.
    - The safeguard is that the next step is kept within [0.1 t, 0.5 t].

References:
    J. Nocedal and S. J. Wright, Numerical Optimization, 2nd edition, 2006, Section 3.5.
"""

import math

from fuse_ext.search.line_search import LineSearch, Reason
from fuse_ext.search.more_thuente import RETREAT, LineSearchPoint


class Armijo(LineSearch):
    r"""Backtracking with interpolation to sufficient decrease (Nocedal and Wright, Section 3.5).

    While :math:`\phi(t) > \phi(0) + c_1 t \phi'(0)`, the next step is the minimiser of the cubic
    through phi(0), phi'(0) and the last two finite trials (of the quadratic, after one), kept
    within [0.1 t, 0.5 t]. After a trial that is not finite it is 0.1 t. The step never grows, and
    slopes at trials are not used.
    """

    name = "armijo"
    needs_gradient = False

    def _begin(self, origin: LineSearchPoint) -> None:
        self._previous: LineSearchPoint | None = None

    def _accepts(self, trial: LineSearchPoint) -> Reason | None:
        return "armijo" if self._decreases(trial) else None

    def _advance(self, trial: LineSearchPoint) -> float | Reason:
        if trial.loss == math.inf:
            step = RETREAT * trial.step
        else:
            step = min(max(self._interpolate(trial), 0.1 * trial.step), 0.5 * trial.step)
            self._previous = trial
        return step if step >= self.options.step_min else "min_step"

    def _interpolate(self, trial: LineSearchPoint) -> float:
        """Minimiser of ``f0 + slope0 t + b t^2 + a t^3`` through the last trials (one: a = 0)."""
        slope0 = self._origin.slope
        b = self._curvature(trial)
        a = 0.0
        if self._previous is not None:
            a = (self._curvature(self._previous) - b) / (self._previous.step - trial.step)
            b -= a * trial.step
        # The root of slope0 + 2 b t + 3 a t^2 in the form that allows a = 0.
        denominator = b + math.sqrt(max(0.0, b * b - 3.0 * a * slope0))
        return -slope0 / denominator if denominator > 0.0 else trial.step

    def _curvature(self, point: LineSearchPoint) -> float:
        """``(phi(t) - phi(0) - t phi'(0)) / t^2``, which is b + a t for the cubic."""
        return ((point.loss - self._origin.loss) / point.step - self._origin.slope) / point.step
