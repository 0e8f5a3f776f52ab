"""Curvature pairs belong to the parameters that they were taken on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fuse_ext import LBFGS
from fuse_ext.kernels import scalars as ring
from fuse_ext.vector.flat import MOST_PARTS

F64 = torch.float64


class Coupled:
    """A quadratic in three blocks, each of which may be left out of the gradient."""

    def __init__(self, **options: Any) -> None:
        generator = torch.Generator().manual_seed(2)
        root = torch.randn(9, 9, generator=generator, dtype=F64)
        self.hessian = root @ root.T + torch.eye(9, dtype=F64)
        self.blocks = [torch.ones(3, dtype=F64, requires_grad=True) for _ in range(3)]
        defaults = {"max_iter": 1, "line_search_fn": "strong_wolfe", "history_size": 6}
        tolerances = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
        self.optimizer = LBFGS(self.blocks, **{**defaults, **tolerances, **options})

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        x = torch.cat(self.blocks)
        loss = 0.5 * x @ self.hessian @ x
        loss.backward()
        return loss

    def freeze(self, *frozen: int) -> None:
        for i, block in enumerate(self.blocks):
            block.requires_grad_(i not in frozen)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.optimizer.step(self.closure)

    @property
    def entry(self) -> dict[str, Any]:
        entry: dict[str, Any] = self.optimizer.state[self.blocks[0]]
        return entry

    @property
    def pair_sets(self) -> list[list[int]]:
        """Which blocks were absent from each pair held, newest first."""
        scalars, slots = self.entry["scalars"], self.entry["history"].size(1)
        numbers = ring.array(scalars, "pair_set", slots)
        return [self.entry["sets"][int(numbers[i])] for i in ring.held_slots(scalars, slots)]

    @property
    def usable(self) -> int:
        return int(ring.read_header(self.entry["scalars"]).usable)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_pairs_wait_for_their_parameters(backend: str) -> None:
    problem = Coupled(backend=backend)
    problem.step(3)
    assert problem.pair_sets == [[]] * 3
    problem.freeze(1)
    problem.step(2)
    assert problem.pair_sets == [[1]] * 2 + [[]] * 3
    assert problem.usable == 2
    problem.freeze()
    problem.step()
    assert problem.usable == 4  # as if nothing had been
    assert problem.pair_sets == [[]] + [[1]] * 2 + [[]] * 3
    problem.step(3)
    assert problem.pair_sets == [[]] * 4 + [[1]] * 2


def test_a_pair_knows_nothing_of_what_was_frozen() -> None:
    problem = Coupled()
    problem.freeze(0, 2)
    problem.step(3)
    history = problem.entry["history"]
    for slot in ring.held_slots(problem.entry["scalars"], history.size(1)):
        for row in history[:, slot]:
            assert not row[:3].any() and not row[6:].any()
            assert row[3:6].all()


@pytest.mark.parametrize("options", [{}, {"line_search_fn": None, "lr": 0.1}], ids=str)
def test_a_new_set_begins_as_a_new_problem(options: dict[str, Any]) -> None:
    """Its first direction is -g, and the step as cautious as a first one."""
    problem, other = Coupled(**options), Coupled(**options)
    problem.step(4)
    problem.freeze(0)
    other.freeze(0)
    with torch.no_grad():
        for mine, theirs in zip(problem.blocks, other.blocks, strict=True):
            theirs.copy_(mine)
    for _ in range(5):
        problem.step()
        other.step()
        for mine, theirs in zip(problem.blocks, other.blocks, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0.0)


def test_sets_are_in_the_checkpoint() -> None:
    problem, again = Coupled(), Coupled()
    problem.step(3)
    problem.freeze(2)
    problem.step(2)
    again.freeze(2)
    with torch.no_grad():
        for mine, theirs in zip(problem.blocks, again.blocks, strict=True):
            theirs.copy_(mine)
    again.optimizer.load_state_dict(problem.optimizer.state_dict())
    for frozen in ((2,), (), (0, 1), (2,)):
        for one in (problem, again):
            one.freeze(*frozen)
            one.step(2)
        assert all(map(torch.equal, problem.blocks, again.blocks))
        assert problem.usable == again.usable


@pytest.mark.parametrize(
    ("name", "value"),
    [("sets", [[3]]), ("sets", [3]), ("sets", "all"), ("set", 1), ("set", -1), ("arrival", [1.0])],
    ids=str,
)
def test_damaged_sets_are_refused(name: str, value: Any) -> None:
    problem, again = Coupled(), Coupled()
    problem.step(2)
    state = problem.optimizer.state_dict()
    state["state"][0][name] = value
    with pytest.raises(ValueError, match=f"state_dict does not fit: .*{name}"):
        again.optimizer.load_state_dict(state)


def test_sets_without_end() -> None:
    """Layers left out at random: the list of sets stays short, and the run goes on."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.ones(1, dtype=F64, requires_grad=True) for _ in range(9)]
    optimizer = LBFGS(blocks, line_search_fn="strong_wolfe", max_iter=1, tolerance_change=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        kept = [b for b, keep in zip(blocks, used.tolist(), strict=True) if keep]
        loss = torch.cat(kept).square().sum()
        loss.backward()
        return loss

    seen = set()
    for _ in range(300):
        used = torch.rand(9, generator=generator) < 0.5
        used[0] = True
        seen.add(tuple(used.tolist()))
        optimizer.step(closure)
        assert len(optimizer.state[blocks[0]]["sets"]) <= MOST_PARTS
    assert len(seen) > MOST_PARTS
    assert max(float(b.detach().abs()) for b in blocks) < 1e-3


def test_a_trial_with_other_gradients_makes_no_pair() -> None:
    """A branch that is taken on one side of a wall only: the step ends beyond it."""
    x = torch.tensor([2.0], dtype=F64, requires_grad=True)
    z = torch.tensor([1.0], dtype=F64, requires_grad=True)
    optimizer = LBFGS([x, z], line_search_fn="strong_wolfe", max_iter=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = x.square().sum()
        if bool(x < 1.5):
            loss = loss + (z - 3.0).square().sum()
        elif bool(x < 10.0):
            loss = loss + 4.0
        loss.backward()
        return loss

    optimizer.step(closure)
    assert z.item() == 1.0 and x.item() < 1.5
    assert optimizer.report().pairs_held == 0
    for _ in range(20):
        optimizer.step(closure)
    assert abs(x.item()) < 1e-6 and abs(z.item() - 3.0) < 1e-6
