"""Data-parallel steps on every GPU of this machine, whose parameters must stay the same.

    python -m torch.distributed.run --standalone --nproc-per-node N -m benchmarks.harness.gpu_ranks

Each rank has other data; DistributedDataParallel averages the gradients (nccl, without GPUs gloo),
and FusePV goes from Adam to its second phase. Ends with an error where ranks differ.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fuse_ext import FusePV

STEPS, SWITCH = 40, 10


def main() -> int:
    rank, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=120))
    try:
        torch.manual_seed(0)
        layers = torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1)
        model = DistributedDataParallel(
            torch.nn.Sequential(*layers).to(device), device_ids=[rank] if cuda else None
        )
        optimizer = FusePV(model.parameters(), 1e-2, switch=SWITCH)
        torch.manual_seed(1 + rank)
        first = last = torch.zeros(())
        for step in range(STEPS):
            x = torch.randn(64, 20, device=device)

            def closure(x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss = (model(x) - x.sum(1, keepdim=True).sin()).square().mean()
                loss.backward()
                return loss.detach()

            last = optimizer.step(closure)
            first = last if step == 0 else first
        flat = torch.cat([p.detach().view(-1) for p in model.parameters()])
        others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(others, flat)
        gap = max(float((flat - other).abs().max()) for other in others)
        if rank == 0:
            print(
                f"{dist.get_world_size()} ranks, {dist.get_backend()}: phase {optimizer.phase}, "
                f"loss {float(first):.3g} to {float(last):.3g}, largest difference {gap:.3g}"
            )
        return int(gap > 0.0)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
