"""A flat vector that several ranks hold: who they are, who holds what, and sums over all of them.

Each rank's flat vector is made of what lies with it: whole tensors (plain ones, under DDP), or its
shards of DTensors (``fully_shard``, tensor parallelism). What several ranks hold alike counts in a
sum with one over their number. No vector is ever exchanged, only float64 scalars: one all-reduce
for each question of :class:`~fuse_ext.vector.measures.Measures`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fuse_ext.vector.measures import LOCAL, POINT_SUMS, Measures, PartsDiffer
from fuse_ext.vector.shards import check_spread, is_dtensor, shards_of

# What ``process_group`` may say in the place of a group: each process trains a model of its own.
ALONE = "local"
# Numbers that a rank's set of absent parameters is told apart by are exact in float64.
_EXACT = 2**53


class Said:
    """What the user has said of ranks; copies share it, for a group cannot be copied.

    Args:
        group: See :func:`find_ranks`.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> Said:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is None or self.group == ALONE:
            return Said, (self.group,)
        if self.group is dist.group.WORLD:
            return _of_all, ()
        raise TypeError(
            "an optimizer with a process_group other than torch.distributed.group.WORLD cannot be "
            "pickled: a group belongs to its process; save its state_dict"
        )


def _of_all() -> Said:
    return Said(dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)


class Ranks:
    """The processes that step together.

    Args:
        group: Theirs.
        device: Of the parameters; where the group's backend takes tensors of it, numbers are
            exchanged there.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group = group
        self._mesh: Any = None
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        on_host = device.type == "meta" or dist.get_backend(group) in ("gloo", "mpi")
        self.device = torch.device("cpu") if on_host else device

    def mesh(self, device: torch.device) -> Any:
        """These ranks as a mesh of one dimension."""
        if self._mesh is None:
            from torch.distributed.device_mesh import DeviceMesh

            self._mesh = DeviceMesh.from_group(self.group, device.type)
        return self._mesh

    def add(self, sums: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sums over all ranks, and the largest of all, with one all-reduce.

        Args:
            sums: A vector of float64.
            largest: Another one; each of its numbers takes a place for each rank.

        Returns:
            New vectors beside the ones given.
        """
        mine = sums.to(self.device)
        if largest is not None:
            places = mine.new_zeros(self.size, largest.numel())
            places[self.rank].copy_(largest)
            mine = torch.cat([mine, places.view(-1)])
        elif mine is sums:
            mine = sums.clone()
        dist.all_reduce(mine, group=self.group)
        total = mine[: sums.numel()].to(sums.device)
        if largest is None:
            return total, None
        found = mine[sums.numel() :].view(self.size, -1)
        return total, found.amax(0).to(largest.device)

    def exchange(self, sums: list[float], largest: Sequence[float] = ()) -> list[float]:
        """:meth:`add` of numbers."""
        numbers = torch.tensor(sums, dtype=torch.float64)
        most = torch.tensor(list(largest), dtype=torch.float64) if largest else None
        total, found = self.add(numbers, most)
        return [*total.tolist(), *([] if found is None else found.tolist())]


def find_ranks(params: Sequence[Tensor], group: Any, device: torch.device) -> Ranks | None:
    """Those that step together; None for this process alone.

    Args:
        params: The parameters.
        group: What the user has said: None for the ranks of the DTensors among the parameters,
            ``ALONE``, a ProcessGroup or a DeviceMesh.
        device: The parameters'.

    Raises:
        ValueError, TypeError: The group is none, or does not go with the parameters' meshes.
        RuntimeError: DTensors' meshes have no group in common that could be found.
    """
    check_spread(params)
    meshes = [param.device_mesh for param in params if is_dtensor(param)]  # type: ignore[attr-defined]
    if isinstance(group, str):
        if group != ALONE:
            raise ValueError(
                f"process_group must be a group, a mesh, None or {ALONE!r}, got {group!r}"
            )
        if meshes:
            raise ValueError(f"process_group={ALONE!r} does not go with DTensors, which are shared")
        return None
    if group is None:
        if not meshes:
            return None
        group = _group_of(meshes)
    elif hasattr(group, "get_group"):
        group = _group_of([group])
    elif not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a ProcessGroup, a DeviceMesh, None or {ALONE!r}, got {group!r}"
        )
    ranks = Ranks(group, device)
    for i, param in enumerate(params):
        if ranks.size % shards_of(param):
            raise ValueError(
                f"process_group has {ranks.size} ranks, but params[{i}] lies in "
                f"{shards_of(param)} shards: give the group of all ranks that hold one"
            )
    return ranks if ranks.size > 1 else None


def _group_of(meshes: list[Any]) -> Any:
    """The group of all ranks of these meshes."""
    largest = max(meshes, key=lambda mesh: mesh.size())
    members = set(largest.mesh.flatten().tolist())
    for mesh in meshes:
        if not members.issuperset(mesh.mesh.flatten().tolist()):
            raise RuntimeError(
                f"parameters lie on the meshes {largest} and {mesh}, neither of which holds the "
                "other: pass process_group, of all ranks that step together"
            )
    if largest.ndim == 1:
        return largest.get_group()
    if largest.size() == dist.get_world_size():
        return dist.group.WORLD
    if largest.mesh_dim_names is None:
        raise RuntimeError(
            f"{largest} has no mesh_dim_names, without which torch has no group of all its ranks: "
            "give it names, or pass process_group"
        )
    return largest._flatten().get_group()


def unsaid(params: Sequence[Tensor], group: Any) -> bool:
    """Whether other ranks may or may not step with this one, and nobody has said which.

    It is so under DistributedDataParallel, which leaves no mark on parameters, and equally where
    each rank trains a model of its own.
    """
    if group is not None or any(map(is_dtensor, params)):
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class OverRanks:
    """Measures of a vector that several ranks hold.

    Args:
        together: Those ranks.
    """

    def __init__(self, together: Ranks) -> None:
        self._together = together
        self.ranks = together.size

    def largest(self, tensors: list[Tensor]) -> float:
        """See :class:`Measures`."""
        held = any(x.numel() for x in tensors)
        return self._together.exchange([], [LOCAL.largest(tensors) if held else 0.0])[0]

    def total(self, *numbers: float) -> list[float]:
        """See :class:`Measures`."""
        return self._together.exchange(list(numbers))

    def any(self, *flags: bool) -> list[bool]:
        """See :class:`Measures`."""
        return [count > 0.0 for count in self._together.exchange([float(flag) for flag in flags])]

    def point(self, norms: list[float], loss: Any, absent: tuple[int, ...]) -> list[float]:
        """See :class:`Measures`."""
        number = float(hash(absent) % _EXACT)
        known = [0.0 if loss is None else float(loss) / self.ranks, float(loss is not None)]
        found = self._together.exchange(
            [*norms[:POINT_SUMS], *known], [*norms[POINT_SUMS:], number, -number]
        )
        *sums, mean, with_loss, largest, highest, lowest = found
        if highest != -lowest:
            raise PartsDiffer
        if 0.0 < with_loss < self.ranks:
            raise ValueError(
                f"the closure returned a loss on {with_loss:.0f} of {self.ranks} ranks: it must "
                "on all of them, or on none"
            )
        return [*sums, largest, mean if with_loss else math.nan]


def measures_of(together: Ranks | None) -> Measures:
    """Measures of a vector on these ranks."""
    return LOCAL if together is None else OverRanks(together)
