"""Without a promise: one function is found out, used as if it were promised, and watched."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from regression_cases import CHANGES, POINTS, Regression, new_points, new_targets
from torch import Tensor

from fuse_ext import AtOnce, FusePV
from fuse_ext.kernels import scalars as ring


def test_it_does_all_that_a_promise_would_have_made_it_do() -> None:
    said, unsaid = Regression(deterministic=True, switch=50), Regression()
    for run in (said, unsaid):
        while run.calls < 800:
            run.step()
    group = unsaid.optimizer.param_groups[0]
    assert group["history_size"] == said.optimizer.param_groups[0]["history_size"] > 10
    assert group["curvature_tol"] == 1e-8
    assert unsaid.value() <= 3 * said.value()
    before, steps = unsaid.calls, 100
    unsaid.step(steps)
    assert unsaid.calls - before <= 1.5 * steps
    assert unsaid.optimizer.report().function_changes == 0


def test_what_was_said_stays() -> None:
    run = Regression(history_size=10, curvature_tol=1e-3)
    run.step(100)
    group = run.optimizer.param_groups[0]
    assert run.optimizer.report().line_search != "fixed"
    assert (group["history_size"], group["curvature_tol"]) == (10, 1e-3)


def test_what_a_group_says_stays() -> None:
    run = Regression()
    run.optimizer = FusePV([{"params": run.params, "history_size": 20}], lr=1e-2)
    for steps in (0, 100):
        run.step(steps)
        assert run.optimizer.param_groups[0]["history_size"] == 20
    run.optimizer.switch_back()
    assert run.optimizer.param_groups[0]["history_size"] == 20


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_within_a_step(change: Callable[[Regression], None]) -> None:
    """No step ends above where it began on the function as it is now, and it goes on."""
    run = Regression()
    run.step(160)
    for _ in range(3):
        before = run.optimizer.report().function_changes
        change(run)
        for _ in range(25):
            began = run.value()
            run.step()
            assert run.value() <= began * (1 + 1e-12)
        noticed = run.optimizer.report().function_changes - before
        assert noticed == 1 or (noticed == 0 and change is new_points)  # they change little
    assert run.optimizer.report().function_changes > 0
    assert run.optimizer.phase == "lbfgs"
    assert run.optimizer.report().fallbacks == 0


@pytest.mark.parametrize("times", [2, 3, 4])
@pytest.mark.parametrize("constant", [0.0, 1e6])
def test_batches_used_several_times_are_not_one_function(times: int, constant: float) -> None:
    run = Regression(torch.float32)
    everything, run.constant = run.x, constant
    generator = torch.Generator().manual_seed(1)
    for _ in range(300 // times):
        run.x = everything[torch.randperm(POINTS, generator=generator)[:10]]
        run.step(times)
    calls = run.calls
    for _ in range(100 // times):
        run.x = everything[torch.randperm(POINTS, generator=generator)[:10]]
        run.step(times)
    assert run.calls - calls <= 105
    group = run.optimizer.param_groups[0]
    assert (group["history_size"], group["curvature_tol"]) == (10, 1e-4)


def test_cleared_or_switched_back_it_begins_anew_in_full() -> None:
    """Pairs are few again, and a new optimizer's steps are repeated to the bit."""
    run, new = Regression(), Regression()
    run.step(100)
    run.optimizer.state.clear()
    with torch.no_grad():
        for ours, theirs in zip(new.params, run.params, strict=True):
            ours.copy_(theirs)
    for each in (run, new):
        each.step(70)
    assert torch.equal(run.flat, new.flat)
    run.optimizer.switch_back()
    assert run.optimizer.param_groups[0]["history_size"] == 10


def test_a_group_that_is_added_later_agrees_with_the_others() -> None:
    run, again = Regression(curvature="pairs"), Regression(curvature="pairs")
    run.step(100)
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for each in (run, again):
        extra = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        each.optimizer.add_param_group({"params": [extra]})
        sizes = {group["history_size"] for group in each.optimizer.param_groups}
        assert sizes == {each.optimizer.flat.numel} != {10}
        each.step(20)  # the ring is as large
        assert each.optimizer.state_dict()["state"][0]["history"].shape[1] == sizes.pop() + 1


