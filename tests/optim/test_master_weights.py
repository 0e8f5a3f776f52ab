"""``master_weights``: bfloat16 parameters take steps that are too small for them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adam_cases import BACKENDS, frozen
from living_cases import correlated
from torch import Tensor, nn

import fuse_ext
from fuse_ext import Adam, FusePV

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SWITCH = 10
# Steps of at most 1e-4: weights are some 0.3, and a bfloat16 of that size has a spacing of 0.002.
KINDS: dict[str, Callable[..., Any]] = {
    "adam": lambda p, **o: Adam(p, lr=1e-4, **o),
    "adam decoupled": lambda p, **o: Adam(
        p, lr=1e-4, weight_decay=0.1, decoupled_weight_decay=True, **o
    ),
    "adam amsgrad": lambda p, **o: Adam(p, lr=1e-4, weight_decay=0.1, amsgrad=True, **o),
    "adam capturable": lambda p, **o: Adam(p, lr=1e-4, capturable=True, **o),
    "adam bf16 moments": lambda p, **o: Adam(p, lr=1e-4, moment_dtype=BF16, **o),
    "adam phase": lambda p, **o: FusePV(p, lr=1e-4, switch=10**6, **o),
    "diagonal": lambda p, **o: FusePV(
        p, lr=1e-4, switch=SWITCH, deterministic=False, metric="diagonal", step_cap=1.0, **o
    ),
    "kronecker": lambda p, **o: FusePV(
        p, lr=1e-4, switch=SWITCH, deterministic=False, metric="kronecker", step_cap=1.0, **o
    ),
    "kronecker decoupled": lambda p, **o: FusePV(
        p,
        lr=1e-4,
        switch=SWITCH,
        deterministic=False,
        metric="kronecker",
        step_cap=1.0,
        weight_decay=0.1,
        decoupled_weight_decay=True,
        **o,
    ),
}
SECOND = ("diagonal", "kronecker", "kronecker decoupled")


class Run:
    """A network whose weights are bfloat16 numbers at first, in whatever dtype they are."""

    def __init__(self, make: Callable[..., Any], dtype: torch.dtype = BF16, **options: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)]
        self.model = nn.Sequential(*layers).to(BF16).to(dtype)
        self.params = list(self.model.parameters())
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(64, 8, generator=generator).to(BF16)
        self.x, self.y = x.to(dtype), (x[:, :4] * x[:, 4:]).to(dtype)
        self.optimizer = make(self.params, **options)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.model(self.x) - self.y).float().square().mean()
        loss.backward()
        return loss.detach()

    def train(self, steps: int) -> float:
        for _ in range(steps):
            loss = self.optimizer.step(self.closure)
        return float(loss)

    @property
    def masters(self) -> list[Tensor]:
        return [self.optimizer.state[p]["master_weight"] for p in self.params]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_stands_still_without_them(kind: str, backend: str) -> None:
    make, start = KINDS[kind], Run(KINDS["adam"]).closure()
    wide = Run(make, F32, backend=backend).train(250)
    still = Run(make, backend=backend)
    with_them = Run(make, backend=backend, master_weights=True)
    fell = float(start) - wide
    assert fell > 0.03
    assert float(start) - still.train(250) < 0.5 * fell
    assert with_them.train(250) == pytest.approx(wide, abs=0.08 * fell)
    for param, master in zip(with_them.params, with_them.masters, strict=True):
        assert master.dtype == F32
        assert torch.equal(param, master.to(BF16))
    assert getattr(with_them.optimizer, "phase", "adam") == ("lbfgs" if kind in SECOND else "adam")


def test_steps_are_those_of_float32_on_the_same_gradients() -> None:
    """To the bit, as long as parameters and gradients are the same."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator).to(BF16)
    narrow, wide = start.clone().requires_grad_(), start.float().requires_grad_()
    ours, theirs = Adam([narrow], lr=1e-3, master_weights=True), Adam([wide], lr=1e-3)
    for _ in range(20):
        grad = torch.randn(7, 5, generator=generator).to(BF16)
        narrow.grad, wide.grad = grad, grad.float()
        ours.step()
        theirs.step()
        assert torch.equal(ours.state[narrow]["master_weight"], wide)
        assert torch.equal(narrow, wide.to(BF16))


