"""What L-BFGS does where a step fails: reasons, noise, the ladder down to Adam."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from fuse_pv_cases import Fit
from lbfgs_cases import F64, make, state
from problems import Objective, Problem, nan_wall, quadratic, rosenbrock
from torch import Tensor

from fuse_ext import LBFGS, Fuse, FusePV, LossPlateau

SEARCHES = ("strong_wolfe", "approximate_wolfe", "armijo")


def offset(value: float, n: int = 2**14) -> Problem:
    """A sum over many parameters, each of which adds ``value`` to the loss."""
    d = torch.logspace(0.0, 2.0, n, dtype=F64)
    start = torch.randn(n, generator=torch.Generator().manual_seed(0)).double()
    return Problem("offset", lambda x: (value + 0.5 * d.to(x.dtype) * x * x).sum(), start)


# --- the first step ------------------------------------------------------------------------------


@pytest.mark.parametrize("line_search", SEARCHES)
def test_a_first_step_is_not_lost_in_the_rounding_of_the_loss(line_search: str) -> None:
    """A step of 1-norm 1 changes this sum by less than its last digit."""
    mine = Objective(offset(1e5), torch.float32)
    optimizer = make([mine.x], line_search_fn=line_search, max_iter=60, max_eval=200)
    optimizer.step(mine.closure)
    ours = (mine.x.detach().double() ** 2 * torch.logspace(0.0, 2.0, 2**14, dtype=F64)).sum()
    assert ours < 1000.0  # of 355,089
    if line_search == "approximate_wolfe":
        assert ours < 1e-3


@pytest.mark.parametrize("line_search", [*SEARCHES, None])
def test_a_first_step_is_not_lost_in_the_rounding_of_the_parameters(
    line_search: str | None,
) -> None:
    n = 1000
    problem = Problem(
        "far", lambda x: 1e-9 * (x - 1e6).square().sum(), torch.full((n,), 1e6 + 9.0, dtype=F64)
    )
    mine = Objective(problem, torch.float32)
    optimizer = make([mine.x], line_search_fn=line_search, max_iter=20, max_eval=100)
    optimizer.step(mine.closure)
    assert mine.gap < 1e-3 * problem.f(problem.x0)


# --- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [1e-7, 1e-6, 1e-5, 1e-4])
def test_noise_of_the_loss_is_learnt(noise: float) -> None:
    """Good gradients under a loss with few digits, as those of physics-informed networks."""
    problem = quadratic(1e3, n=20)
    mine = Objective(problem)

    def closure() -> Tensor:
        loss = mine.closure().detach() + 1.0
        wave = torch.sin(1e9 * mine.x.detach()).mean()
        return loss * (1.0 + noise * wave)

    optimizer = FusePV([mine.x], switch=0, deterministic=True)
    for _ in range(400):
        optimizer.step(closure)
    assert mine.gap < 1e-3 * noise
    assert optimizer.report().loss_noise > 1e-14


def test_the_noise_learnt_is_in_the_checkpoint() -> None:
    mine = Objective(rosenbrock(4))
    optimizer = make([mine.x], line_search_fn="approximate_wolfe")
    optimizer.step(mine.closure)
    state(optimizer)["loss_noise"] = 1e-5
    again = make([Objective(rosenbrock(4)).x], line_search_fn="approximate_wolfe")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.report().loss_noise == optimizer.report().loss_noise == 1e-5


# --- reasons -------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_search", SEARCHES)
def test_at_the_floor_it_says_so_and_only_looks_once_a_step(line_search: str) -> None:
    problem = rosenbrock(10)
    mine = Objective(Problem("", lambda x: 100.0 + problem.f(x), problem.x0, 100.0), torch.float32)
    optimizer = FusePV([mine.x], switch=0, line_search=line_search, deterministic=True)
    for _ in range(1000):
        optimizer.step(mine.closure)
    calls, report = mine.calls, optimizer.report()
    assert report.stop_reason in ("precision", "no_descent", "gradient") and report.converged
    optimizer.step(mine.closure)
    assert (mine.calls, optimizer.report().fallbacks) == (calls + 1, 0)
    assert mine.gap < 1e-3


def test_lbfgs_reports() -> None:
    mine = Objective(rosenbrock(4))
    optimizer = LBFGS([mine.x], history_size=5, line_search_fn="strong_wolfe")
    assert optimizer.report().stop_reason == "not started"
    optimizer.step(mine.closure)
    report = optimizer.report()
    assert (report.phase, report.stop_reason, report.converged) == ("lbfgs", "max_iter", False)
    assert (report.evaluations, report.lbfgs_iterations) == (mine.calls, 20)
    assert report.pairs_held == 5 and report.state_bytes > 0
    for _ in range(10):
        optimizer.step(mine.closure)
    assert optimizer.report().stop_reason in ("gradient", "slope")
    assert optimizer.report().converged


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_relative_progress_knows_no_scale(scale: float) -> None:
    """Where torch's absolute tolerances end at once or never."""
    problem = rosenbrock(4)
    mine = Objective(Problem("", lambda x: scale * (1.0 + problem.f(x)), problem.x0, scale))
    optimizer = FusePV([mine.x], switch=0, rtol=1e-9, deterministic=True)
    steps = 0
    while not optimizer.report().converged:
        optimizer.step(mine.closure)
        steps += 1
        assert steps < 200
    assert optimizer.report().stop_reason == "progress"
    assert mine.gap < 1e-6 * scale


