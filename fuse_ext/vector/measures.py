"""Dots and norms of flat vectors, behind one small protocol.

Whoever decides by the size of a vector asks here, so that a vector that is spread over several
ranks can answer with sums over all of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Measures(Protocol):
    """Numbers that a whole vector yields, and that everyone who holds a part of it agrees on."""

    def dot(self, a: Tensor, b: Tensor) -> float:
        """a.b of two flat vectors."""

    def norm(self, a: Tensor) -> float:
        """|a| of a flat vector, or of a part of it."""

    def largest(self, tensors: list[Tensor]) -> float:
        """max |x| over tensors of any shape, of which one at least is not empty."""


class Local:
    """Measures of a vector that lies in this process as a whole."""

    def dot(self, a: Tensor, b: Tensor) -> float:
        """See :class:`Measures`."""
        return float(a.dot(b))

    def norm(self, a: Tensor) -> float:
        """See :class:`Measures`."""
        return float(a.norm())

    def largest(self, tensors: list[Tensor]) -> float:
        """See :class:`Measures`."""
        # Empty tensors have no largest element.
        held = [x.detach() for x in tensors if x.numel()]
        ends = [torch.aminmax(x.abs() if x.is_complex() else x) for x in held]
        return float(torch.stack([end for pair in ends for end in pair]).abs().max())


LOCAL = Local()
