"""What LBFGS promises beside the iterates: groups, decay, line searches, reasons."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lbfgs_cases import BACKENDS, F64, SEARCHES, make, reason, state
from problems import Objective, Problem, log_barrier, logistic, nan_wall, quadratic, rosenbrock
from torch import Tensor

from fuse_ext import LBFGS

# --- groups and weight decay ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_lr_of_a_group_is_its_share_of_the_direction(backend: str) -> None:
    a, b = torch.ones(3, dtype=F64), torch.full((2, 2), 2.0, dtype=F64)
    before = a.clone(), b.clone()
    a.requires_grad_()
    b.requires_grad_()
    optimizer = LBFGS(
        [{"params": a}, {"params": b, "lr": 0.1}], lr=0.4, max_iter=1, backend=backend
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = a.square().sum() + b.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    t = 1.0 / (6.0 + 16.0)  # the first step has 1-norm lr
    torch.testing.assert_close(a.detach(), before[0] - 0.4 * t * 2.0 * before[0])
    torch.testing.assert_close(b.detach(), before[1] - 0.1 * t * 2.0 * before[1])


class Halves:
    """A quadratic of two tensors, of which the second may be frozen or left out."""

    def __init__(self, **groups: Any) -> None:
        self.f = quadratic(100.0, n=20).f
        generator = torch.Generator().manual_seed(1)
        self.moving = torch.randn(12, generator=generator, dtype=F64).requires_grad_()
        self.other = torch.randn(8, generator=generator, dtype=F64).requires_grad_()
        self.decay = groups.pop("decay_in_closure", 0.0)
        frozen = groups.pop("frozen", False)
        members = [{"params": self.moving}]
        if frozen:
            members.insert(0, {"params": self.other, "lr": 0.0})
        self.optimizer = make(members, **groups)
        self.calls = 0

    def closure(self) -> Tensor:
        self.calls += 1
        self.moving.grad = self.other.grad = None
        loss = self.f(torch.cat([self.moving, self.other]))
        loss = loss + 0.5 * self.decay * self.moving.square().sum()
        loss.backward()
        return loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("line_search", SEARCHES)
def test_a_group_with_lr_0_is_frozen_as_if_it_were_not_there(
    line_search: str, backend: str
) -> None:
    options = {"line_search_fn": line_search, "weight_decay": 0.1, "backend": backend}
    frozen, alone = Halves(frozen=True, **options), Halves(**options)
    start = frozen.other.detach().clone()
    for _ in range(30):
        frozen.optimizer.step(frozen.closure)
        alone.optimizer.step(alone.closure)
        torch.testing.assert_close(frozen.moving, alone.moving, rtol=1e-7, atol=1e-9)
    assert torch.equal(frozen.other, start)
    assert frozen.calls == alone.calls
    assert frozen.other.grad.abs().max() > 1.0  # and still there, for whoever wants to see it


def test_what_is_frozen_does_not_count_for_the_tolerance() -> None:
    mine = Halves(frozen=True, tolerance_grad=1e-5, max_iter=200, max_eval=400)
    mine.optimizer.step(mine.closure)
    assert reason(mine.optimizer) == "gradient"
    assert mine.moving.grad.abs().max() <= 1e-5 < mine.other.grad.abs().max()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_frozen_group_thaws(deterministic: bool) -> None:
    mine = Halves(frozen=True, deterministic=deterministic, tolerance_grad=1e-6)
    for _ in range(60):
        mine.optimizer.step(mine.closure)
    assert reason(mine.optimizer) == "gradient"
    mine.optimizer.param_groups[0]["lr"] = 1.0
    for _ in range(150):
        mine.optimizer.step(mine.closure)
    assert reason(mine.optimizer) == "gradient"
    assert mine.other.grad.abs().max() <= 1e-6


def test_nothing_moves_at_lr_0() -> None:
    mine = Objective(rosenbrock(4))
    optimizer = make([mine.x], lr=0.0)
    optimizer.step(mine.closure)
    assert torch.equal(mine.x.detach(), mine.problem.x0)
    assert reason(optimizer) == "lr"
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(mine.closure)
    assert reason(optimizer) == "max_iter"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("line_search", [*SEARCHES, None])
@pytest.mark.parametrize("maximize", [False, True])
def test_weight_decay_is_a_term_of_the_objective(
    line_search: str | None, maximize: bool, backend: str
) -> None:
    """As if the closure added decay/2 |x|^2 (subtracted, to maximize)."""
    options = {
        "line_search_fn": line_search,
        "maximize": maximize,
        "backend": backend,
        "lr": 0.5,
        "max_iter": 3,
    }
    problem = quadratic(30.0, n=15)
    sign = -1.0 if maximize else 1.0

    def signed(x: Tensor) -> Tensor:
        return sign * problem.f(x)

    signed_problem = Problem("signed", signed, problem.x0)
    inside = Objective(signed_problem, weight_decay=sign * 0.3)
    outside = Objective(signed_problem)
    by_closure = make([inside.x], **options)
    by_option = make([outside.x], weight_decay=0.3, **options)
    for _ in range(10):
        by_closure.step(inside.closure)
        by_option.step(outside.closure)
        torch.testing.assert_close(outside.x, inside.x, rtol=1e-8, atol=1e-10)
    assert inside.calls == outside.calls


def test_weight_decay_of_each_group() -> None:
    a, b = (torch.ones(2, dtype=F64).requires_grad_() for _ in range(2))
    optimizer = make([{"params": a, "weight_decay": 1.0}, {"params": b, "weight_decay": 3.0}])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * ((a - 2.0).square().sum() + (b - 2.0).square().sum())
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    torch.testing.assert_close(a.detach(), torch.full((2,), 1.0, dtype=F64))
    torch.testing.assert_close(b.detach(), torch.full((2,), 0.5, dtype=F64))


# --- line searches and storage -------------------------------------------------------------------


@pytest.mark.parametrize("line_search", SEARCHES)
@pytest.mark.parametrize(
    "problem", [rosenbrock(2), rosenbrock(10), quadratic(1e3), logistic()], ids=str
)
def test_every_line_search_finds_the_minimum(problem: Problem, line_search: str) -> None:
    mine = Objective(problem)
    start = mine.gap
    make([mine.x], line_search_fn=line_search, max_iter=300, max_eval=500).step(mine.closure)
    assert mine.gap <= 1e-9 * start


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("history_dtype", "dtype", "expected"),
    [
        (None, torch.float32, torch.float32),
        (None, torch.float64, torch.float64),
        (None, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.int8, torch.float32, torch.int8),
        (torch.int8, torch.bfloat16, torch.int8),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_history_dtype(
    history_dtype: torch.dtype | None, dtype: torch.dtype, expected: torch.dtype, backend: str
) -> None:
    mine = Objective(quadratic(10.0), dtype)
    start = mine.gap
    optimizer = make([mine.x], history_dtype=history_dtype, backend=backend)
    for _ in range(20):
        optimizer.step(mine.closure)
    assert state(optimizer)["history"].dtype == expected
    assert state(optimizer)["history"].shape == (2, 6, 50)
    # bfloat16 parameters have three digits.
    assert mine.gap < (1e-3 if dtype == torch.bfloat16 else 1e-4) * start


def test_max_eval_ends_a_step_and_spares_the_history() -> None:
    """A search cut short by the budget is no failure: it is taken up again by the next step."""
    mine = Objective(rosenbrock(10))
    optimizer = make([mine.x], max_iter=20, max_eval=4)
    searches = []
    for _ in range(15):
        before = mine.calls
        optimizer.step(mine.closure)
        assert mine.calls - before == 4
        assert reason(optimizer) == "max_eval"
        searches.append(optimizer._phase.progress.line_search)
    assert searches.count("max_evaluations") >= 3
    assert state(optimizer)["resets"] == state(optimizer)["line_search_failures"] == 0
    assert mine.gap < 1e-8


def test_the_default_budget_of_one_iteration_is_a_whole_line_search() -> None:
    """torch's default max_eval for max_iter=1 is 1: a single trial, that could fail for ever."""
    mine = Objective(log_barrier())
    optimizer = LBFGS([mine.x], max_iter=1, line_search_fn="strong_wolfe")
    for _ in range(40):
        optimizer.step(mine.closure)
    assert mine.gap < 1e-9


