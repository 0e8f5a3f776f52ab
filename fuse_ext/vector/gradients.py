"""Norms of the gradients at hand: whether all are finite, and whether two calls gave the same."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse_ext.kernels.bound_ops import bind
from fuse_ext.kernels.ops import Ops
from fuse_ext.vector.flat import FlatParams, Part
from fuse_ext.vector.measures import PartsDiffer
from fuse_ext.vector.reduced_ops import ReducedOps


class GradStats(NamedTuple):
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


# Where no parameter has one.
NO_GRADIENT = GradStats(0.0, 0.0, 0.0, 0.0, 0.0)


def effective_gradient(
    flat: FlatParams,
    ops: Ops,
    part: Part,
    grads: list[Tensor],
    decay: list[float],
    maximize: bool,
    ascends: list[bool],
    out: Tensor,
) -> Tensor:
    """The gradient of what is minimised, sign and L2 penalty included, as one flat vector.

    Zero where a parameter is not in ``part``. ``decay`` and ``ascends`` (where not all go the same
    way) are of the part's parameters, or empty.
    """
    if part.absent:
        out.zero_()
    if part.params:
        ops.grad_gather(part.reals(part.params), grads, part.offsets, out)
    if maximize:
        out.neg_()
    for i, up in zip(part.indices, ascends, strict=False):
        if up:
            flat.piece(out, i).neg_()
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


def survey(
    flat: FlatParams, ops: Ops, stats: Tensor, loss: float | None
) -> tuple[GradStats | None, float]:
    """Norms of the gradients at hand, None where there is none, and the loss, NaN without one.

    Over all ranks, where several step together; ``stats`` is overwritten.
    """
    if flat.together is None:
        found = GradStats(*stats.tolist()) if grad_stats_into(flat, ops, stats) else None
        return found, math.nan if loss is None else loss
    absent = tuple(i for i, p in enumerate(flat.params) if p.grad is None)
    try:
        *norms, mean = flat.measures.point(_own_norms(flat, ops, absent, stats), loss, absent)
    except PartsDiffer:
        flat.fill_gradients()
        return survey(flat, ops, stats, loss)
    return GradStats(*norms) if len(absent) < len(flat.params) else None, mean


def _own_norms(flat: FlatParams, ops: Ops, absent: tuple[int, ...], stats: Tensor) -> list[float]:
    """This rank's share of the norms."""
    part = flat.part(absent)
    grads: list[Any] = [flat.grad(i) for i in part.indices]
    return ReducedOps(ops, part).norms(flat.reals(grads), [], False, None, None, stats, None)


def grads_are_finite(flat: FlatParams, ops: Ops) -> bool:
    """Whether all gradients at hand are; one read of them."""
    stats = torch.zeros(len(GradStats._fields), dtype=torch.float64, device=flat.device)
    plain = flat.layout.grads()
    if plain is not None:
        numbers = bind(ops, flat.whole).grad_stats(plain, [], False, None, None, stats, *[None] * 3)
        return GradStats._make(numbers[:-1]).finite
    return not grad_stats_into(flat, ops, stats) or GradStats(*stats.tolist()).finite
