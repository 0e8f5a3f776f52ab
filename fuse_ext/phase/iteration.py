"""The L-BFGS iteration (Algorithms 1 and 2) that LBFGS, FusePV and Fuse share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.ring import History
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.scalars import Header
from fuse_ext.objective.evaluations import EVALUATION_NAMES, Point
from fuse_ext.objective.step_options import LbfgsOptions, spread_lr
from fuse_ext.objective.trials import MAX_LINE_SEARCH_EVALUATIONS, Searching
from fuse_ext.search.noise import PRECISION_NAMES
from fuse_ext.vector.flat import Closure, FlatParams

__all__ = [
    "COUNTERS",
    "ENGINE_NAMES",
    "MAX_LINE_SEARCH_EVALUATIONS",
    "LbfgsEngine",
    "LbfgsOptions",
    "Point",
    "spread_lr",
]

# Each time that not even -g leads anywhere the first trial is cut by this factor, so often.
CUT, MOST_CUTS = 0.1, 3
# Where searches are cut short by max_eval, and where a fixed step is not finite, so often.
SHORTEST_CUT = 15
# Searches that ended so have not failed for rounding.
NOT_ROUNDING = ("slopes_disagree", "non_finite")
# Weight of the failures before the last step: four in a row, or a third of all, make 3.
FAILING_DECAY = 0.9
# So many starts in a row that are not finite may be the fault of batches.
BAD_BATCHES = 3


class LbfgsEngine(Searching):
    """The L-BFGS iteration on a flat vector of parameters.

    ``entry`` is the optimizer's state entry (on its first parameter, as in torch.optim.LBFGS): it
    holds the history's tensors and the counters ``n_iter``, ``func_evals`` and so on.
    """

    _grad_prev_apart = False

    def __init__(
        self,
        flat: FlatParams,
        ops: Ops,
        entry: dict[str, Any],
        history_size: int,
        history_dtype: torch.dtype | None,
    ) -> None:
        apart = self._grad_prev_apart
        history = History(flat, ops, entry, history_size, history_dtype, apart)
        super().__init__(flat, ops, entry, history)
        for name in (*COUNTERS, *TALLIES):
            entry.setdefault(name, 0)
        self._direction_max = 0.0
        # Where the parameters stand, None where it was not evaluated.
        self._stand: Point | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        return self.history.nbytes

    # --- one optimizer step -----------------------------------------------------------------

    def step(self, closure: Closure | None, options: LbfgsOptions, evaluated: Any = None) -> Any:
        """At most ``max_iter`` iterations of Algorithm 1.

        If the closure raises, the parameters return to the last iterate completed (with one
        iteration per step: to where the step began), and calling again goes on from there.
        ``evaluated``: the loss of gradients that the closure has just made where the step begins.

        Returns:
            The closure's loss where the step began.
        """
        self.flat.check_unchanged()
        point = self._stand = self.start(closure, options, evaluated)
        first_loss = point.loss
        if not point.finite:
            self._refuse_start()
            return first_loss
        self._entry["bad_starts"] = 0
        if self.settled:
            self.stay_settled(options)
            self.progress.reason = self.settled
        elif options.lr == 0.0:
            self.progress.reason = "lr"
        elif point.stats.abs_max <= options.tolerance_grad:
            self.progress.reason = "gradient"
        else:
            try:
                self._iterations(closure, options, point)
            except BaseException:
                self._note_interruption(point, options)
                raise
        self.note_arrival(self._stand, options)
        self._stand = None
        if self.progress.reason in ("lr", "gradient"):
            self._memory = None  # a step calls the closure, whatever comes of it
        return first_loss

    def _note_interruption(self, start: Point, options: LbfgsOptions) -> None:
        """The parameters are at the last iterate completed; if that is the start, nothing was."""
        if self._stand is start:
            self.note_return(options)
        else:
            self.note_arrival(self._stand, options)

    def _iterations(self, closure: Closure | None, options: LbfgsOptions, point: Point) -> None:
        here: Point | None = point
        for iteration in range(options.max_iter):
            if iteration > 0 and self._left <= 0:
                self.progress.reason = "max_eval"
                break
            self.progress.reason = "max_iter"
            before = here
            assert before is not None
            here = self._iterate(closure, options, before, iteration)
            if here is None:
                break
            moved = self._entry["pair_step"] is not None
            if moved and self.is_one_function(options) and self._at_floor(here):
                self.progress.reason = "precision"
                self.settle_at(here, options, "precision")
                break
            if moved and self._converged(options, before, here, iteration):
                break
        if here is not None and not options.deterministic and not options.pairs_elsewhere:
            self.absorb_pair(here, options)

    def _at_floor(self, here: Point) -> bool:
        return here.loss is not None and self.precision.at_floor(here.value, here.stats.square)

    def _converged(self, options: LbfgsOptions, before: Point, here: Point, iteration: int) -> bool:
        """torch.optim.LBFGS's tests after an iteration; notes the reason."""
        reason = None
        if here.stats.abs_max <= options.tolerance_grad:
            reason = "gradient"
        elif self.progress.step_length * self._direction_max <= options.tolerance_change:
            reason = "step"
        elif here.loss is not None and abs(here.value - before.value) < options.tolerance_change:
            reason = "loss"
        elif here.loss is not None and 0.0 < options.rtol * abs(here.value) >= abs(
            here.value - before.value
        ):
            reason = "progress"
        last = iteration + 1 == options.max_iter
        if reason is not None and not (last and reason not in ("gradient", "progress")):
            self.progress.reason = reason
        return reason is not None

    def _iterate(
        self, closure: Closure | None, options: LbfgsOptions, point: Point, iteration: int
    ) -> Point | None:
        """Direction and step; the new point, or None where its gradient is not known."""
        self._entry["n_iter"] += 1
        header, moved = self._set_out(point, options, self.origin())
        if header is None:
            self.progress.reason = "no_descent"
            self.settle_at(point, options, "no_descent")
            return None
        if not moved and -header.direction_dot_grad <= options.tolerance_change:
            self.progress.reason = "slope"
            self.settle_at(point, options, "slope")
            return None
        self._memory = None  # nor does anyone else hold gradients that the closure may drop now
        point.grads.clear()
        self._direction_max = header.direction_max
        step = self.first_trial(header, point, options)
        if options.line_search is None:
            return self._fixed_step(closure, options, header, step, moved, iteration)
        assert closure is not None
        return self._searched_step(closure, options, point, header, step, moved, iteration)

    def first_trial(self, header: Header, point: Point, options: LbfgsOptions) -> float:
        """lr, cut to a visible step of 1-norm about lr while nothing is known of the curvature."""
        if header.usable > 0 or point.stats.abs_sum == 0.0:
            self._entry["cuts"] = 0
            return options.lr
        visible = self.precision.visible_step(
            self._largest_parameter(),
            point.stats.abs_max,
            point.stats.square,
            None if options.line_search is None else point.value,
        )
        step = max(min(1.0, 1.0 / point.stats.abs_sum), visible)
        return step * CUT ** self._entry["cuts"] * options.lr

    def _largest_parameter(self) -> float:
        """max |x| of the parameters that take part."""
        # Empty tensors have no largest element.
        largest = [p.detach().abs().max() for p in self.history.part.params if p.numel()]
        return float(torch.stack([x.double() for x in largest]).max())

    # --- curvature --------------------------------------------------------------------------

    def find_direction(self, point: Point, options: LbfgsOptions) -> Header | None:
        """-H g at the point; -g, with the history forgotten, where that does not descend."""
        return self._set_out(point, options, None)[0]

    def _set_out(
        self, point: Point, options: LbfgsOptions, origin: Tensor | None
    ) -> tuple[Header | None, bool]:
        """The direction, and with ``origin`` the first trial too where it is lr.

        Returns:
            The direction's numbers, None where nothing descends; and whether the parameters are
            at lr p now, in which case the slope is below -tolerance_change.
        """
        if not point.part.params:
            return None, False
        if self.history.enter(point.part):
            self.drop_pair()  # it is of other parameters
        part = self.history.part
        decay, lr_scale = part.pick(options.weight_decay), part.pick(options.lr_scale)
        while True:
            header, moved = self.history.update_direction(
                point.grads,
                decay,
                lr_scale,
                options.maximize,
                self._entry["pair_step"],
                options.curvature_tol,
                origin,
                options.lr,
                options.tolerance_change,
            )
            self.drop_pair()
            if moved or (header.direction_dot_grad < 0.0 and math.isfinite(header.direction_sq)):
                return header, moved
            if header.usable == 0:
                return None, False
            self._reset()

    def absorb_pair(self, point: Point, options: LbfgsOptions) -> None:
        """Completes the pair in waiting with the gradient at ``point``, of the same batch."""
        if self._entry["pair_step"] is None:
            return
        part = self.history.part
        if point.part.absent == part.absent:
            self.history.update(
                point.grads,
                part.pick(options.weight_decay),
                options.maximize,
                self._entry["pair_step"],
                options.curvature_tol,
            )
        self.drop_pair()

    def take_step(self, step: float) -> None:
        """Notes that the parameters have moved by step * p."""
        self._entry["pair_step"] = self.progress.step_length = step

    def refuse(self, point: Point) -> None:
        """Counts a point that is not finite; nothing of it enters the history."""
        assert not point.finite
        self.count_non_finite()
        self.drop_pair()

    def count_non_finite(self) -> None:
        """Notes that a step was not taken for a NaN or infinite value."""
        self._entry["non_finite"] += 1
        self.progress.reason = "non_finite"

    def _refuse_start(self) -> None:
        """Counts a start that is not finite; one that follows a step there is left again.

        A few times may be the fault of batches. Then it is that of a fixed step whose end was not
        evaluated: it is undone, and the next one is shorter or another.
        """
        self.count_non_finite()
        self._entry["bad_starts"] += 1
        here = self._arrived is not None and self._arrived[0] == self.flat.places()
        bad = self._entry["bad_starts"] > BAD_BATCHES
        if not bad or self._entry["pair_step"] is None or not here:
            return
        self._go_back(self.origin())
        self._count_failing(True)
        self._retreat(self.history.header())

    def _retreat(self, header: Header) -> None:
        """The last direction leads nowhere: -g next time and, if it was that, a shorter step."""
        if header.usable > 0:
            self._reset()
        else:
            self._entry["cuts"] = min(self._entry["cuts"] + 1, SHORTEST_CUT)
            self._entry["step_cuts"] += 1

    def _count_failing(self, failed: bool) -> None:
        """A decaying count of the steps that led nowhere, though rounding did not hide the way."""
        self._entry["failing"] = FAILING_DECAY * self._entry["failing"] + failed

    def _reset(self) -> None:
        self._entry["resets"] += 1
        self.history.reset()

    @property
    def failing(self) -> float:
        """The decaying count of steps that led nowhere."""
        count: float = self._entry["failing"]
        return count

    def restart(self, point: Point, options: LbfgsOptions, found: bool) -> None:
        """Goes on from where somebody else has led, or stays for good where nothing was found."""
        self._entry.update(failing=0, cuts=0, settled="")
        self.drop_pair()
        self.progress.line_search = "none"
        if found:
            self._reset()
            self.progress.reason = "max_iter"
        else:
            self.settle_at(point, options, "line_search")
            self.progress.reason = "line_search"
        point.grads.clear()  # of another point by now
        self.note_arrival(point, options)

    # --- steps ------------------------------------------------------------------------------

    def _fixed_step(
        self,
        closure: Closure | None,
        options: LbfgsOptions,
        header: Header,
        step: float,
        moved: bool,
        iteration: int,
    ) -> Point | None:
        origin, before = self.origin(), self._stand
        if not moved:
            self.history.move(origin, step, save=True)
        self.take_step(step)
        self._stand = None
        self.progress.line_search = "fixed"
        last = iteration + 1 == options.max_iter
        # The evaluation of a deterministic closure is the next step's first one.
        wanted = not last or options.same_batch_pairs or options.deterministic
        if closure is None or not wanted or options.pairs_elsewhere or self._left <= 0:
            return None
        try:
            point = self.evaluate(closure, options, False)
        except BaseException:
            self._go_back(origin)
            self._stand = before
            raise
        if point.finite:
            self._stand = point
            return point
        self._go_back(origin)
        self._stand = before
        self.count_non_finite()
        self._count_failing(True)
        self._retreat(header)  # the same step would only lead there again
        return None

    def _searched_step(
        self,
        closure: Closure,
        options: LbfgsOptions,
        point: Point,
        header: Header,
        step: float,
        moved: bool,
        iteration: int,
    ) -> Point | None:
        origin = self.origin()
        met, whole = self._entry["non_finite"], self._left >= MAX_LINE_SEARCH_EVALUATIONS
        result, at, best = self.search(closure, options, point, header, step, moved)
        if not self.lowers(result, point, options):
            self._go_back(origin)
            if self._entry["non_finite"] > met:
                self.progress.line_search = "non_finite"
            elif result.success:
                self.progress.line_search = "no_progress"
            cut_short = result.reason == "max_evaluations" and not whole
            if cut_short and iteration > 0:  # the next step has more
                self.progress.reason = "max_eval"
                return None
            return self._search_failed(closure, options, point, header, iteration, cut_short)
        if not result.is_last:
            self.history.move(origin, result.step, save=False)
            at = self._return_to(best, options)
        self.take_step(result.step)
        self._count_failing(False)
        if at.part.absent != self.history.part.absent:
            # Others have gradients here than where the step began: those are the next ones.
            self.drop_pair()
            self._stand = self.evaluate(closure, options, False) if self.has_budget else None
            return self._stand
        self._stand = at
        return at

    def _search_failed(
        self,
        closure: Closure,
        options: LbfgsOptions,
        point: Point,
        header: Header,
        iteration: int,
        cut_short: bool,
    ) -> Point | None:
        """Goes on with -g, then with shorter steps along it, unless rounding hides any descent."""
        self._entry["line_search_failures"] += 1
        hidden = self.progress.line_search == "no_progress"
        if hidden and not self.is_one_function(options) and self._left > 0:
            # Or is it another function each time (dropout, say)?
            again = self.evaluate(closure, options, False)
            hidden = abs(again.value - point.value) <= self.precision.noise * abs(point.value)
        steepest = header.usable == 0
        final = hidden or (steepest and self._is_final(point, header))
        self._count_failing(not final and not cut_short)
        self.progress.reason = "precision" if steepest and final else "line_search"
        most_cuts = SHORTEST_CUT if cut_short else MOST_CUTS
        if steepest and (final or self._entry["cuts"] >= most_cuts):
            self.settle_at(point, options, self.progress.reason)
            return None
        self._retreat(header)
        if iteration + 1 == options.max_iter:
            return None
        if self._left <= 0:
            self.progress.reason = "max_eval"
            return None
        again = self.evaluate(closure, options, False)
        if again.finite:
            self._stand = again
            return again
        self.count_non_finite()
        return None

    def _is_final(self, point: Point, header: Header) -> bool:
        """Whether rounding is why not even the shortest visible step along -g lowers the loss.

        It is where one rounding of the parameters should change the loss by less than its noise,
        or where a sum of squares has no digits left. (Slopes that contradict a loss with digits,
        and trials that are not finite, say nothing of rounding.)
        """
        if self.precision.without_digits(point.value):
            return True
        if self.progress.line_search in NOT_ROUNDING:
            return False
        visible = (
            torch.finfo(self.flat.dtype).eps * self._largest_parameter() / header.direction_max
        )
        decrease = -visible * header.direction_dot_grad
        return self._shortest <= visible and decrease <= self.precision.noise * abs(point.value)


# What an entry counts since the start, for reports, and what it holds besides tensors in all.
COUNTERS = ("n_iter", "func_evals", "resets", "line_search_failures", "step_cuts", "non_finite")
# The tallies are of the present: trials cut, and failed steps, the last ones weighing most.
TALLIES = ("cuts", "failing", "bad_starts")
ENGINE_NAMES = (*EVALUATION_NAMES, *COUNTERS, *TALLIES, *PRECISION_NAMES)
