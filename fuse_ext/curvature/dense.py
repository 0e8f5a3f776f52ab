"""A dense inverse Hessian with the self-scaled Broyden update (csrc/broyden.h).

For few parameters, and one function at every call: there it takes far fewer iterations than any
number of pairs, each of which costs one read of the matrix.

Memory, for d parameters: 4 d (d + 8) bytes for the lower triangle in float64, whatever the
parameters' dtype, 2 k + 1 vectors of float64 (k = :func:`terms_apart`) and 5 of the state's dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.ring import History
from fuse_ext.curvature.ring_state import OF_PAIRS, SET_ASIDE, check_ring_state
from fuse_ext.kernels import ops as kernels
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.scalars import (
    MOST_TERMS,
    TERM_SIZE,
    TILE,
    Header,
    matrix_place,
    matrix_size,
)
from fuse_ext.kernels.scalars import index as scalar_index
from fuse_ext.vector.flat import FlatParams, Part
from fuse_ext.vector.gradients import GradStats, effective_gradient

# What a state entry holds of it, beside what the ring of one pair holds.
MATRIX_NAMES = ("matrix", "matrix_vectors", "matrix_scalars")
# Formulas of the update.
BROYDEN, BFGS = "broyden", "bfgs"
# The ring's slots: one pair, which is never closed, and the open one.
_SLOTS = 2


def terms_apart(numel: int) -> int:
    """Pairs that are kept as vectors before the matrix takes them in.

    k pairs cost 4 k d numbers read an iteration, and spare the d^2 of reading and writing the
    matrix in all iterations but one in k: least together near k = sqrt(d) / 2.
    """
    return max(4, min(round(math.sqrt(numel) / 2), MOST_TERMS))


def matrix_nbytes(numel: int) -> int:
    """Bytes of the matrix alone."""
    return 8 * matrix_size(numel)


class DenseMatrix:
    """H as a matrix; otherwise as :class:`~fuse_ext.curvature.ring.History`, whose methods say how.

    The ring of one pair beside it holds the direction, the previous gradient and the scalars that
    the host decides by. The matrix is of the parameters that take part: with others it begins anew.

    Args:
        flat: The parameters.
        ops: Kernels to use.
        entry: The state entry, filled or taken over: ``matrix`` [tiles * 64] (float64, the lower
            triangle in tiles of 8 x 8), ``matrix_vectors`` [2 k + 1, about d], ``matrix_scalars``,
            and the ring's.
        update: "broyden" or "bfgs".
        self_scaling: Divide H by tau at each pair.
    """

    kind, forgets = "dense", False

    def __init__(
        self,
        flat: FlatParams,
        ops: Ops,
        entry: dict[str, Any],
        update: str = BROYDEN,
        self_scaling: bool = True,
    ) -> None:
        self._flat, self._ops = flat, ops
        self._ring = History(flat, ops, entry, 1, None)
        self._update, self._self_scaling = update, self_scaling
        where = kernels.scalars_device(ops, flat.device)
        numel, terms = flat.numel, terms_apart(flat.numel)
        # An odd number of tiles: no two rows that stream together fall on the same cache sets.
        stride = TILE * (-(-numel // TILE) | 1)
        self._matrix = kernels.zeros_in_large_pages(matrix_size(numel), torch.float64, flat.device)
        self._vectors = torch.zeros(2 * terms + 1, stride, dtype=torch.float64, device=flat.device)
        size = matrix_place("header") + TERM_SIZE * terms
        self._scalars = torch.zeros(size, dtype=torch.float64, device=where)
        tensors = self._matrix, self._vectors, self._scalars
        for name, tensor in zip(MATRIX_NAMES, tensors, strict=True):
            if name in entry:
                tensor.copy_(entry[name])
            entry[name] = tensor
        self._grad = flat.new_vector()
        self._shares: tuple[list[float], Tensor | None] = [], None

    @property
    def part(self) -> Part:
        """The parameters that directions and pairs are of."""
        return self._ring.part

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        return self._ring.nbytes + sum(
            t.nbytes for t in (self._matrix, self._vectors, self._scalars)
        )

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch: the gradient as one vector."""
        return self._grad.nbytes

    def enter(self, part: Part) -> bool:
        """From now on directions and pairs are of these parameters; whether that is new."""
        if not self._ring.enter(part):
            return False
        self.reset()
        return True

    def header(self) -> Header:
        """The scalars the host decides by; ``count`` is of the pairs that the matrix has seen."""
        header = self._ring.header()
        header.count, header.self_scaling = header.usable, float(self._self_scaling)
        return header

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
        """See :meth:`History.stats`."""
        return self._ring.stats(grads, decay, maximize, along_direction, loss, part, absent)

    def update(
        self,
        grads: list[Tensor],
        decay: list[float],
        maximize: bool,
        pair_step: float | None,
        curvature_tol: float,
    ) -> None:
        """See :meth:`History.update`; the direction follows at once."""
        self._step(grads, decay, [], maximize, pair_step, curvature_tol)

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
        """See :meth:`History.update_direction`."""
        self._step(grads, decay, lr_scale, maximize, pair_step, curvature_tol)
        header = self.header()
        if origin is None or not header.allows(least_slope):
            return header, False
        self._ring.move(origin, step, True)
        return header, True

    def _offer(self, s: Tensor, y: Tensor) -> None:
        """Takes a pair in, with BFGS, since of B s nothing is known."""
        self._ring.rows[0, 0].copy_(s)
        self._ring.rows[1, 0].zero_()
        self._put("known", 0.0)
        self._put("exact", 0.0)
        self._direction(y, None, 1.0, 0.0)

    def take_over(self, ring: History) -> None:
        """Begins with a ring's pairs and the step that it was on; what they count, it has counted.

        With BFGS for those pairs.
        """
        self.enter(ring.part)
        direction, grad_prev = ring.waiting()
        for s, y in ring.pairs():
            self._offer(s, y)
        for name in ("accepted", "skipped"):
            self._ring.scalars[scalar_index(name, _SLOTS)] = 0.0
        self._ring.rows[0, 0].copy_(direction)
        self.set_grad_prev(grad_prev)

    def set_grad_prev(self, grad: Tensor) -> None:
        """See :meth:`History.set_grad_prev`; the step's direction stays."""
        self._ring.rows[1, 0].copy_(grad)
        self._put("known", 0.0)
        self._put("exact", 0.0)

    def move(self, origin: Tensor, step: float, save: bool) -> None:
        """Parameters = origin + step * p; with ``save`` origin = parameters first."""
        self._ring.move(origin, step, save)

    def reset(self) -> None:
        """Forgets all pairs; the counters stay."""
        self._scalars.zero_()
        self._ring.reset()

    def set_aside(self) -> None:
        """See :meth:`History.set_aside`."""
        held = self._scalars.tolist()
        self._scalars.zero_()
        self._ring.set_aside(held)

    def take_up(self) -> list[float] | None:
        """See :meth:`History.take_up`."""
        held = self._ring.take_up()
        if held is not None:
            self._scalars.copy_(torch.tensor(held, dtype=torch.float64))
            self._put("known", 0.0)  # the direction was -g since: of B s nothing is known
            self._put("exact", 0.0)
        return held

    def _put(self, name: str, value: float) -> None:
        self._scalars[matrix_place(name)] = value

    def _step(
        self,
        grads: list[Tensor],
        decay: list[float],
        lr_scale: list[float],
        maximize: bool,
        pair_step: float | None,
        curvature_tol: float,
    ) -> None:
        grad = effective_gradient(
            self._flat, self._ops, self.part, grads, decay, maximize, self._grad
        )
        self._direction(grad, self._flat_shares(lr_scale), pair_step, curvature_tol)

    def _direction(
        self, grad: Tensor, shares: Tensor | None, pair_step: float | None, curvature_tol: float
    ) -> None:
        self._ops.dense_direction(
            grad,
            self._ring.rows[1, 0],
            self._ring.rows[0, 0],
            self._matrix,
            self._vectors,
            self._scalars,
            self._ring.scalars,
            shares,
            pair_step,
            curvature_tol,
            self.part.numel,
            self._update == BROYDEN,
            self._self_scaling,
        )

    def _flat_shares(self, lr_scale: list[float]) -> Tensor | None:
        """A share for each element; None where all are 1."""
        if all(share == 1.0 for share in lr_scale):
            return None
        key = [*lr_scale, *self.part.indices]
        if self._shares[0] != key:
            shares = torch.ones_like(self._grad)
            for i, share in zip(self.part.indices, lr_scale, strict=True):
                self._flat.stretch(shares, i).fill_(share)
            self._shares = key, shares
        return self._shares[1]


