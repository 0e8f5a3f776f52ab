"""What a step asks of a device: launches, waits, allocations and bytes, counted while it runs.

    python tests/cuda/cuda_counts.py

prints the table of docs/cuda.md. The kernels run in the host execution model (cuda_sim), which
counts their launches and the bytes that they load and store; what Python asks of torch besides is
seen by torch's own modes. Tensors that are made with device="cpu", in that word, are the host's;
all others are taken for the device's. What the closure does is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from cuda_sim import library
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fuse_ext import LBFGS, Adam, Fuse, FusePV, Never
from fuse_ext.curvature import ring
from fuse_ext.kernels import ops
from fuse_ext.vector import gradients

NUMEL, PAIRS = 16_384, 10
DENSE = 1_024  # parameters where there is a dense matrix
SIDE = 64  # columns of the two matrices that are all parameters
# What the living metric costs a parameter depends on the matrices' number and shapes, not on how
# large they are: square ones, as many as gpu-check measures.
WEIGHTS, WEIGHT_SIDE = 24, 16


@dataclass(frozen=True)
class Counts:
    """Of one step.

    Attributes:
        launches: Kernels, ours and torch's; a copy within the device is one.
        waits: Times that the host waits for a number.
        allocations: New tensors on the device.
        bytes: Read and written by kernels.
    """

    launches: int
    waits: int
    allocations: int
    bytes: int

    def less(self, other: Counts) -> Counts:
        """What another step did not ask for."""
        return Counts(
            self.launches - other.launches,
            self.waits - other.waits,
            self.allocations - other.allocations,
            self.bytes - other.bytes,
        )

    def a_parameter(self, name: str) -> str:
        """Bytes a parameter, in words; of a matrix a share of d, the number of parameters."""
        if "matrix" in name:
            return f"{self.bytes / DENSE**2:.1f} d"
        if is_of_matrices(name):
            return f"{self.bytes / (WEIGHTS * WEIGHT_SIDE**2):.0f}"
        return f"{self.bytes / NUMEL:.0f}"


def is_of_matrices(name: str) -> bool:
    """Whether a row is of the square matrices."""
    return "living metric" in name and "diagonal" not in name


# What only makes room, or another view of what is there.
_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias")


class _Calls(TorchFunctionMode):
    """Reads that torch's dispatcher does not see, and tensors that are the host's."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        counter, kwargs = self.counter, kwargs or {}
        if func is Tensor.tolist and not counter.is_host(args[0]):
            counter.waits += not counter.paused
        if kwargs.get("device") == "cpu" and not isinstance(kwargs["device"], torch.device):
            with counter.pause():
                result = func(*args, **kwargs)
            counter.host.append(result)
            return result
        return func(*args, **kwargs)


