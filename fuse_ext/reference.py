"""Every op in plain PyTorch: the oracle of the kernels, and the fallback on other devices.

Signatures and effects are those of :class:`fuse_ext.ops.Ops`. Speed is no aim here: flat vectors
are really concatenated, and scalars are read one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuse_ext import scalars as ring
from fuse_ext.checks import FLOATING
from fuse_ext.scalars import Header

# Elements of an int8 row that share a scale (kScaleBlock in csrc/numeric.h).
SCALE_BLOCK = 128


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in some order, without overlap."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """The elements as a vector, in the memory order of ``like`` (row-major if it is not dense).

    A view of ``tensor`` where its own order is that one, else a copy.
    """
    if not is_dense(like):
        return tensor.contiguous().view(-1)
    if tensor.stride() != like.stride():
        tensor = torch.empty_strided(
            like.size(), like.stride(), dtype=tensor.dtype, device=tensor.device
        ).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def write_in_memory_order(tensor: Tensor, like: Tensor, values: Tensor) -> None:
    """The reverse of :func:`in_memory_order`: ``tensor`` takes the vector's values."""
    if is_dense(like):
        shaped = values.as_strided(like.size(), like.stride(), values.storage_offset())
    else:
        shaped = values.view(like.size())
    tensor.copy_(shaped)


def _check_tensor(tensor: Tensor, name: str, device: torch.device) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; only dense tensors are supported")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but params[0] is on {device}")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; supported are float32, float64, bfloat16 and float16"
        )


def _check(
    params: list[Tensor],
    grads: list[Tensor] | None,
    offsets: list[int],
    numel: int,
    dtype: torch.dtype,
    **per_tensor: list[float],
) -> None:
    """The checks of csrc/adapters.cpp; ``numel`` and ``dtype`` are the flat state's."""
    if len(offsets) != len(params):
        raise ValueError(f"offsets has {len(offsets)} entries for {len(params)} params")
    if grads is not None and len(grads) != len(params):
        raise ValueError(f"grads has {len(grads)} entries for {len(params)} params")
    for name, values in per_tensor.items():
        if values and len(values) != len(params):
            raise ValueError(f"{name} has {len(values)} entries for {len(params)} params")
    free_from = 0
    for i, (param, offset) in enumerate(zip(params, offsets, strict=True)):
        _check_tensor(param, f"params[{i}]", params[0].device)
        if param.dtype == torch.float64 and dtype != torch.float64:
            raise TypeError(
                f"params[{i}] has dtype float64 but the state float32, which would round it"
            )
        if not free_from <= offset <= numel - param.numel():
            raise ValueError(
                f"offsets[{i}]={offset} does not fit: params[{i}] has {param.numel()} elements, "
                f"the state {numel}, taken up to {free_from}"
            )
        free_from = offset + param.numel()
        if grads is not None:
            _check_tensor(grads[i], f"grads[{i}]", params[0].device)
            if grads[i].shape != param.shape:
                raise ValueError(
                    f"grads[{i}] has shape {tuple(grads[i].shape)} but params[{i}] has "
                    f"{tuple(param.shape)}"
                )


def _flat(tensors: list[Tensor], params: list[Tensor], offsets: list[int], out: Tensor) -> Tensor:
    for tensor, param, offset in zip(tensors, params, offsets, strict=True):
        out[offset : offset + param.numel()] = in_memory_order(tensor, param)
    return out


