"""The CUDA kernels, their launchers and their torch glue, executed on the CPU.

The very sources of csrc/cuda run in the host execution model of cuda_sim, in three schedules,
under the checks that the CPU kernels pass too. test_cuda_sanitizers.py runs this file and
test_cuda_sim_dense.py again under AddressSanitizer, UndefinedBehaviorSanitizer and
ThreadSanitizer.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import test_fixed_step as fixed
import test_int8_history as int8
import test_ops_adam as adam
import test_ops_errors as errors
import test_ops_layouts as layouts
import test_ops_lbfgs as lbfgs
import test_ops_parts as parts
import torch
from cuda_sim import library
from ops_cases import (
    BACKENDS,
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    NATIVE,
    Ring,
    adam_arguments,
    clone_arguments,
    direction_arguments,
    every_op,
    make_ring,
    make_tensors,
    point_arguments,
    same_bits,
    split,
    tensors_of,
    update_arguments,
)
from torch import Tensor

from fuse_ext import LBFGS, Adam, FusePV, Never
from fuse_ext.kernels import ops
from fuse_ext.kernels import scalars as ring

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())

PLAIN, TSAN = library.VARIANT == "plain", library.VARIANT == "tsan"
# Around where the kernels change gear: packs of 4; tiles of 128 and 512 elements a warp; one warp,
# one block, the whole grid of the simulated size at work, and more than one round of it.
SIZES = (0, 1, 3, 4, 5, 127, 128, 129, 256, 257, 511, 512, 513, 1023, 1025, 1281, 5120, 5121, 11003)
if not PLAIN:
    SIZES = (1281,) if TSAN else (0, 3, 130, 1281, 5123)
# One tensor whose packs are aligned, and several whose packs are not.
PIECES = (3,) if TSAN else (1, 3)
plain_only = pytest.mark.skipif(not PLAIN, reason="nothing here for a sanitizer to see")
not_tsan = pytest.mark.skipif(TSAN, reason="the same memory accesses as in other tests")


def results(name: str, op: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors after the op, which gets its own copies."""
    mine = clone_arguments(arguments)
    getattr(op, name)(**mine)
    return tensors_of(mine)


# --- Adam -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("state", [F32, BF16])
def test_adam_at_every_size(numel: int, state: torch.dtype) -> None:
    for pieces in PIECES:
        tensors = make_tensors(split(numel, pieces))
        adam.check_adam_step("cuda", tensors, adam_arguments(tensors, state))


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("param", "grad", "state"), adam.MIXED)
def test_adam_of_every_combination_of_dtypes(
    param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> None:
    tensors = make_tensors([150, 1, 0, 30, 64], (param,), (grad,))
    adam.check_adam_step("cuda", tensors, adam_arguments(tensors, state, amsgrad=True))


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("state", [F32, F64, BF16])
@pytest.mark.parametrize("options", adam.OPTIONS.values(), ids=adam.OPTIONS)
def test_adam_with_every_option(state: torch.dtype, options: dict[str, Any]) -> None:
    adam.test_every_option("cuda", state, options)


@not_tsan
@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("pieces", [1, 7, 200])
def test_adam_on_segments_of_all_dtypes_with_gaps(pieces: int) -> None:
    tensors = make_tensors(
        split(3000, pieces), (F32, BF16, F16), (F32, F32, BF16), gaps=(0, 3, 0, 130)
    )
    adam.check_adam_step("cuda", tensors, adam_arguments(tensors, amsgrad=True, weight_decay=0.1))


@not_tsan
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "state"), [(F64, F64), *((t, s) for t in (F32, BF16, F16) for s in (F32, BF16))]
)
def test_adam_has_the_bits_of_the_cpu(
    cuda: Any, dtype: torch.dtype, state: torch.dtype, amsgrad: bool
) -> None:
    tensors = make_tensors([1000, 37, 640], (dtype,), gaps=(1, 0, 2))
    arguments = adam_arguments(
        tensors, state, amsgrad=amsgrad, weight_decay=0.1, grad_scale=torch.tensor(8.0)
    )
    ours, cpus = results("adam_step", cuda, arguments), results("adam_step", NATIVE, arguments)
    for name, value in ours.items():
        if name != "stats":
            assert same_bits(value, cpus[name]), name


