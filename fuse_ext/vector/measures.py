"""Sums, norms and agreements on flat vectors, behind one small protocol.

Whoever decides anything by a number asks here, so that a vector that is spread over several ranks,
or held by several, answers with one number for all of them: every rank then takes the same branch,
and calls the closure as often as the others (:mod:`fuse_ext.vector.ranks`).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

# How sums, and how largest values, of a point lie in what ranks exchange: the order of GradStats.
POINT_SUMS = 4


class Measures(Protocol):
    """Numbers that a whole vector yields, and that everyone who holds a part of it agrees on.

    Attributes:
        ranks: How many those are; every method is a collective call of theirs, but for 1.
    """

    ranks: int

    def largest(self, tensors: list[Tensor]) -> float:
        """max |x| over tensors of any shape, of which one at least is not empty."""

    def total(self, *numbers: float) -> list[float]:
        """Sums of what each rank has of them."""

    def any(self, *flags: bool) -> list[bool]:
        """Whether they are true on any rank."""

    def point(self, norms: list[float], loss: Any, absent: tuple[int, ...]) -> list[float]:
        """The norms of a gradient (:class:`GradStats`) and the loss, NaN where there is none.

        ``norms`` are those of what lies here, weighted by how many ranks hold it; the loss is the
        mean of all.

        Raises:
            PartsDiffer: ``absent``, the parameters without a gradient, is not the same everywhere.
            ValueError: Some ranks have a loss and others none.
        """


class PartsDiffer(Exception):
    """Ranks have gradients of different parameters."""


class Local:
    """Measures of a vector that lies in this process as a whole."""

    ranks = 1

    def largest(self, tensors: list[Tensor]) -> float:
        """See :class:`Measures`."""
        # Empty tensors have no largest element.
        held = [x.detach() for x in tensors if x.numel()]
        ends = [torch.aminmax(x.abs() if x.is_complex() else x) for x in held]
        return float(torch.stack([end for pair in ends for end in pair]).abs().max())

    def total(self, *numbers: float) -> list[float]:
        """See :class:`Measures`."""
        return list(numbers)

    def any(self, *flags: bool) -> list[bool]:
        """See :class:`Measures`."""
        return list(flags)

    def point(self, norms: list[float], loss: Any, absent: tuple[int, ...]) -> list[float]:
        """See :class:`Measures`."""
        return [*norms, math.nan if loss is None else float(loss)]


LOCAL = Local()
