"""The trial steps of Moré and Thuente's line search: their updating and their four cases.

Deviations from the paper:
    - It knows only finite values. Here a trial with loss +inf closes the bracket, and there is no
      point in closing in on such a bound: a search is content ("interval_too_small") with a step
      of at least 0.9 times it.
    - An interpolation that is not a number (an infinite end, or one that overflowed) is replaced
      by bisection.

References:
    J. J. Moré and D. J. Thuente, Line search algorithms with guaranteed sufficient decrease, ACM
    Transactions on Mathematical Software 20(3), 1994, pp. 286-307.
"""

import math
from typing import Literal, NamedTuple, TypeAlias

# A trial that is not finite is followed by one this far along from the best step towards it: eight
# retreats lead from t = 1 to t = 1e-8.
RETREAT = 0.1

# Why there is no next trial: see fuse_ext.search.line_search.Reason.
StopReason: TypeAlias = Literal["interval_too_small", "no_progress", "max_step", "min_step"]


class LineSearchPoint(NamedTuple):
    """A step with the value and derivative of phi there."""

    step: float
    loss: float
    slope: float


class MoreThuente:
    r"""Chooses the trial steps of Moré and Thuente (1994).

    The state is an interval with ends ``best`` (the least loss so far) and ``other``, a bracket
    once ``other`` is set. Each trial replaces an end and yields the next one by interpolation.
    A trial that is below ``best`` without sufficient decrease is judged by the auxiliary function

    .. math:: \psi(t) = \phi(t) - \phi(0) - c_1 t \phi'(0)

    instead of phi (Section 2, where this is the first of two stages: it cannot happen any more
    once a trial had sufficient decrease and a slope that was not negative).

    The paper knows only finite values. Here a trial with loss +inf closes the bracket like any
    higher value, the next one retreats from it by :data:`RETREAT`, and a bracket with such an end
    is small enough at a relative width of 0.1.

    Args:
        c1: Sufficient decrease.
        xtol: Least relative width of the bracket.
        step_min: Smallest trial step.
        step_max: Largest trial step.
    """

    # Constants of the authors' code. Beyond an unbracketed trial the next one lies this many times
    # the trial's distance from the best; two trials have to shrink the bracket by the last one.
    _EXTRAPOLATE_MIN = 1.1
    _EXTRAPOLATE_MAX = 4.0
    _SHRINK = 0.66
    _XTOL_NON_FINITE = 0.1

    def __init__(self, c1: float, xtol: float, step_min: float, step_max: float) -> None:
        self.c1 = c1
        self.xtol = xtol
        self.step_min = float(step_min)
        self.step_max = float(step_max)

    def begin(self, origin: LineSearchPoint) -> None:
        """Start from phi(0), phi'(0)."""
        self._origin = origin
        self._best = origin
        self._other: LineSearchPoint | None = None
        width = self.step_max - self.step_min
        self._widths = (2.0 * width, width)  # of the bracket, the last two

    def advance(self, trial: LineSearchPoint) -> float | StopReason:
        """Take in a trial; return the next step, or the reason why there is none."""
        least_slope = self.c1 * self._origin.slope
        decreases = trial.loss <= self._origin.loss + trial.step * least_slope
        if trial.step >= self.step_max and decreases and trial.slope <= least_slope:
            return "max_step"
        if trial.step <= self.step_min and not (decreases and trial.slope < least_slope):
            return "min_step"
        by_psi = not decreases and trial.loss <= self._best.loss
        step = self._update(trial, tilt=least_slope if by_psi else 0.0)
        best, other = self._best, self._other
        if other is None:
            return min(max(step, self.step_min), self.step_max)
        width = abs(other.step - best.step)
        too_wide = width >= self._SHRINK * self._widths[0] and trial.loss < math.inf
        # Not a number: an interpolation with an infinite end, or one that overflowed.
        if too_wide or math.isnan(step):
            step = best.step + 0.5 * (other.step - best.step)
        self._widths = (self._widths[1], width)
        step = min(max(step, self.step_min), self.step_max)
        low, high = sorted((best.step, other.step))
        xtol = self.xtol if other.loss < math.inf else max(self.xtol, self._XTOL_NON_FINITE)
        if high - low <= xtol * high:
            return "interval_too_small"
        return step if low < step < high else "no_progress"

    def _update(self, trial: LineSearchPoint, tilt: float) -> float:
        """Replace an end of the interval by the trial; return the interpolated next step.

        With ``tilt`` 0 losses and slopes are those of phi, with c1 phi'(0) those of psi.
        """
        best, other = self._best, self._other
        x, t = _tilted(best, tilt), _tilted(trial, tilt)
        y = None if other is None else _tilted(other, tilt)
        turned = min(x.slope, t.slope) < 0.0 < max(x.slope, t.slope)

        if t.loss > x.loss:
            self._other = trial
            return x.step + RETREAT * (t.step - x.step) if t.loss == math.inf else _case_1(x, t)
        self._best = trial
        if turned:
            self._other = best
            return _case_2(x, t)
        if y is not None:
            return _case_3_inside(x, t, y) if abs(t.slope) < abs(x.slope) else _case_4(t, y)
        beyond = t.step - x.step
        low = t.step + self._EXTRAPOLATE_MIN * beyond if x.step > 0.0 else 0.0
        high = t.step + self._EXTRAPOLATE_MAX * beyond
        if abs(t.slope) < abs(x.slope):
            return min(max(_case_3_beyond(x, t, high), low), high)
        return high


