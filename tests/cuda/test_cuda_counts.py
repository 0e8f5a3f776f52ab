"""What steps ask of a device, counted in the execution model, against what docs/cuda.md says."""

from __future__ import annotations

import cuda_counts
import pytest
import torch
from cuda_sim import library

cuda_model = pytest.importorskip("benchmarks.cuda_model")

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())


@pytest.fixture(scope="module")
def counts(simulated: library.SimulatedOps) -> dict[str, cuda_counts.Counts]:
    simulated.schedule("forward")
    return cuda_counts.all_counts(simulated)


def test_the_documented_table_is_what_is_counted(
    counts: dict[str, cuda_counts.Counts],
) -> None:
    text = (library.ROOT / "docs" / "cuda.md").read_text()
    assert cuda_counts.table(counts) in text, (
        "write the output of python tests/cuda/cuda_counts.py into docs/cuda.md:\n"
        + cuda_counts.table(counts)
    )


def test_no_step_in_a_row_of_adam_or_of_a_search_allocates(
    counts: dict[str, cuda_counts.Counts],
) -> None:
    """But for the first step of a search, which takes the memory for all that follow."""
    rows = ("Adam", "FusePV, Adam phase", "fixed step", "Fuse", "search with pairs")
    for name, count in counts.items():
        if name.startswith(rows):
            first = name == "search with pairs, first step"
            assert (count.allocations > 0) == first, name
        if "capturable" in name:
            assert count.waits == 0, name


def test_the_host_waits_once_before_an_adam_step(counts: dict[str, cuda_counts.Counts]) -> None:
    """Under GradScaler a living metric reads its verdict by itself."""
    for name, count in counts.items():
        if name.startswith("FusePV, Adam phase") or name.startswith("living metric"):
            assert count.waits <= (2 if name == "living metric, GradScaler" else 1), name


def test_the_model_has_the_bytes_of_a_matrix_that_are_counted(
    counts: dict[str, cuda_counts.Counts],
) -> None:
    """With as many terms as on average, and where it takes all of them in."""
    for name in (cuda_model.MATRIX_STEP, cuda_model.TAKING_IN):
        modelled = cuda_model.bytes_of(name, cuda_model.Cost(0.0, 0, 0), cuda_counts.DENSE)
        assert counts[name].bytes == pytest.approx(modelled, rel=0.01), name


def test_a_matrix_that_takes_its_terms_in_is_read_and_written_besides(
    counts: dict[str, cuda_counts.Counts],
) -> None:
    """The triangle, in float64: 8 d^2 bytes."""
    more = counts[cuda_model.TAKING_IN].less(counts[cuda_model.MATRIX_STEP]).bytes
    assert 8.0 < more / cuda_counts.DENSE**2 < 8.6


@pytest.mark.parametrize("rows", cuda_model.ROWS)
def test_the_model_has_the_bytes_that_are_counted(
    counts: dict[str, cuda_counts.Counts], rows: str
) -> None:
    """But for the scales of 8-bit rows, one in 128 elements."""
    name = "fixed step, capturable" + (f", {rows}" if rows != "float32" else "")
    modelled = cuda_model.iteration_bytes(cuda_counts.PAIRS, rows)
    scales = 44 * 4 / 128 if rows == "int8" else 0.0
    counted = counts[name].bytes / cuda_counts.NUMEL
    assert counted == pytest.approx(modelled - scales, abs=0.1)


def test_the_counter_sees_what_is_planted(simulated: library.SimulatedOps) -> None:
    """A read of each kind, an allocation, a kernel and its bytes; and nothing of the host's."""
    with cuda_counts.as_device(simulated) as counter:
        x = torch.zeros(100)
        host = torch.zeros(3, device="cpu")
        of = counter.of
        assert of(lambda: x.sum().item()) == cuda_counts.Counts(1, 1, 1, 404)
        assert of(lambda: float(x[0])).waits == 1
        assert of(lambda: bool(x[0] > 0)).waits == 1
        assert of(lambda: x[:5].tolist()).waits == 1
        assert of(lambda: x.add_(1.0)) == cuda_counts.Counts(1, 0, 0, 800)
        assert of(lambda: x.zero_()) == cuda_counts.Counts(1, 0, 0, 400)
        assert of(lambda: torch.empty_like(x)) == cuda_counts.Counts(0, 0, 1, 0)
        assert of(lambda: x.view(10, 10)[2:]) == cuda_counts.Counts(0, 0, 0, 0)
        assert of(lambda: host.add_(1.0).tolist()) == cuda_counts.Counts(0, 0, 0, 0)
        with counter.pause():
            y = x + 1.0
        assert of(lambda: x.copy_(y)) == cuda_counts.Counts(1, 0, 0, 800)
