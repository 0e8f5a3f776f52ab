"""FusePV: both phases beside Adam and LBFGS alone, the report, bad options, what it is for."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from fuse_pv_cases import BACKENDS, Fit, assert_same, bytes_in, saved_state
from problems import Objective, rosenbrock
from torch import Tensor

from fuse_ext import (
    LBFGS,
    Adam,
    AtOnce,
    FusePV,
    NearSolution,
    Never,
)

# --- FusePV(Never) is Adam, FusePV(AtOnce) is LBFGS ----------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"amsgrad": True, "betas": (0.5, 0.9)},
        {"eps_inside_root": True, "eps": 1e-3},
        {"maximize": True},
        {"lr": torch.tensor(3e-3)},
        {"groups": [{"lr": 1e-2, "betas": (0.8, 0.9)}, {"weight_decay": 0.5, "eps": 1e-4}]},
        {"groups": [{"lr": 0.0}, {}]},
    ],
    ids=str,
)
def test_without_a_switch_it_is_adam(options: dict[str, Any], backend: str) -> None:
    adam = Fit(Adam, backend=backend, **options)
    for check_finite in (True, False):
        fuse = Fit(switch=Never(), backend=backend, check_finite=check_finite, **options)
        adam = Fit(Adam, backend=backend, **options)
        assert fuse.step(30) == adam.step(30)
        assert torch.equal(fuse.flat, adam.flat)
        ours, theirs = saved_state(fuse.optimizer), saved_state(adam.optimizer)
        del ours[0]["fuse_pv"]
        assert_same(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("line_search", ["strong_wolfe", "approximate_wolfe", "armijo", None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_iter": 3, "max_eval": 20},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"deterministic": True},
        {"history_dtype": torch.bfloat16, "history_size": 4},
        {"tolerance_grad": 1e-2, "tolerance_change": 1e-3, "max_iter": 5},
        {"curvature_tol": 0.5},
        {"groups": [{}, {"weight_decay": 0.5}]},
        {"groups": [{"lbfgs_lr": 0.2}, {"lbfgs_lr": 0.5}]},
        {"groups": [{"lbfgs_lr": 0.0}, {}]},
    ],
    ids=str,
)
def test_with_the_switch_at_once_it_is_lbfgs(
    options: dict[str, Any], line_search: str | None, backend: str
) -> None:
    common = {"history_size": 6, "tolerance_grad": 0.0, "tolerance_change": 0.0, **options}
    common = {"curvature_tol": 1e-4, "max_iter": 1, "max_eval": 25, "backend": backend, **common}
    common.setdefault("deterministic", False)  # FusePV would find out
    # LBFGS does not evaluate after its last fixed step: torch's does not.
    fuse = Fit(
        switch=AtOnce(), lbfgs_lr=0.3, line_search=line_search, pairs="consecutive", **common
    )
    if "groups" in common:
        common["groups"] = [
            {"lr" if name == "lbfgs_lr" else name: value for name, value in group.items()}
            for group in common["groups"]
        ]
    lbfgs = Fit(LBFGS, lr=0.3, line_search_fn=line_search, **common)
    assert fuse.step(20) == lbfgs.step(20)
    assert fuse.calls == lbfgs.calls
    assert torch.equal(fuse.flat, lbfgs.flat)
    ours, theirs = saved_state(fuse.optimizer), saved_state(lbfgs.optimizer)
    del ours[0]["fuse_pv"]
    assert_same(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adam_up_to_the_switch_and_lbfgs_from_there(backend: str) -> None:
    search = {"line_search": "strong_wolfe"}
    fuse = Fit(switch=7, lr=1e-2, history_size=4, backend=backend, **search)
    adam = Fit(Adam, lr=1e-2, backend=backend)
    losses = fuse.step(20)
    assert losses[:7] == adam.step(7)
    lbfgs = Fit(
        LBFGS,
        max_iter=1,
        max_eval=25,
        history_size=4,
        line_search_fn="strong_wolfe",
        tolerance_grad=0.0,
        tolerance_change=0.0,
        curvature_tol=1e-4,
        backend=backend,
    )
    lbfgs.load(adam.flat)
    assert losses[7:] == lbfgs.step(13)
    assert torch.equal(fuse.flat, lbfgs.flat)


# --- memory and report ---------------------------------------------------------------------------


@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_bytes_are_those_of_the_tensors(history_dtype: torch.dtype | None, amsgrad: bool) -> None:
    fit = Fit(switch=3, history_dtype=history_dtype, amsgrad=amsgrad)
    assert fit.optimizer.report().state_bytes == 0
    numel = fit.flat.numel()
    fit.step()
    assert fit.optimizer.report().state_bytes == bytes_in(fit.optimizer)
    assert fit.optimizer.report().state_bytes >= (12 if amsgrad else 8) * numel
    fit.step(5)
    report = fit.optimizer.report()
    assert report.phase == "lbfgs"
    assert report.state_bytes == bytes_in(fit.optimizer)
    trials, history = fit.optimizer._phase.iteration.trials, fit.optimizer._phase.history
    held = trials._origin, trials._best_grads, getattr(history, "_grad", None)
    scratch = [t for t in held if t is not None]
    assert report.workspace_bytes == sum(t.untyped_storage().nbytes() for t in scratch)
    fit.optimizer.switch_back()
    assert fit.optimizer.report().state_bytes == bytes_in(fit.optimizer) == 0


def test_adams_moments_are_released_at_the_switch_and_the_history_on_the_way_back() -> None:
    fit = Fit(switch=5, line_search=None, lbfgs_lr=0.1)
    fit.step(4)
    held = [weakref.ref(t) for t in (*fit.optimizer._phase.moments._moments.values(),)]
    assert all(ref() is not None for ref in held)
    fit.step()
    gc.collect()
    assert fit.optimizer.phase == "lbfgs"
    assert all(ref() is None for ref in held)
    assert all(
        entry.keys().isdisjoint({"exp_avg", "exp_avg_sq", "step"})
        for entry in fit.optimizer.state.values()
    )
    fit.step(3)
    entry = fit.optimizer.state[fit.optimizer.param_groups[0]["params"][0]]
    held = [value for name, value in entry.items() if name != "record"]
    kept = [weakref.ref(value) for value in held if isinstance(value, Tensor)]
    assert kept
    del entry, held
    fit.optimizer.switch_back()
    gc.collect()
    assert all(ref() is None for ref in kept)


@pytest.mark.parametrize("deterministic", [False, True])
def test_report_at_every_stage(deterministic: bool) -> None:
    search = {} if deterministic else {"line_search": "strong_wolfe"}
    fit = Fit(switch=4, lr=1e-2, history_size=3, deterministic=deterministic, **search)
    optimizer = fit.optimizer
    report = optimizer.report()
    assert (report.phase, report.adam_steps, report.evaluations) == ("adam", 0, 0)
    assert (report.switch_step, report.switch_reason) == (None, "")
    for k in range(1, 4):
        fit.step()
        report = optimizer.report()
        assert (report.phase, report.adam_steps, report.evaluations) == ("adam", k, fit.calls)
        assert (report.lbfgs_iterations, report.stop_reason) == (0, "not started")
    fit.step()
    report = optimizer.report()
    assert (report.phase, report.adam_steps, report.switch_step) == ("lbfgs", 4, 4)
    assert (report.lbfgs_iterations, report.pairs_held, report.step_length) == (0, 0, 0.0)
    for k in range(1, 7):
        fit.step()
        report = optimizer.report()
        closed = k - 1 if deterministic else k
        assert report.adam_steps == 4
        assert report.lbfgs_iterations == k
        assert report.evaluations == fit.calls
        assert report.pairs_held == min(closed, 3)
        assert report.pairs_accepted + report.pairs_skipped == closed
        assert (report.line_search, report.stop_reason) == ("wolfe", "max_iter")
        assert report.step_length > 0.0
    text = str(report)
    assert "switch_reason         step 4 >= n=4" in text.splitlines()


@pytest.mark.parametrize("curvature", ["pairs", "dense"])
@pytest.mark.parametrize("line_search", ["strong_wolfe", "armijo", None])
def test_deterministic_costs_about_one_evaluation_an_iteration(
    line_search: str | None, curvature: str
) -> None:
    calls = []
    for deterministic in (False, True):
        fit = Fit(
            switch=5,
            lr=1e-2,
            lbfgs_lr=1.0 if line_search else 0.2,
            line_search=line_search,
            deterministic=deterministic,
            self_scaling=False,
            curvature=curvature,
            curvature_tol=1e-8,
            dtype=torch.float64,
        )
        fit.step(45)
        calls.append(fit.calls - 5)
    assert calls[1] == calls[0] - 39  # 40 steps less the first
    assert calls[1] <= 1.3 * 40 + 2


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite, got -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"lbfgs_lr": math.inf}, ValueError, "lbfgs_lr must be at least 0 and finite, got inf"),
        ({"line_search": "newton"}, ValueError, "line_search must be None or one of .* 'newton'"),
        ({"line_search": 1}, TypeError, "line_search must be a string or None, got 1"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1, got 0"),
        ({"max_iter": "2"}, TypeError, "max_iter must be an int, got '2'"),
        ({"history_size": -1}, ValueError, "history_size must be at least 1, got -1"),
        ({"history_dtype": torch.int32}, ValueError, "history_dtype must be None or one of"),
        ({"curvature_tol": 2.0}, ValueError, r"curvature_tol must be in \[0, 1\], got 2.0"),
        ({"on_switch": 3}, TypeError, "on_switch must be callable or None, got 3"),
        ({"switch": "soon"}, TypeError, "switch must be a Switchover, an int"),
        ({"switch": -1}, ValueError, "switch must be at least 0, got -1"),
        (
            {"switch": NearSolution(torch.ones(2), 0.1)},
            ValueError,
            r"x_star has the shapes \[\(2,\)\], the parameters have \[\(3, 8\)",
        ),
        (
            {"groups": [{}, {"max_iter": 2}]},
            ValueError,
            "max_iter must be the same in all parameter groups, got 1 in group 0 and 2 in group 1",
        ),
        ({"groups": [{}, {"lr": math.nan}]}, ValueError, "lr must be .* got nan"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_out_of_range(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Fit(**options)


# --- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 5.0), (torch.float64, 15.0)], ids=str
)
def test_a_full_batch_fit_ends_far_below_adam(dtype: torch.dtype, factor: float) -> None:
    """A network fitted to sin(4 x), as in a PINN: the same number of gradients for both.

    In float32 the loss's rounding ends some line searches early.
    """

    def fit(kind: type[torch.optim.Optimizer], budget: int, **options: Any) -> float:
        torch.manual_seed(1)
        x = torch.linspace(-1.0, 1.0, 64, dtype=dtype)[:, None]
        model = torch.nn.Sequential(
            torch.nn.Linear(1, 16),
            torch.nn.Tanh(),
            torch.nn.Linear(16, 16),
            torch.nn.Tanh(),
            torch.nn.Linear(16, 1),
        ).to(dtype)
        optimizer = kind(model.parameters(), lr=1e-2, **options)
        calls, least = 0, math.inf

        def closure() -> Tensor:
            nonlocal calls, least
            calls += 1
            optimizer.zero_grad()
            loss = (model(x) - (4.0 * x).sin()).square().mean()
            loss.backward()
            least = min(least, loss.item())
            return loss

        while calls < budget:
            before = calls
            optimizer.step(closure)
            if calls == before:  # at rest
                break
        return least

    adam = fit(Adam, 800)
    fuse = fit(FusePV, 800, switch=200, deterministic=True)
    assert fuse < adam / factor


def test_the_valley_of_rosenbrock() -> None:
    adam, fuse = Objective(rosenbrock(2)), Objective(rosenbrock(2))
    first = Adam([adam.x], lr=1e-2)
    both = FusePV([fuse.x], lr=1e-2, switch=100)
    while fuse.calls < 200:
        both.step(fuse.closure)
    for _ in range(200):
        first.step(adam.closure)
    assert adam.gap > 1e-2
    assert fuse.gap < 1e-12
