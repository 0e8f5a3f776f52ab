"""Line searches: conditions, walls, noise, an adversary; test_more_thuente.py has the oracles."""

import copy
import math
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_ext.search import make_line_search
from fuse_ext.search.line_search import LineSearch, LineSearchResult

Phi = Callable[[float], tuple[float, float]]  # t -> phi(t), phi'(t)
Trial = tuple[float, float, float]  # t, phi(t), phi'(t)

SEARCHES = ("armijo", "strong_wolfe", "approximate_wolfe")
WOLFE = ("strong_wolfe", "approximate_wolfe")
deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=300)


def make(name: str, **options) -> LineSearch:
    search = make_line_search(name, **options)
    assert search is not None
    return search


def drive(search: LineSearch, phi: Phi, t0: float) -> tuple[list[Trial], LineSearchResult]:
    """Run a search as a step does, holding one saved point besides the current one."""
    f0, slope0 = phi(0.0)
    trials: list[Trial] = []
    saved: Trial = (0.0, f0, slope0)
    step: float | None = search.start(f0, slope0, t0)
    while step is not None:
        trials.append((step, *phi(step)))
        step = search.tell(*trials[-1][1:])
        if search.best_changed:
            assert step is not None
            saved = trials[-1]
    result = search.result
    assert result.evaluations == len(trials) <= search.options.max_evaluations
    accepted = trials[-1] if result.is_last else saved
    assert accepted == (result.step, result.loss, result.slope)
    assert result.success == (result.step > 0.0)
    assert all(search.options.step_min <= t[0] <= search.options.step_max for t in trials)
    return trials, result


@given(
    name=st.sampled_from(SEARCHES),
    log_t0=st.floats(-4.0, 3.0),
    slope0=st.floats(-10.0, -0.01),
    bend=st.floats(-5.0, 5.0),
    height=st.floats(0.0, 5.0),
    frequency=st.floats(0.01, 30.0),
)
@deterministic
def test_accepted_steps_satisfy_what_the_reason_says(name, log_t0, slope0, bend, height, frequency):
    def phi(t):
        angle = frequency * t
        value = slope0 * t + bend * t * t + t**4 - height * math.cos(angle)
        return value, slope0 + 2 * bend * t + 4 * t**3 + height * frequency * math.sin(angle)

    f0 = phi(0.0)[0]
    search = make(name)
    trials, result = drive(search, phi, 10**log_t0)
    c1, c2 = search.options.c1, search.options.c2
    armijo = [t for t in trials if t[1] <= f0 + c1 * t[0] * slope0]
    if result.reason in ("wolfe", "armijo"):
        assert result.is_last
        assert armijo == [trials[-1]] if name == "armijo" else trials[-1] in armijo
        assert name == "armijo" or abs(result.slope) <= c2 * abs(slope0)
    elif result.reason == "approximate_wolfe":
        assert (2 * c1 - 1) * slope0 >= result.slope >= c2 * slope0
        assert abs(result.loss - f0) <= 1e-6 * abs(f0)
    elif armijo:
        assert result.success
        assert result.loss == min(t[1] for t in armijo)


# What is not finite.

BAD = (
    (math.nan, 1.0),
    (math.inf, math.nan),
    (-math.inf, -1.0),
    (-1.0, math.nan),
    (-1.0, math.inf),
    (-1.0, -math.inf),
)


def walled(phi: Phi, is_bad: Callable[[float], bool], bad: tuple[float, float]) -> Phi:
    return lambda t: bad if is_bad(t) else phi(t)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("minimum", [1e-3, 0.1, 0.5, 0.9, 1.5, 1e3])
def test_wall_above(name, bad, minimum):
    """Everything from the wall on is not finite; the minimum is before or beyond it."""
    for exponent in np.arange(-8.0, -0.3, 0.37):
        wall = 10.0**exponent
        m = minimum * wall
        search = make(name)
        phi = walled(lambda t, m=m: ((t / m - 1) ** 2, 2 * (t / m - 1) / m), wall.__le__, bad)
        trials, result = drive(search, phi, 1.0)
        assert result.success
        assert result.step < wall
        assert result.loss < phi(0.0)[0]
        if minimum < 2 or name == "armijo":
            assert result.reason in ("armijo", "wolfe", "approximate_wolfe")
        else:  # phi falls all the way to the wall: the Wolfe searches stop close before it
            assert result.reason == "interval_too_small"
            assert result.step >= 0.9 * min(t[0] for t in trials if t[0] >= wall)
        bound = math.inf
        for step, *_ in trials:
            assert step < bound
            bound = step if step >= wall else bound


