"""Under the promise too: what does not fit what is remembered is looked at again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Objective, Problem, classification, logistic, quadratic, rosenbrock
from regression_cases import CHANGES, POINTS, Regression, new_points, new_targets
from torch import Tensor

from fuse_ext import LBFGS, FusePV
from fuse_ext.objective.evaluations import Evaluations

NEVER_STOP = {"tolerance_grad": 0.0, "tolerance_change": 0.0}


def pv(params: list[Tensor], **options: Any) -> FusePV:
    return FusePV(params, lr=1e-2, switch=20, deterministic=True, **options)


def lbfgs(search: str, **more: Any) -> Callable[..., LBFGS]:
    def make(params: list[Tensor], **options: Any) -> LBFGS:
        defaults = {"max_iter": 1, "history_size": 20, **NEVER_STOP, **more}
        return LBFGS(params, line_search_fn=search, deterministic=True, **{**defaults, **options})

    return make


MAKERS = {
    "pv": pv,
    "pv_armijo": lambda p, **o: pv(p, line_search="armijo", **o),
    "strong_wolfe": lbfgs("strong_wolfe"),
    "approximate_wolfe": lbfgs("approximate_wolfe"),
    "armijo": lbfgs("armijo"),
    "max_iter": lbfgs("strong_wolfe", max_iter=3, max_eval=10),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_within_a_step(
    change: Callable[[Regression], None], make: Callable[..., Any]
) -> None:
    """No step ends above where it began on the function as it is now, and it goes on."""
    run = Regression(make=make)
    run.step(110)
    for _ in range(3):
        before = run.optimizer.report().function_changes
        change(run)
        for _ in range(25):
            began, calls = run.value(), run.calls
            run.step()
            assert run.value() <= began * (1 + 1e-12)
            assert 1 <= run.calls - calls <= 26
        noticed = run.optimizer.report().function_changes - before
        assert noticed == 1 or (noticed == 0 and change is new_points)  # they change little
    report = run.optimizer.report()
    assert report.function_changes > 0 or change is new_points
    assert (report.phase, report.fallbacks) == ("lbfgs", 0)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_new_points_every_so_often_need_no_word(make: Callable[..., Any]) -> None:
    """Collocation points are drawn anew every 50 steps, as DeepXDE does, and nobody says so."""
    told = Regression(make=make)
    generator = torch.Generator().manual_seed(3)
    steps, worse = 0, 0
    for _ in range(10):
        told.x = 4 * torch.rand(POINTS, 1, generator=generator, dtype=torch.float64) - 2
        for _ in range(50):
            began = told.value()
            told.step()
            steps += 1
            worse += steps > 20 and told.value() > began * (1 + 1e-12)
    assert worse == 0
    told.x = torch.linspace(-2, 2, 1000, dtype=torch.float64)[:, None]
    assert told.value() < 1e-3
    assert told.calls <= 1.4 * steps * (3 if make is MAKERS["max_iter"] else 1)


@pytest.mark.parametrize("make", [MAKERS["pv"], MAKERS["strong_wolfe"]], ids=["pv", "lbfgs"])
def test_a_budget_holds_whatever_is_looked_at(make: Callable[..., Any]) -> None:
    run = Regression(make=make, max_eval=2)
    for step in range(200):
        if step % 10 == 9:
            new_targets(run)
        calls = run.calls
        run.step()
        assert 1 <= run.calls - calls <= 2


def test_a_fixed_step_is_held_against_its_start() -> None:
    """It does not go along a gradient of another function, and no pair mixes two."""
    run = Regression(
        make=lambda p: LBFGS(
            p, lr=0.2, max_iter=1, line_search_fn=None, deterministic=True, **NEVER_STOP
        )
    )
    run.step(40)
    before = run.optimizer.report()
    new_targets(run)
    run.step(20)
    report = run.optimizer.report()
    assert report.function_changes == before.function_changes + 1
    pairs = before.pairs_accepted + before.pairs_skipped
    assert report.pairs_accepted + report.pairs_skipped < pairs + 20


PROBLEMS = (rosenbrock(10), rosenbrock(100), quadratic(1e3), quadratic(1e6), logistic())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("search", ["strong_wolfe", "approximate_wolfe", "armijo"])
@pytest.mark.parametrize("problem", [*PROBLEMS, classification("digits")], ids=str)
def test_on_one_function_hardly_anything_is_looked_at_twice(
    problem: Problem, search: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few of 1,000 evaluations; those after a failed search are the next start's instead."""
    looks, look_again = [0], Evaluations.look_again

    def counted(self: Evaluations, *args: Any) -> Any:
        looks[0] += 1
        return look_again(self, *args)

    monkeypatch.setattr(Evaluations, "look_again", counted)
    mine = Objective(problem, dtype)
    optimizer = lbfgs(search, history_size=10)([mine.x])
    while mine.calls < 1000:
        optimizer.step(mine.closure)
    report = optimizer.report()
    assert report.function_changes == 0
    assert looks[0] - report.line_search_failures <= 3
