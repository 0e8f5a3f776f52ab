"""What the memory of this machine can deliver: the measure for the kernels.

Several ways to read a buffer, and several to update Adam's four vectors; the best one (by its
median over the rounds, in which the kernels run too) is the limit. A limit measured too low
would flatter us, so every way counts that moves the whole working set through the cores:
compiled loops over 1 to 8 streams a thread with and without prefetching, on the kernels' own
buffers and on buffers in large pages, and torch's own operators.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.rounds import Spread

Ways = dict[str, Callable[[], float]]
STREAMS = (1, 2, 4, 8)
# As many as there are rows that the passes read side by side with AVX-512 (kGroup in rows.inl).
MOST_STREAMS = STREAMS[-1]
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread"]
FLOAT, INT, LONG, POINTER = ctypes.c_float, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


@cache
def compiled() -> ctypes.CDLL | None:
    """limits.cpp, or None where no compiler is found; torch's operators then stand alone."""
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        source = Path(__file__).with_name("limits.cpp")
        try:
            subprocess.run(
                [*compiler, *FLAGS, str(source), "-o", str(library)],
                check=True,
                capture_output=True,
                text=True,
            )
        except subprocess.CalledProcessError as error:
            print(f"limits.cpp does not compile, torch's operators stand alone:\n{error.stderr}")
            return None
        loops = ctypes.CDLL(str(library))
    loops.limit_large_pages.argtypes = [POINTER, LONG]
    loops.limit_read.argtypes = [POINTER, LONG, INT, INT, INT]
    loops.limit_read.restype = FLOAT
    loops.limit_update.argtypes = [*[POINTER] * 4, LONG, *[FLOAT] * 3, INT, INT, INT]
    return loops


def in_large_pages(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A vector of ones, in large pages where the system has them."""
    vector = torch.empty(numel, dtype=dtype)
    loops = compiled()
    if loops is not None:
        loops.limit_large_pages(vector.data_ptr(), vector.nbytes)
    return vector.fill_(1.0)


def _timed(work: Callable[[], object], nbytes: int) -> Callable[[], float]:
    """Seconds per byte of one call."""

    def run() -> float:
        time.sleep(2e-3)  # torch's idle workers spin for a moment, on our cores
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) / nbytes

    return run


def reading(rows: Tensor) -> Ways:
    """Ways to read a buffer of float32 rows [rows, d] once; each returns seconds per byte.

    Args:
        rows: The kernels' own buffer, or one like it.
    """
    flat = rows.view(-1)
    half = flat.numel() // 2
    vector = torch.ones(rows.shape[1])
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "torch.sum": (lambda: flat.sum(), flat.nbytes),
        "torch.dot": (lambda: torch.dot(flat[:half], flat[half : 2 * half]), 8 * half),
        "torch.mv": (lambda: torch.mv(rows, vector), flat.nbytes),
    }
    loops = compiled()
    if loops is not None:
        threads = torch.get_num_threads()
        for streams in STREAMS:
            for prefetch in (0, 1):

                def read(streams: int = streams, prefetch: int = prefetch) -> None:
                    loops.limit_read(flat.data_ptr(), flat.numel(), streams, prefetch, threads)

                name = _streams(streams) + ", prefetching" * prefetch
                ways[name] = (read, flat.nbytes)
    return {name: _timed(*way) for name, way in ways.items()}


def updating(vectors: list[Tensor], where: str) -> Ways:
    """Ways to update float32 vectors p, m, v with a gradient; each returns seconds per byte.

    The values stay what they are: the factors are 0 (which no loop can know beforehand).

    Args:
        vectors: p, g, m, v.
        where: What they are, for the names.
    """
    p, g, m, v = vectors
    d = p.numel()

    def torch_lerp() -> None:
        m.lerp_(g, 0.0)
        v.lerp_(g, 0.0)
        p.lerp_(m, 0.0)

    def torch_add() -> None:
        m.add_(g, alpha=0.0)
        v.add_(g, alpha=0.0)
        p.add_(g, alpha=0.0)

    def torch_foreach() -> None:
        torch._foreach_add_([m, v, p], [g, g, m], alpha=0.0)

    ways: dict[str, tuple[Callable[[], object], int]] = {
        f"torch lerp_, {where}": (torch_lerp, 36 * d),
        f"torch add_, {where}": (torch_add, 36 * d),
        f"torch _foreach_add_, {where}": (torch_foreach, 36 * d),
    }
    loops = compiled()
    if loops is not None:
        threads = torch.get_num_threads()
        at = [vector.data_ptr() for vector in vectors]
        for blocked in (0, 1):
            for prefetch in (0, 1):

                def update(blocked: int = blocked, prefetch: int = prefetch) -> None:
                    loops.limit_update(*at, d, 0.0, 0.0, 0.0, blocked, prefetch, threads)

                name = "loop in blocks" if blocked else "loop"
                ways[f"{name}, {where}" + ", prefetching" * prefetch] = (update, 28 * d)
    return {name: _timed(*way) for name, way in ways.items()}


def _streams(streams: int) -> str:
    return f"loop over {streams} streams"


def of_most_streams(measured: dict[str, Spread]) -> dict[str, Spread]:
    """Those of the ways to read that have the most streams; none without a compiler."""
    name = _streams(MOST_STREAMS)
    return {way: spread for way, spread in measured.items() if way.startswith(name)}


def best(measured: dict[str, Spread]) -> tuple[str, Spread]:
    """The fastest way by median: its name and its bytes per second."""
    name = min(measured, key=lambda way: measured[way].median)
    return name, measured[name].per(1.0)
