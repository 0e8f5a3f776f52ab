"""Checks of the tensors that are to share one flat vector: each names the tensor and its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fuse_ext.checks import COMPLEX, FLOATING


def listed(params: Any) -> Any:
    """What an optimizer was given, a list in place of an iterator.

    Raises:
        TypeError: It is a model.
        ValueError: It is an iterator with nothing (left) in it.
    """
    if isinstance(params, nn.Module):
        raise TypeError(
            f"params is a {type(params).__name__}, a model: pass its parameters, model.parameters()"
        )
    if not isinstance(params, Iterator):
        return params
    found = list(params)
    if not found:
        raise ValueError(
            "optimizer got an empty parameter list: params is an iterator with nothing left in it. "
            "One that was used before, as by another optimizer, is empty: call model.parameters() "
            "once more, or keep list(model.parameters())"
        )
    return found


def check_params(params: list[Tensor], owners: list[Tensor] | None = None) -> None:
    """Raises for parameters that cannot share one flat vector.

    Args:
        params: What lies here of each.
        owners: The parameters themselves, where that is not the same.
    """
    if not params:
        raise ValueError("params is empty: the optimizer got no tensor")
    seen: dict[Tensor, int] = {}
    for i, (param, owner) in enumerate(zip(params, owners or params, strict=True)):
        if owner in seen:
            raise ValueError(
                f"params[{i}] is the same tensor as params[{seen[owner]}]; each may appear once"
            )
        seen[owner] = i
        if param.layout != torch.strided:
            raise TypeError(
                f"params[{i}] has layout {param.layout}; only dense tensors are supported"
            )
        if param.dtype not in FLOATING + COMPLEX:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING + COMPLEX)
            raise TypeError(f"params[{i}] has dtype {param.dtype}; supported are {names}")
        if param.device != params[0].device:
            raise ValueError(
                f"params[{i}] is on {param.device} but params[0] is on {params[0].device}; "
                "use one optimizer per device"
            )
        if param.is_conj() or param.is_neg():
            raise ValueError(
                f"params[{i}] is a conjugated or negated view, whose memory holds other values; "
                "pass its .resolve_conj() or .resolve_neg()"
            )
        if any(
            n > 1 and stride == 0 for n, stride in zip(param.shape, param.stride(), strict=True)
        ):
            raise ValueError(
                f"params[{i}] has shape {tuple(param.shape)} and strides {param.stride()}: several "
                "of its elements share memory; pass its .clone()"
            )


def check_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Raises for a gradient that does not fit its parameter; None always does."""
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise TypeError(
                f"grads[{i}] has layout {grad.layout}; only dense tensors are supported"
            )
        if grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"grads[{i}] has shape {tuple(grad.shape)} on {grad.device} but params[{i}] has "
                f"{tuple(param.shape)} on {param.device}"
            )
        if grad.dtype not in (COMPLEX if param.is_complex() else FLOATING):
            raise TypeError(f"grads[{i}] has dtype {grad.dtype} but params[{i}] has {param.dtype}")
