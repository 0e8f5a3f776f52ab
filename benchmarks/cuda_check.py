"""Everything that needs a GPU, in one go, with one report to send back: `make gpu-check`.

    python -m benchmarks.cuda_check [--output build/gpu-check.md] [--quick]

Runs the tests marked cuda, the same under NVIDIA's compute-sanitizer where it is found, and steps
on every GPU together where there are several; and measures each step of the table in docs/cuda.md:
its time by CUDA events beside the model's prediction for this GPU, torch.optim's and a triad's in
the same run, and its waits and allocations beside those that were counted. What fails says so in
the report, and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import math
import platform
import shutil
import statistics
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fuse_ext
from benchmarks import cuda_model
from benchmarks.harness.gpu_model import H100, RTX4090, Gpu
from benchmarks.harness.gpu_steps import (
    DENSE,
    LONG_PAIRS,
    OF_MATRICES,
    PAIRS,
    STEPS,
    Problem,
    Step,
)
from benchmarks.harness.gpu_steps import LONG as LONG_STEPS
from fuse_ext.curvature.dense import terms_apart
from fuse_ext.kernels import ops, scalars

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Small cases; the sanitizers slow kernels down by two orders of magnitude.
SANITIZED_TESTS = "awkward_tensors or waits_for or wait_for"
DEVICE = torch.device("cuda")
# Parameters, and the tensors they are spread over.
CASES = ((10_000_000, 1), (10_000_000, 300), (100_000_000, 1), (10_000, 8))
# Matrices of weights, of so many rows and columns.
WEIGHTS = ((24, 1024),)
# Parameters of dense matrices, and of long histories.
MATRICES = (300, 2_000, 16_000)
LONG = (16_000,)
COPIED = 1 << 28  # float32 elements


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the device, by events, after warm-up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


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
    capability = facts.major * 10 + facts.minor
    like = H100 if facts.major >= 9 or capability == 80 else RTX4090
    clock = 1e3 * getattr(facts, "clock_rate", 0) or like.clock
    return replace(
        like,
        name=facts.name,
        processors=facts.multi_processor_count,
        clock=clock,
        bandwidth=bandwidth,
        threads=getattr(facts, "max_threads_per_multi_processor", like.threads),
        code="sm_90" if facts.major >= 9 else "sm_80",
    )


@dataclass(frozen=True)
class Observed:
    """Of some steps on a device: waits and allocations of each."""

    waits: float
    allocations: float


def observe(run: Callable[[], object], steps: int = 3) -> Observed | None:
    """What torch sees of a step; None where there is no device to wait for."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            for _ in range(steps):
                run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
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


def row(
    gpu: Gpu,
    costs: dict[str, cuda_model.Cost],
    name: str,
    step: Step,
    shapes: list[tuple[int, ...]],
    pairs: int,
    repeats: int,
) -> str:
    """One line of the report."""
    problem = Problem(shapes, DEVICE, step.batches)
    numel = sum(x.numel() for x in problem.params)
    run, cost = step.build(problem), costs.get(name)
    seen = observe(run)
    ms = milliseconds(captured(run) if step.captured else run, repeats)
    closure = milliseconds(problem.closure, repeats) if step.closure else 0.0
    cells = [f"{numel:,}", str(len(shapes)), name, f"{ms:.3f}", f"{closure:.3f}"]
    if cost is None:
        cells += ["", "", *([f"{seen.waits:.1f}", f"{seen.allocations:.1f}"] if seen else ["", ""])]
        return "| " + " | ".join(cells) + " |"
    expected = cuda_model.predicted(gpu, name, cost, numel, pairs)
    size = numel**2 if "matrix" in name else numel
    bytes_moved = cost.bytes * size
    if "fixed step" in name and pairs != cuda_model.PAIRS:
        bytes_moved = cuda_model.iteration_bytes(pairs) * numel
    cells += [cuda_model.cell(expected), f"{1e3 * bytes_moved / gpu.bandwidth:.3f}"]
    waits, made = (f"{seen.waits:.1f}", f"{seen.allocations:.1f}") if seen else ("-", "-")
    cells += [f"{waits} ({cost.syncs})", f"{made} ({cost.allocations})"]
    return "| " + " | ".join(cells) + " |"


