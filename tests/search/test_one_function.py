"""Whether the closure is one function: told by starts that are not where the last step ended."""

from __future__ import annotations

import math

import pytest

from fuse_ext.search.noise import FLOOR_EVALUATIONS, Precision
from fuse_ext.search.one_function import MOST_OTHERS, OneFunction, Values, agree

HERE = Values(2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (HERE, True),
        (HERE._replace(loss=2.0 + 1e-7), True),
        (HERE._replace(loss=2.0 + 1e-5), False),
        (HERE._replace(square=1.005), True),
        (HERE._replace(square=1.1), False),
        (HERE._replace(abs_sum=3.2), False),
        (HERE._replace(loss=math.nan), False),
    ],
    ids=str,
)
def test_what_agrees(other: Values, same: bool) -> None:
    assert agree(HERE, other) is agree(other, HERE) is same


def test_a_constant_hides_the_loss_but_not_the_gradient() -> None:
    assert not agree(Values(1e6 + 0.5, 1.0, 3.0), Values(1e6 + 0.1, 0.7, 2.0))


def test_gradients_that_are_rounding_tell_nothing() -> None:
    a, b = Values(2.0, 1e-12, 1e-6), Values(2.0, 3e-12, 2e-6)
    assert not agree(a, b)
    assert agree(a, b, largest_square=1.0)


def starts(pattern: str) -> OneFunction:
    """Steps that begin where the last one has ended ("s") or elsewhere ("o")."""
    function = OneFunction({})
    function.end_step(HERE)
    for kind in pattern:
        function.begin_step()
        values = HERE if kind == "s" else HERE._replace(loss=5.0)
        assert function.meet(values, (), 0.0) is (kind == "s")
        function.end_step(HERE)
    return function


def test_batches_contradict_and_new_points_do_not() -> None:
    assert starts("s").known and not starts("").known
    assert not starts("so").known
    assert starts("ooo").contradicted
    assert starts("so" * 8).contradicted  # every batch twice
    assert not starts(("o" + 20 * "s") * 9).contradicted
    assert starts("so" + 30 * "s").known
    assert MOST_OTHERS > 1.0  # one start alone is no proof


def test_what_a_step_told_counts_once_it_is_completed() -> None:
    function = starts("s")
    for _ in range(9):  # a step that raises every time
        function.begin_step()
        assert not function.meet(HERE._replace(loss=5.0), (), 0.0)
    assert not function.contradicted
    function.begin_step()
    assert function.known


def test_other_parameters_are_another_function_but_no_batch() -> None:
    function = starts("s")
    for _ in range(5):
        function.begin_step()
        assert function.meet(HERE, (1,), 0.0) is False
        function.end_step(HERE)
    assert not function.contradicted


# --- the floor ---------------------------------------------------------------------------------


def visit(precision: Precision, loss: float, square: float, evaluations: int = 1) -> bool:
    for _ in range(evaluations):
        precision.spend()
    floor = precision.at_floor(loss, square)
    precision.end_step(loss)
    return floor


def test_the_floor_is_reached_after_as_long_as_it_took() -> None:
    precision = Precision({}, 1e-7)
    loss = 1.0
    for _ in range(60):
        loss *= 0.9
        assert not visit(precision, loss, 1.0)
    waited = 0
    while not visit(precision, loss, 1.0):
        waited += 1
    assert 58 <= waited <= 60


def test_the_wait_has_limits() -> None:
    low, high = FLOOR_EVALUATIONS
    for steps, expected in ((3, low), (1000, high)):
        precision = Precision({}, 1e-16)
        for k in range(steps):
            visit(precision, 1.0 / (k + 1), 1.0)
        waited = 1
        while not visit(precision, 1.0 / steps, 1.0):
            waited += 1
        assert waited == expected


def test_a_gradient_that_goes_on_falling_is_no_floor() -> None:
    precision = Precision({}, 1e-7)
    assert not any(visit(precision, 1.0, 0.8**k) for k in range(500))
    # Nor is a slow valley, whose loss falls by less than a rounding a step.
    precision = Precision({}, 1e-7)
    assert not any(visit(precision, 1.0 - 2e-8 * k, 1.0) for k in range(500))


def test_records_of_noise_are_no_fall() -> None:
    """The least of many noisy values goes on falling, ever more slowly."""
    precision = Precision({}, 1e-7)
    steps = 0
    while not visit(precision, 1.0 + 1e-8 * math.sin(steps), 1.0 + 0.5 * math.cos(steps)):
        steps += 1
        assert steps < 50


def test_more_noise_is_believed_where_trials_show_it() -> None:
    precision = Precision({}, 1e-7)
    assert not precision.learn(5e-3, shown=False)
    assert precision.learn(5e-3, shown=True)
    assert precision.noise == 1e-2  # no more than it must be
    assert precision.noise_at_a_point == 1e-3
    assert not precision.learn(0.2, shown=True)
    visit(precision, 1.0, 1.0)
    assert precision.is_low(1.01) and not precision.is_low(1.03)


def test_sums_of_squares_without_digits() -> None:
    precision = Precision({}, 2.2e-16)
    precision.begin(10.0)
    assert precision.without_digits(4.7e-32) and precision.without_digits(0.0)
    assert not precision.without_digits(1e-20)
    assert not Precision({}, 2.2e-16).without_digits(0.0)  # where nothing was ever lost
