"""The work that optimizers are timed at, and the check that all of them did the same of it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fuse_ext
from fuse_ext.kernels.scalars import read_header

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# What a history may be stored in; a dtype shows up in the tables once this build takes it.
HISTORY_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}


def split(numel: int, tensors: int) -> list[int]:
    """Sizes of so many tensors that add up to ``numel``."""
    return [numel // tensors + (i < numel % tensors) for i in range(tensors)]


def history_dtypes() -> dict[str, torch.dtype]:
    """The storage formats that fuse_ext.LBFGS accepts."""
    accepted = {}
    for name, dtype in HISTORY_DTYPES.items():
        try:
            fuse_ext.LBFGS([torch.zeros(1)], history_dtype=dtype)
        except (TypeError, ValueError):
            continue
        accepted[name] = dtype
    return accepted


class Quadratic:
    r"""f(x) = 1/2 sum_i D_i x_i^2 with its closure, which keeps its own time.

    The curvatures D lie between 1/condition and 1, evenly in the logarithm, in random order.
    Every pair is then accepted (s.y >= |s|^2 / condition), and because the minimum is at 0,
    where floats keep their relative precision, there is no floor to run into. The start is random
    and scaled so that |g|_1 is about 100 for every d: the first step of all these optimizers is
    lr / |g|_1, which for a sum over many parameters may be lost to rounding.

    Each call of the closure hands out its gradients in other tensors than the call before, as
    ``zero_grad(set_to_none=True)`` and ``backward()`` do (most gradients of a small network on
    the CPU then lie at a new address each time).

    Args:
        sizes: Of the parameter tensors.
        dtype: Of everything.
        condition: See above.
        like: Another problem of these sizes, to share D and the gradients' memory with.

    Attributes:
        params: Start from the same numbers in every instance.
        curvature: D, in the parameters' pieces.
        seconds: Spent inside the closure so far.
        calls: Of the closure so far.
    """

    def __init__(
        self,
        sizes: list[int],
        dtype: torch.dtype = torch.float32,
        condition: float = 1e4,
        like: Quadratic | None = None,
    ) -> None:
        numel = sum(sizes)
        random = torch.Generator().manual_seed(0)
        start = torch.randn(numel, generator=random, dtype=torch.float32).to(dtype)
        start *= 1e3 / numel
        self.params = [nn.Parameter(part.clone()) for part in start.split(sizes)]
        self._x = [param.detach() for param in self.params]
        if like is None:
            exponents = torch.rand(numel, generator=random, dtype=torch.float32).to(dtype)
            self.curvature = list(torch.pow(condition, -exponents).split(sizes))
            # Two sets to take turns.
            self._grads = [[torch.empty_like(x) for x in self._x] for _ in range(2)]
        else:
            self.curvature, self._grads = like.curvature, like._grads
        self.seconds = 0.0
        self.calls = 0

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(x.numel() for x in self._x)

    def next_grads(self) -> list[Tensor]:
        """Puts the gradients of this point into ``.grad``, and returns them."""
        grads = self._grads[self.calls % 2]
        self.calls += 1
        for param, x, d, grad in zip(self.params, self._x, self.curvature, grads, strict=True):
            torch.mul(d, x, out=grad)
            param.grad = grad
        return grads

    def closure(self) -> Any:
        """As an optimizer wants it: returns the loss."""
        start = time.perf_counter()
        with torch.no_grad():
            grads = self.next_grads()
            dots = [torch.dot(x, g) for x, g in zip(self._x, grads, strict=True)]
            loss = 0.5 * torch.stack(dots).sum()
        self.seconds += time.perf_counter() - start
        return loss


class Iterations:
    """An L-BFGS optimizer at work on a quadratic, iteration by iteration.

    Args:
        make: Optimizer from parameters; ``max_iter=each``, tolerances 0.
        problem: Its own copy of the problem.
        each: Iterations a call of ``step``.
    """

    def __init__(self, make: MakeOptimizer, problem: Quadratic, each: int = 1) -> None:
        self.problem = problem
        self.optimizer = make(problem.params)
        self.each = each
        self.iterations = 0
        self._accepted = self._visible = 0
        self._seen: list[weakref.ref[Tensor]] = []

    def fill(self, history_size: int) -> None:
        """Iterates until the history is full, and twice more; what it does counts from here.

        Raises:
            RuntimeError: Pairs are refused.
        """
        while self.iterations == 0 or self.pairs_held() < history_size:
            if self.iterations > 2 * history_size + 20:
                raise RuntimeError(
                    f"{type(self.optimizer).__module__} holds {self.pairs_held()} of "
                    f"{history_size} pairs after {self.iterations} iterations"
                )
            self.run()
        self.run()
        self.run()
        self.iterations = self.problem.calls = self._visible = 0
        self._accepted = -self._all_accepted()

    def pairs_held(self) -> int:
        """In the history now."""
        if isinstance(self.optimizer, torch.optim.LBFGS):
            return len(self.entry["old_dirs"] or [])
        return int(read_header(self.entry["scalars"]).count)

    def run(self) -> float:
        """Seconds an iteration outside the closure."""
        inside = self.problem.seconds
        start = time.perf_counter()
        self.optimizer.step(self.problem.closure)
        spent = time.perf_counter() - start - (self.problem.seconds - inside)
        self.iterations += self.each
        if isinstance(self.optimizer, torch.optim.LBFGS):
            self._count_new_pairs()
        else:
            self._visible += self.each
        return spent / self.each

    @property
    def entry(self) -> dict[str, Any]:
        """The optimizer's state, which both keep with the first parameter."""
        entry: dict[str, Any] = self.optimizer.state[self.problem.params[0]]
        return entry

    def _count_new_pairs(self) -> None:
        # torch counts no pairs, and of a call only the last ones are to be seen. Weak, so that what
        # it drops is freed as usual.
        pairs = self.entry["old_dirs"]
        self._visible += min(self.each, self.optimizer.param_groups[0]["history_size"])
        self._accepted += sum(all(pair is not seen() for seen in self._seen) for pair in pairs)
        self._seen = [weakref.ref(pair) for pair in pairs]

    def _all_accepted(self) -> int:
        if isinstance(self.optimizer, torch.optim.LBFGS):
            return 0
        return int(read_header(self.entry["scalars"]).accepted)

    def work(self) -> dict[str, float]:
        """What it did since :meth:`fill`, to be compared: per iteration, but for the pairs held.

        Of torch's pairs only those count that were in the history at the end of a call of step.
        """
        return {
            "pairs held": self.pairs_held(),
            "pairs accepted": (self._accepted + self._all_accepted()) / self._visible,
            "evaluations": self.problem.calls / self.iterations,
        }


def differences(cases: dict[str, Iterations]) -> str:
    """How the work of some cases differs by more than 5%; empty if it does not."""
    done = {name: case.work() for name, case in cases.items()}
    first = next(iter(done.values()))
    same = all(abs(work[k] / first[k] - 1) <= 0.05 for work in done.values() for k in first)
    if same:
        return ""
    return "unequal work: " + "; ".join(f"{name} {work}" for name, work in done.items())
