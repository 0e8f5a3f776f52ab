"""The L-BFGS iteration beside torch.optim.LBFGS and others, outside the closure."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import fuse_ext
from benchmarks.harness import limits, peers
from benchmarks.harness.iteration_limits import BareIteration
from benchmarks.harness.machine import available_memory
from benchmarks.harness.rounds import Spread, interleaved, repeated, show_time
from benchmarks.harness.tables import count, number, table
from benchmarks.harness.workloads import (
    Iterations,
    MakeOptimizer,
    Quadratic,
    differences,
    history_dtypes,
    split,
)

# A step so short that the run never ends, however many iterations it takes.
FIXED_LR = 1e-3
# The passes over the history; the op's names in torch's profiler.
PASSES = ("fuse_ext::lbfgs_update", "fuse_ext::lbfgs_set_out")
SIZES = {  # (parameters, tensors, history size, dtype); the last two are targets
    True: [
        (10**6, 8, 10, torch.float32),
        (10**6, 300, 10, torch.float32),
        (10**6, 8, 40, torch.float32),
        (10**6, 8, 10, torch.float64),
        (10**4, 8, 10, torch.float32),
        (2 * 10**7, 1, 10, torch.float32),
    ],
    False: [
        (10**3, 4, 10, torch.float32),
        (10**5, 8, 10, torch.float32),
        (10**6, 1, 10, torch.float32),
        (10**6, 8, 10, torch.float32),
        (10**6, 300, 10, torch.float32),
        (10**7, 300, 10, torch.float32),
        (10**4, 8, 100, torch.float32),
        (10**6, 8, 5, torch.float32),
        (10**6, 8, 20, torch.float32),
        (10**6, 8, 40, torch.float32),
        (10**6, 8, 100, torch.float32),
        (10**6, 8, 10, torch.float64),
        (10**7, 8, 10, torch.float64),
        (10**4, 8, 10, torch.float32),
        (2 * 10**7, 1, 10, torch.float32),
    ],
}
OUT_OF_CACHE = 10**7
# So many parameters have their history in a common L3 cache.
IN_CACHE = 2 * 10**5
# Up to here the ops are also timed without an optimizer around them.
SMALL = 10**5
SEARCHED = {  # (parameters, tensors, dtype)
    True: [(10**5, 8, torch.float32), (10**5, 8, torch.float64), (10**7, 8, torch.float32)],
    False: [
        (10**4, 8, torch.float32),
        (10**5, 8, torch.float32),
        (10**5, 8, torch.float64),
        (10**6, 8, torch.float32),
        (10**6, 8, torch.float64),
        (10**7, 8, torch.float32),
    ],
}
SEARCHED_HISTORY = 10
SEARCHED_ITERATIONS = 20  # a call of step, as torch's optimizer by default
# Other libraries take part up to here; a repeat is a whole run of theirs.
PEERS_UP_TO = 10**6


@dataclass(frozen=True)
class LbfgsRow:
    """One size.

    Attributes:
        numel: Parameters.
        tensors: In so many tensors.
        history_size: m
        dtype: Of the parameters.
        seconds: An iteration outside the closure, for torch, for each history dtype of ours, and
            for other libraries.
        evaluations: Calls of the closure an iteration, where optimizers choose.
        unequal: How the work of ours and torch's differs; empty if it does not.
        state: Bytes of state a parameter, for torch and ours.
        read_limit: The best way to read the history, and its bytes a second.
        side_by_side: Bytes a second of the best way that reads as many streams as our passes do.
        passes: Seconds of our two passes over the history, in one iteration.
        ops: Seconds of each of our ops, in one iteration.
        bare: Seconds of each op in iterations without an optimizer, where the problem is small.
        in_cache: Seconds of our iteration on :data:`IN_CACHE` parameters, where the problem is
            large.
    """

    numel: int
    tensors: int
    history_size: int
    dtype: str
    seconds: dict[str, Spread]
    evaluations: dict[str, float] = field(default_factory=dict)
    unequal: str = ""
    state: dict[str, float] = field(default_factory=dict)
    read_limit: tuple[str, Spread] | None = None
    side_by_side: Spread | None = None
    passes: Spread | None = None
    ops: dict[str, float] = field(default_factory=dict)
    bare: dict[str, Spread] = field(default_factory=dict)
    in_cache: dict[str, Spread] = field(default_factory=dict)

    def speedup(self, ours: str = "fp32", peer: str = "torch") -> Spread:
        """How many times as fast as the peer we are, round by round."""
        return self.seconds[peer].over(self.seconds[ours])

    @property
    def bytes_read(self) -> int:
        """Of the history, in the two passes: 4 m rows."""
        return 16 * self.history_size * self.numel

    @property
    def bytes_moved(self) -> int:
        """In the two passes, each vector once: 4 m + 5 read, 5 written.

        Pass 1 reads 2 m rows, the open row, g and the previous g, and writes y; pass 2 reads 2 m
        rows, g and x, and writes p, the previous g, x and where it was.
        """
        return 4 * (4 * self.history_size + 10) * self.numel

    def fraction(self, nbytes: int) -> Spread | None:
        """Of the read limit that the two passes reach, round by round."""
        if self.passes is None or self.read_limit is None:
            return None
        return self.passes.per(nbytes).over(self.read_limit[1])


def optimizers(
    history_size: int, dtype: torch.dtype, lr: float, iterations: int, search: str | None
) -> dict[str, MakeOptimizer]:
    """torch.optim.LBFGS and ours with each history dtype, so that they do the same work."""
    options: dict[str, Any] = {
        "lr": lr,
        "max_iter": iterations,
        "max_eval": 25 * iterations,
        "history_size": history_size,
        "tolerance_grad": 0.0,
        "tolerance_change": 0.0,
        "line_search_fn": search,
    }
    made: dict[str, MakeOptimizer] = {"torch": partial(torch.optim.LBFGS, **options)}
    if dtype == torch.float64:
        return {**made, "fp64": partial(fuse_ext.LBFGS, **options)}
    for name, history in history_dtypes().items():
        made[name] = partial(fuse_ext.LBFGS, history_dtype=history, **options)
    return made


def set_up(
    made: dict[str, MakeOptimizer],
    sizes: list[int],
    dtype: torch.dtype,
    history_size: int,
    each: int = 1,
) -> dict[str, Iterations]:
    """Each optimizer on its own copy of one problem, with a full history."""
    shared: Quadratic | None = None
    cases = {}
    for name, make in made.items():
        problem = Quadratic(sizes, dtype, like=shared)
        shared = shared or problem
        cases[name] = Iterations(make, problem, each)
        cases[name].fill(history_size)
    return cases


def _state_bytes(case: Iterations) -> float:
    """Bytes of tensors in the optimizer's state, a parameter."""
    storages = {}
    for value in case.entry.values():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / case.problem.numel


