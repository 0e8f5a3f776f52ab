"""Repeats in interleaved rounds, and their spread: median and quartiles."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from benchmarks.harness.tables import number, time_unit


def progress(total: int, title: str) -> tqdm[Any]:
    """A progress bar over ``total`` repeats."""
    return tqdm(
        total=total, desc=title, ncols=79, leave=False, bar_format="{l_bar}{bar}| {elapsed}"
    )


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeats.

    Attributes:
        median: Of the values.
        low: First quartile.
        high: Third quartile.
        values: One per round.
    """

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """The spread of one value a round."""
        numbers = tuple(values)
        low, median, high = statistics.quantiles(numbers, n=4, method="inclusive")
        return Spread(median, low, high, numbers)

    def over(self, other: Spread) -> Spread:
        """The quotient, round by round: what was noise to both is no noise in it."""
        return Spread.of(a / b for a, b in zip(self.values, other.values, strict=True))

    def scaled(self, factor: float) -> Spread:
        """All values times a factor."""
        return Spread.of(factor * value for value in self.values)

    def per(self, amount: float) -> Spread:
        """``amount`` over each value: a rate, where the values are times."""
        return Spread.of(amount / value for value in self.values)

    def show(self, digits: int = 3) -> str:
        """``median (low-high)``."""
        return f"{number(self.median, digits)} ({self.range(digits)})"

    def range(self, digits: int = 3) -> str:
        """``low-high``."""
        return f"{number(self.low, digits)}-{number(self.high, digits)}"


def show_time(spread: Spread) -> str:
    """A time with quartiles in a unit that suits it."""
    factor, unit = time_unit(spread.median)
    return f"{number(factor * spread.median)} {unit} ({spread.scaled(factor).range()})"


@contextmanager
def no_garbage() -> Any:
    """Collects now and not while the clock runs, as timeit does."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleaved(
    cases: dict[str, Callable[[], float]], rounds: int, title: str, warmup: int = 1
) -> dict[str, Spread]:
    """Repeats every case once a round, in an order drawn anew (seeded) for each round.

    Whatever slows the machine for a while then slows all cases alike, and no case always runs
    behind the same other.

    Args:
        cases: Each runs once and returns its own seconds.
        rounds: Repeats that count.
        title: For the progress bar.
        warmup: Rounds that do not.
    """
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with no_garbage(), progress((rounds + warmup) * len(cases), title) as bar:
        for at in range(-warmup, rounds):
            order = list(cases)
            shuffle(order)
            for name in order:
                spent = cases[name]()
                if at >= 0:
                    seconds[name].append(spent)
                bar.update()
            gc.collect(0)
    return {name: Spread.of(values) for name, values in seconds.items()}


def clocked(
    step: Callable[[], object], before: Callable[[], object] | None = None
) -> Callable[[], float]:
    """Times one call of ``step``; ``before`` runs ahead of it, off the clock."""
    clock = time.perf_counter

    def once() -> float:
        if before is not None:
            before()
        start = clock()
        step()
        return clock() - start

    return once


def repeated(once: Callable[[], float], least: float = 5e-3) -> Callable[[], float]:
    """The mean of as many calls as fill ``least`` seconds (at most 200): one repeat of a case.

    Short calls get one more that does not count, to bring back to the cache what belongs there.
    """
    calls = 0

    def run() -> float:
        nonlocal calls
        if not calls:
            calls = min(200, max(1, math.ceil(least / min(once(), once()))))
        elif calls > 1:
            once()
        return sum(once() for _ in range(calls)) / calls

    return run
