"""How often LBFGS calls its closure, and what it remembers of the points it was called at."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lbfgs_cases import BACKENDS, F64, SEARCHES, header, make, pairs, reason, state
from problems import Objective, Problem, quadratic, rosenbrock
from torch import Tensor

# --- evaluation counts ---------------------------------------------------------------------------


@pytest.mark.parametrize("line_search", [*SEARCHES, None])
@pytest.mark.parametrize("problem", [rosenbrock(10), quadratic(30.0)], ids=str)
def test_deterministic_saves_the_first_evaluation(
    problem: Problem, line_search: str | None
) -> None:
    counts, points = [], []
    for deterministic in (False, True):
        mine = Objective(problem)
        optimizer = make(
            [mine.x],
            line_search_fn=line_search,
            lr=1.0 if line_search else 0.01,
            deterministic=deterministic,
        )
        for _ in range(25):
            optimizer.step(mine.closure)
        counts.append(mine.calls)
        points.append(mine.x.detach())
    torch.testing.assert_close(points[0], points[1], rtol=1e-7, atol=1e-9)
    # Each step but the first begins with the evaluation that ended the one before.
    assert counts[1] == (counts[0] - 24 if line_search else 26)


def touch_parameter(x: Tensor) -> None:
    with torch.no_grad():
        x.mul_(1.0)


def replace_data(x: Tensor) -> None:
    torch.nn.utils.vector_to_parameters(x.detach().clone(), [x])  # no version counter moves


def touch_gradient(x: Tensor) -> None:
    torch.nn.utils.clip_grad_norm_([x], 1e-3)


def zero_gradient(x: Tensor) -> None:
    x.grad.zero_()


def drop_gradient(x: Tensor) -> None:
    x.grad = None


def new_gradient(x: Tensor) -> None:
    x.grad = x.grad.clone()


TOUCHES = (
    touch_parameter,
    replace_data,
    touch_gradient,
    zero_gradient,
    drop_gradient,
    new_gradient,
)


@pytest.mark.parametrize("touch", TOUCHES)
def test_deterministic_evaluates_again_what_was_touched(touch: Callable[[Tensor], None]) -> None:
    mine, untouched = Objective(quadratic(100.0)), Objective(quadratic(100.0))
    optimizer = make([mine.x], deterministic=True)
    other = make([untouched.x], deterministic=True)
    for _ in range(3):
        optimizer.step(mine.closure)
        other.step(untouched.closure)
    before = mine.calls
    touch(mine.x)
    optimizer.step(mine.closure)
    other.step(untouched.closure)
    assert mine.calls - before == untouched.calls - before + 1
    if "gradient" in touch.__name__:  # the pair in waiting is still right
        assert torch.equal(mine.x, untouched.x)


def test_a_pair_in_waiting_dies_with_its_point() -> None:
    """s = t p is not how the parameters got where the user has put them."""
    mine = Objective(quadratic(100.0))
    optimizer = make([mine.x], deterministic=True)
    for _ in range(3):
        optimizer.step(mine.closure)
    assert header(optimizer).accepted == 2
    assert state(optimizer)["pair_step"] is not None
    with torch.no_grad():
        mine.x.add_(1.0)
    here, there = pairs(optimizer)
    optimizer.step(mine.closure)
    assert header(optimizer).accepted + header(optimizer).skipped == 2
    for (s, y), (s_before, y_before) in zip(pairs(optimizer), (here, there), strict=True):
        assert torch.equal(s, s_before)
        assert torch.equal(y, y_before)
    for _ in range(150):
        optimizer.step(mine.closure)
    assert mine.gap < 1e-12


def test_a_new_objective_is_evaluated_again() -> None:
    mine = Objective(quadratic(10.0))
    # Strong Wolfe may end before: the new objective, about 90, hides the last decreases.
    search = "approximate_wolfe"
    optimizer = make([mine.x], deterministic=True, tolerance_grad=1e-9, line_search_fn=search)
    for _ in range(60):
        optimizer.step(mine.closure)
    at_rest = mine.calls
    optimizer.step(mine.closure)
    assert mine.calls == at_rest + 1
    optimizer.param_groups[0]["weight_decay"] = 10.0
    for _ in range(60):
        optimizer.step(mine.closure)
    assert mine.calls > at_rest + 3
    assert (mine.x.grad + 10.0 * mine.x.detach()).abs().max() <= 1e-9


@pytest.mark.parametrize("line_search", SEARCHES)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_one_evaluation_a_step_where_a_deterministic_search_is_at_its_end(
    line_search: str, dtype: torch.dtype
) -> None:
    """Down where rounding hides the loss's decrease, a step only looks whether that is still so."""

    def f(x: Tensor) -> Tensor:  # an offset makes the floor of the loss coarse
        return 100.0 + rosenbrock(10).f(x)

    mine = Objective(Problem("offset", f, rosenbrock(10).x0, 100.0), dtype)
    optimizer = make([mine.x], line_search_fn=line_search, deterministic=True)
    for _ in range(100):
        optimizer.step(mine.closure)
    before = mine.calls
    loss = optimizer.step(mine.closure)
    for _ in range(19):
        assert optimizer.step(mine.closure) == loss
    assert mine.calls - before == 20
    assert reason(optimizer) in ("precision", "gradient", "no_descent")
    # Asked otherwise, it tries again.
    optimizer.param_groups[0]["lr"] = 0.9
    optimizer.step(mine.closure)
    assert mine.calls > before + 21 or reason(optimizer) == "gradient"


