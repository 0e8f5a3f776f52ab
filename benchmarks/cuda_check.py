"""Everything that needs a GPU, in one go, with one report to send back: `make gpu-check`.

    python -m benchmarks.cuda_check [--output build/gpu-check.md] [--quick]

Runs the tests marked cuda, the same under NVIDIA's compute-sanitizer where it is found, and times
our steps against torch.optim's and against the copy bandwidth, with CUDA events. The report begins
with what the machine is.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fuse_ext
from benchmarks import cuda_model
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
# Parameters of dense matrices.
MATRICES = (300, 2_000, 16_000)
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


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second that a plain copy reads and writes."""
    source = torch.empty(COPIED, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * milliseconds(lambda: target.copy_(source), repeats))


def parameters(numel: int, tensors: int) -> list[Tensor]:
    made = [torch.randn(numel // tensors, device=DEVICE) for _ in range(tensors)]
    for x in made:
        x.requires_grad_()
        x.grad = torch.randn_like(x)
    return made


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """The replay of a step, captured after a warm-up; the step itself where there is no GPU."""
    if DEVICE.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def adam_times(numel: int, tensors: int, repeats: int) -> dict[str, float]:
    def both(**options: Any) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        ours = fuse_ext.Adam(parameters(numel, tensors), lr=1e-3, **options)
        return ours, torch.optim.Adam(parameters(numel, tensors), lr=1e-3, fused=True, **options)

    ours, theirs = both()
    times = {"ours": milliseconds(ours.step, repeats), "torch": milliseconds(theirs.step, repeats)}
    narrow = fuse_ext.Adam(parameters(numel, tensors), lr=1e-3, moment_dtype=torch.bfloat16)
    times["ours, bf16 moments"] = milliseconds(narrow.step, repeats)
    # torch's own asks for an accelerator.
    ours, theirs = both(capturable=True) if DEVICE.type == "cuda" else both()
    times["ours, captured"] = milliseconds(captured(ours.step), repeats)
    times["torch, captured"] = milliseconds(captured(theirs.step), repeats)
    return times


def lbfgs_times(numel: int, tensors: int, pairs: int, repeats: int) -> dict[str, float]:
    """One fixed-step iteration with a full history; the closure costs nothing."""

    def one(
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        again: Callable[[Callable[[], object]], Callable[[], object]] = lambda step: step,
    ) -> float:
        params = parameters(numel, tensors)
        optimizer = make(params)
        curvatures = [torch.linspace(1, 2, p.numel(), device=DEVICE) for p in params]
        loss = torch.zeros((), device=DEVICE)

        def closure() -> Tensor:
            for p, h in zip(params, curvatures, strict=True):
                assert p.grad is not None
                torch.mul(h, p.detach(), out=p.grad)
            return loss

        for _ in range(pairs + 2):
            optimizer.step(closure)
        return milliseconds(again(lambda: optimizer.step(closure)), repeats)

    def make(dtype: torch.dtype | None, **options: Any) -> Any:
        return lambda params: fuse_ext.LBFGS(
            params,
            lr=0.5,
            history_size=pairs,
            max_iter=1,
            tolerance_change=0,
            tolerance_grad=0,
            history_dtype=dtype,
            **options,
        )

    def torchs(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            params, lr=0.5, history_size=pairs, max_iter=1, tolerance_change=0, tolerance_grad=0
        )

    return {
        "ours": one(make(None)),
        "ours, captured": one(make(None, capturable=True), captured),
        "ours, bf16 history": one(make(torch.bfloat16)),
        "ours, int8 history": one(make(torch.int8)),
        "torch": one(torchs),
    }


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


def benchmark(quick: bool) -> str:
    repeats = 5 if quick else 30
    bandwidth = copy_bandwidth(repeats)
    lines = [f"Copy bandwidth: {bandwidth / 1e12:.2f} TB/s", ""]
    lines += ["| d | tensors | step | ms | of the copy bandwidth |", "|---|---|---|---|---|"]
    for numel, tensors in CASES:
        moved = {
            "Adam": cuda_model.adam().bytes,
            "Adam, captured": cuda_model.adam().bytes,
            "Adam, bf16 moments": cuda_model.adam(narrow=True).bytes,
            "L-BFGS": cuda_model.lbfgs(10).bytes,
            "L-BFGS, captured": cuda_model.lbfgs(10).bytes,
            "L-BFGS, bf16 history": cuda_model.lbfgs(10, "bfloat16").bytes,
            "L-BFGS, int8 history": cuda_model.lbfgs(10, "int8").bytes,
        }
        times = {
            **{("Adam", who): t for who, t in adam_times(numel, tensors, repeats).items()},
            **{("L-BFGS", who): t for who, t in lbfgs_times(numel, tensors, 10, repeats).items()},
        }
        for (step, who), ms in times.items():
            share = moved.get(who.replace("ours", step), 0) * numel / (1e-3 * ms) / bandwidth
            cell = f"{share:.0%}" if share else ""
            lines.append(f"| {numel:,} | {tensors} | {step}, {who} | {ms:.3f} | {cell} |")
    for numel in MATRICES:
        ms = matrix_time(numel, repeats)
        share = cuda_model.matrix_bytes(numel) / (1e-3 * ms) / bandwidth
        lines.append(f"| {numel:,} | 1 | dense matrix | {ms:.3f} | {share:.0%} |")
    return "\n".join(lines)


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
        done = subprocess.run([smi, query, "--format=csv"], capture_output=True, text=True)
        facts["nvidia-smi"] = done.stdout.strip().replace("\n", "; ")
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def run(command: list[str]) -> tuple[bool, str]:
    """Whether the command succeeded, and the end of what it said."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check.md")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not fuse_ext.build_info()["cuda"]:
        print("needs a GPU and an extension with CUDA kernels", file=sys.stderr)
        return 2
    sections = {"Tests marked cuda": run(PYTEST), **sanitizer_sections()}
    text = [f"# fuse_ext on a GPU\n\n{machine()}"]
    text += [
        f"## {name}: {'passed' if good else 'FAILED'}\n\n```\n{output}\n```"
        for name, (good, output) in sections.items()
    ]
    text.append(f"## Times\n\n{benchmark(options.quick)}")
    text.append(f"## What the model predicted\n\n{cuda_model.table(100_000_000, 10)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n\n".join(text) + "\n")
    print(f"Report: {options.output}")
    return 0 if all(good for good, _ in sections.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
