"""What a failed search gives up is there again where nothing else goes further."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from adam_cases import frozen
from fuse_pv_cases import until_converged
from torch import Tensor

from fuse_ext import LBFGS, FusePV
from fuse_ext.kernels.scalars import matrix_place

KINDS: dict[str, Any] = {
    "dense": lambda p: FusePV(p, 1e-2, switch=5, deterministic=True),
    "pairs": lambda p: FusePV(p, 1e-2, switch=5, deterministic=True, curvature="pairs"),
    "int8": lambda p: LBFGS(
        p,
        max_iter=1,
        line_search_fn="approximate_wolfe",
        history_dtype=torch.int8,
        deterministic=True,
    ),
}


class Valley:
    """Rosenbrock's, twenty times."""

    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = (0.1 * torch.randn(40, generator=generator)).requires_grad_()
        self.optimizer = KINDS[kind]([self.x])

    def closure(self) -> Tensor:
        self.x.grad = None
        even, odd = self.x[::2], self.x[1::2]
        loss = (1 - even).square().sum() + 100.0 * (odd - even.square()).square().sum()
        loss.backward()
        return loss.detach()

    def run(self, steps: int) -> Any:
        return until_converged(self.optimizer, self.closure, steps)

    @property
    def history(self) -> Any:
        return self.optimizer._phase.history


def curvature_of(run: Valley) -> Any:
    """All that directions are made of."""
    entry = run.optimizer.state[run.x]
    names = ("matrix", "matrix_scalars", "scalars", "history", "history_scale")
    found = {name: entry[name].clone() for name in names if name in entry}
    if "matrix" in found:  # that the step was along -H g is of the step
        found["matrix_scalars"][[matrix_place("known"), matrix_place("exact")]] = 0.0
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_set_aside_is_taken_up_again(kind: str) -> None:
    run = Valley(kind)
    run.run(60)
    history = run.history
    before, held = frozen(curvature_of(run)), history.header().count
    assert held > 5
    history.set_aside()
    assert history.header().count == 0
    assert history.take_up() is not None
    assert frozen(curvature_of(run)) == before
    assert history.take_up() is None  # once
    history.set_aside()
    history.reset()
    assert history.take_up() is None  # forgotten for good


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_taken_up_over_what_was_learnt_since(kind: str) -> None:
    run = Valley(kind)
    run.run(60)
    history = run.history
    history.set_aside()
    run.run(6)
    count = history.header().count
    assert 0 < count <= 6
    assert history.take_up() is None
    assert history.header().count == count


@pytest.mark.parametrize("kind", ["dense", "pairs"])
def test_a_run_that_rounding_has_ended_keeps_its_curvature(kind: str) -> None:
    """Searches fail along -H g and along -g alike, so it was not H's fault."""
    run = Valley(kind)
    report = run.run(1000)
    assert report.stop_reason == "precision" and report.line_search_failures > 1
    assert report.history_resets == 0
    assert report.pairs_held == report.pairs_accepted if kind == "dense" else 40
    # In float64 the first direction is of that curvature.
    run.optimizer.continue_in(torch.float64)
    before = run.optimizer.report()
    after = run.run(3)
    assert after.pairs_accepted >= before.pairs_accepted + 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_between_knows_what_is_set_aside(kind: str) -> None:
    run = Valley(kind)
    run.run(60)
    run.history.set_aside()
    saved = copy.deepcopy(run.optimizer.state_dict())
    assert run.history.take_up() is not None
    other = Valley(kind)
    other.optimizer.load_state_dict(saved)
    assert other.history.take_up() is not None
    assert frozen(curvature_of(other)) == frozen(curvature_of(run))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aside", ["all", [1.0, 2.0], [1, 2, 3]])
def test_what_is_no_curvature_is_refused(kind: str, aside: Any) -> None:
    run = Valley(kind)
    run.run(10)
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.state[run.x]["set_aside"] = aside
    broken = run.optimizer.state_dict()
    with pytest.raises(ValueError, match="set_aside"):
        Valley(kind).optimizer.load_state_dict(broken)
    Valley(kind).optimizer.load_state_dict(saved)
