"""Trials along a direction: what a line search asks of the objective, and the way back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.ring import History
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.scalars import Header
from fuse_ext.objective.evaluations import Evaluations, Point
from fuse_ext.objective.step_options import LbfgsOptions
from fuse_ext.search import make_line_search
from fuse_ext.search.approximate_wolfe import ApproximateWolfe
from fuse_ext.search.line_search import LineSearch, LineSearchResult
from fuse_ext.tell.report import Progress
from fuse_ext.vector.flat import Closure, FlatParams

# Trials of one line search at most, as in torch.optim.LBFGS.
MAX_LINE_SEARCH_EVALUATIONS = 25
# Line searches that ended so have done what was asked, though the loss may show no decrease. One
# that fell back on a step without decrease would do so for ever.
PASSED = ("wolfe", "approximate_wolfe")


class Searching(Evaluations):
    """Moves the parameters along the direction in the history and evaluates there.

    Args:
        flat: The parameters.
        ops: Kernels to use.
        entry: The optimizer's state entry.
        history: Holds the direction.
    """

    def __init__(self, flat: FlatParams, ops: Ops, entry: dict[str, Any], history: History) -> None:
        super().__init__(flat, entry, history)
        self.ops = ops
        self.progress = Progress(reason=entry["settled"] or Progress.reason)
        self._origin: Tensor | None = None
        self._best_grads: Tensor | None = None
        self._searches: dict[tuple[str, int], LineSearch] = {}
        self._shortest = math.inf  # trial of the last search

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch vectors held between steps (not part of the state)."""
        return sum(t.nbytes for t in (self._origin, self._best_grads) if t is not None)

    def origin(self) -> Tensor:
        """Scratch for the point that a step starts from."""
        if self._origin is None:
            self._origin = self.new_vector()
        return self._origin

    def new_vector(self) -> Tensor:
        """A vector of zeros as long as the flat state."""
        return torch.zeros(self.flat.numel, dtype=self.flat.dtype, device=self.flat.device)

    def search(
        self,
        closure: Closure,
        options: LbfgsOptions,
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
        origin = self.origin()
        save = not moved
        self._shortest = math.inf
        while True:
            search = self._search(str(options.line_search), self._left)
            trial: float | None = search.start(point.value, header.direction_dot_grad, step)
            at, best = point, point
            try:
                while trial is not None:
                    if not (moved and trial == step):
                        self.history.move(origin, trial, save)
                    save = moved = False
                    self._shortest = min(self._shortest, trial)
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
            if (
                self.lowers(result, point, options)
                or not self._learns_noise(search)
                or self._left <= 0
            ):
                break
            at.grads.clear()
        self.progress.line_search = result.reason
        return result, at, best

    def lowers(self, result: LineSearchResult, point: Point, options: LbfgsOptions) -> bool:
        """Whether a search from the point has found a step that is worth taking.

        Losses that noise has made higher must not add up: on one function none is accepted that is
        above the lowest by more than noise explains (:meth:`Precision.is_low`).
        """
        if result.loss < point.value:
            return True
        if result.reason not in PASSED:
            return False
        return not self.is_one_function(options) or self.precision.is_low(result.loss)

    def _learns_noise(self, search: LineSearch) -> bool:
        """Whether noise may explain the failure of a search that can live with it."""
        return isinstance(search, ApproximateWolfe) and self.precision.learn(search.noise_needed)

    def _save_grads(self, grads: list[Tensor]) -> None:
        if self._best_grads is None:
            self._best_grads = self.new_vector()
        part = self.history.part
        self.ops.grad_gather(part.reals(part.params), grads, part.offsets, self._best_grads)

    def _return_to(self, best: Point, options: LbfgsOptions) -> Point:
        """Gradients and losses of an earlier trial, where the parameters are again."""
        assert self._best_grads is not None
        part = self.history.part
        found, grads = self.flat.gradients(options.freezing)
        if found.absent != part.absent:  # the caller evaluates again
            return best._replace(part=found)
        self.ops.grad_scatter(part.reals(part.params), grads, part.offsets, self._best_grads)
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
