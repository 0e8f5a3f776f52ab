"""Runs on the paper's four functions of two variables, from many starts (Fig. 1-4).

SGD and Adam treat every coordinate alone, so one tensor of all starts takes exactly the steps that
each start takes by itself; FUSE and L-BFGS run from one start after the other.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fuse_ext

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from common import Relay
from functions import PROBLEMS

SWITCH = 100  # Adam steps before SGD: as many as FusePV's WarmUp takes at least
NEAR = 0.1  # from a global minimum: in it, and in no other (they are 0.96 apart or more)
EXACT = 1e-6  # the same, and at its bottom
SAME = 1e-8  # two losses that differ by no more are the same
LARGEST = 1e300  # the loss of a run that diverged
FLOOR = 1e-13  # of |x - x*| / max(1, |x*|): below, rounding decides
STILL = 5  # steps in a row that move a tenth of that at most: a run has ended
DECADES = range(-9, 0)  # of the error
SEEDS = {"reported": 0, "tuning": 1}

Params = list[Tensor]


def starts(function: str, which: str, count: int) -> np.ndarray:
    """So many points of the function's window, drawn uniformly by the seed of ``which``."""
    left, right, bottom, top = PROBLEMS[function].window
    draw = np.random.default_rng(SEEDS[which]).random((count, 2))
    return draw * (right - left, top - bottom) + (left, bottom)


def sgd(params: Params, lr: float) -> Any:
    return torch.optim.SGD(params, lr=lr)


def adam(params: Params, lr: float) -> Any:
    return torch.optim.Adam(params, lr=lr)


def adam_then_sgd(params: Params, lr: float, second: float) -> Any:
    return Relay(adam(params, lr), sgd(params, second), SWITCH)


def fuse_pv(params: Params, lr: float) -> Any:
    """All by default, but told that the closure is the same function at every call."""
    return fuse_ext.FusePV(params, lr=lr, deterministic=True)


def lbfgs(params: Params) -> Any:
    return fuse_ext.FusePV(params, switch=fuse_ext.AtOnce(), deterministic=True)


TOGETHER: dict[str, Callable[..., Any]] = {
    "SGD": sgd,
    "Adam": adam,
    "Adam+SGD": adam_then_sgd,
}
ALONE: dict[str, Callable[..., Any]] = {"FUSE": fuse_pv, "L-BFGS": lbfgs}


def distances(function: str, points: np.ndarray) -> np.ndarray:
    """From each of the points to the nearest global minimum."""
    minima = np.array(PROBLEMS[function].minima, dtype=float)
    steps = points[:, None] - minima
    return np.hypot(steps[..., 0], steps[..., 1]).min(1)


def moments(budget: int) -> list[int]:
    """Numbers of evaluations at which curves are kept: all up to 20, then 40 a decade.

    And all around the switch.
    """
    log = np.geomspace(1, budget, round(40 * math.log10(budget))).round().astype(int).tolist()
    around = range(SWITCH - 5, SWITCH + 40)
    return sorted(n for n in {*range(21), *log, *around} if n <= budget)


class Trace(NamedTuple):
    """A run from one start: before every step, and at the end.

    Attributes:
        calls: Gradient evaluations so far, of shape (steps + 1,).
        points: Of shape (steps + 1, 2).
        losses: Of shape (steps + 1,).
        switch: Index of the first point of L-BFGS (SGD, after Adam); 0 where nothing changes.
    """

    calls: np.ndarray
    points: np.ndarray
    losses: np.ndarray
    switch: int


def values(function: str, points: np.ndarray) -> np.ndarray:
    """The function at points of shape (..., 2)."""
    result: np.ndarray = PROBLEMS[function].f(*torch.from_numpy(points).unbind(-1)).numpy()
    return result


def together(
    function: str, make: Callable[[Params], Any], starts: np.ndarray, budget: int
) -> Iterator[Trace]:
    """Coordinate-wise methods, from all starts at once."""
    x = torch.tensor(starts, requires_grad=True)
    optimizer = make([x])
    points = np.empty((budget + 1, *starts.shape))

    def closure() -> Tensor:
        x.grad = None
        loss = PROBLEMS[function].f(*x.unbind(1)).sum()
        loss.backward()
        return loss

    for calls in range(budget):
        points[calls] = x.detach().numpy()
        optimizer.step(closure)
    points[budget] = x.detach().numpy()
    losses = values(function, points)
    switch = min(SWITCH, budget) if isinstance(optimizer, Relay) else 0
    for i in range(len(starts)):
        yield Trace(np.arange(budget + 1), points[:, i], losses[:, i], switch)


def alone(
    function: str, make: Callable[[Params], Any], start: np.ndarray, budget: int
) -> tuple[Trace, fuse_ext.Report]:
    """FUSE or L-BFGS from one start, until it converges or moves by rounding errors only."""
    x = torch.tensor(start, requires_grad=True)
    optimizer, calls, still = make([x]), 0, 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        x.grad = None
        loss = PROBLEMS[function].f(*x)
        loss.backward()
        return loss

    trace = [(0, x.tolist())]
    while calls < budget and still < STILL:
        place = x.detach().clone()
        optimizer.step(closure)
        if calls > budget:  # a search that ends beyond
            break
        trace.append((calls, x.tolist()))
        moved = float((x.detach() - place).abs().max() / max(1.0, float(place.abs().max())))
        still = still + 1 if optimizer.phase == "lbfgs" and moved < FLOOR / 10 else 0
    counts, points = (np.array(column) for column in zip(*trace, strict=True))
    report = optimizer.report()
    switch = min(report.switch_step or 0, len(points) - 1)
    return Trace(counts, points, values(function, points), switch), report


