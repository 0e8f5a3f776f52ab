"""Pairs in the host's memory with parameters on a real device. Needs a GPU: `make gpu-check`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_cuda_device import cuda_only
from torch import Tensor, nn

from fuse_ext import LBFGS, Fuse, FusePV

SEARCH = {"line_search_fn": "strong_wolfe", "max_iter": 2, "history_size": 5}
PV = {"lr": 1e-2, "switch": 4, "deterministic": True, "curvature": "pairs", "history_size": 5}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (LBFGS, {"lr": 0.5, "max_iter": 2, "history_size": 5, "weight_decay": 1e-3}),
    (LBFGS, SEARCH),
    (LBFGS, {**SEARCH, "history_dtype": torch.bfloat16}),
    (LBFGS, {**SEARCH, "history_dtype": torch.int8}),
    (FusePV, PV),
    (Fuse, {"lr": 1e-2, "history_dtype": torch.int8}),
]


class Bowl:
    """f(x) = sum D x^2 / 2, whose pairs say all there is to know."""

    def __init__(self, kind: Any, options: dict[str, Any], device: str, **more: Any) -> None:
        torch.manual_seed(0)
        start = [torch.randn(1000), torch.randn(30, 17)]
        self.params = [nn.Parameter(x.to(device)) for x in start]
        self.curvature = [torch.linspace(0.2, 1, x.numel()).view_as(x).to(device) for x in start]
        self.optimizer = kind(self.params, **options, **more)

    def closure(self) -> Tensor:
        loss = torch.zeros((), device=self.params[0].device)
        for param, d in zip(self.params, self.curvature, strict=True):
            param.grad = d * param.detach()
            loss += 0.5 * (param.detach() * param.grad).sum()
        return loss

    def go(self, steps: int) -> Bowl:
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self

    def point(self) -> Tensor:
        return torch.cat([p.detach().view(-1).cpu() for p in self.params])


@cuda_only
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_rows_are_pinned_and_steps_those_of_rows_on_the_device(kind: Any, options: Any) -> None:
    beside = Bowl(kind, options, "cuda").go(7)
    apart = Bowl(kind, options, "cuda", history_device="cpu").go(7)
    entry = apart.optimizer.state[apart.params[0]]
    assert entry["history"].device.type == "cpu" and entry["history"].is_pinned()
    assert beside.optimizer.state[beside.params[0]]["history"].device.type == "cuda"
    # Sums of another order, over few steps.
    torch.testing.assert_close(apart.point(), beside.point(), rtol=2e-2, atol=2e-2)
    assert apart.optimizer.report().pairs_held == beside.optimizer.report().pairs_held > 0


@cuda_only
@pytest.mark.parametrize(("kind", "options"), CASES[1:5])
@pytest.mark.parametrize("to_host", [True, False])
def test_checkpoints_and_copies_go_on(kind: Any, options: Any, to_host: bool) -> None:
    places = ("cpu", None) if to_host else (None, "cpu")
    first = Bowl(kind, options, "cuda", history_device=places[1]).go(6)
    second = Bowl(kind, options, "cuda", history_device=places[0])
    for mine, theirs in zip(second.params, first.params, strict=True):
        mine.detach().copy_(theirs.detach())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    entry = second.optimizer.state[second.params[0]]
    assert entry["history"].device.type == ("cpu" if to_host else "cuda")
    third = copy.deepcopy(second)
    torch.testing.assert_close(second.go(2).point(), first.go(2).point(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(third.go(2).point(), second.point(), rtol=1e-4, atol=1e-4)


@cuda_only
def test_the_device_holds_no_rows() -> None:
    numel = 2_000_000
    param = nn.Parameter(torch.ones(numel, device="cuda"))
    param.grad = torch.ones(numel, device="cuda")
    optimizer = LBFGS([param], max_iter=1, history_size=10, history_device="cpu")
    before = torch.cuda.memory_allocated()
    optimizer.step(None)
    held = torch.cuda.memory_allocated() - before
    report = optimizer.report()
    assert held <= 1.02 * report.workspace_bytes + 2**16
    assert report.workspace_bytes <= 12 * numel + 2**16  # gradient, direction, origin


def test_the_comparisons_themselves() -> None:
    """On the CPU, where there is nothing to compare but that these run and get somewhere."""
    for kind, options in CASES:
        start, run = Bowl(kind, options, "cpu"), Bowl(kind, options, "cpu", history_device="cpu")
        run.go(7)
        assert run.closure() < 0.9 * start.closure()
        assert run.optimizer.report().pairs_held > 0
