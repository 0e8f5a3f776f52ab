"""new_objective(): the closure is another function from the next step on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from regression_cases import Regression, new_targets

from fuse_ext import LBFGS, AtOnce, Fuse, FusePV

SEARCHED = {"max_iter": 1, "tolerance_grad": 0.0, "tolerance_change": 0.0}
MAKERS: dict[str, Callable[[Any], Any]] = {
    "adam": lambda p: FusePV(p, 1e-2, switch=10**6),
    "found out": lambda p: FusePV(p, 1e-2),
    "promised": lambda p: FusePV(p, 1e-2, switch=20, deterministic=True),
    "promised, fixed": lambda p: FusePV(
        p, 1e-2, 20, deterministic=True, line_search=None, lbfgs_lr=0.2
    ),
    "device": lambda p: FusePV(
        p, 1e-2, 20, capturable=True, line_search=None, lbfgs_lr=0.2, deterministic=True
    ),
    "lbfgs": lambda p: LBFGS(p, line_search_fn="strong_wolfe", deterministic=True, **SEARCHED),
    "lbfgs, no promise": lambda p: LBFGS(p, line_search_fn="strong_wolfe", **SEARCHED),
    "fuse": lambda p: Fuse(p, 1e-2, deterministic=True, theta=0.5),
}
REMEMBERS = ("found out", "promised", "lbfgs")


def pairs(run: Regression) -> int:
    report = run.optimizer.report()
    return int(report.pairs_accepted + report.pairs_skipped)


@pytest.mark.parametrize("make", MAKERS)
def test_it_may_be_said_at_any_time_and_in_any_phase(make: str) -> None:
    run = Regression(make=MAKERS[make])
    run.optimizer.new_objective()
    for step in range(150):
        if step % 30 == 29:
            new_targets(run)
            run.optimizer.new_objective()
        began, counted, calls = run.value(), pairs(run), run.calls
        run.step()
        if step % 30 == 29 and make in REMEMBERS and step > 90:
            assert run.calls > calls + 1  # the start, and a trial at least
            assert run.value() <= began
            assert pairs(run) == counted  # none waits for the other function's gradient
    assert run.optimizer.report().function_changes == 0
    assert run.optimizer.report().fallbacks == 0


@pytest.mark.parametrize("make", ["device", "promised, fixed", "fuse"])
def test_no_pair_mixes_two_functions(make: str) -> None:
    run = Regression(make=MAKERS[make])
    run.step(60)
    counted = pairs(run)
    new_targets(run)
    run.optimizer.new_objective()
    run.step()
    assert pairs(run) == counted


def test_said_while_it_finds_out_it_looks_twice_again() -> None:
    run = Regression(make=MAKERS["found out"])
    run.step(21)  # one look at the point
    assert run.optimizer.report().stop_reason == "watch"
    new_targets(run)
    run.optimizer.new_objective()
    run.step()
    assert run.optimizer.report().stop_reason == "watch"
    run.step(5)
    assert run.optimizer.report().line_search != "fixed"


def test_adam_takes_no_notice() -> None:
    told, untold = Regression(make=MAKERS["adam"]), Regression(make=MAKERS["adam"])
    for _ in range(10):
        told.optimizer.new_objective()
        told.step()
        untold.step()
    assert torch.equal(told.flat, untold.flat)


@pytest.mark.parametrize("make", REMEMBERS)
def test_a_checkpoint_between_the_call_and_the_step(make: str) -> None:
    run, again = (Regression(make=MAKERS[make]) for _ in range(2))
    run.step(100)
    for each in (run, again):
        new_targets(each)
    run.optimizer.new_objective()
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    with torch.no_grad():
        for ours, theirs in zip(again.params, run.params, strict=True):
            ours.copy_(theirs)
    for each in (run, again):
        each.step(30)
    assert torch.equal(run.flat, again.flat)
    assert run.calls - 100 >= again.calls > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: FusePV(p, switch=AtOnce(), deterministic=True),
        lambda p: FusePV(p, switch=AtOnce()),
        MAKERS["lbfgs"],
    ],
    ids=["promised", "unsaid", "lbfgs"],
)
def test_a_settled_run_goes_on(make: Callable[[Any], Any]) -> None:
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer, goal = make([x]), start

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (x - goal).square().sum()
        loss.backward()
        return loss

    for target in (start, -start, 2 * start):
        goal = target
        optimizer.new_objective()
        for _ in range(20):
            optimizer.step(closure)
        assert optimizer.report().converged
        torch.testing.assert_close(x.detach(), goal)
