"""Training steps under torch.compile: compiled forward and loss, the optimizer outside or inside.

The backend is "aot_eager": what is traced and where the graph breaks is the same as with
"inductor", and the numbers are those of eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fuse_ext import LBFGS, Adam, Fuse, FusePV

KINDS: dict[str, Callable[[Any], Any]] = {
    "Adam": lambda p: Adam(p, lr=0.01),
    "Adam, capturable": lambda p: Adam(p, lr=torch.tensor(0.01), capturable=True),
    "LBFGS": lambda p: LBFGS(p, lr=0.5, max_iter=1),
    "LBFGS, capturable": lambda p: LBFGS(p, lr=0.5, max_iter=1, capturable=True),
    "FusePV": lambda p: FusePV(p, lr=0.01, switch=4, line_search=None),
    "FusePV, capturable": lambda p: FusePV(p, lr=0.01, switch=4, line_search=None, capturable=True),
    "Fuse": lambda p: Fuse(p, lr=0.01, line_search=None),
}
SEARCHED: dict[str, Callable[[Any], Any]] = {
    "LBFGS": lambda p: LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
    "FusePV": lambda p: FusePV(p, lr=0.01, switch=4),
    "Fuse": lambda p: Fuse(p, lr=0.01),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Training:
    """A small network on fixed data."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.x, self.y = torch.randn(32, 4), torch.randn(32, 1)
        self.optimizer = make(self.net.parameters())
        self.backend = CompileCounterWithBackend("aot_eager")

    def loss(self) -> Tensor:
        return nn.functional.mse_loss(self.net(self.x), self.y)

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        self.optimizer.zero_grad()
        value = loss()
        value.backward()
        self.optimizer.step()
        return value

    def place(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])


def train(make: Callable[[Any], Any], how: str, steps: int = 9) -> Tensor:
    """The parameters after the steps."""
    run = Training(make)
    loss: Callable[[], Tensor] = run.loss
    step: Callable[[], Tensor]
    if how in ("outside", "closure outside"):
        loss = torch.compile(loss, backend=run.backend)
    if how.startswith("closure"):

        def closure() -> Tensor:
            run.optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        step = lambda: run.optimizer.step(closure)  # noqa: E731
    else:
        step = lambda: run.step(loss)  # noqa: E731
    if how == "inside":
        step = torch.compile(step, backend=run.backend)
    for _ in range(steps):
        step()
    assert (run.backend.frame_count > 0) == (how in ("outside", "closure outside", "inside"))
    # Forward and loss are compiled once, and not again as steps are counted or the phase changes.
    assert run.backend.frame_count <= 2
    return run.place()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_are_those_of_eager(kind: str) -> None:
    eager = train(KINDS[kind], "eager")
    assert torch.equal(eager, train(KINDS[kind], "outside"))
    assert torch.equal(eager, train(KINDS[kind], "inside"))


@pytest.mark.parametrize("kind", SEARCHED)
def test_closures_that_call_compiled_code(kind: str) -> None:
    eager = train(SEARCHED[kind], "closure")
    assert torch.equal(eager, train(SEARCHED[kind], "closure outside"))