@pytest.mark.parametrize("line_search", SEARCHES)
def test_a_step_that_lowers_nothing_is_a_failure(line_search: str) -> None:
    """Noise far above the loss's last digit: searches end in steps too small to change it.

    Taken, such a step leaves everything as it was, and the next search would be the same one.
    """
    basis, _ = torch.linalg.qr(torch.randn(50, 50, dtype=F64))
    matrix = ((basis * torch.logspace(0.0, 4.0, 50, dtype=F64)) @ basis.T).float()
    vector = torch.randn(50)

    def f(x: Tensor) -> Tensor:
        return 0.5 * (x @ (matrix @ x)) - vector @ x

    mine = Objective(Problem("noisy", f, torch.zeros(50, dtype=F64)), torch.float32)
    optimizer = make([mine.x], line_search_fn=line_search, history_size=10, deterministic=True)
    steps = 0
    while not optimizer.report().converged and steps < 1500:
        optimizer.step(mine.closure)
        steps += 1
    before = mine.calls
    assert before < 1.5 * steps
    # Slopes lead on where the loss is noise: to the last digits of the solution.
    solution = torch.linalg.solve(matrix.double(), vector.double())
    error = (mine.x.detach().double() - solution).norm() / solution.norm()
    assert error < (1e-4 if line_search == "approximate_wolfe" else 0.5)
    optimizer.step(mine.closure)
    assert (mine.calls, reason(optimizer)) == (before + 1, "precision")


@pytest.mark.parametrize("line_search", SEARCHES)
def test_few_evaluations_at_the_floor_of_float32(line_search: str) -> None:
    """Without the promise of determinism a step there costs a search, but no endless one."""

    def f(x: Tensor) -> Tensor:
        return 100.0 + quadratic(1e3).f(x)

    mine = Objective(Problem("offset", f, quadratic(1e3).x0, 100.0), torch.float32)
    optimizer = make([mine.x], line_search_fn=line_search)
    for _ in range(100):
        optimizer.step(mine.closure)
    before = mine.calls
    for _ in range(50):
        optimizer.step(mine.closure)
    assert mine.calls - before <= 50 * 8


