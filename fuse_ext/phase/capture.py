"""What capturable=True asks of options and tensors: a step reads nothing from the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_ext.checks import check_loss
from fuse_ext.vector.flat import ParamGroup


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: then nothing runs, and Python runs only once."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_while_capturing(device: torch.device, what: str) -> None:
    """Raises RuntimeError where ``what`` would become part of a graph and be repeated."""
    if is_capturing(device):
        raise RuntimeError(
            f"{what} while a CUDA graph is being captured, and would be repeated by every replay; "
            "take a step or two before the capture"
        )


def check_capturable(group: ParamGroup, search_name: str) -> None:
    """Raises ValueError for an option of L-BFGS that needs the host between two launches.

    Args:
        group: The parameter group.
        search_name: What the option with the line search is called.
    """
    for name, wanted in ((search_name, None), ("max_iter", 1), ("rtol", 0.0)):
        if group[name] != wanted:
            raise ValueError(
                f"capturable=True needs {name}={wanted!r}, got {name}={group[name]!r}: "
                "the host would have to read the loss between two iterations or trials"
            )


def check_lr_tensor(lr: Tensor, device: torch.device) -> None:
    """Raises unless the kernels can read this lr where it is."""
    if lr.numel() != 1:
        raise ValueError(f"lr must have one element, got a tensor of {lr.numel()}")
    if lr.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lr must be float32 or float64 with capturable=True, got {lr.dtype}")
    if lr.device != device:
        raise ValueError(
            f"lr is on {lr.device} but the parameters are on {device}, where capturable=True "
            "reads it"
        )


def shared_lr(groups: list[ParamGroup], device: torch.device) -> Tensor | None:
    """The tensor that is every group's lr, or None where all are numbers.

    L-BFGS takes one step for all parameters, of which each group has a share known to the host.
    """
    lrs = [group["lr"] for group in groups]
    if not any(isinstance(lr, Tensor) for lr in lrs):
        return None
    for i, lr in enumerate(lrs):
        if lr is not lrs[0]:
            raise ValueError(
                "capturable=True needs one lr tensor for all parameter groups in the L-BFGS phase, "
                f"got {lrs[0]!r} in group 0 and {lr!r} in group {i}"
            )
    check_lr_tensor(lrs[0], device)
    first: Tensor = lrs[0]
    return first


def device_loss(loss: Any, device: torch.device) -> Tensor | None:
    """The closure's loss for a kernel to look at, unread; None if there is none or it is finite.

    Raises:
        TypeError, ValueError: As :func:`fuse_ext.checks.check_loss`.
    """
    check_loss(loss)
    if isinstance(loss, Tensor):
        return loss.detach()
    if loss is None or math.isfinite(loss):
        return None
    return torch.full((), math.nan, dtype=torch.float32, device=device)
