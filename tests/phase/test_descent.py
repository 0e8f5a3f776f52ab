"""Where losses still fall beyond noise, steps do not become shorter than Adam's."""

from __future__ import annotations

import copy
import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuse_ext import FusePV, Never
from fuse_ext.phase.living.descent import LOWER, MEANS, Descent
from fuse_ext.phase.living.lengths import FALL_FROM, Lengths
from fuse_ext.phase.living.trend import BLOCK, Trend


def feed(losses: list[float], entry: dict[str, Any] | None = None) -> tuple[Descent, list[bool]]:
    """The losses of one step after another, and where they were smooth."""
    entry = {} if entry is None else entry
    trend, descent = Trend(entry), Descent(entry)
    if not entry:
        trend.restart(), descent.restart()
    smooth = []
    for loss in losses:
        trend.worse(loss)
        smooth.append(descent.smooth(loss, trend.block))
    return descent, smooth


def textbook(losses: list[float]) -> bool:
    """The same from all losses at once."""
    blocks = [losses[i : i + BLOCK] for i in range(0, len(losses) - BLOCK + 1, BLOCK)]
    width = 1
    for number in range(1, len(blocks) + 1):
        width *= 2 if number == MEANS * width else 1
    parts = [blocks[i : i + width] for i in range(0, len(blocks), width)]
    quarter = len(parts) // 4
    if not quarter:
        return True

    def of(some: list[list[list[float]]]) -> tuple[float, float]:
        flat = [block for part in some for block in part]
        mean = statistics.fmean(statistics.fmean(block) for block in flat)
        variance = statistics.fmean(statistics.variance(block) for block in flat)
        return mean, math.sqrt(variance / (len(flat) * BLOCK))

    late, early = of(parts[-quarter:]), of(parts[-2 * quarter : -quarter])
    return late[0] < early[0] - LOWER * math.hypot(late[1], early[1])


@pytest.mark.parametrize("slope", [0.0, 1e-3, 1e-2])
@pytest.mark.parametrize("count", [30, 79, 80, 320, 500, 2000, 7000])
def test_the_textbook(count: int, slope: float) -> None:
    generator = torch.Generator().manual_seed(count)
    noise = torch.randn(count, generator=generator, dtype=torch.float64).tolist()
    losses = [1e3 + value - slope * k for k, value in enumerate(noise)]
    entry: dict[str, Any] = {}
    descent, _ = feed(losses, entry)
    assert descent.falling == textbook(losses)
    assert len(entry["means"]) < MEANS
    # A fall of a thousandth of the noise a step shows in time, since quarters grow.
    if count == 7000:
        assert descent.falling == (slope > 0.0)


def test_blocks_that_fall_by_chance_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, generator=generator, dtype=torch.float64).tolist()
    entry: dict[str, Any] = {}
    told = [feed(noise[:80], entry)[0].falling]
    for start in range(80, 20_000, BLOCK):
        told.append(feed(noise[start : start + BLOCK], entry)[0].falling)
    assert 0 < sum(told) < 0.1 * len(told)


def test_losses_of_one_function_are_smooth() -> None:
    _, smooth = feed([math.exp(-k / 30) for k in range(100)])
    assert [k for k, told in enumerate(smooth) if told] == [19, 39, 59, 79, 99]
    generator = torch.Generator().manual_seed(0)
    _, smooth = feed(torch.randn(4000, generator=generator).tolist())
    assert not any(smooth)


def test_a_loss_now_and_then_tells_nothing() -> None:
    descent, _ = feed([3.0, 2.0, 1.0])
    assert descent.falling
    descent.forget()
    assert not descent.falling
    descent.forget()
    assert not descent.falling


def test_lengths_wait_at_adams_own() -> None:
    lengths = Lengths({})
    lengths.begin(scheduled=False)
    for _ in range(3000):  # from 7 times Adam's they come down in any case
        lengths.count(1.0, 7.0, 1e-3, falling=True)
    assert lengths.factor(7.0, 1e-3) == pytest.approx(1.0, abs=1e-3)
    for _ in range(1000):
        lengths.count(1.0, 7.0, 1e-3, falling=False)
    wanted = 7.0 * math.sqrt(FALL_FROM / (50.0 * 49.0 + 1000.0))
    assert lengths.factor(7.0, 1e-3) == pytest.approx(wanted, rel=1e-3)


def far_away(seed: int, lr: float, **options: Any) -> float:
    """A network on targets around 30, which it has to come to first; batches of 64."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 8, generator=generator)
    y = x @ torch.randn(8, 1, generator=generator) + 30
    y = y + 0.1 * torch.randn(2000, 1, generator=generator)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = FusePV(model.parameters(), lr=lr, **options)
    for _ in range(600):
        rows = torch.randint(2000, (64,), generator=generator)
        optimizer.zero_grad()
        loss = (model(x[rows]) - y[rows]).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return float((model(x) - y).square().mean().detach())


def test_a_long_way_is_not_gone_in_ever_shorter_steps() -> None:
    """Told the losses, it is as far as Adam; by gradients alone nobody knows how far it is."""
    ours = statistics.median(far_away(seed, 3e-2) for seed in range(3))
    adam = statistics.median(far_away(seed, 3e-2, switch=Never()) for seed in range(3))
    assert ours < 2.0 * adam


def test_checkpoints_of_before_go_on() -> None:
    """Without what was not counted then, and with the lr of the first group alone."""
    x = torch.zeros(3, requires_grad=True)
    generator = torch.Generator().manual_seed(0)

    def closure() -> Tensor:
        x.grad = x.detach() - torch.randn(3, generator=generator)
        return x.grad.square().sum()

    optimizer = FusePV([x], lr=1e-2)
    for _ in range(60):
        optimizer.step(closure)
    entry = optimizer.state[x]
    for name in ("falling", "means", "last_loss", "last_change", "turns", "looks_from"):
        del entry[name]
    entry["last_lr"] = 1e-2
    entry["fuse_pv"]["last_lr"] = 1e-2
    saved = copy.deepcopy(optimizer.state_dict())
    y = x.detach().clone().requires_grad_()
    again = FusePV([y], lr=1e-2)
    again.load_state_dict(saved)
    x = y
    for _ in range(100):
        again.step(closure)
    report = again.report()
    assert report.phase == "lbfgs" and report.setbacks == 0
    assert "scheduled" not in again.state[y]["fuse_pv"]
    assert again.state[y]["held"] is None