@pytest.mark.parametrize("line_search", [*SEARCHES, None])
@pytest.mark.parametrize("deterministic", [False, True])
def test_old_gradients_are_free_while_new_ones_are_made(
    deterministic: bool, line_search: str | None
) -> None:
    """Of the gradients that zero_grad(set_to_none=True) drops in a trial, nothing stays behind."""
    mine = Objective(quadratic(30.0))
    options = {"line_search_fn": line_search, "lr": 0.1, "deterministic": deterministic}
    optimizer = make([mine.x], **options)

    def closure() -> Tensor:
        old = [] if mine.x.grad is None else [weakref.ref(mine.x.grad)]
        mine.x.grad = None
        assert all(ref() is None for ref in old)
        return mine.closure()

    for max_iter in (1, 1, 3, 5):
        optimizer.param_groups[0].update(max_iter=max_iter, max_eval=20 * max_iter)
        optimizer.step(closure)
    with torch.no_grad():
        mine.x.add_(1.0)
    optimizer.step(closure)


# --- the point that the line search returns to ---------------------------------------------------


class Cliff:
    """Falls in a line towards a cliff, beyond which the loss is NaN.

    No trial satisfies strong Wolfe: the search closes in on the cliff from above and falls back
    on its best trial, which is not its last.
    """

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        self.a = torch.zeros(4, dtype=dtype, requires_grad=True)
        self.b = torch.zeros(2, 3, dtype=dtype).t().requires_grad_()
        self.unused = torch.zeros(2, dtype=dtype, requires_grad=True)
        self.params = [self.a, self.b, self.unused]
        self.optimizer = make(self.params, **options)
        self.trials: list[list[Tensor]] = []

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        s = self.a.sum() + self.b.sum()
        loss = -s - 0.01 * s.square() if s <= 1.05 else s * math.nan
        loss.backward()
        self.trials.append([self.a.detach().clone(), self.b.detach().clone()])
        return loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_back_at_the_best_trial(dtype: torch.dtype, deterministic: bool, backend: str) -> None:
    mine = Cliff(dtype, deterministic=deterministic, backend=backend)
    loss = mine.optimizer.step(mine.closure)
    assert loss == 0.0
    assert state(mine.optimizer)["non_finite"] > 0
    x = [mine.a.detach(), mine.b.detach()]
    assert not all(map(torch.equal, mine.trials[-1], x)), "the best trial was the last one"
    t = mine.optimizer._phase.progress.step_length
    for part in x:  # origin + t p, with p = -g = 1
        torch.testing.assert_close(part, torch.full_like(part, t), rtol=1e-6, atol=0.0)
    stored = [mine.a.grad.clone(), mine.b.grad.clone()]
    assert mine.unused.grad is None
    mine.closure()
    assert torch.equal(stored[0], mine.a.grad)
    assert torch.equal(stored[1], mine.b.grad)


def test_the_next_step_begins_with_the_best_trials_gradient() -> None:
    """In deterministic mode nothing is evaluated again: what was restored is what is used."""
    remembered, evaluated = Cliff(F64, deterministic=True), Cliff(F64, deterministic=False)
    for cliff in (remembered, evaluated):
        for _ in range(2):
            cliff.optimizer.step(cliff.closure)
    assert torch.equal(remembered.a, evaluated.a)
    assert torch.equal(remembered.b, evaluated.b)


def test_complex_gradients_are_restored_too() -> None:
    """Autograd hands out lazily conjugated gradients, whose memory holds other values."""
    z = torch.zeros(3, dtype=torch.complex128, requires_grad=True)
    weights = torch.tensor([1.0 + 2.0j, -1.0j, 0.5], dtype=torch.complex128)
    optimizer = make([z])

    def closure() -> Tensor:
        optimizer.zero_grad()
        s = (z.conj() * weights).sum().real
        loss = -s if s <= 1.05 else s * math.nan
        loss.backward()
        return loss

    optimizer.step(closure)
    assert state(optimizer)["non_finite"] > 0
    stored = z.grad.clone()
    torch.testing.assert_close(stored, -weights)
    closure()
    torch.testing.assert_close(z.grad, stored)
