"""Adam from the best point known, where no line search leads on: kept if it finds a better one."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.moments import Moments
from fuse_ext.objective.evaluations import Point
from fuse_ext.objective.step_options import StepOptions
from fuse_ext.phase.lbfgs.iteration import Iteration
from fuse_ext.vector.flat import Closure, ParamGroup

# The decaying count of steps that led nowhere at which Adam is asked: three, or nearly.
FAILING = 3.0


def goes_astray(iteration: Iteration, options: StepOptions) -> bool:
    """Whether search after search has failed on one function."""
    fails = options.line_search is not None and iteration.setbacks.failing >= FAILING
    return fails and iteration.objective.is_one_function(options)


def adam_excursion(
    iteration: Iteration, closure: Closure, options: StepOptions, groups: list[ParamGroup]
) -> Any:
    """At most ``max_eval`` - 1 Adam steps with fresh moments, all in one step of the optimizer.

    The parameters end at the least loss met. Where that is the one they began with, nothing is
    left to try and the iteration settles there; else L-BFGS goes on with an empty history. Only for
    a closure that is one function, since losses are compared.

    Costs two vectors of moments and a copy of the parameters, for the time of the call.

    Returns:
        The closure's loss where the step began.
    """
    objective = iteration.objective
    iteration.flat.check_unchanged()
    point = objective.start(closure, options)
    if not point.finite:
        iteration.refuse(point)
        return point.loss
    params, others = point.part.params, _others(iteration, point)
    start, kept = _copies(params), _copies(others)
    best, least = start, point
    adam = Moments(iteration.flat, iteration.ops, defaultdict(dict), groups)
    try:
        while objective.has_budget:
            adam.step(groups)
            here = iteration.trials.attempt(closure, options, point, False)
            if not here.finite or here.part.absent != point.part.absent:
                break
            if here.value < least.value:
                best, least = _copies(params), here
    except BaseException:
        iteration.flat.note_move()
        torch._foreach_copy_([*params, *others], [*start, *kept])
        objective.note_return(options)
        raise
    iteration.flat.note_move()
    torch._foreach_copy_([*params, *others], [*best, *kept])
    _go_on(iteration, least, options, found=least is not point)
    return point.loss


def _go_on(iteration: Iteration, point: Point, options: StepOptions, found: bool) -> None:
    """L-BFGS goes on from where Adam has led, or stays for good where nothing was found."""
    objective, progress = iteration.objective, iteration.progress
    iteration.entry.update(failing=0, cuts=0, settled="")
    objective.drop_pair()
    progress.line_search = "none"
    if found:
        iteration.setbacks.reset()
        progress.reason = "max_iter"
    else:
        objective.settle_at(point, options, "line_search")
        iteration.setbacks.take_back()
        progress.reason = "line_search"
    point.grads.clear()  # of another point by now
    objective.note_arrival(point, options)


def _copies(params: list[Tensor]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def _others(iteration: Iteration, point: Point) -> list[Tensor]:
    """Parameters with gradients in groups with lr = 0, of which Adam may make 0.0 of -0.0."""
    flat = iteration.flat
    return [flat.tensors[i] for i in point.part.absent if flat.params[i].grad is not None]
