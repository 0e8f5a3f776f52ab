"""The L-BFGS iteration (Algorithms 1 and 2) that LBFGS, FusePV and Fuse share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_ext.evaluations import Evaluations, Point
from fuse_ext.flat import Closure, FlatParams
from fuse_ext.history import History
from fuse_ext.lbfgs_options import LbfgsOptions, spread_lr
from fuse_ext.line_search import (
    ApproximateWolfe,
    LineSearch,
    LineSearchResult,
    make_line_search,
)
from fuse_ext.ops import Ops
from fuse_ext.precision import PRECISION_NAMES
from fuse_ext.report import Progress
from fuse_ext.scalars import Header

__all__ = [
    "COUNTERS",
    "ENGINE_NAMES",
    "MAX_LINE_SEARCH_EVALUATIONS",
    "LbfgsEngine",
    "LbfgsOptions",
    "Point",
    "spread_lr",
]

# Trials of one line search at most, as in torch.optim.LBFGS.
MAX_LINE_SEARCH_EVALUATIONS = 25
# Each time that not even -g leads anywhere the first trial is cut by this factor, so often.
CUT, MOST_CUTS = 0.1, 3
# Weight of the failures before the last step: four in a row, or a third of all, make 3.
FAILING_DECAY = 0.9
# So many starts in a row that are not finite may be the fault of batches.
BAD_BATCHES = 3
# Line searches that ended so have done what was asked, though the loss may show no decrease. One
# that fell back on a step without decrease would do so for ever.
PASSED = ("wolfe", "approximate_wolfe")


class LbfgsEngine(Evaluations):
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
        super().__init__(flat, entry, history)
        self.ops = ops
        for name in (*COUNTERS, *TALLIES):
            entry.setdefault(name, 0)
        self._bad_starts = 0  # in a row, that were not finite
        self.progress = Progress()
        self._direction_max = 0.0
        self._origin: Tensor | None = None
        self._best_grads: Tensor | None = None
        self._searches: dict[tuple[str, int], LineSearch] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        return self.history.nbytes

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch vectors held between steps (not part of the state)."""
        return sum(t.nbytes for t in (self._origin, self._best_grads) if t is not None)

    def origin(self) -> Tensor:
        """Scratch for the point that a step starts from."""
        if self._origin is None:
            self._origin = self._new_vector()
        return self._origin

    def _new_vector(self) -> Tensor:
        return torch.zeros(self.flat.numel, dtype=self.flat.dtype, device=self.flat.device)

    # --- one optimizer step -----------------------------------------------------------------

    def step(self, closure: Closure | None, options: LbfgsOptions) -> Any:
        """At most ``max_iter`` iterations of Algorithm 1.

        If the closure raises, the parameters return to the last iterate completed (with one
        iteration per step: to where the step began), and calling again goes on from there.

        Returns:
            The closure's loss where the step began.
        """
        self.flat.check_unchanged()
        evaluations_before = self._entry["func_evals"]
        point = self.start(closure, options)
        first_loss = point.loss
        if self._memory is not None and self._memory.settled:
            return first_loss
        if not point.finite:
            self._refuse_start()
            return first_loss
        self._bad_starts = 0
        if point.stats.abs_max <= options.tolerance_grad or options.lr == 0.0:
            self.progress.reason = "lr" if options.lr == 0.0 else "gradient"
            self._remember(point, options)
            return first_loss
        here: Point | None = point
        for iteration in range(options.max_iter):
            budget = options.max_eval - (self._entry["func_evals"] - evaluations_before)
            if iteration == 0:  # cut short, it might fail at every step in the same way
                budget = max(budget, MAX_LINE_SEARCH_EVALUATIONS)
            elif budget <= 0:
                self.progress.reason = "max_eval"
                break
            self.progress.reason = "max_iter"
            before = here
            assert before is not None
            here = self._iterate(closure, options, before, budget, iteration)
            if here is None:
                break
            moved = self._entry["pair_step"] is not None
            if moved and self._converged(options, before, here, iteration):
                break
            if moved and options.deterministic and self._at_floor(here):
                self.progress.reason = "precision"
                break
        if here is not None:
            if not options.deterministic and not options.pairs_elsewhere:
                self.absorb_pair(here, options)
            floor = options.deterministic and self.progress.reason == "precision"
            self._remember(here, options, settled=floor)
        self.note_arrival(options)
        return first_loss

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
        self,
        closure: Closure | None,
        options: LbfgsOptions,
        point: Point,
        budget: int,
        iteration: int,
    ) -> Point | None:
        """Direction and step; the new point, or None where its gradient is not known."""
        self._entry["n_iter"] += 1
        header, moved = self._set_out(point, options, self.origin())
        if header is None:
            self.progress.reason = "no_descent"
            self._remember(point, options, settled=True)
            return None
        if not moved and -header.direction_dot_grad <= options.tolerance_change:
            self.progress.reason = "slope"
            self._remember(point, options, settled=True)
            return None
        self._memory = None  # nor does anyone else hold gradients that the closure may drop now
        point.grads.clear()
        self._direction_max = header.direction_max
        step = self.first_trial(header, point, options)
        if options.line_search is None:
            return self._fixed_step(closure, options, header, step, moved, iteration)
        assert closure is not None
        return self._searched_step(closure, options, point, header, step, moved, budget, iteration)

    def first_trial(self, header: Header, point: Point, options: LbfgsOptions) -> float:
        """lr, cut to a visible step of 1-norm about lr while nothing is known of the curvature."""
        if header.usable > 0 or point.stats.abs_sum == 0.0:
            self._entry["cuts"] = 0
            return options.lr
        # Empty tensors have no largest element.
        largest = [p.detach().abs().max() for p in self.flat.params if p.numel()]
        visible = self.precision.visible_step(
            float(torch.stack([x.double() for x in largest]).max()),
            point.stats.abs_max,
            point.stats.square,
            None if options.line_search is None else point.value,
        )
        step = max(min(1.0, 1.0 / point.stats.abs_sum), visible)
        return step * CUT ** self._entry["cuts"] * options.lr

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
        grads = options.moving(point.grads)
        while True:
            header, moved = self.history.update_direction(
                grads,
                options.weight_decay,
                options.lr_scale,
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

    def _update(self, point: Point, options: LbfgsOptions) -> None:
        self.history.update(
            options.moving(point.grads),
            options.weight_decay,
            options.maximize,
            self._entry["pair_step"],
            options.curvature_tol,
        )
        self.drop_pair()

    def absorb_pair(self, point: Point, options: LbfgsOptions) -> None:
        """Completes the pair in waiting with the gradient at ``point``, of the same batch."""
        if self._entry["pair_step"] is not None:
            self._update(point, options)

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
        self._bad_starts += 1
        here = self._arrived is not None and self._arrived[0] == self.flat.places()
        if self._bad_starts <= BAD_BATCHES or self._entry["pair_step"] is None or not here:
            return
        self._go_back(self.origin())
        self._count_failing(True)
        self._retreat(self.history.header())

    def _retreat(self, header: Header) -> None:
        """The last direction leads nowhere: -g next time and, if it was that, a shorter step."""
        if header.usable > 0:
            self._reset()
        else:
            self._entry["cuts"] = min(self._entry["cuts"] + 1, 15)
            self._entry["step_cuts"] += 1

    def _count_failing(self, failed: bool) -> None:
        """A decaying count of the steps that led nowhere, though rounding did not hide the way."""
        self._entry["failing"] = FAILING_DECAY * self._entry["failing"] + failed

    def _reset(self) -> None:
        self._entry["resets"] += 1
        self.history.reset()

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
        origin = self.origin()
        if not moved:
            self.history.move(origin, step, save=True)
        self.take_step(step)
        self.progress.line_search = "fixed"
        last = iteration + 1 == options.max_iter
        # The evaluation of a deterministic closure is the next step's first one.
        wanted = not last or options.same_batch_pairs or options.deterministic
        if closure is None or not wanted or options.pairs_elsewhere:
            return None
        try:
            point = self.evaluate(closure, options, False)
        except BaseException:
            self._go_back(origin)
            raise
        if point.finite:
            return point
        self._go_back(origin)
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
        budget: int,
        iteration: int,
    ) -> Point | None:
        origin = self.origin()
        met = self._entry["non_finite"]
        result, at, best = self.search(closure, options, point, header, step, budget, moved)
        if not _lowers(result, point):
            self._go_back(origin)
            if self._entry["non_finite"] > met:
                self.progress.line_search = "non_finite"
            elif result.success:
                self.progress.line_search = "no_progress"
            if budget < MAX_LINE_SEARCH_EVALUATIONS and result.reason == "max_evaluations":
                self.progress.reason = "max_eval"
                return None
            return self._search_failed(closure, options, point, header, iteration)
        if not result.is_last:
            self.history.move(origin, result.step, save=False)
            at = self._return_to(best)
        self.take_step(result.step)
        self._count_failing(False)
        return at

    def search(
        self,
        closure: Closure,
        options: LbfgsOptions,
        point: Point,
        header: Header,
        step: float,
        budget: int,
        moved: bool = False,
    ) -> tuple[LineSearchResult, Point, Point]:
        """Line search along the direction at ``point``, starting with ``step``.

        Leaves the parameters at the last trial and the point of departure in :meth:`origin`; with
        ``moved`` they are at ``step`` already.

        Returns:
            The result, the last trial and the best one.
        """
        origin = self.origin()
        save = not moved
        while True:
            search = self._search(str(options.line_search), budget)
            trial: float | None = search.start(point.value, header.direction_dot_grad, step)
            at, best = point, point
            try:
                while trial is not None:
                    if not (moved and trial == step):
                        self.history.move(origin, trial, save)
                    save = moved = False
                    at = self.evaluate(closure, options, True)
                    self._entry["non_finite"] += not at.finite
                    trial = search.tell(at.value if at.finite else math.inf, at.stats.slope)
                    if search.best_changed:
                        best = at
                        self._save_grads(at.grads)
                    if trial is not None:
                        at.grads.clear()
            except BaseException:
                self._go_back(origin)
                raise
            result = search.result
            if _lowers(result, point) or not self._learns_noise(search):
                break
            at.grads.clear()
        self.progress.line_search = result.reason
        return result, at, best

    def _learns_noise(self, search: LineSearch) -> bool:
        """Whether noise may explain the failure of a search that can live with it."""
        return isinstance(search, ApproximateWolfe) and self.precision.learn(search.noise_needed)

    def _search_failed(
        self,
        closure: Closure,
        options: LbfgsOptions,
        point: Point,
        header: Header,
        iteration: int,
    ) -> Point | None:
        """Goes on with -g, then with shorter steps along it, unless rounding hides any descent."""
        self._entry["line_search_failures"] += 1
        hidden = self.progress.line_search == "no_progress"
        if hidden and not options.deterministic:
            # Or is it another function each time (dropout, say)?
            again = self.evaluate(closure, options, False)
            hidden = abs(again.value - point.value) <= self.precision.noise * abs(point.value)
        self._count_failing(not hidden)
        self.progress.reason = "precision" if hidden and header.usable == 0 else "line_search"
        if header.usable == 0 and (hidden or self._entry["cuts"] >= MOST_CUTS):
            self._remember(point, options, settled=True)
            return None
        self._retreat(header)
        if iteration + 1 == options.max_iter:
            return None
        again = self.evaluate(closure, options, False)
        if again.finite:
            return again
        self.count_non_finite()
        return None

    def _save_grads(self, grads: list[Tensor]) -> None:
        if self._best_grads is None:
            self._best_grads = self._new_vector()
        flat = self.flat
        self.ops.grad_gather(flat.reals(flat.params), grads, flat.offsets, self._best_grads)

    def _return_to(self, best: Point) -> Point:
        """Gradients and losses of an earlier trial, where the parameters are again."""
        assert self._best_grads is not None
        flat = self.flat
        grads = flat.grads()
        self.ops.grad_scatter(flat.reals(flat.params), grads, flat.offsets, self._best_grads)
        return best._replace(grads=grads)

    def undo(self) -> None:
        """Takes the last step back."""
        self._go_back(self.origin())

    def _go_back(self, origin: Tensor) -> None:
        """Undoes the step under way."""
        self.history.move(origin, 0.0, save=False)
        self.drop_pair()
        self._memory = None

    def _search(self, name: str, budget: int) -> LineSearch:
        key = (name, min(MAX_LINE_SEARCH_EVALUATIONS, budget))
        if key not in self._searches:
            # What rounding hides of a loss, in units of the loss: below it there is no descent to
            # find, only evaluations to waste.
            noise = torch.finfo(self.flat.dtype).eps
            search = make_line_search(key[0], max_evaluations=key[1], loss_eps=noise)
            assert search is not None
            self._searches[key] = search
        if name == "approximate_wolfe":
            self._searches[key].loss_eps = self.precision.noise
        return self._searches[key]


# What an entry counts since the start, for reports, and what it holds besides tensors in all.
COUNTERS = ("n_iter", "func_evals", "resets", "line_search_failures", "step_cuts", "non_finite")
# The tallies are of the present: trials cut, and failed steps, the last ones weighing most.
TALLIES = ("cuts", "failing")
ENGINE_NAMES = ("pair_step", *COUNTERS, *TALLIES, *PRECISION_NAMES)


def _lowers(result: LineSearchResult, point: Point) -> bool:
    """Whether a search has found a step that is worth taking."""
    return result.reason in PASSED or result.loss < point.value
