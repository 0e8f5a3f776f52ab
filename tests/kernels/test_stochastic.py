"""Adam's moments in bfloat16: what is stored is a fair rounding, the same on every machine.

Run as a program, this file prints a digest of the results at the instruction-set level of the
environment. Eq. 2 itself is compared with float64 in test_ops_adam.py; the optimizers are tested
in curvature/test_bf16_moments.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from ops_cases import (
    BACKENDS,
    BF16,
    F32,
    NATIVE,
    Tensors,
    adam_arguments,
    bits,
    clone_arguments,
    make_tensors,
    same_bits,
    split,
)
from torch import Tensor

from fuse_ext.kernels.reference.stochastic import random_bits, store_stochastic

CPU = torch.device("cpu")
MOMENTS = ("exp_avg", "exp_avg_sq")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def bits_of(begin: int, numel: int, steps: range) -> Tensor:
    """Random bits, [steps, elements]."""
    return torch.stack([random_bits(begin, numel, step, CPU) for step in steps])


# --- random bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [0, 12_345, 2**31, 2**32 - 9_000, 5 * 2**33])
@pytest.mark.parametrize("first_step", [1, 1000, 2**24, 2**40])
def test_both_halves_are_uniform_and_independent(begin: int, first_step: int) -> None:
    """chi^2 over 256 cells: mean 255, standard deviation 22.6."""
    drawn = bits_of(begin, 16_384, range(first_step, first_step + 8))
    high, low = drawn >> 16, drawn & 0xFFFF
    assert drawn.min() >= 0 and drawn.max() < 2**32
    cells = {
        "high bits of exp_avg's half": high >> 8,
        "low bits of exp_avg's half": high & 0xFF,
        "high bits of exp_avg_sq's half": low >> 8,
        "low bits of exp_avg_sq's half": low & 0xFF,
        "both halves": (high >> 12) << 4 | low >> 12,
        "neighbours": (high[:, 1:] >> 12) << 4 | high[:, :-1] >> 12,
        "successive steps": (high[1:] >> 12) << 4 | high[:-1] >> 12,
        "a half and the other's next": (high[1:] >> 12) << 4 | low[:-1] >> 12,
    }
    for name, cell in cells.items():
        found = torch.bincount(cell.flatten(), minlength=256).double()
        expected = found.sum() / 256
        chi2 = float(((found - expected) ** 2 / expected).sum())
        assert 255 - 5 * 22.6 < chi2 < 255 + 5 * 22.6, (name, chi2)


def test_every_pair_of_steps_is_uncorrelated() -> None:
    """Also of steps far apart: thresholds that come again would favour one direction for good."""
    drawn = bits_of(0, 4096, range(1, 129)).double()
    for part in (drawn // 2**16, drawn % 2**16):
        part = (part - part.mean()) / part.std()
        over_elements = part @ part.T / 4096
        over_steps = part.T[:512] @ part[:, :512] / 128
        for correlation, samples in ((over_elements, 4096), (over_steps, 128)):
            off = correlation[~torch.eye(len(correlation), dtype=torch.bool)]
            assert off.abs().max() < 5.5 / math.sqrt(samples)
            assert abs(float(off.square().mean()) * samples - 1) < 0.05


# --- rounding -------------------------------------------------------------------------------


def test_rounding_keeps_the_mean() -> None:
    values = torch.cat([torch.randn(64), torch.randn(32) * 1e-39, torch.randn(32) * 1e30])
    draws = 16_384
    shown = values.repeat_interleave(draws)
    stored = torch.empty(shown.shape, dtype=BF16)
    store_stochastic(stored, shown, random_bits(0, len(shown), 3, CPU) & 0xFFFF)
    # To float64 before any difference: subnormals are exact there.
    exact, rounded = values.double(), stored.double().view(-1, draws)
    down = (values.view(torch.int32) & -65536).view(F32).double()
    up = ((values.view(torch.int32) & -65536) + 65536).view(F32).double()
    assert ((rounded == down[:, None]) | (rounded == up[:, None])).all()
    share = (exact - down) / (up - down)
    error = (rounded == up[:, None]).double().mean(1) - share
    assert (error.abs() <= 5 * (share * (1 - share) / draws).sqrt() + 1e-12).all()


def test_what_is_representable_is_kept() -> None:
    """Every bfloat16 there is, with the largest random number; NaN may change its payload."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    stored = torch.empty_like(every)
    store_stochastic(stored, every.float(), torch.full((2**16,), 0xFFFF))
    assert torch.equal(stored.isnan(), every.isnan())
    assert same_bits(stored[~every.isnan()], every[~every.isnan()])