@pytest.mark.parametrize("steps", [3, SWITCH, SWITCH + 1, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_bit_for_bit(kind: str, steps: int) -> None:
    run, other = (Run(KINDS[kind], master_weights=True) for _ in range(2))
    run.train(steps)
    file = io.BytesIO()
    torch.save((run.model.state_dict(), run.optimizer.state_dict()), file)
    file.seek(0)
    model, optimizer = torch.load(file, weights_only=True)
    other.optimizer.load_state_dict(optimizer)  # before the model and its parameters
    other.model.load_state_dict(model)
    copied = copy.deepcopy(run)
    for each in (run, other, copied):
        each.train(15)
    for each in (other, copied):
        assert frozen(each.params) == frozen(run.params)
        assert frozen(each.masters) == frozen(run.masters)


@pytest.mark.parametrize("kind", ["adam", *SECOND])
def test_a_checkpoint_with_them_is_taken_without_and_the_reverse(kind: str) -> None:
    for has in (False, True):
        run = Run(KINDS[kind], master_weights=has)
        run.train(30)
        other = Run(KINDS[kind], master_weights=not has)
        other.model.load_state_dict(run.model.state_dict())
        other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        other.train(3)
        held = ["master_weight" in other.optimizer.state.get(p, {}) for p in other.params]
        assert held == [not has] * len(held)


@pytest.mark.parametrize("kind", ["adam", "adam capturable", *SECOND])
def test_what_a_user_writes_into_a_parameter_counts(kind: str) -> None:
    run = Run(KINDS[kind], master_weights=True)
    run.train(40)
    before = [master.clone() for master in run.masters]
    with torch.no_grad():
        run.params[0][0, 0] = 3.0
    run.train(1)
    assert run.masters[0][0, 0] == pytest.approx(3.0, abs=2e-3)
    others = torch.ones_like(run.params[0], dtype=torch.bool)
    others[0, 0] = False
    moved = (run.masters[0] - before[0]).abs()[others]
    assert 0.0 < moved.max() < 2e-3  # what was kept of them is not lost


def test_back_in_adam_they_go_on() -> None:
    for kind in SECOND:
        run = Run(KINDS[kind], master_weights=True)
        run.train(40)
        before = [master.clone() for master in run.masters]
        run.optimizer.switch_back()
        resumed = Run(KINDS[kind], master_weights=True)
        resumed.model.load_state_dict(run.model.state_dict())
        resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        for each in (run, resumed):
            each.train(1)
            for master, kept in zip(each.masters, before, strict=True):
                assert (master - kept).abs().max() <= 2e-4


def test_a_search_gives_them_up() -> None:
    run = Run(
        lambda p, **o: FusePV(p, lr=1e-4, switch=5, deterministic=True, **o), master_weights=True
    )
    run.train(4)
    assert len(run.masters) == 4
    run.train(4)
    assert run.optimizer.phase == "lbfgs"
    assert not any("master_weight" in run.optimizer.state.get(p, {}) for p in run.params)


def test_wide_and_narrow_parameters_and_late_gradients() -> None:
    """As in a network whose norms are in float32, and one that is frozen at first."""
    wide = torch.full((3,), 1.0, requires_grad=True)
    narrow, half = (torch.full((3,), 1.0, dtype=d, requires_grad=True) for d in (BF16, F16))
    optimizer = Adam([wide, narrow, half], lr=1e-4, master_weights=True)
    for step in range(40):
        for param in (wide, narrow, half):
            param.grad = None if param is half and step < 20 else torch.ones_like(param)
        optimizer.step()
    assert "master_weight" not in optimizer.state[wide]
    kept = [optimizer.state[p]["master_weight"] for p in (narrow, half)]
    torch.testing.assert_close(kept[0], wide.detach(), rtol=0.0, atol=1e-6)
    torch.testing.assert_close(kept[1], torch.full((3,), 0.998), rtol=0.0, atol=1e-5)
    optimizer.add_param_group({"params": [torch.zeros(2, dtype=BF16, requires_grad=True)]})
    assert frozen(optimizer.state[narrow]["master_weight"]) == frozen(kept[0])


def test_memory_formats_and_complex_parameters() -> None:
    weight = torch.randn(4, 3, 2, 2).to(BF16).to(memory_format=torch.channels_last)
    strided = torch.randn(6, 8).to(BF16)[:, ::2].requires_grad_()
    params = [
        weight.requires_grad_(),
        strided,
        torch.randn(3, dtype=torch.complex64).requires_grad_(),
    ]
    twins = [p.detach().clone().to(torch.promote_types(p.dtype, F32)) for p in params]
    twins = [p.requires_grad_() for p in twins]
    ours, theirs = Adam(params, lr=1e-3, master_weights=True), Adam(twins, lr=1e-3)
    for step in range(5):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.ones_like(p) * (step + 1)
            q.grad = torch.ones_like(q) * (step + 1)
        ours.step()
        theirs.step()
    for p, q in zip(params[:2], twins[:2], strict=True):
        assert torch.equal(ours.state[p]["master_weight"], q)
    assert torch.equal(params[2], twins[2])


@pytest.mark.parametrize("dtype", [F32, torch.float64])
def test_continue_in_a_wider_dtype_goes_on_from_them(dtype: torch.dtype) -> None:
    run = Run(KINDS["adam phase"], master_weights=True)
    run.train(20)
    kept = [master.clone() for master in run.masters]
    run.model.to(dtype)  # or it does so itself
    run.x, run.y = run.x.to(dtype), run.y.to(dtype)
    run.optimizer.continue_in(dtype)
    for param, master in zip(run.params, kept, strict=True):
        assert torch.equal(param, master.to(dtype))
        assert "master_weight" not in run.optimizer.state[param]
    run.train(5)


@pytest.mark.parametrize("name", ["Adam", "FusePV"])
def test_memory_is_as_estimated(name: str) -> None:
    params = [nn.Parameter(torch.ones(300, 40, dtype=BF16)), nn.Parameter(torch.ones(500))]
    estimate = fuse_ext.estimate_memory(params, name, master_weights=True)
    without = fuse_ext.estimate_memory(params, name)
    for phase, other in zip(estimate.phases, without.phases, strict=True):
        assert phase.state_bytes == other.state_bytes + 4 * 300 * 40
    switch = {} if name == "Adam" else {"switch": 5, "deterministic": False}
    optimizer = getattr(fuse_ext, name)(params, lr=1e-3, master_weights=True, **switch)
    for _ in range(45):
        for param in params:
            param.grad = correlated(param)
        optimizer.step()
    held = sum(
        storage.nbytes()
        for storage in {
            value.untyped_storage().data_ptr(): value.untyped_storage()
            for entry in optimizer.state.values()
            for value in entry.values()
            if isinstance(value, Tensor)
        }.values()
    )
    assert estimate.phases[-1].state_bytes == pytest.approx(held, rel=0.02)
    if name == "FusePV":
        assert optimizer.report().state_bytes == pytest.approx(held, rel=0.02)
