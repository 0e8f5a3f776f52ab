"""How far steps have usually led lately: where a line search had better begin.

A self-scaled inverse Hessian is often too large, and 1 is then no step but a wasted evaluation: of
3,000 on a physics-informed network 1,400 were, and with this 450.
"""

from __future__ import annotations

import math
from typing import Any

from fuse_ext.search.line_search import LineSearchResult

# What the mean keeps of itself from step to step. 0.5 and 0.7 are as good; the rule of equal
# decreases (Nocedal and Wright, eq. 3.60) ends some three times higher.
KEEPS = 0.9
# So many steps in a row whose slope would have vanished within this of 1 say that H has come right:
# near a minimum the mean would follow so slowly that convergence were no faster than linear.
IN_A_ROW, NEAR_ONE = 2, 0.1
# No single step says more than this, nor is any begun that is shorter.
SHORTEST, LONGEST = 0.05, 4.0


class UsualStep:
    """A mean of log t, t being where the slope would have vanished along each direction.

    Args:
        entry: The optimizer's state entry; holds ``usual_step``, the mean, 0 for a step of 1, and
            ``right_steps``, how many in a row were next to 1.
    """

    NAMES = ("usual_step", "right_steps")

    def __init__(self, entry: dict[str, Any]) -> None:
        self._entry = entry
        entry.setdefault("usual_step", 0.0)
        entry.setdefault("right_steps", 0)

    @property
    def share(self) -> float:
        """The first trial as a share of the one that is asked for, at most 1."""
        mean: float = self._entry["usual_step"]
        return 1.0 if mean >= 0.0 else max(SHORTEST, math.exp(mean))

    def forget(self) -> None:
        """Of another direction's lengths nothing follows."""
        self._entry.update(usual_step=0.0, right_steps=0)

    def learn(self, result: LineSearchResult, start: float, unit: float) -> None:
        """Takes in a step that was found.

        Args:
            result: Of the search.
            start: The slope where it began, below 0.
            unit: The step that is asked for.
        """
        if not result.success or not start < result.slope < math.inf:
            return
        vanishes = result.step / unit * start / (start - result.slope)
        length = math.log(min(max(vanishes, SHORTEST), LONGEST))
        entry = self._entry
        entry["right_steps"] = entry["right_steps"] + 1 if abs(length) <= NEAR_ONE else 0
        right = entry["right_steps"] >= IN_A_ROW
        entry["usual_step"] = 0.0 if right else KEEPS * entry["usual_step"] + (1.0 - KEEPS) * length
