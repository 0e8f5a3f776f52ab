"""What an optimizer did, and why."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuse_ext.phase.averages import AveragedEngine
    from fuse_ext.phase.iteration import LbfgsEngine

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


def check_log(log: Any) -> None:
    """Raises ValueError unless a saved entry holds these counts."""
    if not isinstance(log, dict) or not NEW_LOG.keys() <= log.keys():
        raise ValueError(f"state_dict does not fit: {LOG!r} must hold {list(NEW_LOG)}")


CONVERGED = ("gradient", "slope", "step", "loss", "progress", "precision", "no_descent")


@dataclass
class Progress:
    """What the last call of an L-BFGS ``step`` did.

    Attributes:
        reason: Why it ended: "max_iter" or "max_eval" (the budget), "gradient" (at most
            tolerance_grad), "slope", "step" or "loss" (changes at most tolerance_change),
            "progress" (a decrease of at most rtol times the loss),
            "precision" (rounding or noise of the loss hides any further decrease), "line_search"
            (it found no step that lowers the loss), "no_descent" (the gradient is 0, or so small
            that its square is), "non_finite", "watch" (the step was given to finding out whether
            the closure is the same function at every call), or "lr" (which is 0).
        step_length: Of the last step taken.
        line_search: Why the last search ended.
    """

    reason: str = "not started"
    step_length: float = 0.0
    line_search: str = "none"


@dataclass(frozen=True)
class Report:
    """A snapshot by ``opt.report()``; ``print`` it for a table.

    Attributes:
        phase: "adam" or "lbfgs" ("fuse" for the blend).
        adam_steps: Adam steps taken.
        lbfgs_iterations: L-BFGS iterations begun.
        switch_step: Adam steps before the switch, or None.
        switch_reason: Why it switched; empty before.
        evaluations: Calls of the closure.
        pairs_held: Curvature pairs in the history.
        pairs_accepted: Pairs accepted so far.
        pairs_skipped: Pairs refused by the curvature test.
        history_resets: Times the history was dropped: the direction did not descend, no acceptable
            step was found along it, or, on averages, the gradient had jumped.
        step_cuts: Times the next step along -g was made shorter, since none was found.
        fallbacks: Times Adam took over again, since line searches kept failing or what had looked
            like one function were batches; on one function for one step, see ``FusePV.step``.
        step_length: t of the last L-BFGS step.
        line_search: Why the last line search ended.
        line_search_failures: Searches that found no acceptable step.
        loss_noise: Noise of the loss, relative to it, that approximate Wolfe reckons with.
        stop_reason: Why the last L-BFGS step ended; see :class:`Progress`.
        non_finite: Points with a NaN or infinite loss or gradient; none was stepped on or used.
        state_bytes: Bytes of optimizer state held.
        workspace_bytes: Bytes of scratch held between steps.
    """

    phase: str
    adam_steps: int = 0
    lbfgs_iterations: int = 0
    switch_step: int | None = None
    switch_reason: str = ""
    evaluations: int = 0
    pairs_held: int = 0
    pairs_accepted: int = 0
    pairs_skipped: int = 0
    history_resets: int = 0
    step_cuts: int = 0
    fallbacks: int = 0
    step_length: float = 0.0
    line_search: str = "none"
    line_search_failures: int = 0
    loss_noise: float = 0.0
    stop_reason: str = "not started"
    non_finite: int = 0
    state_bytes: int = 0
    workspace_bytes: int = 0

    @property
    def converged(self) -> bool:
        """Whether L-BFGS stopped because there is nothing left to gain.

        That is, for "gradient", "slope", "step", "loss", "progress", "precision" and
        "no_descent".
        """
        return self.stop_reason in CONVERGED

    def __str__(self) -> str:
        width = max(len(f.name) for f in fields(self))
        return "\n".join(f"{f.name:<{width}}  {getattr(self, f.name)}" for f in fields(self))


def lbfgs_fields(
    engine: LbfgsEngine | AveragedEngine | None, entry: dict[str, Any]
) -> dict[str, Any]:
    """What every report says of L-BFGS; of its past alone where there is no engine."""
    counted = {
        "lbfgs_iterations": entry.get("n_iter", 0),
        "evaluations": entry.get("func_evals", 0),
        "history_resets": entry.get("resets", 0),
        "step_cuts": entry.get("step_cuts", 0),
        "line_search_failures": entry.get("line_search_failures", 0),
        "non_finite": entry.get("non_finite", 0),
    }
    if engine is None:
        return counted
    header = engine.history.header()
    return {
        **counted,
        "pairs_held": int(header.count),
        "pairs_accepted": int(header.accepted),
        "pairs_skipped": int(header.skipped),
        "step_length": engine.progress.step_length,
        "line_search": engine.progress.line_search,
        "loss_noise": engine.precision.noise,
        "stop_reason": engine.progress.reason,
        "state_bytes": engine.nbytes,
        "workspace_bytes": engine.workspace_nbytes,
    }
