"""L-BFGS on averages: beside a plain twin, its pairs, and when FusePV chooses it."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from averaged_cases import Noisy
from fuse_pv_cases import Fit, assert_same, snapshot
from sklearn.datasets import load_digits
from torch import Tensor

from fuse_ext import FusePV, Never
from fuse_ext.curvature.block_pairs import BLOCK, DAMPING, damp
from fuse_ext.curvature.metric import LARGEST_LR, longest, reduced
from fuse_ext.phase import averages as averaged
from fuse_ext.phase.averages import (
    CAP_DECAY,
    JUMP,
    REACH,
    RETREAT,
)

BACKENDS = ("native", "reference")


class Jumping(Noisy):
    """Its gradient is 100 times as long at some calls."""

    calls, jumps = 0, range(0)

    def __call__(self) -> Tensor:
        loss = super().__call__()
        if self.calls in self.jumps:
            torch._foreach_mul_([p.grad for p in self.params], 100.0)
        self.calls += 1
        return loss


def two_loop(grad: Tensor, pairs: list[tuple[Tensor, Tensor]], diagonal: Tensor) -> Tensor:
    """-H g with H0 = gamma * diagonal, as textbooks have it."""
    q, alphas = -grad.clone(), []
    for s, y in reversed(pairs):
        alphas.append(s @ q / (s @ y))
        q -= alphas[-1] * y
    if pairs:
        s, y = pairs[-1]
        q *= s @ y / (y @ (diagonal * y))
    q *= diagonal
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        q += s * (alpha - y @ q / (s @ y))
    return q


def twin(problem: Noisy, warm: int, steps: int, lr: float, m: int, cap: float) -> Tensor:
    """``warm`` Adam steps and ``steps`` on averages, in the parameters' own coordinates."""
    x = problem.x
    exp_avg, exp_avg_sq = torch.zeros_like(x), torch.zeros_like(x)

    def gradient() -> Tensor:
        torch.nn.utils.vector_to_parameters(x, problem.params)
        return problem.grad()

    for k in range(1, warm + 1):
        g = gradient()
        exp_avg = 0.9 * exp_avg + 0.1 * g
        exp_avg_sq = 0.999 * exp_avg_sq + 0.001 * g * g
        metric = (exp_avg_sq / (1 - 0.999**k)).sqrt() + 1e-8
        x = x - lr * exp_avg / (1 - 0.9**k) / metric
    average = exp_avg / (1 - 0.9**warm)
    last = lr * (average**2 / metric).sum().sqrt()
    pairs: list[tuple[Tensor, Tensor]] = []
    block: list[tuple[Tensor, Tensor]] = []
    norms: list[Tensor] = []
    before, before_norm, share = None, math.inf, 1.0

    def length(gradient: Tensor) -> Tensor:
        return (gradient * gradient / metric).sum().sqrt()

    for k in range(steps):
        g = gradient()
        fall = (warm / (warm + k)) ** CAP_DECAY
        weight = max(0.1, fall / REACH)
        average = (1 - weight) * average + weight * g
        if length(average) > JUMP * before_norm:
            metric = torch.hypot(metric, average)
            before, block, pairs, share = None, [], [], 0.5 * share
            before_norm, norms = math.inf, []
        norms.append(length(average))
        p = two_loop(average, pairs, 1 / metric)
        t = 1.0 if pairs else lr
        lengths = max(share * cap, min(cap, 1.0))
        lengths = min(lengths, max(1.0, lengths * LARGEST_LR / lr))
        t = min(t, float(lengths * last * fall / (p * p * metric).sum().sqrt()))
        block.append((x, g))
        x = x + (t * p).clamp(-lengths * lr, lengths * lr)
        if len(block) < BLOCK:
            continue
        mean = [torch.stack(column).mean(0) for column in zip(*block, strict=True)]
        if before is not None:
            s, y = mean[0] - before[0], mean[1] - before[1]
            if pairs:
                s_last, y_last = pairs[-1]
                gamma = s_last @ y_last / (y_last @ (y_last / metric))
                bs = s * metric / gamma
                if s @ y < DAMPING * (s @ bs):
                    theta = (1 - DAMPING) * (s @ bs) / (s @ bs - s @ y)
                    y = theta * y + (1 - theta) * bs
            if s @ y > 0:
                pairs = [*pairs, (s, y)][-m:]
        before_norm, norms = float(torch.stack(norms).mean()), []
        before, block = mean, []
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("noise", "cap", "jumps"),
    [
        (0.0, 3.0, range(0)),
        (0.3, 5.0, range(0)),
        (3.0, 1e9, range(0)),
        (0.0, 30.0, range(29, 31)),
        (0.3, 30.0, range(29, 31)),
    ],
)
def test_it_is_what_its_description_says(
    backend: str, noise: float, cap: float, jumps: range
) -> None:
    torch.manual_seed(4)
    problem = Jumping(noise=noise)
    problem.jumps = jumps
    again = copy.deepcopy(problem)
    again.batches = torch.Generator().manual_seed(1)
    opt = FusePV(
        problem.params,
        lr=0.05,
        switch=6,
        pairs="averaged",
        step_cap=cap,
        history_size=4,
        backend=backend,
    )
    for _ in range(6 + 100):
        opt.step(problem)
    assert opt.report().pairs_held == 4  # the ring has gone round
    assert opt.state[problem.params[0]]["cap_share"] == (RETREAT if jumps else 1.0)
    expected = twin(again, 6, 100, 0.05, 4, cap)
    torch.testing.assert_close(problem.x, expected, rtol=1e-7, atol=1e-9)


