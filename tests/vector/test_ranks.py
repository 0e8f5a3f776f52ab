"""Several processes step as one, whatever each of them meets; run on 2 and on 4 with gloo.

All cases of one size run in the same processes: starting them is what takes the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from collectives import Calls
from rank_cases import (
    MODES,
    data,
    data_of,
    fit,
    loss_of,
    make,
    nan_at,
    spread,
    started_once,
    whole,
)
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import LBFGS, Adam, Fuse, FusePV, When, estimate_memory
from fuse_ext.switch.criterion import Observation

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)

# Which layouts are trained in which modes, by the number of processes. Bases of shards are not
# those of whole matrices, nor are blocks of int8 rows: there ranks must agree, with nobody else.
WAYS = {
    2: {"ddp": list(MODES), "fsdp": list(MODES)},
    4: {
        "hsdp": ["lbfgs search", "pairs", "living"],
        "mixed": ["adam", "lbfgs search", "lbfgs int8", "living diagonal", "fuse"],
        "columns": ["lbfgs search", "living"],
    },
}
OWN_WAY = ("living", "lbfgs int8", "matrix")
TRAININGS = [
    (size, layout, mode)
    for size, layouts in WAYS.items()
    for layout, modes in layouts.items()
    for mode in modes
]


def trainings(rank: int, size: int) -> dict[tuple[str, str], Any]:
    return {
        (layout, mode): data_of(fit(layout, mode, rank))
        for layout, modes in WAYS[size].items()
        for mode in modes
    }


def all_jobs(rank: int, folder: str) -> dict[str, Any]:
    """Everything that the tests below look at, from one start of the processes."""
    size = dist.get_world_size()
    found: dict[str, Any] = {"trainings": trainings(rank, size)}
    if size == 2:
        for job in (spoiled, counted, odd_gradients, refusals, raised, criteria, bytes_held):
            found[job.__name__] = job(rank)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    return started_once(tmp_path_factory.mktemp("ranks"), f"{__name__}:all_jobs")


# --- the same steps as in one process -------------------------------------------------------


@pytest.mark.parametrize(("size", "layout", "mode"), TRAININGS)
def test_ranks_step_as_one_process(ranks: Any, size: int, layout: str, mode: str) -> None:
    first, *others = (found["trainings"][layout, mode] for found in ranks(size))
    for other in others:
        assert torch.equal(first["params"], other["params"])
        assert first["calls"] == other["calls"]
        assert first["report"] == other["report"] or layout != "ddp"
    alone = data_of(fit(None, mode))
    if mode not in OWN_WAY or (layout == "ddp" and size == 2):
        assert first["calls"] == alone["calls"]
        torch.testing.assert_close(first["params"], alone["params"], rtol=0, atol=1e-6)
    mean = [sum(losses) / len(losses) for losses in zip(first["losses"], strict=True)]
    assert mean[-1] < 0.8 * mean[0]


# --- ranks that meet different things -------------------------------------------------------

SPOILED = ["adam", "lbfgs fixed", "lbfgs search", "pairs", "living", "fuse search"]


def spoiled(rank: int) -> dict[tuple[str, str], Any]:
    """One rank alone has a NaN for a loss, now and then; and its losses are of another size."""
    found = {}
    for layout in ("ddp", "fsdp"):
        for mode in [*SPOILED, "finds out", "batch search"]:
            nan = nan_at(3, 8, 9, 20)

            def spoils(call: int, nan: Callable[[int], float] = nan) -> float:
                return nan(call) * 3.0 if rank == 1 else 1.0

            found[layout, mode] = data_of(fit(layout, mode, rank, spoils, steps=25))
    return found


@pytest.mark.filterwarnings("ignore:FusePV met a loss")
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("mode", [*SPOILED, "finds out", "batch search"])
def test_a_nan_on_one_rank_is_a_nan_on_all(ranks: Any, layout: str, mode: str) -> None:
    first, second = (found["spoiled"][layout, mode] for found in ranks(2))
    assert torch.equal(first["params"], second["params"])
    assert first["params"].isfinite().all()
    assert first["calls"] == second["calls"]
    if mode != "adam":
        assert first["report"].non_finite == second["report"].non_finite > 0
    assert first["report"] == second["report"] or layout == "fsdp"


def odd_gradients(rank: int) -> dict[str, Any]:
    """Parameters without a gradient on one rank, or on all, at some steps."""
    found, mine = {}, [part[rank::2] for part in data()]
    for mode in ("adam", "lbfgs search", "pairs", "living"):
        kind, options, _ = MODES[mode]
        model, group = spread("fsdp", make())
        optimizer = kind(model.parameters(), **options, process_group=group)
        calls = [0]

        def closure(
            weights: Any = model, optimizer: Any = optimizer, calls: list[int] = calls
        ) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(weights, mine[0], mine[1], "fsdp")
            loss.backward()
            calls[0] += 1
            if rank == 1 and calls[0] % 7 == 0:
                weights.scale.grad = None
            if calls[0] in (9, 10, 11):
                weights.first.bias.grad = None
            return loss.detach()

        for _ in range(20):
            optimizer.step(closure)
        found[mode] = whole(model), calls[0]
    return found


def test_ranks_with_gradients_of_different_parameters(ranks: Any) -> None:
    first, second = (found["odd_gradients"] for found in ranks(2))
    for mode, (params, calls) in first.items():
        assert torch.equal(params, second[mode][0]), mode
        assert calls == second[mode][1], mode


def raised(rank: int) -> tuple[Tensor, int, Any]:
    """The closure raises on one rank alone, at a trial."""
    model, group = spread("ddp", make())
    optimizer = LBFGS(
        model.parameters(),
        line_search_fn="strong_wolfe",
        max_iter=1,
        trial_errors=(ArithmeticError,),
        process_group=group,
    )
    x, y = (part[rank::2] for part in data())
    calls = [0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y, None)
        loss.backward()
        calls[0] += 1
        if rank == 1 and calls[0] in (2, 6, 10):
            raise ArithmeticError("on this rank alone")
        return loss

    for _ in range(10):
        optimizer.step(closure)
    return whole(model), calls[0], optimizer.report()


def test_a_trial_that_raises_on_one_rank_is_refused_on_all(ranks: Any) -> None:
    (first, calls, report), (second, others, other) = (found["raised"] for found in ranks(2))
    assert torch.equal(first, second)
    assert calls == others
    assert report.non_finite == other.non_finite > 0
    assert report == other


def criteria(rank: int) -> list[int]:
    """A criterion that only one rank's clock, say, would fulfil."""

    def says(seen: Observation) -> bool:
        return rank == 1 and seen.step == 4

    model, group = spread("ddp", make())
    optimizer = FusePV(model.parameters(), switch=When(says), process_group=group)
    x, y = (part[rank::2] for part in data())
    steps = []
    for _ in range(6):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, x, y, None)
            loss.backward()
            return loss

        optimizer.step(closure)
        steps.append(optimizer.report().switch_step)
    return steps


