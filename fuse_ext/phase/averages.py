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

A parameter without a gradient is not touched: neither its average nor its place changes, and no
pair counts it that was taken, in part, without it. One that Adam has never seen gets the root mean
square of its first gradient as its metric.

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

from fuse_ext.curvature.moments import AdamEngine
from fuse_ext.curvature.ring import History
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.scalars import Header
from fuse_ext.objective.evaluations import effective_gradient
from fuse_ext.objective.step_options import LbfgsOptions
from fuse_ext.phase.iteration import COUNTERS, TALLIES
from fuse_ext.search.noise import Precision
from fuse_ext.tell.report import Progress
from fuse_ext.vector.flat import FlatParams, ParamGroup, Part, memory_order

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
# Which parameters have no metric yet, and which had no gradient at the last step, at some step of
# this block, and of the one before. Older checkpoints have none of them, nor "unsteady": the blocks
# until averages are of the same parameters again.
LISTS = ("without_metric", "absent", "missed", "missed_before")
AVERAGED_NAMES = (*VECTORS, *NUMBERS, *LISTS, "unsteady")


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
    for name in LISTS:
        places = entry.get(name, [])
        if not isinstance(places, list) or not set(places) <= set(range(len(flat.params))):
            raise ValueError(
                f"state_dict does not fit: {name} is {places!r}, no list of places among "
                f"{len(flat.params)} parameters"
            )


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
        for name in LISTS:
            entry.setdefault(name, [])
        entry.setdefault("unsteady", 0)
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
            without_metric=legacy.unseen,
            absent=[],
            missed=[],
            missed_before=[],
            unsteady=0,
        )

    def outdated(self, state: dict[Any, Any]) -> bool:
        """Whether the user has cleared or replaced ``Optimizer.state``."""
        return state.get(self._flat.params[0]) is not self._entry

    def _piece(self, vector: Tensor, i: int) -> Tensor:
        """The part of a flat vector that belongs to ``params[i]``."""
        offset = self._flat.offsets[i]
        return vector[offset : offset + self._flat.sizes[i]]

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
            decays = zip(options.weight_decay, shrink, strict=True)
            coupled = [0.0 if factor is not None else decay for decay, factor in decays]
            options = replace(options, weight_decay=coupled)
        part, grads = flat.gradients(options.freezing)
        if not part.params:
            self.progress.reason = "gradient"
            return True
        grad = effective_gradient(flat, self._ops, options, part, grads, self._scratch)
        if not math.isfinite(float(grad.dot(grad))):
            self.count_non_finite()
            return False
        self._measure_new(part, grad)
        grad.div_(entry["root_metric"])
        entry["n_iter"] += 1
        self._note_absent(part)
        kept = self._set_aside(part)
        entry["grad_avg"].lerp_(grad, max(1.0 - beta, self._fall() / REACH))
        norm = float(entry["grad_avg"].norm())
        if entry["blocks"] and not entry["unsteady"] and norm > JUMP * entry["last_norm"]:
            self._renew_metric(grad)
            norm = float(entry["grad_avg"].norm())
        header = self._direction(options)
        if header is None:
            self.progress.reason = "no_descent"
            self._put_back(part, kept)
            return True
        entry["grad_sum"].add_(grad)
        entry["norm_sum"] += norm
        self._put_back(part, kept)
        lengths = longest(reduced(step_cap, entry["cap_share"]), entry["adam_lr"]) * options.lr
        square = header.direction_sq
        if part.absent:
            self._set_step(part, 1.0)
            square = float(self._step.dot(self._step))
        length = self._length(header, square, options, lengths)
        self._set_step(part, length)
        self._bound_elements(lengths * entry["adam_lr"])
        self._advance_block()
        if options.lr != 0.0:
            self._move(part, options, shrink)
        entry["averaged_steps"] += 1
        if entry["block_step"] == BLOCK:
            self._close_block(options)
        self.progress.step_length = length
        self.progress.reason, self.progress.line_search = "max_iter", "fixed"
        return True

    def _set_step(self, part: Part, length: float) -> None:
        """z = t p, whatever the rows' dtype, of the parameters that move."""
        self._step.zero_()
        self.history.move(self._scratch, length, save=True)
        for i in part.absent:
            self._piece(self._step, i).zero_()

    def _note_absent(self, part: Part) -> None:
        """Which parameters pairs will not count, and whether averages can be compared."""
        entry, absent = self._entry, list(part.absent)
        if absent != entry["absent"]:
            entry["absent"], entry["unsteady"] = absent, 2  # in this block and the next
        entry["missed"] = sorted({*entry["missed"], *absent})

    def _measure_new(self, part: Part, grad: Tensor) -> None:
        """Gives parameters their metric that have their first gradient now.

        Its root mean square: single elements of one batch would be their own metric for long. The
        block begins anew, since what is new in the average is no jump of the old.
        """
        entry = self._entry
        new = [i for i in entry["without_metric"] if i not in part.absent]
        for i in new:
            piece = self._piece(grad, i)
            size = float(piece.norm()) / math.sqrt(piece.numel())
            if size > 0.0:
                self._piece(entry["root_metric"], i).fill_(math.sqrt(size))
                entry["without_metric"] = [j for j in entry["without_metric"] if j != i]
                self._restart_blocks()

    def _restart_blocks(self) -> None:
        """Forgets the block under way and the one before it."""
        for name in ("iterate_diff", "iterate_rise", "grad_sum", "grad_mean"):
            self._entry[name].zero_()
        self._entry.update(block_step=0, blocks=0, norm_sum=0.0, missed=[], missed_before=[])

    def _set_aside(self, part: Part) -> list[Tensor]:
        """Takes the averages of absent parameters out of the average."""
        average = self._entry["grad_avg"]
        kept = [self._piece(average, i).clone() for i in part.absent]
        for i in part.absent:
            self._piece(average, i).zero_()
        return kept

    def _put_back(self, part: Part, kept: list[Tensor]) -> None:
        for i, piece in zip(part.absent, kept, strict=True):
            self._piece(self._entry["grad_avg"], i).copy_(piece)

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
        self._restart_blocks()
        entry["cap_share"] *= RETREAT
        entry["resets"] += 1
        self.history.reset()

    def _length(
        self, header: Header, square: float, options: LbfgsOptions, lengths: float
    ) -> float:
        """Adam's own step while there is no pair, then 1, times lr; at most the cap.

        ``square`` is p.p of the parameters that move.
        """
        entry = self._entry
        length = options.lr * (1.0 if header.usable > 0 else entry["adam_lr"])
        cap = lengths * entry["adam_step_norm"] * self._fall()
        return float(min(length, cap / math.sqrt(square))) if square > 0.0 else 0.0

    def _bound_elements(self, bound: float) -> None:
        """No parameter moves by more; the step in its own coordinates goes to the scratch."""
        root = self._entry["root_metric"]
        torch.div(self._step, root, out=self._scratch).clamp_(-bound, bound)
        torch.mul(self._scratch, root, out=self._step)
        self._step.nan_to_num_(0.0)  # 0 * inf, where nothing moves

    def _move(self, part: Part, options: LbfgsOptions, shrink: list[float | None]) -> None:
        for param, factor in zip(part.params, part.pick(shrink), strict=True) if shrink else ():
            if factor is not None:
                param.mul_(factor)
        pieces = part.pick(self._pieces)
        if options.lr_scale:
            torch._foreach_mul_(pieces, part.pick(options.lr_scale))
        torch._foreach_add_(part.params, pieces)

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
            for i in {*entry["missed"], *entry["missed_before"]}:
                self._piece(y, i).zero_()
                self._piece(entry["iterate_diff"], i).zero_()
            self._offer(entry["iterate_diff"], y, options.curvature_tol)
        entry["missed"], entry["missed_before"] = [], entry["missed"]
        entry["unsteady"] = max(entry["unsteady"] - 1, 0)
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
