"""Turning a matrix into the eigenbases of its gradients' covariances, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# In a parameter's own state, of the sides that have one.
BASES = ("row_basis", "column_basis")


def rotate(entry: dict[str, Any], matrix: Tensor) -> Tensor:
    """Q_L^T G Q_R; always a new tensor."""
    left, right = (entry.get(name) for name in BASES)
    rotated = matrix if left is None else left.T @ matrix
    return rotated if right is None else rotated @ right


def rotate_back(entry: dict[str, Any], matrix: Tensor) -> Tensor:
    """Q_L X Q_R^T."""
    left, right = (entry.get(name) for name in BASES)
    rotated = matrix if left is None else left @ matrix
    return rotated if right is None else rotated @ right.T


def adams_second(entry: dict[str, Any], second: Tensor, steps: float, beta2: float) -> Tensor:
    """What Adam's second moment would be, from that in the bases; a new tensor.

    Coordinates of the basis are next to uncorrelated, so that the variance of an element is the sum
    of theirs, each by the square of its share. Its own count becomes the parameter's, ``steps``.
    """
    squares = {name: entry[name].square() for name in BASES if name in entry}
    factor = (1.0 - beta2**steps) / (1.0 - beta2 ** entry["basis_steps"])
    return rotate_back(squares, second) * factor