class _Ops(TorchDispatchMode):
    """Kernels, allocations and reads among torch's own ops."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.counter.paused:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.counter.see(func, inputs, outputs)
        return result


class Counter:
    """Counts what happens within ``with counter:``, except while it is paused.

    Args:
        kernels: The simulated device.
    """

    def __init__(self, kernels: library.SimulatedOps) -> None:
        self.kernels, self.paused = kernels, False
        self.host: list[Tensor] = []
        self.launches = self.waits = self.allocations = self.bytes = 0

    def __enter__(self) -> Counter:
        self._modes = _Ops(self), _Calls(self)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What the host does, or the user."""
        before, self.paused = self.paused, True
        yield
        self.paused = before

    def is_host(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the host."""
        return any(_memory(tensor) == _memory(other) for other in self.host)

    def see(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """One of torch's or our ops was called."""
        space, _, name = func._schema.name.partition("::")
        if space == "fuse_ext_sim":
            # The one op that asks for memory of its own (csrc/cuda/ops.cpp).
            self.allocations += name == "dense_direction"
            return
        if any(map(self.is_host, inputs)):
            self.host += [x for x in outputs if not self.is_host(x)]
            return
        if name == "_local_scalar_dense":
            self.waits += 1
            return
        held = set(map(_memory, inputs))
        new = [x for x in outputs if _memory(x) not in held]
        self.allocations += len(new)
        changes = func._schema.is_mutable
        if name in _NO_KERNEL or not (new or changes):
            return
        self.launches += 1
        # Those ops read nothing of what they write.
        reads = inputs[1:] if name in ("copy_", "fill_", "zero_") else inputs
        written = outputs if outputs or not changes else inputs[:1]
        self.bytes += sum(x.nbytes for x in (*reads, *written))

    def of(self, step: Callable[[], Any]) -> Counts:
        """What one call asks for."""
        names = ("launches", "waits", "allocations", "bytes")
        before = [getattr(self, name) for name in names]
        launches, moved = self.kernels.launches(), self.kernels.bytes_moved()
        step()
        own = [getattr(self, name) - then for name, then in zip(names, before, strict=True)]
        own[0] += self.kernels.launches() - launches
        own[3] += self.kernels.bytes_moved() - moved
        return Counts(*own)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def as_device(kernels: library.SimulatedOps) -> Iterator[Counter]:
    """Python takes the parameters for those of a device, and the simulated kernels for its ops."""
    with (
        mock.patch.object(ops, "select", lambda *_: kernels),
        mock.patch.object(gradients, "is_remote", lambda _: True),
        mock.patch.object(ring, "is_remote", lambda _: True),
        Counter(kernels) as counter,
    ):
        yield counter


class Problem:
    """A convex quadratic in matrices.

    Args:
        counter: Is paused while the closure runs.
        batches: Whether every call is another function, as on minibatches.
        shape: Number of the matrices, rows and columns of each.
    """

    def __init__(
        self,
        counter: Counter,
        batches: bool = False,
        shape: tuple[int, int, int] = (2, NUMEL // SIDE // 2, SIDE),
    ) -> None:
        self.counter, self.calls = counter, 0
        with counter.pause():
            torch.manual_seed(0)
            self.params = [x.clone().requires_grad_() for x in torch.randn(shape)]
            self.curvatures = torch.logspace(0.0, 3.0, math.prod(shape)).view(shape)
            self.noise = torch.randn(7, *shape) * (1.0 if batches else 0.0)

    def closure(self) -> Tensor:
        """New gradients, and the loss."""
        with self.counter.pause():
            self.calls += 1
            noise, loss = self.noise[self.calls % 7], torch.zeros(())
            for x, h, linear in zip(self.params, self.curvatures, noise, strict=True):
                at = x.detach()
                x.grad = h * at + linear
                loss = loss + (0.5 * h * at * at + linear * at).sum()
            return loss


def as_scaled(counter: Counter, optimizer: Any) -> None:
    """As GradScaler leaves it."""
    with counter.pause():
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)


def adam_counts(counter: Counter) -> dict[str, Counts]:
    """Steps of Adam, alone and as FusePV's first phase."""
    found = {}

    def second(
        make: Callable[[Problem], Any], scaled: bool = False, closure: bool = True
    ) -> Counts:
        problem = Problem(counter)
        optimizer = make(problem)
        if scaled:
            as_scaled(counter, optimizer)
        for _ in range(2):
            problem.closure()
            step = (lambda: optimizer.step(problem.closure)) if closure else optimizer.step
            counts = counter.of(step)
        return counts

    def groups(problem: Problem) -> list[dict[str, Any]]:
        return [{"params": [x], "lr": 1e-3 * i} for i, x in enumerate(problem.params, 1)]

    found["Adam"] = second(lambda p: Adam(p.params))
    found["Adam, two groups"] = second(lambda p: Adam(groups(p)))
    found["Adam, GradScaler"] = second(lambda p: Adam(p.params), scaled=True, closure=False)
    found["Adam, bfloat16 moments"] = second(lambda p: Adam(p.params, moment_dtype=torch.bfloat16))
    captured = {"switch": Never(), "line_search": None, "capturable": True}
    found["Adam, capturable"] = second(lambda p: Adam(p.params, capturable=True))
    found["FusePV, Adam phase"] = second(lambda p: FusePV(p.params))
    found["FusePV, Adam phase, two groups"] = second(lambda p: FusePV(groups(p)))
    found["FusePV, Adam phase, check_finite=False"] = second(
        lambda p: FusePV(p.params, check_finite=False)
    )
    found["FusePV, Adam phase, GradScaler"] = second(
        lambda p: FusePV(p.params), scaled=True, closure=False
    )
    found["FusePV, Adam phase, capturable"] = second(lambda p: FusePV(p.params, **captured))
    return found


def minibatch_counts(counter: Counter) -> dict[str, Counts]:
    """FusePV on minibatches: the switch, and the phases after it."""
    found = {}

    def follow(steps: int, scaled: bool = False, **options: Any) -> list[Counts]:
        shape = (WEIGHTS, WEIGHT_SIDE, WEIGHT_SIDE)
        plain = options.get("metric") == "diagonal"
        problem = Problem(counter, True) if plain else Problem(counter, True, shape)
        optimizer = FusePV(problem.params, 1e-3, switch=3, **options)
        if not scaled:
            return [counter.of(lambda: optimizer.step(problem.closure)) for _ in range(steps)]
        counts = []
        for _ in range(steps):
            as_scaled(counter, optimizer)
            problem.closure()
            counts.append(counter.of(optimizer.step))
        return counts

    # Step 3 switches, step 4 looks at the closure, ten gather covariances and ten measure; then
    # every other step takes covariances, and every tenth renews the bases.
    steps = follow(43)
    found["the switch, to a living metric"] = steps[2]
    found["living metric, watching the closure"] = steps[3]
    # Every fifth takes weights into their mean besides, which these are without.
    bare = follow(43, average_weights=False)
    found["living metric, gathering"] = bare[8]
    found["living metric, measuring"] = bare[17]
    pairs = list(zip(bare, steps, strict=True))[33:43]
    kinds = sorted(set(bare[33:43]), key=lambda counts: counts.launches)
    names = "living metric", "living metric, taking covariances", "living metric, bases renewed"
    found |= dict(zip(names, kinds, strict=True))
    assert {with_mean for _, with_mean in pairs} > set(kinds)
    found["living metric, weights into the mean"] = next(
        with_mean for one, with_mean in pairs if one == kinds[0] != with_mean
    )
    scaled = sorted(set(follow(43, scaled=True)[33:43]), key=lambda counts: counts.launches)
    found["living metric, GradScaler"] = scaled[0]
    found["living metric, diagonal"] = follow(8, metric="diagonal")[-1]
    return found


def one_function_counts(counter: Counter) -> dict[str, Counts]:
    """L-BFGS and the dense matrix on one function."""
    found = {}

    def filled(
        make: Callable[[Problem], Any], steps: int = PAIRS + 25, numel: int = NUMEL
    ) -> list[tuple[Counts, int]]:
        problem = Problem(counter, shape=(2, numel // SIDE // 2, SIDE))
        optimizer, counts = make(problem), []
        for _ in range(steps):
            before = problem.calls
            counts.append(
                (counter.of(lambda: optimizer.step(problem.closure)), problem.calls - before)
            )
        return counts

    fixed = {"lr": 0.5, "max_iter": 1, "history_size": PAIRS}
    fixed |= {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    for name, dtype in (("", None), (", bfloat16", torch.bfloat16), (", int8", torch.int8)):
        found[f"fixed step, capturable{name}"] = filled(
            lambda p, dtype=dtype: LBFGS(p.params, history_dtype=dtype, capturable=True, **fixed)
        )[-1][0]
    found["fixed step"] = filled(lambda p: LBFGS(p.params, **fixed))[-1][0]
    found["Fuse"] = filled(lambda p: Fuse(p.params))[-1][0]
    for name, options in (
        ("pairs", {"curvature": "pairs", "history_size": PAIRS, "self_scaling": False}),
        ("matrix", {"curvature": "dense"}),
    ):
        steps = filled(
            lambda p, options=options: FusePV(
                p.params, 1e-3, switch=2, deterministic=True, **options
            ),
            numel=DENSE if name == "matrix" else NUMEL,
        )
        found[f"the switch, to a search with {name}"] = steps[1][0]
        found[f"search with {name}, first step"] = steps[2][0]
        later = steps[PAIRS + 2 :]
        ones = [counts for counts, trials in later if trials == 1]
        two = next(counts for counts, trials in reversed(later) if trials == 2)
        like = min(ones, key=lambda counts: abs(counts.bytes - two.bytes))
        if name == "matrix":  # each step adds a term, until the matrix takes them in
            ones.sort(key=lambda counts: counts.bytes)
            ones, taking_in = ones[: len(ones) // 2 + 1], ones[-1]
        found[f"search with {name}, one trial"] = ones[-1]
        found[f"search with {name}, each trial more"] = two.less(like)
        if name == "matrix":
            found["search with matrix, terms taken in"] = taking_in
    return found


def all_counts(kernels: library.SimulatedOps) -> dict[str, Counts]:
    """Every row of the table."""
    with as_device(kernels) as counter:
        return {
            **adam_counts(counter),
            **minibatch_counts(counter),
            **one_function_counts(counter),
        }


def table(counts: dict[str, Counts]) -> str:
    """As docs/cuda.md has it."""
    lines = [
        "| step | launches | waits | allocations | bytes a parameter |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {c.launches} | {c.waits} | {c.allocations} | {c.a_parameter(name)} |"
        for name, c in counts.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(library.why_not() or table(all_counts(library.SimulatedOps("plain"))))
