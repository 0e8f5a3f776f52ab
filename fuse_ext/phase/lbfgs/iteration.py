"""The L-BFGS iteration (Algorithms 1 and 2), with a line search or a fixed step."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fuse_ext.curvature.dense import MATRIX_NAMES, check_matrix_state
from fuse_ext.curvature.protocol import InverseHessian
from fuse_ext.curvature.ring_state import check_ring_state
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.scalars import Header
from fuse_ext.objective.evaluations import (
    EVALUATION_NAMES,
    Evaluations,
    FunctionChanged,
    Point,
    check_evaluation_state,
)
from fuse_ext.objective.progress import Progress
from fuse_ext.objective.setbacks import COUNTERS, MOST_CUTS, SHORTEST_CUT, TALLIES, Setbacks
from fuse_ext.objective.step_options import MAX_LINE_SEARCH_EVALUATIONS, StepOptions
from fuse_ext.objective.trials import Trials
from fuse_ext.objective.usual_step import UsualStep
from fuse_ext.search.line_search import LineSearchResult
from fuse_ext.search.noise import PRECISION_NAMES
from fuse_ext.vector.flat import Closure, FlatParams, Part

# So many starts in a row that are not finite may be the fault of batches.
BAD_BATCHES = 3
# What an entry holds of it besides the history's tensors.
ITERATION_NAMES = (*EVALUATION_NAMES, *COUNTERS, *TALLIES, *PRECISION_NAMES, *UsualStep.NAMES)


class Iteration:
    """The L-BFGS iteration on a flat vector of parameters.

    ``entry``, the optimizer's state entry (on its first parameter, as in torch.optim.LBFGS), holds
    ``n_iter``, ``func_evals`` and so on, and what ``history``, the inverse Hessian, keeps there.
    """

    def __init__(
        self, flat: FlatParams, ops: Ops, entry: dict[str, Any], history: InverseHessian
    ) -> None:
        self.flat, self.ops, self.entry, self.history = flat, ops, entry, history
        self.objective = Evaluations(flat, entry, self.history)
        self.trials = Trials(self.objective, ops, entry)
        self.progress = Progress(reason=entry["settled"] or Progress.reason)
        self.setbacks = Setbacks(entry, self.history, self.progress)
        self._direction_max = 0.0
        self._part: Part | None = None  # that of the last direction
        self._stand: Point | None = None  # where parameters are, if that was evaluated

    # --- one optimizer step -----------------------------------------------------------------

    def run(self, closure: Closure | None, options: StepOptions, evaluated: Any = None) -> Any:
        """At most ``max_iter`` iterations of Algorithm 1.

        If the closure raises, the parameters return to the last iterate completed (with one
        iteration per step: to where the step began), and calling again goes on from there.
        ``evaluated``: the loss of gradients that the closure has just made where the step begins.

        Returns:
            The closure's loss where the step began.
        """
        self.flat.check_unchanged()
        objective, progress = self.objective, self.progress
        point = self._stand = objective.start(closure, options, evaluated)
        if not point.finite:
            self._refuse_start()
            return point.loss
        self.entry["bad_starts"] = 0
        if settled := self.entry["settled"]:
            objective.stay_settled(options)
            progress.reason = settled
        elif options.lr == 0.0:
            progress.reason = "lr"
        elif point.stats.abs_max <= options.tolerance_grad:
            progress.reason = "gradient"
            # Sums of squares that are 0 are solved before the first iteration.
            trained = point.stats.abs_max > 0.0 or self.entry["n_iter"] > 0 or point.value == 0.0
            if not (trained and point.part.params) and self.flat.total:
                progress.stop_untrained(self.entry["n_iter"])
        else:
            try:
                self._iterations(closure, options, point)
            except BaseException:
                self._note_interruption(point, options)
                raise
        objective.note_arrival(self._stand, options)
        self._stand = None
        return point.loss

    def _note_interruption(self, start: Point, options: StepOptions) -> None:
        """The parameters are at the last iterate completed; if that is the start, nothing was."""
        if self._stand is start:
            self.objective.note_return(options)
        else:
            self.objective.note_arrival(self._stand, options)

    def _iterations(
        self, closure: Closure | None, options: StepOptions, here: Point | None
    ) -> None:
        for iteration in range(options.max_iter):
            if iteration > 0 and self.objective.left <= 0:
                self.progress.reason = "max_eval"
                break
            self.progress.reason = "max_iter"
            assert here is not None
            before, here = here, self._iterate(closure, options, here, iteration)
            self.objective.remembered = False
            if here is None:
                break
            moved = self.entry["pair_step"] is not None
            if moved and self.objective.at_floor(here, options):
                self.progress.reason = "precision"
                self.objective.settle_at(here, options, "precision")
                break
            if moved and self._converged(options, before, here, iteration):
                break
        if here is not None and not options.deterministic and not options.pairs_elsewhere:
            self.absorb_pair(here, options)

    def _converged(self, options: StepOptions, before: Point, here: Point, iteration: int) -> bool:
        """Whether the iteration was one too many; notes the reason."""
        return self.progress.ends_after(
            options,
            before.value,
            None if here.loss is None else here.value,
            here.stats.abs_max,
            self.progress.step_length * self._direction_max,
            last=iteration + 1 == options.max_iter,
        )

    def _iterate(
        self, closure: Closure | None, options: StepOptions, point: Point, iteration: int
    ) -> Point | None:
        """Direction and step; the new point, or None where its gradient is not known."""
        try:
            return self._attempt(closure, options, point, iteration)
        except FunctionChanged as news:
            self._stand = point = news.point
        if not point.finite:
            self.setbacks.count_non_finite()
        elif self.objective.left > 0:
            return self._attempt(closure, options, point, iteration)
        else:
            self.progress.reason = "max_eval"
        return None

    def _attempt(
        self, closure: Closure | None, options: StepOptions, point: Point, iteration: int
    ) -> Point | None:
        self.entry["n_iter"] += 1
        usual = options.lr * self.trials.usual.share  # the first trial where curvature is known
        header, moved = self._set_out(point, options, self.trials.origin(), usual)
        flat = not moved and header and -header.direction_dot_grad <= options.tolerance_change
        if header is None or flat:
            if self.objective.remembered:
                assert closure is not None
                self._stand = point = self.objective.look_again(closure, options)
            self.progress.reason = "slope" if flat else "no_descent"
            self.objective.settle_at(point, options, self.progress.reason)
            return None
        # Nor does anyone else hold gradients that the closure may drop now.
        self.objective.forget_point()
        point.grads.clear()
        self._direction_max = header.direction_max
        step = self.trials.first_trial(header, point, options, usual)
        if options.line_search is None:
            return self._fixed_step(closure, options, point, header, step, moved, iteration)
        assert closure is not None
        return self._searched_step(closure, options, point, header, step, moved, iteration)

    # --- curvature --------------------------------------------------------------------------

    def search(
        self,
        closure: Closure,
        options: StepOptions,
        point: Point,
        header: Header,
        step: float,
        moved: bool = False,
    ) -> tuple[LineSearchResult, Point, Point]:
        """:meth:`Trials.search`, of whose end the progress tells."""
        found = self.trials.search(closure, options, point, header, step, moved)
        self.progress.line_search = found[0].reason
        return found

    def find_direction(self, point: Point, options: StepOptions) -> Header | None:
        """-H g at the point; -g, with the history forgotten, where that does not descend."""
        return self._set_out(point, options, None, 0.0)[0]

    def _set_out(
        self, point: Point, options: StepOptions, origin: Tensor | None, step: float
    ) -> tuple[Header | None, bool]:
        """The direction; with ``origin`` the first trial ``step`` too where curvature is known.

        Returns:
            The direction's numbers, None where nothing descends; and whether the parameters are
            at it now, in which case the slope is below -tolerance_change.
        """
        if not (part := point.part).params:
            return None, False
        if part is not self._part and self.history.enter(part):  # as nobody else lets it
            self.objective.drop_pair()  # it is of other parameters
        self._part = part
        decay, lr_scale = part.pick(options.weight_decay), part.pick(options.lr_scale)
        while True:
            header, moved = self.history.update_direction(
                point.grads,
                decay,
                lr_scale,
                options.maximize,
                self.entry["pair_step"],
                options.curvature_tol,
                origin,
                step,
                options.tolerance_change,
            )
            self.objective.drop_pair()
            if moved or (header.direction_dot_grad < 0.0 and math.isfinite(header.direction_sq)):
                return header, moved
            if header.usable == 0:
                return None, False
            self.setbacks.reset()

    def absorb_pair(self, point: Point, options: StepOptions) -> None:
        """Completes the pair in waiting with the gradient at ``point``, of the same batch."""
        if self.entry["pair_step"] is None:
            return
        if point.part.absent == (part := self.history.part).absent:
            self.history.update(
                point.grads,
                part.pick(options.weight_decay),
                options.maximize,
                self.entry["pair_step"],
                options.curvature_tol,
            )
        self.objective.drop_pair()

    def take_step(self, step: float) -> None:
        """Notes that the parameters have moved by step * p."""
        self.entry["pair_step"] = self.progress.step_length = step

    def refuse(self, point: Point) -> None:
        """Counts a point that is not finite; nothing of it enters the history."""
        assert not point.finite
        self.setbacks.count_non_finite()
        self.objective.drop_pair()

    def _refuse_start(self) -> None:
        """Counts a start that is not finite; one that follows a step there is left again.

        A few times may be the fault of batches. Then it is that of a fixed step whose end was not
        evaluated: it is undone, and the next one is shorter or another.
        """
        self.setbacks.count_non_finite()
        self.entry["bad_starts"] += 1
        if self.entry["bad_starts"] <= BAD_BATCHES or self.entry["pair_step"] is None:
            return
        if not self.objective.stands_where_it_arrived():
            return
        self.trials.undo()
        self.setbacks.count_failing(True)
        self.setbacks.retreat(self.history.header())

    # --- steps ------------------------------------------------------------------------------

    def _fixed_step(
        self,
        closure: Closure | None,
        options: StepOptions,
        start: Point,
        header: Header,
        step: float,
        moved: bool,
        iteration: int,
    ) -> Point | None:
        before = self._stand
        if not moved:
            self.history.move(self.trials.origin(), step, save=True)
        self.take_step(step)
        self._stand = None
        self.progress.line_search = "fixed"
        last = iteration + 1 == options.max_iter
        # The evaluation of a deterministic closure is the next step's first one.
        wanted = not last or options.same_batch_pairs or options.deterministic
        if closure is None or not wanted or options.pairs_elsewhere or self.objective.left <= 0:
            return None
        try:
            point = self.trials.end(closure, options, start, header, step)
        except BaseException:
            self.trials.undo()
            self._stand = before
            raise
        if point.finite:
            self._stand = point
            return point
        self.trials.undo()
        self._stand = before
        self.setbacks.count_non_finite()
        self.setbacks.count_failing(True)
        self.setbacks.retreat(header)  # the same step would only lead there again
        return None

    def _searched_step(
        self,
        closure: Closure,
        options: StepOptions,
        point: Point,
        header: Header,
        step: float,
        moved: bool,
        iteration: int,
    ) -> Point | None:
        met, whole = self.entry["non_finite"], self.objective.left >= MAX_LINE_SEARCH_EVALUATIONS
        result, at, best = self.search(closure, options, point, header, step, moved)
        if not self.trials.lowers(result, point, options):
            self.trials.undo()
            if self.entry["non_finite"] > met:
                self.progress.line_search = "non_finite"
            elif result.success:
                self.progress.line_search = "no_progress"
            cut_short = result.reason == "max_evaluations" and not whole
            if cut_short and iteration > 0:  # the next step has more
                self.progress.reason = "max_eval"
                return None
            return self._search_failed(closure, options, point, header, iteration, cut_short)
        if not result.is_last:
            self.history.move(self.trials.origin(), result.step, save=False)
            at = self.trials.return_to(best, options)
        self.take_step(result.step)
        self.setbacks.count_success(header.usable == 0 and self.objective.is_one_function(options))
        if result.reason == "max_evaluations" and whole and self.setbacks.unlearn(header):
            self.objective.drop_pair()
        if at.part.absent != self.history.part.absent:
            # Others have gradients here than where the step began: those are the next ones.
            self.objective.drop_pair()
            again = self.objective.has_budget
            self._stand = self.objective.evaluate(closure, options, False) if again else None
            return self._stand
        self._stand = at
        return at

    def _search_failed(
        self,
        closure: Closure,
        options: StepOptions,
        point: Point,
        header: Header,
        iteration: int,
        cut_short: bool,
    ) -> Point | None:
        """Goes on with -g, then with shorter steps along it, unless rounding hides any descent."""
        again = None
        if self.objective.remembered:  # on another function a failure says nothing
            self._stand = again = self.objective.look_again(closure, options)
        self.entry["line_search_failures"] += 1
        ended = self.progress.line_search
        hidden = ended in ("no_progress", "noise")
        doubted = ended == "noise" or not self.objective.is_one_function(options)
        if hidden and doubted and self.objective.left > 0:
            # Or is it another function each time (dropout, say)?
            repeated = self.objective.evaluate(closure, options, False).value
            noise = self.objective.precision.noise_at_a_point
            hidden = abs(repeated - point.value) <= noise * abs(point.value)
        steepest = header.usable == 0
        final = hidden or (steepest and self.trials.is_final(point, header, ended))
        self.setbacks.count_failing(not final and not cut_short)
        self.progress.reason = "precision" if steepest and final else "line_search"
        most_cuts = SHORTEST_CUT if cut_short else MOST_CUTS
        if steepest and (final or self.entry["cuts"] >= most_cuts):
            self.objective.settle_at(point, options, self.progress.reason)
            self.setbacks.take_back()
            return None
        self.setbacks.retreat(header)
        if iteration + 1 == options.max_iter:
            return None
        if self.objective.left <= 0:
            self.progress.reason = "max_eval"
            return None
        again = again or self.objective.evaluate(closure, options, False)
        if again.finite:
            self._stand = again
            return again
        self.setbacks.count_non_finite()
        return None


def check_lbfgs_state(entry: dict[str, Any], slots: int, flat: FlatParams) -> None:
    """Raises ValueError unless a state entry holds pairs or a matrix of these parameters."""
    if any(name in entry for name in MATRIX_NAMES):
        check_matrix_state(entry, flat)
    else:
        check_ring_state(entry, slots, flat)
    check_evaluation_state(entry)
