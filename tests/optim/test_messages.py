"""What is said where something usual was done wrong, and what is done about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse_ext import LBFGS, Adam, AfterSteps, Fuse, FusePV, Never

OPTIMIZERS = (FusePV, LBFGS, Adam, Fuse)


def network(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), *middle, nn.Linear(16, 1))


class Fit:
    """A regression whose closure may do what a closure should not."""

    def __init__(self, *middle: nn.Module, zeroes: bool = True, in_place: bool = False) -> None:
        self.model = network(*middle)
        self.x = torch.randn(64, 3)
        self.y = torch.sin(self.x.sum(1, keepdim=True))
        self.rows: Callable[[], Any] = lambda: slice(None)
        self.zeroes, self.in_place, self.calls = zeroes, in_place, 0

    def loss(self, rows: Any) -> Tensor:
        return (self.model(self.x[rows]) - self.y[rows]).square().mean()

    def closure(self) -> Tensor:
        self.calls += 1
        if self.zeroes:
            self.model.zero_grad(set_to_none=not self.in_place)
        loss = self.loss(self.rows())
        loss.backward()
        return loss

    def draw(self, count: int) -> None:
        """Other rows from now on."""
        rows = torch.randint(0, 64, (count,))
        self.rows = lambda: rows

    def optimizer(self, **options: Any) -> FusePV:
        options = {"lr": 1e-2, "switch": 20, "deterministic": True, **options}
        return FusePV(self.model.parameters(), **options)


def said_once(told: list[warnings.WarningMessage]) -> bool:
    """One warning, of the line of this file that called ``step``."""
    return len(told) == 1 and told[0].filename == __file__


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_model_is_no_list_of_parameters(optimizer: type) -> None:
    for model in (nn.Linear(2, 2), network()):
        with pytest.raises(TypeError, match=r"params is a \w+, a model: pass .*parameters\(\)"):
            optimizer(model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_iterator_that_is_used_up(optimizer: type) -> None:
    params = network().parameters()
    optimizer(params)
    with pytest.raises(ValueError, match="empty parameter list: params is an iterator"):
        optimizer(params)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loss_is_no_closure(optimizer: type) -> None:
    fit = Fit()
    opt = optimizer(fit.model.parameters())
    before = [p.detach().clone() for p in fit.model.parameters()]
    loss = fit.closure()
    for given in (loss, loss.item(), {"loss": loss}):
        with pytest.raises(TypeError, match=r"closure must be a function, got .*step\(closure\)"):
            opt.step(given)
        with pytest.raises(TypeError, match="closure must be a function"):
            opt.step(closure=given)
    assert all(map(torch.equal, before, fit.model.parameters()))
    assert not any(opt.state.values())


def test_a_scaler_with_a_closure_is_refused_in_the_adam_phase() -> None:
    fit = Fit()
    opt, scaler = fit.optimizer(), torch.amp.GradScaler("cpu")
    scaler.scale(fit.loss(slice(None))).backward()
    with pytest.raises(RuntimeError, match="GradScaler does not go with a closure"):
        scaler.step(opt, fit.closure)


def test_a_scaler_that_has_scaled_nothing_ends_before_it_calls_the_optimizer() -> None:
    """So that the words are torch's: docs/troubleshooting.md has them."""
    fit = Fit()
    opt = fit.optimizer()
    with pytest.raises(AssertionError, match="Attempted step but _scale is None"):
        torch.amp.GradScaler("cpu").step(opt, fit.closure)
    assert fit.calls == 0 and not any(opt.state.values())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "deterministic=True"),
        ({"deterministic": None, "line_search": "armijo"}, "line_search='armijo'"),
        ({"deterministic": None, "max_iter": 3}, "max_iter=3"),
    ],
)
def test_no_closure_though_the_next_phase_needs_one(options: dict[str, Any], named: str) -> None:
    fit = Fit()
    opt = fit.optimizer(switch=None, **options)
    loss = fit.closure()
    with pytest.raises(ValueError, match=f"without a closure, but with {named}"):
        opt.step()
    # With what the criterion needs there is a step, and a warning of what will come.
    with pytest.warns(RuntimeWarning, match=f"{named}.* after the switch will raise") as told:
        opt.step(loss=loss)
    assert told[0].filename == __file__
    opt.step(loss=loss)
    assert opt.report().adam_steps == 2


