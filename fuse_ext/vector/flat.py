"""The parameters of an optimizer as one logical vector, some of them as a part of it.

State is flat and ours; parameters and gradients stay the user's tensors (design: no ``p.data`` is
re-pointed, nothing is gathered). Complex parameters take part as pairs of real numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fuse_ext import _C
from fuse_ext.vector.checks import check_grads, check_params
from fuse_ext.vector.measures import Measures
from fuse_ext.vector.ranks import find_ranks, measures_of, unsaid
from fuse_ext.vector.rows.rows import Rows
from fuse_ext.vector.shards import Stretch, is_dtensor, lay_out, like, local

ParamGroup: TypeAlias = dict[str, Any]
Closure: TypeAlias = Callable[[], Any]
# What the flat state is kept in.
WIDE = (torch.float32, torch.float64)
# Sets of parameters with gradients that are known at the same time; an index of each costs little.
MOST_PARTS = 64


class Part:
    """Some parameters of a flat vector, at their places in it.

    Args:
        flat: The layout of all.
        absent: Which of its parameters are not among them, in order.

    Attributes:
        indices: Which are, in the order of their places.
        params, offsets: Their tensors (of DTensors what lies here), and where each begins in the
            flat vector.
        numel: Elements of theirs, two per complex number.
        layout: What C++ knows of them.
    """

    def __init__(self, flat: FlatParams, absent: tuple[int, ...]) -> None:
        self.flat, self.absent = flat, absent
        left_out = set(absent)
        self.indices = [i for i in flat.order if i not in left_out]
        self._chosen: bool = bool(absent) or flat.permuted
        self.params = self.pick(flat.tensors)
        self.offsets = self.pick(flat.offsets)
        self.numel = sum(flat.sizes[i] for i in self.indices)
        self.layout = _C.Layout([self.params], self.offsets) if self._chosen else flat.layout

    def pick(self, values: list[Any]) -> list[Any]:
        """Of one value for each parameter of the flat vector those of this part; [] stays []."""
        return [values[i] for i in self.indices] if values and self._chosen else values

    def reals(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors, complex ones as real views of shape [..., 2]."""
        return self.flat.reals(tensors)


