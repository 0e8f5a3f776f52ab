"""What a phase is: it is asked for a step, does it, and tells in one small result what it did.

FusePV holds one phase and says what to do between steps; how a step is made is the phase's affair
alone. The other optimizers hold what a phase is made of: Adam its ``Moments``, Fuse ``Moments`` and
an ``Iteration``; LBFGS holds a phase of ``phase/lbfgs/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fuse_ext.objective.step_options import StepOptions
from fuse_ext.switch.criterion import Observation, Switchover
from fuse_ext.vector.flat import Closure, ParamGroup


class Scaling(NamedTuple):
    """What GradScaler has set on the optimizer around a call of ``step``.

    Attributes:
        factor: Of the gradients at hand; None without a scaler.
        found_inf: Not 0 where one of them is infinite; None where the scaler has not looked.
    """

    factor: Tensor | None
    found_inf: Tensor | None

    @classmethod
    def of(cls, optimizer: Any) -> Scaling:
        """What it has set on this optimizer."""
        own = optimizer.__dict__
        if "grad_scale" not in own and "found_inf" not in own:
            return NO_SCALING
        return cls(own.get("grad_scale"), own.get("found_inf"))

    @property
    def found(self) -> bool | None:
        """``found_inf`` as the host knows it, read from the device."""
        return None if self.found_inf is None else float(self.found_inf) != 0.0

    def check(self, closure: Closure | None) -> None:
        """Raises RuntimeError for a closure, whose gradients the scaler has not looked at."""
        if self.factor is not None and closure is not None:
            raise RuntimeError(
                "GradScaler does not go with a closure: it looks for infinities before the closure "
                "makes new gradients, and L-BFGS wants losses that are not scaled. Call "
                "scaler.step(optimizer) after scaler.scale(loss).backward(), or step(closure) "
                "without a scaler"
            )

    def unscale(self, grads: list[Tensor | None]) -> None:
        """Takes the factor out of the gradients."""
        if self.factor is not None:
            for grad in grads:
                if grad is not None:
                    grad.div_(self.factor)


NO_SCALING = Scaling(None, None)


@dataclass(slots=True)  # freezing it would triple the time it takes to make one
class Call:
    """What a phase is asked for; each looks at what concerns it.

    Attributes:
        closure: The user's, or None.
        groups: ``Optimizer.param_groups``.
        loss: Of the gradients at hand, where there is no closure.
        log: Where Adam counts.
        criterion: What will be asked after an Adam step.
        scaling: GradScaler's part.
        empty: A step that only makes the state, without gradients and with lr = 0.
        options: What a step of L-BFGS is told.
        lr, lr_unit: With ``capturable``, the step is ``options.lr`` times lr / lr_unit.
        batch_id: What batch this is.
        pair_closure: The sample that curvature pairs are to be of.
        rescues: Whether Adam may try where all searches fail.
        evaluated: The loss of gradients that the closure has just made where the step begins.
    """

    closure: Closure | None
    groups: list[ParamGroup]
    loss: Any = None
    log: dict[str, Any] | None = None
    criterion: Switchover | None = None
    scaling: Scaling = NO_SCALING
    empty: bool = False
    options: StepOptions | None = None
    lr: Tensor | None = None
    lr_unit: float = 1.0
    batch_id: int | str | None = None
    pair_closure: Closure | None = None
    rescues: bool = False
    evaluated: Any = None

    def taken_over(self, loss: Any) -> Call:
        """For another phase that takes over where this one has evaluated the closure."""
        self.evaluated, self.batch_id, self.pair_closure = loss, None, None
        return self


class Outcome(NamedTuple):
    """What a step did.

    Attributes:
        loss: The closure's (or the caller's) where the step began.
        observed: What the criterion is to be asked about, if an Adam step was taken.
        refused: A loss or gradient was not finite, and the step was not taken.
        rescued: Adam has tried, since all searches failed.
        failing: So many searches fail that another phase should go on.
        contradicted: Steps do not begin as the ones before ended: no function, but batches.
        worse: Losses have stayed above those at the switch: Adam should go on, and for long.
        one_function: What looked like batches is one function; the step was not taken.
        believed: From this step on the closure is taken for one function, though not promised.
    """

    loss: Any
    observed: Observation | None = None
    refused: bool = False
    rescued: bool = False
    failing: bool = False
    contradicted: bool = False
    worse: bool = False
    one_function: bool = False
    believed: bool = False

    @property
    def troubled(self) -> bool:
        """Whether there is something to count, or to leave the phase for."""
        return self.rescued or self.failing or self.worse or self.contradicted


class Phase(Protocol):
    """One way of stepping, with its state and its counts."""

    @property
    def begun(self) -> bool:
        """Whether there is state; until then parameters may be converted."""

    def step(self, call: Call) -> Outcome:
        """One step of the optimizer."""

    def settle(self, log: dict[str, Any]) -> None:
        """Brings to the host what the device alone has counted: Adam's counts to ``log``."""

    def outdated(self, state: dict[Any, Any]) -> bool:
        """Whether the user has cleared or replaced ``Optimizer.state``."""

    def new_objective(self) -> None:
        """The closure is another function from the next step on."""

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""


class QuasiNewton(Phase, Protocol):
    """A phase of L-BFGS."""

    @property
    def history(self) -> Any:
        """What it knows of H, with its name as ``kind``."""

    @property
    def host_decides(self) -> bool:
        """Whether its steps read the device, so that the host may too."""

    def refuse(self) -> None:
        """Counts a step that was not taken for an infinite gradient."""
