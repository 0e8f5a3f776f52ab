"""FusePV and Fuse from descriptions that JSON can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fuse_ext


def build(model: nn.Module, name: str, options: dict[str, Any], steps_per_epoch: int) -> Any:
    """FusePV or Fuse.

    Args:
        model: Whose parameters it is for.
        name: "fuse_pv" or "fuse".
        options: All of FusePV's, with "switch" as :func:`make_switch` reads it and "history_dtype"
            by name; of Fuse with "theta" as :func:`make_theta` does.
        steps_per_epoch: For switches and schedules that count epochs.
    """
    options = dict(options)
    if name == "fuse":
        options["theta"] = make_theta(options["theta"], steps_per_epoch)
        return fuse_ext.Fuse(model.parameters(), **options)
    options["switch"] = make_switch(options.get("switch", "auto"), steps_per_epoch)
    if isinstance(options.get("history_dtype"), str):
        options["history_dtype"] = getattr(torch, options["history_dtype"])
    return fuse_ext.FusePV(model.parameters(), **options)


def make_switch(switch: Any, steps_per_epoch: int) -> Any:
    """FusePV's ``switch`` from something that JSON can hold.

    Args:
        switch: "auto" (the default criterion), "never", a number of epochs, or the name and
            arguments of a criterion: ``{"name": "GradNorm", "zeta": 0.1}``.
        steps_per_epoch: Adam steps in an epoch.
    """
    if switch == "auto":
        return None
    if switch == "never":
        return fuse_ext.Never()
    if isinstance(switch, dict):
        arguments = {key: value for key, value in switch.items() if key != "name"}
        return getattr(fuse_ext, switch["name"])(**arguments)
    return fuse_ext.AfterSteps(round(switch * steps_per_epoch))


def make_theta(theta: Any, steps_per_epoch: int) -> Any:
    """Fuse's ``theta`` from something that JSON can hold.

    Args:
        theta: A number, or the name and arguments of a schedule, with "epochs" in place of its
            steps: ``{"name": "LinearTheta", "epochs": 5}``.
        steps_per_epoch: Steps in an epoch.
    """
    if not isinstance(theta, dict):
        return theta
    arguments = {key: value for key, value in theta.items() if key not in ("name", "epochs")}
    return getattr(fuse_ext, theta["name"])(round(theta["epochs"] * steps_per_epoch), **arguments)
