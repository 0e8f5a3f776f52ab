"""Every form in which torch.distributed.checkpoint takes the state of sharded parameters.

Saved on two ranks in one phase, at the switch and after it, and resumed in a fresh optimizer, which
is in the first: all go on to the bit as the run does that was saved.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import MODES, continued, make, on_ranks, spread
from torch import distributed as dist
from torch import nn

from fuse_ext import prepare_to_load

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)
SIZE, STEPS = 2, 4
# Steps before: in the Adam phase, at the switch (5), while bases are measured (12), and later.
SAVED = [("pairs", 3), ("pairs", 5), ("pairs", 25), ("living", 12), ("living", 25)]
SAVED += [("lbfgs int8", 25)]
# What torch is told: of shards in files, and of whole state_dicts in saving and in loading.
SHARDED: dict[str, dict[str, bool]] = {
    "sharded": {},
    "sharded, on the host": {"cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},
    "flattened, on the host": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
}
WHOLE: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
    "full": ({}, {"full_state_dict": True}),
    "full, from the first rank": ({}, {"full_state_dict": True, "broadcast_from_rank0": True}),
    "full, flattened": (
        {"flatten_optimizer_state_dict": True},
        {"flatten_optimizer_state_dict": True},
    ),
}


def begun(mode: str, weights: Any = None) -> tuple[nn.Module, Any]:
    """A model in shards, perhaps with these weights, and an optimizer that has never stepped."""
    kind, options, _ = MODES[mode]
    inner = make()
    inner.idle.requires_grad_(False)  # torch wants a state of all others
    model, group = spread("fsdp", inner)
    if weights is not None:
        model.load_state_dict(weights)
    return model, kind(model.parameters(), **options, process_group=group)


def from_files(model: nn.Module, optimizer: Any, mode: str, told: Any, place: str) -> Any:
    """A fresh model and optimizer with the state that was written to files."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states

    options = states.StateDictOptions(**told)
    state = states.get_optimizer_state_dict(model, optimizer, options=options)
    checkpoint.save({"optimizer": state}, checkpoint_id=place)
    other, fresh = begun(mode, copy.deepcopy(model.state_dict()))
    reader = checkpoint.FileSystemReader(place)
    prepare_to_load(other, fresh, reader.read_metadata())
    into = {"optimizer": states.get_optimizer_state_dict(other, fresh, options=options)}
    checkpoint.load(into, storage_reader=reader)
    states.set_optimizer_state_dict(other, fresh, into["optimizer"], options=options)
    return other, fresh


def from_whole(model: nn.Module, optimizer: Any, mode: str, saving: Any, loading: Any) -> Any:
    """The same with a whole state_dict, that of the first rank."""
    from torch.distributed.checkpoint import state_dict as states

    saved = states.StateDictOptions(full_state_dict=True, cpu_offload=True, **saving)
    own = states.get_optimizer_state_dict(model, optimizer, options=saved)
    first = [own]
    dist.broadcast_object_list(first)
    other, fresh = begun(mode, copy.deepcopy(model.state_dict()))
    prepare_to_load(other, fresh, first[0])
    given = own if "broadcast_from_rank0" in loading else first[0]
    options = states.StateDictOptions(**loading)
    states.set_optimizer_state_dict(other, fresh, given, options=options)
    return other, fresh


def forms(rank: int, folder: str) -> dict[Any, dict[str, bool]]:
    """Which ones go on as the run does that was saved."""
    found: dict[Any, dict[str, bool]] = {}
    for mode, before in SAVED:
        model, optimizer = begun(mode)
        continued(model, optimizer, mode, 0, before)
        resumed = {}
        for number, (name, told) in enumerate(SHARDED.items()):
            place = f"{folder}/{mode}-{before}-{number}"
            resumed[name] = from_files(model, optimizer, mode, told, place)
        for name, (saving, loading) in WHOLE.items():
            resumed[name] = from_whole(model, optimizer, mode, saving, loading)
        end = continued(model, optimizer, mode, before, STEPS)
        found[mode, before] = {
            name: torch.equal(continued(*other, mode, before, STEPS), end)
            for name, other in resumed.items()
        }
    return found


def test_all_forms_go_on_to_the_bit(tmp_path: Path) -> None:
    for found in on_ranks(SIZE, tmp_path, f"{__name__}:forms"):
        assert list(found) == SAVED
        for saved, same in found.items():
            assert same == dict.fromkeys([*SHARDED, *WHOLE], True), saved
