"""Who watches a step sees it: hooks, profilers, torch.compile; nobody else pays for them."""

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fuse_ext import _C, LBFGS, Adam, Fuse, FusePV

KINDS = {
    "Adam": lambda params: Adam(params, lr=0.1),
    "LBFGS": lambda params: LBFGS(params, max_iter=2, line_search_fn="strong_wolfe"),
    "FusePV": lambda params: FusePV(params, lr=0.1, switch=2),
    "Fuse": lambda params: Fuse(params, lr=0.1),
}
OPS = {
    "Adam": {"adam_step"},
    "LBFGS": {"grad_stats", "lbfgs_update", "lbfgs_two_loop", "lbfgs_direction", "lbfgs_move"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def problem(make):
    """An optimizer and the closure of a quadratic."""
    param = torch.randn(5).requires_grad_()
    optimizer = make([param])

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    return optimizer, closure


@each_kind
def test_hooks_of_one_optimizer_and_of_all(kind):
    optimizer, closure = problem(KINDS[kind])
    log = []

    def note(name):
        return lambda opt, args, kwargs: log.append((name, opt, args, kwargs))

    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_post_hook(note("all after")),
    ]
    names = ["all before", "before", "after", "all after"]
    for handle in handles:  # each alone must be enough to be heard
        log.clear()
        optimizer.step(closure)
        assert [entry[0] for entry in log] == names
        assert all(entry[1:] == (optimizer, (optimizer, closure), {}) for entry in log)
        handle.remove()
        del names[0]
    log.clear()
    optimizer.step(closure)
    assert log == []


@each_kind
def test_a_hook_may_change_the_arguments(kind):
    optimizer, closure = problem(KINDS[kind])
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, closure), {}))
    assert optimizer.step() is not None


def test_torchs_wrapper_is_entered_only_where_someone_would_notice():
    class Watched(Adam):
        entered = 0

        def _optimizer_step_code(self):  # torch's wrapper calls it
            Watched.entered += 1

    optimizer, closure = problem(Watched)
    optimizer.step(closure)
    assert Watched.entered == 0
    with profile(activities=[ProfilerActivity.CPU]):
        optimizer.step(closure)
    assert Watched.entered == 1
    optimizer.register_step_post_hook(lambda *_: None)
    optimizer.step(closure)
    assert Watched.entered == 2


@pytest.mark.parametrize("kind", OPS)
def test_a_profile_names_the_step_and_its_ops(kind):
    optimizer, closure = problem(KINDS[kind])
    assert not _C.is_observed()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        assert _C.is_observed()
        optimizer.step(closure)
    assert not _C.is_observed()
    names = {event.key for event in profiler.key_averages()}
    assert f"Optimizer.step#{kind}.step" in names
    assert {f"fuse_ext::{op}" for op in OPS[kind]} <= names


@pytest.mark.parametrize("kind", OPS)
def test_dispatch_modes_see_the_ops(kind):
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    seen = set()
    optimizer, closure = problem(KINDS[kind])
    with Log():
        optimizer.step(closure)
    assert {f"fuse_ext::{op}" for op in OPS[kind]} <= seen


@each_kind
@pytest.mark.parametrize("enabled", (True, False), ids=("grad", "no_grad"))
def test_autograds_mode_around_a_step(kind, enabled):
    optimizer, closure = problem(KINDS[kind])
    modes = []

    def watched():
        modes.append(torch.is_grad_enabled())
        return closure()

    def fails():
        raise KeyError("closure")

    with torch.set_grad_enabled(enabled):
        for _ in range(4):
            optimizer.step(watched)
            assert torch.is_grad_enabled() == enabled
        with pytest.raises(KeyError, match="closure"):
            optimizer.step(fails)
        assert torch.is_grad_enabled() == enabled
        optimizer.register_step_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
        del modes[:]
        optimizer.step(watched)
        assert modes[0] == enabled and all(modes[1:])
    assert torch.is_grad_enabled()


def test_a_subclass_may_differentiate_in_its_step():
    class Regularised(Adam):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.square().sum().backward()
            return super().step(closure)

    param = torch.ones(3).requires_grad_()
    optimizer = Regularised([param], lr=0.1)
    optimizer.step()
    assert torch.equal(param.grad, torch.full((3,), 2.0))
    assert torch.allclose(param, torch.full((3,), 0.9))


@each_kind
def test_the_wrapper_is_made_once_for_a_class(kind):
    optimizer, _ = problem(KINDS[kind])
    before = type(optimizer).step
    again, _ = problem(KINDS[kind])
    assert type(again).step is before
    assert before.hooked and before.__name__ == "step" and before.__doc__