@each_backend
def test_nothing_finite_becomes_infinite(backend: str) -> None:
    """Nor the reverse, nor negative: with 4096 elements some would round up."""
    largest = torch.finfo(BF16).max
    tensors = make_tensors([4096])
    tensors.grads[0].fill_(math.sqrt(3.4e38))
    arguments = adam_arguments(tensors, BF16, beta2=0.5)
    arguments["exp_avg_sq"].fill_(largest)
    arguments["exp_avg_sq"][:3] = torch.tensor([math.inf, math.nan, 0.0])
    arguments["exp_avg"][:3] = torch.tensor([0.0, math.nan, -0.0])
    tensors.grads[0][:3] = 0.0
    BACKENDS[backend].adam_step(**arguments)
    v, m = arguments["exp_avg_sq"], arguments["exp_avg"]
    assert v[0] == math.inf and v[1].isnan() and v[2] == 0.0
    assert m[0] == 0.0 and m[1].isnan() and m[2] == 0.0
    assert (v[3:] == largest).all()
    assert m[3:].isfinite().all()


def exact_arguments(numel: int, step: int) -> dict[str, Any]:
    """A step in which the arithmetic is exact, so that only the rounding is left to differ."""
    draw = lambda n: torch.randint(-255, 256, (n,)).double()  # noqa: E731
    tensors = make_tensors(split(numel, 5), draw=draw, gaps=(0, 3))
    for grad in tensors.grads:
        grad.copy_(torch.randint(-1000, 1000, grad.shape))
    arguments = adam_arguments(tensors, BF16, beta1=0.5, beta2=0.75, step=step)
    arguments["exp_avg_sq"] = torch.randint(0, 256, (tensors.numel,)).to(BF16)
    arguments["exp_avg"] = torch.randint(-255, 256, (tensors.numel,)).to(BF16)
    return arguments


@pytest.mark.parametrize("step", [1, 2, 77, 2**24 + 1, 2**35 + 5])
def test_kernel_and_twin_and_formula_have_the_same_bits(step: int) -> None:
    arguments = exact_arguments(20_001, step)
    tensors = Tensors(
        arguments["params"], arguments["grads"], arguments["offsets"], arguments["exp_avg"].numel()
    )
    g, covered = tensors.flat(tensors.grads), tensors.covered()
    m = (0.5 * (arguments["exp_avg"].double() + g)).float()
    v = (0.75 * arguments["exp_avg_sq"].double() + 0.25 * g * g).float()
    random = random_bits(0, tensors.numel, step, CPU)
    expected = {name: arguments[name].clone() for name in MOMENTS}
    for name, value, half in (("exp_avg", m, random >> 16), ("exp_avg_sq", v, random & 0xFFFF)):
        rounded = torch.empty_like(expected[name])
        store_stochastic(rounded, value, half)
        expected[name][covered] = rounded[covered]
    for backend in BACKENDS.values():
        mine = clone_arguments(arguments)
        backend.adam_step(**mine)
        for name in MOMENTS:
            assert same_bits(mine[name], expected[name]), name


