"""The mean that Eq. 3, Eq. 4 and the loss gap hold to a bound, over a window or since the start."""

import math
from collections import deque

from fuse_ext.switch.criterion import Observation, Reader, Switchover


class Mean:
    """Mean of all numbers pushed so far, or of the last ``window``, correctly rounded.

    The sum is kept as partial sums that do not overlap (Shewchuk 1997, the algorithm of
    math.fsum), so that numbers leave a window again without a trace and no pass over it is made.
    """

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.count = 0
        self._partials: list[float] = []
        self._recent: deque[float] | None = None if window is None else deque(maxlen=window)

    def push(self, value: float) -> None:
        """Take in one usable number."""
        if self._recent is not None:
            if self.count == self.window:
                self._add(-self._recent[0])
                self.count -= 1
            self._recent.append(value)
        self._add(value)
        self.count += 1

    @property
    def full(self) -> bool:
        """Whether the window is full; without one, whether there is a number at all."""
        return self.count >= (self.window or 1)

    @property
    def value(self) -> float:
        """The mean; not for an empty one."""
        return math.fsum(self._partials) / self.count

    def values(self) -> list[float]:
        """What ``restored`` needs: the numbers of the window; without one, the partial sums."""
        return list(self._partials if self._recent is None else self._recent)

    @classmethod
    def restored(cls, window: int | None, count: int, values: list[float]) -> "Mean":
        """The mean of ``count`` numbers that had these ``values()``."""
        mean = cls(window)
        if mean._recent is None:
            mean._partials, mean.count = list(values), count
        else:
            for value in values:
                mean.push(value)
        return mean

    def _add(self, value: float) -> None:
        partials = []
        for partial in self._partials:
            high = value + partial
            low = (
                (partial - (high - value))
                if abs(value) >= abs(partial)
                else value - (high - partial)
            )
            if low:
                partials.append(low)
            value = high
        self._partials = [*partials, value]


class MeanCriterion(Switchover):
    """Base of the criteria that hold a mean, over a window or since the start, to a bound."""

    _fields: tuple[str, ...] = ("window", "count", "values")

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget the mean."""
        super().reset()
        self._mean = Mean(self.window)

    def _holds(self, what: str, value: float, bound: str) -> str:
        """:meth:`waiting` in words, where ``value`` is the mean, or less."""
        if not self._mean.full:
            return f"{what}: {self._mean.count} of {self.window or 1} values"
        return f"{what} is {value:.3g}, above {bound}"

    def _over(self, obs: Observation) -> str:
        steps = "all steps" if self.window is None else f"{self.window} steps"
        return f"(mean over {steps}) at step {obs.step}"

    def _state(self) -> dict[str, object]:
        return {"window": self.window, "count": self._mean.count, "values": self._mean.values()}

    def _parse(self, state: object) -> dict[str, object]:
        read = Reader(self, state, *self._fields)
        read.same("window", self.window)
        values = read.numbers("values", self.window)
        if self.window is not None:
            read.same("count", len(values))
        return {"_mean": Mean.restored(self.window, read.integer("count"), values)}
