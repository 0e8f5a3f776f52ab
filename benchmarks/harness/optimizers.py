"""An optimizer from a description that JSON can hold."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

# What of a description the training loop sees to, and the version of a package, which is there so
# that a stored run knows of it.
OF_THE_LOOP = ("name", "batch", "batch_factor", "schedule", "version")
OURS = ("fuse_pv", "fuse")


def module_of(name: str) -> str:
    """The module that builds an optimizer.

    It is imported by this name alone: so a stored run of another optimizer does not depend on our
    sources, and is not run again when they change (see :mod:`benchmarks.harness.cells`).
    """
    return f"benchmarks.harness.{'ours' if name in OURS else 'rivals'}"


def make(model: nn.Module, description: dict[str, Any], steps_per_epoch: int) -> Any:
    """The optimizer of a description.

    Args:
        model: Whose parameters it is for.
        description: "name" and what that takes; see :mod:`benchmarks.harness.rivals` and
            :mod:`benchmarks.harness.ours`.
        steps_per_epoch: For switches that count epochs.

    Raises:
        ValueError: No such optimizer.
    """
    options = {k: v for k, v in description.items() if k not in OF_THE_LOOP}
    module = importlib.import_module(module_of(description["name"]))
    return module.build(model, description["name"], options, steps_per_epoch)
