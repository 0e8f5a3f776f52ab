"""Turning a matrix into the eigenbases of its gradients' covariances, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.vector.flat import ParamGroup

# In a parameter's own state, of the sides that have one.
BASES = ("row_basis", "column_basis")


def rotate(entry: dict[str, Any], matrix: Tensor) -> Tensor:
    """Q_L^T G Q_R, of one matrix or of several; always a new tensor."""
    left, right = (entry.get(name) for name in BASES)
    rotated = matrix if left is None else left.mT @ matrix
    return rotated if right is None else rotated @ right


def rotate_back(entry: dict[str, Any], matrix: Tensor) -> Tensor:
    """Q_L X Q_R^T."""
    left, right = (entry.get(name) for name in BASES)
    rotated = matrix if left is None else left @ matrix
    return rotated if right is None else rotated @ right.mT


def root_of(variance: Tensor, group: ParamGroup) -> Tensor:
    """sqrt(v) + eps as the group has it; overwrites ``variance``."""
    eps = float(group["eps"])
    if group["eps_inside_root"]:
        return variance.add_(eps).sqrt_()
    return variance.sqrt_().add_(eps)


def stretch_of(
    entry: dict[str, Any], average: Tensor, variance: Tensor, group: ParamGroup
) -> Tensor:
    """By how much longer a step in the bases promises the decrease of Adam's own step.

    To first order that of a step u is m.u, with u = m / sqrt(v) for each. A gradient that nearly
    all elements have in common is one coordinate of the basis, along which Adam goes as far as
    elements add up to, sqrt(m n) at most, and a step in the basis no further than along any other.
    So at rates that are short of where Adam becomes unstable the basis would be the slower one, the
    more so the smaller they are; near there the two are level, and this is next to 1.

    Args:
        entry: Holds the bases.
        average: m in the bases.
        variance: v, bias-corrected.
        group: Whose eps it is.

    Returns:
        One number, of shape (1,); 1 where the gradient has been 0.
    """
    here = average.square().div_(root_of(variance.clone(), group)).sum()
    squares = {name: entry[name].square() for name in BASES if name in entry}
    # Sums of squares; only rounding makes one negative, where next to nothing was summed.
    own = root_of(rotate_back(squares, variance).clamp_(min=0.0), group)
    adams = rotate_back(entry, average).square_().div_(own).sum()
    return (adams / here).nan_to_num_(1.0, 1.0, 1.0).view(1)


def no_less(
    second: Tensor, average: Tensor, seen: float, steps: float, betas: tuple[float, float]
) -> Tensor:
    """A second moment that is no less than the square of the first: E[g]^2 <= E[g^2].

    Where coordinates have just been turned, that of one which has met no gradient is next to 0, and
    a step along it would be without measure.

    Args:
        second: Not corrected for its bias.
        average: The first moment, likewise.
        seen: Steps of the second one.
        steps: Of the first one.
        betas: Decay rates of both moments.
    """
    share = (1.0 - betas[1] ** seen) / (1.0 - betas[0] ** steps) ** 2
    return torch.maximum(second, average.square().mul_(share))


def adams_moments(
    entry: dict[str, Any],
    average: Tensor,
    second: Tensor,
    steps: float,
    betas: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """What Adam's moments would be, from those in the bases; new tensors.

    The first one exactly. Coordinates of the basis are next to uncorrelated, so that the variance
    of an element is the sum of theirs, each by the square of its share. Its own count becomes the
    parameter's, ``steps``.
    """
    squares = {name: entry[name].square() for name in BASES if name in entry}
    factor = (1.0 - betas[1] ** steps) / (1.0 - betas[1] ** entry["basis_steps"])
    own = rotate_back(entry, average)
    return own, no_less(rotate_back(squares, second) * factor, own, steps, steps, betas)
