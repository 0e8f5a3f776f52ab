"""The trials of the Moré-Thuente search: the tables of its paper, and scipy's dcsrch."""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize._dcsrch import DCSRCH

from fuse_ext.search import make_line_search
from fuse_ext.search.line_search import LineSearch, LineSearchResult

Phi = Callable[[float], tuple[float, float]]  # t -> phi(t), phi'(t)


def make(**options) -> LineSearch:
    search = make_line_search("strong_wolfe", **options)
    assert search is not None
    return search


def scipy_trials(phi: Phi, t0: float, c1, c2, xtol, step_min, step_max, budget):
    """Trial steps of scipy's dcsrch, and the task it ends with."""
    steps: list[float] = []

    def value(t):
        steps.append(float(t))
        return phi(float(t))[0]

    dcsrch = DCSRCH(value, lambda t: phi(float(t))[1], c1, c2, xtol, step_min, step_max)
    *_, task = dcsrch(t0, *phi(0.0), maxiter=budget + 1)
    return steps, task


def assert_same_trials(phi: Phi, t0: float, search: LineSearch) -> LineSearchResult:
    """Compare with dcsrch, trial by trial."""
    o = search.options
    steps = []
    step = search.start(*phi(0.0), t0)
    while step is not None:
        steps.append(step)
        step = search.tell(*phi(step))
    result = search.result
    expected, task = scipy_trials(
        phi, t0, o.c1, o.c2, o.xtol, o.step_min, o.step_max, o.max_evaluations
    )
    if result.reason == "max_evaluations":
        expected.pop()  # dcsrch judges the last trial only on its way to the next
    if result.reason in ("interval_too_small", "no_progress"):
        # dcsrch evaluates the best point once more before it says that it gives up.
        assert any(expected[-1] == pytest.approx(s, rel=1e-10, abs=0.0) for s in (0.0, *steps))
        expected.pop()
    assert steps == pytest.approx(expected, rel=1e-10, abs=0.0)
    assert (result.reason == "wolfe") == (task == b"CONVERGENCE")
    return result


# The test functions of Moré and Thuente (1994), Section 5.


def function_1(t, beta=2.0):
    return -t / (t * t + beta), (t * t - beta) / (t * t + beta) ** 2


def function_2(t, beta=0.004):
    s = t + beta
    return s**5 - 2 * s**4, 5 * s**4 - 8 * s**3


def function_3(t, beta=0.01, waves=39):
    if t <= 1 - beta:
        value, slope = 1 - t, -1.0
    elif t >= 1 + beta:
        value, slope = t - 1, 1.0
    else:
        value, slope = (t - 1) ** 2 / (2 * beta) + beta / 2, (t - 1) / beta
    angle = waves * math.pi / 2
    value += 2 * (1 - beta) / (waves * math.pi) * math.sin(angle * t)
    return value, slope + (1 - beta) * math.cos(angle * t)


def yanai(beta_1, beta_2):
    g1, g2 = (math.sqrt(1 + beta * beta) - beta for beta in (beta_1, beta_2))

    def phi(t):
        left, right = math.hypot(1 - t, beta_2), math.hypot(t, beta_1)
        return g1 * left + g2 * right, -g1 * (1 - t) / left + g2 * t / right

    return phi


# The searches need c1 < c2, where the paper has mu = eta in all tables but the first.
BELOW = math.nextafter(0.001, 0.0)
BELOW_TENTH = math.nextafter(0.1, 0.0)
# Function, mu, eta, and for the starting steps 1e-3, 1e-1, 1e1, 1e3: evaluations, final step.
PAPER_TABLES = {
    "I": (function_1, 0.001, 0.1, [(6, 1.4), (3, 1.4), (1, 10.0), (4, 37.0)]),
    "II": (function_2, BELOW_TENTH, 0.1, [(12, 1.6), (8, 1.6), (8, 1.6), (11, 1.6)]),
    "III": (function_3, BELOW_TENTH, 0.1, [(12, 1.0), (12, 1.0), (10, 1.0), (13, 1.0)]),
    "IV": (yanai(1e-3, 1e-3), BELOW, 0.001, [(4, 0.08), (1, 0.1), (3, 0.35), (4, 0.83)]),
    "V": (yanai(1e-2, 1e-3), BELOW, 0.001, [(6, 0.075), (3, 0.078), (7, 0.073), (8, 0.076)]),
    "VI": (yanai(1e-3, 1e-2), BELOW, 0.001, [(13, 0.93), (11, 0.93), (8, 0.92), (11, 0.92)]),
}


