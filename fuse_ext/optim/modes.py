"""Which L-BFGS follows Adam: with a line search, with a fixed step, or on averages."""

from __future__ import annotations

from fuse_ext.optim.lbfgs import check_line_search
from fuse_ext.switch.criterion import Switchover
from fuse_ext.switch.plateau import LossPlateau
from fuse_ext.switch.steps import AfterSteps, Never, WarmUp
from fuse_ext.vector.flat import FlatParams, ParamGroup

AUTO = "auto"
# How curvature pairs are made.
AVERAGED, SAME_BATCH, CONSECUTIVE = "averaged", "same_batch", "consecutive"
PAIRS = (AUTO, AVERAGED, SAME_BATCH, CONSECUTIVE)
# The line search that "auto" means where the closure is the same function at every call.
SEARCH = "approximate_wolfe"
# Adam steps that give the averaged gradient and its metric, and L-BFGS on averages a start; from
# there it is ahead of Adam (python -m benchmarks.stochastic).
FIRST_STEPS = 50
# Curvature pairs if nothing is said. On one function more are better, as long as they are cheap.
LEAST_PAIRS, MOST_PAIRS = 10, 500
HISTORY_BYTES = 64 * 2**20
# With fewer of them self-scaling costs some 5% more evaluations (python -m benchmarks.robustness).
SCALING_PAIRS = 100


def check_modes(group: ParamGroup) -> None:
    """Raises for options of this choice that are unknown or contradict each other."""
    pairs, search = group["pairs"], group["line_search"]
    if pairs not in PAIRS:
        raise ValueError(f"pairs must be one of {', '.join(PAIRS)}, got {pairs!r}")
    if search != AUTO:
        check_line_search("line_search", search)
    if group["deterministic"] not in (True, False, None):
        raise TypeError(
            f"deterministic must be True, False or None, got {group['deterministic']!r}"
        )
    if group["self_scaling"] not in (True, False, None):
        raise TypeError(f"self_scaling must be True, False or None, got {group['self_scaling']!r}")
    if pairs != AVERAGED:
        return
    for name, allowed in (
        ("capturable", (False,)),
        ("line_search", (AUTO, None)),
        ("deterministic", (False, None)),
        ("max_iter", (1,)),
    ):
        if group[name] not in allowed:
            raise ValueError(f"pairs='averaged' goes with {name} in {allowed}, got {group[name]!r}")


def averages(group: ParamGroup) -> bool:
    """Whether L-BFGS is to begin on averages: asked for, or likely where nothing was asked."""
    if group["pairs"] != AUTO:
        return bool(group["pairs"] == AVERAGED)
    return group["line_search"] == AUTO and group["max_iter"] == 1 and not group["deterministic"]


def finds_out(group: ParamGroup) -> bool:
    """Whether the closure will be watched to learn if it is the same function at every call."""
    return averages(group) and group["pairs"] == AUTO and group["deterministic"] is None


def mixed_signs(groups: list[ParamGroup]) -> bool:
    """Whether some groups ascend and others descend."""
    return any(bool(group["maximize"]) != bool(groups[0]["maximize"]) for group in groups)


def check_signs(groups: list[ParamGroup]) -> None:
    """Raises ValueError for groups of both signs, which an L-BFGS without averages cannot have."""
    if mixed_signs(groups):
        raise ValueError(
            "maximize must be the same in all parameter groups, got "
            f"{[group['maximize'] for group in groups]}: ascent in one group and descent in "
            "another have no common objective for a line search or a fixed step; on averages and "
            "with switch=Never() each group has its own sign"
        )


def check_signs_to_come(groups: list[ParamGroup], switch: Switchover) -> None:
    """As :func:`check_signs`, unless L-BFGS will be on averages or never begin."""
    if not isinstance(switch, Never) and (switch.at_once or not averages(groups[0])):
        check_signs(groups)


def default_switch(group: ParamGroup) -> Switchover:
    """When to leave Adam if nothing is said."""
    if averages(group):
        return AfterSteps(FIRST_STEPS)
    if group["deterministic"]:
        return WarmUp() | LossPlateau()
    return LossPlateau()


def default_history_size(group: ParamGroup, flat: FlatParams) -> int:
    """Pairs to keep if nothing is said."""
    if not may_scale(group):
        return LEAST_PAIRS
    dtype = group["history_dtype"] or flat.dtype
    numel = max(flat.numel, 1)
    fit = min(HISTORY_BYTES // (2 * dtype.itemsize * numel), numel, MOST_PAIRS)
    return max(fit, LEAST_PAIRS)


def may_scale(group: ParamGroup) -> bool:
    """Whether self-scaling is asked for, or could pay: on one function with a line search."""
    if group["self_scaling"] is not None:
        return bool(group["self_scaling"])
    return bool(group["deterministic"]) and group["line_search"] is not None


def self_scales(group: ParamGroup) -> bool:
    """Whether L-BFGS scales itself."""
    if group["self_scaling"] is not None:
        return bool(group["self_scaling"])
    return may_scale(group) and group["history_size"] >= SCALING_PAIRS


def lbfgs_lr(group: ParamGroup) -> float:
    """The group's L-BFGS step: lbfgs_lr, times what a schedule has done to lr since the switch."""
    lr = float(group["lr"])
    if not group["lr_at_switch"]:  # was 0, or the group is new: its schedule begins when lr does
        group["lr_at_switch"] = lr
    return float(group["lbfgs_lr"]) * (lr / group["lr_at_switch"] if lr else 0.0)
