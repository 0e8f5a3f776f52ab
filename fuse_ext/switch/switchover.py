"""When FusePV leaves Adam for L-BFGS: the criteria of FUSE (arXiv 2503.04204), section II.C.

They compose with ``&`` and ``|``::

    FusePV(params, switch=AfterSteps(500) & LossPlateau() | AfterEpochs(20))

and are Python scalars at work: the squared gradient norm of Eq. 3 comes out of the Adam step, and
none but :class:`NearSolution` reads the parameters. A loss or squared norm that is NaN, infinite
or larger than 1e290 (sums of such overflow) is passed over as if its step had not been taken: it
enters no mean and no window. A criterion with a window is not true before the window is full.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch

from fuse_ext.checks import check_integer, check_number
from fuse_ext.switch.criterion import (
    AT_ONCE,
    All,
    Any,
    Mean,
    Observation,
    Reader,
    Switchover,
    usable,
)
from fuse_ext.switch.plateau import LossPlateau

__all__ = [
    "AfterEpochs",
    "AfterSteps",
    "All",
    "Any",
    "AtOnce",
    "GradNorm",
    "LossChange",
    "LossGap",
    "LossPlateau",
    "NearSolution",
    "Never",
    "Observation",
    "Switchover",
    "WarmUp",
    "When",
    "as_switchover",
]


class Never(Switchover):
    """Stay with Adam."""

    def _verdict(self, obs: Observation) -> str:
        return ""


class AtOnce(Switchover):
    """Begin with L-BFGS: switch before the first Adam step."""

    at_once = True
    reason = AT_ONCE

    def _verdict(self, obs: Observation) -> str:
        return AT_ONCE


class AfterSteps(Switchover):
    """Switch after ``n`` Adam steps ("simple iteration" in II.C); 0 is :class:`AtOnce`."""

    def __init__(self, n: int) -> None:
        check_integer("n", n, 0)
        self.n = n
        self.at_once = self.n == 0
        self.reset()

    def _verdict(self, obs: Observation) -> str:
        return f"step {obs.step} >= n={self.n}" if obs.step >= self.n else ""

    def __repr__(self) -> str:
        return f"AfterSteps(n={self.n})"


class WarmUp(Switchover):
    """Switch after ``n`` Adam steps, if the losses are those of one smooth function.

    Where the closure is the same function at every step, L-BFGS gains more per evaluation than
    Adam almost from the start: on two physics-informed networks and 1,200 evaluations, switches
    after 10 to 100 steps ended 1.8 to 7 times lower than the recipe of 500 steps and one long one
    of torch.optim.LBFGS, and 10 to 70 times lower than with one iteration a step; beside
    torch.optim.LBFGS from the very start they ended at 0.5 to 2.4 times its loss, better on one
    network and worse on the other (medians of five starts, ``python -m benchmarks.switching``).
    Minibatches are told by the turning points of the last ``n`` losses: independent noise turns at
    two steps of three (Kendall and Stuart), a smooth function, even where Adam makes it oscillate,
    at fewer than one of four. Then it waits, for good if need be; FusePV's default for
    ``deterministic=True`` is ``WarmUp() | LossPlateau()``.

    Args:
        n: Steps; at least 10.

    References:
        M. G. Kendall and A. Stuart, The Advanced Theory of Statistics, volume 3, 1966, Section
        45.18.
    """

    needs_loss = True

    def __init__(self, n: int = 100) -> None:
        check_integer("n", n, 10)
        self.n = n
        self.reset()

    def reset(self) -> None:
        """Forget the losses."""
        super().reset()
        self._turns: deque[float] = deque(maxlen=self.n - 2)  # 1 at a turning point
        self._previous: float | None = None
        self._rising = 0  # whether the last loss was higher than the one before

    def _verdict(self, obs: Observation) -> str:
        if usable(obs.loss):
            if self._previous is not None:
                rising = int(obs.loss > self._previous)
                self._turns.append(abs(rising - self._rising))
                self._rising = rising
            self._previous = obs.loss
        turns = int(sum(self._turns))
        if obs.step < self.n or len(self._turns) < self.n - 2 or 4 * turns > self.n:
            return ""
        return f"step {obs.step} >= n={self.n} of a smooth loss ({turns} turning points)"

    def _state(self) -> dict[str, object]:
        return {
            "n": self.n,
            "turns": list(self._turns),
            "previous": self._previous,
            "rising": self._rising,
        }

    def _parse(self, state: object) -> dict[str, object]:
        read = Reader(self, state, "n", "turns", "previous", "rising")
        read.same("n", self.n)
        return {
            "_turns": deque(read.numbers("turns", self.n - 2), self.n - 2),
            "_previous": read.optional("previous"),
            "_rising": read.integer("rising"),
        }

    def __repr__(self) -> str:
        return f"WarmUp(n={self.n})"


class AfterEpochs(Switchover):
    """Switch after ``n`` epochs, as in the paper's experiments; 0 is :class:`AtOnce`.

    With ``steps_per_epoch`` an epoch is that many Adam steps, and the switch follows the last of
    them. Without, epochs are what the optimizer's ``next_epoch()`` counts, and the switch follows
    the first Adam step after the call.
    """

    def __init__(self, n: int, steps_per_epoch: int | None = None) -> None:
        check_integer("n", n, 0)
        if steps_per_epoch is not None:
            check_integer("steps_per_epoch", steps_per_epoch, 1)
        self.n = n
        self.steps_per_epoch = steps_per_epoch
        self.at_once = self.n == 0
        self.reset()

    def _verdict(self, obs: Observation) -> str:
        steps = self.steps_per_epoch
        epoch = obs.epoch if steps is None else obs.step // steps
        return f"epoch {epoch} >= n={self.n} at step {obs.step}" if epoch >= self.n else ""

    def __repr__(self) -> str:
        return f"AfterEpochs(n={self.n}, steps_per_epoch={self.steps_per_epoch})"


class _MeanCriterion(Switchover):
    """Base of the criteria that hold a mean, over a window or since the start, to a bound."""

    _fields: tuple[str, ...] = ("window", "count", "values")

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget the mean."""
        super().reset()
        self._mean = Mean(self.window)

    def _over(self, obs: Observation) -> str:
        steps = "all steps" if self.window is None else f"{self.window} steps"
        return f"(mean over {steps}) at step {obs.step}"

    def _state(self) -> dict[str, object]:
        return {"window": self.window, "count": self._mean.count, "values": self._mean.values()}

    def _parse(self, state: object) -> dict[str, object]:
        read = Reader(self, state, *self._fields)
        read.same("window", self.window)
        values = read.numbers("values", self.window)
        if self.window is not None:
            read.same("count", len(values))
        return {"_mean": Mean.restored(self.window, read.integer("count"), values)}


