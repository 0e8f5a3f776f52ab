"""What an optimizer did, and why."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from html import escape
from typing import Any, Protocol

from fuse_ext.curvature.protocol import InverseHessian
from fuse_ext.curvature.ring_state import BEFORE
from fuse_ext.objective.progress import CONVERGED, Progress
from fuse_ext.search.noise import Precision


class Telling(Protocol):
    """What a phase of L-BFGS tells of itself.

    Attributes:
        progress: What its last step did.
        precision: What it has learnt of the loss's noise.
    """

    progress: Progress
    precision: Precision

    @property
    def history(self) -> InverseHessian:
        """What it knows of H."""

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch held between steps."""


@dataclass(frozen=True)
class Report:
    """A snapshot by ``opt.report()``; ``print`` it for what matters and a table of the rest.

    Attributes:
        phase: "adam" or "lbfgs" ("fuse" for the blend).
        loss: What the last step returned, the loss where it began; None before the first step, and
            where there was neither closure nor loss. It is not saved in a checkpoint.
        second_phase: Which kind of phase follows Adam, or is at work, and why.
        waiting: Why Adam has not been left yet; empty afterwards.
        adam_steps: Adam steps taken.
        lbfgs_iterations: L-BFGS iterations begun.
        switch_step: Adam steps before the last switch, or None.
        switch_reason: Why it switched; empty before.
        evaluations: Calls of the closure.
        curvature: "pairs" or "dense", as L-BFGS keeps it; "diagonal" or "kronecker", the metric of
            the phase on minibatches; empty in the Adam phase.
        pairs_held: Curvature pairs in the history, or seen by the matrix since it began.
        pairs_accepted: Pairs accepted so far.
        pairs_skipped: Pairs refused by the curvature test so far.
        history_resets: Times the history was dropped: the direction did not descend, or no
            acceptable step was found along it.
        step_cuts: Times the next step along -g was made shorter, since none was found.
        fallbacks: Times Adam took over again, since line searches kept failing, what had looked
            like one function were batches, or losses stayed above those at the switch; on one
            function for one step, see ``FusePV.step``.
        setbacks: Of these, times for losses that stayed above.
        function_changes: Steps that found the closure to be another function than was remembered.
        step_length: t of the last L-BFGS step.
        line_search: Why the last line search ended.
        line_search_failures: Searches that found no acceptable step.
        loss_noise: Noise of the loss, relative to it, that approximate Wolfe reckons with.
        stop_reason: Why the last L-BFGS step ended; see :class:`Progress`.
        non_finite: Points with a NaN or infinite loss or gradient; none was stepped on or used.
        state_bytes: Bytes of optimizer state held, also those on the host (``history_device``).
        workspace_bytes: Bytes of scratch held between steps.
        float64_gain: Where ``stop_reason`` is "precision" and the state not in float64, up to how
            much the loss may still fall there: its noise; where it was still falling by more, as
            in a long valley, the falls of the last eighths of the run continued as a geometric
            series; or, where it has come down to 100 roundings of where it began, as sums of
            squares do that go to 0, all of it.
        advice: In words, with the call that goes on there; else empty.
    """

    phase: str
    loss: float | None = field(default=None, compare=False)
    second_phase: str = ""
    waiting: str = ""
    adam_steps: int = 0
    lbfgs_iterations: int = 0
    switch_step: int | None = None
    switch_reason: str = ""
    evaluations: int = 0
    curvature: str = ""
    pairs_held: int = 0
    pairs_accepted: int = 0
    pairs_skipped: int = 0
    history_resets: int = 0
    step_cuts: int = 0
    fallbacks: int = 0
    setbacks: int = 0
    function_changes: int = 0
    step_length: float = 0.0
    line_search: str = "none"
    line_search_failures: int = 0
    loss_noise: float = 0.0
    stop_reason: str = "not started"
    non_finite: int = 0
    state_bytes: int = 0
    workspace_bytes: int = 0
    float64_gain: float = 0.0
    advice: str = ""

    @property
    def converged(self) -> bool:
        """Whether L-BFGS stopped because there is nothing left to gain.

        That is, for "gradient", "slope", "step", "loss", "progress", "precision" and
        "no_descent".
        """
        return self.stop_reason in CONVERGED

    @property
    def _headline(self) -> str:
        loss = "no loss yet" if self.loss is None else f"loss {self.loss:.6g}"
        if self.phase == "adam":
            return f"Adam, {self.adam_steps:,} steps: {loss}"
        ended = f"converged ({self.stop_reason})" if self.converged else "not converged"
        steps = f"{self.lbfgs_iterations:,} iterations"
        name = "Adam and L-BFGS blended" if self.phase == "fuse" else "Second phase"
        return f"{name}, {steps}: {loss}, {ended}"

    @property
    def _rows(self) -> list[tuple[str, str, bool]]:
        """Name, value, and whether it matters most."""
        first = ("second_phase", "waiting", "switch_reason", "advice")
        told = [(name, str(getattr(self, name)), True) for name in first if getattr(self, name)]
        rest = [f.name for f in fields(self) if f.name not in first]
        return told + [(name, str(getattr(self, name)), False) for name in rest]

    def __str__(self) -> str:
        width = max(len(name) for name, *_ in self._rows)
        lines = [f"{name:<{width}}  {value}" for name, value, _ in self._rows]
        return "\n".join([self._headline, *lines])

    def _repr_html_(self) -> str:
        """For notebooks: what matters, and the rest folded."""
        shown, folded = (
            "".join(
                f"<tr><th style='text-align:left'>{name}</th>"
                f"<td style='text-align:left'>{escape(value)}</td></tr>"
                for name, value, first in self._rows
                if first is wanted
            )
            for wanted in (True, False)
        )
        return (
            f"<b>{escape(self._headline)}</b><table>{shown}</table>"
            f"<details><summary>all counts</summary><table>{folded}</table></details>"
        )


