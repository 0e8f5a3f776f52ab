"""The parts of `make gpu-check` and of the traffic model that need no GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import collectives
import pytest
import rank_cases
import torch

cuda_check = pytest.importorskip("benchmarks.cuda_check")
cuda_model = pytest.importorskip("benchmarks.cuda_model")
gpu_model = pytest.importorskip("benchmarks.harness.gpu_model")
gpu_ranks = pytest.importorskip("benchmarks.harness.gpu_ranks")
gpu_steps = pytest.importorskip("benchmarks.harness.gpu_steps")
gpu_table = pytest.importorskip("benchmarks.harness.gpu_table")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check on the CPU, few times, on few parameters."""

    def timed(run: Callable[[], object]) -> float:
        run()
        return 1.0

    torch.manual_seed(0)
    monkeypatch.setattr(gpu_table, "timed", timed)
    monkeypatch.setattr(gpu_table, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_table, "COPIED", 100)
    monkeypatch.setattr(gpu_table, "CASES", ((90, 3),))
    monkeypatch.setattr(gpu_table, "WEIGHTS", ((2, 8),))
    monkeypatch.setattr(gpu_table, "MATRICES", (70,))
    monkeypatch.setattr(gpu_table, "LONG", (600,))


def test_the_check_measures_every_step(small: None) -> None:
    lines: list[str] = []
    assert gpu_table.measure(quick=True, lines=lines) == 0, "\n".join(lines)
    text = "\n".join(lines)
    for name in (*gpu_steps.STEPS, *gpu_steps.WITH_PAIRS.names()):
        assert f"| 90 | 3 | {name} |" in text
    for name in (*gpu_steps.OF_MATRICES, *gpu_steps.LIVING.names()):
        assert f"| 128 | 2 | {name} |" in text
    for name in gpu_steps.WITH_MATRIX.names():
        assert f"| 70 | 1 | {name} |" in text
    assert "| 600 | 1 | fixed step, capturable |" in text
    assert "dense_direction alone" in text


