"""What people do around a large model, to its end and in both phases, beside the same run without.

Each recipe is compared with float64 where it changes the run, and with the plain run where it must
not. On minibatches without a closure, as a trainer calls it, and on the full batch with one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from fuse_ext import FusePV

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SWITCH, STEPS, BATCH = 10, 60, 24
KINDS: dict[str, dict[str, Any]] = {
    "minibatches": {"lr": 3e-3, "deterministic": False, "metric": "kronecker"},
    "full batch": {"lr": 3e-3, "deterministic": True},
}
both_kinds = pytest.mark.parametrize("kind", KINDS)


class Blocks(nn.Module):
    """A residual network, whose blocks may forget their activations."""

    def __init__(self, forgets: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(2)
        )
        self.outer, self.forgets = nn.Linear(16, 4), forgets

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.forgets else block(x))
        out: Tensor = self.outer(x)
        return out


@dataclass
class Recipe:
    """A training loop with its changes.

    Attributes:
        kind: On what: of ``KINDS``.
        dtype: Of the parameters.
        model: Makes it.
        wrap: What the loop calls in its place.
        options: More of FusePV's.
        groups: Makes parameter groups of the model.
        parts: Into how many micro-batches a batch is divided.
        clips: The longest gradient.
        autocast: Dtype of the forward pass.
        scaler: Scales the loss.
        schedule: Makes a scheduler of the optimizer.
        after: Called with the loop after every step.
    """

    kind: str
    dtype: torch.dtype = F32
    model: Callable[[], nn.Module] = Blocks
    wrap: Callable[[nn.Module], Any] = lambda model: model
    options: dict[str, Any] = field(default_factory=dict)
    groups: Callable[[nn.Module], Any] = lambda model: model.parameters()
    parts: int = 1
    clips: float | None = None
    autocast: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    schedule: Callable[[Any], Any] | None = None
    after: Callable[[Recipe], None] = lambda loop: None

    def run(self, steps: int = STEPS) -> Recipe:
        torch.manual_seed(0)
        self.network = self.model().to(self.dtype)
        self.called = self.wrap(self.network)
        given = {"switch": SWITCH, **KINDS[self.kind], **self.options}
        self.optimizer = FusePV(self.groups(self.network), **given)
        scheduler = self.schedule(self.optimizer) if self.schedule else None
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(96, 8, generator=generator, dtype=F64)
        y = (x[:, :4] * x[:, 4:]).tanh()
        self.x, self.y = x.to(self.dtype), y.to(self.dtype)
        self.lrs, self.norms = [], []
        for self.step in range(steps):
            self.lrs.append(self.optimizer.param_groups[0]["lr"])
            self.take_step()
            if scheduler is not None:
                scheduler.step()
            self.after(self)
        assert self.optimizer.phase == "lbfgs"
        assert self.optimizer.report().adam_steps == SWITCH
        return self

    def take_step(self) -> None:
        if self.kind == "full batch":
            self.optimizer.step(self.closure)
        elif self.scaler is None:
            self.closure()
            self.optimizer.step()
        else:
            self.closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=F64)
        for x, y in self.micro_batches():
            with torch.autocast("cpu", self.autocast or BF16, enabled=self.autocast is not None):
                found = self.called(x)
            loss = (found.to(self.dtype) - y).square().mean() / self.parts
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            total += loss.detach()
        if self.clips is not None:
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.clips)
            self.norms.append(float(norm))
        return total

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.arange(96)
        if self.kind == "minibatches":
            rows = (rows[:BATCH] + 17 * self.step) % 96
        for part in rows.chunk(self.parts):
            yield self.x[part], self.y[part]

    @property
    def loss(self) -> float:
        """On all data, without autocast."""
        with torch.no_grad():
            return float((self.network(self.x) - self.y).square().mean())

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.network.parameters()]


START = 0.60  # of the loss


def assert_near(one: Recipe, other: Recipe, within: float) -> None:
    """Both have learnt, and alike: losses differ by a share of what they have fallen."""
    fell = START - other.loss
    assert fell > 0.2
    assert one.loss == pytest.approx(other.loss, abs=within * fell)


def warm_up_then_cosine(optimizer: Any) -> Any:
    warm = schedulers.LinearLR(optimizer, 0.1, total_iters=8)
    cosine = schedulers.CosineAnnealingLR(optimizer, STEPS - 8)
    return schedulers.SequentialLR(optimizer, [warm, cosine], [8])


@both_kinds
def test_warm_up_then_cosine(kind: str) -> None:
    run, exact = (Recipe(kind, dtype, schedule=warm_up_then_cosine).run() for dtype in (F32, F64))
    assert run.lrs == exact.lrs
    assert run.lrs[0] == pytest.approx(3e-4) and max(run.lrs) == pytest.approx(3e-3)
    assert run.lrs[-1] < 1e-5
    assert_near(run, exact, 0.05)
    still = [weight.clone() for weight in run.weights]
    run.optimizer.param_groups[0]["lr"] = 0.0  # where the cosine ends
    run.take_step()
    assert all(map(torch.equal, run.weights, still))


def matrices_decay(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 3.0}, {"params": vectors, "weight_decay": 0.0}]


def test_decoupled_weight_decay_on_matrices_only() -> None:
    decoupled = {"decoupled_weight_decay": True}

    def go(dtype: torch.dtype = F32, groups: Any = matrices_decay) -> Recipe:
        return Recipe("minibatches", dtype, groups=groups, options=decoupled).run()

    run, exact, plain = go(), go(F64), go(groups=lambda model: model.parameters())
    assert_near(run, exact, 0.02)
    for decayed, free in zip(run.weights, plain.weights, strict=True):
        if decayed.ndim > 1:
            assert decayed.norm() < 0.9 * free.norm()
    # Without gradients there is nothing but the decay: (1 - lr wd) a step, longer steps or not.
    weights = [weight.clone() for weight in run.weights]
    run.optimizer.zero_grad()
    for param in run.network.parameters():
        param.grad = torch.zeros_like(param)
    for group in run.optimizer.param_groups:
        group["betas"] = (0.0, 0.999)  # nor an average of those before
    run.optimizer.step()
    for before, after in zip(weights, run.weights, strict=True):
        ratio = float(after.norm() / before.norm()) if before.norm() else 1.0
        assert ratio < 1.0 - 3e-3 if before.ndim > 1 else ratio == pytest.approx(1.0, abs=1e-3)


def test_decay_in_a_search_is_part_of_what_is_minimised() -> None:
    run, exact = (
        Recipe("full batch", dtype, groups=matrices_decay, options={"weight_decay": 0.0}).run()
        for dtype in (F32, F64)
    )
    assert run.loss == pytest.approx(exact.loss, rel=0.02)
    plain = Recipe("full batch").run()
    assert plain.loss < run.loss
    matrices = [w for w in run.weights if w.ndim > 1], [w for w in plain.weights if w.ndim > 1]
    assert sum(w.norm() for w in matrices[0]) < 0.8 * sum(w.norm() for w in matrices[1])


@both_kinds
def test_clipped_gradients(kind: str) -> None:
    """On one function what is clipped is no gradient of it, and the run goes down all the same."""
    run, exact = (Recipe(kind, dtype, clips=0.05).run() for dtype in (F32, F64))
    assert sum(norm > 0.05 for norm in run.norms) > 0.3 * len(run.norms)
    if kind == "minibatches":
        assert_near(run, exact, 0.02)
    else:
        assert run.loss < 0.8 * START and exact.loss < 0.8 * START


@both_kinds
def test_accumulated_gradients(kind: str) -> None:
    parts, whole = (Recipe(kind, F64, parts=parts).run() for parts in (4, 1))
    assert_near(parts, whole, 1e-3)
    if kind == "minibatches":
        torch.testing.assert_close(parts.weights, whole.weights, rtol=1e-6, atol=1e-7)


@both_kinds
def test_bfloat16_autocast(kind: str) -> None:
    run, exact = (Recipe(kind, autocast=autocast).run() for autocast in (BF16, None))
    # A search sees a loss whose noise it has to learn.
    if kind == "minibatches":
        assert_near(run, exact, 0.05)
    else:
        assert run.loss < 0.5 * START
    assert all(weight.dtype == F32 for weight in run.weights)


def test_a_grad_scaler() -> None:
    """Scales are powers of two, so that unscaled gradients are the same numbers."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=20)
    run, plain = (Recipe("minibatches", scaler=given).run() for given in (scaler, None))
    assert scaler.get_scale() > 2.0**12
    assert_near(run, plain, 1e-3)
    torch.testing.assert_close(run.weights, plain.weights, rtol=1e-4, atol=1e-5)
    before = [weight.clone() for weight in run.weights]
    scale = scaler.get_scale()
    run.closure()
    run.network.outer.weight.grad[0, 0] = math.inf  # type: ignore[union-attr]
    scaler.step(run.optimizer)
    scaler.update()
    assert all(map(torch.equal, run.weights, before))
    assert scaler.get_scale() == 0.5 * scale
    run.take_step()
    assert not any(map(torch.equal, run.weights, before))


