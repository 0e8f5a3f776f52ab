"""The phase on minibatches in a living metric: against an oracle in float64, and its edges."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from living_cases import CAP, READY, SWITCH, Batches, factor_at
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fuse_ext import FusePV
from fuse_ext.phase.living import trend
from fuse_ext.phase.living.metric import kronecker
from fuse_ext.phase.living.metric.kronecker import GATHER, MEASURE, REFRESH
from fuse_ext.phase.living.metric.sides import Form, form_of
from fuse_ext.tell.log import REST


def oracle(
    run: Batches,
    steps: int,
    factors: Callable[[int], float],
    matrices: bool,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.0,
    decoupled: bool = False,
) -> None:
    """The textbook's formulas, matrix by matrix, on the parameters of ``run``.

    Eigenvectors are taken in full where the phase takes one step of orthogonal iteration, so that
    this is its equal until the first renewal.
    """
    beta1, beta2 = betas
    lr = 0.01
    held: list[dict[str, Any]] = [
        {"m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in run.params
    ]
    for k in range(1, steps + 1):
        run.closure()
        after = k - SWITCH  # steps of the phase, this one included
        factor = factors(after - 1) if after > 0 else 1.0
        with torch.no_grad():
            for param, s in zip(run.params, held, strict=True):
                assert param.grad is not None
                g = param.grad + (0.0 if decoupled else decay) * param
                s["m"] = beta1 * s["m"] + (1 - beta1) * g
                mean = s["m"] / (1 - beta1**k)
                matrix = g.reshape(g.shape[0], -1)
                rotate = matrices and param.ndim > 1 and after > 0
                if rotate:
                    weight = max(0.05, 1 / after)
                    for name, product in (("L", matrix @ matrix.T), ("R", matrix.T @ matrix)):
                        old = s.get(name, torch.zeros_like(product))
                        s[name] = old + weight * (product - old)
                if rotate and after == GATHER:
                    s["QL"], s["QR"] = (torch.linalg.eigh(s[name])[1].flip(1) for name in "LR")
                    s["w"] = torch.zeros_like(matrix)
                if rotate and after >= GATHER:
                    rotated = s["QL"].T @ matrix @ s["QR"]
                    s["w"] = beta2 * s["w"] + (1 - beta2) * rotated**2
                if rotate and after > READY:
                    seen = after - GATHER + 1
                    inner = s["QL"].T @ mean.reshape(matrix.shape) @ s["QR"]
                    inner = inner / ((s["w"] / (1 - beta2**seen)).sqrt() + eps)
                    step = (s["QL"] @ inner @ s["QR"].T).reshape(param.shape)
                    step = step * min(max(s["stretch"], 1.0), max(1.0, CAP / max(factor, 1.0)))
                else:
                    s["v"] = beta2 * s["v"] + (1 - beta2) * g**2
                    step = mean / ((s["v"] / (1 - beta2**k)).sqrt() + eps)
                if rotate and after == READY:  # what takes its place
                    inner = s["QL"].T @ mean.reshape(matrix.shape) @ s["QR"]
                    s["w"] = torch.maximum(s["w"], inner**2 * (1 - beta2**MEASURE))
                    s["stretch"] = stretch(
                        s, mean.reshape(matrix.shape), s["w"] / (1 - beta2**MEASURE), eps
                    )
                if decoupled:
                    param.mul_(1 - lr * factor * decay)
                param.sub_(lr * factor * step)


def stretch(s: dict[str, Any], mean: Tensor, variance: Tensor, eps: float) -> float:
    """Adam's m.u over m.u in the bases, an element at a time."""
    rows, columns = s["QL"], s["QR"]
    inner = rows.T @ mean @ columns
    here = (inner**2 / (variance.sqrt() + eps)).sum()
    own = torch.einsum("ia,jb,ab->ij", rows**2, columns**2, variance)
    return float((mean**2 / (own.sqrt() + eps)).sum() / here)


