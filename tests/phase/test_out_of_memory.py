"""Where there is no memory for the phase after Adam, Adam goes on as if it had not been tried."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fuse_pv_cases import Fit, assert_same, saved_state, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

from fuse_ext.phase import succession

SWITCH = 6
ERRORS: dict[str, Callable[[], BaseException]] = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    "python": lambda: MemoryError("no more"),
}
KINDS: dict[str, dict[str, Any]] = {
    "living": {"metric": "kronecker", "deterministic": False},
    "pairs": {"deterministic": True, "curvature": "pairs"},
    "int8": {"deterministic": True, "history_dtype": torch.int8},
    "dense": {"deterministic": True},
    "capturable": {"capturable": True, "line_search": None, "lbfgs_lr": 0.1},
}
MAKES_MEMORY = {"aten.empty.memory_format", "aten.zeros.default", "aten.new_zeros.default"}


class Full(TorchDispatchMode):
    """Memory ends at the ``fails``-th tensor of more than ``small`` elements that is made."""

    def __init__(self, error: BaseException, fails: int, small: int = 8) -> None:
        super().__init__()
        self.error, self.left, self.small = error, fails, small

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if str(func) in MAKES_MEMORY and made.numel() > self.small:
            self.left -= 1
            if self.left <= 0:
                raise self.error
        return made


@contextmanager
def full_at_switches(fit: Fit, error: BaseException, fails: int) -> Iterator[Full]:
    """Memory is short while the optimizer changes phases, and at no other time."""
    optimizer, switch = fit.optimizer, fit.optimizer._begin_lbfgs
    mode = Full(error, fails)

    def begin(reason: str) -> Any:
        with mode:
            return switch(reason)

    optimizer._begin_lbfgs = begin
    try:
        yield mode
    finally:
        del optimizer._begin_lbfgs


def allocations(options: dict[str, Any]) -> int:
    """Tensors that a switch makes."""
    fit = Fit(switch=SWITCH, **options)
    with full_at_switches(fit, MemoryError(), 10**6) as mode:
        fit.step(SWITCH)
    assert fit.optimizer.phase == "lbfgs"
    return 10**6 - mode.left


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("kind", KINDS)
def test_adam_goes_on_and_the_report_says_so(kind: str, error: str) -> None:
    options = KINDS[kind]
    count = allocations(options)
    assert count >= 2
    for fails in range(1, count + 1):  # whichever of them it is
        fit = Fit(switch=SWITCH, **options)
        never = Fit(switch=10**6, **options)
        raised = ERRORS[error]()
        with full_at_switches(fit, raised, fails), pytest.warns(RuntimeWarning, match="no memory"):
            fit.step(SWITCH)
        never.step(SWITCH)
        assert fit.optimizer.phase == "adam"
        report = fit.optimizer.report()
        assert report.waiting == f"no memory for the next phase: {raised}"
        assert report.switch_step is None
        ours, theirs = saved_state(fit.optimizer), saved_state(never.optimizer)
        assert ours[0].pop("fuse_pv")["adam_steps"] == theirs[0].pop("fuse_pv")["adam_steps"]
        assert_same(ours, theirs)
        assert fit.step(20) == never.step(20)  # without another attempt
        assert torch.equal(fit.flat, never.flat)


def test_it_tries_again_after_some_time_and_by_hand() -> None:
    fit = Fit(switch=SWITCH, deterministic=True)
    with full_at_switches(fit, MemoryError("no more"), 1):
        with pytest.warns(RuntimeWarning, match="no memory"):
            fit.step(SWITCH)
        with pytest.warns(RuntimeWarning, match="no memory"):
            fit.step(100)
    resumed = Fit(switch=SWITCH, deterministic=True)
    resumed.load(fit.flat)
    resumed.optimizer.load_state_dict(copy.deepcopy(fit.optimizer.state_dict()))
    assert "no more" in resumed.optimizer.report().waiting
    resumed.step(99)
    assert resumed.optimizer.phase == "adam"
    resumed.step(1)
    assert resumed.optimizer.phase == "lbfgs"
    assert not resumed.optimizer.report().waiting
    fit.optimizer.switch_now()
    assert fit.optimizer.phase == "lbfgs"


def test_other_errors_and_a_switch_at_once_are_raised() -> None:
    fit = Fit(switch=SWITCH, deterministic=True)
    fit.step(SWITCH - 1)
    before = snapshot(fit.optimizer)
    error = pytest.raises(RuntimeError, match="something else")
    with full_at_switches(fit, RuntimeError("something else"), 1), error:
        fit.optimizer.switch_now()
    assert_same(snapshot(fit.optimizer), before)
    fit = Fit(switch=0, deterministic=True)
    error = pytest.raises(torch.OutOfMemoryError, match="nothing left")
    with full_at_switches(fit, torch.OutOfMemoryError("nothing left"), 1), error:
        fit.step(1)


# --- a closure that is found to be one function after the switch ----------------------------

GROWING: dict[str, tuple[dict[str, Any], str, str]] = {
    "from batches to a matrix": ({}, "kronecker", "dense"),
    "from batches to pairs": ({"curvature": "pairs"}, "kronecker", "pairs"),
    "from pairs to a matrix": ({"line_search": "strong_wolfe"}, "pairs", "dense"),
    "to more pairs": ({"line_search": "strong_wolfe", "curvature": "pairs"}, "pairs", "pairs"),
}


@contextmanager
def full_at_growth(fit: Fit, error: BaseException, fails: int) -> Iterator[Full]:
    """Memory is short while the optimizer takes its closure for one function."""
    optimizer, grow = fit.optimizer, fit.optimizer._grow
    mode = Full(error, fails)

    def short(follows: Any) -> Any:
        mode.left = fails
        with mode:
            return grow(follows)

    optimizer._grow = short
    try:
        yield mode
    finally:
        del optimizer._grow


def kept(fit: Fit) -> tuple[str, int]:
    """What is known of H, and the pairs that there are to be."""
    phase = fit.optimizer._phase
    return phase.history.kind, fit.optimizer.param_groups[0]["history_size"]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("kind", GROWING)
def test_the_phase_at_hand_goes_on_and_tries_again(
    kind: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, before, after = GROWING[kind]
    monkeypatch.setattr(succession, "STAY", 4)
    fit = Fit(switch=SWITCH, **options)
    with full_at_growth(fit, MemoryError(), 10**6) as mode:
        fit.step(SWITCH + 5)
    count, larger = 10**6 - mode.left, kept(fit)
    assert count >= 2 and larger[0] == after and larger[1] > 10
    for fails in range(1, count + 1):  # whichever of them it is
        fit = Fit(switch=SWITCH, **options)
        with full_at_growth(fit, ERRORS[error](), fails), pytest.warns(RuntimeWarning) as said:
            losses = fit.step(SWITCH + 12)
        assert sum("no memory for the phase of one function" in str(w.message) for w in said) == 1
        assert kept(fit) == (before, 10) and fit.optimizer.phase == "lbfgs"
        assert losses[-1] < losses[SWITCH + 4]
        resumed = Fit(switch=SWITCH, **options)
        resumed.load(fit.flat)
        resumed.optimizer.load_state_dict(copy.deepcopy(fit.optimizer.state_dict()))
        for each in (fit, resumed):
            each.step(10)  # now there is memory
            assert kept(each) == larger


def test_state_is_as_it_was_where_growing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, before, _ in GROWING.values():
        fit = Fit(switch=SWITCH, **options)
        held: list[Any] = []

        def note(follows: Any, optimizer: Any = fit.optimizer, held: list[Any] = held) -> Any:
            held.append((snapshot(optimizer), [*map(id, optimizer.state.values())]))
            with Full(MemoryError("no more"), 2):
                found = type(optimizer)._grow(optimizer, follows)
            held.append((snapshot(optimizer), [*map(id, optimizer.state.values())]))
            return found

        monkeypatch.setattr(fit.optimizer, "_grow", note, raising=False)
        with pytest.warns(RuntimeWarning, match="no memory for the phase of one function"):
            fit.step(SWITCH + 5)
        (then, entries), (now, same) = held[:2]
        assert now["state"][0]["fuse_pv"].pop("grows_at") > 0
        assert_same(now, then)
        assert entries == same, before
