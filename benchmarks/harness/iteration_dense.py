"""An iteration with the dense inverse Hessian, beside the same update in numpy and in scipy."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.rounds import Spread, clocked, interleaved, show_time
from benchmarks.harness.tables import count, number, table
from fuse_ext.curvature.dense import DenseMatrix, terms_apart
from fuse_ext.kernels import ops
from fuse_ext.vector.flat import FlatParams

SIZES = {True: (257, 2000), False: (257, 2000, 5000)}
# Walked through before each repeat, so that the matrix comes from the memory as in training, where
# the closure runs in between: several times the largest of caches.
FLUSHED = 2**24
OURS, NUMPY, SCIPY = "fuse_ext", "numpy", "scipy BFGS"
# Where it lies without that: in a cache, if there is one that holds it.
LEFT = " (not flushed)"
STEP = 0.1
# Ways to read and write the matrix once, none of which changes it; the fastest is the limit.
REWRITES: dict[str, Callable[[Tensor], object]] = {
    "torch mul_": lambda matrix: matrix.mul_(1.0),
    "torch add_": lambda matrix: matrix.add_(0.0),
    "torch clamp_": lambda matrix: matrix.clamp_(max=math.inf),
}


@dataclass(frozen=True)
class DenseRow:
    """One size, in float64.

    Attributes:
        numel: Parameters.
        nbytes: Of the matrix.
        terms: Pairs that are kept apart from it; an iteration is the mean over as many.
        seconds: An iteration, or reading and writing the matrix, by who does it.
    """

    numel: int
    nbytes: int
    terms: int
    seconds: dict[str, Spread]

    def once(self, where: str = "") -> Spread:
        """Reading and writing the matrix once, in the fastest way."""
        return min((self.seconds[way + where] for way in REWRITES), key=lambda s: s.median)

    def passes(self, where: str = "") -> Spread:
        """An iteration in units of that."""
        return self.seconds[OURS + where].over(self.once(where))

    def speedup(self, peer: str) -> Spread | None:
        """How many times a peer's iteration takes; None where the peer is missing."""
        theirs = self.seconds.get(peer)
        return None if theirs is None else theirs.over(self.seconds[OURS])

    def as_json(self) -> dict[str, Any]:
        """For the results."""
        seconds = {name: spread.values for name, spread in self.seconds.items()}
        return {
            "parameters": self.numel,
            "nbytes": self.nbytes,
            "terms": self.terms,
            "seconds": seconds,
        }


def measure(args: argparse.Namespace) -> list[DenseRow]:
    """All sizes up to ``args.largest``."""
    return [_measure(numel, args.rounds) for numel in SIZES[args.quick] if numel <= args.largest]


def _measure(numel: int, rounds: int) -> DenseRow:
    dense = _Dense(numel)
    flushed = torch.ones(FLUSHED, dtype=torch.float64)

    def rest() -> None:
        time.sleep(2e-3)  # torch's idle workers spin for a moment, on our cores

    def flush() -> None:
        flushed.add_(1.0)
        rest()

    terms = terms_apart(numel)
    cases = {NUMPY: clocked(_numpy(numel), flush)}
    for where, before in (("", flush), (LEFT, rest)):
        cases[OURS + where] = _mean(dense.iteration(before), terms)
        for way, rewrite in REWRITES.items():
            cases[way + where] = _mean(clocked(partial(rewrite, dense.matrix), before), terms)
    if find_spec("scipy") is not None:
        cases[SCIPY] = clocked(_scipy(numel), flush)
    title = f"dense, d = {count(numel)}"
    return DenseRow(numel, dense.matrix.nbytes, terms, interleaved(cases, rounds, title))


def _mean(once: Callable[[], float], times: int) -> Callable[[], float]:
    """The mean of so many calls: of a cycle, from one time that M takes terms in to the next."""
    return lambda: sum(once() for _ in range(times)) / times


class _Dense:
    """Our iteration on a quadratic, whose pairs are never refused."""

    def __init__(self, numel: int) -> None:
        self._x = nn.Parameter(torch.randn(numel, dtype=torch.float64))
        flat = FlatParams([{"params": [self._x]}])
        entry: dict[str, Any] = {}
        self._h = DenseMatrix(flat, ops.select("auto", flat.device), entry)
        self.matrix: Tensor = entry["matrix"]
        self._direction = entry["history"][0, 0]
        self._curvature = torch.linspace(1, 100, numel, dtype=torch.float64)
        self._iterate(None)

    def _iterate(self, pair_step: float | None) -> None:
        grad = self._curvature * self._x.detach()
        self._h.update_direction([grad], [], [], False, pair_step, 0.0)

    def iteration(self, before: Callable[[], object]) -> Callable[[], float]:
        """Times one iteration, behind a step and what comes before."""

        def move() -> None:
            with torch.no_grad():
                self._x.add_(self._direction, alpha=STEP)
                if float(self._x.square().sum()) < 1e-12:  # found: somewhere else
                    self._x.normal_()
                    self._iterate(None)
                    self._x.add_(self._direction, alpha=STEP)
            before()

        return clocked(lambda: self._iterate(STEP), move)


def _pair(numel: int) -> tuple[np.ndarray, np.ndarray]:
    s = np.random.default_rng(0).standard_normal(numel)
    return s, np.linspace(1, 100, numel) * s


def _numpy(numel: int) -> Callable[[], object]:
    """The BFGS update as one would write it, in place, and the product for the direction.

    The self-scaled Broyden update is of the same rank, so that this is no more work.
    """
    matrix, (s, y) = np.eye(numel), _pair(numel)

    def iterate() -> np.ndarray:
        w, sy = matrix @ y, s @ y
        cross = np.outer(w, s)
        cross = cross + cross.T
        np.subtract(matrix, cross / sy, out=matrix)
        np.add(matrix, np.outer(s, s * ((1 + y @ w / sy) / sy)), out=matrix)
        return matrix @ y

    return iterate


def _scipy(numel: int) -> Callable[[], object]:
    """scipy's BFGS update of the inverse Hessian, and the product."""
    from scipy.optimize import BFGS

    update, (s, y) = BFGS(), _pair(numel)
    update.initialize(numel, "inv_hess")

    def iterate() -> np.ndarray:
        update.update(s, y)
        product: np.ndarray = update.dot(y)
        return product

    return iterate


def as_text(rows: list[DenseRow]) -> str:
    """The table, with what it says in words."""
    if not rows:
        return ""
    return (
        "The dense inverse Hessian (self-scaled Broyden, float64), an iteration as the mean over "
        "those from one time that the matrix takes pairs in to the next; before each one a buffer "
        f"of {FLUSHED * 8 // 2**20} MiB is walked through, as a closure would, but for the column "
        "that says not. numpy and scipy update with BFGS"
        f"{'' if SCIPY in rows[0].seconds else ' (scipy is missing here)'}.\n\n{_table(rows)}"
    )


def _table(rows: list[DenseRow]) -> str:
    """A line for each size."""
    headers = (
        "parameters",
        "matrix",
        "an iteration",
        "reading and writing it once",
        "iteration / that",
        "the same, not flushed",
        "numpy / ours",
        "scipy's BFGS / ours",
    )
    lines = [
        [
            count(row.numel),
            f"{number(row.nbytes / 2**20)} MiB",
            show_time(row.seconds[OURS]),
            show_time(row.once()),
            row.passes().show(),
            row.passes(LEFT).show(),
            *("-" if ratio is None else ratio.show() for ratio in map(row.speedup, (NUMPY, SCIPY))),
        ]
        for row in rows
    ]
    return table(headers, lines)
