"""Steps on so many ranks, measured: what each rank computes, sends, waits for and holds.

Every rank has its rows of some square matrices, as fully_shard would leave them: DTensors, on one
rank plain tensors. The closure writes a quadratic's gradient, and is timed apart; on minibatches
the quadratic has another slope at every call. All optimizers take their turns in each round, in an
order that is the same on all ranks.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import fuse_ext
from benchmarks.harness import limits
from benchmarks.harness.memory_case import tensor_bytes
from tests.cases.collectives import Calls
from tests.cases.rank_cases import on_ranks

PAIRS = 10
SWITCH = 3
# Steps of a repeat: after as many the bases of the living metric are renewed.
STEPS = 10
# Before them: L-BFGS fills its history, matrices of the living metric get their bases.
WARM = 40
SMALL, LARGE = 1, 2**17  # float64 numbers of the all-reduces that latency and bandwidth are from

_ITERATION = {"max_iter": 1, "history_size": PAIRS, "tolerance_grad": 0.0, "tolerance_change": 0.0}
_PV = partial(fuse_ext.FusePV, lr=1e-3)
_OURS = partial(fuse_ext.LBFGS, lr=1e-2, **_ITERATION)
# name -> (how it is made, whether every call is another batch)
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], bool]] = {
    "torch.optim.AdamW(fused=True)": (partial(torch.optim.AdamW, lr=1e-3, fused=True), True),
    "FusePV, Adam phase": (partial(_PV, switch=10**9), True),
    "living metric, diagonal": (partial(_PV, switch=SWITCH, metric="diagonal"), True),
    # As by default, but that gradients drawn at random are not worth having bases for.
    "living metric": (partial(_PV, switch=SWITCH, metric="kronecker"), True),
    "L-BFGS, float32 rows": (_OURS, False),
    "L-BFGS, bfloat16 rows": (partial(_OURS, history_dtype=torch.bfloat16), False),
    "L-BFGS, int8 rows": (partial(_OURS, history_dtype=torch.int8), False),
    "torch.optim.LBFGS": (partial(torch.optim.LBFGS, lr=1e-2, **_ITERATION), False),
}
if hasattr(torch.optim, "Muon"):  # torch >= 2.9
    OPTIMIZERS["torch.optim.Muon"] = (partial(torch.optim.Muon, lr=1e-3), True)

# Where FusePV has to be all the while.
PHASES = {
    "FusePV, Adam phase": "adam",
    "living metric, diagonal": "lbfgs, diagonal",
    "living metric": "lbfgs, kronecker",
}


def shares(size: int, matrices: int, side: int) -> list[nn.Parameter]:
    """This rank's rows of the matrices; DTensors where there are several ranks."""
    torch.manual_seed(0)
    whole = [torch.randn(side, side) / side for _ in range(matrices)]
    if size == 1:
        return [nn.Parameter(matrix) for matrix in whole]
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    return [nn.Parameter(distribute_tensor(matrix, mesh, [Shard(0)])) for matrix in whole]


def here(tensor: Any) -> Tensor:
    """What of a tensor lies on this rank."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Problem:
    """f(x) = sum_i (D_i x_i^2 / 2 + b_i x_i), with b = 0 or another one at every call.

    Args:
        params: Of this optimizer alone.
        batches: Whether b changes.

    Attributes:
        wall, cpu: Seconds inside the closure so far, and those that this thread computed.
    """

    def __init__(self, params: list[nn.Parameter], batches: bool) -> None:
        self.params, self.wall, self.cpu, self.calls = params, 0.0, 0.0, 0
        self._x = [here(p.detach()) for p in params]
        torch.manual_seed(1)
        self._curvature = [torch.rand_like(x).mul_(-9).exp_() for x in self._x]
        self._slopes = [[torch.randn_like(x).mul_(1e-3) for x in self._x] for _ in range(3)]
        self._batches = batches
        # Two sets take turns, as after zero_grad(set_to_none=True).
        self._grads = [[torch.empty_like(p) for p in params] for _ in range(2)]

    @torch.no_grad()
    def closure(self) -> Tensor:
        """The loss, of which every rank returns the mean's share."""
        wall, cpu = time.perf_counter(), time.thread_time()
        self.calls += 1
        loss = torch.zeros(())
        slopes, grads = self._slopes[self.calls % 3], self._grads[self.calls % 2]
        for i, (param, x, slope) in enumerate(zip(self.params, self._x, slopes, strict=True)):
            grad = here(grads[i])
            torch.mul(self._curvature[i], x, out=grad)
            loss += 0.5 * torch.dot(grad.view(-1), x.view(-1))
            if self._batches:
                grad.add_(slope)
                loss += torch.dot(slope.view(-1), x.view(-1))
            param.grad = grads[i]
        loss *= dist.get_world_size()
        self.wall += time.perf_counter() - wall
        self.cpu += time.thread_time() - cpu
        return loss


