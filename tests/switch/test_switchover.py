"""Switchover criteria: against brute force, composed, saved, misused (LossPlateau: next door)."""

import copy
import io
import itertools
import json
import math
import pickle
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_ext.switch.criterion import All, Any, Observation, Switchover
from fuse_ext.switch.eq3_eq4 import GradNorm, LossChange
from fuse_ext.switch.known_optimum import LossGap, NearSolution
from fuse_ext.switch.plateau import LossPlateau
from fuse_ext.switch.steps import AfterEpochs, AfterSteps, AtOnce, Never, WarmUp
from fuse_ext.switch.when import When, as_switchover

deterministic = settings(derandomize=True, deadline=None, database=None, max_examples=100)
NON_FINITE = (math.nan, math.inf, -math.inf, 1e300)  # 1e300: sums of such overflow
windows = st.integers(1, 6)
losses = st.lists(
    st.one_of(
        st.floats(-10, 10),
        st.sampled_from([0.0, 1e-300, 1e16, -1e16, 1.0, 1.5]),
        st.sampled_from(NON_FINITE),
    ),
    max_size=40,
)


def observation(step: int, value: float | None = None, params=(), epoch: int = 0) -> Observation:
    """An Adam step whose loss is ``value`` and whose squared gradient norm is its size."""
    return Observation(step, epoch, value, None if value is None else abs(value), params)


def decisions(switch: Switchover, values: Sequence[float | None], first: int = 1) -> list[str]:
    """The reasons given after each step, "" for no switch."""
    reasons = []
    for step, value in enumerate(values, first):
        assert switch.observe(observation(step, value)) == (switch.reason != "")
        reasons.append(switch.reason)
    return reasons


def usable(values: Sequence[float]) -> list[float]:
    return [value for value in values if abs(value) <= 1e290]


def below(numbers: Sequence[float], bound: float, window: int | None) -> bool:
    recent = numbers if window is None else numbers[-window:]
    if len(recent) < (window or 1):
        return False
    return math.fsum(recent) / len(recent) <= bound


# Each criterion against brute force.


@deterministic
@given(losses, st.floats(0, 20), st.none() | windows)
def test_grad_norm_is_the_mean_of_eq_3(values, zeta, window):
    expected = [
        below([abs(v) for v in usable(values[: k + 1])], zeta, window) for k in range(len(values))
    ]
    assert [r != "" for r in decisions(GradNorm(zeta, window), values)] == expected


@deterministic
@given(losses, st.floats(0, 20), windows)
def test_loss_change_is_the_mean_of_eq_4(values, sigma, window):
    expected = []
    for k in range(len(values)):
        seen = usable(values[: k + 1])
        changes = [abs(b - a) for a, b in itertools.pairwise(seen)]
        expected.append(below(changes, sigma, window))
    assert [r != "" for r in decisions(LossChange(sigma, window), values)] == expected


@deterministic
@given(losses, st.floats(-5, 5), st.floats(0, 10), windows)
def test_loss_gap_is_the_mean_loss_above_the_least(values, f_star, sigma, window):
    expected = []
    for k in range(len(values)):
        recent = usable(values[: k + 1])[-window:]
        expected.append(len(recent) == window and math.fsum(recent) / window - f_star <= sigma)
    assert [r != "" for r in decisions(LossGap(f_star, sigma, window), values)] == expected


def test_a_number_leaves_the_window_without_a_trace():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(3000) * 10.0 ** rng.integers(-30, 30, 3000)
    criterion = LossGap(0.0, 0.0, window=7)
    for step, value in enumerate(values.tolist(), 1):
        criterion.observe(observation(step, value))
        mean = math.fsum(values[max(0, step - 7) : step].tolist()) / min(step, 7)
        assert criterion._mean.value == mean


@pytest.mark.parametrize("n", [0, 1, 5])
def test_after_steps_and_epochs(n):
    steps = AfterSteps(n)
    assert [steps.observe(observation(k)) for k in range(1, 8)] == [k >= n for k in range(1, 8)]
    counted = AfterEpochs(n, steps_per_epoch=3)
    assert [counted.observe(observation(k)) for k in range(1, 20)] == [
        k >= 3 * n for k in range(1, 20)
    ]
    told = AfterEpochs(n)
    assert [told.observe(observation(1, epoch=e)) for e in range(8)] == [e >= n for e in range(8)]
    assert steps.at_once == counted.at_once == told.at_once == (n == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_near_solution_takes_the_norm_in_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (), (0,), (4,)]
    params = [torch.randn(s, dtype=dtype, generator=generator) for s in shapes]
    params[0] = params[0].t().contiguous().t().requires_grad_()
    x_star = [torch.randn(s, dtype=dtype, generator=generator) for s in shapes]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    flat = [torch.cat([t.detach().to(wide).flatten() for t in ts]) for ts in (params, x_star)]
    distance = float(np.linalg.norm((flat[0] - flat[1]).numpy()))
    obs = observation(1, params=params)
    assert NearSolution(x_star, distance * (1 + 1e-12)).observe(obs)
    assert not NearSolution(x_star, distance * (1 - 1e-12)).observe(obs)


