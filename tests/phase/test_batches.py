"""No pair mixes two batches: batch_id, and pairs from another sample."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from fuse_pv_cases import snapshot
from torch import Tensor

from fuse_ext import FusePV
from fuse_ext.kernels.scalars import array, index


class Batches:
    """Least squares over 60 rows; ``on(rows)`` is the closure of some of them."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.inputs = torch.randn(60, 6, dtype=torch.float64)
        self.targets = torch.randn(60, dtype=torch.float64)
        self.x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        self.calls: list[str] = []

    def on(self, rows: slice, name: str = "") -> Any:
        def closure() -> Tensor:
            self.calls.append(name)
            self.x.grad = None
            loss = (self.inputs[rows] @ self.x - self.targets[rows]).square().mean()
            loss.backward()
            return loss

        return closure

    def hessian(self, rows: slice) -> Tensor:
        a = self.inputs[rows]
        return 2.0 * a.T @ a / len(a)


FIRST, SECOND, BOTH = slice(0, 30), slice(30, 60), slice(15, 45)


def newest_pair(opt: FusePV, x: Tensor) -> tuple[Tensor, Tensor]:
    entry = opt.state[x]
    scalars, rows = entry["scalars"], entry["history"]
    slots = rows.shape[1]
    slot = (int(scalars[index("open", slots)]) - 1) % slots
    return array(scalars, "row_scale", slots)[slot] * rows[0, slot], rows[1, slot]


def fixed(problem: Batches, **options: Any) -> FusePV:
    options = {"line_search": None, "pairs": "consecutive", "lbfgs_lr": 0.3, **options}
    return FusePV([problem.x], lr=0.01, switch=2, **options)


def test_a_pair_in_waiting_is_dropped_with_its_batch() -> None:
    problem = Batches()
    opt = fixed(problem)
    batches = {"a": FIRST, "b": SECOND}
    held = []
    for name in "aabaabbb":
        opt.step(problem.on(batches[name]), batch_id=name)
        report = opt.report()
        held.append(report.pairs_accepted + report.pairs_skipped)
    # Adam, Adam, then pairs: (b, a) no, (a, a) one, (a, b) no, (b, b) and (b, b) two.
    assert held == [0, 0, 0, 0, 1, 1, 2, 3]


def test_every_pair_is_of_one_batch() -> None:
    problem = Batches()
    opt = fixed(problem)
    for name, rows in zip("aaabbbaaa", [FIRST] * 3 + [SECOND] * 3 + [FIRST] * 3, strict=True):
        before = opt.report().pairs_accepted
        opt.step(problem.on(rows), batch_id=name)
        if opt.report().pairs_accepted > before:
            s, y = newest_pair(opt, problem.x)
            torch.testing.assert_close(y, problem.hessian(rows) @ s)


def test_without_identity_consecutive_gradients_are_taken_as_one_batch() -> None:
    problem = Batches()
    opt = fixed(problem)
    for k in range(6):
        opt.step(problem.on((FIRST, SECOND)[k % 2]))
    report = opt.report()
    assert report.pairs_accepted + report.pairs_skipped == 3


def test_a_remembered_evaluation_goes_with_its_batch() -> None:
    problem = Batches()
    opt = FusePV([problem.x], lr=0.01, switch=2, deterministic=True)
    for _ in range(4):
        opt.step(problem.on(FIRST), batch_id=0)
    calls = len(problem.calls)
    loss = opt.step(problem.on(SECOND), batch_id=1)
    opt.switch_back()
    assert len(problem.calls) >= calls + 2  # where the step began, and a trial
    assert loss > 0.0


def test_the_identity_is_saved() -> None:
    first, again = Batches(), Batches()
    ours, theirs = fixed(first), fixed(again)
    for _ in range(4):
        ours.step(first.on(FIRST), batch_id="a")
    with torch.no_grad():
        again.x.copy_(first.x)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    before = theirs.report().pairs_accepted
    theirs.step(again.on(SECOND), batch_id="b")
    assert theirs.report().pairs_accepted == before
    ours.step(first.on(FIRST), batch_id="a")
    assert ours.report().pairs_accepted == before + 1


