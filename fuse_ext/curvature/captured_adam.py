"""Adam with capturable=True: step counts and rates on the device, nothing read from there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.moments import AdamEngine, adam_numbers
from fuse_ext.kernels.ops import Ops
from fuse_ext.phase.capture import check_lr_tensor, refuse_while_capturing
from fuse_ext.vector.checks import check_grads
from fuse_ext.vector.flat import FlatParams, ParamGroup


class CapturedAdam(AdamEngine):
    """As :class:`AdamEngine`, to the bit, for steps that a CUDA graph repeats.

    Parameters of one group that have always had gradients together are one class: their step counts
    lie side by side on the device, equal, and the kernel advances all of them.
    """

    def __init__(
        self,
        flat: FlatParams,
        ops: Ops,
        state: dict[Any, Any],
        groups: list[ParamGroup],
        moment_dtype: torch.dtype | None = None,
    ) -> None:
        refuse_while_capturing(flat.device, "Adam's state is made")
        self._sums: list[Tensor] = []  # of squared gradients, for each call of the last step
        self._calls = 0
        super().__init__(flat, ops, state, groups, moment_dtype)

    def _adopt_moments(self) -> None:
        # Each class's step counts, and its group; each parameter's class and place in it.
        self._counts: list[Tensor] = []
        self._group_of: list[int] = []
        self._members: list[list[int]] = []
        self._class_of = [0] * len(self._flat.params)
        self._place_of = [0] * len(self._flat.params)
        found: dict[tuple[int, float], list[int]] = {}
        for group, place in enumerate(self._flat.group_slices):
            for i in range(place.start, place.stop):
                entry = self._state.get(self._flat.params[i]) or {}
                found.setdefault((group, float(entry.get("step", 0.0))), []).append(i)
        for (group, steps), members in found.items():
            size, dtype = (len(members),), self._steps.dtype
            count = torch.full(size, steps, dtype=dtype, device=self._flat.device)
            self._new_class(count, group, members)
        super()._adopt_moments()

    def _new_class(self, count: Tensor, group: int, members: list[int]) -> int:
        self._counts.append(count)
        self._group_of.append(group)
        self._members.append([])
        self._seat(len(self._counts) - 1, members)
        return len(self._counts) - 1

    def _seat(self, which: int, members: list[int]) -> None:
        self._members[which] = members
        for place, i in enumerate(members):
            self._class_of[i], self._place_of[i] = which, place

    def _read_shared_step(self) -> None:
        """There is none on the host."""

    def _step_entry(self, i: int) -> Tensor:
        return self._counts[self._class_of[i]][self._place_of[i]]

    @property
    def grad_norm_sq(self) -> float:
        """||g||^2 of the last step; reads the device."""
        return sum(float(total) for total in self._sums[: self._calls])

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        moments = sum(moment.nbytes for moment in self._moments.values())
        return moments + sum(count.nbytes for count in self._counts)

    def step(
        self,
        groups: list[ParamGroup],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        loss: Tensor | None = None,
        grad_square: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        """One step on every parameter that has a gradient.

        Not taken where ``found_inf`` is not 0, or ``loss`` or ``grad_square`` is not finite;
        ``counts`` (float64 [2]) counts the steps taken and those that were not.

        Raises:
            TypeError, ValueError, RuntimeError: As :class:`AdamEngine`; other parameters have
                gradients than in the steps before a capture.
        """
        flat = self._flat
        flat.check_unchanged()
        self._check_amsgrad(groups)
        grads = [p.grad for p in flat.params]
        check_grads(flat.params, grads)
        for group in groups:
            if isinstance(group["lr"], Tensor):
                check_lr_tensor(group["lr"], flat.device)
        classes = self._classes_with(grads)
        while len(self._sums) < len(classes):
            self._sums.append(torch.zeros(1, dtype=torch.float64, device=flat.device))
        self._calls = len(classes)
        for which, total in zip(classes, self._sums, strict=False):
            group, members = groups[self._group_of[which]], self._members[which]
            chosen: list[Any] = [grads[i] for i in members]
            lr = group["lr"]
            on_device = isinstance(lr, Tensor)
            numbers = adam_numbers(group, 1, 0.0 if on_device else float(lr))
            self._ops.adam_step(
                flat.reals([flat.params[i] for i in members]),
                flat.reals(chosen),
                [flat.offsets[i] for i in members],
                self._moments["exp_avg"],
                self._moments["exp_avg_sq"],
                self._moments["max_exp_avg_sq"] if group["amsgrad"] else None,
                total,
                grad_scale=grad_scale,
                found_inf=found_inf,
                step_tensor=self._counts[which],
                lr_tensor=lr if on_device else None,
                loss=loss,
                grad_square=grad_square,
                counts=counts,
                **numbers._asdict(),
            )
            counts = None  # once a step
        if counts is not None:  # a step without gradients
            counts[:1].add_(1.0)
        if not self._all_exposed:
            self._expose_new(i for which in classes for i in self._members[which])

    def _classes_with(self, grads: list[Tensor | None]) -> list[int]:
        """The classes whose members have gradients; one that is divided becomes two."""
        chosen: dict[int, list[int]] = {}
        for i, grad in enumerate(grads):
            if grad is not None:
                chosen.setdefault(self._class_of[i], []).append(i)
        classes = []
        for which, stepping in chosen.items():
            members = self._members[which]
            if len(stepping) < len(members):
                refuse_while_capturing(
                    self._flat.device,
                    f"{len(stepping)} of {len(members)} parameters that have taken as many steps "
                    "have gradients now, and part from the others",
                )
                count = self._counts[which]
                leaving = set(stepping)
                self._seat(which, [i for i in members if i not in leaving])
                self._counts[which] = count[len(stepping) :].clone()
                group = self._group_of[which]
                new = self._new_class(count[: len(stepping)].clone(), group, stepping)
                for i in members:
                    if self._exposed[i]:
                        self._state[self._flat.params[i]]["step"] = self._step_entry(i)
                which = new
            classes.append(which)
        return classes


def make_adam(
    flat: FlatParams, ops: Ops, state: dict[Any, Any], groups: list[ParamGroup]
) -> AdamEngine:
    """The engine for these groups, capturable or not."""
    kind = CapturedAdam if groups[0]["capturable"] else AdamEngine
    return kind(flat, ops, state, groups, groups[0]["moment_dtype"])