class Case:
    """An optimizer on its own copy of the problem."""

    def __init__(self, name: str, params: list[nn.Parameter]) -> None:
        make, batches = OPTIMIZERS[name]
        self.name, self.problem, self.optimizer = name, Problem(params, batches), make(params)
        self._closure: Callable[[], Any] = self.problem.closure

    def step(self) -> None:
        """One step."""
        self.optimizer.step(self._closure)

    def repeat(self) -> tuple[float, float]:
        """Seconds a step outside the closure: passed, and computed by this thread."""
        dist.barrier()
        inside = self.problem.wall, self.problem.cpu
        wall, cpu = time.perf_counter(), time.thread_time()
        for _ in range(STEPS):
            self.step()
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        return (
            (wall - (self.problem.wall - inside[0])) / STEPS,
            (cpu - (self.problem.cpu - inside[1])) / STEPS,
        )

    def listen(self) -> dict[str, Any]:
        """What it sends in as many steps: calls, bytes, the largest call, seconds; a step."""
        calls = Calls()
        closure = self._closure

        def unheard() -> Any:
            calls.listens = False
            try:
                return closure()
            finally:
                calls.listens = True

        dist.barrier()
        self._closure = unheard
        with calls:
            for _ in range(STEPS):
                self.step()
        self._closure = closure
        sizes = [call.nbytes for call in calls.heard]
        return {
            "calls": len(sizes) / STEPS,
            "bytes": sum(sizes) / STEPS,
            "largest_call": max(sizes, default=0),
            "kinds": sorted({call.name for call in calls.heard}),
            "collective_seconds": calls.seconds / STEPS,
            "ops": calls.ops / STEPS,
        }

    def state_bytes(self) -> int:
        """Bytes of state on this rank, each memory once."""
        return tensor_bytes(_local(dict(self.optimizer.state)), {})

    def phase(self) -> str:
        """Where FusePV is, and in which metric; empty for others."""
        if not isinstance(self.optimizer, fuse_ext.FusePV):
            return ""
        curvature = self.optimizer.report().curvature
        return f"{self.optimizer.phase}, {curvature}" if curvature else self.optimizer.phase


def _local(value: Any) -> Any:
    if isinstance(value, Tensor):
        return here(value)
    if isinstance(value, dict):
        return {key: _local(entry) for key, entry in value.items()}
    return [_local(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def measure(rank: int, folder: str, matrices: int, side: int, rounds: int) -> dict[str, Any]:
    """One rank's figures; see :func:`on_so_many`."""
    size = dist.get_world_size()
    cases, failed = {}, {}
    for name in OPTIMIZERS:
        case = Case(name, shares(size, matrices, side))
        try:
            for _ in range(WARM):
                case.step()
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            # The same on all ranks: it knows no DTensors.
            failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        cases[name] = case
    numel = sum(x.numel() for x in map(here, shares(size, matrices, side)))
    found: dict[str, dict[str, Any]] = {
        name: {"wall": [], "cpu": [], **case.listen()} for name, case in cases.items()
    }
    rows = torch.ones(2 * PAIRS + 2, max(numel, 1))
    vectors = [torch.ones(numel) for _ in range(4)]
    ways = {"read": limits.reading(rows), "update": limits.updating(vectors, "vectors")}
    bandwidth: dict[str, list[float]] = {"read": [], "update": []}
    square = torch.randn(side, side)
    product: list[float] = []
    latency: dict[int, list[float]] = {SMALL: [], LARGE: []}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        order = list(cases)
        shuffle(order)
        for name in order:
            wall, cpu = cases[name].repeat()
            found[name]["wall"].append(wall)
            found[name]["cpu"].append(cpu)
        for kind, some in ways.items():
            dist.barrier()
            bandwidth[kind].append(1.0 / min(way() for way in some.values()))
        mine = square[: max(1, side // size)]
        start = time.thread_time()
        for _ in range(5):
            mine @ square
        spent = (time.thread_time() - start) / 5
        product.append(2 * mine.numel() * side / max(spent, 1e-9))
        for numbers, seconds in latency.items():
            seconds.append(all_reduce_seconds(numbers) if size > 1 else 0.0)
    for name, case in cases.items():
        found[name] |= {"state_bytes": case.state_bytes()}
        if case.phase() != PHASES.get(name, ""):
            failed[name] = f"ended in the phase {case.phase()!r}"
            del found[name]
    return {
        "numel": numel,
        "optimizers": found,
        "failed": failed,
        # By the clock, which others' work slows: what is possible is what the best round has seen.
        "bandwidth": {kind: max(rates) for kind, rates in bandwidth.items()},
        "flops": statistics.median(product),
        "all_reduce": {str(8 * n): min(seconds) for n, seconds in latency.items()},
    }


def all_reduce_seconds(numbers: int, repeats: int = 10) -> float:
    """Of an all-reduce of so many float64 numbers."""
    vector = torch.zeros(numbers, dtype=torch.float64)
    dist.all_reduce(vector)
    start = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(vector)
    return (time.perf_counter() - start) / repeats


def on_so_many(ranks: int, matrices: int, side: int, rounds: int) -> list[dict[str, Any]]:
    """What every one of so many ranks has measured, on ``matrices`` of ``side`` x ``side``."""
    with tempfile.TemporaryDirectory() as folder:
        job = f"{__name__}:measure"
        return on_ranks(ranks, Path(folder), job, matrices, side, rounds)
