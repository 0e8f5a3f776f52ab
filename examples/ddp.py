"""FusePV under DistributedDataParallel: each rank has the whole model, and its rows of each batch.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py
    torchrun --standalone --nproc-per-node 2 examples/ddp.py --steps 400 --resume

Gradients are averaged before the optimizer sees them, but each rank has its own loss:
``process_group`` makes it step on their mean. Rank 0 saves.
"""

from __future__ import annotations

from typing import Any

import torch
from digits_on_ranks import arguments, begin, network, train
from torch import distributed as dist
from torch import nn

from fuse_ext import FusePV


def main() -> None:
    """Trains, perhaps from a checkpoint on."""
    args = arguments(__doc__ or "")
    device = begin()
    plain = network(device)
    model = nn.parallel.DistributedDataParallel(plain)
    optimizer = FusePV(model.parameters(), lr=2e-3, process_group=dist.group.WORLD)
    checkpoint, begun = args.out / "ddp.pt", 0
    if args.resume:
        saved = torch.load(checkpoint, map_location=device)
        plain.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begun = saved["step"]

    def state() -> dict[str, Any] | None:
        if dist.get_rank() > 0:
            return None
        return {"model": plain.state_dict(), "optimizer": optimizer.state_dict()}

    train(model, optimizer, device, args, checkpoint, begun, state)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
