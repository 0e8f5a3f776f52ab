"""Checkpoints of two processes under DistributedDataParallel: resumed on two and on one."""

from __future__ import annotations

import copy
import datetime
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adam_cases import frozen
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_map_only

from benchmarks.harness.ranks import leave
from fuse_ext import FusePV, prepare_to_load

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

RANKS, BEFORE, AFTER = 2, 30, 6
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
KINDS: dict[str, dict[str, Any]] = {
    "adam": {"switch": 1000},
    "living": {"switch": 5, "deterministic": False, "metric": "kronecker"},
    "pairs": {"switch": 5, "deterministic": True, "curvature": "pairs"},
    "dense": {"switch": 5, "deterministic": True},
}


def make(kind: str) -> tuple[nn.Module, FusePV]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    group = dist.group.WORLD if dist.is_initialized() else None
    return model, FusePV(model.parameters(), lr=1e-2, process_group=group, **KINDS[kind])


def train(model: nn.Module, optimizer: FusePV, kind: str, steps: range, rank: int) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x[:, :1] * x[:, 1:2]).sin()
    for step in steps:
        rows = torch.arange(64)
        if kind not in ("pairs", "dense"):
            rows = (rows[:16] + 5 * step) % 64
        mine = rows[rank::RANKS]

        def closure(mine: Tensor = mine) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x[mine]) - y[mine]).square().mean()
            loss.backward()
            loss = loss.detach()
            dist.all_reduce(loss)
            return loss / RANKS

        optimizer.step(closure)


def resumed_through(form: str, kind: str, run: Any, folder: Path, rank: int) -> tuple[Any, FusePV]:
    """Another model and optimizer, with what the form brings of the first ones."""
    model, optimizer = run
    other, fresh = make(kind)
    parallel = nn.parallel.DistributedDataParallel(other)
    parallel.load_state_dict(model.state_dict())
    if form == "files":
        saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(saved, checkpoint_id=folder / kind)
        reader = dcp.FileSystemReader(folder / kind)
        prepare_to_load(parallel, fresh, reader.read_metadata())
        into = {"optimizer": get_optimizer_state_dict(parallel, fresh)}
        dcp.load(into, storage_reader=reader)
        set_optimizer_state_dict(parallel, fresh, into["optimizer"])
        return parallel, fresh
    full = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    assert bool(full) == (rank == 0)
    forms = [tree_map_only(Tensor, lambda t: t.to("meta"), full)]
    dist.broadcast_object_list(forms)
    prepare_to_load(parallel, fresh, forms[0])
    set_optimizer_state_dict(parallel, fresh, full, options=BROADCAST)
    return parallel, fresh


def work(rank: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS, timeout=patience
    )
    found = {}
    for kind in KINDS:
        model, optimizer = make(kind)
        parallel = nn.parallel.DistributedDataParallel(model)
        train(parallel, optimizer, kind, range(BEFORE), rank)
        saved = copy.deepcopy(optimizer.state_dict())
        others = [
            resumed_through(form, kind, (parallel, optimizer), Path(folder), rank)
            for form in ("files", "broadcast")
        ]
        same = [frozen(fresh.state_dict()) == frozen(saved) for _, fresh in others]
        ends = []
        for each in ((parallel, optimizer), *others):
            each[1].zero_grad()
            train(*each, kind, range(BEFORE, BEFORE + AFTER), rank)
            ends.append(frozen([each[0].state_dict(), each[1].state_dict()]))
        found[kind] = (saved, same, [end == ends[0] for end in ends], optimizer.phase)
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def test_two_ranks_resume_to_the_bit_and_one_takes_over(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    for kind in KINDS:
        saved, same, ends, phase = first[kind]
        assert (kind, phase) == (kind, "adam" if kind == "adam" else "lbfgs")
        assert frozen(saved) == frozen(second[kind][0])
        assert all((*same, *second[kind][1])), kind
        assert all((*ends, *second[kind][2])), kind
        model, optimizer = make(kind)  # one process, without a group
        reader = dcp.FileSystemReader(tmp_path / kind)
        prepare_to_load(model, optimizer, reader.read_metadata())
        into = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        with pytest.warns(UserWarning, match="torch.distributed is disabled"):
            dcp.load(into, storage_reader=reader)
        set_optimizer_state_dict(model, optimizer, into["optimizer"])
        assert frozen(optimizer.state_dict()) == frozen(saved)
