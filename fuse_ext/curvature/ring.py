"""The ring of curvature pairs: its memory, and the passes over it.

Memory, for m = history_size and d parameters: (2 m + 2) d elements, and with the Broyden update
5 (m + 1)^2 float64 numbers. The slot being filled holds
the direction in its S row and, where history and state share a dtype, the previous gradient in
its Y row; a lower-precision history keeps the previous gradient apart, in the state's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.ring_state import OF_PAIRS, SET_ASIDE
from fuse_ext.kernels import ops as kernels
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.bound_ops import BoundOps
from fuse_ext.kernels.capture import is_remote
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.reference.memory import SCALE_BLOCK, Rows
from fuse_ext.kernels.scalars import Header
from fuse_ext.vector.flat import MOST_PARTS, FlatParams, Part, memory_order
from fuse_ext.vector.gradients import STATS, GradStats
from fuse_ext.vector.host.rows import HOST, HostRows, Staging, on_host
from fuse_ext.vector.reduced_ops import ReducedOps, blend, bound_ops

# Rows are padded to an odd number of these, so that rows start on cache lines and no two rows
# that stream together fall on the same cache sets.
ROW_ALIGNMENT = 128


class History:
    """Curvature pairs of one flat vector.

    A pair belongs to the parameters that it was taken on (:class:`~fuse_ext.vector.flat.Part`), and
    only pairs of the present ones make a direction: one that was taken without a parameter knows
    nothing of it, and in one that was taken with it y holds what its step did to the gradients of
    the others. Pairs of other parameters wait in the ring until their turn or their end.

    Args:
        flat: The parameters.
        ops: Kernels to use.
        entry: The state entry that holds ``history`` [2, m + 1, d], ``scalars`` and, if needed,
            ``grad_prev`` [d] and ``history_scale``; filled here, taken over where it already holds
            them. ``sets`` lists the parameters that were absent, for each set that was met, and
            ``set`` is the place of the present one.
        history_size: m, the number of pairs.
        dtype: Of the rows; None for the state's. int8 rows have one float32 scale per 128
            elements.
        grad_prev_apart: Keep the previous gradient in a vector of its own in any case.
        apart: Keep all of it in the host's memory, though the parameters are on a device.
    """

    kind, forgets = "pairs", True

    def __init__(
        self,
        flat: FlatParams,
        ops: Ops,
        entry: dict[str, Any],
        history_size: int,
        dtype: torch.dtype | None,
        grad_prev_apart: bool = False,
        apart: bool = False,
    ) -> None:
        self._flat, self._ops, self._entry = flat, ops, entry
        self.part = flat.whole
        self.slots = history_size + 1
        self.dtype = flat.dtype if dtype is None else dtype
        self._staging = Staging(flat, ops, self.dtype) if apart else None
        self._bounds: dict[tuple[int, ...], BoundOps] = {}
        self._bound = self._bound_to(self.part)
        there = kernels.scalars_device(ops, flat.device)

        def memory(*shape: int, dtype: torch.dtype) -> Tensor:
            if apart:
                return on_host(shape, dtype, flat)
            return torch.empty(shape, dtype=dtype, device=flat.device)

        padded = (flat.numel + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT
        if padded // ROW_ALIGNMENT % 2 == 0:
            padded += ROW_ALIGNMENT
        # Zeroed, since a checkpoint must not carry stray memory, but only after the advice: pages
        # that were touched before stay small.
        rows = memory(2, self.slots, padded, dtype=self.dtype)
        kernels.advise_large_pages(rows)
        rows.zero_()
        self.rows = rows[:, :, : flat.numel]
        self.scalars = ring.new_scalars(self.slots, HOST if apart else there)
        self.grad_prev = (
            None
            if self.dtype == flat.dtype and not grad_prev_apart
            else memory(flat.numel, dtype=flat.dtype).zero_()
        )
        blocks = (flat.numel + SCALE_BLOCK - 1) // SCALE_BLOCK
        self.scales = (
            memory(2, self.slots, blocks, dtype=torch.float32).zero_()
            if self.dtype == torch.int8
            else None
        )
        # Norms of the gradient, and behind them the loss where it would be waited for alone.
        with_loss = torch.zeros(len(STATS) + 1, dtype=torch.float64, device=there)
        self._stats = with_loss[:-1]
        self._with_loss = with_loss if is_remote(flat.device) else None
        tensors = {"history": self.rows, "scalars": self.scalars}
        if self.grad_prev is not None:
            tensors["grad_prev"] = self.grad_prev
        if self.scales is not None:
            tensors["history_scale"] = self.scales
        if "broyden" in entry:
            tensors["broyden"] = ring.new_broyden(self.slots, self.scalars.device)
        self._broyden = tensors.get("broyden")
        if "scalars" in entry:
            entry["scalars"] = ring.with_sets(entry["scalars"], self.slots)
        for name, tensor in tensors.items():
            if name in entry:
                tensor.copy_(entry[name])
            entry[name] = tensor
        strides = memory_order(flat)
        if strides:
            entry["strides"] = strides
        if "sets" in entry:
            self.enter(flat.part(tuple(entry["sets"][entry["set"]])))

    def enter(self, part: Part) -> bool:
        """From now on directions and pairs are of these parameters.

        Returns:
            Whether they were others before.
        """
        known = "sets" in self._entry
        if known and part.absent == self.part.absent:
            return False
        self.part, self._bound = part, self._bound_to(part)
        self._note_size()
        absent = list(part.absent)
        sets = self._entry.setdefault("sets", [])
        if absent not in sets:
            if len(sets) >= MOST_PARTS:
                sets.clear()
                self.reset()
            sets.append(absent)
        before, self._entry["set"] = self._entry.get("set", 0), sets.index(absent)
        if before != self._entry["set"]:
            self.note_set()
        return known and before != self._entry["set"]

    def note_set(self) -> None:
        """Tells the recursion which pairs are of the present parameters."""
        self.scalars[ring.index("set", self.slots)].fill_(self._entry["set"])

    def _bound_to(self, part: Part) -> BoundOps:
        if part.absent not in self._bounds:
            if len(self._bounds) > MOST_PARTS:
                self._bounds.clear()
            staging, ops = self._staging, self._ops
            self._bounds[part.absent] = (
                bound_ops(ops, part) if staging is None else HostRows(ops, part, staging)
            )
        return self._bounds[part.absent]

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        apart = sum(t.nbytes for t in (self.grad_prev, self.scales) if t is not None)
        apart += 0 if self._broyden is None else self._broyden.nbytes
        return self.rows.untyped_storage().nbytes() + self.scalars.nbytes + apart

    @property
    def host_nbytes(self) -> int:
        """Bytes in the host's memory that would else be the device's, scratch included."""
        return 0 if self._staging is None else self.nbytes + self._staging.sent.nbytes

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch on the device."""
        return 0 if self._staging is None else self._staging.nbytes

    def header(self) -> Header:
        """The scalars the host decides by."""
        return ring.read_header(self.scalars)

    def scale_itself(self) -> None:
        """From now on each pair scales the inverse Hessian before it (csrc/two_loop.h)."""
        self.scalars[ring.index("self_scaling", self.slots)] = 1.0

    def update_as_broyden(self) -> None:
        """From now on H is that of the Broyden update (csrc/broyden_pairs.h) of the pairs to come.

        Those held make it alone, with BFGS, until the next one is there.
        """
        self._broyden = ring.new_broyden(self.slots, self.scalars.device)
        self._entry["broyden"] = self._broyden
        self._note_size()

    def _note_size(self) -> None:
        """Tells the update how many parameters pairs are of, the same on all ranks."""
        if self._broyden is not None:
            params = [self._flat.params[i] for i in self.part.indices]
            numel = sum(p.numel() * (2 if p.is_complex() else 1) for p in params)
            self._broyden[ring.broyden_index("taking_part", self.slots)] = numel

    def stop_scaling(self) -> None:
        """From now on they do not, nor do those held; the newest one's scale is the initial one.

        And the update is BFGS.
        """
        self._broyden = None
        self._entry.pop("broyden", None)
        scalars, slots = self.scalars, self.slots
        scalars[ring.index("self_scaling", slots)] = 0.0
        ring.array(scalars, "growth", slots).zero_()
        for i in ring.held_slots(scalars, slots)[:1]:
            ratio = [ring.array(scalars, name, slots)[i, i] for name in ("gram_sy", "gram_yy")]
            scalars[ring.index("gamma", slots)] = ratio[0] / ratio[1]

    def reset(self) -> None:
        """Forgets all pairs; the counters stay."""
        self._entry[SET_ASIDE] = []
        self._say(0.0, 0.0, 0.0)

    def _say(self, *values: float) -> None:
        """Whether there are pairs: without it they are but numbers in memory."""
        for name, value in zip(OF_PAIRS, values, strict=True):
            self.scalars[ring.index(name, self.slots)] = value

    def set_aside(self, besides: Sequence[float] = ()) -> None:
        """:meth:`reset`, until :meth:`take_up`, which gives back what is to be kept ``besides``."""
        header = self.header()
        self.reset()
        self._entry[SET_ASIDE] = [*(getattr(header, name) for name in OF_PAIRS), *besides]

    def take_up(self) -> list[float] | None:
        """Has again what was set aside; None where nothing was, or something was learnt since."""
        held, self._entry[SET_ASIDE] = self._entry.get(SET_ASIDE), []
        header = self.header()
        if not held or header.count > 0 or header.usable > 0:
            return None
        self._say(*held[: len(OF_PAIRS)])
        return held[len(OF_PAIRS) :]

    def stats(
        self,
        grads: list[Tensor],
        decay: list[float],
        maximize: bool,
        along_direction: bool,
        loss: Any = None,
        part: Part | None = None,
        absent: tuple[int, ...] = (),
    ) -> tuple[GradStats, float]:
        """Norms of the gradient, its slope along the current direction, and the loss as a number.

        NaN where no loss is given. On a device the host waits once for all of it. ``part``: whose
        gradients these are, if not those of the parameters of the direction. ``absent``: who has
        none at all, which ranks have to agree on (PartsDiffer).
        """
        bound = self._bound if part is None else self._bound_to(part)
        if isinstance(bound, ReducedOps):
            rows = self.rows if along_direction else None
            own = bound.norms(grads, decay, maximize, rows, self.scalars, self._stats, self.scales)
            *norms, value = self._flat.measures.point(own, loss, absent)
            return GradStats(*norms), value
        rows, scalars, scales = None, None, None
        if along_direction:
            rows, scalars, scales = self.rows, self.scalars, self.scales
        given = loss if isinstance(loss, Tensor) else None
        numbers = bound.grad_stats(
            grads, decay, maximize, rows, scalars, self._stats, scales, given, self._with_loss
        )
        value = numbers.pop()
        if given is None:
            value = math.nan if loss is None else float(loss)
        return GradStats(*numbers), value

    def update(
        self,
        grads: list[Tensor],
        decay: list[float],
        maximize: bool,
        pair_step: float | None,
        curvature_tol: float,
    ) -> None:
        """Dots of the gradient with all rows and the two-loop recursion on them.

        With ``pair_step`` = t, first forms the pair s = t p, y = g - g_prev, and keeps it when
        s.y > curvature_tol |s| |y|.
        """
        self._bound.lbfgs_update(
            grads,
            decay,
            maximize,
            self.rows,
            self.grad_prev,
            self.scalars,
            self.scales,
            pair_step,
            curvature_tol,
            self._broyden,
            False,
        )

    def direction(
        self, grads: list[Tensor], decay: list[float], lr_scale: list[float], maximize: bool
    ) -> Header:
        """p = -H g into the open slot, g into g_prev; to be called after :meth:`update`."""
        held = self.rows, self.grad_prev, self.scalars, self.scales
        return Header(*self._bound.lbfgs_direction(grads, decay, lr_scale, maximize, *held))

    def update_direction(
        self,
        grads: list[Tensor],
        decay: list[float],
        lr_scale: list[float],
        maximize: bool,
        pair_step: float | None,
        curvature_tol: float,
        origin: Tensor | None = None,
        step: float = 0.0,
        least_slope: float = 0.0,
    ) -> tuple[Header, bool]:
        """:meth:`update`, then p = -H g into the open slot and g into g_prev, in one call.

        With ``origin``, which becomes the parameters, also :meth:`move` by ``step``, where pairs
        are usable, p is finite and -g.p > ``least_slope``. Says whether it did.
        """
        numbers = self._bound.lbfgs_update_direction(
            grads,
            decay,
            lr_scale,
            maximize,
            self.rows,
            self.grad_prev,
            self.scalars,
            self.scales,
            pair_step,
            curvature_tol,
            origin,
            step,
            least_slope,
            self._broyden,
        )
        moved = numbers.pop() != 0.0
        return Header(*numbers), moved

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Copies of s and y of the usable pairs, oldest first, in the state's dtype."""
        rows = Rows(self.rows, self.scales, self._flat.dtype)
        scale = ring.array(self.scalars, "row_scale", self.slots).tolist()
        slots = reversed(ring.usable_slots(self.scalars, self.slots))
        return [(rows.read(0, i) * scale[i], rows.read(1, i).clone()) for i in slots]

    def waiting(self) -> tuple[Tensor, Tensor]:
        """Copies of the direction, and of the gradient where it began."""
        rows = Rows(self.rows, self.scales, self._flat.dtype)
        direction = rows.read(0, int(self.header().open))
        return direction.clone(), self._grad_prev().clone()

    def set_grad_prev(self, grad: Tensor) -> None:
        """Puts another gradient in the place of the one that y will be taken from."""
        self._grad_prev().copy_(grad)

    def _grad_prev(self) -> Tensor:
        """Where it lies."""
        return self.rows[1, int(self.header().open)] if self.grad_prev is None else self.grad_prev

    def move(self, origin: Tensor, step: float, save: bool) -> None:
        """Parameters = origin + step * p; with ``save`` origin = parameters first."""
        self._bound.lbfgs_move(origin, self.rows, self.scalars, self.scales, step, save)

    def blend(self, origin: Tensor, theta: float, step: float) -> None:
        """Algorithm 3's mixture of the current parameters (Adam's) and origin + step * p."""
        held = self.rows, self.scalars, self.scales
        if isinstance(self._bound, HostRows):
            return self._bound.fuse_blend(origin, *held, theta, step)
        blend(self._ops, self._bound, self.part, origin, *held, theta, step)
