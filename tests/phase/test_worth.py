"""Bases that are not worth having: how that is measured, and that Adam's metric stays then."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fuse_ext
from fuse_ext import FusePV
from fuse_ext.phase.living.metric import worth
from fuse_ext.phase.living.metric.kronecker import GATHER, MEASURE, REFRESH
from fuse_ext.phase.living.metric.worth import FLOOR, LEAST_GAIN, SAMPLE, gain_of, sample_of

SWITCH = 3
TURN = SWITCH + GATHER + MEASURE  # steps after which a weight has its bases, or never will
SHAPE = (12, 20)


class Noise:
    """Two weights and a bias on gradients that are given; those of the second are correlated.

    The first one's elements are independent, and each of a size of its own.
    """

    def __init__(self, seed: int = 0, **options: Any) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        of = {"generator": torch.Generator().manual_seed(100), "dtype": torch.float64}
        self.sizes = torch.randn(SHAPE, **of).exp()
        self.mix = torch.randn(SHAPE[1], SHAPE[1], **of)
        self.params = [
            torch.randn(shape, **of).requires_grad_() for shape in (SHAPE, SHAPE, SHAPE[:1])
        ]
        given = {"lr": 1e-3, "switch": SWITCH, "deterministic": False, **options}
        self.optimizer = FusePV(self.params, **given)

    def step(self, count: int = 1) -> None:
        """So many of them."""
        for _ in range(count):
            noise = [
                torch.randn(p.shape, generator=self.draw, dtype=torch.float64) for p in self.params
            ]
            noise[0] *= self.sizes
            noise[1] = noise[1] @ self.mix
            for param, grad in zip(self.params, noise, strict=True):
                param.grad = grad
            self.optimizer.step()

    def has_bases(self) -> list[bool]:
        """Each weight."""
        return ["row_basis" in self.optimizer.state[param] for param in self.params[:2]]

    def values(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [param.detach().clone() for param in self.params]


def test_the_gain_is_that_of_gaussians() -> None:
    """log det of the diagonal beside that of the covariance, an element."""
    torch.manual_seed(0)
    mix = torch.randn(6, 6, dtype=torch.float64)
    covariance = mix @ mix.T
    values, vectors = torch.linalg.eigh(covariance)
    rows = torch.randn(200_000, 6, dtype=torch.float64) @ mix.T
    own, second = (x.square().mean(0) for x in (rows, rows @ vectors))
    gain, count = gain_of(own, second).tolist()
    expected = covariance.diagonal().log().sum() - values.log().sum()
    assert count == 6 and gain == pytest.approx(float(expected), abs=0.02)
    assert gain_of(own, own)[0] == 0.0
    for scale in (1e-30, 1e30):  # it has no units
        assert gain_of(scale * own, scale * second)[0] == pytest.approx(gain)


def test_elements_that_never_move_say_nothing() -> None:
    own, second = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1e-9, 1.0, 2.0])
    assert gain_of(own, second).tolist() == [0.0, 3.0]
    assert gain_of(torch.zeros(3), torch.zeros(3)).tolist() == [0.0, 0.0]
    assert gain_of(torch.zeros(0), torch.zeros(0)).tolist() == [0.0, 0.0]
    second = torch.tensor([1.0, 1.0, 1.0])
    expected = math.log(FLOOR) + math.log(2.0)
    assert gain_of(own, second)[0] == pytest.approx(expected)


@pytest.mark.parametrize("numel", [0, 1, 7, SAMPLE - 1, SAMPLE, SAMPLE + 1, 3 * SAMPLE + 5])
def test_samples(numel: int) -> None:
    sample = sample_of(torch.arange(numel))
    assert len(sample) == worth.sample_length(numel) <= worth.longest_sample(numel)
    assert len(sample) >= min(numel, SAMPLE // 2)
    if numel:
        assert sample[0] == 0 and sample[-1] >= numel - 1 - numel / SAMPLE


def test_each_weight_for_itself() -> None:
    """The first one is stepped as with metric="diagonal", the second as with "kronecker"."""
    run, diagonal, bases = Noise(), Noise(metric="diagonal"), Noise(metric="kronecker")
    for one in (run, diagonal, bases):
        one.step(TURN - 2)
    assert run.has_bases() == [True, True]  # they are being measured
    for one in (run, diagonal, bases):
        one.step(2 * REFRESH)
    assert run.has_bases() == [False, True] and bases.has_bases() == [True, True]
    first, second, bias = run.values()
    assert torch.equal(first, diagonal.values()[0]) and torch.equal(bias, diagonal.values()[2])
    assert torch.equal(second, bases.values()[1])
    assert not torch.equal(second, diagonal.values()[1])
    report = run.optimizer.report()
    assert report.curvature == "kronecker" and report.workspace_bytes == 0
    tensors = {k for k, v in run.optimizer.state[run.params[0]].items() if isinstance(v, Tensor)}
    assert tensors == {"step", "exp_avg", "exp_avg_sq", "weight_average", "record"}


def test_nothing_is_left_of_them() -> None:
    run = Noise()
    run.mix = torch.eye(SHAPE[1], dtype=torch.float64)  # the second one's are independent too
    run.step(TURN - 2)
    report = run.optimizer.report()
    measured = 2 * 8 * 2 * math.prod(SHAPE)
    assert report.curvature == "kronecker" and report.workspace_bytes == measured
    run.step(4)
    report, numel = run.optimizer.report(), sum(param.numel() for param in run.params)
    assert report.curvature == "diagonal" and report.workspace_bytes == 0
    steps = 4 * len(run.params)
    assert report.state_bytes == 3 * 8 * numel + steps  # the moments, and the mean of the weights


@pytest.mark.parametrize("more", [1, GATHER + 1, TURN - SWITCH - 1, TURN - SWITCH, TURN])
def test_checkpoints_at_every_stage(more: int) -> None:
    run, again = Noise(), Noise()
    run.step(SWITCH + more)
    for param, value in zip(again.params, run.values(), strict=True):
        param.data.copy_(value)
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.draw.set_state(run.draw.get_state())
    for one in (run, again):
        one.step(TURN)
    assert run.has_bases() == again.has_bases() == [False, True]
    assert all(map(torch.equal, run.values(), again.values()))
    assert again.optimizer.report() == run.optimizer.report()


def test_a_checkpoint_of_before_keeps_its_bases() -> None:
    run, again = Noise(), Noise()
    run.step(TURN - 2)
    for param in run.params:
        run.optimizer.state[param].pop("own_sq", None)
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.step(5)
    assert again.has_bases() == [True, True]


@pytest.mark.parametrize("name", ["own_sq", "rotated_sq"])
def test_what_is_measured_of_another_weight_is_refused(name: str) -> None:
    run = Noise()
    run.step(TURN - 2)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["state"][1][name] = torch.zeros(5)
    with pytest.raises(ValueError, match=rf"{name} of params\[1\] is not of shape .*\(12, 20\)"):
        run.optimizer.load_state_dict(saved)
    run.step(5)
    assert run.has_bases() == [False, True]


def test_the_next_second_phase_looks_again() -> None:
    run = Noise()
    run.step(TURN + 1)
    run.optimizer.switch_back()
    for param in run.params:
        assert run.optimizer.state[param].keys().isdisjoint({"factor_steps", "basis_steps"})
    run.sizes, run.mix = torch.ones(SHAPE, dtype=torch.float64), run.mix * 0.5
    run.step(SWITCH + 1)
    assert run.has_bases() == [True, True]
    run.step(TURN)
    assert run.has_bases() == [False, True]


def test_they_come_back_where_they_are_asked_for() -> None:
    run, again = Noise(), Noise()
    run.step(TURN + 1)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["param_groups"][0]["metric"] = "kronecker"
    again.optimizer.load_state_dict(saved)
    again.step(GATHER + MEASURE)
    assert again.has_bases() == [True, True]


def test_no_gradient_says_nothing() -> None:
    """Bases of a weight whose gradient is 0 while they are measured stay."""
    run = Noise()
    run.sizes = torch.zeros(SHAPE, dtype=torch.float64)
    run.step(TURN + 1)
    assert run.has_bases() == [True, True]
    assert run.values()[0].isfinite().all()


def hidden_gain(dropout: float, seed: int) -> float:
    """Of an element of the weight between two layers of units that are left out so often."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(dropout)),
        *(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(dropout)),
        nn.Linear(64, 10),
    )
    optimizer = FusePV(model.parameters(), lr=1e-3, switch=20)
    for _ in range(20 + GATHER + MEASURE - 2):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    entry = optimizer.state[model[3].weight]
    gain, count = gain_of(entry["own_sq"], entry["rotated_sq"]).tolist()
    return gain / count


@pytest.mark.parametrize("seed", range(3))
def test_dropout(seed: int) -> None:
    """Noise that strikes units one by one leaves little of what they have in common."""
    plain, noisy = hidden_gain(0.0, seed), hidden_gain(0.5, seed)
    assert plain > 10 * LEAST_GAIN and noisy < 2 * LEAST_GAIN


def test_memory_is_as_estimated_while_they_are_measured() -> None:
    run = Noise()
    run.step(TURN - 2)
    found = fuse_ext.estimate_memory(run.params, deterministic=False).phases[-1]
    report = run.optimizer.report()
    assert found.state_bytes == report.state_bytes
    assert found.workspace_bytes == report.workspace_bytes
