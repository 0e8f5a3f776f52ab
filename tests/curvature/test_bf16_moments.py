"""Adam's moments in bfloat16: the optimizers live with them.

Their rounding is tested in kernels/test_stochastic.py.
"""

from __future__ import annotations

import copy
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
    same_bits,
)
from resume_cases import run, through_deepcopy, through_pickle, through_torch_save
from torch import Tensor, nn

import fuse_ext
from fuse_ext import Adam, FusePV

ULP = 2.0**-7  # at most, relative
MOMENTS = ("exp_avg", "exp_avg_sq")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


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


def test_fuse_pv_resumes_bit_for_bit_in_both_phases() -> None:
    params = make_params()
    optimizer = FusePV(params, 0.01, switch=6, moment_dtype=BF16)
    for _ in range(2):
        step_noisily([optimizer], 5)
        copies = twin(params)
        resumed = FusePV(copies, switch=6, moment_dtype=BF16)
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