def release() -> None:
    """Gives the last row's memory back."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def benchmark(quick: bool) -> tuple[str, int]:
    """The rows, and how many of them failed."""
    repeats, failed = 5 if quick else 30, 0
    bandwidth = triad_bandwidth(repeats)
    gpu, costs = this_gpu(bandwidth), cuda_model.counted()
    plans: list[tuple[dict[str, Step], list[tuple[int, ...]], int]] = [
        (STEPS, [(numel // tensors,)] * tensors, PAIRS) for numel, tensors in CASES
    ]
    plans += [(OF_MATRICES, [(side, side)] * count, PAIRS) for count, side in WEIGHTS]
    plans += [(DENSE, [(numel,)], PAIRS) for numel in MATRICES]
    plans += [(LONG_STEPS, [(numel,)], LONG_PAIRS) for numel in LONG]
    lines = [f"Triad: {bandwidth / 1e12:.3f} TB/s. The model takes this GPU for: {gpu}.", ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for steps, shapes, pairs in plans:
        for name, step in steps.items():
            print(f"{name}, {len(shapes)} of {shapes[0]}", flush=True)
            try:
                lines.append(row(gpu, costs, name, step, shapes, pairs, repeats))
            except Exception as error:  # the next row may still work
                failed += 1
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                numel = sum(math.prod(shape) for shape in shapes)
                lines.append(f"| {numel:,} | {len(shapes)} | {name} | FAILED: {said} |" + " |" * 5)
            release()
    for numel in MATRICES:
        try:
            ms = matrix_time(numel, repeats)
            share = cuda_model.matrix_bytes(numel) / (1e-3 * ms) / bandwidth
            lines.append(
                f"| {numel:,} | 1 | dense_direction alone, of the triad {share:.0%} "
                f"| {ms:.3f} |" + " |" * 5
            )
        except Exception as error:
            failed += 1
            lines.append(f"| {numel:,} | 1 | dense_direction alone: FAILED {error} |" + " |" * 6)
        release()
    return "\n".join(lines), failed


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


def machine() -> str:
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    facts = {
        "GPU": f"{torch.cuda.get_device_name()}, compute capability {capability}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "fuse_ext": fuse_ext.build_info(),
        "host": f"{platform.platform()}, Python {platform.python_version()}",
    }
    smi = shutil.which("nvidia-smi")
    if smi:
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,ecc.mode.current"
        facts["nvidia-smi"] = run([smi, query, "--format=csv"], 60.0)[1].replace("\n", "; ")
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def run(command: list[str], seconds: float = 3600.0) -> tuple[bool, str]:
    """Whether the command succeeded, and the end of what it said."""
    print(" ".join(command), flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)[-3000:]
    return done.returncode == 0, (done.stdout + done.stderr).strip()[-3000:]


def sanitizer_sections() -> dict[str, tuple[bool, str]]:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).is_file():
        return {"compute-sanitizer": (True, "not found on this machine: not run")}
    tests = [*PYTEST, "-k", SANITIZED_TESTS]
    return {
        f"compute-sanitizer {name}": run(
            [found, "--tool", name, "--error-exitcode", "9", "--target-processes", "all", *tests]
        )
        for name in SANITIZER_TOOLS
    }


def several_gpus() -> tuple[bool, str]:
    """Data-parallel steps on all GPUs, over nccl."""
    count = torch.cuda.device_count()
    if count < 2:
        return True, "one GPU: not run; please run this on a machine with several, too"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return run([*launcher, f"--nproc-per-node={count}", "-m", "benchmarks.harness.gpu_ranks"])


SEND = """\
**What to send back**: this file as it is, failures included, as an issue of the repository. Say \
also whether anything else was running on the GPU. If a test failed, the lines of its section are \
what we need; if a row below FAILED, its message is; if the program was stopped, what the terminal \
said last. Most telling are rows whose time is far from the prediction (more than a third), and \
rows whose waits or allocations are not those that were counted."""


def report(sections: dict[str, tuple[bool, str]], facts: str, quick: bool) -> tuple[str, bool]:
    """The report, and whether all is well."""
    text = [f"# fuse_ext on a GPU\n\n{facts}", SEND]
    text += [
        f"## {name}: {'passed' if good else 'FAILED'}\n\n```\n{output}\n```"
        for name, (good, output) in sections.items()
    ]
    good = all(good for good, _ in sections.values())
    for heading, part in (
        ("Steps, measured beside their predictions", lambda: benchmark(quick)),
        ("What the model predicts for other GPUs", lambda: (cuda_model.table(), 0)),
    ):
        try:
            body, failed = part()
            note = f"{failed} rows FAILED" if failed else ""
        except Exception:
            body, note = f"```\n{traceback.format_exc()[-3000:]}\n```", "FAILED"
        good = good and not note
        text.append(f"## {heading}{': ' + note if note else ''}\n\n{body}")
    return "\n\n".join(text) + "\n", good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check.md")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not fuse_ext.build_info()["cuda"]:
        print("needs a GPU and an extension with CUDA kernels", file=sys.stderr)
        return 2
    sections = {
        "Tests marked cuda": run(PYTEST),
        **sanitizer_sections(),
        "Several GPUs": several_gpus(),
    }
    text, good = report(sections, machine(), options.quick)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(f"Report: {options.output}\nPlease send it back; its first lines say how.")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
