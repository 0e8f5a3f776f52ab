"""The objective where the parameters stand, and what is remembered of it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse_ext.checks import check_loss
from fuse_ext.flat import Closure, FlatParams
from fuse_ext.history import GradStats, History
from fuse_ext.hooks import with_grad
from fuse_ext.lbfgs_options import LbfgsOptions
from fuse_ext.ops import Ops
from fuse_ext.precision import Precision


class Point(NamedTuple):
    """The objective where the parameters stand.

    Attributes:
        loss: What the closure returned (None without one).
        value: The loss to minimise: sign and weight decay included.
        grads: The gradients, one tensor a parameter.
        stats: Their norms.
    """

    loss: Any
    value: float
    grads: list[Tensor]
    stats: GradStats

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return self.stats.finite and (self.loss is None or math.isfinite(self.value))


class Memory(NamedTuple):
    """Where a deterministic closure was evaluated last, for the next step to begin with.

    Attributes:
        point: What it gave.
        params: The parameters' places then.
        grads: Each ``.grad`` with its version.
        options: Of the step that evaluated it.
        settled: Nothing can be done from here with these options.
    """

    point: Point
    params: Any
    grads: list[tuple[Tensor | None, int]]
    options: LbfgsOptions
    settled: bool


class Evaluations:
    """Calls the closure, or remembers what it gave; and knows who moved the parameters.

    Args:
        flat: The parameters.
        entry: The optimizer's state entry: counts ``func_evals``, holds ``pair_step``, the step
            length t of a pair that awaits its second gradient (s = t p is taken, y not known).
        history: Where the gradient's norms are taken.
    """

    def __init__(self, flat: FlatParams, entry: dict[str, Any], history: History) -> None:
        self.flat, self._entry, self.history = flat, entry, history
        self.precision = Precision(entry, torch.finfo(flat.dtype).eps)
        entry.setdefault("pair_step", None)
        self._memory: Memory | None = None
        # Where the last step has led, on which objective.
        self._arrived: Any = None

    def evaluate(self, closure: Closure, options: LbfgsOptions, along_direction: bool) -> Point:
        """Calls the closure where the parameters stand."""
        loss = with_grad(closure)
        self._entry["func_evals"] += 1
        check_loss(loss, options.needs_loss)
        return self._point(loss, options, along_direction)

    def _point(self, loss: Any, options: LbfgsOptions, along_direction: bool) -> Point:
        grads = self.flat.grads()
        stats, value = self.history.stats(
            options.moving(grads), options.weight_decay, options.maximize, along_direction, loss
        )
        if options.maximize:
            value = -value
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss = loss.detach()
        return Point(loss, value + stats.penalty, grads, stats)

    def start(self, closure: Closure | None, options: LbfgsOptions) -> Point:
        """The point where the step begins: evaluated, remembered, or gradients at hand."""
        if closure is not None and options.deterministic and self._memory_holds(options):
            assert self._memory is not None
            return self._memory.point
        self._memory = None
        if self._entry["pair_step"] is not None and self._moved_since(options):
            self.drop_pair()
        if closure is None:
            return self._point(None, options, False)
        return self.evaluate(closure, options, False)

    def _memory_holds(self, options: LbfgsOptions) -> bool:
        """Whether evaluating would give what it gave last; drops a pair in waiting if x changed."""
        memory = self._memory
        if memory is None:
            return False
        moved = memory.params != self.flat.places()
        if moved or memory.options.objective != options.objective:
            self.drop_pair()  # x or g changed by more than the step
            self.precision.forget_least()
            return False
        if memory.settled and memory.options != options:
            return False
        return all(
            p.grad is grad and _version(grad) == version
            for p, (grad, version) in zip(self.flat.params, memory.grads, strict=True)
        )

    def _remember(self, point: Point, options: LbfgsOptions, settled: bool = False) -> None:
        """A deterministic closure need not be called again where it was called last."""
        if options.deterministic and point.loss is not None:
            grads = [(g, _version(g)) for g in (p.grad for p in self.flat.params)]
            self._memory = Memory(point, self.flat.places(), grads, options, settled)

    def _moved_since(self, options: LbfgsOptions) -> bool:
        """Whether x or the objective changed by more than the last step."""
        here = (self.flat.places(), options.objective)
        return self._arrived is not None and self._arrived != here

    def note_arrival(self, options: LbfgsOptions) -> None:
        """At the end of a step: notes where a pair in waiting has led."""
        if self._entry["pair_step"] is not None:
            params = self._memory.params if self._memory is not None else self.flat.places()
            self._arrived = (params, options.objective)

    @property
    def has_pair(self) -> bool:
        """Whether a step was taken whose second gradient is not known."""
        return self._entry["pair_step"] is not None

    def begin_batch(self, batch_id: int | str | None) -> None:
        """Gives up what is of another batch: a pair in waiting, an evaluation remembered."""
        if self._entry.get("batch_id") != batch_id:
            self._entry["batch_id"] = batch_id
            self.drop_pair()
            self._memory = None

    def drop_pair(self) -> None:
        """Gives up the pair in waiting."""
        self._entry["pair_step"] = None


def effective_gradient(
    flat: FlatParams,
    ops: Ops,
    grads: list[Tensor],
    options: LbfgsOptions,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of what is minimised, sign and L2 penalty included, as one flat vector."""
    if out is None:
        out = torch.zeros(flat.numel, dtype=flat.dtype, device=flat.device)
    ops.grad_gather(flat.reals(flat.params), options.moving(grads), flat.offsets, out)
    if options.maximize:
        out.neg_()
    for i, ascends in enumerate(options.ascends):
        if ascends:
            flat.piece(out, i).neg_()
    for i, coefficient in enumerate(options.weight_decay):
        if coefficient:
            flat.piece(out, i).add_(flat.params[i].detach(), alpha=coefficient)
    return out


def _version(grad: Tensor | None) -> int:
    return -1 if grad is None else grad._version
