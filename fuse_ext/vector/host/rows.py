"""The ops on a history that lies on the host, while the parameters lie on a device.

Dots and combinations run where the rows are, with the CPU's kernels. An iteration sends the
gradient to the host once and the direction back once; norms, slopes and moves stay on the device,
which holds the direction's row and no other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.kernels import ops as kernels
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.bound_ops import bind
from fuse_ext.kernels.capture import is_remote
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.reference.memory import SCALE_BLOCK
from fuse_ext.kernels.scalars import HEADER
from fuse_ext.vector.flat import FlatParams, Part
from fuse_ext.vector.gradients import effective_gradient
from fuse_ext.vector.reduced_ops import Segments

HOST = torch.device("cpu")
_OPEN, _SQUARE = HEADER.index("open"), HEADER.index("direction_sq")
_SLOTS = 2  # the fewest that a ring has; all of the device's are one row


def lies_apart(history_device: str | None, flat: FlatParams) -> bool:
    """Whether rows are to lie elsewhere than the parameters: not where both are on the host."""
    return history_device is not None and is_remote(flat.device)


def on_host(shape: tuple[int, ...], dtype: torch.dtype, flat: FlatParams) -> Tensor:
    """Memory of the host, which a device of CUDA can read by itself; none for the meta device."""
    if flat.device.type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.empty(shape, dtype=dtype, device=HOST, pin_memory=flat.device.type == "cuda")


class Staging:
    """What the device and the host keep for each other.

    Args:
        flat: The parameters.
        ops: Kernels of their device.
        dtype: Of the rows.

    Attributes:
        gathered, sent: The gradient as one vector, there and here; ``sent`` is in the memory of the
            host.
        row: A ring on the device all of whose rows are the direction's: history, scalars, scales.
    """

    def __init__(self, flat: FlatParams, ops: Ops, dtype: torch.dtype) -> None:
        self.gathered = flat.new_vector()
        self.sent = on_host((flat.numel,), flat.dtype, flat).zero_()
        one = torch.zeros(flat.numel, dtype=dtype, device=flat.device)
        scalars = ring.new_scalars(_SLOTS, kernels.scalars_device(ops, flat.device))
        scales = None
        if dtype == torch.int8:
            blocks = -(-flat.numel // SCALE_BLOCK)
            scales = torch.zeros(2, _SLOTS, blocks, dtype=torch.float32, device=flat.device)
        self.row = one.expand(2, _SLOTS, flat.numel), scalars, scales

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        rows, scalars, scales = self.row
        held = self.gathered.nbytes + rows.untyped_storage().nbytes() + scalars.nbytes
        return held + (0 if scales is None else scales.nbytes)


class HostRows:
    """:class:`~fuse_ext.kernels.bound_ops.BoundOps` of parameters there and rows here.

    Args:
        ops: Kernels of the parameters' device.
        part: The parameters.
        staging: Of all parts of the flat vector.
    """

    def __init__(self, ops: Ops, part: Part, staging: Staging) -> None:
        self._ops, self._part, self._staging = ops, part, staging
        self._there = bind(ops, part)
        backend = "auto" if kernels.is_native(ops) else "reference"
        # Its stretches stand for the parameters: the decay that these are for is done there.
        self._sent = [part.flat.stretch(staging.sent, i) for i in part.indices]
        segments = Segments(part.flat, self._sent, part.offsets)
        self._here = bind(kernels.select(backend, HOST), segments)

    def _send(self, grads: list[Tensor], decay: list[float], maximize: bool) -> None:
        """The effective gradient to the host, which waits for it."""
        staging, part = self._staging, self._part
        flat = part.flat
        effective_gradient(flat, self._ops, part, grads, decay, maximize, staging.gathered)
        staging.sent.copy_(staging.gathered)

    def _bring(self, history: Tensor, scalars: Tensor, scales: Tensor | None) -> None:
        """The direction to the device; nobody waits, and the next gradient comes after it."""
        opened = int(scalars[_OPEN])
        rows, _, scale = self._staging.row
        rows[0, 0].copy_(history[0, opened], non_blocking=True)
        if scale is not None and scales is not None:
            scale[0, 0].copy_(scales[0, opened], non_blocking=True)

    def adam_step(self, grads: list[Tensor], *rest: Any) -> None:
        """Eq. 2 knows no rows."""
        self._there.adam_step(grads, *rest)

    def grad_stats(self, grads: list[Tensor], *rest: Any) -> list[float]:
        """All there."""
        decay, maximize, history, scalars, stats, scales, *loss = rest
        if history is not None:
            history, scalars, scales = self._staging.row
        return self._there.grad_stats(
            grads, decay, maximize, history, scalars, stats, scales, *loss
        )

    def lbfgs_update(self, grads: list[Tensor], *rest: Any) -> None:
        """Pass 1 and the recursion, here."""
        decay, maximize, *ring_and_pair = rest
        self._send(grads, decay, maximize)
        self._here.lbfgs_update(self._sent, [], False, *ring_and_pair)

    def lbfgs_direction(self, grads: list[Tensor], *rest: Any) -> list[float]:
        """Pass 2, here; the direction goes there."""
        decay, lr_scale, maximize, history, grad_prev, scalars, scales = rest
        self._send(grads, decay, maximize)
        held = history, grad_prev, scalars, scales
        numbers = self._here.lbfgs_direction(self._sent, [], lr_scale, False, *held)
        self._bring(history, scalars, scales)
        return numbers

    def lbfgs_update_direction(self, grads: list[Tensor], *rest: Any) -> list[float]:
        """Both on one gradient; who calls moves."""
        decay, lr_scale, maximize, history, grad_prev, scalars, scales, *pair = rest
        pair_step, curvature_tol, *_, broyden = pair
        self._send(grads, decay, maximize)
        held = history, grad_prev, scalars, scales
        stays = None, 0.0, 0.0
        numbers = self._here.lbfgs_update_direction(
            self._sent, [], lr_scale, False, *held, pair_step, curvature_tol, *stays, broyden
        )
        self._bring(history, scalars, scales)
        return numbers

    def lbfgs_move(
        self,
        origin: Tensor,
        history: Tensor,
        scalars: Tensor,
        history_scale: Tensor | None,
        step: float,
        save: bool,
    ) -> None:
        """Parameters = origin + step * p, there."""
        self._there.lbfgs_move(origin, *self._staging.row, step, save)

    def fuse_blend(
        self,
        origin: Tensor,
        history: Tensor,
        scalars: Tensor,
        history_scale: Tensor | None,
        theta: float,
        step: float,
    ) -> None:
        """Algorithm 3, there; the step that it took comes here."""
        rows, there, scale = self._staging.row
        params = self._part.reals(self._part.params)
        self._ops.fuse_blend(
            params, self._part.offsets, origin, rows, there, theta, step, history_scale=scale
        )
        opened = int(scalars[_OPEN])
        history[0, opened].copy_(rows[0, 0])
        if scale is not None and history_scale is not None:
            history_scale[0, opened].copy_(scale[0, 0])
        scalars[_SQUARE].copy_(there[_SQUARE])
