"""L-BFGS within simple bounds, by projection.

Elements at a bound that the gradient presses them against stay there; the others take the step of
the two-loop recursion on what their elements of the pairs say, and are projected where it leads out
(Bertsekas 1982). The segment to the point that is projected is searched, as in L-BFGS-B 3.0
(Morales and Nocedal 2011), with this package's own search.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fuse_ext.objective.step_options import MAX_LINE_SEARCH_EVALUATIONS
from fuse_ext.search import make_line_search

# A pair needs s.y above this share of |s| |y|, as LBFGS's.
CURVATURE_TOL = 1e-8
# A direction has to descend by at least this share of |g| |d|.
LEAST_DESCENT = 1e-10
# A decrease of so many roundings of the loss, to first order, cannot be seen in it.
HIDDEN = 100.0


class At(NamedTuple):
    """The function at a point of the box.

    Attributes:
        x: The point.
        loss: Its value.
        grad: Its gradient.
    """

    x: Tensor
    loss: float
    grad: Tensor


@dataclass
class Pairs:
    """What steps have told of the curvature.

    Attributes:
        most: Pairs kept.
        held: (s, y), the oldest first.
    """

    most: int
    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, s: Tensor, y: Tensor) -> None:
        """Keeps a pair of positive curvature."""
        if float(s @ y) > CURVATURE_TOL * float(s.norm() * y.norm()):
            self.held.append((s, y))
            del self.held[: -self.most]

    def direction(self, grad: Tensor, free: Tensor) -> Tensor:
        """-H g on the free elements, 0 elsewhere; without pairs -g, of 1-norm 1 at most."""
        q = grad * free
        used = []
        for s, y in self.held:
            s, y = s * free, y * free
            curvature = float(s @ y)
            if curvature > CURVATURE_TOL * float(s.norm() * y.norm()):
                used.append((s, y, curvature))
        if not used:
            return -q / max(1.0, float(q.abs().sum()))
        shares = []
        for s, y, curvature in reversed(used):
            shares.append(float(s @ q) / curvature)
            q = q - shares[-1] * y
        _, y, curvature = used[-1]
        q = q * (curvature / float(y @ y))
        for (s, y, curvature), share in zip(used, reversed(shares), strict=True):
            q = q + (share - float(y @ q) / curvature) * s
        return -q


class Box:
    """The bounds.

    Args:
        low, high: Of each element.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high

    def project(self, x: Tensor) -> Tensor:
        """The nearest point within."""
        return torch.minimum(torch.maximum(x, self.low), self.high)

    def optimality(self, at: At) -> float:
        """max |P(x - g) - x|, which is max |g| away from the bounds and 0 at a solution."""
        return float((self.project(at.x - at.grad) - at.x).abs().max())

    def free(self, at: At) -> Tensor:
        """1 for the elements that may move, 0 for those that are pressed against a bound."""
        pressed = ((at.x <= self.low) & (at.grad > 0)) | ((at.x >= self.high) & (at.grad < 0))
        return (~pressed).to(at.x.dtype)

    def longest(self, x: Tensor, d: Tensor) -> float:
        """The largest t with x + t d within."""
        room = torch.where(d > 0, self.high - x, self.low - x)
        steps = torch.where(d == 0, torch.full_like(d, torch.inf), room / d)
        return float(steps.min())

    def direction(self, at: At, pairs: Pairs) -> Tensor | None:
        """Where to: to the projection of the quasi-Newton step, or of the steepest one."""
        free = self.free(at)
        for step in (pairs.direction(at.grad, free), Pairs(1).direction(at.grad, free)):
            d = self.project(at.x + step) - at.x
            if float(at.grad @ d) < -LEAST_DESCENT * float(at.grad.norm() * d.norm()):
                return d
            pairs.held.clear()
        return None


def minimize_in_box(
    evaluate: Callable[[Tensor], At],
    x: Tensor,
    box: Box,
    *,
    history_size: int,
    gtol: float,
    ftol: float,
    maxiter: int,
    has_budget: Callable[[], bool],
    note: Callable[[At], bool],
) -> tuple[At, str, int, float]:
    """Projected L-BFGS.

    Args:
        evaluate: The function; x is within the bounds.
        x: Where to begin, in float64.
        box: The bounds.
        history_size: Pairs kept.
        gtol: Ends where max |P(x - g) - x| is at most this.
        ftol: Ends where a step gains at most this share of the loss.
        maxiter: Iterations at most.
        has_budget: Whether another evaluation may be made.
        note: Told of every new point; true to stop.

    Returns:
        The last point, why it ended, the iterations and the last step length.
    """
    at, pairs, length = evaluate(box.project(x)), Pairs(history_size), 0.0
    for iteration in range(maxiter):
        if box.optimality(at) <= gtol:
            return at, "gradient", iteration, length
        d = box.direction(at, pairs)
        if d is None:
            return at, "no_descent", iteration, length
        found, length = _search(evaluate, at, d, box, has_budget)
        hidden = HIDDEN * torch.finfo(d.dtype).eps * abs(at.loss)
        if found is None and -float(at.grad @ d) <= hidden and has_budget():
            return at, "precision", iteration, length
        if found is None and pairs.held:  # as everywhere here: once more without curvature
            pairs.held.clear()
            continue
        if found is None:
            reason = "line_search" if has_budget() else "max_eval"
            return at, reason, iteration, length
        pairs.add(found.x - at.x, found.grad - at.grad)
        gain, at = at.loss - found.loss, found
        if note(at):
            return at, "callback", iteration + 1, length
        if 0.0 < ftol * max(abs(at.loss), abs(at.loss + gain)) >= gain:
            return at, "progress", iteration + 1, length
        if not has_budget():
            return at, "max_eval", iteration + 1, length
    reason = "gradient" if box.optimality(at) <= gtol else "max_iter"
    return at, reason, maxiter, length


def _search(
    evaluate: Callable[[Tensor], At],
    at: At,
    d: Tensor,
    box: Box,
    has_budget: Callable[[], bool],
) -> tuple[At | None, float]:
    """Strong Wolfe along d, no farther than the bounds: the point found, and its t."""
    longest = max(box.longest(at.x, d), 1.0)  # the end of the segment is within
    search = make_line_search(
        "strong_wolfe",
        c2=0.9,
        max_evaluations=MAX_LINE_SEARCH_EVALUATIONS,
        step_max=min(longest, 1e10),
        loss_eps=torch.finfo(torch.float64).eps,
    )
    assert search is not None
    trial: float | None = search.start(at.loss, float(at.grad @ d), 1.0)
    best, length = at, 0.0
    while trial is not None and has_budget():
        here, step = evaluate(box.project(at.x + trial * d)), trial
        finite = bool(torch.isfinite(here.grad).all())
        loss, slope = (here.loss, float(here.grad @ d)) if finite else (torch.inf, 0.0)
        trial = search.tell(loss, slope)
        if loss < best.loss:
            best, length = here, step
        if trial is None and search.result.success and search.result.is_last and loss < at.loss:
            return here, step
    return (None, 0.0) if best is at else (best, length)