class GradNorm(_MeanCriterion):
    """Switch when the mean squared gradient norm is at most ``zeta`` (Eq. 3).

    Args:
        zeta: The bound; >= 0.
        window: None takes the mean over all steps since the start, as Eq. 3 is printed, in which
            the first gradients weigh for long; an integer over the last that many steps.
    """

    needs_grad_norm = True

    def __init__(self, zeta: float, window: int | None = None) -> None:
        check_number("zeta", zeta, 0.0)
        if window is not None:
            check_integer("window", window, 1)
        self.zeta = float(zeta)
        super().__init__(window)

    def _verdict(self, obs: Observation) -> str:
        if usable(obs.grad_norm_sq):
            self._mean.push(obs.grad_norm_sq)
        if not self._mean.full or self._mean.value > self.zeta:
            return ""
        value = f"{self._mean.value:.3g} <= zeta={self.zeta:g}"
        return f"squared gradient norm {value} {self._over(obs)} (Eq. 3)"

    def __repr__(self) -> str:
        return f"GradNorm(zeta={self.zeta!r}, window={self.window})"


class LossChange(_MeanCriterion):
    """Switch when the mean of ``|f_k - f_{k-1}|`` is at most ``sigma`` (Eq. 4).

    Args:
        sigma: The bound; >= 0. On minibatches the mean settles at the loss's noise, and
            ``sigma`` must lie above it.
        window: The differences over which Eq. 4's expectation is taken; 1 is the single
            difference as printed, which on minibatches is chance.
    """

    needs_loss = True
    _fields = (*_MeanCriterion._fields, "previous")

    def __init__(self, sigma: float, window: int = 100) -> None:
        check_number("sigma", sigma, 0.0)
        check_integer("window", window, 1)
        self.sigma = float(sigma)
        super().__init__(window)

    def reset(self) -> None:
        """Forget the losses."""
        super().reset()
        self._previous: float | None = None

    def _verdict(self, obs: Observation) -> str:
        if usable(obs.loss):
            if self._previous is not None:
                self._mean.push(abs(obs.loss - self._previous))
            self._previous = obs.loss
        if not self._mean.full or self._mean.value > self.sigma:
            return ""
        value = f"{self._mean.value:.3g} <= sigma={self.sigma:g}"
        return f"loss change {value} {self._over(obs)} (Eq. 4)"

    def _state(self) -> dict[str, object]:
        return {**super()._state(), "previous": self._previous}

    def _parse(self, state: object) -> dict[str, object]:
        previous = Reader(self, state, *self._fields).optional("previous")
        return {**super()._parse(state), "_previous": previous}

    def __repr__(self) -> str:
        return f"LossChange(sigma={self.sigma!r}, window={self.window})"


