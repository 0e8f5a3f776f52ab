r"""What a line search is: the ask-and-tell protocol, its options and its result.

A line search looks for a step t > 0 along a descent direction p from the point x. It sees only

.. math::
    \phi(t) = f(x + t p), \qquad \phi'(t) = \nabla f(x + t p)^T p, \qquad \phi'(0) < 0,

and never evaluates anything itself: the caller asks for a trial step, evaluates and tells
(``fixed`` is the absence of a search)::

    step = search.start(f0, slope0, t0=1.0)
    while step is not None:
        loss, slope = evaluate(x + step * p)
        step = search.tell(loss, slope)
        if search.best_changed:
            ...  # save the gradient: the search may come back to this point
    search.result

A trial with a loss or slope that is NaN or infinite (-inf too) counts as a loss of +inf. It
bounds the search from then on, and the next trial retreats from it by a factor of ten, so that
eight retreats lead from t = 1 to t = 1e-8.

The searches: armijo.py, wolfe.py (whose trial steps are more_thuente.py's), approximate_wolfe.py.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

from fuse_ext.search.more_thuente import LineSearchPoint

Reason: TypeAlias = Literal[
    "wolfe",  # both strong Wolfe conditions hold
    "approximate_wolfe",  # Hager and Zhang's test holds
    "armijo",  # sufficient decrease holds, which is all that was asked for
    "max_evaluations",  # the budget is spent, and the search would have gone on
    "interval_too_small",  # the relative width of the bracket is at most xtol
    "no_progress",  # rounding leaves no step within the bracket, or loss_eps hides any decrease
    "max_step",  # phi still decreases at step_max
    "noise",  # it hides any decrease, and there is more of it than loss_eps
    "slopes_disagree",  # the loss rises where its slopes say that it falls, again and again
    "min_step",  # sufficient decrease fails at step_min, or asks for a smaller step
    "non_finite",  # one of the last seven, and no trial was finite
]


# No limits but those of floats, see LineSearchOptions.
STEP_MIN, STEP_MAX = 1e-150, 1e150


class LineSearchResult(NamedTuple):
    """What a line search found.

    A search that stops before its own test holds falls back on the trial of least loss among
    those with sufficient decrease; that is a success too, and ``reason`` says why it stopped.

    Attributes:
        step: The accepted step, 0.0 if there is none.
        loss: phi(step) as it was told (``f0`` at step 0.0).
        slope: phi'(step) as it was told (NaN if it was not evaluated).
        success: Whether the step has sufficient decrease or passed the search's own test.
        reason: Why the search ended, one of :data:`Reason`.
        evaluations: Trials told.
        is_last: Whether the accepted step is the last trial, so that the caller already stands
            at it. If False, the caller has to go back to ``step``.
    """

    step: float
    loss: float
    slope: float
    success: bool
    reason: Reason
    evaluations: int
    is_last: bool


@dataclass(frozen=True)
class LineSearchOptions:
    """Options of every search.

    Attributes:
        c1: Sufficient decrease; ``0 < c1 < c2 < 1``, and below 0.5 for approximate Wolfe.
        c2: Curvature; Armijo ignores it.
        max_evaluations: Trials per search, at least 1.
        step_min: Smallest trial step, positive.
        step_max: Largest trial step, finite. (c1 and c2 are those of Nocedal's L-BFGS code. Its
            limits of 1e-20 and 1e20 depend on the units of x and f: the step of a parameter of
            1e-10 whose loss is of the order of 1 is 1e-20. So the defaults of both only keep
            products in the range of floats; xtol and max_evaluations end a search.)
        xtol: A search stops when its bracket [l, u] has ``u - l <= xtol * u``, in [0, 1). The
            default lies below the resolution of float32 parameters. Armijo ignores it.
        loss_eps: Noise in the loss relative to ``|f0|``, in [0, 1); None for the search's
            ``default_loss_eps``. Armijo and strong Wolfe give up ("no_progress") when no trial so
            far has sufficient decrease and the next would have a first-order decrease
            ``t |slope0|`` below the noise: never, at their default 0.0.

    Raises:
        ValueError: An option is out of its range.
    """

    c1: float = 1e-4
    c2: float = 0.9
    max_evaluations: int = 25
    step_min: float = STEP_MIN
    step_max: float = STEP_MAX
    xtol: float = 1e-8
    loss_eps: float | None = None

    def __post_init__(self) -> None:
        c1, c2, step_min, step_max = self.c1, self.c2, self.step_min, self.step_max
        if not 0.0 < c1 < c2 < 1.0:
            raise ValueError(f"c1 and c2 must satisfy 0 < c1 < c2 < 1, got c1={c1!r}, c2={c2!r}")
        if not isinstance(self.max_evaluations, int) or self.max_evaluations < 1:
            raise ValueError(
                f"max_evaluations must be an integer >= 1, got {self.max_evaluations!r}"
            )
        if not 0.0 < step_min < step_max < math.inf:
            raise ValueError(
                "step_min and step_max must satisfy 0 < step_min < step_max < inf, "
                f"got step_min={step_min!r}, step_max={step_max!r}"
            )
        if not 0.0 <= self.xtol < 1.0:
            raise ValueError(f"xtol must be in [0, 1), got {self.xtol!r}")
        if self.loss_eps is not None and not 0.0 <= self.loss_eps < 1.0:
            raise ValueError(f"loss_eps must be None or in [0, 1), got {self.loss_eps!r}")


class LineSearch(ABC):
    r"""Ask-and-tell state machine; see the module's docstring for the protocol.

    Every search shares the sufficient decrease (Armijo) condition

    .. math:: \phi(t) \le \phi(0) + c_1 t \phi'(0).

    One object serves any number of searches, one after the other.

    Args:
        options: See :class:`LineSearchOptions`.

    Attributes:
        name: What :func:`make_line_search` calls the search.
        needs_gradient: Whether :meth:`tell` needs the slope.
        best_changed: After :meth:`tell`: the search goes on, and the trial just told is now the
            one it would fall back on.
    """

    name: ClassVar[str]
    needs_gradient: ClassVar[bool]
    default_loss_eps: ClassVar[float] = 0.0

    def __init__(self, options: LineSearchOptions | None = None) -> None:
        self.options = LineSearchOptions() if options is None else options
        loss_eps = self.options.loss_eps
        self.loss_eps = self.default_loss_eps if loss_eps is None else loss_eps
        self.best_changed = False
        self._origin = LineSearchPoint(0.0, math.nan, math.nan)
        self._step: float | None = None  # the trial asked for; None when no search is under way
        self._evaluations = 0
        self._best: LineSearchPoint | None = None  # least loss with sufficient decrease
        self._seen_finite = False
        self._result: LineSearchResult | None = None

    def start(self, f0: float, slope0: float, t0: float) -> float:
        """Begin a search, dropping any that was under way.

        Args:
            f0: phi(0), finite.
            slope0: phi'(0), finite and negative.
            t0: First step to try, finite and positive.

        Returns:
            The first trial step: ``t0``, clipped to ``[step_min, step_max]``.

        Raises:
            ValueError: An argument is out of its range.
        """
        f0, slope0, t0 = float(f0), float(slope0), float(t0)
        if not math.isfinite(f0):
            raise ValueError(f"f0 must be finite, got {f0}")
        if not (math.isfinite(slope0) and slope0 < 0.0):
            raise ValueError(
                f"slope0 must be finite and negative (a descent direction), got {slope0}"
            )
        if not (math.isfinite(t0) and t0 > 0.0):
            raise ValueError(f"t0 must be finite and positive, got {t0}")
        self.best_changed = False
        self._origin = LineSearchPoint(0.0, f0, slope0)
        self._step = min(max(t0, float(self.options.step_min)), float(self.options.step_max))
        self._evaluations = 0
        self._best = None
        self._seen_finite = False
        self._result = None
        self._begin(self._origin)
        return self._step

    def tell(self, f: float, slope: float | None = None) -> float | None:
        """Take in the last trial.

        Args:
            f: phi at the trial.
            slope: phi' at the trial; may be None where ``needs_gradient`` is False.

        Returns:
            The next trial step, or None when the search has finished.

        Raises:
            RuntimeError: No search is under way.
            TypeError: The search needs the slope and got None.
        """
        if self._step is None:
            raise RuntimeError("tell() needs a search under way: call start() first")
        if slope is None and self.needs_gradient:
            raise TypeError(f"slope must be given at every trial of {self.name}, got None")
        told = LineSearchPoint(self._step, float(f), math.nan if slope is None else float(slope))
        finite = math.isfinite(told.loss) and (slope is None or math.isfinite(told.slope))
        trial = told if finite else LineSearchPoint(told.step, math.inf, math.nan)
        self._evaluations += 1
        self._seen_finite = self._seen_finite or finite

        outcome = self._judge(trial)
        if isinstance(outcome, str):
            self.best_changed = False
            self._step = None
            self._result = self._conclude(outcome, trial)
            return None
        self.best_changed = trial is self._best
        self._step = outcome
        return outcome

    @property
    def result(self) -> LineSearchResult:
        """The outcome. RuntimeError while the search has not finished."""
        if self._result is None:
            raise RuntimeError("result is known only once tell() has returned None")
        return self._result

    def _judge(self, trial: LineSearchPoint) -> float | Reason:
        """The next trial step, or the reason why the search ends here."""
        accepted = self._accepts(trial)
        if accepted is not None:
            self._best = trial
            return accepted
        reading = self._read(trial)
        if self._decreases(reading) and (self._best is None or trial.loss < self._best.loss):
            self._best = trial
        step = self._advance(reading)
        if isinstance(step, str):
            return step
        if self._best is None and self._hopeless(step):
            return "no_progress"
        return "max_evaluations" if self._evaluations >= self.options.max_evaluations else step

    def _conclude(self, reason: Reason, trial: LineSearchPoint) -> LineSearchResult:
        point = self._origin if self._best is None else self._best
        why = reason if self._seen_finite else "non_finite"
        success, is_last = self._best is not None, self._best is trial
        return LineSearchResult(*point, success, why, self._evaluations, is_last)

    def _decreases(self, trial: LineSearchPoint) -> bool:
        """Sufficient decrease."""
        return trial.loss <= self._origin.loss + trial.step * (self.options.c1 * self._origin.slope)

    def _read(self, trial: LineSearchPoint) -> LineSearchPoint:
        """What the choice of steps makes of a trial: it is taken as it was told."""
        return trial

    def _hopeless(self, step: float) -> bool:
        """Whether noise hides the decrease that a trial at ``step`` could bring."""
        return step * -self._origin.slope < self.loss_eps * abs(self._origin.loss)

    @abstractmethod
    def _begin(self, origin: LineSearchPoint) -> None:
        """Prepare for trials from ``origin``."""

    @abstractmethod
    def _accepts(self, trial: LineSearchPoint) -> Reason | None:
        """The test that ends the search; the reason if it holds."""

    @abstractmethod
    def _advance(self, trial: LineSearchPoint) -> float | Reason:
        """The next trial step, or the reason why there is none."""
