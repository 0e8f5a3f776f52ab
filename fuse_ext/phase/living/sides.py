"""Which sides of a weight get a basis."""

from __future__ import annotations

import torch
from torch import Tensor

from fuse_ext.vector.flat import FlatParams, ParamGroup
from fuse_ext.vector.shards import largest_here, shards_of

# A side up to this long gets a basis; a longer one stays as it is. With a side of length a on both
# sides of a matrix a step costs 10 a operations an element, where the gradient costs 6 for every
# row of the batch. A transformer of width 128 on text (sides of 128, 384 and 512, 1,024 rows) took
# 97 s for a loss of 1.236 with this limit, 76 s for 1.295 in fewer steps, and 75 s for 1.321 with
# a limit of 256; AdamW 64 s for 1.59. Much longer ones do not pay on a CPU, nor do the sides of
# inputs always: KMNIST's 784 cost accuracy. On a GPU, which multiplies matrices best, nothing has
# been measured yet.
LONGEST_SIDE = {"cpu": 512, "cuda": 2048}
# Nor does one that is so many times as long as the other. A matrix of a x b has a b parameters, and
# the longer side's covariance and basis 8 a^2 bytes, 8 a / b a parameter, and 10 a operations an
# element: 2,048 bytes of a weight of 512 x 2, and as many of an adapter of 2,048 x 8 (LoRA) on a
# GPU. So it is at most 128 bytes. The head of an image network, 128 x 10, keeps its own.
MOST_TIMES_LONGER = 16
# A matrix with a side beyond it is taken for an embedding, few of whose rows have a gradient.
EMBEDDING_SIDE = 8192


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """A weight as a matrix: its first dimension, and all others."""
    rows = param.shape[0] if param.ndim else 1
    return rows, param.numel() // max(rows, 1)


def rotated_sides(
    param: Tensor, amsgrad: bool, narrow: bool, limited: bool, device: torch.device
) -> tuple[bool, bool]:
    """Which sides of a parameter get a basis.

    None do of vectors, complex numbers, with AMSGrad, whose largest moment is of one basis, and
    with moments that are stored ``narrow``; ``limited`` leaves out sides that cost more than they
    bring.
    """
    if param.ndim < 2 or param.is_complex() or amsgrad or narrow:
        return False, False
    rows, columns = matrix_shape(param)
    if min(rows, columns) < 2 or max(rows, columns) > EMBEDDING_SIDE:
        return False, False
    most = EMBEDDING_SIDE
    if limited:
        most = LONGEST_SIDE.get(device.type, LONGEST_SIDE["cpu"])
        most = min(most, MOST_TIMES_LONGER * min(rows, columns))
    return rows <= most, columns <= most


def sides_of(
    flat: FlatParams,
    groups: list[ParamGroup],
    narrow: bool,
    limited: bool,
    shards: list[int] | None = None,
) -> dict[int, tuple[bool, bool]]:
    """Of each parameter that has a basis on some side, which ones; see :func:`rotated_sides`.

    ``shards``: in how many pieces each lies, if the parameters do not know.
    """
    found = {}
    pieces = shards or [shards_of(param) for param in flat.stand_ins]
    for group, place in zip(groups, flat.group_slices, strict=True):
        for i in range(place.start, place.stop):
            shape = largest_here(flat.stand_ins[i])  # ranks have bases of the same sides
            sides = rotated_sides(shape, bool(group["amsgrad"]), narrow, limited, flat.device)
            if pieces[i] > 1:
                # The longer side's would be of the whole matrix's size, and on every rank.
                rows, columns = matrix_shape(shape)
                sides = sides[0] and rows <= columns, sides[1] and columns <= rows
            if any(sides):
                found[i] = sides
    return found
