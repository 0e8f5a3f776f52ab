"""The best learning rate of a method, with none of the best at the edge of what was tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Beyond these it is no longer the grid that is too narrow.
LEAST, LARGEST = 1e-6, 1e2


@dataclass(frozen=True)
class Search:
    """What a search has come to.

    Attributes:
        tried: Learning rates, ascending, those included whose value is not known yet.
        best: The best one; None while values are missing.
    """

    tried: tuple[float, ...]
    best: float | None

    @property
    def at_edge(self) -> bool:
        """Whether the best is the least or the largest that was tried."""
        return self.best in (self.tried[0], self.tried[-1])


def search(
    start: Sequence[float], value_of: Callable[[float], float | None], extensions: int
) -> Search:
    """Goes on beyond the edge of a grid for as long as the best value is there.

    Args:
        start: The first learning rates, ascending, each 1 or 3 times a power of ten.
        value_of: The value of a learning rate, higher is better; None while it is not known.
        extensions: At most so many more; the same for every method.

    Returns:
        The lower of equals is the best. While a value is missing, the learning rates whose values
        are needed to go on.
    """
    tried = list(start)
    while True:
        values = {rate: value_of(rate) for rate in tried}
        known = {rate: value for rate, value in values.items() if value is not None}
        if len(known) < len(tried):
            return Search(tuple(tried), None)
        best = max(tried, key=lambda rate: (known[rate], -rate))
        low, high = neighbour(tried[0], -1), neighbour(tried[-1], 1)
        if extensions > 0 and best == tried[-1] and high <= LARGEST:
            tried.append(high)
        elif extensions > 0 and best == tried[0] and low >= LEAST:
            tried.insert(0, low)
        else:
            return Search(tuple(tried), best)
        extensions -= 1


def neighbour(rate: float, direction: int) -> float:
    """The next one of 1, 3, 10, 30 and so on, up (1) or down (-1)."""
    mantissa, exponent = f"{rate:.0e}".split("e")
    power = int(exponent)
    if mantissa == "1":
        return float(f"3e{power if direction > 0 else power - 1}")
    return float(f"1e{power + 1 if direction > 0 else power}")
