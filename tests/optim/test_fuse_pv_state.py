"""FusePV's checkpoints in and between its phases, copies of it, and groups that come later."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse_pv_cases import BACKENDS, Fit, assert_same, saved_state, snapshot
from torch import Tensor

from fuse_ext import (
    LBFGS,
    Adam,
    AfterSteps,
    AtOnce,
    Fuse,
    FusePV,
    GradNorm,
    LossChange,
    LossGap,
    LossPlateau,
    NearSolution,
    Never,
)

SWITCH_AT = 6
# Before the first step; in mid-Adam; on either side of the switch; the ring of 3 filling up, just
# full, and wrapped.
STAGES = {
    "new": 0,
    "adam": 3,
    "before-switch": 5,
    "at-switch": 6,
    "filling": 8,
    "full": 9,
    "wrapped": 14,
}


def new(**options: Any) -> Fit:
    return Fit(**{"switch": SWITCH_AT, "lr": 1e-2, "history_size": 3, **options})


def assert_goes_on_alike(ours: Fit, theirs: Fit, steps: int = 10) -> None:
    """The same losses, parameters, state and decisions."""
    assert ours.step(steps) == theirs.step(steps)
    assert torch.equal(ours.flat, theirs.flat)
    assert_same(snapshot(ours.optimizer), snapshot(theirs.optimizer))
    ours_report, theirs_report = ours.optimizer.report(), theirs.optimizer.report()
    assert ours_report.switch_step == theirs_report.switch_step
    assert ours_report.switch_reason == theirs_report.switch_reason
    assert ours_report.adam_steps == theirs_report.adam_steps


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "reference"},
        {"deterministic": True},
        {"line_search": None, "lbfgs_lr": 0.1},
        {"line_search": None, "lbfgs_lr": 0.1, "pairs": "consecutive"},
        {"history_dtype": torch.bfloat16, "deterministic": True},
        {"history_dtype": torch.int8},
        {"dtype": torch.bfloat16, "line_search": "approximate_wolfe"},
        {"amsgrad": True, "weight_decay": 0.1, "dtype": torch.float64},
        {"groups": [{"lr": 3e-3, "lbfgs_lr": 0.5}, {"weight_decay": 0.1}]},
    ],
    ids=str,
)
def test_a_checkpoint_goes_on_bit_for_bit(
    options: dict[str, Any], stage: str, tmp_path: Path
) -> None:
    """Through a file and into another model and optimizer, as after a crash."""
    first = new(**options)
    first.step(STAGES[stage])
    file = tmp_path / "saved.pt"
    torch.save({"model": first.flat, "optimizer": first.optimizer.state_dict()}, file)
    # A deterministic closure's last evaluation is not saved, but repeated.
    calls = first.calls
    again = new(**options)
    saved = torch.load(file, weights_only=True)
    again.load(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    assert again.optimizer.phase == first.optimizer.phase
    assert again.optimizer.report().evaluations == calls
    for fit in (first, again):
        fit.optimizer.zero_grad()  # both evaluate the point at hand
    assert_goes_on_alike(again, first)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda fit: pickle.loads(pickle.dumps(fit))])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_copies_go_on_bit_for_bit(
    stage: str, deterministic: bool, copied: Callable[[Fit], Fit]
) -> None:
    first = new(deterministic=deterministic, switch=LossGap(0.0, 0.2) & AfterSteps(SWITCH_AT))
    first.step(STAGES[stage])
    again = copied(first)
    assert again.params[0] is not first.params[0]
    assert again.optimizer.param_groups[0]["params"][0] is again.params[0]
    before = first.flat, snapshot(first.optimizer)
    again.step(4)
    assert_same((first.flat, snapshot(first.optimizer)), before)
    for fit in (first, again):
        fit.optimizer.zero_grad()
    first.step(4)
    assert_goes_on_alike(again, first)


def test_a_copy_keeps_callback_and_criterion() -> None:
    seen: list[int] = []
    first = new(on_switch=lambda optimizer: seen.append(id(optimizer)), switch=LossChange(1.0, 4))
    first.step(3)
    again = copy.deepcopy(first)
    again.step(2)
    assert seen == [id(again.optimizer)]
    assert first.optimizer.phase == "adam"


CRITERIA = {
    "plateau": lambda: LossPlateau(window=20, patience=1),
    "norm": lambda: GradNorm(0.02, window=8),
    "mean norm": lambda: GradNorm(0.04),
    "change": lambda: LossChange(4e-3, window=10),
    "composed": lambda: (LossChange(4e-3, window=10) & AfterSteps(30)) | LossGap(0.0, 0.02, 5),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_the_criterions_observations_are_saved(name: str) -> None:
    plain = new(switch=CRITERIA[name]())
    while plain.optimizer.phase == "adam":
        plain.step()
    expected = plain.optimizer.report()
    assert expected.switch_step > 12
    # A reload every seven steps changes nothing.
    fit = new(switch=CRITERIA[name]())
    while fit.optimizer.phase == "adam":
        fit.step()
        if fit.calls % 7 == 0:
            saved = copy.deepcopy(fit.optimizer.state_dict())
            again = new(switch=CRITERIA[name]())
            again.load(fit.flat)
            again.optimizer.load_state_dict(saved)
            again.calls = fit.calls
            fit = again
    assert fit.optimizer.report().switch_step == expected.switch_step
    assert fit.optimizer.report().switch_reason == expected.switch_reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("there", ["adam", "wrapped"])
@pytest.mark.parametrize("here", ["adam", "wrapped"])
def test_a_checkpoint_of_either_phase_loads_into_either_phase(
    here: str, there: str, backend: str
) -> None:
    first = new(backend=backend)
    first.step(STAGES[there])
    again = new(backend=backend)
    again.step(STAGES[here])
    again.load(first.flat)
    again.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert again.optimizer.phase == first.optimizer.phase
    for fit in (first, again):
        fit.optimizer.zero_grad()  # both evaluate the point at hand
    assert_goes_on_alike(again, first)


def test_a_checkpoint_after_the_way_back() -> None:
    """With L-BFGS's counts left, but neither moments nor history."""
    for steps in (0, 2):
        first, again = (new(line_search="strong_wolfe") for _ in range(2))
        first.step(9)
        first.optimizer.switch_back()
        first.step(steps)
        again.load(first.flat)
        again.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
        assert again.optimizer.phase == "adam"
        assert again.optimizer.report().lbfgs_iterations == 3
        assert_goes_on_alike(again, first)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, Adam])
