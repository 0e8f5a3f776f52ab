"""FusePV with closures, without, and with those that fail or give NaN."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from fuse_pv_cases import ATTEMPTS, Fit, Trace, assert_same, snapshot
from problems import Objective, log_barrier
from torch import Tensor

from fuse_ext import (
    LBFGS,
    Adam,
    AfterSteps,
    FusePV,
    LossChange,
    LossGap,
    LossPlateau,
    Never,
)

# --- with and without a closure ------------------------------------------------------------------


def test_adam_needs_no_closure() -> None:
    with_closure, without = (Fit(switch=Never()) for _ in range(2))
    for _ in range(10):
        with_closure.step()
        loss = without.closure()
        assert without.optimizer.step() is None
        assert without.optimizer.step.__wrapped__  # torch's hooks are around it
    assert torch.equal(with_closure.flat, without.flat)
    assert without.optimizer.report().evaluations == 0
    assert without.optimizer.step(loss=loss) is loss


TRACE = Trace(lr=1e-2)


def test_the_loss_may_be_given_where_there_is_no_closure() -> None:
    switch = LossGap(0.0, 0.1)
    fit = Fit(switch=switch, lr=1e-2)
    expected = TRACE.first(lambda k: TRACE.losses[k - 1] <= 0.1)
    for _ in range(expected):
        assert fit.optimizer.phase == "adam"
        loss = fit.closure()
        fit.optimizer.step(loss=loss)
    assert fit.optimizer.phase == "lbfgs"
    fit = Fit(switch=LossGap(0.0, 0.1), lr=1e-2)
    for k in range(expected):
        fit.closure()
        fit.optimizer.step(loss=TRACE.losses[k])  # a number will do
    assert fit.optimizer.phase == "lbfgs"


@pytest.mark.parametrize("line_search", ["strong_wolfe", None])
def test_both_phases_without_a_closure(line_search: str | None) -> None:
    fit = Fit(switch=4, line_search=line_search, lbfgs_lr=0.1)
    lbfgs = Fit(
        LBFGS,
        lr=0.1,
        max_iter=1,
        history_size=10,
        curvature_tol=1e-4,
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )
    for k in range(4):
        fit.closure()
        if k == 0 and line_search is not None:  # it is said at once what will come
            with pytest.warns(RuntimeWarning, match="the first step after the switch will raise"):
                fit.optimizer.step()
        else:
            fit.optimizer.step()
    assert fit.optimizer.phase == "lbfgs"
    lbfgs.load(fit.flat)
    fit.closure()
    if line_search is not None:
        before = snapshot(fit.optimizer), fit.flat
        with pytest.raises(
            ValueError,
            match="closure=None in the L-BFGS phase needs line_search=None and max_iter=1, got "
            r"line_search='strong_wolfe' and max_iter=1",
        ):
            fit.optimizer.step()
        assert_same((snapshot(fit.optimizer), fit.flat), before)
        return
    for _ in range(10):
        fit.closure()
        fit.optimizer.step()
        lbfgs.step()
    assert torch.equal(fit.flat, lbfgs.flat)


@pytest.mark.parametrize(
    "switch", [LossPlateau(), LossGap(0.0, 0.1), AfterSteps(3) | LossChange(1e-3)]
)
def test_a_criterion_without_the_loss_it_needs(switch: Any) -> None:
    fit = Fit(switch=switch)
    fit.step(2)
    fit.closure()
    before = snapshot(fit.optimizer), fit.flat
    with pytest.raises(
        ValueError, match=r"closure=None and loss=None, but switch=.* needs the loss"
    ):
        fit.optimizer.step()
    assert_same((snapshot(fit.optimizer), fit.flat), before)


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (torch.zeros(2), ValueError),
        ("x", TypeError),
        (torch.zeros((), dtype=torch.complex64), TypeError),
    ],
)
@pytest.mark.parametrize("steps", [0, 2, 6])
def test_a_closure_without_a_scalar_changes_nothing(
    steps: int, returned: Any, error: type[Exception]
) -> None:
    fit = Fit(switch=4)
    fit.step(steps)
    before = snapshot(fit.optimizer, but=ATTEMPTS), fit.flat

    def closure() -> Any:
        fit.closure()
        return returned

    with pytest.raises(error, match="closure must return"):
        fit.optimizer.step(closure)
    assert_same((snapshot(fit.optimizer, but=ATTEMPTS), fit.flat), before)
    assert fit.optimizer.report().adam_steps == min(steps, 4)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("line_search", ["strong_wolfe", None])
def test_an_exception_at_any_evaluation_can_be_retried(
    line_search: str | None, deterministic: bool
) -> None:
    """In both phases and at the switch; the retry ends, bit for bit, where it would have."""
    options = {
        "switch": LossGap(0.0, 0.25),
        "lr": 1e-2,
        "line_search": line_search,
        "lbfgs_lr": 1.0 if line_search else 0.1,
        "history_size": 3,
        "deterministic": deterministic,
    }

    def run(failing: int | None) -> Fit:
        fit = Fit(**options)
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise KeyboardInterrupt
            return fit.closure()

        for _ in range(14):
            before = fit.flat
            try:
                fit.optimizer.step(closure)
            except KeyboardInterrupt:
                assert torch.equal(fit.flat, before)
                fit.optimizer.step(closure)
        return fit

    plain = run(None)
    assert 3 <= plain.optimizer.report().adam_steps <= 10
    final = snapshot(plain.optimizer, but=ATTEMPTS)
    for failing in range(1, plain.calls + 1):
        again = run(failing)
        assert torch.equal(again.flat, plain.flat), failing
        assert_same(snapshot(again.optimizer, but=ATTEMPTS), final)
        assert again.optimizer.report().switch_step == plain.optimizer.report().switch_step


# --- NaN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("steps", [0, 2, 8])
def test_a_step_that_is_not_finite_is_not_taken(steps: int, value: float, what: str) -> None:
    fit, spared = (Fit(switch=5, lr=1e-2) for _ in range(2))

    def closure() -> Tensor:
        loss = fit.closure()
        if what == "gradient":
            fit.params[1].grad[3] = value
            return loss
        return loss * value

    fit.step(steps)
    spared.step(steps)
    before = snapshot(fit.optimizer, but=ATTEMPTS), fit.flat
    with pytest.warns(RuntimeWarning, match="not finite and did not take the step") as caught:
        for _ in range(3):  # one warning
            fit.optimizer.step(closure)
    assert len(caught) == 1
    assert_same((snapshot(fit.optimizer, but=ATTEMPTS), fit.flat), before)
    assert fit.optimizer.report().non_finite == 3
    assert fit.optimizer.report().adam_steps == min(steps, 5)
    fit.step(6)
    spared.step(6)
    assert torch.equal(fit.flat, spared.flat)
    assert fit.optimizer.report().switch_step == spared.optimizer.report().switch_step


def test_without_the_check_adam_takes_what_it_gets() -> None:
    fit, adam = Fit(switch=Never(), check_finite=False), Fit(Adam)
    for each in (fit, adam):
        each.step(3)
        each.closure()
        each.params[1].grad[3] = math.nan
        each.optimizer.step()
    assert torch.equal(fit.flat.isnan(), adam.flat.isnan())
    assert fit.flat.isnan().sum() == 1


def test_nan_at_a_trial_in_the_second_phase() -> None:
    """pytorch#5953, and no warning: to backtrack is business as usual."""
    mine = Objective(log_barrier(), torch.float32)
    optimizer = FusePV([mine.x], lr=0.1, switch=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            optimizer.step(mine.closure)
    assert optimizer.report().non_finite > 0
    torch.testing.assert_close(mine.x.detach(), torch.ones(4), rtol=0.0, atol=2e-3)
