"""Each step of the table in docs/cuda.md on this GPU, beside the model's prediction."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import cuda_model
from benchmarks.harness import gpu_waits
from benchmarks.harness.gpu_model import H100, RTX4090, Gpu
from benchmarks.harness.gpu_steps import PAIRS, Passage, Problem, Step
from fuse_ext.curvature.dense import terms_apart
from fuse_ext.kernels import ops, scalars

DEVICE = torch.device("cuda")
# Elements of a tensor, and tensors. Of multiples of 4 elements, so that all packs are whole; and
# of an odd number, so that most tensors have places in the flat vector that their addresses do not
# agree with.
CASES = ((10_000_000, 1), (33_332, 300), (100_000_000, 1), (1_252, 8))
ODD_CASES = ((33_333, 300),)
ODD = ", odd sizes: mostly element by element"
# Square matrices of weights, and their sides.
WEIGHTS = (cuda_model.WEIGHTS,)
# Parameters of dense matrices, and of long histories.
MATRICES = (300, 2_000, 16_000)
LONG = (16_000,)
COPIED = 1 << 28  # float32 elements
# A multiprocessor's, by compute capability: A100, H100 and B200. All others, whatever their
# number (8.6 and 8.9, 10.3, 12.0), have a consumer GPU's two.
FLOAT64_LANES = {(8, 0): 32, (9, 0): 64, (10, 0): 64}


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of a call on the device, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after warm-up."""
    for _ in range(3):
        run()
    return statistics.median(timed(run) for _ in range(repeats))


def triad_bandwidth(repeats: int) -> float:
    """Bytes a second of a = b + 2 c: two vectors read, one written."""
    b, c = torch.zeros(COPIED, device=DEVICE), torch.zeros(COPIED, device=DEVICE)
    a = torch.empty_like(b)
    return 3 * a.nbytes / (1e-3 * milliseconds(lambda: torch.add(b, c, alpha=2, out=a), repeats))


def this_gpu(bandwidth: float) -> Gpu:
    """The model of this machine's GPU: the known one that is most like it, with its own numbers."""
    if DEVICE.type != "cuda":
        return RTX4090
    facts = torch.cuda.get_device_properties(DEVICE)
    float64_lanes = FLOAT64_LANES.get((facts.major, facts.minor), RTX4090.float64_lanes)
    like = RTX4090 if float64_lanes == RTX4090.float64_lanes else H100
    clock = 1e3 * getattr(facts, "clock_rate", 0) or like.clock
    return replace(
        like,
        name=facts.name,
        processors=facts.multi_processor_count,
        clock=clock,
        bandwidth=bandwidth,
        threads=getattr(facts, "max_threads_per_multi_processor", like.threads),
        float32_lanes=64 if (facts.major, facts.minor) == (8, 0) else like.float32_lanes,
        float64_lanes=float64_lanes,
        # What the model knows of; other machine code is much alike.
        code="sm_90" if facts.major >= 9 else "sm_80",
    )


@dataclass(frozen=True)
class Observed:
    """Of some steps on a device: waits and allocations of each."""

    waits: float
    allocations: float

    def less(self, other: Observed | None, times: float = 1.0) -> Observed:
        """Without what came so many times within."""
        if other is None:
            return self
        return Observed(
            self.waits - times * other.waits, self.allocations - times * other.allocations
        )

    @staticmethod
    def mean(of: list[Observed]) -> Observed | None:
        """Of several steps; None for none."""
        if not of:
            return None
        waits = statistics.fmean(one.waits for one in of)
        return Observed(waits, statistics.fmean(one.allocations for one in of))


def observe(run: Callable[[], object], steps: int = 3) -> Observed | None:
    """What torch sees of a step; None where there is no device to wait for."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with gpu_waits.noted() as waits:
        for _ in range(steps):
            run()
    made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    return Observed(len(waits) / steps, made / steps)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The replay of a step that is warm; the step itself where there is no GPU."""
    if DEVICE.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


HEADINGS = (
    "d",
    "tensors",
    "step",
    "ms",
    "of it the closure",
    "predicted ms without closure, and what binds",
    "ms of a triad of its bytes",
    "waits (counted)",
    "allocations (counted)",
)


@dataclass(frozen=True)
class Measured:
    """A step: its time, that of the closure in it, and what torch saw of it without the closure."""

    ms: float
    closure: float
    seen: Observed | None