def op_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of every op of ours during a call, by torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports its start and a missing GPU
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return {
        event.key: event.cpu_time_total / 1e6
        for event in profiler.key_averages()
        if event.key.startswith("fuse_ext::")
    }


def enough_memory(numel: int, history_size: int) -> bool:
    """Whether torch's optimizer and all of ours fit at once; says so if not."""
    needed = 4.0 * numel * (8 * history_size + 40)
    if needed < available_memory():
        return True
    print(f"left out: L-BFGS with {count(numel)} parameters needs {needed / 2**30:.0f} GiB free")
    return False


def measure_fixed(args: argparse.Namespace) -> list[LbfgsRow]:
    """One iteration with a fixed step: direction, update, move."""
    return [
        _measure_fixed(args.rounds, *size)
        for size in SIZES[args.quick]
        if size[0] <= args.largest and enough_memory(size[0], size[2])
    ]


def _measure_fixed(
    rounds: int, numel: int, tensors: int, history_size: int, dtype: torch.dtype
) -> LbfgsRow:
    made = optimizers(history_size, dtype, FIXED_LR, 1, None)
    cases = set_up(made, split(numel, tensors), dtype, history_size)
    runs: dict[str, Callable[[], float]] = {
        name: repeated(case.run) for name, case in cases.items()
    }
    ways: limits.Ways = {}
    ops: dict[str, float] = {}
    small: dict[str, Iterations] = {}
    if numel >= OUT_OF_CACHE and dtype == torch.float32:
        history = cases["fp32"].entry["history"]
        storage = torch.empty(0).set_(history.untyped_storage())
        ways = limits.reading(storage.view(history.shape[0] * history.shape[1], -1))

        def passes() -> float:
            ops.update(op_seconds(cases["fp32"].run))
            return sum(ops[name] for name in PASSES)

        runs["passes"] = passes
        ours = {name: make for name, make in made.items() if name != "torch"}
        small = set_up(ours, split(IN_CACHE, tensors), dtype, history_size)
        runs |= {_cached(name): repeated(case.run) for name, case in small.items()}
    bare = bare_cases(split(numel, tensors), dtype, history_size, searched=False)
    label = f"L-BFGS, {count(numel)} in {tensors}, m = {history_size}"
    seconds = interleaved({**runs, **ways, **bare}, rounds, label)
    reads = {way: seconds.pop(way) for way in ways}
    of_many = limits.of_most_streams(reads)
    in_passes = seconds.pop("passes", None)
    return LbfgsRow(
        numel,
        tensors,
        history_size,
        str(dtype).removeprefix("torch."),
        seconds,
        unequal=differences(cases),
        state={name: _state_bytes(case) for name, case in cases.items()},
        read_limit=limits.best(reads) if reads else None,
        side_by_side=limits.best(of_many)[1] if of_many else None,
        passes=in_passes,
        ops=ops,
        bare={name: seconds.pop(name) for name in bare},
        in_cache={name: seconds.pop(_cached(name)) for name in small},
    )