@pytest.mark.parametrize("stage", ["new", "adam", "wrapped"])
def test_adams_checkpoints_are_welcome(kind: type[torch.optim.Optimizer], stage: str) -> None:
    """Moments, steps and options are taken over; phase and criterion begin anew."""
    theirs = Fit(kind, lr=3e-3, betas=(0.8, 0.95))
    theirs.step(5)
    fuse = new(switch=LossChange(0.0, window=3) | AfterSteps(4))
    fuse.step(STAGES[stage])
    fuse.load(theirs.flat)
    fuse.optimizer.load_state_dict(copy.deepcopy(theirs.optimizer.state_dict()))
    assert fuse.optimizer.phase == "adam"
    assert fuse.optimizer.param_groups[0]["lr"] == 3e-3
    for _ in range(3):
        fuse.step()
        theirs.step()
        torch.testing.assert_close(fuse.flat, theirs.flat, rtol=1e-5, atol=1e-7)
    assert fuse.optimizer.phase == "adam"
    fuse.step()
    assert fuse.optimizer.report().switch_step == 4
    assert fuse.optimizer.phase == "lbfgs"


def test_with_adams_checkpoint_the_criterion_begins_anew() -> None:
    theirs, fuse = Fit(torch.optim.Adam), new(switch=LossChange(100.0, window=5))
    theirs.step(2)
    fuse.step(4)
    fuse.optimizer.load_state_dict(copy.deepcopy(theirs.optimizer.state_dict()))
    fuse.step(5)
    assert fuse.optimizer.phase == "adam"
    fuse.step()
    assert fuse.optimizer.phase == "lbfgs"


def test_adam_takes_fuse_pvs_checkpoint_of_the_first_phase() -> None:
    fuse, adam = new(), Fit(torch.optim.Adam)
    fuse.step(4)
    adam.load(fuse.flat)
    adam.optimizer.load_state_dict(copy.deepcopy(fuse.optimizer.state_dict()))
    for _ in range(2):
        fuse.step()
        adam.step()
    torch.testing.assert_close(fuse.flat, adam.flat, rtol=1e-5, atol=1e-7)


def other_parameters() -> dict[str, Any]:
    x = torch.ones(3, requires_grad=True)
    optimizer = FusePV([x, *(torch.ones(2) for _ in range(3))])
    x.grad = torch.ones(3)
    optimizer.step(loss=1.0)
    return optimizer.state_dict()


def of(kind: type[torch.optim.Optimizer], steps: int = 4, **options: Any) -> dict[str, Any]:
    fit = Fit(kind, **options)
    fit.step(steps)
    return fit.optimizer.state_dict()


