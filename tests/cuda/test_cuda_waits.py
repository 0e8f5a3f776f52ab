"""That torch's debug mode for waits is on for as long as it is wanted, whatever happens within."""

from __future__ import annotations

import warnings

import pytest
import torch

gpu_waits = pytest.importorskip("benchmarks.harness.gpu_waits")


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that are set, by a torch that says each time what it otherwise says once."""
    found: list[str] = []

    def set_mode(mode: str) -> None:
        found.append(mode)
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all "
            "synchronizing operations",
            UserWarning,
            stacklevel=2,
        )

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return found


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["forbidden", "noted"])
def test_the_mode_ends_and_what_torch_says_of_it_is_no_error(name: str, modes: list[str]) -> None:
    within = {"forbidden": "error", "noted": "warn"}[name]
    with getattr(gpu_waits, name)():
        assert modes == [within]
    with pytest.raises(ZeroDivisionError), getattr(gpu_waits, name)():
        raise ZeroDivisionError
    assert modes == [within, "default"] * 2


@pytest.mark.parametrize("name", ["forbidden", "noted"])
def test_a_mode_that_cannot_be_set_does_not_stay(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []

    def refuse(mode: str) -> None:
        modes.append(mode)
        if mode != "default":
            raise RuntimeError("half set")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", refuse)
    with pytest.raises(RuntimeError, match="half set"), getattr(gpu_waits, name)():
        pass
    assert modes[-1] == "default"


def test_waits_are_counted_and_nothing_else(modes: list[str]) -> None:
    with gpu_waits.noted() as waits:
        for text in ("called a synchronizing CUDA operation", "something else") * 2:
            warnings.warn(text, UserWarning, stacklevel=1)
    assert waits == ["called a synchronizing CUDA operation"] * 2