def _effective_gradient(
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    weight_decay: list[float],
    maximize: bool,
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    """g = sign * grad + weight_decay * param, flat."""
    device = params[0].device if params else None
    g = _flat(grads, params, offsets, torch.zeros(numel, dtype=dtype, device=device))
    if maximize:
        g.neg_()
    for i, decay in enumerate(weight_decay):
        if decay:
            piece = g[offsets[i] : offsets[i] + params[i].numel()]
            piece.add_(in_memory_order(params[i], params[i]).to(dtype), alpha=decay)
    return g


def _sum(values: Tensor) -> float:
    # MPS has no float64.
    exact = torch.float32 if values.device.type == "mps" else torch.float64
    return float(values.sum(dtype=exact))


def _dot(a: Tensor, b: Tensor) -> float:
    return _sum(a * b.to(a.dtype))


def _state_dtype(history: Tensor, grad_prev: Tensor | None) -> torch.dtype:
    if grad_prev is not None:
        return grad_prev.dtype
    if history.dtype not in (torch.float32, torch.float64):
        raise TypeError("grad_prev is missing: only a float32 or float64 history can hold it")
    return history.dtype


class _Rows:
    """The rows of a history, read as they were stored; an int8 history has scales."""

    def __init__(self, history: Tensor, scales: Tensor | None, dtype: torch.dtype) -> None:
        if (scales is not None) != (history.dtype == torch.int8):
            raise ValueError(
                "history_scale belongs to an int8 history, and only to it; history has dtype "
                f"{history.dtype}"
            )
        self._history, self._scales, self._dtype = history, scales, dtype

    def read(self, side: int, slot: int) -> Tensor:
        row = self._history[side, slot].to(self._dtype)
        if self._scales is None:
            return row
        return row * self._spread(self._scales[side, slot])

    def write(self, side: int, slot: int, values: Tensor) -> Tensor:
        """Stores the values, rounded; returns what was stored."""
        if self._scales is not None:
            padded = torch.nn.functional.pad(values, (0, -len(values) % SCALE_BLOCK))
            blocks = padded.view(-1, SCALE_BLOCK)
            # The product is NaN, and with it the scale, where a value is not finite.
            self._scales[side, slot] = blocks.abs().amax(1) / 127 + (blocks * 0).sum(1)
            scale = self._spread(self._scales[side, slot])
            values = torch.where(scale > 0, values / scale, 0).round().clamp(-127, 127)
        self._history[side, slot] = values
        return self.read(side, slot)

    def _spread(self, scales: Tensor) -> Tensor:
        spread = scales.to(self._dtype).repeat_interleave(SCALE_BLOCK)
        return spread[: self._history.size(2)]


def _ring(scalars: Tensor, history: Tensor) -> tuple[Header, list[int]]:
    """The header, and the ring's slots, newest pair first."""
    slots = history.size(1)
    header = ring.read_header(scalars)
    newest = int(header.open) + slots - 1
    return header, [(newest - age) % slots for age in range(int(header.count))]


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
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    if step < 1:
        raise ValueError(f"step={step} must be at least 1")
    _check(params, grads, offsets, exp_avg.numel(), exp_avg.dtype)
    if found_inf is not None and found_inf.item() != 0.0:
        return
    scale = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else grad_scale.item())
    step_size = lr / (1.0 - beta1**step)
    root_scale = 1.0 / math.sqrt(1.0 - beta2**step)
    sum_sq = 0.0
    for param, grad, offset in zip(params, grads, offsets, strict=True):
        place = slice(offset, offset + param.numel())
        m, v = exp_avg[place], exp_avg_sq[place]
        x = in_memory_order(param, param).to(m.dtype, copy=True)
        g = in_memory_order(grad, param).to(m.dtype) * scale
        sum_sq += _dot(g, g)
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
    _check(params, grads, offsets, numel, dtype, weight_decay=weight_decay)
    g = _effective_gradient(params, grads, offsets, weight_decay, maximize, numel, dtype)
    penalty = 0.0
    for param, decay in zip(params, weight_decay, strict=False):
        x = in_memory_order(param, param).to(dtype)
        penalty += 0.5 * decay * _dot(x, x)
    slope = 0.0
    if history is not None and scalars is not None:
        rows = _Rows(history, history_scale, dtype)
        slope = _dot(g, rows.read(0, int(ring.read_header(scalars).open)))
    largest = float(g.abs().max()) if numel else 0.0
    values = [slope, _dot(g, g), _sum(g.abs()), penalty, largest]
    stats.copy_(torch.tensor(values, dtype=torch.float64))


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
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    dtype, numel = _state_dtype(history, grad_prev), history.size(2)
    _check(params, grads, offsets, numel, dtype, weight_decay=weight_decay)
    g = _effective_gradient(params, grads, offsets, weight_decay, maximize, numel, dtype)
    header, pairs = _ring(scalars, history)
    slots, opened = history.size(1), int(header.open)
    rows = _Rows(history, history_scale, dtype)
    grad_s, grad_y = ring.array(scalars, "grad_s", slots), ring.array(scalars, "grad_y", slots)
    if form_pair:
        # As stored: a rounded pair is the pair.
        y = rows.write(1, opened, g - (rows.read(1, opened) if grad_prev is None else grad_prev))
        pairs = [*pairs, opened]
        y_s, y_y = ring.array(scalars, "y_s", slots), ring.array(scalars, "y_y", slots)
        for slot in pairs:
            y_s[slot], y_y[slot] = _dot(y, rows.read(0, slot)), _dot(y, rows.read(1, slot))
        scalars[ring.index("y_dot_y", slots)] = y_y[opened]
    for slot in pairs:
        grad_s[slot], grad_y[slot] = _dot(g, rows.read(0, slot)), _dot(g, rows.read(1, slot))


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
    for age in range(count):
        i = (opened + slots - 1 - age) % slots
        gram_sy[i, opened] = row_scale[i] * y_s[i]
        gram_yy[i, opened] = gram_yy[opened, i] = y_y[i]
    gram_sy[opened, opened], gram_yy[opened, opened] = sy, yy
    scalars[ring.index("gamma", slots)] = sy / yy
    scalars[ring.index("accepted", slots)] += 1
    scalars[ring.index("count", slots)] = min(count + 1, slots - 1)
    scalars[ring.index("open", slots)] = (opened + 1) % slots


