"""Norms of the gradients at hand, and all else that the host decides by before a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse_ext.kernels.bound_ops import bind
from fuse_ext.kernels.capture import is_remote
from fuse_ext.kernels.ops import Ops
from fuse_ext.vector.flat import FlatParams, Part
from fuse_ext.vector.measures import PartsDiffer
from fuse_ext.vector.reduced_ops import ReducedOps


@dataclass(slots=True)  # made, and read, in half the time that a NamedTuple takes
class GradStats:
    """What one pass over the effective gradient g yields (order of csrc/stats.h).

    Attributes:
        slope: g.p along the current direction.
        square: g.g
        abs_sum: sum |g|
        penalty: sum weight_decay/2 x^2, the loss that weight decay stands for.
        abs_max: max |g|
    """

    slope: float
    square: float
    abs_sum: float
    penalty: float
    abs_max: float

    @property
    def finite(self) -> bool:
        """Whether every element of g is finite."""
        return math.isfinite(self.square)


# Their names, in their order.
STATS = tuple(field.name for field in fields(GradStats))
# Where no parameter has one.
NO_GRADIENT = GradStats(0.0, 0.0, 0.0, 0.0, 0.0)


def effective_gradient(
    flat: FlatParams,
    ops: Ops,
    part: Part,
    grads: list[Tensor],
    decay: list[float],
    maximize: bool,
    out: Tensor,
) -> Tensor:
    """The gradient of what is minimised, sign and L2 penalty included, as one flat vector.

    Zero where a parameter is not in ``part``. ``decay`` is of the part's parameters, or empty.
    """
    if part.absent:
        out.zero_()
    if part.params:
        ops.grad_gather(part.reals(part.params), grads, part.offsets, out)
    if maximize:
        out.neg_()
    for i, coefficient in zip(part.indices, decay, strict=False):
        if coefficient:
            flat.piece(out, i).add_(flat.tensors[i].detach(), alpha=coefficient)
    return out


def grad_stats_into(flat: FlatParams, ops: Ops, stats: Tensor) -> bool:
    """``stats`` = :class:`GradStats` of the gradients at hand; False where there is none."""
    members = [i for i, p in enumerate(flat.params) if p.grad is not None]
    grads: list[Any] = [flat.grad(i) for i in members]
    if members:
        ops.grad_stats(
            flat.reals([flat.tensors[i] for i in members]),
            flat.reals(grads),
            [flat.offsets[i] for i in members],
            [],
            False,
            None,
            None,
            stats,
        )
    return bool(members)


class Told(NamedTuple):
    """What a :class:`Readout` has read.

    Attributes:
        norms: Of the gradients; None where they were not asked for or there are none.
        loss: As a number; None without one.
        found_inf: GradScaler's verdict; None without one.
    """

    norms: GradStats | None
    loss: float | None
    found_inf: bool | None

    @property
    def finite(self) -> bool:
        """Whether all that was read is."""
        norms = self.norms is None or self.norms.finite
        return norms and (self.loss is None or math.isfinite(self.loss))


class Readout:
    """What the host decides by before a step on the gradients at hand, in one copy.

    Args:
        flat: The parameters.
        ops: Kernels to use.
    """

    def __init__(self, flat: FlatParams, ops: Ops) -> None:
        self._flat, self._ops = flat, ops
        # The norms, the loss, GradScaler's verdict.
        size = len(STATS) + 2
        self._numbers = torch.zeros(size, dtype=torch.float64, device=flat.device)
        # Views take as long as a kernel on a small problem.
        self._stats, self._with_loss = self._numbers[: size - 2], self._numbers[:-1]
        self._bound = bind(ops, flat.whole)

    def read(self, loss: Any = None, found_inf: Tensor | None = None, norms: bool = True) -> Told:
        """Loss and verdict, where given, and norms of the gradients, if asked for."""
        if self._flat.together is not None:
            return self._over_ranks(loss, found_inf, norms)
        remote, numbers = is_remote(self._flat.device), self._numbers
        here = loss if isinstance(loss, Tensor) and loss.device == numbers.device else None
        if not norms:
            return self._without_norms(loss, here, found_inf, remote)
        stats, with_loss = self._stats, self._with_loss
        plain = self._flat.layout.grads()
        if plain is not None:
            # The loss is not copied where there is nothing to wait for.
            behind = with_loss if remote and here is not None else None
            rest = stats, None, here, behind
            *values, value = self._bound.grad_stats(plain, [], False, None, None, *rest)
        elif not grad_stats_into(self._flat, self._ops, stats):
            return self._without_norms(loss, here, found_inf, remote)
        elif remote and here is not None:
            with_loss[-1:].copy_(here.detach().reshape(1))
            *values, value = with_loss.tolist()
        else:
            values, value = stats.tolist(), math.nan if here is None else here.item()
        told = None if loss is None else value if here is not None else _number(loss)
        found = None if found_inf is None else float(found_inf) != 0.0
        return Told(GradStats(*values), told, found)

    def finite(self, told: Told) -> bool:
        """Whether a step may be taken on what was read.

        Where other ranks may step too, and nobody has said so, only the gradients are asked, which
        all share: by its own loss each would decide for itself.
        """
        if self._flat.unsaid:
            return told.norms is None or told.norms.finite
        return told.finite

    def _over_ranks(self, loss: Any, found_inf: Tensor | None, norms: bool) -> Told:
        """The same of all ranks: the mean loss, a verdict where one has it, norms of the whole."""
        flat, own, absent = self._flat, [0.0] * len(STATS), tuple[int, ...]()
        number = None if loss is None else _number(loss)
        found = None
        if found_inf is not None:
            found = flat.measures.any(float(found_inf) != 0.0)[0]
        if norms:
            absent = tuple(i for i, param in enumerate(flat.params) if param.grad is None)
            part = flat.part(absent)
            grads: list[Any] = [flat.grad(i) for i in part.indices]
            stats = self._stats
            bound = ReducedOps(self._ops, part)
            own = bound.norms(flat.reals(grads), [], False, None, None, stats, None)
        elif number is None:
            return Told(None, None, found)
        try:
            *values, mean = flat.measures.point(own, number, absent)
        except PartsDiffer:
            flat.fill_gradients()
            return self._over_ranks(loss, found_inf, norms)
        some = norms and len(absent) < len(flat.params)
        return Told(GradStats(*values) if some else None, None if number is None else mean, found)

    def _without_norms(
        self, loss: Any, here: Tensor | None, found_inf: Tensor | None, remote: bool
    ) -> Told:
        if remote and here is not None and found_inf is not None:
            both = self._numbers[-2:]
            both[:1].copy_(here.detach().reshape(1))
            both[1:].copy_(found_inf.reshape(1))
            value, found = both.tolist()
            return Told(None, value, found != 0.0)
        number = None if loss is None else _number(loss)
        return Told(None, number, None if found_inf is None else float(found_inf) != 0.0)


def _number(loss: Any) -> float:
    return float(loss.item() if isinstance(loss, Tensor) else loss)
