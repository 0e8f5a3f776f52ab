"""The ops on a flat vector that several ranks hold: passes over what lies here, sums over all.

Vectors stay where they are. Each pass leaves a few float64 scalars, which one all-reduce sums: the
dots of pass 1 (four times m + 1 numbers; two times without a pair), the three numbers of a
direction, or the norms of a gradient. What follows from scalars alone, the recursion, runs on every
rank, on the same numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse_ext import _C
from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.bound_ops import BoundOps, bind, one_after_another
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.reference.memory import SCALE_BLOCK
from fuse_ext.kernels.scalars import HEADER
from fuse_ext.vector.flat import FlatParams, Part

# Where what a direction is judged by lies in the scalars: two sums and a maximum.
_SUMS = slice(HEADER.index("direction_dot_grad"), HEADER.index("direction_sq") + 1)
_LARGEST = HEADER.index("direction_max")


class Piece(NamedTuple):
    """What of a part lies in one stretch of the flat vector.

    Attributes:
        place: The stretch.
        blocks: The same, in the blocks that share a scale.
        members: Which of the part's lists belong to it.
        share: What it counts in sums over ranks.
        segments: Its parameters and where they begin in the stretch.
        bound: The ops on them.
    """

    place: slice
    blocks: slice
    members: slice
    share: float
    segments: Segments
    bound: BoundOps


class Segments:
    """Parameters and their places in one stretch; see :class:`fuse_ext.kernels.bound_ops`."""

    def __init__(self, flat: FlatParams, params: list[Tensor], offsets: list[int]) -> None:
        self._flat, self.params, self.offsets = flat, params, offsets
        self.layout = _C.Layout([params], offsets)

    def reals(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors, complex ones as real views of shape [..., 2]."""
        return self._flat.reals(tensors)


def bound_ops(ops: Ops, part: Part) -> BoundOps:
    """The ops on a part of a flat vector, whoever holds it."""
    return bind(ops, part) if part.flat.together is None else ReducedOps(ops, part)


def blend(
    ops: Ops,
    bound: BoundOps,
    part: Part,
    origin: Tensor,
    history: Tensor,
    scalars: Tensor,
    scales: Tensor | None,
    theta: float,
    step: float,
) -> None:
    """Algorithm 3 on a part of a flat vector, whoever holds it."""
    if isinstance(bound, ReducedOps):
        return bound.fuse_blend(origin, history, scalars, scales, theta, step)
    params = part.reals(part.params)
    ring_and_step = origin, history, scalars, theta, step
    return ops.fuse_blend(params, part.offsets, *ring_and_step, history_scale=scales)