@pytest.mark.parametrize("table", PAPER_TABLES)
@pytest.mark.parametrize("start", range(4))
def test_tables_of_more_and_thuente(table, start):
    phi, mu, eta, rows = PAPER_TABLES[table]
    evaluations, final = rows[start]
    result = assert_same_trials(phi, (1e-3, 1e-1, 1e1, 1e3)[start], make(c1=mu, c2=eta))
    assert result.reason == "wolfe"
    assert result.evaluations == evaluations
    # At most two digits are printed (0.08 for 0.085 in Table IV).
    assert result.step == pytest.approx(final, rel=0.07)


def quartic(a, b, c, d):
    return lambda t: (
        -a * t + b * t * t + c * t**3 + d * t**4,
        -a + 2 * b * t + 3 * c * t * t + 4 * d * t**3,
    )


def wave(a, b, c, d):
    return lambda t: (
        a * math.sin(d * t + b) + c * t + 0.01 * t * t,
        a * d * math.cos(d * t + b) + c + 0.02 * t,
    )


def exponentials(a, b, c, d):
    # The rising one is cut off (as a constant) before it overflows.
    def phi(t):
        up, down = math.exp(min(a * t, 300.0)), math.exp(-abs(b) * t)
        return d * down + up - c * t, -abs(b) * d * down + (a * up if a * t < 300 else 0.0) - c

    return phi


positive = st.floats(0.01, 10.0)
any_sign = st.floats(-5.0, 5.0)
functions = st.builds(
    lambda family, *numbers: family(*numbers),
    st.sampled_from((quartic, wave, exponentials)),
    positive,
    any_sign,
    any_sign,
    positive,
)


@given(
    phi=functions,
    log_t0=st.floats(-4.0, 3.0),
    log_c1=st.floats(-5.0, -1.1),
    c2=st.floats(0.1, 0.95),
    log_xtol=st.floats(-12.0, -1.0),
    log_step_max=st.floats(0.0, 5.0),
)
@settings(derandomize=True, deadline=None, database=None, max_examples=600)
def test_trials_equal_those_of_scipy(phi, log_t0, log_c1, c2, log_xtol, log_step_max):
    assume(phi(0.0)[1] < -1e-3)
    search = make(
        c1=10**log_c1,
        c2=c2,
        xtol=10**log_xtol,
        step_min=1e-12,
        step_max=10**log_step_max,
        max_evaluations=40,
    )
    assert_same_trials(phi, min(10**log_t0, 10**log_step_max), search)


def test_trials_equal_those_of_scipy_for_any_answers():
    """Answers that belong to no function, so that every turn of the algorithm is taken."""
    rng = random.Random(0)
    reasons = set()
    for _ in range(1000):
        told = {"0": (0.0, -1.0)}

        def phi(t, told=told):
            key = f"{t:.8g}"  # the same answers for steps that differ by rounding
            if key not in told:
                told[key] = rng.uniform(-2.0, 2.0), rng.uniform(-2.0, 2.0)
            return told[key]

        c1 = rng.uniform(0.0, 0.6)
        search = make(c1=c1, c2=c1 + 1e-3, max_evaluations=12, xtol=0.01)
        reasons.add(assert_same_trials(phi, rng.uniform(0.1, 10.0), search).reason)
    assert reasons >= {"wolfe", "interval_too_small", "max_evaluations"}


@pytest.mark.parametrize(
    ("phi", "t0", "options", "reason"),
    [
        (lambda t: (-t, -1.0), 1.0, {"step_max": 100.0}, "max_step"),
        (lambda t: (1.0 if t else 0.0, -1.0), 1.0, {"step_min": 1e-3}, "min_step"),
        (lambda t: (t * t - 1e-3 * t, 2 * t - 1e-3), 1.0, {"c2": 0.01, "xtol": 0.9}, "wolfe"),
        (lambda t: (abs(t - 0.3), -1.0 if t < 0.3 else 1.0), 1.0, {}, "interval_too_small"),
        (lambda t: (abs(t - 0.3), -1.0 if t < 0.3 else 1.0), 1.0, {"xtol": 0.0}, "no_progress"),
    ],
)
def test_ends_without_curvature_equal_those_of_scipy(phi, t0, options, reason):
    result = assert_same_trials(phi, t0, make(max_evaluations=200, **options))
    assert result.reason == reason
    assert result.success == (reason != "min_step")
