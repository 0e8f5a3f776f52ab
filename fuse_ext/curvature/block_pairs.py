"""Curvature pairs of two successive block means: s of iterates, y of gradients, with damping.

On minibatches a pair of single gradients is mostly noise. Here each side is a mean over ``BLOCK``
batches (SlimQN / mL-BFGS), and y is damped as Powell does, so that s.y stays positive.

References:
    - Niu et al., SlimQN / mL-BFGS: A momentum-based L-BFGS for distributed large-scale neural
      network optimization, TMLR 2023, arXiv 2307.13744.
    - M. J. D. Powell, Algorithms for nonlinear constraints that use Lagrangian functions,
      Mathematical Programming 14, 1978 (damping).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.ring import History
from fuse_ext.vector.flat import FlatParams
from fuse_ext.vector.measures import LOCAL, Measures

# Batches that one mean of iterates and gradients is taken over.
BLOCK = 10
# Powell's bound: y is moved towards B s until s.y >= DAMPING s.B s.
DAMPING = 0.2

# Vectors of a block in the state entry, in the coordinates of the steps.
BLOCK_VECTORS = ("iterate_diff", "iterate_rise", "grad_sum", "grad_mean")


class BlockPairs:
    """The block under way and the one before it; kept in the optimizer's state entry.

    Args:
        flat: The parameters.
        entry: Holds the vectors, ``block_step`` and ``blocks`` (steps of this block, and blocks
            before it), ``norm_sum`` and ``last_norm`` (of the averaged gradient, over this block
            and as a mean over the last), ``missed`` and ``missed_before`` (which parameters had no
            gradient at some step of either), and ``unsteady``, the blocks until averages are of
            the same parameters again.
        scratch: A vector that may be written to while a block is closed.
    """

    def __init__(self, flat: FlatParams, entry: dict[str, Any], scratch: Tensor) -> None:
        self._flat, self._entry, self._scratch = flat, entry, scratch

    def begin(self) -> None:
        """Nothing is known of any block."""
        self._entry.update(
            block_step=0, blocks=0, norm_sum=0.0, last_norm=0.0, missed=[], missed_before=[]
        )

    def restart(self) -> None:
        """Forgets the block under way and the one before it."""
        for name in BLOCK_VECTORS:
            self._entry[name].zero_()
        self._entry.update(block_step=0, blocks=0, norm_sum=0.0, missed=[], missed_before=[])

    def miss(self, absent: list[int]) -> None:
        """No pair will count these parameters that this block is part of."""
        self._entry["missed"] = sorted({*self._entry["missed"], *absent})

    def grown(self, norm: float, factor: float) -> bool:
        """Whether the averaged gradient is ``factor`` times as long as it was in the last block."""
        entry = self._entry
        compares = entry["blocks"] and not entry["unsteady"]
        return bool(compares and norm > factor * entry["last_norm"])

    def add_gradient(self, grad: Tensor, norm: float) -> None:
        """Counts a batch's gradient, and the norm of the averaged one."""
        self._entry["grad_sum"].add_(grad)
        self._entry["norm_sum"] += norm

    def add_step(self, step: Tensor) -> bool:
        """Counts the step into the difference of block means that is under way, and the next one.

        The i-th iterates of two blocks of L steps lie L steps apart; on average over i, the k-th
        step of the first block counts k/L and that of the second (L - k)/L.

        Returns:
            Whether the block is full.
        """
        entry = self._entry
        entry["block_step"] += 1
        risen = entry["block_step"] / BLOCK
        if risen < 1.0:
            entry["iterate_diff"].add_(step, alpha=1.0 - risen)
        entry["iterate_rise"].add_(step, alpha=risen)
        return bool(entry["block_step"] == BLOCK)

    def close(self, history: History, curvature_tol: float) -> None:
        """Offers the pair that the block completes and begins the next one."""
        entry = self._entry
        mean = entry["grad_sum"].div_(BLOCK)
        entry["last_norm"], entry["norm_sum"] = entry["norm_sum"] / BLOCK, 0.0
        if entry["blocks"] > 0:
            y = torch.sub(mean, entry["grad_mean"], out=self._scratch)
            for i in {*entry["missed"], *entry["missed_before"]}:
                self._flat.stretch(y, i).zero_()
                self._flat.stretch(entry["iterate_diff"], i).zero_()
            self._offer(history, entry["iterate_diff"], y, curvature_tol)
        entry["missed"], entry["missed_before"] = [], entry["missed"]
        entry["unsteady"] = max(entry["unsteady"] - 1, 0)
        for now, later in (("grad_mean", "grad_sum"), ("iterate_diff", "iterate_rise")):
            entry[now], entry[later] = entry[later], entry[now]
            entry[later].zero_()
        entry["block_step"] = 0
        entry["blocks"] += 1

    def _offer(self, history: History, s: Tensor, y: Tensor, curvature_tol: float) -> None:
        header = history.header()
        if header.usable > 0:
            damp(s, y, 1.0 / header.gamma, self._flat.measures)
        history.offer(s, y, curvature_tol)


def damp(
    s: Tensor, y: Tensor, curvature: float, measures: Measures = LOCAL, bound: float = DAMPING
) -> None:
    """Powell's damping, in place, with B = curvature * I.

    Where s.y < bound s.B s, y becomes theta y + (1 - theta) B s with the theta that makes
    s.y = bound s.B s.
    """
    sy, sbs = measures.dot(s, y), curvature * measures.dot(s, s)
    if sy < bound * sbs:
        theta = (1.0 - bound) * sbs / (sbs - sy)
        y.mul_(theta).add_(s, alpha=(1.0 - theta) * curvature)
