"""Everything that needs a GPU, in one go, with one report to send back: `make gpu-check`.

    python -m benchmarks.cuda_check [--output build/gpu-check.md] [--quick]

Runs the tests marked cuda, the same under NVIDIA's compute-sanitizer where it is found, and steps
on every GPU together where there are several; and measures each step of the table in docs/cuda.md:
its time by CUDA events beside the model's prediction for this GPU, torch.optim's and a triad's in
the same run, and its waits and allocations beside those that were counted. What fails says so in
the report, and the rest goes on; the report is written anew after every part and every row of the
table, whose rows are measured in a new process after one that fails. Control-C ends a part or a row
that hangs, and the next one begins; twice in two seconds it ends all rows.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

import fuse_ext
from benchmarks import cuda_model
from benchmarks.harness import gpu_rows

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Small cases; the sanitizers slow kernels down by two orders of magnitude.
SANITIZED_TESTS = "awkward_tensors or waits_for or wait_for"


def can_run() -> bool:
    """Whether there are a GPU and kernels for it."""
    return torch.cuda.is_available() and bool(fuse_ext.build_info()["cuda"])


def machine() -> str:
    """Its GPU and software."""
    try:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        gpu = f"{torch.cuda.get_device_name()}, compute capability {capability}"
    except Exception as error:  # what is wrong with it the parts will say
        gpu = f"does not answer: {error}"
    facts = {
        "GPU": gpu,
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
    except subprocess.TimeoutExpired as error:
        said = [(of or b"").decode(errors="replace") for of in (error.stdout, error.stderr)]
        return False, f"{''.join(said).strip()[-3000:]}\nstopped after {seconds:g} s"
    except OSError as error:
        return False, str(error)[-3000:]
    return done.returncode == 0, (done.stdout + done.stderr).strip()[-3000:]


def sanitized(tool: str) -> tuple[bool, str]:
    """Tests under one of the sanitizer's tools."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).is_file():
        return True, "compute-sanitizer was not found on this machine: not run"
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return run([found, *options, *PYTEST, "-k", SANITIZED_TESTS])


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


class Report:
    """The file to send back.

    Args:
        path: Where it is written, anew after every part.
        facts: Of the machine.
    """

    def __init__(self, path: Path, facts: str) -> None:
        self.path, self.good = path, True
        self.parts = [f"# fuse_ext on a GPU\n\n{facts}", SEND]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """All parts so far."""
        self.path.write_text("\n\n".join(self.parts) + "\n")

    def add(self, name: str, work: Callable[[], tuple[bool, str]], fenced: bool = True) -> None:
        """A part: whether all was well in it and what it says, or how it ended."""
        try:
            good, body = work()
        except (Exception, KeyboardInterrupt):
            good, body = False, traceback.format_exc()[-3000:]
            fenced = True
        self.good = self.good and good
        body = f"```\n{body}\n```" if fenced else body
        self.parts.append(f"## {name}: {'passed' if good else 'FAILED'}\n\n{body}")
        self.write()

    def follow(self, name: str, lines: Iterable[tuple[bool, str]]) -> None:
        """A part that is written anew with every line: whether it is well, and the line."""
        good, text = True, ""
        self.parts.append("")

        def write(state: str) -> None:
            self.parts[-1] = f"## {name}: {state}\n\n{text.rstrip()}"
            self.write()

        try:
            for well, line in lines:
                good, text = good and well, f"{text}{line}\n"
                write("under way")
        except (Exception, KeyboardInterrupt):
            good, text = False, f"{text}\n```\n{traceback.format_exc()[-3000:]}\n```"
        self.good = self.good and good
        write("passed" if good else "FAILED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check.md")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    if not can_run():
        print("needs a GPU and an extension with CUDA kernels", file=sys.stderr)
        return 2
    report = Report(options.output, machine())
    report.add("Tests marked cuda", lambda: run(PYTEST))
    for tool in SANITIZER_TOOLS:
        report.add(f"compute-sanitizer {tool}", lambda tool=tool: sanitized(tool))
    report.add("Several GPUs", several_gpus)
    heading = "Steps, measured beside their predictions"
    report.follow(heading, gpu_rows.measure(options.quick))
    heading = "What the model predicts for other GPUs"
    report.add(heading, lambda: (True, cuda_model.table()), fenced=False)
    print(f"Report: {options.output}\nPlease send it back; its first lines say how.")
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
