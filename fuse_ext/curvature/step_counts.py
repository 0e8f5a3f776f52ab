"""How many Adam steps each parameter has taken: counted on the host, or where a graph replays them.

Eq. 2 corrects its averages by the step count k. Parameters may have different ones, since a step
leaves out who has no gradient. Whoever counts also says which parameters one call of the kernel
may take together: those of one group and of one count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.kernels.capture import refuse_while_capturing
from fuse_ext.vector.flat import FlatParams, ParamGroup


class HostCounts:
    """Counts in one vector on the CPU, in the dtype that torch gives them.

    Args:
        flat: The parameters.
    """

    on_device = False

    def __init__(self, flat: FlatParams) -> None:
        self._flat = flat
        double = torch.get_default_dtype() == torch.float64
        self._steps = torch.zeros(
            len(flat.params), dtype=torch.float64 if double else torch.float32, device="cpu"
        )
        self._one = torch.ones((), dtype=self._steps.dtype, device="cpu")
        # The count that all parameters share, or None when they differ; and what it was read
        # from: users may write to the counts in ``state``.
        self._shared: int | None = 0
        self._version = 0

    def adopt(self, steps: list[float]) -> None:
        """Takes over what a state holds, 0 where it holds nothing."""
        for i, count in enumerate(steps):
            self._steps[i] = count
        self._read_shared()

    def entry(self, i: int) -> Tensor:
        """The count of ``params[i]``, as its state shows it."""
        return self._steps[i]

    def of(self, i: int) -> float:
        """The count of ``params[i]`` as a number."""
        return float(self._steps[i])

    @property
    def largest(self) -> int:
        """The largest count."""
        return int(self._steps.max())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._steps.nbytes

    def shared(self) -> int | None:
        """The count of all parameters, None where they differ."""
        if self._steps._version != self._version:
            self._read_shared()
        return self._shared

    def _read_shared(self) -> None:
        steps = set(self._steps.tolist())
        self._shared = int(steps.pop()) if len(steps) == 1 else None
        self._version = self._steps._version

    def advance_all(self, step: int) -> None:
        """All parameters have taken this step."""
        self._steps.add_(self._one)
        self._shared, self._version = step, self._steps._version

    def advance(self, stepped: list[int]) -> None:
        """These parameters have taken one step."""
        # A list would become a tensor on the default device, in some versions of torch.
        index = torch.tensor(stepped, dtype=torch.int64, device="cpu")
        self._steps.index_add_(0, index, self._one.expand(len(stepped)))
        self._read_shared()

    def calls(
        self, groups: list[ParamGroup], grads: list[Tensor | None]
    ) -> list[tuple[ParamGroup, list[int], int]]:
        """(group, parameters, step to come) of every kernel call."""
        steps = [int(step) for step in self._steps.tolist()]
        found: dict[tuple[int, int], list[int]] = {}
        for which, place in enumerate(self._flat.group_slices):
            for i in range(place.start, place.stop):
                if grads[i] is not None:
                    found.setdefault((which, steps[i] + 1), []).append(i)
        return [(groups[which], members, step) for (which, step), members in found.items()]


class DeviceCounts:
    """Counts beside the parameters, which the kernel advances, for steps that a graph repeats.

    Parameters of one group and stretch that have always had gradients together are one class: their
    counts lie side by side on the device, equal, and one call of the kernel takes all of them.

    Args:
        flat: The parameters.

    Attributes:
        values: Each class's counts.
        members: Each class's parameters.
        groups: Each class's group.
    """

    on_device = True

    def __init__(self, flat: FlatParams) -> None:
        refuse_while_capturing(flat.device, "Adam's state is made")
        self._flat = flat
        double = torch.get_default_dtype() == torch.float64
        self._dtype = torch.float64 if double else torch.float32
        self.values: list[Tensor] = []
        self.members: list[list[int]] = []
        self.groups: list[int] = []
        # Each parameter's class and place in it.
        self._class_of = [0] * len(flat.params)
        self._place_of = [0] * len(flat.params)

    def adopt(self, steps: list[float]) -> None:
        """Takes over what a state holds, 0 where it holds nothing."""
        found: dict[tuple[int, float, int], list[int]] = {}
        stretch_of = {i: k for k, s in enumerate(self._flat.stretches) for i in s.members}
        for group, place in enumerate(self._flat.group_slices):
            for i in range(place.start, place.stop):
                found.setdefault((group, steps[i], stretch_of[i]), []).append(i)
        for (group, count, _), members in found.items():
            size = (len(members),)
            values = torch.full(size, count, dtype=self._dtype, device=self._flat.device)
            self._new_class(values, group, members)

    def _new_class(self, values: Tensor, group: int, members: list[int]) -> int:
        self.values.append(values)
        self.groups.append(group)
        self.members.append([])
        self._seat(len(self.values) - 1, members)
        return len(self.values) - 1

    def _seat(self, which: int, members: list[int]) -> None:
        self.members[which] = members
        for place, i in enumerate(members):
            self._class_of[i], self._place_of[i] = which, place

    def entry(self, i: int) -> Tensor:
        """The count of ``params[i]``, as its state shows it."""
        return self.values[self._class_of[i]][self._place_of[i]]

    def of(self, i: int) -> float:
        """The count of ``params[i]`` as a number; reads the device."""
        return float(self.entry(i))

    @property
    def largest(self) -> int:
        """The largest count; reads the device."""
        return max((int(values.max()) for values in self.values if len(values)), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(values.nbytes for values in self.values)

    def classes_with(self, grads: list[Any]) -> tuple[list[int], list[int]]:
        """The classes whose members have gradients; one that is divided becomes two.

        Returns:
            Those classes, and the parameters whose count lies elsewhere now.
        """
        chosen: dict[int, list[int]] = {}
        for i, grad in enumerate(grads):
            if grad is not None:
                chosen.setdefault(self._class_of[i], []).append(i)
        classes, resettled = [], []
        for which, stepping in chosen.items():
            members = self.members[which]
            if len(stepping) < len(members):
                refuse_while_capturing(
                    self._flat.device,
                    f"{len(stepping)} of {len(members)} parameters that have taken as many steps "
                    "have gradients now, and part from the others",
                )
                values = self.values[which]
                leaving = set(stepping)
                self._seat(which, [i for i in members if i not in leaving])
                self.values[which] = values[len(stepping) :].clone()
                which = self._new_class(
                    values[: len(stepping)].clone(), self.groups[which], stepping
                )
                resettled.extend(members)
            classes.append(which)
        return classes, resettled
