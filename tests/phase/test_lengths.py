"""How long steps on minibatches are beside Adam's, with a schedule and without."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from living_cases import SWITCH, Batches, factor_at

from fuse_ext import FusePV
from fuse_ext.phase.living.lengths import BLOCK, FALL_FROM, RISE, Lengths


def test_a_schedule_keeps_its_meaning() -> None:
    """Where lr changes in the Adam phase a step of the diagonal metric is Adam's, to the bit."""
    ours = Batches(metric="diagonal", switch=6)
    adam = Batches(switch=10**6)
    for run in (ours, adam):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 60)
        for _ in range(60):
            run.step()
            schedule.step()
    assert ours.optimizer.phase == "lbfgs"
    assert torch.equal(ours.flat, adam.flat)


def test_a_later_schedule_ends_the_fall_at_1() -> None:
    run = Batches(metric="diagonal", lr=1e-3)
    run.step(SWITCH + 50)
    before = run.optimizer.report().step_length
    assert before > 3.0
    run.optimizer.param_groups[0]["lr"] = 1e-4
    run.step(30)
    assert 2.0 < run.optimizer.report().step_length < before
    run.step(5000)
    assert run.optimizer.report().step_length == 1.0


def test_a_schedule_that_begins_below_1_keeps_what_there_is() -> None:
    entry: dict[str, Any] = {}
    lengths = Lengths(entry)
    lengths.begin(scheduled=False)
    for _ in range(20_000):
        lengths.count(1.0, 7.0, 1e-3)
    before = lengths.factor(7.0, 1e-3)
    assert before < 0.5
    lengths.hold(7.0, 1e-3)
    for _ in range(20_000):
        lengths.count(1.0, 7.0, 1e-4)
    assert lengths.factor(7.0, 1e-4) == before


def test_a_schedule_that_lowers_lr_does_not_raise_the_factor() -> None:
    """Below lr = 1e-3 the factor would be larger, were lr not what somebody else sees to."""
    entry: dict[str, Any] = {}
    lengths = Lengths(entry)
    lengths.begin(scheduled=False)
    lengths.count(1.0, 7.0, 1e-2)
    before = lengths.factor(7.0, 1e-2)
    lengths.hold(7.0, 1e-2)
    assert lengths.factor(7.0, 1e-4) == before


def test_lengths_rise_and_fall() -> None:
    run = Batches(metric="diagonal", lr=1e-3)
    seen = []
    for _ in range(SWITCH + 200):
        run.step()
        seen.append(run.optimizer.report().step_length)
    after = seen[SWITCH:]
    wanted = [factor_at(k, lr=1e-3) for k in range(200)]
    assert after == pytest.approx(wanted)
    assert after[0] == 1.0
    assert max(after) > 5.0


def begun(scheduled: bool = False) -> Lengths:
    lengths = Lengths({})
    lengths.begin(scheduled)
    return lengths


def counted(lengths: Lengths, norm: float, steps: int, lr: float = 1e-3) -> float:
    """The factor after so many steps on gradients of this norm."""
    for _ in range(steps):
        lengths.count(norm, 7.0, lr)
    return lengths.factor(7.0, lr)


def test_after_a_jump_lengths_begin_anew() -> None:
    lengths = begun()
    assert counted(lengths, 1.0, 20_000) < 0.5
    assert counted(lengths, 10.0, BLOCK) == 1.0  # the task has changed
    assert counted(lengths, 10.0, RISE) == pytest.approx(factor_at(RISE, lr=1e-3))
    assert counted(lengths, 5.0, 200) == pytest.approx(factor_at(RISE + 200, lr=1e-3))


def test_a_jump_of_steps_that_are_longer_than_adams_halves_the_rise() -> None:
    lengths = begun()
    assert counted(lengths, 1.0, 100) > 2.0
    counted(lengths, 10.0, BLOCK)
    half = (1 + 6 * 0.5) * math.sqrt(FALL_FROM / (FALL_FROM + RISE))
    assert counted(lengths, 10.0, RISE) == pytest.approx(half)


def test_single_batches_are_no_jump() -> None:
    lengths = begun()
    for _ in range(100):
        counted(lengths, 1.0, 9)
        counted(lengths, 300.0, 1)
    assert lengths.factor(7.0, 1e-3) == pytest.approx(factor_at(1000, lr=1e-3))
    assert counted(lengths, 0.0, 10) == pytest.approx(factor_at(1010, lr=1e-3))


def test_a_jump_leaves_a_schedule_alone() -> None:
    lengths = begun(scheduled=True)
    counted(lengths, 1.0, 2 * BLOCK)
    assert counted(lengths, 100.0, 2 * BLOCK) == 1.0


def test_lengths_are_those_of_the_largest_rate() -> None:
    """Whatever the order of groups: a first one that is slow does not stretch the others."""
    for order in (1, -1):
        run = Batches(metric="diagonal")
        rates = [(0, 1e-5), (2, 3e-2)][::order]
        run.optimizer = FusePV(
            [{"params": [run.params[i]], "lr": lr} for i, lr in rates],
            metric="diagonal",
            deterministic=False,
            switch=SWITCH,
        )
        lengths = []
        for _ in range(SWITCH + 40):
            run.step()
            lengths.append(run.optimizer.report().step_length)
        assert max(lengths) == 1.0


@pytest.mark.parametrize("where", ["adam", "after"])
def test_a_schedule_of_a_later_group_is_one(where: str) -> None:
    run = Batches(metric="diagonal")
    run.optimizer = FusePV(
        [{"params": run.params[:1], "lr": 0.0}, {"params": run.params[1:], "lr": 1e-3}],
        metric="diagonal",
        deterministic=False,
        switch=SWITCH,
    )
    begin = 2 if where == "adam" else SWITCH + 10
    lengths = []
    for step in range(SWITCH + 400):
        if step >= begin:
            run.optimizer.param_groups[1]["lr"] = 1e-3 * (1 - step / 1000)
        run.step()
        lengths.append(run.optimizer.report().step_length)
    assert lengths[-1] >= 1.0
    if where == "adam":
        assert max(lengths) == 1.0


def test_a_cycle_is_the_users() -> None:
    """OneCycleLR moves lr from the first step on: lengths are Adam's at its every rate."""
    run = Batches(metric="diagonal")
    cycle = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, 1e-2, 300, cycle_momentum=False)
    for _ in range(299):
        run.step()
        cycle.step()
        assert run.optimizer.report().step_length in (1.0, 0.0)  # 0.0: Adam says nothing of it


def test_a_plateau_lowers_what_there_is() -> None:
    """ReduceLROnPlateau changes lr after the switch: from there on the factor falls to 1 alone."""
    run = Batches(metric="diagonal", lr=1e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer, patience=60)
    steps = []
    for _ in range(800):
        (loss,) = run.step()
        plateau.step(loss)
        group = run.optimizer.param_groups[0]
        steps.append((group["lr"], run.optimizer.report().step_length))
    assert steps[-1][0] < 1e-3  # it has come to that
    lowered = [factor for lr, factor in steps if lr < 1e-3]
    assert all(later <= before for before, later in itertools.pairwise(lowered))
    assert lowered[-1] >= 1.0
