"""The ops as a step calls them: on one set of parameters, with few arguments and results.

The native ops are methods of the C++ layout, which knows the parameters (csrc/bound_ops.cpp). Any
other set of ops is called with lists of tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from fuse_ext.kernels import ops as kernels
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.scalars import HEADER, Header


class AdamNumbers(NamedTuple):
    """Eq. 2's numbers for one step, in the order of :meth:`BoundOps.adam_step`."""

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    eps_in_root: float
    weight_decay: float
    decoupled_weight_decay: bool
    maximize: bool


class Segments(Protocol):
    """Some parameters and where they lie in the flat state (:class:`fuse_ext.vector.flat.Part`).

    Attributes:
        params, offsets: The parameters, and where each begins.
        layout: What C++ knows of them.
    """

    params: list[Tensor]
    offsets: list[int]
    layout: Any

    def reals(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors, complex ones as real views of shape [..., 2]."""


class BoundOps(Protocol):
    """The ops on the parameters of one part; see :class:`fuse_ext.kernels.ops.Ops`.

    ``grads`` are real and in the parameters' order. What the host decides by comes as numbers.
    """

    def adam_step(
        self,
        grads: list[Tensor],
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        max_exp_avg_sq: Tensor | None,
        stats: Tensor,
        grad_scale: Tensor | None,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        eps_in_root: float,
        weight_decay: float,
        decoupled_weight_decay: bool,
        maximize: bool,
        /,
    ) -> None:
        """Eq. 2."""

    def grad_stats(
        self,
        grads: list[Tensor],
        weight_decay: list[float],
        maximize: bool,
        history: Tensor | None,
        scalars: Tensor | None,
        stats: Tensor,
        history_scale: Tensor | None,
        loss: Tensor | None,
        with_loss: Tensor | None,
        /,
    ) -> list[float]:
        """The entries of :class:`fuse_ext.curvature.ring.GradStats`, and the loss (0 without one).

        On a device ``stats`` is a view of ``with_loss``, whose last number the loss becomes, so
        that the host waits once for both.
        """

    def lbfgs_update(
        self,
        grads: list[Tensor],
        weight_decay: list[float],
        maximize: bool,
        history: Tensor,
        grad_prev: Tensor | None,
        scalars: Tensor,
        history_scale: Tensor | None,
        pair_step: float | None,
        curvature_tol: float,
        broyden: Tensor | None,
        scaled: bool,
        /,
    ) -> None:
        """Pass 1 and the recursion; with ``pair_step`` the open slot becomes a pair first.

        ``broyden`` and ``scaled`` as in :meth:`fuse_ext.kernels.ops.Ops.lbfgs_two_loop`.
        """

    def lbfgs_direction(
        self,
        grads: list[Tensor],
        weight_decay: list[float],
        lr_scale: list[float],
        maximize: bool,
        history: Tensor,
        grad_prev: Tensor | None,
        scalars: Tensor,
        history_scale: Tensor | None,
        /,
    ) -> list[float]:
        """Pass 2; the entries of :class:`fuse_ext.kernels.scalars.Header`."""

    def lbfgs_update_direction(
        self,
        grads: list[Tensor],
        weight_decay: list[float],
        lr_scale: list[float],
        maximize: bool,
        history: Tensor,
        grad_prev: Tensor | None,
        scalars: Tensor,
        history_scale: Tensor | None,
        pair_step: float | None,
        curvature_tol: float,
        origin: Tensor | None,
        step: float,
        least_slope: float,
        broyden: Tensor | None,
        /,
    ) -> list[float]:
        """Both of them in one call, and with ``origin`` perhaps the move too.

        It is made, and the last number is 1 instead of 0, where the step can only be ``step``:
        pairs are usable, p is finite and -g.p > ``least_slope`` >= 0.
        """

    def lbfgs_move(
        self,
        origin: Tensor,
        history: Tensor,
        scalars: Tensor,
        history_scale: Tensor | None,
        step: float,
        save: bool,
        /,
    ) -> None:
        """Parameters = origin + step * p; with ``save`` origin = parameters first."""


def bind(ops: Ops, part: Segments) -> BoundOps:
    """The ops on these parameters."""
    if kernels.is_native(ops) and part.layout.has_ops:
        return cast(BoundOps, part.layout)
    return _Listed(ops, part)


class _Listed:
    """Ops that are called with lists of tensors."""

    def __init__(self, ops: Ops, part: Segments) -> None:
        self._ops: Any = ops
        self._part = part

    @property
    def _params(self) -> list[Tensor]:
        return self._part.reals(self._part.params)

    def adam_step(self, grads: list[Tensor], *rest: Any) -> None:
        exp_avg, exp_avg_sq, max_exp_avg_sq, stats, grad_scale, *numbers = rest
        moments = exp_avg, exp_avg_sq, max_exp_avg_sq
        named = AdamNumbers._make(numbers)._asdict()
        offsets = self._part.offsets
        self._ops.adam_step(
            self._params, grads, offsets, *moments, stats, grad_scale=grad_scale, **named
        )

    def grad_stats(self, grads: list[Tensor], *rest: Any) -> list[float]:
        *arguments, stats, scale, loss, with_loss = rest
        self._ops.grad_stats(
            self._params, grads, self._part.offsets, *arguments, stats, history_scale=scale
        )
        if with_loss is None:
            return [*stats.tolist(), 0.0 if loss is None else loss.item()]
        if loss is not None:
            with_loss[-1:].copy_(loss.detach().reshape(1))
        return with_loss.tolist()

    def lbfgs_update(self, grads: list[Tensor], *rest: Any) -> None:
        *arguments, history, grad_prev, scalars, scale, pair_step, tol, broyden, scaled = rest
        commit = pair_step is not None
        ring = history, grad_prev, scalars
        self._ops.lbfgs_update(
            self._params,
            grads,
            self._part.offsets,
            *arguments,
            *ring,
            commit,
            history_scale=scale,
        )
        step_length = pair_step if commit else 0.0
        self._ops.lbfgs_two_loop(
            scalars, history.size(1), commit, step_length, tol, broyden=broyden, scaled=scaled
        )

    def lbfgs_direction(self, grads: list[Tensor], *rest: Any) -> list[float]:
        *arguments, scalars, scale = rest
        self._ops.lbfgs_direction(
            self._params, grads, self._part.offsets, *arguments, scalars, history_scale=scale
        )
        return scalars[: len(HEADER)].tolist()

    def lbfgs_update_direction(self, grads: list[Tensor], *rest: Any) -> list[float]:
        return one_after_another(self, grads, *rest)

    def lbfgs_move(self, *rest: Any) -> None:
        *arguments, scale, step, save = rest
        self._ops.lbfgs_move(
            self._params, self._part.offsets, *arguments, step, save, history_scale=scale
        )


def one_after_another(ops: BoundOps, grads: list[Tensor], *rest: Any) -> list[float]:
    """:meth:`BoundOps.lbfgs_update_direction` by the other ops."""
    decay, lr_scale, *ring, pair_step, curvature_tol, origin, step, least_slope, broyden = rest
    maximize, history, grad_prev, scalars, scale = ring
    scaled = any(share != 1.0 for share in lr_scale)
    pair = pair_step, curvature_tol, broyden, scaled
    ops.lbfgs_update(grads, decay, maximize, history, grad_prev, scalars, scale, *pair)
    numbers = ops.lbfgs_direction(
        grads, decay, lr_scale, maximize, history, grad_prev, scalars, scale
    )
    moves = origin is not None and Header(*numbers).allows(least_slope)
    if moves:
        ops.lbfgs_move(origin, history, scalars, scale, step, True)
    return [*numbers, float(moves)]
