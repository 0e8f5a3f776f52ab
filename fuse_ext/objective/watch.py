"""Whether a closure is one function, found out by calling it twice at one point.

For minibatches that may be none (``Watch``), and for what was promised to be one (``Habits``).
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

from torch import Tensor

from fuse_ext.checks import check_loss, warn_caller
from fuse_ext.kernels.hooks import with_grad
from fuse_ext.kernels.ops import Ops
from fuse_ext.search.one_function import FORGETTING, Values, agree
from fuse_ext.vector.flat import Closure, FlatParams
from fuse_ext.vector.gradients import NO_GRADIENT, GradStats, Readout, Told
from fuse_ext.vector.shards import local

# So many calls in a row with gradients of 0 tell as much as two others: a batch that a network has
# learnt by heart, or beyond a margin, has none either.
SATURATED = 20


class Look(NamedTuple):
    """What a call of the closure on a minibatch has told.

    Attributes:
        loss: As the closure returned it, or as it was passed; None without one.
        one_function: Whether it is one function after all.
        undecided: Whether the next call will tell: until then no step may be taken.
        finite: Whether the loss is, where there is one that all ranks know.
        norms: Of the gradients, where they were asked for and there are some.
        value: The loss as a number, read in the same copy as they.
    """

    loss: Any = None
    one_function: bool = False
    undecided: bool = False
    finite: bool = True
    norms: GradStats | None = None
    value: float | None = None


class Watch:
    """Compares two calls at one point: the loss and the norms of the gradient.

    Args:
        flat: The parameters, which must not move between the two calls.
        ops: Kernels to use.
        entry: The optimizer's state entry: holds ``watched_loss`` (NaN before the first call) while
            there is something to find out, ``watched_grad``, and how often in a row that was 0.
    """

    NAMES = ("watched_loss", "watched_grad", "watched_zeros")

    def __init__(self, flat: FlatParams, ops: Ops, entry: dict[str, Any]) -> None:
        self._flat, self._entry = flat, entry
        self._readout = Readout(flat, ops)

    def begin(self) -> None:
        """The next two calls are compared."""
        self._entry["watched_loss"] = math.nan

    def give_up(self) -> None:
        """There is no finding out, for now."""
        for name in self.NAMES:
            self._entry.pop(name, None)

    @property
    def on(self) -> bool:
        """Whether it is not known yet."""
        return "watched_loss" in self._entry

    def look(
        self, closure: Closure | None, mixed: bool, norms: bool = False, loss: Any = None
    ) -> Look:
        """Calls the closure, if there is one; ``mixed``: groups ascend and descend at once.

        ``norms``: of the gradients that it leaves, or that are at hand, in the same copy.
        ``loss``: of these, where there is no closure.
        """
        try:
            if closure is not None:
                loss = with_grad(closure)
            check_loss(loss)
        except Exception:
            if norms and closure is not None:
                self._flat.measures.tell_raised()
            raise
        if mixed or (closure is not None and loss is None):
            self.give_up()  # no function to minimise, be it one or not
        compares = self.on and closure is not None and loss is not None
        if norms:
            self._flat.check_unchanged()
        told = self._readout.read(loss, norms=norms or compares)
        if compares:
            one_function = self._tell(told)
            if one_function and self._flat.unsaid:
                warn_unsaid()  # other ranks may see batches
            elif one_function is not False:
                return Look(loss, bool(one_function), one_function is None)
        finite = self._flat.unsaid or told.loss is None or math.isfinite(told.loss)
        return Look(loss, finite=finite, norms=told.norms, value=told.loss)

    def _tell(self, told: Told) -> bool | None:
        """Takes in a call; whether it is one function, None while that is not known."""
        entry = self._entry
        norms = told.norms or NO_GRADIENT
        assert told.loss is not None
        # Where nobody has spoken of other ranks, gradients are what all know.
        loss = 0.0 if self._flat.unsaid else told.loss
        now = Values(loss, norms.square, norms.abs_sum)
        before = Values(entry["watched_loss"], *entry.get("watched_grad", (math.nan, math.nan)))
        if not before.finite and now.finite:
            entry["watched_loss"], entry["watched_grad"] = now.loss, [now.square, now.abs_sum]
            return None
        same = bool(now.finite and agree(before, now))
        zeros = entry.get("watched_zeros", 1) + 1
        if same and told.norms is not None and now.square == 0.0 and zeros < SATURATED:
            entry["watched_zeros"] = zeros
            return None
        self.give_up()
        return same


def warn_unsaid() -> None:
    """Tells why a closure that repeats is not taken for one function."""
    warn_caller(
        "the closure looks like one function, for which L-BFGS with a line search would be better, "
        "but there are other ranks, and with a search each would go its own way if their losses "
        "differ: pass process_group=torch.distributed.group.WORLD if they train one model "
        '(DistributedDataParallel), or process_group="local" if each trains its own'
    )


# Changes of the function, each counting less from step to step, after which they are no accident:
# every step or every second one. Points that are drawn anew every tenth step come to 1.5.
MANY_CHANGES = 3.0


class _Mark(NamedTuple):
    """Where there is a NaN in a gradient, which the closure is free to drop, and what was there."""

    grad: weakref.ref[Tensor]
    place: tuple[int, ...]
    value: Tensor


class Habits:
    """What a closure does that a function does not; each is said once.

    Adding to the gradients that it finds is put right: they are taken away before each call.

    Args:
        flat: The parameters.
        entry: The optimizer's state entry: counts ``func_evals``.

    Attributes:
        adds: Whether it adds to gradients; None while that is not known.
        doubles: Whether nothing was said yet of two calls at one point that differ.
    """

    def __init__(self, flat: FlatParams, entry: dict[str, Any]) -> None:
        self._flat, self._entry = flat, entry
        self.adds: bool | None = None
        self._changes = 0.0
        self.doubles, self._said_changes = True, False

    def call(self, closure: Closure) -> Any:
        """Calls it, the first time where there are gradients with a mark on one of them."""
        if self.adds:
            self._clear()
        if self.adds is not None:
            return with_grad(closure)
        mark = self._mark()
        marked, adds = self._flat.measures.any(mark is not None)[0], False
        if not marked:
            return with_grad(closure)
        try:
            if mark is None:  # of other ranks' gradients there is one
                loss = with_grad(closure)
            else:
                loss, adds = self._call_with(closure, mark)
        except Exception:
            if self._flat.together is not None:  # the others wait for an answer, and know then
                self.adds = self._flat.measures.any(False)[0]
            raise
        self.adds = self._flat.measures.any(adds)[0]
        if not self.adds:
            return loss
        warn_caller(
            "the closure adds to the gradients that it finds, so that at every trial of a step "
            "they hold those of the trials before it. From here on FusePV takes them away before "
            "each call. Begin the closure with optimizer.zero_grad(); sums over several backward "
            "passes belong into one call of it"
        )
        self._clear()
        self._entry["func_evals"] += 1
        return with_grad(closure)

    def _call_with(self, closure: Closure, mark: _Mark) -> tuple[Any, bool]:
        """The loss, and whether the gradient still holds the mark."""
        try:
            loss = with_grad(closure)
        except BaseException:
            if (grad := mark.grad()) is not None:
                local(grad)[mark.place] = mark.value
            raise
        # A gradient that the closure has not made anew is the one with the mark.
        grad = mark.grad()
        if grad is None or all(param.grad is not grad for param in self._flat.params):
            return loss, False
        return loss, math.isnan(float(local(grad)[mark.place].real))

    def _mark(self) -> _Mark | None:
        """Puts a NaN into a gradient that a closure has to make anew."""
        for i, param in enumerate(self._flat.params):
            if self._flat.grad(i) is None or (whole := param.grad) is None:
                continue
            if not param.requires_grad or not (grad := local(whole)).numel():
                continue
            place = (0,) * grad.dim()
            value = grad[place].clone()
            grad[place] = math.nan
            return _Mark(weakref.ref(whole), place, value)
        return None

    def _clear(self) -> None:
        for param in self._flat.params:
            param.grad = None

    def check_own(self, others: bool) -> None:
        """To be asked where a step begins if it ``adds``; ``others``: with gradients not ours.

        Raises:
            RuntimeError: They are part of another sum, on some rank.
        """
        own = others and any(param.grad is not None for param in self._flat.params)
        if self._flat.measures.any(own)[0]:
            raise RuntimeError(
                "gradients were accumulated before step(closure), and the closure adds to them: a "
                "line search cannot evaluate that sum again. Do all backward passes in one call of "
                "the closure (with Lightning: leave accumulate_grad_batches at 1 and sum over the "
                "parts in training_step), or leave out deterministic=True and the line search"
            )

    def begin_step(self) -> None:
        """Changes that lie back count less."""
        self._changes *= FORGETTING

    def tell_differs(self, first: float, second: float) -> None:
        """Two calls at one point, one after the other, gave these losses."""
        self.doubles = False
        warn_caller(
            f"deterministic=True, but two calls of the closure at one point gave the losses "
            f"{first:.7g} and {second:.7g}: dropout, noise, or batches that are drawn inside it. "
            "FusePV evaluates a step's start again where a trial does not fit it, which costs "
            "evaluations, and cannot converge. Call model.eval() or draw before step(closure); on "
            "minibatches leave deterministic out"
        )

    def tell_changed(self) -> None:
        """The step under way has begun on another function than the last one has ended on."""
        self._changes += 1.0
        if self._changes < MANY_CHANGES or self._said_changes or not self.doubles:
            return
        self._said_changes = True
        warn_caller(
            "deterministic=True, but the closure is another function from step to step, as "
            "minibatches are. FusePV notices, and evaluates where the step began again, which "
            "takes one or two evaluations a step; curvature of many functions is no function's. "
            "On minibatches leave deterministic out; where points or weights change now and "
            "then, call optimizer.new_objective()"
        )
