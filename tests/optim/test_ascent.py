"""maximize: ascent in one group, descent in another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract_cases import CPU, Problem
from fuse_pv_cases import BACKENDS, assert_same
from torch import Tensor

from fuse_ext import LBFGS, AtOnce, Fuse, FusePV, Never


class Saddle:
    """f(x, y) = a(x) - b(y), of which every second call is another sample where ``noise`` is."""

    def __init__(self, signs: tuple[float, float], noise: float) -> None:
        self.params = [torch.full((5,), 0.7, device=CPU), torch.full((4,), -0.4, device=CPU)]
        self.signs, self.noise, self.calls = signs, noise, 0

    def closure(self) -> Tensor:
        self.calls += 1
        for param, sign in zip(self.params, self.signs, strict=True):
            scale = torch.arange(1, param.numel() + 1, dtype=torch.float32, device=CPU)
            target = 1.0 + self.noise * (self.calls % 3 - 1)
            param.grad = sign * 2.0 * scale * (param - target)
        return torch.ones((), device=CPU)

    @property
    def flat(self) -> Tensor:
        return torch.cat(self.params)


MIXED: dict[str, dict[str, Any]] = {
    "never": {"switch": Never()},
    "never, with a search": {"switch": Never(), "line_search": "armijo"},
    "never, capturable": {"switch": Never(), "line_search": None, "capturable": True},
    "default": {"switch": 5},
    "not one function": {"switch": 5, "deterministic": False},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
def test_every_group_has_its_own_sign(name: str, decay: dict[str, Any], backend: str) -> None:
    """As descent in all groups, with the gradients of those that ascend turned round."""
    runs = []
    for signs, maximize in (((1.0, -1.0), (False, True)), ((1.0, 1.0), (False, False))):
        problem = Saddle(signs, noise=0.1)
        groups = [
            {"params": p, "maximize": m, **decay}
            for p, m in zip(problem.params, maximize, strict=True)
        ]
        options = dict(MIXED[name])
        if not any(maximize):  # a loss that never changes would be one function
            options.setdefault("deterministic", False)
        optimizer = FusePV(groups, 0.05, backend=backend, **options)

        def closure(problem: Saddle = problem) -> Tensor | None:
            """By losses that are known lengths are judged, but what climbs and falls has none."""
            loss = problem.closure()
            return loss if "never" in name else None

        for _ in range(60):
            optimizer.step(closure)
        runs.append(problem.flat)
        assert optimizer.phase == ("adam" if "never" in name else "lbfgs")
        copied = copy.deepcopy(optimizer)
        again = FusePV(groups, 0.05, backend=backend, **options)
        again.load_state_dict(copied.state_dict())
        for _ in range(3):
            again.step(closure)
        runs.append(problem.flat)
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3])
    assert (runs[0] - 1.0).abs().max() < (0.5 if not decay else 1.0)  # both have come closer


def test_adam_and_fuse_pv_agree_on_signs() -> None:
    ours, theirs = Saddle((1.0, -1.0), 0.1), Saddle((1.0, -1.0), 0.1)
    for problem, kind in (
        (ours, lambda groups: FusePV(groups, 0.05, Never())),
        (theirs, lambda groups: torch.optim.Adam(groups, 0.05)),
    ):
        optimizer = kind([{"params": p, "maximize": p.numel() == 4} for p in problem.params])
        for _ in range(20):
            optimizer.step(problem.closure)
    torch.testing.assert_close(ours.flat, theirs.flat)


@pytest.mark.parametrize(
    "options",
    [
        {"line_search": "armijo"},
        {"line_search": None},
        {"line_search": None, "capturable": True, "switch": 5},
        {"deterministic": True},
        {"max_iter": 2},
        {"switch": AtOnce()},
        {"pairs": "same_batch"},
    ],
    ids=str,
)
def test_l_bfgs_needs_one_sign(options: dict[str, Any]) -> None:
    problem = Saddle((1.0, -1.0), 0.0)
    up, down = (
        {"params": p, "maximize": m} for p, m in zip(problem.params, (True, False), strict=True)
    )
    wanted = "maximize must be the same .* no common objective"
    with pytest.raises(ValueError, match=wanted):
        FusePV([up, down], **options)
    optimizer = FusePV([up], **{"maximize": True, **options})
    with pytest.raises(ValueError, match=wanted):
        optimizer.add_param_group(down)
    assert len(optimizer.param_groups) == 1
    both = FusePV([up, {**down, "maximize": True}], **options)
    both.step(problem.closure)
    saved = copy.deepcopy(both.state_dict())
    saved["param_groups"][1]["maximize"] = False
    before = copy.deepcopy(both.state_dict())
    with pytest.raises(ValueError, match=wanted):
        both.load_state_dict(saved)
    assert_same(both.state_dict(), before)


@pytest.mark.parametrize("kind", [LBFGS, Fuse])
def test_one_objective_has_one_sign(kind: Any) -> None:
    problem = Saddle((1.0, -1.0), 0.0)
    up, down = (
        {"params": p, "maximize": m} for p, m in zip(problem.params, (True, False), strict=True)
    )
    with pytest.raises(ValueError, match="maximize must be the same in all parameter groups"):
        kind([up, down])


@pytest.mark.parametrize("capturable", [False, True])
def test_signs_that_differ_when_the_switch_comes(capturable: bool) -> None:
    problem = Saddle((1.0, -1.0), 0.0)
    groups = [
        {"params": p, "maximize": m} for p, m in zip(problem.params, (True, False), strict=True)
    ]
    options = {"line_search": None, "capturable": capturable}
    optimizer = FusePV(groups, 0.05, Never(), **options)
    optimizer.step(problem.closure)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="no common objective"):
        optimizer.switch_now()
    assert optimizer.phase == "adam"
    assert_same(optimizer.state_dict(), before)
    # Nor later, when someone has turned a sign round in the midst of it.
    optimizer.param_groups[0]["maximize"] = False
    optimizer.switch_now()
    optimizer.step(problem.closure)
    optimizer.param_groups[1]["maximize"] = True
    at = problem.flat
    with pytest.raises(ValueError, match="no common objective"):
        optimizer.step(problem.closure)
    assert torch.equal(problem.flat, at)


def test_a_history_of_one_objective_does_not_go_with_two_signs() -> None:
    problem = Problem()
    found = FusePV([{"params": p} for p in problem.params], 0.01, 5)
    for _ in range(9):
        found.step(problem.closure)
    saved = copy.deepcopy(found.state_dict())
    assert "root_metric" not in saved["state"][0]  # it has found out
    saved["param_groups"][1]["maximize"] = True
    before = copy.deepcopy(found.state_dict())
    with pytest.raises(ValueError, match="no common objective"):
        found.load_state_dict(saved)
    assert_same(found.state_dict(), before)