# --- another sample ------------------------------------------------------------------------------


@pytest.mark.parametrize("history_dtype", [None, torch.float32])
@pytest.mark.parametrize("line_search", [None, "armijo", "strong_wolfe"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}], ids=str)
def test_pairs_of_an_overlap(
    line_search: str | None, history_dtype: torch.dtype | None, options: dict[str, Any]
) -> None:
    problem = Batches()
    opt = fixed(
        problem,
        line_search=line_search,
        pairs="same_batch",
        history_dtype=history_dtype,
        **options,
    )
    decay = options.get("weight_decay", 0.0) * torch.eye(6, dtype=torch.float64)
    for k in range(8):
        own, overlap = problem.on((FIRST, SECOND)[k % 2]), problem.on(BOTH, "overlap")
        before = opt.report().pairs_accepted
        del problem.calls[:]
        opt.step(own, pair_closure=overlap)
        if k >= 2:
            assert problem.calls.count("overlap") == 2
            assert opt.report().pairs_accepted == before + 1
            s, y = newest_pair(opt, problem.x)
            tolerance = {} if history_dtype is None else {"rtol": 1e-4, "atol": 1e-5}
            expected = (problem.hessian(BOTH) + decay) @ s.double()
            torch.testing.assert_close(y.double(), expected, **tolerance)
    assert opt.report().evaluations > 8


@pytest.mark.parametrize("call", [1, 2])
def test_an_error_in_the_pair_closure_undoes_the_step(call: int) -> None:
    problem = Batches()
    opt = fixed(problem, pairs="same_batch")
    for _ in range(5):
        opt.step(problem.on(FIRST), pair_closure=problem.on(BOTH))
    before = problem.x.detach().clone()
    count = 0

    def fails() -> Tensor:
        nonlocal count
        count += 1
        if count == call:
            raise KeyError("overlap")
        return problem.on(BOTH)()

    with pytest.raises(KeyError, match="overlap"):
        opt.step(problem.on(FIRST), pair_closure=fails)
    assert torch.equal(problem.x, before)
    opt.step(problem.on(FIRST), pair_closure=problem.on(BOTH))
    assert not torch.equal(problem.x, before)


def test_an_overlap_that_is_not_finite_gives_no_pair() -> None:
    problem = Batches()
    opt = fixed(problem, pairs="same_batch")
    for _ in range(5):
        opt.step(problem.on(FIRST), pair_closure=problem.on(BOTH))
    accepted = opt.report().pairs_accepted
    with pytest.warns(RuntimeWarning, match="not finite"):
        opt.step(problem.on(FIRST), pair_closure=lambda: problem.on(BOTH)() * math.nan)
    assert opt.report().pairs_accepted == accepted
    assert opt.report().non_finite == 1


@pytest.mark.parametrize("options", [{"max_iter": 2}, {"deterministic": True}], ids=str)
def test_where_another_sample_makes_no_sense(options: dict[str, Any]) -> None:
    problem = Batches()
    opt = fixed(problem, pairs="same_batch", line_search="armijo", **options)
    for _ in range(2):
        opt.step(problem.on(FIRST))
    before = snapshot(opt), problem.x.detach().clone()
    with pytest.raises(ValueError, match="pair_closure needs max_iter=1 and deterministic=False"):
        opt.step(problem.on(FIRST), pair_closure=problem.on(BOTH))
    assert torch.equal(problem.x, before[1])
    with pytest.raises(ValueError, match="closure=None"):
        opt.step(pair_closure=problem.on(BOTH))


def test_a_captured_step_knows_no_batches() -> None:
    problem = Batches()
    opt = fixed(problem, capturable=True)
    for options in ({"batch_id": 1}, {"pair_closure": problem.on(BOTH)}):
        with pytest.raises(ValueError, match="capturable=True goes with neither"):
            opt.step(problem.on(FIRST), **options)
    assert opt.report().adam_steps == 0