# --- what is kept ---------------------------------------------------------------------------


def settled(trace: Trace) -> int:
    """Evaluations after which the loss stays within SAME of the last one."""
    away = np.flatnonzero(~(np.abs(trace.losses - trace.losses[-1]) <= SAME))
    return int(trace.calls[min(away[-1] + 1, len(trace.calls) - 1)]) if len(away) else 0


def errors(function: str, points: np.ndarray) -> np.ndarray | None:
    """|x_k - x*| / max(1, |x*|) of the iterates, if they go to a minimum x* that is smooth.

    x* is found by Newton's method from the last of them.
    """

    def of(point: Tensor) -> Tensor:
        return PROBLEMS[function].f(*point)

    solution = torch.tensor(points[-1])
    scale = max(1.0, float(solution.norm()))
    for _ in range(20):
        x = solution.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(of(x), x)
        hessian: Any = torch.autograd.functional.hessian(of, solution)
        if not torch.isfinite(hessian).all() or torch.linalg.eigvalsh(hessian)[0] < 1e-3:
            return None
        step = torch.linalg.solve(hessian, gradient)
        solution = solution - step
        if float(step.norm()) < FLOOR / 100 * scale:
            break
    found = np.linalg.norm(points - solution.numpy(), axis=1) / scale
    result: np.ndarray = found
    return result if found[-1] < 0.01 else None


def ratios(sequences: list[np.ndarray]) -> list[dict[str, Any]]:
    """Quartiles of e_{k+1} / e_k over all runs, for each decade of e_k that has ten of them.

    e_{k+1} counts as FLOOR at least: what is below is rounding.
    """
    if not sequences:
        return []
    before = np.concatenate([e[:-1] for e in sequences])
    after = np.concatenate([e[1:] for e in sequences])
    found = []
    for decade in DECADES:
        here = (before >= 10.0**decade) & (before < 10.0 ** (decade + 1))
        if here.sum() >= 10:
            quotients = np.maximum(after[here], FLOOR) / before[here]
            low, median, high = np.percentile(quotients, (25, 50, 75)).tolist()
            found.append(
                {"decade": decade, "pairs": int(here.sum()), "median": median}
                | {"quartiles": [low, high]}
            )
    return found


def keep(function: str, traces: list[Trace], budget: int) -> dict[str, Any]:
    """The result of a cell."""
    ends = np.array([trace.points[-1] for trace in traces])
    finals = np.array([trace.losses[-1] for trace in traces])
    finite = np.isfinite(finals)
    away = np.where(finite, distances(function, ends), math.inf)
    at = moments(budget)
    near = np.zeros(len(at))
    sequences = []
    for trace, is_finite in zip(traces, finite, strict=True):
        rows = np.searchsorted(trace.calls, at, side="right") - 1  # the last point known by then
        near += distances(function, trace.points[rows]) <= NEAR
        found = errors(function, trace.points[trace.switch :]) if is_finite else None
        if found is not None:
            sequences.append(found)
    first = traces[0]
    rows = np.unique(np.searchsorted(first.calls, at, side="right") - 1)
    return {
        "moments": at,
        "near_share": (near / len(traces)).tolist(),
        "first": {
            "calls": first.calls[rows].tolist(),
            "points": first.points[rows].tolist(),
            "losses": first.losses[rows].tolist(),
            "switch": int(np.searchsorted(rows, first.switch)),
        },
        "losses": np.where(finite, finals, LARGEST).tolist(),
        "near": (away <= NEAR).tolist(),
        "exact": (away <= EXACT).tolist(),
        "diverged": int((~finite).sum()),
        "settled": [settled(trace) for trace in traces],
        "evaluations": [int(trace.calls[-1]) for trace in traces],
        "smooth": len(sequences),
        "ratios": ratios(sequences),
    }


# --- cells ----------------------------------------------------------------------------------


def traces(
    function: str, method: str, lrs: list[float], which: str, count: int, budget: int
) -> tuple[list[Trace], list[fuse_ext.Report]]:
    """One method with its learning rates, from all starts."""
    points = starts(function, which, count)
    if method in TOGETHER:
        make = partial(TOGETHER[method], **dict(zip(("lr", "second"), lrs, strict=False)))
        return list(together(function, make, points, budget)), []
    make = partial(ALONE[method], **dict(zip(("lr",), lrs, strict=False)))
    found = [alone(function, make, point, budget) for point in points]
    return [trace for trace, _ in found], [report for _, report in found]


def run(function: str, method: str, lrs: list[float], count: int, budget: int) -> dict[str, Any]:
    """The method from the starts that are reported."""
    found, reports = traces(function, method, lrs, "reported", count, budget)
    result = keep(function, found, budget)
    if reports:
        result["switches"] = [report.switch_step for report in reports]
        result["fallbacks"] = sum(report.fallbacks for report in reports)
    return result


def tune(
    function: str, method: str, grid: list[list[float]], count: int, budget: int
) -> list[dict[str, Any]]:
    """The method with every one of the learning rates, on other starts."""
    tried = []
    for lrs in grid:
        found, _ = traces(function, method, lrs, "tuning", count, budget)
        finals = np.nan_to_num([trace.losses[-1] for trace in found], nan=LARGEST, posinf=LARGEST)
        ends = np.array([trace.points[-1] for trace in found])
        tried.append(
            {
                "lrs": lrs,
                "near": int((distances(function, ends) <= NEAR).sum()),
                "losses": float(np.median(finals)),
                "settled": float(np.median([settled(trace) for trace in found])),
            }
        )
    return tried
