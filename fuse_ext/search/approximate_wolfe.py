"""The approximate Wolfe conditions of Hager and Zhang, for losses with rounding errors in them.

Deviations from the paper:
    - They let phi(t) lie below phi(0) by any amount; here by no more than the noise.
    - Trials are those of Moré and Thuente, on a reading of the losses that noise cannot mislead
      (see :class:`ApproximateWolfe`).
    - The search gives up where the loss rises though its slopes say that it falls: soon where
      that is noise ("noise"), or else where it does so again and again ("slopes_disagree").

References:
    W. W. Hager and H. Zhang, A new conjugate gradient method with guaranteed descent and an
    efficient line search, SIAM Journal on Optimization 16(1), 2005, pp. 170-192.
"""

import math

from fuse_ext.search.line_search import LineSearchOptions, Reason
from fuse_ext.search.more_thuente import LineSearchPoint
from fuse_ext.search.wolfe import StrongWolfe


class ApproximateWolfe(StrongWolfe):
    r"""Strong Wolfe, or Hager and Zhang's approximate Wolfe test, which survives noise in f.

    Close to a minimum the loss changes by less than its own rounding error and sufficient
    decrease fails at random, while slopes still have correct digits. So a trial also passes if

    .. math::
        (2 c_1 - 1) \phi'(0) \ge \phi'(t) \ge c_2 \phi'(0), \qquad
        |\phi(t) - \phi(0)| \le \epsilon |\phi(0)|.

    This is condition T2 of Hager and Zhang (2005, Section 4, delta = c1, sigma = c2), except that
    they let phi(t) lie below phi(0) by any amount. Where it lies below by more than the noise,
    the loss itself can judge, and far from a minimum a flat slope alone is a poor reason to stop.

    The first inequality is sufficient decrease of the quadratic with slopes phi'(0) and phi'(t),
    whose value at t is :math:`\hat\phi(t) = \phi(0) + t (\phi'(0) + \phi'(t)) / 2`. Trials are
    chosen by the same reading (not from the paper): where neither phi nor :math:`\hat\phi`
    differs from phi(0) by more than the noise, :math:`\hat\phi` stands in for phi, so that noise
    cannot mislead the bracketing.

    Here :math:`\epsilon` is ``loss_eps``; its default, 1e-6, is the paper's and suits float32
    losses. It may be changed between searches. Raises ValueError unless ``c1 < 0.5``.

    Attributes:
        noise_needed: The least :math:`\epsilon` with which the trial of flattest slope would
            have been accepted in the last search; inf if the slopes tell against all trials.
    """

    name = "approximate_wolfe"
    default_loss_eps = 1e-6
    # Noise has been seen where a loss rises though the slope has changed by no more than this, ...
    _SAME_SLOPE = 0.2
    # ... and by so many times what is in proportion to the step beside the rise that is to be
    # explained, and by so large a share of that.
    _OUT_OF_PROPORTION, _NO_SMALL_PART = 5.0, 0.25
    # The search closes in on the origin, and a smooth loss soon falls with its slopes.
    _MOST_AGAINST = 3

    def __init__(self, options: LineSearchOptions | None = None) -> None:
        super().__init__(options)
        if self.options.c1 >= 0.5:
            raise ValueError(f"c1 must be below 0.5 for {self.name}, got {self.options.c1!r}")
        self.noise_needed = math.inf

    def _begin(self, origin: LineSearchPoint) -> None:
        super()._begin(origin)
        self.noise_needed = self._flattest = math.inf
        self._flattest_step = 0.0
        self._rises: list[tuple[float, float]] = []  # steps with the slope of the origin, rises
        self._against = 0  # trials at which the loss is higher though it falls there

    def _accepts(self, trial: LineSearchPoint) -> Reason | None:
        slope0 = self._origin.slope
        if abs(trial.slope - slope0) <= self._SAME_SLOPE * abs(slope0):  # not where it is NaN
            self._rises.append((trial.step, trial.loss - self._origin.loss))
        if super()._accepts(trial) is not None:
            return "wolfe"
        if (2.0 * self.options.c1 - 1.0) * slope0 >= trial.slope >= self.options.c2 * slope0:
            change = abs(trial.loss - self._origin.loss)
            if change <= self._noise():
                return "approximate_wolfe"
            if abs(trial.slope) < self._flattest and self._origin.loss != 0.0:
                self._flattest, self._flattest_step = abs(trial.slope), trial.step
                self.noise_needed = change / abs(self._origin.loss)
        return None

    @property
    def shows_noise(self) -> bool:
        """Whether the loss rises at shorter trials as noise does.

        A smooth loss does not rise between two slopes that say that it falls; where slopes are
        wrong it rises in proportion to the step.
        """
        if self.noise_needed == math.inf:
            return False
        needed, at = self.noise_needed * abs(self._origin.loss), self._flattest_step
        return any(
            needed * max(self._NO_SMALL_PART, self._OUT_OF_PROPORTION * step / at) <= rise
            for step, rise in self._rises
        )

    def _advance(self, trial: LineSearchPoint) -> float | Reason:
        found = 0.0 if self._best is None else self._origin.loss - self._best.loss
        if self.shows_noise and found <= self.noise_needed * abs(self._origin.loss):
            return "noise"
        self._against += trial.slope < 0.0 and self._origin.loss < trial.loss < math.inf
        if self._against >= self._MOST_AGAINST and self._best is None:
            return "slopes_disagree"
        return super()._advance(trial)

    def _hopeless(self, step: float) -> bool:
        return False  # slopes decide below the noise

    def _noise(self) -> float:
        return self.loss_eps * abs(self._origin.loss)

    def _read(self, trial: LineSearchPoint) -> LineSearchPoint:
        change = 0.5 * trial.step * (self._origin.slope + trial.slope)
        if max(abs(trial.loss - self._origin.loss), abs(change)) <= self._noise():
            return trial._replace(loss=self._origin.loss + change)
        return trial