class LossGap(_MeanCriterion):
    """Switch when ``f - f_star <= sigma``, for problems whose least loss is known (II.C).

    Args:
        f_star: The least loss.
        sigma: The bound; >= 0.
        window: ``f`` is the mean of the last that many losses.
    """

    needs_loss = True

    def __init__(self, f_star: float, sigma: float, window: int = 1) -> None:
        check_number("f_star", f_star, -math.inf)
        self.f_star = float(f_star)
        check_number("sigma", sigma, 0.0)
        check_integer("window", window, 1)
        self.sigma = float(sigma)
        super().__init__(window)

    def _verdict(self, obs: Observation) -> str:
        if usable(obs.loss):
            self._mean.push(obs.loss)
        if not self._mean.full or self._mean.value - self.f_star > self.sigma:
            return ""
        value = f"{self._mean.value - self.f_star:.3g} <= sigma={self.sigma:g}"
        return f"loss gap f - f* {value} {self._over(obs)}"

    def __repr__(self) -> str:
        return f"LossGap(f_star={self.f_star!r}, sigma={self.sigma!r}, window={self.window})"


class NearSolution(Switchover):
    """Switch when ``||x - x_star|| <= sigma``, for problems whose solution is known (II.C).

    The norm is taken in float64, in a pass over the parameters after every Adam step, for which
    the CPU waits.

    Args:
        x_star: A tensor, or a sequence of tensors, with the shapes of the parameters.
        sigma: The bound; >= 0.
    """

    def __init__(self, x_star: torch.Tensor | Sequence[torch.Tensor], sigma: float) -> None:
        tensors = [x_star] if isinstance(x_star, torch.Tensor) else x_star
        if not isinstance(tensors, Sequence):
            raise TypeError(f"x_star must be a tensor or a sequence of tensors, got {x_star!r}")
        for i, x in enumerate(tensors):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"x_star[{i}] must be a tensor, got {x!r}")
            if not torch.isfinite(x).all():
                raise ValueError(f"x_star[{i}] has an entry that is NaN or infinite")
        check_number("sigma", sigma, 0.0)
        self.sigma = float(sigma)
        self.x_star = tuple(x.detach().clone() for x in tensors)

    def check(self, params: Sequence[torch.Tensor]) -> None:
        """Raise ValueError if the parameters have not the shapes of ``x_star``."""
        expected = [tuple(x.shape) for x in self.x_star]
        shapes = [tuple(p.shape) for p in params]
        if shapes != expected:
            raise ValueError(f"x_star has the shapes {expected}, the parameters have {shapes}")

    def _verdict(self, obs: Observation) -> str:
        self.check(obs.params)
        norms = []
        for p, x in zip(obs.params, self.x_star, strict=True):
            wide = torch.complex128 if p.is_complex() or x.is_complex() else torch.float64
            difference = p.detach().to(wide) - x.to(p.device, wide)
            norms.append(float(torch.linalg.vector_norm(difference)))
        distance = math.hypot(*norms)
        if not distance <= self.sigma:
            return ""
        return f"distance ||x - x*|| {distance:.3g} <= sigma={self.sigma:g} at step {obs.step}"

    def __repr__(self) -> str:
        if sum(x.numel() for x in self.x_star) <= 20:
            shown = [f"torch.tensor({x.tolist()}, dtype={x.dtype})" for x in self.x_star]
        else:
            shown = [f"<tensor of shape {tuple(x.shape)}>" for x in self.x_star]
        return f"NearSolution(x_star=[{', '.join(shown)}], sigma={self.sigma!r})"