def lbfgs_two_loop(
    scalars: Tensor, slots: int, commit: bool, step_length: float, curvature_tol: float
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    if commit:
        _commit_pair(scalars, slots, step_length, curvature_tol)
    header = ring.read_header(scalars)
    newest_first = [
        (int(header.open) + slots - 1 - age) % slots for age in range(int(header.count))
    ]
    gamma = header.gamma if newest_first else 1.0
    named = {
        name: ring.array(scalars, name, slots).tolist()
        for name in ("row_scale", "grad_s", "grad_y", "gram_sy", "gram_yy")
    }
    scale, sy, yy = named["row_scale"], named["gram_sy"], named["gram_yy"]
    alpha: dict[int, float] = {}
    for i in newest_first:
        s_dot_p = -scale[i] * named["grad_s"][i] - sum(a * sy[i][j] for j, a in alpha.items())
        alpha[i] = s_dot_p / sy[i][i]
    change: dict[int, float] = {}  # alpha_i - beta_i
    for i in reversed(newest_first):
        y_dot_p = -gamma * (named["grad_y"][i] + sum(alpha[j] * yy[i][j] for j in alpha))
        y_dot_p += sum(c * sy[j][i] for j, c in change.items())
        change[i] = alpha[i] - y_dot_p / sy[i][i]
    coef_s, coef_y = ring.array(scalars, "coef_s", slots), ring.array(scalars, "coef_y", slots)
    for i in newest_first:
        coef_s[i], coef_y[i] = change[i] * scale[i], -gamma * alpha[i]
    ring.array(scalars, "coef_g", slots)[0] = -gamma


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
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    dtype, numel = _state_dtype(history, grad_prev), history.size(2)
    _check(params, grads, offsets, numel, dtype, weight_decay=weight_decay, lr_scale=lr_scale)
    g = _effective_gradient(params, grads, offsets, weight_decay, maximize, numel, dtype)
    header, pairs = _ring(scalars, history)
    slots, opened = history.size(1), int(header.open)
    coef_s, coef_y = ring.array(scalars, "coef_s", slots), ring.array(scalars, "coef_y", slots)
    rows = _Rows(history, history_scale, dtype)
    p = g * float(ring.array(scalars, "coef_g", slots))
    for slot in pairs:
        p.add_(rows.read(0, slot), alpha=float(coef_s[slot]))
        p.add_(rows.read(1, slot), alpha=float(coef_y[slot]))
    for i, share in enumerate(lr_scale):
        p[offsets[i] : offsets[i] + params[i].numel()] *= share
    p = rows.write(0, opened, p)
    (history[1, opened] if grad_prev is None else grad_prev).copy_(g)
    scalars[ring.index("direction_dot_grad", slots)] = _dot(g, p)
    scalars[ring.index("direction_sq", slots)] = _dot(p, p)
    scalars[ring.index("direction_max", slots)] = float(p.abs().max()) if numel else 0.0


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
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    _check(params, None, offsets, history.size(2), origin.dtype)
    header, _ = _ring(scalars, history)
    if save:
        _flat(params, params, offsets, origin)
        if step == 0.0:
            return
    target = origin
    if step != 0.0:
        target = origin + step * _Rows(history, history_scale, origin.dtype).read(
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
    _check(params, None, offsets, history.size(2), origin.dtype)
    header, _ = _ring(scalars, history)
    rows, opened = _Rows(history, history_scale, origin.dtype), int(header.open)
    adam_point = _flat(params, params, offsets, origin.clone())
    lbfgs_point = origin + step * rows.read(0, opened)
    point = adam_point.lerp(lbfgs_point, 1.0 - theta)
    for param, offset in zip(params, offsets, strict=True):
        write_in_memory_order(param, param, point[offset : offset + param.numel()])
    taken = rows.write(0, opened, _flat(params, params, offsets, origin.clone()) - origin)
    scalars[ring.index("direction_sq", history.size(1))] = _dot(taken, taken)


def grad_gather(
    params: list[Tensor], grads: list[Tensor], offsets: list[int], flat: Tensor
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    _check(params, grads, offsets, flat.numel(), flat.dtype)
    _flat(grads, params, offsets, flat)


def grad_scatter(
    params: list[Tensor], grads: list[Tensor], offsets: list[int], flat: Tensor
) -> None:
    """See :class:`fuse_ext.ops.Ops`."""
    _check(params, grads, offsets, flat.numel(), flat.dtype)
    for param, grad, offset in zip(params, grads, offsets, strict=True):
        write_in_memory_order(grad, param, flat[offset : offset + param.numel()])
