"""What the tests of LBFGS share: an optimizer, and looks into its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext import LBFGS
from fuse_ext.kernels import scalars as ring

BACKENDS = ("native", "reference")
SEARCHES = ("strong_wolfe", "approximate_wolfe", "armijo")
NEVER_STOP = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
F64 = torch.float64


def make(params: Any, **options: Any) -> LBFGS:
    """One searched iteration a step, without tolerances, unless told otherwise."""
    defaults = {"max_iter": 1, "history_size": 5, "line_search_fn": "strong_wolfe", **NEVER_STOP}
    return LBFGS(params, **{**defaults, **options})


def reason(optimizer: LBFGS) -> str:
    return optimizer._phase.progress.reason


def state(optimizer: LBFGS) -> dict[str, Any]:
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def header(optimizer: LBFGS) -> ring.Header:
    return ring.read_header(state(optimizer)["scalars"])


def pairs(optimizer: LBFGS) -> list[tuple[Tensor, Tensor]]:
    """The pairs (s, y) held, newest first, read from the state."""
    entry = state(optimizer)
    slots = entry["history"].shape[1]
    scale = ring.array(entry["scalars"], "row_scale", slots)
    count, opened = int(header(optimizer).count), int(header(optimizer).open)
    newest_first = [(opened - 1 - age) % slots for age in range(count)]
    return [
        (scale[slot] * entry["history"][0, slot], entry["history"][1, slot].clone())
        for slot in newest_first
    ]


def snapshot(optimizer: LBFGS) -> dict[str, Any]:
    """The state but for the counts of attempts."""
    attempts = ("n_iter", "func_evals", "non_finite", "bad_starts")
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in state(optimizer).items()
        if name not in attempts
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value.nan_to_num(7.0), theirs[name].nan_to_num(7.0)), name
        else:
            assert value == theirs[name], name
