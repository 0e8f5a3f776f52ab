"""LBFGS refuses bad options and parameters, and knows odd but good ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lbfgs_cases import BACKENDS, F64, make, reason, state
from problems import Objective, rosenbrock
from torch import Tensor

from fuse_ext import LBFGS


def param(**options: Any) -> Tensor:
    return torch.ones(3, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr must be at least 0 and finite, got -1.0"),
        ({"lr": math.nan}, ValueError, r"lr must be .* got nan"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must have one element, got a tensor of 2"),
        ({"lr": "1"}, TypeError, r"lr must be a number, got '1'"),
        ({"max_iter": 0}, ValueError, r"max_iter must be at least 1, got 0"),
        ({"max_iter": 1.5}, TypeError, r"max_iter must be an int, got 1.5"),
        ({"max_eval": 0}, ValueError, r"max_eval must be at least 1, got 0"),
        ({"history_size": 0}, ValueError, r"history_size must be at least 1, got 0"),
        ({"history_size": 2.0}, TypeError, r"history_size must be an int, got 2.0"),
        ({"tolerance_grad": -1e-9}, ValueError, r"tolerance_grad must be .* got -1e-09"),
        ({"tolerance_change": math.nan}, ValueError, r"tolerance_change must be .* got nan"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must be .* got -0.1"),
        ({"curvature_tol": 1.5}, ValueError, r"curvature_tol must be in \[0, 1\], got 1.5"),
        ({"curvature_tol": -0.1}, ValueError, r"curvature_tol must be in \[0, 1\], got -0.1"),
        (
            {"line_search_fn": "wolfe"},
            ValueError,
            r"line_search_fn must be None or one of .*'strong_wolfe'.* got 'wolfe'",
        ),
        ({"line_search_fn": 3}, TypeError, r"line_search_fn must be a string or None, got 3"),
        (
            {"history_dtype": torch.int16},
            ValueError,
            r"history_dtype must be None or one of .* got torch.int16",
        ),
        ({"history_dtype": "bf16"}, ValueError, r"history_dtype must be None or .* got 'bf16'"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of auto, native, .* got 'cuda'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_out_of_range(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LBFGS([param(requires_grad=True)], **options)
    if "backend" in options:
        return
    # The same in a parameter group of its own, at construction and later.
    groups = [{"params": [param(requires_grad=True)]}, {"params": [param()], **options}]
    with pytest.raises((ValueError, TypeError)):
        LBFGS(groups)
    optimizer = LBFGS([param(requires_grad=True)])
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_iter", 3),
        ("max_eval", 3),
        ("tolerance_grad", 0.5),
        ("tolerance_change", 0.5),
        ("history_size", 3),
        ("line_search_fn", "armijo"),
        ("maximize", True),
        ("history_dtype", torch.bfloat16),
        ("curvature_tol", 0.5),
        ("deterministic", True),
    ],
)
def test_options_that_groups_share(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be the same in all parameter groups, got"):
        LBFGS([{"params": [param()]}, {"params": [param()], name: value}])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "empty"),
        ([torch.ones(2, dtype=torch.int64)], TypeError, r"params\[0\] has dtype torch.int64"),
        ([torch.ones(2).to_sparse()], TypeError, r"params\[0\] has layout torch.sparse_coo"),
        (
            [torch.ones(2), torch.ones(2, device="meta")],
            ValueError,
            r"params\[1\] is on meta but params\[0\] is on cpu",
        ),
    ],
    ids=str,
)
def test_parameters_that_cannot_be_one_vector(params: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LBFGS(params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sparse_gradient(backend: str) -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = make(table.parameters(), backend=backend)
    before = table.weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=r"grads\[0\] has layout torch.sparse_coo"):
        optimizer.step(closure)
    assert torch.equal(table.weight, before)


def test_a_parameter_that_changed_its_shape() -> None:
    x = torch.ones(3, requires_grad=True)
    optimizer = make([x])
    optimizer.step(lambda: _square(x))
    x.data = torch.ones(5)
    x.grad = None
    with pytest.raises(ValueError, match=r"params\[0\] is now .*\(5,\).* but was .*\(3,\)"):
        optimizer.step(lambda: _square(x))


def _square(x: Tensor) -> Tensor:
    x.grad = None
    loss = x.square().sum()
    loss.backward()
    return loss


def test_parameters_may_change_their_dtype_before_the_first_step() -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = make(model.parameters())
    model.double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.eye(3, dtype=F64)) - 1.0).square().sum()
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    assert state(optimizer)["history"].dtype == F64
    assert closure() < 1e-12


def test_an_empty_first_group_and_empty_tensors() -> None:
    mine = Objective(rosenbrock(4))
    nothing = torch.zeros(0, 3, requires_grad=True)
    optimizer = make([{"params": []}, {"params": [nothing, mine.x]}], history_size=4)
    for _ in range(60):
        optimizer.step(mine.closure)
    assert mine.gap < 1e-12
    saved = optimizer.state_dict()
    again = Objective(rosenbrock(4))
    other = make([{"params": []}, {"params": [torch.zeros(0, 3), again.x]}], history_size=4)
    other.load_state_dict(saved)
    assert other.report().lbfgs_iterations == optimizer.report().lbfgs_iterations > 0


def test_all_parameters_empty() -> None:
    nothing = torch.zeros(0, requires_grad=True)
    optimizer = make([nothing])
    assert optimizer.step(lambda: torch.tensor(1.0)) == 1.0
    assert reason(optimizer) == "gradient"