def check_matrix_state(entry: dict[str, Any], flat: FlatParams) -> None:
    """Raises ValueError unless a state entry holds a matrix of these parameters."""
    check_ring_state(entry, _SLOTS, flat)
    numel = flat.numel
    terms = terms_apart(numel)
    shapes = {
        "matrix": (matrix_size(numel),),
        "matrix_vectors": (2 * terms + 1, TILE * (-(-numel // TILE) | 1)),
        "matrix_scalars": (matrix_place("header") + TERM_SIZE * terms,),
    }
    for name, expected in shapes.items():
        held = entry.get(name)
        shape = tuple(held.shape) if isinstance(held, Tensor) else None
        if shape != expected:
            raise ValueError(
                f"state_dict does not fit: {name} has shape {shape}, expected {expected} "
                f"({numel} parameters)"
            )
    aside = entry.get(SET_ASIDE)
    if aside and len(aside) != len(OF_PAIRS) + shapes["matrix_scalars"][0]:
        raise ValueError(f"state_dict does not fit: {SET_ASIDE} has {len(aside)} numbers")
    held = float(entry["matrix_scalars"][matrix_place("terms")])
    if not 0 <= held < terms:
        raise ValueError(
            f"state_dict does not fit: matrix_scalars say that {held} terms are held, with room "
            f"for {terms}"
        )
