"""The phase itself: what it looks at before a step, who takes the step, and when to go back."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from fuse_ext.curvature.moments import Moments
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.scalars import Header
from fuse_ext.objective.progress import Progress
from fuse_ext.objective.setbacks import COUNTERS, TALLIES
from fuse_ext.objective.step_options import mixed_signs
from fuse_ext.objective.watch import Watch
from fuse_ext.phase.living.average import AVERAGE_NAMES, COUNT, EVERY, WeightAverage
from fuse_ext.phase.living.descent import NAMES as DESCENT_NAMES
from fuse_ext.phase.living.descent import Descent
from fuse_ext.phase.living.lengths import NAMES, Lengths, have_changed, rates
from fuse_ext.phase.living.metric.kronecker import KroneckerMetric
from fuse_ext.phase.living.metric.state import DIAGONAL, KRONECKER, KRONECKER_NAMES
from fuse_ext.phase.living.trend import BLOCK, Trend
from fuse_ext.phase.living.trend import NAMES as TREND_NAMES
from fuse_ext.phase.modes import AUTO
from fuse_ext.phase.protocol import Call, Outcome
from fuse_ext.search.noise import Precision
from fuse_ext.vector.flat import FlatParams, ParamGroup

# What an entry holds beside lengths and trend: every group's lr at the last step.
LIVING_NAMES = (*NAMES, *TREND_NAMES, "last_lr")
# The step from which on losses that look like one function's lead to another look at two calls at
# one point; missing where there is nothing to find out. A look takes an evaluation, so that each
# one is twice as far from the switch as the one before.
LOOKS_FROM = "looks_from"
# What older checkpoints lack.
LATER_NAMES = (*DESCENT_NAMES, LOOKS_FROM, COUNT)
LISTS = ("last_lr", "means")  # of numbers, or of lists of them
_NO_PAIRS = Header(*[0.0] * len(fields(Header)))


@dataclass
class NoPairs:
    """What a report asks of a history, of a phase without one.

    Attributes:
        kind: The metric's.
    """

    kind: str

    def header(self) -> Header:
        """No pair was held, accepted or skipped."""
        return _NO_PAIRS


class LivingPhase:
    """Adam's averages go on, in a metric that lives; one gradient a step.

    Args:
        flat: The parameters.
        ops: Kernels to use.
        state: ``Optimizer.state``; holds Adam's moments, and takes the metric of matrices.
        groups: ``Optimizer.param_groups``.
    """

    begun, host_decides = True, True

    def __init__(
        self, flat: FlatParams, ops: Ops, state: dict[Any, Any], groups: list[ParamGroup]
    ) -> None:
        self._flat, self._ops, self._state = flat, ops, state
        self._entry: dict[str, Any] = state[flat.params[0]]
        # Counted on the host, which decides here, whatever Adam did.
        first = groups[0]
        narrow, keeps = first["moment_dtype"], bool(first["master_weights"])
        self.moments = Moments(flat, ops, state, groups, narrow, keeps_masters=keeps)
        for name in (*COUNTERS, *TALLIES):
            self._entry.setdefault(name, 0)
        metric = groups[0]["metric"]
        self._matrices: KroneckerMetric | None = None
        if metric != DIAGONAL:
            limited = metric == AUTO
            self._matrices = KroneckerMetric(flat, state, self.moments, groups, limited)
        turns = self._matrices is not None and bool(self._matrices.forms)
        self.history = NoPairs(KRONECKER if turns else DIAGONAL)
        averages = bool(first.get("average_weights"))
        self.average = WeightAverage(flat, state, self.moments) if averages else None
        self._lengths, self._trend = Lengths(self._entry), Trend(self._entry)
        self._descent = Descent(self._entry)
        self._watch = Watch(flat, ops, self._entry)
        self._largest = torch.finfo(flat.dtype).max
        self.progress = Progress()
        self.precision = Precision(self._entry, torch.finfo(flat.dtype).eps)

    def take_memory(self) -> None:
        """Takes what matrices and averages will need, so that it is known at the switch."""
        if self._matrices is not None:
            self._matrices.begin()
        if self.average is not None:
            self.average.begin()

    def inherit(self, groups: list[ParamGroup], scheduled: bool, watches: bool) -> None:
        """Begins where Adam ends.

        Args:
            groups: ``Optimizer.param_groups``.
            scheduled: Whether lr has changed in the Adam phase.
            watches: Whether to find out if the closure is one function.
        """
        self._lengths.begin(scheduled)
        self._restart()
        self._entry["last_lr"] = rates(groups)
        if watches:
            self._entry[LOOKS_FROM] = BLOCK
            self._watch.begin()

    def outdated(self, state: dict[Any, Any]) -> bool:
        """Whether the user has cleared or replaced ``Optimizer.state``."""
        return state.get(self._flat.params[0]) is not self._entry

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        more = (part.nbytes for part in (self._matrices, self.average) if part is not None)
        return self.moments.nbytes + sum(more)

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of what is measured until matrices have their metric."""
        return 0 if self._matrices is None else self._matrices.measuring_nbytes

    def new_objective(self) -> None:
        """The closure is another function: gradients before and after are not compared."""
        self._lengths.restart()
        self._restart()
        if LOOKS_FROM in self._entry:
            self._watch.begin()

    def _restart(self) -> None:
        """Losses begin anew, and so do averages."""
        self._trend.restart()
        self._descent.restart()
        if self.average is not None:
            self.average.restart()

    def settle(self, log: dict[str, Any]) -> None:
        """The host has counted everything itself."""

    def refuse(self) -> None:
        """Counts a step that was not taken for a value that is not finite."""
        self._entry["non_finite"] += 1
        self.progress.reason = "non_finite"

    def leave(self, groups: list[ParamGroup]) -> None:
        """Leaves parameters as steps have, and Adam's moments as Adam would have them."""
        if self.average is not None:
            self.average.drop()
        if self._matrices is not None:
            self._matrices.leave(groups)

    def step(self, call: Call) -> Outcome:
        """One step, unless the closure turns out to be one function all along."""
        entry, closure, groups = self._entry, call.closure, call.groups
        if self.average is not None and self.average.in_place:
            raise RuntimeError(
                "step() after optimizer.eval(), which has put the averages of the weights in their "
                "place: call optimizer.train() before the closure or backward()"
            )
        look = self._watch.look(closure, mixed_signs(groups), norms=True, loss=call.loss)
        entry["func_evals"] += closure is not None
        if look.undecided:
            self.progress.reason = "watch"
        if look.undecided or look.one_function:
            return Outcome(look.loss, one_function=look.one_function)
        if not look.finite:
            self.refuse()
            return Outcome(look.loss, refused=True)
        if look.norms is None:
            self.progress.stop_untrained(entry["n_iter"])
            return Outcome(look.loss)
        square = look.norms.square
        if square == 0.0 and not entry["living_steps"] and not self._has_trained():
            self.progress.stop_untrained(0)
            return Outcome(look.loss)
        if not square <= self._largest:  # nor may its square overflow in the metric
            self.refuse()
            return Outcome(look.loss, refused=True)
        self._move(groups, math.sqrt(square))
        return Outcome(look.loss, worse=self._makes_it_worse(call, look.value))

    def _look_again(self) -> None:
        """What looked like batches may have been a function that changed between the two calls."""
        entry = self._entry
        if entry["n_iter"] >= entry.get(LOOKS_FROM, math.inf):
            entry[LOOKS_FROM] = 2 * entry["n_iter"]
            self._watch.begin()

    def _has_trained(self) -> bool:
        """Whether Adam has met a gradient that is not 0."""
        trained = bool(self.moments.stored("exp_avg").any())
        return self._flat.measures.any(trained)[0]

    def _move(self, groups: list[ParamGroup], norm: float) -> None:
        entry, lengths = self._entry, self._lengths
        lrs, cap = rates(groups), float(groups[0]["step_cap"])
        if have_changed(before := entry["last_lr"], lrs):
            lengths.hold(cap, max(before) if isinstance(before, list) else before)
        entry["last_lr"], lr = lrs, max(lrs)
        factor = lengths.factor(cap, lr)
        scaled = [{**group, "lr": float(group["lr"]) * factor} for group in groups]
        ready: frozenset[int] = frozenset()
        if self._matrices is not None:
            self._flat.check_unchanged()
            ready = self._matrices.ready()
            self._matrices.gather(groups, ready)
        self.moments.step(scaled, leave_out=ready)
        if self._matrices is not None:
            self._matrices.step(groups, factor, ready)
            if not self._matrices.forms:  # none was worth having
                self.history.kind = DIAGONAL
        if lengths.count(norm, cap, lr, self._descent.falling):
            self._restart()
        entry["n_iter"] += 1
        if self.average is not None and entry["n_iter"] % EVERY == 0:
            self.average.take_in()
        self.progress.step_length = factor
        self.progress.reason, self.progress.line_search = "max_iter", "fixed"

    def _makes_it_worse(self, call: Call, loss: float | None) -> bool:
        """Whether losses have stayed above those at the switch, and not for too long steps.

        Steps that were longer than Adam's are the first to go. Unknown losses rise and fall unseen,
        and so do those of one rank, by which each would go its own way.
        """
        if loss is None or self._flat.unsaid or mixed_signs(call.groups):
            self._descent.forget()
            return False
        loss = -loss if call.groups[0]["maximize"] else loss
        worse = self._trend.worse(loss)
        if self._descent.smooth(loss, self._trend.block) and call.closure is not None:
            self._look_again()
        return worse and not self._lengths.shorten()


def put_average(phase: Any, in_place: bool) -> None:
    """Gives parameters the mean of the last ones, or these back; nothing where there is none."""
    average = phase.average if isinstance(phase, LivingPhase) else None
    if average is not None and average.in_place != in_place:
        average.put() if in_place else average.take_back()


def living_names() -> tuple[str, ...]:
    """What the phase keeps in a parameter's state beside Adam's moments."""
    return (*LIVING_NAMES, *LATER_NAMES, *KRONECKER_NAMES, *AVERAGE_NAMES)
