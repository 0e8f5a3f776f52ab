"""The parts of `make gpu-check` that need no GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import collectives
import pytest
import rank_cases
import torch

cuda_check = pytest.importorskip("benchmarks.cuda_check")
cuda_model = pytest.importorskip("benchmarks.cuda_model")
gpu_model = pytest.importorskip("benchmarks.harness.gpu_model")
gpu_rows = pytest.importorskip("benchmarks.harness.gpu_rows")
gpu_ranks = pytest.importorskip("benchmarks.harness.gpu_ranks")
gpu_steps = pytest.importorskip("benchmarks.harness.gpu_steps")
gpu_table = pytest.importorskip("benchmarks.harness.gpu_table")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check on the CPU, few times, on few parameters, in this process."""

    def timed(run: Callable[[], object]) -> float:
        run()
        return 1.0

    torch.manual_seed(0)
    monkeypatch.setattr(gpu_table, "timed", timed)
    monkeypatch.setattr(gpu_table, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_table, "COPIED", 100)
    monkeypatch.setattr(gpu_rows, "follow", gpu_rows.work)
    monkeypatch.setattr(gpu_table, "CASES", ((30, 3),))
    monkeypatch.setattr(gpu_table, "ODD_CASES", ((31, 3),))
    monkeypatch.setattr(gpu_table, "WEIGHTS", ((2, 8),))
    monkeypatch.setattr(gpu_table, "MATRICES", (70,))
    monkeypatch.setattr(gpu_table, "LONG", (600,))


def report_of(path: Path) -> tuple[bool, str]:
    """Whether the table was well, and its part of the report."""
    report = cuda_check.Report(path / "report.md", "made up")
    report.follow("Steps", gpu_rows.measure(quick=True))
    return report.good, report.path.read_text()


