"""Where line searches begin: as far as steps have usually led, and at 1 once H has come right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fuse_ext import FusePV
from fuse_ext.objective.usual_step import IN_A_ROW, UsualStep
from fuse_ext.search.line_search import LineSearchResult


def tell(usual: UsualStep, vanishes: float) -> None:
    """A step of 1 whose slope would have vanished there."""
    slope = -1.0 + 1.0 / vanishes
    usual.learn(LineSearchResult(1.0, 0.0, slope, True, "wolfe", 1, True), -1.0, 1.0)


def test_the_first_trial_follows_the_mean() -> None:
    usual = UsualStep({})
    for _ in range(60):
        tell(usual, 0.4)
    assert usual.share == pytest.approx(0.4, rel=1e-2)
    tell(usual, 1.0)  # once may be chance
    assert usual.share < 0.5


def test_steps_that_were_right_in_a_row_are_believed() -> None:
    usual = UsualStep({})
    for _ in range(60):
        tell(usual, 0.4)
    for k in range(IN_A_ROW):
        assert usual.share < 0.6, k
        tell(usual, 1.05)
    assert usual.share == 1.0
    tell(usual, 0.4)
    assert usual.share == pytest.approx(math.exp(0.1 * math.log(0.4)))


def valley(x: Tensor) -> Tensor:
    return (1 - x[0]).square() + 100 * (x[1] - x[0].square()).square()


def himmelblau(x: Tensor) -> Tensor:
    return (x[0].square() + x[1] - 11).square() + (x[0] + x[1].square() - 7).square()


@pytest.mark.parametrize("function", [valley, himmelblau])
@pytest.mark.parametrize("options", [{"deterministic": True}, {}])
def test_convergence_is_superlinear(function: Any, options: dict[str, Any]) -> None:
    """Self-scaling with steps of less than 1 left a tenth of the error, iteration by iteration."""
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = FusePV([x], 1e-2, 20, **options)
    norms: list[float] = []

    def closure() -> Tensor:
        x.grad = None
        loss: Tensor = function(x)
        loss.backward()
        return loss.detach()

    for _ in range(200):
        optimizer.step(closure)
        assert x.grad is not None
        norms.append(float(x.grad.norm()))
        if optimizer.report().converged:
            break
    far = next(k for k, norm in enumerate(norms) if max(norms[k:]) < 1e-2)
    near = next(k for k, norm in enumerate(norms) if max(norms[k:]) < 1e-9)
    assert near - far <= 6
