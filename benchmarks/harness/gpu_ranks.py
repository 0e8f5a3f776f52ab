"""Data-parallel steps on every GPU of this machine, whose parameters must stay the same.

    python -m torch.distributed.run --standalone --nproc-per-node N -m benchmarks.harness.gpu_ranks

Each rank has other data; DistributedDataParallel averages the gradients (nccl, without GPUs gloo),
and FusePV goes from Adam to its second phase. Ends with an error, and says why, where ranks differ,
nothing was learnt or the phase is still the first.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness.ranks import leave
from fuse_ext import FusePV

STEPS, SWITCH = 40, 10


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


def largest_gap(flat: torch.Tensor) -> float:
    """The largest difference between this rank's vector and another's; NaN where one has NaN."""
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    return float(torch.stack([(flat - other).abs().max() for other in others]).max())


def train(device: torch.device) -> tuple[float, float, float, str]:
    """The largest gap, the first and the last loss, and the phase."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
    model = DistributedDataParallel(
        torch.nn.Sequential(*layers).to(device),
        device_ids=[device.index] if device.type == "cuda" else None,
    )
    optimizer = FusePV(model.parameters(), 1e-2, switch=SWITCH)
    torch.manual_seed(1 + dist.get_rank())
    first = last = torch.zeros(())
    for step in range(STEPS):
        x = torch.randn(64, 20, device=device)

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - x[:, :2].sum(1, keepdim=True).sin()).square().mean()
            loss.backward()
            return loss.detach()

        last = optimizer.step(closure)
        first = last if step == 0 else first
    gap = largest_gap(torch.cat([p.detach().view(-1) for p in model.parameters()]))
    return gap, float(first), float(last), optimizer.phase


def main() -> None:
    """Joins the others; the exit code is how many things are wrong."""
    rank, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=120))
    gap, first, last, phase = train(device)
    wrong = complaints(gap, first, last, phase)
    if dist.get_rank() == 0:
        print(
            f"{dist.get_world_size()} ranks, {dist.get_backend()}: phase {phase}, "
            f"loss {first:.3g} to {last:.3g}, largest difference {gap:.3g}"
        )
        print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    leave(len(wrong))


if __name__ == "__main__":
    main()
