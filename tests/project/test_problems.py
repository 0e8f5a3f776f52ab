"""The test problems are what their tables say: gradients, starts and minima."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import Problem, large_problem_set, more_garbow_hillstrom

PROBLEMS = large_problem_set()
# f at the standard start, as printed in later collections or simple to work out.
STARTS = {
    "rosenbrock": 24.2,
    "freudenstein-roth": 400.5,
    "brown-badly-scaled": 999998000003.0,
    "beale": 14.203125,
    "helical-valley": 2500.0,
    "powell-singular": 215.0,
    "wood": 19192.0,
    "watson-6": 30.0,
    "broyden-tridiagonal-10": 21.0,
    "broyden-banded-10": 360.0,
}


def test_there_are_enough_of_them() -> None:
    assert len(more_garbow_hillstrom()) >= 30
    assert len({p.name for p in PROBLEMS}) == len(PROBLEMS)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gradient(problem: Problem) -> None:
    """Autograd's against central differences along random directions, off the start."""
    generator = torch.Generator().manual_seed(1)
    scale = problem.x0.abs().clamp(min=0.1)
    x = problem.x0 + 1e-2 * scale * torch.randn(len(scale), generator=generator).double()
    (gradient,) = torch.autograd.functional.jacobian(problem.f, (x,))
    for _ in range(3):
        v = scale * torch.randn(len(scale), generator=generator).double()
        h = 1e-5
        difference = (problem.f(x + h * v) - problem.f(x - h * v)) / (2 * h)
        size = (gradient * v).abs().sum() + 1e-10 * problem.f(x).abs() / h
        assert (difference - gradient @ v).abs() <= 1e-5 * size


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(problem: Problem, dtype: torch.dtype) -> None:
    x = problem.x0.to(dtype).requires_grad_()
    loss = problem.f(x)
    loss.backward()
    assert loss.dtype == x.grad.dtype == dtype
    assert loss.isfinite() and x.grad.isfinite().all()
    assert loss.item() == pytest.approx(problem.f(problem.x0).item(), rel=1e-3)
    if problem.name in STARTS:
        assert loss.item() == pytest.approx(STARTS[problem.name], rel=1e-4)


@pytest.mark.parametrize("problem", more_garbow_hillstrom(), ids=str)
def test_minimum(problem: Problem) -> None:
    """A trust region method with exact Hessians comes to f*, from the start or from nearby."""
    optimize = pytest.importorskip("scipy.optimize")

    def hessian(x):
        return torch.autograd.functional.hessian(problem.f, torch.from_numpy(x)).numpy()

    def both(x):
        at = torch.from_numpy(x).requires_grad_()
        loss = problem.f(at)
        loss.backward()
        return loss.item(), at.grad.numpy()

    start = problem.x0.numpy()
    if problem.name == "brown-badly-scaled":  # too far for its steps
        start = start * [1e6 - 1, 2e-6 + 1e-7]
    if problem.name == "biggs-exp6":  # trust regions find the other minimum
        method, options = "L-BFGS-B", {"ftol": 0.0, "gtol": 0.0}
    else:
        method, options = "trust-exact", {"maxiter": 500, "gtol": 1e-9}
    with np.errstate(over="ignore"):
        found = optimize.minimize(
            both,
            start,
            jac=True,
            hess=None if method == "L-BFGS-B" else hessian,
            method=method,
            options=options,
        )
    assert found.fun == pytest.approx(problem.least, rel=1e-9, abs=1e-13)
