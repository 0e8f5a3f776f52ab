"""What LBFGS promises beside the iterates: groups, decay, evaluation counts, pairs, reasons."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lbfgs_cases import BACKENDS, F64, SEARCHES, header, make, pairs, reason, state
from problems import Objective, Problem, log_barrier, logistic, nan_wall, quadratic, rosenbrock
from torch import Tensor

from fuse_ext import LBFGS

# --- groups and weight decay ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_lr_of_a_group_is_its_share_of_the_direction(backend: str) -> None:
    a, b = torch.ones(3, dtype=F64), torch.full((2, 2), 2.0, dtype=F64)
    before = a.clone(), b.clone()
    a.requires_grad_()
    b.requires_grad_()
    optimizer = LBFGS(
        [{"params": a}, {"params": b, "lr": 0.1}], lr=0.4, max_iter=1, backend=backend
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = a.square().sum() + b.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    t = 1.0 / (6.0 + 16.0)  # the first step has 1-norm lr
    torch.testing.assert_close(a.detach(), before[0] - 0.4 * t * 2.0 * before[0])
    torch.testing.assert_close(b.detach(), before[1] - 0.1 * t * 2.0 * before[1])


class Halves:
    """A quadratic of two tensors, of which the second may be frozen or left out."""

    def __init__(self, **groups: Any) -> None:
        self.f = quadratic(100.0, n=20).f
        generator = torch.Generator().manual_seed(1)
        self.moving = torch.randn(12, generator=generator, dtype=F64).requires_grad_()
        self.other = torch.randn(8, generator=generator, dtype=F64).requires_grad_()
        self.decay = groups.pop("decay_in_closure", 0.0)
        frozen = groups.pop("frozen", False)
        members = [{"params": self.moving}]
        if frozen:
            members.insert(0, {"params": self.other, "lr": 0.0})
        self.optimizer = make(members, **groups)
        self.calls = 0

    def closure(self) -> Tensor:
        self.calls += 1
        self.moving.grad = self.other.grad = None
        loss = self.f(torch.cat([self.moving, self.other]))
        loss = loss + 0.5 * self.decay * self.moving.square().sum()
        loss.backward()
        return loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("line_search", SEARCHES)
def test_a_group_with_lr_0_is_frozen_as_if_it_were_not_there(
    line_search: str, backend: str
) -> None:
    options = {"line_search_fn": line_search, "weight_decay": 0.1, "backend": backend}
    frozen, alone = Halves(frozen=True, **options), Halves(**options)
    start = frozen.other.detach().clone()
    for _ in range(30):
        frozen.optimizer.step(frozen.closure)
        alone.optimizer.step(alone.closure)
        torch.testing.assert_close(frozen.moving, alone.moving, rtol=1e-7, atol=1e-9)
    assert torch.equal(frozen.other, start)
    assert frozen.calls == alone.calls
    assert frozen.other.grad.abs().max() > 1.0  # and still there, for whoever wants to see it


def test_what_is_frozen_does_not_count_for_the_tolerance() -> None:
    mine = Halves(frozen=True, tolerance_grad=1e-5, max_iter=200, max_eval=400)
    mine.optimizer.step(mine.closure)
    assert reason(mine.optimizer) == "gradient"
    assert mine.moving.grad.abs().max() <= 1e-5 < mine.other.grad.abs().max()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_frozen_group_thaws(deterministic: bool) -> None:
    mine = Halves(frozen=True, deterministic=deterministic, tolerance_grad=1e-6)
    for _ in range(60):
        mine.optimizer.step(mine.closure)
    assert reason(mine.optimizer) == "gradient"
    mine.optimizer.param_groups[0]["lr"] = 1.0
    for _ in range(150):
        mine.optimizer.step(mine.closure)
    assert reason(mine.optimizer) == "gradient"
    assert mine.other.grad.abs().max() <= 1e-6


def test_nothing_moves_at_lr_0() -> None:
    mine = Objective(rosenbrock(4))
    optimizer = make([mine.x], lr=0.0)
    optimizer.step(mine.closure)
    assert torch.equal(mine.x.detach(), mine.problem.x0)
    assert reason(optimizer) == "lr"
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(mine.closure)
    assert reason(optimizer) == "max_iter"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("line_search", [*SEARCHES, None])
@pytest.mark.parametrize("maximize", [False, True])
def test_weight_decay_is_a_term_of_the_objective(
    line_search: str | None, maximize: bool, backend: str
) -> None:
    """As if the closure added decay/2 |x|^2 (subtracted, to maximize)."""
    options = {
        "line_search_fn": line_search,
        "maximize": maximize,
        "backend": backend,
        "lr": 0.5,
        "max_iter": 3,
    }
    problem = quadratic(30.0, n=15)
    sign = -1.0 if maximize else 1.0

    def signed(x: Tensor) -> Tensor:
        return sign * problem.f(x)

    signed_problem = Problem("signed", signed, problem.x0)
    inside = Objective(signed_problem, weight_decay=sign * 0.3)
    outside = Objective(signed_problem)
    by_closure = make([inside.x], **options)
    by_option = make([outside.x], weight_decay=0.3, **options)
    for _ in range(10):
        by_closure.step(inside.closure)
        by_option.step(outside.closure)
        torch.testing.assert_close(outside.x, inside.x, rtol=1e-8, atol=1e-10)
    assert inside.calls == outside.calls


def test_weight_decay_of_each_group() -> None:
    a, b = (torch.ones(2, dtype=F64).requires_grad_() for _ in range(2))
    optimizer = make([{"params": a, "weight_decay": 1.0}, {"params": b, "weight_decay": 3.0}])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * ((a - 2.0).square().sum() + (b - 2.0).square().sum())
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    torch.testing.assert_close(a.detach(), torch.full((2,), 1.0, dtype=F64))
    torch.testing.assert_close(b.detach(), torch.full((2,), 0.5, dtype=F64))


# --- line searches and storage -------------------------------------------------------------------


@pytest.mark.parametrize("line_search", SEARCHES)
@pytest.mark.parametrize(
    "problem", [rosenbrock(2), rosenbrock(10), quadratic(1e3), logistic()], ids=str
)
def test_every_line_search_finds_the_minimum(problem: Problem, line_search: str) -> None:
    mine = Objective(problem)
    start = mine.gap
    make([mine.x], line_search_fn=line_search, max_iter=300, max_eval=500).step(mine.closure)
    assert mine.gap <= 1e-9 * start


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("history_dtype", "dtype", "expected"),
    [
        (None, torch.float32, torch.float32),
        (None, torch.float64, torch.float64),
        (None, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.int8, torch.float32, torch.int8),
        (torch.int8, torch.bfloat16, torch.int8),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_history_dtype(
    history_dtype: torch.dtype | None, dtype: torch.dtype, expected: torch.dtype, backend: str
) -> None:
    mine = Objective(quadratic(10.0), dtype)
    start = mine.gap
    optimizer = make([mine.x], history_dtype=history_dtype, backend=backend)
    for _ in range(20):
        optimizer.step(mine.closure)
    assert state(optimizer)["history"].dtype == expected
    assert state(optimizer)["history"].shape == (2, 6, 50)
    # bfloat16 parameters have three digits.
    assert mine.gap < (1e-3 if dtype == torch.bfloat16 else 1e-4) * start


def test_max_eval_ends_a_step_and_spares_the_history() -> None:
    """A search cut short by the budget is no failure: it is taken up again by the next step."""
    mine = Objective(rosenbrock(10))
    optimizer = make([mine.x], max_iter=20, max_eval=4)
    searches = []
    for _ in range(15):
        before = mine.calls
        optimizer.step(mine.closure)
        assert mine.calls - before == 4
        assert reason(optimizer) == "max_eval"
        searches.append(optimizer._engine.progress.line_search)
    assert searches.count("max_evaluations") >= 3
    assert state(optimizer)["resets"] == state(optimizer)["line_search_failures"] == 0
    assert mine.gap < 1e-8


def test_the_default_budget_of_one_iteration_is_a_whole_line_search() -> None:
    """torch's default max_eval for max_iter=1 is 1: a single trial, that could fail for ever."""
    mine = Objective(log_barrier())
    optimizer = LBFGS([mine.x], max_iter=1, line_search_fn="strong_wolfe")
    for _ in range(40):
        optimizer.step(mine.closure)
    assert mine.gap < 1e-9


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


