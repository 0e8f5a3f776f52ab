"""How long a kernel takes on a GPU, by what may bind it: a model, never measured.

A pass over vectors takes as long as the slowest of these:

- bandwidth: its bytes over what a plain copy reaches;
- bytes in flight: a multiprocessor that has fewer bytes under way than hide the memory's latency
  gets a share of its bandwidth;
- waves: what goes for the last, partly empty wave of blocks, or for a grid that is no wave;
- issue slots: instructions of all warps over four a clock and multiprocessor;
- float64: its instructions, on units of which a consumer GPU has few.

Numbers of kernels are those of the machine code, which tests/cuda/test_cuda_build.py looks up
(tests/cuda/cuda_static.py counts registers and the instructions of a round), and of the grids in
csrc/cuda/launch.cuh.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

THREADS, WARPS = 128, 4  # of a block
MOST_BLOCKS, MOST_LIGHT_BLOCKS = 1_024, 8_192
FILL, LEAST_PAIRS, MOST_SLICES = 512, 8, 64
SHARED_BYTES = 48 * 1024
SLOTS_A_CLOCK = 4  # instructions of a multiprocessor, one for each of its schedulers
REGISTERS = 65_536  # of a multiprocessor


@dataclass(frozen=True)
class Gpu:
    """A GPU as the model sees it.

    Attributes:
        name: Its name.
        code: The architecture whose machine code it runs here.
        processors: Multiprocessors.
        clock: Cycles a second.
        bandwidth: Bytes a second that a copy reaches.
        in_flight: Bytes that a multiprocessor must have under way for that (about: CUB's tuning has
            32 KiB for an H100 and 12 KiB where it knows nothing better).
        threads: That fit onto a multiprocessor.
        float32_lanes: Of a multiprocessor; each multiplies and adds once a clock.
        float64_lanes: Likewise.
    """

    name: str
    code: str
    processors: int
    clock: float
    bandwidth: float
    in_flight: float
    threads: int
    float32_lanes: int
    float64_lanes: int


H100 = Gpu("H100 SXM", "sm_90", 132, 1.755e9, 3.0e12, 32 * 1024, 2048, 128, 64)
RTX4090 = Gpu("RTX 4090", "sm_80", 128, 2.52e9, 0.93e12, 12 * 1024, 1536, 128, 2)
GPUS = (H100, RTX4090)

# Seconds: a launch by the host (captured ones cost the device LAUNCH_GAP), a wait with its copy,
# the two chains at the end of a sum, a step of the recursion in shared memory and in the cache.
LAUNCH, LAUNCH_GAP, WAIT, SUM_END = 4e-6, 1.5e-6, 10e-6, 3e-6
RECURSION, LONG_RECURSION = 0.25e-6, 0.6e-6
MOST_STAGED_SLOTS = 52  # whose scalars lie in shared memory


@dataclass(frozen=True)
class Kernel:
    """A pass over vectors, on float32 parameters.

    Attributes:
        elements: That a warp takes at a time.
        flight: Bytes that a thread has under way before it waits for the first of them.
        registers: Of a thread, by architecture.
        slots: Instructions a round of a warp, by architecture.
        float64: Of them those in float64.
        most: Blocks at most.
    """

    elements: int
    flight: int
    registers: dict[str, int]
    slots: dict[str, int]
    float64: int
    most: int = MOST_LIGHT_BLOCKS


# The keys are those of cuda_static.py; ACCESSES of a round are what its instructions are found by.
KERNELS = {
    "adam<float, f32, no>": Kernel(
        128, 64, {"sm_80": 68, "sm_90": 74}, {"sm_80": 278, "sm_90": 311}, 2
    ),
    "adam<float, bf16, no>": Kernel(
        128, 48, {"sm_80": 66, "sm_90": 74}, {"sm_80": 369, "sm_90": 401}, 2
    ),
    "stats<float>": Kernel(512, 64, {"sm_80": 90, "sm_90": 84}, {"sm_80": 224, "sm_90": 234}, 4),
    "move<float>": Kernel(512, 128, {"sm_80": 80, "sm_90": 78}, {"sm_80": 115, "sm_90": 120}, 0),
    "copy<float, yes>": Kernel(512, 64, {"sm_80": 56, "sm_90": 56}, {"sm_80": 79, "sm_90": 84}, 0),
    # Of the passes over the history: a round over one pair (narrow rows: two).
    "update<float, f32>": Kernel(
        512, 128, {"sm_80": 168, "sm_90": 165}, {"sm_80": 189, "sm_90": 181}, 2, MOST_BLOCKS
    ),
    "update<float, bf16>": Kernel(
        512, 128, {"sm_80": 159, "sm_90": 158}, {"sm_80": 225, "sm_90": 230}, 4, MOST_BLOCKS
    ),
    "update<float, i8>": Kernel(
        512, 64, {"sm_80": 168, "sm_90": 167}, {"sm_80": 370, "sm_90": 370}, 4, MOST_BLOCKS
    ),
    "direction<float, f32>": Kernel(
        512, 128, {"sm_80": 168, "sm_90": 164}, {"sm_80": 131, "sm_90": 168}, 0, MOST_BLOCKS
    ),
    "direction<float, bf16>": Kernel(
        512, 128, {"sm_80": 168, "sm_90": 168}, {"sm_80": 149, "sm_90": 183}, 0, MOST_BLOCKS
    ),
    "direction<float, i8>": Kernel(
        512, 64, {"sm_80": 168, "sm_90": 168}, {"sm_80": 305, "sm_90": 314}, 0, MOST_BLOCKS
    ),
}
# Accesses of 128, 64 and 32 bits and narrower that make up a round.
ACCESSES = {
    "adam<float, f32, no>": (7, 0, 0, 0),
    "adam<float, bf16, no>": (3, 4, 0, 0),
    "stats<float>": (4, 0, 0, 0),
    "move<float>": (16, 0, 0, 0),
    "copy<float, yes>": (8, 0, 0, 0),
    "update<float, f32>": (8, 0, 0, 0),
    "update<float, bf16>": (8, 0, 0, 0),
    "update<float, i8>": (0, 8, 8, 0),
    "direction<float, f32>": (8, 0, 0, 0),
    "direction<float, bf16>": (8, 0, 0, 0),
    "direction<float, i8>": (0, 8, 8, 0),
}
# A tile's part that does not belong to a pair, in rounds of one.
OUTER_ROUNDS = 2.0


@dataclass(frozen=True)
class Time:
    """Seconds, and what binds."""

    seconds: float
    bound: str


def blocks_at_once(gpu: Gpu, kernel: Kernel, shared_bytes: int = 0) -> int:
    """Blocks that a multiprocessor holds."""
    registers = ceil(kernel.registers[gpu.code] / 8) * 8 * THREADS
    fit = min(REGISTERS // registers, gpu.threads // THREADS)
    return min(fit, 200 * 1024 // (shared_bytes + 1024)) if gpu.code == "sm_90" else fit


def flight_of(gpu: Gpu, kernel: Kernel) -> int:
    """Bytes under way on a multiprocessor that is full."""
    return blocks_at_once(gpu, kernel) * THREADS * kernel.flight


def pass_time(
    gpu: Gpu, name: str, numel: int, bytes_moved: float, rounds: float = 1.0, blocks: int = 0
) -> Time:
    """One launch.

    Args:
        gpu: Where.
        name: Of ``KERNELS``.
        numel: Parameters.
        bytes_moved: By all of it.
        rounds: Per tile.
        blocks: Of the grid; 0 for those of a plain one.
    """
    kernel = KERNELS[name]
    tiles = ceil(numel / kernel.elements)
    blocks = blocks or max(1, min(kernel.most, ceil(tiles / WARPS)))
    at_once = blocks_at_once(gpu, kernel) * gpu.processors
    waves, rest = divmod(blocks, at_once)
    flight = flight_of(gpu, kernel)

    def efficiency(share: float) -> float:
        return min(1.0, share * flight / gpu.in_flight)

    plain = bytes_moved / gpu.bandwidth
    memory = plain * (waves * at_once / blocks) / efficiency(1.0)
    if rest:
        memory += plain * (rest / blocks) / efficiency(rest / at_once)
    used = gpu.processors * min(1.0, blocks / gpu.processors)
    clocks = used * gpu.clock
    issue = tiles * rounds * kernel.slots[gpu.code] / (clocks * SLOTS_A_CLOCK)
    float64 = tiles * rounds * kernel.float64 * 32 / (clocks * gpu.float64_lanes)
    bounds = {"issue slots": issue, "float64": float64, "bandwidth": plain}
    if efficiency(1.0) < 1.0:
        bounds["bytes in flight"] = memory
    elif memory > 1.05 * plain:
        bounds["waves" if waves else "few blocks"] = memory
    else:
        bounds["bandwidth"] = memory
    bound = max(bounds, key=lambda key: bounds[key])
    return Time(bounds[bound], bound)


def slices(pairs: int, numel: int) -> tuple[int, int]:
    """Slices of the pairs, and blocks of each, as csrc/cuda/shares.cuh divides a pass."""
    tiles = ceil(numel / 512)
    columns = max(1, min(MOST_BLOCKS, ceil(tiles / WARPS)))
    count = max(1, min(FILL // columns, pairs // LEAST_PAIRS, MOST_SLICES))
    return count, columns


def products(gpu: Gpu, operations: float) -> Time:
    """Products of matrices in float32, a multiplication and an addition being two operations."""
    return Time(operations / (2 * gpu.processors * gpu.float32_lanes * gpu.clock), "products")


def matrix_pass(gpu: Gpu, bytes_moved: float, float64: float) -> Time:
    """A pass over a dense matrix: its bytes, or its instructions in float64."""
    plain = Time(bytes_moved / gpu.bandwidth, "bandwidth")
    issue = Time(float64 / (gpu.processors * gpu.float64_lanes * gpu.clock), "float64")
    return max(plain, issue, key=lambda time: time.seconds)


def recursion(pairs: int) -> Time:
    """lbfgs_two_loop or lbfgs_decide: two steps a pair, each waiting for the one before."""
    long = pairs + 1 > MOST_STAGED_SLOTS
    return Time(2 * pairs * (LONG_RECURSION if long else RECURSION), "recursion")


def whole(parts: list[Time], launches: int, waits: int, captured: bool) -> Time:
    """A step of these launches: the device's time, or the host's where that is longer."""
    device = sum(part.seconds for part in parts) + launches * LAUNCH_GAP
    host = 0.0 if captured else launches * LAUNCH
    longest = max(parts, key=lambda part: part.seconds)
    seconds = max(device, host) + waits * WAIT
    if host > device or launches * LAUNCH_GAP > 0.5 * device:
        return Time(seconds, "waits" if waits * WAIT > host else "launches")
    return Time(seconds, "waits" if waits * WAIT > device else longest.bound)
