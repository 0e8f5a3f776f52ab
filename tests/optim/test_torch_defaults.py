"""torch's default device and dtype do not matter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contract_cases import CASES, Problem
from fuse_pv_cases import BACKENDS, assert_same
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import fuse_ext
from fuse_ext import Adam

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
