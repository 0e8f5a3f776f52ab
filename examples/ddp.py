"""FusePV under DistributedDataParallel: each rank has the whole model, and its rows of each batch.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py
    torchrun --standalone --nproc-per-node 2 examples/ddp.py --steps 400 --resume
    torchrun --standalone --nproc-per-node 2 examples/ddp.py --shard-state

Gradients are averaged before the optimizer sees them, but each rank has its own loss:
``process_group`` makes it step on their mean. Rank 0 saves; with ``--shard-state``, where each rank
holds the state of its rows of the parameters alone, every rank its own part.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from digits_on_ranks import arguments, network, on_ranks, train
from torch import distributed as dist
from torch import nn

from fuse_ext import FusePV


def run(device: torch.device, args: argparse.Namespace) -> None:
    """Trains, perhaps from a checkpoint on."""
    plain = network(device)
    model = nn.parallel.DistributedDataParallel(plain)
    optimizer = FusePV(
        model.parameters(), lr=2e-3, process_group=dist.group.WORLD, shard_state=args.shard_state
    )
    part = f"_{dist.get_rank()}" if args.shard_state else ""
    checkpoint, begun = args.out / f"ddp{part}.pt", 0
    if args.resume:
        saved = torch.load(checkpoint, map_location=device)
        plain.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begun = saved["step"]

    def state() -> dict[str, Any] | None:
        if dist.get_rank() > 0 and not args.shard_state:
            return None
        return {"model": plain.state_dict(), "optimizer": optimizer.state_dict()}

    train(model, optimizer, device, args, checkpoint, begun, state)


if __name__ == "__main__":
    on_ranks(run, arguments(__doc__ or "", shards=True))
