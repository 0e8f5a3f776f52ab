"""Training on several processes: models spread in every way, and ways of stepping on them.

A worker runs all cases it is given, one after the other, and saves what each rank has come to;
the same functions train in one process on all data (``rank`` None).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from benchmarks.harness.ranks import leave
from fuse_ext import LBFGS, Adam, Fuse, FusePV
from fuse_ext.vector.ranks import Ranks

ROWS, BATCH = 48, 12  # both divisible by the ranks
STEPS = 30

# name -> (optimizer, options, whether each step is on all data)
MODES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "adam": (Adam, {"lr": 1e-2}, False),
    "lbfgs fixed": (LBFGS, {"lr": 0.2, "max_iter": 1, "history_size": 5}, True),
    "lbfgs search": (LBFGS, {"line_search_fn": "strong_wolfe", "max_iter": 2}, True),
    "lbfgs armijo bf16": (
        LBFGS,
        {"line_search_fn": "armijo", "max_iter": 1, "history_dtype": torch.bfloat16},
        True,
    ),
    "lbfgs int8": (
        LBFGS,
        {"line_search_fn": "strong_wolfe", "max_iter": 1, "history_dtype": torch.int8},
        True,
    ),
    "broyden": (
        LBFGS,
        {
            **{"line_search_fn": "strong_wolfe", "max_iter": 1, "deterministic": True},
            **{"history_size": 6, "self_scaling": True, "update": "broyden"},
        },
        True,
    ),
    "pairs": (
        FusePV,
        {"lr": 1e-2, "switch": 5, "deterministic": True, "curvature": "pairs"},
        True,
    ),
    "matrix": (FusePV, {"lr": 1e-2, "switch": 5, "deterministic": True}, True),
    "finds out": (FusePV, {"lr": 1e-2, "switch": 5, "curvature": "pairs"}, True),
    "living": (FusePV, {"lr": 1e-2, "switch": 5}, False),
    "living diagonal": (FusePV, {"lr": 1e-2, "switch": 5, "metric": "diagonal"}, False),
    "fixed step": (
        FusePV,
        {"lr": 1e-2, "switch": 5, "line_search": None, "lbfgs_lr": 0.1, "pairs": "consecutive"},
        True,
    ),
    "batch search": (FusePV, {"lr": 1e-2, "switch": 5, "line_search": "strong_wolfe"}, False),
    "fuse": (Fuse, {"lr": 1e-2, "lbfgs_lr": 0.1}, True),
    "fuse search": (Fuse, {"lr": 1e-2, "line_search": "strong_wolfe"}, True),
}


class Net(nn.Module):
    """Uneven shards, shards without an element, a [1, N] weight and a parameter nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.ones(7))
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.scale * self.first(x).tanh())
        return result


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    return x, (x[:, :1] * x[:, 1:2]).sin() + 0.3


def make() -> Net:
    torch.manual_seed(1)
    return Net().double()


# --- ways of spreading a model --------------------------------------------------------------


def spread(layout: str, model: Net) -> tuple[nn.Module, Any]:
    """The model on all ranks, and the process_group to tell."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    size = dist.get_world_size()
    if layout in ("ddp", "zero"):
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        return wrapped, dist.group.WORLD
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicas", "shards"))
        fully_shard(model, mesh=mesh)
        return model, None
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ranks",))
    if layout == "fsdp":
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, None
    if layout == "mixed":  # some parameters stay whole, and their gradients are the user's affair
        fully_shard(model.first, mesh=mesh)
        return model, None
    assert layout == "columns"  # tensor-parallel: a weight's columns; all ranks have the same data
    for module, name, dim in ((model.first, "weight", 1), (model.second, "weight", 1)):
        whole = getattr(module, name).detach()
        sharded = distribute_tensor(whole, mesh, [Shard(dim)])
        setattr(module, name, nn.Parameter(sharded))
    return model, None


def average_plain(model: nn.Module) -> None:
    """Gradients of whole parameters beside sharded ones."""
    for param in model.parameters():
        if param.grad is not None and not hasattr(param, "placements"):
            dist.all_reduce(param.grad)
            param.grad /= dist.get_world_size()


def rows_at(step: int, full: bool) -> Tensor:
    """Those of all ranks in a step."""
    return torch.arange(ROWS) if full else (torch.arange(BATCH) + 5 * step) % ROWS


def continued(model: nn.Module, optimizer: Any, mode: str, begin: int, steps: int) -> Tensor:
    """Steps on this rank's rows of every batch; all parameters then."""
    x, y = data()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in range(begin, begin + steps):
        mine = rows_at(step, MODES[mode][2])[rank::size]

        def closure(mine: Tensor = mine) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x[mine], y[mine], None)
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
    return whole(model)


