"""FusePV(capturable=True) in both phases, and across the switch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from capture_cases import Bowl, NothingRead, fake_cuda, run
from torch import Tensor

from fuse_ext import AfterEpochs, AfterSteps, FusePV, LossPlateau, NearSolution, Never, When
from fuse_ext.phase.protocol import Call
from fuse_ext.phase.told import tell

BF16 = torch.bfloat16


def make(params: Any, **options: Any) -> FusePV:
    defaults = {"lr": 0.05, "switch": 6, "lbfgs_lr": 0.7, "line_search": None, "history_size": 3}
    return FusePV(params, **{**defaults, **options})


def both(steps: int = 30, closure: bool = True, problem: Any = None, **options: Any) -> Any:
    return [
        run(lambda p, c=c: make(p, capturable=c, **options), steps, closure, **problem or {})
        for c in (False, True)
    ]


def check_same(ordinary: Any, captured: Any) -> None:
    assert torch.equal(ordinary[0], captured[0])
    ours, theirs = asdict(captured[1].report()), asdict(ordinary[1].report())
    for name in ("state_bytes", "workspace_bytes"):
        del ours[name], theirs[name]
    assert ours == theirs


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor lr": {"lr": torch.tensor(0.05)},
    "bf16": {"history_dtype": BF16},
    "int8": {"history_dtype": torch.int8, "weight_decay": 0.1},
    "other batches": {"pairs": "consecutive"},
    "deterministic": {"deterministic": True},
    "AdamW": {"decoupled_weight_decay": True, "weight_decay": 0.1, "amsgrad": True},
    "unchecked": {"check_finite": False},
    "L-BFGS at once": {"switch": 0, "lr": torch.tensor(1.0)},
    "Adam alone": {"switch": Never()},
    "epochs": {"switch": AfterEpochs(1, steps_per_epoch=5)},
    "reference": {"backend": "reference"},
}


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_results(options: dict[str, Any], closure: bool) -> None:
    ordinary, captured = both(closure=closure, **options)
    if "deterministic" in options:  # which evaluates once more in the ordinary step
        assert torch.equal(ordinary[0], captured[0])
    else:
        check_same(ordinary, captured)


@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_dtypes(dtype: torch.dtype) -> None:
    check_same(*both(problem={"dtype": dtype}))


@pytest.mark.filterwarnings("ignore:FusePV met a loss or gradient that is not finite")
@pytest.mark.parametrize("what", ["bad_calls", "bad_losses"])
@pytest.mark.parametrize(
    ("options", "bad"),
    [
        ({"switch": Never()}, [0, 1, 4, 9]),
        ({"switch": 0}, [3, 9, 11]),  # the ends of steps, which are undone
        ({"switch": 0, "pairs": "consecutive"}, [0, 4, 5, 12]),  # starts
    ],
    ids=["adam", "ends", "starts"],
)
def test_points_that_are_not_finite(options: dict[str, Any], bad: list[int], what: str) -> None:
    problem = {what: bad}
    ordinary, captured = both(20, True, problem, **options)
    check_same(ordinary, captured)
    assert captured[1].report().non_finite == len(bad)
    if what == "bad_calls":
        check_same(*both(20, False, problem, **options))


def test_the_criterion_counts_calls() -> None:
    """Which of them were not steps, only the device knows."""
    _, optimizer, _ = run(lambda p: make(p, capturable=True), 10, bad_calls=[2, 3])
    report = optimizer.report()
    assert (report.switch_step, report.adam_steps, report.non_finite) == (4, 4, 2)


def test_a_loss_by_hand() -> None:
    for bad in (torch.tensor(torch.nan), float("inf")):
        bowl = Bowl()
        optimizer = make(bowl.params, capturable=True)
        for step in range(4):
            loss: Any = bowl.closure()
            place = bowl.place()
            optimizer.step(loss=bad if step == 2 else loss)
            assert torch.equal(place, bowl.place()) == (step == 2)
        report = optimizer.report()
        assert (report.adam_steps, report.non_finite, report.evaluations) == (3, 1, 0)


def test_the_lr_at_the_switch_is_the_unit_of_its_schedule() -> None:
    places = []
    for lr in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        bowl = Bowl()
        optimizer = make(bowl.params, lr=lr, capturable=True)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for _ in range(15):
            optimizer.step(bowl.closure)
            schedule.step()
        assert optimizer.param_groups[0]["lr_at_switch"] == pytest.approx(0.05 * 0.9**5)
        places.append(bowl.place())
    torch.testing.assert_close(*places, rtol=1e-5, atol=1e-6)


def test_an_lr_of_0_at_the_switch_is_no_unit() -> None:
    bowl, lr = Bowl(), torch.tensor(0.05)
    optimizer = make(bowl.params, lr=lr, switch=Never(), capturable=True)
    optimizer.step(bowl.closure)
    lr.zero_()
    optimizer.switch_now()
    place = bowl.place()
    with pytest.raises(ValueError, match=r"lr_at_switch=0.0: the L-BFGS step follows lr"):
        optimizer.step(bowl.closure)
    assert torch.equal(bowl.place(), place)


def test_groups() -> None:
    results = []
    for capturable in (False, True):
        bowl = Bowl()
        groups: list[dict[str, Any]] = [
            {"params": bowl.params[:1]},
            {"params": bowl.params[1:], "lbfgs_lr": 0.5, "weight_decay": 0.1},
        ]
        optimizer = make(groups, capturable=capturable)
        for _ in range(20):
            optimizer.step(bowl.closure)
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
        for _ in range(5):
            optimizer.step(bowl.closure)
        report = optimizer.report()
        results.append((bowl.place(), report.adam_steps, report.lbfgs_iterations))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_back_and_forth() -> None:
    results = []
    for capturable in (False, True):
        bowl, switched = Bowl(), []
        optimizer = make(bowl.params, capturable=capturable, on_switch=switched.append)
        for step in range(24):
            if step == 12:
                optimizer.switch_back()
            optimizer.step(bowl.closure)
        assert len(switched) == 2
        assert optimizer.report().adam_steps == 12
        report = optimizer.report()
        results.append((bowl.place(), report.lbfgs_iterations, report.pairs_accepted))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == 12
    assert results[0][2] == results[1][2] > report.pairs_held  # of both rings


def scaled(optimizer: FusePV, bowl: Bowl, bad: bool) -> None:
    """What GradScaler does around a step."""
    bowl.closure()
    for p in bowl.params:
        p.grad.mul_(8.0)
    if bad:
        bowl.params[0].grad[0] = torch.inf
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(bad))
    optimizer.step()


def test_grad_scaler() -> None:
    results = []
    for capturable in (False, True):
        bowl = Bowl()
        optimizer = make(bowl.params, capturable=capturable)
        for step in range(16):
            # The ordinary switch waits for steps that were taken, the captured one counts calls.
            scaled(optimizer, bowl, bad=step in (8, 11))
        results.append(bowl.place())
        assert optimizer.report().non_finite == 2
    assert torch.equal(*results)
    bowl = Bowl()
    optimizer = make(bowl.params, capturable=True, switch=Never())
    for step in range(6):
        scaled(optimizer, bowl, bad=step % 2 == 0)
    report = optimizer.report()
    assert (report.adam_steps, report.non_finite) == (3, 3)


# --- counts of steps that the host did not see ------------------------------------------------


def test_the_host_takes_over_the_devices_count() -> None:
    """A replay is a step that Python does not see: the op's arguments of the last one again."""
    bowl = Bowl()
    optimizer = make(bowl.params, switch=AfterSteps(20), capturable=True)
    for _ in range(3):
        optimizer.step(bowl.closure)
    phase = optimizer._phase
    replay: Callable[[], Any] = lambda: phase.moments.step_on_device(  # noqa: E731
        optimizer.param_groups, loss=bowl.closure(), counted=phase._counted
    )
    bowl.bad_losses = {5}
    for _ in range(10):
        replay()
    report = optimizer.report()
    assert (report.adam_steps, report.non_finite, report.evaluations) == (12, 1, 3)
    assert float(optimizer.state[bowl.params[1]]["step"]) == 12
    for _ in range(8):
        assert optimizer.phase == "adam"
        optimizer.step(bowl.closure)
    report = optimizer.report()
    assert (report.phase, report.switch_step) == ("lbfgs", 20)
    entry = optimizer.state[bowl.params[0]]
    for _ in range(4):
        call = Call(None, optimizer.param_groups)
        tell(optimizer._phase, call, optimizer.flat)
        optimizer._phase.step(call)
    assert entry["n_iter"] == 0
    assert optimizer.report().lbfgs_iterations == entry["n_iter"] == 4


