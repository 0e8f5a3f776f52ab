"""Builds the CUDA kernels for the host execution model, and calls them as one more set of ops.

Variants: ``plain``; ``asan`` (AddressSanitizer and UndefinedBehaviorSanitizer) and ``tsan``
(ThreadSanitizer), which need a process of their own with the sanitizer loaded first
(:func:`sanitized_environment`). What is built lies in build/cuda_sim and is used again as long as
the sources are the same.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from fuse_ext.kernels import ops

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cuda_sim"
TORCH = Path(torch.__file__).parent
# The variant that this process can load.
VARIANT = os.environ.get("FUSE_EXT_CUDA_SIM", "plain")
KERNELS = ("adam", "dense", "lbfgs", "points", "recursion")
ORDERS = ("forward", "reverse", "shuffled")
# Small blocks and grids: few elements already take every path. ThreadSanitizer's threads are dear.
THREADS = 64
MOST_BLOCKS = {"plain": 5, "asan": 5, "tsan": 2}
GRID = {"THREADS": THREADS, "MOST_LIGHT_BLOCKS": 7, "GROUPS": 2, "FILL": 4, "LEAST_PAIRS": 1}

SANITIZERS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-fsanitize=thread"],
}
PRELOADED = {"plain": [], "asan": ["libasan.so", "libubsan.so"], "tsan": ["libtsan.so"]}

# As for the extension: no contraction, so that an Adam step has the same bits everywhere.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
FLAGS += [f"-I{HERE}", f"-I{ROOT / 'csrc'}"]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def why_not() -> str:
    """Why the model cannot be built here; empty if it can."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return "the host execution model of CUDA needs Linux with glibc (its fibers are ucontexts)"
    found = shutil.which(compiler()[0])
    if not found:
        return f"the host execution model of CUDA needs a C++ compiler ({compiler()[0]}; set CXX)"
    macros = subprocess.run(
        [*compiler(), "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True
    ).stdout
    if "__clang__" in macros or "__GNUC__" not in macros:
        return f"the host execution model of CUDA needs GCC, and CXX={compiler()[0]} is not"
    return ""


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


@contextmanager
def _locked() -> Iterator[None]:
    """One process builds at a time, also with pytest-xdist."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def _sources_digest() -> str:
    digest = hashlib.sha256()
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    files += [p for p in HERE.iterdir() if p.suffix in (".h", ".cpp", ".cu", ".py")]
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(repr((compiler(), torch.__version__, sys.version)).encode())
    return digest.hexdigest()[:16]


def _object(source: Path, name: str, flags: list[str]) -> Path:
    """The object file of a source under these flags, compiled unless it is at hand."""
    target = BUILD / _sources_digest() / f"{name}.o"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        unfinished = target.with_suffix(".tmp.o")
        _run([*compiler(), *FLAGS, *flags, "-x", "c++", "-c", str(source), "-o", str(unfinished)])
        unfinished.rename(target)
    return target


def _link(name: str, objects: list[Path], flags: list[str]) -> Path:
    target = BUILD / _sources_digest() / name
    if not target.exists():
        unfinished = target.with_suffix(".tmp")
        _run([*compiler(), *map(str, objects), *flags, "-ldl", "-o", str(unfinished)])
        unfinished.rename(target)
    return target


def build(variant: str) -> Path:
    """The shared library with the CUDA kernels and the ops' own torch glue."""
    sanitize = SANITIZERS[variant]
    sizes = {**GRID, "MOST_BLOCKS": MOST_BLOCKS[variant]}
    grid = [f"-DFUSE_CUDA_{name}={value}" for name, value in sizes.items()]
    with _locked():
        objects = [_object(HERE / "scheduler.cpp", "scheduler", [])]
        headers = (TORCH / "include", TORCH / "include/torch/csrc/api/include")
        system = [f"-isystem{path}" for path in headers]
        objects.append(_object(HERE / "glue.cpp", "glue", system))
        for name in KERNELS:
            source = ROOT / "csrc" / "cuda" / f"{name}.cu"
            objects.append(_object(source, f"{name}.{variant}", [*grid, *sanitize]))
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        return _link(f"{variant}.so", objects, ["-shared", *sanitize, *libraries])


def build_faults(variant: str) -> Path:
    """The program of faulty kernels (faults.cu)."""
    sanitize = SANITIZERS[variant]
    with _locked():
        objects = [
            _object(HERE / "scheduler.cpp", "scheduler", []),
            _object(HERE / "faults.cu", f"faults.{variant}", sanitize),
        ]
        return _link(f"faults.{variant}", objects, [*sanitize, "-fPIE"])


def sanitized_environment(variant: str) -> dict[str, str]:
    """The environment in which Python can load a variant."""
    paths = [
        subprocess.run(
            [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in PRELOADED[variant]
    ]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0,quarantine_size_mb=16",
        "TSAN_OPTIONS": "halt_on_error=1,report_signal_unsafe=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "FUSE_EXT_CUDA_SIM": variant,
    }


class SimulatedOps:
    """The CUDA kernels under the signatures of fuse_ext.kernels.ops.Ops, on CPU tensors."""

    def __init__(self, variant: str) -> None:
        path = str(build(variant))
        self._schemas = torch.library.Library("fuse_ext_sim", "DEF")
        for name in ops.NAMES:
            schema = str(getattr(torch.ops.fuse_ext, name).default._schema)
            self._schemas.define(schema.replace("fuse_ext::", "", 1))
        torch.ops.load_library(path)
        for name in ops.NAMES:
            setattr(self, name, getattr(torch.ops.fuse_ext_sim, name).default)
        self._library = ctypes.CDLL(path)
        for name in ("cuda_sim_launch_count", "cuda_sim_bytes_moved"):
            getattr(self._library, name).restype = ctypes.c_int64

    def schedule(self, order: str, seed: int = 0) -> None:
        """Which threads run first, from now on."""
        self._library.cuda_sim_set_schedule(ORDERS.index(order), seed)

    def launches(self) -> int:
        """Kernels launched so far."""
        return int(self._library.cuda_sim_launch_count())

    def bytes_moved(self) -> int:
        """Bytes that kernels have read and written of vectors so far."""
        return int(self._library.cuda_sim_bytes_moved())