def fit(
    layout: str | None,
    mode: str,
    rank: int | None = None,
    spoils: Callable[[int], float] | None = None,
    steps: int = STEPS,
    looks: Callable[[nn.Module], Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Trains; ``spoils`` gives what the k-th loss is multiplied by on this rank.

    ``looks`` sees the model after every step. The layout "zero" is "ddp" with sharded state.
    """
    kind, options, full = MODES[mode]
    size = 1 if rank is None else dist.get_world_size()
    model: nn.Module = make()
    group = None
    if layout is not None:
        model, group = spread(layout, model)
        more = {"process_group": group, **more}
    if layout == "zero":
        more["shard_state"] = True
    optimizer: Optimizer = kind(model.parameters(), **options, **more)
    x, y = data()
    calls, losses, seen = [0], [], []
    for step in range(steps):
        rows = rows_at(step, full)
        mine = rows if rank is None or layout == "columns" else rows[rank::size]

        def closure(mine: Tensor = mine) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x[mine], y[mine], layout)
            loss.backward()
            if layout == "mixed":
                average_plain(model)
            calls[0] += 1
            loss = loss.detach()
            return loss if spoils is None else loss * spoils(calls[0])

        losses.append(float(optimizer.step(closure)))
        if looks is not None:
            seen.append(looks(model))
    return {
        "params": whole(model),
        "calls": calls[0],
        "losses": losses,
        "seen": seen,
        "report": optimizer.report() if hasattr(optimizer, "report") else None,
        "optimizer": optimizer,
        "model": model,
        "closure": closure,
    }


def loss_of(model: nn.Module, x: Tensor, y: Tensor, layout: str | None) -> Tensor:
    if layout != "columns":
        return (model(x) - y).square().mean()
    net: Any = model
    from torch.distributed.tensor import DTensor, Replicate

    mesh = net.first.weight.device_mesh
    x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    hidden = (x @ net.first.weight.T).full_tensor() + net.first.bias
    hidden = net.scale * hidden.tanh()
    hidden = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
    result = (hidden @ net.second.weight.T).full_tensor() + net.second.bias
    return (result - y).square().mean()


def whole(model: nn.Module) -> Tensor:
    """All parameters as one vector, shards put together."""
    parts = []
    for param in model.parameters():
        full = param.full_tensor() if hasattr(param, "full_tensor") else param
        parts.append(full.detach().reshape(-1))
    return torch.cat(parts).clone()


def data_of(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("params", "calls", "losses", "seen", "report")}


# --- processes ------------------------------------------------------------------------------


def work(rank: int, size: int, folder: str, job: str, arguments: tuple[Any, ...]) -> None:
    """One process: joins the others and does the job, a function of this file or of a test's."""
    import datetime
    import importlib

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    module, name = job.split(":")
    found = getattr(importlib.import_module(module), name)(rank, folder, *arguments)
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


@contextmanager
def imagined(rank: int, size: int) -> Iterator[None]:
    """This process as one of so many, who all have the same numbers; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def add(self: Ranks, sums: Tensor, largest: Tensor | None = None) -> Any:
        return sums * self.size, largest

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    over_others, Ranks.add = Ranks.add, add  # type: ignore[method-assign]
    try:
        yield
    finally:
        Ranks.add = over_others  # type: ignore[method-assign]
        dist.destroy_process_group()


def on_ranks(size: int, folder: Path, job: str, *arguments: Any) -> list[Any]:
    """What a job returns on each of so many processes."""
    torch.multiprocessing.spawn(work, (size, str(folder), job, arguments), size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def started_once(folder: Path, job: str) -> Callable[[int], list[Any]]:
    """What a job returns on each of so many processes, which are started once for a number."""
    found: dict[int, list[Any]] = {}
    begun: set[int] = set()

    def get(size: int) -> list[Any]:
        if size not in found:
            assert size not in begun, "the processes failed before, see the first failure"
            begun.add(size)
            (mine := folder / str(size)).mkdir()
            found[size] = on_ranks(size, mine, job)
        return found[size]

    return get


def nan_at(*calls: int) -> Callable[[int], float]:
    return lambda call: math.nan if call in calls else 1.0
