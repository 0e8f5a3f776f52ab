"""What ddp.py and fsdp2.py share: scikit-learn's digits, a network, and the training loop.

Each rank sees its own rows of every batch. The optimizer steps on numbers of all ranks, so that
their parameters stay the same to the last bit, which the end of a run looks at.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import cross_entropy

from fuse_ext import FusePV

BATCH = 128  # of all ranks together


def arguments(description: str, shards: bool = False) -> argparse.Namespace:
    """The options of both; ``shards``: also the one of plain parameters."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=200, help="until which step to train")
    parser.add_argument("--full", action="store_true", help="every step on all images")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    if shards:
        parser.add_argument("--shard-state", action="store_true", help="a share of it on each rank")
    default = Path(__file__).parent / "out"
    parser.add_argument("--out", type=Path, default=default, help="folder for checkpoints")
    return parser.parse_args()


def begin() -> torch.device:
    """Joins the other processes that torchrun has started."""
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    if not cuda:
        torch.set_num_threads(1)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def on_ranks(
    job: Callable[[torch.device, argparse.Namespace], None], args: argparse.Namespace
) -> None:
    """Does the job together with the others, and leaves with them.

    At once, past Python's own end: DistributedDataParallel keeps the group, whose threads would
    abort the process where one still lets go of a tensor while Python ends.
    """
    job(begin(), args)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def network(device: torch.device) -> nn.Module:
    """A perceptron of 8 x 8 pixels to 10 digits, with the same weights on all ranks."""
    torch.manual_seed(0)
    layers = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    return nn.Sequential(*layers).to(device)


def train(
    model: nn.Module,
    optimizer: FusePV,
    device: torch.device,
    args: argparse.Namespace,
    checkpoint: Path,
    begun: int,
    state: Callable[[], dict[str, Any] | None],
) -> None:
    """Trains from step ``begun`` on, writes a checkpoint, and tells what came of it.

    ``state`` gives what this rank saves to ``checkpoint``; None where another does.
    """
    images, digits = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32, device=device)
    y = torch.tensor(digits, device=device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    usable = len(x) // ranks * ranks  # as many rows for each: their mean is the mean of means
    value = torch.zeros(())
    for step in range(begun, args.steps):
        order = torch.randperm(usable, generator=torch.Generator().manual_seed(step))
        batch = torch.arange(usable) if args.full else order[: BATCH // ranks * ranks]
        mine = batch[rank::ranks].to(device)

        def closure(mine: Tensor = mine) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x[mine]), y[mine])
            loss.backward()
            return loss.detach()

        value = optimizer.step(closure)
        if rank == 0 and (step % 50 == 49 or step + 1 == args.steps):
            print(f"step {step + 1}: loss {float(value):.4f} on rank 0, {optimizer.phase}")
    if (saved := state()) is not None:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": args.steps, **saved}, checkpoint)
    report = optimizer.report()
    weights = sum(local_part(param).numel() for param in model.parameters())
    total = sum(param.numel() for param in model.parameters())
    told: list[Any] = [None] * ranks
    digest = float(full_parameters(model).double().sum())
    known = digest, report.adam_steps, report.lbfgs_iterations, report.evaluations
    dist.all_gather_object(told, (weights, report.state_bytes, known, float(value)))
    if rank == 0:
        for which, (numel, nbytes, _, loss) in enumerate(told):
            print(
                f"rank {which}: {numel:,} of {total:,} parameters, {nbytes:,} bytes of state, "
                f"last loss {loss:.4f}"
            )
        print("all ranks agree:", len({known for _, _, known, _ in told}) == 1)
        print(f"metric or curvature: {report.curvature}; stopped for: {report.stop_reason}")


def local_part(param: Tensor) -> Tensor:
    """What of a parameter lies on this rank."""
    return param.to_local() if hasattr(param, "to_local") else param


def full_parameters(model: nn.Module) -> Tensor:
    """All parameters, put together."""
    parts = []
    for param in model.parameters():
        whole = param.full_tensor() if hasattr(param, "full_tensor") else param
        parts.append(whole.detach().reshape(-1))
    return torch.cat(parts)
