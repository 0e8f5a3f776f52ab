"""The parts of `make gpu-check` and of the traffic model that need no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

cuda_check = pytest.importorskip("benchmarks.cuda_check")
cuda_model = pytest.importorskip("benchmarks.cuda_model")
gpu_model = pytest.importorskip("benchmarks.harness.gpu_model")
gpu_steps = pytest.importorskip("benchmarks.harness.gpu_steps")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The check on the CPU, each step once, on few parameters; returns what steps returned."""
    calls: list[object] = []

    def once(run: Callable[[], object], repeats: int) -> float:
        calls.append(run())
        return 1.0

    monkeypatch.setattr(cuda_check, "milliseconds", once)
    monkeypatch.setattr(cuda_check, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(cuda_check, "COPIED", 100)
    monkeypatch.setattr(cuda_check, "CASES", ((90, 3),))
    monkeypatch.setattr(cuda_check, "WEIGHTS", ((2, 8),))
    monkeypatch.setattr(cuda_check, "MATRICES", (70,))
    monkeypatch.setattr(cuda_check, "LONG", (600,))
    return calls


def test_the_check_measures_every_step(small: list[object]) -> None:
    text, failed = cuda_check.benchmark(quick=True)
    assert failed == 0, text
    steps = gpu_steps.STEPS
    assert text.count("| 90 | 3 |") == len(steps)
    for name in (*steps, *gpu_steps.OF_MATRICES, *gpu_steps.DENSE):
        assert f"| {name} |" in text
    assert "| 600 | 1 | fixed step, capturable |" in text
    assert "dense_direction alone" in text


def test_every_row_is_one_that_was_counted() -> None:
    peers = {*gpu_steps.PEERS, gpu_steps.TORCH_LBFGS}
    rows = {*gpu_steps.STEPS, *gpu_steps.OF_MATRICES, *gpu_steps.DENSE, *gpu_steps.LONG}
    assert rows - peers <= set(cuda_model.counted())


def test_a_row_that_fails_is_reported_and_the_rest_goes_on(
    small: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(problem: object) -> object:
        raise RuntimeError("no such kernel")

    steps = {"broken": gpu_steps.Step(broken), "Adam": gpu_steps.STEPS["Adam"]}
    monkeypatch.setattr(cuda_check, "STEPS", steps)
    text, good = cuda_check.report({"Tests": (True, "1 passed")}, "- GPU: none", quick=True)
    assert not good
    assert "| broken | FAILED: RuntimeError: no such kernel |" in text
    assert "1 rows FAILED" in text
    assert "| 90 | 3 | Adam | 1.000 |" in text
    assert "What to send back" in text


def test_a_benchmark_that_fails_leaves_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(quick: bool) -> tuple[str, int]:
        raise MemoryError("no triad")

    monkeypatch.setattr(cuda_check, "benchmark", broken)
    text, good = cuda_check.report({}, "", quick=True)
    assert not good
    assert "MemoryError: no triad" in text
    assert "predict" in text


def test_a_command_that_is_missing_is_a_failure() -> None:
    good, said = cuda_check.run(["/nonexistent/compute-sanitizer"])
    assert not good
    assert "compute-sanitizer" in said


def test_the_model_counts_what_torch_does() -> None:
    cost = cuda_model.torch_lbfgs(10, 1000)
    # At least two waits a pair, and more than the two passes' 4 m d elements.
    assert cost.syncs >= 2 * 10 + 3
    assert cost.launches >= 4 * 10
    assert cost.bytes > cuda_model.iteration_bytes(10)


@pytest.mark.parametrize(
    ("rows", "row_bytes"), [("float32", 4), ("bfloat16", 2), ("int8", 1 + 4 / 128)]
)
def test_bytes_of_an_iteration(rows: str, row_bytes: float) -> None:
    """4 m + 4 accesses to rows, and 7 to gradients, parameters and their copies."""
    assert cuda_model.iteration_bytes(10, rows) == 44 * row_bytes + 7 * 4


def test_what_binds() -> None:
    """Made-up kernels on an H100, each slowest for one reason."""
    gpu = gpu_model.H100
    base = gpu_model.Kernel(512, 64, {"sm_90": 64}, {"sm_90": 10}, 0)
    d, bytes_moved = 100_000_000, 4e8
    cases = {
        "bandwidth": base,
        "bytes in flight": replace(base, flight=8),
        "issue slots": replace(base, slots={"sm_90": 10_000}),
        "float64": replace(base, float64=2_000),
    }
    times = {}
    for bound, kernel in cases.items():
        gpu_model.KERNELS["made up"] = kernel
        try:
            time = gpu_model.pass_time(gpu, "made up", d, bytes_moved)
        finally:
            del gpu_model.KERNELS["made up"]
        assert time.bound == bound
        times[bound] = time.seconds
    assert times["bandwidth"] == pytest.approx(bytes_moved / gpu.bandwidth, rel=0.05)
    assert all(times["bandwidth"] < seconds for b, seconds in times.items() if b != "bandwidth")


def test_a_last_wave_that_is_nearly_empty_costs() -> None:
    gpu, name = gpu_model.H100, "adam<float, f32, no>"
    at_once = gpu.processors * gpu_model.blocks_at_once(gpu, gpu_model.KERNELS[name])
    d = 100_000_000

    def seconds(blocks: int) -> float:
        return gpu_model.pass_time(gpu, name, d, 28.0 * d, 1.0, blocks).seconds

    assert 1.5 < seconds(at_once + 1) / seconds(at_once) < 1.7
    assert seconds(2 * at_once) == pytest.approx(seconds(at_once))
    assert seconds(1024) > 1.2 * seconds(8192)


def test_light_kernels_have_enough_under_way() -> None:
    """As docs/cuda.md promises."""
    gpu = gpu_model.H100
    for name, kernel in gpu_model.KERNELS.items():
        least = 24 if "i8" in name else 32
        assert gpu_model.flight_of(gpu, kernel) >= least * 1024, name


def test_long_histories_fill_the_device() -> None:
    share, columns = gpu_model.slices(500, 16_000)
    assert columns == 8
    assert share * columns > 3 * gpu_model.H100.processors
    assert gpu_model.slices(10, 16_000)[0] == 1


def test_predictions_are_those_of_the_docs() -> None:
    text = (Path(cuda_model.__file__).parents[1] / "docs" / "cuda.md").read_text()
    assert cuda_model.table() in text, "write python -m benchmarks.cuda_model into docs/cuda.md"
    assert cuda_model.flight_table() in text
