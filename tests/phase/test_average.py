"""The mean of the weights that eval() puts in their place: by hand, in all dtypes, its edges."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from living_cases import SWITCH, Batches, correlated
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fuse_ext
from fuse_ext import FusePV
from fuse_ext.phase.living.average import EVERY, SHARE

METRICS = ("diagonal", "kronecker")


def counted(seen: list[Tensor]) -> Tensor:
    """What is to come of these weights: the first, then each by its share."""
    mean = seen[0].clone()
    for k, weights in enumerate(seen):
        mean += SHARE / (SHARE + k) * (weights - mean)
    return mean


def weights_of(run: Batches, steps: int) -> list[Tensor]:
    """Takes so many steps on minibatches; those whose weights count."""
    seen = []
    for k in range(1, steps + 1):
        run.step()
        if k % EVERY == 0:
            seen.append(run.flat.clone())
    return seen


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("steps", [1, EVERY - 1, EVERY, 4 * EVERY, 60])
def test_the_mean_of_weights(metric: str, steps: int) -> None:
    run = Batches(metric=metric)
    run.step(SWITCH)
    seen = [run.flat.clone(), *weights_of(run, steps)][1 if steps >= EVERY else 0 :]
    before = run.flat.clone()
    run.optimizer.eval()
    torch.testing.assert_close(run.flat, counted(seen), rtol=1e-12, atol=1e-12)
    run.optimizer.train()
    assert torch.equal(run.flat, before)


@pytest.mark.parametrize("metric", METRICS)
def test_steps_know_nothing_of_it(metric: str) -> None:
    """To the bit, asked for or not, looked at or not."""
    runs = [Batches(metric=metric, average_weights=keeps) for keeps in (True, False)]
    for run in runs:
        run.step(SWITCH + 7)
    runs[0].optimizer.eval()
    assert not torch.equal(runs[0].flat, runs[1].flat)
    runs[0].optimizer.eval()
    runs[0].optimizer.train()
    runs[0].optimizer.train()
    for run in runs:
        run.step(40)
    assert torch.equal(runs[0].flat, runs[1].flat)
    runs[1].optimizer.eval()
    assert torch.equal(runs[0].flat, runs[1].flat)  # there is no mean


def test_nothing_happens_where_there_is_none() -> None:
    """Before a step, in the Adam phase, on one function."""
    run = Batches()
    for steps in (0, 2):
        run.step(steps)
        before = run.flat.clone()
        run.optimizer.train()
        run.optimizer.eval()
        assert torch.equal(run.flat, before)
        run.step(1)  # nor is a step refused
    one = [torch.ones(3, requires_grad=True)]
    opt = FusePV(one, 0.1, deterministic=True, switch=2)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (one[0] - torch.arange(3.0)).square().sum()
        loss.backward()
        return loss

    for _ in range(6):
        opt.step(closure)
        opt.eval()
    assert "weight_average" not in opt.state[one[0]]


def test_a_step_on_the_mean_is_refused() -> None:
    run = Batches()
    run.step(SWITCH + 10)
    run.optimizer.eval()
    before, state = run.flat.clone(), copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\) before"):
        run.step()
    assert torch.equal(run.flat, before)
    now = run.optimizer.state_dict()
    torch.testing.assert_close(now["state"], state["state"], rtol=0, atol=0)
    run.optimizer.train()
    run.step()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("how", ["state_dict", "pickle", "save"])
def test_checkpoints(metric: str, how: str, in_place: bool) -> None:
    """Saved with the mean in place too, as one evaluates and then saves: bit for bit."""
    run, again = Batches(metric=metric), Batches(metric=metric)
    run.step(SWITCH + 33)
    if in_place:
        run.optimizer.eval()
    with torch.no_grad():
        for param, other in zip(run.params, again.params, strict=True):
            other.copy_(param)
    if how == "pickle":
        again.optimizer = pickle.loads(pickle.dumps(run.optimizer))
        again.params = [p for group in again.optimizer.param_groups for p in group["params"]]
    elif how == "save":
        written = io.BytesIO()
        torch.save(run.optimizer.state_dict(), written)
        written.seek(0)
        again.optimizer.load_state_dict(torch.load(written))
    else:
        again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    again.calls = run.calls
    for one in (run, again):
        one.optimizer.train()
    assert torch.equal(run.flat, again.flat)
    assert run.step(25) == again.step(25)
    assert run.optimizer.report() == again.optimizer.report()
    for one in (run, again):
        one.optimizer.eval()
    assert torch.equal(run.flat, again.flat)


def test_a_checkpoint_of_before_there_were_means() -> None:
    run, again = Batches(average_weights=False), Batches()
    run.step(SWITCH + 30)
    saved = copy.deepcopy(run.optimizer.state_dict())
    del saved["param_groups"][0]["average_weights"]
    with torch.no_grad():
        for param, other in zip(run.params, again.params, strict=True):
            other.copy_(param)
    again.optimizer.load_state_dict(saved)
    again.calls = run.calls
    assert run.step(20) == again.step(20)
    before = again.flat.clone()
    again.optimizer.eval()
    assert not torch.equal(again.flat, before) and again.flat.isfinite().all()


@pytest.mark.parametrize("bad", [torch.zeros(2), torch.zeros(6, 5, dtype=torch.complex64), 3])
@pytest.mark.parametrize("name", ["weight_average", "trained_weight"])
def test_means_of_another_weight_are_refused(name: str, bad: Any) -> None:
    run = Batches()
    run.step(SWITCH + 10)
    run.optimizer.eval()
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["state"][0][name] = bad
    with pytest.raises(ValueError, match=rf"state_dict does not fit: {name} of params\[0\] is"):
        run.optimizer.load_state_dict(saved)


class Weights:
    """Parameters of some dtype on gradients that are drawn."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(9, 5), (7,), (4, 3, 2, 2)]
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        self.params = [nn.Parameter(value.to(dtype)) for value in drawn]
        with torch.no_grad():
            self.params[2].data = self.params[2].data.to(memory_format=torch.channels_last)
        self.generator = torch.Generator().manual_seed(1)
        options = {"deterministic": False, "switch": SWITCH, **options}
        self.optimizer = FusePV(self.params, 0.01, **options)

    def step(self, count: int) -> None:
        for _ in range(count):
            for param in self.params:
                if param.requires_grad:
                    drawn = torch.randn(param.shape, generator=self.generator)
                    param.grad = drawn.to(param.dtype) + 0.1 * param.detach()
            self.optimizer.step()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
)
@pytest.mark.parametrize("master", [False, True])
def test_every_dtype(dtype: torch.dtype, master: bool) -> None:
    """A narrow parameter's mean is wide, and what is shown of it the nearest one."""
    run = Weights(dtype, master_weights=master)
    run.step(SWITCH)
    twin = copy.deepcopy(run)
    seen: list[list[Tensor]] = [[] for _ in run.params]
    for _ in range(8):
        run.step(EVERY)
        for held, param in zip(seen, run.params, strict=True):
            own = run.optimizer.state[param].get("master_weight", param)
            wide = torch.complex128 if param.is_complex() else torch.float64
            held.append(own.detach().to(wide))
    trained = [param.detach().clone() for param in run.params]
    run.optimizer.eval()
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * (dtype != torch.float64))
    for param, held in zip(run.params, seen, strict=True):
        assert param.dtype == dtype
        mean = counted(held)
        torch.testing.assert_close(param.detach().to(mean.dtype), mean, rtol=4 * eps, atol=4 * eps)
    run.optimizer.train()
    assert all(map(torch.equal, trained, run.params))
    twin.step(8 * EVERY + 3)
    run.step(3)  # master weights go on where they were, too
    assert all(map(torch.equal, twin.params, run.params))


