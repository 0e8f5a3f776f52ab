"""LBFGS(capturable=True): the ordinary step's results, and nothing read from the device."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict
from typing import Any

import pytest
import torch
from capture_cases import NEVER, Bowl, NothingRead, fake_cuda, run
from lbfgs_cases import header, state
from torch import Tensor

from fuse_ext import LBFGS
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.fixed_step import Control

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def make(params: Any, **options: Any) -> LBFGS:
    defaults = {"lr": 0.7, "max_iter": 1, "history_size": 3, **NEVER}
    return LBFGS(params, **{**defaults, **options})


def both(
    steps: int = 40, closure: bool = True, problem: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any]:
    """The same run without and with capturable."""
    ordinary, captured = (
        run(lambda p, c=c: make(p, capturable=c, **options), steps, closure, **problem or {})
        for c in (False, True)
    )
    return ordinary, captured


def check_same(ordinary: Any, captured: Any) -> None:
    """Iterates, counts and curvature, to the bit."""
    assert torch.equal(ordinary[0], captured[0])
    ours, theirs = asdict(captured[1].report()), asdict(ordinary[1].report())
    # grad_prev apart, zeros and the origin kept; deterministic evaluates again.
    for name in ("state_bytes", "workspace_bytes", "evaluations"):
        del ours[name], theirs[name]
    assert ours == theirs
    entries = [state(optimizer) for _, optimizer, _ in (ordinary, captured)]
    slots = entries[0]["history"].size(1)
    # The dots of the last gradient are known even where no step was taken.
    for name in ("row_scale", "gram_sy", "gram_yy"):
        a, b = (ring.array(entry["scalars"], name, slots) for entry in entries)
        assert torch.equal(a, b), name
    headers = [asdict(header(optimizer)) for _, optimizer, _ in (ordinary, captured)]
    for numbers in headers:
        del numbers["y_dot_y"]  # as those dots
    assert headers[0] == pytest.approx(headers[1], rel=0, abs=0, nan_ok=True)


# A ring of three, so that 40 steps wrap it around many times.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"history_dtype": BF16},
    "f16": {"history_dtype": F16},
    "int8": {"history_dtype": torch.int8},
    "f64 rows": {"history_dtype": F64},
    "weight decay": {"weight_decay": 0.3},
    "one pair": {"history_size": 1},
    "long": {"history_size": 60},
    "tensor lr": {"lr": torch.tensor(0.7)},
    "strict": {"curvature_tol": 0.5},
    "tolerances": {"tolerance_grad": 1e-3, "tolerance_change": 1e-6},
    "lr 0": {"lr": 0.0},
    "tensor lr 0": {"lr": torch.tensor(0.0)},
    "reference": {"backend": "reference"},
    "reference int8": {"backend": "reference", "history_dtype": torch.int8, "weight_decay": 0.1},
}


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_results(options: dict[str, Any], closure: bool) -> None:
    ordinary, captured = both(closure=closure, **options)
    check_same(ordinary, captured)
    if "lr" not in options:
        assert captured[0][-1].norm() < 1e-2 * captured[0][0].norm()


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("maximize", [False, True])
def test_dtypes_and_maximize(dtype: torch.dtype, maximize: bool) -> None:
    problem = {"dtype": dtype, "sign": -1.0 if maximize else 1.0}
    check_same(*both(maximize=maximize, problem=problem, weight_decay=0.1))


@pytest.mark.parametrize("history_dtype", [None, BF16, torch.int8])
@pytest.mark.parametrize(
    "bad", [[0], [0, 1, 2, 3, 4], [7], [9, 10, 11], [9, 10, 11, 12], list(range(5, 14)), [1, 3, 4]]
)
@pytest.mark.parametrize("what", ["bad_calls", "bad_losses"])
def test_points_that_are_not_finite(
    what: str, bad: list[int], history_dtype: torch.dtype | None
) -> None:
    """Nothing moves there; after four in a row the step that led there is undone."""
    problem: dict[str, Any] = {what: bad}
    ordinary, captured = both(steps=30, problem=problem, history_dtype=history_dtype)
    check_same(ordinary, captured)
    assert captured[1].report().non_finite == len(bad)
    for call in bad:
        undone = call - bad[0] >= 3 and call in bad
        assert undone or call == 0 or torch.equal(captured[0][call], captured[0][call - 1])


def test_a_bad_gradient_changes_nothing_at_all() -> None:
    _, optimizer, bowl = run(lambda p: make(p, capturable=True), 10, closure=False)
    entry = state(optimizer)
    kept = {k: v.clone() for k, v in entry.items() if isinstance(v, Tensor) and k != "control"}
    opened, place = int(header(optimizer).open), bowl.place()
    pair_step = Control(entry["control"]).pair_step
    bowl.params[1].grad[0, 0] = torch.nan
    optimizer.step()
    assert torch.equal(bowl.place(), place)
    assert Control(entry["control"]).pair_step == pair_step > 0
    kept["history"][1, opened] = entry["history"][1, opened]  # y of a pair not yet there
    slots = kept["history"].size(1)
    for name in ("grad_s", "grad_y", "y_s", "y_y"):  # dots of this very gradient
        ring.array(kept["scalars"], name, slots).copy_(ring.array(entry["scalars"], name, slots))
    place_of = ring.index("y_dot_y", slots)
    kept["scalars"][place_of] = entry["scalars"][place_of]
    for name, value in kept.items():
        assert torch.equal(value.nan_to_num(7.0), entry[name].nan_to_num(7.0)), name


def test_rosenbrock() -> None:
    iterates = []
    for capturable in (False, True):
        x = torch.tensor([-1.2, 1.0], dtype=F64, requires_grad=True)
        optimizer = make([x], lr=0.2, history_size=5, capturable=capturable)

        def closure(x: Tensor = x, optimizer: LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
            loss.backward()
            return loss

        places = []
        for _ in range(120):
            optimizer.step(closure)
            places.append(x.detach().clone())
        iterates.append(torch.stack(places))
    assert torch.equal(*iterates)
    assert torch.allclose(iterates[0][-1], torch.ones(2, dtype=F64), atol=1e-3)


def groups(params: list[Tensor], lrs: tuple[float, ...]) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)]


@pytest.mark.parametrize("lrs", [(0.5, 0.4, 0.5), (0.5, 0.0, 0.2)], ids=["shares", "frozen"])
def test_groups_of_different_lr(lrs: tuple[float, ...]) -> None:
    ordinary, captured = (
        run(lambda p, c=c: make(groups(p, lrs), capturable=c, weight_decay=0.1), 30)
        for c in (False, True)
    )
    check_same(ordinary, captured)


def test_a_parameter_without_gradient() -> None:
    def without(params: list[Tensor], capturable: bool) -> LBFGS:
        return make([*params, torch.ones(4, requires_grad=True)], capturable=capturable)

    ordinary, captured = (run(lambda p, c=c: without(p, c), 20) for c in (False, True))
    check_same(ordinary, captured)


def test_complex_and_strided_parameters() -> None:
    places = []
    for capturable in (False, True):
        torch.manual_seed(0)
        z = torch.randn(4, 3, dtype=torch.complex64).t().requires_grad_()
        x = torch.randn(6, 4)[:, ::2].requires_grad_()
        optimizer = make([z, x], lr=0.1, capturable=capturable)
        for _ in range(20):
            optimizer.zero_grad()
            ((z - 1j).abs().square().sum() + (x**2).sum() * 3).backward()
            optimizer.step()
        places.append(torch.cat([torch.view_as_real(z.detach()).flatten(), x.detach().flatten()]))
    assert torch.equal(*places)


def test_deterministic_undoes_a_step_at_the_next_start() -> None:
    """The ordinary step looks at its own end: it lands where the next one of this begins."""
    options = {"deterministic": True, "lr": 1.0}
    ordinary, captured = both(steps=20, problem={"bad_calls": [6]}, **options)
    assert captured[1].report().history_resets == ordinary[1].report().history_resets == 1
    assert torch.equal(captured[0][6], captured[0][4])
    assert captured[0][-1].norm() < 1e-2
    check_same(*both(steps=20, **options))


def test_directions_that_do_not_descend() -> None:
    """-g, with the history forgotten, in the very same step."""
    results = []
    for capturable in (False, True):
        _, optimizer, bowl = run(lambda p, c=capturable: make(p, capturable=c), 8)
        entry = state(optimizer)
        slots = entry["history"].size(1)
        ring.array(entry["scalars"], "gram_yy", slots).mul_(-100.0)
        for _ in range(10):
            optimizer.step(bowl.closure)
        assert optimizer.report().history_resets >= 1
        results.append((bowl.place(), optimizer.report().history_resets))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_an_ascent_by_shares_is_left_out() -> None:
    """g.p < 0 does not foretell it for groups of different lr: then the next step is along -g."""
    x, y = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    optimizer = make(groups([x, y], (1.0, 0.01)), capturable=True)
    # Along (1, 1) the function bends so much that -H g points uphill in x.
    a = torch.tensor([[1.0, 1.9], [1.9, 4.0]])
    for _ in range(60):
        g = a @ torch.cat([x, y]).detach()
        x.grad, y.grad = g[:1].clone(), g[1:].clone()
        before = torch.cat([x, y]).detach()
        optimizer.step()
        reason, moved = optimizer.report().stop_reason, torch.cat([x, y]).detach() - before
        assert bool(moved.any()) == (reason == "max_iter")
        assert not moved.any() or float(moved @ g) < 0
    assert optimizer.report().history_resets > 0
    value = torch.cat([x, y]).detach()
    assert float(value @ a @ value) < 0.2 * float(torch.ones(2) @ a @ torch.ones(2))


# --- nothing is read ------------------------------------------------------------------------


@pytest.mark.parametrize("history_dtype", [None, BF16, torch.int8])
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float", "tensor"])
def test_nothing_is_read_and_nothing_allocated(lr: Any, history_dtype: torch.dtype | None) -> None:
    _, optimizer, bowl = run(
        lambda p: make(p, lr=lr, history_dtype=history_dtype, capturable=True), 1, closure=False
    )
    for _ in range(6):
        bowl.closure()
        with NothingRead(limit=20) as seen:
            optimizer.step()
        names = [f"fuse_ext::lbfgs_{n}" for n in ("update", "decide", "direction", "move")]
        assert [n for n in seen.ops if "fuse_ext" in n] == names
        assert len(seen.ops) == 4
    with pytest.raises(AssertionError, match="the host reads a tensor"), NothingRead(limit=20):
        optimizer.report()


@pytest.mark.parametrize("with_closure", [False, True])
def test_nothing_is_read_on_a_device(monkeypatch: pytest.MonkeyPatch, with_closure: bool) -> None:
    with fake_cuda(monkeypatch):
        bowl = Bowl(device="cuda")
        optimizer = make(bowl.params, capturable=True)
        for step in range(5):
            bowl.bad_calls.add(3)
            if with_closure:
                optimizer.step(bowl.closure)
            else:
                bowl.closure()
                optimizer.step()
            if step == 2:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device="cuda")
        assert state(optimizer)["control"].device.type == "cuda"


def test_the_state_is_made_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch, capturing=True) as device:
        bowl = Bowl(device="cuda")
        optimizer = make(bowl.params, capturable=True)
        with pytest.raises(RuntimeError, match="history of L-BFGS is made while a CUDA graph"):
            optimizer.step()
        device.capturing = False
        optimizer.step(bowl.closure)
        device.capturing = True
        optimizer.step(bowl.closure)
        assert state(optimizer)["func_evals"] == 1  # nothing has run in the capture


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iter": 20}, "capturable=True needs max_iter=1, got max_iter=20"),
        ({"line_search_fn": "armijo"}, "needs line_search_fn=None, got line_search_fn='armijo'"),
        ({"rtol": 1e-3}, "needs rtol=0.0, got rtol=0.001"),
    ],
)
def test_options_that_need_the_host(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([torch.zeros(2)], capturable=True, **options)
    _, optimizer, bowl = run(lambda p: make(p, capturable=True), 3)
    before, kept = bowl.place(), copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step(bowl.closure)
    assert torch.equal(bowl.place(), before)
    now = optimizer.state_dict()["state"][0]
    for name, value in kept["state"][0].items():
        assert torch.equal(value, now[name]) if isinstance(value, Tensor) else value == now[name]


def test_lr_tensors() -> None:
    a, b = torch.zeros(2), torch.zeros(3)
    lr = torch.tensor(0.1)
    for second, kind, message in (
        (0.1, ValueError, "one lr tensor for all parameter groups .* in group 1"),
        (torch.tensor(0.1), ValueError, "one lr tensor for all parameter groups"),
    ):
        optimizer = make([{"params": [a]}, {"params": [b], "lr": second}], lr=lr, capturable=True)
        with pytest.raises(kind, match=message):
            optimizer.step()
    optimizer = make([a], lr=torch.tensor(1, dtype=torch.int64), capturable=True)
    with pytest.raises(TypeError, match=r"lr must be float32 or float64 .* torch.int64"):
        optimizer.step()
    assert not optimizer.state


def test_a_closure_that_raises() -> None:
    _, optimizer, bowl = run(lambda p: make(p, capturable=True), 5)
    place, entry = bowl.place(), copy.deepcopy(state(optimizer))

    def fails() -> Tensor:
        raise KeyError("closure")

    for bad, kind in ((fails, KeyError), (lambda: "0.5", TypeError), (lambda: place, ValueError)):
        with pytest.raises(kind):
            optimizer.step(bad)
        assert torch.equal(bowl.place(), place)
        assert torch.equal(state(optimizer)["control"], entry["control"])


# --- checkpoints ----------------------------------------------------------------------------


def continued(optimizer: LBFGS, bowl: Bowl, steps: int = 10) -> Tensor:
    for _ in range(steps):
        optimizer.step(bowl.closure)
    return bowl.place()


@pytest.mark.parametrize("history_dtype", [None, BF16, torch.int8])
@pytest.mark.parametrize("then", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_state_dict_goes_both_ways(
    first: bool, then: bool, history_dtype: torch.dtype | None
) -> None:
    """To the bit, from either kind into either, bad gradients before and after included."""
    options = {"history_dtype": history_dtype}
    _, optimizer, bowl = run(
        lambda p: make(p, capturable=first, **options), 8, bad_calls=[6, 7], bad_losses=[10]
    )
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    other = Bowl()
    for p, q in zip(other.params, bowl.params, strict=True):
        p.data.copy_(q.data)
    other.calls, other.bad_losses = bowl.calls, bowl.bad_losses
    loaded = make(other.params, capturable=then, **options)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["capturable"] is then
    assert ("control" in state(loaded)) is then
    assert torch.equal(continued(loaded, other), continued(optimizer, bowl))
    ours, theirs = loaded.report(), optimizer.report()
    assert ours.lbfgs_iterations == theirs.lbfgs_iterations
    assert (ours.non_finite, ours.pairs_accepted) == (theirs.non_finite, theirs.pairs_accepted)


def test_copies_are_independent() -> None:
    _, optimizer, bowl = run(lambda p: make(p, capturable=True), 6)
    twin, other = copy.deepcopy((optimizer, bowl))
    assert torch.equal(continued(optimizer, bowl), continued(twin, other))
    third, fourth = pickle.loads(pickle.dumps((optimizer, bowl)))
    assert torch.equal(continued(optimizer, bowl), continued(third, fourth))


def test_a_damaged_control_is_refused() -> None:
    _, optimizer, _ = run(lambda p: make(p, capturable=True), 4)
    saved = optimizer.state_dict()
    saved["state"][0]["control"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"control has shape \(3,\), expected"):
        optimizer.load_state_dict(saved)
