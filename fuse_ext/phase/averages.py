"""L-BFGS on averages, for minibatches: steps on the averaged gradient, curvature from averages.

Three things make quasi-Newton steps fail on minibatches: a direction that is mostly noise, pairs
that mix two functions, and steps as long as a noisy model likes. Here

- the direction is -H m, with m the moving average of the gradients that Adam has begun. It
  reaches back over ``REACH`` steps at first, since long steps soon outdate a gradient, and over
  more and more as they get shorter, up to as many as Adam's;
- a pair is the difference of two successive block means, s of iterates and y of gradients, with
  Powell's damping of y (:mod:`fuse_ext.curvature.block_pairs`);
- H grows out of Adam's metric: its initial diagonal is D^-1, D = sqrt(v) + eps at the switch, and
  the length of a step in that metric is at most ``step_cap`` times that of Adam's last one (for lr
  above 1e-3 that of one with 1e-3, but not below Adam's own), less and less as steps go by. Nor
  does any element move by more than so many times lr, as Adam's would not.

Where m has grown ``JUMP`` times as long as it was in the last block, the metric is outdated and
steps have been too long: D is renewed, the pairs are forgotten, and the cap is ``RETREAT`` of what
it was, down to Adam's own length.

A parameter without a gradient is not touched: neither its average nor its place changes, and no
pair counts it that was taken, in part, without it. One that Adam has never seen gets the root mean
square of its first gradient as its metric.

So without a pair a step is Adam's, and every step costs one gradient. All vectors are kept in
Adam's coordinates, x' = D^(1/2) x, where D is the identity: s' = D^(1/2) s, g' = D^(-1/2) g, and
the ops of L-BFGS serve as they are.

Memory, beside the history: 6 vectors of the state's dtype, and 2 of scratch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.block_pairs import BLOCK_VECTORS, BlockPairs
from fuse_ext.curvature.metric import legacy, longest, reduced, renew
from fuse_ext.curvature.moments import Moments
from fuse_ext.curvature.ring import History
from fuse_ext.kernels.ops import Ops
from fuse_ext.kernels.scalars import Header
from fuse_ext.objective.evaluations import effective_gradient
from fuse_ext.objective.progress import Progress
from fuse_ext.objective.setbacks import Setbacks
from fuse_ext.objective.step_options import StepOptions, mixed_signs
from fuse_ext.objective.watch import Watch
from fuse_ext.phase.protocol import Call, Outcome
from fuse_ext.search.noise import Precision
from fuse_ext.vector.flat import FlatParams, ParamGroup, Part, memory_order
from fuse_ext.vector.gradients import NO_GRADIENT
from fuse_ext.vector.measures import PartsDiffer
from fuse_ext.vector.narrow.masters import Masters

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
VECTORS = ("root_metric", "grad_avg", *BLOCK_VECTORS)
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


class AveragesPhase:
    """L-BFGS on averages, one gradient a step.

    Args:
        flat: The parameters.
        ops: Kernels to use.
        entry: The optimizer's state entry; holds all tensors and counters.
        history_size: m.
        history_dtype: Storage of the pairs; None for the state's.
    """

    begun, host_decides = True, True

    def __init__(
        self,
        flat: FlatParams,
        ops: Ops,
        entry: dict[str, Any],
        history_size: int,
        history_dtype: torch.dtype | None,
    ) -> None:
        self._flat, self._ops, self._entry = flat, ops, entry
        self.masters = Masters(flat, {}, keeps=False)  # or with some, of whoever makes the phase
        # The L-BFGS ops see one vector: the step in Adam's coordinates.
        self._step = flat.new_vector()
        stretches = [self._step[stretch.place] for stretch in flat.stretches]
        coordinates = FlatParams([{"params": stretches}], alike=flat)
        self.history = History(coordinates, ops, entry, history_size, history_dtype)
        strides = memory_order(flat)
        if strides:
            entry["strides"] = strides
        self._scratch = flat.new_vector()
        self._pieces = [flat.piece(self._scratch, i) for i in range(len(flat.params))]
        self.progress = Progress()
        self._setbacks = Setbacks(entry, self.history, self.progress)
        entry.setdefault("pair_step", None)
        self.precision = Precision(entry, torch.finfo(flat.dtype).eps)
        for name in VECTORS:
            vector = flat.new_vector()
            if name in entry:
                vector.copy_(entry[name])
            entry[name] = vector
        for name in LISTS:
            entry.setdefault(name, [])
        entry.setdefault("unsteady", 0)
        self._blocks = BlockPairs(flat, entry, self._scratch)
        self._watch = Watch(flat, ops, entry)

    def inherit(self, moments: Moments, groups: list[ParamGroup], watches: bool) -> None:
        """Begins where Adam ends; with ``watches`` finds out if the closure is one function."""
        entry = self._entry
        average, root = entry["grad_avg"], entry["root_metric"]
        left = legacy(self._flat, moments, groups, average, root)
        root.clamp_(min=LEAST_METRIC * left.mean_metric).sqrt_()
        average.div_(root)
        self._blocks.begin()
        entry.update(
            averaged_steps=0,
            cap_share=1.0,
            adam_steps=left.steps,
            adam_step_norm=left.lr * self._flat.measures.norm(average),
            adam_lr=left.lr,
            without_metric=left.unseen,
            absent=[],
            unsteady=0,
        )
        if watches:
            self._watch.begin()

    def outdated(self, state: dict[Any, Any]) -> bool:
        """Whether the user has cleared or replaced ``Optimizer.state``."""
        return state.get(self._flat.params[0]) is not self._entry

    @property
    def workspace_nbytes(self) -> int:
        """Bytes of scratch vectors held between steps (not part of the state)."""
        return self._step.nbytes + self._scratch.nbytes

    def new_objective(self) -> None:
        """The closure is another function from the next step on: no two blocks are compared."""
        self._blocks.restart()
        if self._watch.on:
            self._watch.begin()

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        held = sum(self._entry[name].nbytes for name in VECTORS)
        return self.history.nbytes + held + self.masters.nbytes

    def settle(self, log: dict[str, Any]) -> None:
        """The host has counted everything itself."""

    def refuse(self) -> None:
        """Counts a step that was not taken for a value that is not finite."""
        self._setbacks.count_non_finite()

    def step(self, call: Call) -> Outcome:
        """One step, unless the closure turns out to be one function all along."""
        entry, closure, groups, options = self._entry, call.closure, call.groups, call.options
        assert options is not None
        seen = entry["non_finite"]
        mixed = mixed_signs(groups)
        look = self._watch.look(closure, mixed)
        entry["func_evals"] += closure is not None
        if look.undecided:
            self.progress.reason = "watch"
        if look.undecided or look.one_function:
            return Outcome(look.loss, one_function=look.one_function)
        if not look.finite or not self._agree(look.value, options):
            self.refuse()
            return Outcome(look.loss, refused=True)
        if mixed:
            ascends = self._flat.per_segment([bool(group["maximize"]) for group in groups], None)
            options = replace(options, maximize=False, ascends=ascends)
        shrinks = [
            1.0 - float(group["lr"]) * float(group["weight_decay"])
            if group["decoupled_weight_decay"]
            else None
            for group in groups
        ]
        self.step_on_gradients(
            options,
            float(groups[0]["betas"][0]),
            float(groups[0]["step_cap"]),
            self._flat.per_segment(shrinks, None),
        )
        return Outcome(look.loss, refused=entry["non_finite"] > seen)

    def _agree(self, loss: float | None, options: StepOptions) -> bool:
        """Whether the loss is finite on all ranks, which see to it that they move the same."""
        if self._flat.together is None:
            return True
        absent = self._flat.gradients(options.freezing)[0].absent
        try:
            mean = self._flat.measures.point([*NO_GRADIENT], loss, absent)[-1]
        except PartsDiffer:
            self._flat.fill_gradients()
            return self._agree(loss, options)
        return loss is None or math.isfinite(mean)

    def step_on_gradients(
        self, options: StepOptions, beta: float, step_cap: float, shrink: list[float | None]
    ) -> None:
        """One step on the gradients at hand; none where they are not finite.

        Args:
            options: lr is relative to 1 at the switch; it scales step and cap.
            beta: Decay rate of the averaged gradient, at most.
            step_cap: Longest step, in lengths of Adam's last one, in Adam's metric.
            shrink: What decoupled weight decay multiplies each parameter by, None where weight
                decay is an L2 term; empty for None everywhere.
        """
        flat, entry, measures = self._flat, self._entry, self._flat.measures
        flat.check_unchanged()
        if shrink and options.weight_decay:
            decays = zip(options.weight_decay, shrink, strict=True)
            coupled = [0.0 if factor is not None else decay for decay, factor in decays]
            options = replace(options, weight_decay=coupled)
        part, grads = flat.gradients(options.freezing)
        if not part.params:
            self.progress.stop_untrained(entry["n_iter"])
            return
        grad = effective_gradient(flat, self._ops, options, part, grads, self._scratch)
        if not math.isfinite(measures.dot(grad, grad)):
            self.refuse()
            return
        self._measure_new(part, grad)
        grad.div_(entry["root_metric"])
        entry["n_iter"] += 1
        self._note_absent(part)
        kept = self._set_aside(part)
        entry["grad_avg"].lerp_(grad, max(1.0 - beta, self._fall() / REACH))
        norm = measures.norm(entry["grad_avg"])
        if self._blocks.grown(norm, JUMP):
            self._renew_metric(grad)
            norm = measures.norm(entry["grad_avg"])
        header = self._direction(options)
        if header is None:
            self.progress.reason = "no_descent"
            if norm == 0.0 and not entry["averaged_steps"]:  # nor has Adam met any other
                self.progress.stop_untrained(0)
            self._put_back(part, kept)
            return
        self._blocks.add_gradient(grad, norm)
        self._put_back(part, kept)
        lengths = longest(reduced(step_cap, entry["cap_share"]), entry["adam_lr"]) * options.lr
        square = header.direction_sq
        if part.absent:
            self._set_step(part, 1.0)
            square = measures.dot(self._step, self._step)
        length = self._length(header, square, options, lengths)
        self._set_step(part, length)
        self._bound_elements(lengths * entry["adam_lr"])
        full = self._blocks.add_step(self._step)
        if options.lr != 0.0:
            self._move(part, options, shrink)
        entry["averaged_steps"] += 1
        if full:
            self._blocks.close(self.history, options.curvature_tol)
        self.progress.step_length = length
        self.progress.reason, self.progress.line_search = "max_iter", "fixed"

    def _set_step(self, part: Part, length: float) -> None:
        """z = t p, whatever the rows' dtype, of the parameters that move."""
        self._step.zero_()
        self.history.move(self._scratch, length, save=True)
        for i in part.absent:
            self._flat.stretch(self._step, i).zero_()

    def _note_absent(self, part: Part) -> None:
        """Which parameters pairs will not count, and whether averages can be compared."""
        entry, absent = self._entry, list(part.absent)
        if absent != entry["absent"]:
            entry["absent"], entry["unsteady"] = absent, 2  # in this block and the next
        self._blocks.miss(absent)

    def _measure_new(self, part: Part, grad: Tensor) -> None:
        """Gives parameters their metric that have their first gradient now.

        Its root mean square: single elements of one batch would be their own metric for long. The
        block begins anew, since what is new in the average is no jump of the old.
        """
        entry = self._entry
        for i in [i for i in entry["without_metric"] if i not in part.absent]:
            piece = self._flat.stretch(grad, i)
            size = math.sqrt(self._flat.measures.mean_square(piece, i))
            if size > 0.0:
                self._flat.stretch(entry["root_metric"], i).fill_(math.sqrt(size))
                entry["without_metric"] = [j for j in entry["without_metric"] if j != i]
                self._blocks.restart()

    def _set_aside(self, part: Part) -> list[Tensor]:
        """Takes the averages of absent parameters out of the average."""
        pieces = [self._flat.stretch(self._entry["grad_avg"], i) for i in part.absent]
        kept = [piece.clone() for piece in pieces]
        for piece in pieces:
            piece.zero_()
        return kept

    def _put_back(self, part: Part, kept: list[Tensor]) -> None:
        for i, piece in zip(part.absent, kept, strict=True):
            self._flat.stretch(self._entry["grad_avg"], i).copy_(piece)

    def _direction(self, options: StepOptions) -> Header | None:
        """-H m, with the history forgotten where that does not descend; None where m is 0."""
        tol, whole = options.curvature_tol, self._entry["grad_avg"]
        average = [whole[stretch.place] for stretch in self._flat.stretches]
        while True:
            header, _ = self.history.update_direction(average, [], [], False, None, tol)
            if header.direction_dot_grad < 0.0 and math.isfinite(header.direction_sq):
                return header
            if header.usable == 0:
                return None
            self._setbacks.reset()

    def _fall(self) -> float:
        """What is left of the cap."""
        begun = max(self._entry["adam_steps"], 1)
        return float((begun / (begun + self._entry["averaged_steps"])) ** CAP_DECAY)

    def _renew_metric(self, grad: Tensor) -> None:
        """The metric grows by m, and what was known in the old one is given up but m and g."""
        entry = self._entry
        renew(entry["root_metric"], entry["grad_avg"], grad, spare=entry["grad_sum"])
        self._blocks.restart()
        entry["cap_share"] *= RETREAT
        self._setbacks.reset()

    def _length(self, header: Header, square: float, options: StepOptions, lengths: float) -> float:
        """Adam's own step while there is no pair, then 1, times lr; at most the cap.

        ``square`` is p.p of the parameters that move.
        """
        length = options.lr * (1.0 if header.usable > 0 else self._entry["adam_lr"])
        cap = lengths * self._entry["adam_step_norm"] * self._fall()
        return float(min(length, cap / math.sqrt(square))) if square > 0.0 else 0.0

    def _bound_elements(self, bound: float) -> None:
        """No parameter moves by more; the step in its own coordinates goes to the scratch."""
        root = self._entry["root_metric"]
        torch.div(self._step, root, out=self._scratch).clamp_(-bound, bound)
        torch.mul(self._scratch, root, out=self._step)
        self._step.nan_to_num_(0.0)  # 0 * inf, where nothing moves

    def _move(self, part: Part, options: StepOptions, shrink: list[float | None]) -> None:
        pieces = part.pick(self._pieces)
        if options.lr_scale:
            torch._foreach_mul_(pieces, part.pick(options.lr_scale))
        self.masters.add(part.indices, pieces, part.pick(shrink))