def changed(steps: int, change: Callable[[dict[str, Any]], Any]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        fit = new(switch=LossGap(0.0, 1e-9, 3) | AfterSteps(SWITCH_AT))
        fit.step(steps)
        saved = copy.deepcopy(fit.optimizer.state_dict())
        saved["state"] = copy.deepcopy(saved_state(fit.optimizer))
        change(saved)
        return saved

    return make


FOREIGN = {
    "SGD": (lambda: of(torch.optim.SGD, lr=0.1, momentum=0.9), "has no 'betas'"),
    "LBFGS": (lambda: of(LBFGS, max_iter=1), "has no 'betas'"),
    "torch's LBFGS": (lambda: of(torch.optim.LBFGS, max_iter=1), "has no 'betas'"),
    "Adamax": (lambda: of(torch.optim.Adamax), "is not Adam's: the state of params"),
    "other shapes": (other_parameters, r"exp_avg of params\[0\] has shape \(3,\)"),
    "other criterion": (lambda: of(FusePV, switch=AfterSteps(9)), "state of Any: kind is"),
    "other history_size": (
        changed(9, lambda s: s["param_groups"][0].update(history_size=7)),
        r"history has shape \(2, 4, 41\), expected \(2, 8, 41\)",
    ),
    "no history": (changed(9, lambda s: s["state"][0].pop("history")), "has no tensor 'history'"),
    "no scalars": (changed(9, lambda s: s["state"][0].pop("scalars")), "has no tensor 'scalars'"),
    "no state": (changed(9, lambda s: s["state"].clear()), "has no tensor 'history'"),
    "no groups": (changed(3, lambda s: s.pop("param_groups")), "has no 'param_groups'"),
    "unknown phase": (
        changed(3, lambda s: s["param_groups"][0].update(phase="sgd")),
        "phase must be 'adam' or 'lbfgs', got 'sgd'",
    ),
    "wrong phase": (
        changed(3, lambda s: s["param_groups"][0].update(phase="lbfgs")),
        "has no tensor 'history'",
    ),
    "bad option": (
        changed(3, lambda s: s["param_groups"][0].update(max_iter=0)),
        "max_iter must be at least 1, got 0",
    ),
    "bad criterion": (
        changed(3, lambda s: s["state"][0]["fuse_pv"]["criterion"].update(members=[])),
        "state of Any: 0 members, this one has 2",
    ),
    "bad log": (
        changed(3, lambda s: s["state"][0]["fuse_pv"].pop("switches")),
        "'fuse_pv' must hold",
    ),
    "fewer parameters": (
        changed(3, lambda s: s["param_groups"][0].update(params=[0, 1])),
        r"parameter groups of \[2\] tensors, the optimizer of \[4\]",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("stage", ["new", "adam", "wrapped"])
def test_a_foreign_state_changes_nothing(stage: str, name: str) -> None:
    """Not even what the criterion has seen."""
    make, message = FOREIGN[name]
    options = {"history_size": 3, "lr": 1e-2}
    fit, spared = (
        Fit(switch=LossGap(0.0, 1e-9, 3) | AfterSteps(SWITCH_AT), **options) for _ in range(2)
    )
    fit.step(STAGES[stage])
    spared.step(STAGES[stage])
    foreign = make()
    before = copy.deepcopy(foreign)
    with pytest.raises(ValueError, match=message):
        fit.optimizer.load_state_dict(foreign)
    assert_same(foreign, before)
    assert_same(snapshot(fit.optimizer), snapshot(spared.optimizer))
    assert_goes_on_alike(fit, spared)


def test_loading_does_not_tie_the_optimizer_to_the_dictionary() -> None:
    first = new()
    first.step(9)
    saved = copy.deepcopy(first.optimizer.state_dict())
    kept = copy.deepcopy(saved)
    again = new()
    again.load(first.flat)
    again.optimizer.load_state_dict(saved)
    again.step(5)
    assert_same(saved, kept)


def test_hooks_of_the_user_see_and_change_what_is_loaded() -> None:
    first, again = new(), new()
    first.step(3)

    def faster(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 0.5} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    again.optimizer.register_load_state_dict_pre_hook(faster)
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    assert again.optimizer.param_groups[0]["lr"] == 0.5
    assert again.optimizer.report().adam_steps == 3


# --- groups that come later ----------------------------------------------------------------------


class Late:
    """A fit with a tensor that joins later, and pulls towards 3."""

    def __init__(self, **options: Any) -> None:
        self.fit = new(**options)
        self.extra = torch.zeros(2, requires_grad=True)

    def closure(self) -> Tensor:
        self.extra.grad = None
        loss = self.fit.closure()
        extra = (self.extra - 3.0).square().sum()
        extra.backward()
        return loss + extra.detach()

    def step(self, count: int) -> None:
        for _ in range(count):
            self.fit.optimizer.step(self.closure)


def test_a_group_may_join_in_the_adam_phase() -> None:
    late = Late(switch=30)
    late.step(5)
    moments = late.fit.optimizer.state[late.fit.params[0]]["exp_avg"].clone()
    late.fit.optimizer.add_param_group({"params": [late.extra], "lr": 0.1})
    optimizer = late.fit.optimizer
    assert torch.equal(optimizer.state[late.fit.params[0]]["exp_avg"], moments)
    late.step(1)
    assert int(optimizer.state[late.fit.params[0]]["step"]) == 6
    assert int(optimizer.state[late.extra]["step"]) == 1
    torch.testing.assert_close(late.extra.detach(), torch.full((2,), 0.1))
    late.step(24)
    assert optimizer.report().switch_step == 30
    late.step(30)
    torch.testing.assert_close(late.extra.detach(), torch.full((2,), 3.0), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_group_may_join_in_the_lbfgs_phase(deterministic: bool) -> None:
    search = {} if deterministic else {"line_search": "approximate_wolfe"}
    late = Late(deterministic=deterministic, **search)
    late.step(12)
    optimizer = late.fit.optimizer
    before = optimizer.report()
    accepted = before.pairs_accepted
    optimizer.add_param_group({"params": [late.extra]})
    assert optimizer.phase == "lbfgs"
    report = optimizer.report()
    assert (report.pairs_held, report.lbfgs_iterations) == (0, before.lbfgs_iterations)
    assert report.pairs_accepted == accepted >= before.pairs_held > 0
    assert report.pairs_skipped == before.pairs_skipped
    assert report.switch_step == SWITCH_AT
    late.step(2)
    assert optimizer.report().pairs_accepted + optimizer.report().pairs_skipped > accepted
    late.step(28)
    torch.testing.assert_close(late.extra.detach(), torch.full((2,), 3.0), rtol=1e-2, atol=0.0)
    saved = copy.deepcopy(optimizer.state_dict())
    assert {group["phase"] for group in saved["param_groups"]} == {"lbfgs"}
    # And what is saved then loads.
    again = Late()
    again.fit.optimizer.add_param_group({"params": [again.extra]})
    again.fit.optimizer.load_state_dict(saved)
    assert again.fit.optimizer.report().pairs_held == 3
    assert again.fit.optimizer.report().pairs_accepted == optimizer.report().pairs_accepted


@pytest.mark.parametrize("steps", [3, 9])
@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"history_size": 5}, "history_size must be the same"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"params": [torch.ones(2, device="meta")]}, "is on meta"),
    ],
    ids=str,
)
def test_a_group_that_does_not_fit_changes_nothing(
    group: dict[str, Any], message: str, steps: int
) -> None:
    fit, spared = new(), new()
    fit.step(steps)
    spared.step(steps)
    with pytest.raises(ValueError, match=message):
        fit.optimizer.add_param_group({"params": [torch.ones(2)], **group})
    assert_goes_on_alike(fit, spared)


