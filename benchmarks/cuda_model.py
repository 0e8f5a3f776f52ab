"""Launches, waits, bytes and predicted times of a step on a GPU: ours and torch.optim's.

    python -m benchmarks.cuda_model

No GPU is used. What our steps ask for is in the table of docs/cuda.md, counted while they run in
the execution model (tests/cuda/cuda_counts.py; a test compares); torch.optim.LBFGS is counted here,
op by op, while it runs on the CPU. The times are predictions (benchmarks/harness/gpu_model.py):
nothing was measured on a GPU.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness.gpu_model import (
    GPUS,
    KERNELS,
    OUTER_ROUNDS,
    Gpu,
    Time,
    blocks_at_once,
    flight_of,
    pass_time,
    recursion,
    slices,
    whole,
)

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4.0 / 128}
KINDS = {"float32": "f32", "bfloat16": "bf16", "int8": "i8"}


@dataclass(frozen=True)
class Cost:
    """What one step asks of a GPU.

    Attributes:
        bytes: Moved per parameter; of a matrix per parameter and parameter.
        launches: Kernels.
        syncs: Times that the host waits for the device.
        allocations: New tensors.
    """

    bytes: float
    launches: int
    syncs: int
    allocations: int = 0


def counted(text: str | None = None) -> dict[str, Cost]:
    """The steps of the table in docs/cuda.md, or in a text of its form."""
    text = (ROOT / "docs" / "cuda.md").read_text() if text is None else text
    rows = re.findall(
        r"^\| ([^|`]+?) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]+)(?: d)? \|$", text, re.MULTILINE
    )
    assert rows, "docs/cuda.md has no table of counts"
    return {name: Cost(float(b), int(n), int(w), int(a)) for name, n, w, a, b in rows}


def update_bytes(pairs: int, row: float) -> float:
    """grad, previous gradient, p, rows; y."""
    return 4 + 4 + row + 2 * pairs * row + row


def direction_bytes(pairs: int, row: float) -> float:
    """grad, rows; p, previous gradient."""
    return 4 + 2 * pairs * row + row + 4


def move_bytes(row: float) -> float:
    """param, p; origin, param."""
    return 4 + row + 4 + 4


def iteration_bytes(pairs: int, rows: str = "float32") -> float:
    """lbfgs_update, lbfgs_direction and lbfgs_move with a fixed step, a parameter."""
    row = ROWS[rows]
    return update_bytes(pairs, row) + direction_bytes(pairs, row) + move_bytes(row)


def passes(gpu: Gpu, step: str, numel: int, pairs: int) -> list[Time] | None:
    """The launches of a step that are modelled kernel by kernel; None for others."""

    def one(kernel: str, bytes_: float, rounds: float = 1.0, blocks: int = 0) -> Time:
        return pass_time(gpu, kernel, numel, bytes_ * numel, rounds, blocks)

    look = one("stats<float>", 4)
    if step.startswith(("Adam", "FusePV, Adam phase")):
        narrow = "bfloat16" in step
        step_of = one(f"adam<float, {'bf16' if narrow else 'f32'}, no>", 20 if narrow else 28)
        looks = "FusePV" in step and not step.endswith(("False", "GradScaler"))
        return [look, step_of] if looks else [step_of]
    if step == "living metric, diagonal":
        return [look, one("adam<float, f32, no>", 28)]
    if not step.startswith(("fixed step", "search with pairs, one trial")):
        return None
    rows = next((name for name in ROWS if step.endswith(name)), "float32")
    row, kind = ROWS[rows], KINDS[rows]
    batch = 1 if rows == "float32" else 2
    share, columns = slices(pairs, numel)
    blocks = share * columns if share > 1 else 0
    rounds = pairs / batch + OUTER_ROUNDS * share
    parts = [
        one(f"update<float, {kind}>", update_bytes(pairs, row) + 8 * (share - 1), rounds, blocks),
        recursion(pairs),
        # Slices leave parts of the direction, which are written and read.
        one(
            f"direction<float, {kind}>",
            direction_bytes(pairs, row) + (12 * share if share > 1 else 0),
            rounds,
            blocks,
        ),
        one("move<float>", move_bytes(row)),
    ]
    return parts if "capturable" in step else [*parts, look]


def predicted(gpu: Gpu, step: str, cost: Cost, numel: int, pairs: int) -> Time:
    """A step's time.

    Where torch's ops do it, from its bytes alone: products of matrices take longer.
    """
    parts = passes(gpu, step, numel, pairs)
    if parts is None:
        size = numel**2 if "matrix" in step else numel
        parts = [Time(cost.bytes * size / gpu.bandwidth, "bandwidth")]
    return whole(parts, cost.launches, cost.syncs, "capturable" in step)


def matrix_bytes(numel: int) -> float:
    """Of an iteration with a dense matrix that takes no terms in; its vectors are left out.

    The lower triangle in float64, and what the blocks leave of their products: a number for every
    64 of the square, written and read.
    """
    return (4 + 2 * 8 / 64) * numel**2


class _Counter(TorchDispatchMode):
    """Counts ops, reads of scalars and bytes of vectors as long as the parameters."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.bytes = self.ops = self.syncs = 0

    def _bytes(self, values: Iterable[Any]) -> int:
        return sum(v.nbytes for v in values if isinstance(v, Tensor) and v.numel() >= self.numel)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            self.syncs += 1
        elif not func.is_view:
            self.ops += 1
            # In-place ops both read and write what they return.
            inputs, outputs = tree_leaves((args, kwargs)), tree_leaves(result)
            if func._schema.name in ("aten::zero_", "aten::fill_", "aten::copy_"):
                inputs = inputs[1:]
            self.bytes += self._bytes(inputs) + self._bytes(outputs)
        return result


