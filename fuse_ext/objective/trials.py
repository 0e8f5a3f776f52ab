"""Trials along a direction: the first one, what a line search asks, and the way back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.scalars import Header
from fuse_ext.objective.evaluations import Evaluations, Point
from fuse_ext.objective.step_options import MAX_LINE_SEARCH_EVALUATIONS, StepOptions
from fuse_ext.objective.usual_step import UsualStep
from fuse_ext.search import make_line_search
from fuse_ext.search.approximate_wolfe import ApproximateWolfe
from fuse_ext.search.line_search import LineSearch, LineSearchResult
from fuse_ext.vector.flat import Closure

# Line searches that ended so have done what was asked, though the loss may show no decrease. One
# that fell back on a step without decrease would do so for ever.
PASSED = ("wolfe", "approximate_wolfe")
# Searches that ended so have not failed for rounding.
NOT_ROUNDING = ("slopes_disagree", "non_finite")
# Each time that not even -g leads anywhere the first trial is cut by this factor.
CUT = 0.1
# Two ends of a step fit each other where the loss differs by less than this share of the change
# from what slopes say. Half is what a cubic with its turning point at the end has.
MISFIT = 0.5
# After so many of them in a row only every so manyth is a reason to look.
BELIEVED_MISFITS = 8


class Trials:
    """Moves the parameters along the direction and evaluates there.

    Args:
        objective: Where they are evaluated.
        ops: Kernels to use.
        entry: The optimizer's state entry: ``non_finite`` counts, and ``cuts`` says how often the
            first trial along -g has been cut.
    """

    def __init__(self, objective: Evaluations, ops: Ops, entry: dict[str, Any]) -> None:
        self.objective = objective
        self._flat, self._history = objective.flat, objective.history
        self._ops, self._entry = ops, entry
        self._origin: Tensor | None = None
        self._best_grads: Tensor | None = None
        self._searches: dict[tuple[str, int], LineSearch] = {}
        self._shortest = math.inf  # trial of the last search
        self.usual = UsualStep(entry)
        self._misfits = 0  # trials in a row that did not fit their start

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch vectors held between steps (not part of the state)."""
        return sum(t.nbytes for t in (self._origin, self._best_grads) if t is not None)

    def origin(self) -> Tensor:
        """Scratch for the point that a step starts from."""
        if self._origin is None:
            self._origin = self._flat.new_vector()
        return self._origin

    def first_trial(
        self, header: Header, point: Point, options: StepOptions, known: float
    ) -> float:
        """``known``, or while nothing is known of the curvature a visible one of 1-norm lr.

        Which is cut where there was none.
        """
        if header.usable > 0 or point.stats.abs_sum == 0.0:
            self._entry["cuts"] = 0
            return known
        self.usual.forget()
        visible = self.objective.precision.visible_step(
            self._largest_parameter(),
            point.stats.abs_max,
            point.stats.square,
            None if options.line_search is None else point.value,
        )
        step = max(min(1.0, 1.0 / point.stats.abs_sum), visible)
        return step * CUT ** self._entry["cuts"] * options.lr

    def _largest_parameter(self) -> float:
        """max |x| of the parameters that take part."""
        return self._flat.measures.largest(self._history.part.params)

    def search(
        self,
        closure: Closure,
        options: StepOptions,
        point: Point,
        header: Header,
        step: float,
        moved: bool = False,
    ) -> tuple[LineSearchResult, Point, Point]:
        """Line search along the direction at ``point``, starting with ``step``.

        Leaves the parameters at the last trial and the point of departure in :meth:`origin`; with
        ``moved`` they are at ``step`` already.

        Returns:
            The result, the last trial and the best one.
        """
        save = not moved
        self._shortest = math.inf
        while True:
            search = self._search(str(options.line_search), self.objective.left)
            trial: float | None = search.start(point.value, header.direction_dot_grad, step)
            at, best = point, point
            try:
                while trial is not None:
                    if not (moved and trial == step):
                        self._history.move(self.origin(), trial, save)
                    save = moved = False
                    self._shortest = min(self._shortest, trial)
                    at = self.attempt(closure, options, point, True)
                    here, finite = trial, at.finite
                    self._entry["non_finite"] += not finite
                    trial = search.tell(at.value if finite else math.inf, at.stats.slope)
                    if search.best_changed:
                        best = at
                        self._save_grads(at.grads)
                    if trial is not None:
                        at.grads.clear()
                    if self.objective.remembered and self._doubts(point, header, here, at):
                        ended = trial is None and search.result.is_last
                        at = self._look_back(closure, options, here, at, ended)
            except BaseException:
                self.undo()
                raise
            result = search.result
            lower = self.lowers(result, point, options)
            found = lower and not _is_luck(search, point)
            if found or not self._learns_noise(search, options):
                break
            if self.objective.left <= 0:
                if lower:  # curvature has not misled this search
                    result = result._replace(reason="noise")
                break
            at.grads.clear()
        if header.self_scaling:
            self.usual.learn(result, header.direction_dot_grad, options.lr)
        if self.objective.remembered and options.seen:
            self.objective.trust(result.step * -header.direction_dot_grad, point)
        return result, at, best

    def attempt(
        self, closure: Closure, options: StepOptions, start: Point, along_direction: bool
    ) -> Point:
        """A trial; of infinite loss where the closure raises what it is allowed to."""
        if not options.trial_errors:
            return self.objective.evaluate(closure, options, along_direction)
        self.objective.allowed = options.trial_errors
        try:
            return self.objective.evaluate(closure, options, along_direction)
        except options.trial_errors:
            self._entry["func_evals"] += 1
        finally:
            self.objective.allowed = ()
        for i in self._history.part.indices:  # what is restored there will find a place
            if (param := self._flat.params[i]).grad is None:
                param.grad = torch.zeros_like(param)
        common = self.objective.note_raised(options)
        return common or replace(start, value=math.inf, grads=[])

    def end(
        self, closure: Closure, options: StepOptions, point: Point, header: Header, step: float
    ) -> Point:
        """Evaluates the end of a step of fixed length; the start again where that does not fit.

        Raises:
            FunctionChanged: The start was remembered, and belongs to another function.
        """
        if not self.objective.remembered:
            return self.objective.evaluate(closure, options, False)
        at = self.objective.evaluate(closure, options, True)
        if at.part.absent != self._history.part.absent:  # these are not all the gradients
            return self.objective.look(closure, options, False)
        if at.loss is None or not self._doubts(point, header, step, at):
            return at
        return self._look_back(closure, options, step, at, True)

    def _doubts(self, point: Point, header: Header, step: float, at: Point) -> bool:
        """Whether to evaluate the start again, since a trial does not fit it.

        Where trials never do, though it is the same function again and again, gradients are not
        those of the loss (clipped inside the closure, say): then only now and then.
        """
        if self._fits(point, header, step, at):
            self._misfits = 0
            return False
        self._misfits += 1
        return self._misfits <= BELIEVED_MISFITS or self._misfits % BELIEVED_MISFITS == 0

    def _fits(self, point: Point, header: Header, step: float, at: Point) -> bool:
        """Whether a trial can be of the function that was remembered where the step began.

        The loss at both ends and the slopes there have to go together: for a quadratic they do to
        the last digit, for others nearly. An offset between two functions is beyond that.
        """
        rise, here, there = at.value - point.value, header.direction_dot_grad, at.stats.slope
        expected = 0.5 * step * (here + there)
        scale = max(abs(rise), abs(step * here), abs(step * there))
        precision = self.objective.precision
        # A loss that is nothing but rounding may be any other; another function's has digits.
        share = 1.0 if precision.without_digits(point.value) else 2.0 * precision.noise
        return bool(abs(rise - expected) <= MISFIT * scale + share * abs(point.value))

    def _look_back(
        self, closure: Closure, options: StepOptions, step: float, at: Point, ended: bool
    ) -> Point:
        """Evaluates the start again, which was remembered; FunctionChanged where it is another's.

        Leaves the parameters there, or at ``step`` again where the search has ended.
        """
        if ended:
            self._save_grads(at.grads)
        self._history.move(self.origin(), 0.0, save=False)
        self.objective.look_again(closure, options)
        if not ended:
            return at
        self._history.move(self.origin(), step, save=False)
        return self.return_to(at, options)

    def lowers(self, result: LineSearchResult, point: Point, options: StepOptions) -> bool:
        """Whether a search from the point has found a step that is worth taking.

        Losses that noise has made higher must not add up: on one function none is accepted that is
        above the lowest by more than noise explains (:meth:`Precision.is_low`).
        """
        if result.loss < point.value:
            return True
        if result.reason not in PASSED:
            return False
        return not self.objective.is_one_function(options) or self.objective.precision.is_low(
            result.loss
        )

    def _learns_noise(self, search: LineSearch, options: StepOptions) -> bool:
        """Whether noise may explain the failure of a search that can live with it."""
        if not isinstance(search, ApproximateWolfe):
            return False
        objective = self.objective
        # Else it may be another function at every trial.
        one = objective.is_one_function(options) and objective.habits.doubles
        return objective.precision.learn(search.noise_needed, one and search.shows_noise)

    def _save_grads(self, grads: list[Tensor]) -> None:
        if self._best_grads is None:
            self._best_grads = self._flat.new_vector()
        part = self._history.part
        self._ops.grad_gather(part.reals(part.params), grads, part.offsets, self._best_grads)

    def return_to(self, best: Point, options: StepOptions) -> Point:
        """Gradients and losses of an earlier trial, where the parameters are again."""
        assert self._best_grads is not None
        part = self._history.part
        found, grads = self._flat.gradients(options.freezing)
        if found.absent != part.absent:  # the caller evaluates again
            return replace(best, part=found)
        self._ops.grad_scatter(part.reals(part.params), grads, part.offsets, self._best_grads)
        return replace(best, grads=grads)

    def undo(self) -> None:
        """Takes the step under way, or the last one, back."""
        self._history.move(self.origin(), 0.0, save=False)
        self.objective.drop_pair()
        self.objective.forget_point()

    def _search(self, name: str, budget: int) -> LineSearch:
        key = (name, min(MAX_LINE_SEARCH_EVALUATIONS, budget))
        if key not in self._searches:
            # What rounding hides of a loss, in units of the loss: below it there is no descent to
            # find, only evaluations to waste.
            noise = torch.finfo(self._flat.dtype).eps
            search = make_line_search(key[0], max_evaluations=key[1], loss_eps=noise)
            assert search is not None
            self._searches[key] = search
        if name == "approximate_wolfe":
            self._searches[key].loss_eps = self.objective.precision.noise
        return self._searches[key]

    def is_final(self, point: Point, header: Header, ended: str) -> bool:
        """Whether rounding is why not even the shortest visible step along -g lowers the loss.

        It is where one rounding of the parameters should change the loss by less than its noise,
        or where a sum of squares has no digits left. (Slopes that contradict a loss with digits,
        and trials that are not finite, say nothing of rounding.)

        ``ended``: why the last search did.
        """
        if self.objective.precision.without_digits(point.value):
            return True
        if ended in NOT_ROUNDING:
            return False
        visible = (
            torch.finfo(self._flat.dtype).eps * self._largest_parameter() / header.direction_max
        )
        decrease = -visible * header.direction_dot_grad
        return self._shortest <= visible and decrease <= self.objective.precision.noise * abs(
            point.value
        )


def _is_luck(search: LineSearch, start: Point) -> bool:
    """Whether a search that no step ended well found less than the noise that would explain it."""
    if not isinstance(search, ApproximateWolfe) or (result := search.result).reason in PASSED:
        return False
    return start.value - result.loss <= search.noise_needed * abs(start.value) < math.inf
