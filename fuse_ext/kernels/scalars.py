"""Named access to the float64 vectors of scalars.

Those of L-BFGS (layout: csrc/two_loop.h), and those of a dense matrix (csrc/broyden.h).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from fuse_ext import _C


@dataclass(slots=True)  # freezing it would triple the time it takes to make one
class Header:
    """The scalars that the host decides by, in their order.

    Attributes:
        count: Pairs held, of all sets of parameters.
        open: Slot being filled.
        gamma: s.y / y.y of the newest pair; of the oldest with self-scaling.
        direction_dot_grad: g.p, the slope along the direction.
        direction_sq: p.p.
        direction_max: max |p|.
        accepted: Pairs accepted since the ring was made.
        skipped: Pairs refused by the curvature test in that time.
        pair_cosine: s.y / (|s| |y|) of the last pair offered.
        y_dot_y: y.y of that pair, raw as the update pass left it.
        self_scaling: 1 where pairs scale the inverse Hessian before them, else 0.
        usable: Pairs of the present set of parameters, as the last recursion found them; with
            none of them the direction is -g.
    """

    count: float
    open: float
    gamma: float
    direction_dot_grad: float
    direction_sq: float
    direction_max: float
    accepted: float
    skipped: float
    pair_cosine: float
    y_dot_y: float
    self_scaling: float
    usable: float

    def allows(self, least_slope: float) -> bool:
        """Whether the step may be made unseen: pairs, a finite p, and -g.p > least_slope."""
        return (
            self.usable > 0
            and -self.direction_dot_grad > least_slope
            and math.isfinite(self.direction_sq)
        )


HEADER = tuple(field.name for field in fields(Header))


@cache
def layout(slots: int) -> dict[str, int | tuple[int, int]]:
    """Name -> index of a scalar, or (offset, length) of an array, for ``slots`` slots."""
    return dict(_C.scalar_layout(slots))


def new_scalars(slots: int, device: torch.device) -> Tensor:
    """Zeroed scalars: an empty ring with slot 0 open."""
    return torch.zeros(int(_C.scalar_layout(slots)["size"]), dtype=torch.float64, device=device)


def with_sets(scalars: Tensor, slots: int) -> Tensor:
    """Scalars of a checkpoint from before pairs had sets, as if all had been of set 0."""
    if scalars.numel() != index("size_without_sets", slots):
        return scalars
    missing = index("size", slots) - scalars.numel()
    scalars = torch.cat([scalars, scalars.new_zeros(missing)])
    scalars[index("usable", slots)] = scalars[index("count", slots)]
    return scalars


def with_more_slots(scalars: Tensor, slots: int, more: int) -> Tensor:
    """Scalars for a ring of ``more`` slots: the pairs held from slot 0 on, and the open one."""
    kept, wider = in_order(scalars, slots), new_scalars(more, scalars.device)
    wider[: layout(slots)["row_scale"][0]] = scalars[: layout(slots)["row_scale"][0]]  # type: ignore[index]
    wider[index("open", more)] = len(kept) - 1
    for name, place in layout(slots).items():
        if isinstance(place, tuple):
            old, new = array(scalars, name, slots), array(wider, name, more)
            if old.dim() == 2:
                new[: len(kept), : len(kept)] = old[kept][:, kept]
            elif len(old) == slots:
                new[: len(kept)] = old[kept]
            else:
                new.copy_(old)
    return wider


def in_order(scalars: Tensor, slots: int) -> list[int]:
    """The slots of all pairs, oldest first, and the open one."""
    return [*reversed(held_slots(scalars, slots)), int(read_header(scalars).open)]


def index(name: str, slots: int) -> int:
    """Where the scalar ``name`` lies."""
    place = layout(slots)[name]
    assert isinstance(place, int)
    return place


def array(scalars: Tensor, name: str, slots: int) -> Tensor:
    """A view of the array ``name``; Gram matrices come as [slots, slots]."""
    place = layout(slots)[name]
    assert isinstance(place, tuple)
    offset, length = place
    view = scalars[offset : offset + length]
    return view.view(slots, slots) if name.startswith("gram") else view


def read_header(scalars: Tensor) -> Header:
    """Copies the header to the host (one synchronisation on a GPU)."""
    return Header(*scalars[: len(HEADER)].tolist())


def held_slots(scalars: Tensor, slots: int) -> list[int]:
    """The slots of all pairs, newest first."""
    header = read_header(scalars)
    newest = int(header.open) + slots - 1
    return [(newest - age) % slots for age in range(int(header.count))]


def usable_slots(scalars: Tensor, slots: int) -> list[int]:
    """The slots of the pairs of the present set, newest first."""
    sets, present = array(scalars, "pair_set", slots).tolist(), float(scalars[index("set", slots)])
    return [i for i in held_slots(scalars, slots) if sets[i] == present]


# Arrays of broyden_pairs.h by slot; the others are by member, but for scratch.
_BY_SLOT = ("run", "along_s", "along_y", "gram_ss")
_BY_MEMBER = (
    *("inverse_terms", "direct_terms"),
    *("inverse_own", "inverse_other", "direct_own", "direct_other"),
)


@cache
def broyden_layout(slots: int) -> dict[str, int | tuple[int, int]]:
    """As :func:`layout`, of what lies beside the scalars with the Broyden update."""
    return dict(_C.broyden_layout(slots))


def new_broyden(slots: int, device: torch.device) -> Tensor:
    """Zeroed: no pair has a run."""
    size = broyden_layout(slots)["size"]
    assert isinstance(size, int)
    return torch.zeros(size, dtype=torch.float64, device=device)


def broyden_index(name: str, slots: int) -> int:
    """Where a scalar of it lies."""
    place = broyden_layout(slots)[name]
    assert isinstance(place, int)
    return place


def broyden_array(broyden: Tensor, name: str, slots: int) -> Tensor:
    """A view of an array of it: [slots], [n, slots] or [slots, slots]."""
    place = broyden_layout(slots)[name]
    assert isinstance(place, tuple)
    offset, length = place
    view = broyden[offset : offset + length]
    return view if length == slots else view.view(-1, slots)


def broyden_with_more_slots(broyden: Tensor, scalars: Tensor, slots: int, more: int) -> Tensor:
    """For a ring of ``more`` slots, as :func:`with_more_slots`; ``scalars`` as they were before."""
    kept, wider = in_order(scalars, slots), new_broyden(more, broyden.device)
    first = broyden_layout(slots)["run"]
    assert isinstance(first, tuple)
    wider[: first[0]] = broyden[: first[0]]
    for name in (*_BY_SLOT, *_BY_MEMBER):
        old, new = broyden_array(broyden, name, slots), broyden_array(wider, name, more)
        if name == "gram_ss":
            new[: len(kept), : len(kept)] = old[kept][:, kept]
        elif name in _BY_SLOT:
            new[: len(kept)] = old[kept]
        else:
            new[: len(old), :slots] = old
    members = broyden_array(broyden, "member", slots).long().tolist()
    place = {slot: float(i) for i, slot in enumerate(kept)}
    moved = [place.get(slot, 0.0) for slot in members]
    broyden_array(wider, "member", more)[:slots] = torch.tensor(moved, dtype=torch.float64)
    return wider


_MATRIX = dict(_C.matrix_layout(0))
# Side of a matrix's tiles; numbers of a term; terms that can be held apart from the matrix.
TILE = int(_MATRIX["tile"])
TERM_SIZE, MOST_TERMS = int(_MATRIX["term_size"]), int(_MATRIX["most_terms"])


def matrix_place(name: str) -> int:
    """Where a scalar of a dense matrix lies; "header": where its terms begin."""
    return int(_MATRIX[name])


def matrix_size(numel: int) -> int:
    """Float64 numbers in the tiles of a symmetric matrix of so many rows."""
    return int(_C.matrix_layout(numel)["size"])