def _cached(name: str) -> str:
    return f"{name}, in cache"


def bare_cases(
    sizes: list[int], dtype: torch.dtype, history_size: int, searched: bool
) -> dict[str, Callable[[], float]]:
    """The ops of an iteration by themselves, for small problems in float32."""
    if sum(sizes) > SMALL or dtype != torch.float32:
        return {}
    return BareIteration(Quadratic(sizes, dtype), history_size, FIXED_LR, searched).cases()


def measure_searched(args: argparse.Namespace) -> list[LbfgsRow]:
    """Iterations with a strong Wolfe search."""
    return [
        _measure_searched(args.rounds, *size)
        for size in SEARCHED[args.quick]
        if size[0] <= args.largest and enough_memory(size[0], SEARCHED_HISTORY)
    ]


def _measure_searched(rounds: int, numel: int, tensors: int, dtype: torch.dtype) -> LbfgsRow:
    sizes, m = split(numel, tensors), SEARCHED_HISTORY
    made = optimizers(m, dtype, 1.0, SEARCHED_ITERATIONS, "strong_wolfe")
    cases = set_up(made, sizes, dtype, m, SEARCHED_ITERATIONS)
    # One call of step a repeat: every round is then the same stretch of the run for all.
    runs: dict[str, Callable[[], float]] = {name: case.run for name, case in cases.items()}
    evaluations: dict[str, float] = {}
    if numel <= PEERS_UP_TO:
        problem = Quadratic(sizes, dtype)
        others = {"pytorch-minimize": peers.pytorch_minimize(problem, m)}
        if dtype == torch.float64:
            others["scipy L-BFGS-B"] = peers.scipy_lbfgsb(problem, m)
        for name, run in others.items():
            if run is not None:
                runs[name] = partial(_run_peer, run, name, evaluations)
    label = f"strong Wolfe, {count(numel)}"
    bare = bare_cases(sizes, dtype, m, searched=True)
    seconds = interleaved({**runs, **bare}, rounds, label)
    for name, case in cases.items():
        evaluations[name] = case.work()["evaluations"]
    return LbfgsRow(
        numel,
        tensors,
        m,
        str(dtype).removeprefix("torch."),
        seconds,
        evaluations,
        unequal=differences(cases),
        bare={name: seconds.pop(name) for name in bare},
    )


def _run_peer(run: peers.Run, name: str, evaluations: dict[str, float]) -> float:
    seconds, evaluations[name] = run()
    return seconds


def _ours(row: LbfgsRow) -> list[str]:
    known = ("fp32", "fp64", "bf16", "int8")
    return [name for name in known if name in row.seconds]


def as_table(rows: list[LbfgsRow], title: str) -> str:
    """Markdown: a line for every optimizer of every size."""
    lines = []
    for row in rows:
        size = f"{count(row.numel)} {row.dtype} in {row.tensors}, m = {row.history_size}"
        for name, seconds in row.seconds.items():
            ours = name in _ours(row)
            ratio = row.seconds["torch"].over(seconds)
            cells = [size, f"fuse_ext, {name} history" if ours else name, show_time(seconds)]
            cells.append("" if name == "torch" else ratio.show())
            cells.append(number(row.state[name]) if name in row.state else "")
            cells.append(f"{row.evaluations[name]:.2f}" if row.evaluations else "")
            lines.append(cells)
            size = ""
    headers = [title, "optimizer", "an iteration", "torch / this", "state, B/param", "evaluations"]
    keep = [i for i in range(len(headers)) if i < 4 or any(cells[i] for cells in lines)]
    text = table([headers[i] for i in keep], [[cells[i] for i in keep] for cells in lines])
    notes = [f"{count(row.numel)}: {row.unequal}" for row in rows if row.unequal]
    return "\n\n".join([text, *notes])


def as_json(rows: list[LbfgsRow]) -> list[dict[str, Any]]:
    """For the results file."""
    return [
        {
            "parameters": row.numel,
            "tensors": row.tensors,
            "history_size": row.history_size,
            "dtype": row.dtype,
            "seconds": row.seconds,
            "torch_over_ours": {name: row.speedup(name) for name in _ours(row)},
            "evaluations": row.evaluations,
            "unequal": row.unequal,
            "state_bytes_per_parameter": row.state,
            "read_limit": row.read_limit
            and {"way": row.read_limit[0], "bytes_per_second": row.read_limit[1]},
            "side_by_side_bytes_per_second": row.side_by_side,
            "passes_seconds": row.passes,
            "ops_seconds": row.ops,
            "bare_ops_seconds": row.bare,
            "in_cache_seconds": row.in_cache,
        }
        for row in rows
    ]
