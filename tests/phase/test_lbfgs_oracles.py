"""LBFGS against four oracles: plain Python, the dense BFGS formula, torch.optim and scipy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from problems import Objective, Problem, logistic, problem_set, quadratic, rosenbrock
from torch import Tensor

from fuse_ext import LBFGS
from fuse_ext.search import make_line_search

BACKENDS = ("native", "reference")
SEARCHES = ("strong_wolfe", "approximate_wolfe", "armijo", None)
EPS = torch.finfo(torch.float64).eps


class PlainLbfgs:
    """Algorithms 1 and 2 on whole vectors and Python lists, in float64: the oracle."""

    def __init__(self, problem: Problem, m: int, line_search: str | None, lr: float = 1.0) -> None:
        self.f, self.m, self.lr = problem.f, m, lr
        eps = EPS * (8 if line_search == "approximate_wolfe" else 1)
        self.search = make_line_search(line_search, loss_eps=eps)
        self.x = problem.x0.clone()
        self.loss, self.g = self.evaluate(self.x)
        self.pairs: list[tuple[Tensor, Tensor]] = []  # oldest first

    def evaluate(self, x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        loss = self.f(x)
        loss.backward()
        return loss.item(), x.grad

    def direction(self) -> Tensor:
        p = -self.g
        alphas = []
        for s, y in reversed(self.pairs):
            alphas.append((s @ p) / (s @ y))
            p = p - alphas[-1] * y
        if self.pairs:
            s, y = self.pairs[-1]
            p = (s @ y) / (y @ y) * p
        for (s, y), alpha in zip(self.pairs, reversed(alphas), strict=True):
            p = p + (alpha - (y @ p) / (s @ y)) * s
        return p

    def step(self) -> None:
        p, slope = self.direction(), 0.0
        slope = (self.g @ p).item()
        t = self.lr if self.pairs else self.lr * min(1.0, 1.0 / self.g.abs().sum().item())
        if self.search is not None:
            trial = self.search.start(self.loss, slope, t)
            while trial is not None:
                loss, g = self.evaluate(self.x + trial * p)
                trial = self.search.tell(loss, (g @ p).item())
            t = self.search.result.step
        x = self.x + t * p
        loss, g = self.evaluate(x)
        s, y = x - self.x, g - self.g
        if s @ y > 1e-8 * s.norm() * y.norm():
            self.pairs = [*self.pairs, (s, y)][-self.m :]
        self.x, self.loss, self.g = x, loss, g


@pytest.mark.parametrize("line_search", SEARCHES)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 10])
def test_trajectory_of_plain_lbfgs(m: int, line_search: str | None) -> None:
    """Long enough for every slot of the ring to hold the oldest and the newest pair."""
    problem = quadratic(30.0, n=15) if line_search is None else rosenbrock(10)
    # Rounding grows from step to step and m = 10 sees the end of Rosenbrock's valley earlier.
    steps = min(2 * m + 6, 22)
    for backend in BACKENDS:
        plain = PlainLbfgs(problem, m, line_search, lr=0.5)
        mine = Objective(problem)
        optimizer = LBFGS(
            [mine.x],
            lr=0.5,
            max_iter=1,
            max_eval=25,
            history_size=m,
            line_search_fn=line_search,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            deterministic=True,
            backend=backend,
        )
        for k in range(steps):
            plain.step()
            optimizer.step(mine.closure)
            torch.testing.assert_close(
                mine.x.detach(), plain.x, rtol=1e-6, atol=1e-8, msg=lambda m, k=k: f"step {k}: {m}"
            )


def dense_inverse_hessian(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Nocedal and Wright, Equations 7.16 and 7.20: BFGS updates of gamma I, oldest pair first."""
    s, y = pairs[-1]
    identity = torch.eye(len(s), dtype=s.dtype)
    h = (s @ y) / (y @ y) * identity
    for s, y in pairs:
        rho = 1.0 / (y @ s)
        v = identity - rho * torch.outer(y, s)
        h = v.T @ h @ v + rho * torch.outer(s, s)
    return h


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 10])
def test_steps_of_the_dense_bfgs_formula(m: int, backend: str) -> None:
    """Each step is t times -H g, H built from the points and gradients seen from outside."""
    mine = Objective(rosenbrock(6))
    optimizer = LBFGS(
        [mine.x],
        max_iter=1,
        max_eval=25,
        history_size=m,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
        backend=backend,
    )
    points: list[tuple[Tensor, Tensor]] = []
    for k in range(25):
        mine.closure()
        points.append((mine.x.detach().clone(), mine.x.grad.clone()))
        optimizer.step(mine.closure)
        pairs = [
            (after[0] - before[0], after[1] - before[1])
            for before, after in itertools.pairwise(points)
        ]
        if pairs:
            x, g = points[-1]
            p = -dense_inverse_hessian(pairs[-m:]) @ g
            step = mine.x.detach() - x
            t = (step @ p) / (p @ p)
            torch.testing.assert_close(
                step, t * p, rtol=1e-6, atol=1e-12, msg=lambda m, k=k: f"step {k}: {m}"
            )


