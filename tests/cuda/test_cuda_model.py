"""What is predicted of a GPU: bytes, products, what binds, and that the docs say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

cuda_model = pytest.importorskip("benchmarks.cuda_model")
gpu_model = pytest.importorskip("benchmarks.harness.gpu_model")
gpu_steps = pytest.importorskip("benchmarks.harness.gpu_steps")


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


@pytest.mark.parametrize("shape", [(16, 16), (48, 16)])
def test_the_model_counts_the_products_of_the_living_metric(shape: tuple[int, int]) -> None:
    """As torch counts them while a step of each row runs."""
    passage, shapes = gpu_steps.LIVING, [shape] * 2
    problem = gpu_steps.Problem(shapes, torch.device("cpu"), passage.batches)
    optimizer = passage.make(problem)
    seen = set()
    for number in range(passage.steps):
        with FlopCounterMode(display=False) as counter:
            optimizer.step(problem.closure)
        name = passage.row_of(number, 1, optimizer)
        if name in cuda_model.PRODUCTS:
            seen.add(name)
            modelled = cuda_model.product_operations(name, shapes)
            assert counter.get_total_flops() == modelled, name
    assert seen == {name for name in cuda_model.PRODUCTS if "GradScaler" not in name}


def test_products_of_a_side_without_a_basis_are_none() -> None:
    """A vector, and the longer side of a matrix that is longer than a GPU's limit."""
    step = "living metric"
    assert cuda_model.product_operations(step, [(64,)]) == 0.0
    assert cuda_model.product_operations(step, [(64, 4096)]) == 2 * 2 * 64 * 4096 * 64


def test_products_and_float64_bind_where_they_should() -> None:
    """Products on large matrices, and float64 where a consumer GPU takes a matrix's terms in."""
    costs, gpus = cuda_model.counted(), gpu_model.GPUS
    step = "living metric, taking covariances"
    for side, bound in ((64, "bandwidth"), (2048, "products")):
        shapes = [(side, side)] * 24
        cost = replace(costs[step], launches=1, syncs=0)
        for gpu in gpus:
            time = cuda_model.predicted(gpu, step, cost, 24 * side**2, 10, shapes)
            assert time.bound == bound
    step = cuda_model.TAKING_IN
    bounds = [cuda_model.predicted(g, step, costs[step], 16_000, 10).bound for g in gpus]
    assert bounds == ["bandwidth", "float64"]


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
