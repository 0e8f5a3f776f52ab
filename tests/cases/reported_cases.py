"""A network whose layers can be frozen, trained as a configuration wants; and bits to compare."""

from __future__ import annotations

import io
from typing import Any

import torch
from configurations import Configuration
from torch import Tensor

# The last layer is a branch past the others, which a batch may or may not use.
LAYERS, BRANCH = 3, 2
BATCHES = 4


def bits(tensors: Any) -> list[Tensor]:
    """A copy of each tensor's memory: -0.0 is not 0.0 here."""
    tensors = [tensors] if isinstance(tensors, Tensor) else tensors
    return [t.detach().contiguous().clone().flatten().view(torch.uint8) for t in tensors]


def changed(before: list[Tensor], tensors: Any) -> list[int]:
    """Which tensors no longer have these bits."""
    now = bits(tensors)
    assert len(now) == len(before)
    return [i for i, (a, b) in enumerate(zip(before, now, strict=True)) if not torch.equal(a, b)]


class Net:
    """Two layers with tanh, 4-5-1, and a linear branch from input to output; 48 examples.

    ``aligned``: 16-8-16 without biases, so that every layer has 128 elements. Leaving one out
    then moves the others by whole blocks and SIMD lanes, and no sum is rounded in another order.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, aligned: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.inputs = normal(48, 16 if aligned else 4)
        self.targets = (self.inputs[:, :1] * self.inputs[:, 1:2]).sin() + 0.3 * self.inputs[:, 2:3]
        if aligned:
            self.layers = [[0.6 * normal(a, 128 // a)] for a in (16, 8, 16)]
        else:
            shapes = ((4, 5), (5, 1), (4, 1))
            self.layers = [[0.6 * normal(a, b), 0.1 * normal(b)] for a, b in shapes]
        for layer in self.layers:
            layer[0].view(-1)[1] = -0.0  # which x + 0 would turn into 0.0
            for p in layer:
                p.requires_grad_()
        self.uses_branch = True

    @property
    def params(self) -> list[Tensor]:
        return [p for layer in self.layers for p in layer]

    def others(self, layer: int) -> list[Tensor]:
        """All parameters but those of a layer."""
        return [p for i, ps in enumerate(self.layers) if i != layer for p in ps]

    def freeze(self, layer: int, frozen: bool = True) -> None:
        for p in self.layers[layer]:
            p.requires_grad_(not frozen)
            if frozen:
                p.grad = None

    def loss(self, rows: slice = slice(None)) -> Tensor:
        first, second, branch = self.layers
        x = self.inputs[rows]
        out = _linear(_linear(x, *first).tanh(), *second).mean(1, keepdim=True)
        if self.uses_branch:
            out = out + _linear(x, *branch).mean(1, keepdim=True)
        return (out - self.targets[rows]).square().mean()

    def set(self, values: list[Tensor]) -> None:
        """Gives the parameters these values."""
        with torch.no_grad():
            for p, value in zip(self.params, values, strict=True):
                p.copy_(value)

    @property
    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


class Training:
    """Steps of one configuration on a net, one batch after the other where it has batches.

    ``step_number`` says which batch is next; with a "batch_id" each is used twice in a row.
    """

    def __init__(
        self, config: Configuration, net: Net, params: Any = None, step_number: int = 0, **over: Any
    ) -> None:
        self.config, self.net = config, net
        self.optimizer = config.make(net.params if params is None else params, **over)
        self.step_number, self.calls = step_number, 0
        self.no_gradients = False

    @property
    def batch(self) -> int:
        turn = self.step_number // 2 if self.config.driver == "batch_id" else self.step_number
        return 0 if self.config.full_batch else turn % BATCHES

    def _evaluate(self, rows: slice) -> Tensor:
        for p in self.net.params:  # of all, as model.zero_grad() does
            p.grad = None
        loss = self.net.loss(rows)
        if loss.requires_grad and not self.no_gradients:
            loss.backward()
        return loss

    def closure(self) -> Tensor:
        self.calls += 1
        size = len(self.net.inputs) // (1 if self.config.full_batch else BATCHES)
        return self._evaluate(slice(self.batch * size, (self.batch + 1) * size))

    def pair_closure(self) -> Tensor:
        """The second half of the batch."""
        size = len(self.net.inputs) // BATCHES
        return self._evaluate(slice(self.batch * size + size // 2, (self.batch + 1) * size))

    def step(self, count: int = 1) -> list[float]:
        """The losses where the steps began."""
        losses = []
        for _ in range(count):
            extra: dict[str, Any] = {}
            if self.config.driver == "batch_id":
                extra["batch_id"] = self.batch
            elif self.config.driver == "pair_closure":
                extra["pair_closure"] = self.pair_closure
            loss = self.optimizer.step(self.closure, **extra)
            self.step_number += 1
            losses.append(float(loss.detach()))
        return losses

    def objective(self, weight_decay: float = 0.0) -> float:
        """What a line search minimises on the full batch, in the parameters that move."""
        with torch.no_grad():
            value = float(self.net.loss().double())
        moving = [p.detach().double().square().sum() for p in self.net.params if p.requires_grad]
        return value + weight_decay / 2 * float(sum(moving))

    @property
    def phase(self) -> str:
        return getattr(self.optimizer, "phase", self.config.phase)


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state_dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def groups_without_lr(net: Net, layer: int, config: Configuration) -> list[dict[str, Any]]:
    """One group for each layer, of which this one has lr = 0."""
    groups: list[dict[str, Any]] = [{"params": layer_params} for layer_params in net.layers]
    groups[layer]["lr"] = 0.0
    if config.phase == "fuse":  # whose L-BFGS half has its own
        groups[layer]["lbfgs_lr"] = 0.0
    return groups
