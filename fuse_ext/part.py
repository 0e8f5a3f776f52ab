"""The parameters that take part in a step: all of them, or those that have a gradient and may move.

The rest is not touched: kernels read flat indices that no parameter covers as zeros and never
write them (csrc/segments.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fuse_ext import _C

if TYPE_CHECKING:
    from fuse_ext.flat import FlatParams


class Part:
    """Some parameters of a flat vector, at their places in it.

    Args:
        flat: The layout of all.
        absent: Which of its parameters are not among them, in order.

    Attributes:
        indices: Which are.
        params, offsets: Those parameters, and where each begins in the flat vector.
        layout: What C++ knows of them.
    """

    def __init__(self, flat: FlatParams, absent: tuple[int, ...]) -> None:
        self.flat, self.absent = flat, absent
        left_out = set(absent)
        self.indices = [i for i in range(len(flat.params)) if i not in left_out]
        self.params = [flat.params[i] for i in self.indices] if absent else flat.params
        self.offsets = [flat.offsets[i] for i in self.indices] if absent else flat.offsets
        self.layout = _C.Layout([self.params], self.offsets) if absent else flat.layout

    def pick(self, values: list[Any]) -> list[Any]:
        """Of one value for each parameter of the flat vector those of this part; [] stays []."""
        return [values[i] for i in self.indices] if values and self.absent else values

    def reals(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors, complex ones as real views of shape [..., 2]."""
        return self.flat.reals(tensors)