# --- without a closure ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_without_a_closure_is_torchs_step_with_one(backend: str) -> None:
    ours, theirs = Objective(logistic()), Objective(logistic())
    optimizer = LBFGS([ours.x], lr=0.5, max_iter=1, history_size=4, backend=backend)
    torchs = torch.optim.LBFGS([theirs.x], lr=0.5, max_iter=1, history_size=4)
    for _ in range(25):
        ours.closure()
        assert optimizer.step() is None
        torchs.step(theirs.closure)
        torch.testing.assert_close(ours.x, theirs.x, rtol=1e-7, atol=1e-9)
    assert ours.calls == theirs.calls


@pytest.mark.parametrize("options", [{"line_search_fn": "armijo"}, {"max_iter": 2}], ids=str)
def test_a_missing_closure_is_named(options: dict[str, Any]) -> None:
    mine = Objective(rosenbrock(4))
    optimizer = LBFGS([mine.x], **{"max_iter": 1, **options})
    mine.closure()
    with pytest.raises(ValueError, match=r"closure=None needs line_search_fn=None and max_iter=1"):
        optimizer.step()
    assert torch.equal(mine.x.detach(), mine.problem.x0)


# --- why a step ends -----------------------------------------------------------------------------


def misleading(x: Tensor) -> Tensor:
    """The gradient points down, the loss goes up: autograd knows nothing of the second term."""
    return x.sum() + 2.0 * (1.0 - x.detach()).sum()


