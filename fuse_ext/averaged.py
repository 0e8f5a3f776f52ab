"""L-BFGS for minibatches: a step on the averaged gradient, with curvature from averages.

Three things make quasi-Newton steps fail on minibatches: a direction that is mostly noise, pairs
that mix two functions, and steps as long as a noisy model likes. Here

- the direction is -H m, with m the moving average of the gradients that Adam has begun. It
  reaches back over ``REACH`` steps at first, since long steps soon outdate a gradient, and over
  more and more as they get shorter, up to as many as Adam's;
- a pair is the difference of two successive block means, s of iterates and y of gradients, each
  over ``BLOCK`` batches (as in SlimQN and mL-BFGS), with Powell's damping of y;
- H grows out of Adam's metric: its initial diagonal is D^-1, D = sqrt(v) + eps at the switch, and
  the length of a step in that metric is at most ``step_cap`` times that of Adam's last one (for lr
  above 1e-3 that of one with 1e-3, but not below Adam's own), less and less as steps go by. Nor
  does any element move by more than so many times lr, as Adam's would not.

Where m has grown ``JUMP`` times as long as it was in the last block, the metric is outdated and
steps have been too long. Then D becomes (D^2 + m^2)^(1/2), so that no element of D^-1 m exceeds 1,
the pairs are forgotten, and the cap is ``RETREAT`` of what it was, down to Adam's own length.

So without a pair a step is Adam's, and every step costs one gradient. All vectors are kept in
Adam's coordinates, x' = D^(1/2) x, where D is the identity: s' = D^(1/2) s, g' = D^(-1/2) g, and
the ops of L-BFGS serve as they are.

Memory, beside the history: 6 vectors of the state's dtype, and 2 of scratch.

References:
    - Niu et al., SlimQN / mL-BFGS: A momentum-based L-BFGS for distributed large-scale neural
      network optimization, TMLR 2023, arXiv 2307.13744.
    - M. J. D. Powell, Algorithms for nonlinear constraints that use Lagrangian functions,
      Mathematical Programming 14, 1978 (damping).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fuse_ext.adam_engine import AdamEngine
from fuse_ext.evaluations import effective_gradient
from fuse_ext.flat import FlatParams, ParamGroup
from fuse_ext.history import History, memory_order
from fuse_ext.lbfgs_engine import COUNTERS, TALLIES
from fuse_ext.lbfgs_options import LbfgsOptions
from fuse_ext.ops import Ops
from fuse_ext.precision import Precision
from fuse_ext.report import Progress
from fuse_ext.scalars import Header

# Batches that one mean of iterates and gradients is taken over.
BLOCK = 10
# Powell's bound: y is moved towards B s until s.y >= DAMPING s.B s.
DAMPING = 0.2
# From this lr on the cap does not grow with Adam's steps, until it has come down to their length.
LARGEST_LR = 1e-3
# Where Adam has seen next to no gradient D is this much of its mean: what wakes up later must not
# take steps beyond all measure.
LEAST_METRIC = 1e-3
# The cap falls as (k0 / (k0 + k))^CAP_DECAY, k0 Adam steps and k steps after them.
CAP_DECAY = 0.5
# Steps that the averaged gradient reaches back over at first.
REACH = 3.0
# An average that has grown so much over what it was in the last block, noise and all, is no noise:
# losses have jumped. The cap falls by this factor then.
JUMP, RETREAT = 3.0, 0.5

# Vectors in the state entry, in Adam's coordinates but for the first.
VECTORS = ("root_metric", "grad_avg", "iterate_diff", "iterate_rise", "grad_sum", "grad_mean")
# Numbers in it.
NUMBERS = (
    "block_step",
    "blocks",
    "adam_steps",
    "adam_step_norm",
    "adam_lr",
    "averaged_steps",
    "cap_share",
    "norm_sum",
    "last_norm",
)
AVERAGED_NAMES = (*VECTORS, *NUMBERS)


def check_averaged_state(entry: dict[str, Any], flat: FlatParams) -> None:
    """Raises ValueError unless a state entry that holds averages holds all, of these parameters."""
    if not entry.keys() & set(VECTORS):
        return
    for name in VECTORS:
        vector = entry.get(name)
        if not isinstance(vector, Tensor) or tuple(vector.shape) != (flat.numel,):
            what = tuple(vector.shape) if isinstance(vector, Tensor) else repr(vector)
            raise ValueError(f"state_dict does not fit: {name} is {what}, not {flat.numel} numbers")
    for name in NUMBERS:
        if not isinstance(entry.get(name), (int, float)):
            raise ValueError(f"state_dict does not fit: {name} is {entry.get(name)!r}, no number")


class AveragedEngine:
    """L-BFGS on averages, one gradient a step.

    Args:
        flat: The parameters.
        ops: Kernels to use.
        entry: The optimizer's state entry; holds all tensors and counters.
        history_size: m.
        history_dtype: Storage of the pairs; None for the state's.
    """

    def __init__(
        self,
        flat: FlatParams,
        ops: Ops,
        entry: dict[str, Any],
        history_size: int,
        history_dtype: torch.dtype | None,
    ) -> None:
        self._flat, self._ops, self._entry = flat, ops, entry
        # The L-BFGS ops see one vector: the step in Adam's coordinates.
        self._step = self._new_vector()
        self._coords = FlatParams([{"params": [self._step]}])
        self.history = History(self._coords, ops, entry, history_size, history_dtype)
        strides = memory_order(flat)
        if strides:
            entry["strides"] = strides
        self._scratch = self._new_vector()
        self._pieces = [flat.piece(self._scratch, i) for i in range(len(flat.params))]
        for name in (*COUNTERS, *TALLIES):
            entry.setdefault(name, 0)
        entry.setdefault("pair_step", None)
        self.precision = Precision(entry, torch.finfo(flat.dtype).eps)
        for name in VECTORS:
            vector = self._new_vector()
            if name in entry:
                vector.copy_(entry[name])
            entry[name] = vector
        self.progress = Progress()

    def _new_vector(self) -> Tensor:
        return torch.zeros(self._flat.numel, dtype=self._flat.dtype, device=self._flat.device)

    def inherit(self, adam: AdamEngine, groups: list[ParamGroup]) -> None:
        """Begins where Adam ends."""
        entry = self._entry
        average, root = entry["grad_avg"], entry["root_metric"]
        legacy = adam.legacy(groups, average, root)
        root.clamp_(min=LEAST_METRIC * legacy.mean_metric).sqrt_()
        average.div_(root)
        entry.update(
            block_step=0,
            blocks=0,
            averaged_steps=0,
            cap_share=1.0,
            norm_sum=0.0,
            last_norm=0.0,
            adam_steps=legacy.steps,
            adam_step_norm=legacy.lr * float(average.norm()),
            adam_lr=legacy.lr,
        )

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch vectors held between steps (not part of the state)."""
        return self._step.nbytes + self._scratch.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        return self.history.nbytes + sum(self._entry[name].nbytes for name in VECTORS)

    # --- one step ---------------------------------------------------------------------------

    def step(
        self, options: LbfgsOptions, beta: float, step_cap: float, shrink: list[float | None]
    ) -> bool:
        """One step on the gradients at hand.

        Args:
            options: lr is relative to 1 at the switch; it scales step and cap.
            beta: Decay rate of the averaged gradient, at most.
            step_cap: Longest step, in lengths of Adam's last one, in Adam's metric.
            shrink: What decoupled weight decay multiplies each parameter by, None where weight
                decay is an L2 term; empty for None everywhere.

        Returns:
            Whether the gradients were finite; else nothing has changed.
        """
        flat, entry = self._flat, self._entry
        flat.check_unchanged()
        if shrink and options.weight_decay:
            kept = zip(options.weight_decay, shrink, strict=True)
            options = replace(options, weight_decay=[0.0 if f is not None else d for d, f in kept])
        grad = self._scaled_gradient(options)
        if not math.isfinite(float(grad.dot(grad))):
            self.count_non_finite()
            return False
        entry["n_iter"] += 1
        entry["grad_avg"].lerp_(grad, max(1.0 - beta, self._fall() / REACH))
        norm = float(entry["grad_avg"].norm())
        if entry["blocks"] and norm > JUMP * entry["last_norm"]:
            self._renew_metric(grad)
            norm = float(entry["grad_avg"].norm())
        header = self._direction(options)
        if header is None:
            self.progress.reason = "no_descent"
            return True
        entry["grad_sum"].add_(grad)
        entry["norm_sum"] += norm
        lengths = longest(reduced(step_cap, entry["cap_share"]), entry["adam_lr"]) * options.lr
        length = self._length(header, options, lengths)
        # z = t p, whatever the rows' dtype.
        self._step.zero_()
        self.history.move(self._scratch, length, save=True)
        self._bound_elements(lengths * entry["adam_lr"])
        self._advance_block()
        self._move(options, shrink)
        entry["averaged_steps"] += 1
        if entry["block_step"] == BLOCK:
            self._close_block(options)
        self.progress.step_length = length
        self.progress.reason, self.progress.line_search = "max_iter", "fixed"
        return True

    def _scaled_gradient(self, options: LbfgsOptions) -> Tensor:
        """g' = D^(-1/2) g of the objective, in the scratch vector."""
        flat = self._flat
        grad = effective_gradient(flat, self._ops, flat.grads(), options, self._scratch)
        return grad.div_(self._entry["root_metric"])

    def _direction(self, options: LbfgsOptions) -> Header | None:
        """-H m, with the history forgotten where that does not descend; None where m is 0."""
        average = [self._entry["grad_avg"]]
        while True:
            header, _ = self.history.update_direction(
                average, [], [], False, None, options.curvature_tol
            )
            if header.direction_dot_grad < 0.0 and math.isfinite(header.direction_sq):
                return header
            if header.usable == 0:
                return None
            self._entry["resets"] += 1
            self.history.reset()

    def _fall(self) -> float:
        """What is left of the cap."""
        begun = max(self._entry["adam_steps"], 1)
        return float((begun / (begun + self._entry["averaged_steps"])) ** CAP_DECAY)

    def _renew_metric(self, grad: Tensor) -> None:
        """D = (D^2 + m^2)^(1/2), and what was known in the old metric is given up but m and g."""
        entry = self._entry
        root, average, spare = (entry[name] for name in ("root_metric", "grad_avg", "grad_sum"))
        for vector in (average, grad):
            vector.mul_(root).nan_to_num_(0.0)  # 0 * inf, where nothing moves
        torch.hypot(torch.mul(root, root, out=spare), average, out=spare)
        torch.sqrt(spare, out=root)
        average.div_(root)
        grad.div_(root)
        for name in ("iterate_diff", "iterate_rise", "grad_sum", "grad_mean"):
            entry[name].zero_()
        entry.update(block_step=0, blocks=0, norm_sum=0.0, cap_share=RETREAT * entry["cap_share"])
        entry["resets"] += 1
        self.history.reset()

    def _length(self, header: Header, options: LbfgsOptions, lengths: float) -> float:
        """Adam's own step while there is no pair, then 1, times lr; at most the cap."""
        entry = self._entry
        length = options.lr * (1.0 if header.usable > 0 else entry["adam_lr"])
        cap = lengths * entry["adam_step_norm"] * self._fall()
        return float(min(length, cap / math.sqrt(header.direction_sq)))

    def _bound_elements(self, bound: float) -> None:
        """No parameter moves by more; the step in its own coordinates goes to the scratch."""
        root = self._entry["root_metric"]
        torch.div(self._step, root, out=self._scratch).clamp_(-bound, bound)
        torch.mul(self._scratch, root, out=self._step)
        self._step.nan_to_num_(0.0)  # 0 * inf, where nothing moves

    def _move(self, options: LbfgsOptions, shrink: list[float | None]) -> None:
        params = self._flat.params
        for param, factor in zip(params, shrink, strict=True) if shrink else ():
            if factor is not None:
                param.mul_(factor)
        if options.lr_scale:
            torch._foreach_mul_(self._pieces, options.lr_scale)
        torch._foreach_add_(params, self._pieces)

    # --- curvature --------------------------------------------------------------------------

    def _advance_block(self) -> None:
        """Counts the step into the difference of block means that is under way, and the next one.

        The i-th iterates of two blocks of L steps lie L steps apart; on average over i, the k-th
        step of the first block counts k/L and that of the second (L - k)/L.
        """
        entry = self._entry
        entry["block_step"] += 1
        risen = entry["block_step"] / BLOCK
        if risen < 1.0:
            entry["iterate_diff"].add_(self._step, alpha=1.0 - risen)
        entry["iterate_rise"].add_(self._step, alpha=risen)

    def _close_block(self, options: LbfgsOptions) -> None:
        """Offers the pair that the block completes and begins the next one."""
        entry = self._entry
        mean = entry["grad_sum"].div_(BLOCK)
        entry["last_norm"], entry["norm_sum"] = entry["norm_sum"] / BLOCK, 0.0
        if entry["blocks"] > 0:
            y = torch.sub(mean, entry["grad_mean"], out=self._scratch)
            self._offer(entry["iterate_diff"], y, options.curvature_tol)
        for now, later in (("grad_mean", "grad_sum"), ("iterate_diff", "iterate_rise")):
            entry[now], entry[later] = entry[later], entry[now]
            entry[later].zero_()
        entry["block_step"] = 0
        entry["blocks"] += 1

    def _offer(self, s: Tensor, y: Tensor, curvature_tol: float) -> None:
        header = self.history.header()
        if header.usable > 0:
            damp(s, y, 1.0 / header.gamma)
        self.history.offer(s, y, curvature_tol)

    # --- counts -----------------------------------------------------------------------------

    def count_non_finite(self) -> None:
        """Notes that a step was not taken for a NaN or infinite value."""
        self._entry["non_finite"] += 1
        self.progress.reason = "non_finite"


def reduced(step_cap: float, share: float) -> float:
    """This share of the cap, but not less than the length of Adam's last step."""
    return max(step_cap * share, min(step_cap, 1.0))


def longest(step_cap: float, lr: float) -> float:
    """The first step's cap in lengths of Adam's last step, at whose lr it was made."""
    if lr <= LARGEST_LR:
        return step_cap
    return min(step_cap, max(1.0, step_cap * LARGEST_LR / lr))


def damp(s: Tensor, y: Tensor, curvature: float, bound: float = DAMPING) -> None:
    """Powell's damping, in place, with B = curvature * I.

    Where s.y < bound s.B s, y becomes theta y + (1 - theta) B s with the theta that makes
    s.y = bound s.B s.
    """
    sy, sbs = float(s.dot(y)), curvature * float(s.dot(s))
    if sy < bound * sbs:
        theta = (1.0 - bound) * sbs / (sbs - sy)
        y.mul_(theta).add_(s, alpha=(1.0 - theta) * curvature)
