"""Adam's engine: moments and step counts of a flat vector, and the fused step (Eq. 2)."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuse_ext.kernels.bound_ops import AdamNumbers, bind
from fuse_ext.kernels.ops import Ops, zeros_in_large_pages
from fuse_ext.vector.checks import check_grads
from fuse_ext.vector.flat import FlatParams, ParamGroup

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def check_adam_state(
    state: dict[Any, Any], params: list[Tensor], where: list[Any], source: str = "state_dict"
) -> None:
    """Raises ValueError unless ``state`` holds Adam's moments in the parameters' shapes."""
    for i, (param, key) in enumerate(zip(params, where, strict=True)):
        entry = state.get(key)
        if not entry:
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
        for name in MOMENTS:
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


def check_moment_dtype(dtype: Any) -> None:
    """Raises ValueError for an option ``moment_dtype`` that is unknown."""
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"moment_dtype must be None or torch.bfloat16, got {dtype!r}")


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


class AdamLegacy(NamedTuple):
    """What Adam leaves to the phase after it, beside two vectors.

    Attributes:
        steps: Adam steps taken.
        lr: The largest of the groups.
        mean_metric: Of the elements where the metric is known and finite; 0 without any.
        unseen: Which parameters have never had a gradient.
    """

    steps: int
    lr: float
    mean_metric: float
    unseen: list[int]


class AdamEngine:
    """Adam's moments for a flat vector of parameters, and the fused step.

    ``state`` is ``Optimizer.state``: each parameter that has had a gradient gets torch's own
    entries (step, exp_avg, exp_avg_sq and, for amsgrad, max_exp_avg_sq), as views of the flat
    buffers, so that checkpoints are those of torch.optim.Adam.

    Memory: 8 bytes a parameter (12 with amsgrad) in float32, twice that in float64, half of it in
    bfloat16.
    """

    def __init__(
        self,
        flat: FlatParams,
        ops: Ops,
        state: dict[Any, Any],
        groups: list[ParamGroup],
        moment_dtype: torch.dtype | None = None,
    ) -> None:
        self._flat, self._ops, self._state = flat, ops, state
        self._bound = bind(ops, flat.whole)
        self._group_amsgrad = [group["amsgrad"] for group in groups]
        self._amsgrad = [group["amsgrad"] for group in groups for _ in group["params"]]
        names = MOMENTS if any(self._amsgrad) else MOMENTS[:2]
        check_moments_fit(moment_dtype, flat.params)
        dtype = moment_dtype or flat.dtype
        self._moments = {
            name: zeros_in_large_pages(flat.numel, dtype, flat.device) for name in names
        }
        # Steps of each parameter, on the host and in the dtype that torch gives them.
        double = torch.get_default_dtype() == torch.float64
        self._steps = torch.zeros(
            len(flat.params), dtype=torch.float64 if double else torch.float32, device="cpu"
        )
        self._one = torch.ones((), dtype=self._steps.dtype, device=self._steps.device)
        self._exposed = [False] * len(flat.params)
        self._stats = torch.zeros(1, dtype=torch.float64, device=flat.device)
        self._grad_norm_sq: float | None = 0.0
        # The step count that all parameters share, or None when they differ; and what it was
        # read from: users may write to the step counts in ``state``.
        self._shared_step: int | None = 0
        self._steps_version = 0
        self._adopt_moments()

    def _adopt_moments(self) -> None:
        """Takes over whatever moments ``state`` holds and points it at the flat buffers."""
        for i, param in enumerate(self._flat.params):
            entry = self._state.get(param)
            if not entry or "exp_avg" not in entry:
                continue
            self._steps[i] = float(entry["step"])
            for name, moment in self._moments.items():
                if name in entry:
                    self._flat.piece(moment, i).copy_(entry[name])
            self._expose(i)
        self._entries = list(self._state.values())
        self._all_exposed = all(self._exposed)
        self._read_shared_step()

    def _expose(self, i: int) -> None:
        entry = self._state[self._flat.params[i]]
        entry["step"] = self._step_entry(i)
        for name in MOMENTS if self._amsgrad[i] else MOMENTS[:2]:
            entry[name] = self._flat.piece(self._moments[name], i)
        self._exposed[i] = True

    def _step_entry(self, i: int) -> Tensor:
        return self._steps[i]

    def _read_shared_step(self) -> None:
        steps = set(self._steps.tolist())
        self._shared_step = int(steps.pop()) if len(steps) == 1 else None
        self._steps_version = self._steps._version

    def outdated(self, state: dict[Any, Any]) -> bool:
        """Whether the user has replaced parameters in the groups, or entries of ``state``."""
        same = len(state) == len(self._entries)
        same = same and all(map(operator.is_, state.values(), self._entries))
        return not same or self._flat.replaced()

    @property
    def grad_norm_sq(self) -> float:
        """||g||^2 of the last step (Eq. 3's summand), out of the kernel that made it."""
        if self._grad_norm_sq is None:
            self._grad_norm_sq = float(self._stats)
        return self._grad_norm_sq

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        return sum(moment.nbytes for moment in self._moments.values()) + self._steps.nbytes

    def legacy(self, groups: list[ParamGroup], grad_avg: Tensor, metric: Tensor) -> AdamLegacy:
        """What the last step was made of: lr times ``grad_avg / metric``, element by element.

        Args:
            groups: ``Optimizer.param_groups``.
            grad_avg: Becomes the bias-corrected average of the gradients; flat.
            metric: Becomes D = sqrt(v) + eps, bias-corrected, over the parameter's share of the
                largest lr; 0 where nothing is known, inf where nothing moves.
        """
        grad_avg.copy_(self._moments["exp_avg"])
        metric.zero_()
        largest = max(float(group["lr"]) for group in groups)
        total, known = 0.0, 0
        unseen: list[int] = []
        for group, place in zip(groups, self._flat.group_slices, strict=True):
            beta1, beta2 = group["betas"]
            source = MOMENTS[2] if group["amsgrad"] else MOMENTS[1]
            share = float(group["lr"]) / largest if largest > 0.0 else 0.0
            eps = float(group["eps"])
            inside, outside = (eps, 0.0) if group["eps_inside_root"] else (0.0, eps)
            for i in range(place.start, place.stop):
                steps = float(self._steps[i])
                begin, size = self._flat.offsets[i], self._flat.sizes[i]
                m, d = grad_avg[begin : begin + size], metric[begin : begin + size]
                if not share:
                    d.fill_(math.inf)
                elif steps:
                    m.div_(1.0 - beta1**steps)
                    # Bfloat16 becomes the state's dtype before anything is added to it.
                    d.copy_(self._moments[source][begin : begin + size]).add_(inside)
                    d.div_(1.0 - beta2**steps).sqrt_().add_(outside).div_(share)
                    total += float(d.sum(dtype=torch.float64))
                    known += size
                elif size:
                    unseen.append(i)
        mean = total / known if known else 0.0
        return AdamLegacy(int(self._steps.max()), largest, mean, unseen)

    def step(
        self,
        groups: list[ParamGroup],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One step on every parameter that has a gradient.

        Raises:
            TypeError, ValueError, RuntimeError: A gradient or parameter that the kernels cannot
                take; nothing has changed then.
        """
        flat = self._flat
        flat.check_unchanged()
        self._check_amsgrad(groups)
        if self._steps._version != self._steps_version:
            self._read_shared_step()
        plain = flat.layout.grads()
        if plain is not None and self._shared_step is not None and len(groups) == 1:
            self._step_all(groups[0], self._shared_step + 1, plain, grad_scale, found_inf)
            return
        grads = [p.grad for p in flat.params]
        calls = self._buckets(groups, grads)
        check_grads(flat.params, grads)  # no call may fail after another has changed things
        options = [adam_numbers(group, step, float(group["lr"])) for group, _, step in calls]
        if found_inf is not None and float(found_inf) != 0.0:
            return
        norms = []
        for (group, members, _), numbers in zip(calls, options, strict=True):
            self._call(members, grads, group["amsgrad"], numbers, grad_scale)
            if len(calls) > 1:
                norms.append(float(self._stats))
        self._grad_norm_sq = None if len(calls) == 1 else sum(norms)  # read when asked for
        self._advance([i for _, members, _ in calls for i in members])

    def _step_all(
        self,
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
            self._stats,
            grad_scale,
            *numbers,
        )
        self._grad_norm_sq = None  # read when asked for
        self._steps.add_(self._one)
        self._shared_step, self._steps_version = step, self._steps._version
        if not self._all_exposed:
            self._expose_new(range(len(grads)))

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
        grads: list[Tensor | None],
        amsgrad: bool,
        numbers: AdamNumbers,
        grad_scale: Tensor | None,
    ) -> None:
        flat = self._flat
        chosen: list[Any] = [grads[i] for i in members]
        self._ops.adam_step(
            flat.reals([flat.params[i] for i in members]),
            flat.reals(chosen),
            [flat.offsets[i] for i in members],
            self._moments["exp_avg"],
            self._moments["exp_avg_sq"],
            self._moments["max_exp_avg_sq"] if amsgrad else None,
            self._stats,
            grad_scale=grad_scale,
            **numbers._asdict(),
        )

    def _buckets(
        self, groups: list[ParamGroup], grads: list[Tensor | None]
    ) -> list[tuple[ParamGroup, list[int], int]]:
        """(group, parameters, step) for every kernel call: those of one group and step count."""
        steps = [int(step) for step in self._steps.tolist()]
        buckets: dict[tuple[int, int], list[int]] = {}
        for which, place in enumerate(self._flat.group_slices):
            for i in range(place.start, place.stop):
                if grads[i] is not None:
                    buckets.setdefault((which, steps[i] + 1), []).append(i)
        return [(groups[which], members, step) for (which, step), members in buckets.items()]

    def _advance(self, stepped: list[int]) -> None:
        """Counts the step for every parameter that took part."""
        if stepped:
            # A list would become a tensor on the default device, in some versions of torch.
            index = torch.tensor(stepped, dtype=torch.int64, device=self._steps.device)
            self._steps.index_add_(0, index, self._one.expand(len(stepped)))
            self._read_shared_step()
            self._expose_new(stepped)

    def _expose_new(self, stepped: Iterable[int]) -> None:
        """Gives parameters that took their first step their state."""
        new = [i for i in stepped if not self._exposed[i]]
        for i in new:
            self._expose(i)
        if new:
            self._entries = list(self._state.values())
            self._all_exposed = all(self._exposed)


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
