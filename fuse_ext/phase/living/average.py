"""The mean of the weights that steps have come by, to be judged and kept in their place.

At a constant learning rate weights wander about a minimum, and a schedule that ends at 0 is there
to bring them to rest. Their mean is at rest at any time: no horizon, and steps know nothing of it.
It is that of the last share of the steps, whatever their number: x_k = x_{k-1} + s / (s + k)
(w_k - x_{k-1}), in which w_j counts as a polynomial of degree s in j.

References:
    - Polyak, Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control
      Optim. 30(4), 1992.
    - Shamir, Zhang, Stochastic gradient descent for non-smooth optimization, ICML 2013, arXiv
      1212.1824 (polynomial decay averaging).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuse_ext.curvature.moments import Moments
from fuse_ext.vector.flat import FlatParams
from fuse_ext.vector.shards import like, local, placed

# s above: the mean is some 6% of the steps old. Test accuracy of three seeds, constant rates, with
# 4, 8, 16 and 32 (and of the weights themselves): MNIST at 0.1 92.8, 92.8, 92.7, 92.6 (91.4);
# FashionMNIST at 0.001 87.1, 87.3, 87.3, 87.3 (86.6); CIFAR-10 at 0.003 48.2, 49.0, 49.2, 49.2
# (48.2); USPS, of 98 steps, at 0.001 93.3, 93.8, 94.1, 94.1 (94.3). A transformer on text, 1,000
# steps at 1e-3: 1.218, 1.210, 1.211, 1.219 nats (1.284). With a cosine it changes nothing.
SHARE = 16.0
# Steps between two weights that count; as good as all of them, for a fifth of the time.
EVERY = 5

# In a parameter's own state: its mean; and while that is in its place, the weight that steps go on
# from. In the first one: how many weights the means are of.
AVERAGE, TRAINED = "weight_average", "trained_weight"
AVERAGE_NAMES = (AVERAGE, TRAINED)
COUNT = "averaged"


class WeightAverage:
    """Means of the parameters that have been stepped; those of others are themselves.

    Memory: 4 bytes a parameter in float32, also of narrower ones, 8 in float64; while the mean is
    in the weights' place they are held too.

    Args:
        flat: The parameters.
        state: ``Optimizer.state``; means that it holds are taken over.
        moments: Adam's, which know what is stepped on.

    Attributes:
        in_place: Whether the parameters are the means.
    """

    def __init__(self, flat: FlatParams, state: dict[Any, Any], moments: Moments) -> None:
        self._flat, self._state, self._moments = flat, state, moments
        self._entry: dict[str, Any] = state[flat.params[0]]
        self.in_place = False
        for i, (param, mine) in enumerate(zip(flat.params, flat.tensors, strict=True)):
            entry = state.get(param, {})
            # Perhaps of a checkpoint in another dtype, or of other ranks.
            for name, dtype in ((AVERAGE, self._dtype(mine)), (TRAINED, mine.dtype)):
                if name in entry:
                    held = local(placed(entry[name], flat.stand_ins[i]))
                    kept = torch.empty_like(mine, dtype=dtype, requires_grad=False).copy_(held)
                    entry[name] = like(kept, flat.stand_ins[i])
            self.in_place |= TRAINED in entry

    def _dtype(self, mine: Tensor) -> torch.dtype:
        return self._flat.dtype.to_complex() if mine.is_complex() else self._flat.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        entries = [self._state.get(param, {}) for param in self._flat.params]
        held = [entry[name] for entry in entries for name in AVERAGE_NAMES if name in entry]
        return sum(local(tensor).nbytes for tensor in held)

    def begin(self) -> None:
        """Takes the memory of all parameters that have been stepped; the next weight is first."""
        for i in self._stepped():
            self._kept(i)
        self.restart()

    def restart(self) -> None:
        """What there was says nothing of the weights to come."""
        self._entry[COUNT] = 0

    def _stepped(self) -> list[int]:
        state, params = self._state, self._flat.params
        return [i for i, param in enumerate(params) if "exp_avg" in state.get(param, {})]

    def _kept(self, i: int) -> Tensor:
        """The mean of ``params[i]``; until now that was the parameter itself."""
        entry, mine = self._state[self._flat.params[i]], self._flat.tensors[i]
        if AVERAGE not in entry:
            kept = torch.empty_like(mine, dtype=self._dtype(mine), requires_grad=False)
            kept.copy_(self._moments.weight(i).detach())
            entry[AVERAGE] = like(kept, self._flat.stand_ins[i])
        found: Tensor = local(entry[AVERAGE])
        return found

    def take_in(self) -> None:
        """The weights as they are now count."""
        count = self._entry.get(COUNT, 0)  # checkpoints of before there were means have none
        share, self._entry[COUNT] = SHARE / (SHARE + count), count + 1
        stepped = self._stepped()
        means = [self._kept(i) for i in stepped]
        weights = [self._moments.weight(i).detach() for i in stepped]
        wide = [w.to(m.dtype) for w, m in zip(weights, means, strict=True)]
        if means:
            torch._foreach_lerp_(means, wide, share)

    def put(self) -> None:
        """Gives parameters their means."""
        flat, state = self._flat, self._state
        averaged = [i for i in self._stepped() if AVERAGE in state[flat.params[i]]]
        trained = [flat.tensors[i].detach().clone() for i in averaged]  # or nothing has changed
        for i, before in zip(averaged, trained, strict=True):
            state[flat.params[i]][TRAINED] = like(before, flat.stand_ins[i])
            flat.tensors[i].detach().copy_(local(state[flat.params[i]][AVERAGE]))
        self._moved(bool(averaged))

    def take_back(self) -> None:
        """Gives parameters back the weights that steps go on from."""
        for param, mine in zip(self._flat.params, self._flat.tensors, strict=True):
            if (trained := self._state.get(param, {}).pop(TRAINED, None)) is not None:
                mine.detach().copy_(local(trained))
        self._moved(False)

    def _moved(self, in_place: bool) -> None:
        self.in_place = in_place
        self._flat.note_move()
        self._flat.gather()

    def drop(self) -> None:
        """Leaves nothing, and parameters as steps have left them."""
        if self.in_place:
            self.take_back()
        for param in self._flat.params:
            self._state.get(param, {}).pop(AVERAGE, None)
        self._entry.pop(COUNT, None)


def check_average_state(entry: dict[str, Any], param: Tensor, i: int) -> None:
    """Raises ValueError for saved means that are not of this parameter."""
    for name in AVERAGE_NAMES:
        held = entry.get(name)
        if held is None:
            continue
        fits = isinstance(held, Tensor) and held.shape == param.shape
        if not fits or held.is_complex() != param.is_complex():
            what = (
                f"of {held.dtype} and shape {tuple(held.shape)}"
                if isinstance(held, Tensor)
                else repr(held)
            )
            raise ValueError(
                f"state_dict does not fit: {name} of params[{i}] is {what}, the parameter of "
                f"{param.dtype} and shape {tuple(param.shape)}"
            )
