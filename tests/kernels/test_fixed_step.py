"""What a fixed step decides on the device: csrc/fixed_step.h against its twin and by cases."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from ops_cases import (
    BACKENDS,
    BF16,
    F32,
    F64,
    Ring,
    Watch,
    adam_arguments,
    clone_arguments,
    decide_arguments,
    direction_arguments,
    give_control,
    make_ring,
    make_tensors,
    move_arguments,
    same_bits,
    stats_arguments,
    update_arguments,
)
from torch import Tensor

from fuse_ext.kernels import fixed_step
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.fixed_step import GO, PLACES, RETURN, STAY, Control

each_backend = pytest.mark.parametrize("backend", BACKENDS)
NORMS = {"grad_square": 5.0, "grad_sum": 8.0, "grad_largest": 1.5, "param_largest": 3.0}


def decided_ring(count: int, numel: int = 40, sets: int = 1, **numbers: float) -> Ring:
    """A ring of good pairs, all its dots known, and a control with some norms.

    The slots' pairs are of the sets 0, 1, ... in turn, and the present set is 0.
    """
    made = make_ring(numel, 4, 2, count, state_dtype=F32)
    slots, rows = made.slots, torch.randn(5, 15, dtype=F64)
    y = rows + 0.3 * torch.randn(5, 15, dtype=F64)
    made.array("gram_sy").copy_(rows @ y.T)
    made.array("gram_yy").copy_(y @ y.T)
    made.array("y_y").copy_(y @ y[2])
    made.array("y_s").copy_(rows @ y[2])
    g = torch.randn(15, dtype=F64)
    made.array("grad_s").copy_(rows @ g)
    made.array("grad_y").copy_(y @ g)
    named = {"gamma": 0.7, "direction_sq": rows[2] @ rows[2], "y_dot_y": y[2] @ y[2]}
    named |= {"direction_dot_grad": -2.0}
    for name, value in named.items():
        made.scalars[ring.index(name, slots)] = value
    made.array("pair_set").copy_(torch.arange(slots) % sets)
    usable = len(ring.usable_slots(made.scalars, slots))
    made.scalars[ring.index("usable", slots)] = usable
    give_control(made, **NORMS | numbers)
    return made


def run(backend: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    mine = clone_arguments(arguments)
    getattr(BACKENDS[backend], name)(**mine)
    return mine


STATES = [
    dict(zip(("count", "sets", "pair_step", "bad_starts", "cuts", "reset"), values, strict=True))
    for values in itertools.product((0, 1, 4), (1, 2), (0.0, 0.5), (0, 3), (0, 2, 15), (0, 1))
    if values[0] or values[1] == 1
]
TOLD: tuple[dict[str, Any], ...] = (
    {},
    {"closes_pair": True},
    {"lr": 0.0},
    {"tolerance_grad": 2.0, "tolerance_change": 0.1},
    {"loss": torch.tensor(math.nan)},
    {"loss": torch.tensor([math.inf], dtype=BF16), "closes_pair": True},
    {"lr_tensor": torch.tensor(0.25, dtype=F64), "lr_unit": 2.0, "patience": 0},
    {"lr_tensor": torch.tensor([3.0]), "loss": torch.tensor(4.0, dtype=F64)},
)


def check_decisions(backend: str, told: dict[str, Any], states: list[dict[str, Any]]) -> None:
    """Scalars and control after lbfgs_decide are those of the reference."""
    for state, square in itertools.product(states, (5.0, math.inf, math.nan)):
        made = decided_ring(**state | {"grad_square": square})
        arguments = decide_arguments(made, **told)
        ours, expected = (run(b, "lbfgs_decide", arguments) for b in (backend, "reference"))
        for key in ("control", "scalars"):
            torch.testing.assert_close(
                ours[key], expected[key], rtol=1e-11, atol=1e-11, equal_nan=True, msg=str(state)
            )


@pytest.mark.parametrize("told", TOLD, ids=str)
def test_decisions_are_those_of_the_reference(told: dict[str, Any]) -> None:
    check_decisions("native", told, STATES)


@each_backend
def test_the_first_step_is_visible_and_of_1_norm_one(backend: str) -> None:
    for told, numbers, expected in (
        ({}, {}, 0.5 / 8.0),
        ({}, {"grad_sum": 0.1}, 0.5),
        ({}, {"cuts": 2.0}, 0.5 * 0.1**2 / 8.0),
        ({}, {"param_largest": 3e5}, 0.5 * math.sqrt(2.0**-23) * 3e5 / 1.5),
        ({"lr_tensor": torch.tensor(0.25), "lr_unit": 0.5}, {}, 0.25 / 8.0),
    ):
        arguments = decide_arguments(decided_ring(0, **numbers), **told)
        control = Control(run(backend, "lbfgs_decide", arguments)["control"])
        assert control.step_length == pytest.approx(expected, rel=1e-14)
        assert (control.move, control.n_iter) == (GO, 1)
    control = Control(run(backend, "lbfgs_decide", decide_arguments(decided_ring(3)))["control"])
    assert control.step_length == 0.5


@each_backend
def test_a_direction_that_would_ascend_is_foreseen(backend: str) -> None:
    made = decided_ring(3)
    made.scalars[ring.index("gamma", made.slots)] = -50.0  # a negative initial Hessian
    after = run(backend, "lbfgs_decide", decide_arguments(made))
    scalars, control = after["scalars"], Control(after["control"])
    header = ring.read_header(scalars)
    assert (header.count, header.gamma, control.resets, control.move) == (0, 0, 1, GO)
    assert ring.array(scalars, "coef_g", made.slots) == -1.0
    assert control.step_length == 0.5 / 8.0


@each_backend
def test_pairs_of_other_sets_decide_nothing(backend: str) -> None:
    made = decided_ring(4)
    made.scalars[ring.index("set", made.slots)] = 7
    after = run(backend, "lbfgs_decide", decide_arguments(made))
    scalars, control = after["scalars"], Control(after["control"])
    header = ring.read_header(scalars)
    assert (header.count, header.usable, control.resets, control.move) == (4, 0, 0, GO)
    assert ring.array(scalars, "coef_g", made.slots) == -1.0
    assert control.step_length == 0.5 / 8.0
    state = {name: after[name] for name in ("scalars", "control")}
    # Where -g does not descend either, there is nothing to forget.
    scalars[ring.index("direction_dot_grad", made.slots)] = 0.0
    moved = run(backend, "lbfgs_move", passes(made)["lbfgs_move"] | state)
    assert Control(moved["control"]).reset == 0.0
    # A step along -g that led nowhere is cut, whatever else the ring holds.
    control.pair_step, control.bad_starts, control.cuts = 0.5, 3, 1
    told = {"loss": torch.tensor(math.nan)}
    back = run(backend, "lbfgs_decide", decide_arguments(made, **told) | state)
    control = Control(back["control"])
    assert (control.move, control.cuts, control.step_cuts, control.resets) == (RETURN, 2, 1, 0)
    assert ring.read_header(back["scalars"]).count == 4


def passes(made: Ring, numel: int = 40) -> dict[str, dict[str, Any]]:
    """Arguments of the three passes over vectors."""
    tensors = make_tensors([numel])
    return {
        "lbfgs_update": update_arguments(tensors, made),
        "lbfgs_direction": direction_arguments(tensors, made),
        "lbfgs_move": move_arguments(tensors, made, torch.randn(numel), 0.125, True),
    }


@each_backend
@pytest.mark.parametrize("move", [STAY, RETURN])
def test_no_direction_where_none_is_wanted(backend: str, move: int) -> None:
    arguments = clone_arguments(passes(decided_ring(2, move=move))["lbfgs_direction"])
    watch = Watch(arguments)
    BACKENDS[backend].lbfgs_direction(**arguments)
    assert watch.changed() == set()


@each_backend
@pytest.mark.parametrize("state", [F32, F64])
def test_the_norms_are_those_of_grad_stats(backend: str, state: torch.dtype) -> None:
    check_norms(backend, state, [40, 3000, 1])


def check_norms(backend: str, state: torch.dtype, sizes: list[int]) -> None:
    """lbfgs_update with a control: the norms, and everything else as without."""
    for count, pair_step, present in itertools.product((0, 2), (0.0, 0.5), (0, 1)):
        tensors = make_tensors(sizes, (state, BF16, F32), gaps=(0, 3))
        made = make_ring(tensors.numel, 4, 2, count, state, state)
        made.scalars[ring.index("set", made.slots)] = present  # the pairs are of set 0
        control = Control(give_control(made, pair_step=pair_step, param_largest=-1.0))
        decay = [(0.1, 0.0, 0.3)[i % 3] for i in range(len(sizes))]
        stats = stats_arguments(tensors, None, decay, maximize=True)
        BACKENDS[backend].grad_stats(**stats)
        undecided = clone_arguments(update_arguments(tensors, made, pair_step > 0, decay, True))
        BACKENDS[backend].lbfgs_update(**undecided | {"control": None})
        decided = clone_arguments(update_arguments(tensors, made, False, decay, True))
        BACKENDS[backend].lbfgs_update(**decided)
        control = Control(decided["control"])
        norms = [control.grad_square, control.grad_sum, control.grad_largest]
        # Bits, for the CPU's kernels; another order of the same sums elsewhere.
        on_cpu = backend in ("native", "reference")
        torch.testing.assert_close(
            torch.tensor(norms, dtype=F64),
            stats["stats"][[1, 2, 4]],
            rtol=0.0 if on_cpu else 1e-5,
            atol=0.0,
        )
        largest = max([float(p.abs().max()) for p in tensors.params if p.numel()], default=0.0)
        assert control.param_largest == (-1.0 if count and not present else largest)
        assert same_bits(decided["history"], undecided["history"])
        ours, theirs = decided["scalars"], undecided["scalars"]
        torch.testing.assert_close(
            ours, theirs, rtol=0.0 if on_cpu else 1e-9, atol=0.0 if on_cpu else 1e-9
        )


@each_backend
def test_moves(backend: str) -> None:
    for numbers, slope, expected in (
        ({"move": GO, "step_length": 0.25}, -2.0, "step"),
        ({"move": GO, "step_length": 0.25, "slope_tolerance": 2.0}, -2.0, "slope"),
        ({"move": GO, "step_length": 0.25}, 0.0, "no_descent"),
        ({"move": GO, "step_length": 0.25}, math.nan, "no_descent"),
        ({"move": RETURN, "step_length": 0.25}, -2.0, "return"),
        ({"move": STAY, "step_length": 0.25}, -2.0, "stay"),
    ):
        made = decided_ring(2, **numbers)
        made.scalars[ring.index("direction_dot_grad", made.slots)] = slope
        before = passes(made)["lbfgs_move"]
        after = run(backend, "lbfgs_move", before)
        p = made.history[0, made.opened]
        x, origin = before["params"][0], before["origin"]
        goal = {"step": x + 0.25 * p, "return": origin}.get(expected, x)
        assert same_bits(after["params"][0], goal), expected
        assert same_bits(after["origin"], x if expected == "step" else origin), expected
        control = Control(after["control"])
        taken = 0.25 if expected == "step" else 0.0
        assert (control.pair_step, control.taken) == (taken, taken), expected
        assert control.reset == (expected == "no_descent")
        if numbers["move"] == GO:
            reason = fixed_step.REASONS[int(control.reason)]
            assert reason == {"step": "max_iter"}.get(expected, expected)
        changed = {i for i in range(len(PLACES)) if after["control"][i] != before["control"][i]}
        told = ("pair_step", "taken", "reason", "reset")
        assert changed <= {PLACES[name] for name in told}


# --- Adam -----------------------------------------------------------------------------------


def check_adam_on_the_device(backend: str, state: torch.dtype, number: torch.dtype) -> None:
    """A step whose number and rate are tensors is that of the same numbers, to the bit."""
    for pieces, options in (
        (1, {}),
        (3, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
        (200, {"amsgrad": True}),
    ):
        tensors = make_tensors([300, 41], (state,))
        lr = torch.tensor(0.0123, dtype=number)
        arguments = adam_arguments(tensors, state, **options)
        step, counts = torch.full((pieces,), 6.0, dtype=number), torch.tensor([6.0, 1.0], dtype=F64)
        device = {"step_tensor": step, "lr_tensor": lr, "counts": counts}
        device |= {"step": -1, "lr": math.nan, "loss": torch.tensor(2.0, dtype=BF16)}
        ours = run(backend, "adam_step", arguments | device)
        expected = run(backend, "adam_step", arguments | {"step": 7, "lr": lr.item()})
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "stats"):
            value: Tensor | None = ours[key]
            assert value is None or same_bits(value, expected[key]), key
        for a, b in zip(ours["params"], expected["params"], strict=True):
            assert same_bits(a, b)
        assert ours["step_tensor"].tolist() == [7.0] * pieces
        assert ours["counts"].tolist() == [7.0, 1.0]


@each_backend
@pytest.mark.parametrize("state", [F32, F64])
@pytest.mark.parametrize("number", [F32, F64])
def test_adam_with_its_numbers_on_the_device(
    backend: str, state: torch.dtype, number: torch.dtype
) -> None:
    check_adam_on_the_device(backend, state, number)


@each_backend
@pytest.mark.parametrize(
    "bad",
    [
        {"found_inf": torch.tensor(1.0)},
        {"loss": torch.tensor(math.nan)},
        {"loss": torch.tensor([-math.inf], dtype=BF16)},
        {"grad_square": torch.tensor(math.inf, dtype=F64)},
    ],
    ids=str,
)
def test_adam_skips_and_counts(backend: str, bad: dict[str, Tensor]) -> None:
    arguments = adam_arguments(make_tensors([300]), amsgrad=True, **bad)
    arguments["step_tensor"], arguments["counts"] = torch.tensor(3.0), torch.zeros(2, dtype=F64)
    arguments["stats"].zero_()
    watch = Watch(arguments)
    BACKENDS[backend].adam_step(**arguments)
    assert watch.changed() == {"counts"}
    assert arguments["counts"].tolist() == [0.0, 1.0]