@pytest.mark.parametrize("name", WOLFE)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("t0", [1e-3, 0.2, 1.0, 50.0])
def test_hole(name, bad, t0):
    """Trials in an interval between finite points are not finite, at either end of the bracket."""
    for low, high in ((0.05, 0.2), (0.3, 0.6), (0.9, 1.1), (1.5, 3.0), (1.5, math.inf)):
        for minimum in (0.01, 0.4, 1.0, 2.0):
            phi = walled(
                lambda t, m=minimum: ((t - m) ** 2, 2 * (t - m)),
                lambda t, low=low, high=high: low <= t < high,
                bad,
            )
            _, result = drive(make(name), phi, t0)
            assert result.success
            assert not low <= result.step < high
            assert result.loss < minimum**2


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("bad", BAD)
def test_nothing_finite(name, bad):
    search = make(name)
    assert drive(search, lambda t: (-t, t - 1.0), 1.0)[1].success
    trials, result = drive(search, walled(lambda t: (1.0, -1.0), bool, bad), 1.0)
    assert result == LineSearchResult(0.0, 1.0, -1.0, False, "non_finite", len(trials), False)
    assert [t[0] for t in trials] == pytest.approx([10.0**-k for k in range(len(trials))])
    assert trials[-1][0] < 1e-18


@pytest.mark.parametrize("name", WOLFE)
def test_trials_between_a_wall_and_the_best_point(name):
    search = make(name)
    assert search.start(0.0, -1.0, 1.0) == 1.0
    assert search.tell(math.nan, -1.0) == pytest.approx(0.1)  # a tenth of the way to 1
    assert search.tell(-0.1, -1.0) == pytest.approx(0.55)  # half-way: no cubic with that wall
    assert search.tell(math.inf, -1.0) == pytest.approx(0.145)  # a tenth of the way to 0.55
    assert search.tell(-0.145, -1.0) == pytest.approx(0.3475)
    assert search.tell(-0.3475, -1.0) == pytest.approx(0.44875)
    assert search.tell(-0.44875, -1.0) == pytest.approx(0.499375)
    assert search.tell(-0.499375, -1.0) is None  # 0.55 is close enough
    assert search.result.reason == "interval_too_small"


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("t0", [1e-3, 1.0, 1e3])
def test_logarithm_next_to_its_pole(name, t0):
    """pytorch#5953: 10 sum a (x - log x), NaN for x < 0, by steepest descent from 3 to 1."""
    a = np.array([1.0, 5.0, 25.0, 125.0])
    x = np.full(4, 3.0)
    search = make(name)
    for _ in range(1000):
        g = 10 * a * (1 - 1 / x)
        if np.linalg.norm(g) < 1e-5:
            break

        def phi(t, x=x, g=g):
            y = x - t * g
            if (y <= 0).any():
                return math.nan, math.nan
            return 10 * float(a @ (y - np.log(y))), -10 * float((a * (1 - 1 / y)) @ g)

        _, result = drive(search, phi, t0)
        assert result.success
        x = x - result.step * g
        assert ((x > 0) & (x < 4)).all()
    assert x == pytest.approx(np.ones(4), abs=1e-3)


# Armijo by hand.


def test_armijo_interpolates_first_by_a_quadratic_then_by_a_cubic():
    search = make("armijo")
    assert search.start(1.0, -1.0, 1.0) == 1.0
    # f0 - t + b t^2 with value 3 at 1 has b = 3 and its minimum at 1 / 6.
    second = search.tell(3.0)
    assert second == pytest.approx(1 / 6)
    # b + a t is 3 at 1 and `curvature` at 1/6; the minimum solves -1 + 2 b t + 3 a t^2 = 0.
    value = 1.1
    curvature = (value - 1.0 + second) / second**2
    a = (3.0 - curvature) / (1.0 - second)
    b = 3.0 - a
    root = min(r.real for r in np.roots([3 * a, 2 * b, -1.0]) if r.real > 0 and r.imag == 0)
    third = search.tell(value)
    assert third == pytest.approx(min(max(root, 0.1 * second), 0.5 * second))
    assert search.tell(0.5) is None
    assert search.result.reason == "armijo"
    assert math.isnan(search.result.slope)


