"""Eq. 2 in plain PyTorch: Adam's step, the twin of csrc/adam.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuse_ext.kernels.reference.memory import (
    check,
    dot,
    first_step,
    in_memory_order,
    number_of,
    write_in_memory_order,
)
from fuse_ext.kernels.reference.stochastic import random_bits, store_stochastic


def adam_step(
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    stats: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    eps_in_root: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    step_tensor: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    loss: Tensor | None = None,
    grad_square: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """See :class:`fuse_ext.kernels.ops.Ops`."""
    if step_tensor is not None:
        step = int(first_step(step_tensor, exp_avg.device)) + 1
    if lr_tensor is not None:
        lr = number_of("lr_tensor", lr_tensor, exp_avg.device)
    if step < 1:
        raise ValueError(f"step={step} must be at least 1")
    narrow = exp_avg.dtype == torch.bfloat16
    dtype = torch.float32 if narrow else exp_avg.dtype
    check(params, grads, offsets, exp_avg.numel(), dtype)
    numbers = [number.item() for number in (loss, grad_square) if number is not None]
    skips = found_inf is not None and found_inf.item() != 0.0
    skips = skips or not all(map(math.isfinite, numbers))
    if counts is not None:
        counts[int(skips)] += 1
    if skips:
        return
    if step_tensor is not None:
        step_tensor.add_(1)
    scale = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else grad_scale.item())
    step_size = lr / (1.0 - beta1**step)
    root_scale = 1.0 / math.sqrt(1.0 - beta2**step)
    sum_sq = 0.0
    for param, grad, offset in zip(params, grads, offsets, strict=True):
        place = slice(offset, offset + param.numel())
        m, v = exp_avg[place].to(dtype), exp_avg_sq[place].to(dtype)
        x = in_memory_order(param, param).to(dtype, copy=True)
        g = in_memory_order(grad, param).to(dtype) * scale
        sum_sq += dot(g, g)
        if decoupled_weight_decay:
            x.mul_(1.0 - lr * weight_decay)
        elif weight_decay:
            g = g + weight_decay * x
        m.lerp_(g, 1.0 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        second = v
        if max_exp_avg_sq is not None:
            second = torch.maximum(max_exp_avg_sq[place], v)
            max_exp_avg_sq[place] = second
        denominator = (second + eps_in_root).sqrt().mul_(root_scale).add_(eps)
        write_in_memory_order(param, param, x.addcdiv_(m, denominator, value=-step_size))
        if narrow:
            random = random_bits(offset, param.numel(), step, m.device)
            store_stochastic(exp_avg[place], m, random >> 16)
            store_stochastic(exp_avg_sq[place], v, random & 0xFFFF)
    stats[0] = sum_sq