def test_a_criterion_that_holds_on_one_rank_switches_all(ranks: Any) -> None:
    first, second = (found["criteria"] for found in ranks(2))
    assert first == second == [None, None, None, 4, 4, 4]


# --- what is sent, and what is held ---------------------------------------------------------


def counted(rank: int) -> dict[str, Any]:
    """Slots, and the collective calls of an optimizer's own in two steps, with their bytes."""
    found = {}
    for mode in ("lbfgs search", "pairs", "living"):
        done = fit("fsdp", mode, rank, steps=20)
        optimizer, evaluate = done["optimizer"], done["closure"]
        calls = Calls()

        def closure(calls: Calls = calls, evaluate: Any = evaluate) -> Tensor:
            calls.listens = False
            loss: Tensor = evaluate()
            calls.listens = True
            calls.mark("closure")
            return loss

        with calls:
            for _ in range(2):
                optimizer.step(closure)
        found[mode] = optimizer.param_groups[0].get("history_size", 0) + 1, calls.heard
    return found


def test_only_scalars_are_sent(ranks: Any) -> None:
    for mode, (slots, heard) in ranks(2)[0]["counted"].items():
        names = {name for name, _ in heard}
        assert names == {"allreduce_", "closure"}, mode
        # y's dots and g's with all rows, s and y, are the most.
        assert max(size for _, size in heard) <= 8 * 4 * slots, mode
        trials = sum(name == "closure" for name, _ in heard)
        sums = len(heard) - trials
        iterations = 4 if mode == "lbfgs search" else 2
        if mode in ("lbfgs search", "pairs"):
            # Whether anyone was moved, once a step; one a trial; dots and direction an iteration,
            # and dots once more where a step closes its own pair.
            assert sums <= 2 + trials + 2 * iterations + 2
        if mode == "living":
            assert sums == 2


