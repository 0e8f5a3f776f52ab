"""Steps on a GPU as `make gpu-check` measures them, named as in the table of docs/cuda.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuse_ext import LBFGS, Adam, FusePV, Never

PAIRS = 10
FIXED = {"lr": 0.5, "max_iter": 1, "history_size": PAIRS}
FIXED |= {"tolerance_grad": 0.0, "tolerance_change": 0.0}
CAPTURABLE = {"switch": Never(), "line_search": None, "capturable": True}
SEARCH: dict[str, Any] = {"switch": 1, "deterministic": True}
PEERS = ("torch.optim.Adam(fused=True)", "torch.optim.Adam(fused=True), captured")
TORCH_LBFGS = "torch.optim.LBFGS, fixed step"


class Problem:
    """A convex quadratic, its closure in few kernels.

    Args:
        shapes: Of its parameters.
        device: Where.
        batches: Whether every call is another function.
    """

    def __init__(
        self, shapes: list[tuple[int, ...]], device: torch.device, batches: bool = False
    ) -> None:
        self.params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
        self.curvatures = [torch.linspace(1, 100, x.numel(), device=device) for x in self.params]
        self.batches, self.calls = batches, 0
        for x in self.params:
            x.grad = torch.zeros_like(x)
        self.closure()

    def closure(self) -> Tensor:
        """New gradients, in the tensors that hold the old ones, and the loss."""
        self.calls += 1
        loss = torch.zeros((), device=self.params[0].device)
        for x, h in zip(self.params, self.curvatures, strict=True):
            at = x.detach().view(-1)
            assert x.grad is not None
            torch.mul(h, at, out=x.grad.view(-1))
            loss += 0.5 * torch.dot(x.grad.view(-1), at)
            if self.batches:
                x.grad.add_(0.1 * (self.calls % 7 - 3))
        return loss


@dataclass(frozen=True)
class Step:
    """How a row is made.

    Attributes:
        make: The optimizer of a problem.
        warm: Steps before the one that is measured.
        closure: Whether the step calls it; else gradients are at hand.
        captured: Whether a graph replays the step.
        batches: Whether the closure is another function at every call.
    """

    make: Callable[[Problem], Any]
    warm: int = 3
    closure: bool = True
    captured: bool = False
    batches: bool = False

    def build(self, problem: Problem) -> Callable[[], object]:
        """The step, warmed up but not captured."""
        optimizer = self.make(problem)

        def run() -> object:
            return optimizer.step(problem.closure) if self.closure else optimizer.step()

        for _ in range(self.warm):
            run()
        return run


def groups(problem: Problem) -> list[dict[str, Any]]:
    """Every other parameter in a group of its own rate."""
    halves = problem.params[::2], problem.params[1::2]
    return [{"params": half, "lr": 1e-3 * i} for i, half in enumerate(halves, 1) if half]


def scaled(optimizer: Any, problem: Problem) -> Any:
    """As under GradScaler."""
    device = problem.params[0].device
    optimizer.grad_scale = torch.ones((), device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    return optimizer


def lbfgs(dtype: torch.dtype | None = None, **options: Any) -> Callable[[Problem], Any]:
    return lambda p: LBFGS(p.params, history_dtype=dtype, **FIXED, **options)


def theirs(**options: Any) -> Callable[[Problem], Any]:
    # The CPU, where the tests run this, has no capturable Adam.
    def make(problem: Problem) -> Any:
        given = options if problem.params[0].is_cuda else {}
        return torch.optim.Adam(problem.params, lr=1e-3, fused=True, **given)

    return make


FULL = PAIRS + 3
STEPS = {
    "Adam": Step(lambda p: Adam(p.params), closure=False),
    "Adam, two groups": Step(lambda p: Adam(groups(p)), closure=False),
    "Adam, GradScaler": Step(lambda p: scaled(Adam(p.params), p), closure=False),
    "Adam, bfloat16 moments": Step(
        lambda p: Adam(p.params, moment_dtype=torch.bfloat16), closure=False
    ),
    "Adam, capturable": Step(
        lambda p: Adam(p.params, capturable=True), closure=False, captured=True
    ),
    "FusePV, Adam phase": Step(lambda p: FusePV(p.params, switch=Never())),
    "FusePV, Adam phase, two groups": Step(lambda p: FusePV(groups(p), switch=Never())),
    "FusePV, Adam phase, check_finite=False": Step(
        lambda p: FusePV(p.params, switch=Never(), check_finite=False)
    ),
    "FusePV, Adam phase, GradScaler": Step(
        lambda p: scaled(FusePV(p.params, switch=Never()), p), closure=False
    ),
    "FusePV, Adam phase, capturable": Step(lambda p: FusePV(p.params, **CAPTURABLE), captured=True),
    "living metric, diagonal": Step(
        lambda p: FusePV(p.params, switch=1, metric="diagonal"), 5, batches=True
    ),
    "fixed step, capturable": Step(lbfgs(capturable=True), FULL, captured=True),
    "fixed step, capturable, bfloat16": Step(
        lbfgs(torch.bfloat16, capturable=True), FULL, captured=True
    ),
    "fixed step, capturable, int8": Step(lbfgs(torch.int8, capturable=True), FULL, captured=True),
    "fixed step": Step(lbfgs(), FULL),
    "search with pairs, one trial": Step(
        lambda p: FusePV(p.params, curvature="pairs", history_size=PAIRS, **SEARCH), FULL
    ),
    PEERS[0]: Step(theirs(), closure=False),
    PEERS[1]: Step(theirs(capturable=True), closure=False, captured=True),
    TORCH_LBFGS: Step(lambda p: torch.optim.LBFGS(p.params, **FIXED), FULL),
}
# On matrices, whose sides the living metric gives a basis.
OF_MATRICES = {
    "living metric": Step(
        lambda p: FusePV(p.params, switch=1, metric="kronecker"), 25, batches=True
    ),
    "torch.optim.Adam(fused=True)": STEPS[PEERS[0]],
}
# Where the parameters are few.
DENSE = {
    "search with matrix, one trial": Step(
        lambda p: FusePV(p.params, curvature="dense", **SEARCH), FULL
    ),
}
# A long history of few parameters, with as many pairs as it has room for.
LONG_PAIRS = 500
LONG = {
    "fixed step, capturable": Step(
        lambda p: LBFGS(
            p.params, **{**FIXED, "history_size": LONG_PAIRS, "lr": 0.01}, capturable=True
        ),
        LONG_PAIRS + 3,
        captured=True,
    )
}
