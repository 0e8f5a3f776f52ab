"""Steps that led nowhere: what is counted, and what the next step does instead."""

from __future__ import annotations

from typing import Any

from fuse_ext.curvature.protocol import InverseHessian
from fuse_ext.curvature.ring import BEFORE
from fuse_ext.kernels.scalars import Header
from fuse_ext.objective.progress import Progress

# So often the first trial along -g is cut where not even that leads anywhere.
MOST_CUTS = 3
# Where searches are cut short by max_eval, and where a fixed step is not finite, so often.
SHORTEST_CUT = 15
# Weight of the failures before the last step: four in a row, or a third of all, make 3.
FAILING_DECAY = 0.9
# What an entry counts since the start, for reports; of pairs those of rings before the present
# one, which counts its own.
COUNTERS = (
    "n_iter",
    "func_evals",
    "resets",
    "line_search_failures",
    "step_cuts",
    "non_finite",
    "changes",
    *BEFORE.values(),
)
# The tallies are of the present: trials cut, and failed steps, the last ones weighing most.
TALLIES = ("cuts", "failing", "bad_starts")


class Setbacks:
    """Keeps the counts of a state entry, and forgets the curvature that misled a step.

    Args:
        entry: The optimizer's state entry; holds ``COUNTERS`` and ``TALLIES``.
        history: What directions come from.
        progress: Told of what was not finite.
    """

    def __init__(self, entry: dict[str, Any], history: InverseHessian, progress: Progress) -> None:
        self._entry, self._history, self._progress = entry, history, progress
        for name in (*COUNTERS, *TALLIES):
            entry.setdefault(name, 0)

    def count_non_finite(self) -> None:
        """Notes that a step was not taken for a NaN or infinite value."""
        self._entry["non_finite"] += 1
        self._progress.reason = "non_finite"

    def reset(self) -> None:
        """Forgets all pairs."""
        self._entry["resets"] += 1
        self._history.reset()

    def retreat(self, header: Header) -> None:
        """The last direction leads nowhere: -g next time and, if it was that, a shorter step."""
        if header.usable > 0:
            self.reset()
        else:
            self._entry["cuts"] = min(self._entry["cuts"] + 1, SHORTEST_CUT)
            self._entry["step_cuts"] += 1

    def unlearn(self) -> bool:
        """After a search that no step ended well: whether what misled it was to be forgotten.

        A matrix keeps what is wrong in it for good, and searches stay as long (gradients clipped in
        the closure: 300 steps took 2,300 evaluations, and 800 with this).
        """
        if self._history.forgets:
            return False
        self.reset()
        return True

    def count_failing(self, failed: bool) -> None:
        """A decaying count of the steps that led nowhere, though rounding did not hide the way."""
        self._entry["failing"] = FAILING_DECAY * self._entry["failing"] + failed

    def begin_anew(self) -> None:
        """What led nowhere on one function says nothing of another."""
        self._entry.update(cuts=0, failing=0)

    @property
    def failing(self) -> float:
        """That count."""
        count: float = self._entry["failing"]
        return count
