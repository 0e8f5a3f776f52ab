"""Steps that led nowhere: what is counted, and what the next step does instead."""

from __future__ import annotations

from typing import Any

from fuse_ext.curvature.protocol import InverseHessian
from fuse_ext.curvature.ring_state import BEFORE
from fuse_ext.kernels.scalars import Header
from fuse_ext.objective.progress import Progress

# So often the first trial along -g is cut where not even that leads anywhere.
MOST_CUTS = 3
# Where searches are cut short by max_eval, and where a fixed step is not finite, so often.
SHORTEST_CUT = 15
# So many iterations have to go by before curvature that has failed twice is given another chance.
SECOND_CHANCE = 10
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
# The tallies are of the present: trials cut, failed steps, the last ones weighing most, and the
# iteration at which curvature had another chance.
TALLIES = ("cuts", "failing", "bad_starts", "chance")


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

    def _set_aside(self) -> None:
        self._entry["resets"] += 1
        self._history.set_aside()

    def take_back(self) -> bool:
        """Has again what was set aside, if nothing was learnt since.

        Where not even -g leads anywhere it was not to blame, and another dtype (``continue_in``) or
        other data can go on with it. Says whether there was anything.
        """
        found = self._history.take_up() is not None
        self._entry["resets"] -= found
        return found

    def retreat(self, header: Header) -> None:
        """The last direction leads nowhere: -g next time and, if it was that, a shorter step."""
        if header.usable > 0:
            self._set_aside()
        else:
            self._entry["cuts"] = min(self._entry["cuts"] + 1, SHORTEST_CUT)
            self._entry["step_cuts"] += 1

    def count_success(self, steepest_on_one: bool) -> None:
        """Notes a step. After one along -g on one function curvature has another chance.

        Its search may have failed for rounding alone, as happens in long valleys, where what was
        learnt in thousands of iterations is worth much. It has no third chance soon after.
        """
        self.count_failing(False)
        if not steepest_on_one:
            return
        now, last = self._entry["n_iter"], self._entry["chance"]
        if (not last or now - last > SECOND_CHANCE) and self.take_back():
            self._entry["chance"] = now

    def unlearn(self, header: Header) -> bool:
        """After a search that no step ended well: whether what misled it was to be forgotten.

        Along -g nothing of what is known did.

        A matrix keeps what is wrong in it for good, and searches stay as long (gradients clipped in
        the closure: 300 steps took 2,300 evaluations, and 800 with this).
        """
        if self._history.forgets or header.usable == 0:
            return False
        self._set_aside()
        self._entry["chance"] = self._entry["n_iter"]  # it has had it
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