# --- nothing is read ------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["float", "tensor"])
def test_nothing_is_read_and_nothing_allocated(lr: Any) -> None:
    bowl = Bowl()
    optimizer = make(bowl.params, lr=lr, capturable=True)
    launches = {
        "adam": ["grad_stats", "adam_step"],
        "lbfgs": ["lbfgs_update", "lbfgs_decide", "lbfgs_direction", "lbfgs_move"],
    }
    for step in range(12):
        loss, phase = bowl.closure(), optimizer.phase
        if step in (0, 5):  # state is made; the switch
            optimizer.step(loss=loss)
            continue
        with NothingRead(limit=2) as seen:
            optimizer.step(loss=loss)
        views = {"aten::detach", "aten::slice.Tensor"}
        names = [name for name in seen.ops if name not in views]
        assert names == [f"fuse_ext::{name}" for name in launches[phase]]
    assert optimizer.phase == "lbfgs"


def test_a_second_evaluation_takes_three_launches_more() -> None:
    bowl = Bowl()
    optimizer = make(bowl.params, switch=0, capturable=True)
    optimizer.step(bowl.closure)
    with NothingRead(limit=1000) as seen:
        optimizer.step(bowl.closure)
    ours = [name.removeprefix("fuse_ext::lbfgs_") for name in seen.ops if "fuse_ext" in name]
    assert ours == ["update", "decide", "direction", "move", "update", "decide", "move"]