# --- without a closure ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_without_a_closure_is_torchs_step_with_one(backend: str) -> None:
    ours, theirs = Objective(logistic()), Objective(logistic())
    optimizer = LBFGS([ours.x], lr=0.5, max_iter=1, history_size=4, backend=backend)
    torchs = torch.optim.LBFGS([theirs.x], lr=0.5, max_iter=1, history_size=4)
    for _ in range(25):
        ours.closure()
        assert optimizer.step() is None
        torchs.step(theirs.closure)
        torch.testing.assert_close(ours.x, theirs.x, rtol=1e-7, atol=1e-9)
    assert ours.calls == theirs.calls


@pytest.mark.parametrize("options", [{"line_search_fn": "armijo"}, {"max_iter": 2}], ids=str)
def test_a_missing_closure_is_named(options: dict[str, Any]) -> None:
    mine = Objective(rosenbrock(4))
    optimizer = LBFGS([mine.x], **{"max_iter": 1, **options})
    mine.closure()
    with pytest.raises(ValueError, match=r"closure=None needs line_search_fn=None and max_iter=1"):
        optimizer.step()
    assert torch.equal(mine.x.detach(), mine.problem.x0)


# --- curvature pairs -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("line_search", SEARCHES)
def test_pairs_never_mix_batches(line_search: str, backend: str) -> None:
    """With a new batch at every step, y is the difference of two gradients of one batch."""
    generator = torch.Generator().manual_seed(2)
    data = torch.randn(40, 8, 6, generator=generator, dtype=F64)
    targets = torch.randn(40, 8, generator=generator, dtype=F64)
    x = torch.zeros(6, dtype=F64, requires_grad=True)
    optimizer = make([x], line_search_fn=line_search, history_size=3, backend=backend)

    def gradient(batch: int, at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        loss = (data[batch] @ at - targets[batch]).square().mean()
        return torch.autograd.grad(loss, at)[0]

    expected: list[tuple[Tensor, Tensor]] = []
    for batch in range(40):

        def closure(batch: int = batch) -> Tensor:
            optimizer.zero_grad()
            loss = (data[batch] @ x - targets[batch]).square().mean()
            loss.backward()
            return loss

        before = x.detach().clone()
        optimizer.step(closure)
        after = x.detach().clone()
        expected.insert(0, (after - before, gradient(batch, after) - gradient(batch, before)))
        assert state(optimizer)["pair_step"] is None  # nothing waits for another batch
        for held, true in zip(pairs(optimizer), expected, strict=False):
            torch.testing.assert_close(held, true, rtol=1e-6, atol=1e-12)
    assert header(optimizer).accepted == 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_pair_leaves_the_others(backend: str) -> None:
    """Armijo's steps may end where the function is concave: s.y < 0."""

    def f(x: Tensor) -> Tensor:
        return x.cos().sum() + 0.01 * x.square().sum()

    mine = Objective(Problem("cosines", f, torch.linspace(0.1, 0.9, 7, dtype=F64)))
    optimizer = make([mine.x], line_search_fn="armijo", backend=backend)
    seen: list[float] = []
    for _ in range(14):
        held, before = pairs(optimizer) if seen else [], header(optimizer) if seen else None
        optimizer.step(mine.closure)
        now = header(optimizer)
        seen.append(now.pair_cosine)
        if now.pair_cosine <= 1e-8:
            assert now.accepted == (before.accepted if before else 0)
            for kept, old in zip(pairs(optimizer), held, strict=True):
                assert torch.equal(kept[0], old[0])
                assert torch.equal(kept[1], old[1])
        elif before:
            assert now.accepted == before.accepted + 1
    assert header(optimizer).skipped >= 3
    assert header(optimizer).accepted >= 5
    assert mine.x.grad.abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_curvature_test_knows_no_scale(scale: float) -> None:
    """torch keeps a pair if s.y > 1e-10, and so none of a loss in small units."""

    def f(x: Tensor) -> Tensor:
        return scale * quadratic(10.0).f(x)

    mine = Objective(Problem("scaled", f, quadratic(10.0).x0))
    optimizer = make([mine.x])
    for _ in range(15):
        optimizer.step(mine.closure)
    assert header(optimizer).accepted == 15
    assert mine.value / scale < 1e-4


def test_curvature_tol_refuses_weak_pairs() -> None:
    mine = Objective(rosenbrock(10))
    optimizer = make([mine.x], curvature_tol=1.0)
    for _ in range(5):
        optimizer.step(mine.closure)
    assert header(optimizer).accepted == 0
    assert header(optimizer).skipped == 5


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
    t = mine.optimizer._engine.progress.step_length
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


# --- why a step ends -----------------------------------------------------------------------------


def misleading(x: Tensor) -> Tensor:
    """The gradient points down, the loss goes up: autograd knows nothing of the second term."""
    return x.sum() + 2.0 * (1.0 - x.detach()).sum()


@pytest.mark.parametrize(
    ("expected", "f", "options"),
    [
        ("max_iter", rosenbrock(4).f, {}),
        ("max_iter", rosenbrock(4).f, {"max_iter": 3, "max_eval": 100}),
        ("max_eval", rosenbrock(4).f, {"max_iter": 100, "max_eval": 5}),
        ("gradient", lambda x: (x - 2.0).square().sum(), {}),
        ("gradient", lambda x: x.square().sum(), {"max_iter": 20, "tolerance_grad": 1e-3}),
        ("slope", lambda x: 1e-3 * x.sum(), {"tolerance_change": 1e-3}),
        ("step", lambda x: 1e6 * x.pow(4).sum(), {"max_iter": 20, "tolerance_change": 0.1}),
        (
            "loss",
            lambda x: 1e-3 * x.square().sum(),
            {"max_iter": 9, "line_search_fn": "armijo", "lr": 0.01, "tolerance_change": 1e-5},
        ),
        ("line_search", misleading, {}),
        ("line_search", nan_wall().f, {}),
        ("non_finite", lambda x: (x - 5.0).log().sum(), {}),
        ("non_finite", nan_wall().f, {"line_search_fn": None, "max_iter": 2}),
        ("no_descent", lambda x: 1e-200 * x.sum(), {}),
        ("lr", rosenbrock(4).f, {"lr": 0.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_reason(expected: str, f: Callable[[Tensor], Tensor], options: dict[str, Any]) -> None:
    mine = Objective(Problem("", f, nan_wall().x0))
    optimizer = make([mine.x], **options)
    optimizer.step(mine.closure)
    assert reason(optimizer) == expected


def test_the_reason_is_that_of_the_last_iteration() -> None:
    """A search that fails in mid-step, and a step that goes on from there along -g."""
    mine = Objective(rosenbrock(10))
    seen: list[Tensor] = []

    def closure() -> Tensor:
        loss = mine.closure()
        known = any(torch.equal(mine.x, x) for x in seen)
        if state(optimizer).get("n_iter") == 6 and not known:
            return loss * math.nan
        seen.append(mine.x.detach().clone())
        return loss

    optimizer = make([mine.x], max_iter=12, max_eval=200)
    optimizer.step(closure)
    assert state(optimizer)["line_search_failures"] == 1
    assert reason(optimizer) == "max_iter"