@not_tsan
@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1023, 2000])
def test_non_finite_gradients_show_in_the_sum(value: float, where: int) -> None:
    adam.test_non_finite_gradients_show_in_the_sum("cuda", value, where)


@not_tsan
def test_nothing_changes_where_inf_was_found(cuda: Any) -> None:
    arguments = adam_arguments(make_tensors([300]), amsgrad=True, found_inf=torch.tensor(1.0))
    after = results("adam_step", cuda, arguments)
    for name, value in tensors_of(arguments).items():
        assert same_bits(value, after[name]), name


def test_addresses_that_no_vector_may_have(cuda: Any) -> None:
    """State, rows and tensors one element off."""
    for shift in (1, 2, 3):
        for state in (F32, BF16):
            tensors = make_tensors([700, 61])
            arguments = adam_arguments(tensors, state)
            for name in ("exp_avg", "exp_avg_sq"):
                whole = torch.cat([torch.zeros(shift, dtype=state), arguments[name]])
                arguments[name] = whole[shift:]
            for i, param in enumerate(tensors.params):
                tensors.params[i] = torch.cat([torch.zeros(shift), param])[shift:]
            adam.check_adam_step("cuda", tensors, arguments)
        case = lbfgs.make_case([700, 61], exact=True)
        memory = torch.full((case.ring.history.numel() + 8 * 7 + shift,), math.nan)
        moved = memory[shift:].as_strided(case.ring.history.shape, case.ring.history.stride())
        case.ring.history = moved.copy_(case.ring.history)
        case.check_all("cuda")


