"""The parts of `make gpu-check` and of the traffic model that need no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

cuda_check = pytest.importorskip("benchmarks.cuda_check")
cuda_model = pytest.importorskip("benchmarks.cuda_model")


def test_the_benchmark_runs_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def once(run: Callable[[], object], repeats: int) -> float:
        calls.append(run())
        return 1.0

    monkeypatch.setattr(cuda_check, "milliseconds", once)
    monkeypatch.setattr(cuda_check, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(cuda_check, "COPIED", 100)
    monkeypatch.setattr(cuda_check, "CASES", ((90, 3),))
    monkeypatch.setattr(cuda_check, "MATRICES", (70,))
    # torch's fused Adam, as on a GPU, wants float tensors of one device; the CPU has it too.
    text = cuda_check.benchmark(quick=True)
    assert len(calls) == 1 + 5 + 5 + 1
    assert text.count("| 90 | 3 |") == 10
    assert text.count("| 70 | 1 | dense matrix |") == 1


def test_the_model_counts_what_torch_does() -> None:
    cost = cuda_model.torch_lbfgs(10, 1000)
    # At least two waits a pair, and more than the two passes' 4 m d elements.
    assert cost.syncs >= 2 * 10 + 3
    assert cost.launches >= 4 * 10
    assert cost.bytes > cuda_model.lbfgs(10).bytes
    table = cuda_model.table(1_000_000, 10)
    assert "torch.optim" in table
    assert "predicted" in table


@pytest.mark.parametrize(
    ("rows", "row_bytes"), [("float32", 4), ("bfloat16", 2), ("int8", 1 + 4 / 128)]
)
def test_bytes_of_an_iteration(rows: str, row_bytes: float) -> None:
    """4 m + 4 accesses to rows, and 7 to gradients, parameters and their copies."""
    assert cuda_model.lbfgs(10, rows).bytes == 44 * row_bytes + 7 * 4
    assert cuda_model.lbfgs(10, rows, capturable=False).bytes == 44 * row_bytes + 8 * 4
