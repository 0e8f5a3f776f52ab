"""A criterion of the user's own, and what an optimizer's ``switch`` argument stands for."""

from collections.abc import Callable

from fuse_ext.checks import check_integer
from fuse_ext.switch.criterion import Observation, Reader, Switchover
from fuse_ext.switch.plateau import LossPlateau
from fuse_ext.switch.steps import AfterSteps


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
