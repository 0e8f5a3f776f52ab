"""What user code may rely on with every ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_cases import CASES, CPU, SEARCHES, Problem
from fuse_pv_cases import BACKENDS, assert_same, saved_state
from torch import Tensor

import fuse_ext
from fuse_ext import LBFGS, Adam, AtOnce, Fuse, FusePV, LossPlateau, Never

# --- parameter groups belong to the caller -------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_group_serves_a_second_optimizer(name: str) -> None:
    problem, again = Problem(), Problem()
    group: dict[str, Any] = {"params": (p for p in problem.params), "weight_decay": 0.1}
    first = CASES[name]([group])
    assert all(map(operator.is_, group["params"], problem.params))
    assert group.keys() == {"params", "weight_decay"}
    for _ in range(9):
        first.step(problem.closure)
    assert group.keys() == {"params", "weight_decay"}
    # The same numbers in the same tensors, to the second optimizer as to one that is alone.
    with torch.no_grad():
        for param, start in zip(problem.params, again.params, strict=True):
            param.copy_(start)
    problem.calls = 0
    second = CASES[name]([group])
    alone = CASES[name]([{"params": again.params, "weight_decay": 0.1}])
    for _ in range(9):
        second.step(problem.closure)
        alone.step(again.closure)
    assert torch.equal(problem.flat, again.flat)
    assert_same(second.state_dict(), alone.state_dict())


@pytest.mark.parametrize("kind", [Adam, LBFGS, Fuse, FusePV])
def test_a_group_added_later_stays_the_caller_s(kind: Any) -> None:
    optimizer = kind([torch.zeros(2, requires_grad=True)], lr=0.1)
    new = torch.zeros(3, requires_grad=True)
    group = {"params": new, "lr": 0.2}
    optimizer.add_param_group(group)
    assert group.keys() == {"params", "lr"} and group["params"] is new
    optimizer.param_groups[1]["lr"] = 0.3  # as schedulers do
    assert group["lr"] == 0.2
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([new])
    with pytest.raises(KeyError, match="params"):
        optimizer.add_param_group({"lr": 0.2})


@pytest.mark.parametrize("switch", [3, 0])
def test_phase_and_rate_at_the_switch_are_not_taken_over(switch: int) -> None:
    problem = Problem()
    first = FusePV(problem.params, 0.01, switch)
    for _ in range(5):
        first.step(problem.closure)
    assert first.phase == "lbfgs"
    second = FusePV(first.param_groups, 0.01, 100)
    assert second.phase == "adam"
    assert second.param_groups[0]["lr_at_switch"] is None
    assert first.phase == "lbfgs"
    third = FusePV(second.param_groups, switch=AtOnce())
    assert third.phase == "lbfgs"

    new = torch.zeros(3, requires_grad=True)
    second.add_param_group({"params": new, "phase": "lbfgs", "lr_at_switch": 7.0})
    assert [group["phase"] for group in second.param_groups] == ["adam", "adam"]
    assert second.param_groups[1]["lr_at_switch"] is None
    third.add_param_group({"params": new, "phase": "adam"})
    assert [group["phase"] for group in third.param_groups] == ["lbfgs", "lbfgs"]


def test_a_group_serves_an_estimate_and_an_optimizer() -> None:
    group = {"params": (torch.zeros(n, requires_grad=True) for n in (2, 3))}
    assert fuse_ext.estimate_memory([group]).numel == 5
    FusePV([group])
    assert group.keys() == {"params"} and len(group["params"]) == 2


@pytest.mark.parametrize("name", CASES)
def test_what_a_hook_returns_is_not_written_to(name: str) -> None:
    problem = Problem()
    optimizer = CASES[name](problem.params)
    optimizer.step(problem.closure)
    kept = copy.deepcopy(optimizer.state_dict())
    kept["param_groups"][0]["capturable"] = "another process's"
    before = copy.deepcopy(kept)
    optimizer.register_load_state_dict_pre_hook(lambda _, incoming: kept)
    if "capturable" in optimizer.defaults:
        optimizer.load_state_dict(optimizer.state_dict())
    assert_same(kept, before)


# --- a parameter given twice ---------------------------------------------------------------------

TWICE = "a parameter group with duplicate parameters"


@pytest.mark.parametrize("name", CASES)
def test_a_parameter_twice_in_one_group_counts_once(name: str) -> None:
    problem, other = Problem(), Problem()
    weight, bias, late = problem.params
    with pytest.warns(UserWarning, match=TWICE):
        optimizer = CASES[name]([weight, bias, weight, late, bias])
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, problem.params)]
    once = CASES[name](other.params)
    for _ in range(9):
        optimizer.step(problem.closure)
        once.step(other.closure)
    assert torch.equal(problem.flat, other.flat)
    assert_same(optimizer.state_dict(), once.state_dict())


@pytest.mark.parametrize("kind", [Adam, LBFGS, Fuse, FusePV])
def test_names_of_parameters_given_twice(kind: Any) -> None:
    a, b, c = (torch.zeros(n, requires_grad=True) for n in (2, 3, 4))
    given = [("a", a), ("a again", a), ("b", b)]
    with pytest.warns(UserWarning, match=TWICE):
        optimizer = kind([{"params": given}])
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]
    assert len(given) == 3
    group = {"params": [("c", c), ("c", c)]}
    with pytest.warns(UserWarning, match=TWICE):
        optimizer.add_param_group(group)
    assert optimizer.param_groups[1]["param_names"] == ["c"]
    assert optimizer.flat.numel == 9
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group({"params": [("a", a)]})
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        kind([{"params": a}, {"params": [b, a]}])


# --- closures that return None -------------------------------------------------------------------

WITHOUT_LOSS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    **{name: CASES[name] for name in CASES if "capturable" in name},
    "adam": CASES["adam"],
    "adam phase": CASES["adam phase"],
    "never": lambda p, **o: FusePV(p, 0.01, Never(), **o),
    "unchecked": lambda p, **o: FusePV(p, 0.01, Never(), check_finite=False, **o),
    "minibatches": CASES["minibatches"],
    "fixed step": CASES["fixed step"],
    "consecutive": lambda p, **o: FusePV(
        p, 0.01, 5, line_search=None, lbfgs_lr=0.1, pairs="consecutive", **o
    ),
    "one function": lambda p, **o: FusePV(
        p, 0.01, 5, line_search=None, lbfgs_lr=0.1, deterministic=True, **o
    ),
    "iterations": lambda p, **o: FusePV(
        p, 0.01, 5, line_search=None, lbfgs_lr=0.1, max_iter=3, **o
    ),
    "lbfgs": lambda p, **o: LBFGS(p, 0.1, max_iter=3, tolerance_change=0.0, **o),
    "lbfgs one function": lambda p, **o: LBFGS(
        p, 0.1, max_iter=3, max_eval=99, tolerance_change=0.0, deterministic=True, **o
    ),
    "fuse": CASES["fuse"],
    "fuse one function": lambda p, **o: Fuse(p, 0.01, deterministic=True, **o),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WITHOUT_LOSS)
def test_a_closure_may_return_none_where_nothing_needs_the_loss(name: str, backend: str) -> None:
    silent, telling = Problem(), Problem()
    if name == "one function" or "lbfgs one" in name:
        silent.calls = telling.calls = 9  # evaluations remembered do not count
    ours = WITHOUT_LOSS[name](silent.params, backend=backend)
    theirs = WITHOUT_LOSS[name](telling.params, backend=backend)

    def closure() -> None:
        silent.closure()

    for _ in range(30):
        assert ours.step(closure) is None
        if name == "minibatches":  # by known losses lengths are judged: the same without a closure
            telling.closure()
            theirs.step()
        else:
            assert theirs.step(telling.closure) is not None
        assert torch.equal(silent.flat, telling.flat)
    if isinstance(ours, FusePV):
        assert ours.phase == ("adam" if name in ("adam phase", "never", "unchecked") else "lbfgs")


def test_without_a_loss_they_stay_minibatches() -> None:
    silent, other = Problem(), Problem()
    ours = FusePV(silent.params, 0.01, 5)
    theirs = FusePV(other.params, 0.01, 5, deterministic=False)
    for k in range(20):
        # A loss now and then comes too late: the steps are taken.
        ours.step(lambda k=k: silent.closure() if k == 9 else silent.closure() and None)
        loss = other.closure()
        theirs.step(loss=loss if k == 9 else None)
        assert torch.equal(silent.flat, other.flat)
    assert ours.report().line_search == "fixed"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda p: FusePV(p, 0.01, LossPlateau()), r"switch=LossPlateau\(.*\) needs"),
        (lambda p: FusePV(p, 0.01, AtOnce(), deterministic=True), "'approximate_wolfe' needs"),
        (lambda p: FusePV(p, 0.01, AtOnce(), line_search="armijo"), "line search 'armijo' needs"),
        (lambda p: FusePV(p, 0.01, AtOnce(), line_search=None, rtol=0.5), "rtol=0.5 needs"),
        (lambda p: LBFGS(p, rtol=1e-3), "rtol=0.001 needs"),
        *(
            (lambda p, s=search: LBFGS(p, line_search_fn=s), f"line search '{search}' needs")
            for search in SEARCHES[1:]
        ),
        (lambda p: Fuse(p, line_search="strong_wolfe"), "line search 'strong_wolfe' needs"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_needs_the_loss_is_named(make: Any, what: str, backend: str) -> None:
    problem = Problem()
    optimizer = make(problem.params)
    before = problem.flat
    with pytest.raises(TypeError, match=f"closure must return the loss, got None; .*{what}"):
        optimizer.step(lambda: problem.closure() and None)
    assert torch.equal(problem.flat, before)


def test_the_sample_of_a_pair_needs_no_loss() -> None:
    silent, telling = Problem(), Problem()
    ours, theirs = (
        FusePV(p.params, 0.01, AtOnce(), line_search="armijo", deterministic=False)
        for p in (silent, telling)
    )
    for _ in range(5):
        ours.step(silent.closure, pair_closure=lambda: silent.closure() and None)
        theirs.step(telling.closure, pair_closure=telling.closure)
    assert torch.equal(silent.flat, telling.flat)


# --- tolerances ----------------------------------------------------------------------------------

LBFGS_ALONE: dict[str, Callable[..., Any]] = {
    "lbfgs": lambda p, **o: LBFGS(p, **o),
    "lbfgs search": lambda p, **o: LBFGS(p, line_search_fn="strong_wolfe", **o),
    "lbfgs capturable": lambda p, **o: LBFGS(p, max_iter=1, capturable=True, **o),
    "fuse_pv": lambda p, **o: FusePV(p, switch=AtOnce(), max_iter=3, **o),
    "fuse_pv fixed": lambda p, **o: FusePV(p, switch=AtOnce(), line_search=None, **o),
    "fuse_pv one function": lambda p, **o: FusePV(p, switch=AtOnce(), deterministic=True, **o),
    "fuse_pv capturable": lambda p, **o: FusePV(
        p, switch=AtOnce(), line_search=None, capturable=True, **o
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LBFGS_ALONE)
def test_an_infinite_tolerance_stops_a_step_at_once(name: str, backend: str) -> None:
    for tolerance, reason in (("tolerance_grad", "gradient"), ("tolerance_change", "slope")):
        problem = Problem()
        options = {"tolerance_grad": 0.0, "tolerance_change": 0.0, tolerance: math.inf}
        optimizer = LBFGS_ALONE[name](problem.params, backend=backend, **options)
        before = problem.flat
        for k in range(3):
            loss = optimizer.step(problem.closure)
            assert isinstance(loss, Tensor)
            if name != "fuse_pv capturable":  # whose host cannot know that there is no pair
                assert problem.calls == k + 1
        assert torch.equal(problem.flat, before)
        assert optimizer.report().stop_reason == reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LBFGS_ALONE)
@pytest.mark.filterwarnings("ignore:the closure has left no gradient")
def test_minus_infinity_is_never(name: str, backend: str) -> None:
    never, zero = Problem(), Problem()
    for problem, value in ((never, -math.inf), (zero, 0.0)):
        options = {"tolerance_grad": value, "tolerance_change": value}
        optimizer = LBFGS_ALONE[name](problem.params, backend=backend, **options)
        for _ in range(5):
            optimizer.step(problem.closure)
        for param in problem.params:  # nor may it divide by a gradient of 0
            param.grad = None
        optimizer.step(lambda: torch.zeros((), device=CPU))
    assert torch.equal(never.flat, zero.flat)


@pytest.mark.parametrize("kind", [LBFGS, FusePV])
@pytest.mark.parametrize("name", ["tolerance_grad", "tolerance_change"])
def test_other_tolerances_are_still_refused(kind: Any, name: str) -> None:
    for value in (math.nan, -1.0):
        with pytest.raises(ValueError, match=f"{name} must be at least 0"):
            kind(Problem().params, **{name: value})


# --- Adam(fused=True) ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Adam, torch.optim.Adam])
def test_fused_on_a_device_without_memory(kind: Any) -> None:
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = kind(model.parameters(), fused=True)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating"):
        optimizer.step()
    optimizer.zero_grad()
    model.to_empty(device="cpu")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()


@pytest.mark.parametrize("kind", [Adam, torch.optim.Adam])
def test_fused_and_foreach_exclude_each_other(kind: Any) -> None:
    with pytest.raises(RuntimeError, match=r"fused.*foreach"):
        kind([torch.zeros(2)], fused=True, foreach=True)


# --- the user's own state ------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3, 9])
@pytest.mark.parametrize("name", [*CASES, "torch's adam", "torch's lbfgs"])
def test_the_state_may_hold_what_is_the_user_s(name: str, steps: int) -> None:
    makers = {
        **CASES,
        "torch's adam": lambda p: torch.optim.Adam(p),
        "torch's lbfgs": lambda p: torch.optim.LBFGS(p),
    }
    problem, plain = Problem(), Problem()
    optimizer, other = makers[name](problem.params), makers[name](plain.params)
    mine: dict[str, Any] = {"a number": 3, "some numbers": {"step": 4}}
    optimizer.state.update(copy.deepcopy(mine))
    for _ in range(steps):
        optimizer.step(problem.closure)
        other.step(plain.closure)
    copied = copy.deepcopy(optimizer)
    assert {key: copied.state[key] for key in mine} == mine
    again = makers[name](problem.params)
    again.load_state_dict(optimizer.state_dict())
    assert {key: again.state[key] for key in mine} == mine
    for _ in range(3):
        again.step(problem.closure)
        other.step(plain.closure)
    assert torch.equal(problem.flat, plain.flat)


def test_the_state_of_a_parameter_is_not_the_user_s() -> None:
    problem = Problem()
    optimizer = LBFGS(problem.params)
    optimizer.step(problem.closure)
    saved = optimizer.state_dict()
    saved["state"] = {**saved_state(optimizer), 2: {"exp_avg": 1}}  # no record says what there is
    with pytest.raises(ValueError, match=r"it holds \['exp_avg'\] for parameter 2"):
        optimizer.load_state_dict(saved)
