"""Weights with a side much longer than the other: blocks, each a matrix of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fuse_ext
from fuse_ext import FusePV
from fuse_ext.phase.living.metric.kronecker import GATHER, MEASURE, REFRESH
from fuse_ext.phase.living.metric.sides import Form

SWITCH = 3
READY = SWITCH + GATHER + MEASURE


class Thin:
    """Least squares of noisy targets in a weight of [2, 60] or [60, 2], whole or as its blocks."""

    def __init__(self, shape: tuple[int, int], parts: int = 1, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.dim = 0 if shape[0] > shape[1] else 1
        self.params = [
            part.clone().contiguous().requires_grad_() for part in whole.chunk(parts, self.dim)
        ]
        self.mix = torch.randn(60, 60, generator=generator, dtype=torch.float64) / 8
        self.calls = 0
        options = {"deterministic": False, "switch": SWITCH, **options}
        self.optimizer = FusePV(self.params, 0.01, **options)

    def step(self, count: int) -> None:
        for _ in range(count):
            generator = torch.Generator().manual_seed(1000 + self.calls)
            self.calls += 1
            x = torch.randn(8, 60, generator=generator, dtype=torch.float64) @ self.mix
            self.optimizer.zero_grad()
            weight = torch.cat(list(self.params), self.dim)
            seen = x @ (weight if self.dim == 0 else weight.T)
            (seen - x[:, :2]).square().mean().backward()
            self.optimizer.step()

    @property
    def weight(self) -> Tensor:
        return torch.cat([param.detach() for param in self.params], self.dim)


@pytest.mark.parametrize("shape", [(2, 60), (60, 2)])
@pytest.mark.parametrize("steps", [READY - 1, READY + 1, READY + 3 * REFRESH + 2])
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_block_is_a_matrix(shape: tuple[int, int], steps: int, decoupled: bool) -> None:
    """Without the stretch, which is one for all of a weight, blocks are as weights of their own."""
    options = {"step_cap": 1.0, "weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    whole, parts = Thin(shape, **options), Thin(shape, 2, **options)
    whole.step(steps)
    parts.step(steps)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-9, atol=1e-9)
    entry = whole.optimizer.state[whole.params[0]]
    assert entry["row_basis"].shape == ((2, 2, 2) if shape[0] == 2 else (2, 30, 30))
    assert entry["column_basis"].shape == ((2, 30, 30) if shape[0] == 2 else (2, 2, 2))
    for one, other in zip(entry["row_basis"], parts.params, strict=True):
        torch.testing.assert_close(one, parts.optimizer.state[other]["row_basis"])


@pytest.mark.parametrize("shape", [(2, 60), (60, 2)])
def test_the_way_back_to_adam(shape: tuple[int, int]) -> None:
    whole, parts = Thin(shape, step_cap=1.0), Thin(shape, 2, step_cap=1.0)
    for run in (whole, parts):
        run.step(READY + REFRESH + 1)
        run.optimizer.switch_back()
        run.step(5)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 60), (60, 2)])
@pytest.mark.parametrize("steps", [SWITCH + 5, SWITCH + GATHER + 3, READY + REFRESH + 3])
def test_checkpoints(shape: tuple[int, int], steps: int) -> None:
    run, again = Thin(shape), Thin(shape)
    run.step(steps)
    with torch.no_grad():
        again.params[0].copy_(run.params[0])
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.calls = run.calls
    run.step(2 * REFRESH)
    again.step(2 * REFRESH)
    assert torch.equal(run.weight, again.weight)


def test_whole_bases_of_a_checkpoint_stay_whole() -> None:
    """As versions before there were blocks have saved them, or ``metric="kronecker"``."""
    run, again = Thin((2, 60), metric="kronecker"), Thin((2, 60))
    run.step(READY + 2)
    with torch.no_grad():
        again.params[0].copy_(run.params[0])
    again.optimizer.load_state_dict(run.optimizer.state_dict())
    again.calls = run.calls
    run.step(2 * REFRESH)
    again.step(2 * REFRESH)
    assert torch.equal(run.weight, again.weight)
    assert again.optimizer.state[again.params[0]]["column_basis"].shape == (60, 60)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("row_factor", (2, 2, 3)),
        ("row_basis", (3, 2, 2)),
        ("column_basis", (2, 29, 29)),
        ("column_factor", (7, 30, 30)),
    ],
)
def test_blocks_of_another_weight_are_refused(name: str, shape: tuple[int, ...]) -> None:
    run = Thin((2, 60))
    run.step(READY + 1)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["state"][0][name] = torch.zeros(shape)
    before = run.weight.clone()
    with pytest.raises(ValueError, match=r"of params\[0\] is .* of a weight of \(2, 60\)"):
        run.optimizer.load_state_dict(saved)
    run.step(1)
    assert not torch.equal(run.weight, before)


def test_forms_there_and_back() -> None:
    for form in (
        Form(3, 4, (True, True)),
        Form(3, 4, (True, True), 5),
        Form(3, 4, (True, True), 5, True),
    ):
        shape = (3, 20) if form.across else (3 * form.blocks, 4)
        weight = torch.arange(float(form.blocks * 12)).view(shape)
        matrices = form.matrices(weight)
        assert matrices.shape == form.shape and torch.equal(form.back(matrices, weight), weight)
        assert matrices.data_ptr() == weight.data_ptr()
        if form.blocks > 1:
            for n, part in enumerate(weight.chunk(form.blocks, 1 if form.across else 0)):
                assert torch.equal(matrices[n], part)


def test_memory_is_bounded() -> None:
    found = fuse_ext.estimate_memory([torch.empty(512, 2)])
    assert found.phases[-1].state_bytes <= 133 * 1024
