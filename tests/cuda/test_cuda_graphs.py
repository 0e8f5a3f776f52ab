"""Captured steps on a CUDA device: replays against eager steps. Needs a GPU: `make gpu-check`.

A machine without one runs the same with a graph that only remembers what to call again
(test_the_recipes_themselves).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_cases import NEVER, Bowl
from test_cuda_device import cuda_only, gpu_waits
from torch import Tensor

from fuse_ext import LBFGS, Adam, AfterSteps, FusePV, Never

REPLAYS = 30
SHAPES = ((1000, 37), (513,), (3, 5))


class Problem(Bowl):
    """Several tensors; the closure allocates only what the graph's own memory pool gives it."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype, SHAPES, device)


class Remembered:
    """What stands in for a graph where there is no device: calls its step again."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.replay = step


def capture(step: Callable[[], Any], device: str) -> Any:
    """The recipe of docs/cuda.md: warm up on a side stream, then capture."""
    if device == "cpu":
        for _ in range(2):
            step()
        return Remembered(step)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def replayed(
    make: Callable[[list[Tensor]], Any], device: str, closure: bool, replays: int = REPLAYS
) -> tuple[Any, Problem, Any, Problem]:
    """An optimizer whose steps are replayed, and one that took as many eagerly."""
    pairs = []
    for captured in (True, False):
        problem = Problem(device)
        optimizer = make(problem.params)

        def step(problem: Problem = problem, optimizer: Any = optimizer) -> None:
            if closure:
                optimizer.step(problem.closure)
            else:
                problem.closure()
                optimizer.step()

        again = capture(step, device).replay if captured else step
        for _ in range(replays if captured else replays + 2):
            again()
        pairs.append((optimizer, problem))
    return *pairs[0], *pairs[1]


def lr(value: float, device: str) -> Tensor:
    return torch.tensor(value, device=device)


ADAMS: dict[str, Callable[[list[Tensor], str], Any]] = {
    "Adam": lambda p, d: Adam(p, lr=0.05, capturable=True),
    "AdamW": lambda p, d: Adam(
        p,
        lr=lr(0.05, d),
        amsgrad=True,
        weight_decay=0.1,
        decoupled_weight_decay=True,
        capturable=True,
    ),
    "bf16 moments": lambda p, d: Adam(p, lr=0.05, moment_dtype=torch.bfloat16, capturable=True),
    "FusePV, Adam": lambda p, d: FusePV(
        p, lr=lr(0.05, d), switch=Never(), line_search=None, capturable=True
    ),
}


def lbfgs(history_dtype: torch.dtype | None = None, **options: Any) -> Any:
    return lambda p, d: LBFGS(
        p,
        lr=0.5,
        max_iter=1,
        history_size=4,
        history_dtype=history_dtype,
        capturable=True,
        **NEVER,
        **options,
    )


LBFGSES: dict[str, Callable[[list[Tensor], str], Any]] = {
    "LBFGS": lbfgs(),
    "bf16": lbfgs(torch.bfloat16, weight_decay=0.1),
    "int8": lbfgs(torch.int8),
    "FusePV, L-BFGS": lambda p, d: FusePV(
        p, lr=lr(1.0, d), switch=0, lbfgs_lr=0.5, line_search=None, capturable=True
    ),
}
CLOSURES = (True, False)


def check_replays(make: Callable[[list[Tensor], str], Any], device: str, closure: bool) -> None:
    """Replays are steps, to the bit: the kernels have one order of summation."""
    ours, mine, theirs, other = replayed(lambda p: make(p, device), device, closure)
    assert torch.equal(mine.place(), other.place())
    if isinstance(ours, Adam):
        assert {float(e["step"]) for e in ours.state.values()} == {REPLAYS + 2.0}
        return
    a, b = ours.report(), theirs.report()
    assert (a.adam_steps, a.lbfgs_iterations) == (b.adam_steps, b.lbfgs_iterations)
    assert a.adam_steps + a.lbfgs_iterations == REPLAYS + 2
    assert (a.pairs_accepted, a.non_finite) == (b.pairs_accepted, b.non_finite)
    if a.lbfgs_iterations:
        assert float(mine.place().norm()) < 1e-2 * float(Problem("cpu").place().norm())


@cuda_only
@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize("kind", [*ADAMS, *LBFGSES])
def test_replays_are_steps(kind: str, closure: bool) -> None:
    check_replays((ADAMS | LBFGSES)[kind], "cuda", closure)


def both_phases(device: str) -> tuple[Tensor, Any]:
    """The recipe of docs/cuda.md: one graph for each phase."""
    problem = Problem(device)
    rate = lr(0.05, device)
    optimizer = FusePV(
        problem.params,
        lr=rate,
        switch=Never(),
        lbfgs_lr=0.5,
        line_search=None,
        history_size=4,
        capturable=True,
    )

    def step() -> None:
        optimizer.step(problem.closure)

    graph = capture(step, device)
    for k in range(20):
        rate.fill_(0.05 * 0.9**k)  # a schedule
        graph.replay()
    del graph  # Adam's moments are about to be released
    optimizer.switch_now()
    graph = capture(step, device)
    for _ in range(REPLAYS):
        graph.replay()
    return problem.place(), optimizer.report()


def check_both_phases(device: str) -> None:
    place, report = both_phases(device)
    expected, on_cpu = both_phases("cpu")
    assert (report.adam_steps, report.lbfgs_iterations) == (22, REPLAYS + 2)
    assert report.switch_step == on_cpu.switch_step == 22
    torch.testing.assert_close(place.cpu(), expected, rtol=1e-3, atol=1e-3)


@cuda_only
def test_one_graph_for_each_phase() -> None:
    check_both_phases("cuda")


def skips(device: str) -> Any:
    """NaN put into the data between two replays: the step is left out, and counted."""
    problem = Problem(device)
    optimizer = FusePV(problem.params, lr=0.05, switch=Never(), line_search=None, capturable=True)
    graph = capture(lambda: optimizer.step(problem.closure), device)
    for phase in ("adam", "lbfgs"):
        if phase == "lbfgs":
            del graph
            optimizer.switch_now()
            graph = capture(lambda: optimizer.step(problem.closure), device)
        graph.replay()
        place = problem.place()
        kept = problem.curvatures[1].clone()
        problem.curvatures[1].fill_(torch.nan)
        graph.replay()
        graph.replay()
        assert torch.equal(problem.place(), place)
        problem.curvatures[1].copy_(kept)
        graph.replay()
        assert not torch.equal(problem.place(), place)
    report = optimizer.report()
    # In L-BFGS the second evaluation of a refused step is not counted again.
    assert report.non_finite == 4
    assert report.adam_steps == 4
    return report


@cuda_only
def test_a_replay_that_is_not_finite_is_no_step() -> None:
    skips("cuda")


@cuda_only
@pytest.mark.parametrize("kind", [*ADAMS, *LBFGSES])
def test_eager_steps_wait_for_nothing(kind: str) -> None:
    problem = Problem("cuda")
    optimizer = (ADAMS | LBFGSES)[kind](problem.params, "cuda")
    for _ in range(2):
        optimizer.step(problem.closure)
    torch.cuda.synchronize()
    with gpu_waits.forbidden():
        for _ in range(3):
            optimizer.step(problem.closure)
    torch.cuda.synchronize()


@cuda_only
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize(
    ("make", "steps_before", "message"),
    [
        (lambda p, d: Adam(p), 2, "step=3 would be the same whenever the graph"),
        (lambda p, d: Adam(p, capturable=True), 0, "Adam's state is made while a CUDA graph"),
        (lbfgs(), 0, "history of L-BFGS is made while a CUDA graph"),
    ],
    ids=["ordinary", "Adam", "LBFGS"],
)
def test_what_cannot_be_captured_says_so(make: Any, steps_before: int, message: str) -> None:
    problem = Problem("cuda")
    optimizer = make(problem.params, "cuda")
    problem.closure()
    for _ in range(steps_before):
        optimizer.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    torch.cuda.synchronize()


@cuda_only
def test_the_switch_is_not_made_in_a_capture() -> None:
    problem = Problem("cuda")
    optimizer = FusePV(
        problem.params, lr=0.05, switch=AfterSteps(3), line_search=None, capturable=True
    )
    graph = capture(lambda: optimizer.step(problem.closure), "cuda")
    for _ in range(5):
        graph.replay()
    assert optimizer.phase == "adam"
    assert optimizer.report().adam_steps == 7


def test_the_recipes_themselves() -> None:
    for closure in CLOSURES:
        for make in (ADAMS | LBFGSES).values():
            check_replays(make, "cpu", closure)
    check_both_phases("cpu")
    skips("cpu")
