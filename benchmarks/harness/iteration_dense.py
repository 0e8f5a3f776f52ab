"""An iteration with the dense inverse Hessian, beside the same update in numpy and in scipy."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
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
OURS, TWICE, NUMPY, SCIPY = "fuse_ext", "read and written once", "numpy", "scipy BFGS"
CACHED = " (in cache)"
STEP, SHARE = 0.1, 1e-3


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

    def passes(self, where: str = "") -> Spread:
        """An iteration in units of reading and writing the matrix once."""
        return self.seconds[OURS + where].over(self.seconds[TWICE + where])

    def speedup(self, peer: str) -> Spread | None:
        """How many times a peer's iteration takes; None where the peer is missing."""
        theirs = self.seconds.get(peer)
        return None if theirs is None else theirs.over(self.seconds[OURS])

    def as_json(self) -> dict[str, Any]:
        """For the results."""
        seconds = {name: spread.values for name, spread in self.seconds.items()}
        return {
            "numel": self.numel,
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

    def flush() -> None:
        flushed.add_(1.0)

    def rewrite() -> Tensor:
        return dense.matrix.mul_(1.0)

    cases = {
        OURS: dense.cycle(flush),
        TWICE: clocked(rewrite, flush),
        OURS + CACHED: dense.cycle(lambda: None),
        TWICE + CACHED: clocked(rewrite, rewrite),
        NUMPY: clocked(_numpy(numel), flush),
    }
    if find_spec("scipy") is not None:
        cases[SCIPY] = clocked(_scipy(numel), flush)
    title = f"dense, d = {count(numel)}"
    return DenseRow(
        numel, dense.matrix.nbytes, terms_apart(numel), interleaved(cases, rounds, title)
    )


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
        self._terms = terms_apart(numel)
        self._iterate(None)

    def _iterate(self, pair_step: float | None) -> None:
        grad = self._curvature * self._x.detach()
        self._h.update_direction([grad], [], [], False, pair_step, 0.0)

    def cycle(self, before: Callable[[], object]) -> Callable[[], float]:
        """The mean over the iterations from one time that M takes terms in to the next."""

        def move() -> None:
            before()
            with torch.no_grad():
                self._x.add_(self._direction, alpha=STEP)
                if float(self._x.square().sum()) < 1e-12:  # found: somewhere else
                    self._x.normal_()
                    self._iterate(None)
                    self._x.add_(self._direction, alpha=STEP)

        once = clocked(lambda: self._iterate(STEP), move)
        return lambda: sum(once() for _ in range(self._terms)) / self._terms


def _pair(numel: int) -> tuple[np.ndarray, np.ndarray]:
    s = np.random.default_rng(0).standard_normal(numel)
    return s, np.linspace(1, 100, numel) * s


def _numpy(numel: int) -> Callable[[], object]:
    """The formula of csrc/broyden.h as one would write it, and the product for the direction."""
    matrix, (s, y) = np.eye(numel), _pair(numel)

    def iterate() -> np.ndarray:
        nonlocal matrix
        w, sy = matrix @ y, s @ y
        ywy = y @ w
        v = math.sqrt(ywy) * (s / sy - w / ywy)
        inner = matrix - np.outer(w, w) / ywy + (1 - SHARE) * np.outer(v, v)
        matrix = inner / (1 - SHARE) + np.outer(s, s) / sy
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
        f"in cache.\n\n{_table(rows)}"
    )


def _table(rows: list[DenseRow]) -> str:
    """A line for each size."""
    headers = (
        "parameters",
        "matrix",
        "an iteration",
        "/ reading and writing it once",
        "the same in cache",
        "numpy / ours",
        "scipy's BFGS / ours",
    )
    lines = [
        [
            count(row.numel),
            f"{number(row.nbytes / 2**20)} MiB",
            show_time(row.seconds[OURS]),
            row.passes().show(),
            row.passes(CACHED).show(),
            *("-" if ratio is None else ratio.show() for ratio in map(row.speedup, (NUMPY, SCIPY))),
        ]
        for row in rows
    ]
    return table(headers, lines)
