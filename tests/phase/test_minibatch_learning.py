"""What the phase on minibatches is for, and what it must not lose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuse_pv_cases import Fit, assert_same, snapshot
from noisy_cases import Noisy
from sklearn.datasets import load_digits
from torch import Tensor

from fuse_ext import FusePV, Never

METRICS = ("diagonal", "kronecker")


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


@pytest.mark.parametrize("seed", [1, 3])
def test_a_network_that_learns_its_images_by_heart_does_not_lose_them(seed: int) -> None:
    """Near a loss of 0 a metric that was frozen let it jump back to 2 for good."""
    x, y = digits()
    torch.manual_seed(seed)
    sizes = [64, 256, 256, 10]
    layers = [torch.nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    opt = FusePV(model.parameters(), lr=1e-3, metric="diagonal")
    order, losses = torch.Generator().manual_seed(seed), []
    for _ in range(24):
        for rows in torch.randperm(1437, generator=order).split(64):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model(x[:1437]), y[:1437]).item())
    assert max(losses[8:]) < 0.2
    assert losses[-1] < 0.02


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_digits_in_batches_are_learnt_faster_than_by_adam(seed: int, metric: str) -> None:
    """Logistic regression, batches of 64: the loss over all images after five epochs."""
    x, y = digits()
    losses = []
    for switch in (30, Never()):
        torch.manual_seed(seed)
        model = torch.nn.Linear(64, 10)
        opt = FusePV(model.parameters(), lr=1e-3, switch=switch, metric=metric)
        for _ in range(5):
            for rows in torch.randperm(len(x)).split(64):
                opt.zero_grad()
                torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                opt.step()
        losses.append(torch.nn.functional.cross_entropy(model(x), y).item())
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(bad: str, metric: str) -> None:
    fit = Fit(metric=metric, deterministic=False, switch=5, lr=1e-2)
    fit.step(40)
    before = snapshot(fit.optimizer), fit.flat

    def closure() -> Tensor:
        loss = fit.closure()
        if bad == "gradient":
            fit.params[2].grad[0] = math.nan
            return loss
        return loss * math.nan

    with pytest.warns(RuntimeWarning, match="not finite"):
        fit.optimizer.step(closure)
    assert torch.equal(fit.flat, before[1])
    report = fit.optimizer.report()
    assert (report.non_finite, report.stop_reason) == (1, "non_finite")
    for key, entry in snapshot(fit.optimizer)["state"].items():
        held = before[0]["state"][key]
        for name, value in entry.items():
            if isinstance(value, Tensor) and name != "record":  # which counts the refusal
                assert torch.equal(value, held[name]), name
    fit.step(30)
    assert math.isfinite(fit.loss().item())


@pytest.mark.parametrize("metric", METRICS)
def test_an_error_in_the_closure_changes_nothing(metric: str) -> None:
    fit = Fit(metric=metric, deterministic=False, switch=5, lr=1e-2)
    fit.step(40)
    before = snapshot(fit.optimizer), fit.flat
    with pytest.raises(KeyError, match="batch"):
        fit.optimizer.step(lambda: {}["batch"])
    assert torch.equal(fit.flat, before[1])
    assert_same(snapshot(fit.optimizer), before[0])


def test_a_group_that_is_added_steps_as_adam_does() -> None:
    """The others keep their metric, moments and lengths."""
    problem, late = Noisy(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = FusePV(problem.params, lr=0.02, switch=10, deterministic=False, metric="diagonal")
    for _ in range(40):
        opt.step(problem)
    opt.add_param_group({"params": [late], "lr": 0.01})
    problem()
    late.grad = torch.full_like(late, 3.0)
    held = opt.state[problem.params[0]]["exp_avg"].clone()
    opt.step()
    assert opt.phase == "lbfgs"
    length = opt.report().step_length
    torch.testing.assert_close(late.detach(), torch.full_like(late, 1.0 - 0.01 * length))
    expected = held.lerp(problem.params[0].grad, 0.1)
    torch.testing.assert_close(opt.state[problem.params[0]]["exp_avg"], expected)


def test_a_gradient_of_zero_is_a_step_of_adams() -> None:
    """Its average goes on, as torch's Adam has it."""
    problem = Noisy()
    opt = FusePV(problem.params, lr=0.02, switch=1, deterministic=False, metric="diagonal")
    for _ in range(5):
        opt.step(problem)
    held = opt.state[problem.params[0]]["exp_avg"].clone()
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    before = problem.x
    opt.step()
    torch.testing.assert_close(opt.state[problem.params[0]]["exp_avg"], 0.9 * held)
    assert not torch.equal(problem.x, before)


# --- a world that changes ------------------------------------------------------------------------

TURN, STEPS = 300, 600


def relabelled(run: Run) -> None:
    run.y = (run.y * 3 + 1) % 10


def other_pixels(run: Run) -> None:
    run.x = run.x[:, torch.randperm(64, generator=torch.Generator().manual_seed(9))]


def batches_of(size: int) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        run.size = size

    return change


def rates_times(factor: float) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] *= factor

    return change


def thawed(run: Run) -> None:
    run.model[0].requires_grad_(True)


class Run:
    """A network on digits; what happens in the middle is done to it."""

    def __init__(self, frozen: bool, **options: Any) -> None:
        torch.manual_seed(0)
        (self.x, self.y), self.size = digits(), 64
        self.model = torch.nn.Sequential(
            torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)
        )
        self.model[0].requires_grad_(not frozen)
        self.optimizer = FusePV(self.model.parameters(), lr=3e-3, **options)
        self.order = torch.Generator().manual_seed(1)

    def train(self, change: Callable[[Run], None], restarts: bool) -> float:
        """The loss over all images in the end."""
        schedule = None
        if restarts:
            schedulers = torch.optim.lr_scheduler
            schedule = schedulers.CosineAnnealingWarmRestarts(self.optimizer, 150)
        for step in range(STEPS):
            if step == TURN:
                change(self)
            rows = torch.randint(len(self.x), (self.size,), generator=self.order)
            self.optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])
            loss.backward()
            self.optimizer.step()
            if schedule is not None:
                schedule.step()
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(self.model(self.x), self.y).item()


CHANGES: dict[str, Callable[[Run], None]] = {
    "other labels": relabelled,
    "other pixels": other_pixels,
    "small batches": batches_of(8),
    "large batches": batches_of(512),
    "higher rates": rates_times(5.0),
    "lower rates": rates_times(0.1),
    "a layer thaws": thawed,
    "warm restarts": lambda run: None,
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_followed_as_adam_follows_them(name: str, metric: str) -> None:
    frozen, restarts = name == "a layer thaws", name == "warm restarts"
    adam = Run(frozen, switch=Never()).train(CHANGES[name], restarts)
    run = Run(frozen, metric=metric)
    assert run.train(CHANGES[name], restarts) < 1.05 * adam
    assert run.optimizer.phase == "lbfgs"
