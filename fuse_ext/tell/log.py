"""What FusePV counts over both phases, saved with the state."""

from __future__ import annotations

from typing import Any

from fuse_ext.checks import warn_caller

# FusePV keeps its own counts in this entry of the first parameter's state;
# at the start they are these.
LOG = "fuse_pv"
NEW_LOG = {
    "adam_steps": 0,
    "adam_evaluations": 0,
    "adam_non_finite": 0,
    "phase_steps": 0,  # Adam steps and epochs since Adam began or was returned to
    "phase_epochs": 0,
    "switches": 0,
    "switch_step": None,
    "switch_reason": "",
    "fallbacks": 0,
}

# Where losses rose after a switch, Adam goes on for at least so many steps before the next one, and
# three, seven, ... times as many where that happens again: in the end it is left alone.
REST = 100


def log_in(entry: dict[str, Any]) -> dict[str, Any]:
    """FusePV's counts in the first parameter's state; where there are none, new ones."""
    if LOG not in entry:
        entry[LOG] = dict(NEW_LOG)
    log: dict[str, Any] = entry[LOG]
    return log


def rested(log: dict[str, Any]) -> bool:
    """Whether Adam has gone on for long enough where losses rose, or memory lacked, at a switch."""
    least = max(REST * (2 ** log.get("setbacks", 0) - 1), log.get("stays_until", 0))
    return bool(log["phase_steps"] >= least)


def falls_back(log: dict[str, Any], outcome: Any, finds_out: bool) -> bool:
    """Counts what has failed; whether Adam takes over.

    Args:
        log: FusePV's.
        outcome: Of a step.
        finds_out: Whether nothing was said of the closure.
    """
    batches = outcome.contradicted and finds_out
    failing = outcome.failing or outcome.worse or batches
    log["fallbacks"] += outcome.rescued + failing
    if outcome.worse:
        log["setbacks"] = log.get("setbacks", 0) + 1
    if batches:
        log["batches"] = True  # for good
    return bool(failing)


def criterion_in(state_dict: dict[str, Any]) -> Any:
    """The criterion's state in FusePV's state_dict, None where there is none.

    Raises:
        ValueError: The counts are not there, or not all.
    """
    first = state_dict["param_groups"][0]["params"][0]
    log = state_dict["state"].get(first, {}).get(LOG, NEW_LOG)
    if not isinstance(log, dict) or not NEW_LOG.keys() <= log.keys():
        raise ValueError(f"state_dict does not fit: {LOG!r} must hold {list(NEW_LOG)}")
    return log.get("criterion")


def warn_non_finite(optimizer: Any) -> None:
    """Warns of the first step that this optimizer did not take."""
    if vars(optimizer).get("_warned_non_finite"):
        return
    optimizer._warned_non_finite = True
    warn_caller(
        "FusePV met a loss or gradient that is not finite and did not take the step; "
        "further ones are only counted in report()"
    )
