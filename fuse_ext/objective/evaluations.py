"""The objective where the parameters stand, and what is remembered of it."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse_ext.checks import check_loss
from fuse_ext.curvature.protocol import InverseHessian
from fuse_ext.kernels.hooks import with_grad
from fuse_ext.kernels.ops import Ops
from fuse_ext.objective.step_options import StepOptions
from fuse_ext.objective.watch import Habits
from fuse_ext.search.noise import Precision
from fuse_ext.search.one_function import SAME_LOSS, OneFunction, Values, agree, check_arrival
from fuse_ext.vector import gradients
from fuse_ext.vector.flat import Closure, FlatParams, Part
from fuse_ext.vector.gradients import NO_GRADIENT, GradStats
from fuse_ext.vector.measures import PartsDiffer

_grad, _wanted = operator.attrgetter("grad"), operator.attrgetter("requires_grad")
# What the state entry holds of all this, besides the counters.
EVALUATION_NAMES = ("pair_step", "settled", *OneFunction.NAMES)


@dataclass(slots=True)  # made, and read, in half the time that a NamedTuple takes
class Point:
    """The objective where the parameters stand.

    Attributes:
        loss: What the closure returned (None without one).
        value: The loss to minimise: sign and weight decay included.
        grads: The gradients: of ``part``, or of the direction's parameters in a line search.
        stats: Their norms.
        part: The parameters that have a gradient here and may move.
    """

    loss: Any
    value: float
    grads: list[Tensor]
    stats: GradStats
    part: Part

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return math.isfinite(self.stats.square) and (self.loss is None or math.isfinite(self.value))

    @property
    def values(self) -> Values:
        """What tells this function from another one."""
        return Values(self.value, self.stats.square, self.stats.abs_sum)


class FunctionChanged(Exception):
    """The closure is another function than when the step's start was remembered.

    Args:
        point: What it gives where the step begins, and the parameters are again.
    """

    def __init__(self, point: Point) -> None:
        super().__init__("the closure is another function than before")
        self.point = point


class Memory(NamedTuple):
    """Where a deterministic closure was evaluated last, for the next step to begin with.

    Attributes:
        point: What it gave.
        grads: Each parameter's ``.grad``.
        versions: Those of the gradients.
        wanted: Whether each parameter asked for one.
    """

    point: Point
    grads: list[Tensor | None]
    versions: list[int]
    wanted: list[bool]

    @classmethod
    def of(cls, point: Point, flat: FlatParams) -> Memory:
        """What is remembered of a point where the parameters stand."""
        grads = list(map(_grad, flat.params))
        return cls(point, grads, _versions(grads), list(map(_wanted, flat.params)))

    def holds(self, flat: FlatParams) -> bool:
        """Whether nobody has touched the gradients since, nor asked for others."""
        return (
            all(map(operator.is_, map(_grad, flat.params), self.grads))
            and _versions(self.grads) == self.versions
            and list(map(_wanted, flat.params)) == self.wanted
        )


class Evaluations:
    """Calls the closure, or remembers what it gave; and knows who moved the parameters.

    Args:
        flat: The parameters.
        entry: The optimizer's state entry: counts ``func_evals``, and ``changes``, how often a
            start that was remembered or seen belonged to another function; holds ``pair_step``,
            the step length t of a pair that awaits its second gradient (s = t p is taken, y not
            known), and ``settled``, why nothing can be done from here (empty while something can).
        history: Where the gradient's norms are taken.
    """

    def __init__(self, flat: FlatParams, entry: dict[str, Any], history: InverseHessian) -> None:
        self.flat, self._entry, self.history = flat, entry, history
        self.precision = Precision(entry, torch.finfo(flat.dtype).eps)
        self.function = OneFunction(entry)
        self.habits = Habits(flat, entry)
        entry.setdefault("pair_step", None)
        entry.setdefault("settled", "")
        # Whether the step under way stands on a point that was remembered and not evaluated since.
        self.remembered = False
        self.left = 0  # evaluations that the step under way may still make
        self.allowed: tuple[type[Exception], ...] = ()  # errors that the caller will deal with
        self._memory: Memory | None = None
        # Where the last step has led, on which objective.
        self._arrived: Any = None
        self._distrusts = False  # whether the last step could not tell what function it was on
        self._settled_with: StepOptions | None = None

    def outdated(self, state: dict[Any, Any]) -> bool:
        """Whether the user has cleared or replaced ``Optimizer.state``."""
        return state.get(self.flat.params[0]) is not self._entry

    @property
    def has_budget(self) -> bool:
        """Whether the step under way may evaluate once more."""
        return self.left > 0

    def evaluate(self, closure: Closure, options: StepOptions, along_direction: bool) -> Point:
        """Calls the closure where the parameters stand."""
        self.left -= 1
        self.precision.spend()
        return self.look(closure, options, along_direction)

    def note_raised(self, options: StepOptions) -> Point | None:
        """The closure has raised here: other ranks are told. What all have; None for one alone."""
        if self.flat.together is None:
            return None
        return replace(self._point(math.inf, options, True), grads=[])

    def look(self, closure: Closure, options: StepOptions, along_direction: bool) -> Point:
        """:meth:`evaluate` where the step's budget has counted that evaluation already."""
        try:
            asks = options.compares and self.habits.adds is not False
            loss = self.habits.call(closure) if asks else with_grad(closure)
            self._entry["func_evals"] += 1
            check_loss(loss, options.needs_loss)
        except Exception as error:
            if not isinstance(error, self.allowed):
                self.flat.measures.tell_raised()
            raise
        return self._point(loss, options, along_direction)

    def _point(self, loss: Any, options: StepOptions, along_direction: bool) -> Point:
        part, grads = self.flat.gradients(options.freezing)
        of = self.history.part if along_direction else part
        if of is not part and of.absent != part.absent:
            grads = self._grads_of(of)
        if of.params or self.flat.together is not None:
            try:
                stats, value = self.history.stats(
                    grads,
                    of.pick(options.weight_decay),
                    options.maximize,
                    along_direction,
                    loss,
                    None if of is self.history.part else of,
                    part.absent,
                )
            except PartsDiffer:
                self.flat.fill_gradients()
                return self._point(loss, options, along_direction)
        else:
            stats, value = NO_GRADIENT, math.nan if loss is None else float(loss)
        if options.maximize:
            value = -value
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss = loss.detach()
        return Point(loss, value + stats.penalty, grads, stats, part)

    def _grads_of(self, part: Part) -> list[Tensor]:
        """The gradients of these parameters, zeros where a trial has none: it stays in a branch."""
        held = zip(part.params, part.indices, strict=True)
        grads = [torch.zeros_like(p) if (g := self.flat.grad(i)) is None else g for p, i in held]
        return part.reals([grad.resolve_neg() for grad in grads])

    def start(self, closure: Closure | None, options: StepOptions, evaluated: Any = None) -> Point:
        """The point where the step begins: evaluated, remembered, or gradients at hand.

        ``evaluated`` is the loss of gradients that the closure has just made there.
        """
        flat, habits = self.flat, self.habits
        self.left = options.max_eval - 1  # where it begins is the first
        self.precision.begin_step(0 if closure is None else 1)
        self.function.begin_step()
        if options.compares:
            habits.begin_step()
        memory = self._memory if closure is not None and options.deterministic else None
        touched = memory is not None and not memory.holds(flat)
        # Whether x or the objective changed by more than the last step.
        here = (flat.places(), options.objective)
        moved = self._arrived is not None and self._arrived != here
        if flat.together is not None:  # what one rank sees counts for all
            moved, touched = flat.measures.any(moved, touched)
        if moved:
            self._begin_function()
            self.function.leave()
        distrusts, self._distrusts = options.seen and self._distrusts, False
        self.remembered = False
        if memory is not None and not moved and not self.settled and not distrusts:
            # A step calls the closure at least once: the start, where there will be no trial.
            idle = options.lr == 0.0 or memory.point.stats.abs_max <= options.tolerance_grad
            self.remembered = not idle and not touched
            if self.remembered:
                return memory.point
        if habits.adds and closure is not None and evaluated is None and not moved:
            habits.check_own(self._memory is not None and not self._memory.holds(flat))
        del memory  # nobody else holds gradients that the closure may drop now
        self._memory = None
        if closure is None:
            return self._point(None, options, False)
        if evaluated is None:
            point = self.look(closure, options, False)
        else:
            point = self._point(evaluated, options, False)
        if options.compares and point.loss is not None and point.finite:
            self._compare(point, options)
        return point

    def _compare(self, point: Point, options: StepOptions) -> None:
        """Holds where a step begins against where the last one ended."""
        same = self._as_before(point, options)
        if same is False:
            self._entry["changes"] += options.deterministic
            if options.promises:
                self.habits.tell_changed()
            self._begin_function()
        elif self.settled and self._settled_with not in (None, options):
            self._entry["settled"] = ""
        self.precision.begin(point.value)

    def trust(self, decrease: float, point: Point) -> None:
        """A step from memory has gone as expected, by ``decrease`` to first order.

        Where noise hides that much the loss told nothing, and the next step looks at its start.
        """
        self._distrusts = decrease <= self.precision.noise * abs(point.value)
        if not self._distrusts:
            self.function.fits()

    def _as_before(self, point: Point, options: StepOptions) -> bool | None:
        """Whether this is where the last step has ended; counts unless one function is promised."""
        ask = self.function.compare if options.promises else self.function.meet
        return ask(point.values, point.part.absent, self.precision.noise_at_a_point)

    def look_again(self, closure: Closure, options: StepOptions) -> Point:
        """Evaluates where the step began from memory; the step's budget has counted that.

        Where it is as remembered that counts as much as a step that begins so.

        Raises:
            FunctionChanged: It is not.
        """
        again = self.look(closure, options, False)
        self.remembered = False
        if again.finite and self._as_before(again, options) is not False:
            return again
        self._begin_function()
        self._entry["changes"] += 1
        if options.promises and again.finite:
            again = self._again(again, closure, options)
        if again.finite:
            self.precision.begin(again.value)
        raise FunctionChanged(again)

    def _again(self, here: Point, closure: Closure, options: StepOptions) -> Point:
        """Calls the closure where it has just been called: does it give what it gave?"""
        if not self.habits.doubles or not self.has_budget:
            self.habits.tell_changed()
            return here
        there = self.evaluate(closure, options, False)
        if agree(here.values, there.values, max(self.precision.noise_at_a_point, SAME_LOSS)):
            self.habits.tell_changed()
        elif there.finite:
            self.habits.tell_differs(here.value, there.value)
            self.precision.doubt()
        return there

    def is_one_function(self, options: StepOptions) -> bool:
        """Whether two calls of the closure may be compared: promised or, with a search, seen."""
        return options.deterministic or (options.line_search is not None and self.function.known)

    def at_floor(self, here: Point, options: StepOptions) -> bool:
        """Whether one function has long stopped to fall, all but for its rounding."""
        if here.loss is None or not self.is_one_function(options):
            return False
        return self.precision.at_floor(here.value, here.stats.square)

    def settle_at(self, point: Point, options: StepOptions, reason: str) -> None:
        """Nothing can be done from this point, where the parameters stand, on this function.

        From now on a step is one call of the closure, as long as that gives what it gave here.
        """
        # A step that begins otherwise tells that it is another function, or a batch: no promise is
        # needed.
        if point.loss is not None and options.compares:
            self._entry["settled"] = reason
            self._settled_with = options

    def stay_settled(self, options: StepOptions) -> None:
        """It goes for these options, which a checkpoint does not say."""
        self._settled_with = options

    @property
    def settled(self) -> str:
        """Why nothing can be done from here; empty while something can."""
        reason: str = self._entry["settled"]
        return reason

    def note_return(self, options: StepOptions) -> None:
        """A step that could not be completed has put the parameters back to where it began."""
        if self._arrived is not None:
            self._arrived = (self.flat.places(), options.objective)

    def note_arrival(self, point: Point | None, options: StepOptions) -> None:
        """At the end of a step: notes where it has led, and what is known of that point."""
        self._arrived = (self.flat.places(), options.objective)
        self.precision.end_step(math.nan if point is None else point.value)
        if not options.compares or point is None or point.loss is None or not point.finite:
            self.function.end_step(None)
            return
        self.function.end_step(point.values, point.part.absent)
        if options.deterministic and point.grads:
            self._memory = Memory.of(point, self.flat)

    @property
    def has_pair(self) -> bool:
        """Whether a step was taken whose second gradient is not known."""
        return self._entry["pair_step"] is not None

    def forget_point(self) -> None:
        """What is remembered of where the parameters stand is given up."""
        self._memory = None

    def stands_where_it_arrived(self) -> bool:
        """Whether nobody has moved the parameters since the last step."""
        moved = self._arrived is None or self._arrived[0] != self.flat.places()
        return not self.flat.measures.any(moved)[0]

    def begin_batch(self, batch_id: int | str | None) -> None:
        """The next step is on another batch."""
        self._entry["batch_id"] = batch_id
        self.new_objective()

    def new_objective(self) -> None:
        """Gives up what is of another function: a pair in waiting, an evaluation remembered."""
        self._begin_function()
        self._memory = None
        self.function.leave()

    def _begin_function(self) -> None:
        self.drop_pair()
        self.precision.forget_least()
        self._entry["settled"] = ""

    def drop_pair(self) -> None:
        """Gives up the pair in waiting."""
        self._entry["pair_step"] = None


def effective_gradient(
    flat: FlatParams, ops: Ops, options: StepOptions, part: Part, grads: list[Tensor], out: Tensor
) -> Tensor:
    """See :func:`fuse_ext.vector.gradients.effective_gradient`; as the options have it."""
    decay = part.pick(options.weight_decay)
    return gradients.effective_gradient(flat, ops, part, grads, decay, options.maximize, out)


def _versions(grads: list[Tensor | None]) -> list[int]:
    return [-1 if grad is None else grad._version for grad in grads]


def check_evaluation_state(entry: dict[str, Any]) -> None:
    """Raises ValueError for a state entry whose last evaluation or pair in waiting is none."""
    check_arrival(entry)
    pair_step = entry.get("pair_step")
    if not (pair_step is None or isinstance(pair_step, float)):
        raise ValueError(f"state_dict does not fit: pair_step is {pair_step!r}, not a float")
