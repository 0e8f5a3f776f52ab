"""What user code may rely on with every ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fuse_pv_cases import BACKENDS, assert_same
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import fuse_ext
from fuse_ext import LBFGS, Adam, AtOnce, Fuse, FusePV, LossPlateau, Never

SEARCHES = (None, "armijo", "strong_wolfe", "approximate_wolfe")
CPU = torch.device("cpu")


class Problem:
    """A regression whose tensors all say where they are and of which dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator(device=CPU).manual_seed(3)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device=CPU)
            return drawn.to(dtype)

        self.inputs, self.targets = normal(30, 5), normal(30, 4)
        self.params = [normal(5, 4), normal(4), normal(3)]
        for param in self.params:
            param.requires_grad_()
        self.calls = 0

    def closure(self) -> Tensor:
        self.calls += 1
        for param in self.params:
            param.grad = None
        weight, bias, late = self.params
        loss = ((self.inputs @ weight + bias).tanh() - self.targets).square().mean()
        if not 3 < self.calls < 6:  # from then on one parameter's step count lags behind
            loss = loss + late.square().sum()
        loss.backward()
        return loss.detach()

    @property
    def flat(self) -> Tensor:
        return torch.cat([param.detach().reshape(-1) for param in self.params])


# --- default device and dtype --------------------------------------------------------------------


CASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p, **o: Adam(p, lr=0.01, **o),
    "adam amsgrad": lambda p, **o: Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1, **o),
    "adam bf16": lambda p, **o: Adam(p, lr=0.01, moment_dtype=torch.bfloat16, **o),
    "adam capturable": lambda p, **o: Adam(p, lr=0.01, capturable=True, **o),
    "lbfgs capturable": lambda p, **o: LBFGS(p, lr=0.5, max_iter=1, capturable=True, **o),
    "fuse": lambda p, **o: Fuse(p, 0.01, **o),
    "fuse search": lambda p, **o: Fuse(p, 0.01, line_search="strong_wolfe", **o),
    "averages": lambda p, **o: FusePV(p, 0.01, 5, deterministic=False, **o),
    "finds out": lambda p, **o: FusePV(p, 0.01, 5, **o),
    "deterministic": lambda p, **o: FusePV(p, 0.01, 5, deterministic=True, **o),
    "fixed step": lambda p, **o: FusePV(p, 0.01, 5, line_search=None, lbfgs_lr=0.1, **o),
    "capturable": lambda p, **o: FusePV(
        p, 0.01, 5, line_search=None, lbfgs_lr=0.1, capturable=True, **o
    ),
    "adam phase": lambda p, **o: FusePV(p, 0.01, 100, **o),
}
for _search in SEARCHES:
    CASES[f"lbfgs {_search}"] = lambda p, _s=_search, **o: LBFGS(
        p, lr=0.5, max_iter=3, line_search_fn=_s, **o
    )
HISTORIES = (None, torch.bfloat16, torch.int8)


def variants() -> Iterator[Any]:
    for name in CASES:
        histories = (None,) if name.startswith("adam") else HISTORIES
        for history in histories:
            options = {} if history is None else {"history_dtype": history}
            yield pytest.param(name, options, id=f"{name}-{history}".replace("torch.", ""))


@contextmanager
def defaults(device: str | None, dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if device is not None:
            torch.set_default_device(device)
        if dtype is not None:
            torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def trained(name: str, steps: int, **options: Any) -> tuple[Tensor, Any]:
    """Parameters and state after some steps, a checkpoint and some more."""
    problem = Problem()
    optimizer = CASES[name](problem.params, **options)
    for _ in range(steps):
        optimizer.step(problem.closure)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer = CASES[name](problem.params, **options)
    optimizer.load_state_dict(saved)
    for _ in range(4):
        optimizer.step(problem.closure)
    return problem.flat, copy.deepcopy(optimizer.state_dict())


def with_float64_counts(state: Any) -> Any:
    """torch counts Adam's steps in float64 where that is the default dtype."""
    for entry in state["state"].values():
        if "step" in entry:
            entry["step"] = entry["step"].double()
    return state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), list(variants()))