def test_near_solution_copies_x_star_and_is_false_at_nan():
    x_star = torch.zeros(2)
    criterion = NearSolution(x_star, 0.5)
    x_star.fill_(9.0)
    assert criterion.observe(observation(1, params=[torch.zeros(2)]))
    assert not criterion.observe(observation(2, params=[torch.full((2,), math.nan)]))


def test_never_and_at_once():
    assert decisions(Never(), [1.0, 0.0]) == ["", ""]
    assert AtOnce().at_once and AtOnce().reason == "at once, before the first Adam step"
    assert AtOnce().observe(observation(1))


def test_when_calls_the_function():
    seen: list[Observation] = []

    def small(obs: Observation) -> bool:
        seen.append(obs)
        return obs.loss < 1.0

    criterion = When(small)
    assert decisions(criterion, [2.0, 0.5]) == ["", "small(obs) is true at step 2"]
    assert [obs.step for obs in seen] == [1, 2]
    assert criterion.needs_loss and criterion.needs_grad_norm
    assert When(lambda obs: obs.step > 1, False, False).observe(observation(2))
    with pytest.raises(TypeError, match=r"<lambda>\(obs\) must return a bool, got None"):
        When(lambda obs: None).observe(observation(1, 1.0))


# Composition.


def test_members_see_every_observation_and_nothing_latches():
    values = [0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0]
    short, long = (lambda: LossGap(0.0, 1.0, window=2)), (lambda: LossGap(0.0, 1.0, window=3))
    one, two = decisions(short(), values), decisions(long(), values)
    both, either = decisions(short() & long(), values), decisions(short() | long(), values)
    assert [r != "" for r in one] == [False, True, True, False, False, True, True]
    assert [r != "" for r in two] == [False, False, True, False, False, False, True]
    assert both == ["", "", f"{one[2]} and {two[2]}", "", "", "", f"{one[6]} and {two[6]}"]
    assert either == ["", one[1], both[2], "", "", one[5], both[6]]


def test_composition_flattens_and_nests():
    a, b, c, d = AfterSteps(1), Never(), AtOnce(), AfterSteps(4)
    assert (a & b & c).members == (a & (b & c)).members == (a, b, c)
    assert (a | b | c).members == (a | (b | c)).members == (a, b, c)
    mixed = a & b | c & d
    assert type(mixed) is Any and [type(m) for m in mixed.members] == [All, All]
    for bits in itertools.product([False, True], repeat=4):
        p, q, r, s = (AfterSteps(0 if bit else 9) for bit in bits)
        expected = (bits[0] and bits[1]) or (bits[2] and bits[3])
        nested = p & q | r & s
        assert nested.at_once == expected and (nested.reason != "") == expected
        assert nested.observe(observation(1)) == expected
    with pytest.raises(TypeError, match="unsupported operand"):
        a & (lambda obs: True)  # type: ignore[operator]


def test_needs_are_those_of_the_members():
    assert not (AfterSteps(1) & Never()).needs_loss
    assert (AfterSteps(1) & LossPlateau()).needs_loss
    assert (Never() | AfterSteps(1) & GradNorm(1.0)).needs_grad_norm
    assert not (Never() | LossGap(0, 1)).needs_grad_norm


def test_reset_forgets():
    values = np.random.default_rng(0).standard_normal(700).tolist()
    for make in MAKERS.values():
        criterion = make()
        before = decisions(criterion, values)
        criterion.reset()
        assert criterion.reason == ("at once, before the first Adam step" * criterion.at_once)
        assert criterion.state_dict() == make().state_dict()
        assert decisions(criterion, values) == before


# State, copies, text.


def low_loss(obs: Observation) -> bool:
    return obs.loss is not None and obs.loss < -1.0