@pytest.mark.parametrize(
    "options",
    [
        {"deterministic": None},
        {"deterministic": False, "line_search": None, "pairs": "consecutive"},
        {"switch": Never()},
    ],
)
def test_nothing_is_said_where_no_closure_is_needed(options: dict[str, Any]) -> None:
    fit = Fit()
    opt = fit.optimizer(**{"switch": AfterSteps(3), **options})
    for _ in range(6):
        fit.closure()
        opt.step()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_closure_that_zeroes_is_left_alone(in_place: bool) -> None:
    fit = Fit(in_place=in_place)
    opt = fit.optimizer()
    for _ in range(60):
        loss = opt.step(fit.closure)
    assert opt.report().evaluations == fit.calls <= 75
    assert loss.item() < 1e-3


@pytest.mark.parametrize("outside", [False, True])
def test_a_forgotten_zero_grad_is_said_and_put_right(outside: bool) -> None:
    fit = Fit(zeroes=False)
    opt = fit.optimizer()
    with pytest.warns(RuntimeWarning, match="adds to the gradients that it finds") as told:
        for _ in range(60):
            if outside:  # before the step, where it serves Adam but no trial
                opt.zero_grad()
            loss = opt.step(fit.closure)
    assert said_once(told)
    assert opt.report().evaluations == fit.calls
    right = Fit()
    reference = right.optimizer()
    for _ in range(60):
        expected = reference.step(right.closure)
    if outside:  # the one way of going wrong that leaves Adam's steps as they are
        torch.testing.assert_close(loss, expected)
    assert loss.item() < 1e-3


def test_the_mark_goes_where_the_closure_raises() -> None:
    fit = Fit()
    opt = LBFGS(fit.model.parameters(), line_search_fn="strong_wolfe")
    fit.closure()
    before = [p.grad.clone() for p in fit.model.parameters()]

    def closure() -> Tensor:
        raise KeyError("no data")

    with pytest.raises(KeyError):
        opt.step(closure)
    assert all(torch.equal(g, p.grad) for g, p in zip(before, fit.model.parameters(), strict=True))


def test_gradients_accumulated_outside_cannot_be_searched() -> None:
    fit = Fit(zeroes=False)
    opt = fit.optimizer(switch=3)
    fit.rows = lambda: slice(32, None)
    with (
        pytest.warns(RuntimeWarning, match="adds to the gradients"),
        pytest.raises(RuntimeError, match="accumulated before step"),
    ):
        for _ in range(6):
            opt.zero_grad()
            fit.loss(slice(None, 32)).backward()
            opt.step(fit.closure)
    assert opt.report().lbfgs_iterations == 1


def test_dropout_is_said_once() -> None:
    fit = Fit(nn.Dropout(0.1))
    opt = fit.optimizer()
    with pytest.warns(RuntimeWarning, match="two calls of the closure at one point") as told:
        for _ in range(80):
            opt.step(fit.closure)
    assert said_once(told)
    report = opt.report()
    assert report.phase == "lbfgs" and report.function_changes > 5
    assert report.evaluations == fit.calls


def test_batches_that_change_from_step_to_step_are_said_once() -> None:
    fit = Fit()
    opt = fit.optimizer()
    with pytest.warns(RuntimeWarning, match="another function from step to step") as told:
        for _ in range(80):
            fit.draw(16)
            opt.step(fit.closure)
    assert said_once(told)


def test_points_that_change_now_and_then_are_nothing_to_warn_of() -> None:
    fit = Fit()
    opt = fit.optimizer()
    for step in range(100):
        if step % 10 == 0:
            fit.draw(32)
        opt.step(fit.closure)
    assert opt.report().function_changes > 3


def test_noise_under_the_promise_is_said_where_adam_stays_for_it() -> None:
    fit = Fit()
    opt = fit.optimizer(switch=None)
    with pytest.warns(RuntimeWarning, match="goes up and down as on minibatches") as told:
        for _ in range(130):
            fit.draw(8)
            opt.step(fit.closure)
    assert said_once(told)
    assert opt.phase == "adam"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unpromised = fit.optimizer(switch=None, deterministic=None)
        for _ in range(130):
            unpromised.step(fit.closure)


def test_an_optimizers_state_is_loaded_whole() -> None:
    small = FusePV(nn.Linear(2, 1).parameters())
    with pytest.raises(ValueError, match="no strict=False"):
        FusePV(network().parameters()).load_state_dict(small.state_dict())