@pytest.mark.parametrize("switch", [0, Never()], ids=["lbfgs", "adam"])
@pytest.mark.parametrize("with_closure", [False, True])
def test_nothing_is_read_on_a_device(
    monkeypatch: pytest.MonkeyPatch, with_closure: bool, switch: Any
) -> None:
    with fake_cuda(monkeypatch):
        bowl = Bowl(device="cuda")
        optimizer = make(bowl.params, switch=switch, capturable=True)
        for step in range(5):
            if with_closure:
                optimizer.step(bowl.closure)
            else:
                optimizer.step(loss=bowl.closure())
            if step == 2 and not with_closure:
                optimizer.grad_scale = torch.tensor(2.0, device="cuda")
                optimizer.found_inf = torch.zeros((), device="cuda")


def test_a_capture_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda(monkeypatch) as device:
        bowl = Bowl(device="cuda")
        optimizer = make(bowl.params, switch=3, capturable=True)
        optimizer.step(bowl.closure)
        device.capturing = True
        for _ in range(5):
            optimizer.step(bowl.closure)
        log = optimizer.state[bowl.params[0]]["fuse_pv"]
        assert (optimizer.phase, log["adam_steps"], log["adam_evaluations"]) == ("adam", 1, 1)
        bowl = Bowl(device="cuda")
        optimizer = make(bowl.params, switch=0, capturable=True)
        with pytest.raises(RuntimeError, match="history of L-BFGS is made while a CUDA graph"):
            optimizer.step(bowl.closure)


# --- errors and checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"line_search": "approximate_wolfe"}, "needs line_search=None, got line_search='approx"),
        ({"max_iter": 5}, "needs max_iter=1, got max_iter=5"),
        ({"rtol": 0.1}, "needs rtol=0.0, got rtol=0.1"),
        ({"switch": None}, r"needs a switch that reads nothing .* got LossPlateau\("),
        ({"switch": AfterSteps(3) | LossPlateau()}, "needs a switch that reads nothing"),
        ({"switch": NearSolution([torch.zeros(2)], 0.1)}, "reads nothing .* got NearSolution"),
        ({"switch": lambda seen: True}, "needs a switch that reads nothing from the device"),
    ],
)
def test_options_that_need_the_host(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"capturable=True {message}|{message}"):
        make([torch.zeros(2)], capturable=True, **options)


def test_a_function_that_needs_nothing() -> None:
    quiet = When(lambda seen: seen.step == 4, needs_loss=False, needs_grad_norm=False)
    _, optimizer, _ = run(lambda p: make(p, switch=quiet, capturable=True), 8)
    assert optimizer.report().switch_step == 4


def test_a_closure_that_raises_at_the_end_of_a_step() -> None:
    bowl = Bowl()
    optimizer = make(bowl.params, switch=0, capturable=True)
    for _ in range(4):
        optimizer.step(bowl.closure)
    place, calls = bowl.place(), []

    def fails_later() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            assert not torch.equal(bowl.place(), place)
            raise KeyError("closure")
        return bowl.closure()

    with pytest.raises(KeyError):
        optimizer.step(fails_later)
    assert torch.equal(bowl.place(), place)
    optimizer.step(bowl.closure)
    assert optimizer.report().pairs_skipped == 0


def twin(bowl: Bowl) -> Bowl:
    other = Bowl()
    for p, q in zip(other.params, bowl.params, strict=True):
        p.data.copy_(q.data)
    return other


@pytest.mark.parametrize("steps", [3, 6, 12], ids=["adam", "switched", "lbfgs"])
@pytest.mark.parametrize("then", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_state_dict_goes_both_ways(first: bool, then: bool, steps: int) -> None:
    _, optimizer, bowl = run(lambda p: make(p, capturable=first), steps)
    other = twin(bowl)
    loaded = make(other.params, capturable=then)
    loaded.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for _ in range(10):
        optimizer.step(bowl.closure)
        loaded.step(other.closure)
    assert torch.equal(bowl.place(), other.place())
    ours, theirs = loaded.report(), optimizer.report()
    assert (ours.adam_steps, ours.switch_step) == (theirs.adam_steps, theirs.switch_step) == (6, 6)
    assert ours.lbfgs_iterations == theirs.lbfgs_iterations
    assert ours.evaluations == theirs.evaluations


@pytest.mark.parametrize("steps", [3, 12], ids=["adam", "lbfgs"])
def test_copies_are_independent(steps: int) -> None:
    _, optimizer, bowl = run(lambda p: make(p, capturable=True), steps)
    pairs = [(optimizer, bowl), copy.deepcopy((optimizer, bowl))]
    pairs.append(pickle.loads(pickle.dumps((optimizer, bowl))))
    for one, its in pairs:
        for _ in range(6):
            one.step(its.closure)
    for one, its in pairs[1:]:
        assert torch.equal(bowl.place(), its.place())
        assert one.report() == optimizer.report()
