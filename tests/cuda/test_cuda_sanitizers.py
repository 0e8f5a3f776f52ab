"""The host execution model under sanitizers: it catches faults, and our kernels have none.

cuda_sim/faults.cu plants one fault at a time in a small kernel of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from cuda_sim import library

pytestmark = pytest.mark.skipif(
    bool(library.why_not()) or "FUSE_EXT_CUDA_SIM" in os.environ,
    reason=library.why_not() or "already under a sanitizer",
)

# What finds a fault, and what it says.
FAULTS = {
    "bound_off_by_one": ("asan", "AddressSanitizer: heap-buffer-overflow"),
    "tail_read_as_vector": ("asan", "AddressSanitizer: heap-buffer-overflow"),
    "shared_overrun": ("asan", "AddressSanitizer: heap-buffer-overflow"),
    "misaligned_vector": ("asan", "misaligned address"),
    "missing_barrier": ("tsan", "ThreadSanitizer: data race"),
    "missing_syncwarp": ("tsan", "ThreadSanitizer: data race"),
    "missing_release": ("tsan", "ThreadSanitizer: data race"),
    "missing_acquire": ("tsan", "ThreadSanitizer: data race"),
    "counter_not_reset": ("plain", "expected 3601, counter 3"),
    "uninitialised_shared": ("plain", "nan, expected 3601"),
    "divergent_barrier": ("plain", "thread 0 waits at the barrier faults.cu"),
    "thread_leaves_early": ("plain", "but thread 5 has ended"),
    "missing_lane": ("plain", "but thread 3 waits at the barrier"),
}
# A wrong order also gives wrong sums, in some order.
WRONG_IN_SOME_SCHEDULE = ("missing_barrier", "missing_syncwarp")


def run_fault(variant: str, name: str) -> tuple[int, str]:
    environment = library.sanitized_environment(variant)
    del environment["LD_PRELOAD"]  # the program is linked with its sanitizer
    done = subprocess.run(
        [str(library.build_faults(variant)), name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("variant", library.SANITIZERS)
def test_a_correct_kernel_passes(variant: str) -> None:
    code, output = run_fault(variant, "none")
    assert code == 0, output
    assert output.count("sum 3601, expected 3601, counter 0") == len(library.ORDERS)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_planted_fault_is_caught(fault: str) -> None:
    variant, message = FAULTS[fault]
    code, output = run_fault(variant, fault)
    assert code != 0
    assert message in output, output


@pytest.mark.parametrize("fault", WRONG_IN_SOME_SCHEDULE)
def test_the_schedules_differ(fault: str) -> None:
    code, output = run_fault("plain", fault)
    assert code == 1, output
    assert "sum 3601," in output, "right in one schedule, wrong in another"


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_our_kernels_are_clean(variant: str) -> None:
    library.build(variant)
    tests = ["test_cuda_sim.py", "test_cuda_sim_dense.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=library.HERE.parent,
        env=library.sanitized_environment(variant),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
