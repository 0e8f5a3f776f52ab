"""FusePV under schedules of its learning rates and under scaled gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuse_pv_cases import ATTEMPTS, Fit, assert_same, snapshot

from fuse_ext import (
    Adam,
    AtOnce,
    FusePV,
)

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
