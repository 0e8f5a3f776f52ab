"""Steps on a GPU as `make gpu-check` measures them, named as in the table of docs/cuda.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuse_ext import LBFGS, Adam, Fuse, FusePV, Never
from fuse_ext.kernels.scalars import matrix_place

PAIRS = 10
FIXED = {"lr": 0.5, "max_iter": 1, "history_size": PAIRS}
FIXED |= {"tolerance_grad": 0.0, "tolerance_change": 0.0}
CAPTURABLE = {"switch": Never(), "line_search": None, "capturable": True}
SEARCH: dict[str, Any] = {"lr": 1e-3, "switch": 2, "deterministic": True}
PEERS = ("torch.optim.Adam(fused=True)", "torch.optim.Adam(fused=True), captured")
TORCH_LBFGS = "torch.optim.LBFGS, fixed step"


class Problem:
    """A convex quadratic, its closure in few kernels.

    Args:
        shapes: Of its parameters.
        device: Where.
        batches: Whether every call is another function.
    """

    def __init__(
        self, shapes: list[tuple[int, ...]], device: torch.device, batches: bool = False
    ) -> None:
        self.params = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
        self.curvatures = [torch.linspace(1, 100, x.numel(), device=device) for x in self.params]
        self.batches, self.calls = batches, 0
        for x in self.params:
            x.grad = torch.zeros_like(x)
        self.closure()

    def closure(self) -> Tensor:
        """New gradients, in the tensors that hold the old ones, and the loss."""
        self.calls += 1
        loss = torch.zeros((), device=self.params[0].device)
        for x, h in zip(self.params, self.curvatures, strict=True):
            at = x.detach().view(-1)
            assert x.grad is not None
            torch.mul(h, at, out=x.grad.view(-1))
            loss += 0.5 * torch.dot(x.grad.view(-1), at)
            if self.batches:
                slope = 0.1 * (self.calls % 7 - 3)
                x.grad.add_(slope)
                loss += slope * at.sum()
        if self.batches:  # else they would go down as those of one function
            loss *= 1.0 + self.calls * 3 % 7 / 7
        return loss


@dataclass(frozen=True)
class Step:
    """How a row is made.

    Attributes:
        make: The optimizer of a problem.
        warm: Steps before the one that is measured.
        closure: Whether the step calls it; else gradients are at hand.
        captured: Whether a graph replays the step.
        batches: Whether the closure is another function at every call.
    """

    make: Callable[[Problem], Any]
    warm: int = 3
    closure: bool = True
    captured: bool = False
    batches: bool = False

    def build(self, problem: Problem) -> Callable[[], object]:
        """The step, warmed up but not captured."""
        optimizer = self.make(problem)

        def run() -> object:
            return optimizer.step(problem.closure) if self.closure else optimizer.step()

        for _ in range(self.warm):
            run()
        return run


def groups(problem: Problem) -> list[dict[str, Any]]:
    """Every other parameter in a group of its own rate."""
    halves = problem.params[::2], problem.params[1::2]
    return [{"params": half, "lr": 1e-3 * i} for i, half in enumerate(halves, 1) if half]


def scaled(optimizer: Any, problem: Problem) -> Any:
    """As under GradScaler."""
    device = problem.params[0].device
    optimizer.grad_scale = torch.ones((), device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    return optimizer


def lbfgs(dtype: torch.dtype | None = None, **options: Any) -> Callable[[Problem], Any]:
    return lambda p: LBFGS(p.params, history_dtype=dtype, **FIXED, **options)


def theirs(**options: Any) -> Callable[[Problem], Any]:
    # The CPU, where the tests run this, has no capturable Adam.
    def make(problem: Problem) -> Any:
        given = options if problem.params[0].is_cuda else {}
        return torch.optim.Adam(problem.params, lr=1e-3, fused=True, **given)

    return make


FULL = PAIRS + 3
STEPS = {
    "Adam": Step(lambda p: Adam(p.params), closure=False),
    "Adam, two groups": Step(lambda p: Adam(groups(p)), closure=False),
    "Adam, GradScaler": Step(lambda p: scaled(Adam(p.params), p), closure=False),
    "Adam, bfloat16 moments": Step(
        lambda p: Adam(p.params, moment_dtype=torch.bfloat16), closure=False
    ),
    "Adam, capturable": Step(
        lambda p: Adam(p.params, capturable=True), closure=False, captured=True
    ),
    "FusePV, Adam phase": Step(lambda p: FusePV(p.params, switch=Never())),
    "FusePV, Adam phase, two groups": Step(lambda p: FusePV(groups(p), switch=Never())),
    "FusePV, Adam phase, check_finite=False": Step(
        lambda p: FusePV(p.params, switch=Never(), check_finite=False)
    ),
    "FusePV, Adam phase, GradScaler": Step(
        lambda p: scaled(FusePV(p.params, switch=Never()), p), closure=False
    ),
    "FusePV, Adam phase, capturable": Step(lambda p: FusePV(p.params, **CAPTURABLE), captured=True),
    "living metric, diagonal": Step(
        lambda p: FusePV(p.params, switch=1, metric="diagonal"), 5, batches=True
    ),
    "fixed step, capturable": Step(lbfgs(capturable=True), FULL, captured=True),
    "fixed step, capturable, bfloat16": Step(
        lbfgs(torch.bfloat16, capturable=True), FULL, captured=True
    ),
    "fixed step, capturable, int8": Step(lbfgs(torch.int8, capturable=True), FULL, captured=True),
    "fixed step": Step(lbfgs(), FULL),
    "Fuse": Step(lambda p: Fuse(p.params), FULL),
    PEERS[0]: Step(theirs(), closure=False),
    PEERS[1]: Step(theirs(capturable=True), closure=False, captured=True),
    TORCH_LBFGS: Step(lambda p: torch.optim.LBFGS(p.params, **FIXED), FULL),
}
# Where most places in the flat vector and addresses disagree, so that elements go one by one.
OF_ODD = {name: STEPS[name] for name in ("Adam", "FusePV, Adam phase", "fixed step, capturable")}
# On matrices: beside what the living metric costs there.
OF_MATRICES = {PEERS[0]: STEPS[PEERS[0]]}
# A long history of few parameters, with as many pairs as it has room for.
LONG_PAIRS = 500
LONG = {
    "fixed step, capturable": Step(
        lambda p: LBFGS(
            p.params, **{**FIXED, "history_size": LONG_PAIRS, "lr": 0.01}, capturable=True
        ),
        LONG_PAIRS + 3,
        captured=True,
    )
}


@dataclass(frozen=True)
class Passage:
    """Steps that come once or now and then: fresh optimizers are led through them.

    Attributes:
        make: The optimizer of a problem.
        steps: That each optimizer takes.
        rows: Which of them make a row: takes a step's number, from 0, the calls of the closure in
            it, and the optimizer after it.
        batches: Whether the closure is another function at every call.
        closure: Whether the step calls it; else it was called just before, as under GradScaler.
        more: A row for what one row takes more than another: its name, and theirs.
    """

    make: Callable[[Problem], Any]
    steps: int
    rows: dict[str, Callable[[int, int, Any], bool]]
    batches: bool = False
    closure: bool = True
    more: tuple[str, str, str] | None = None

    def names(self) -> list[str]:
        """Of all rows."""
        return [*self.rows, *([self.more[0]] if self.more else [])]

    def row_of(self, number: int, calls: int, optimizer: Any) -> str | None:
        """The row that a step belongs to."""
        found = (name for name, is_of in self.rows.items() if is_of(number, calls, optimizer))
        return next(found, None)

    def step(self, optimizer: Any, problem: Problem) -> object:
        """One step."""
        if self.closure:
            return optimizer.step(problem.closure)
        problem.closure()
        return optimizer.step()


# The switch ends step 2, and step 3 looks at the closure. Then ten steps gather covariances, of
# which the last finds the bases, and ten measure in them; of those that follow every other takes
# covariances, and every tenth renews the bases. Every fifth takes weights into their mean besides.
EIGH = "living metric, bases found"
LIVING = Passage(
    lambda p: FusePV(p.params, 1e-3, switch=3, metric="kronecker"),
    43,
    {
        "the switch, to a living metric": lambda number, *_: number == 2,
        "living metric, watching the closure": lambda number, *_: number == 3,
        "living metric, gathering": lambda number, *_: 5 <= number <= 12 and number != 8,
        EIGH: lambda number, *_: number == 13,
        "living metric, measuring": lambda number, *_: 14 <= number <= 21 and number != 18,
        "living metric, bases renewed": lambda number, *_: number in (32, 42),
        "living metric, weights into the mean": lambda number, *_: number in (28, 38),
        "living metric, taking covariances": lambda number, *_: (
            number > 22 and number % 2 == 1 and number % 10 != 3
        ),
        "living metric": lambda number, *_: number > 22 and number % 2 == 0,
    },
    batches=True,
)
# Without the look at the closure all comes a step sooner.
LIVING_SCALED = Passage(
    lambda p: scaled(FusePV(p.params, 1e-3, switch=3, metric="kronecker"), p),
    42,
    {
        "living metric, GradScaler": lambda number, *_: (
            number > 21 and number % 2 == 1 and number not in (27, 31, 37, 41)
        )
    },
    batches=True,
    closure=False,
)


def took_terms_in(optimizer: Any) -> bool:
    """Whether the dense matrix has just done so: no term is left. Reads the device."""
    entry = optimizer.state[optimizer.param_groups[0]["params"][0]]
    return float(entry["matrix_scalars"][matrix_place("terms")]) == 0.0


def search(curvature: str) -> Passage:
    """On one function; the history is full where trials are told apart."""
    name = {"pairs": "pairs", "dense": "matrix"}[curvature]
    one, two = (f"search with {name}, {count}" for count in ("one trial", "two trials"))
    rows: dict[str, Callable[[int, int, Any], bool]] = {
        f"the switch, to a search with {name}": lambda number, *_: number == 1,
        f"search with {name}, first step": lambda number, *_: number == 2,
    }
    if curvature == "dense":
        rows["search with matrix, terms taken in"] = lambda number, calls, optimizer: (
            number >= FULL - 1 and calls == 1 and took_terms_in(optimizer)
        )
    rows[one] = lambda number, calls, _: number >= FULL - 1 and calls == 1
    rows[two] = lambda number, calls, _: number >= FULL - 1 and calls == 2
    return Passage(
        lambda p: FusePV(p.params, curvature=curvature, history_size=PAIRS, **SEARCH),
        # Up to 32 pairs are kept as terms before the matrix takes them in.
        FULL + (40 if curvature == "dense" else 20),
        rows,
        more=(f"search with {name}, each trial more", two, one),
    )


WITH_PAIRS, WITH_MATRIX = search("pairs"), search("dense")
PASSAGES = (LIVING, LIVING_SCALED, WITH_PAIRS, WITH_MATRIX)
# Rows that docs/cuda.md has no counts for.
UNCOUNTED = (EIGH, WITH_PAIRS.more[1], WITH_MATRIX.more[1])