def test_armijo_halves_where_the_cubic_has_no_minimum():
    def phi(t):
        return -t + 0.8 * t**2 - t**3

    search = make("armijo", c1=0.9, c2=0.95)
    assert search.start(0.0, -1.0, 0.6) == 0.6
    assert search.tell(phi(0.6)) == pytest.approx(0.3)
    assert search.tell(phi(0.3)) == pytest.approx(0.15)


@given(told=st.lists(st.floats(-1e-12, 1e3) | st.sampled_from((math.nan, math.inf, -math.inf))))
@deterministic
def test_armijo_keeps_each_step_within_a_tenth_and_a_half_of_the_last(told):
    search = make("armijo", max_evaluations=100, step_min=1e-300)
    step = search.start(0.0, -1.0, 1.0)
    for f in told:
        last, step = step, search.tell(f)
        if step is None:
            return
        if not math.isfinite(f):
            assert step == 0.1 * last
        assert 0.1 * last <= step <= 0.5 * last


# The floor of the loss's precision.


def noisy_float32(phi: Phi, rng: random.Random) -> Phi:
    def rounded(t):
        value, slope = phi(t)
        return float(np.float32(value * (1 + rng.uniform(-1e-7, 1e-7)))), slope

    return rounded


def test_approximate_wolfe_at_the_float32_floor():
    """phi falls by less than the noise in it; only slopes tell where the minimum is."""
    rng = random.Random(0)
    failures = dict.fromkeys(WOLFE, 0)
    for _ in range(500):
        depth, minimum = 10 ** rng.uniform(-11, -7.5), 10 ** rng.uniform(-0.8, 1.5)

        def phi(t, depth=depth, m=minimum):
            return 2.5 + depth * ((t / m - 1) ** 2 - 1), 2 * depth * (t / m - 1) / m

        for name in WOLFE:
            _, result = drive(make(name), noisy_float32(phi, rng), 1.0)
            slope0 = phi(0.0)[1]
            good = (2e-4 - 1) * slope0 >= result.slope >= 0.9 * slope0
            failures[name] += not (result.success and good)
            if name == "approximate_wolfe":
                assert good
                assert result.evaluations <= 4
                assert result.reason in ("wolfe", "approximate_wolfe")
    assert failures["approximate_wolfe"] == 0
    assert failures["strong_wolfe"] > 50


def test_approximate_wolfe_is_strong_wolfe_above_the_floor():
    def phi(t):
        return -t / (t * t + 2), (t * t - 2) / (t * t + 2) ** 2

    strong, approximate = (drive(make(name, c2=0.1), phi, 1e3) for name in WOLFE)
    assert strong == approximate
    assert strong[1].evaluations == 3  # the first is flat, but has hardly come down


def test_noise_does_not_hide_a_rise():
    """A trial above f0 by more than the noise is refused whatever its slope."""
    search = make("approximate_wolfe", loss_eps=1e-6)
    search.start(1.0, -1e-9, 1.0)
    assert search.tell(1.0 + 2e-6, 0.0) is not None
    search.start(1.0, -1e-9, 1.0)
    assert search.tell(1.0 + 0.5e-6, 0.0) is None
    assert search.result.reason == "approximate_wolfe"
    search.start(1.0, -1e-9, 1.0)
    assert search.tell(1.0 - 1e-6, 0.0) is None
    assert search.result.reason == "wolfe"


@pytest.mark.parametrize("name", ["armijo", "strong_wolfe"])
def test_search_gives_up_below_the_noise(name):
    def phi(t):
        return (1.0 + 1e-7 if t else 1.0), -1e-9

    _, result = drive(make(name, loss_eps=6e-8), phi, 1.0)
    assert result == LineSearchResult(0.0, 1.0, -1e-9, False, "no_progress", 1, False)
    assert drive(make(name), phi, 1.0)[1].evaluations > 3


# Any answers at all.

