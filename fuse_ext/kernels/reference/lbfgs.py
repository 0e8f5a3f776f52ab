"""Algorithm 2 in plain PyTorch: the passes over the history, the recursion, the step.

The twin of csrc/two_loop.h and of the kernels around it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuse_ext.kernels import fixed_step
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.reference import broyden_pairs
from fuse_ext.kernels.reference.memory import (
    Rows,
    check,
    dot,
    effective_gradient,
    fill_flat,
    number_of,
    ring_slots,
    state_dtype,
    sum_of,
    write_in_memory_order,
)


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
    """See :class:`fuse_ext.kernels.ops.Ops`."""
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


def _commit_pair(
    scalars: Tensor, slots: int, step_length: float, curvature_tol: float, dropped: int = 1
) -> bool:
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
        return False
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
    held = count + 1 if count + 1 < slots else count + 1 - dropped
    first = (opened + 1 - held) % slots if scaling else opened
    scalars[ring.index("gamma", slots)] = gram_sy[first, first] / gram_yy[first, first]
    scalars[ring.index("accepted", slots)] += 1
    scalars[ring.index("count", slots)] = held
    scalars[ring.index("open", slots)] = (opened + 1) % slots
    return True


def lbfgs_two_loop(
    scalars: Tensor,
    slots: int,
    commit: bool,
    step_length: float,
    curvature_tol: float,
    *,
    broyden: Tensor | None = None,
    scaled: bool = False,
) -> None:
    """See :class:`fuse_ext.kernels.ops.Ops`."""
    opened, fresh = int(ring.read_header(scalars).open), False
    if commit:
        dropped = 1 if broyden is None else max(1, (slots - 1) // 2)
        fresh = _commit_pair(scalars, slots, step_length, curvature_tol, dropped)
    if broyden is None:
        return _recursion(scalars, slots)
    if fresh:
        broyden_pairs.note_pair(scalars, broyden, slots, opened, step_length)
    if broyden_pairs.newest_run(scalars, broyden, slots, scaled):
        _choose(scalars, slots)
        broyden_pairs.recursion(scalars, broyden, slots, step_length, fresh, scaled)
    else:
        _recursion(scalars, slots)


def _choose(scalars: Tensor, slots: int) -> list[int]:
    """Notes the usable pairs, newest first, and what those before each have grown by."""
    newest_first = ring.usable_slots(scalars, slots)
    scalars[ring.index("usable", slots)] = len(newest_first)
    chosen = ring.array(scalars, "chosen", slots)
    chosen[: len(newest_first)] = torch.tensor(
        newest_first, dtype=chosen.dtype, device=chosen.device
    )
    grown, product = ring.array(scalars, "grown", slots), 1.0
    growth = ring.array(scalars, "growth", slots).tolist()
    for i in newest_first:
        grown[i] = product
        product *= 1.0 + growth[i]
    return newest_first


def _recursion(scalars: Tensor, slots: int) -> None:
    header, newest_first = ring.read_header(scalars), _choose(scalars, slots)
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
    """See :class:`fuse_ext.kernels.ops.Ops`."""
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
    """See :class:`fuse_ext.kernels.ops.Ops`."""
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
    """See :class:`fuse_ext.kernels.ops.Ops`."""
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
    """See :class:`fuse_ext.kernels.ops.Ops`."""
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
    """See :class:`fuse_ext.kernels.ops.Ops`."""
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