def lbfgs_fields(phase: Telling | None, entry: dict[str, Any]) -> dict[str, Any]:
    """What every report says of L-BFGS; of its past alone where it is not the phase."""
    counted = {
        "lbfgs_iterations": entry.get("n_iter", 0),
        "evaluations": entry.get("func_evals", 0),
        "history_resets": entry.get("resets", 0),
        "step_cuts": entry.get("step_cuts", 0),
        "function_changes": entry.get("changes", 0),
        "line_search_failures": entry.get("line_search_failures", 0),
        "non_finite": entry.get("non_finite", 0),
        "pairs_accepted": entry.get(BEFORE["accepted"], 0),
        "pairs_skipped": entry.get(BEFORE["skipped"], 0),
    }
    if phase is None:
        return counted
    header = phase.history.header()
    return {
        **counted,
        "curvature": phase.history.kind,
        "pairs_held": int(header.count),
        "pairs_accepted": counted["pairs_accepted"] + int(header.accepted),
        "pairs_skipped": counted["pairs_skipped"] + int(header.skipped),
        "step_length": phase.progress.step_length,
        "line_search": phase.progress.line_search,
        "loss_noise": phase.precision.noise,
        "stop_reason": phase.progress.reason,
        "state_bytes": phase.nbytes,
        "workspace_bytes": phase.workspace_nbytes,
        **beyond_the_floor(phase),
    }


def beyond_the_floor(phase: Telling) -> dict[str, Any]:
    """What float64 could still give where the rounding of a narrower dtype has ended the run."""
    if phase.progress.reason != "precision" or phase.precision.is_double:
        return {}
    gain = phase.precision.hidden
    return {
        "float64_gain": gain,
        "advice": f"float64 may lower the loss by up to {gain:.2g}: "
        "optimizer.continue_in(torch.float64)",
    }


def report_of_phases(
    phase: str, log: dict[str, Any], entry: dict[str, Any], now: Any, **told: Any
) -> Report:
    """FusePV's report: what its log has counted, what its present phase tells, and ``told``."""
    tells = now is not None and phase == "lbfgs"  # Adam tells nothing but its size
    fields = lbfgs_fields(now if tells else None, entry)
    fields["evaluations"] += log["adam_evaluations"]
    fields["non_finite"] += log["adam_non_finite"]
    if not tells:
        fields["state_bytes"] = 0 if now is None else now.nbytes
    counted = ("adam_steps", "switch_step", "switch_reason", "fallbacks")
    fields["setbacks"] = log.get("setbacks", 0)
    fields.update(told)
    return Report(phase=phase, **{name: log[name] for name in counted}, **fields)