@pytest.mark.parametrize("steps", [0, 20, 70])
def test_pairs_that_were_asked_for_stay_where_a_group_is_added(steps: int) -> None:
    run = Regression(deterministic=True, history_size=20, switch=50)
    run.step(steps)
    run.optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    assert [group["history_size"] for group in run.optimizer.param_groups] == [20, 20]


@pytest.mark.parametrize("steps", [56, 120])
def test_a_checkpoint_goes_on_bit_for_bit(steps: int) -> None:
    run, again = Regression(), Regression()
    run.step(steps)
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    with torch.no_grad():
        for ours, theirs in zip(again.params, run.params, strict=True):
            ours.copy_(theirs)
    for each in (run, again):
        each.optimizer.zero_grad()  # both evaluate the point at hand
        each.step(40)
    assert torch.equal(run.flat, again.flat)


def test_an_error_when_the_start_is_looked_at_again_can_be_retried() -> None:
    run, spared = Regression(), Regression()
    for each in (run, spared):
        each.step(150)
        new_targets(each)
    before, calls = run.flat, 0

    def fails_at_second_call() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("interrupted")
        return run.closure()

    with pytest.raises(RuntimeError, match="interrupted"):
        run.optimizer.step(fails_at_second_call)
    assert torch.equal(run.flat, before)
    for each in (run, spared):
        each.step(10)
    assert torch.equal(run.flat, spared.flat)


@pytest.mark.parametrize("curvature", ["auto", "pairs"])
@pytest.mark.parametrize("search", [{}, {"line_search": "strong_wolfe"}, {"line_search": "armijo"}])
def test_at_once_it_is_found_out_as_well(search: dict[str, str], curvature: str) -> None:
    """One evaluation an iteration, and the curvature that the promise would have given."""
    losses: dict[str, list[float]] = {"said": [], "unsaid": []}
    for seed in range(5):
        options = {"seed": seed, "switch": AtOnce(), "curvature": curvature, **search}
        said, unsaid = Regression(deterministic=True, **options), Regression(**options)
        for name, run in (("said", said), ("unsaid", unsaid)):
            while run.calls < 600:
                run.step()
            losses[name].append(run.value())
    ours, theirs = (run.optimizer.param_groups[0] for run in (unsaid, said))
    assert ours["history_size"] == theirs["history_size"] > 10
    assert ours["curvature_tol"] == 1e-8
    assert statistics.median(losses["unsaid"]) <= 2 * statistics.median(losses["said"])
    report, promised = unsaid.optimizer.report(), said.optimizer.report()
    assert report.curvature == promised.curvature == ("dense" if curvature == "auto" else curvature)
    assert report.pairs_held == unsaid.flat.numel() or curvature == "auto"
    assert report.lbfgs_iterations >= 0.9 * promised.lbfgs_iterations
    assert (report.function_changes, report.fallbacks) == (0, 0)


def test_at_once_what_was_said_stays() -> None:
    run = Regression(switch=AtOnce(), history_size=12, curvature_tol=1e-3)
    run.step(60)
    group = run.optimizer.param_groups[0]
    assert (group["history_size"], group["curvature_tol"]) == (12, 1e-3)
    assert run.calls < 100


@pytest.mark.parametrize("search", [{}, {"line_search": "strong_wolfe"}])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_at_once_batches_do_not_get_what_one_function_gets(
    search: dict[str, str], times: int
) -> None:
    run = Regression(switch=AtOnce(), **search)
    everything, generator = run.x, torch.Generator().manual_seed(1)
    for _ in range(60 // times):
        run.x = everything[torch.randperm(POINTS, generator=generator)[:10]]
        run.step(times)
    group, entry = run.optimizer.param_groups[0], run.optimizer.state[run.params[0]]
    assert (group["history_size"], group["curvature_tol"]) == (10, 1e-4)
    if search:
        assert not ring.read_header(entry["scalars"]).self_scaling
    else:
        assert run.optimizer.report().fallbacks == 1
