"""What an approximation H of the inverse Hessian answers, whatever it is made of."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from fuse_ext.kernels.scalars import Header
from fuse_ext.vector.flat import Part
from fuse_ext.vector.gradients import GradStats


class InverseHessian(Protocol):
    """Takes pairs (s, y), gives directions -H g, forgets, and is saved with the state entry.

    :class:`fuse_ext.curvature.ring.History` is one, whose docstrings say what the arguments are,
    and :class:`fuse_ext.curvature.dense.DenseMatrix` another. Gradients are real tensors in the
    order of :attr:`part`, and come with the L2 coefficients and the sign that make them the
    effective ones.

    Attributes:
        kind: "pairs" or "dense", for reports.
        forgets: Whether old pairs leave it, and with them what was wrong.
        part: The parameters that directions and pairs are of.
    """

    kind: str
    forgets: bool

    @property
    def part(self) -> Part:
        """See above."""

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch held between steps."""

    def enter(self, part: Part) -> bool:
        """From now on directions and pairs are of these parameters; whether that is new."""

    def header(self) -> Header:
        """The scalars that the host decides by."""

    def stats(
        self,
        grads: list[Tensor],
        decay: list[float],
        maximize: bool,
        along_direction: bool,
        loss: Any = None,
        part: Part | None = None,
        absent: tuple[int, ...] = (),
    ) -> tuple[GradStats, float]:
        """Norms of a gradient, its slope along the direction, and the loss as a number."""

    def update(
        self,
        grads: list[Tensor],
        decay: list[float],
        maximize: bool,
        pair_step: float | None,
        curvature_tol: float,
    ) -> None:
        """Takes in a gradient; with ``pair_step`` = t offers the pair of the step t p to here."""

    def update_direction(
        self,
        grads: list[Tensor],
        decay: list[float],
        lr_scale: list[float],
        maximize: bool,
        pair_step: float | None,
        curvature_tol: float,
        origin: Tensor | None = None,
        step: float = 0.0,
        least_slope: float = 0.0,
    ) -> tuple[Header, bool]:
        """:meth:`update`, then p = -H g; with ``origin`` perhaps the step too, and whether so."""

    def set_grad_prev(self, grad: Tensor) -> None:
        """Puts another gradient in the place of the one that y will be taken from."""

    def move(self, origin: Tensor, step: float, save: bool) -> None:
        """Parameters = origin + step * p; with ``save`` origin = parameters first."""

    def reset(self) -> None:
        """Forgets all pairs; the counters stay."""

    def set_aside(self) -> None:
        """:meth:`reset`, until :meth:`take_up`."""

    def take_up(self) -> list[float] | None:
        """Has again what was set aside; None where nothing was, or something was learnt since."""
