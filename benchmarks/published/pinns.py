"""Physics-informed networks (Raissi et al. 2019) as sums of mean squares, float64 or float32."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.published.networks import Jet, jet, mlp

CHUNK = 1000  # points that a pass takes at once: what it keeps then fits a cache

Residual = Callable[[Jet, Tensor], Tensor]
Features = Callable[[Tensor, Sequence[int], int], Jet]


@dataclass(frozen=True)
class Term:
    """weight * mean(r^2) over some points.

    Attributes:
        points: (n, coordinates).
        residual: r, (n,) or shorter, of the network's jet at the points and of the points.
        directions: Coordinates whose derivatives the residual needs.
        seconds: How many of them are needed twice, from the first on.
        weight: Of the mean.
    """

    points: Tensor
    residual: Residual
    directions: tuple[int, ...] = ()
    seconds: int = 0
    weight: float = 1.0

    def pieces(self, features: Features) -> list[tuple[Jet, Tensor]]:
        """The inputs' jets and the points, some at a time."""
        return [
            (features(points, self.directions, self.seconds), points)
            for points in self.points.split(CHUNK)
        ]


@dataclass(frozen=True)
class Resampling:
    """Residual-adaptive: candidates are kept with odds of |r|^k / mean(|r|^k) + c (Wu et al. 2023).

    Attributes:
        every: Evaluations after which new points are due.
        candidates: Drawn uniformly from the domain.
        low: Corner of the domain.
        high: The opposite one.
        k: Power of the residual.
        c: 0 for none at all where the residual is 0.
    """

    every: int
    candidates: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    k: float = 1.0
    c: float = 1.0


@dataclass(frozen=True)
class Equation:
    """A boundary value problem.

    Attributes:
        terms: Of the loss. The first has the points inside, which may be resampled.
        exact: The solution at points (n, coordinates), (n,).
        test: Points where the error is measured.
        relative: The error is relative in the l2 norm, or else the root of the mean square.
        features: The network's inputs as a jet; by default the coordinates.
        resampling: How new points are drawn, if any are.
    """

    terms: tuple[Term, ...]
    exact: Callable[[Tensor], Tensor]
    test: Tensor
    relative: bool
    features: Features = Jet.of_inputs
    resampling: Resampling | None = None


class Pinn:
    """A network to be trained on an equation.

    Args:
        equation: With all points in the dtype of the network.
        widths: Of the network.
        glorot: Its initialisation, or torch's own.
        seed: Of the initialisation, and of all points drawn later.

    Attributes:
        params: To be optimized.
        resample_every: Evaluations, or None.
    """

    def __init__(
        self, equation: Equation, widths: tuple[int, ...], glorot: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self._equation = equation
        self._model = mlp(widths, equation.test.dtype, glorot)
        self._judged = copy.deepcopy(self._model)
        self._pieces = [term.pieces(equation.features) for term in equation.terms]
        self._random = torch.Generator().manual_seed(seed)
        self._test = Term(equation.test, lambda u, x: u.value[0]).pieces(equation.features)
        self._exact = equation.exact(equation.test)
        self.params: list[Tensor] = list(self._model.parameters())
        resampling = equation.resampling
        self.resample_every = None if resampling is None else resampling.every

    def evaluate(self) -> Tensor:
        """The loss; its gradients are in ``params``, in other tensors at every call."""
        for param in self.params:
            param.grad = None
        total = torch.zeros((), dtype=self._equation.test.dtype)
        for term, pieces in zip(self._equation.terms, self._pieces, strict=True):
            residuals = [term.residual(jet(self._model, at), points) for at, points in pieces]
            count = sum(len(residual) for residual in residuals)
            for residual in residuals:
                part = (term.weight / count) * residual.square().sum()
                part.backward()
                total += part.detach()
        return total

    def error(self, params: Sequence[Tensor]) -> float:
        """Of the solution that a network with other parameters is, see ``Equation.relative``."""
        with torch.no_grad():
            torch._foreach_copy_(list(self._judged.parameters()), list(params))
            found = torch.cat([jet(self._judged, at).value[0] for at, _ in self._test])
        off = torch.linalg.vector_norm(found - self._exact)
        if self._equation.relative:
            return float(off / torch.linalg.vector_norm(self._exact))
        return float(off) / len(found) ** 0.5

    def resample(self) -> None:
        """Draws new points inside."""
        how = self._equation.resampling
        assert how is not None
        inside = self._equation.terms[0]
        dtype = inside.points.dtype
        low, high = torch.tensor(how.low, dtype=dtype), torch.tensor(how.high, dtype=dtype)
        uniform = torch.rand(how.candidates, len(low), generator=self._random, dtype=dtype)
        candidates = replace(inside, points=low + (high - low) * uniform)
        with torch.no_grad():
            residual = torch.cat(
                [
                    inside.residual(jet(self._model, at), points)
                    for at, points in candidates.pieces(self._equation.features)
                ]
            )
        odds = residual.abs() ** how.k
        odds = odds / odds.mean() + how.c
        if not (torch.isfinite(odds).all() and odds.count_nonzero() >= len(inside.points)):
            return  # a run that is lost keeps its points
        kept = torch.multinomial(odds, len(inside.points), generator=self._random)
        self._pieces[0] = replace(inside, points=candidates.points[kept]).pieces(
            self._equation.features
        )
