"""Adam's metric D = sqrt(v) + eps at the switch, which L-BFGS on averages grows out of."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fuse_ext.curvature.moments import MOMENTS, Moments
from fuse_ext.vector.flat import FlatParams, ParamGroup

# From this lr on the cap does not grow with Adam's steps, until it has come down to their length.
LARGEST_LR = 1e-3


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


def legacy(
    flat: FlatParams,
    moments: Moments,
    groups: list[ParamGroup],
    grad_avg: Tensor,
    metric: Tensor,
) -> AdamLegacy:
    """What the last step was made of: lr times ``grad_avg / metric``, element by element.

    Args:
        flat: The parameters.
        moments: Theirs.
        groups: ``Optimizer.param_groups``.
        grad_avg: Becomes the bias-corrected average of the gradients; flat.
        metric: Becomes D = sqrt(v) + eps, bias-corrected, over the parameter's share of the
            largest lr; 0 where nothing is known, inf where nothing moves.
    """
    grad_avg.copy_(moments.stored("exp_avg"))
    metric.zero_()
    largest = max(float(group["lr"]) for group in groups)
    sums: list[Tensor] = []
    known = 0.0
    unseen: list[int] = []
    for group, place in zip(groups, flat.group_slices, strict=True):
        beta1, beta2 = group["betas"]
        source = MOMENTS[2] if group["amsgrad"] else MOMENTS[1]
        share = float(group["lr"]) / largest if largest > 0.0 else 0.0
        eps = float(group["eps"])
        inside, outside = (eps, 0.0) if group["eps_inside_root"] else (0.0, eps)
        for i in range(place.start, place.stop):
            steps = moments.counts.of(i)
            begin, size = flat.offsets[i], flat.sizes[i]
            m, d = grad_avg[begin : begin + size], metric[begin : begin + size]
            if not share:
                d.fill_(math.inf)
            elif steps:
                m.div_(1.0 - beta1**steps)
                # Bfloat16 becomes the state's dtype before anything is added to it.
                d.copy_(moments.stored(source)[begin : begin + size]).add_(inside)
                d.div_(1.0 - beta2**steps).sqrt_().add_(outside).div_(share)
                sums.append(d.sum(dtype=torch.float64) * flat.share(i))
                known += flat.share(i) * size
            elif flat.params[i].numel():
                unseen.append(i)
    total, known = flat.measures.total(sum(torch.stack(sums).tolist()) if sums else 0.0, known)
    mean = total / known if known else 0.0
    return AdamLegacy(moments.counts.largest, largest, mean, unseen)


def renew(root: Tensor, average: Tensor, grad: Tensor, spare: Tensor) -> None:
    """D = (D^2 + m^2)^(1/2), so that no element of D^-1 m exceeds 1.

    Args:
        root: D^(1/2); becomes that of the new D.
        average: m in the old metric's coordinates; becomes that in the new one's.
        grad: g, likewise.
        spare: Is overwritten.
    """
    for vector in (average, grad):
        vector.mul_(root).nan_to_num_(0.0)  # 0 * inf, where nothing moves
    torch.hypot(torch.mul(root, root, out=spare), average, out=spare)
    torch.sqrt(spare, out=root)
    average.div_(root)
    grad.div_(root)


def reduced(step_cap: float, share: float) -> float:
    """This share of the cap, but not less than the length of Adam's last step."""
    return max(step_cap * share, min(step_cap, 1.0))


def longest(step_cap: float, lr: float) -> float:
    """The first step's cap in lengths of Adam's last step, at whose lr it was made."""
    if lr <= LARGEST_LR:
        return step_cap
    return min(step_cap, max(1.0, step_cap * LARGEST_LR / lr))