MAKERS: dict[str, Callable[[], Switchover]] = {
    "never": Never,
    "at_once": AtOnce,
    "steps": lambda: AfterSteps(300),
    "epochs": lambda: AfterEpochs(30, steps_per_epoch=10),
    "grad_norm": lambda: GradNorm(0.79),
    "grad_norm_window": lambda: GradNorm(0.7, window=20),
    "loss_change": lambda: LossChange(1.0, window=30),
    "loss_gap": lambda: LossGap(-0.5, 0.4, window=10),
    "plateau": lambda: LossPlateau(window=60, z=0.5),
    "warm_up": lambda: WarmUp(10),
    "when": lambda: When(low_loss),
    "nested": lambda: (
        (GradNorm(0.8, window=15) & LossPlateau(window=40, patience=1)) | LossChange(0.9, 25)
    ),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("cut", [0, 1, 19, 137, 333, 450])
def test_a_saved_criterion_goes_on_bit_for_bit(name, cut):
    values = np.random.default_rng(0).standard_normal(600).tolist()
    values[::50] = [math.nan] * len(values[::50])
    criterion = MAKERS[name]()
    decisions(criterion, values[:cut])
    state = criterion.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    copies = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    for saved in (json.loads(json.dumps(state)), torch.load(file, weights_only=True)):
        assert saved == state
        copies.append(MAKERS[name]())
        decisions(copies[-1], [0.25] * 7)  # what it saw before is replaced
        copies[-1].load_state_dict(saved)
        assert copies[-1].state_dict() == state
    expected = decisions(criterion, values[cut:], cut + 1)
    for other in copies:
        assert decisions(other, values[cut:], cut + 1) == expected
    assert state == json.loads(json.dumps(state))  # a snapshot, not a view


def test_the_random_run_exercises_both_answers():
    values = np.random.default_rng(0).standard_normal(600).tolist()
    for name in MAKERS.keys() - {"never", "at_once"}:
        answers = {reason != "" for reason in decisions(MAKERS[name](), values)}
        assert answers == {False, True}, name


def test_thresholds_are_not_part_of_the_state():
    loose, tight = GradNorm(10.0, window=2), GradNorm(0.1, window=2)
    decisions(loose, [1.0, 1.0])
    tight.load_state_dict(loose.state_dict())
    assert loose.observe(observation(3, 1.0)) and not tight.observe(observation(3, 1.0))
    assert tight.observe(observation(5, 0.0)) is False
    assert tight.observe(observation(6, 0.0)) is True


SEEN = {"kind": "GradNorm", "window": 3, "count": 1, "values": [4.0]}


@pytest.mark.parametrize(
    ("criterion", "state", "message"),
    [
        (GradNorm(1.0, 3), None, "state of GradNorm: expected a dict, got None"),
        (GradNorm(1.0, 3), {}, "state of GradNorm: kind is None"),
        (LossGap(0, 1), SEEN, "state of LossGap: kind is 'GradNorm'"),
        (GradNorm(1.0), SEEN, "state of GradNorm: window=3, expected None"),
        (GradNorm(1.0, 3), {**SEEN, "zeta": 1}, r"state of GradNorm: unknown fields \['zeta'\]"),
        (
            GradNorm(1.0, 3),
            {"kind": "GradNorm", "window": 3},
            r"state of GradNorm: missing fields \['count', 'values'\]",
        ),
        (GradNorm(1.0, 3), {**SEEN, "count": 2}, "state of GradNorm: count=2, expected 1"),
        (GradNorm(1.0, 3), {**SEEN, "values": [1.0] * 4}, r"values=\[1.0, .*\] is not valid"),
        (GradNorm(1.0, 3), {**SEEN, "values": [math.nan]}, r"values=\[nan\] is not valid"),
        (GradNorm(1.0), {**SEEN, "window": None, "count": -1}, "count=-1 is not valid"),
        (
            LossChange(1.0, 1),
            {"kind": "LossChange", "window": 1, "count": 0, "values": [], "previous": "1"},
            "state of LossChange: previous='1' is not valid",
        ),
        (Never(), {"kind": "Never", "members": []}, r"unknown fields \['members'\]"),
        (When(low_loss), {"kind": "When", "fn": "other"}, "fn='other', expected 'low_loss'"),
        (
            LossPlateau(),
            LossPlateau(window=100).state_dict(),
            "state of LossPlateau: window=100, expected 200",
        ),
        (
            LossPlateau(),
            {**LossPlateau().state_dict(), "streak": True},
            "state of LossPlateau: streak=True is not valid",
        ),
        (
            LossPlateau(),
            {**LossPlateau().state_dict(), "finding": 0},
            "state of LossPlateau: finding=0 is not valid",
        ),
        (
            Never() & AfterSteps(1),
            (Never() & AtOnce() & AfterSteps(1)).state_dict(),
            "state of All: 3 members, this one has 2",
        ),
        (
            Never() & AfterSteps(1) & AtOnce(),
            (Never() & AfterSteps(1)).state_dict(),
            "state of All: 2 members, this one has 3",
        ),
        (
            GradNorm(1.0, 3) | LossGap(0, 1),
            {"kind": "Any", "members": [SEEN, SEEN]},
            "state of LossGap: kind is 'GradNorm'",
        ),
    ],
)
def test_a_wrong_state_is_refused_and_changes_nothing(criterion, state, message):
    decisions(criterion, [0.5, -2.0])
    before, reason = criterion.state_dict(), criterion.reason
    with pytest.raises(ValueError, match=message):
        criterion.load_state_dict(state)
    assert criterion.state_dict() == before and criterion.reason == reason


@pytest.mark.parametrize(
    "criterion",
    [
        *(make() for name, make in MAKERS.items() if name not in ("when", "nested")),
        AfterEpochs(2),
        LossPlateau(window=40, rtol=0.05, z=2.0, patience=3),
        GradNorm(1 / 3) & (LossGap(-1e-300, 0.1, 5) | AfterEpochs(3)) & Never(),
        NearSolution(torch.tensor([0.1, -2.0]), 1e-3),
        NearSolution([torch.eye(2, dtype=torch.float64) / 3, torch.tensor(1j)], 0),
        When(low_loss, needs_loss=False),
    ],
    ids=repr,
)
def test_repr_is_the_constructor_call(criterion):
    twin = eval(repr(criterion))
    assert type(twin) is type(criterion) and repr(twin) == repr(criterion)
    if isinstance(criterion, NearSolution):
        for x, y in zip(twin.x_star, criterion.x_star, strict=True):
            assert torch.equal(x, y) and x.dtype == y.dtype


def test_repr_of_a_large_solution_shows_its_shapes():
    text = repr(NearSolution([torch.zeros(50, 10), torch.zeros(10)], 0.5))
    assert text == (
        "NearSolution(x_star=[<tensor of shape (50, 10)>, <tensor of shape (10,)>], sigma=0.5)"
    )


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        (AfterSteps(2), "step 2 >= n=2"),
        (AfterEpochs(1, 2), "epoch 1 >= n=1 at step 2"),
        (
            GradNorm(1e-3),
            "squared gradient norm 0.0001 <= zeta=0.001 (mean over all steps) at step 2 (Eq. 3)",
        ),
        (
            GradNorm(1e-3, 2),
            "squared gradient norm 0.0001 <= zeta=0.001 (mean over 2 steps) at step 2 (Eq. 3)",
        ),
        (LossChange(0.5, 1), "loss change 0 <= sigma=0.5 (mean over 1 steps) at step 2 (Eq. 4)"),
        (LossGap(-1, 1.5), "loss gap f - f* 1 <= sigma=1.5 (mean over 1 steps) at step 2"),
        (NearSolution(torch.ones(1), 2), "distance ||x - x*|| 1 <= sigma=2 at step 2"),
    ],
    ids=repr,
)
def test_reasons(criterion, reason):
    criterion.observe(observation(1, 1e-4, [torch.zeros(1)]))
    assert criterion.observe(observation(2, 1e-4, [torch.zeros(1)]))
    assert criterion.reason == reason