# --- the ladder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["closure", "no closure"])
def test_a_fixed_step_into_nan_is_left_again(kind: str) -> None:
    """At max_iter=1 nobody evaluates its end before the next step begins."""
    start = torch.full((4,), 3.0, dtype=F64)
    a = torch.tensor([1.0, 5.0, 25.0, 125.0], dtype=F64)
    mine = Objective(Problem("root", lambda x: (a * (x - 2.0 * x.sqrt())).sum(), start))
    optimizer = make([mine.x], line_search_fn=None, lr=1.0)
    for _ in range(200):
        if kind == "closure":
            optimizer.step(mine.closure)
        else:
            mine.closure()
            optimizer.step()
    assert state(optimizer)["non_finite"] > 0
    torch.testing.assert_close(mine.x.detach(), torch.ones(4, dtype=F64), rtol=0.0, atol=1e-4)


def test_steps_are_cut_until_they_stay_inside() -> None:
    """A wall of NaN close by, beyond the reach of one cut."""

    def f(x: Tensor) -> Tensor:
        return (1e9 * x - (x - 1e-6).log()).sum()

    mine = Objective(Problem("", f, torch.ones(1, dtype=F64)))
    optimizer = make([mine.x], line_search_fn=None, lr=1e3, deterministic=True)
    for _ in range(20):
        optimizer.step(mine.closure)
    report = optimizer.report()
    assert report.step_cuts > 1 and report.non_finite >= report.step_cuts
    assert mine.value < 1e9


def misleading(x: Tensor) -> Tensor:
    """The gradient points down, the loss goes up: autograd knows nothing of the second term."""
    return x.sum() + 2.0 * (1.0 - x.detach()).sum()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("f", [misleading, nan_wall().f], ids=["misleading", "wall"])
def test_where_every_search_fails_adam_may_try(deterministic: bool, f: Any) -> None:
    """It is one function: Adam's steps are taken back, since they find nothing better."""
    mine = Objective(Problem("", f, nan_wall().x0))
    optimizer = FusePV([mine.x], switch=0, deterministic=deterministic)
    for _ in range(4):
        optimizer.step(mine.closure)
    report = optimizer.report()
    assert (report.line_search_failures, report.step_cuts, report.fallbacks) == (4, 3, 0)
    before = mine.calls
    optimizer.step(mine.closure)
    report = optimizer.report()
    assert (report.phase, report.fallbacks, report.stop_reason) == ("lbfgs", 1, "line_search")
    assert before + 2 <= mine.calls <= before + 26
    before = mine.calls
    for _ in range(10):
        optimizer.step(mine.closure)
        assert torch.equal(mine.x.detach(), mine.problem.x0)
    report = optimizer.report()
    assert (mine.calls, report.fallbacks, report.converged) == (before + 10, 1, False)


