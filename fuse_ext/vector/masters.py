"""Weights in the flat state's dtype, on which steps are taken, of parameters that are narrower.

A bfloat16 number has 8 bits: a step of less than a 256th of a weight is lost in it, and Adam's are
that small. Kept here, steps add up until the parameter, which is the weight rounded, shows them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fuse_ext.vector.flat import FlatParams

MASTER = "master_weight"  # in the state of each parameter that has one


class Masters:
    """Kept weights of narrow parameters; parameters as wide as the flat state are their own.

    A parameter that somebody else has written to is taken over, where its elements are no longer
    those that the kept ones round to.

    Memory: 4 bytes a narrow parameter.

    Args:
        flat: The parameters.
        state: ``Optimizer.state``; kept weights that it holds are taken over.

    Attributes:
        weights: Of each parameter what steps are to be taken on.
    """

    def __init__(self, flat: FlatParams, state: dict[Any, Any]) -> None:
        self._flat, self._state = flat, state
        self.weights: list[Tensor] = [param.detach() for param in flat.params]
        eps = torch.finfo(flat.dtype).eps
        self._narrow = {i for i, p in enumerate(flat.params) if torch.finfo(p.dtype).eps > eps}
        # The parameters' versions when they were last the kept weights, rounded.
        self._versions: dict[int, int] = {}
        for i in self._narrow:
            param = flat.params[i]
            like = torch.empty_like(param, dtype=flat.dtype, device="meta")
            held = state.get(param, {}).get(MASTER)
            if held is not None and _alike(held, like) and held.device == param.device:
                self.weights[i] = held
                continue
            self.weights[i] = torch.empty_like(like, device=param.device, requires_grad=False)
            self.weights[i].copy_(param.detach() if held is None else held)
            if held is not None:
                self.show(i)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(self.weights[i].nbytes for i in self._narrow)

    def show(self, i: int) -> None:
        """Puts the kept weight into the state of ``params[i]``, or takes out what is none."""
        entry = self._state[self._flat.params[i]]
        entry.pop(MASTER, None)
        if i in self._narrow:
            entry[MASTER] = self.weights[i]

    def follow(self, indices: Iterable[int]) -> None:
        """Takes over what others have written to these parameters; to be called before a step."""
        for i in self._narrow.intersection(indices):
            param, kept = self._flat.params[i], self.weights[i]
            if self._versions.get(i) != param._version:
                now = param.detach()
                kept.copy_(torch.where(kept.to(param.dtype) == now, kept, now.to(kept.dtype)))
                self._versions[i] = param._version

    def round(self, indices: Iterable[int]) -> None:
        """Gives these parameters their kept weights; to be called after a step."""
        chosen = sorted(self._narrow.intersection(indices))
        if not chosen:
            return
        params = [self._flat.params[i] for i in chosen]
        torch._foreach_copy_([p.detach() for p in params], [self.weights[i] for i in chosen])
        for i, param in zip(chosen, params, strict=True):
            self._versions[i] = param._version


def give_up_masters(flat: FlatParams, state: dict[Any, Any]) -> None:
    """Gives parameters that have become wider their kept weights, which go.

    Those that somebody has written to since keep what they are.

    Args:
        flat: The layout of the parameters as they were.
        state: ``Optimizer.state``.
    """
    for param, before in zip(flat.params, flat.dtypes, strict=True):
        kept = state.get(param, {}).pop(MASTER, None)
        if kept is not None:
            now = param.detach()
            now.copy_(torch.where(kept.to(before).to(now.dtype) == now, kept.to(now.dtype), now))


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether their elements are the same kind of numbers in the same order."""
    return one.dtype == other.dtype and one.stride() == other.stride()
