"""A run of any optimizer on any task: so many steps, judged at a few of them."""

from __future__ import annotations

import importlib
import math
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import optimizers
from benchmarks.harness.averages import judged
from benchmarks.harness.minibatch import warm_up
from benchmarks.harness.networks import hidden_matrices
from benchmarks.harness.schedules import Schedule
from benchmarks.stochastic.task import Task


def train(
    task: str,
    options: dict[str, Any],
    optimizer: dict[str, Any],
    steps: int,
    seed: int,
    held_out: bool = False,
) -> dict[str, Any]:
    """One run.

    Args:
        task: A module whose ``build(options, steps, seed, held_out)`` returns a
            :class:`~benchmarks.stochastic.task.Task`.
        options: The task's.
        optimizer: As :func:`benchmarks.harness.optimizers.make` reads it, with "schedule" of
            :mod:`benchmarks.harness.schedules`. A "switch" counts in runs: 0.5 is half of this one.
        steps: Of the optimizer.
        seed: Of start, batches and noise.
        held_out: A tenth of the training set takes the place of what is tested on: for tuning.

    Returns:
        Lists with an entry for each of the task's marks: "step", what the judge says (None where
        it is not finite; a run ends there, and the rest is None), "gradients" (calls of the
        closure) and "cpu_seconds" (of the optimizer's steps, closures included). Besides:
        "switch_step", "report" (what FusePV says of itself), and the conditions.
    """
    torch.manual_seed(seed)
    built: Task = importlib.import_module(task).build(options, steps, seed, held_out)
    model = built.model
    opt = optimizers.make(model, optimizer, steps)
    schedule = Schedule(opt, optimizer.get("schedule", "constant"), steps)
    loss = built.batch()
    model.train()
    warm_up(model, loss, optimizer)
    torch.manual_seed(seed)  # of dropout: the same after any optimizer's warm-up

    gradients, seconds, switch_step = 0, 0.0, None
    lists: dict[str, list[Any]] = {}

    def closure() -> Tensor:
        nonlocal gradients
        gradients += 1
        model.zero_grad()
        found = loss(model)
        found.backward()
        return found

    def record(step: int) -> bool:
        found = _judged(built, opt, step)
        found |= {"step": step, "gradients": gradients, "cpu_seconds": seconds}
        for key, value in found.items():
            lists.setdefault(key, []).append(value if math.isfinite(value) else None)
        return math.isfinite(found["loss"])

    going = record(0)
    for step in range(steps):
        if not going:
            break
        if step:
            loss = built.batch()
        adam = getattr(opt, "phase", None) == "adam"
        start = time.process_time()
        schedule.set(step)
        try:
            opt.step(closure)
        except torch.linalg.LinAlgError:  # SOAP's, of a matrix that is not finite
            break
        seconds += time.process_time() - start
        if adam and opt.phase != "adam" and switch_step is None:
            switch_step = step + 1
        if step + 1 in built.marks:
            going = record(step + 1)
    for values in lists.values():
        values += [None] * (len(built.marks) - len(values))

    return {
        "data": built.note,
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": optimizer,
        "steps": steps,
        "seed": seed,
        **lists,
        "switch_step": switch_step,
        "report": asdict(opt.report()) if optimizer["name"] == "fuse_pv" else None,
    }


@torch.no_grad()
def _judged(built: Task, opt: Any, step: int) -> dict[str, float]:
    """What the judge says."""
    built.model.eval()
    with judged(opt):
        found = built.judge(step)
    built.model.train()
    return found


def describe(task: str, options: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """A task in numbers and words.

    Args:
        task: As in :func:`train`, with a ``steps(options)`` for tasks counted in epochs.
        options: The task's.
        steps: None for the module's.
    """
    module = importlib.import_module(task)
    steps = module.steps(options) if steps is None else steps
    built: Task = module.build(options, steps, 0, False)
    return {
        "data": built.note,
        "parameters": sum(p.numel() for p in built.model.parameters()),
        "hidden_matrices": len(hidden_matrices(built.model)),
        "steps": steps,
    }