@pytest.mark.parametrize(
    ("expected", "f", "options"),
    [
        ("max_iter", rosenbrock(4).f, {}),
        ("max_iter", rosenbrock(4).f, {"max_iter": 3, "max_eval": 100}),
        ("max_eval", rosenbrock(4).f, {"max_iter": 100, "max_eval": 5}),
        ("gradient", lambda x: (x - 2.0).square().sum(), {}),
        ("gradient", lambda x: x.square().sum(), {"max_iter": 20, "tolerance_grad": 1e-3}),
        ("slope", lambda x: 1e-3 * x.sum(), {"tolerance_change": 1e-3}),
        ("step", lambda x: 1e6 * x.pow(4).sum(), {"max_iter": 20, "tolerance_change": 0.1}),
        (
            "loss",
            lambda x: 1e-3 * x.square().sum(),
            {"max_iter": 9, "line_search_fn": "armijo", "lr": 0.01, "tolerance_change": 1e-5},
        ),
        ("line_search", misleading, {}),
        ("line_search", nan_wall().f, {}),
        ("non_finite", lambda x: (x - 5.0).log().sum(), {}),
        ("non_finite", nan_wall().f, {"line_search_fn": None, "max_iter": 2}),
        ("no_descent", lambda x: 1e-200 * x.sum(), {}),
        ("lr", rosenbrock(4).f, {"lr": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reason(expected: str, f: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    mine = Objective(Problem("", f, nan_wall().x0))
    optimizer = make([mine.x], **options)
    optimizer.step(mine.closure)
    assert reason(optimizer) == expected


def test_the_reason_is_that_of_the_last_iteration() -> None:
    """A search that fails in mid-step, and a step that goes on from there along -g."""
    mine = Objective(rosenbrock(10))
    seen: list[Tensor] = []

    def closure() -> Tensor:
        loss = mine.closure()
        known = any(torch.equal(mine.x, x) for x in seen)
        if state(optimizer).get("n_iter") == 6 and not known:
            return loss * math.nan
        seen.append(mine.x.detach().clone())
        return loss

    optimizer = make([mine.x], max_iter=12, max_eval=200)
    optimizer.step(closure)
    assert state(optimizer)["line_search_failures"] == 1
    assert reason(optimizer) == "max_iter"
