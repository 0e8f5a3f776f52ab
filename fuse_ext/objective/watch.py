"""Whether a closure is one function after all, found out by calling it twice at one point."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse_ext.checks import loss_value
from fuse_ext.kernels.hooks import with_grad
from fuse_ext.kernels.ops import Ops
from fuse_ext.search.one_function import Values, agree
from fuse_ext.vector.flat import Closure, FlatParams
from fuse_ext.vector.gradients import NO_GRADIENT, GradStats, survey


class Look(NamedTuple):
    """What a call of the closure on a minibatch has told.

    Attributes:
        loss: As the closure returned it; None without one.
        one_function: Whether it is one function after all.
        undecided: Whether the next call will tell: until then no step may be taken.
        finite: Whether the loss is, where there is one, and where no other rank has another.
        value: The loss as a number.
    """

    loss: Any = None
    one_function: bool = False
    undecided: bool = False
    finite: bool = True
    value: float | None = None


class Watch:
    """Compares two calls at one point: the loss and the norms of the gradient.

    Args:
        flat: The parameters, which must not move between the two calls.
        ops: Kernels to use.
        entry: The optimizer's state entry: holds ``watched_loss`` (NaN before the first call) while
            there is something to find out, and ``watched_grad``.
    """

    NAMES = ("watched_loss", "watched_grad")

    def __init__(self, flat: FlatParams, ops: Ops, entry: dict[str, Any]) -> None:
        self._flat, self._ops, self._entry = flat, ops, entry

    def begin(self) -> None:
        """The next two calls are compared."""
        self._entry["watched_loss"] = math.nan

    def give_up(self) -> None:
        """There is no finding out."""
        self._entry.pop("watched_loss", None)

    @property
    def on(self) -> bool:
        """Whether it is not known yet."""
        return "watched_loss" in self._entry

    def look(self, closure: Closure | None, mixed: bool) -> Look:
        """Calls the closure, if there is one; ``mixed``: groups ascend and descend at once."""
        loss = None if closure is None else with_grad(closure)
        if mixed or (closure is not None and loss is None):
            self.give_up()  # no function to minimise, be it one or not
        if loss is None:
            return Look()
        value = loss_value(loss)
        if self.on:
            one_function, value = self.tell(value)
            if one_function and self._flat.unsaid:
                warn_unsaid()  # other ranks may see batches
            elif one_function is not False:
                return Look(loss, bool(one_function), one_function is None)
        # Of other ranks' losses nothing is known yet, nor is whether one is not finite.
        alone = self._flat.together is None
        return Look(loss, finite=not alone or math.isfinite(value), value=value)

    def _stats(self) -> Tensor:
        fields = GradStats._fields
        return torch.zeros(len(fields), dtype=torch.float64, device=self._flat.device)

    def tell(self, loss: float) -> tuple[bool | None, float]:
        """Takes in a call; whether it is one function, None while that is not known.

        Also the loss, which is the mean over all ranks.
        """
        entry = self._entry
        norms, loss = survey(self._flat, self._ops, self._stats(), loss)
        norms = norms or NO_GRADIENT
        now = Values(loss, norms.square, norms.abs_sum)
        before = Values(entry["watched_loss"], *entry.get("watched_grad", (math.nan, math.nan)))
        if not before.finite and now.finite:
            entry["watched_loss"], entry["watched_grad"] = now.loss, [now.square, now.abs_sum]
            return None, loss
        del entry["watched_loss"]
        entry.pop("watched_grad", None)
        return bool(now.finite and agree(before, now)), loss


def warn_unsaid() -> None:
    """Tells why a closure that repeats is not taken for one function."""
    warnings.warn(
        "the closure looks like one function, for which L-BFGS with a line search would be better, "
        "but there are other ranks, and with a search each would go its own way if their losses "
        "differ: pass process_group=torch.distributed.group.WORLD if they train one model "
        '(DistributedDataParallel), or process_group="local" if each trains its own',
        RuntimeWarning,
        stacklevel=6,
    )
