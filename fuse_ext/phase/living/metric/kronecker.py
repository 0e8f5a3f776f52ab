r"""A Kronecker-factored metric for matrices: Adam in the eigenbasis of the gradients' covariances.

For a weight G of [m, n] the covariances L = E[G G^T] and R = E[G^T G] are averaged, Q_L and Q_R are
their eigenvectors, and Adam's second moment is that of Q_L^T G Q_R: the metric is the best diagonal
one in that basis, and R and L together are the Kronecker factors of the gradient's covariance. Both
moments are kept in the basis, so that a step takes two products a side: the gradient into it and
the step out of it. Bases are renewed every ``REFRESH`` steps by one step of orthogonal iteration.

A step in the bases is stretched until it promises, to first order, the decrease of Adam's own
(``stretch_of``), within the longest that steps may be.

A basis needs data. For ``GATHER`` steps the covariances are averaged, for ``MEASURE`` more the
second moment in the new basis, and only then does it take the place of Adam's, which steps until
then; where the bases are not worth having (:mod:`worth`), for good.

References:
    - Gupta, Koren, Singer, Shampoo: preconditioned stochastic tensor optimization, ICML 2018,
      arXiv 1802.09568.
    - Vyas et al., SOAP: improving and stabilizing Shampoo using Adam, ICLR 2025, arXiv 2409.11321.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.moments import Moments
from fuse_ext.curvature.step_counts import HostCounts
from fuse_ext.phase.living.metric.bases import (
    BASES,
    adams_moments,
    no_less,
    root_of,
    rotate,
    rotate_back,
    stretch_of,
)
from fuse_ext.phase.living.metric.sides import FACTORS, form_of_state, forms_of
from fuse_ext.phase.living.metric.state import KRONECKER_NAMES, MEASURED, STEPS, STRETCH
from fuse_ext.phase.living.metric.worth import (
    LEAST_GAIN,
    OWN,
    gain_of,
    sample_length,
    sample_of,
)
from fuse_ext.vector.flat import FlatParams, ParamGroup

GATHER, MEASURE = 10, 10
# Decay of the covariances a step and steps between two renewals of the bases, as in SOAP.
FACTOR_DECAY, REFRESH = 0.95, 10
# Once there are bases, covariances take in every so-manieth gradient; they cost as much as a
# product with a basis, and change slowly.
FACTOR_EVERY = 2


class KroneckerMetric:
    """The metric of those parameters that have one.

    Memory: for each of a weight's sides of length a that has a basis 8 a^2 bytes in float32, 4 more
    a parameter while the second moment is measured, and none for the moments, which are Adam's.

    Args:
        flat: The parameters.
        state: ``Optimizer.state``; what it holds is taken over.
        moments: Adam's, whose averages go on.
        groups: ``Optimizer.param_groups``.
        limited: Whether sides that are long get no basis, those much longer than the other
            one of each of their blocks, and a weight none that is not worth having.

    Attributes:
        forms: Each parameter that has a metric here, or may have, as the matrices that it is taken
            for.
    """

    def __init__(
        self,
        flat: FlatParams,
        state: dict[Any, Any],
        moments: Moments,
        groups: list[ParamGroup],
        limited: bool = True,
    ) -> None:
        self._flat, self._state, self._moments = flat, state, moments
        self._weighs = limited
        narrow = moments.stored("exp_avg").dtype != flat.dtype
        self.forms = forms_of(flat, groups, narrow, limited)
        for i in list(self.forms):
            entry = state.get(flat.params[i], {})
            if "factor_steps" in entry and not any(name in entry for name in FACTORS):  # given up
                if limited:
                    del self.forms[i]
                    continue
                for name in STEPS:  # what was asked for since begins anew
                    del entry[name]
            self.forms[i] = form_of_state(entry, flat.tensors[i]) or self.forms[i]
            for name in (*FACTORS, *BASES, MEASURED, OWN, STRETCH):
                if name in entry:  # perhaps of a checkpoint in another dtype
                    entry[name] = entry[name].to(dtype=flat.dtype, device=flat.device)
            if "factor_steps" in entry and STRETCH not in entry:  # of an older checkpoint
                entry[STRETCH] = torch.ones(1, dtype=flat.dtype, device=flat.device)

    def begin(self) -> None:
        """Takes the memory for all parameters that have had a gradient."""
        for i in self.forms:
            entry = self.entry(i) if self._flat.params[i] in self._state else {}
            if "exp_avg" in entry and "factor_steps" not in entry:
                self._begin(entry, i)

    def _begin(self, entry: dict[str, Any], i: int) -> None:
        """Zeros where nothing has been gathered."""
        flat, form = self._flat, self.forms[i]
        for names in (FACTORS, BASES):
            for name, square, has in zip(names, form.squares(), form.sides, strict=True):
                if has:
                    entry[name] = torch.zeros(square, dtype=flat.dtype, device=flat.device)
        entry[STRETCH] = torch.ones(1, dtype=flat.dtype, device=flat.device)
        entry.update(dict.fromkeys(STEPS, 0))

    def entry(self, i: int) -> dict[str, Any]:
        """The state of ``params[i]``."""
        found: dict[str, Any] = self._state[self._flat.params[i]]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of state held."""
        return self._bytes_of(*FACTORS, *BASES, STRETCH)

    @property
    def measuring_nbytes(self) -> int:
        """Bytes of second moments that are being measured."""
        return self._bytes_of(MEASURED, OWN)

    def _bytes_of(self, *names: str) -> int:
        entries = (self._state.get(self._flat.params[i], {}) for i in self.forms)
        return sum(entry[name].nbytes for entry in entries for name in names if name in entry)

    def ready(self) -> frozenset[int]:
        """The parameters with a gradient whose step is taken here and not by Adam."""
        return frozenset(
            i
            for i in self.forms
            if self._flat.params[i].grad is not None and self._is_ready(self.entry(i))
        )

    @staticmethod
    def _is_ready(entry: dict[str, Any]) -> bool:
        return bool(entry.get("basis_steps", 0) >= MEASURE)

    # --- a step -----------------------------------------------------------------------------

    def gather(self, groups: list[ParamGroup], ready: frozenset[int]) -> None:
        """Learns of the gradients at hand where the metric is not ready.

        To be called before Adam steps: weight decay is of the weights where the gradient is.
        """
        for i, group in self._at_hand(groups):
            if i not in ready:
                self._gather(i, group)

    def step(self, groups: list[ParamGroup], factor: float, ready: frozenset[int]) -> None:
        """Steps where the metric is ready, ``factor`` times as far as Adam does.

        To be called after Adam has stepped the others, whose moments are turned once all is known.
        """
        stepped, masters = sorted(ready), self._moments.masters
        if masters is not None:
            masters.follow(ready)
        at_hand = list(self._at_hand(groups))
        if self._weighs:
            self._give_up([i for i, _ in at_hand if self._is_due(self.entry(i))])
        for i, group in at_hand:
            if i in ready:
                self._advance(i, group, factor)
            elif i in self.forms and self._is_ready(self.entry(i)):
                self._turn(i, group)
        if stepped:
            if masters is not None:
                masters.round(stepped)
            assert isinstance(self._moments.counts, HostCounts)  # as LivingPhase makes them
            self._moments.counts.advance(stepped)

    def _at_hand(self, groups: list[ParamGroup]) -> Iterator[tuple[int, ParamGroup]]:
        """Those of the parameters here that have a gradient, with their groups."""
        for group, place in zip(groups, self._flat.group_slices, strict=True):
            for i in range(place.start, place.stop):
                if i in self.forms and self._flat.params[i].grad is not None:
                    yield i, group

    def _gradient(self, i: int, group: ParamGroup) -> Tensor:
        """Of what is minimised, an L2 penalty included, in the flat state's dtype."""
        own = self._flat.grad(i)
        assert own is not None
        grad = own.to(self._flat.dtype)
        grad = -grad if group["maximize"] else grad
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            weight = self._moments.weight(i).to(grad.dtype)
            grad = grad.add(weight, alpha=float(group["weight_decay"]))
        return grad

    def _moment(self, name: str, i: int) -> Tensor:
        return self._flat.piece(self._moments.stored(name), i)

    def _average(self, entry: dict[str, Any], matrix: Tensor, every: int = 1) -> None:
        """Takes a gradient into the covariances, which see every so-manieth one."""
        entry["factor_steps"] += 1
        seen, left_out = divmod(entry["factor_steps"], every)
        if left_out:
            return
        # The first one counts in full: what is averaged needs no correction.
        weight = max(1.0 - FACTOR_DECAY**every, 1.0 / seen)
        for name, side in zip(FACTORS, (matrix, matrix.mT), strict=True):
            if name in entry:
                entry[name].lerp_(side @ side.mT, weight)

    def _gather(self, i: int, group: ParamGroup) -> None:
        """Learns the covariances, then the second moment in their basis; Adam steps meanwhile."""
        entry, grad = self.entry(i), self._gradient(i, group)
        if "factor_steps" not in entry:
            self._begin(entry, i)
        matrix = self.forms[i].matrices(grad)
        self._average(entry, matrix)
        if entry["factor_steps"] < GATHER:
            return
        if MEASURED not in entry:
            if not self._find_bases(entry):
                return
            entry[MEASURED] = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
            if self._weighs:
                entry[OWN] = entry[MEASURED].new_zeros(sample_length(matrix.numel()))
        rotated = rotate(entry, matrix)
        beta2 = float(group["betas"][1])
        entry[MEASURED].mul_(beta2).addcmul_(rotated, rotated, value=1.0 - beta2)
        if OWN in entry:
            own = sample_of(matrix)
            entry[OWN].mul_(beta2).addcmul_(own, own, value=1.0 - beta2)
        entry["basis_steps"] += 1

    @staticmethod
    def _is_due(entry: dict[str, Any]) -> bool:
        """Whether it is the step after which bases, if they were found at once, are measured."""
        return bool(entry.get("factor_steps") == GATHER + MEASURE - 1)

    def _give_up(self, due: list[int]) -> None:
        """Leaves those to Adam whose bases are not worth having; all ranks the same ones."""
        if not due:
            return
        entries = [self.entry(i) for i in due]
        # Where bases were not found at once, or of an older checkpoint.
        unknown = torch.zeros(2, dtype=torch.float64, device=self._flat.device)
        gains = [gain_of(e[OWN], e[MEASURED]) if OWN in e else unknown for e in entries]
        sums = self._flat.measures.total(*torch.stack(gains).flatten().tolist())
        for i, entry, gain, count in zip(due, entries, sums[::2], sums[1::2], strict=True):
            entry.pop(OWN, None)
            if gain < LEAST_GAIN * count:
                for name in (*FACTORS, *BASES, MEASURED, STRETCH):
                    entry.pop(name, None)
                entry["basis_steps"] = 0
                del self.forms[i]

    def _turn(self, i: int, group: ParamGroup) -> None:
        """Adam's moments into the bases, as they have been measured there."""
        entry = self.entry(i)
        betas, form = _betas(group), self.forms[i]
        steps, seen = self._moments.counts.of(i), entry["basis_steps"]
        variance, average = (self._moment(name, i) for name in ("exp_avg_sq", "exp_avg"))
        rotated = rotate(entry, form.matrices(average))
        second = no_less(entry.pop(MEASURED), rotated, seen, steps, betas)
        mean = rotated / (1.0 - betas[0] ** steps)
        entry[STRETCH] = stretch_of(entry, mean, second / (1.0 - betas[1] ** seen), group)
        variance.copy_(form.back(second, variance))
        average.copy_(form.back(rotated, average))

    def _find_bases(self, entry: dict[str, Any]) -> bool:
        """Eigenvectors, largest first; False where there are none to be had this time."""
        found = {}
        for factor, basis in zip(FACTORS, BASES, strict=True):
            if factor in entry:
                try:
                    found[basis] = torch.linalg.eigh(entry[factor])[1].flip(-1)
                except RuntimeError:  # of which torch.linalg's are
                    return False
        for basis, vectors in found.items():
            entry[basis].copy_(vectors)
        return True

    def _advance(self, i: int, group: ParamGroup, factor: float) -> None:
        """Adam's step in the basis, ``factor`` times as long, and stretched."""
        entry, weight = self.entry(i), self._moments.weight(i)
        grad, form = self._gradient(i, group), self.forms[i]
        matrix = form.matrices(grad)
        (beta1, beta2), lr = _betas(group), float(group["lr"]) * factor
        steps = self._moments.counts.of(i) + 1.0
        self._average(entry, matrix, FACTOR_EVERY)
        rotated = rotate(entry, matrix)
        stored = [self._moment(name, i) for name in ("exp_avg", "exp_avg_sq")]
        # Copies where the weight is not row-major.
        average, second = map(form.matrices, stored)
        average.lerp_(rotated, 1.0 - beta1)
        second.mul_(beta2).addcmul_(rotated, rotated, value=1.0 - beta2)
        entry["basis_steps"] += 1
        variance = second / (1.0 - beta2 ** entry["basis_steps"])
        renews = entry["basis_steps"] % REFRESH == 0
        if renews:
            entry[STRETCH] = stretch_of(entry, average, variance, group)
        stretch = entry[STRETCH].clamp(1.0, max(1.0, float(group["step_cap"]) / max(factor, 1.0)))
        root = root_of(variance, group)
        turned = torch.div(average, root, out=root).mul_(stretch)
        step = form.back(rotate_back(entry, turned), grad)
        if group["decoupled_weight_decay"] and group["weight_decay"]:
            weight.mul_(1.0 - lr * float(group["weight_decay"]))
        weight.add_(step.to(weight.dtype), alpha=-lr / (1.0 - beta1**steps))
        if renews:
            average, second = self._renew(entry, average, second)
            second = no_less(second, average, entry["basis_steps"], steps, (beta1, beta2))
        for kept, new in zip(stored, (average, second), strict=True):
            if new.data_ptr() != kept.data_ptr():
                kept.copy_(form.back(new, kept))

    def _renew(
        self, entry: dict[str, Any], average: Tensor, second: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of orthogonal iteration on each basis, largest eigenvalues first.

        The first moment is taken over exactly; the second goes with its directions, which move
        little in so few steps, but for those without a gradient, which the others leave any place.
        """
        average = rotate_back(entry, average)
        for side, (factor, basis) in enumerate(zip(FACTORS, BASES, strict=True)):
            if factor not in entry:
                continue
            vectors = entry[basis]
            image = entry[factor] @ vectors
            order = torch.argsort((vectors * image).sum(-2), descending=True, stable=True)
            entry[basis] = torch.linalg.qr(_ordered(image, order, 1))[0].contiguous()
            second = _ordered(second, order, side)  # rows go with the first side
        return rotate(entry, average), second

    # --- leaving ----------------------------------------------------------------------------

    def leave(self, groups: list[ParamGroup]) -> None:
        """Gives the metric up: Adam's moments become those of the weights' own elements."""
        betas = self._flat.per_segment([_betas(group) for group in groups], None)
        for i in self.forms:
            entry = self.entry(i)
            if self._is_ready(entry):
                form, steps = self.forms[i], self._moments.counts.of(i)
                stored, average = (self._moment(name, i) for name in ("exp_avg_sq", "exp_avg"))
                held = form.matrices(average), form.matrices(stored)
                own, second = adams_moments(entry, *held, steps, betas[i])
                stored.copy_(form.back(second, stored))
                average.copy_(form.back(own, average))
        for param in self._flat.params:  # also where they were given up
            for name in KRONECKER_NAMES:
                self._state.get(param, {}).pop(name, None)


def _betas(group: ParamGroup) -> tuple[float, float]:
    """As numbers, which they may be as tensors."""
    beta1, beta2 = map(float, group["betas"])
    return beta1, beta2


def _ordered(matrices: Tensor, order: Tensor, side: int) -> Tensor:
    """Their rows (side 0) or columns (1) in this order, in that of each block's own."""
    if order.dim() == 1:
        return matrices.index_select(side, order)
    return matrices.take_along_dim(order.unsqueeze(-1 if side == 0 else -2), side - 2)