def test_what_is_frozen_or_thawed_later() -> None:
    run = Weights(torch.float64)
    late = run.params[1].requires_grad_(False)
    run.step(SWITCH + 20)
    before = late.detach().clone()
    run.optimizer.eval()
    assert torch.equal(late, before) and "weight_average" not in run.optimizer.state.get(late, {})
    run.optimizer.train()
    late.requires_grad_()
    run.step(4 * EVERY)
    run.optimizer.eval()
    first, mean = before, late.detach().clone()
    run.optimizer.train()
    assert not torch.equal(mean, late) and not torch.equal(mean, first)
    low, high = torch.minimum(first, late), torch.maximum(first, late)
    assert ((mean - low > -0.2) & (high - mean > -0.2)).all()


def test_groups_that_join_while_the_mean_is_in_place() -> None:
    run = Weights(torch.float64)
    run.step(SWITCH + 20)
    trained = [param.detach().clone() for param in run.params]
    run.optimizer.eval()
    more = nn.Parameter(torch.ones(3, dtype=torch.float64))
    run.optimizer.add_param_group({"params": [more]})
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        run.step(1)
    run.optimizer.train()
    assert all(map(torch.equal, trained, run.params))
    run.params.append(more)
    run.step(EVERY)
    run.optimizer.eval()
    assert torch.equal(more.detach(), torch.ones_like(more)) is False


