"""Adam from the best point known, where no line search leads on: kept if it finds a better one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.moments import AdamEngine
from fuse_ext.objective.evaluations import Point
from fuse_ext.objective.step_options import LbfgsOptions
from fuse_ext.phase.iteration import LbfgsEngine
from fuse_ext.vector.flat import Closure, ParamGroup

# The engine's decaying count of steps that led nowhere at which Adam is asked: three, or nearly.
FAILING = 3.0


def goes_astray(engine: LbfgsEngine, options: LbfgsOptions) -> bool:
    """Whether search after search has failed on one function."""
    searches = options.line_search is not None and engine.is_one_function(options)
    return searches and engine.failing >= FAILING


def adam_excursion(
    engine: LbfgsEngine, closure: Closure, options: LbfgsOptions, groups: list[ParamGroup]
) -> Any:
    """At most ``max_eval`` - 1 Adam steps with fresh moments, all in one step of the optimizer.

    The parameters end at the least loss met. Where that is the one they began with, nothing is
    left to try and the engine settles there; else L-BFGS goes on with an empty history. Only for a
    closure that is one function, since losses are compared.

    Costs two vectors of moments and a copy of the parameters, for the time of the call.

    Returns:
        The closure's loss where the step began.
    """
    engine.flat.check_unchanged()
    point = engine.start(closure, options)
    if not point.finite:
        engine.refuse(point)
        return point.loss
    params, others = point.part.params, _others(engine, point)
    start, kept = _copies(params), _copies(others)
    best, least = start, point
    adam = AdamEngine(engine.flat, engine.ops, defaultdict(dict), groups)
    try:
        while engine.has_budget:
            adam.step(groups)
            here = engine.evaluate(closure, options, False)
            if not here.finite or here.part.absent != point.part.absent:
                break
            if here.value < least.value:
                best, least = _copies(params), here
    except BaseException:
        torch._foreach_copy_([*params, *others], [*start, *kept])
        engine.note_return(options)
        raise
    torch._foreach_copy_([*params, *others], [*best, *kept])
    engine.restart(least, options, found=least is not point)
    return point.loss


def _copies(params: list[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def _others(engine: LbfgsEngine, point: Point) -> list[Tensor]:
    """Parameters with gradients in groups with lr = 0, of which Adam may make 0.0 of -0.0."""
    absent = [engine.flat.params[i] for i in point.part.absent]
    return [param for param in absent if param.grad is not None]
