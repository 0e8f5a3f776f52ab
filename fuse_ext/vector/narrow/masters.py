"""Weights in the flat state's dtype, on which steps are taken, of parameters that are narrower.

A bfloat16 number has 8 bits: a step of less than a 512th of a weight is lost in it, and Adam's are
that small. Kept here, steps add up until the parameter, which is the weight rounded, shows them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fuse_ext.vector.flat import FlatParams
from fuse_ext.vector.shards import like, local, placed

MASTER = "master_weight"  # in the state of each parameter that has one


class Masters:
    """Kept weights of narrow parameters; parameters as wide as the flat state are their own.

    A parameter that somebody else has written to is taken over, where its elements are no longer
    those that the kept ones round to.

    Memory: 4 bytes a narrow parameter, of those that lie on this rank.

    Args:
        flat: The parameters.
        state: ``Optimizer.state``; kept weights that it holds are taken over.
        keeps: Whether there are any; else all parameters are their own.
    """

    def __init__(self, flat: FlatParams, state: dict[Any, Any], keeps: bool = True) -> None:
        self._flat, self._state = flat, state
        self._kept: dict[int, Tensor] = {}
        # The parameters' versions when they were last the kept weights, rounded.
        self._versions: dict[int, int] = {}
        eps = torch.finfo(flat.dtype).eps
        for i, (param, mine) in enumerate(zip(flat.params, flat.tensors, strict=True)):
            if not keeps or torch.finfo(mine.dtype).eps <= eps:
                continue
            held = state.get(param, {}).get(MASTER)
            if held is not None:
                held = local(placed(held, flat.stand_ins[i]))
            if held is None or not _takes_place_of(held, mine, flat.dtype):
                found = torch.empty_like(mine, dtype=flat.dtype, requires_grad=False)
                found.copy_(mine.detach() if held is None else held)
                self._kept[i] = found
            else:
                self._kept[i] = held
            if held is not None:
                self.show(i)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(kept.nbytes for kept in self._kept.values())

    def weight(self, i: int) -> Tensor:
        """What steps of ``params[i]`` are taken on."""
        kept = self._kept.get(i)
        return self._flat.tensors[i] if kept is None else kept

    def show(self, i: int) -> None:
        """Puts the kept weight into the state of ``params[i]``, or takes out what is none."""
        param = self._flat.params[i]
        self._state[param].pop(MASTER, None)
        if i in self._kept:
            self._state[param][MASTER] = like(self._kept[i], self._flat.stand_ins[i])

    def follow(self, indices: Iterable[int]) -> None:
        """Takes over what others have written to these parameters; to be called before a step."""
        for i in self._kept.keys() & set(indices):
            mine, kept = self._flat.tensors[i], self._kept[i]
            if self._versions.get(i) != self._flat.version(i):
                now = mine.detach()
                kept.copy_(torch.where(kept.to(now.dtype) == now, kept, now.to(kept.dtype)))
                self._versions[i] = self._flat.version(i)

    def round(self, indices: Iterable[int]) -> None:
        """Gives these parameters their kept weights; to be called after a step."""
        chosen = sorted(self._kept.keys() & set(indices))
        if not chosen:
            return
        params = [self._flat.tensors[i] for i in chosen]
        torch._foreach_copy_([p.detach() for p in params], [self._kept[i] for i in chosen])
        for i in chosen:
            self._versions[i] = self._flat.version(i)


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
            now, kept = local(param).detach(), local(kept)
            now.copy_(torch.where(kept.to(before).to(now.dtype) == now, kept.to(now.dtype), now))


def _takes_place_of(held: Tensor, mine: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor may be kept as it is."""
    alike = held.dtype == dtype and held.device == mine.device and held.shape == mine.shape
    return alike and held.stride() == torch.empty_like(mine, device="meta").stride()