class FlatParams:
    """Where every parameter lies in the flat vector.

    Args:
        groups: ``Optimizer.param_groups`` itself; the vector follows their order.
        process_group: Who steps together; see :func:`~fuse_ext.vector.ranks.find_ranks`.

    Attributes:
        params: All parameters, as the groups have them.
        tensors: The same list or, where some are DTensors, what lies here of each; with
            ``shard_state`` this rank's rows.
        rows: Whose they are; None without ``shard_state``.
        stand_ins: How each is spread: the parameter itself, or a DTensor of its rows.
        offsets: First flat index of each; even for complex ones, which view pairs of reals.
        sizes: Elements of each that lie here (two per complex number).
        numel: Length of the flat vector.
        spread: Whether some of those are DTensors.
        total, usual: Elements of all parameters, and of those that lie on a rank on average.
        unsaid: Whether other ranks may step with this one, and nobody has said so.
        together: The ranks that hold it; None for this process alone.
        stretches: What of it is divided among them in one way.
        order, permuted: The parameters by their places, and whether that is another order: those
            that equally many ranks hold lie together.
        group_slices: For each group, its slice of ``params``.
        device: Where all of them live.
        dtype: Of the flat state: float64 if any parameter has it, else float32.
        layout: What C++ knows of all this: quick answers for the common case.
        memo: For the optimizer, to keep what it has prepared for this layout.
        whole: All parameters as a :class:`Part`.
        measures: Numbers that all ranks agree on.
    """

    def __init__(self, groups: list[ParamGroup], process_group: Any = None) -> None:
        self._groups = groups
        self.params: list[Tensor] = []
        self.group_slices: list[slice] = []
        for group in groups:
            first = len(self.params)
            self.params.extend(group["params"])
            self.group_slices.append(slice(first, len(self.params)))
        self.rows: Rows | None = None
        if groups and groups[0].get("shard_state"):
            check_params(self.params)
            self.rows = Rows(self.params, process_group)
        self.stand_ins = self.params if self.rows is None else self.rows.stand_ins
        self.spread = any(map(is_dtensor, self.stand_ins))
        self.tensors = self.params if self.rows is None else self.rows.tensors
        if self.spread and self.rows is None:
            # Views of their own, whatever becomes of the objects inside DTensors.
            self.tensors = [local(p).detach() if is_dtensor(p) else p for p in self.params]
        check_params(self.tensors, self.params)
        self.device = self.tensors[0].device
        double = (torch.float64, torch.complex128)
        self.dtype = torch.float64 if any(p.dtype in double for p in self.params) else torch.float32
        self._complex = any(p.is_complex() for p in self.params)
        self.sizes = [p.numel() * (2 if p.is_complex() else 1) for p in self.tensors]
        self.unsaid = unsaid(self.params, process_group)
        self.together = (
            find_ranks(self.params, process_group, self.device)
            if self.rows is None
            else self.rows.together
        )
        ranks = 1 if self.together is None else self.together.size
        places = lay_out(self.stand_ins, self.sizes, ranks)
        self.stretches = places.stretches
        self.offsets: list[int] = places.offsets
        self.numel: int = places.numel
        self.total, self.usual = places.total, places.usual
        self.order: list[int] = places.order
        self.permuted: bool = self.order != list(range(len(self.params)))
        self.measures: Measures = measures_of(self.together, self.params)
        self.memo: Any = None
        tensors = self.tensors
        self.layout: Any = _C.Layout([tensors[place] for place in self.group_slices], self.offsets)
        self._tells_places = self.rows is None and not self.spread
        self.whole = Part(self, ())
        self._parts: dict[tuple[int, ...], Part] = {(): self.whole}
        self._formats = self._formats_now()
        self._described = [_describe(param) for param in self.tensors]
        self._forms = [_form(param) for param in self.tensors]

    def _follow(self) -> None:
        """Looks where DTensors, or parameters, keep what lies here, which may have moved."""
        for i, (param, mine) in enumerate(zip(self.params, self.tensors, strict=True)):
            if self.rows is None:
                now = None if local(param).data_ptr() == mine.data_ptr() else local(param)
            else:
                now = self.rows.moved(i)
            if now is None:
                continue
            if _form(now) != self._forms[i] or now.dtype != mine.dtype:
                raise ValueError(
                    f"params[{i}] is now {_describe(now)} on this rank, but was "
                    f"{self._described[i]} when the state was made; make a new optimizer"
                )
            mine.data = now
            if self.rows is not None:
                self.rows.follow(i)

    def _formats_now(self) -> tuple[Any, ...]:
        params = self.tensors
        numels, strides = list(map(Tensor.numel, params)), list(map(Tensor.stride, params))
        return numels, strides, [p.dtype for p in params], params[0].device

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of the parameters, when this layout was made."""
        found: list[torch.dtype] = self._formats[2]
        return found

    def replaced(self) -> bool:
        """Whether the groups hold other tensors than when this layout was made."""
        if self.layout.unchanged(self._groups):
            return False
        if len(self._groups) != len(self.group_slices):
            return True
        for group, place in zip(self._groups, self.group_slices, strict=True):
            now, then = group["params"], self.params[place]
            if len(now) != len(then) or not all(map(operator.is_, now, then)):
                return True
        return False

    def check_unchanged(self) -> None:
        """Raises ValueError where a parameter is not what the flat state was laid out for.

        Another shape, dtype, device or memory format (``model.to(...)`` after the first step), or
        another tensor in a parameter group.
        """
        if self.layout.unchanged(self._groups):
            return
        self._check_not_replaced()
        if self.spread:
            self._follow()
        if self._formats_now() == self._formats:
            return
        for i, (param, before) in enumerate(zip(self.tensors, self._described, strict=True)):
            if _describe(param) != before:
                self._refuse(i)

    def check_forms(self) -> None:
        """As :meth:`check_unchanged`, but parameters may have other dtypes by now.

        And strides, as long as their elements lie in the flat state as they did.
        """
        self._check_not_replaced()
        for i, (param, before) in enumerate(zip(self.tensors, self._forms, strict=True)):
            if _form(param) != before:
                self._refuse(i)

    def _check_not_replaced(self) -> None:
        if self.replaced():
            raise ValueError(
                f"param_groups no longer hold the {len(self.params)} tensors that the state was "
                "made for; use add_param_group, or make a new optimizer"
            )

    def _refuse(self, i: int) -> None:
        param, before = self.tensors[i], self._formats[2][i]
        instead = "convert parameters before the first step"
        real = param.dtype.to_real()
        wider = real in WIDE and torch.finfo(param.dtype).eps < torch.finfo(before).eps
        if wider and _form(param) == self._forms[i]:
            instead = f"call optimizer.continue_in({real}) to convert the state too"
        raise ValueError(
            f"params[{i}] is now {_describe(param)}, but was {self._described[i]} when the state "
            f"was made; {instead}, or make a new optimizer"
        )

    def places(self) -> Any:
        """The versions and addresses of all parameters: differs once anyone has moved them."""
        if self._tells_places and (known := self.layout.places()):
            return known
        if self.rows is not None:
            return [(self.version(i), p.data_ptr()) for i, p in enumerate(self.params)]
        places = [(p._version, p.data_ptr()) for p in self.tensors]
        # An op on a DTensor counts there alone.
        return (places, [p._version for p in self.params]) if self.spread else places

    def version(self, i: int) -> int:
        """How often ``params[i]`` was written to, but for what :meth:`gather` has written."""
        return self.tensors[i]._version - (0 if self.rows is None else self.rows.gathered[i])

    def note_move(self) -> None:
        """What lies here was moved, or will have been when this step ends; on all ranks alike."""
        if self.rows is not None:
            self.rows.stale = True

    def gather(self) -> None:
        """With ``shard_state``, has all ranks' rows where any were moved; else nothing is sent."""
        if self.rows is not None and self.rows.stale:
            self.rows.gather()

    def reals(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors, complex ones as real views of shape [..., 2]."""
        if not self._complex:
            return tensors
        return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]

    def gradients(self, lr_scale: list[float] | None = None) -> tuple[Part, list[Tensor]]:
        """The parameters that a step may move, and their gradients as real tensors.

        Left out are those without a gradient, and those with a share of 0 in ``lr_scale``.

        Raises:
            TypeError, ValueError: A gradient does not fit its parameter.
        """
        plain = self.layout.grads()
        if plain is not None and not (lr_scale and 0.0 in lr_scale):
            return self.whole, plain
        grads = self.grads()
        check_grads(self.tensors, grads)
        absent = tuple(
            i for i, grad in enumerate(grads) if grad is None or (lr_scale and lr_scale[i] == 0.0)
        )
        part = self.part(absent)
        return part, self.reals([self._own_memory(i) for i in part.indices])

    def _own_memory(self, i: int) -> Tensor:
        """A gradient whose memory holds its values, which is not so of autograd's lazy views."""
        grad = self.grad(i)
        assert grad is not None
        if grad.is_conj() or grad.is_neg():
            # Line searches write to gradients.
            param = self.params[i]
            if is_dtensor(param):
                grad = grad.resolve_neg()
                param.grad = like(grad, param)
            else:
                assert param.grad is not None
                param.grad = param.grad.resolve_conj().resolve_neg()
                grad = self.grad(i)
                assert grad is not None
        return grad

    def grad(self, i: int) -> Tensor | None:
        """What lies here of the gradient of ``params[i]``."""
        param = self.params[i]
        grad = param.grad
        if grad is None or self.tensors[i] is param:
            return grad
        if self.rows is not None:
            return self.rows.grad(i)
        if grad.placements != param.placements:  # type: ignore[attr-defined]
            grad = param.grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
        return local(grad)

    def grads(self) -> list[Tensor | None]:
        """:meth:`grad` of all."""
        return [self.grad(i) for i in range(len(self.params))]

    def fill_gradients(self) -> None:
        """Gives parameters zeros for a gradient where another rank has one, and this one none."""
        self.measures.check_alike()
        missing = [param.grad is None for param in self.params]
        counts = self.measures.total(*map(float, missing))
        for param, is_missing, count in zip(self.params, missing, counts, strict=True):
            if is_missing and count < self.measures.ranks:
                param.grad = torch.zeros_like(param)

    def alike(self, members: list[int]) -> list[tuple[list[int], Stretch]]:
        """These parameters, in flat order, by the stretches that they lie in."""
        if len(self.stretches) == 1:
            return [(members, self.stretches[0])]
        chosen = set(members)
        found = [([i for i in s.members if i in chosen], s) for s in self.stretches]
        return [(some, stretch) for some, stretch in found if some]

    def part(self, absent: tuple[int, ...]) -> Part:
        """All parameters but these."""
        found = self._parts.get(absent)
        if found is None:
            if len(self._parts) > MOST_PARTS:  # layers left out at random: keep the whole alone
                self._parts = {(): self.whole}
            found = self._parts[absent] = Part(self, absent)
        return found

    def piece(self, flat: Tensor, i: int) -> Tensor:
        """The part of a flat tensor that belongs to ``params[i]``, as a view of its shape."""
        param, offset = self.tensors[i], self.offsets[i]
        real = torch.view_as_real(param) if param.is_complex() else param
        part = flat[offset : offset + self.sizes[i]]
        if torch.ops.aten.is_non_overlapping_and_dense(real):
            part = part.as_strided(real.size(), real.stride(), part.storage_offset())
        else:
            part = part.view(real.size())
        return torch.view_as_complex(part) if param.is_complex() else part

    def new_vector(self) -> Tensor:
        """A vector of zeros as long as the flat state, and of its dtype."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def shown(self, flat: Tensor, i: int) -> Tensor:
        """:meth:`piece`, as a DTensor where the parameter, or its stand-in, is one."""
        return like(self.piece(flat, i), self.stand_ins[i])

    def stretch(self, flat: Tensor, i: int) -> Tensor:
        """The part of a flat tensor that belongs to ``params[i]``, as it lies there."""
        return flat[self.offsets[i] : self.offsets[i] + self.sizes[i]]

    def per_segment(self, values: list[Any], neutral: Any) -> list[Any]:
        """One value per group spread over its parameters; empty when all are ``neutral``."""
        if all(value == neutral for value in values):
            return []
        return [
            value
            for value, place in zip(values, self.group_slices, strict=True)
            for _ in range(place.stop - place.start)
        ]


def _form(param: Tensor) -> tuple[Any, ...]:
    """What decides how a parameter lies in the flat state: all but its dtype's width."""
    dense = torch.ops.aten.is_non_overlapping_and_dense(param)
    order = param.stride() if dense else torch.empty(param.shape, device="meta").stride()
    return param.is_complex(), param.shape, order, param.device


def _describe(param: Tensor) -> str:
    shape, strides = tuple(param.shape), param.stride()
    return f"{param.dtype} of shape {shape} and strides {strides} on {param.device}"


def memory_order(flat: FlatParams) -> list[list[int]]:
    """Strides of the parameters, whose memory order rows follow; empty if all are row-major."""
    params = flat.tensors if flat.rows is None else flat.params  # all ranks say the same
    if all(p.is_contiguous() for p in params):
        return []
    return [list(p.stride()) for p in params]