class When(Switchover):
    """Switch when ``fn(obs)`` is true.

    A state_dict holds no more of ``fn`` than its name, so what ``fn`` keeps to itself is not
    saved; subclass :class:`Switchover` for a criterion with state of its own.

    Args:
        fn: Takes an :class:`Observation`, returns a bool.
        needs_loss: False if ``fn`` can do without ``obs.loss``, so that a step without a closure
            is allowed.
        needs_grad_norm: False if ``fn`` can do without ``obs.grad_norm_sq``.
    """

    def __init__(
        self,
        fn: Callable[[Observation], bool],
        needs_loss: bool = True,
        needs_grad_norm: bool = True,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be callable, got {fn!r}")
        self.fn = fn
        self.needs_loss = bool(needs_loss)
        self.needs_grad_norm = bool(needs_grad_norm)

    @property
    def _name(self) -> str:
        return getattr(self.fn, "__name__", type(self.fn).__name__)

    def _verdict(self, obs: Observation) -> str:
        answer: object = self.fn(obs)
        if answer is None:
            raise TypeError(f"{self._name}(obs) must return a bool, got None")
        return f"{self._name}(obs) is true at step {obs.step}" if answer else ""

    def _state(self) -> dict[str, object]:
        return {"fn": self._name}

    def _parse(self, state: object) -> dict[str, object]:
        Reader(self, state, "fn").same("fn", self._name)
        return {}

    def __repr__(self) -> str:
        needs = f"needs_loss={self.needs_loss}, needs_grad_norm={self.needs_grad_norm}"
        return f"When(fn={self._name}, {needs})"


def as_switchover(value: object) -> Switchover:
    """What an optimizer's ``switch`` argument stands for.

    A :class:`Switchover` stands for itself, an integer for :class:`AfterSteps`, None for
    :class:`LossPlateau` and any other callable for :class:`When`.

    Raises:
        TypeError: ``value`` is none of these; a bool or a class is not.
        ValueError: A negative integer.
    """
    if isinstance(value, Switchover):
        return value
    if value is None:
        return LossPlateau()
    if isinstance(value, int) and not isinstance(value, bool):
        check_integer("switch", value, 0)
        return AfterSteps(value)
    if callable(value) and not isinstance(value, type):
        return When(value)
    raise TypeError(
        f"switch must be a Switchover, an int (Adam steps), a callable or None, got {value!r}"
    )