def test_parameters_may_change_their_dtype_before_the_first_step() -> None:
    fit = new(switch=3)
    for param in fit.params:
        param.data = param.data.double()
    fit.inputs, fit.targets = fit.inputs.double(), fit.targets.double()
    fit.step(3)
    assert fit.optimizer.state[fit.params[0]]["exp_avg_sq"].dtype == torch.float64
    fit.step(3)


@pytest.mark.parametrize("steps", [2, 8])
def test_parameters_may_not_change_later(steps: int) -> None:
    fit = new()
    fit.step(steps)
    fit.params[1].data = torch.zeros(9)
    fit.params[1].grad = None
    with pytest.raises(ValueError, match=r"params\[1\] is now .*\(9,\).* but was .*\(8,\)"):
        fit.optimizer.step(lambda: fit.params[0].sum())


def test_near_solution_and_never_are_saved_too() -> None:
    for make in (Never, AtOnce, lambda: NearSolution([p.detach() for p in Fit().params], 1e-3)):
        first, again = new(switch=make()), new(switch=make())
        first.step(3)
        again.load(first.flat)
        again.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
        assert_goes_on_alike(again, first)


@pytest.mark.parametrize("kind", [LBFGS, FusePV, Fuse])
def test_a_history_knows_its_memory_format(kind: Any) -> None:
    """Rows follow the parameters' memory order; another order would permute the pairs."""

    def make(memory_format: torch.memory_format) -> tuple[torch.nn.Parameter, Any]:
        x = torch.nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=memory_format))
        options = {"switch": 0} if kind is FusePV else {}
        return x, kind([x], history_size=2, **options)

    x, opt = make(torch.channels_last)
    opt.step(lambda: setattr(x, "grad", torch.ones_like(x)) or 1.0)
    same, other = make(torch.channels_last)[1], make(torch.contiguous_format)[1]
    same.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="its parameters had strides"):
        other.load_state_dict(opt.state_dict())