answers = st.lists(
    st.tuples(st.floats(allow_subnormal=True), st.floats(allow_subnormal=True)), min_size=1
)
tame_answers = st.lists(
    st.tuples(st.floats(-2, 2) | st.sampled_from((math.nan, math.inf)), st.floats(-2, 2)),
    min_size=1,
)
# Many ties, zeros, and slopes equal to c1 slope0.
coarse = st.sampled_from((-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0))
coarse_answers = st.lists(st.tuples(coarse, coarse), min_size=1)


@given(
    name=st.sampled_from(SEARCHES),
    told=answers | tame_answers | coarse_answers,
    f0=coarse | st.floats(allow_nan=False, allow_infinity=False),
    slope0=st.just(-1.0) | st.floats(max_value=-0.0, exclude_max=True, allow_infinity=False),
    t0=st.just(1.0) | st.floats(min_value=0.0, exclude_min=True, allow_infinity=False),
    c1=st.sampled_from((1e-4, 0.25, 0.49)),
    c2=st.sampled_from((0.5, 0.9)),
    bounds=st.sampled_from(((5e-324, 1e20), (1e-3, 1e3), (1, 2), (1e-20, 1e300))),
    budget=st.integers(1, 40),
)
@settings(deterministic, max_examples=1000)
def test_adversary(name, told, f0, slope0, t0, c1, c2, bounds, budget):
    """Whatever a search is told, it ends, stays in its bounds, and remembers its best point."""
    options = {"c1": c1, "c2": c2, "max_evaluations": budget}
    options |= {"step_min": bounds[0], "step_max": bounds[1]}

    def answer():
        stream = iter(told * budget)
        return lambda t: next(stream) if t > 0.0 else (f0, slope0)

    search = make(name, **options)
    trials, result = drive(search, answer(), t0)
    again = drive(search, answer(), t0)  # the object can be used again
    fresh = drive(make(name, **options), answer(), t0)
    assert repr((trials, result)) == repr(again) == repr(fresh)

    finite = [t for t in trials if math.isfinite(t[1]) and math.isfinite(t[2])]
    if result.success:
        assert (result.step, result.loss, result.slope) in finite
    else:
        assert (result.step, result.loss, result.slope) == (0.0, f0, slope0)
    assert (result.reason == "non_finite") == (not finite)
    for i, trial in enumerate(trials):
        if trial not in finite and i + 1 < len(trials):
            ends = [0.0, *(t[0] for t in finite)]
            retreats = (max(x + 0.1 * (trial[0] - x), bounds[0]) for x in ends)
            assert any(math.isclose(trials[i + 1][0], step) for step in retreats)
        if trial not in finite and all(t[0] < trial[0] for t in trials[:i] if t in finite):
            assert all(t[0] < trial[0] for t in trials[i + 1 :])
    if name == "strong_wolfe" and result.reason != "wolfe":
        decreasing = [t for t in finite if t[1] <= f0 + t[0] * (c1 * slope0)]
        assert result.success == bool(decreasing)
        assert not decreasing or result.loss == min(t[1] for t in decreasing)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("budget", [1, 2, 4])
def test_budget(name, budget):
    phi = walled(lambda t: (1.0, -1.0), bool, (2.0, 1.0))
    _, result = drive(make(name, max_evaluations=budget), phi, 1.0)
    assert result == LineSearchResult(0.0, 1.0, -1.0, False, "max_evaluations", budget, False)


def test_best_point_before_the_last_is_returned():
    search = make("strong_wolfe", c2=0.1, max_evaluations=2)
    assert search.start(1.0, -1.0, 1.0) == 1.0
    step = search.tell(0.5, -0.9)
    assert search.best_changed
    assert step == 5.0
    assert search.tell(3.0, 1.0) is None
    assert not search.best_changed
    assert search.result == LineSearchResult(1.0, 0.5, -0.9, True, "max_evaluations", 2, False)


# Arguments and the protocol.


