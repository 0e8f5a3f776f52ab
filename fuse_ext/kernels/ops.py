"""Typed access to the kernels; the only file that knows ``torch.ops.fuse_ext``.

Every op exists twice under one signature: as a C++ kernel here, and as plain PyTorch in
:mod:`fuse_ext.kernels.reference`. :func:`select` chooses between the two sets. Ops return nothing;
they write into the tensors that their schema (csrc/ops.cpp) marks as mutated.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fuse_ext import _C
from fuse_ext.kernels import reference

BACKENDS = ("auto", "native", "reference")
NAMES = (
    "adam_step",
    "grad_stats",
    "lbfgs_update",
    "lbfgs_two_loop",
    "lbfgs_decide",
    "lbfgs_direction",
    "lbfgs_set_out",
    "lbfgs_move",
    "dense_direction",
    "fuse_blend",
    "grad_gather",
    "grad_scatter",
)


class Ops(Protocol):
    """One set of ops. ``offsets[i]`` is where ``params[i]`` begins in the flat state.

    Arithmetic is in the flat state's dtype, float32 or float64, and float32 for Adam's moments in
    bfloat16; float64 parameters need a float64 state. Arguments that do not fit raise TypeError or
    ValueError, naming the argument, before anything has changed.
    """

    def adam_step(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        offsets: list[int],
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None,
        stats: Tensor,
        *,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        eps_in_root: float,
        weight_decay: float,
        decoupled_weight_decay: bool,
        maximize: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        step_tensor: Tensor | None = None,
        lr_tensor: Tensor | None = None,
        loss: Tensor | None = None,
        grad_square: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """Eq. 2 in place; ``stats[0]`` becomes the sum of squared gradients (Eq. 3).

        Averages in bfloat16 are rounded stochastically, by bits that the step's number and the
        element's place in the flat vector determine (csrc/stochastic.h).

        ``step_tensor`` holds the steps before this one, instead of ``step`` - 1, in each of its
        elements, and counts it there; ``lr_tensor`` stands for ``lr``. Where ``found_inf`` is not
        0, or ``loss`` or ``grad_square`` is not finite, nothing changes. ``counts`` (float64 [2])
        counts the steps taken and those that were not.
        """

    def grad_stats(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        offsets: list[int],
        weight_decay: list[float],
        maximize: bool,
        history: Tensor | None,
        scalars: Tensor | None,
        stats: Tensor,
        *,
        history_scale: Tensor | None = None,
    ) -> None:
        """``stats`` = g.p, g.g, sum|g|, sum of weight_decay/2 x^2, max|g|.

        g is the effective gradient: grad (negated to maximize) + weight_decay * param. p is the
        direction in the open slot, left out where there is no history.
        """

    def lbfgs_update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        offsets: list[int],
        weight_decay: list[float],
        maximize: bool,
        history: Tensor,
        grad_prev: Tensor | None,
        scalars: Tensor,
        form_pair: bool,
        *,
        history_scale: Tensor | None = None,
        control: Tensor | None = None,
    ) -> None:
        """Pass 1: y = g - g_prev into the open slot, and the dots of g and y with every row.

        With ``control`` (:mod:`fuse_ext.kernels.fixed_step`) it says whether a pair is formed, and
        receives the gradient's norms; ``grad_prev`` must be given then.
        """

    def lbfgs_two_loop(
        self,
        scalars: Tensor,
        slots: int,
        commit: bool,
        step_length: float,
        curvature_tol: float,
        *,
        broyden: Tensor | None = None,
        scaled: bool = False,
    ) -> None:
        """Algorithm 2 on the Gram matrix; with ``commit`` the open slot becomes a pair first.

        With ``broyden`` (csrc/broyden_pairs.h) the self-scaled Broyden update instead, half of the
        pairs being dropped where there is room for no more. ``scaled`` says that the direction to
        come is multiplied by shares that are not all 1.
        """

    def lbfgs_decide(
        self,
        scalars: Tensor,
        slots: int,
        control: Tensor,
        *,
        lr: float,
        lr_unit: float,
        lr_tensor: Tensor | None,
        loss: Tensor | None,
        curvature_tol: float,
        tolerance_grad: float,
        tolerance_change: float,
        eps: float,
        patience: int,
        closes_pair: bool,
    ) -> None:
        """:meth:`lbfgs_two_loop`, and whether, whence and how far to go, all decided there.

        The step is ``lr`` (times ``lr_tensor`` / ``lr_unit``). See csrc/fixed_step.h.
        """

    def lbfgs_direction(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        offsets: list[int],
        weight_decay: list[float],
        lr_scale: list[float],
        maximize: bool,
        history: Tensor,
        grad_prev: Tensor | None,
        scalars: Tensor,
        *,
        history_scale: Tensor | None = None,
        control: Tensor | None = None,
    ) -> None:
        """Pass 2: the direction into the open slot, g into g_prev, and g.p, p.p, max|p|.

        Does nothing where ``control`` says so.
        """

    def lbfgs_set_out(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        offsets: list[int],
        weight_decay: list[float],
        lr_scale: list[float],
        maximize: bool,
        history: Tensor,
        grad_prev: Tensor | None,
        scalars: Tensor,
        origin: Tensor,
        step: float,
        *,
        history_scale: Tensor | None = None,
    ) -> None:
        """:meth:`lbfgs_direction`, then :meth:`lbfgs_move` with ``save``: one pass on the CPU."""

    def lbfgs_move(
        self,
        params: list[Tensor],
        offsets: list[int],
        origin: Tensor,
        history: Tensor,
        scalars: Tensor,
        step: float,
        save: bool,
        *,
        history_scale: Tensor | None = None,
        control: Tensor | None = None,
    ) -> None:
        """param = origin + step * p; with ``save`` the origin is taken from param first.

        With ``control`` it says both, and whether to move at all, and is told what was done.
        """

    def dense_direction(
        self,
        grad: Tensor,
        grad_prev: Tensor,
        direction: Tensor,
        matrix: Tensor,
        vectors: Tensor,
        matrix_scalars: Tensor,
        scalars: Tensor,
        lr_scale: Tensor | None,
        pair_step: float | None,
        curvature_tol: float,
        taking_part: int,
        broyden: bool,
        self_scaling: bool,
    ) -> None:
        """One iteration with a dense inverse Hessian H (csrc/broyden.h): direction = -H grad.

        With ``pair_step`` = t first offers the pair s = t direction, y = grad - grad_prev, which
        updates H where s.y > curvature_tol |s| |y|. ``lr_scale`` multiplies the direction element
        by element; ``taking_part`` is how many parameters pairs are of. All are flat: the gradient
        is the effective one. ``grad_prev`` becomes grad,
        and the header of ``scalars`` (a ring of one pair) tells what the host decides by.
        """

    def fuse_blend(
        self,
        params: list[Tensor],
        offsets: list[int],
        origin: Tensor,
        history: Tensor,
        scalars: Tensor,
        theta: float,
        step: float,
        *,
        history_scale: Tensor | None = None,
    ) -> None:
        """Algorithm 3: param = theta * param + (1 - theta) * (origin + step * p)."""

    def grad_gather(
        self, params: list[Tensor], grads: list[Tensor], offsets: list[int], flat: Tensor
    ) -> None:
        """flat = grads, in the parameters' memory order."""

    def grad_scatter(
        self, params: list[Tensor], grads: list[Tensor], offsets: list[int], flat: Tensor
    ) -> None:
        """Grads = flat, in the parameters' memory order."""