def test_a_gradient_that_jumps_renews_the_metric() -> None:
    torch.manual_seed(3)
    problem = Noisy(noise=0.0)
    opt = FusePV(problem.params, lr=1e-3, switch=10, pairs="averaged", step_cap=5.0)
    entry = opt.state[problem.params[0]]
    shares = []
    for k in range(-10, 12 * BLOCK):
        loss = problem()
        jumps = k >= 0 and k % (3 * BLOCK) == 2 * BLOCK + 3
        if jumps:  # in a block that has another before it
            torch._foreach_mul_([p.grad for p in problem.params], 100.0)
            held, metric = entry["resets"], entry["root_metric"].clone()
            assert opt.report().pairs_held > 0
        opt.step(loss=loss)
        if k >= 0:
            shares.append(entry["cap_share"])
        if jumps:
            assert entry["resets"] == held + 1 and opt.report().pairs_held == 0
            assert (entry["root_metric"] >= metric).all()
            # m / D in the parameters' coordinates: Adam's own bound.
            assert float((entry["grad_avg"] / entry["root_metric"]).abs().max()) <= 1.0 + 1e-12
    assert shares[:: 3 * BLOCK] == [1.0, 0.5, 0.25, 0.125]
    assert reduced(5.0, 0.125) == 1.0  # Adam's own length
    assert reduced(0.3, 0.125) == 0.3  # unless less was asked for


def test_no_element_moves_further_than_adams_would_in_so_many_steps() -> None:
    torch.manual_seed(2)
    problem = Noisy(noise=1.0)
    opt = FusePV(problem.params, lr=1e-3, switch=10, pairs="averaged", step_cap=2.0)
    furthest = 0.0
    for k in range(80):
        before = problem.x
        problem()
        if k >= 10:
            problem.params[0].grad.view(-1)[0] += 1e3  # and none has seen that before
        opt.step()
        if k >= 10:
            furthest = max(furthest, float((problem.x - before).abs().max()))
    assert 1.9e-3 < furthest <= 2e-3 * (1 + 1e-9)


