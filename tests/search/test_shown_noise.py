"""Approximate Wolfe: when trials show that a loss is noisy, and not that its slopes are wrong."""

import math

import pytest
from test_line_search import Phi, drive, make


def rises(noise: float, lie: float, bump: float) -> Phi:
    """A quadratic of depth 1e-2 from a lucky loss, with slopes that are not its own, and a wave."""

    def phi(t):
        luck = noise if t else 0.0
        value = 1.0 + luck + 0.02 * t * (t / 2 - 1) + lie * t + bump * (1 - math.cos(20 * t))
        return value, 0.02 * (t - 1) + 20 * bump * math.sin(20 * t)

    return phi


@pytest.mark.parametrize(
    ("phi", "shown"),
    [
        (rises(0.02, 0.0, 0.0), True),
        (rises(0.0, 0.05, 0.0), False),
        (rises(0.0, 0.0, 0.05), False),
        (rises(0.0, 0.021, 0.01), False),
    ],
    ids=["noise", "wrong slopes", "waves", "both"],
)
def test_noise_is_told_from_slopes_that_are_wrong(phi, shown):
    """Noise rises as much at short steps; a search that sees it ends, to be repeated with it."""
    search = make("approximate_wolfe", loss_eps=1e-6)
    trials, result = drive(search, phi, 1.0)
    assert search.shows_noise is shown
    assert (result.reason == "noise") is shown
    if shown:
        assert search.noise_needed == pytest.approx(0.01)
        assert len(trials) <= 4
        search.loss_eps = 0.02
        _, result = drive(search, phi, 1.0)
        assert (result.reason, result.step) == ("approximate_wolfe", 1.0)