def test_torch_defaults_do_not_matter(name: str, options: dict[str, Any], backend: str) -> None:
    flat, state = trained(name, 9, backend=backend, **options)
    assert flat.isfinite().all()
    for device, default in (
        ("meta", None),
        ("meta", torch.float64),
        (None, torch.float16),
        (None, torch.bfloat16),
    ):
        with defaults(device, default):
            ours = trained(name, 9, backend=backend, **options)
        assert torch.equal(ours[0], flat)
        expected = copy.deepcopy(state)
        if default == torch.float64:
            expected = with_float64_counts(expected)
        assert_same(ours[1], expected)


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.float16])
def test_step_counts_have_the_dtype_of_torch(default: torch.dtype) -> None:
    dtypes = []
    for kind in (Adam, torch.optim.Adam):
        with defaults(None, default):
            problem = Problem()
            optimizer = kind(problem.params)
            optimizer.step(problem.closure)
            dtypes.append(optimizer.state[problem.params[0]]["step"].dtype)
    assert dtypes[0] == dtypes[1]


class Named(TorchFunctionMode):
    """Refuses to make a tensor of a device or dtype that is not named."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() - {torch.asarray, torch.as_tensor}:
            assert kwargs.get("device") is not None, f"{func.__name__} names no device"
            assert kwargs.get("dtype") is not None, f"{func.__name__} names no dtype"
        return func(*args, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), list(variants()))
def test_every_tensor_names_device_and_dtype(
    name: str, options: dict[str, Any], backend: str
) -> None:
    with Named():  # long enough for a pair of block means
        trained(name, 26, backend=backend, **options)


@pytest.mark.parametrize("optimizer", ["Adam", "LBFGS", "Fuse", "FusePV"])
@pytest.mark.parametrize("options", [{}, {"line_search": "auto", "history_dtype": torch.int8}])
def test_estimates_do_not_depend_on_torch_defaults(optimizer: str, options: Any) -> None:
    params: list[Any] = [1000, Problem().params]
    expected = [fuse_ext.estimate_memory(p, optimizer, **options) for p in params]
    with defaults("meta", torch.float16), Named():
        ours = [fuse_ext.estimate_memory(p, optimizer, **options) for p in params]
    assert ours == expected


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
    "averages": CASES["averages"],
    "said so": lambda p, **o: FusePV(p, 0.01, 5, pairs="averaged", **o),
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
        assert theirs.step(telling.closure) is not None
        assert torch.equal(silent.flat, telling.flat)
    if isinstance(ours, FusePV):
        assert ours.phase == ("adam" if name in ("adam phase", "never", "unchecked") else "lbfgs")


def test_without_a_loss_it_stays_on_averages() -> None:
    silent, other = Problem(), Problem()
    ours = FusePV(silent.params, 0.01, 5)
    theirs = FusePV(other.params, 0.01, 5, deterministic=False)
    for k in range(20):
        # A loss now and then comes too late: the steps are taken.
        ours.step(lambda k=k: silent.closure() if k == 9 else silent.closure() and None)
        theirs.step(other.closure)
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


# --- ascent in one group, descent in another -----------------------------------------------------


class Saddle:
    """f(x, y) = a(x) - b(y), of which every second call is another sample where ``noise`` is."""

    def __init__(self, signs: tuple[float, float], noise: float) -> None:
        self.params = [torch.full((5,), 0.7, device=CPU), torch.full((4,), -0.4, device=CPU)]
        self.signs, self.noise, self.calls = signs, noise, 0

    def closure(self) -> Tensor:
        self.calls += 1
        for param, sign in zip(self.params, self.signs, strict=True):
            scale = torch.arange(1, param.numel() + 1, dtype=torch.float32, device=CPU)
            target = 1.0 + self.noise * (self.calls % 3 - 1)
            param.grad = sign * 2.0 * scale * (param - target)
        return torch.ones((), device=CPU)

    @property
    def flat(self) -> Tensor:
        return torch.cat(self.params)


MIXED: dict[str, dict[str, Any]] = {
    "never": {"switch": Never()},
    "never, with a search": {"switch": Never(), "line_search": "armijo"},
    "never, capturable": {"switch": Never(), "line_search": None, "capturable": True},
    "default": {"switch": 5},
    "averages": {"switch": 5, "pairs": "averaged"},
    "not one function": {"switch": 5, "deterministic": False},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
def test_every_group_has_its_own_sign(name: str, decay: dict[str, Any], backend: str) -> None:
    """As descent in all groups, with the gradients of those that ascend turned round."""
    runs = []
    for signs, maximize in (((1.0, -1.0), (False, True)), ((1.0, 1.0), (False, False))):
        problem = Saddle(signs, noise=0.1)
        groups = [
            {"params": p, "maximize": m, **decay}
            for p, m in zip(problem.params, maximize, strict=True)
        ]
        options = dict(MIXED[name])
        if not any(maximize):  # a loss that never changes would be one function
            options.setdefault("deterministic", False)
        optimizer = FusePV(groups, 0.05, backend=backend, **options)
        for _ in range(60):
            optimizer.step(problem.closure)
        runs.append(problem.flat)
        assert optimizer.phase == ("adam" if "never" in name else "lbfgs")
        copied = copy.deepcopy(optimizer)
        again = FusePV(groups, 0.05, backend=backend, **options)
        again.load_state_dict(copied.state_dict())
        for _ in range(3):
            again.step(problem.closure)
        runs.append(problem.flat)
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3])
    assert (runs[0] - 1.0).abs().max() < (0.5 if not decay else 1.0)  # both have come closer


def test_adam_and_fuse_pv_agree_on_signs() -> None:
    ours, theirs = Saddle((1.0, -1.0), 0.1), Saddle((1.0, -1.0), 0.1)
    for problem, kind in (
        (ours, lambda groups: FusePV(groups, 0.05, Never())),
        (theirs, lambda groups: torch.optim.Adam(groups, 0.05)),
    ):
        optimizer = kind([{"params": p, "maximize": p.numel() == 4} for p in problem.params])
        for _ in range(20):
            optimizer.step(problem.closure)
    torch.testing.assert_close(ours.flat, theirs.flat)


@pytest.mark.parametrize(
    "options",
    [
        {"line_search": "armijo"},
        {"line_search": None},
        {"line_search": None, "capturable": True, "switch": 5},
        {"deterministic": True},
        {"max_iter": 2},
        {"switch": AtOnce()},
        {"pairs": "same_batch"},
    ],
    ids=str,
)
def test_an_l_bfgs_without_averages_needs_one_sign(options: dict[str, Any]) -> None:
    problem = Saddle((1.0, -1.0), 0.0)
    up, down = (
        {"params": p, "maximize": m} for p, m in zip(problem.params, (True, False), strict=True)
    )
    wanted = "maximize must be the same .* no common objective"
    with pytest.raises(ValueError, match=wanted):
        FusePV([up, down], **options)
    optimizer = FusePV([up], **{"maximize": True, **options})
    with pytest.raises(ValueError, match=wanted):
        optimizer.add_param_group(down)
    assert len(optimizer.param_groups) == 1
    both = FusePV([up, {**down, "maximize": True}], **options)
    both.step(problem.closure)
    saved = copy.deepcopy(both.state_dict())
    saved["param_groups"][1]["maximize"] = False
    before = copy.deepcopy(both.state_dict())
    with pytest.raises(ValueError, match=wanted):
        both.load_state_dict(saved)
    assert_same(both.state_dict(), before)


@pytest.mark.parametrize("kind", [LBFGS, Fuse])
def test_one_objective_has_one_sign(kind: Any) -> None:
    problem = Saddle((1.0, -1.0), 0.0)
    up, down = (
        {"params": p, "maximize": m} for p, m in zip(problem.params, (True, False), strict=True)
    )
    with pytest.raises(ValueError, match="maximize must be the same in all parameter groups"):
        kind([up, down])


@pytest.mark.parametrize("capturable", [False, True])
def test_signs_that_differ_when_the_switch_comes(capturable: bool) -> None:
    problem = Saddle((1.0, -1.0), 0.0)
    groups = [
        {"params": p, "maximize": m} for p, m in zip(problem.params, (True, False), strict=True)
    ]
    options = {"line_search": None, "capturable": capturable}
    optimizer = FusePV(groups, 0.05, Never(), **options)
    optimizer.step(problem.closure)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="no common objective"):
        optimizer.switch_now()
    assert optimizer.phase == "adam"
    assert_same(optimizer.state_dict(), before)
    # Nor later, when someone has turned a sign round in the midst of it.
    optimizer.param_groups[0]["maximize"] = False
    optimizer.switch_now()
    optimizer.step(problem.closure)
    optimizer.param_groups[1]["maximize"] = True
    at = problem.flat
    with pytest.raises(ValueError, match="no common objective"):
        optimizer.step(problem.closure)
    assert torch.equal(problem.flat, at)


def test_a_history_of_one_objective_does_not_go_with_two_signs() -> None:
    problem = Problem()
    found = FusePV([{"params": p} for p in problem.params], 0.01, 5)
    for _ in range(9):
        found.step(problem.closure)
    saved = copy.deepcopy(found.state_dict())
    assert "root_metric" not in saved["state"][0]  # it has found out
    saved["param_groups"][1]["maximize"] = True
    before = copy.deepcopy(found.state_dict())
    with pytest.raises(ValueError, match="no common objective"):
        found.load_state_dict(saved)
    assert_same(found.state_dict(), before)


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
    saved["state"][2] = {"exp_avg": 1}
    with pytest.raises(ValueError, match=r"it holds \['exp_avg'\] for parameter 2"):
        optimizer.load_state_dict(saved)
