"""What the metric of matrices keeps in a parameter's state: names, checks, bytes."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fuse_ext.phase.living.metric.bases import BASES
from fuse_ext.phase.living.metric.sides import FACTORS, Form, form_of_state, forms_of, matrix_shape
from fuse_ext.phase.living.metric.worth import OWN, sample_length
from fuse_ext.phase.modes import AUTO
from fuse_ext.vector.flat import FlatParams, ParamGroup

DIAGONAL, KRONECKER = "diagonal", "kronecker"
METRICS = (AUTO, DIAGONAL, KRONECKER)
# In a parameter's own state, beside covariances and bases of the sides that have one: the second
# moment in them while it is measured, what steps are stretched by, as it was when the bases were
# renewed, and steps since the covariances, and since the measuring, began.
MEASURED = "rotated_sq"
STRETCH = "stretch"
STEPS = ("factor_steps", "basis_steps")
KRONECKER_NAMES = (*FACTORS, *BASES, MEASURED, OWN, STRETCH, *STEPS)


def check_kronecker_state(entry: dict[str, Any], param: Tensor, i: int) -> None:
    """Raises ValueError for a saved state whose factors or bases are not of this parameter."""
    form = form_of_state(entry, param) or Form(*matrix_shape(param), (False, False))
    divides = math.prod(form.shape) == param.numel()
    for name, square in zip((*FACTORS, *BASES), form.squares() * 2, strict=True):
        factor = entry.get(name)
        fits = isinstance(factor, Tensor) and tuple(factor.shape) == square and divides
        if factor is not None and not fits:
            what = tuple(factor.shape) if isinstance(factor, Tensor) else repr(factor)
            raise ValueError(
                f"state_dict does not fit: {name} of params[{i}] is {what}, not {square} of a "
                f"weight of {tuple(param.shape)}"
            )
    for name, shape in ((MEASURED, form.shape), (OWN, (sample_length(param.numel()),))):
        held = entry.get(name)
        if held is not None and not (isinstance(held, Tensor) and tuple(held.shape) == shape):
            raise ValueError(
                f"state_dict does not fit: {name} of params[{i}] is not of shape {shape}, as for a "
                f"weight of {tuple(param.shape)}"
            )
    if any(name in entry for name in FACTORS):
        stretch = entry.get(STRETCH)  # older checkpoints have none
        if stretch is not None and not (isinstance(stretch, Tensor) and stretch.shape == (1,)):
            raise ValueError(f"state_dict does not fit: {STRETCH} of params[{i}] is {stretch!r}")
        for name in STEPS:
            if not isinstance(entry.get(name), int) or entry[name] < 0:
                raise ValueError(
                    f"state_dict does not fit: {name} of params[{i}] is {entry.get(name)!r}, "
                    "no count"
                )


def kronecker_nbytes(
    flat: FlatParams, groups: list[ParamGroup], shards: list[int] | None = None
) -> tuple[int, int]:
    """Bytes of covariances and bases, and of the second moments while they are measured."""
    limited = groups[0]["metric"] == AUTO
    narrow = groups[0]["moment_dtype"] not in (None, flat.dtype)
    forms: dict[int, Form] = {}
    if groups[0]["metric"] != DIAGONAL:
        forms = forms_of(flat, groups, narrow, limited, shards)
    squares = sum(
        math.prod(square)
        for form in forms.values()
        for square, one in zip(form.squares(), form.sides, strict=True)
        if one
    )
    sizes = [flat.tensors[i].numel() for i in forms]
    measured = sum(sizes) + limited * sum(map(sample_length, sizes))
    return (2 * squares + len(forms)) * flat.dtype.itemsize, measured * flat.dtype.itemsize