@dataclass(frozen=True)
class Table:
    """What the lines of a table are made with.

    Attributes:
        gpu: This one, as the model sees it.
        costs: Of the steps, as docs/cuda.md has them.
        repeats: Of a step; an optimizer that a passage is for is made anew for a fifth of them.
    """

    gpu: Gpu
    costs: dict[str, cuda_model.Cost]
    repeats: int

    def line(
        self,
        name: str,
        shapes: list[tuple[int, ...]],
        pairs: int,
        measured: Measured,
        note: str = "",
    ) -> str:
        """One line, with what was predicted."""
        numel, seen = sum(map(math.prod, shapes)), measured.seen
        cells = [f"{numel:,}", str(len(shapes)), name + note]
        cells += [f"{measured.ms:.3f}", f"{measured.closure:.3f}"]
        waits, made = (f"{seen.waits:.1f}", f"{seen.allocations:.1f}") if seen else ("-", "-")
        cost = self.costs.get(name)
        if cost is None:
            cells += ["", "", waits, made]
            return "| " + " | ".join(cells) + " |"
        expected = cuda_model.predicted(self.gpu, name, cost, numel, pairs, shapes)
        bytes_moved = cuda_model.bytes_of(name, cost, numel)
        if "fixed step" in name and pairs != cuda_model.PAIRS:
            bytes_moved = cuda_model.iteration_bytes(pairs) * numel
        cells += [cuda_model.cell(expected), f"{1e3 * bytes_moved / self.gpu.bandwidth:.3f}"]
        cells += [f"{waits} ({cost.syncs})", f"{made} ({cost.allocations})"]
        return "| " + " | ".join(cells) + " |"

    def step(
        self, name: str, step: Step, shapes: list[tuple[int, ...]], pairs: int, note: str = ""
    ) -> str:
        """The line of a step that is repeated as it is."""
        problem = Problem(shapes, DEVICE, step.batches)
        run = step.build(problem)
        before = problem.calls
        run()
        calls = problem.calls - before
        seen = observe(run)
        if seen is not None and calls:
            seen = seen.less(observe(problem.closure), calls)
        ms = milliseconds(captured(run) if step.captured else run, self.repeats)
        closure = milliseconds(problem.closure, self.repeats) if calls else 0.0
        return self.line(name, shapes, pairs, Measured(ms, calls * closure, seen), note)

    def passage(self, passage: Passage, shapes: list[tuple[int, ...]]) -> tuple[list[str], int]:
        """The lines of a passage, and how many failed. The first optimizer is watched, not timed.

        Raises:
            Exception: What a step raises.
        """
        first = lead_through(passage, shapes, watch=True)
        later: list[Led] = []
        for _ in range(max(2, self.repeats // 5)):
            release()
            later += lead_through(passage, shapes, watch=False)
        alone = Problem(shapes, DEVICE, passage.batches)
        closure, asks = milliseconds(alone.closure, self.repeats), observe(alone.closure)
        found: dict[str, Measured] = {}
        for name in passage.rows:
            of = [led for led in later if led.row == name]
            seen = [
                led.seen.less(asks, led.calls)
                for led in first
                if led.row == name and led.seen is not None
            ]
            if of:
                ms = statistics.median(led.ms for led in of)
                calls = statistics.median(led.calls for led in of)
                found[name] = Measured(ms, closure * calls, Observed.mean(seen))
        if passage.more is not None:
            name, more, less = passage.more
            if more in found and less in found:
                found[name] = difference(found[more], found[less])
        lines, failed = [], 0
        for name in passage.names():
            if name in found:
                lines.append(self.line(name, shapes, PAIRS, found[name]))
            else:
                failed += 1
                lines.append(failure(name, shapes, "no such step came"))
        return lines, failed


@dataclass(frozen=True)
class Led:
    """A step of a passage: its row, time, calls of the closure and what torch saw of it."""

    row: str
    ms: float
    calls: int
    seen: Observed | None


def lead_through(passage: Passage, shapes: list[tuple[int, ...]], watch: bool) -> list[Led]:
    """Leads a fresh optimizer through its steps, and watches them or takes their times."""
    problem, found = Problem(shapes, DEVICE, passage.batches), []
    optimizer = passage.make(problem)

    def run() -> object:
        return passage.step(optimizer, problem)

    for number in range(passage.steps):
        before = problem.calls
        seen = observe(run, 1) if watch else None
        ms = 0.0 if watch else timed(run)
        calls = problem.calls - before
        row = passage.row_of(number, calls, optimizer)
        if row is not None:
            found.append(Led(row, ms, calls, seen))
    return found


def difference(more: Measured, less: Measured) -> Measured:
    """What one step takes more than another."""
    seen = None
    if more.seen is not None and less.seen is not None:
        seen = more.seen.less(less.seen)
    return Measured(more.ms - less.ms, more.closure - less.closure, seen)


def failure(name: str, shapes: list[tuple[int, ...]], said: str) -> str:
    """The line of a step that could not be measured."""
    numel = sum(map(math.prod, shapes))
    return f"| {numel:,} | {len(shapes)} | {name} | FAILED: {said} |" + " |" * 5


def brief(error: Exception) -> str:
    """An exception in one line of a table."""
    return " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:300]


def release() -> None:
    """Gives the last row's memory back."""
    gc.collect()
    if DEVICE.type == "cuda":
        # After an error of the device everything raises: the rows that follow will say so.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def matrix_time(numel: int, repeats: int) -> float:
    """dense_direction on a quadratic, with the two products of vectors around it."""
    x = torch.randn(numel, device=DEVICE)
    grad, curvatures = torch.empty_like(x), torch.linspace(1, 100, numel, device=DEVICE)
    grad_prev, direction = torch.zeros_like(x), torch.zeros_like(x)
    tile, room = scalars.TILE, terms_apart(numel)
    double: dict[str, Any] = {"dtype": torch.float64, "device": DEVICE}
    matrix = torch.zeros(scalars.matrix_size(numel), **double)
    vectors = torch.zeros(2 * room + 1, tile * (-(-numel // tile) | 1), **double)
    numbers = torch.zeros(scalars.matrix_place("header") + scalars.TERM_SIZE * room, **double)
    header = scalars.new_scalars(2, DEVICE)
    kernels = ops.select("native", DEVICE)

    def iterate() -> None:
        x.add_(direction)
        torch.mul(curvatures, x, out=grad)
        kernels.dense_direction(
            grad,
            grad_prev,
            direction,
            matrix,
            vectors,
            numbers,
            header,
            lr_scale=None,
            pair_step=1.0,
            curvature_tol=1e-8,
            taking_part=numel,
            broyden=True,
            self_scaling=True,
        )

    return milliseconds(iterate, repeats)


def matrix_line(of: Table, numel: int) -> str:
    """The line of dense_direction alone."""
    ms = matrix_time(numel, of.repeats)
    share = cuda_model.matrix_bytes(numel) / (1e-3 * ms) / of.gpu.bandwidth
    return (
        f"| {numel:,} | 1 | dense_direction alone, of the triad {share:.0%} | {ms:.3f} |" + " |" * 5
    )