@both_kinds
def test_an_average_of_the_weights(kind: str) -> None:
    averages: list[AveragedModel] = []
    by_hand: list[Tensor] = []

    def follow(loop: Recipe) -> None:
        if not averages:
            averages.append(AveragedModel(loop.network, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
            by_hand.extend(weight.clone() for weight in loop.weights)
        averages[0].update_parameters(loop.network)
        if loop.step:
            for mine, weight in zip(by_hand, loop.weights, strict=True):
                mine.lerp_(weight, 0.1)

    run, plain = Recipe(kind, F64, after=follow).run(), Recipe(kind, F64).run()
    assert all(map(torch.equal, run.weights, plain.weights))  # who looks on changes nothing
    torch.testing.assert_close([p.detach() for p in averages[0].module.parameters()], by_hand)
    with torch.no_grad():
        loss = float((averages[0](run.x) - run.y).square().mean())
    assert loss < START - 0.2


@both_kinds
@pytest.mark.parametrize("how", ["activation checkpoints", "torch.compile"])
def test_how_the_gradient_is_made_does_not_matter(kind: str, how: str) -> None:
    if how == "torch.compile":
        torch.compiler.reset()
        changed: dict[str, Any] = {"wrap": lambda model: torch.compile(model, backend="aot_eager")}
    else:
        changed = {"model": lambda: Blocks(forgets=True)}
    run, plain = Recipe(kind, F64, **changed).run(), Recipe(kind, F64).run()
    assert_near(run, plain, 1e-3)
    if kind == "minibatches":
        torch.testing.assert_close(run.weights, plain.weights, rtol=1e-6, atol=1e-7)


def test_all_of_it_at_once() -> None:
    """As a large model is trained: bfloat16 with master weights, decay, clipping, a schedule."""

    def go(dtype: torch.dtype, **more: Any) -> Recipe:
        recipe = Recipe(
            "minibatches",
            dtype,
            model=lambda: Blocks(forgets=True),
            groups=matrices_decay,
            parts=2,
            clips=1.0,
            schedule=warm_up_then_cosine,
            options={"decoupled_weight_decay": True, **more},
        )
        return recipe.run()

    run = go(BF16, master_weights=True, moment_dtype=BF16, metric="diagonal")
    assert_near(run, go(F32, metric="diagonal"), 0.1)