def bytes_held(rank: int) -> dict[str, tuple[int, int]]:
    """Bytes of state, as reported and as estimated."""
    found = {}
    for mode, options in (("pairs", {"deterministic": True, "curvature": "pairs"}), ("living", {})):
        done = fit("fsdp", mode, rank, steps=20)
        size = done["optimizer"].param_groups[0]["history_size"]
        said = estimate_memory(done["model"], history_size=size, **options)
        found[mode] = done["optimizer"].report().state_bytes, said.phases[-1].state_bytes
    return found


def test_estimates_count_what_lies_on_a_rank(ranks: Any) -> None:
    for found in ranks(2):
        for held, said in found["bytes_held"].values():
            assert abs(held - said) <= 0.02 * said


# --- what is refused ------------------------------------------------------------------------


def refusals(rank: int) -> dict[str, str]:
    """What the optimizers say of what they cannot do, or must not guess."""
    found = {}

    def note(name: str, attempt: Callable[[], Any]) -> None:
        try:
            attempt()
        except (ValueError, TypeError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    plain, (sharded, _) = make(), spread("fsdp", make())
    note("search", lambda: LBFGS(plain.parameters(), line_search_fn="armijo"))
    note("fuse", lambda: Fuse(plain.parameters(), line_search="armijo"))
    note("promised", lambda: FusePV(plain.parameters(), deterministic=True))
    note("adam", lambda: Adam(plain.parameters()))
    note("fixed", lambda: LBFGS(plain.parameters()))
    note("minibatches", lambda: FusePV(plain.parameters()))
    local: dict[str, Any] = {"deterministic": True, "process_group": "local"}
    note("local", lambda: FusePV(plain.parameters(), **local))
    note("matrix", lambda: FusePV(sharded.parameters(), curvature="dense"))
    note("host", lambda: FusePV(sharded.parameters(), history_device="cpu"))
    note("graph", lambda: FusePV(sharded.parameters(), capturable=True, line_search=None, switch=9))
    note("alone", lambda: Adam(sharded.parameters(), process_group="local"))
    note("name", lambda: Adam(plain.parameters(), process_group="all"))
    note("kind", lambda: Adam(plain.parameters(), process_group=3))
    optimizer = Adam(sharded.parameters())
    note("dtype", lambda: optimizer.continue_in(torch.float64))
    note("fsdp1", lambda: Adam(first_fsdp(False).parameters()))
    note("fsdp1, views", lambda: FusePV(first_fsdp(True).parameters()))
    note("guess", lambda: watch_alone(plain))
    return found


def first_fsdp(views: bool) -> nn.Module:
    """A model in FSDP1, whose parameters are flat ones, or views of them."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    device = torch.device("cpu")
    return FullyShardedDataParallel(nn.Linear(3, 3), use_orig_params=views, device_id=device)


def watch_alone(model: nn.Module) -> None:
    """Full batches, and nobody has said whether the other rank has the same model."""
    optimizer = FusePV(model.parameters(), lr=1e-3, switch=3)
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y, None)
        loss.backward()
        return loss

    with pytest.warns(RuntimeWarning, match="process_group"):
        for _ in range(8):
            optimizer.step(closure)
    raise RuntimeError(f"stayed in {optimizer.report().curvature}")


def test_what_cannot_be_done_is_said(ranks: Any) -> None:
    first, second = (found["refusals"] for found in ranks(2))
    assert first == second
    for name in ("search", "fuse", "promised"):
        assert first[name].startswith("RuntimeError: there are other ranks")
    for name in ("adam", "fixed", "minibatches", "local"):
        assert name not in first
    assert "curvature='dense'" in first["matrix"]
    assert "history_device='cpu'" in first["host"]
    assert "capturable=True" in first["graph"]
    assert "process_group='local'" in first["alone"]
    assert "got 'all'" in first["name"]
    assert first["kind"].startswith("TypeError: process_group")
    assert "DTensors" in first["dtype"]
    assert "FSDP1" in first["fsdp1"] and "FSDP1" in first["fsdp1, views"]
    assert first["guess"] == "RuntimeError: stayed in kronecker"
