"""What user code may rely on with every ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
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
from fuse_ext import LBFGS, Adam, AtOnce, Fuse, FusePV

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
