"""What limits the targets of per_iteration: the memory, instructions, or what is not an op.

Bounds out of the same run. Out of cache: the bytes that an exact iteration cannot but move, at the
best bandwidth measured, and for the two passes, which read many rows side by side, at that of many
streams; and the instructions of our own, as if everything lay in a cache. In cache: our ops alone,
called without an optimizer around them, as if Python and all bookkeeping cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.limits import MOST_STREAMS
from benchmarks.harness.rounds import Spread, show_time
from benchmarks.harness.tables import number, table
from benchmarks.harness.workloads import Quadratic
from fuse_ext.curvature.ring import History
from fuse_ext.kernels import ops
from fuse_ext.kernels.bound_ops import AdamNumbers, bind
from fuse_ext.vector.flat import FlatParams

HEADERS = (
    "target",
    "bound",
    "its time",
    "ours",
    "bound / ours",
    "peer / bound: the best ratio",
    "peer / ours",
    "wanted",
    "so",
)
# Of an element of a history row; in 8 bits with its share of a block's scale.
ROW_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4.0 / 128}
# The two passes in one call, the first move included.
UPDATE_AND_SET_OUT = "lbfgs_update + lbfgs_set_out"
# So much of a bound counts as all of it: what is left is noise.
REACHED = 0.95


def bytes_of_iteration(history_size: int, row: float, evaluations: float | None = None) -> float:
    """Bytes a parameter that an exact L-BFGS iteration on float32 must move; each vector once.

    Pass 1 reads 2 m rows, p, g and the previous g, and writes y; pass 2 reads 2 m rows and g, and
    writes p and the previous g. The first move reads and writes x while p is at hand, any other
    reads p as well. A line search reads g and p for the slope at each of its evaluations.

    Args:
        history_size: m
        row: Bytes of an element of a row.
        evaluations: Of a line search; None for a fixed step.
    """
    passes = (4 * history_size + 3) * row + 16.0
    if evaluations is None:
        return passes + 8.0
    return passes + 8.0 * evaluations + (evaluations - 1.0) * row + evaluations * (row + 4.0)


@dataclass(frozen=True)
class Limit:
    """A target's time beside its bound.

    Attributes:
        target: As the table of targets calls it.
        what: The bound.
        bound: Its seconds, round by round.
        ours: Seconds measured.
        peer: The peer's.
        wanted: The ratio asked for; None where another number than a ratio is.
    """

    target: str
    what: str
    bound: Spread
    ours: Spread
    peer: Spread
    wanted: float | None

    @property
    def reached(self) -> Spread:
        """Share of our time that the bound takes."""
        return self.bound.over(self.ours)

    @property
    def best(self) -> Spread:
        """The ratio to the peer if we were as fast as the bound."""
        return self.peer.over(self.bound)

    @property
    def ratio(self) -> Spread:
        """The ratio to the peer."""
        return self.peer.over(self.ours)

    @property
    def verdict(self) -> str:
        """What follows from the medians."""
        reached = self.reached.median
        if reached > 1.0 / REACHED:
            bound = "faster than the bound, which does not limit it"
        elif reached >= REACHED:
            bound = "at the bound"
        else:
            bound = f"{100 * (1 - reached):.0f}% is not the bound"
        if self.wanted is None or self.ratio.median >= self.wanted:
            return bound
        if self.best.median < self.wanted:
            return f"{bound}; not even the bound would do"
        return f"{bound}; the bound would do"

    def cells(self) -> list[str]:
        """A line of the table."""
        return [
            self.target,
            self.what,
            show_time(self.bound),
            show_time(self.ours),
            self.reached.show(),
            self.best.show(),
            self.ratio.show(),
            "" if self.wanted is None else f"{self.wanted:g}",
            self.verdict,
        ]


def memory_limit(
    target: str,
    moved: float,
    numel: int,
    bandwidth: Spread,
    ours: Spread,
    peer: Spread,
    wanted: float | None,
) -> Limit:
    """The bound for ``moved`` bytes a parameter."""
    rate = number(bandwidth.median / 1e9)
    what = f"memory: {moved:.1f} bytes a parameter at {rate} GB/s"
    return Limit(target, what, bandwidth.per(moved * numel), ours, peer, wanted)


def streams_limit(
    target: str, moved: float, side_by_side: Spread, best: Spread, ours: Spread, wanted: float
) -> Limit:
    """The bound for bytes read from many streams at once; the peer reads them as is best."""
    rate = number(side_by_side.median / 1e9)
    what = f"memory: {MOST_STREAMS} streams a thread, without any arithmetic, at {rate} GB/s"
    return Limit(target, what, side_by_side.per(moved), ours, best.per(moved), wanted)


def instructions_limit(
    target: str, cached: Spread, share: float, ours: Spread, peer: Spread, wanted: float | None
) -> Limit:
    """The bound of what we do with the numbers; ``cached``: a problem ``share`` of the size."""
    seconds = cached.scaled(1.0 / share)
    what = f"instructions: {number(1 / share)} times a problem whose history lies in the L3 cache"
    return Limit(target, what, seconds, ours, peer, wanted)


def ops_limit(
    target: str,
    seconds: dict[str, Spread],
    calls: dict[str, float],
    ours: Spread,
    peer: Spread,
    wanted: float | None,
) -> Limit:
    """The bound of the ops alone, each so many times an iteration."""
    rounds = zip(*(seconds[name].scaled(calls[name]).values for name in seconds), strict=True)
    total = Spread.of(sum(parts) for parts in rounds)
    seconds = {name: spread for name, spread in seconds.items() if calls[name] != 0.0}
    parts = ", ".join(
        f"{name} {number(1e6 * seconds[name].median)}"
        + (f" x {calls[name]:.2f}" if calls[name] != 1.0 else "")
        for name in seconds
    )
    rest = 1e6 * (ours.median - total.median)
    what = f"ops alone, us: {parts}; the rest (Python, dispatch, colder caches) {number(rest)}"
    return Limit(target, what, total, ours, peer, wanted)


@dataclass
class BareIteration:
    """L-BFGS with a fixed step as calls of ops: no optimizer, no tests, no line search.

    Every other iteration makes direction and move in one op, as optimizers do.

    Args:
        problem: Its own copy; the closure runs before each iteration, off the clock.
        history_size: m
        lr: The step.
        searched: Norms come with the slope, as in a line search.
    """

    problem: Quadratic
    history_size: int
    lr: float
    searched: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        flat = FlatParams([{"params": self.problem.params}])
        self._flat = flat
        self._history = History(flat, ops.select("auto", flat.device), {}, self.history_size, None)
        self._origin = torch.zeros(flat.numel, dtype=flat.dtype)
        self._pair_step: float | None = None
        for _ in range(self.history_size + 3):
            self.run()

    def run(self) -> None:
        """Two iterations; notes the seconds of each op."""
        history, origin = self._history, self._origin
        loss = self.problem.closure()
        grads = self._flat.gradients()[1]
        pair = self._pair_step
        self._time("grad_stats", lambda: history.stats(grads, [], False, self.searched, loss))
        self._time("lbfgs_update", lambda: history.update(grads, [], False, pair, 1e-8))
        self._time("lbfgs_direction", lambda: history.direction(grads, [], [], False))
        self._time("lbfgs_move", lambda: history.move(origin, self.lr, True))
        self.problem.closure()
        again = (self._flat.gradients()[1], [], [], False, self.lr, 1e-8, origin, self.lr, 0.0)
        history.stats(again[0], [], False, self.searched, loss)
        self._time(UPDATE_AND_SET_OUT, lambda: history.update_direction(*again))
        self._pair_step = self.lr

    def _time(self, name: str, call: Callable[[], object]) -> None:
        start = perf_counter()
        call()
        self.seconds[name] = perf_counter() - start

    def cases(self, repeats: int = 50) -> dict[str, Callable[[], float]]:
        """The mean seconds of each op, to be interleaved with other cases."""

        def mean(name: str) -> Callable[[], float]:
            def run() -> float:
                total = 0.0
                for _ in range(repeats):
                    self.run()
                    total += self.seconds[name]
                return total / repeats

            return run

        return {name: mean(name) for name in self.seconds}


def bare_adam(params: list[nn.Parameter]) -> Callable[[], object]:
    """Adam's op on parameters that have gradients, with moments of its own."""
    flat = FlatParams([{"params": params}])
    bound = bind(ops.select("auto", flat.device), flat)
    moments: list[Tensor] = [torch.zeros(flat.numel, dtype=flat.dtype) for _ in range(2)]
    stats = torch.zeros(1, dtype=torch.float64)
    numbers = AdamNumbers(1, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.0, False, False)

    def step() -> None:
        with torch.no_grad():
            bound.adam_step(flat.gradients()[1], *moments, None, stats, None, *numbers)

    return step


def as_table(limits: list[Limit]) -> str:
    """Markdown."""
    if not limits:
        return ""
    text = (
        "What limits the targets that are times: the bytes that an exact iteration must move, at "
        "the best bandwidth of this run or at that of many streams, the instructions on numbers in "
        "cache, or the ops alone. L-BFGS with rows of r bytes an element "
        "moves (4 m + 3) r + 16 in its two passes, 8 in the first move and r + 8 in any other, and "
        "r + 4 for a trial's slope."
    )
    return f"{text}\n\n{table(HEADERS, [limit.cells() for limit in limits])}"


def as_json(limits: list[Limit]) -> list[dict[str, Any]]:
    """For the results file."""
    return [
        {
            "target": limit.target,
            "bound": limit.what,
            "bound_seconds": limit.bound,
            "seconds": limit.ours,
            "bound_over_ours": limit.reached,
            "best_ratio": limit.best,
            "ratio": limit.ratio,
            "wanted": limit.wanted,
            "verdict": limit.verdict,
        }
        for limit in limits
    ]
