"""FusePV under fully_shard (FSDP2): each rank has its shards of the model, and of all state.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py
    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --steps 400 --resume

Nothing has to be said of ranks: the parameters know theirs. Each rank saves its own part, for as
many ranks; docs/large-models.md says how another number of them goes on.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from digits_on_ranks import arguments, network, on_ranks, train
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fuse_ext import FusePV


def run(device: torch.device, args: argparse.Namespace) -> None:
    """Trains, perhaps from a checkpoint on."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = network(device)
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = FusePV(model.parameters(), lr=2e-3)
    checkpoint, begun = args.out / f"fsdp2_{dist.get_rank()}.pt", 0
    if args.resume:
        saved = torch.load(checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begun = saved["step"]

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    train(model, optimizer, device, args, checkpoint, begun, state)


if __name__ == "__main__":
    on_ranks(run, arguments(__doc__ or ""))