def torch_lbfgs(pairs: int, numel: int = 10_000) -> Cost:
    """torch.optim.LBFGS with a fixed step and a full history: counted, without the closure."""
    torch.manual_seed(0)
    x = torch.randn(numel, requires_grad=True)
    curvature = torch.linspace(1, 2, numel)
    optimizer = torch.optim.LBFGS([x], lr=0.5, max_iter=1, history_size=pairs, tolerance_change=0)

    def closure() -> Tensor:
        return x.new_zeros(())

    # The history is full after so many steps; the last is counted.
    for _ in range(pairs + 3):
        x.grad = curvature * x.detach()
        counted = _Counter(numel)
        with counted:
            optimizer.step(closure)
    return Cost(counted.bytes / numel, counted.ops, counted.syncs)


# Sides of the problems whose times are predicted: parameters (of a matrix) and pairs.
NUMEL, MATRIX, PAIRS = 100_000_000, 16_000, 10
SMALL = ((16_000, 500), (100_000, 100), (2_000_000, 10))


def cell(time: Time) -> str:
    """Milliseconds, and what binds."""
    return f"{1e3 * time.seconds:.2f} ms, {time.bound}"


def table(numel: int = NUMEL, pairs: int = PAIRS) -> str:
    """The predictions as a Markdown table."""
    costs = counted()
    lines = [
        f"d = {numel:,} float32 parameters in one tensor (with a matrix {MATRIX:,}), m = {pairs}, "
        "steps captured where the row says capturable",
        "",
        "| step | " + " | ".join(gpu.name for gpu in GPUS) + " |",
        "|---" * (len(GPUS) + 1) + "|",
    ]
    for name, cost in costs.items():
        of = MATRIX if "matrix" in name else numel
        cells = [cell(predicted(gpu, name, cost, of, pairs)) for gpu in GPUS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    fused = [cell(whole([torch_fused_adam(gpu, numel)], 1, 0, False)) for gpu in GPUS]
    lines.append("| torch.optim.Adam(fused=True) | " + " | ".join(fused) + " |")
    theirs = torch_lbfgs(pairs)
    cells = [cell(predicted(gpu, "torch", theirs, numel, pairs)) for gpu in GPUS]
    lines.append(
        f"| torch.optim.LBFGS, fixed step ({theirs.launches} launches, {theirs.syncs} waits, "
        f"{theirs.bytes:.0f} bytes) | " + " | ".join(cells) + " |"
    )
    name = "fixed step, capturable"
    for small, m in SMALL:
        cells = [cell(predicted(gpu, name, costs[name], small, m)) for gpu in GPUS]
        lines.append(f"| {name}, m = {m}, d = {small:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def torch_fused_adam(gpu: Gpu, numel: int) -> Time:
    """torch.optim.Adam(fused=True) on one tensor; the gradient norm would be a pass of its own."""
    return Time(28 * numel / gpu.bandwidth, "bandwidth")


def flight_table() -> str:
    """KiB under way on a full multiprocessor, of each kernel, and what the GPU wants."""
    lines = [
        "| kernel | " + " | ".join(f"{g.name}: blocks, KiB in flight" for g in GPUS) + " |",
        "|---" * (len(GPUS) + 1) + "|",
    ]
    for name, kernel in KERNELS.items():
        cells = [
            f"{blocks_at_once(gpu, kernel)}, {flight_of(gpu, kernel) / 1024:.0f}" for gpu in GPUS
        ]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    wanted = " | ".join(f"{gpu.in_flight / 1024:.0f}" for gpu in GPUS)
    lines.append(f"| wanted for the bandwidth, about | {wanted} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=NUMEL, help="number of parameters")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="history size m")
    options = parser.parse_args()
    print(f"{table(options.numel, options.pairs)}\n\n{flight_table()}")


if __name__ == "__main__":
    main()
