"""Whether the closure is the same function at every call, by what it returned at one point."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

# Two calls of one function at one point differ by less than this, relative to the loss; ...
SAME_LOSS = 1e-6
# ... and their gradients' norms by less than this, for a loss may hide what changes behind a large
# constant. Minibatches differ by more.
SAME_GRADIENT = 1e-2
# Squared gradients of less than this share of the largest are rounding for all one knows.
LEAST_SQUARE = 1e-8
# Starts that contradict count less and less from step to step. Two in three, or every second one
# for some steps, are batches; new points every so often are not.
FORGETTING, MOST_OTHERS = 0.9, 2.0
# What is left of one of them some 20 steps later.
LEAST_OTHERS = 0.1
# Agreements after which a step begins with what it remembers. A batch that is used twice or three
# times in a row does not get so far without a contradiction.
SURE = 4.0


class Values(NamedTuple):
    """What the closure gave at a point: the loss, and of the gradient g.g and sum |g|."""

    loss: float
    square: float
    abs_sum: float

    @property
    def finite(self) -> bool:
        """Whether all are."""
        return math.isfinite(self.loss + self.square + self.abs_sum)


def agree(a: Values, b: Values, loss_tol: float = SAME_LOSS, largest_square: float = 0.0) -> bool:
    """Whether two calls at one point could be of one function.

    Args:
        a: What one gave.
        b: What the other gave.
        loss_tol: Noise of the loss, relative to it.
        largest_square: The largest g.g met; far below it nothing is told by gradients.
    """
    if not abs(a.loss - b.loss) <= loss_tol * max(abs(a.loss), abs(b.loss)):
        return False
    if max(a.square, b.square) <= LEAST_SQUARE * largest_square:
        return True
    return all(
        abs(x - y) <= SAME_GRADIENT * max(x, y)
        for x, y in ((a.square, b.square), (a.abs_sum, b.abs_sum))
    )


class OneFunction:
    """Compares where steps begin with where the ones before ended; kept in the state entry.

    What a step has told counts once it is completed.

    Args:
        entry: Holds ``arrival``, the :class:`Values` where the parameters were left (empty where
            they are not known), ``arrival_absent``, which parameters had no gradient there,
            ``agreed``, ``contradicted`` (a decaying count) and ``largest_square``.
    """

    NAMES = ("arrival", "arrival_absent", "agreed", "contradicted", "largest_square")

    def __init__(self, entry: dict[str, Any]) -> None:
        self._entry = entry
        entry.setdefault("arrival", [])
        entry.setdefault("arrival_absent", [])
        for name in self.NAMES[2:]:
            entry.setdefault(name, 0.0)
        self._told: bool | None = None  # by the start of the step under way

    def begin_step(self) -> None:
        """Nothing is told yet."""
        self._told = None

    def leave(self) -> None:
        """Of where the parameters stand now nothing is known."""
        self._entry["arrival"] = []

    def compare(self, values: Values, absent: tuple[int, ...], loss_tol: float) -> bool | None:
        """Whether a step begins as the last one has left it; None if that is not known."""
        entry = self._entry
        if not entry["arrival"]:
            return None
        if list(absent) != entry["arrival_absent"]:  # frozen or thawed
            return False
        before, largest = Values(*entry["arrival"]), entry["largest_square"]
        return agree(before, values, max(loss_tol, SAME_LOSS), max(largest, values.square))

    def meet(self, values: Values, absent: tuple[int, ...], loss_tol: float) -> bool | None:
        """:meth:`compare`, and what it says counts."""
        same = self.compare(values, absent, loss_tol)
        # Frozen or thawed parameters tell nothing of batches.
        self._told = same if list(absent) == self._entry["arrival_absent"] else None
        return same

    def fits(self) -> None:
        """Trials were what one expects of the function that the step has begun with."""
        if self._told is None:
            self._told = True

    def end_step(self, values: Values | None, absent: tuple[int, ...] = ()) -> None:
        """Takes in where a step has ended, None where that was not evaluated."""
        entry = self._entry
        if self._told is not None:
            entry["agreed"], entry["contradicted"] = self._counts()
            self._told = None
        if values is None:
            entry["arrival"] = []
            return
        entry["arrival"], entry["arrival_absent"] = list(values), list(absent)
        entry["largest_square"] = max(entry["largest_square"], values.square)

    def _counts(self) -> tuple[float, float]:
        """``agreed`` and ``contradicted``, with what the start of the step under way has told."""
        agreed, contradicted = self._entry["agreed"], self._entry["contradicted"]
        if self._told is None:
            return agreed, contradicted
        return agreed + self._told, FORGETTING * contradicted + (not self._told)

    @property
    def contradicted(self) -> bool:
        """Whether too many starts were not as the steps before had left it."""
        return self._counts()[1] >= MOST_OTHERS

    @property
    def looks_like_batches(self) -> bool:
        """Whether starts have contradicted before it was sure."""
        agreed, contradicted = self._counts()
        return agreed < SURE and contradicted > 0.0

    @property
    def sure(self) -> bool:
        """Whether it has been seen so often that a step need not look at its start again."""
        agreed, contradicted = self._counts()
        return agreed >= SURE and contradicted < 1.0

    @property
    def undisputed(self) -> bool:
        """Whether that was contradicted neither before nor, for long, since."""
        agreed, contradicted = self._counts()
        return agreed >= SURE and contradicted < LEAST_OTHERS

    @property
    def known(self) -> bool:
        """Whether it has been seen to be one function, and not lately to be another."""
        agreed, contradicted = self._counts()
        return agreed >= 1 and contradicted < 1.0


def check_arrival(entry: dict[str, Any]) -> None:
    """Raises ValueError for a state entry whose last step has ended at no values."""
    arrival = entry.get("arrival", [])
    if not (
        isinstance(arrival, list)
        and len(arrival) in (0, len(Values._fields))
        and all(isinstance(value, float) for value in arrival)
    ):
        raise ValueError(f"state_dict does not fit: arrival is {arrival!r}")
