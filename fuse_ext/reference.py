"""Every op in plain PyTorch: the oracle of the kernels, and the fallback on other devices.

Signatures and effects are those of :class:`fuse_ext.ops.Ops`. Speed is no aim here: flat vectors
are really concatenated, and scalars are read one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuse_ext import fixed_step
from fuse_ext import scalars as ring
from fuse_ext.reference_memory import (
    Rows,
    check,
    dot,
    effective_gradient,
    fill_flat,
    first_step,
    in_memory_order,
    number_of,
    ring_slots,
    state_dtype,
    sum_of,
    write_in_memory_order,
)
from fuse_ext.stochastic import random_bits, store_stochastic


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
    """See :class:`fuse_ext.ops.Ops`."""
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
    """See :class:`fuse_ext.ops.Ops`."""
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


def lbfgs_update(
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    weight_decay: list[float],
    maximize: bool,
    history: Tensor,
    grad_prev: Tensor | None,
    scalars: Tensor,
    form_pair: bool,
    *,
    history_scale: Tensor | None = None,
    control: Tensor | None = None,
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    dtype, numel = state_dtype(history, grad_prev, control), history.size(2)
    check(params, grads, offsets, numel, dtype, weight_decay=weight_decay)
    g = effective_gradient(params, grads, offsets, weight_decay, maximize, numel, dtype)
    header, pairs = ring_slots(scalars, history)
    if control is not None:
        numbers = fixed_step.Control(control)
        form_pair = numbers.pair_step != 0.0
        numbers.grad_square, numbers.grad_sum = dot(g, g), sum_of(g.abs())
        numbers.grad_largest = float(g.abs().max()) if numel else 0.0
        if not ring.usable_slots(scalars, history.size(1)):
            largest = [float(p.abs().max()) for p in params if p.numel()]
            numbers.param_largest = max(largest, default=0.0)
    slots, opened = history.size(1), int(header.open)
    rows = Rows(history, history_scale, dtype)
    grad_s, grad_y = ring.array(scalars, "grad_s", slots), ring.array(scalars, "grad_y", slots)
    if form_pair:
        # As stored: a rounded pair is the pair.
        y = rows.write(1, opened, g - (rows.read(1, opened) if grad_prev is None else grad_prev))
        pairs = [*pairs, opened]
        y_s, y_y = ring.array(scalars, "y_s", slots), ring.array(scalars, "y_y", slots)
        for slot in pairs:
            y_s[slot], y_y[slot] = dot(y, rows.read(0, slot)), dot(y, rows.read(1, slot))
        scalars[ring.index("y_dot_y", slots)] = y_y[opened]
    for slot in pairs:
        grad_s[slot], grad_y[slot] = dot(g, rows.read(0, slot)), dot(g, rows.read(1, slot))


def _commit_pair(scalars: Tensor, slots: int, step_length: float, curvature_tol: float) -> None:
    """Closes the open slot when s.y > curvature_tol |s| |y|; else leaves it open."""
    header = ring.read_header(scalars)
    opened, count = int(header.open), int(header.count)
    y_s, y_y = ring.array(scalars, "y_s", slots), ring.array(scalars, "y_y", slots)
    row_scale = ring.array(scalars, "row_scale", slots)
    gram_sy, gram_yy = (ring.array(scalars, name, slots) for name in ("gram_sy", "gram_yy"))
    sy, yy = step_length * float(y_s[opened]), float(scalars[ring.index("y_dot_y", slots)])
    norms = (
        math.sqrt(step_length * step_length * header.direction_sq) * math.sqrt(yy)
        if yy >= 0
        else math.nan
    )
    cosine = sy / norms if norms else math.nan
    scalars[ring.index("pair_cosine", slots)] = cosine
    if not (sy > curvature_tol * norms and yy > 0.0 and math.isfinite(norms + sy)):
        scalars[ring.index("skipped", slots)] += 1
        return
    row_scale[opened] = step_length
    ring.array(scalars, "pair_set", slots)[opened] = scalars[ring.index("set", slots)]
    for i in ring.held_slots(scalars, slots):
        gram_sy[i, opened] = row_scale[i] * y_s[i]
        gram_yy[i, opened] = gram_yy[opened, i] = y_y[i]
    gram_sy[opened, opened], gram_yy[opened, opened] = sy, yy
    scaling = bool(scalars[ring.index("self_scaling", slots)])
    grown = -step_length * step_length * header.direction_dot_grad / sy  # s.B s / s.y = 1 / tau
    growth = ring.array(scalars, "growth", slots)
    growth[opened] = grown - 1.0 if scaling and 1.0 < grown < math.inf else 0.0
    held = min(count + 1, slots - 1)
    first = (opened + 1 - held) % slots if scaling else opened
    scalars[ring.index("gamma", slots)] = gram_sy[first, first] / gram_yy[first, first]
    scalars[ring.index("accepted", slots)] += 1
    scalars[ring.index("count", slots)] = held
    scalars[ring.index("open", slots)] = (opened + 1) % slots


def lbfgs_two_loop(
    scalars: Tensor, slots: int, commit: bool, step_length: float, curvature_tol: float
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    if commit:
        _commit_pair(scalars, slots, step_length, curvature_tol)
    _recursion(scalars, slots)


def _recursion(scalars: Tensor, slots: int) -> None:
    header, newest_first = ring.read_header(scalars), ring.usable_slots(scalars, slots)
    scalars[ring.index("usable", slots)] = len(newest_first)
    chosen = ring.array(scalars, "chosen", slots)
    chosen[: len(newest_first)] = torch.tensor(
        newest_first, dtype=chosen.dtype, device=chosen.device
    )
    named = {
        name: ring.array(scalars, name, slots).tolist()
        for name in ("row_scale", "grad_s", "grad_y", "growth", "gram_sy", "gram_yy")
    }
    scale, sy, yy = named["row_scale"], named["gram_sy"], named["gram_yy"]
    gamma = header.gamma if newest_first else 1.0
    if 0 < len(newest_first) < header.count:
        first = newest_first[-1 if header.self_scaling else 0]
        gamma = sy[first][first] / yy[first][first]
    alpha: dict[int, float] = {}
    for i in newest_first:
        s_dot_p = -scale[i] * named["grad_s"][i] - sum(a * sy[i][j] for j, a in alpha.items())
        alpha[i] = s_dot_p / sy[i][i]
    grown, product = ring.array(scalars, "grown", slots), 1.0
    for i in newest_first:
        grown[i] = product
        product *= 1.0 + named["growth"][i]
    change: dict[int, float] = {}  # alpha_i - beta_i, and what has become of it
    initial = -gamma
    for i in reversed(newest_first):
        if change:
            growth = 1.0 + named["growth"][i]
            initial *= growth
            change = {j: c * growth for j, c in change.items()}
        y_dot_p = initial * (named["grad_y"][i] + sum(alpha[j] * yy[i][j] for j in alpha))
        y_dot_p += sum(c * sy[j][i] for j, c in change.items())
        change[i] = alpha[i] - y_dot_p / sy[i][i]
    coef_s, coef_y = ring.array(scalars, "coef_s", slots), ring.array(scalars, "coef_y", slots)
    for i in ring.held_slots(scalars, slots):
        coef_s[i] = coef_y[i] = 0.0  # read by the second pass, whatever the pair's set
    for i in newest_first:
        coef_s[i], coef_y[i] = change[i] * scale[i], initial * alpha[i]
    ring.array(scalars, "coef_g", slots)[0] = initial


def lbfgs_decide(
    scalars: Tensor,
    slots: int,
    control: Tensor,
    *,
    lr: float,
    lr_unit: float,
    lr_tensor: Tensor | None,
    loss: Tensor | None,
    curvature_tol: float,
    tolerance_grad: float,
    tolerance_change: float,
    eps: float,
    patience: int,
    closes_pair: bool,
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    if lr_tensor is not None:
        lr *= number_of("lr_tensor", lr_tensor, lr_tensor.device) / lr_unit
    fixed_step.decide(
        scalars,
        slots,
        control,
        lr=lr,
        loss=0.0 if loss is None else loss.item(),
        curvature_tol=curvature_tol,
        tolerance_grad=tolerance_grad,
        tolerance_change=tolerance_change,
        eps=eps,
        patience=patience,
        closes_pair=closes_pair,
        commit=lambda t: _commit_pair(scalars, slots, t, curvature_tol),
        recursion=lambda: _recursion(scalars, slots),
    )


def lbfgs_direction(
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    weight_decay: list[float],
    lr_scale: list[float],
    maximize: bool,
    history: Tensor,
    grad_prev: Tensor | None,
    scalars: Tensor,
    *,
    history_scale: Tensor | None = None,
    control: Tensor | None = None,
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    dtype, numel = state_dtype(history, grad_prev, control), history.size(2)
    check(params, grads, offsets, numel, dtype, weight_decay=weight_decay, lr_scale=lr_scale)
    if control is not None and fixed_step.Control(control).move != fixed_step.GO:
        return
    g = effective_gradient(params, grads, offsets, weight_decay, maximize, numel, dtype)
    header, pairs = ring_slots(scalars, history)
    slots, opened = history.size(1), int(header.open)
    coef_s, coef_y = ring.array(scalars, "coef_s", slots), ring.array(scalars, "coef_y", slots)
    rows = Rows(history, history_scale, dtype)
    p = g * float(ring.array(scalars, "coef_g", slots))
    for slot in pairs:
        p.add_(rows.read(0, slot), alpha=float(coef_s[slot]))
        p.add_(rows.read(1, slot), alpha=float(coef_y[slot]))
    for i, share in enumerate(lr_scale):
        p[offsets[i] : offsets[i] + params[i].numel()] *= share
    p = rows.write(0, opened, p)
    (history[1, opened] if grad_prev is None else grad_prev).copy_(g)
    scalars[ring.index("direction_dot_grad", slots)] = dot(g, p)
    scalars[ring.index("direction_sq", slots)] = dot(p, p)
    scalars[ring.index("direction_max", slots)] = float(p.abs().max()) if numel else 0.0


def lbfgs_set_out(
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    weight_decay: list[float],
    lr_scale: list[float],
    maximize: bool,
    history: Tensor,
    grad_prev: Tensor | None,
    scalars: Tensor,
    origin: Tensor,
    step: float,
    *,
    history_scale: Tensor | None = None,
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    check(params, None, offsets, history.size(2), origin.dtype)
    given = params, grads, offsets, weight_decay, lr_scale, maximize
    lbfgs_direction(*given, history, grad_prev, scalars, history_scale=history_scale)
    lbfgs_move(params, offsets, origin, history, scalars, step, True, history_scale=history_scale)


def lbfgs_move(
    params: list[Tensor],
    offsets: list[int],
    origin: Tensor,
    history: Tensor,
    scalars: Tensor,
    step: float,
    save: bool,
    *,
    history_scale: Tensor | None = None,
    control: Tensor | None = None,
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    check(params, None, offsets, history.size(2), origin.dtype)
    header, _ = ring_slots(scalars, history)
    if control is not None:
        order = fixed_step.ordered_move(scalars, control)
        if order is None:
            return
        step, save = order
    if save:
        fill_flat(params, params, offsets, origin)
        if step == 0.0:
            return
    target = origin
    if step != 0.0:
        target = origin + step * Rows(history, history_scale, origin.dtype).read(
            0, int(header.open)
        )
    for param, offset in zip(params, offsets, strict=True):
        write_in_memory_order(param, param, target[offset : offset + param.numel()])


def fuse_blend(
    params: list[Tensor],
    offsets: list[int],
    origin: Tensor,
    history: Tensor,
    scalars: Tensor,
    theta: float,
    step: float,
    *,
    history_scale: Tensor | None = None,
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    check(params, None, offsets, history.size(2), origin.dtype)
    header, _ = ring_slots(scalars, history)
    rows, opened = Rows(history, history_scale, origin.dtype), int(header.open)
    start = torch.zeros_like(origin)  # where no parameter is, the origin is not read
    for param, offset in zip(params, offsets, strict=True):
        place = slice(offset, offset + param.numel())
        start[place] = origin[place]
    adam_point = fill_flat(params, params, offsets, start.clone())
    lbfgs_point = start + step * rows.read(0, opened)
    point = adam_point.lerp(lbfgs_point, 1.0 - theta)
    for param, offset in zip(params, offsets, strict=True):
        write_in_memory_order(param, param, point[offset : offset + param.numel()])
    taken = rows.write(0, opened, fill_flat(params, params, offsets, start.clone()) - start)
    scalars[ring.index("direction_sq", history.size(1))] = dot(taken, taken)


def grad_gather(
    params: list[Tensor], grads: list[Tensor], offsets: list[int], flat: Tensor
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    check(params, grads, offsets, flat.numel(), flat.dtype)
    fill_flat(grads, params, offsets, flat)


def grad_scatter(
    params: list[Tensor], grads: list[Tensor], offsets: list[int], flat: Tensor
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    check(params, grads, offsets, flat.numel(), flat.dtype)
    for param, grad, offset in zip(params, grads, offsets, strict=True):
        write_in_memory_order(grad, param, flat[offset : offset + param.numel()])
