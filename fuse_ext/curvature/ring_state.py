"""What a state entry holds of a ring of curvature pairs, and whether a checkpoint's fits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.fixed_step import PLACES
from fuse_ext.kernels.reference.memory import SCALE_BLOCK
from fuse_ext.vector.flat import FlatParams, memory_order

# Scalars that say that there are pairs.
OF_PAIRS = ("count", "gamma", "usable")
# Under this name: those of a curvature that a search has given up, until it is known whether
# anything else goes further; and those of the matrix, if it is one.
SET_ASIDE = "set_aside"
# What a state entry of L-BFGS holds of its history; only some of it for some dtypes and layouts.
STATE_NAMES = (
    "history",
    "history_scale",
    "grad_prev",
    "scalars",
    "broyden",
    "strides",
    "control",
    "sets",
    "set",
    SET_ASIDE,
)
# Under which names an entry keeps what rings before the present one have counted.
BEFORE = {"accepted": "accepted_before", "skipped": "skipped_before"}


def check_ring_state(entry: dict[str, Any], slots: int, flat: FlatParams) -> None:
    """Raises ValueError unless a state entry holds a history of these parameters."""
    numel = flat.numel
    shapes: dict[str, Any] = {
        "history": (2, slots, numel),
        "scalars": (ring.layout(slots)["size"],),
    }
    history, scalars = entry.get("history"), entry.get("scalars")
    older = (ring.layout(slots)["size_without_sets"],)
    if isinstance(scalars, Tensor) and tuple(scalars.shape) == older:
        shapes["scalars"] = older  # History completes them
    if "broyden" in entry:
        shapes["broyden"] = (ring.broyden_layout(slots)["size"],)
    if isinstance(history, Tensor) and history.element_size() < 4:
        shapes["grad_prev"] = (numel,)
    if "control" in entry:  # with capturable=True
        shapes |= {"grad_prev": (numel,), "control": (len(PLACES),)}
    if isinstance(history, Tensor) and history.dtype == torch.int8:
        shapes["history_scale"] = (2, slots, -(-numel // SCALE_BLOCK))
    for name, expected in shapes.items():
        if not isinstance(entry.get(name), Tensor):
            raise ValueError(
                f"state_dict is not of fuse_ext's L-BFGS: it has no tensor {name!r}, "
                f"only {sorted(map(str, entry))}"
            )
        shape = tuple(entry[name].shape)
        if shape != expected:
            raise ValueError(
                f"state_dict does not fit: {name} has shape {shape}, expected {expected} "
                f"(history_size={slots - 1}, {numel} parameters)"
            )
    ours, theirs = memory_order(flat), entry.get("strides", [])
    if ours != theirs:
        raise ValueError(
            f"state_dict does not fit: its parameters had strides {theirs or 'in row-major order'},"
            f" these have {ours or 'in row-major order'}; load it before a change of memory format"
        )
    check_set_aside(entry)
    sets, which = entry.get("sets", [[]]), entry.get("set", 0)
    known = range(len(flat.params))
    if not (
        isinstance(sets, list)
        and all(isinstance(absent, list) and set(absent) <= set(known) for absent in sets)
        and which in range(max(len(sets), 1))
    ):
        raise ValueError(
            f"state_dict does not fit: sets={sets!r} and set={which!r} name no parameters among "
            f"{len(flat.params)}"
        )


def check_set_aside(entry: dict[str, Any]) -> None:
    """Raises ValueError unless what is set aside, if anything is, are numbers, and not too few."""
    held = entry.get(SET_ASIDE, [])
    numbers = isinstance(held, list) and all(isinstance(value, float) for value in held)
    if not numbers or 0 < len(held) < len(OF_PAIRS):
        raise ValueError(
            f"state_dict does not fit: {SET_ASIDE} must be no numbers or those of {OF_PAIRS}, got "
            f"{held!r}"
        )
