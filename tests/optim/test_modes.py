"""Which L-BFGS follows Adam: found out, promised or asked for."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from fuse_pv_cases import Fit
from noisy_cases import Noisy

from fuse_ext import FusePV


def test_one_function_gets_a_line_search() -> None:
    fit = Fit(switch=5, lr=1e-2)
    fit.step(5)
    before = fit.flat
    fit.step()
    assert torch.equal(fit.flat, before)
    assert fit.optimizer.report().stop_reason == "watch"
    losses = fit.step(100)
    report = fit.optimizer.report()
    assert report.line_search == "wolfe"
    assert report.evaluations == fit.calls
    assert losses[-1] < 1e-2 * losses[0]


def test_batches_get_a_living_metric() -> None:
    problem = Noisy()
    opt = FusePV(problem.params, lr=0.02, switch=5)
    for _ in range(30):
        opt.step(problem)
    report = opt.report()
    assert (report.lbfgs_iterations, report.evaluations) == (24, 30)
    assert report.line_search == "fixed"
    assert report.curvature in ("diagonal", "kronecker")
    assert "exp_avg" in opt.state[problem.params[0]]


@pytest.mark.parametrize(
    "options",
    [{"line_search": "armijo"}, {"max_iter": 3}, {"deterministic": True}, {"pairs": "same_batch"}],
    ids=str,
)
def test_who_asks_for_something_else_gets_it(options: dict[str, Any]) -> None:
    problem = Noisy()
    opt = FusePV(problem.params, lr=0.02, switch=5, **options)
    for _ in range(7):
        opt.step(problem)
    assert opt.state[problem.params[0]].keys().isdisjoint({"living_steps"})
    assert opt.report().lbfgs_iterations >= 2


def test_no_watching_where_it_is_known_to_be_batches() -> None:
    problem = Noisy()
    opt = FusePV(problem.params, lr=0.02, switch=5, deterministic=False)
    for _ in range(8):
        opt.step(problem)
    assert opt.report().lbfgs_iterations == 3


def test_a_checkpoint_while_watching() -> None:
    first, again = Fit(switch=5, lr=1e-2), Fit(switch=5, lr=1e-2)
    first.step(6)
    again.load(first.flat)
    again.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert again.step(8) == first.step(8)
    assert again.optimizer.report().line_search == "wolfe"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "mixed"}, "pairs must be one of auto, same_batch"),
        ({"step_cap": -1.0}, "step_cap must be"),
        ({"step_cap": math.nan}, "step_cap must be"),
        ({"deterministic": "yes"}, "deterministic must be"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Fit(**options)
