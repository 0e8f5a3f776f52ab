"""bfloat16 and float16 in the kernels against torch, bit for bit."""

from __future__ import annotations

import pytest
import torch
from ops_cases import (
    BACKENDS,
    BF16,
    F16,
    F32,
    F64,
    NATIVE,
    Tensors,
    copy_arguments,
    direction_arguments,
    make_ring,
    same_bits,
)
from torch import Tensor


def load(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The values as the kernels read them."""
    flat = torch.zeros(stored.numel(), dtype=dtype)
    NATIVE.grad_gather(**copy_arguments(Tensors([stored], [stored], [0], stored.numel()), flat))
    return flat


def store(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values as the kernels write them."""
    grad = torch.zeros(values.numel(), dtype=dtype)
    param = torch.zeros(values.numel(), dtype=F64 if values.dtype == F64 else F32)
    NATIVE.grad_scatter(**copy_arguments(Tensors([param], [grad], [0], values.numel()), values))
    return grad


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal bits; of NaNs only that they are NaN (torch itself is not consistent there)."""
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert same_bits(actual[number], expected[number])


def all_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def interesting_floats(dtype: torch.dtype) -> Tensor:
    """float32 numbers: all that ``dtype`` has, what lies between them, and random ones.

    Ties, just above and below them, subnormals, overflow and NaN are among them.
    """
    numbers = all_patterns(dtype).to(F32)
    numbers = numbers[numbers.isfinite()].sort().values
    ties = (numbers[1:].to(F64) + numbers[:-1].to(F64)).div(2).to(F32)
    largest = numbers[-1:]
    overflow = largest.to(F64) + (largest - numbers[-2:-1]).to(F64) * torch.tensor([0.4, 0.5, 0.6])
    near = torch.cat([numbers, ties, overflow.to(F32)])
    inf = torch.tensor(float("inf"))
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan")])
    any_bits = torch.randint(-(2**31), 2**31, (100_003,)).to(torch.int32).view(F32)
    return torch.cat([near, near.nextafter(inf), near.nextafter(-inf), special, any_bits])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("stored", [BF16, F16])
def test_load_all_patterns(stored: torch.dtype, dtype: torch.dtype) -> None:
    values = all_patterns(stored)
    assert_same(load(values, dtype), values.to(dtype))
    # Element by element behind the last whole vector.
    for n in (1, 3, 7):
        assert_same(load(values[1000 : 1000 + n], dtype), values[1000 : 1000 + n].to(dtype))


@pytest.mark.parametrize("stored", [BF16, F16])
def test_store_rounds_as_torch(stored: torch.dtype) -> None:
    values = interesting_floats(stored)
    assert_same(store(values, stored), values.to(stored))


@pytest.mark.parametrize("stored", [BF16, F16, F32])
def test_store_of_float64(stored: torch.dtype) -> None:
    """By way of float32, as torch does it."""
    base = all_patterns(BF16).to(F64)
    base = torch.cat([base, interesting_floats(F16 if stored == F32 else stored).to(F64)])
    values = torch.cat([base, base * (1 + 2.0**-26), base * 1e200, torch.randn(10_000, dtype=F64)])
    assert_same(store(values, stored), values.to(F32).to(stored))
    assert_same(store(values, stored), values.to(stored))


@pytest.mark.parametrize("stored", [BF16, F16])
def test_store_then_load_is_the_identity(stored: torch.dtype) -> None:
    values = all_patterns(stored)
    assert_same(store(load(values, F32), stored), values)
    assert_same(store(load(values, F64), stored), values)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_float16_survives_flushed_denormals(dtype: torch.dtype) -> None:
    """Numbers subnormal in float16 are none in float32, so the mode must not touch them."""
    values = all_patterns(F16)
    expected = values.to(dtype)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        loaded = load(values, dtype)
        stored = store(loaded, F16)
    finally:
        torch.set_flush_denormal(False)
    assert_same(loaded, expected)
    assert_same(stored, values)


@pytest.mark.parametrize("state", [F32, F64])
@pytest.mark.parametrize("stored", [BF16, F16])
def test_rows_of_all_patterns(stored: torch.dtype, state: torch.dtype) -> None:
    """The passes over the history have loads of their own: p = row must be the row."""
    values = all_patterns(stored)
    tensors = Tensors([torch.zeros(2**16)], [torch.zeros(2**16)], [0], 2**16)
    for count in (1, 2, 3):  # two rows a pair: one at a time, and several at once
        made = make_ring(2**16, 3, 3, count, stored, state)
        for slot in made.pairs:
            made.history[:, slot] = 0
        made.history[0, made.pairs[-1]] = values
        made.array("coef_s").fill_(1.0)
        NATIVE.lbfgs_direction(**direction_arguments(tensors, made))
        p = made.history[0, made.opened]
        assert torch.equal(p.isnan(), values.isnan())
        assert torch.equal(p[~p.isnan()], values[~p.isnan()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stored", [BF16, F16])
def test_signs_of_zero_and_of_tiny_numbers(backend: str, stored: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30])
    grad = torch.ones(6, dtype=stored)
    tensors = Tensors([torch.zeros(6)], [grad], [0], 6)
    BACKENDS[backend].grad_scatter(**copy_arguments(tensors, values))
    assert torch.equal(grad.signbit(), values.signbit())
