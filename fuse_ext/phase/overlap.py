"""Curvature pairs from another sample than the step's own batch, such as an overlap of batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fuse_ext.objective.evaluations import effective_gradient
from fuse_ext.objective.step_options import LbfgsOptions
from fuse_ext.phase.iteration import LbfgsEngine
from fuse_ext.vector.flat import Closure


def overlap_step(
    engine: LbfgsEngine, closure: Closure | None, pair_closure: Closure, options: LbfgsOptions
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
    engine.drop_pair()
    gradient_alone = replace(options, line_search=None, rtol=0.0)
    before = engine.evaluate(pair_closure, gradient_alone, False)
    if not before.finite:
        engine.refuse(before)
        return before.loss
    at_start = engine.new_vector()
    effective_gradient(engine.flat, engine.ops, options, before.part, before.grads, at_start)
    loss = engine.step(closure, replace(options, pairs_elsewhere=True))
    if not engine.has_pair:
        return loss
    try:
        after = engine.evaluate(pair_closure, gradient_alone, False)
    except BaseException:
        engine.undo()
        raise
    same = before.part.absent == engine.history.part.absent
    if after.finite and same:
        engine.history.set_grad_prev(at_start)
        engine.absorb_pair(after, options)
    elif after.finite:
        engine.drop_pair()  # the sample knows other parameters than the step
    else:
        engine.refuse(after)
    return loss
