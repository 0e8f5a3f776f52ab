"""Traffic, launches and synchronisations of one iteration on a GPU: ours and torch.optim's.

    python -m benchmarks.cuda_model

No GPU is used. Our figures follow from the kernels (the bytes are those in the headers of
csrc/cuda/*.cu; tests/cuda/test_cuda_sim.py counts the launches); torch.optim.LBFGS's are counted
while it runs on the CPU, op by op. The times are predictions for an H100 from its copy bandwidth
alone, about 3.0 TB/s: nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPY_BANDWIDTH = 3.0e12  # bytes a second
ROWS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4.0 / 128}


@dataclass(frozen=True)
class Cost:
    """What one iteration costs a GPU, on d float32 parameters.

    Attributes:
        bytes: Moved per parameter.
        launches: Kernels.
        syncs: Times that the host waits for the device.
    """

    bytes: float
    launches: int
    syncs: int

    def milliseconds(self, numel: int) -> float:
        """Predicted for an H100, from its copy bandwidth alone."""
        return 1e3 * self.bytes * numel / COPY_BANDWIDTH


def adam(checked: bool = False, narrow: bool = False) -> Cost:
    """adam_step, with the sum of squared gradients that Eq. 3 needs.

    ``checked``: after a pass over the gradients, as in FusePV(check_finite=True, capturable=True).
    ``narrow``: with bfloat16 moments.
    """
    return Cost(28 - 8 * narrow + 4 * checked, 1 + checked, 0)


def torch_fused_adam() -> Cost:
    """torch.optim.Adam(fused=True) on one tensor; the gradient norm would be a pass of its own."""
    return Cost(28, 1, 0)


def lbfgs(pairs: int, rows: str = "float32", capturable: bool = True) -> Cost:
    """lbfgs_update, lbfgs_decide, lbfgs_direction and lbfgs_move with a fixed step.

    Unless ``capturable``, the host decides: by grad_stats before and the header of the direction.
    """
    row = ROWS[rows]
    update = 4 + 4 + row + 2 * pairs * row + row  # grad, previous gradient, p, rows; y
    direction = 4 + 2 * pairs * row + row + 4  # grad, rows; p, previous gradient
    move = 4 + row + 4 + 4  # param, p; origin, param
    if capturable:
        return Cost(update + direction + move, 4, 0)
    return Cost(4 + update + direction + move, 5, 2)


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


def table(numel: int, pairs: int) -> str:
    """The model as a Markdown table."""
    theirs = torch_lbfgs(pairs)
    rows = {
        "Adam step, ours (with the gradient norm)": adam(),
        "Adam step, ours, bfloat16 moments": adam(narrow=True),
        "FusePV's Adam step with check_finite, ours": adam(checked=True),
        "Adam step, torch fused": torch_fused_adam(),
        **{f"L-BFGS iteration, ours, {name} history": lbfgs(pairs, name) for name in ROWS},
        "L-BFGS iteration, ours, float32 history, the host deciding": lbfgs(
            pairs, capturable=False
        ),
        "L-BFGS iteration, torch.optim": theirs,
    }
    lines = [
        f"m = {pairs}, d = {numel:,} float32 parameters in one tensor, fixed step, "
        "capturable=True where ours does not say otherwise",
        "",
        "| | bytes per parameter | kernels | host waits | predicted ms, H100 at 3.0 TB/s |",
        "|---|---|---|---|---|",
    ]
    for name, cost in rows.items():
        lines.append(
            f"| {name} | {cost.bytes:.0f} | {cost.launches} | {cost.syncs} "
            f"| {cost.milliseconds(numel):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=100_000_000, help="number of parameters")
    parser.add_argument("--pairs", type=int, default=10, help="history size m")
    options = parser.parse_args()
    print(table(options.numel, options.pairs))


if __name__ == "__main__":
    main()
