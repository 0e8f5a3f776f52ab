"""A tree of tensors (a tensor, or lists and dictionaries of them) as leaves, and its bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fuse_ext.checks import check_loss

Fun = Callable[[Any], Any]


class Tree:
    """The variables, as leaves of their own memory that ask for gradients.

    Args:
        x0: Where to begin; it is copied.

    Attributes:
        leaves: The tensors, in the order of the tree.
    """

    def __init__(self, x0: Any) -> None:
        found, self._spec = pytree.tree_flatten(x0)
        for i, leaf in enumerate(found):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"x0 must hold tensors only, got {leaf!r} as leaf {i}")
        self.leaves = [leaf.detach().clone().requires_grad_() for leaf in found]

    def of(self, leaves: list[Tensor]) -> Any:
        """The tree with these in place of the leaves."""
        return pytree.tree_unflatten(leaves, self._spec)

    def copy(self) -> Any:
        """The tree as it is, without gradients."""
        return self.of([leaf.detach().clone() for leaf in self.leaves])

    def evaluate(self, fun: Fun) -> Tensor:
        """``fun`` at the leaves, whose gradients are made anew."""
        for leaf in self.leaves:
            leaf.grad = None
        with torch.enable_grad():
            loss = fun(self.of(self.leaves))
            check_loss(loss, "minimize")
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise TypeError(
                    f"fun must return a tensor made of x by torch's operations, got {loss!r}"
                )
            loss.backward()
        return loss.detach()

    def grads(self) -> list[Tensor]:
        """Of all leaves, 0 where ``fun`` does not depend on one."""
        return [
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()
            for leaf in self.leaves
        ]

    def flat(self, tensors: list[Tensor]) -> Tensor:
        """Tensors like the leaves as one vector, in float64."""
        return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])

    def put(self, x: Tensor) -> None:
        """Writes such a vector into the leaves, rounded to their dtype."""
        pieces = x.split([leaf.numel() for leaf in self.leaves])
        with torch.no_grad():
            for leaf, piece in zip(self.leaves, pieces, strict=True):
                leaf.copy_(piece.view(leaf.shape))

    def bounds(self, bounds: Any) -> tuple[Tensor, Tensor]:
        """The lower and the upper bounds as vectors of all elements.

        Args:
            bounds: A pair (lower, upper), or an object with ``lb`` and ``ub``. Each is None, a
                number, a tensor that broadcasts to a single leaf, or a tree like x0 of these.

        Raises:
            ValueError, TypeError: They do not fit x0, are NaN, or cross.
        """
        if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
            bounds = bounds.lb, bounds.ub
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            raise TypeError(f"bounds must be a pair (lower, upper), got {bounds!r}")
        if any(leaf.is_complex() for leaf in self.leaves):
            raise TypeError("bounds do not go with complex tensors in x0")
        infinite = (-torch.inf, torch.inf)
        low, high = (self._side(*side) for side in zip(bounds, infinite, strict=True))
        wrong = (~(low <= high)).nonzero()
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(
                f"bounds: lower must be at most upper, got {float(low[i])} and {float(high[i])} "
                f"at element {i}"
            )
        return low, high

    def _side(self, side: Any, infinite: float) -> Tensor:
        values = [side] * len(self.leaves)
        if len(self.leaves) > 1 and pytree.tree_structure(side) == self._spec:
            values = pytree.tree_leaves(side)
        found = []
        for i, (value, leaf) in enumerate(zip(values, self.leaves, strict=True)):
            try:
                given = torch.as_tensor(
                    infinite if value is None else value, dtype=torch.float64, device=leaf.device
                )
                # As the leaf can hold it, so that it can stand on its bound.
                held = given.to(leaf.dtype).double()
                found.append(held.broadcast_to(leaf.shape).reshape(-1))
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"bounds: {value!r} does not fit leaf {i} of x0, of shape {tuple(leaf.shape)}"
                ) from error
        return torch.cat(found)