def test_adam_leads_out_of_where_every_search_fails() -> None:
    """A gradient that points the wrong way in one of two directions, until Adam has gone on."""

    def f(x: Tensor) -> Tensor:
        lie = x[1] - x[1].detach() if bool(x[0] > 1.995) else 0.0
        return x[0] ** 2 + (x[1] - 0.5) ** 2 - 43.0 * lie

    mine = Objective(Problem("", f, torch.full((2,), 2.0, dtype=F64)))
    optimizer = FusePV([mine.x], switch=0, deterministic=True)
    losses = []
    for _ in range(60):
        optimizer.step(mine.closure)
        losses.append(mine.value)
    assert optimizer.report().fallbacks >= 1
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-10


def test_a_loss_that_is_another_at_each_call_is_left_to_adam() -> None:
    """Dropout, forgotten in the L-BFGS phase."""
    fit = Fit(switch=5, lr=1e-3, line_search="strong_wolfe")
    noise = torch.Generator().manual_seed(3)

    def closure() -> Tensor:
        fit.optimizer.zero_grad()
        kept = (torch.rand(40, 1, generator=noise) < 0.5).float()
        w1, b1, w2, b2 = fit.params
        output = ((fit.inputs @ w1 + b1).tanh() @ w2 + b2) * kept
        loss = (output - fit.targets).square().mean()
        loss.backward()
        return loss

    for _ in range(300):
        fit.optimizer.step(closure)
    assert fit.optimizer.report().fallbacks >= 1
    assert math.isfinite(fit.loss().item())


# --- what others do to parameters and state ------------------------------------------------------


@pytest.mark.parametrize("kind", ["LBFGS", "FusePV", "Fuse"])
def test_a_pair_whose_point_was_edited_is_dropped(kind: str) -> None:
    """Without a closure the second gradient of a pair comes with the next step."""

    def optimizer_for(x: Tensor) -> Any:
        if kind == "LBFGS":
            return make([x], line_search_fn=None, lr=1e-3)
        if kind == "FusePV":
            return FusePV([x], switch=0, line_search=None, lbfgs_lr=1e-3)
        return Fuse([x], lr=1e-3, theta=0.5, lbfgs_lr=1e-3)

    held = []
    for edit in (False, True):
        mine = Objective(rosenbrock(4))
        optimizer = optimizer_for(mine.x)
        for k in range(4):
            mine.closure()
            optimizer.step()
            if edit and k == 2:
                with torch.no_grad():
                    mine.x.mul_(1.1)
        held.append(optimizer.report().pairs_accepted)
    assert held == [3, 2]


def test_the_phase_before_a_switch_at_once() -> None:
    fit = Fit(switch=0)
    assert fit.optimizer.phase == "lbfgs"
    again = Fit(switch=0)
    again.optimizer.load_state_dict(copy.deepcopy(fit.optimizer.state_dict()))
    assert fit.step(4) == again.step(4)
    assert again.optimizer.report().switch_step == 0
    fit = Fit(switch=0)
    fit.optimizer.switch_back()
    assert fit.optimizer.phase == "adam"
    fit.step()
    assert fit.optimizer.report().adam_steps == 1