# Arguments.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AfterSteps(-1), ValueError, r"n must be at least 0, got -1"),
        (lambda: AfterSteps(True), TypeError, r"n must be an int, got True"),
        (lambda: AfterSteps(2.0), TypeError, r"n must be an int, got 2.0"),
        (lambda: AfterEpochs(-3), ValueError, r"n must be at least 0, got -3"),
        (lambda: AfterEpochs(1, 0), ValueError, r"steps_per_epoch must be at least 1, got 0"),
        (lambda: AfterEpochs(1, True), TypeError, r"steps_per_epoch must be an int, got True"),
        (lambda: GradNorm(-1e-4), ValueError, r"zeta must be at least 0 and finite, got -0.0001"),
        (lambda: GradNorm(math.nan), ValueError, r"zeta must be at least 0 and finite, got nan"),
        (lambda: GradNorm("small"), TypeError, r"zeta must be a number, got 'small'"),
        (lambda: GradNorm(1, 0), ValueError, r"window must be at least 1, got 0"),
        (lambda: GradNorm(1, 2.5), TypeError, r"window must be an int, got 2.5"),
        (lambda: LossChange(math.nan), ValueError, r"sigma must be at least 0 and finite, got nan"),
        (lambda: LossChange(1, -2), ValueError, r"window must be at least 1, got -2"),
        (lambda: LossChange(1, None), TypeError, r"window must be an int, got None"),
        (
            lambda: LossGap(math.inf, 1),
            ValueError,
            r"f_star must be at least -inf and finite, got inf",
        ),
        (lambda: LossGap(None, 1), TypeError, r"f_star must be a number, got None"),
        (lambda: LossGap(0, -1), ValueError, r"sigma must be at least 0 and finite, got -1"),
        (lambda: LossGap(0, 1, 0), ValueError, r"window must be at least 1, got 0"),
        (lambda: NearSolution(1.0, 1), TypeError, r"x_star must be a tensor or a sequence"),
        (lambda: NearSolution([1.0], 1), TypeError, r"x_star\[0\] must be a tensor, got 1.0"),
        (
            lambda: NearSolution(torch.tensor([1.0, math.nan]), 1),
            ValueError,
            r"x_star\[0\] has an entry that is NaN or infinite",
        ),
        (lambda: NearSolution(torch.ones(1), True), TypeError, r"sigma must be a number, got True"),
        (lambda: LossPlateau(window=210), ValueError, r"window must be a multiple of 20, got 210"),
        (lambda: LossPlateau(window=0), ValueError, r"window must be at least 20, got 0"),
        (
            lambda: LossPlateau(rtol=-0.1),
            ValueError,
            r"rtol must be at least 0 and finite, got -0.1",
        ),
        (lambda: LossPlateau(z=math.inf), ValueError, r"z must be at least 0 and finite, got inf"),
        (lambda: LossPlateau(patience=0), ValueError, r"patience must be at least 1, got 0"),
        (lambda: When(3), TypeError, r"fn must be callable, got 3"),
        (lambda: All(), ValueError, r"All\(\) has no members"),
        (lambda: Any(Never(), 3), TypeError, r"members\[1\] must be a Switchover, got 3"),
        (lambda: as_switchover(True), TypeError, r"switch must be .*, got True"),
        (lambda: as_switchover(1.5), TypeError, r"switch must be .*, got 1.5"),
        (lambda: as_switchover("plateau"), TypeError, r"switch must be .*, got 'plateau'"),
        (lambda: as_switchover(LossPlateau), TypeError, r"switch must be .*, got <class"),
        (lambda: as_switchover(-1), ValueError, r"switch must be at least 0, got -1"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_one_object_cannot_be_two_members():
    a = LossPlateau()
    for compose in (lambda: a & a, lambda: a & Never() | a, lambda: Any(Never(), a, a)):
        with pytest.raises(ValueError, match="the same criterion occurs twice"):
            compose()


@pytest.mark.parametrize(
    "params",
    [[torch.zeros(3)], [torch.zeros(2), torch.zeros(2)], [torch.zeros(2, 1)], []],
    ids=["shape", "count", "rank", "none"],
)
def test_near_solution_needs_parameters_of_its_shapes(params):
    criterion = NearSolution(torch.zeros(2), 1.0)
    message = r"x_star has the shapes \[\(2,\)\], the parameters have \["
    for switch in (criterion, Never() | criterion):
        with pytest.raises(ValueError, match=message):
            switch.check(params)
        with pytest.raises(ValueError, match=message):
            switch.observe(observation(1, params=params))
    (Never() | criterion).check([torch.ones(2)])


@pytest.mark.parametrize("criterion", [LossPlateau(), LossChange(1), LossGap(0, 1), GradNorm(1)])
def test_a_missing_observation_is_refused_before_any_member_sees_the_step(criterion):
    name = "loss" if criterion.needs_loss else "grad_norm_sq"
    seen: list[int] = []
    watcher = When(lambda obs: bool(seen.append(obs.step)), False, False)
    for switch in (criterion, watcher & criterion):
        with pytest.raises(ValueError, match=f"needs the observation's {name}, which is None"):
            switch.observe(observation(1))
    assert not seen


def test_as_switchover():
    plateau, composite = LossPlateau(window=40), Never() | AtOnce()
    assert as_switchover(plateau) is plateau and as_switchover(composite) is composite
    assert repr(as_switchover(None)) == repr(LossPlateau())
    assert repr(as_switchover(7)) == "AfterSteps(n=7)"
    assert as_switchover(0).at_once
    assert isinstance(as_switchover(low_loss), When)
