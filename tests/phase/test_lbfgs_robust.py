"""LBFGS under NaN, exceptions, odd closures and foreign checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lbfgs_cases import BACKENDS, F64, SEARCHES, assert_same, make, reason, snapshot, state
from problems import Objective, log_barrier, nan_wall, rosenbrock
from torch import Tensor

from fuse_ext import LBFGS

# --- NaN, infinities, exceptions -----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("max_iter", [1, 20])
@pytest.mark.parametrize("line_search", SEARCHES)
def test_nan_at_a_trial_does_not_send_the_parameters_outward(
    line_search: str, max_iter: int, dtype: torch.dtype, backend: str
) -> None:
    """pytorch#5953: torch.optim.LBFGS ends at 1e42."""
    mine = Objective(log_barrier(), dtype)
    optimizer = LBFGS([mine.x], max_iter=max_iter, line_search_fn=line_search, backend=backend)
    for _ in range(60 // max_iter + 3):
        optimizer.step(mine.closure)
        assert (mine.x > 0).all()
        assert (mine.x <= 3.0 + 1e-6).all()
    assert state(optimizer)["non_finite"] > 0
    # Where the loss is 1,560, its rounding in float32 hides 3e-4 of x.
    torch.testing.assert_close(
        mine.x.detach().double(),
        torch.ones(4, dtype=F64),
        rtol=0.0,
        atol=4e-3 if dtype != F64 else 1e-5,
    )


@pytest.mark.parametrize("max_iter", [1, 20])
def test_nan_after_a_fixed_step_is_undone(max_iter: int) -> None:
    mine = Objective(log_barrier())
    optimizer = LBFGS([mine.x], max_iter=max_iter, deterministic=True)
    for _ in range(60):
        optimizer.step(mine.closure)
        assert mine.gap < 1e4
    assert state(optimizer)["non_finite"] > 0
    torch.testing.assert_close(mine.x.detach(), torch.ones(4, dtype=F64), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("line_search", ["strong_wolfe", None])
def test_a_start_that_is_not_finite_changes_nothing(
    line_search: str | None, value: float, what: str, backend: str
) -> None:
    mine, spared = Objective(rosenbrock(6)), Objective(rosenbrock(6))
    options = {"line_search_fn": line_search, "lr": 1.0 if line_search else 1e-3}
    optimizer = make([mine.x], backend=backend, **options)
    other = make([spared.x], backend=backend, **options)

    def bad_closure() -> Tensor:
        loss = mine.closure()
        if what == "gradient":
            mine.x.grad[2] = value
            return loss
        return loss * value

    for _ in range(4):
        optimizer.step(mine.closure)
        other.step(spared.closure)
    before, x = snapshot(optimizer), mine.x.detach().clone()
    for _ in range(3):
        optimizer.step(bad_closure)
        assert reason(optimizer) == "non_finite"
        assert_same(snapshot(optimizer), before)
        assert torch.equal(mine.x, x)
    assert state(optimizer)["non_finite"] == 3
    for _ in range(4):
        optimizer.step(mine.closure)
        other.step(spared.closure)
    assert torch.equal(mine.x, spared.x)
    assert_same(snapshot(optimizer), snapshot(other))


def test_a_wall_of_nan_around_the_start() -> None:
    mine = Objective(nan_wall())
    optimizer = make([mine.x], max_iter=5, max_eval=200)
    for _ in range(3):
        optimizer.step(mine.closure)
        assert torch.equal(mine.x.detach(), mine.problem.x0)
    assert reason(optimizer) == "line_search"
    # The first step tried three times more, each time from a tenth of the length, and settled; the
    # others only looked.
    assert state(optimizer)["line_search_failures"] == 4
    assert state(optimizer)["step_cuts"] == 3
    assert mine.calls <= 4 * 26 + 2


class _Boom(BaseException):
    """Neither a RuntimeError nor even an Exception, as KeyboardInterrupt."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("line_search", ["strong_wolfe", "armijo", None])
def test_an_exception_at_any_evaluation_can_be_retried(
    line_search: str | None, deterministic: bool, backend: str
) -> None:
    """Parameters return to where the step began; the retry ends, bit for bit, where it would."""

    def run(failing: int | None, error: type[BaseException] = _Boom) -> tuple[Tensor, int, dict]:
        mine = Objective(rosenbrock(10), torch.float32)
        optimizer = make(
            [mine.x],
            line_search_fn=line_search,
            lr=1.0 if line_search else 2e-3,
            history_size=3,
            deterministic=deterministic,
            backend=backend,
        )
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise error
            return mine.closure()

        for _ in range(8):
            before = mine.x.detach().clone()
            try:
                optimizer.step(closure)
            except error:
                assert torch.equal(mine.x, before)
                optimizer.step(closure)
        if calls < (failing or 0):
            raise AssertionError(f"the closure was called {calls} times")
        return mine.x.detach(), calls, snapshot(optimizer)

    x, calls, final = run(None)
    for failing in range(1, calls + 1):
        again, _, state_then = run(failing, KeyboardInterrupt if failing % 2 else _Boom)
        assert torch.equal(again, x), failing
        assert_same(state_then, final)


def test_an_exception_in_mid_step_leaves_the_last_iterate() -> None:
    """With several iterations a step, those completed stay."""
    reference = Objective(rosenbrock(10))
    one = make([reference.x], deterministic=True)
    iterates = [reference.x.detach().clone()]
    for _ in range(12):
        one.step(reference.closure)
        iterates.append(reference.x.detach().clone())
    for failing in range(1, 13):
        mine = Objective(rosenbrock(10))
        optimizer = make([mine.x], max_iter=12, max_eval=100)

        def closure(mine: Objective = mine, failing: int = failing) -> Tensor:
            if mine.calls == failing:
                raise _Boom
            return mine.closure()

        with pytest.raises(_Boom):
            optimizer.step(closure)
        assert any(torch.allclose(mine.x, x, rtol=1e-9, atol=0.0) for x in iterates), failing
        for _ in range(8):
            optimizer.step(mine.closure)
        assert mine.gap < 1e-8


# --- what closures return ------------------------------------------------------------------------


@pytest.mark.parametrize("when", [1, 2, 5])
@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, r"closure must return the loss, got None; end it with `return loss`"),
        ("0.5", TypeError, r"closure must return the loss, got '0.5'"),
        (torch.zeros(2), ValueError, r"must return a scalar loss, got a tensor of shape \(2,\)"),
    ],
)
def test_a_closure_without_a_scalar(
    when: int, returned: Any, error: type[Exception], message: str
) -> None:
    mine = Objective(rosenbrock(4))
    optimizer = make([mine.x])

    def closure() -> Any:
        loss = mine.closure()
        return returned if mine.calls == when else loss

    with pytest.raises(error, match=message):
        for _ in range(5):
            before = mine.x.detach().clone()
            optimizer.step(closure)
    assert torch.equal(mine.x, before)


@pytest.mark.parametrize(
    "convert", [Tensor.item, lambda loss: loss.detach().numpy()[()], lambda t: t[None]]
)
def test_losses_that_are_numbers(convert: Callable[[Tensor], Any]) -> None:
    mine, plain = Objective(rosenbrock(4)), Objective(rosenbrock(4))
    optimizer, other = make([mine.x]), make([plain.x])
    for _ in range(5):
        loss = optimizer.step(lambda: convert(mine.closure()))
        assert float(loss) == other.step(plain.closure).item()
    assert torch.equal(mine.x, plain.x)


def test_the_loss_of_a_step_is_that_where_it_began() -> None:
    for deterministic in (False, True):
        mine = Objective(rosenbrock(4))
        optimizer = make([mine.x], max_iter=3, max_eval=75, deterministic=deterministic)
        for _ in range(5):
            expected = mine.value
            loss = optimizer.step(mine.closure)
            assert loss.item() == pytest.approx(expected, rel=1e-12)
            assert not loss.requires_grad


@pytest.mark.filterwarnings("ignore:the closure has left no gradient")
def test_a_closure_that_forgets_backward() -> None:
    """No gradient counts as zero, as in torch, and the reason says so."""
    x = torch.ones(3, requires_grad=True)
    optimizer = make([x])
    loss = optimizer.step(lambda: x.square().sum())
    assert loss == 3.0
    assert reason(optimizer) == "no_gradient"
    assert not optimizer.report().converged
    assert torch.equal(x.detach(), torch.ones(3))


def test_the_closure_runs_with_gradients_enabled() -> None:
    mine = Objective(rosenbrock(4))
    optimizer = make([mine.x])
    with torch.no_grad():
        optimizer.step(mine.closure)
    assert not torch.equal(mine.x.detach(), mine.problem.x0)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_a_checkpoint_goes_on_bit_for_bit(
    steps: int, deterministic: bool, history_dtype: torch.dtype | None, tmp_path: Any
) -> None:
    """Before the first step, with the ring filling up, and full."""

    def new() -> tuple[Objective, LBFGS]:
        mine = Objective(rosenbrock(10), torch.float32)
        options = {"deterministic": deterministic, "history_dtype": history_dtype}
        return mine, make([mine.x], history_size=4, **options)

    mine, optimizer = new()
    for _ in range(steps):
        optimizer.step(mine.closure)
    torch.save({"x": mine.x.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    for _ in range(6):
        optimizer.step(mine.closure)

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again, other = new()
    with torch.no_grad():
        again.x.copy_(saved["x"])
    other.load_state_dict(saved["optimizer"])
    for _ in range(6):
        other.step(again.closure)
    assert torch.equal(again.x, mine.x)
    assert_same(snapshot(other), snapshot(optimizer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][0].pop("history"), r"lacks \['history'\]"),
        (lambda s: s["state"][0].pop("scalars"), r"lacks \['scalars'\]"),
        (lambda s: s["state"][0].pop("grad_prev"), r"lacks \['grad_prev'\]"),
        (lambda s: s["state"][0].update(history=torch.zeros(2, 4, 9)), r"history has shape"),
        (lambda s: s["state"][0].update(scalars=torch.zeros(3)), r"scalars has shape \(3,\)"),
        (lambda s: s["state"][0].update(pair_step="x"), r"pair_step is 'x', not a float"),
        (lambda s: s["param_groups"][0].update(history_size=7), r"history has shape .* expected"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr must be at least 0"),
        (lambda s: s["param_groups"][0].pop("history_size"), "has no 'history_size'"),
        (lambda s: s["param_groups"][0].update(params=[0, 1]), r"parameter groups of \[2\]"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(
    change: Callable[[dict], Any], message: str
) -> None:
    mine = Objective(rosenbrock(10), torch.float32)
    optimizer = make([mine.x], history_dtype=torch.bfloat16)
    for _ in range(4):
        optimizer.step(mine.closure)
    saved = optimizer.state_dict()
    before = snapshot(optimizer)
    foreign = {
        "state": {0: dict(saved["state"][0])},
        "param_groups": [dict(saved["param_groups"][0])],
    }
    change(foreign)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign)
    assert_same(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["history_size"] == 5
    optimizer.step(mine.closure)


def test_torchs_state_is_refused_and_its_options_are_taken() -> None:
    mine, theirs = Objective(rosenbrock(4)), Objective(rosenbrock(4))
    torchs = torch.optim.LBFGS([theirs.x], lr=0.25, history_size=7)
    optimizer = make([mine.x])
    optimizer.load_state_dict(torchs.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["history_size"] == 7
    torchs.step(theirs.closure)
    with pytest.raises(ValueError, match=r"state_dict is not of fuse_ext's L-BFGS: it has no"):
        optimizer.load_state_dict(torchs.state_dict())


def test_a_group_added_later_starts_the_curvature_afresh() -> None:
    mine = Objective(rosenbrock(10))
    late = torch.ones(3, dtype=F64, requires_grad=True)
    optimizer = make([mine.x])

    def closure() -> Tensor:
        late.grad = None
        loss = mine.closure()
        extra = (late - 3.0).square().sum()
        extra.backward()
        return loss + extra.detach()

    for _ in range(5):
        optimizer.step(mine.closure)
    before = optimizer.report()
    optimizer.add_param_group({"params": [late], "weight_decay": 0.0})
    after = optimizer.report()
    assert (before.pairs_held > 0, after.pairs_held) == (True, 0)
    for name in ("pairs_accepted", "pairs_skipped", "evaluations", "lbfgs_iterations"):
        assert getattr(after, name) == getattr(before, name), name
    for _ in range(60):
        optimizer.step(closure)
    assert mine.gap < 1e-9
    torch.testing.assert_close(late.detach(), torch.full((3,), 3.0, dtype=F64), rtol=1e-4, atol=0)
