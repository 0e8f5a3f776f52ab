"""Judging optimizers that hold other parameters for it than for steps, and Adam as one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

# As FusePV's: from which step on, at which steps weights count, and how fast older ones fade.
FIRST_STEP, EVERY, SHARE = 20, 5, 16.0


@contextmanager
def judged(optimizer: Any) -> Iterator[None]:
    """Within it the parameters are those that are to be judged."""
    averaging = hasattr(optimizer, "eval")
    if averaging:
        optimizer.eval()
    try:
        yield
    finally:
        if averaging:
            optimizer.train()


class Averaged:
    """An optimizer whose weights are judged by their mean, made as FusePV makes it.

    The control for FusePV's steps: what its own mean is worth any optimizer can have.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        self._params = list(model.parameters())
        # avg_fn is not asked for the first one, which is taken as it is.
        self._mean = AveragedModel(
            model, avg_fn=lambda mean, new, n: mean + (new - mean) * (SHARE / (SHARE + n))
        )
        self._model, self._trained = model, [torch.empty(0)]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self.optimizer.param_groups

    def step(self, closure: Callable[[], Tensor]) -> Any:
        """A step of the optimizer."""
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps >= FIRST_STEP and self.steps % EVERY == 0:
            self._mean.update_parameters(self._model)
        return loss

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the mean in place, if there is one."""
        self._trained = [p.clone() for p in self._params]
        if self._mean.n_averaged:
            for p, mean in zip(self._params, self._mean.parameters(), strict=True):
                p.copy_(mean)

    @torch.no_grad()
    def train(self) -> None:
        """Takes it back."""
        for p, own in zip(self._params, self._trained, strict=True):
            p.copy_(own)
