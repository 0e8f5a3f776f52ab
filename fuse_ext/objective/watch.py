"""Whether a closure is one function after all, found out by calling it twice at one point."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fuse_ext.checks import check_loss
from fuse_ext.kernels.hooks import with_grad
from fuse_ext.kernels.ops import Ops
from fuse_ext.search.one_function import Values, agree
from fuse_ext.vector.flat import Closure, FlatParams
from fuse_ext.vector.gradients import NO_GRADIENT, GradStats, Readout, Told


class Look(NamedTuple):
    """What a call of the closure on a minibatch has told.

    Attributes:
        loss: As the closure returned it; None without one.
        one_function: Whether it is one function after all.
        undecided: Whether the next call will tell: until then no step may be taken.
        finite: Whether the loss is, where there is one.
        norms: Of the gradients, where they were asked for and there are some.
    """

    loss: Any = None
    one_function: bool = False
    undecided: bool = False
    finite: bool = True
    norms: GradStats | None = None


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
        self._flat, self._entry = flat, entry
        self._readout = Readout(flat, ops)

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

    def look(self, closure: Closure | None, mixed: bool, norms: bool = False) -> Look:
        """Calls the closure, if there is one; ``mixed``: groups ascend and descend at once.

        ``norms``: of the gradients that it leaves, or that are at hand, in the same copy.
        """
        loss = None if closure is None else with_grad(closure)
        if mixed or (closure is not None and loss is None):
            self.give_up()  # no function to minimise, be it one or not
        check_loss(loss)
        compares = self.on and loss is not None
        if norms:
            self._flat.check_unchanged()
        told = self._readout.read(loss, norms=norms or compares)
        if compares:
            one_function = self._tell(told)
            if one_function is not False:
                return Look(loss, bool(one_function), one_function is None)
        finite = told.loss is None or math.isfinite(told.loss)
        return Look(loss, finite=finite, norms=told.norms)

    def _tell(self, told: Told) -> bool | None:
        """Takes in a call; whether it is one function, None while that is not known."""
        entry = self._entry
        norms = told.norms or NO_GRADIENT
        assert told.loss is not None
        now = Values(told.loss, norms.square, norms.abs_sum)
        before = Values(entry["watched_loss"], *entry.get("watched_grad", (math.nan, math.nan)))
        if not before.finite and now.finite:
            entry["watched_loss"], entry["watched_grad"] = now.loss, [now.square, now.abs_sum]
            return None
        del entry["watched_loss"]
        entry.pop("watched_grad", None)
        return bool(now.finite and agree(before, now))