def test_names():
    assert make_line_search(None) is None
    assert make_line_search("fixed") is None
    assert [make(name).name for name in SEARCHES] == list(SEARCHES)
    assert [make(name).needs_gradient for name in SEARCHES] == [False, True, True]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "wolfe",
            {},
            "line_search must be None or one of 'fixed', 'armijo', 'strong_wolfe', "
            "'approximate_wolfe', got 'wolfe'",
        ),
        ("armijo", {"c1": 0.0}, "0 < c1 < c2 < 1, got c1=0.0, c2=0.9"),
        ("strong_wolfe", {"c1": 0.5, "c2": 0.5}, "0 < c1 < c2 < 1, got c1=0.5, c2=0.5"),
        ("strong_wolfe", {"c2": 1.0}, "0 < c1 < c2 < 1, got c1=0.0001, c2=1.0"),
        (None, {"c2": math.nan}, "0 < c1 < c2 < 1, got c1=0.0001, c2=nan"),
        ("approximate_wolfe", {"c1": 0.5}, "c1 must be below 0.5 for approximate_wolfe, got 0.5"),
        ("armijo", {"max_evaluations": 0}, "max_evaluations must be an integer >= 1, got 0"),
        ("fixed", {"max_evaluations": 2.5}, "max_evaluations must be an integer >= 1, got 2.5"),
        ("armijo", {"step_min": 0.0}, "step_min=0.0, step_max=1e+150"),
        ("armijo", {"step_max": 1e-150}, "step_min=1e-150, step_max=1e-150"),
        ("strong_wolfe", {"step_max": math.inf}, "step_min=1e-150, step_max=inf"),
        ("strong_wolfe", {"xtol": 1.0}, r"xtol must be in \[0, 1\), got 1.0"),
        ("armijo", {"loss_eps": -1e-9}, r"loss_eps must be None or in \[0, 1\), got -1e-09"),
    ],
)
def test_bad_options(name, options, message):
    pattern = message.replace("+", r"\+")
    with pytest.raises(ValueError, match=pattern):
        make_line_search(name, **options)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((math.nan, -1.0, 1.0), "f0 must be finite, got nan"),
        ((-math.inf, -1.0, 1.0), "f0 must be finite, got -inf"),
        ((1.0, 0.0, 1.0), r"slope0 must be finite and negative \(a descent direction\), got 0.0"),
        ((1.0, 2.0, 1.0), "slope0 must be .* got 2.0"),
        ((1.0, math.nan, 1.0), "slope0 must be .* got nan"),
        ((1.0, -math.inf, 1.0), "slope0 must be .* got -inf"),
        ((1.0, -1.0, 0.0), "t0 must be finite and positive, got 0.0"),
        ((1.0, -1.0, math.inf), "t0 must be finite and positive, got inf"),
        ((1.0, -1.0, math.nan), "t0 must be finite and positive, got nan"),
    ],
)
def test_bad_start_leaves_a_search_as_it_was(name, arguments, message):
    search = make(name)
    search.start(1.0, -1.0, 1.0)
    before = copy.deepcopy(search)
    with pytest.raises(ValueError, match=message):
        search.start(*arguments)
    assert search.tell(2.0, -1.0) == before.tell(2.0, -1.0)


@pytest.mark.parametrize("name", SEARCHES)
def test_protocol(name):
    search = make(name)
    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        search.tell(0.0, 0.0)
    search.start(1.0, -1.0, 1.0)
    with pytest.raises(RuntimeError, match="result is known only once"):
        _ = search.result
    if search.needs_gradient:
        with pytest.raises(TypeError, match=f"slope must be given at every trial of {name}"):
            search.tell(0.5)
    assert search.tell(0.5, 0.0) is None
    assert search.result.evaluations == 1
    with pytest.raises(RuntimeError, match=r"call start\(\) first"):
        search.tell(0.0, 0.0)


@pytest.mark.parametrize("name", SEARCHES)
def test_pickle_in_the_middle_of_a_search(name):
    search = make(name)
    search.start(1.0, -1.0, 1.0)
    search.tell(3.0, 2.0)
    twin = pickle.loads(pickle.dumps(search))
    assert twin.tell(2.0, 1.0) == search.tell(2.0, 1.0)


@pytest.mark.parametrize("t0", [1e-30, 1e-3, 1.0, 1e30])
def test_first_step_is_clipped(t0):
    assert make("armijo", step_min=1e-2, step_max=1.0).start(0.0, -1.0, t0) == min(max(t0, 1e-2), 1)