def test_pairs_are_differences_of_means() -> None:
    """Without noise y = A s exactly, so that every pair must show the problem's Hessian."""
    torch.manual_seed(0)
    problem = Noisy(noise=0.0)
    opt = FusePV(problem.params, lr=0.02, switch=3, pairs="averaged", history_size=3)
    iterates = []
    for _ in range(3 + 2 * BLOCK):
        iterates.append(problem.x)
        opt.step(problem)
    blocks = [torch.stack(iterates[3 + i * BLOCK :][:BLOCK]).mean(0) for i in (0, 1)]
    entry = opt.state[problem.params[0]]
    root = entry["root_metric"]
    s, y = entry["history"][0, 0] / root, entry["history"][1, 0] * root
    torch.testing.assert_close(s, blocks[1] - blocks[0])
    torch.testing.assert_close(y, problem.hessian @ s)


def test_damping() -> None:
    s, y = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    y -= (1.0 + y @ s) * s / (s @ s)  # s.y = -1
    damp(s, y, 0.7)
    assert float(s @ y) == pytest.approx(DAMPING * 0.7 * float(s @ s))
    kept = y.clone()
    damp(s, y, 0.7 - 1e-9)  # now it is fine
    assert torch.equal(kept, y)


@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, history_dtype: torch.dtype | None) -> None:
    problem = Noisy(dtype, noise=0.1)
    start = problem.x @ problem.hessian @ problem.x
    opt = FusePV(problem.params, lr=0.05, switch=10, pairs="averaged", history_dtype=history_dtype)
    for _ in range(100):
        opt.step(problem)
    assert problem.x @ problem.hessian @ problem.x < 0.2 * start
    assert opt.report().pairs_accepted >= 7


def test_complex_parameters_and_a_gap_between_them() -> None:
    real, pair = torch.ones(3).requires_grad_(), torch.ones(2, dtype=torch.complex64)
    pair.requires_grad_()
    opt = FusePV([real, pair], lr=0.05, switch=5, pairs="averaged")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = real.square().sum() + (pair - 2j).abs().square().sum() + 0.01 * torch.randn(())
        loss.backward()
        return loss

    for _ in range(200):
        opt.step(closure)
    assert real.abs().max() < 0.1
    assert (pair - 2j).abs().max() < 0.1


# --- the metric ----------------------------------------------------------------------------------


def test_no_step_is_longer_than_the_cap() -> None:
    torch.manual_seed(2)
    problem = Noisy(noise=1.0)
    opt = FusePV(problem.params, lr=0.05, switch=10, pairs="averaged", step_cap=2.0)
    for _ in range(10):
        opt.step(problem)
    entry = opt.state[problem.params[0]]
    for k in range(60):
        before = problem.x
        opt.step(problem)
        length = float(((problem.x - before) * entry["root_metric"]).norm())
        limit = entry["adam_step_norm"] * (10 / (10 + k)) ** CAP_DECAY
        assert length <= limit * (1 + 1e-9)


def test_the_cap_does_not_grow_with_a_large_lr() -> None:
    assert longest(5.0, 1e-4) == longest(5.0, 1e-3) == 5.0
    assert longest(5.0, 2e-3) == 2.5
    assert longest(5.0, 1e-2) == longest(5.0, 1.0) == 1.0
    assert longest(0.5, 1.0) == 0.5


def test_a_schedule_scales_steps_and_cap() -> None:
    whole, halved = (Fit(pairs="averaged", switch=10, lr=1e-2) for _ in range(2))
    for fit in (whole, halved):
        fit.step(40)
    before = whole.flat
    halved.optimizer.param_groups[0]["lr"] *= 0.5
    whole.step()
    halved.step()
    torch.testing.assert_close(halved.flat - before, 0.5 * (whole.flat - before))


def test_shares_of_lr_and_frozen_groups() -> None:
    fit = Fit(pairs="averaged", switch=10, lr=1e-2, groups=[{"lr": 0.0}, {}])
    frozen = [p.detach().clone() for p in fit.params[:2]]
    losses = fit.step(60)
    assert all(map(torch.equal, frozen, fit.params[:2]))
    assert losses[-1] < losses[0]
    assert fit.optimizer.report().pairs_held > 0
    entry = fit.optimizer.state[fit.params[0]]
    for param in fit.params[2:]:
        param.register_hook(lambda grad: 1e4 * grad)  # a jump
    fit.step(3)
    assert entry["cap_share"] == RETREAT
    assert all(map(torch.equal, frozen, fit.params[:2]))
    for name in averaged.VECTORS[1:]:
        assert entry[name].isfinite().all()


