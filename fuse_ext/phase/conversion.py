"""Going on in a more exact dtype: the parameters' part, and what a state entry forgets for it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_ext.kernels.fixed_step import PLACES
from fuse_ext.search.noise import NEW_FLOOR
from fuse_ext.vector.flat import WIDE, FlatParams, ParamGroup


def check_conversion(flat: FlatParams, groups: list[ParamGroup], dtype: Any, begun: bool) -> None:
    """Raises unless the parameters, and their state where it has ``begun``, can take this dtype.

    Raises:
        TypeError: It is no dtype.
        ValueError: It is none of the flat state's or less exact than what there is; or parameters
            have changed by more than their dtype since the state was made.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if flat.rows is not None:
        raise ValueError(
            f"dtype={dtype} cannot be given to parameters with shard_state=True: convert the model "
            "before, and load the state into a new optimizer"
        )
    if flat.spread:
        raise ValueError(
            f"dtype={dtype} cannot be given to DTensors, whose memory belongs to who has spread "
            "them: convert the model before, and load the state into a new optimizer"
        )
    if dtype not in WIDE:
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    params = [param for group in groups for param in group["params"]]
    held = {f"params[{i}]": param.dtype for i, param in enumerate(params)}
    if begun:
        flat.check_forms()
        held["the state"] = flat.dtype
    for what, now in held.items():
        if torch.finfo(now).eps < torch.finfo(dtype).eps:
            raise ValueError(
                f"dtype must be as exact as parameters and state at least, got {dtype}, but {what} "
                f"has {now}"
            )


def convert_params(groups: list[ParamGroup], dtype: torch.dtype) -> None:
    """Gives the parameters, which stay the same objects, and their gradients this dtype.

    Those that have it already keep their memory.
    """
    params: list[Tensor] = [param for group in groups for param in group["params"]]
    wanted = [dtype.to_complex() if param.is_complex() else dtype for param in params]
    # All memory is taken before anything changes.
    found = [_converted(param.detach(), to) for param, to in zip(params, wanted, strict=True)]
    grads = [
        None if param.grad is None else _converted(param.grad, to)
        for param, to in zip(params, wanted, strict=True)
    ]
    for param, data, grad in zip(params, found, grads, strict=True):
        if data.dtype != param.dtype:
            param.grad = None
            param.data = data
        param.grad = grad


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor with its elements in the order in which the flat vector has them."""
    if tensor.dtype == dtype:
        return tensor
    dense = torch.ops.aten.is_non_overlapping_and_dense(tensor)
    return tensor.to(
        dtype, memory_format=torch.preserve_format if dense else torch.contiguous_format
    )


def forget_rounding(entry: dict[str, Any]) -> None:
    """Takes out of a state entry what is of the loss as another dtype has rounded it.

    That is the noise of the loss and its floor, the last evaluation, and a pair that awaits its
    second gradient. What is known of the curvature and counted stays; so does the size of the loss
    at the start, by which it is known when a sum of squares has lost its digits.
    """
    anew: dict[str, Any] = {"pair_step": None, "settled": "", "arrival": []}
    anew.update(cuts=0, failing=0)  # rounding may have been why
    entry.update({name: value for name, value in anew.items() if name in entry})
    if "spent" in entry:
        entry.update(NEW_FLOOR)
        entry.pop("loss_noise", None)
    if "watched_loss" in entry:  # one look at a point must not be compared with another dtype's
        entry["watched_loss"] = math.nan
        entry.pop("watched_grad", None)
    if "control" in entry:
        entry["control"][PLACES["pair_step"]] = 0.0
    else:
        entry.pop("grad_prev", None)  # where it lies depends on the dtype
    entry.pop("strides", None)
