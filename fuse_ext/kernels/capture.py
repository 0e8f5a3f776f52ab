"""What a CUDA graph asks of code: while it is being captured nothing runs, and nothing is read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_ext.checks import check_loss


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: then nothing runs, and Python runs only once."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_remote(device: torch.device) -> bool:
    """Whether the host waits where it reads a number that lies there."""
    return device.type != "cpu"


def refuse_while_capturing(device: torch.device, what: str) -> None:
    """Raises RuntimeError where ``what`` would become part of a graph and be repeated."""
    if is_capturing(device):
        raise RuntimeError(
            f"{what} while a CUDA graph is being captured, and would be repeated by every replay; "
            "take a step or two before the capture"
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
