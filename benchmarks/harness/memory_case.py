"""One optimizer in a process of its own: what its memory really is (Linux).

The resident set and its peak are the system's own figures. They follow every allocation if glibc
was told so (MALLOC_MMAP_THRESHOLD_) before the process began.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fuse_ext
from benchmarks.harness.workloads import Quadratic, split

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SMALL = 10**4  # of the rehearsal
# Options that a case holds by name, as "torch.bfloat16".
DTYPE_OPTIONS = {"history_dtype", "moment_dtype"}
# With a fixed step, so short that the run does not end; with a search, so short that the search
# goes on past a first good trial, the case that needs most memory.
LR = {False: 1e-3, True: 0.05}


def resident(peak: bool = False) -> int:
    """Bytes resident now, or at most since :func:`forget_peak`."""
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


def forget_peak() -> None:
    """The peak is measured from here."""
    CLEAR.write_text("5")


def make(spec: dict[str, Any], params: list[Any]) -> torch.optim.Optimizer:
    """The optimizer of a case."""
    library, _, name = spec["optimizer"].rpartition(".")
    options = {
        key: getattr(torch, value.removeprefix("torch.")) if key in DTYPE_OPTIONS else value
        for key, value in spec.get("options", {}).items()
    }
    if name == "LBFGS":
        searched = options.get("line_search_fn") is not None
        options = {
            "lr": LR[searched],
            "max_iter": 1,
            "max_eval": 25,
            "tolerance_grad": 0.0,
            "tolerance_change": 0.0,
            "history_size": 10,
            **options,
        }
    else:
        options = {"lr": 1e-3, **options}
    module = torch.optim if library == "torch.optim" else fuse_ext
    kind: Callable[..., torch.optim.Optimizer] = getattr(module, name)
    return kind(params, **options)


def tensor_bytes(value: Any, seen: dict[int, int]) -> int:
    """Bytes of all storages in a state, each once."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        for entry in value.values():
            tensor_bytes(entry, seen)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            tensor_bytes(entry, seen)
    return sum(seen.values())


def measure(spec: dict[str, Any]) -> dict[str, int]:
    """Runs one case.

    Args:
        spec: optimizer, numel, tensors, options, and after: steps before the one measured.

    Returns:
        Bytes: state (of the tensors in ``optimizer.state``), held (how much the resident set
        grew since before the optimizer was made) and peak (the same at the worst moment of a
        step); and evaluations a step.
    """
    problem = Quadratic(split(spec["numel"], spec["tensors"]))
    problem.closure()
    problem.closure()  # both sets of gradients are in memory
    gc.collect()
    before = resident()
    optimizer = make(spec, problem.params)
    for _ in range(spec["after"]):
        optimizer.step(problem.closure)
    gc.collect()
    held = resident() - before
    forget_peak()
    problem.calls = 0
    optimizer.step(problem.closure)
    return {
        "state": tensor_bytes(dict(optimizer.state), {}),
        "held": held,
        "peak": resident(peak=True) - before,
        "evaluations": problem.calls,
    }


def rehearse_and_measure(spec: dict[str, Any]) -> tuple[dict[str, int], float]:
    """:func:`measure` after a rehearsal in small, and the CPU seconds of both.

    What torch loads on first use is not counted then.
    """
    torch.set_num_threads(1)
    measure({**spec, "numel": SMALL})
    return measure(spec), time.process_time()
