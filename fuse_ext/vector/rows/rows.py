"""State sharded among ranks that hold the parameters alike (ZeRO-1, Rajbhandari et al. 2020).

Under DistributedDataParallel all ranks have all parameters and gradients. Here each steps on its
own rows of every parameter, those that ``fully_shard`` would give it, in the parameter's own
memory; all that is made for them is a shard. What the others have moved is gathered before anyone
looks: before the closure is called, before a criterion is asked, and at the end of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from fuse_ext.vector.ranks import Ranks, find_ranks
from fuse_ext.vector.shards import as_dtensor, is_dtensor

# Gathered bytes in one call. Parameters are sent through buffers, 1 + 1/W times as large: DDP's
# gradients have theirs of 25 MiB.
BUCKET = 32 * 2**20
# Each parameter's rows begin at a multiple of so many bytes, for whatever dtype.
ALIGNMENT = 16

# Its name from torch 2.14 on, and the one before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


class Slot(NamedTuple):
    """Where a parameter's rows lie in what a rank sends.

    Attributes:
        i: Which parameter.
        place: Its bytes, as many on every rank.
    """

    i: int
    place: slice


def check_shareable(params: Sequence[Tensor]) -> None:
    """Raises ValueError for parameters whose rows are not to be shared out."""
    for i, param in enumerate(params):
        if is_dtensor(param):
            raise ValueError(
                f"shard_state=True is for parameters that all ranks hold; params[{i}] is a "
                "DTensor, whose state lies in shards as it does: leave the option out"
            )
        if param.is_complex():
            raise ValueError(
                f"shard_state=True does not go with complex parameters: params[{i}] has "
                f"{param.dtype}"
            )


def share_of(tensor: Tensor, ranks: int, rank: int = 0) -> Tensor:
    """A rank's rows of a tensor, as a view; one without dimensions itself.

    As torch.chunk divides them: the last ranks may have fewer, or none.
    """
    if not tensor.dim() or ranks == 1:
        return tensor
    rows = tensor.shape[0]
    chunk = -(-rows // ranks)
    return tensor.detach()[min(rank * chunk, rows) : min((rank + 1) * chunk, rows)]


class Rows:
    """This rank's rows of every parameter, and a way to have everybody's.

    A parameter without dimensions stays whole: all ranks take the same step on it.

    Args:
        params: The parameters.
        process_group: Who holds them.

    Attributes:
        together: Those ranks.
        tensors: Of each parameter what this rank steps on: a view of its rows.
        stand_ins: Each as it lies: a DTensor of those views.
        gathered: How often gathering has written to each parameter.
        stale: Whether rows were moved that other ranks have not seen yet.

    Raises:
        ValueError: A parameter is a DTensor or complex, or nobody else holds them.
        TypeError: See :func:`~fuse_ext.vector.ranks.find_ranks`.
    """

    def __init__(self, params: Sequence[Tensor], process_group: Any) -> None:
        check_shareable(params)
        device = params[0].device
        together = find_ranks(params, process_group, device)
        if together is None:
            raise ValueError(
                "shard_state=True needs process_group, with more than one rank, got "
                f"process_group={process_group!r}"
            )
        self.together: Ranks = together
        self.stale = False
        self.gathered = [0] * len(params)
        self._params = params
        self._addresses = [param.data_ptr() for param in params]
        self.tensors = [self.part(i) for i in range(len(params))]
        self.stand_ins = [self._stand_in(i) for i in range(len(params))]
        self._places = [self._places_of(i) for i in range(len(params))]
        self._buckets = self._fill_buckets()

    def _stand_in(self, i: int) -> Tensor:
        from torch.distributed.tensor import Shard

        param = self._params[i]
        mesh = self.together.mesh(param.device)
        return as_dtensor(self.tensors[i], mesh, [Shard(0)], param.shape) if param.dim() else param

    def _chunk(self, i: int) -> int:
        """Rows of the ranks that have most."""
        return -(-self._params[i].shape[0] // self.together.size)

    def part(self, i: int) -> Tensor:
        """What this rank steps on of ``params[i]``, where that lies by now."""
        return share_of(self._params[i], self.together.size, self.together.rank)

    def grad(self, i: int) -> Tensor | None:
        """The same of its gradient; what does not fit the parameter as it is."""
        param = self._params[i]
        grad = param.grad
        if grad is None or grad.layout != torch.strided or grad.shape != param.shape:
            return grad
        return share_of(grad, self.together.size, self.together.rank)

    def moved(self, i: int) -> Tensor | None:
        """:meth:`part`, if ``params[i]`` has other memory than it had."""
        return None if self._params[i].data_ptr() == self._addresses[i] else self.part(i)

    def follow(self, i: int) -> None:
        """All that is kept of the memory of ``params[i]`` beside ``tensors[i]`` is of the new."""
        self._addresses[i] = self._params[i].data_ptr()
        self._places[i] = self._places_of(i)

    # --- gathering --------------------------------------------------------------------------

    def _fill_buckets(self) -> list[tuple[int, list[Slot]]]:
        """What is sent in one call: bytes of a rank, and whose."""
        buckets: list[tuple[int, list[Slot]]] = []
        size = self.together.size
        for i, param in enumerate(self._params):
            if not param.dim() or not param.numel():
                continue
            nbytes = self._chunk(i) * (param.numel() // param.shape[0]) * param.element_size()
            padded = -(-nbytes // ALIGNMENT) * ALIGNMENT
            if not buckets or (buckets[-1][0] + padded) * size > BUCKET:
                buckets.append((0, []))
            begin, slots = buckets[-1]
            slots.append(Slot(i, slice(begin, begin + nbytes)))
            buckets[-1] = begin + padded, slots
        return buckets

    def _places_of(self, i: int) -> list[Tensor]:
        """Views of a parameter: ranks with equally many rows as one, then the one with fewer."""
        param = self._params[i].detach()
        if not param.dim() or not param.numel():
            return []
        rows, chunk = param.shape[0], self._chunk(i)
        full = rows // chunk
        found = [param[: full * chunk].unflatten(0, (full, chunk))]
        if rest := rows - full * chunk:
            found.append(param[-rest:].unsqueeze(0))
        return found

    def gather(self) -> None:
        """Gives all parameters the rows that other ranks have moved; to be called on all alike."""
        together = self.together
        for nbytes, slots in self._buckets:
            mine = torch.empty(nbytes, dtype=torch.uint8, device=together.device)
            sent = [self.tensors[slot.i] for slot in slots]
            for slot, rows in zip(slots, sent, strict=True):
                place = mine[slot.place][: rows.nbytes]
                place.view(rows.dtype).view(rows.shape).copy_(rows)
            all_of_them = mine.new_empty(together.size * nbytes)
            _all_gather(all_of_them, mine, group=together.group)
            table = all_of_them.view(together.size, nbytes)
            for slot in slots:
                self._receive(slot.i, table[:, slot.place])
        self.stale = False

    def _receive(self, i: int, table: Tensor) -> None:
        """``table`` has a line of bytes from every rank."""
        before, first = self._params[i]._version, 0
        for place in self._places[i]:
            lines = table[first : first + len(place), : place[0].nbytes]
            place.copy_(lines.view(place.dtype).view(place.shape))
            first += len(place)
        self.gathered[i] += self._params[i]._version - before


def step_gathered(
    gather: Callable[[], None],
    step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A step whose closures, and who comes after it, see the rows that all ranks have moved.

    Also where it raises, which ranks do alike; but not where it is interrupted (Ctrl-C), since
    others may not be: then they are gathered in the next step.

    Args:
        gather: Gathers rows that were moved.
        step: Takes it.
        args: What it is given by place.
        kwargs: And by name.
    """

    def before(closure: Any) -> Any:
        if not callable(closure):
            return closure

        def gathered() -> Any:
            gather()
            return closure()

        return gathered

    closures = {name: before(value) for name, value in kwargs.items()}
    try:
        found = step(*map(before, args), **closures)
    except Exception:
        gather()
        raise
    gather()
    return found