@pytest.mark.parametrize("metric", ["diagonal", "kronecker", "auto"])
@pytest.mark.parametrize("options", [{}, {"betas": (0.8, 0.99), "eps": 1e-3}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
def test_the_textbook(metric: str, options: dict[str, Any], decay: float, decoupled: bool) -> None:
    given = {"weight_decay": decay, "decoupled_weight_decay": decoupled, **options}
    run, plain = Batches(metric=metric, **given), Batches()
    steps = SWITCH + READY + REFRESH - 1  # of which the last ones are in the bases; to a renewal
    run.step_untold(steps)
    oracle(plain, steps, factor_at, metric != "diagonal", decay=decay, decoupled=decoupled,
           **options)  # fmt: skip
    torch.testing.assert_close(run.flat, plain.flat, rtol=1e-9, atol=1e-9)
    entry = run.optimizer.state[run.params[0]]
    assert ("row_basis" in entry) == (metric != "diagonal")


def test_moments_that_go_back_are_those_of_some_gradients() -> None:
    """E[g]^2 <= E[g^2] for each element, so that no step is longer than Adam's."""
    torch.manual_seed(0)
    weight = torch.zeros(12, 12, dtype=torch.float64, requires_grad=True)
    steady = torch.zeros(12, 12, dtype=torch.float64)
    steady[3, 5] = 1.0
    optimizer = FusePV([weight], 0.01, switch=SWITCH, metric="kronecker", deterministic=False)
    for _ in range(SWITCH + READY + 2 * REFRESH):
        noise = torch.randn(12, 2, dtype=torch.float64) @ torch.randn(2, 12, dtype=torch.float64)
        weight.grad = steady + 0.3 * noise
        optimizer.step()
    steps = optimizer.state[weight]["step"].item()
    optimizer.switch_back()
    state = optimizer.state[weight]
    mean = state["exp_avg"] / (1 - 0.9**steps)
    second = state["exp_avg_sq"] / (1 - 0.999**steps)
    assert (mean.square() <= second * (1 + 1e-12)).all() and mean.abs().max() > 0.5


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("batch", [2, 4])
def test_directions_that_have_met_no_gradient(batch: int, seed: int) -> None:
    """Gradients of few rows leave directions of a basis to chance, where second moments are 0.

    A renewal turns the first moment into the new ones exactly: steps along these were up to 427
    times as long here as the longest may be, of elements that are all ``step_cap`` times lr.
    """
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    weight, lr, longest = model[0].weight, 1e-3, 0.0
    optimizer = FusePV(model.parameters(), lr, switch=SWITCH, metric="kronecker")
    for _ in range(SWITCH + READY + 12 * REFRESH):
        rows, before = torch.randint(len(x), (batch,)), weight.detach().clone()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        longest = max(longest, float((weight.detach() - before).norm()))
    assert 0.0 < longest < CAP * lr * math.sqrt(weight.numel())


def test_the_metric_is_used_and_lives() -> None:
    """Past the first renewal: bases stay orthonormal, and near the eigenvectors."""
    run = Batches(metric="kronecker")
    run.step(SWITCH + READY + 8 * REFRESH)
    for param in (run.params[0], run.params[2]):
        entry = run.optimizer.state[param]
        for factor, basis in (("row_factor", "row_basis"), ("column_factor", "column_basis")):
            q = entry[basis]
            torch.testing.assert_close(q.T @ q, torch.eye(len(q), dtype=q.dtype))
            rotated = q.T @ entry[factor] @ q
            off = rotated - torch.diag(rotated.diagonal())
            assert off.norm() < 0.5 * rotated.norm()
    diagonal = Batches(metric="diagonal")
    diagonal.step(SWITCH + READY + 8 * REFRESH)
    assert not torch.equal(run.flat, diagonal.flat)


@pytest.mark.parametrize("more", [1, GATHER - 1, GATHER, READY, READY + 1, READY + 15])
@pytest.mark.parametrize("metric", ["diagonal", "kronecker"])
def test_checkpoints_at_every_stage(metric: str, more: int) -> None:
    run, again = Batches(metric=metric), Batches(metric=metric)
    run.step(SWITCH + more)
    with torch.no_grad():
        for param, other in zip(run.params, again.params, strict=True):
            other.copy_(param)
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.calls = run.calls
    assert run.step(25) == again.step(25)
    assert torch.equal(run.flat, again.flat)
    assert run.optimizer.report() == again.optimizer.report()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_what_has_no_gradient_does_not_move(decay: float) -> None:
    run = Batches(metric="kronecker", weight_decay=decay, decoupled_weight_decay=True)
    run.step(SWITCH + READY + 5)
    frozen = run.params[0].requires_grad_(False)
    frozen.grad = None
    before = frozen.detach().clone()
    others = run.params[2].detach().clone()
    run.truth.requires_grad_()  # the loss still needs some gradient
    run.step(15)
    assert torch.equal(frozen, before)
    assert not torch.equal(run.params[2], others)


def test_back_to_adam_with_moments_that_are_warm() -> None:
    run = Batches(metric="kronecker")
    average = torch.zeros_like(run.params[0])
    for _ in range(SWITCH + READY + 30):
        run.step(1)
        assert run.params[0].grad is not None
        average.lerp_(run.params[0].grad, 0.1)
    steps = float(run.optimizer.state[run.params[0]]["step"])
    seen = []
    for _ in range(300):  # of the gradients' own second moments
        run.closure()
        assert run.params[0].grad is not None
        seen.append(run.params[0].grad.square())
    run.optimizer.switch_back()
    run.optimizer.param_groups[0]["lr"] = 0.0
    entry = run.optimizer.state[run.params[0]]
    # Kept in bases that were renewed, and out of them again.
    torch.testing.assert_close(entry["exp_avg"], average, rtol=1e-9, atol=1e-12)
    assert float(entry["step"]) == steps
    second = entry["exp_avg_sq"] / (1 - 0.999**steps)
    ratio = second.mean() / torch.stack(seen).mean()
    assert 0.5 < float(ratio) < 4.0  # they were larger when it began
    assert entry.keys().isdisjoint(kronecker.KRONECKER_NAMES)
    run.step(3)
    assert run.optimizer.phase == "adam"


class Rising(Batches):
    """Losses that are higher by 100 from some step on, whatever the parameters; or lower."""

    since, sign = 10**9, 1.0

    def closure(self) -> Tensor:
        """The gradient is that of the batch, descended or, with ``maximize``, ascended."""
        loss = super().closure()
        for param in self.params:
            assert param.grad is not None
            param.grad.mul_(self.sign)
        return self.sign * (loss.detach() + 100.0 * (self.calls > self.since))


@pytest.mark.parametrize("maximize", [False, True])
def test_where_losses_stay_above_adam_takes_over(maximize: bool) -> None:
    run = Rising(maximize=maximize)
    run.sign = -1.0 if maximize else 1.0
    steps = trend.BLOCK * trend.BLOCKS
    run.step(SWITCH + trend.BLOCK)
    run.since = run.calls
    lengths = []
    for _ in range(2 * steps):
        assert run.optimizer.phase == "lbfgs"
        lengths.append(run.optimizer.report().step_length)
        run.step()
    # First Adam's own lengths, which 1 / sqrt(k) may only shorten, and then Adam.
    assert max(lengths[steps:]) < 1.0
    report = run.optimizer.report()
    assert (report.phase, report.fallbacks, report.setbacks) == ("adam", 1, 1)
    average = run.optimizer.state[run.params[0]]["exp_avg"]
    assert average.any()
    # It is left alone for long, and then the level is that of now.
    run.step(REST - 1)
    assert run.optimizer.phase == "adam"
    run.step(1 + 2 * steps)
    report = run.optimizer.report()
    assert (report.phase, report.setbacks) == ("lbfgs", 1)
    before = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.load_state_dict(before)
    assert run.optimizer.report().setbacks == 1


def test_twice_as_long_each_time() -> None:
    run = Rising()
    run.step(SWITCH + trend.BLOCK)
    ended = []
    for _ in range(3):
        run.since = run.calls
        while run.optimizer.phase == "lbfgs":
            run.step()
        run.since = 10**9
        before = run.calls
        while run.optimizer.phase == "adam":
            run.step()
        ended.append(run.calls - before)
        run.step(trend.BLOCK)
    assert ended == [REST, 3 * REST, 7 * REST]


def test_a_trend_is_no_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    for offset in (0.0, 1e6):
        kept: dict[str, Any] = {}
        told = trend.Trend(kept)
        told.restart()
        losses = torch.randn(20000, generator=generator, dtype=torch.float64).exp() + offset
        assert not any(told.worse(float(loss)) for loss in losses)
        # A little more is seen, and told once in so many blocks.
        higher = (losses[:4000] + 4.0).tolist()
        assert sum(map(told.worse, higher)) == 4000 // (trend.BLOCK * trend.BLOCKS)
    assert set(kept) == set(trend.NAMES)


def test_new_objectives_have_new_levels() -> None:
    run = Rising()
    run.step(SWITCH + trend.BLOCK)
    run.since = run.calls
    run.optimizer.new_objective()
    run.step(3 * trend.BLOCK * trend.BLOCKS)
    assert (run.optimizer.phase, run.optimizer.report().fallbacks) == ("lbfgs", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_gains(dtype: torch.dtype) -> None:
    """Noise is of the inputs alone: the minimum is 0, but for the kernel's part."""
    runs = {metric: Batches(dtype, metric=metric, lr=0.03) for metric in ("diagonal", "kronecker")}
    ends = {}
    for metric, run in runs.items():
        losses = run.step(400)
        ends[metric] = sum(losses[-50:]) / 50
        assert ends[metric] < 0.2 * losses[0]
    if dtype != torch.bfloat16:
        assert ends["kronecker"] < 1.5 * ends["diagonal"]


def test_channels_last_weights() -> None:
    first, second = Batches(metric="kronecker"), Batches(metric="kronecker")
    kernel = second.params[2]
    kernel.data = kernel.data.to(memory_format=torch.channels_last)
    second.optimizer = FusePV(second.params, 0.01, SWITCH, deterministic=False, metric="kronecker")
    first.step(SWITCH + READY + 30)
    second.step(SWITCH + READY + 30)
    torch.testing.assert_close(first.flat, second.flat, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("size", [1e25, math.inf, math.nan])
def test_a_gradient_beyond_all_measure_is_not_stepped_on(size: float) -> None:
    run = Batches(torch.float32, metric="kronecker")
    run.step(SWITCH + READY + 5)
    before = copy.deepcopy(run.optimizer.state_dict()["state"])
    flat = run.flat

    def closure() -> Tensor:
        loss = run.closure()
        assert run.params[0].grad is not None
        run.params[0].grad[0, 0] = size
        return loss

    with pytest.warns(RuntimeWarning, match="not finite"):
        run.optimizer.step(closure)
    assert torch.equal(run.flat, flat)
    assert run.optimizer.report().non_finite == 1
    now = run.optimizer.state_dict()["state"]
    for key, entry in before.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and name != "record":  # it has counted the step
                assert torch.equal(value, now[key][name]), name
    run.step(20)
    assert run.flat.isfinite().all()


def test_who_gets_a_basis() -> None:
    def sides(*shape: int, dtype: torch.dtype = torch.float32, **flags: bool) -> tuple[bool, bool]:
        options = {"amsgrad": False, "narrow": False, "limited": True, **flags}
        cpu = torch.device("cpu")
        return form_of(torch.empty(shape, dtype=dtype), device=cpu, **options).sides

    def form(*shape: int, **flags: Any) -> Form:
        options = {"amsgrad": False, "narrow": False, "limited": True, **flags}
        return form_of(torch.empty(shape), device=torch.device("cpu"), **options)

    assert sides(10, 784) == (True, False)
    assert sides(10, 784, limited=False) == (True, True)
    assert sides(16, 8, 3, 3) == (True, True)
    # A longer side's basis costs 8 a / b bytes a parameter: where that is much it has blocks.
    assert sides(128, 10) == sides(512, 32) == sides(32, 2) == (True, True)
    assert form(128, 10) == Form(128, 10, (True, True))
    assert form(512, 2) == Form(16, 2, (True, True), 32)
    assert form(2, 512) == Form(2, 16, (True, True), 32, across=True)
    assert form(8, 40, 3, 3) == Form(8, 120, (True, True), 3, across=True)
    assert form(33, 2) == Form(11, 2, (True, True), 3)
    assert form(33, 2, limited=False) == Form(33, 2, (True, True))
    assert form(31, 2) == Form(31, 2, (False, True))  # which nothing divides
    assert form(512, 2, divides=False) == Form(512, 2, (False, True))
    assert form(2, 512, divides=False) == Form(2, 512, (True, False))
    gpu = torch.device("cuda")
    adapter = torch.empty(2048, 8)
    assert form_of(adapter, False, False, True, gpu) == Form(64, 8, (True, True), 32)
    assert form_of(adapter, False, False, True, gpu, False).sides == (False, True)
    assert sides(50_000, 64) == sides(50_000, 64, limited=False) == (False, False)
    assert sides(7) == sides(1, 7) == sides(7, 1) == sides() == (False, False)
    assert sides(4, 4, amsgrad=True) == sides(4, 4, narrow=True) == (False, False)
    assert sides(4, 4, dtype=torch.complex64) == (False, False)


def test_bad_states_are_refused() -> None:
    run = Batches(metric="kronecker")
    run.step(SWITCH + READY + 5)
    fresh = Batches(metric="kronecker")
    for change, match in (
        (lambda entry: entry.update(row_basis=torch.zeros(2, 2)), "row_basis of params"),
        (lambda entry: entry.update(factor_steps="x"), "factor_steps of params"),
        (lambda entry: entry.update(share=None), "share is None"),
        (lambda entry: entry.pop("exp_avg_sq"), "exp_avg_sq"),
    ):
        saved = copy.deepcopy(run.optimizer.state_dict())
        change(saved["state"][0])
        before = fresh.flat
        with pytest.raises(ValueError, match=match):
            fresh.optimizer.load_state_dict(saved)
        assert torch.equal(fresh.flat, before)
        assert fresh.optimizer.phase == "adam"


def test_one_function_leaves_nothing_of_the_metric_behind() -> None:
    run = Batches(deterministic=None)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        run.calls, calls = 0, calls + 1
        return run.closure()

    for _ in range(30):
        run.optimizer.step(closure)
    assert run.optimizer.report().curvature == "dense"
    for param in run.params:
        held = run.optimizer.state[param].keys()
        assert held.isdisjoint({"exp_avg", "exp_avg_sq", "step", *kronecker.KRONECKER_NAMES})


@pytest.mark.parametrize("metric", ["diagonal", "kronecker"])
def test_a_scaler_changes_nothing_but_what_overflows(metric: str) -> None:
    """With GradScaler: bit for bit the same steps, and none on an infinite gradient."""
    plain, scaled = Batches(torch.float32, metric=metric), Batches(torch.float32, metric=metric)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    for step in range(SWITCH + READY + 20):
        plain.closure()
        plain.optimizer.step()
        if step == SWITCH + 5:
            before = scaled.flat
            scaled.closure()
            scaled.calls -= 1
            assert scaled.params[0].grad is not None
            scaled.params[0].grad[0, 0] = math.inf
            scaler.scale(torch.ones(()))
            scaler.step(scaled.optimizer)
            scaler.update(1024.0)
            assert torch.equal(scaled.flat, before)
        scaled.closure()
        scaler.scale(torch.ones(()))  # makes its state
        for param in scaled.params:
            assert param.grad is not None
            param.grad.mul_(1024.0)
        scaler.step(scaled.optimizer)
        scaler.update(1024.0)
    assert scaled.optimizer.phase == "lbfgs"
    assert torch.equal(plain.flat, scaled.flat)