def test_elements_that_adam_has_not_seen_move_like_the_others() -> None:
    late, always = torch.ones(4).requires_grad_(), torch.ones(4).requires_grad_()
    opt = FusePV([late, always], lr=1e-2, switch=10, pairs="averaged")
    for k in range(60):
        opt.zero_grad()
        loss = always.square().sum() + (late.square().sum() if k >= 10 else 0.0)
        (loss + 0.0 * torch.randn(())).backward()
        opt.step()
    assert late.max() < 0.9
    assert late.min() > -0.2


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay(decoupled: bool) -> None:
    """Decoupled decay shrinks by lr * weight_decay a step; an L2 term is part of the gradient."""
    ours, plain = (
        Fit(
            pairs="averaged",
            switch=10,
            lr=1e-2,
            weight_decay=decay,
            decoupled_weight_decay=decoupled,
        )
        for decay in (0.1, 0.0)
    )
    plain.step(10)
    ours.step(10)
    plain.load(ours.flat)
    plain.optimizer.state[plain.params[0]].update(
        {
            name: ours.optimizer.state[ours.params[0]][name].clone()
            for name in ("root_metric", "grad_avg")
        }
    )
    plain.optimizer._phase._entry.update(
        adam_step_norm=ours.optimizer._phase._entry["adam_step_norm"]
    )
    before = ours.flat
    ours.step()
    if decoupled:
        plain.step()
        torch.testing.assert_close(ours.flat, plain.flat - 1e-2 * 0.1 * before)
    else:
        plain.closure()
        for p, b in zip(plain.params, before.split([p.numel() for p in plain.params]), strict=True):
            p.grad.add_(b.view_as(p), alpha=0.1)
        plain.optimizer.step()
        torch.testing.assert_close(ours.flat, plain.flat)


# --- nothing is lost -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(bad: str) -> None:
    fit = Fit(pairs="averaged", switch=5, lr=1e-2)
    fit.step(30)
    before = snapshot(fit.optimizer), fit.flat

    def closure() -> Tensor:
        loss = fit.closure()
        if bad == "gradient":
            fit.params[2].grad[0] = math.nan
            return loss
        return loss * math.nan

    with pytest.warns(RuntimeWarning, match="not finite"):
        fit.optimizer.step(closure)
    assert torch.equal(fit.flat, before[1])
    assert fit.optimizer.report().non_finite == 1
    assert fit.optimizer.report().stop_reason == "non_finite"
    entry, held = fit.optimizer.state[fit.params[0]], before[0]["state"][0]
    for name in averaged.VECTORS:
        assert torch.equal(entry[name], held[name])
    fit.step(30)
    assert math.isfinite(fit.loss().item())


def test_an_error_in_the_closure_changes_nothing() -> None:
    fit = Fit(pairs="averaged", switch=5, lr=1e-2)
    fit.step(30)
    before = snapshot(fit.optimizer), fit.flat
    with pytest.raises(KeyError, match="batch"):
        fit.optimizer.step(lambda: {}["batch"])
    assert torch.equal(fit.flat, before[1])
    assert_same(snapshot(fit.optimizer), before[0])


@pytest.mark.parametrize("at", [10, 13, 29, 30, 47])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoints(at: int, backend: str) -> None:
    """In the middle of a block, at its end, before the first pair and after."""
    options: dict[str, Any] = {"pairs": "averaged", "switch": 9, "lr": 1e-2, "backend": backend}
    first, again = Fit(**options), Fit(**options)
    first.step(at)
    again.load(first.flat)
    again.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert again.step(25) == first.step(25)
    assert torch.equal(again.flat, first.flat)
    assert_same(snapshot(again.optimizer), snapshot(first.optimizer))
    copied = copy.deepcopy(first)
    assert copied.step(12) == first.step(12)