def _tilted(point: LineSearchPoint, tilt: float) -> LineSearchPoint:
    """The point of ``phi(t) - tilt t``."""
    step, loss, slope = point
    return LineSearchPoint(step, loss - step * tilt, slope - tilt)


# The four cases of Section 4 of the paper: x is the best end of the interval, y the other end,
# t the trial. Below, the cubic is the one through both values and slopes of two points, the
# quadratic goes through two values and a slope, and the secant step is that of two slopes.


def _case_1(x: LineSearchPoint, t: LineSearchPoint) -> float:
    """A higher loss: the cubic if it is closer to x than the quadratic, else their mean."""
    cubic = _cubic(x, t)
    chord = _divide(t.loss - x.loss, t.step - x.step)
    quadratic = x.step + 0.5 * _divide(x.slope, x.slope - chord) * (t.step - x.step)
    if abs(cubic - x.step) <= abs(quadratic - x.step):
        return cubic
    return cubic + 0.5 * (quadratic - cubic)


def _case_2(x: LineSearchPoint, t: LineSearchPoint) -> float:
    """No higher loss, slopes of opposite sign: the cubic or the secant, the farther from t."""
    return max(_cubic(t, x), _secant(t, x), key=lambda step: abs(step - t.step))


def _case_3_beyond(x: LineSearchPoint, t: LineSearchPoint, limit: float) -> float:
    """A flatter slope of the same sign, no bracket: the farther of cubic and secant."""
    return max(_cubic_beyond(x, t, limit), _secant(t, x))


def _case_3_inside(x: LineSearchPoint, t: LineSearchPoint, y: LineSearchPoint) -> float:
    """A flatter slope of the same sign in a bracket: the closer of cubic and secant.

    The step goes at most 0.66 of the way from t to y.
    """
    cubic = _cubic_beyond(x, t, y.step)
    step = min(_secant(t, x), cubic, key=lambda step: abs(step - t.step))
    farthest = t.step + 0.66 * (y.step - t.step)
    return min(step, farthest) if t.step > x.step else max(step, farthest)


def _case_4(t: LineSearchPoint, y: LineSearchPoint) -> float:
    """A slope of the same sign that is no flatter, in a bracket: the cubic of t and y."""
    return _cubic(t, y)


def _cubic(a: LineSearchPoint, b: LineSearchPoint) -> float:
    """Minimiser of the cubic through a and b. NaN if it is not defined."""
    return a.step + _cubic_fraction(a, b)[0] * (b.step - a.step)


def _cubic_beyond(x: LineSearchPoint, t: LineSearchPoint, otherwise: float) -> float:
    """Minimiser of the cubic through x and t if there is one beyond t."""
    fraction, root = _cubic_fraction(t, x)
    if fraction < 0.0 and root != 0.0:
        return t.step + fraction * (x.step - t.step)
    return otherwise


def _cubic_fraction(a: LineSearchPoint, b: LineSearchPoint) -> tuple[float, float]:
    """Where from a (0) to b (1) the cubic has its minimiser, and the root in the formula.

    Nocedal and Wright, Equation 3.59, scaled against overflow. A root of 0 means that the cubic
    is monotone, a fraction of NaN that the formula is not defined.
    """
    theta = _divide(3.0 * (a.loss - b.loss), b.step - a.step) + a.slope + b.slope
    scale = max(abs(theta), abs(a.slope), abs(b.slope))
    p, q, r = _divide(theta, scale), _divide(a.slope, scale), _divide(b.slope, scale)
    root = math.copysign(scale * math.sqrt(max(0.0, p * p - q * r)), b.step - a.step)
    return _divide((root - a.slope) + theta, ((root - a.slope) + root) + b.slope), root


def _secant(a: LineSearchPoint, b: LineSearchPoint) -> float:
    """Zero of the linear interpolant of the slopes, which differ."""
    return a.step + _divide(a.slope, a.slope - b.slope) * (b.step - a.step)


def _divide(a: float, b: float) -> float:
    """Quotient, NaN for a divisor of 0 (where Python would raise)."""
    return a / b if b != 0.0 else math.nan
