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
    matrix_pass,
    pass_time,
    products,
    recursion,
    slices,
    whole,
)
from fuse_ext.curvature.dense import terms_apart
from fuse_ext.phase.living.metric.sides import form_of

ROOT = Path(__file__).resolve().parents[1]
# Square matrices of weights on which the living metric's rows are predicted and measured, and their
# side: as of a transformer's layers. Those that are counted are as many.
WEIGHTS = (24, 1024)
RENEWED = "living metric, bases renewed"
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


def predicted(
    gpu: Gpu,
    step: str,
    cost: Cost,
    numel: int,
    pairs: int,
    shapes: list[tuple[int, ...]] | None = None,
) -> Time:
    """A step's time.

    Where torch's ops do it, from its bytes and its products of matrices, one after the other.

    Args:
        gpu: Where.
        step: As the table has it.
        cost: Of it.
        numel: Parameters.
        pairs: Of the history.
        shapes: Of the parameters, for products; one vector if not given.
    """
    parts = passes(gpu, step, numel, pairs)
    if parts is None:
        moved = bytes_of(step, cost, numel)
        if "matrix" in step:
            parts = [matrix_pass(gpu, moved, float64_of(step, numel))]
        else:
            parts = [Time(moved / gpu.bandwidth, "bandwidth")]
            parts.append(products(gpu, product_operations(step, shapes or [])))
    return whole(parts, cost.launches, cost.syncs, "capturable" in step)


def bytes_of(step: str, cost: Cost, numel: int) -> float:
    """Bytes that a step moves; those of a matrix with as many terms as it has on average."""
    if step in (MATRIX_STEP, TAKING_IN):
        terms = terms_apart(numel)
        if step == MATRIX_STEP:
            return matrix_bytes(numel, terms // 2)
        return matrix_bytes(numel, terms - 1) + 8 * numel**2
    return cost.bytes * (numel**2 if "matrix" in step else numel)


MATRIX_STEP, TAKING_IN = "search with matrix, one trial", "search with matrix, terms taken in"


def matrix_bytes(numel: int, terms: int = 0) -> float:
    """Of an iteration with a dense matrix that takes no terms in.

    The lower triangle in float64, and what the blocks leave of their products: a number for every
    64 of the square, written and read. Of vectors each term's two, twice, and the gradient; and
    those of the step around it.
    """
    return (4 + 2 * 8 / 64) * numel**2 + (156 + 36 * terms) * numel


def float64_of(step: str, numel: int) -> float:
    """Instructions in float64 of a dense step, as csrc/cuda/dense.cu makes them.

    For each number of the triangle two of the product and its mirror image, and what the warps add
    up of 8 x 8 tiles (1.6); two for each term that is taken in.
    """
    half = numel**2 / 2
    if step == MATRIX_STEP:
        return 3.6 * half
    if step == TAKING_IN:
        return (3.6 + 2 * terms_apart(numel)) * half
    return 0.0


# Products of a matrix with a factor, a side, in a step of the living metric: covariances, the
# gradient into the basis, the step out of it. A renewal takes the moment out of the old basis and
# into the new one besides, takes covariances, and turns the step that measures the stretch.
PRODUCTS = {
    "living metric, gathering": 1,
    "living metric, measuring": 2,
    "living metric": 2,
    "living metric, weights into the mean": 2,
    "living metric, GradScaler": 2,
    "living metric, taking covariances": 3,
    RENEWED: 6,
}


def product_operations(step: str, shapes: list[tuple[int, ...]]) -> float:
    """Of the products of a step, for the sides that have a basis; QR decompositions are not in it.

    Covariances are counted whole, as torch makes them.
    """
    operations = 0.0
    for shape in shapes:
        param = torch.empty(shape, device="meta")
        form = form_of(param, False, False, True, torch.device("cuda"))
        for side, has in zip((form.rows, form.columns), form.sides, strict=True):
            if has:
                operations += 2 * PRODUCTS.get(step, 0) * param.numel() * side
                # The basis is multiplied by the covariance.
                operations += 2 * form.blocks * side**3 if step == RENEWED else 0
    return operations


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
        f"d = {numel:,} float32 parameters in one tensor (with a matrix {MATRIX:,}, with a living "
        f"metric of matrices {WEIGHTS[0]} of {WEIGHTS[1]:,} x {WEIGHTS[1]:,}), m = {pairs}, steps "
        "captured where the row says capturable",
        "",
        "| step | " + " | ".join(gpu.name for gpu in GPUS) + " |",
        "|---" * (len(GPUS) + 1) + "|",
    ]
    count, side = WEIGHTS
    for name, cost in costs.items():
        of, shapes = MATRIX if "matrix" in name else numel, [(numel,)]
        if "living metric" in name and "diagonal" not in name:
            of, shapes = count * side**2, [(side, side)] * count
        cells = [cell(predicted(gpu, name, cost, of, pairs, shapes)) for gpu in GPUS]
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
