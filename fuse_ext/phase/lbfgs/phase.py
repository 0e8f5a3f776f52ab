"""The L-BFGS phase with a line search or a fixed step (Algorithms 1 and 2).

Around the iteration stand what concerns whole steps: batches, pairs of another sample, and what to
do where search after search fails.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fuse_ext.curvature.dense import MATRIX_NAMES, DenseMatrix
from fuse_ext.curvature.protocol import InverseHessian
from fuse_ext.curvature.ring import History
from fuse_ext.kernels.ops import Ops
from fuse_ext.objective.evaluations import effective_gradient
from fuse_ext.objective.progress import Progress
from fuse_ext.objective.step_options import StepOptions
from fuse_ext.phase.lbfgs.device import DevicePhase, to_host
from fuse_ext.phase.lbfgs.excursion import FAILING, adam_excursion, goes_astray
from fuse_ext.phase.lbfgs.iteration import Iteration
from fuse_ext.phase.modes import finds_out
from fuse_ext.phase.protocol import Call, Outcome
from fuse_ext.search.noise import Precision
from fuse_ext.vector.flat import Closure, FlatParams, ParamGroup
from fuse_ext.vector.host.rows import lies_apart


class LbfgsPhase:
    """Algorithm 1, ``max_iter`` iterations a step.

    Args:
        iteration: The iteration and its state.
        finds_out: Where the closure is seen to be one function, step as if that were promised.
    """

    begun, host_decides = True, True

    def __init__(self, iteration: Iteration, finds_out: bool = False) -> None:
        self.iteration, self._finds_out = iteration, finds_out
        self.progress: Progress = iteration.progress
        self.precision: Precision = iteration.objective.precision
        # Whether the user has cleared or replaced ``Optimizer.state``; asked in every step.
        self.outdated = iteration.objective.outdated

    @property
    def history(self) -> InverseHessian:
        """What it knows of H."""
        return self.iteration.history

    def step(self, call: Call) -> Outcome:
        """At most ``max_iter`` iterations, or Adam's try where they lead nowhere."""
        iteration, closure, options = self.iteration, call.closure, call.options
        assert options is not None
        function = iteration.objective.function
        before = self._finds_out and self.believes(call.groups)
        if self._finds_out and function.sure:
            options = options.promised
        seen, rescued = iteration.entry["non_finite"], False
        if iteration.entry.get("batch_id") != call.batch_id:
            iteration.objective.begin_batch(call.batch_id)
        if call.pair_closure is not None:
            loss = overlap_step(iteration, closure, call.pair_closure, options)
        elif call.rescues and closure is not None and goes_astray(iteration, options):
            loss, rescued = adam_excursion(iteration, closure, options, call.groups), True
        else:
            loss = iteration.run(closure, options, call.evaluated)
        refused = iteration.entry["non_finite"] > seen and self.progress.reason == "non_finite"
        if not call.rescues:
            return Outcome(loss, None, refused)
        one = call.groups[0]["max_iter"] == 1  # else these are steps on batches, more likely
        believed = one and self._finds_out and self.believes(call.groups) and not before
        if self._finds_out and function.looks_like_batches:
            unscale(self.history, call.groups[0])
        failing = iteration.setbacks.failing >= FAILING
        if failing and goes_astray(iteration, options):
            return Outcome(loss, None, refused, rescued, believed=believed)
        others = function.contradicted
        return Outcome(loss, None, refused, rescued, failing, others, believed=believed)

    def believes(self, groups: list[ParamGroup]) -> bool:
        """Whether the closure is taken for one function by now."""
        function = self.iteration.objective.function
        # What returns to Adam where it errs need not be sure to keep more pairs.
        return function.known if finds_out(groups[0]) else function.undisputed

    def refuse(self) -> None:
        """Counts a step that was not taken for an infinite gradient."""
        self.iteration.setbacks.count_non_finite()

    def new_objective(self) -> None:
        """The closure is another function from the next step on: the pairs stay, no more."""
        self.iteration.objective.new_objective()
        self.iteration.setbacks.begin_anew()

    def settle(self, log: dict[str, Any]) -> None:
        """The host has counted everything itself."""

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        return self.history.nbytes

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch vectors held between steps (not part of the state)."""
        return self.iteration.trials.workspace_nbytes + self.history.workspace_nbytes


def overlap_step(
    iteration: Iteration, closure: Closure | None, pair_closure: Closure, options: StepOptions
) -> Any:
    """A step on the closure's batch with y = g(x + t p) - g(x) of ``pair_closure``'s sample.

    With the overlap of this batch and the next as sample this is multi-batch L-BFGS (Berahas,
    Nocedal and Takac, NeurIPS 2016). Costs two gradients of the sample more, and a vector of
    scratch.
    """
    if options.max_iter > 1 or options.deterministic:
        raise ValueError(
            f"pair_closure needs max_iter=1 and deterministic=False, got max_iter="
            f"{options.max_iter} and deterministic={options.deterministic}"
        )
    if closure is None:
        raise ValueError("closure=None with a pair_closure: its gradients would take their place")
    objective = iteration.objective
    objective.drop_pair()
    gradient_alone = replace(options, line_search=None, rtol=0.0)
    before = objective.evaluate(pair_closure, gradient_alone, False)
    if not before.finite:
        iteration.refuse(before)
        return before.loss
    at_start = iteration.flat.new_vector()
    effective_gradient(iteration.flat, iteration.ops, options, before.part, before.grads, at_start)
    loss = iteration.run(closure, replace(options, pairs_elsewhere=True))
    if not objective.has_pair:
        return loss
    try:
        after = objective.evaluate(pair_closure, gradient_alone, False)
    except BaseException:
        iteration.trials.undo()
        raise
    same = before.part.absent == iteration.history.part.absent
    if after.finite and same:
        iteration.history.set_grad_prev(at_start)
        iteration.absorb_pair(after, options)
    elif after.finite:
        objective.drop_pair()  # the sample knows other parameters than the step
    else:
        iteration.refuse(after)
    return loss


def unscale(history: InverseHessian, group: ParamGroup) -> None:
    """On batches pairs do not scale what is before them, unless that was asked for."""
    unasked = not group["self_scaling"]
    if unasked and isinstance(history, History) and history.header().self_scaling:
        history.stop_scaling()


def make_lbfgs(
    flat: FlatParams,
    ops: Ops,
    entry: dict[str, Any],
    group: ParamGroup,
    self_scaling: bool,
    broyden: bool,
    finds_out: bool = False,
    dense: bool = False,
) -> LbfgsPhase | DevicePhase:
    """The phase for this group's options, capturable or not, whichever made ``entry``.

    What ``entry`` holds goes on as it began: pairs or a matrix, with self-scaling or without.
    """
    new, size, dtype = "history" not in entry, group["history_size"], group["history_dtype"]
    if group.get("capturable"):
        device_phase = DevicePhase(flat, ops, entry, size, dtype)
        if new and self_scaling:
            device_phase.history.scale_itself()
        return device_phase
    to_host(entry)
    history: InverseHessian
    if MATRIX_NAMES[0] in entry or (new and dense):
        history = DenseMatrix(flat, ops, entry, group["update"], group["self_scaling"] is not False)
    else:
        apart = lies_apart(group.get("history_device"), flat)
        history = ring = History(flat, ops, entry, size, dtype, apart=apart)
        if new and self_scaling:
            ring.scale_itself()
        if new and broyden:
            ring.update_as_broyden()
    return LbfgsPhase(Iteration(flat, ops, entry, history), finds_out)
