"""adam_step against Eq. 2 in float64, on both backends."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from ops_cases import (
    BACKENDS,
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    NATIVE,
    SIZES,
    Tensors,
    adam_arguments,
    assert_stored,
    assert_sum,
    fits,
    integers,
    large_then_small,
    make_tensors,
    normal,
    same_bits,
    split,
    unit_roundoff,
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
MIXED = [
    (param, grad, state)
    for param, grad, state in product(DTYPES, DTYPES, (F32, F64, BF16))
    if fits(param, state)
]


def check_adam_step(backend: str, tensors: Tensors, arguments: dict[str, Any]) -> None:
    """Makes the step and compares all that it writes with Eq. 2 in float64.

    In T, the state's dtype (float32 for moments in bfloat16), each of a dozen operations and
    coefficients is off by one roundoff u of its result; m = b1 m + (1 - b1) g may cancel, so its
    error is relative to |m| + |g|, and so is the step's. 16 u leave a little room. Averages in
    bfloat16 are rounded up or down: by less than 2^-7. (test_stochastic.py looks closer.)
    """
    kept = arguments["exp_avg"].dtype
    state_dtype, unit = (F32, 2.0**-7) if kept == BF16 else (kept, 0.0)
    u, tiny = 16 * unit_roundoff(state_dtype), torch.finfo(state_dtype).tiny
    x, grad = tensors.flat(tensors.params), tensors.flat(tensors.grads)
    m, v, largest = (
        None if t is None else t.to(F64, copy=True)
        for t in (arguments[k] for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
    )
    assert m is not None and v is not None
    before = {k: arguments[k].clone() for k in ("exp_avg", "exp_avg_sq")}

    BACKENDS[backend].adam_step(**arguments)

    o = arguments
    scale = 1.0 if o["grad_scale"] is None else float(o["grad_scale"])
    raw = grad * (-1 if o["maximize"] else 1) / scale
    decayed = 0.0 if o["decoupled_weight_decay"] else o["weight_decay"]
    g, size = raw + decayed * x, raw.abs() + (decayed * x).abs()
    keep = 1 - o["lr"] * o["weight_decay"] if o["decoupled_weight_decay"] else 1.0
    m_new = m + (1 - o["beta1"]) * (g - m)
    v_new = o["beta2"] * v + (1 - o["beta2"]) * g * g
    v_size = o["beta2"] * v + (1 - o["beta2"]) * size * size
    second = v_new if largest is None else torch.maximum(largest, v_new)
    root = (second + o["eps_in_root"]).sqrt() / math.sqrt(1 - o["beta2"] ** o["step"])
    step = o["lr"] / (1 - o["beta1"] ** o["step"]) / (root + o["eps"])
    x_new = x * keep - step * m_new

    covered = tensors.covered()
    x_error = u * (x.abs() + step * (m.abs() + size))
    x_error += tiny  # below the smallest normal number errors are absolute
    for i, (param, offset) in enumerate(zip(tensors.params, tensors.offsets, strict=True)):
        place = slice(offset, offset + param.numel())
        assert_stored(param, x_new[place], x_error[place], f"params[{i}] {param.dtype}")
    for name, exact, error in (
        ("exp_avg", m_new, u * (m.abs() + size) + tiny + unit * m_new.abs()),
        ("exp_avg_sq", v_new, u * v_size + tiny + unit * v_new),
        ("max_exp_avg_sq", second, u * v_size + tiny),
    ):
        if o[name] is not None:
            assert_stored(o[name][covered], exact[covered], error[covered], name)
    for name, old in before.items():
        assert same_bits(o[name][~covered], old[~covered]), f"{name} between the parameters"
    assert_sum(float(o["stats"]), raw * raw, state_dtype, "sum of squared gradients")


@each_backend
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_every_size(backend: str, dtype: torch.dtype, numel: int) -> None:
    tensors = make_tensors([numel], (dtype,))
    check_adam_step(backend, tensors, adam_arguments(tensors, F64 if dtype == F64 else F32))


@each_backend
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_size_with_moments_in_bfloat16(backend: str, dtype: torch.dtype, numel: int) -> None:
    tensors = make_tensors([numel], (dtype,))
    check_adam_step(backend, tensors, adam_arguments(tensors, BF16))


@each_backend
@pytest.mark.parametrize(("param", "grad", "state"), MIXED)
def test_every_combination_of_dtypes(
    backend: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> None:
    tensors = make_tensors([1500, 1, 0, 30], (param,), (grad,))
    check_adam_step(backend, tensors, adam_arguments(tensors, state, amsgrad=True))


@each_backend
@pytest.mark.parametrize("state", [F32, BF16])
@pytest.mark.parametrize("pieces", [1, 2, 7, 100, 1000])
def test_segments_of_all_dtypes_with_gaps(backend: str, pieces: int, state: torch.dtype) -> None:
    """Gaps are parameters without a gradient: their moments stay as they are."""
    sizes = split(9000, pieces)
    tensors = make_tensors(sizes, (F32, BF16, F16), (F32, F32, BF16, F16), gaps=(0, 3, 0, 1, 1000))
    check_adam_step(backend, tensors, adam_arguments(tensors, state))


OPTIONS: dict[str, dict[str, Any]] = {
    "first step": {"step": 1},
    "late step": {"step": 1_000_000},
    "betas": {"beta1": 0.0, "beta2": 0.9},
    "zero lr": {"lr": 0.0},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "L2": {"weight_decay": 0.3},
    "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
    "eps": {"eps": 0.5},
    "eps in root": {"eps": 0.0, "eps_in_root": 0.5},
    "grad_scale": {"grad_scale": torch.tensor(1024.0)},
    "grad_scale float64": {"grad_scale": torch.tensor([0.37], dtype=F64)},
    "found no inf": {"found_inf": torch.tensor([0.0])},
    "all": {
        "step": 3,
        "amsgrad": True,
        "maximize": True,
        "weight_decay": 0.1,
        "eps": 1e-3,
        "eps_in_root": 1e-2,
        "grad_scale": torch.tensor(3.0),
        "found_inf": torch.tensor(0.0),
    },
}


@each_backend
@pytest.mark.parametrize("state", [F32, F64, BF16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(backend: str, state: torch.dtype, options: dict[str, Any]) -> None:
    tensors = make_tensors([700, 400], (state, BF16), gaps=(0, 5))
    check_adam_step(backend, tensors, adam_arguments(tensors, state, **options))


@each_backend
@pytest.mark.parametrize("state", [F32, F64, BF16])
def test_first_steps_from_zero_moments(backend: str, state: torch.dtype) -> None:
    tensors = make_tensors([2000], (state,))
    arguments = adam_arguments(tensors, state, draw=lambda n: torch.zeros(n, dtype=F64))
    for step in range(1, 6):
        tensors.grads[0].copy_(normal(2000))
        check_adam_step(backend, tensors, arguments | {"step": step})


@each_backend
def test_zero_gradients_and_moments_do_not_move(backend: str) -> None:
    tensors = make_tensors([100])
    tensors.grads[0].zero_()
    arguments = adam_arguments(tensors, draw=lambda n: torch.zeros(n, dtype=F64))
    before = tensors.params[0].clone()
    BACKENDS[backend].adam_step(**arguments)
    assert same_bits(tensors.params[0], before)


@each_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1023, 2000])
def test_non_finite_gradients_show_in_the_sum(backend: str, value: float, where: int) -> None:
    tensors = make_tensors([2001])
    tensors.grads[0][where] = value
    arguments = adam_arguments(tensors)
    BACKENDS[backend].adam_step(**arguments)
    assert not math.isfinite(arguments["stats"])
    others = torch.arange(2001) != where
    assert tensors.params[0][others].isfinite().all()


@pytest.mark.parametrize("pieces", [1, 100])
@pytest.mark.parametrize("numel", SIZES)
def test_sum_of_squares_is_exact_for_integers(numel: int, pieces: int) -> None:
    tensors = make_tensors(split(numel, pieces), (F32, BF16, F16), draw=integers)
    arguments = adam_arguments(tensors, maximize=True, grad_scale=torch.tensor(0.5))
    NATIVE.adam_step(**arguments)
    assert float(arguments["stats"]) == float(4 * tensors.flat(tensors.grads).square().sum())


def test_long_sums_lose_nothing() -> None:
    values = large_then_small(50_001)
    tensors = make_tensors([50_001], draw=lambda n: values)
    arguments = adam_arguments(tensors)
    NATIVE.adam_step(**arguments)
    assert float(arguments["stats"]) == float(values.square().sum())


@each_backend
def test_no_tensors(backend: str) -> None:
    arguments = adam_arguments(Tensors([], [], [], 5))
    before = arguments["exp_avg"].clone()
    BACKENDS[backend].adam_step(**arguments)
    assert same_bits(arguments["exp_avg"], before)
    assert float(arguments["stats"]) == 0.0
