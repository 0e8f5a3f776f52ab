"""Checks of what a user passes in: each names the argument and its value."""

from __future__ import annotations

import math
import sys
import warnings
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raises ValueError unless ``low <= value <= high`` (NaN never is)."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must have one element, got a tensor of {value.numel()}")
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not (low <= number <= high) or math.isinf(number):
        bound = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g} and finite"
        raise ValueError(f"{name} must be {bound}, got {number!r}")


def check_tolerance(name: str, value: Any) -> None:
    """Raises unless ``value`` is a number of at least 0, or inf (stop at once) or -inf (never)."""
    if not isinstance(value, Tensor) and isinstance(value, Real) and math.isinf(value):
        return
    check_number(name, value, 0.0)


def check_integer(name: str, value: Any, low: int) -> None:
    """Raises unless ``value`` is an int of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def check_betas(betas: Any) -> tuple[float, float]:
    """The two decay rates as floats; each must lie in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be a pair, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, 0.0)
        if not float(beta) < 1.0:
            raise ValueError(f"betas[{i}] must be in [0, 1), got {float(beta)!r}")
    return float(betas[0]), float(betas[1])


def refuse_closure(closure: Any) -> NoReturn:
    """Raises TypeError for what is no function."""
    got = "a tensor" if isinstance(closure, Tensor) else repr(closure)
    raise TypeError(
        f"closure must be a function, got {got}: pass the function itself, step(closure), not what "
        "it returns; FusePV takes a loss whose gradients are at hand as step(loss=loss)"
    )


def check_loss(loss: Any, needed_by: str = "") -> None:
    """Raises unless the closure's loss is one number, without reading it.

    Args:
        loss: May be None where nothing needs it.
        needed_by: What does, in words.

    Raises:
        TypeError: The closure returned no number.
        ValueError: It returned a tensor of several elements.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"closure must return a scalar loss, got a tensor of shape {tuple(loss.shape)}"
            )
        if loss.is_complex():
            raise TypeError(f"closure must return a real loss, got a tensor of {loss.dtype}")
    elif loss is None and needed_by:
        raise TypeError(
            "closure must return the loss, got None; end it with `return loss`, which "
            f"{needed_by} needs"
        )
    elif loss is not None and not isinstance(loss, Real):
        raise TypeError(f"closure must return the loss, got {loss!r}; end it with `return loss`")


def loss_value(loss: Any) -> float:
    """The closure's loss, not None, as a float; raises as :func:`check_loss` does."""
    check_loss(loss)
    return float(loss.item() if isinstance(loss, Tensor) else loss)


def warn_caller(message: str) -> None:
    """A RuntimeWarning that points at the line of the user's that called this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in (
        "fuse_ext",
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
