"""Adam(capturable=True): the ordinary step's bits, and nothing read from the device."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from capture_cases import Bowl, NothingRead, fake_cuda
from torch import Tensor

from fuse_ext import Adam

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def state_of(optimizer: Any) -> list[Tensor]:
    """Every tensor of the state but the step counts, in order; then these as numbers."""
    entries = [optimizer.state[p] for g in optimizer.param_groups for p in g["params"]]
    moments = [v for e in entries for k, v in sorted(e.items()) if k != "step"]
    steps = [float(e["step"]) if e else -1.0 for e in entries]
    return [*moments, torch.tensor(steps)]


def train(optimizer: Any, bowl: Bowl, steps: int, drop: dict[int, set[int]] | None = None) -> None:
    """Steps; ``drop`` says which parameters have no gradient at which step."""
    for step in range(steps):
        for p in bowl.params:
            p.grad = None
        bowl.closure()
        for i in (drop or {}).get(step, ()):
            bowl.params[i].grad = None
        optimizer.step()


def check_same(options: dict[str, Any], drop: Any = None, dtype: torch.dtype = F32) -> None:
    results = []
    for capturable in (False, True):
        bowl = Bowl(dtype)
        optimizer = Adam(bowl.params, capturable=capturable, **{"lr": 0.05, **options})
        train(optimizer, bowl, 25, drop)
        results.append([bowl.place(), *state_of(optimizer)])
        assert optimizer.grad_norm_sq > 0
        results[-1].append(torch.tensor(optimizer.grad_norm_sq))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor lr": {"lr": torch.tensor(0.03)},
    "tensor lr of one element": {"lr": torch.tensor([0.03], dtype=F64)},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"decoupled_weight_decay": True, "weight_decay": 0.1, "lr": torch.tensor(0.03)},
    "maximize": {"maximize": True, "lr": 1e-3},
    "inside": {"eps_inside_root": True, "betas": (0.5, 0.9)},
    "reference": {"backend": "reference", "lr": torch.tensor(0.03)},
}


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_bits(options: dict[str, Any], dtype: torch.dtype) -> None:
    check_same(options, dtype=dtype)


@pytest.mark.parametrize(
    "drop",
    [
        {step: {2} for step in range(25)},
        {step: {0} for step in range(9)},
        {3: {0, 1}, 4: {1}, 8: {2}, 9: {0, 1, 2}},
        {step: {step % 3} for step in range(25)},
    ],
    ids=["never", "late", "sometimes", "in turn"],
)
def test_parameters_without_gradients(drop: dict[int, set[int]]) -> None:
    check_same({"amsgrad": True}, drop)


def test_groups() -> None:
    results = []
    for capturable in (False, True):
        bowl = Bowl()
        lr = torch.tensor(0.01)
        groups: list[dict[str, Any]] = [
            {"params": bowl.params[:1], "lr": 0.1},
            {"params": bowl.params[1:], "lr": lr, "amsgrad": True},
        ]
        optimizer = Adam(groups, capturable=capturable)
        train(optimizer, bowl, 10, {4: {1}})
        lr.fill_(0.002)
        train(optimizer, bowl, 10)
        results.append([bowl.place(), *state_of(optimizer)])
        results[-1].append(torch.tensor(optimizer.grad_norm_sq))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_schedule_drives_the_tensor() -> None:
    places = []
    for lr in (0.1, torch.tensor(0.1, dtype=F64)):
        bowl = Bowl()
        optimizer = Adam(bowl.params, lr=lr, capturable=True)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(10):
            train(optimizer, bowl, 1)
            schedule.step()
        places.append(bowl.place())
    torch.testing.assert_close(places[0], places[1], rtol=1e-6, atol=1e-7)


def test_grad_scaler_decides_on_the_device() -> None:
    places = []
    for capturable in (False, True):
        bowl = Bowl()
        optimizer = Adam(bowl.params, lr=0.1, capturable=capturable)
        for step in range(6):
            bowl.closure()
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.zeros(1)
            for p in bowl.params:
                p.grad.mul_(8.0)
            if step in (0, 3):
                bowl.params[0].grad[0] = torch.inf
                optimizer.found_inf = torch.ones(1)
            optimizer.step()
        places.append(bowl.place())
        # A parameter's state appears with its first step; of this one the device knows alone.
        assert float(optimizer.state[bowl.params[0]]["step"]) == 4
    assert torch.equal(*places)


# --- nothing is read ------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_nothing_is_read_and_nothing_allocated(lr: Any) -> None:
    bowl = Bowl()
    optimizer = Adam(bowl.params, lr=lr, amsgrad=True, capturable=True)
    bowl.closure()
    optimizer.step()
    for _ in range(4):
        bowl.closure()
        with NothingRead(limit=2) as seen:
            optimizer.step()
        assert seen.ops == ["fuse_ext::adam_step"]


def test_nothing_is_read_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch):
        bowl = Bowl(device="cuda")
        optimizer = Adam(bowl.params, capturable=True)
        for step in range(4):
            bowl.closure()
            if step == 2:
                bowl.params[1].grad = None
                optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")
                optimizer.grad_scale = torch.tensor(2.0, device="cuda")
                optimizer.found_inf = torch.zeros((), device="cuda")
            optimizer.step()
        assert {e["step"].device.type for e in optimizer.state.values()} == {"cuda"}


def test_a_capture_repeats_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch, capturing=True) as device:
        bowl = Bowl(device="cuda")
        optimizer = Adam(bowl.params, capturable=True)
        bowl.closure()
        with pytest.raises(RuntimeError, match="Adam's state is made while a CUDA graph"):
            optimizer.step()
        device.capturing = False
        optimizer.step()
        device.capturing = True
        optimizer.step()
        bowl.params[1].grad = None
        with pytest.raises(RuntimeError, match="2 of 3 parameters that have taken as many steps"):
            optimizer.step()


def test_lr_tensors_that_no_kernel_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    bowl = Bowl()
    bowl.closure()
    optimizer = Adam(bowl.params, lr=torch.tensor(1, dtype=torch.int32), capturable=True)
    with pytest.raises(TypeError, match=r"lr must be float32 or float64 .* torch.int32"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.ones(2)
    with pytest.raises(ValueError, match="lr must have one element, got a tensor of 2"):
        optimizer.step()
    with fake_cuda(monkeypatch):
        bowl = Bowl(device="cuda")
        bowl.closure()
        optimizer = Adam(bowl.params, capturable=True)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        with pytest.raises(ValueError, match="lr is on cpu but the parameters are on cuda"):
            optimizer.step()


# --- checkpoints ----------------------------------------------------------------------------


def twin(bowl: Bowl) -> Bowl:
    other = Bowl()
    for p, q in zip(other.params, bowl.params, strict=True):
        p.data.copy_(q.data)
    return other


@pytest.mark.parametrize("then", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_state_dict_goes_both_ways(first: bool, then: bool) -> None:
    bowl = Bowl()
    optimizer = Adam(bowl.params, lr=0.1, capturable=first)
    train(optimizer, bowl, 5, {0: {2}, 3: {1}})
    other = twin(bowl)
    loaded = Adam(other.params, lr=0.1, capturable=then)
    loaded.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert loaded.param_groups[0]["capturable"] is then
    for a, b in ((optimizer, bowl), (loaded, other)):
        train(a, b, 5, {1: {0}})
    assert torch.equal(bowl.place(), other.place())
    for x, y in zip(state_of(optimizer), state_of(loaded), strict=True):
        assert torch.equal(x, y)


def test_torchs_checkpoints() -> None:
    bowl = Bowl()
    optimizer = Adam(bowl.params, lr=0.1, capturable=True)
    train(optimizer, bowl, 5, {0: {2}})
    other = twin(bowl)
    torchs = torch.optim.Adam(other.params, lr=0.1)
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch keeps step counts as is
    third = twin(bowl)
    again = Adam(third.params, lr=0.1, capturable=True)
    again.load_state_dict(torchs.state_dict())  # torch.optim's own checkpoint
    # torch's own capturable needs an accelerator.
    torchs.param_groups[0]["capturable"] = False
    for a, b in ((optimizer, bowl), (torchs, other), (again, third)):
        train(a, b, 5)
    assert torch.equal(bowl.place(), third.place())
    torch.testing.assert_close(bowl.place(), other.place(), rtol=1e-5, atol=1e-6)


def test_copies_are_independent() -> None:
    bowl = Bowl()
    optimizer = Adam(bowl.params, lr=0.1, capturable=True)
    train(optimizer, bowl, 3, {0: {1}})
    pairs = [(optimizer, bowl), copy.deepcopy((optimizer, bowl))]
    pairs.append(pickle.loads(pickle.dumps((optimizer, bowl))))
    for one, its in pairs:
        train(one, its, 3)
    assert torch.equal(pairs[0][1].place(), pairs[1][1].place())
    assert torch.equal(pairs[0][1].place(), pairs[2][1].place())


def test_step_counts_in_the_state_are_the_kernels_own() -> None:
    """They are shared by parameters that step together; writing to one is writing to all."""
    bowl, other = Bowl(), Bowl()
    optimizer = Adam(bowl.params, lr=0.1, capturable=True)
    ordinary = Adam(other.params, lr=0.1)
    for one, its in ((optimizer, bowl), (ordinary, other)):
        train(one, its, 3)
        for p in its.params if one is ordinary else its.params[:1]:
            one.state[p]["step"].fill_(100.0)
        train(one, its, 3)
    assert torch.equal(bowl.place(), other.place())
