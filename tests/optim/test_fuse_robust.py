"""What Fuse does when something goes wrong on the way."""

import math

import pytest
import torch
from adam_cases import BACKENDS, frozen, make_params, snapshot, twin
from fuse_cases import DTYPES, SHAPES, closure_of, loss_of

from fuse_ext import Fuse, LinearTheta

NAN, INF = math.nan, math.inf


def test_parameters_moved_by_others_make_no_pair():
    """A pair in waiting is given up when x is not where the step led, or f another function."""
    params = make_params(torch.float64, SHAPES)
    optimizer = Fuse(params, lr=0.1, theta=0.5, deterministic=True)
    closure = closure_of(optimizer, params)
    expected = 0
    for change in (
        lambda: None,
        lambda: params[0].data.copy_(torch.zeros(4)),  # invisible to autograd
        lambda: params[0].detach().clamp_(-0.1, 0.1),
        lambda: None,
        lambda: setattr(params[1], "data", torch.zeros(2, 3, dtype=torch.float64)),
        lambda: optimizer.param_groups[0].update(weight_decay=0.5),
        lambda: None,
    ):
        optimizer.step(closure)
        before = optimizer.report().pairs_accepted
        place = [(p._version, p.data_ptr()) for p in params]
        decay = optimizer.param_groups[0]["weight_decay"]
        change()
        moved = place != [(p._version, p.data_ptr()) for p in params]
        moved = moved or decay != optimizer.param_groups[0]["weight_decay"]
        optimizer.step(closure)
        expected = before + (0 if moved else 1)
        assert optimizer.report().pairs_accepted == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("line_search", (None, "strong_wolfe"))
@pytest.mark.parametrize(("loss", "grad"), [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, -INF)])
def test_what_is_not_finite_is_not_stepped_on(loss, grad, line_search, backend):
    params = make_params(torch.float64, SHAPES)
    twins = twin(params)
    optimizers = [
        Fuse(tensors, lr=0.1, theta=LinearTheta(9), line_search=line_search, backend=backend)
        for tensors in (params, twins)
    ]
    for optimizer, tensors in zip(optimizers, (params, twins), strict=True):
        for _ in range(3):
            optimizer.step(closure_of(optimizer, tensors))

    def bad():
        for p in params:
            p.grad = torch.full_like(p, grad)
        return torch.tensor(loss)

    before = frozen(params)
    assert optimizers[0].step(bad).item() == pytest.approx(loss, nan_ok=True)
    assert frozen(params) == before
    report = optimizers[0].report()
    assert (report.non_finite, report.stop_reason, report.adam_steps) == (1, "non_finite", 3)
    # And it has left no trace: the run goes on as if it had not been.
    for optimizer, tensors in zip(optimizers, (params, twins), strict=True):
        for _ in range(3):
            optimizer.step(closure_of(optimizer, tensors))
    assert frozen(params) == frozen(twins)


def test_not_finite_after_the_step():
    """The step is taken, its pair is not."""
    params = make_params(torch.float64, SHAPES)
    optimizer, calls = Fuse(params, lr=0.1, theta=0.5), []
    good = closure_of(optimizer, params, calls)

    def closure():
        loss = good()
        return loss * NAN if len(calls) == 2 else loss

    before = frozen(params)
    optimizer.step(closure)
    assert frozen(params) != before
    assert optimizer.report().non_finite == 1
    assert optimizer.report().pairs_accepted == 0
    optimizer.step(closure)
    assert optimizer.report().pairs_accepted == 1


