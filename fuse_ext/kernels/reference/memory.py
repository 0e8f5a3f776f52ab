"""How the reference ops see tensors: as flat vectors, as rows of a history, as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fuse_ext.checks import FLOATING
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.scalars import Header

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


def check_tensor(tensor: Tensor, name: str, device: torch.device) -> None:
    """Raises for a parameter or gradient that no kernel takes."""
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; only dense tensors are supported")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but params[0] is on {device}")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}; supported are float32, float64, bfloat16 and float16"
        )


def number_of(name: str, tensor: Tensor, device: torch.device) -> float:
    """The checks of csrc/adapters.cpp for a number on the device."""
    if tensor.numel() != 1:
        raise ValueError(f"{name} has {tensor.numel()} elements, not one")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but the op runs on {device}")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected float32 or float64")
    return float(tensor.item())


def first_step(steps: Tensor, device: torch.device) -> float:
    """The step count that all elements of ``step_tensor`` hold."""
    if steps.numel() == 0 or not steps.is_contiguous():
        raise ValueError(
            f"step_tensor has shape {list(steps.shape)} and strides {list(steps.stride())}; "
            "expected contiguous step counts"
        )
    return number_of("step_tensor", steps.view(-1)[:1], device)


def check(
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
        check_tensor(param, f"params[{i}]", params[0].device)
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
            check_tensor(grads[i], f"grads[{i}]", params[0].device)
            if grads[i].shape != param.shape:
                raise ValueError(
                    f"grads[{i}] has shape {tuple(grads[i].shape)} but params[{i}] has "
                    f"{tuple(param.shape)}"
                )


def fill_flat(
    tensors: list[Tensor], params: list[Tensor], offsets: list[int], out: Tensor
) -> Tensor:
    """The tensors end to end, each in its parameter's memory order, in ``out``."""
    for tensor, param, offset in zip(tensors, params, offsets, strict=True):
        out[offset : offset + param.numel()] = in_memory_order(tensor, param)
    return out


def effective_gradient(
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    weight_decay: list[float],
    maximize: bool,
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    """g = sign * grad + weight_decay * param, flat."""
    device = params[0].device if params else torch.device("cpu")
    g = fill_flat(grads, params, offsets, torch.zeros(numel, dtype=dtype, device=device))
    if maximize:
        g.neg_()
    for i, decay in enumerate(weight_decay):
        if decay:
            piece = g[offsets[i] : offsets[i] + params[i].numel()]
            piece.add_(in_memory_order(params[i], params[i]).to(dtype), alpha=decay)
    return g


def sum_of(values: Tensor) -> float:
    """The sum, in float64 where there is one."""
    # MPS has no float64.
    exact = torch.float32 if values.device.type == "mps" else torch.float64
    return float(values.sum(dtype=exact))


def dot(a: Tensor, b: Tensor) -> float:
    """The sum of the products, which are those of ``a``'s dtype."""
    return sum_of(a * b.to(a.dtype))


def state_dtype(history: Tensor, grad_prev: Tensor | None, control: Tensor | None) -> torch.dtype:
    """The dtype of the flat state: that of the previous gradient."""
    if grad_prev is not None:
        return grad_prev.dtype
    if control is not None:
        raise ValueError(
            "grad_prev is missing: with control it must outlive a gradient that is refused"
        )
    if history.dtype not in (torch.float32, torch.float64):
        raise TypeError("grad_prev is missing: only a float32 or float64 history can hold it")
    return history.dtype


class Rows:
    """The rows of a history, read as they were stored; an int8 history has scales."""

    def __init__(self, history: Tensor, scales: Tensor | None, dtype: torch.dtype) -> None:
        if (scales is not None) != (history.dtype == torch.int8):
            raise ValueError(
                "history_scale belongs to an int8 history, and only to it; history has dtype "
                f"{history.dtype}"
            )
        self._history, self._scales, self._dtype = history, scales, dtype

    def read(self, side: int, slot: int) -> Tensor:
        """A row as it was stored."""
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
            # kLeastScale: below the normal numbers a scale has lost digits.
            least = torch.finfo(torch.float32).tiny
            values = torch.where(scale >= least, values / scale, 0).round().clamp(-127, 127)
        self._history[side, slot] = values
        return self.read(side, slot)

    def _spread(self, scales: Tensor) -> Tensor:
        spread = scales.to(self._dtype).repeat_interleave(SCALE_BLOCK)
        return spread[: self._history.size(2)]


def ring_slots(scalars: Tensor, history: Tensor) -> tuple[Header, list[int]]:
    """The header, and the ring's slots, newest pair first."""
    return ring.read_header(scalars), ring.held_slots(scalars, history.size(1))
