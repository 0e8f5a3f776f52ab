"""Steps of all ranks together on every GPU of this machine, whose parameters must stay the same.

    python -m torch.distributed.run --standalone --nproc-per-node N -m benchmarks.harness.gpu_ranks

Each rank has other data. Collectives run over nccl (without GPUs gloo): DistributedDataParallel's
and ``fully_shard``'s, and our own, of a metric for minibatches, of L-BFGS with a line search, with
state whole, in shards under DDP, and of DTensors; and a checkpoint that is saved by
torch.distributed.checkpoint and resumed. Ends with an error, and says why, where ranks differ,
nothing was learnt, the phase is still the first, or what was resumed goes another way.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness.ranks import leave
from fuse_ext import FusePV, prepare_to_load

STEPS, SWITCH, MORE = 40, 10, 5
# Of two runs from one state: a GPU may add in another order.
RESUMED_GAP = 1e-6
SEARCH = {"deterministic": True, "curvature": "pairs"}


class Case(NamedTuple):
    """How the model is spread, and what the optimizer is told.

    Attributes:
        sharded: By ``fully_shard``, else DistributedDataParallel holds it.
        full: Whether every step is on all of a rank's data.
        options: Of the optimizer.
    """

    sharded: bool
    full: bool
    options: dict[str, Any]


CASES = {
    "minibatches": Case(False, False, {}),
    "a line search": Case(False, True, SEARCH),
    "state in shards": Case(False, False, {"shard_state": True}),
    "state in shards, a line search": Case(False, True, {**SEARCH, "shard_state": True}),
    "fully_shard": Case(True, False, {}),
    "fully_shard, a line search": Case(True, True, SEARCH),
}


def complaints(gap: float, first: float, last: float, phase: str) -> list[str]:
    """What is wrong.

    Args:
        gap: The largest difference between parameters on two ranks.
        first: The loss of the first step.
        last: That of the last one.
        phase: The optimizer's.
    """
    found = []
    if gap != 0.0:  # as NaN is
        found.append(f"parameters differ between ranks, by {gap:.3g}")
    if not last < 0.9 * first:
        found.append(f"the loss went from {first:.3g} to {last:.3g}")
    if phase != "lbfgs":
        found.append(f"the phase is {phase!r} after {STEPS} steps, where {SWITCH} should switch")
    return found


def largest_gap(flat: Tensor) -> float:
    """The largest difference between this rank's vector and another's; NaN where one has NaN."""
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return float(torch.stack([(flat - other).abs().max() for other in others]).max())


class Run:
    """A model and its optimizer on this rank.

    Args:
        case: Of which kind.
        device: Where.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(20, 65), nn.Tanh(), nn.Linear(65, 1)
        self.case, self.device = case, device
        self.model: nn.Module = nn.Sequential(*layers).to(device)
        group: Any = None
        if case.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
        else:
            ids = [device.index] if device.type == "cuda" else None
            self.model, group = DistributedDataParallel(self.model, ids), dist.group.WORLD
        told = {"switch": SWITCH, "process_group": group, **case.options}
        self.optimizer = FusePV(self.model.parameters(), 1e-2, **told)

    def step(self, number: int) -> Tensor:
        """A step on this rank's data of that number."""
        seed = 1 + dist.get_rank() + (0 if self.case.full else dist.get_world_size() * number)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 20, generator=generator).to(self.device)
        found: Tensor = self.optimizer.step(lambda: self.evaluate(x))
        return found

    def evaluate(self, x: Tensor) -> Tensor:
        """The loss on these points, and its gradients."""
        self.optimizer.zero_grad()
        loss: Tensor = (self.model(x) - x[:, :2].sum(1, keepdim=True).sin()).square().mean()
        loss.backward()
        return loss.detach()

    @property
    def flat(self) -> Tensor:
        """All parameters, shards put together."""
        wholes = [p.full_tensor() if self.case.sharded else p for p in self.model.parameters()]  # type: ignore[operator]
        return torch.cat([p.detach().view(-1) for p in wholes])


def train(case: Case, device: torch.device) -> tuple[Run, float, float, float]:
    """The run, the largest gap, and the first and the last loss."""
    run = Run(case, device)
    losses = [run.step(number) for number in range(STEPS)]
    return run, largest_gap(run.flat), float(losses[0]), float(losses[-1])


def resumed_gap(run: Run) -> float:
    """How far a run goes from one that was resumed from its checkpoint."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states

    place = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(place, device=run.device)
    saved = {
        "model": states.get_model_state_dict(run.model),
        "optimizer": states.get_optimizer_state_dict(run.model, run.optimizer),
    }
    checkpoint.save(saved, checkpoint_id=place[0])
    fresh = Run(run.case, run.device)
    reader = checkpoint.FileSystemReader(place[0])
    prepare_to_load(fresh.model, fresh.optimizer, reader.read_metadata())
    into = {
        "model": states.get_model_state_dict(fresh.model),
        "optimizer": states.get_optimizer_state_dict(fresh.model, fresh.optimizer),
    }
    checkpoint.load(into, storage_reader=reader)
    states.set_model_state_dict(fresh.model, into["model"])
    states.set_optimizer_state_dict(fresh.model, fresh.optimizer, into["optimizer"])
    for number in range(STEPS, STEPS + MORE):
        run.step(number)
        fresh.step(number)
    dist.barrier(device_ids=None if run.device.index is None else [run.device.index])
    if dist.get_rank() == 0:
        shutil.rmtree(place[0])
    return float((run.flat - fresh.flat).abs().max())


def main() -> None:
    """Joins the others; the exit code is how many things are wrong."""
    rank, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=120))
    wrong = []
    for name, case in CASES.items():
        run, gap, first, last = train(case, device)
        phase, told = run.optimizer.phase, ""
        found = complaints(gap, first, last, phase)
        if case.sharded:
            resumed = resumed_gap(run)
            told = f" resumed to {resumed:.3g},"
            if not resumed <= RESUMED_GAP:
                found.append(f"what was resumed goes another way, by {resumed:.3g}")
        wrong += [f"{name}: {complaint}" for complaint in found]
        if dist.get_rank() == 0:
            print(
                f"{dist.get_world_size()} ranks, {dist.get_backend()}: phase {phase}, {name}, "
                f"loss {first:.3g} to {last:.3g},{told} largest difference {gap:.3g}"
            )
    if dist.get_rank() == 0:
        print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    leave(len(wrong))


if __name__ == "__main__":
    main()
