"""Pairs with the Broyden update, on vectors: against the textbook's H, and in the optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_cases import BACKENDS, F32, F64
from test_broyden_pairs import N, textbook
from torch import Tensor, nn

import fuse_ext
from fuse_ext import LBFGS, FusePV
from fuse_ext.curvature.ring import History
from fuse_ext.phase.modes import SCALING_PAIRS

BROYDEN = {"update": "broyden", "self_scaling": True}
SEARCHED = {"line_search_fn": "strong_wolfe", "max_iter": 1, "deterministic": True}
NEVER_STOP = {"tolerance_grad": 0.0, "tolerance_change": 0.0}


class Valley:
    """A function of three tensors with N numbers, convex and far from quadratic."""

    def __init__(self, dtype: torch.dtype = F64, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.params = [
            nn.Parameter(torch.randn(shape, generator=draw, dtype=F64).to(dtype))
            for shape in ((2, 3), (7,), (1,))
        ]
        self.matrix = torch.randn(N, N, generator=draw, dtype=F64).to(dtype)
        self.evaluations = 0

    def __call__(self) -> Tensor:
        for param in self.params:
            param.grad = None
        x = torch.cat([param.reshape(-1) for param in self.params])
        loss = (self.matrix @ x).cosh().log().sum() + 0.05 * x.pow(4).sum()
        loss.backward()
        self.evaluations += 1
        return loss.detach()


def history_of(optimizer: LBFGS) -> History:
    assert optimizer._phase is not None
    history = optimizer._phase.history
    assert isinstance(history, History)
    return history


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("history_size", [1, 4, 9])
@pytest.mark.parametrize(("state", "rows"), [(F64, F64), (F64, F32), (F32, F32)], ids=str)
def test_directions_are_the_textbooks(
    backend: str, history_size: int, state: torch.dtype, rows: torch.dtype
) -> None:
    problem, error = Valley(state), 1e-6 if rows == F64 else 1e-2
    told = {"history_size": history_size, "history_dtype": rows, "backend": backend}
    optimizer = LBFGS(problem.params, **told, **BROYDEN, **SEARCHED, **NEVER_STOP)
    seen = []
    for _ in range(14):
        optimizer.step(problem)
        history = history_of(optimizer)
        pairs = [(s.double(), y.double()) for s, y in history.pairs()]
        direction, grad = (vector.double() for vector in history.waiting())
        expected = -textbook(pairs) @ grad
        assert float((direction - expected).norm()) <= error * float(expected.norm())
        seen.append(len(pairs))
    half = max(1, history_size // 2)
    assert max(seen) == history_size
    assert history_size - half + 1 in seen[history_size + 1 :]


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_with_their_own_rates_have_bfgs(backend: str) -> None:
    """Their directions are not -H g, of whose pairs no products are known."""
    found = {}
    for update in ("broyden", "bfgs"):
        problem = Valley()
        groups = [{"params": problem.params[:1]}, {"params": problem.params[1:], "lr": 0.5}]
        told = {"update": update, "self_scaling": True, "history_size": 20, "backend": backend}
        optimizer = LBFGS(groups, **told, **SEARCHED, **NEVER_STOP)
        losses = [float(optimizer.step(problem)) for _ in range(10)]
        found[update] = losses
    assert found["broyden"] == found["bfgs"]


@pytest.mark.parametrize("search", ["strong_wolfe", "approximate_wolfe", "armijo"])
def test_it_converges(search: str) -> None:
    problem = Valley()
    told = {**SEARCHED, "line_search_fn": search}
    optimizer = LBFGS(problem.params, history_size=8, **BROYDEN, **told, **NEVER_STOP)
    for _ in range(100):
        optimizer.step(problem)
    problem()
    largest = max(float(param.grad.abs().max()) for param in problem.params)  # type: ignore[union-attr]
    assert largest < 1e-5


def fit(steps: int, **options: Any) -> tuple[FusePV, Valley]:
    problem = Valley(options.pop("dtype", F64))
    told: dict[str, Any] = {"curvature": "pairs", "switch": 10, **options}
    optimizer = FusePV(problem.params, 1e-2, **told)
    for _ in range(steps):
        optimizer.step(problem)
    return optimizer, problem


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"deterministic": True, "history_size": SCALING_PAIRS}, True),
        ({"deterministic": True, "history_size": SCALING_PAIRS - 1}, False),
        ({"history_size": SCALING_PAIRS}, True),  # found out to be one function
        ({"deterministic": True, "history_size": 5, "self_scaling": True}, True),
        ({"deterministic": True, "history_size": SCALING_PAIRS, "update": "bfgs"}, False),
        ({"deterministic": True, "history_size": SCALING_PAIRS, "self_scaling": False}, False),
        (
            {
                "deterministic": True,
                "history_size": SCALING_PAIRS,
                "history_dtype": torch.bfloat16,
                "dtype": F32,
            },
            False,
        ),
        ({"deterministic": False, "line_search": "armijo", "switch": 5}, False),
    ],
    ids=str,
)
def test_who_updates_so(options: dict[str, Any], expected: bool) -> None:
    optimizer, problem = fit(40, **options)
    assert optimizer.phase == "lbfgs"
    assert ("broyden" in optimizer.state[problem.params[0]]) is expected
    assert ("pairs (broyden)" in optimizer.report().second_phase) is expected
    # A checkpoint goes on as it began, whatever the other was told.
    told = {**options, "update": "bfgs" if expected else "broyden"}
    dtype = told.pop("dtype", F64)
    fresh = Valley(dtype)
    other = FusePV(fresh.params, 1e-2, **{"curvature": "pairs", "switch": 10, **told})
    other.load_state_dict(optimizer.state_dict())
    assert ("broyden" in other.state[fresh.params[0]]) is expected


def test_memory_is_as_estimated() -> None:
    options = {"deterministic": True, "curvature": "pairs", "history_size": 150, "switch": 3}
    model = nn.Linear(40, 30)
    optimizer = FusePV(model.parameters(), 1e-2, **options)
    x = torch.randn(50, 40)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).cosh().mean()
        loss.backward()
        return loss

    for _ in range(8):
        optimizer.step(closure)
    asked = {k: v for k, v in options.items() if k != "switch"}
    estimated = fuse_ext.estimate_memory(model, "FusePV", **asked).phases[-1].state_bytes
    held = optimizer.report().state_bytes
    assert held == pytest.approx(estimated, rel=0.02)
    assert "broyden" in optimizer.state[model.weight]


def test_batches_after_all_have_bfgs() -> None:
    """Where the promise was none, what scaled itself does not any more, nor updates so."""
    history = history_of(_begun())
    history.stop_scaling()
    assert history._broyden is None
    assert "broyden" not in history._entry


def _begun() -> LBFGS:
    problem = Valley()
    optimizer = LBFGS(problem.params, history_size=6, **BROYDEN, **SEARCHED, **NEVER_STOP)
    for _ in range(4):
        optimizer.step(problem)
    return optimizer


@pytest.mark.parametrize("wrong", [None, torch.zeros(3, dtype=F64)], ids=["a number", "short"])
def test_a_checkpoint_that_does_not_fit(wrong: Any) -> None:
    optimizer = _begun()
    saved = optimizer.state_dict()
    fresh = LBFGS(Valley().params, history_size=6, **BROYDEN, **SEARCHED)
    entry = {**saved["state"][0], "broyden": wrong}
    with pytest.raises(ValueError, match="broyden"):
        fresh.load_state_dict({**saved, "state": {**saved["state"], 0: entry}})
    fresh.load_state_dict(saved)
