"""Adam's moments over the flat vector, and the fused step of Eq. 2 that advances them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from fuse_ext.curvature.step_counts import DeviceCounts, HostCounts
from fuse_ext.kernels.bound_ops import AdamNumbers
from fuse_ext.kernels.capture import check_lr_tensor
from fuse_ext.kernels.ops import Ops, zeros_in_large_pages
from fuse_ext.vector.checks import check_grads
from fuse_ext.vector.flat import FlatParams, ParamGroup
from fuse_ext.vector.narrow.masters import MASTER, Masters
from fuse_ext.vector.reduced_ops import bound_ops
from fuse_ext.vector.shards import Stretch, local, placed

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def check_adam_state(
    state: dict[Any, Any], params: list[Tensor], where: list[Any], source: str = "state_dict"
) -> None:
    """Raises ValueError unless ``state`` holds Adam's moments in the parameters' shapes."""
    for i, (param, key) in enumerate(zip(params, where, strict=True)):
        entry = state.get(key)
        if not entry or entry.keys() == {MASTER}:  # which other phases leave
            continue
        for name in ("step", *MOMENTS[:2]):
            if name not in entry:
                raise ValueError(
                    f"{source} is not Adam's: the state of params[{i}] has no {name!r}, "
                    f"only {sorted(map(str, entry))}"
                )
        step = entry["step"]
        if not _is_count(step):
            raise ValueError(f"{source} does not fit: step of params[{i}] is {step!r}, no count")
        for name in (*MOMENTS, MASTER):
            moment = entry.get(name)
            if moment is None:
                continue
            if not isinstance(moment, Tensor) or moment.is_complex() != param.is_complex():
                what = moment.dtype if isinstance(moment, Tensor) else type(moment).__name__
                raise ValueError(
                    f"{source} does not fit: {name} of params[{i}] is {what}, the parameter "
                    f"{param.dtype}"
                )
            if moment.shape != param.shape:
                raise ValueError(
                    f"{source} does not fit: {name} of params[{i}] has shape "
                    f"{tuple(moment.shape)}, the parameter {tuple(param.shape)}"
                )


def _is_count(step: Any) -> bool:
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    return isinstance(step, (int, float)) and step >= 0 and math.isfinite(step) and step % 1 == 0


def check_moments_fit(dtype: torch.dtype | None, params: list[Tensor]) -> None:
    """Raises ValueError unless these parameters may have moments of this dtype."""
    if dtype is None:
        return
    for i, param in enumerate(params):
        if param.dtype == torch.float64 or param.is_complex():
            raise ValueError(
                f"moment_dtype={dtype} is for real parameters of at most float32, "
                f"params[{i}] has {param.dtype}"
            )


class Moments:
    """Adam's moments for a flat vector of parameters, and the fused step.

    ``state`` is ``Optimizer.state``: each parameter that has had a gradient gets torch's own
    entries (step, exp_avg, exp_avg_sq and, for amsgrad, max_exp_avg_sq), as views of the flat
    buffers, so that checkpoints are those of torch.optim.Adam.

    Memory: 8 bytes a parameter (12 with amsgrad) in float32, twice that in float64, half of it in
    bfloat16; with master weights 4 more.

    Args:
        flat: The parameters.
        ops: Kernels to use.
        state: ``Optimizer.state``; moments that it holds are taken over.
        groups: ``Optimizer.param_groups``.
        dtype: How moments are stored; None for the flat state's.
        on_device: Count steps beside the parameters, for steps that a CUDA graph repeats.
        keeps_masters: Step weights in the flat state's dtype, of which narrower parameters are the
            rounding.
    """

    def __init__(
        self,
        flat: FlatParams,
        ops: Ops,
        state: dict[Any, Any],
        groups: list[ParamGroup],
        dtype: torch.dtype | None = None,
        on_device: bool = False,
        keeps_masters: bool = False,
    ) -> None:
        self.counts: HostCounts | DeviceCounts
        self.counts = DeviceCounts(flat) if on_device else HostCounts(flat)
        self._flat, self._ops, self._state = flat, ops, state
        self._bound = bound_ops(ops, flat.whole)
        self._group_amsgrad = [group["amsgrad"] for group in groups]
        self._amsgrad = [group["amsgrad"] for group in groups for _ in group["params"]]
        names = MOMENTS if any(self._amsgrad) else MOMENTS[:2]
        check_moments_fit(dtype, flat.params)
        self._moments = {
            name: zeros_in_large_pages(flat.numel, dtype or flat.dtype, flat.device)
            for name in names
        }
        self._exposed = [False] * len(flat.params)
        self.masters = Masters(flat, state) if keeps_masters else None
        # The sums of squared gradients, one for each call of the last step that has not been read.
        self._totals = self._new_totals(len(groups))
        self._sums = list(self._totals.split(1))
        self._calls = 0
        self._grad_norm_sq: float | None = 0.0
        self._adopt()

    def _new_totals(self, calls: int) -> Tensor:
        return torch.zeros(calls, dtype=torch.float64, device=self._flat.device)

    def _make_room(self, calls: int) -> None:
        """For the sums of so many calls."""
        if calls > len(self._sums):
            self._totals = self._new_totals(calls)
            self._sums = list(self._totals.split(1))

    def _adopt(self) -> None:
        """Takes over whatever moments ``state`` holds and points it at the flat buffers."""
        held = {
            i: entry
            for i, param in enumerate(self._flat.params)
            if (entry := self._state.get(param)) and "exp_avg" in entry
        }
        steps = [float(held[i]["step"]) if i in held else 0.0 for i in range(len(self._exposed))]
        self.counts.adopt(steps)
        for i, entry in held.items():
            for name, moment in self._moments.items():
                if name in entry:
                    mine = local(placed(entry[name], self._flat.stand_ins[i]))
                    self._flat.piece(moment, i).copy_(mine)
            self._expose(i)
        self._entries = list(self._state.values())
        self._all_exposed = all(self._exposed)

    def _expose(self, i: int) -> None:
        entry = self._state[self._flat.params[i]]
        entry["step"] = self.counts.entry(i)
        for name in MOMENTS if self._amsgrad[i] else MOMENTS[:2]:
            entry[name] = self._flat.shown(self._moments[name], i)
        if self.masters is not None:
            self.masters.show(i)
        else:  # of a checkpoint
            entry.pop(MASTER, None)
        self._exposed[i] = True

    def _expose_new(self, stepped: Iterable[int]) -> None:
        """Gives parameters that took their first step their state."""
        new = [i for i in stepped if not self._exposed[i]]
        for i in new:
            self._expose(i)
        if new:
            self._entries = list(self._state.values())
            self._all_exposed = all(self._exposed)

    def outdated(self, state: dict[Any, Any]) -> bool:
        """Whether the user has replaced parameters in the groups, or entries of ``state``."""
        same = len(state) == len(self._entries)
        same = same and all(map(operator.is_, state.values(), self._entries))
        return not same or self._flat.replaced()

    @property
    def grad_norm_sq(self) -> float:
        """||g||^2 of the last step (Eq. 3's summand), out of the kernel that made it."""
        if self._grad_norm_sq is None:
            own = float(sum(self._totals[: self._calls].tolist()))
            self._grad_norm_sq = self._flat.measures.total(own)[0]
        return self._grad_norm_sq

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        held = sum(moment.nbytes for moment in self._moments.values()) + self.counts.nbytes
        return held + (0 if self.masters is None else self.masters.nbytes)

    def weight(self, i: int) -> Tensor:
        """What steps of ``params[i]`` are taken on: the parameter, or its master weight."""
        return self._flat.tensors[i] if self.masters is None else self.masters.weight(i)

    def _round(self, stepped: Iterable[int]) -> None:
        if self.masters is not None:
            self.masters.round(stepped)

    def stored(self, name: str) -> Tensor:
        """One of the moments as a flat vector, in the dtype it is stored in."""
        return self._moments[name]

    # --- a step -----------------------------------------------------------------------------

    def step(
        self,
        groups: list[ParamGroup],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        leave_out: frozenset[int] = frozenset(),
    ) -> None:
        """One step on every parameter that has a gradient and is not to be left out.

        Raises:
            TypeError, ValueError, RuntimeError: A gradient or parameter that the kernels cannot
                take; nothing has changed then.
        """
        counts = self.counts
        if isinstance(counts, DeviceCounts):
            return self.step_on_device(groups, grad_scale, found_inf)
        flat = self._flat
        flat.check_unchanged()
        flat.note_move()
        self._check_amsgrad(groups)
        shared, plain = counts.shared(), flat.layout.grads()
        whole = len(groups) == 1 and not leave_out and self.masters is None
        if whole and plain is not None and shared is not None:
            self._step_all(counts, groups[0], shared + 1, plain, grad_scale, found_inf)
            return None
        grads = [None if i in leave_out else flat.grad(i) for i in range(len(flat.params))]
        calls = counts.calls(groups, grads)
        check_grads(flat.tensors, grads)  # no call may fail after another has changed things
        parts = [
            (some, stretch, group, adam_numbers(group, step, float(group["lr"])))
            for group, members, step in calls
            for some, stretch in flat.alike(members)
        ]
        if found_inf is not None and float(found_inf) != 0.0:
            return None
        self._make_room(len(parts))
        for part, total in zip(parts, self._sums, strict=False):
            self._call(*part, grads, total, grad_scale=grad_scale)
        self._grad_norm_sq, self._calls = None, len(parts)  # read when asked for
        stepped = [i for _, members, _ in calls for i in members]
        if stepped:
            counts.advance(stepped)
            self._round(stepped)
            self._expose_new(stepped)
        return None

    def _step_all(
        self,
        counts: HostCounts,
        group: ParamGroup,
        step: int,
        grads: list[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """The common case: one group, all of whose parameters have taken as many steps."""
        numbers = adam_numbers(group, step, float(group["lr"]))
        if found_inf is not None and float(found_inf) != 0.0:
            return
        moments = self._moments
        self._bound.adam_step(
            grads,
            moments["exp_avg"],
            moments["exp_avg_sq"],
            moments.get("max_exp_avg_sq"),
            self._sums[0],
            grad_scale,
            *numbers,
        )
        self._grad_norm_sq, self._calls = None, 1  # read when asked for
        counts.advance_all(step)
        if not self._all_exposed:
            self._expose_new(range(len(grads)))

    def step_on_device(
        self,
        groups: list[ParamGroup],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        loss: Tensor | None = None,
        grad_square: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> None:
        """:meth:`step`, to the bit, with nothing read from the device.

        Not taken where ``found_inf`` is not 0, or ``loss`` or ``grad_square`` is not finite;
        ``counted`` (float64 [2]) counts the steps taken and those that were not.

        Raises:
            TypeError, ValueError, RuntimeError: As :meth:`step`; other parameters have gradients
                than in the steps before a capture.
        """
        flat, counts = self._flat, self.counts
        assert isinstance(counts, DeviceCounts)
        flat.check_unchanged()
        self._check_amsgrad(groups)
        grads = flat.grads()
        check_grads(flat.tensors, grads)
        for group in groups:
            if isinstance(group["lr"], Tensor):
                check_lr_tensor(group["lr"], flat.device)
        classes, resettled = counts.classes_with(grads)
        for i in resettled:
            if self._exposed[i]:
                self._state[flat.params[i]]["step"] = counts.entry(i)
        self._make_room(len(classes))
        self._grad_norm_sq, self._calls = None, len(classes)
        for which, total in zip(classes, self._sums, strict=False):
            group, lr = groups[counts.groups[which]], groups[counts.groups[which]]["lr"]
            on_device = isinstance(lr, Tensor)
            ((members, stretch),) = flat.alike(counts.members[which])
            self._call(
                members,
                stretch,
                group,
                adam_numbers(group, 1, 0.0 if on_device else float(lr)),
                grads,
                total,
                grad_scale=grad_scale,
                found_inf=found_inf,
                step_tensor=counts.values[which],
                lr_tensor=lr if on_device else None,
                loss=loss,
                grad_square=grad_square,
                counts=counted,
            )
            self._round(members)
            counted = None  # once a step
        if counted is not None:  # a step without gradients
            counted[:1].add_(1.0)
        if not self._all_exposed:
            self._expose_new(i for which in classes for i in counts.members[which])

    def _check_amsgrad(self, groups: list[ParamGroup]) -> None:
        if [group["amsgrad"] for group in groups] == self._group_amsgrad:
            return
        for i, (group, place) in enumerate(zip(groups, self._flat.group_slices, strict=True)):
            if place.start < place.stop and group["amsgrad"] != self._amsgrad[place.start]:
                raise ValueError(
                    f"amsgrad of param_groups[{i}] became {group['amsgrad']!r} after the first "
                    "step; make a new optimizer"
                )

    def _call(
        self,
        members: list[int],
        stretch: Stretch,
        group: ParamGroup,
        numbers: AdamNumbers,
        grads: list[Tensor | None],
        total: Tensor,
        **more: Any,
    ) -> None:
        """The kernel on parameters of one stretch: the bits that round go by places in it."""
        flat, begin = self._flat, stretch.place.start
        if self.masters is not None:
            self.masters.follow(members)
        first, second, *largest = (m[begin:] if begin else m for m in self._moments.values())
        self._ops.adam_step(
            flat.reals([self.weight(i) for i in members]),
            flat.reals(cast(Any, [grads[i] for i in members])),
            [flat.offsets[i] - begin for i in members],
            first,
            second,
            largest[0] if group["amsgrad"] else None,
            total,
            **more,
            **numbers._asdict(),
        )
        if stretch.share != 1.0:
            total.mul_(stretch.share)


def adam_numbers(group: ParamGroup, step: int, lr: float) -> AdamNumbers:
    """A group's options as the op takes them."""
    beta1, beta2 = group["betas"]
    eps, inside = float(group["eps"]), group["eps_inside_root"]
    return AdamNumbers(
        step,
        lr,
        float(beta1),
        float(beta2),
        0.0 if inside else eps,
        eps if inside else 0.0,
        float(group["weight_decay"]),
        bool(group["decoupled_weight_decay"]),
        bool(group["maximize"]),
    )
