"""Tanh networks, and their derivatives by the inputs without nested differentiation.

A residual wants u and some of its first and second derivatives. They are carried forward through
the layers, all in one batch (Taylor mode; Bettencourt, Johnson and Duvenaud 2019). Under
v -> W v + b each derivative is multiplied by W alone, and under a = tanh(v), with s = 1 - a^2,

    a_i = s v_i,    a_ii = s v_ii - 2 a a_i v_i.

Every method gets these derivatives. ``tests/project/test_published_problems.py`` compares them with
nested autograd, which takes about one and a half times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def mlp(widths: Sequence[int], dtype: torch.dtype, glorot: bool) -> nn.Sequential:
    """Layers of these widths with tanh between them, initialised by torch's generator.

    Args:
        widths: Inputs, hidden layers, outputs.
        dtype: Of all parameters. Random numbers are drawn in it.
        glorot: Xavier's normal initialisation with biases of 0; else torch's own.
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layer = nn.Linear(fan_in, fan_out, dtype=dtype)
        if glorot:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Jet(NamedTuple):
    """A function at n points with derivatives along some directions.

    Points come last: W V is then the faster product, twice as fast where layers are narrow.

    Attributes:
        blocks: (width, 1 + k + j, n): the value, the first derivatives along each of k directions,
            and the second derivatives along the first j of them.
        directions: k.
    """

    blocks: Tensor
    directions: int

    @property
    def value(self) -> Tensor:
        """(width, n)."""
        return self.blocks[:, 0]

    @property
    def first(self) -> Tensor:
        """(width, k, n)."""
        return self.blocks[:, 1 : 1 + self.directions]

    @property
    def second(self) -> Tensor:
        """(width, j, n)."""
        return self.blocks[:, 1 + self.directions :]

    @classmethod
    def of_inputs(cls, points: Tensor, directions: Sequence[int], seconds: int) -> Jet:
        """The coordinates themselves.

        Args:
            points: (n, coordinates).
            directions: Coordinates to differentiate by.
            seconds: How many of them twice, from the first on.
        """
        n, width = points.shape
        blocks = torch.zeros(width, 1 + len(directions) + seconds, n, dtype=points.dtype)
        blocks[:, 0] = points.t()
        for i, direction in enumerate(directions):
            blocks[direction, 1 + i] = 1
        return cls(blocks, len(directions))


def jet(model: nn.Sequential, inputs: Jet) -> Jet:
    """The network's output and its derivatives, given those of its inputs.

    Args:
        model: From :func:`mlp`.
        inputs: Without gradients.
    """
    blocks = inputs.blocks
    for layer in model:
        if isinstance(layer, nn.Linear):
            blocks = _Linear.apply(blocks, layer.weight, layer.bias)
        else:
            blocks = _Tanh.apply(blocks, inputs.directions)
    return Jet(blocks, inputs.directions)


class _Linear(torch.autograd.Function):
    """W v + b of the value, W v of the derivatives."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(blocks, weight)
        out = (weight @ blocks.flatten(1)).unflatten(1, blocks.shape[1:])
        out[:, 0] += bias[:, None]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        blocks, weight = ctx.saved_tensors
        flat = grad.flatten(1)
        below = (weight.t() @ flat).view_as(blocks) if ctx.needs_input_grad[0] else None
        return below, flat @ blocks.flatten(1).t(), grad[:, 0].sum(1)


class _Tanh(torch.autograd.Function):
    """The rule of the module's docstring, and its transpose.

    Autograd on the rule itself keeps a dozen arrays and passes over memory twice as often.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, directions: int) -> Tensor:
        a = torch.tanh(blocks[:, 0])
        slope = torch.addcmul(torch.ones((), dtype=a.dtype), a, a, value=-1)
        out = blocks * slope[:, None]
        out[:, 0] = a
        seconds = blocks.shape[1] - 1 - directions
        if seconds:
            turned = out[:, 1 : 1 + seconds] * a[:, None]
            out[:, 1 + directions :].addcmul_(turned, blocks[:, 1 : 1 + seconds], value=-2)
        ctx.save_for_backward(blocks, a, slope)
        ctx.directions = directions
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        blocks, a, slope = ctx.saved_tensors
        directions, seconds = ctx.directions, blocks.shape[1] - 1 - ctx.directions
        below = grad * slope[:, None]
        through = (grad[:, 1:] * blocks[:, 1:]).sum(1).mul_(a)
        if seconds:
            first = blocks[:, 1 : 1 + seconds]
            weighted = grad[:, 1 + directions :] * first  # g_ii v_i
            # a_ii depends on v_i by -4 a s v_i, and a_i and a_ii on v by way of a and s.
            below[:, 1 : 1 + seconds].addcmul_(weighted, (slope * a)[:, None], value=-4)
            curved = (weighted * first).sum(1)
            through.addcmul_(curved, torch.addcmul(slope, a, a, value=-2))
        below[:, 0].addcmul_(through, slope, value=-2)
        return below, None
