"""trial_errors: what a closure may raise at a trial, which counts as one of infinite loss then."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fuse_ext import LBFGS, AtOnce, Fuse, FusePV

SEARCHES = ("strong_wolfe", "approximate_wolfe", "armijo")
NEVER_STOP = {"tolerance_grad": 0.0, "tolerance_change": 0.0}


class NotPositiveError(Exception):
    """As a library's own."""


def optimizers() -> dict[str, Callable[..., Any]]:
    made: dict[str, Callable[..., Any]] = {}
    for search in SEARCHES:
        common = {"line_search_fn": search, **NEVER_STOP}
        made[f"lbfgs_{search}"] = lambda p, c=common, **o: LBFGS(p, max_iter=1, **c, **o)
        made[f"lbfgs_{search}_many"] = lambda p, c=common, **o: LBFGS(p, max_iter=5, **c, **o)
        made[f"lbfgs_{search}_promised"] = lambda p, c=common, **o: LBFGS(
            p, max_iter=1, deterministic=True, **c, **o
        )
        made[f"pv_{search}"] = lambda p, s=search, **o: FusePV(
            p, switch=AtOnce(), line_search=s, **o
        )
        made[f"fuse_{search}"] = lambda p, s=search, **o: Fuse(
            p, 1e-3, theta=0.0, line_search=s, **o
        )
    made["pv_unsaid"] = lambda p, **o: FusePV(p, 1e-3, switch=60, **o)
    made["pv_promised"] = lambda p, **o: FusePV(p, 1e-3, switch=5, deterministic=True, **o)
    return made


OPTIMIZERS = optimizers()


class Barrier:
    """x - 2 sqrt(x) with steep sides, where a negative x is an error; counts errors."""

    def __init__(self, dtype: torch.dtype, error: type[Exception] = NotPositiveError) -> None:
        self.x = torch.full((4,), 0.02, dtype=dtype, requires_grad=True)
        self.scale = torch.tensor([1.0, 5.0, 25.0, 125.0], dtype=dtype)
        self.error, self.errors, self.always = error, 0, False
        self.calls = 0

    def closure(self) -> Tensor:
        self.calls += 1
        self.x.grad = None
        if self.always or bool((self.x <= 0).any()):
            self.errors += 1
            raise self.error("not positive")
        loss = (self.scale * (self.x - 2 * self.x.sqrt() + 1)).sum()
        loss.backward()
        return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_trial_that_raises_is_too_far(name: str, dtype: torch.dtype) -> None:
    mine = Barrier(dtype)
    with torch.no_grad():
        mine.x.fill_(3.0)  # searches overshoot from here
    # A first trial far too long, as lr says.
    first = {"lr": 50.0} if name.startswith("lbfgs") else {"lbfgs_lr": 50.0}
    optimizer = OPTIMIZERS[name]([mine.x], trial_errors=(NotPositiveError,), **first)
    for _ in range(120):
        optimizer.step(mine.closure)
        assert bool((mine.x > 0).all())
    assert mine.errors > 0
    report = optimizer.report()
    assert report.non_finite >= mine.errors
    assert report.evaluations == mine.calls
    goal = torch.ones_like(mine.x)
    torch.testing.assert_close(mine.x.detach(), goal, rtol=0.0, atol=0.05)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_named_is_raised_and_so_is_all_where_a_step_begins(name: str) -> None:
    for named, always in (((ValueError,), False), ((NotPositiveError,), True)):
        mine = Barrier(torch.float64)
        with torch.no_grad():
            mine.x.fill_(3.0)
        first = {"lr": 50.0} if name.startswith("lbfgs") else {"lbfgs_lr": 50.0}
        optimizer = OPTIMIZERS[name]([mine.x], trial_errors=named, **first)
        mine.always = always
        with pytest.raises(NotPositiveError):
            for _ in itertools.repeat(None, 200):
                optimizer.step(mine.closure)
        assert bool((mine.x > 0).all())


def test_a_failed_cholesky() -> None:
    """A covariance with a length scale that searches make too long."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(0, 1, 30, dtype=torch.float32)
    y = torch.sin(6 * x) + 0.05 * torch.randn(30, generator=generator)
    theta = torch.tensor([0.0, 0.0, -1.0], requires_grad=True)
    optimizer = FusePV(
        [theta], switch=AtOnce(), deterministic=True, trial_errors=torch.linalg.LinAlgError
    )
    first = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        length, size, noise = theta.exp()
        kernel = size * torch.exp(-((x[:, None] - x) ** 2) / (2 * length**2))
        factor = torch.linalg.cholesky(kernel + noise * torch.eye(30))
        fit = torch.cholesky_solve(y[:, None], factor)[:, 0] @ y
        loss = 0.5 * fit + factor.diagonal().log().sum()
        loss.backward()
        first.append(float(loss.detach()))
        return loss

    for _ in range(40):
        optimizer.step(closure)
    assert min(first) < first[0] - 10.0


@pytest.mark.parametrize("make", [LBFGS, FusePV, Fuse])
def test_a_checkpoint_does_not_say_it(make: Any) -> None:
    """Classes are no data: torch.load(weights_only=True) reads it; the constructor says them."""
    mine, again = Barrier(torch.float64), Barrier(torch.float64)
    optimizer = make([mine.x], trial_errors=(NotPositiveError,))
    other = make([again.x], trial_errors=(ValueError,))
    optimizer.step(mine.closure)
    assert optimizer.state_dict()["param_groups"][0]["trial_errors"] == ()
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    assert other.param_groups[0]["trial_errors"] == (ValueError,)
    assert copy.deepcopy(optimizer).param_groups[0]["trial_errors"] == (NotPositiveError,)


@pytest.mark.parametrize("wrong", ["ValueError", (3,), (KeyboardInterrupt,), None])
def test_only_exception_classes(wrong: Any) -> None:
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(TypeError, match="trial_errors must be a tuple of exception classes"):
        FusePV([x], trial_errors=wrong)
