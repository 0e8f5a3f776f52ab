"""FusePV: both phases against their engines, the switch, the report, schedules, scaling."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuse_pv_cases import ATTEMPTS, BACKENDS, Fit, assert_same, bytes_in, snapshot
from problems import Objective, log_barrier, rosenbrock
from torch import Tensor

from fuse_ext import (
    LBFGS,
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

# --- FusePV(Never) is Adam, FusePV(AtOnce) is LBFGS ----------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"amsgrad": True, "betas": (0.5, 0.9)},
        {"eps_inside_root": True, "eps": 1e-3},
        {"maximize": True},
        {"lr": torch.tensor(3e-3)},
        {"groups": [{"lr": 1e-2, "betas": (0.8, 0.9)}, {"weight_decay": 0.5, "eps": 1e-4}]},
        {"groups": [{"lr": 0.0}, {}]},
    ],
    ids=str,
)
def test_without_a_switch_it_is_adam(options: dict[str, Any], backend: str) -> None:
    adam = Fit(Adam, backend=backend, **options)
    for check_finite in (True, False):
        fuse = Fit(switch=Never(), backend=backend, check_finite=check_finite, **options)
        adam = Fit(Adam, backend=backend, **options)
        assert fuse.step(30) == adam.step(30)
        assert torch.equal(fuse.flat, adam.flat)
        ours, theirs = fuse.optimizer.state_dict(), adam.optimizer.state_dict()
        del ours["state"][0]["fuse_pv"]
        assert_same(ours["state"], theirs["state"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("line_search", ["strong_wolfe", "approximate_wolfe", "armijo", None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_iter": 3, "max_eval": 20},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"deterministic": True},
        {"history_dtype": torch.bfloat16, "history_size": 4},
        {"tolerance_grad": 1e-2, "tolerance_change": 1e-3, "max_iter": 5},
        {"curvature_tol": 0.5},
        {"groups": [{}, {"weight_decay": 0.5}]},
        {"groups": [{"lbfgs_lr": 0.2}, {"lbfgs_lr": 0.5}]},
        {"groups": [{"lbfgs_lr": 0.0}, {}]},
    ],
    ids=str,
)
def test_with_the_switch_at_once_it_is_lbfgs(
    options: dict[str, Any], line_search: str | None, backend: str
) -> None:
    common = {"history_size": 6, "tolerance_grad": 0.0, "tolerance_change": 0.0, **options}
    common = {"curvature_tol": 1e-4, "max_iter": 1, "max_eval": 25, "backend": backend, **common}
    # LBFGS does not evaluate after its last fixed step: torch's does not.
    fuse = Fit(
        switch=AtOnce(), lbfgs_lr=0.3, line_search=line_search, pairs="consecutive", **common
    )
    if "groups" in common:
        common["groups"] = [
            {"lr" if name == "lbfgs_lr" else name: value for name, value in group.items()}
            for group in common["groups"]
        ]
    lbfgs = Fit(LBFGS, lr=0.3, line_search_fn=line_search, **common)
    assert fuse.step(20) == lbfgs.step(20)
    assert fuse.calls == lbfgs.calls
    assert torch.equal(fuse.flat, lbfgs.flat)
    ours, theirs = fuse.optimizer.state_dict(), lbfgs.optimizer.state_dict()
    del ours["state"][0]["fuse_pv"]
    assert_same(ours["state"], theirs["state"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_adam_up_to_the_switch_and_lbfgs_from_there(backend: str) -> None:
    search = {"line_search": "strong_wolfe"}
    fuse = Fit(switch=7, lr=1e-2, history_size=4, backend=backend, **search)
    adam = Fit(Adam, lr=1e-2, backend=backend)
    losses = fuse.step(20)
    assert losses[:7] == adam.step(7)
    lbfgs = Fit(
        LBFGS,
        max_iter=1,
        max_eval=25,
        history_size=4,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
        curvature_tol=1e-4,
        backend=backend,
    )
    lbfgs.load(adam.flat)
    assert losses[7:] == lbfgs.step(13)
    assert torch.equal(fuse.flat, lbfgs.flat)


# --- the switch ----------------------------------------------------------------------------------


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


class Trace:
    """What Adam alone sees, step by step: the criteria judged from outside."""

    def __init__(self, steps: int = 300, maximize: bool = False, **options: Any) -> None:
        fit = Fit(Adam, maximize=maximize, **options)
        self.losses, self.norms, self.points = [], [], []
        for _ in range(steps):
            self.losses.append(fit.sign * fit.step()[0])
            grads = [p.grad for p in fit.params]
            self.norms.append(sum(g.double().square().sum().item() for g in grads))
            self.points.append(fit.flat)

    def first(self, holds: Callable[[int], bool]) -> int:
        """The first step (from 1) at which a condition holds."""
        return next(k for k in range(1, len(self.losses) + 1) if holds(k))


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
    optimizer.switch_back()
    assert optimizer.phase == "adam"
    assert optimizer.report().pairs_held == 0
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
    # And so does the curvature.
    assert report.pairs_held == report.pairs_accepted == 0
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


# --- memory and report ---------------------------------------------------------------------------


@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_bytes_are_those_of_the_tensors(history_dtype: torch.dtype | None, amsgrad: bool) -> None:
    fit = Fit(switch=3, history_dtype=history_dtype, amsgrad=amsgrad)
    assert fit.optimizer.report().state_bytes == 0
    numel = fit.flat.numel()
    fit.step()
    assert fit.optimizer.report().state_bytes == bytes_in(fit.optimizer)
    assert fit.optimizer.report().state_bytes >= (12 if amsgrad else 8) * numel
    fit.step(5)
    report = fit.optimizer.report()
    assert report.phase == "lbfgs"
    assert report.state_bytes == bytes_in(fit.optimizer)
    engine = fit.optimizer._lbfgs
    scratch = [t for t in (engine._origin, engine._best_grads) if t is not None]
    assert report.workspace_bytes == sum(t.untyped_storage().nbytes() for t in scratch)
    fit.optimizer.switch_back()
    assert fit.optimizer.report().state_bytes == bytes_in(fit.optimizer) == 0


def test_adams_moments_are_released_at_the_switch_and_the_history_on_the_way_back() -> None:
    fit = Fit(switch=5)
    fit.step(4)
    held = [weakref.ref(t) for t in (*fit.optimizer._adam._moments.values(),)]
    assert all(ref() is not None for ref in held)
    fit.step()
    gc.collect()
    assert fit.optimizer.phase == "lbfgs"
    assert all(ref() is None for ref in held)
    assert all(
        entry.keys().isdisjoint({"exp_avg", "exp_avg_sq", "step"})
        for entry in fit.optimizer.state.values()
    )
    fit.step(3)
    rows = weakref.ref(fit.optimizer._lbfgs.history.rows)
    fit.optimizer.switch_back()
    gc.collect()
    assert rows() is None


@pytest.mark.parametrize("deterministic", [False, True])
def test_report_at_every_stage(deterministic: bool) -> None:
    search = {} if deterministic else {"line_search": "strong_wolfe"}
    fit = Fit(switch=4, lr=1e-2, history_size=3, deterministic=deterministic, **search)
    optimizer = fit.optimizer
    report = optimizer.report()
    assert (report.phase, report.adam_steps, report.evaluations) == ("adam", 0, 0)
    assert (report.switch_step, report.switch_reason) == (None, "")
    for k in range(1, 4):
        fit.step()
        report = optimizer.report()
        assert (report.phase, report.adam_steps, report.evaluations) == ("adam", k, fit.calls)
        assert (report.lbfgs_iterations, report.stop_reason) == (0, "not started")
    fit.step()
    report = optimizer.report()
    assert (report.phase, report.adam_steps, report.switch_step) == ("lbfgs", 4, 4)
    assert (report.lbfgs_iterations, report.pairs_held, report.step_length) == (0, 0, 0.0)
    for k in range(1, 7):
        fit.step()
        report = optimizer.report()
        closed = k - 1 if deterministic else k
        assert report.adam_steps == 4
        assert report.lbfgs_iterations == k
        assert report.evaluations == fit.calls
        assert report.pairs_held == min(closed, 3)
        assert report.pairs_accepted + report.pairs_skipped == closed
        assert (report.line_search, report.stop_reason) == ("wolfe", "max_iter")
        assert report.step_length > 0.0
    text = str(report)
    assert "switch_reason         step 4 >= n=4" in text.splitlines()


@pytest.mark.parametrize("line_search", ["strong_wolfe", "armijo", None])
def test_deterministic_costs_about_one_evaluation_an_iteration(line_search: str | None) -> None:
    calls = []
    for deterministic in (False, True):
        fit = Fit(
            switch=5,
            lr=1e-2,
            lbfgs_lr=1.0 if line_search else 0.2,
            line_search=line_search,
            deterministic=deterministic,
            self_scaling=False,
            curvature_tol=1e-8,
            dtype=torch.float64,
        )
        fit.step(45)
        calls.append(fit.calls - 5)
    assert calls[1] == calls[0] - 39  # 40 steps less the first
    assert calls[1] <= 1.3 * 40 + 2


# --- learning rates ------------------------------------------------------------------------------


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=4, gamma=0.5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1.0 / (1.0 + 0.1 * k)),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=21),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_drives_both_phases(name: str) -> None:
    """After the switch, lbfgs_lr times lr over the lr at the switch."""
    fuse = Fit(switch=8, lr=1e-2, lbfgs_lr=0.2, line_search=None, history_size=4)
    schedule = SCHEDULES[name](fuse.optimizer)
    adam = Fit(Adam, lr=1e-2)
    adams_schedule = SCHEDULES[name](adam.optimizer)
    rates = []
    for _ in range(20):
        rates.append(fuse.optimizer.param_groups[0]["lr"])
        fuse.step()
        schedule.step()
    for k in range(8):
        assert adam.optimizer.param_groups[0]["lr"] == rates[k]
        adam.step()
        adams_schedule.step()
    lbfgs = Fit(FusePV, switch=AtOnce(), line_search=None, history_size=4)
    lbfgs.load(adam.flat)
    for rate in rates[8:]:
        lbfgs.optimizer.param_groups[0]["lbfgs_lr"] = 0.2 * (rate / rates[7])
        lbfgs.step()
    assert torch.equal(fuse.flat, lbfgs.flat)
    assert fuse.optimizer.phase == "lbfgs"


def test_a_group_at_lr_0_stays_where_it_is_in_both_phases() -> None:
    fit = Fit(switch=5, groups=[{"lr": 0.0}, {"lr": 1e-2}], deterministic=True)
    start = [p.detach().clone() for p in fit.params]
    fit.step(30)
    assert fit.optimizer.phase == "lbfgs"
    assert all(map(torch.equal, fit.params[:2], start[:2]))
    assert not any(map(torch.equal, fit.params[2:], start[2:]))


def test_a_group_frozen_at_the_switch_can_be_set_free() -> None:
    fit = Fit(switch=5, groups=[{"lr": 0.0}, {"lr": 1e-2}])
    fit.step(10)
    start = fit.params[0].detach().clone()
    before = fit.loss().item()
    fit.optimizer.param_groups[0]["lr"] = 1e-2
    fit.step(40)
    assert not torch.equal(fit.params[0], start)
    assert fit.loss().item() < 0.5 * before


def test_a_warm_up_from_lr_0_after_a_switch_at_once() -> None:
    fit = Fit(switch=AtOnce(), lr=1e-2)
    warm_up = torch.optim.lr_scheduler.LambdaLR(fit.optimizer, lambda k: min(k / 5, 1.0))
    before = fit.loss().item()
    start = fit.flat
    fit.step()
    assert torch.equal(fit.flat, start)
    assert fit.optimizer.report().stop_reason == "lr"
    for _ in range(20):
        warm_up.step()
        fit.step()
    assert fit.loss().item() < 0.5 * before


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
    for _ in range(4):
        fit.closure()
        fit.optimizer.step()
    assert fit.optimizer.phase == "lbfgs"
    lbfgs.load(fit.flat)
    fit.closure()
    if line_search is not None:
        before = snapshot(fit.optimizer), fit.flat
        with pytest.raises(
            ValueError,
            match="closure=None in the L-BFGS phase needs line_search=None and max_iter=1, or "
            "pairs='averaged', got "
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


# --- scaled gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_in_both_phases(unscale_first: bool) -> None:
    """Scaled by powers of two, gradients come back to the bit."""
    options = {"switch": 6, "lr": 1e-2, "line_search": None, "lbfgs_lr": 0.1}
    scaled, plain = Fit(**options), Fit(**options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    for _ in range(15):
        plain.closure()
        plain.optimizer.step()
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.loss()).backward()
        if unscale_first:
            scaler.unscale_(scaled.optimizer)
        scaler.step(scaled.optimizer)
        scaler.update()
        assert torch.equal(scaled.flat, plain.flat)
    assert scaled.optimizer.phase == "lbfgs"
    assert scaler.get_scale() > 1024.0


@pytest.mark.parametrize("steps", [0, 2, 8])
def test_grad_scaler_skips_infinities(steps: int) -> None:
    fit = Fit(switch=5, line_search=None, lbfgs_lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def step(spoil: bool) -> None:
        fit.optimizer.zero_grad()
        scaler.scale(fit.loss()).backward()
        if spoil:
            fit.params[0].grad[0, 0] = math.inf
        scaler.step(fit.optimizer)
        scaler.update()

    for _ in range(steps):
        step(False)
    before = snapshot(fit.optimizer, but=ATTEMPTS), fit.flat
    step(True)
    assert_same((snapshot(fit.optimizer, but=ATTEMPTS), fit.flat), before)
    report = fit.optimizer.report()
    assert (report.adam_steps, report.non_finite) == (min(steps, 5), 1)
    assert scaler.get_scale() == 32.0
    step(False)
    assert fit.optimizer.report().adam_steps == min(steps + 1, 5)


def test_grad_scaler_and_a_line_search_do_not_go_together() -> None:
    fit = Fit(switch=AtOnce())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(fit.loss()).backward()
    with pytest.raises(RuntimeError, match="GradScaler does not go with a closure"):
        scaler.step(fit.optimizer, fit.closure)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite, got -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"lbfgs_lr": math.inf}, ValueError, "lbfgs_lr must be at least 0 and finite, got inf"),
        ({"line_search": "newton"}, ValueError, "line_search must be None or one of .* 'newton'"),
        ({"line_search": 1}, TypeError, "line_search must be a string or None, got 1"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1, got 0"),
        ({"max_iter": "2"}, TypeError, "max_iter must be an int, got '2'"),
        ({"history_size": -1}, ValueError, "history_size must be at least 1, got -1"),
        ({"history_dtype": torch.int32}, ValueError, "history_dtype must be None or one of"),
        ({"curvature_tol": 2.0}, ValueError, r"curvature_tol must be in \[0, 1\], got 2.0"),
        ({"on_switch": 3}, TypeError, "on_switch must be callable or None, got 3"),
        ({"switch": "soon"}, TypeError, "switch must be a Switchover, an int"),
        ({"switch": -1}, ValueError, "switch must be at least 0, got -1"),
        (
            {"switch": NearSolution(torch.ones(2), 0.1)},
            ValueError,
            r"x_star has the shapes \[\(2,\)\], the parameters have \[\(3, 8\)",
        ),
        (
            {"groups": [{}, {"max_iter": 2}]},
            ValueError,
            "max_iter must be the same in all parameter groups, got 1 in group 0 and 2 in group 1",
        ),
        ({"groups": [{}, {"lr": math.nan}]}, ValueError, "lr must be .* got nan"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_out_of_range(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Fit(**options)


# --- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 5.0), (torch.float64, 15.0)], ids=str
)
def test_a_full_batch_fit_ends_far_below_adam(dtype: torch.dtype, factor: float) -> None:
    """A network fitted to sin(4 x), as in a PINN: the same number of gradients for both.

    In float32 the loss's rounding ends some line searches early.
    """

    def fit(kind: type[torch.optim.Optimizer], budget: int, **options: Any) -> float:
        torch.manual_seed(1)
        x = torch.linspace(-1.0, 1.0, 64, dtype=dtype)[:, None]
        model = torch.nn.Sequential(
            torch.nn.Linear(1, 16),
            torch.nn.Tanh(),
            torch.nn.Linear(16, 16),
            torch.nn.Tanh(),
            torch.nn.Linear(16, 1),
        ).to(dtype)
        optimizer = kind(model.parameters(), lr=1e-2, **options)
        calls, least = 0, math.inf

        def closure() -> Tensor:
            nonlocal calls, least
            calls += 1
            optimizer.zero_grad()
            loss = (model(x) - (4.0 * x).sin()).square().mean()
            loss.backward()
            least = min(least, loss.item())
            return loss

        while calls < budget:
            before = calls
            optimizer.step(closure)
            if calls == before:  # at rest
                break
        return least

    adam = fit(Adam, 800)
    fuse = fit(FusePV, 800, switch=200, deterministic=True)
    assert fuse < adam / factor


def test_the_valley_of_rosenbrock() -> None:
    adam, fuse = Objective(rosenbrock(2)), Objective(rosenbrock(2))
    first = Adam([adam.x], lr=1e-2)
    both = FusePV([fuse.x], lr=1e-2, switch=100)
    while fuse.calls < 200:
        both.step(fuse.closure)
    for _ in range(200):
        first.step(adam.closure)
    assert adam.gap > 1e-2
    assert fuse.gap < 1e-12
