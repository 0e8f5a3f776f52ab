"""Which sides of a weight get a basis, and of what part of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse_ext.vector.flat import FlatParams, ParamGroup
from fuse_ext.vector.shards import largest_here, shards_of

# Covariances of rows and columns, in a parameter's own state.
FACTORS = ("row_factor", "column_factor")

# A side up to this long gets a basis; a longer one stays as it is. With a side of length a on both
# sides of a matrix a step costs 10 a operations an element, where the gradient costs 6 for every
# row of the batch. A transformer of width 128 on text (sides of 128, 384 and 512, 1,024 rows) took
# 97 s for a loss of 1.236 with this limit, 76 s for 1.295 in fewer steps, and 75 s for 1.321 with
# a limit of 256; AdamW 64 s for 1.59. Much longer ones do not pay on a CPU, nor do the sides of
# inputs always: KMNIST's 784 cost accuracy. On a GPU, which multiplies matrices best, nothing has
# been measured yet.
LONGEST_SIDE = {"cpu": 512, "cuda": 2048}
# A side that is more than so many times as long as the other is divided into blocks that are not,
# each of them with its own rows and columns a matrix of its own, as distributed Shampoo divides
# weights (Anil et al., arXiv 2002.09018). Whole it would be dear: a matrix of a x b has a b
# parameters, and the longer side's covariance and basis 8 a^2 bytes, 8 a / b a parameter, and 10 a
# operations an element: 2,048 bytes of a weight of 512 x 2, and as many of an adapter of 2,048 x 8
# (LoRA) on a GPU. So it is at most 121 bytes, and all that the phase holds at most 133. Without a
# basis a DenseNet (convolutions of 8 x 144 to 8 x 360) was at 43.6% on CIFAR-10, with whole ones at
# 48.4 +- .9, in blocks at 47.7 +- .4; a CNN with a head of 10 x 256 on USPS at 92.2, 94.0, 93.9.
MOST_TIMES_LONGER = 15
# A matrix with a side beyond it is taken for an embedding, few of whose rows have a gradient.
EMBEDDING_SIDE = 8192


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """A weight as a matrix: its first dimension, and all others."""
    rows = param.shape[0] if param.ndim else 1
    return rows, param.numel() // max(rows, 1)


class Form(NamedTuple):
    """A weight as the matrices that have bases.

    Attributes:
        rows, columns: Of each of them.
        sides: Which of its sides have a basis.
        blocks: How many they are; 1 for a weight that is one matrix.
        across: Whether blocks lie beside each other, not below.
    """

    rows: int
    columns: int
    sides: tuple[bool, bool]
    blocks: int = 1
    across: bool = False

    @property
    def leading(self) -> tuple[int, ...]:
        """Dimensions before those of a matrix: none for one."""
        return () if self.blocks == 1 else (self.blocks,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of :meth:`matrices`."""
        return (*self.leading, self.rows, self.columns)

    def squares(self) -> list[tuple[int, ...]]:
        """Shapes of what belongs to rows and to columns, where these have a basis or not."""
        return [(*self.leading, side, side) for side in (self.rows, self.columns)]

    def matrices(self, tensor: Tensor) -> Tensor:
        """[rows, columns] or [blocks, rows, columns]; a view where memory allows."""
        if not self.across:
            return tensor.reshape(self.shape)
        return tensor.reshape(self.rows, self.blocks, self.columns).transpose(0, 1)

    def back(self, matrices: Tensor, like: Tensor) -> Tensor:
        """:meth:`matrices` in the shape of a weight."""
        return (matrices.transpose(0, 1) if self.across else matrices).reshape(like.shape)


def form_of_state(entry: dict[str, Any], param: Tensor) -> Form | None:
    """As a parameter's state has it; None where that holds no metric."""
    held = [entry.get(name) for name in FACTORS]
    if held[0] is None and held[1] is None:
        return None
    rows, columns = matrix_shape(param)
    sides = held[0] is not None, held[1] is not None
    for side, factor in enumerate(held):
        if isinstance(factor, Tensor) and factor.dim() == 3:
            blocks, size = factor.shape[:2]
            across = (blocks * size == columns) if side else size == rows
            if across:
                return Form(rows, columns // blocks, sides, blocks, across)
            return Form(rows // blocks, columns, sides, blocks)
    return Form(rows, columns, sides)


def form_of(
    param: Tensor,
    amsgrad: bool,
    narrow: bool,
    limited: bool,
    device: torch.device,
    divides: bool = True,
) -> Form:
    """How a parameter is taken for matrices, and which of their sides get a basis.

    None do of vectors, complex numbers, with AMSGrad, whose largest moment is of one basis, and
    with moments that are stored ``narrow``; ``limited`` leaves out or divides sides that cost more
    than they bring. Where it may not be divided (``divides``), or not evenly, a side that is too
    long beside the other gets none.
    """
    rows, columns = matrix_shape(param)
    none = Form(rows, columns, (False, False))
    if param.ndim < 2 or param.is_complex() or amsgrad or narrow:
        return none
    if min(rows, columns) < 2 or max(rows, columns) > EMBEDDING_SIDE:
        return none
    if not limited:
        return none._replace(sides=(True, True))
    most = LONGEST_SIDE.get(device.type, LONGEST_SIDE["cpu"])
    fit = MOST_TIMES_LONGER * min(rows, columns)
    short = rows <= min(most, fit), columns <= min(most, fit)
    longer = max(rows, columns)
    if not divides or longer <= fit or longer > most:
        return none._replace(sides=short)
    blocks = next((n for n in range(-(-longer // fit), longer) if longer % n == 0), longer)
    if longer // blocks < min(rows, columns):
        return none._replace(sides=short)
    if rows < columns:
        return Form(rows, columns // blocks, (True, True), blocks, across=True)
    return Form(rows // blocks, columns, (True, True), blocks)


def forms_of(
    flat: FlatParams,
    groups: list[ParamGroup],
    narrow: bool,
    limited: bool,
    shards: list[int] | None = None,
) -> dict[int, Form]:
    """Of each parameter that has a basis on some side; see :func:`form_of`.

    ``shards``: in how many pieces each lies, if the parameters do not know.
    """
    found = {}
    pieces = shards or [shards_of(param) for param in flat.stand_ins]
    divides = not flat.spread and max(pieces) == 1
    for group, place in zip(groups, flat.group_slices, strict=True):
        for i in range(place.start, place.stop):
            shape = largest_here(flat.stand_ins[i])  # ranks have bases of the same sides
            amsgrad = bool(group["amsgrad"])
            form = form_of(shape, amsgrad, narrow, limited, flat.device, divides)
            (rows, columns), sides = matrix_shape(flat.tensors[i]), form.sides
            if pieces[i] > 1:
                # The longer side's would be of the whole matrix's size, and on every rank.
                a, b = form.rows, form.columns
                sides = sides[0] and a <= b, sides[1] and b <= a
            if form.blocks == 1:
                form = Form(rows, columns, sides)  # of what lies on this rank
            if any(sides):
                found[i] = form
    return found
