"""Adam's moments in bfloat16: what is stored is a fair rounding, and the optimizers live with it.

Run as a program, this file prints a digest of the results at the instruction-set level of the
environment. Eq. 2 itself is compared with float64 in test_ops_adam.py.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from adam_cases import frozen, give_grads, make_params, snapshot, steps, torch_adam, twin
from ops_cases import (
    BACKENDS,
    BF16,
    F16,
    F32,
    F64,
    NATIVE,
    Tensors,
    adam_arguments,
    bits,
    clone_arguments,
    make_tensors,
    same_bits,
    split,
)
from resume_cases import run, through_deepcopy, through_pickle, through_torch_save
from torch import Tensor, nn

import fuse_ext
from fuse_ext import Adam, FusePV
from fuse_ext.kernels.reference.stochastic import random_bits, store_stochastic

CPU = torch.device("cpu")
ULP = 2.0**-7  # at most, relative
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


# --- the optimizers -------------------------------------------------------------------------


def narrow(params: Any, **options: Any) -> Adam:
    return Adam(params, moment_dtype=BF16, **options)


@each_backend
def test_the_first_step_is_that_of_float32_moments(backend: str) -> None:
    """The step is made with the moments as they are before they are stored."""
    params = make_params()
    twins = twin(params)
    ours, full = narrow(params, lr=0.1, backend=backend), Adam(twins, lr=0.1, backend=backend)
    steps(1, ours, full)
    assert frozen(params) == frozen(twins)
    for p, q in zip(params, twins, strict=True):
        for name in MOMENTS:
            assert ours.state[p][name].dtype == BF16
            torch.testing.assert_close(
                ours.state[p][name].float(), full.state[q][name], rtol=ULP, atol=0
            )


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize("options", ({}, {"amsgrad": True, "weight_decay": 0.1}), ids=str)
def test_both_backends_with_groups_and_missing_gradients(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """Parameters of different step counts, one group joining late; rounding may fall otherwise
    where a result differs in its last bit."""
    params = make_params(dtype, [(300,), (20, 5), (7,), (0,), (40,)])
    families = [params, twin(params)]
    made = [
        narrow(
            [{"params": family[:1], "lr": 0.1}, {"params": family[1:4], "betas": (0.8, 0.99)}],
            backend=backend,
            **options,
        )
        for family, backend in zip(families, BACKENDS, strict=True)
    ]
    for step in range(30):
        give_grads(*families)
        if step == 10:
            for family, optimizer in zip(families, made, strict=True):
                optimizer.add_param_group({"params": family[4:]})
        if step % 3:
            for family in families:
                family[step % 4].grad = None
        for optimizer in made:
            optimizer.step()
    assert len({int(made[0].state[p]["step"]) for p in params}) > 2
    moved = 2 * ULP if dtype != F32 else 1e-3
    for p, q in zip(*families, strict=True):
        torch.testing.assert_close(p, q, rtol=moved, atol=moved)
        for name, moment in made[0].state[p].items():
            twin_moment = made[1].state[q][name]
            torch.testing.assert_close(moment, twin_moment, rtol=2 * ULP, atol=1e-5, msg=name)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("through", (through_torch_save, through_pickle, through_deepcopy))
@each_backend
def test_resuming_is_bit_for_bit(capturable: bool, through: Any, backend: str) -> None:
    def make(params: list[Tensor], backend: str) -> Adam:
        groups = [{"params": params[:2], "lr": 0.05}, {"params": params[2:], "weight_decay": 0.1}]
        return narrow(groups, amsgrad=True, capturable=capturable, backend=backend)

    params = make_params()
    optimizer = make(params, backend)
    run(optimizer, 6)
    copies, resumed = through(make, params, optimizer, backend)
    before = snapshot(resumed)
    run(optimizer, 5)
    assert snapshot(resumed) == before
    run(resumed, 5)
    assert frozen(copies) == frozen(params)
    assert frozen(resumed.state_dict()) == frozen(optimizer.state_dict())
    assert resumed.state[copies[0]]["exp_avg"].dtype == BF16


def test_capturable_steps_have_the_same_bits() -> None:
    params = make_params()
    twins = twin(params)
    ours, captured = narrow(params, lr=0.1), narrow(twins, lr=0.1, capturable=True)
    steps(20, ours, captured)
    assert frozen(params) == frozen(twins)
    for p, q in zip(params, twins, strict=True):
        assert all(same_bits(ours.state[p][name], captured.state[q][name]) for name in MOMENTS)


def test_checkpoints_of_float32_moments_go_both_ways() -> None:
    """The dtype is that of the optimizer at hand, not of the one that saved."""
    twins = make_params()
    theirs, full = torch_adam(twins, lr=0.1), Adam(twin(twins), lr=0.1)
    steps(3, theirs, full)
    for saved in (theirs.state_dict(), full.state_dict()):
        params = twin(twins)
        ours = narrow(params)
        ours.load_state_dict(copy.deepcopy(saved))
        assert ours.param_groups[0]["moment_dtype"] == BF16 and ours.param_groups[0]["lr"] == 0.1
        for p, q in zip(params, twins, strict=True):
            for name in MOMENTS:
                assert same_bits(ours.state[p][name], theirs.state[q][name].to(BF16))
            assert ours.state[p]["step"] == 3
        steps(2, ours)
    saved = copy.deepcopy(ours.state_dict())
    for kind in (Adam, torch.optim.Adam):
        again = twin(params)
        back = kind(again)
        back.load_state_dict(copy.deepcopy(saved))
        for p, q in zip(params, again, strict=True):
            assert same_bits(back.state[q]["exp_avg"], ours.state[p]["exp_avg"].float())
        steps(1, back)
        assert back.state[again[0]]["exp_avg"].dtype == F32


def test_training_ends_where_float32_moments_end() -> None:
    torch.manual_seed(1)
    x = torch.randn(256, 20)
    y = (x @ torch.randn(20, 4)).argmax(1)
    losses = {}
    for dtype in (None, BF16):
        torch.manual_seed(2)
        net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
        optimizer = Adam(net.parameters(), lr=0.01, moment_dtype=dtype)
        for step in range(400):
            batch = slice(64 * (step % 4), 64 * (step % 4 + 1))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
        losses[dtype] = nn.functional.cross_entropy(net(x), y).item()
    assert losses[None] < 0.05
    assert losses[BF16] == pytest.approx(losses[None], rel=0.1)


# --- FusePV ---------------------------------------------------------------------------------


def step_noisily(optimizers: list[FusePV], count: int) -> None:
    for _ in range(count):
        families = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
        for relatives in zip(*families, strict=True):
            noise = torch.randn_like(relatives[0])
            for p in relatives:
                p.grad = p.detach() + 0.1 * noise
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("eps_inside_root", [False, True])
def test_averages_take_the_moments_over_in_float32(eps_inside_root: bool) -> None:
    params = make_params()
    families = [params, twin(params)]
    made = [
        FusePV(
            family, 0.01, switch=20, moment_dtype=dtype, pairs="averaged",
            eps_inside_root=eps_inside_root, eps=1e-3,
        )
        for family, dtype in zip(families, (BF16, None), strict=True)
    ]  # fmt: skip
    step_noisily(made, 19)
    assert made[0].state[params[0]]["exp_avg"].dtype == BF16
    step_noisily(made, 1)
    ours, full = (o.state[family[0]] for o, family in zip(made, families, strict=True))
    assert made[0].phase == "lbfgs" and "exp_avg" not in ours
    for name in ("grad_avg", "root_metric"):
        assert ours[name].dtype == F32
        torch.testing.assert_close(ours[name], full[name], rtol=0.05, atol=0.01)
    step_noisily(made, 40)
    for p, q in zip(*families, strict=True):
        torch.testing.assert_close(p, q, rtol=0.1, atol=0.05)
    made[0].switch_back()
    step_noisily(made[:1], 1)
    assert made[0].state[params[0]]["exp_avg"].dtype == BF16


def test_fuse_pv_resumes_bit_for_bit_in_both_phases() -> None:
    params = make_params()
    optimizer = FusePV(params, 0.01, switch=6, moment_dtype=BF16, pairs="averaged")
    for _ in range(2):
        step_noisily([optimizer], 5)
        copies = twin(params)
        resumed = FusePV(copies, switch=6, moment_dtype=BF16, pairs="averaged")
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step_noisily([optimizer, resumed], 3)
        assert frozen(copies) == frozen(params)
    assert optimizer.phase == "lbfgs"


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", ["Adam", "FusePV"])
def test_memory_is_half_and_as_estimated(name: str, amsgrad: bool) -> None:
    params = [nn.Parameter(torch.randn(size)) for size in (1000, 7)]
    options: dict[str, Any] = {"amsgrad": amsgrad, "moment_dtype": BF16}
    estimate = fuse_ext.estimate_memory(params, name, **options).phases[0]
    assert estimate.state_bytes == 1007 * (6 if amsgrad else 4) + 2 * 4
    optimizer = getattr(fuse_ext, name)(params, **options)
    give_grads(params)
    optimizer.step()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    }
    assert sum(storages.values()) == estimate.state_bytes
    if name == "FusePV":
        assert optimizer.report().state_bytes == estimate.state_bytes


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", (Adam, FusePV))
@pytest.mark.parametrize("dtype", (F64, torch.complex64, torch.complex128), ids=str)
def test_other_parameters_are_refused(kind: Any, dtype: torch.dtype) -> None:
    wide = make_params(dtype, [(3,)])
    message = rf"moment_dtype=torch.bfloat16 is for real .* params\[1\] has {dtype}"
    with pytest.raises(ValueError, match=message):
        kind([*make_params(F32, [(2,)]), *wide], moment_dtype=BF16)
    params = make_params(F32, [(2,)])
    optimizer = kind(params, moment_dtype=BF16)
    give_grads(params)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": wide})
    assert snapshot(optimizer) == before
    optimizer.step()


@pytest.mark.parametrize("kind", (Adam, FusePV))
@pytest.mark.parametrize("dtype", (F16, F32, "bfloat16", True))
def test_other_dtypes_are_refused(kind: Any, dtype: Any) -> None:
    message = f"moment_dtype must be None or torch.bfloat16, got {dtype!r}"
    with pytest.raises(ValueError, match=message):
        kind(make_params(), moment_dtype=dtype)


def test_all_groups_have_one() -> None:
    groups = [{"params": make_params()}, {"params": make_params(), "moment_dtype": None}]
    with pytest.raises(ValueError, match="moment_dtype must be the same in all parameter groups"):
        narrow(groups)


if __name__ == "__main__":
    print(digest())
