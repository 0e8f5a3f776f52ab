"""Full batches that are unlike a fresh network on a loss of the order of 1, with nothing said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from regression_cases import POINTS, Regression
from torch import Tensor, nn

from fuse_ext import LBFGS, AtOnce, FusePV

NEVER_STOP = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
MODES: dict[str, dict[str, Any]] = {
    "unsaid": {},
    "promised": {"deterministic": True, "switch": 20},
    "at once": {"switch": AtOnce()},
}
F32, F64 = torch.float32, torch.float64


def trained(dtype: torch.dtype) -> Regression:
    run = Regression(dtype, deterministic=True, switch=20)
    while run.calls < 1500 and not run.optimizer.report().converged:
        run.step()
    return run


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_start_that_is_good_already(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Fine-tuning: no step of L-BFGS ends above where it began, but for rounding."""
    before = trained(dtype)
    run = Regression(dtype, **{"lr": 1e-5, **options})
    with torch.no_grad():
        for ours, theirs in zip(run.params, before.params, strict=True):
            ours.copy_(theirs)
    start = run.value()
    for _ in range(200):
        began, phase = run.value(), run.optimizer.phase
        run.step()
        if phase == "lbfgs" and run.optimizer.report().line_search != "fixed":
            rounding = 8 * torch.finfo(dtype).eps  # of residuals, as targets are of the order of 1
            assert run.value() <= (began**0.5 + rounding) ** 2
    assert run.value() <= 2 * start


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_start_at_a_saddle(options: dict[str, Any]) -> None:
    """Next to it the gradient is nearly 0 and the curvature negative."""
    x = torch.tensor([1e-7, 1.0], dtype=F64, requires_grad=True)
    optimizer = FusePV([x], **{"lr": 1e-3, **options})

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x[0] ** 2 - 1) ** 2 + x[1] ** 2
        loss.backward()
        return loss

    for _ in range(250):
        optimizer.step(closure)
    assert float(closure().detach()) < 1e-10


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_hard_constraints(options: dict[str, Any]) -> None:
    """-u'' = pi^2 sin(pi x) with u = x (1 - x) N(x), which is 0 at both ends."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.linspace(0, 1, 50, dtype=F64)[:, None].requires_grad_()
    optimizer = FusePV(net.parameters(), **{"lr": 1e-2, **options})

    def slope(u: Tensor) -> Tensor:
        return torch.autograd.grad(u.sum(), x, create_graph=True)[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        u = x * (1 - x) * net(x)
        loss = (slope(slope(u)) + torch.pi**2 * torch.sin(torch.pi * x)).square().mean()
        loss.backward(inputs=[*net.parameters()])
        return loss

    for _ in range(400):
        optimizer.step(closure)
    assert float(closure().detach()) < 1e-5


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_coefficients_in_a_group_of_their_own(options: dict[str, Any]) -> None:
    """An inverse problem: y = a sin(b x) with a network's correction; other lr, for both phases."""
    run = Regression()
    coefficients = torch.tensor([0.5, 2.5], dtype=F64, requires_grad=True)
    groups = [{"params": run.params}, {"params": [coefficients], "lr": 1e-1, "lbfgs_lr": 0.5}]
    optimizer = FusePV(groups, **{"lr": 1e-3, **options})
    target = 2 * torch.sin(3 * run.x[:, 0])

    def closure() -> Tensor:
        optimizer.zero_grad()
        w, b, v, c = run.params
        fit = torch.tanh(run.x @ w.T + b) @ v + c
        model = coefficients[0] * torch.sin(coefficients[1] * run.x[:, 0])
        loss = (model + 0.1 * fit - target).square().mean()
        loss.backward()
        return loss

    for _ in range(300):
        optimizer.step(closure)
    assert float(closure().detach()) < 1e-6
    assert optimizer.report().fallbacks == 0


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_large_constant_in_the_loss(options: dict[str, Any], dtype: torch.dtype) -> None:
    run = Regression(dtype, **options)
    run.constant = 1e6
    run.step(300)
    run.constant = 0.0
    assert run.value() < (1e-5 if dtype == F64 else 0.1)
    assert run.optimizer.report().function_changes == 0


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_dropout_of_nothing_is_one_function(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    run = Regression(**options)
    whole = run.loss
    run.loss = lambda: whole() + nn.functional.dropout(run.params[0], 0.0).square().sum() * 1e-9
    run.step(200)
    assert run.optimizer.param_groups[0]["history_size"] == run.flat.numel()
    assert run.value() < 1e-4


def test_one_batch_an_epoch_is_one_function() -> None:
    """Whatever order the loader shuffles it to: sums differ in their last digits."""
    run = Regression()
    loader = torch.utils.data.DataLoader(run.x, batch_size=POINTS, shuffle=True)
    for _ in range(200):
        for run.x in loader:
            run.step()
        run.optimizer.next_epoch()
    report = run.optimizer.report()
    assert run.optimizer.param_groups[0]["history_size"] == run.flat.numel()
    assert (report.function_changes, report.fallbacks) == (0, 0)
    assert run.value() < 1e-4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_steps_on_each_batch_end_no_worse_than_one(seed: int) -> None:
    values = []
    for times in (1, 2):
        run = Regression(F32, seed=seed)
        everything, generator = run.x, torch.Generator().manual_seed(seed)
        for _ in range(800 // times):
            run.x = everything[torch.randperm(POINTS, generator=generator)[:20]]
            run.step(times)
        run.x = everything
        values.append(run.value())
        assert run.optimizer.param_groups[0]["history_size"] == 10
    assert values[1] <= 2 * values[0]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_loss_of_0(options: dict[str, Any], dtype: torch.dtype) -> None:
    """A sum of squares that is solved to the last bit, at the start or on the way."""
    for start in (0.0, 1.0):
        x = torch.full((3,), start, dtype=dtype, requires_grad=True)
        optimizer = FusePV([x], **{"lr": 1e-2, **options})

        def closure(x: Tensor = x, optimizer: FusePV = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = x.square().sum()
            loss.backward()
            return loss

        for _ in range(150):
            optimizer.step(closure)
        assert float(closure().detach()) < 1e-12


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_losses_of_half_precision(options: dict[str, Any]) -> None:
    """Three digits: steps still get somewhere, and no run is taken for batches."""
    run = Regression(F32, **options)
    loss = run.loss
    start = run.value()
    run.loss = lambda: loss().half()
    run.step(300)
    run.loss = loss
    assert run.value() < 0.1 * start
    assert run.optimizer.report().fallbacks == 0


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("norm", [1.0, 1e-2])
@pytest.mark.parametrize("curvature", ["auto", "pairs"])
def test_gradients_clipped_in_the_closure(
    curvature: str, norm: float, options: dict[str, Any]
) -> None:
    """Slopes are not those of the loss: searches take longer, but are not doubted for ever.

    With a matrix longer than with pairs, though it ends lower.
    """
    run = Regression(curvature=curvature, **options)
    closure = run.closure

    def clipped() -> Tensor:
        loss = closure()
        nn.utils.clip_grad_norm_(run.params, norm)
        return loss

    for _ in range(300):
        run.optimizer.step(clipped)
    dense = curvature == "auto"
    assert run.calls <= ((410 if dense else 400) if norm == 1.0 else (1150 if dense else 850))
    assert run.value() < (1e-5 if dense else 1e-3)
    report = run.optimizer.report()
    assert (report.function_changes, report.fallbacks) == (0, 0)


def no_backward(run: Regression) -> Tensor:
    run.optimizer.zero_grad()
    return run.loss()


def zeroed_after(run: Regression) -> Tensor:
    loss = run.closure()
    run.optimizer.zero_grad(set_to_none=False)
    return loss


def dropped_after(run: Regression) -> Tensor:
    loss = run.closure()
    run.optimizer.zero_grad()
    return loss


MAKERS: dict[str, Callable[..., Any]] = {
    "unsaid": lambda p: FusePV(p, 1e-2),
    "minibatches": lambda p: FusePV(p, 1e-2, 20, deterministic=False),
    "promised": lambda p: FusePV(p, 1e-2, switch=20, deterministic=True),
    "at once": lambda p: FusePV(p, 1e-2, switch=AtOnce()),
    "lbfgs": lambda p: LBFGS(p, line_search_fn="strong_wolfe"),
    "lbfgs, fixed": lambda p: LBFGS(p),
}


@pytest.mark.parametrize("wrong", [no_backward, zeroed_after, dropped_after])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_without_gradients_it_warns_and_has_not_converged(
    make: Callable[..., Any], wrong: Callable[[Regression], Tensor]
) -> None:
    run = Regression(make=make)
    with pytest.warns(RuntimeWarning, match="left no gradient") as caught:
        for _ in range(80):
            run.optimizer.step(lambda: wrong(run))
    assert len(caught) == 1
    assert run.optimizer.report().stop_reason == "no_gradient"
    assert not run.optimizer.report().converged