# --- L-BFGS ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("exact", [True, False], ids=["integers", "normal"])
@pytest.mark.parametrize("numel", SIZES)
def test_passes_at_every_size(numel: int, exact: bool) -> None:
    for pieces in PIECES:
        lbfgs.make_case(split(numel, pieces), exact=exact).check_all("cuda")


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("numel", [130, 1281, 5121] if PLAIN else [1281])
@lbfgs.each_row_and_state
def test_passes_with_every_history(numel: int, row: torch.dtype, state: torch.dtype) -> None:
    # Rows that start at multiples of 16 bytes move as vectors, others do not.
    for padded in (numel, (numel + 7) // 8 * 8 + 1):
        lbfgs.make_case([padded], row, state, exact=padded == numel).check_all("cuda")


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("history_size", [1, 2, 3, 7] if PLAIN else [2])
def test_every_ring_position_and_count(history_size: int) -> None:
    lbfgs.test_every_ring_position_and_count("cuda", history_size)


@not_tsan
@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("exact", [True, False], ids=["integers", "normal"])
@pytest.mark.parametrize("pieces", [1, 7, 200])
def test_segments_with_all_options(pieces: int, exact: bool) -> None:
    lbfgs.make_case(
        split(3000, pieces),
        BF16,
        exact=exact,
        param_dtypes=(F32, BF16, F16),
        grad_dtypes=(F32, F32, BF16, F16),
        decay=[(0.0, 2.0, 1.0)[i % 3] for i in range(pieces)],
        lr_scale=[(1.0, 2.0, 0.0, 1.0)[i % 4] for i in range(pieces)],
        maximize=True,
    ).check_all("cuda")


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("kept", [*parts.KEPT.values(), ()], ids=[*parts.KEPT, "none"])
@parts.each_history
def test_some_of_the_parameters(
    kept: tuple[int, ...], row: torch.dtype, state: torch.dtype
) -> None:
    parts.check_parts("cuda", kept, row, state)


@plain_only
@pytest.mark.usefixtures("cuda")
def test_gaps_long_sums_and_no_tensors() -> None:
    lbfgs.test_gaps_between_the_parameters("cuda")
    lbfgs.test_no_tensors("cuda")
    for row in DTYPES:
        lbfgs.test_long_sums_lose_nothing("cuda", row)


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("param", "grad", "state"),
    [c for c in product(DTYPES, DTYPES, (F32, F64)) if lbfgs.fits(c[0], c[2])],
)
def test_passes_of_every_combination_of_dtypes(
    param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> None:
    sizes, decay = [150, 1, 0, 30], [0.5, 0.25, 2.0, 0.0]
    dtypes = {"param_dtypes": [param], "grad_dtypes": [grad]}
    lbfgs.make_case(sizes, state=state, exact=False, **dtypes).check_all("cuda")
    case = lbfgs.make_case(sizes, F16, state, exact=True, decay=decay, **dtypes)
    case.check_update("cuda", True)


@not_tsan
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradients_show(value: float) -> None:
    lbfgs.test_non_finite_gradients_show("cuda", value, 1023)


@plain_only
@pytest.mark.parametrize("slots", [191, 193, 800])
def test_long_histories_leave_shared_memory_for_fewer_warps(cuda: Any, slots: int) -> None:
    tensors, made = make_tensors([1300]), make_ring(1300, slots - 1, 5, 6)
    arguments = update_arguments(tensors, made)
    ours = results("lbfgs_update", cuda, arguments)["scalars"]
    cpus = results("lbfgs_update", NATIVE, arguments)["scalars"]
    torch.testing.assert_close(ours, cpus, rtol=1e-4, atol=1e-3)


@plain_only
def test_a_history_too_long_for_shared_memory_is_refused(cuda: Any) -> None:
    arguments = update_arguments(make_tensors([3]), make_ring(3, 1600, 0, 0))
    with pytest.raises(ValueError, match="history has 1601 slots; the CUDA kernels take at most"):
        cuda.lbfgs_update(**arguments)


def gram_scalars(slots: int, opened: int, count: int, sets: int = 1) -> Tensor:
    """Scalars with the Gram matrices of random, well-conditioned pairs.

    The slots' pairs are of the sets 0, 1, ... in turn, and the present set is 0.
    """
    scalars = torch.randn(ring.new_scalars(slots, torch.device("cpu")).numel(), dtype=F64)
    s = torch.randn(slots, 3 * slots, dtype=F64)
    y = s + 0.3 * torch.randn(slots, 3 * slots, dtype=F64)
    ring.array(scalars, "gram_sy", slots).copy_(s @ y.T)
    ring.array(scalars, "gram_yy", slots).copy_(y @ y.T)
    ring.array(scalars, "row_scale", slots).uniform_(0.5, 2.0)
    ring.array(scalars, "y_y", slots).copy_(y @ y[opened])
    ring.array(scalars, "y_s", slots).copy_(s @ y[opened])
    named = {"open": opened, "count": count, "gamma": 0.7, "direction_sq": float(s[0] @ s[0])}
    named["y_dot_y"] = float(y[opened] @ y[opened])
    named["set"] = 0
    ring.array(scalars, "pair_set", slots).copy_(torch.arange(slots) % sets)
    for name, value in named.items():
        scalars[ring.index(name, slots)] = value
    return scalars


# Up to 52 slots the scalars are worked on in shared memory.
@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("slots", [2, 3, 11, 52, 53, 130] if PLAIN else [11, 53])
@pytest.mark.parametrize("step_length", [0.5, -0.5], ids=["accepted", "refused"])
@pytest.mark.parametrize("commit", [True, False])
def test_two_loop(cuda: Any, slots: int, commit: bool, step_length: float) -> None:
    places = {(0, 0), (slots // 2, slots // 2), (slots - 1, slots - 1), (0, slots - 1)}
    for (opened, count), sets in product(places, (1, 3)):
        arguments = {
            "scalars": gram_scalars(slots, opened, count, sets),
            "slots": slots,
            "commit": commit,
            "step_length": step_length,
            "curvature_tol": 1e-8,
        }
        ours = results("lbfgs_two_loop", cuda, arguments)["scalars"]
        for other in ("native", "reference"):
            expected = results("lbfgs_two_loop", BACKENDS[other], arguments)["scalars"]
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@not_tsan
@pytest.mark.parametrize("entry", ["open", "count"])
@pytest.mark.parametrize("value", [-1.0, 4.0, 1e30, math.nan, math.inf])
def test_damaged_scalars_never_index(cuda: Any, entry: str, value: float) -> None:
    """The host does not read them; the kernels stay inside of the ring, and no direction comes."""
    scalars = None
    for name in (*errors.RING_OPS, "lbfgs_two_loop"):
        arguments = errors.good(name)
        arguments["scalars"][ring.index(entry, 4)] = value
        getattr(cuda, name)(**arguments)
        scalars = arguments["scalars"]
    assert scalars is not None
    assert bool(ring.array(scalars, "coef_g", 4).isnan())


# --- steps that are decided on the device ----------------------------------------------------


@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("told", fixed.TOLD if PLAIN else fixed.TOLD[:2], ids=str)
def test_decisions(told: dict[str, Any]) -> None:
    fixed.check_decisions("cuda", told, fixed.STATES[:: 7 if PLAIN else 30])


@not_tsan
def test_decisions_on_scalars_too_many_for_shared_memory(cuda: Any) -> None:
    made = make_ring(10, 59, 30, 40)
    fixed.give_control(made, **fixed.NORMS, pair_step=0.5)
    for sets in (1, 2):
        made.scalars.copy_(gram_scalars(60, 30, 40, sets))
        arguments = fixed.decide_arguments(made)
        for name, value in results("lbfgs_decide", cuda, arguments).items():
            expected = results("lbfgs_decide", NATIVE, arguments)[name]
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@plain_only
@pytest.mark.usefixtures("cuda")
def test_what_a_decision_leads_to() -> None:
    fixed.test_the_first_step_is_visible_and_of_1_norm_one("cuda")
    fixed.test_a_direction_that_would_ascend_is_foreseen("cuda")
    fixed.test_pairs_of_other_sets_decide_nothing("cuda")
    for move in (fixed.STAY, fixed.RETURN):
        fixed.test_no_direction_where_none_is_wanted("cuda", move)


@pytest.mark.parametrize("order", library.ORDERS)
def test_moves_that_the_device_decides(cuda: Any, order: str) -> None:
    cuda.schedule(order, seed=2)
    fixed.test_moves("cuda")


@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("numel", [n for n in SIZES if n > 0])
def test_norms_at_every_size(numel: int) -> None:
    for pieces, state in product(PIECES, (F32, F64)):
        fixed.check_norms("cuda", state, split(numel, pieces))


# In every order under ThreadSanitizer too: a block that ends before another begins may not touch
# what that one reads, and one that ends after all others may.
@pytest.mark.parametrize("order", library.ORDERS)
@pytest.mark.parametrize("number", [F32, F64])
def test_adam_with_its_numbers_on_the_device(cuda: Any, number: torch.dtype, order: str) -> None:
    cuda.schedule(order, seed=2)
    fixed.check_adam_on_the_device("cuda", F32, number)
    numel = 1281 if TSAN else 5123  # more than one round of the grid
    given = {"step_tensor": 4.0, "lr_tensor": 0.1}
    for state in (F32, BF16):
        tensors = make_tensors(split(numel, 3))
        numbers = {name: torch.tensor(value, dtype=number) for name, value in given.items()}
        arguments = adam_arguments(tensors, state, counts=torch.zeros(2, dtype=F64), **numbers)
        ours, cpus = results("adam_step", cuda, arguments), results("adam_step", NATIVE, arguments)
        for name, value in ours.items():
            if name != "stats":
                assert same_bits(value, cpus[name]), name


@plain_only
@pytest.mark.usefixtures("cuda")
def test_adam_skips_and_counts() -> None:
    for bad in ({"found_inf": 1.0}, {"loss": math.nan}, {"grad_square": math.inf}):
        fixed.test_adam_skips_and_counts("cuda", {k: torch.tensor(v) for k, v in bad.items()})


@plain_only
@pytest.mark.parametrize("history_dtype", [None, BF16, torch.int8])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_whole_iterations_in_four_launches(
    cuda: Any,
    monkeypatch: pytest.MonkeyPatch,
    weight_decay: float,
    history_dtype: torch.dtype | None,
) -> None:
    """LBFGS(capturable=True) on the simulated device: as on the CPU, wrong gradients included."""
    options = {"max_iter": 1, "history_size": 3, "tolerance_grad": 0, "tolerance_change": 0}
    options |= {"history_dtype": history_dtype, "weight_decay": weight_decay, "capturable": True}
    h, iterates, launches = torch.linspace(1, 10, 700), [], set()
    for kernels in (cuda, NATIVE):
        monkeypatch.setattr(ops, "select", lambda *_, kernels=kernels: kernels)
        torch.manual_seed(0)
        xs = [torch.randn(300).requires_grad_(), torch.randn(20, 20).requires_grad_()]
        optimizer = LBFGS(xs, lr=0.5, **options)
        for step in range(25):
            g = h * torch.cat([x.detach().flatten() for x in xs])
            g[5] = math.nan if step in (2, 9, 10, 11, 12) else g[5]
            xs[0].grad, xs[1].grad = g[:300].clone(), g[300:].view(20, 20).clone()
            before = cuda.launches()
            optimizer.step()
            launches.add(cuda.launches() - before)
        iterates.append(torch.cat([x.detach().flatten() for x in xs]))
        report = optimizer.report()
        assert (report.non_finite, report.history_resets, report.step_cuts) == (5, 1, 0)
    assert launches == {0, 4}  # none in the second run, on the CPU
    assert iterates[1].norm() < 1e-1
    torch.testing.assert_close(iterates[0], iterates[1], rtol=1e-3, atol=1e-3)


@plain_only
def test_launches_of_every_step(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As benchmarks/cuda_model.py has them."""
    monkeypatch.setattr(ops, "select", lambda *_: cuda)
    fixed_step = {"line_search": None, "capturable": True}
    for make, expected in (
        (lambda p: Adam(p), 1),
        (lambda p: Adam(p, capturable=True), 1),
        (lambda p: FusePV(p, switch=Never(), **fixed_step), 2),
        (lambda p: FusePV(p, switch=Never(), check_finite=False, **fixed_step), 1),
        (lambda p: LBFGS(p, lr=0.5, max_iter=1), 5),
        (lambda p: LBFGS(p, lr=0.5, max_iter=1, capturable=True), 4),
        (lambda p: FusePV(p, switch=0, lbfgs_lr=0.5, **fixed_step), 4),
    ):
        xs = [torch.randn(300).requires_grad_(), torch.randn(7).requires_grad_()]
        optimizer = make(xs)
        for _ in range(4):
            for x in xs:
                x.grad = x.detach().clone()
            before = cuda.launches()
            optimizer.step()
            assert cuda.launches() == before + expected


# --- rows in 8 bits -------------------------------------------------------------------------


@pytest.mark.usefixtures("in_every_order")
@pytest.mark.parametrize("state", [F32, F64])
@pytest.mark.parametrize("numel", [n for n in SIZES if n > 0])
def test_8_bit_rows_are_those_of_the_cpu(cuda: Any, numel: int, state: torch.dtype) -> None:
    tensors = make_tensors(split(numel, 3), (state,))
    history = int8.make_history(torch.zeros(numel, dtype=state), "native")
    rows, scales = history.rows, history.scales
    assert scales is not None
    rows.copy_(torch.randint(-127, 128, rows.shape))
    scales.uniform_(0.5, 2.0)
    made = Ring(rows, history.scalars, torch.randn(numel, dtype=state))
    history.scalars.copy_(gram_scalars(4, 1, 3))
    scale = {"history_scale": scales}
    update = update_arguments(tensors, made) | scale
    point = point_arguments(tensors, made, torch.randn(numel, dtype=state)) | scale
    # What is rounded to 8 bits has the same bits; sums may differ in their last.
    for name, arguments in (
        ("lbfgs_update", update),
        ("lbfgs_move", point | {"step": 0.5, "save": True}),
        ("fuse_blend", point | {"theta": 0.3, "step": 0.5}),
    ):
        ours, cpus = results(name, cuda, arguments), results(name, NATIVE, arguments)
        for key, value in ours.items():
            if key == "scalars":
                torch.testing.assert_close(value, cpus[key], rtol=1e-4, atol=1e-4 * numel)
            else:
                assert same_bits(value, cpus[key]), f"{name}: {key}"
    # Sums of rows rounded otherwise may move an element to the next whole number.
    arguments = direction_arguments(tensors, made) | scale
    ours = results("lbfgs_direction", cuda, arguments)
    cpus = results("lbfgs_direction", NATIVE, arguments)
    torch.testing.assert_close(ours["history_scale"], cpus["history_scale"], rtol=1e-5, atol=0.0)
    assert (ours["history"].int() - cpus["history"].int()).abs().max() <= 1
    assert same_bits(ours["grad_prev"], cpus["grad_prev"])
    torch.testing.assert_close(ours["scalars"], cpus["scalars"], rtol=1e-2, atol=1e-2)


# --- the ops as torch sees them ---------------------------------------------------------------


LAUNCHES = {"lbfgs_set_out": 2, "dense_direction": 4}


@pytest.mark.parametrize("awkward", [False, True])
@pytest.mark.parametrize("name", ops.NAMES)
def test_few_launches_and_the_same_bits_in_every_schedule(
    cuda: Any, name: str, awkward: bool
) -> None:
    arguments = every_op(awkward)[name]
    before = cuda.launches()
    first = results(name, cuda, arguments)
    assert cuda.launches() == before + LAUNCHES.get(name, 1)
    schedules = [("forward", 0), ("reverse", 0), ("shuffled", 5), ("shuffled", 6)]
    for order, seed in schedules[:1] if TSAN else schedules:
        cuda.schedule(order, seed)
        for key, value in results(name, cuda, arguments).items():
            assert same_bits(value, first[key]), f"{key} in {order} order"


@plain_only
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    "kind", ["channels_last", "channels_last_3d", "transposed", "sliced rows", "scalar", "flipped"]
)
def test_common_layouts(kind: str) -> None:
    layouts.test_common_layouts("cuda", kind)


@plain_only
@pytest.mark.usefixtures("cuda")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(("name", "bad"), errors.BAD_TENSORS)
def test_bad_tensors_are_refused(name: str, bad: str) -> None:
    errors.test_bad_tensors("cuda", name, bad)


@plain_only
@pytest.mark.parametrize(("name", "change", "kind", "message"), errors.BAD_STATE)
def test_bad_state_is_refused(cuda: Any, name: str, change: Any, kind: Any, message: str) -> None:
    arguments = errors.good(name)
    change(arguments)
    errors.check_refused("cuda", name, arguments, kind, message)


@plain_only
@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_scaler_values_are_single_numbers(cuda: Any, name: str) -> None:
    arguments = adam_arguments(make_tensors([4]), **{name: torch.zeros(2)})
    with pytest.raises(ValueError, match=f"{name} has 2 elements, not one"):
        cuda.adam_step(**arguments)
