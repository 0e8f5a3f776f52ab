"""Gives a new optimizer the form of a checkpoint that torch.distributed.checkpoint is to load."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fuse_ext.optim.checkpoint.frozen import owner
from fuse_ext.optim.flat_optimizer import FlatOptimizer
from fuse_ext.vector.shards import is_dtensor, like, local

# Keys and places in lists, from the outermost; size and dtype of a tensor, None for all else.
Path: TypeAlias = tuple[Any, ...]
Form: TypeAlias = tuple[torch.Size, torch.dtype] | None


def prepare_to_load(
    model: nn.Module, optimizer: FlatOptimizer, saved: Any, under: str | None = None
) -> None:
    """Makes room in a new optimizer for the state that a checkpoint holds.

    torch.distributed.checkpoint loads into what is there, by name and by size, and a new optimizer
    is in the Adam phase: of a checkpoint of the L-BFGS phase it finds none of the names. So say
    beforehand what is to come; for an optimizer as it is made, and for one that is already
    running, whose state is given up::

        reader = torch.distributed.checkpoint.FileSystemReader(path)
        fuse_ext.prepare_to_load(model, optimizer, reader.read_metadata())
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        torch.distributed.checkpoint.load(state, storage_reader=reader)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    Where both are in the same phase it is not needed, nor for a state_dict that is at hand as a
    whole, unless torch has flattened it or loads it as a ``full_state_dict``: then give that
    dictionary as ``saved``. It costs the memory of the state. Until the state is there the
    optimizer takes no step.

    Args:
        model: What the parameters belong to, wrapped or not.
        optimizer: Any of ours.
        saved: The checkpoint's metadata, or a state_dict by the parameters' names, flattened or
            not.
        under: Where in the checkpoint the optimizer's state is: "optimizer" above, "app.optimizer"
            in a dictionary within another. None if there is one place alone.

    Raises:
        ValueError: The checkpoint holds no state of these parameters, or several.
    """
    names = _names(model, optimizer)
    found: dict[str, dict[Tensor, dict[str, Any]]] = {}
    spread = dict(zip(optimizer.flat.params, optimizer.flat.stand_ins, strict=True))
    for path, form in _entries(saved):
        if (place := _place(path, names)) is not None:
            prefix, param, keys = place
            whose, _ = owner(keys[0], len(optimizer.flat.params))
            of = param if whose is None else optimizer.flat.params[whose]
            room = _room(form, spread.get(of, of))
            _put(found.setdefault(prefix, {}).setdefault(param, {}), keys, room)
    if under is None and len(found) > 1:
        raise ValueError(f"under=None, but the checkpoint holds states under {sorted(found)}")
    prefix = next(iter(found), "") if under is None else under
    if prefix not in found:
        raise ValueError(
            f"under={under!r}: the checkpoint holds no state of these parameters there, but under "
            f"{sorted(found)}"
        )
    optimizer.await_state(found[prefix])


def _names(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's parameters by the names that torch.distributed.checkpoint gives them."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    params = [param for group in optimizer.param_groups for param in group["params"]]
    places = torch.optim.SGD(params)  # whoever has a state is named
    for place, param in enumerate(params):
        places.state[param] = {"place": place}
    named: Any = get_optimizer_state_dict(model, places)["state"]
    return {name: params[entry["place"]] for name, entry in named.items()}


def _entries(saved: Any) -> Iterator[tuple[Path, Form]]:
    """Path and form of all that a checkpoint holds."""
    metadata = getattr(saved, "state_dict_metadata", None)
    if metadata is None:
        yield from _walk((), saved)
        return
    paths = saved.planner_data or {}
    for key, kept in metadata.items():
        size = getattr(kept, "size", None)
        yield paths.get(key, (key,)), None if size is None else (size, kept.properties.dtype)


def _walk(path: Path, value: Any) -> Iterator[tuple[Path, Form]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _walk((*path, key), entry)
    else:
        yield path, (value.shape, value.dtype) if isinstance(value, Tensor) else None


def _place(path: Path, names: dict[str, Tensor]) -> tuple[str, Tensor, Path] | None:
    """Where the optimizer's state is, whose it is, and what; None for what is none of it."""
    for i, part in enumerate(path):
        under, rest = ".".join(map(str, path[:i])), path[i + 1 :]
        if part == "state" and len(rest) > 1 and rest[0] in names:
            return under, names[rest[0]], rest[1:]
        if isinstance(part, str) and part.startswith("state."):  # flattened
            words = part.split(".")[1:]
            for end in range(len(words) - 1, 0, -1):
                if (name := ".".join(words[:end])) in names:
                    return under, names[name], (*words[end:], *rest)
    return None


def _room(form: Form, param: Tensor) -> Any:
    """What a value of this form can be loaded into."""
    if form is None:
        return 0
    size, dtype = form
    if size == param.shape:
        return torch.zeros_like(param, dtype=dtype)
    leading = len(size) - param.dim()
    if is_dtensor(param) and leading > 0 and size[leading:] == param.shape:
        mine = torch.zeros(*size[:leading], *local(param).shape, dtype=dtype, device=param.device)
        return like(mine, param, tuple(size[:leading]))
    return torch.zeros(size, dtype=dtype, device=param.device if size else "cpu")


def _put(entry: dict[str, Any], keys: Path, value: Any) -> None:
    """Puts a value into dictionaries and lists within each other."""
    here: Any = entry
    for key, following in pairwise(keys):
        if isinstance(here, list):
            here.extend([None] * (key + 1 - len(here)))
        if here[key] is None if isinstance(here, list) else key not in here:
            here[key] = [] if isinstance(following, int) else {}
        here = here[key]
    if isinstance(here, list):
        here.extend([None] * (keys[-1] + 1 - len(here)))
    here[keys[-1]] = value