@pytest.mark.parametrize("switch", [None, 0, 5])
@pytest.mark.parametrize("deterministic", [False, True])
def test_distributed_checkpoints_of_a_new_optimizer(switch: Any, deterministic: bool) -> None:
    """torch.distributed.checkpoint makes the state with a step at lr = 0, without a closure."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(3, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = FusePV(model.parameters(), lr=1e-2, switch=switch, deterministic=deterministic)
    saved = get_optimizer_state_dict(model, optimizer)
    assert saved["state"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.report().adam_steps == 0
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_adam_follows_a_state_that_was_cleared() -> None:
    one, other = Fit(switch=100, lr=1e-2), Fit(switch=100, lr=1e-2)
    one.step(5)
    one.optimizer.state.clear()
    other.load(one.flat)
    assert one.step(5) == other.step(5)
    assert torch.equal(one.flat, other.flat)


# --- defaults ------------------------------------------------------------------------------------


def test_defaults() -> None:
    full, batches = Fit(deterministic=True).optimizer, Fit().optimizer
    assert repr(full._switch) == f"Any(WarmUp(n=100), {LossPlateau()!r})"
    assert repr(batches._switch) == "AfterSteps(n=20)"
    assert isinstance(Fit(line_search="armijo").optimizer._switch, LossPlateau)
    for fit in (Fit(deterministic=True, switch=1), Fit(switch=1)):  # the other one finds out
        fit.step(4)
        names = {name for name, _ in fit.optimizer._phase.iteration.trials._searches}
        assert names == {"approximate_wolfe"}


@pytest.mark.parametrize("lr", [1e-3, 3e-2])
def test_a_deterministic_loss_is_left_early(lr: float) -> None:
    """At the larger step Adam overshoots and the loss swings."""
    fit = Fit(deterministic=True, lr=lr)
    fit.step(101)
    report = fit.optimizer.report()
    assert report.switch_step == 100 and "smooth loss" in report.switch_reason


def test_batches_are_not_taken_for_one_function() -> None:
    """Promised of the L-BFGS phase alone, with minibatches before."""
    fit = Fit(deterministic=True, lr=1e-3)
    shuffle = torch.Generator().manual_seed(0)

    def closure() -> Tensor:
        rows = torch.randperm(40, generator=shuffle)[:20]
        fit.optimizer.zero_grad()
        w1, b1, w2, b2 = fit.params
        output = (fit.inputs[rows] @ w1 + b1).tanh() @ w2 + b2
        loss = (output - fit.targets[rows]).square().mean()
        loss.backward()
        return loss

    with pytest.warns(RuntimeWarning, match="goes up and down as on minibatches") as told:
        for _ in range(390):
            fit.optimizer.step(closure)
    assert len(told) == 1
    assert fit.optimizer.phase == "adam"


@pytest.mark.parametrize("failing", range(1, 5))
def test_an_error_while_adam_tries_leaves_everything_as_it_was(failing: int) -> None:
    """And the step that is called again tries again."""
    mine = Objective(Problem("", misleading, nan_wall().x0))
    optimizer = FusePV([mine.x], switch=0, deterministic=True)
    for _ in range(4):
        optimizer.step(mine.closure)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise KeyboardInterrupt
        return mine.closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(mine.x.detach(), mine.problem.x0)
    before = calls
    optimizer.step(closure)
    assert torch.equal(mine.x.detach(), mine.problem.x0)
    assert calls > before + 2  # once more Adam's steps
    optimizer.step(closure)
    assert optimizer.report().stop_reason == "line_search"


def test_what_has_no_lr_keeps_its_bits_while_adam_tries() -> None:
    """Even -0.0, of which x - 0 m could make 0.0."""
    mine = Objective(Problem("", misleading, nan_wall().x0))
    still = torch.full((2,), -0.0, dtype=F64, requires_grad=True)
    groups = [{"params": [mine.x]}, {"params": [still], "lr": 0.0}]
    optimizer = FusePV(groups, switch=0, deterministic=True)

    def closure() -> Tensor:
        still.grad = torch.full_like(still, -1.0)
        return mine.closure()

    for _ in range(6):
        optimizer.step(closure)
        assert still.detach().view(torch.int64).eq(torch.iinfo(torch.int64).min).all()
    assert optimizer.report().fallbacks == 1