def test_a_line_search_backs_off_from_nan():
    x = torch.full((3,), 3.0, dtype=torch.float64).requires_grad_()
    optimizer = Fuse([x], lr=0.01, theta=0.2, lbfgs_lr=50.0, line_search="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (x - x.log()).sum()
        loss.backward()
        return loss

    for _ in range(40):
        optimizer.step(closure)
    assert optimizer.report().non_finite > 0
    torch.testing.assert_close(x.detach(), torch.ones_like(x), rtol=1e-4, atol=0)


def test_a_failed_line_search_forgets_the_history():
    """As LBFGS does: the next direction is -g. Adam's part of the step is taken."""
    params = make_params(torch.float64, [(4,)])
    optimizer = Fuse(params, lr=0.1, theta=0.5, line_search="strong_wolfe")
    closure = closure_of(optimizer, params)
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.report().pairs_held == 3
    calls = []

    def rising():
        loss = closure()
        calls.append(loss)
        return loss.detach() + 100.0 * len(calls)

    before = frozen(params)
    optimizer.step(rising)
    report = optimizer.report()
    assert report.line_search_failures == 1
    assert report.history_resets == 1
    assert report.stop_reason == "line_search"
    assert report.step_length == 0.0
    assert report.pairs_held <= 1
    assert frozen(params) != before


class Stop(Exception):
    pass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("warm", (0, 3))
@pytest.mark.parametrize(
    ("line_search", "index"), [(None, 0), (None, 1), *(("strong_wolfe", i) for i in range(4))]
)
def test_a_closure_that_raises(line_search, index, warm, backend):
    """Before the step: as if it had not been called. After it: step taken, pair dropped."""
    params = make_params(torch.float64, SHAPES)
    twins = twin(params)
    # Too long a first trial makes a line search of several evaluations.
    options = {"lbfgs_lr": 0.5 if line_search is None else 40.0, "line_search": line_search}
    ours, oracle = (
        Fuse(tensors, lr=0.1, theta=LinearTheta(9), backend=backend, **options)
        for tensors in (params, twins)
    )
    for _ in range(warm):
        ours.step(closure_of(ours, params))
        oracle.step(closure_of(oracle, twins))
    calls = []
    oracle.step(closure_of(oracle, twins, calls))
    assert index < len(calls)
    last = index == len(calls) - 1  # the evaluation after the step
    remaining = index
    good = closure_of(ours, params)

    def bad():
        nonlocal remaining
        if remaining == 0:
            raise Stop
        remaining -= 1
        return good()

    before = frozen(params)
    theta = ours.theta
    with pytest.raises(Stop):
        ours.step(bad)
    assert ours.report().evaluations == oracle.report().evaluations - len(calls) + index
    if last:
        torch.testing.assert_close(params, twins, rtol=1e-12, atol=1e-14)
        assert ours.report().pairs_accepted == oracle.report().pairs_accepted - 1
        return
    assert frozen(params) == before
    assert ours.theta == theta
    ours.step(good)
    torch.testing.assert_close(params, twins, rtol=1e-12, atol=1e-14)
    assert ours.report().pairs_accepted == oracle.report().pairs_accepted


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("loss", TypeError, "closure must return the loss, got 'loss'"),
        (torch.ones(2), ValueError, r"scalar loss, got a tensor of shape \(2,\)"),
    ],
)
def test_a_closure_that_returns_no_scalar(value, error, message):
    params = make_params(torch.float64, SHAPES)
    optimizer = Fuse(params, lr=0.1)
    closure = closure_of(optimizer, params)
    optimizer.step(closure)
    before = frozen(params)
    with pytest.raises(error, match=message):
        optimizer.step(lambda: value)
    assert frozen(params) == before
    optimizer.step(closure)


@pytest.mark.parametrize("value", (1.5, -0.5, NAN, "half"))
def test_a_theta_out_of_range_stops_the_step(value):
    params = make_params(torch.float64, SHAPES)
    optimizer = Fuse(params, theta=lambda step: 0.5 if step < 2 else value)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, params))
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=f"theta must be .*{value}"):
        optimizer.step(closure_of(optimizer, params))
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_no_one_moves_stays_bit_for_bit(dtype, backend):
    """A parameter without a gradient, and a group whose learning rates are 0."""
    params = make_params(dtype, [(50,), (50,), (50,)])
    still = frozen(params[1:])
    optimizer = Fuse(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.0, "lbfgs_lr": 0.0}],
        lr=0.1,
        theta=0.3,
        backend=backend,
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of([params[0], params[2]])
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert frozen(params[1:]) == still


def test_grad_scaler():
    """Without a closure: the scaler itself unscales, and skips what is not finite."""
    params = make_params(torch.float32, [(4,)])
    optimizer = Fuse(params, lr=0.1, theta=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss = loss_of(params)
        scaler.scale(loss).backward()
        if step == 3:
            params[0].grad[0] = INF
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[4] == losses[3]
    assert scaler.get_scale() == 128.0
    assert losses[-1] < 0.5 * losses[0]