# --- torch.optim.LBFGS ---------------------------------------------------------------------------


def split(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


class Twins:
    """One problem on several tensors, for our optimizer and for torch's."""

    def __init__(self, kind: type[torch.optim.Optimizer], problem: Problem, **options: Any) -> None:
        n = len(problem.x0)
        self.problem = problem
        self.params = [
            part.clone().requires_grad_()
            for part in split(problem.x0, [(n - 5,), (2, 2), (), (0, 3)])
        ]
        self.unused = torch.ones(3, dtype=torch.float64, requires_grad=True)  # never has a gradient
        self.sign = -1.0 if options.get("maximize") else 1.0
        self.calls = 0
        self.losses: list[float] = []
        self.optimizer = kind([*self.params, self.unused], **options)

    def closure(self) -> Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.sign * self.problem.f(torch.cat([p.reshape(-1) for p in self.params]))
        loss.backward()
        return loss

    def step(self) -> Tensor:
        self.losses.append(self.optimizer.step(self.closure).item())
        return torch.cat([p.detach().reshape(-1) for p in [*self.params, self.unused]])


@pytest.mark.parametrize(
    "options",
    [
        {"max_iter": 1},
        {"max_iter": 5},
        {"max_iter": 20},
        {"max_iter": 5, "maximize": True},
        {"max_iter": 20, "max_eval": 7},
        {"max_iter": 20, "max_eval": 2},  # torch takes 1 for 2
        {"max_iter": 100, "max_eval": 1000, "tolerance_grad": 1e-3},
        {"max_iter": 100, "max_eval": 1000, "tolerance_change": 1e-3},
        {"max_iter": 100, "max_eval": 1000, "tolerance_change": 1e-5, "tolerance_grad": 0.0},
        {"max_iter": 5, "history_size": 2},
        {"max_iter": 5, "history_size": 100},
        {"max_iter": 5, "lr": torch.tensor(0.3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("problem", [quadratic(30.0, n=15), logistic()], ids=str)
def test_same_iterates_and_evaluations_as_torch(problem: Problem, options: dict[str, Any]) -> None:
    """A fixed step leaves no freedom: every iterate, loss and count is torch's."""
    options = {"lr": 0.5, "history_size": 5, **options}
    ours, theirs = Twins(LBFGS, problem, **options), Twins(torch.optim.LBFGS, problem, **options)
    # Rounding grows by a factor of ten in ten iterations or so.
    for _ in range(4 if options["max_iter"] == 20 else 12):
        torch.testing.assert_close(ours.step(), theirs.step(), rtol=1e-6, atol=1e-7)
        assert ours.calls == theirs.calls
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6, abs=1e-12)
    ours_state, theirs_state = (twin.optimizer.state[twin.params[0]] for twin in (ours, theirs))
    for count in ("n_iter", "func_evals"):
        assert ours_state[count] == theirs_state[count], count


def test_same_iterates_as_torch_for_complex_parameters() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.complex128)
    matrix = matrix @ matrix.mH + 10.0 * torch.eye(6)
    target = torch.randn(6, generator=generator, dtype=torch.complex128)

    def run(kind: type[torch.optim.Optimizer], **options: Any) -> list[Tensor]:
        z = torch.zeros(6, dtype=torch.complex128, requires_grad=True)
        w = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = kind([z, w], max_iter=3, history_size=4, **options)

        def closure() -> Tensor:
            optimizer.zero_grad()
            d = z - target
            loss = (d.conj() @ matrix @ d).real + (w - 2.0).square() * (
                1.0 + d.abs().square().sum()
            )
            loss.backward()
            return loss

        iterates = []
        for _ in range(10):
            optimizer.step(closure)
            iterates.append(
                torch.cat([torch.view_as_real(z.detach()).reshape(-1), w.detach()[None]])
            )
        return iterates

    for ours, theirs in zip(run(LBFGS, lr=0.5), run(torch.optim.LBFGS, lr=0.5), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    searched = run(LBFGS, line_search_fn="strong_wolfe")[-1]
    torch.testing.assert_close(
        torch.view_as_complex(searched[:-1].reshape(6, 2)), target, rtol=1e-6, atol=1e-6
    )


class _Reached(Exception):
    pass


def evaluations(
    kind: type[torch.optim.Optimizer],
    problem: Problem,
    reduction: float,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> int:
    """Calls of the closure until f - f* is ``reduction`` times what it was at the start."""
    mine = Objective(problem, dtype)
    bound = reduction * mine.gap

    def closure() -> Tensor:
        loss = mine.closure()
        if mine.gap <= bound:
            raise _Reached
        return loss

    optimizer = kind(
        [mine.x],
        max_iter=3000,
        max_eval=3000,
        tolerance_grad=0.0,
        tolerance_change=1e-300,
        history_size=10,
        line_search_fn="strong_wolfe",
        **options,
    )
    with pytest.raises(_Reached):
        optimizer.step(closure)
    return mine.calls


def scipy_evaluations(problem: Problem, reduction: float) -> int:
    calls, bound = 0, reduction * (problem.f(problem.x0).item() - problem.least)

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal calls
        calls += 1
        at = torch.tensor(x, requires_grad=True)
        loss = problem.f(at)
        loss.backward()
        if loss.item() - problem.least <= bound:
            raise _Reached
        return loss.item(), at.grad.numpy()

    with pytest.raises(_Reached):
        scipy.optimize.minimize(
            fun,
            problem.x0.numpy(),
            jac=True,
            method="L-BFGS-B",
            options={"maxcor": 10, "ftol": 0.0, "gtol": 0.0, "maxiter": 3000, "maxfun": 3000},
        )
    return calls


PROBLEMS = problem_set()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_no_more_evaluations_than_torch_and_scipy(problem: Problem) -> None:
    for reduction in (1e-4, 1e-8):
        ours = evaluations(LBFGS, problem, reduction)
        # 20 %, and two for chance where there are few.
        assert ours <= 1.2 * evaluations(torch.optim.LBFGS, problem, reduction) + 2
        assert ours <= 1.2 * scipy_evaluations(problem, reduction) + 2


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16, torch.int8], ids=str)
def test_float32_and_short_histories_take_no_longer(
    problem: Problem, history_dtype: torch.dtype | None
) -> None:
    """Design: in float32, and with pairs rounded to 16 or 8 bits, as soon at the same f."""
    reduction = 1e-6
    exact = evaluations(LBFGS, problem, reduction)
    short = evaluations(LBFGS, problem, reduction, torch.float32, history_dtype=history_dtype)
    assert short <= 1.2 * exact + 4


@pytest.mark.parametrize("problem", [rosenbrock(10), quadratic(1e3), logistic()], ids=str)
def test_float16_history_within_its_range(problem: Problem) -> None:
    exact = evaluations(LBFGS, problem, 1e-6)
    short = evaluations(LBFGS, problem, 1e-6, torch.float32, history_dtype=torch.float16)
    assert short <= 1.2 * exact + 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("problem", PROBLEMS[:5] + PROBLEMS[-1:], ids=str)
def test_same_minimum_as_torch(problem: Problem, backend: str) -> None:
    found = []
    for kind in (LBFGS, torch.optim.LBFGS):
        mine = Objective(problem)
        optimizer = kind(
            [mine.x],
            max_iter=1000,
            max_eval=2000,
            history_size=10,
            tolerance_grad=1e-6,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
            **({"backend": backend} if kind is LBFGS else {}),
        )
        optimizer.step(mine.closure)
        assert mine.x.grad.abs().max() <= 1e-4
        found.append(mine.x.detach())
    # The least curvature of all these, logistic regression's penalty, is 1e-3.
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found[0], problem.solution, rtol=2e-3, atol=2e-3)