class _Native:
    """The C++ kernels, called through the dispatcher's overloads directly."""

    def __init__(self) -> None:
        for name in NAMES:
            setattr(self, name, getattr(torch.ops.fuse_ext, name).default)


def _fake(*args: Any, **kwargs: Any) -> None:
    """Every op only mutates its arguments, so tracing has nothing to allocate."""


for _name in NAMES:
    torch.library.register_fake(f"fuse_ext::{_name}")(_fake)

_native = cast(Ops, _Native())
_reference = cast(Ops, reference)


@cache
def has_kernels(device_type: str) -> bool:
    """Whether this build has C++ kernels for the device type."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"fuse_ext::{name}", key) for name in NAMES
    )


def select(backend: str, device: torch.device) -> Ops:
    """The ops to use on a device.

    Args:
        backend: "auto" (kernels where this build has them, else plain PyTorch), "native" or
            "reference".
        device: Where the parameters live.

    Raises:
        ValueError: Unknown backend.
        RuntimeError: ``backend="native"`` on a device without kernels.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return _reference
    if has_kernels(device.type):
        return _native
    if backend == "native":
        raise RuntimeError(f"backend='native' has no kernels for device {device} in this build")
    return _reference


def is_native(ops: Ops) -> bool:
    """Whether these are the C++ kernels."""
    return ops is _native


def scalars_device(ops: Ops, device: torch.device) -> torch.device:
    """Where the scalars of L-BFGS live: beside the kernels, or with Python."""
    return torch.device("cpu") if ops is _reference else device


def advise_large_pages(tensor: Tensor) -> None:
    """Asks for large pages under a big CPU tensor; advice only."""
    if tensor.device.type == "cpu":
        storage = tensor.untyped_storage()
        _C.advise_large_pages(storage.data_ptr(), storage.nbytes())


def zeros_in_large_pages(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of zeros; on the CPU, and where it is big, in large pages if the system has them."""
    vector = torch.empty(numel, dtype=dtype, device=device)
    advise_large_pages(vector)  # pages that were touched before stay small
    return vector.zero_()
