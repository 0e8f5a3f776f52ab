"""The strong Wolfe conditions: the line search of Moré and Thuente, with guaranteed decrease.

Their trial steps are in more_thuente.py, with the deviations from the paper in the choice of them.
Of the search itself:
    - One that stops before both conditions hold falls back on the trial of least loss among those
      with sufficient decrease, which is a success too.

References:
    J. J. Moré and D. J. Thuente, Line search algorithms with guaranteed sufficient decrease, ACM
    Transactions on Mathematical Software 20(3), 1994, pp. 286-307.
"""

from fuse_ext.search.line_search import LineSearch, LineSearchOptions, Reason
from fuse_ext.search.more_thuente import LineSearchPoint, MoreThuente


class StrongWolfe(LineSearch):
    r"""The search of Moré and Thuente (1994) for a step with both strong Wolfe conditions.

    .. math::
        \phi(t) \le \phi(0) + c_1 t \phi'(0), \qquad |\phi'(t)| \le c_2 |\phi'(0)|.

    For finite values the trials are those of :class:`MoreThuente`.
    """

    name = "strong_wolfe"
    needs_gradient = True

    def __init__(self, options: LineSearchOptions | None = None) -> None:
        super().__init__(options)
        self._trials = MoreThuente(
            self.options.c1, self.options.xtol, self.options.step_min, self.options.step_max
        )

    def _begin(self, origin: LineSearchPoint) -> None:
        self._trials.begin(origin)

    def _accepts(self, trial: LineSearchPoint) -> Reason | None:
        flat = abs(trial.slope) <= self.options.c2 * -self._origin.slope
        return "wolfe" if flat and self._decreases(trial) else None

    def _advance(self, trial: LineSearchPoint) -> float | Reason:
        return self._trials.advance(trial)
