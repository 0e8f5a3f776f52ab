"""What of a parameter lies on this rank, and where in the flat vector.

Plain tensors lie here whole. Of a DTensor (``fully_shard``, tensor parallelism) a shard does, or a
replica. Parameters that are divided in one way lie side by side in the flat vector, so that a pass
over one stretch of it counts the same in every sum.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse_ext.kernels.reference.memory import SCALE_BLOCK

# What torch.distributed.fsdp sets on the parameters of FSDP1, flat ones and views of them alike.
FSDP1_MARK = "_fsdp_flattened"


class Stretch(NamedTuple):
    """A part of the flat vector that is divided among the ranks in one way.

    Ranks that hold the same shard of one of its parameters hold the same of all, so that an
    element's place in the stretch is the same on all of them; its place in the flat vector need
    not be, behind shards of different lengths.

    Attributes:
        place: Where it lies.
        members: The parameters in it.
        share: What its elements count in a sum over ranks: one over those that hold them.
    """

    place: slice
    members: list[int]
    share: float


class Places(NamedTuple):
    """Where parameters lie in a flat vector.

    Attributes:
        order: The parameters by their places; those that equally many ranks hold lie together.
        offsets: Where each begins.
        numel: Elements that lie here, and padding.
        total, usual: Elements of all, and those that lie on a rank on average.
        stretches: What equally many ranks hold.
    """

    order: list[int]
    offsets: list[int]
    numel: int
    total: int
    usual: int
    stretches: list[Stretch]


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor; imports nothing where there can be none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What lies on this rank, in its own memory; a plain tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    mine: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    wait = getattr(mine, "wait", None)  # of a collective under way
    return mine if wait is None else wait()


def like(local_tensor: Tensor, param: Tensor, leading: tuple[int, ...] = ()) -> Tensor:
    """What lies on this rank of a tensor that is spread as ``param``, as that DTensor.

    Shares memory. ``leading`` are dimensions before those of the parameter.
    """
    if not is_dtensor(param):
        return local_tensor
    placements = [_behind(at, len(leading)) for at in param.placements]  # type: ignore[attr-defined]
    return as_dtensor(local_tensor, param.device_mesh, placements, (*leading, *param.shape))  # type: ignore[attr-defined]


def as_dtensor(
    local_tensor: Tensor, mesh: Any, placements: list[Any], shape: tuple[int, ...]
) -> Tensor:
    """The DTensor of this shape of which this lies here; shares its memory."""
    from torch.distributed.tensor import DTensor

    # pickle takes a DTensor for one with memory of its own where its part begins behind the
    # beginning of a storage: the part is put in later, as fully_shard does too.
    found = DTensor.from_local(
        local_tensor.new_empty(()).expand(local_tensor.shape),
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
    found._local_tensor = local_tensor.detach()
    return found


def placed(value: Any, param: Tensor, leading: int = 0) -> Any:
    """A state's tensor as ``param`` is spread: a whole one is divided, another DTensor moved.

    ``leading`` says how many dimensions come before the parameter's.
    """
    if not (is_dtensor(param) and isinstance(value, Tensor)):
        return value.full_tensor() if is_dtensor(value) else value
    mesh = param.device_mesh  # type: ignore[attr-defined]
    placements = tuple(_behind(at, leading) for at in param.placements)  # type: ignore[attr-defined]
    if not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        # Everyone has all of it: nothing is sent.
        return distribute_tensor(value.to(param.device), mesh, placements, src_data_rank=None)
    if value.device_mesh != mesh or value.placements != placements:  # type: ignore[attr-defined]
        return value.redistribute(mesh, placements)  # type: ignore[attr-defined]
    return value


def _behind(placement: Any, dimensions: int) -> Any:
    """The placement of a tensor with so many dimensions more in front."""
    if not dimensions or placement.is_replicate():
        return placement
    more = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + dimensions, **more)


def shards_of(param: Tensor) -> int:
    """Into how many pieces, each on ranks of its own, a parameter is divided."""
    if not is_dtensor(param):
        return 1
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return math.prod(mesh.size(i) for i, at in enumerate(placements) if not at.is_replicate())


def way_of(param: Tensor) -> tuple[int, tuple[Any, ...]]:
    """In how many shards a parameter lies, and the mesh and those of its dimensions that cut it."""
    if not is_dtensor(param):
        return 1, ()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    cut = [i for i, at in enumerate(placements) if not at.is_replicate() and mesh.size(i) > 1]
    return shards_of(param), (mesh, *cut) if cut else ()


def largest_here(param: Tensor) -> Tensor:
    """A plain parameter itself; of a DTensor one without memory in the largest shard's shape."""
    if not is_dtensor(param):
        return param
    shape = list(param.shape)
    for i, at in enumerate(param.placements):  # type: ignore[attr-defined]
        if not at.is_replicate():
            shape[at.dim] = -(-shape[at.dim] // param.device_mesh.size(i))  # type: ignore[attr-defined]
    return torch.empty(shape, dtype=param.dtype, device="meta")


def check_spread(params: Sequence[Tensor]) -> None:
    """Raises TypeError for parameters that are spread in ways that are not supported."""
    for i, param in enumerate(params):
        if getattr(param, FSDP1_MARK, False):
            raise TypeError(
                f"params[{i}] belongs to torch.distributed.fsdp.FullyShardedDataParallel (FSDP1), "
                "whose flat parameters do not say which of their elements lie on which rank; use "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if is_dtensor(param) and param.is_complex():
            raise TypeError(f"params[{i}] is a DTensor of {param.dtype}; only real ones can be")
        if is_dtensor(param) and any(p.is_partial() for p in param.placements):  # type: ignore[attr-defined]
            raise TypeError(
                f"params[{i}] has placements {param.placements}: a sum that is not "  # type: ignore[attr-defined]
                "taken yet is no parameter"
            )


def lay_out(
    params: Sequence[Tensor],
    sizes: list[int],
    ranks: int,
    ways: list[tuple[int, tuple[Any, ...]]] | None = None,
) -> Places:
    """Gives every parameter its place.

    Args:
        params: The parameters.
        sizes: Real numbers of each that lie here.
        ranks: How many hold them, together; 1 for this process alone.
        ways: Of each parameter, if it does not say so itself, :func:`way_of`.
    """
    ways = [way_of(param) for param in params] if ways is None else ways
    shards = [n for n, _ in ways]
    # Those of most shards first, and those of equally many as they come.
    keys = [(-way[0], ways.index(way)) for way in ways]
    order = list(range(len(params)))
    if ranks > 1:
        order.sort(key=keys.__getitem__)
    offsets, numel = [0] * len(params), 0
    stretches: list[Stretch] = []
    for (n, _), alike in groupby(order, key=keys.__getitem__):
        members = list(alike)
        if stretches:  # no two of them share a block of int8 rows
            numel = -(-numel // SCALE_BLOCK) * SCALE_BLOCK
        begin = numel
        for i in members:
            offsets[i] = numel + (numel % 2 if params[i].is_complex() else 0)
            numel = offsets[i] + sizes[i]
        stretches.append(Stretch(slice(begin, numel), members, -n / ranks))
    total = usual = numel
    if ranks > 1:
        whole = [p.numel() * (2 if p.is_complex() else 1) for p in params]
        total = sum(whole)
        usual = sum(-(-size // n) for size, n in zip(whole, shards, strict=True))
    return Places(order, offsets, numel, total, usual, stretches)