@each_backend
def test_updates_below_half_a_unit_are_not_lost(backend: str) -> None:
    """v goes from 1 towards 0.81 by 2e-4 a step, a tenth of what rounding to nearest notices."""
    numel, count, beta2 = 2048, 1000, 0.999
    if backend == "reference":
        count = 300
    tensors = make_tensors([numel])
    tensors.grads[0].fill_(0.9)
    arguments = adam_arguments(tensors, BF16, beta2=beta2)
    arguments["exp_avg_sq"].fill_(1.0)
    nearest = torch.ones(numel, dtype=BF16)
    for step in range(1, count + 1):
        BACKENDS[backend].adam_step(**arguments | {"step": step})
        nearest = (beta2 * nearest.float() + (1 - beta2) * 0.81).to(BF16)
    assert (nearest == 1.0).all()
    v = arguments["exp_avg_sq"].double()
    expected = 0.81 + 0.19 * beta2**count
    assert abs(v.mean() - expected) < 5 * v.std() / math.sqrt(numel)
    assert v.std() < 0.05


def test_noise_of_the_moments_is_what_the_docstring_says() -> None:
    numel = 4096
    tensors = make_tensors([numel])
    runs = [adam_arguments(tensors, state, lr=0.0) for state in (F32, BF16)]
    for arguments in runs:
        arguments["exp_avg"].zero_()
        arguments["exp_avg_sq"].fill_(1.0)
    for step in range(1, 3001):
        tensors.grads[0].normal_()
        for arguments in runs:
            NATIVE.adam_step(**arguments | {"step": step})
    (m, v), (m_kept, v_kept) = ([a[name].double() for name in MOMENTS] for a in runs)
    of_v, of_m = v_kept / v - 1, (m_kept - m) / m.std()
    assert 0.03 < of_v.std() < 0.05 and 0.003 < of_m.std() < 0.007
    for error in (of_v, of_m):
        assert abs(error.mean()) < 5 * error.std() / math.sqrt(numel)


@each_backend
def test_the_largest_v_is_rounded_to_nearest(backend: str) -> None:
    """Stochastically it would climb: the maximum of many roundings is one upwards."""
    tensors = make_tensors([3000])
    arguments = adam_arguments(tensors, BF16, beta2=0.0, amsgrad=True)
    arguments["max_exp_avg_sq"].zero_()
    largest = torch.zeros(3000)
    for step in range(1, 20):
        tensors.grads[0].normal_()
        largest = torch.maximum(largest, tensors.grads[0] ** 2)
        BACKENDS[backend].adam_step(**arguments | {"step": step})
    assert same_bits(arguments["max_exp_avg_sq"], largest.to(BF16))


# --- the same bits whatever the machine does ------------------------------------------------


def step_in_pieces(pieces: int) -> dict[str, Tensor]:
    """Two steps on the same 150,001 numbers, in so many tensors."""
    torch.manual_seed(5)
    numel = 150_001
    values = [torch.randn(numel) for _ in range(2)]
    arguments = adam_arguments(make_tensors([numel]), BF16, amsgrad=True, weight_decay=0.1)
    sizes = split(numel, pieces)
    for name, value in zip(("params", "grads"), values, strict=True):
        arguments[name] = [part.clone() for part in value.split(sizes)]
    arguments["offsets"] = [sum(sizes[:i]) for i in range(pieces)]
    for step in (1, 2):
        NATIVE.adam_step(**arguments | {"step": step})
    found = {name: arguments[name] for name in (*MOMENTS, "max_exp_avg_sq")}
    return {**found, "params": torch.cat(arguments["params"])}


def digest() -> str:
    found = step_in_pieces(30).values()
    return hashlib.sha256(b"".join(bits(t).numpy().tobytes() for t in found)).hexdigest()


def test_threads_and_cuts() -> None:
    expected = step_in_pieces(1)
    for threads, pieces in ((1, 300), (2, 1), (3, 30)):
        torch.set_num_threads(threads)
        for name, value in step_in_pieces(pieces).items():
            assert same_bits(value, expected[name]), (name, threads, pieces)


@pytest.mark.parametrize("level", ["default", "avx2", "avx512"])
def test_levels(level: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ
        | {
            "FUSE_EXT_CPU_LEVEL": level,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if "is not available here" in done.stderr:
        pytest.skip(f"this CPU does not run {level}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest()


if __name__ == "__main__":
    print(digest())