def test_a_state_dict_that_does_not_fit() -> None:
    fit, other = Fit(pairs="averaged", switch=5), Fit(pairs="averaged", switch=5)
    fit.step(9)
    state = fit.optimizer.state_dict()
    for name, value in (("grad_sum", torch.zeros(3)), ("root_metric", None), ("blocks", "two")):
        damaged = copy.deepcopy(state)
        damaged["state"][0][name] = value
        with pytest.raises(ValueError, match=f"does not fit: {name}"):
            other.optimizer.load_state_dict(damaged)
    assert other.optimizer.phase == "adam"


def test_back_to_adam_leaves_nothing_behind() -> None:
    fit = Fit(pairs="averaged", switch=5, lr=1e-2)
    fit.step(40)
    fit.optimizer.switch_back()
    assert fit.optimizer.phase == "adam"
    assert not fit.optimizer.state[fit.params[0]].keys() & set(averaged.AVERAGED_NAMES)
    fit.step(40)
    assert fit.optimizer.phase == "lbfgs"


def test_gradients_of_zero_are_no_step_and_no_part_of_a_mean() -> None:
    problem = Noisy()
    opt = FusePV(problem.params, lr=0.02, switch=1, pairs="averaged", betas=(0.0, 0.999))
    for _ in range(5):
        opt.step(problem)
    before, entry = problem.x, opt.state[problem.params[0]]
    held = entry["grad_sum"].clone(), entry["block_step"]
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.report().stop_reason == "no_descent"
    assert torch.equal(problem.x, before)
    assert torch.equal(entry["grad_sum"], held[0]) and entry["block_step"] == held[1]
    opt.step(problem)
    assert not torch.equal(problem.x, before)


def test_a_new_group_gets_adam_first() -> None:
    problem, late = Noisy(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    opt = FusePV(problem.params, lr=0.02, switch=10, pairs="averaged")
    for _ in range(40):
        opt.step(problem)
    accepted = opt.report().pairs_accepted
    opt.add_param_group({"params": [late], "lr": 0.01})
    assert opt.phase == "adam"
    assert opt.report().pairs_accepted == accepted > 0
    for k in range(60):
        problem()
        late.grad = 2.0 * late.detach()
        opt.step()
        assert opt.phase == ("adam" if k < 9 else "lbfgs")
    assert late.abs().max() < 0.9


def test_without_a_closure() -> None:
    problem = Noisy()
    opt = FusePV(problem.params, lr=0.02, switch=10, pairs="averaged")
    before = problem().item()
    for _ in range(80):
        problem()
        opt.step()
    assert opt.report().evaluations == 0
    assert opt.report().pairs_held > 0
    assert problem().item() < before


# --- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 3])
def test_a_network_that_learns_its_images_by_heart_does_not_lose_them(seed: int) -> None:
    """Near a loss of 0, without another metric, the loss of these jumped back to 2 for good."""
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
    torch.manual_seed(seed)
    sizes = [64, 256, 256, 10]
    layers = [torch.nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    opt = FusePV(model.parameters(), lr=1e-3)
    order, losses = torch.Generator().manual_seed(seed), []
    for _ in range(24):
        for rows in torch.randperm(1437, generator=order).split(64):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model(x[:1437]), y[:1437]).item())
    assert max(losses[8:]) < 0.2
    assert losses[-1] < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_digits_in_batches_are_learnt_faster_than_by_adam(seed: int) -> None:
    """Logistic regression, batches of 64: the loss over all images after five epochs."""
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
    losses = []
    for switch in (30, Never()):
        torch.manual_seed(seed)
        model = torch.nn.Linear(64, 10)
        opt = FusePV(model.parameters(), lr=1e-3, switch=switch)
        for _ in range(5):
            for rows in torch.randperm(len(x)).split(64):
                opt.zero_grad()
                torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                opt.step()
        losses.append(torch.nn.functional.cross_entropy(model(x), y).item())
    assert losses[0] < 0.8 * losses[1]
