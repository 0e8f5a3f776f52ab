"""Which curvature pairs LBFGS keeps."""

from __future__ import annotations

import pytest
import torch
from lbfgs_cases import BACKENDS, F64, SEARCHES, header, make, pairs, state
from problems import Objective, Problem, quadratic, rosenbrock
from torch import Tensor


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
