"""What an L-BFGS iteration with a fixed step decides without the host: csrc/fixed_step.h in Python.

``control`` is a float64 vector beside the scalars; :data:`PLACES` names what lies where.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_ext import _C
from fuse_ext.kernels import scalars as ring

PLACES: dict[str, int] = _C.control_layout()
# What lbfgs_direction and lbfgs_move do next.
STAY, GO, RETURN = 0, 1, 2
# Progress.reason of each reason.
REASONS = ("not started", "max_iter", "non_finite", "lr", "gradient", "slope", "no_descent")
_STEPPED, _NON_FINITE, _LR, _GRADIENT, _SLOPE, _NO_DESCENT = range(1, len(REASONS))
# As in csrc/fixed_step.h.
CUT, MOST_CUTS = 0.1, 15


def new_control(device: torch.device) -> Tensor:
    """A control vector before the first step."""
    return torch.zeros(len(PLACES), dtype=torch.float64, device=device)


class Control:
    """A control vector by the names of its numbers; every access reads or writes the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        vars(self)["_tensor"] = tensor

    def __getattr__(self, name: str) -> float:
        tensor: Tensor = vars(self)["_tensor"]
        return float(tensor[PLACES[name]])

    def __setattr__(self, name: str, value: float) -> None:
        tensor: Tensor = vars(self)["_tensor"]
        tensor[PLACES[name]] = value


def decide(
    scalars: Tensor,
    slots: int,
    control: Tensor,
    *,
    lr: float,
    loss: float,
    curvature_tol: float,
    tolerance_grad: float,
    tolerance_change: float,
    eps: float,
    patience: int,
    closes_pair: bool,
    commit: Any,
    recursion: Any,
) -> None:
    """``decide_step``; ``commit(t)`` and ``recursion()`` are those of lbfgs_two_loop."""
    numbers = Control(control)
    numbers.move, numbers.slope_tolerance = STAY, tolerance_change
    if not (math.isfinite(numbers.grad_square) and math.isfinite(loss)):
        _refuse(scalars, slots, numbers, patience, closes_pair)
        return
    if not closes_pair:
        numbers.bad_starts = 0
        if lr == 0.0 or numbers.grad_largest <= tolerance_grad:
            numbers.reason = _LR if lr == 0.0 else _GRADIENT
            return
    if numbers.reset:
        _forget(scalars, slots, numbers)
        numbers.reset = 0
    if numbers.pair_step:
        commit(numbers.pair_step)
    numbers.pair_step = 0
    if closes_pair:
        return
    recursion()
    slope = _slope_to_come(scalars, slots, numbers)
    if ring.read_header(scalars).usable > 0 and not (slope < 0.0 and math.isfinite(slope)):
        _forget(scalars, slots, numbers)
        ring.array(scalars, "coef_g", slots)[0] = -1.0
    numbers.n_iter += 1
    numbers.move = GO
    if ring.read_header(scalars).usable > 0:
        numbers.cuts, numbers.step_length = 0, lr
        return
    visible = math.sqrt(eps) * numbers.param_largest / numbers.grad_largest
    step = min(1.0, 1.0 / numbers.grad_sum)
    step = max(step, visible if math.isfinite(visible) else 0.0)
    numbers.step_length = step * CUT**numbers.cuts * lr


def _forget(scalars: Tensor, slots: int, numbers: Control) -> None:
    for name in ("count", "gamma", "usable"):
        scalars[ring.index(name, slots)] = 0.0
    numbers.resets += 1


def _refuse(
    scalars: Tensor, slots: int, numbers: Control, patience: int, closes_pair: bool
) -> None:
    waiting = numbers.pair_step != 0.0
    if closes_pair and not waiting:
        return
    numbers.non_finite += 1
    numbers.reason = _NON_FINITE
    numbers.bad_starts += not closes_pair
    if not waiting or not (closes_pair or numbers.bad_starts > patience):
        return
    numbers.move, numbers.pair_step = RETURN, 0
    if ring.read_header(scalars).usable > 0:
        _forget(scalars, slots, numbers)
    else:
        numbers.cuts = min(numbers.cuts + 1, MOST_CUTS)
        numbers.step_cuts += 1


def _slope_to_come(scalars: Tensor, slots: int, numbers: Control) -> float:
    slope = float(ring.array(scalars, "coef_g", slots)) * numbers.grad_square
    named = {
        name: ring.array(scalars, name, slots).tolist()
        for name in ("coef_s", "coef_y", "grad_s", "grad_y")
    }
    for i in ring.usable_slots(scalars, slots):
        slope += named["coef_s"][i] * named["grad_s"][i] + named["coef_y"][i] * named["grad_y"][i]
    return slope


def _judge(scalars: Tensor, numbers: Control) -> int:
    header = ring.read_header(scalars)
    if not (header.direction_dot_grad < 0.0 and math.isfinite(header.direction_sq)):
        return _NO_DESCENT
    return _SLOPE if -header.direction_dot_grad <= numbers.slope_tolerance else _STEPPED


def ordered_move(scalars: Tensor, control: Tensor) -> tuple[float, bool] | None:
    """``move_order`` and ``note_move``: step and save of lbfgs_move, or None to stay."""
    numbers = Control(control)
    if numbers.move == RETURN:
        return 0.0, False
    if numbers.move != GO:
        return None
    reason = _judge(scalars, numbers)
    numbers.reason = reason
    if reason == _NO_DESCENT and ring.read_header(scalars).usable > 0:
        numbers.reset = 1
    if reason != _STEPPED:
        return None
    numbers.pair_step = numbers.taken = numbers.step_length
    return numbers.step_length, True
