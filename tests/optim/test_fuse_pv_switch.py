"""FusePV's switch: where every criterion takes it, by hand, there and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuse_pv_cases import Fit, Trace
from torch import Tensor

from fuse_ext import (
    Adam,
    AfterEpochs,
    AfterSteps,
    AtOnce,
    FusePV,
    GradNorm,
    LossChange,
    LossGap,
    LossPlateau,
    NearSolution,
    Never,
    Switchover,
    When,
)


@pytest.mark.parametrize(
    "switch", [AtOnce(), 0, AfterSteps(0), AfterEpochs(0), Never() | AtOnce()], ids=repr
)
def test_at_once(switch: Any) -> None:
    fit = Fit(switch=switch)
    assert fit.optimizer.phase == "lbfgs"
    assert fit.optimizer.report().switch_step is None  # the switch belongs to the first step
    fit.step()
    report = fit.optimizer.report()
    assert (report.phase, report.adam_steps, report.switch_step) == ("lbfgs", 0, 0)
    assert report.switch_reason == "at once, before the first Adam step"
    assert report.lbfgs_iterations == 1


TRACE = Trace(lr=1e-2)


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def changes(k: int) -> list[float]:
    return [abs(b - a) for a, b in zip(TRACE.losses[:k], TRACE.losses[1:k], strict=False)]


def shaped(flat: Tensor) -> list[Tensor]:
    fit = Fit()
    fit.load(flat)
    return [param.detach() for param in fit.params]


@pytest.mark.parametrize(
    ("switch", "holds", "says"),
    [
        (5, lambda k: k >= 5, "step 5 >= n=5"),
        (AfterSteps(5), lambda k: k >= 5, "step 5 >= n=5"),
        (AfterEpochs(2, steps_per_epoch=4), lambda k: k >= 8, "epoch 2 >= n=2 at step 8"),
        (GradNorm(0.3), lambda k: mean(TRACE.norms[:k]) <= 0.3, "(mean over all steps)"),
        (
            GradNorm(0.01, window=10),
            lambda k: k >= 10 and mean(TRACE.norms[k - 10 : k]) <= 0.01,
            "(mean over 10 steps)",
        ),
        (
            LossChange(2e-3, window=10),
            lambda k: k >= 11 and mean(changes(k)[-10:]) <= 2e-3,
            "loss change",
        ),
        (LossGap(0.0, 0.1), lambda k: TRACE.losses[k - 1] <= 0.1, "loss gap f - f*"),
        (
            NearSolution(shaped(TRACE.points[99]), 0.3),
            lambda k: (TRACE.points[k - 1] - TRACE.points[99]).norm() <= 0.3,
            "distance ||x - x*||",
        ),
        (lambda obs: obs.loss < 0.1, lambda k: TRACE.losses[k - 1] < 0.1, "<lambda>(obs) is true"),
        (
            When(lambda obs: obs.grad_norm_sq < 0.02, needs_loss=False),
            lambda k: TRACE.norms[k - 1] < 0.02,
            "is true at step",
        ),
        (
            AfterSteps(60) & LossGap(0.0, 0.1),
            lambda k: k >= 60 and TRACE.losses[k - 1] <= 0.1,
            ">= n=60 and loss gap",
        ),
        (
            AfterSteps(200) | LossGap(0.0, 0.1),
            lambda k: k >= 200 or TRACE.losses[k - 1] <= 0.1,
            "loss gap",
        ),
    ],
    ids=lambda value: repr(value)[:45] if isinstance(value, Switchover) else "",
)
def test_every_criterion_switches_where_it_should(
    switch: Any, holds: Callable[[int], bool], says: str
) -> None:
    fit = Fit(switch=switch, lr=1e-2)
    expected = TRACE.first(holds)
    assert expected > 1
    fit.step(expected - 1)
    assert fit.optimizer.phase == "adam"
    fit.step()
    assert fit.optimizer.phase == "lbfgs"
    report = fit.optimizer.report()
    assert report.switch_step == report.adam_steps == expected
    assert says in report.switch_reason
    assert torch.equal(fit.flat, TRACE.points[expected - 1])
    fit.step(3)
    assert fit.optimizer.report().switch_step == expected


def test_the_loss_plateau_is_reached() -> None:
    fit = Fit(switch=LossPlateau(window=20), lr=1e-2)
    while fit.optimizer.phase == "adam" and fit.calls < 2000:
        fit.step()
    assert "loss plateau" in fit.optimizer.report().switch_reason


def test_epochs_are_told() -> None:
    fit = Fit(switch=AfterEpochs(2))
    for _ in range(2):
        fit.step(3)
        assert fit.optimizer.phase == "adam"
        fit.optimizer.next_epoch()
    fit.step()
    assert fit.optimizer.report().switch_step == 7


def test_maximizing_the_criterion_sees_the_loss_that_falls() -> None:
    fit = Fit(switch=LossGap(0.0, 0.1), lr=1e-2, maximize=True)
    expected = TRACE.first(lambda k: TRACE.losses[k - 1] <= 0.1)
    fit.step(expected)
    assert fit.optimizer.report().switch_step == expected


def test_on_switch_is_called_after_each_switch() -> None:
    seen: list[tuple[str, int | None, bool]] = []

    def tell(optimizer: FusePV) -> None:
        report = optimizer.report()
        seen.append((optimizer.phase, report.switch_step, optimizer is fit.optimizer))

    fit = Fit(switch=3, on_switch=tell)
    fit.step(5)
    assert seen == [("lbfgs", 3, True)]
    fit.optimizer.switch_back()
    assert len(seen) == 1
    fit.step(2)
    fit.optimizer.switch_now()
    assert seen[1:] == [("lbfgs", 5, True)]
    fit.optimizer.switch_now()
    assert len(seen) == 2


def test_switching_by_hand() -> None:
    fit = Fit(switch=4, lr=1e-2, line_search="strong_wolfe")
    optimizer = fit.optimizer
    fit.step(2)
    optimizer.switch_now()
    assert optimizer.phase == "lbfgs"
    assert {group["phase"] for group in optimizer.param_groups} == {"lbfgs"}
    assert optimizer.report().switch_reason == "switch_now() was called"
    fit.step(5)
    accepted = optimizer.report().pairs_accepted
    assert accepted > 0
    optimizer.switch_back()
    assert optimizer.phase == "adam"
    assert optimizer.report().pairs_held == 0
    assert optimizer.report().pairs_accepted == accepted
    # Moments and criterion begin anew: this is Adam from here.
    adam = Fit(Adam, lr=1e-2)
    adam.load(fit.flat)
    assert fit.step(3) == adam.step(3)
    assert optimizer.phase == "adam"
    assert fit.step() == adam.step()
    assert torch.equal(fit.flat, adam.flat)
    report = optimizer.report()
    assert (report.phase, report.adam_steps, report.switch_step) == ("lbfgs", 6, 6)
    assert report.switch_reason == "step 4 >= n=4"
    # And so does the curvature; what was counted stays.
    assert (report.pairs_held, report.pairs_accepted) == (0, accepted)
    fit.step(3)
    assert optimizer.report().pairs_held == 3
    assert optimizer.report().lbfgs_iterations == 8
    optimizer.switch_back()
    optimizer.switch_back()
    assert optimizer.phase == "adam"


def test_on_the_way_back_the_criterion_forgets() -> None:
    fit = Fit(switch=LossChange(100.0, window=5))  # true as soon as its window is full
    fit.step(6)
    assert fit.optimizer.phase == "lbfgs"
    fit.optimizer.switch_back()
    fit.step(5)
    assert fit.optimizer.phase == "adam"
    fit.step()
    assert fit.optimizer.phase == "lbfgs"


def test_going_back_after_a_switch_at_once_gives_adam_a_step() -> None:
    fit = Fit(switch=AtOnce())
    fit.step(3)
    fit.optimizer.switch_back()
    fit.step()
    assert fit.optimizer.report().adam_steps == 1
    assert fit.optimizer.phase == "lbfgs"
