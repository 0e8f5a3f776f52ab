"""LossPlateau: against its definition, on progress, plateaus and noise of every scale."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import theilslopes

from fuse_ext.switch.criterion import Observation
from fuse_ext.switch.plateau import LossPlateau

NON_FINITE = (math.nan, math.inf, -math.inf, 1e300)  # 1e300: sums of such overflow


def decisions(plateau: LossPlateau, values: Sequence[float]) -> list[str]:
    """The reasons given after each step, "" for no switch."""
    reasons = []
    for step, value in enumerate(values, 1):
        assert plateau.observe(Observation(step, 0, value, None, ())) == (plateau.reason != "")
        reasons.append(plateau.reason)
    return reasons


def fired(plateau: LossPlateau, values: np.ndarray) -> int | None:
    """The first step after which the criterion is true."""
    steps = enumerate(values.tolist(), 1)
    observations = (Observation(step, 0, value, None, ()) for step, value in steps)
    return next((obs.step for obs in observations if plateau.observe(obs)), None)


def plateau_by_brute_force(values: list[float], window: int, rtol: float, z: float, patience: int):
    """LossPlateau's decision after each step, from the definition and the whole history."""
    block, answers, findings, medians = window // 20, [], [], []
    for k in range(1, len(values) + 1):
        seen = np.array([value for value in values[:k] if abs(value) <= 1e290])
        new_check = abs(values[k - 1]) <= 1e290 and len(seen) >= window
        if new_check and len(seen) % (window // 4) == 0:
            means = np.array([sum(b.tolist()) / block for b in np.split(seen, len(seen) // block)])
            last = means[-20:]
            order = np.sign(last[None, :] - last[:, None])
            significant = np.triu(order).sum() / math.sqrt(20 * 19 * 45 / 18) <= -z
            rises = (np.diff(seen, prepend=seen[0]) > 0)[-window:].mean()
            decrease = -20 * theilslopes(last).slope
            level, size = np.median(last), np.ptp(means)
            slow = rises < 0.25 and decrease <= rtol * min(abs(level), size)
            findings.append(not significant or slow)
            medians.append(level)
        needed = 4 * (patience - 1) + 1
        plateau = len(findings) >= needed and all(findings[-needed:])
        stale = medians and len(medians) - 1 - int(np.argmin(medians)) >= 4 * (patience + 3)
        answers.append(bool(plateau or stale))
    return answers


@pytest.mark.parametrize("patience", [1, 2])
@pytest.mark.parametrize("curve", ["noise", "decay", "smooth", "teeth", "rise", "constant"])
def test_plateau_matches_brute_force(curve, patience):
    rng = np.random.default_rng(1)
    t = np.arange(420)
    values = {
        "noise": rng.standard_normal(420),
        "decay": 0.5 ** (t / 60) * (1 + 0.6 * rng.standard_normal(420)),
        "smooth": 1.0 / (1 + t),
        "teeth": 0.7 ** (t % 50),
        "rise": t * 1.0,
        "constant": np.full(420, 3.0),
    }[curve].tolist()
    values[5::37] = [NON_FINITE[i % 4] for i in range(len(values[5::37]))]
    options = {"window": 40, "rtol": 0.2, "z": 1.645, "patience": patience}
    actual = [reason != "" for reason in decisions(LossPlateau(**options), values)]
    assert actual == plateau_by_brute_force(values, **options)
    assert any(actual)


def decay(half_life: float, noise: float, seed: int, n: int = 4000, offset: float = 0.0):
    """Exponential decay with multiplicative noise; the half-life in windows of 200 steps."""
    rng = np.random.default_rng(seed)
    values = offset + 0.5 ** (np.arange(n) / (200 * half_life))
    return values * (1 + noise * rng.standard_normal(n))


@pytest.mark.parametrize(
    ("half_life", "noise"),
    [(0.1, 0.0), (1, 0.0), (3, 0.0), (0.5, 0.1), (5, 0.1), (8, 0.1), (2, 0.3), (0.4, 1.0)],
)
def test_plateau_stays_silent_during_progress(half_life, noise):
    for seed in range(4 if noise else 1):
        assert fired(LossPlateau(), decay(half_life, noise, seed)) is None


@pytest.mark.parametrize("offset", [0.0, -1.0, 100.0])
def test_plateau_recognises_stationary_noise(offset):
    rng = np.random.default_rng(0)
    steps = [fired(LossPlateau(), offset + rng.standard_normal(1600)) for _ in range(20)]
    assert all(step is not None and 400 <= step <= 1200 for step in steps)
    assert np.median(steps) == 400


def test_plateau_fires_where_progress_ends():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        curve = np.maximum(0.5 ** (np.arange(4000) / 200), 0.5**10)  # flat from step 2000 on
        step = fired(LossPlateau(), curve * (1 + 0.2 * rng.standard_normal(4000)))
        assert step is not None and 2000 <= step <= 3200


@pytest.mark.parametrize(
    ("values", "latest"),
    [
        (np.full(600, 2.0), 400),
        (np.zeros(600), 400),
        (np.linspace(1, 2, 600), 400),
        (1 + 1e-9 * np.arange(2000)[::-1], 1500),  # linear: a fifth of the range takes 1000 steps
        (5 + np.cos(np.arange(2000) / 3), 1000),  # Adam circling a minimum
        (1e-8 * 0.9 ** (np.arange(4000) % 600) + 1e-12, 2000),  # and bursting again and again
    ],
)
def test_plateau_fires_without_noise(values, latest):
    step = fired(LossPlateau(), values)
    assert step is not None and step <= latest


def test_plateau_yardstick_is_the_range_under_an_offset():
    # What is left to gain decides, not the offset: 100 + decay is judged as 1 + decay.
    steps = [fired(LossPlateau(), decay(2, 0.0, 0, offset=offset)) for offset in (1.0, 100.0, 1e6)]
    assert steps[0] is not None and len(set(steps)) == 1
    assert fired(LossPlateau(), decay(2, 0.0, 0)) is None


def test_plateau_does_not_see_a_spike():
    values = decay(2, 0.05, 0)
    values[300::450] = 1e6
    assert fired(LossPlateau(), values) is None


@pytest.mark.parametrize("exponent", [-600, -1, 7, 600])
def test_plateau_is_invariant_under_scaling(exponent):
    rng = np.random.default_rng(3)
    for noise in (0.0, 0.3):
        curve = (0.5 ** (np.arange(3000) / 150) + 0.01) * (1 + noise * rng.standard_normal(3000))
        step = fired(LossPlateau(), curve)
        assert step is not None
        assert fired(LossPlateau(), curve * 2.0**exponent) == step


def test_plateau_reasons():
    assert decisions(LossPlateau(), [1.0] * 400)[399] == (
        "loss plateau over 400 steps at step 400 "
        "(no significant decrease: Mann-Kendall z 0.00 > -1.645)"
    )
    line = [10.0, *(2.0 - k / 1024 for k in range(500))]
    assert decisions(LossPlateau(), line)[449] == (
        "loss plateau over 400 steps at step 450 (decrease 0.195 in 200 steps <= rtol=0.2 of 1.23)"
    )
    teeth = (0.9 ** (np.arange(4000) % 600)).tolist()
    assert "no new minimum of the loss for 1000 steps" in "".join(decisions(LossPlateau(), teeth))