def test_the_check_measures_every_step(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good, text = report_of(tmp_path)
    assert good, text
    for name in (*gpu_steps.STEPS, *gpu_steps.WITH_PAIRS.names()):
        assert f"| 90 | 3 | {name} |" in text
    for name in gpu_steps.OF_ODD:
        assert f"| 93 | 3 | {name}, odd sizes: mostly element by element |" in text
    living = (*gpu_steps.LIVING.names(), *gpu_steps.LIVING_SCALED.names())
    for name in (*gpu_steps.OF_MATRICES, *living):
        assert f"| 128 | 2 | {name} |" in text
    for name in gpu_steps.WITH_MATRIX.names():
        assert f"| 70 | 1 | {name} |" in text
    assert "| 600 | 1 | fixed step, capturable |" in text
    assert "dense_direction alone" in text


def test_only_the_odd_case_has_tensors_that_begin_within_a_pack() -> None:
    assert all(numel % 4 == 0 for numel, _ in gpu_table.CASES)
    assert all(numel % 2 and count > 1 for numel, count in gpu_table.ODD_CASES)


def test_what_torch_saw_stands_beside_what_was_counted(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With steps that are watched as on a GPU, where what the closure asks for is not the step's;
    of two rows' difference it is the difference."""
    asked = {"calls": 0}
    original = gpu_steps.Problem.closure

    def closure(self: Any) -> Any:
        asked["calls"] += 1
        return original(self)

    def observe(run: Callable[[], object], steps: int = 3) -> Any:
        """Two waits and five allocations of the step, one and three of the closure."""
        before = asked["calls"]
        for _ in range(steps):
            run()
        calls = (asked["calls"] - before) / steps
        step = 0.0 if getattr(run, "__func__", None) is closure else 1.0
        return gpu_table.Observed(2.0 * step + calls, 5.0 * step + 3.0 * calls)

    monkeypatch.setattr(gpu_steps.Problem, "closure", closure)
    monkeypatch.setattr(gpu_table, "observe", observe)
    kept = ("Adam", "FusePV, Adam phase")
    monkeypatch.setattr(gpu_steps, "STEPS", {name: gpu_steps.STEPS[name] for name in kept})
    monkeypatch.setattr(gpu_table, "LONG", ())
    good, text = report_of(tmp_path)
    assert good, text
    ends = {
        line.split(" | ")[2]: line.split(" | ")[-2:]
        for line in text.splitlines()
        if "tensors" not in line and line.count(" | ") > 7
    }
    assert ends["Adam"] == ["2.0 (0)", "5.0 (0) |"]
    assert ends["FusePV, Adam phase"] == ["2.0 (1)", "5.0 (0) |"]
    assert ends["the switch, to a search with pairs"] == ["2.0 (1)", "5.0 (3) |"]
    assert ends["search with pairs, each trial more"] == ["0.0 (1)", "0.0 (0) |"]
    assert ends["living metric, GradScaler"] == ["2.0 (2)", "5.0 (144) |"]
    assert ends[gpu_steps.EIGH] == ["2.0", "5.0 |"]


@pytest.mark.parametrize(
    ("capability", "like", "lanes", "code"),
    [
        ((8, 0), "H100", 32, "sm_80"),
        ((8, 6), "RTX4090", 2, "sm_80"),
        ((8, 9), "RTX4090", 2, "sm_80"),
        ((9, 0), "H100", 64, "sm_90"),
        ((10, 0), "H100", 64, "sm_90"),
        ((10, 3), "RTX4090", 2, "sm_90"),
        ((12, 0), "RTX4090", 2, "sm_90"),
    ],
)
def test_gpus_with_few_float64_lanes_are_told_apart(
    capability: tuple[int, int], like: str, lanes: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        name="made up",
        multi_processor_count=100,
        clock_rate=2_000_000,
        max_threads_per_multi_processor=1536,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    gpu = gpu_table.this_gpu(1e12)
    assert (gpu.float64_lanes, gpu.code) == (lanes, code)
    assert gpu.in_flight == getattr(gpu_model, like).in_flight
    assert (gpu.processors, gpu.clock, gpu.bandwidth) == (100, 2e9, 1e12)


def test_every_row_that_was_counted_is_measured_and_no_other() -> None:
    """But for torch's optimizers, and for what tells of a row that it is a difference of two."""
    others = {*gpu_steps.PEERS, gpu_steps.TORCH_LBFGS, *gpu_steps.UNCOUNTED}
    rows = {*gpu_steps.STEPS, *gpu_steps.OF_ODD, *gpu_steps.OF_MATRICES, *gpu_steps.LONG}
    rows |= {name for passage in gpu_steps.PASSAGES for name in passage.names()}
    assert rows - others == set(cuda_model.counted())


@pytest.mark.parametrize("passage", [gpu_steps.LIVING, gpu_steps.LIVING_SCALED])
def test_steps_of_the_living_metric_are_what_their_rows_say(
    passage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of its methods a step calls, against the name of the row that the step is put in."""
    kronecker = pytest.importorskip("fuse_ext.phase.living.metric.kronecker")
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
    average = pytest.importorskip("fuse_ext.phase.living.average")
    take_in = average.WeightAverage.take_in
    monkeypatch.setattr(
        average.WeightAverage, "take_in", lambda self: (told.append("mean"), take_in(self))
    )
    torch.manual_seed(0)
    problem = gpu_steps.Problem([(8, 8)], torch.device("cpu"), passage.batches)
    optimizer = passage.make(problem)
    found: dict[str, set[tuple[str, ...]]] = {}
    for number in range(passage.steps):
        told.clear()
        before, phase = problem.calls, optimizer.phase
        passage.step(optimizer, problem)
        calls = problem.calls - before
        assert calls == 1
        name = passage.row_of(number, calls, optimizer)
        if phase != optimizer.phase:
            assert number == 2
            assert passage.closure == (name == "the switch, to a living metric")
        elif name is not None:
            found.setdefault(name, set()).add(tuple(sorted(told)))
    if passage is gpu_steps.LIVING_SCALED:
        assert found == {"living metric, GradScaler": {("_advance",)}}
        return
    assert found == {
        "living metric, watching the closure": {()},
        "living metric, gathering": {("_gather", "covariances")},
        gpu_steps.EIGH: {("_find_bases", "_gather", "covariances", "mean")},
        "living metric, measuring": {("_gather", "covariances")},
        "living metric": {("_advance",)},
        "living metric, taking covariances": {("_advance", "covariances")},
        "living metric, bases renewed": {("_advance", "_renew")},
        "living metric, weights into the mean": {("_advance", "mean")},
    }
    assert optimizer.report().function_changes == 0


def broken(*args: object, **kwargs: object) -> Any:
    raise RuntimeError("no such | kernel")


def test_rows_that_fail_are_reported_and_the_rest_goes_on(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = {"broken": gpu_steps.Step(broken), "Adam": gpu_steps.STEPS["Adam"]}
    monkeypatch.setattr(gpu_steps, "STEPS", steps)
    monkeypatch.setattr(gpu_steps, "LIVING", replace(gpu_steps.LIVING, make=broken))
    never = {"a step that never comes": lambda *of: False}
    monkeypatch.setattr(gpu_steps, "WITH_MATRIX", replace(gpu_steps.WITH_MATRIX, rows=never))
    good, text = report_of(tmp_path)
    assert not good
    assert "| broken | FAILED: RuntimeError: no such / kernel |" in text
    assert "| living metric | FAILED: RuntimeError: no such / kernel |" in text
    assert "| a step that never comes | FAILED: no such step came |" in text
    # The difference of two rows that are not there is the second that fails in that passage.
    assert f"{1 + len(gpu_steps.LIVING.names()) + 2} rows FAILED" in text
    assert "| 90 | 3 | Adam | 1.000 |" in text
    assert "| search with pairs, one trial | 1.000 |" in text


# Instead of `python -m benchmarks.harness.gpu_rows FIRST --quick`: row 1 takes its process with it,
# row 3 hangs, row 4 fails and ends its process as it should; the others are well.
CHILD = """
import json, os, sys, time
first = int(sys.argv[1])
print(json.dumps({"head": f"a device, in a process for {first} and later"}), flush=True)
for row in range(first, 6):
    if row == 1:
        sys.stderr.write("the driver is gone")
        sys.stderr.flush()
        os.abort()
    if row == 3:
        time.sleep(600)
    print("what a library says", flush=True)
    line = f"| row {row} |"
    print(json.dumps({"row": row, "lines": [line], "failed": int(row == 4)}), flush=True)
    if row == 4:
        break
print(json.dumps({"end": True}), flush=True)
"""


@pytest.fixture
def six_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The table of the processes above."""
    program = tmp_path / "child.py"
    program.write_text(CHILD)
    rows = [gpu_rows.Row([f"step {i}"], [(4,)], broken) for i in range(6)]
    monkeypatch.setattr(gpu_rows, "all_rows", lambda: rows)
    monkeypatch.setattr(gpu_rows, "CHILD", [sys.executable, str(program)])
    monkeypatch.setattr(gpu_rows, "ROW_SECONDS", 5.0)


def test_a_row_that_takes_its_process_with_it_or_hangs_loses_nothing_else(
    six_rows: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    states: list[str] = []
    write = cuda_check.Report.write

    def noted(self: Any) -> None:
        write(self)
        states.append(self.path.read_text())

    monkeypatch.setattr(cuda_check.Report, "write", noted)
    good, text = report_of(tmp_path)
    assert not good
    for row in (0, 2, 4, 5):
        assert f"| row {row} |" in text
    assert "| step 1 | FAILED: RuntimeError: the process ended with -6: the driver is gone" in text
    assert "| step 3 | FAILED: RuntimeError: stopped after 5 s" in text
    assert "3 rows FAILED" in text
    assert text.count("a device, in a process for 0") == 1 and "for 2" not in text
    # Each line was in the file before the next one came.
    assert any("| row 0 |" in state and "step 1" not in state for state in states)
    assert "## Steps: under way" in states[1] and "## Steps: FAILED" in states[-1]


@pytest.mark.parametrize("times", [1, 2])
def test_control_c_ends_a_row_and_twice_the_table(
    times: int, six_rows: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left = [times]

    def interrupted(first: int, quick: bool) -> Any:
        if first < 2 and left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        yield {"row": 5, "lines": ["| the last |"], "failed": 0}
        yield {"end": True}

    monkeypatch.setattr(gpu_rows, "follow", interrupted)
    good, text = report_of(tmp_path)
    assert not good
    assert "| step 0 | FAILED: stopped by Control-C |" in text
    assert ("| the last |" in text) == (times == 1)
    assert text.count("\nKeyboardInterrupt") == times - 1


def test_a_process_of_its_own_measures_rows(tmp_path: Path) -> None:
    """What `gpu_rows.CHILD` is, on this machine: it says why it cannot."""
    done = subprocess.run(
        [*gpu_rows.CHILD, "10000", "--quick"],
        cwd=cuda_check.ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "NVIDIA" in done.stderr or "CUDA" in done.stderr


def test_the_report_is_written_whatever_its_parts_do(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of `make gpu-check`, with a GPU that is made up and half of its parts broken."""
    target = tmp_path / "new" / "report.md"
    monkeypatch.setattr(gpu_steps, "STEPS", {"Adam": gpu_steps.STEPS["Adam"]})
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