def test_the_mean_follows_into_float64() -> None:
    run = Weights(torch.float32)
    run.step(SWITCH + 20)
    run.optimizer.eval()
    shown = [param.detach().double() for param in run.params]
    run.optimizer.continue_in(torch.float64)
    assert all(map(torch.equal, shown, run.params))
    run.optimizer.train()
    assert all(param.dtype == torch.float64 for param in run.params)
    run.step(EVERY)
    run.optimizer.eval()
    assert run.optimizer.state[run.params[0]]["weight_average"].dtype == torch.float64


@pytest.mark.parametrize("in_place", [False, True])
def test_leaving_leaves_nothing(in_place: bool) -> None:
    run = Batches()
    run.step(SWITCH + 20)
    trained = run.flat.clone()
    if in_place:
        run.optimizer.eval()
    run.optimizer.switch_back()
    assert torch.equal(run.flat, trained)
    for param in run.params:
        assert not {"weight_average", "trained_weight"} & run.optimizer.state[param].keys()
    run.step(1)


def test_new_objectives_begin_a_new_mean() -> None:
    run = Batches()
    run.step(SWITCH + 200)
    run.optimizer.new_objective()
    with torch.no_grad():
        for param in run.params:
            param.add_(5.0)
    run.step(EVERY)
    now = run.flat.clone()
    run.optimizer.eval()
    assert (run.flat - now).abs().max() < 0.5


def test_a_jump_of_gradients_begins_a_new_mean() -> None:
    """A task that has changed is not judged by weights of the one before."""
    run = Batches()
    run.step(SWITCH + 100)
    run.truth.add_(30.0)
    run.step(3 * EVERY)
    for _ in range(200):  # until the lengths have seen it
        if run.optimizer.state[run.params[0]]["averaged"] < 10:
            break
        run.step()
    else:
        raise AssertionError("the jump was not seen")


def test_memory() -> None:
    params = [torch.randn(64, 32, requires_grad=True), torch.randn(7, requires_grad=True)]
    sizes = {}
    for keeps in (True, False):
        options = {"average_weights": keeps}
        estimate = fuse_ext.estimate_memory(params, deterministic=False, **options)
        opt = FusePV(params, switch=2, deterministic=False, average_weights=keeps)
        for _ in range(30):
            for param in params:
                param.grad = correlated(param)
            opt.step()
        sizes[keeps] = opt.report().state_bytes
        assert sizes[keeps] == estimate.phases[-1].state_bytes
    assert sizes[True] - sizes[False] == 4 * (64 * 32 + 7)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_it_is_for(seed: int) -> None:
    """Digits, a tenth of the labels wrong, at a constant rate."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    train, noisy = 1300, y.clone()
    noisy[:130] = torch.randint(10, (130,))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = FusePV(model.parameters(), lr=3e-2)
    for _ in range(500):
        rows = torch.randint(train, (32,))
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), noisy[rows])
        loss.backward()
        opt.step(loss=loss)

    def loss_now() -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x[train:]), y[train:]).item()

    last = loss_now()
    opt.eval()
    assert loss_now() < 0.9 * last
