"""Self-scaling: the inverse Hessian is divided by min(1, s.y / s.B s) before each pair.

The oracle is the inverse Hessian as a dense float64 matrix, with B as its true inverse.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import BACKENDS, F64
from test_two_loop import Scalars, each_backend, each_history_size, hessian
from torch import Tensor, nn

import fuse_ext
from fuse_ext import LBFGS, FusePV
from fuse_ext.kernels import scalars as ring
from fuse_ext.phase.modes import BROYDEN_PAIRS, HISTORY_BYTES, LEAST_PAIRS, MOST_PAIRS

Scaled = tuple[Tensor, Tensor, float]  # s, y, tau


def dense(pairs: list[Scaled], n: int) -> Tensor:
    """H of these pairs, oldest first: from the oldest one's scale, divided by tau before each."""
    eye = torch.eye(n, dtype=F64)
    if not pairs:
        return eye
    s, y, _ = pairs[0]
    h = (s @ y) / (y @ y) * eye
    for k, (s, y, tau) in enumerate(pairs):
        rho = 1 / (s @ y)
        v = eye - rho * torch.outer(y, s)
        h = v.T @ (h / tau if k else h) @ v + rho * torch.outer(s, s)
    return h


def tau_of(h: Tensor, s: Tensor, y: Tensor) -> float:
    return min(1.0, float(s @ y) / float(s @ torch.linalg.solve(h, s)))