class ReducedOps:
    """:class:`~fuse_ext.kernels.bound_ops.BoundOps` over ranks; all but moves are collective.

    Args:
        ops: Kernels to use.
        part: The parameters.
    """

    def __init__(self, ops: Ops, part: Part) -> None:
        self._ops, self._flat = ops, part.flat
        together = part.flat.together
        assert together is not None
        self._together = together
        self._pieces: list[Piece] = []
        first = 0
        for stretch in part.flat.stretches:
            inside = set(stretch.members)
            count = sum(i in inside for i in part.indices)
            members, place = slice(first, first + count), stretch.place
            first += count
            offsets = [offset - place.start for offset in part.offsets[members]]
            segments = Segments(part.flat, part.params[members], offsets)
            blocks = slice(place.start // SCALE_BLOCK, -(-place.stop // SCALE_BLOCK))
            bound = bind(ops, segments)
            self._pieces.append(Piece(place, blocks, members, stretch.share, segments, bound))

    @staticmethod
    def _scales(scales: Tensor | None, piece: Piece) -> Tensor | None:
        """Of the rows' blocks in one stretch; ops want them dense, so perhaps a copy."""
        return None if scales is None else scales[:, :, piece.blocks].contiguous()

    @staticmethod
    def _put_back(scales: Tensor | None, piece: Piece, own: Tensor | None) -> None:
        if scales is not None and own is not None:
            place = scales[:, :, piece.blocks]
            if place.data_ptr() != own.data_ptr() or place.stride() != own.stride():
                place.copy_(own)

    def adam_step(self, grads: list[Tensor], *rest: Any) -> None:
        """Eq. 2 on what lies here; its sum of squares becomes this rank's share of the whole."""
        exp_avg, exp_avg_sq, max_exp_avg_sq, stats, grad_scale, *numbers = rest
        total = torch.zeros_like(stats)
        for piece in self._pieces:
            piece.bound.adam_step(
                grads[piece.members],
                exp_avg[piece.place],
                exp_avg_sq[piece.place],
                None if max_exp_avg_sq is None else max_exp_avg_sq[piece.place],
                stats,
                grad_scale,
                *numbers,
            )
            total.add_(stats, alpha=piece.share)
        stats.copy_(total)

    def norms(
        self,
        grads: list[Tensor],
        decay: list[float],
        maximize: bool,
        history: Tensor | None,
        scalars: Tensor | None,
        stats: Tensor,
        scales: Tensor | None,
    ) -> list[float]:
        """This rank's share of the entries of GradStats; no collective call."""
        total = [0.0] * len(stats)
        for piece in self._pieces:
            *found, _ = piece.bound.grad_stats(
                grads[piece.members],
                decay[piece.members],
                maximize,
                None if history is None else history[:, :, piece.place],
                None if history is None else scalars,
                stats,
                None if history is None else self._scales(scales, piece),
                None,
                None,
            )
            *sums, largest = found
            total = [
                *(a + piece.share * b for a, b in zip(total, sums, strict=False)),
                largest if not largest <= total[-1] else total[-1],  # NaN is the largest
            ]
        return total

    def grad_stats(self, grads: list[Tensor], *rest: Any) -> list[float]:
        """The whole gradient's, and the loss's mean."""
        *arguments, loss, _ = rest
        norms = self.norms(grads, *arguments)
        return self._flat.measures.point(norms, loss, ())

    def lbfgs_update(self, grads: list[Tensor], *rest: Any) -> None:
        """Pass 1, the sums of its dots, and the recursion."""
        decay, maximize, history, grad_prev, scalars, scales, pair_step, *pair = rest
        curvature_tol, broyden, scaled = pair
        slots, forms_pair = history.size(1), pair_step is not None
        names = ("grad_s", "grad_y", "y_s", "y_y")[: 4 if forms_pair else 2]
        dots = [ring.array(scalars, name, slots) for name in names]
        total = torch.zeros(len(names), slots, dtype=scalars.dtype, device=scalars.device)
        for piece in self._pieces:
            for array in dots:
                array.zero_()  # of slots that hold nothing
            own = self._scales(scales, piece)
            self._ops.lbfgs_update(
                piece.segments.reals(piece.segments.params),
                grads[piece.members],
                piece.segments.offsets,
                decay[piece.members],
                maximize,
                history[:, :, piece.place],
                None if grad_prev is None else grad_prev[piece.place],
                scalars,
                forms_pair,
                history_scale=own,
            )
            self._put_back(scales, piece, own)
            for row, array in zip(total, dots, strict=True):
                row.add_(array, alpha=piece.share)
        found, _ = self._together.add(total.view(-1))
        for row, array in zip(found.view(len(names), slots), dots, strict=True):
            array.copy_(row)
        if forms_pair:
            opened = scalars[HEADER.index("open")].long()
            scalars[ring.index("y_dot_y", slots)] = dots[3][opened]
        step_length = pair_step if forms_pair else 0.0
        self._ops.lbfgs_two_loop(
            scalars, slots, forms_pair, step_length, curvature_tol, broyden=broyden, scaled=scaled
        )

    def lbfgs_direction(self, grads: list[Tensor], *rest: Any) -> list[float]:
        """Pass 2, and the sums of what the direction is judged by."""
        decay, lr_scale, maximize, history, grad_prev, scalars, scales = rest
        sums, largest = scalars.new_zeros(2), scalars.new_zeros(1)
        for piece in self._pieces:
            own = self._scales(scales, piece)
            piece.bound.lbfgs_direction(
                grads[piece.members],
                decay[piece.members],
                lr_scale[piece.members],
                maximize,
                history[:, :, piece.place],
                None if grad_prev is None else grad_prev[piece.place],
                scalars,
                own,
            )
            self._put_back(scales, piece, own)
            sums.add_(scalars[_SUMS], alpha=piece.share)
            largest = torch.maximum(largest, scalars[_LARGEST])
        found, most = self._together.add(sums, largest)
        assert most is not None
        scalars[_SUMS], scalars[_LARGEST] = found, most[0]
        return list(scalars[: len(HEADER)].tolist())

    def lbfgs_update_direction(self, grads: list[Tensor], *rest: Any) -> list[float]:
        """Both, and with ``origin`` perhaps the move."""
        return one_after_another(self, grads, *rest)

    def lbfgs_move(
        self,
        origin: Tensor,
        history: Tensor,
        scalars: Tensor,
        history_scale: Tensor | None,
        step: float,
        save: bool,
    ) -> None:
        """Parameters = origin + step * p, of what lies here."""
        self._flat.note_move()
        for piece in self._pieces:
            piece.bound.lbfgs_move(
                origin[piece.place],
                history[:, :, piece.place],
                scalars,
                self._scales(history_scale, piece),
                step,
                save,
            )

    def fuse_blend(
        self,
        origin: Tensor,
        history: Tensor,
        scalars: Tensor,
        history_scale: Tensor | None,
        theta: float,
        step: float,
    ) -> None:
        """Algorithm 3, and the sum of what the step's square is."""
        self._flat.note_move()
        place, total = HEADER.index("direction_sq"), scalars.new_zeros(1)
        for piece in self._pieces:
            own = self._scales(history_scale, piece)
            self._ops.fuse_blend(
                piece.segments.reals(piece.segments.params),
                piece.segments.offsets,
                origin[piece.place],
                history[:, :, piece.place],
                scalars,
                theta,
                step,
                history_scale=own,
            )
            self._put_back(history_scale, piece, own)
            total.add_(scalars[place], alpha=piece.share)
        scalars[place] = self._together.add(total)[0][0]