def test_what_torch_saw_stands_beside_what_was_counted(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps that are watched as on a GPU; of two rows' difference it is the difference."""

    def observe(run: Callable[[], object], steps: int = 3) -> Any:
        for _ in range(steps):
            run()
        return gpu_table.Observed(2.0, 5.0)

    monkeypatch.setattr(gpu_table, "observe", observe)
    monkeypatch.setattr(gpu_table, "STEPS", {"Adam": gpu_steps.STEPS["Adam"]})
    monkeypatch.setattr(gpu_table, "LONG", ())
    lines: list[str] = []
    assert gpu_table.measure(quick=True, lines=lines) == 0, "\n".join(lines)
    ends = {
        line.split(" | ")[2]: line.split(" | ")[-2:]
        for line in lines
        if "tensors" not in line and line.count(" | ") > 7
    }
    assert ends["Adam"] == ["2.0 (0)", "5.0 (0) |"]
    assert ends["the switch, to a search with pairs"] == ["2.0 (1)", "5.0 (3) |"]
    assert ends["search with pairs, each trial more"] == ["0.0 (1)", "0.0 (0) |"]
    assert ends[gpu_steps.EIGH] == ["2.0", "5.0 |"]


def test_every_row_that_was_counted_is_measured_and_no_other() -> None:
    """But for torch's optimizers, and for what tells of a row that it is a difference of two."""
    others = {*gpu_steps.PEERS, gpu_steps.TORCH_LBFGS, *gpu_steps.UNCOUNTED}
    rows = {*gpu_steps.STEPS, *gpu_steps.OF_MATRICES, *gpu_steps.LONG}
    rows |= {name for passage in gpu_steps.PASSAGES for name in passage.names()}
    assert rows - others == set(cuda_model.counted())


def test_steps_of_the_living_metric_are_what_their_rows_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which of its methods a step calls, against the name of the row that the step is put in."""
    kronecker = pytest.importorskip("fuse_ext.phase.living.kronecker")
    told: list[str] = []
    for method in ("_gather", "_find_bases", "_advance", "_renew", "_average"):
        original = getattr(kronecker.KroneckerMetric, method)

        def noted(self: Any, *args: Any, method: str = method, original: Any = original) -> Any:
            before = [x.clone() for x in self.entry(0).values() if isinstance(x, torch.Tensor)]
            found = original(self, *args)
            after = [x for x in self.entry(0).values() if isinstance(x, torch.Tensor)]
            if method != "_average":
                told.append(method)
            elif not all(map(torch.equal, before, after)):
                told.append("covariances")
            return found

        monkeypatch.setattr(kronecker.KroneckerMetric, method, noted)
    torch.manual_seed(0)
    passage = gpu_steps.LIVING
    problem = gpu_steps.Problem([(8, 8)], torch.device("cpu"), passage.batches)
    optimizer = passage.make(problem)
    found: dict[str, set[tuple[str, ...]]] = {}
    for number in range(passage.steps):
        told.clear()
        before, phase = problem.calls, optimizer.phase
        optimizer.step(problem.closure)
        assert problem.calls == before + 1
        name = passage.row_of(number, 1)
        if phase != optimizer.phase:
            assert name == "the switch, to a living metric"
        elif name is not None:
            found.setdefault(name, set()).add(tuple(sorted(told)))
    assert found == {
        "living metric, gathering": {("_gather", "covariances")},
        gpu_steps.EIGH: {("_find_bases", "_gather", "covariances")},
        "living metric, measuring": {("_gather", "covariances")},
        "living metric": {("_advance",)},
        "living metric, taking covariances": {("_advance", "covariances")},
        "living metric, bases renewed": {("_advance", "_renew")},
    }
    assert optimizer.report().function_changes == 0


def broken(*args: object, **kwargs: object) -> Any:
    raise RuntimeError("no such | kernel")


def test_rows_that_fail_are_reported_and_the_rest_goes_on(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"broken": gpu_steps.Step(broken), "Adam": gpu_steps.STEPS["Adam"]}
    monkeypatch.setattr(gpu_table, "STEPS", steps)
    monkeypatch.setattr(gpu_table, "LIVING", replace(gpu_steps.LIVING, make=broken))
    never = {"a step that never comes": lambda number, calls: False}
    monkeypatch.setattr(gpu_table, "WITH_MATRIX", replace(gpu_steps.WITH_MATRIX, rows=never))
    good, text = cuda_check.measured(quick=True)
    assert not good
    assert "| broken | FAILED: RuntimeError: no such / kernel |" in text
    assert "| living metric | FAILED: RuntimeError: no such / kernel |" in text
    assert "| a step that never comes | FAILED: no such step came |" in text
    # The difference of two rows that are not there is the second that fails in that passage.
    assert f"{1 + len(gpu_steps.LIVING.names()) + 2} rows FAILED" in text
    assert "| 90 | 3 | Adam | 1.000 |" in text
    assert "| search with pairs, one trial | 1.000 |" in text


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_was_measured_before_the_end_is_in_the_report(
    small: None, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*args: object) -> float:
        raise error("no matrix")

    monkeypatch.setattr(gpu_table, "release", ends)
    good, text = cuda_check.measured(quick=True)
    assert not good
    assert "| 90 | 3 | Adam | 1.000 |" in text
    assert f"{error.__name__}: no matrix" in text


def test_the_report_is_written_whatever_its_parts_do(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of `make gpu-check`, with a GPU that is made up and half of its parts broken."""
    target = tmp_path / "new" / "report.md"
    monkeypatch.setattr(gpu_table, "STEPS", {"Adam": gpu_steps.STEPS["Adam"]})
    monkeypatch.setattr(gpu_table, "LONG", ())
    monkeypatch.setattr(cuda_check, "can_run", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    monkeypatch.setattr(torch.cuda, "device_count", broken)
    monkeypatch.setattr(cuda_check, "PYTEST", ["/nonexistent/python"])
    monkeypatch.setattr(cuda_check.sys, "argv", ["cuda_check", "--quick", "--output", str(target)])
    seen: list[str] = []

    def stopped(tool: str) -> Any:
        seen.append(target.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda_check, "sanitized", stopped)
    assert cuda_check.main() == 1
    # It is there from the beginning, and grows.
    assert "Tests marked cuda: FAILED" in seen[0]
    assert "compute-sanitizer memcheck" not in seen[0] and "memcheck" in seen[1]
    text = target.read_text()
    assert "does not answer: no such | kernel" in text
    assert "What to send back" in text
    assert text.count("\nKeyboardInterrupt") == len(cuda_check.SANITIZER_TOOLS)
    assert "## Several GPUs: FAILED" in text
    assert "## Steps, measured beside their predictions: passed" in text, text
    assert "| 90 | 3 | Adam | 1.000 |" in text
    assert "## What the model predicts for other GPUs: passed" in text


def test_a_command_that_hangs_is_stopped_and_what_it_said_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hangs(command: list[str], timeout: float, **options: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout, output=b"the last test")

    monkeypatch.setattr(subprocess, "run", hangs)
    good, said = cuda_check.run(["pytest"], seconds=5.0)
    assert not good
    assert said == "the last test\nstopped after 5 s"


def test_a_command_that_is_missing_is_a_failure() -> None:
    good, said = cuda_check.run(["/nonexistent/compute-sanitizer"])
    assert not good
    assert "compute-sanitizer" in said


def test_data_parallel_steps_on_two_processes() -> None:
    """What several GPUs run over nccl, over gloo."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launch, "-m", "benchmarks.harness.gpu_ranks"],
        cwd=cuda_check.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks, gloo: phase lbfgs" in done.stdout
    assert "largest difference 0\n" in done.stdout
    lines = done.stdout.splitlines()
    for name, case in gpu_ranks.CASES.items():
        (line,) = [line for line in lines if f"phase lbfgs, {name}, loss" in line]
        assert line.endswith("largest difference 0")
        # Through torch.distributed.checkpoint into a fresh model and optimizer.
        assert ("resumed to 0," in line) == case.sharded


def test_several_ranks_talk_in_every_case_that_is_checked(tmp_path: Path) -> None:
    """Our own collectives run over nccl only where something asks for them."""
    for heard in rank_cases.on_ranks(2, tmp_path, "test_cuda_check:talk"):
        for name, calls in heard.items():
            assert "allreduce_" in calls, name
            # With state in shards the rows are gathered besides.
            gathers = any("allgather" in call for call in calls)
            assert gathers == ("shards" in name), name


def talk(rank: int, folder: str) -> dict[str, list[str]]:
    """Collective calls of a step in the second phase, but for those of the closure."""
    found = {}
    for name, case in gpu_ranks.CASES.items():
        run = gpu_ranks.Run(case, torch.device("cpu"))
        for number in range(gpu_ranks.SWITCH + 2):
            run.step(number)
        calls, evaluate = collectives.Calls(), run.evaluate

        def unheard(x: Any, calls: Any = calls, evaluate: Any = evaluate) -> Any:
            calls.listens = False
            loss = evaluate(x)
            calls.listens = True
            return loss

        run.evaluate = unheard
        with calls:
            run.step(gpu_ranks.SWITCH + 2)
        found[name] = [call.name for call in calls.heard]
    return found


def test_what_is_wrong_on_several_gpus_is_said() -> None:
    assert gpu_ranks.complaints(0.0, 1.0, 0.5, "lbfgs") == []
    nan = float("nan")
    for gap, last, phase, said in (
        (1e-9, 0.5, "lbfgs", "parameters differ between ranks, by 1e-09"),
        (nan, 0.5, "lbfgs", "parameters differ"),
        (0.0, 1.0, "lbfgs", "the loss went from 1 to 1"),
        (0.0, nan, "lbfgs", "the loss went from 1 to nan"),
        (0.0, 0.5, "adam", "the phase is 'adam'"),
    ):
        (complaint,) = gpu_ranks.complaints(gap, 1.0, last, phase)
        assert said in complaint


def test_ranks_that_differ_are_found(tmp_path: Path) -> None:
    assert rank_cases.on_ranks(2, tmp_path, "test_cuda_check:gaps") == [[0.0, 2.0, True]] * 2


def gaps(rank: int, folder: str) -> list[Any]:
    """Of vectors that are the same, that differ, and that are not finite on one rank."""
    same, other = torch.ones(3), torch.tensor([1.0, 2.0 * rank, 1.0])
    nan = torch.tensor([1.0, float("nan") if rank else 1.0])
    found = [gpu_ranks.largest_gap(vector) for vector in (same, other, nan)]
    return [*found[:2], math.isnan(found[2])]


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
