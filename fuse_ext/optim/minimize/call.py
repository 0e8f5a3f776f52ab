"""``fuse_ext.minimize``: a function, a start, and a result that says how it ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fuse_ext.checks import check_integer, check_number
from fuse_ext.objective.progress import CONVERGED
from fuse_ext.objective.step_options import MAX_LINE_SEARCH_EVALUATIONS
from fuse_ext.optim.lbfgs import LBFGS
from fuse_ext.optim.minimize.bounded import At, Box, minimize_in_box
from fuse_ext.optim.minimize.tree import Fun, Tree
from fuse_ext.tell.report import Report

MESSAGES = {
    "gradient": "the gradient is at most gtol",
    "progress": "a step gained at most ftol of the loss",
    "precision": "rounding hides any further decrease of the loss",
    "no_descent": "no direction descends",
    "slope": "no direction descends",
    "max_iter": "maxiter iterations were made",
    "max_eval": "maxfun evaluations were made",
    "line_search": "no step lowers the loss: is the gradient right, and the loss smooth?",
    "non_finite": "the loss or gradient is NaN or infinite at x0",
    "callback": "the callback raised StopIteration",
    "no_gradient": "the gradient is 0 at x0",
}


@dataclass(frozen=True)
class Minimum:
    """What :func:`minimize` found; the names are those of scipy's ``OptimizeResult``.

    Attributes:
        x: The point, a tree like x0.
        fun: The loss there.
        grad: The gradient there, a tree like x0 (``jac`` in scipy).
        nit: Iterations.
        nfev: Evaluations, each of the loss and its gradient.
        success: Whether nothing is left to gain.
        message: Why it ended.
        report: In the terms of the optimizers.
    """

    x: Any
    fun: float
    grad: Any
    nit: int
    nfev: int
    success: bool
    message: str
    report: Report


def minimize(
    fun: Fun,
    x0: Any,
    *,
    bounds: Any = None,
    gtol: float = 1e-5,
    ftol: float = 0.0,
    maxiter: int = 15_000,
    maxfun: int = 15_000,
    history_size: int = 100,
    callback: Callable[[Any], Any] | None = None,
    trial_errors: tuple[type[Exception], ...] = (),
) -> Minimum:
    r"""For one smooth function of a few tensors, in one call; FusePV is for training a model.

    L-BFGS with approximate Wolfe (:class:`~fuse_ext.LBFGS` with ``deterministic=True``): about one
    evaluation an iteration. With bounds it is a projected L-BFGS. Where the start is poor, the
    loss noisy or the function a model in training, use :class:`~fuse_ext.FusePV`, which takes Adam
    steps first and is saved in checkpoints.

    ::

        x0 = {"a": torch.zeros(3), "b": torch.ones(())}
        found = minimize(lambda x: ((x["a"] - x["b"]) ** 2).sum() + (x["b"] - 2) ** 2, x0)
        found.success, found.x["a"]

    Args:
        fun: Takes a tree like x0, returns a scalar tensor. It is differentiated by autograd and
            must be the same function at every call.
        x0: A tensor, or lists, tuples and dictionaries of them, on one device, of any floating (or,
            without bounds, complex) dtype. They are not changed. float64 reaches farther.
        bounds: None, or a pair (lower, upper) or an object with ``lb`` and ``ub``; each of them
            None, a number, a tensor that broadcasts to x0, or a tree like x0 of these.
        gtol: Ends where max \|g\| is at most this; with bounds, where max \|P(x - g) - x\| is, P
            the projection onto them. Absolute, as in scipy: 0 goes on to the rounding of the loss.
        ftol: Ends where a step gains at most this share of the loss; 0 for never.
        maxiter: Iterations at most.
        maxfun: Evaluations at most, at least 3.
        history_size: Pairs kept, at most 808 bytes an element in float32 (scipy: 10).
        callback: Called with x after each iteration; may raise StopIteration.
        trial_errors: Exceptions of ``fun`` at a trial that count as an infinite loss.

    Returns:
        Where it ended. ``fun`` there is never above that at x0.

    Raises:
        TypeError, ValueError: An argument out of range, or ``fun`` returns no scalar tensor.

    References:
        Nocedal and Wright, Numerical Optimization, 2006, Algorithm 7.5. D. P. Bertsekas, Projected
        Newton methods, SIAM Journal on Control and Optimization 20, 1982.
    """
    for name, value in (("gtol", gtol), ("ftol", ftol)):
        check_number(name, value, 0.0)
    for name, count, least in (
        ("maxiter", maxiter, 1),
        ("maxfun", maxfun, 3),
        ("history_size", history_size, 1),
    ):
        check_integer(name, count, least)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable or None, got {callback!r}")
    run = _Run(fun, Tree(x0), gtol, ftol, maxiter, maxfun, history_size, callback, trial_errors)
    return run.free() if bounds is None else run.within(bounds)


@dataclass
class _Run:
    """One call; see :func:`minimize`."""

    fun: Fun
    tree: Tree
    gtol: float
    ftol: float
    maxiter: int
    maxfun: int
    history_size: int
    callback: Callable[[Any], Any] | None
    trial_errors: tuple[type[Exception], ...]
    nfev: int = 0
    # Of the last evaluation: the leaves' versions, and the loss.
    last: tuple[list[int], float] = ([], math.nan)

    def evaluate(self) -> Tensor:
        self.nfev += 1
        loss = self.tree.evaluate(self.fun)
        self.last = self._versions(), float(loss)
        return loss

    def _versions(self) -> list[int]:
        return [leaf._version for leaf in self.tree.leaves]

    def loss_here(self) -> float:
        """The loss where the leaves are; evaluated, unless that was the last thing done."""
        if self.last[0] != self._versions():
            self.evaluate()
        return self.last[1]

    def stops(self) -> bool:
        if self.callback is None:
            return False
        try:
            self.callback(self.tree.copy())
        except StopIteration:
            return True
        return False

    def free(self) -> Minimum:
        """Without bounds: LBFGS, an iteration a step."""
        optimizer = LBFGS(
            self.tree.leaves,
            max_iter=1,
            tolerance_grad=self.gtol,
            tolerance_change=0.0,
            rtol=self.ftol,
            history_size=self.history_size,
            line_search_fn="approximate_wolfe",
            deterministic=True,
            trial_errors=self.trial_errors,
        )
        group, reason, before = optimizer.param_groups[0], "max_iter", 0
        for _ in range(self.maxiter):
            left = self.maxfun - self.nfev - 1  # one is for the loss at the end
            if left < 1 + (self.nfev == 0):
                reason = "max_eval"
                break
            # A step counts the evaluation where it begins, which it remembers after the first one.
            group["max_eval"] = min(MAX_LINE_SEARCH_EVALUATIONS + 1, left + (self.nfev > 0))
            optimizer.step(self.evaluate)
            report = optimizer.report()
            if report.lbfgs_iterations > before and report.stop_reason == "max_iter":
                before = report.lbfgs_iterations
                if self.stops():
                    reason = "callback"
                    break
            if report.converged or report.stop_reason in ("non_finite", "no_gradient"):
                reason = report.stop_reason
                break
        loss = self.loss_here()
        return self._found(reason, replace(optimizer.report(), loss=loss))

    def within(self, bounds: Any) -> Minimum:
        """With bounds: projected L-BFGS."""
        tree = self.tree
        box = Box(*tree.bounds(bounds))

        def evaluate(x: Tensor) -> At:
            tree.put(x)
            try:
                loss = float(self.evaluate())
            except self.trial_errors:
                if self.nfev == 1:
                    raise
                return At(x, math.inf, torch.full_like(x, math.nan))
            return At(tree.flat(list(tree.leaves)), loss, tree.flat(tree.grads()))

        def note(at: At) -> bool:
            tree.put(at.x)
            return self.stops()

        at, reason, nit, length = minimize_in_box(
            evaluate,
            tree.flat(list(tree.leaves)),
            box,
            history_size=self.history_size,
            gtol=self.gtol,
            ftol=self.ftol,
            maxiter=self.maxiter,
            has_budget=lambda: self.nfev < self.maxfun,
            note=note,
        )
        tree.put(at.x)
        pieces = at.grad.split([leaf.numel() for leaf in tree.leaves])
        for leaf, piece in zip(tree.leaves, pieces, strict=True):
            leaf.grad = piece.view(leaf.shape).to(leaf.dtype)
        report = Report(
            phase="lbfgs",
            loss=at.loss,
            second_phase="projected L-BFGS within bounds",
            lbfgs_iterations=nit,
            evaluations=self.nfev,
            curvature="pairs",
            step_length=length,
            stop_reason=reason,
        )
        return self._found(reason, report)

    def _found(self, reason: str, report: Report) -> Minimum:
        grads = self.tree.of(self.tree.grads())
        assert report.loss is not None
        return Minimum(
            x=self.tree.copy(),
            fun=report.loss,
            grad=grads,
            nit=report.lbfgs_iterations,
            nfev=self.nfev,
            success=reason in CONVERGED,
            message=MESSAGES.get(reason, reason),
            report=report,
        )