@each_backend
@each_history_size
def test_recursion_at_every_ring_index(backend: str, history_size: int) -> None:
    n, smallest = 14, 1.0
    a = hessian(n)
    for opened in range(history_size + 1):
        scalars = Scalars(backend, history_size, opened)
        scalars.data[ring.index("self_scaling", scalars.slots)] = 1.0
        kept: list[Scaled] = []
        for _ in range(history_size + 4):
            g = torch.randn(n, dtype=F64)
            h = dense(kept, n)
            torch.testing.assert_close(scalars.direction(g), -h @ g, rtol=1e-8, atol=1e-9)
            step_length, s = 0.05 + 3 * float(torch.rand(())), torch.randn(n, dtype=F64)
            y = a @ s
            # What g.p is for p = s / t = -H g.
            slope = -float(s @ torch.linalg.solve(h, s)) / step_length**2
            scalars.data[ring.index("direction_dot_grad", scalars.slots)] = slope
            assert scalars.offer(s / step_length, y, step_length)
            tau = tau_of(h, s, y)
            smallest = min(smallest, tau)
            kept = [*kept, (s, y, tau)][-history_size:]
            s, y, _ = kept[0]
            assert scalars.header.gamma == pytest.approx(float(s @ y / (y @ y)), rel=1e-12)
    assert smallest < 0.5  # else nothing was scaled


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("line_search", [None, "strong_wolfe", "approximate_wolfe"])
@pytest.mark.parametrize("history_size", [3, 40])
def test_directions_of_a_run(backend: str, line_search: str | None, history_size: int) -> None:
    """Every step goes along -H g, with tau from the true s.B s and not from -t s.g."""
    n = 8
    a, x = hessian(n), nn.Parameter(torch.randn(n, dtype=F64))
    optimizer = LBFGS(
        [x],
        lr=0.3 if line_search is None else 1.0,
        max_iter=1,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=history_size,
        line_search_fn=line_search,
        self_scaling=True,
        backend=backend,
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * x @ a @ x + 0.1 * x.pow(4).sum()
        loss.backward()
        return loss

    def at() -> tuple[Tensor, Tensor]:
        closure()
        return x.detach().clone(), x.grad.clone()

    kept: list[Scaled] = []
    scaled = 0
    for _ in range(12):
        before, g = at()
        h = dense(kept, n)
        optimizer.step(closure)
        after, g_after = at()
        s, y = after - before, g_after - g
        if kept:
            p = -h @ g
            t = optimizer.report().step_length
            torch.testing.assert_close(s, t * p, rtol=1e-6, atol=1e-9 * float(s.norm()))
        tau = tau_of(h, s, y)
        scaled += tau < 0.99 and bool(kept)
        kept = [*kept, (s, y, tau)][-history_size:]
    assert optimizer.report().pairs_skipped == 0
    assert scaled > 2


def make(numel: int, **options: Any) -> FusePV:
    return FusePV([torch.empty(numel, device="meta")], backend="reference", **options)


@pytest.mark.parametrize(
    ("options", "numel", "expected"),
    [
        ({}, 1000, LEAST_PAIRS),
        ({"deterministic": False}, 1000, LEAST_PAIRS),
        ({"deterministic": True}, 1000, BROYDEN_PAIRS),
        ({"deterministic": True, "update": "bfgs"}, 1000, MOST_PAIRS),
        ({"deterministic": True}, 200, 200),
        ({"deterministic": True}, 2, LEAST_PAIRS),
        ({"deterministic": True}, 100_000, HISTORY_BYTES // 800_000),
        ({"deterministic": True, "history_dtype": torch.bfloat16}, 10**5, HISTORY_BYTES // 400_000),
        ({"deterministic": True}, 10**8, LEAST_PAIRS),
        ({"deterministic": True, "line_search": None}, 1000, LEAST_PAIRS),
        ({"deterministic": True, "self_scaling": False}, 1000, LEAST_PAIRS),
        ({"deterministic": True, "history_size": 7}, 1000, 7),
    ],
    ids=str,
)
def test_default_history_size(options: dict[str, Any], numel: int, expected: int) -> None:
    optimizer = make(numel, **options)
    assert optimizer.param_groups[0]["history_size"] == expected
    optimizer.add_param_group({"params": [torch.empty(3, device="meta")]})
    whole = make(numel + 3, **options).param_groups[0]["history_size"]
    assert [group["history_size"] for group in optimizer.param_groups] == [whole, whole]
    size = options.pop("history_size", None)
    estimate = fuse_ext.estimate_memory(
        numel, history_size=size, deterministic=True, curvature="pairs"
    )
    if options == {"deterministic": True}:
        assert estimate.phases[1].state_bytes >= 8 * expected * numel


def fit(**options: Any) -> tuple[FusePV, list[float]]:
    torch.manual_seed(0)
    x = nn.Parameter(torch.randn(6, dtype=F64))
    optimizer = FusePV([x], 1e-2, curvature="pairs", **options)
    a = hessian(6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * x @ a @ x + 0.1 * x.pow(4).sum()
        loss.backward()
        return loss

    return optimizer, [optimizer.step(closure).item() for _ in range(130)]


def flag(optimizer: FusePV) -> float:
    """Whether the history scales itself."""
    scalars = optimizer.state[optimizer.param_groups[0]["params"][0]]["scalars"]
    slots = optimizer.param_groups[0]["history_size"] + 1
    return float(scalars[ring.index("self_scaling", slots)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"deterministic": True, "history_size": 100}, 1.0),
        ({"deterministic": True, "history_size": 99}, 0.0),
        ({"deterministic": True}, 0.0),  # of so few parameters
        ({"history_size": 100}, 1.0),  # found out to be one function
        ({}, 0.0),
        ({"history_size": 100, "self_scaling": False}, 0.0),
        ({"deterministic": True, "self_scaling": False}, 0.0),
        ({"deterministic": False, "line_search": "armijo", "switch": 5}, 0.0),
        ({"line_search": "armijo", "switch": 5, "self_scaling": True}, 1.0),
    ],
    ids=str,
)
def test_who_scales_itself(options: dict[str, Any], expected: float) -> None:
    optimizer, losses = fit(**options)
    assert optimizer.phase == "lbfgs"
    assert flag(optimizer) == expected
    assert losses[-1] < losses[0]
    # A checkpoint goes on as it began, whatever the other was told.
    options = {**options, "self_scaling": not expected}
    other = FusePV([nn.Parameter(torch.zeros(6, dtype=F64))], 1e-2, **options)
    other.load_state_dict(optimizer.state_dict())
    assert flag(other) == expected


def test_bad_value() -> None:
    with pytest.raises(TypeError, match=r"self_scaling must be True, False or None, got 'yes'"):
        make(3, self_scaling="yes")
