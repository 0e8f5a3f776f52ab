"""Norms of the gradient, and its way into a flat vector and back, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.reference.memory import (
    Rows,
    check,
    dot,
    effective_gradient,
    fill_flat,
    in_memory_order,
    sum_of,
    write_in_memory_order,
)


def grad_stats(
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    weight_decay: list[float],
    maximize: bool,
    history: Tensor | None,
    scalars: Tensor | None,
    stats: Tensor,
    *,
    history_scale: Tensor | None = None,
) -> None:
    """See :class:`fuse_ext.kernels.ops.Ops`."""
    if (history is None) != (scalars is None):
        raise ValueError("history and scalars must be given together")
    double = any(tensor.dtype == torch.float64 for tensor in [*params, *grads])
    dtype = torch.float64 if double else torch.float32
    ends = [offset + param.numel() for param, offset in zip(params, offsets, strict=False)]
    numel = max(ends, default=0) if history is None else history.size(2)
    check(params, grads, offsets, numel, dtype, weight_decay=weight_decay)
    g = effective_gradient(params, grads, offsets, weight_decay, maximize, numel, dtype)
    penalty = 0.0
    for param, decay in zip(params, weight_decay, strict=False):
        x = in_memory_order(param, param).to(dtype)
        penalty += 0.5 * decay * dot(x, x)
    slope = 0.0
    if history is not None and scalars is not None:
        rows = Rows(history, history_scale, dtype)
        slope = dot(g, rows.read(0, int(ring.read_header(scalars).open)))
    largest = float(g.abs().max()) if numel else 0.0
    values = [slope, dot(g, g), sum_of(g.abs()), penalty, largest]
    stats.copy_(torch.tensor(values, dtype=torch.float64, device=stats.device))


def grad_gather(
    params: list[Tensor], grads: list[Tensor], offsets: list[int], flat: Tensor
) -> None:
    """See :class:`fuse_ext.kernels.ops.Ops`."""
    check(params, grads, offsets, flat.numel(), flat.dtype)
    fill_flat(grads, params, offsets, flat)


def grad_scatter(
    params: list[Tensor], grads: list[Tensor], offsets: list[int], flat: Tensor
) -> None:
    """See :class:`fuse_ext.kernels.ops.Ops`."""
    check(params, grads, offsets, flat.numel(), flat.dtype)
    for param, grad, offset in zip(params, grads, offsets, strict=True):
        write_in_memory_order(grad, param, flat[offset : offset + param.numel()])
