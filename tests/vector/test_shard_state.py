"""``shard_state=True``: each rank steps on its own rows of parameters that all of them hold."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_cases import MODES, data, data_of, fit, loss_of, make, nan_at, spread, started_once, whole
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import LBFGS, Adam, Fuse, FusePV, When, estimate_memory

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)

# Bases of shards are not those of whole matrices, nor are blocks of int8 rows; a matrix for H is
# not to be had.
OWN_WAY = ("living", "lbfgs int8", "matrix")
WAYS = {2: list(MODES), 4: ["adam", "lbfgs search", "pairs", "living", "living diagonal", "fuse"]}
TRAININGS = [(size, mode) for size, modes in WAYS.items() for mode in modes]


def all_jobs(rank: int, folder: str) -> dict[str, Any]:
    """Everything that the tests below look at, from one start of the processes."""
    size = dist.get_world_size()
    found: dict[str, Any] = {"trainings": trainings(rank, size), "held": held(rank)}
    if size == 2:
        jobs = (spoiled, odd_gradients, raised, counted, odd_params, edits, watchers, refusals)
        for job in (*jobs, grown, narrow, in_buckets, torchs_own, copied, phases):
            found[job.__name__] = job(rank)
    else:
        found["some_of_them"] = some_of_them(rank)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    return started_once(tmp_path_factory.mktemp("ranks"), f"{__name__}:all_jobs")


# --- the same steps as without --------------------------------------------------------------


def trainings(rank: int, size: int) -> dict[str, Any]:
    return {mode: data_of(fit("zero", mode, rank, looks=whole)) for mode in WAYS[size]}


@pytest.mark.parametrize(("size", "mode"), TRAININGS)
def test_ranks_step_as_one_process(ranks: Any, size: int, mode: str) -> None:
    first, *others = (found["trainings"][mode] for found in ranks(size))
    for other in others:
        assert len(first["seen"]) == len(other["seen"])
        for mine, theirs in zip(first["seen"], other["seen"], strict=True):
            assert torch.equal(mine, theirs)
        assert first["calls"] == other["calls"]
    if mode not in OWN_WAY:
        alone = data_of(fit(None, mode))
        assert first["calls"] == alone["calls"]
        torch.testing.assert_close(first["params"], alone["params"], rtol=0, atol=1e-6)
    mean = [sum(found["trainings"][mode]["losses"][k] for found in ranks(size)) for k in (0, -1)]
    assert mean[1] < 0.8 * mean[0]


# --- ranks that meet different things -------------------------------------------------------

SPOILED = ["adam", "lbfgs fixed", "lbfgs search", "pairs", "living", "fuse search"]


def spoiled(rank: int) -> dict[str, Any]:
    """One rank alone has a NaN for a loss, now and then; and its losses are of another size."""
    nan = nan_at(3, 8, 9, 20)

    def spoils(call: int) -> float:
        return nan(call) * 3.0 if rank == 1 else 1.0

    modes = [*SPOILED, "finds out", "batch search"]
    return {mode: data_of(fit("zero", mode, rank, spoils, steps=25)) for mode in modes}


@pytest.mark.filterwarnings("ignore:FusePV met a loss")
@pytest.mark.parametrize("mode", [*SPOILED, "finds out", "batch search"])
def test_a_nan_on_one_rank_is_a_nan_on_all(ranks: Any, mode: str) -> None:
    first, second = (found["spoiled"][mode] for found in ranks(2))
    assert torch.equal(first["params"], second["params"])
    assert first["params"].isfinite().all()
    assert first["calls"] == second["calls"]
    if mode != "adam":
        assert first["report"].non_finite == second["report"].non_finite > 0


def closure_on(
    model: nn.Module, optimizer: Any, after: Callable[[int], None] = lambda call: None
) -> Callable[[], Tensor]:
    """The loss of this rank's rows, and ``after`` the k-th call."""
    x, y = (part[dist.get_rank() :: dist.get_world_size()] for part in data())
    calls = [0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y, None)
        loss.backward()
        calls[0] += 1
        after(calls[0])
        return loss.detach()

    return closure


def odd_gradients(rank: int) -> dict[str, Tensor]:
    """Parameters without a gradient on one rank, or on all, at some steps."""
    found = {}
    for mode in ("adam", "lbfgs search", "pairs", "living", "fuse"):
        kind, options, _ = MODES[mode]
        model, group = spread("zero", make())
        optimizer = kind(model.parameters(), **options, process_group=group, shard_state=True)
        inner: Any = model.module

        def drops(call: int, inner: Any = inner) -> None:
            if rank == 1 and call % 7 == 0:
                inner.scale.grad = None
            if call in (9, 10, 11):
                inner.first.bias.grad = None

        closure = closure_on(model, optimizer, drops)
        for _ in range(20):
            optimizer.step(closure)
        found[mode] = whole(model)
    return found


def test_ranks_with_gradients_of_different_parameters(ranks: Any) -> None:
    first, second = (found["odd_gradients"] for found in ranks(2))
    for mode, params in first.items():
        assert torch.equal(params, second[mode]), mode


def raised(rank: int) -> dict[str, Any]:
    """The closure raises at a trial: what it may, or another error, on one rank or on both."""
    found: dict[str, Any] = {}
    for name, error, where in (
        ("allowed", ArithmeticError, (1,)),
        ("one", KeyError, (1,)),
        ("both", KeyError, (0, 1)),
    ):
        model, group = spread("zero", make())
        optimizer = LBFGS(
            model.parameters(),
            line_search_fn="strong_wolfe",
            max_iter=1,
            trial_errors=(ArithmeticError,),
            process_group=group,
            shard_state=True,
        )

        def raises(call: int, error: Any = error, where: Any = where) -> None:
            if rank in where and call in (2, 6, 10):
                raise error("on this rank")

        closure = closure_on(model, optimizer, raises)
        before, errors, same = whole(model), [], []
        for _ in range(10):
            try:
                optimizer.step(closure)
            except (KeyError, RuntimeError) as caught:
                errors.append(type(caught).__name__)
                same.append(torch.equal(whole(model), before))
            before = whole(model)
        found[name] = before, errors, same, optimizer.report()
    return found


def test_a_trial_that_raises_on_one_rank_is_refused_on_all(ranks: Any) -> None:
    (first, none, _, report), (second, *_, other) = (
        found["raised"]["allowed"] for found in ranks(2)
    )
    assert torch.equal(first, second)
    assert report.non_finite == other.non_finite > 0
    assert not none


def phases(rank: int) -> dict[str, tuple[Tensor, list[str]]]:
    """An error on one rank in steps without trials."""
    found = {}
    for name, options in (("adam", {"switch": 99}), ("living", {"switch": 3})):
        model, group = spread("zero", make())
        optimizer = FusePV(model.parameters(), **options, process_group=group, shard_state=True)

        def raises(call: int) -> None:
            if rank == 1 and call in (2, 9):
                raise KeyError("on this rank")

        closure, errors = closure_on(model, optimizer, raises), []
        for _ in range(14):
            try:
                optimizer.step(closure)
            except (KeyError, RuntimeError) as caught:
                errors.append(type(caught).__name__)
        found[name] = whole(model), errors
    return found


@pytest.mark.parametrize("name", ["adam", "living"])
def test_an_error_on_one_rank_is_told_to_the_others(ranks: Any, name: str) -> None:
    (first, told), (second, errors) = (found["phases"][name] for found in ranks(2))
    assert torch.equal(first, second)
    assert (told, errors) == (["RuntimeError"] * 2, ["KeyError"] * 2)


@pytest.mark.parametrize("where", ["one", "both"])
def test_an_error_at_a_trial_ends_the_step_on_all_ranks(ranks: Any, where: str) -> None:
    (first, told, same, _), (second, errors, again, _) = (
        found["raised"][where] for found in ranks(2)
    )
    assert torch.equal(first, second)
    assert errors == ["KeyError"] * len(errors) and errors
    assert told == (["RuntimeError"] * len(errors) if where == "one" else errors)
    assert all(same) and all(again)  # the parameters are where the step began


# --- what is sent, and what is held ---------------------------------------------------------


def counted(rank: int) -> dict[str, Any]:
    """The collective calls of an optimizer's own in two steps, with bytes gathered."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.listens, self.heard = True, []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if self.listens and func.namespace in ("c10d", "_c10d_functional"):
                size = args[0].nbytes if isinstance(args[0], Tensor) else 0
                self.heard.append((func.__name__.partition(".")[0], size))
            return func(*args, **(kwargs or {}))

    found = {}
    for mode in ("adam", "lbfgs search", "pairs", "living", "fuse"):
        done = fit("zero", mode, rank, steps=20)
        optimizer, evaluate = done["optimizer"], done["closure"]
        calls = Calls()

        def closure(calls: Calls = calls, evaluate: Any = evaluate) -> Tensor:
            calls.listens = False
            loss: Tensor = evaluate()
            calls.listens = True
            calls.heard.append(("closure", 0))
            return loss

        with calls:
            for _ in range(2):
                optimizer.step(closure)
        found[mode] = calls.heard
    found["bytes"] = sum(param.nbytes for param in make().parameters())
    return found


def test_parameters_are_gathered_once_where_they_were_moved(ranks: Any) -> None:
    counted = ranks(2)[0]["counted"]
    for mode, heard in counted.items():
        if mode == "bytes":
            continue
        names = [name for name, _ in heard]
        gathers = [size for name, size in heard if "allgather" in name]
        assert {*names} <= {"allreduce_", "closure"} | {n for n in names if "allgather" in n}
        # Each parameter's rows are padded to those of the rank that has most, and to 16 bytes.
        assert all(counted["bytes"] <= size <= 2 * counted["bytes"] for size in gathers), mode
        trials = names.count("closure")
        if mode in ("adam", "living"):  # at the end of the step
            assert len(gathers) == 2
        elif mode == "fuse":  # before the second evaluation of the step
            assert len(gathers) == 2 < trials
        else:  # before each trial, and where a step does not end at its last one
            assert trials - 2 <= len(gathers) <= trials + 4


def in_buckets(rank: int) -> tuple[int, bool]:
    """Parameters that are more than one call takes."""
    from fuse_ext.vector.rows import rows

    before, rows.BUCKET = rows.BUCKET, 256
    try:
        done = fit("zero", "lbfgs search", rank, steps=5)
        buckets = len(done["optimizer"].flat.rows._buckets)
    finally:
        rows.BUCKET = before
    whole_ones = fit("zero", "lbfgs search", rank, steps=5)
    return buckets, torch.equal(done["params"], whole_ones["params"])


def test_buckets_change_nothing(ranks: Any) -> None:
    for found in ranks(2):
        buckets, same = found["in_buckets"]
        assert buckets > 2 and same


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


HELD: dict[str, dict[str, Any]] = {
    "adam": {"switch": 99},
    "living": {"switch": 2, "deterministic": False, "metric": "kronecker"},
    "living diagonal": {"switch": 2, "deterministic": False, "metric": "diagonal"},
    "pairs": {"switch": 2, "deterministic": True, "curvature": "pairs", "history_size": 10},
    "int8": {
        "switch": 2,
        "deterministic": True,
        "curvature": "pairs",
        "history_size": 10,
        "history_dtype": torch.int8,
    },
}


def bytes_of(optimizer: FusePV) -> int:
    """Bytes of all tensors in the state that lie here."""
    total = 0
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.numel() > 1 and name != "scalars":
                mine = value.to_local() if hasattr(value, "to_local") else value
                total += mine.nbytes
    return total


def held(rank: int) -> dict[str, tuple[int, int, int, int]]:
    """Bytes of state with and without, as reported, and as estimated."""
    found = {}
    size = dist.get_world_size()
    torch.manual_seed(rank)
    x = torch.randn(32, 64)
    for name, options in HELD.items():
        kept = {}
        for shards in (False, True):
            model = network()
            wrapped = nn.parallel.DistributedDataParallel(model)
            optimizer = FusePV(
                model.parameters(),
                **options,
                process_group=dist.group.WORLD,
                shard_state=shards,
            )

            def closure(model: Any = wrapped, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = (model(x) - x.roll(1, 1)).square().mean()
                loss.backward()
                return loss.detach()

            for _ in range(25):
                optimizer.step(closure)
            kept[shards] = bytes_of(optimizer)
        told = {k: v for k, v in options.items() if k != "switch"}
        said = estimate_memory(network(), shard_over=size, **told)
        phase = said.phases[0 if name == "adam" else 1]
        found[name] = kept[False], kept[True], optimizer.report().state_bytes, phase.state_bytes
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", HELD)
def test_each_rank_holds_its_share(ranks: Any, size: int, name: str) -> None:
    for found in ranks(size):
        alone, shared, reported, estimated = found["held"][name]
        if name == "living":  # bases of a shard's shorter side alone, which is shorter besides
            assert shared <= alone / size
        elif name == "int8":  # scales are of 128 elements of what lies on a rank
            assert shared == pytest.approx(alone / size, rel=0.02)
        else:
            assert shared == alone // size
        assert abs(reported - estimated) <= 0.02 * estimated


# --- parameters of all kinds ----------------------------------------------------------------


def odd_ones() -> list[nn.Parameter]:
    torch.manual_seed(2)
    found = [torch.randn(()), torch.randn(1), torch.randn(1, 5), torch.randn(7, 3), torch.randn(2)]
    found.append(torch.randn(4, 5).t())
    found.append(torch.randn(3, 2, 4, 4).to(memory_format=torch.channels_last))
    found.append(torch.randn(0, 3))
    return [nn.Parameter(each.double()) for each in found]


ODD: dict[str, Callable[..., Any]] = {
    "adam": lambda params, **more: Adam(params, lr=0.1, **more),
    "amsgrad": lambda params, **more: Adam(params, lr=0.1, amsgrad=True, weight_decay=0.1, **more),
    "lbfgs": lambda params, **more: LBFGS(
        params, line_search_fn="strong_wolfe", max_iter=3, history_size=5, **more
    ),
    "diagonal": lambda params, **more: FusePV(
        params, lr=1e-2, switch=3, deterministic=False, metric="diagonal", **more
    ),
    "kronecker": lambda params, **more: FusePV(
        params, lr=1e-2, switch=3, deterministic=False, **more
    ),
    "fuse": lambda params, **more: Fuse(params, line_search="armijo", **more),
}


def on_odd_ones(name: str, **more: Any) -> Tensor:
    params = odd_ones()
    optimizer = ODD[name](params, **more)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([(p.square() - 1.0).square().sum() * (k + 1) for k, p in pairs]).sum()
        loss = loss + params[0] * params[3].sum()
        loss.backward()
        return loss.detach()

    pairs = list(enumerate(params))
    for _ in range(30):
        optimizer.step(closure)
    return torch.cat([p.detach().reshape(-1) for p in params])


def odd_params(rank: int) -> dict[str, Tensor]:
    return {
        name: on_odd_ones(name, process_group=dist.group.WORLD, shard_state=True) for name in ODD
    }


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_and_strides(ranks: Any, name: str) -> None:
    first, second = (found["odd_params"][name] for found in ranks(2))
    assert torch.equal(first, second)
    if name == "kronecker":  # of a shard's shorter side
        assert first.isfinite().all()
    else:
        torch.testing.assert_close(first, on_odd_ones(name), rtol=0, atol=1e-8)


def some_of_them(rank: int) -> dict[str, tuple[Tensor, int]]:
    """Two groups of two ranks each, said as a group and as a mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pairs", "ranks"))["ranks"]
    found = {}
    for name, said in (("group", pairs[rank // 2]), ("mesh", mesh)):
        more: dict[str, Any] = {"process_group": said, "shard_state": True}
        moment = Adam(odd_ones(), **more).flat.stand_ins[3]
        found[name] = on_odd_ones("lbfgs", **more), moment.to_local().shape[0]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("name", ["group", "mesh"])
def test_a_part_of_all_ranks(ranks: Any, name: str) -> None:
    alone = on_odd_ones("lbfgs")
    for found, rows in zip(ranks(4), (4, 3, 4, 3), strict=True):
        params, held = found["some_of_them"][name]
        assert held == rows
        torch.testing.assert_close(params, alone, rtol=0, atol=1e-8)


def narrow(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """bfloat16 parameters with master weights, sharded and not."""
    found = {}
    for name, options in (("adam", {}), ("diagonal", {"switch": 3, "metric": "diagonal"})):
        both = []
        for shards in (False, True):
            model = network().to(torch.bfloat16)
            kind: Any = Adam if name == "adam" else FusePV
            optimizer = kind(
                model.parameters(),
                lr=1e-4,
                master_weights=True,
                process_group=dist.group.WORLD,
                shard_state=shards,
                **options,
            )
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
            for _ in range(12):
                optimizer.zero_grad()
                (model(x) - x.roll(1, 1)).square().mean().backward()
                optimizer.step()
            params = [p.detach().float().reshape(-1) for p in model.parameters()]
            masters = [optimizer.state[p]["master_weight"] for p in model.parameters()]
            masters = [m.full_tensor() if hasattr(m, "full_tensor") else m for m in masters]
            both.append(torch.cat([*params, *(m.reshape(-1) for m in masters)]))
        found[name] = both[0], both[1]
    return found


def test_master_weights(ranks: Any) -> None:
    for found in ranks(2):
        for alone, sharded in found["narrow"].values():
            assert torch.equal(alone, sharded)


# --- torch.optim's contract -----------------------------------------------------------------


def edits(rank: int) -> dict[str, Tensor]:
    """Parameters that others write to, or give other memory, and gradients that stay."""
    found = {}
    for mode in ("adam", "lbfgs search", "living diagonal", "pairs"):
        for layout in ("zero", "ddp"):
            kind, options, _ = MODES[mode]
            model, group = spread(layout, make())
            more = {"shard_state": True} if layout == "zero" else {}
            optimizer = kind(model.parameters(), **options, process_group=group, **more)
            closure = closure_on(model, optimizer)
            for step in range(16):
                if step % 4 == 2:
                    for param in model.parameters():
                        param.data = param.data * 1.01
                if step % 4 == 3:
                    with torch.no_grad():
                        for param in model.parameters():
                            param.mul_(0.99)
                optimizer.step(closure)
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            found[f"{mode} {layout}"] = whole(model)
    return found


def test_parameters_may_be_edited(ranks: Any) -> None:
    first, second = (found["edits"] for found in ranks(2))
    for name, params in first.items():
        assert torch.equal(params, second[name]), name
        other = first[name.replace("zero", "ddp")]
        torch.testing.assert_close(params, other, rtol=0, atol=1e-7)


def grown(rank: int) -> dict[str, Tensor]:
    """A group that lies on one rank alone is added in mid-run."""
    found = {}
    for mode in ("adam", "lbfgs search", "living", "pairs"):
        kind, options, _ = MODES[mode]
        model, group = spread("zero", make())
        extra = nn.Parameter(torch.full((1, 3), 0.5, dtype=torch.float64))
        optimizer = kind(model.parameters(), **options, process_group=group, shard_state=True)
        closure = closure_on(model, optimizer)

        def both(closure: Any = closure, extra: Any = extra, optimizer: Any = optimizer) -> Tensor:
            loss: Tensor = closure()
            with torch.enable_grad():
                more = (extra - 1.0).square().sum()
            if len(optimizer.param_groups) > 1:
                extra.grad = torch.autograd.grad(more, extra)[0]
            return loss + more.detach()

        for step in range(20):
            if step == 10:
                optimizer.add_param_group({"params": [extra]})
            optimizer.step(both)
        found[mode] = torch.cat([whole(model), extra.detach().view(-1)])
    return found


def test_a_group_may_be_added(ranks: Any) -> None:
    first, second = (found["grown"] for found in ranks(2))
    for mode, params in first.items():
        assert torch.equal(params, second[mode]), mode
        assert (params[-3:] != 0.5).all()


def copied(rank: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """An optimizer, its copy and what was pickled of it, each with parameters of its own."""
    found = {}
    for mode in ("adam", "lbfgs search", "living", "pairs"):
        done = fit("zero", mode, rank, steps=28)["optimizer"]
        ends = []
        for each in (copy.deepcopy(done), pickle.loads(pickle.dumps(done)), done):
            params = [param for group in each.param_groups for param in group["params"]]

            def closure(each: Any = each, params: Any = params) -> Tensor:
                each.zero_grad()
                loss = torch.stack([param.square().sum() for param in params]).sum()
                loss.backward()
                return loss.detach()

            for _ in range(4):
                each.step(closure)
            ends.append(torch.cat([param.detach().view(-1) for param in params]))
        found[mode] = ends[0], ends[1], ends[2]
    return found


def test_copies_go_on_alike(ranks: Any) -> None:
    for found in ranks(2):
        for mode, (twin, unpickled, own) in found["copied"].items():
            assert torch.equal(twin, own) and torch.equal(unpickled, own), mode


def watchers(rank: int) -> dict[str, Any]:
    """Criteria and who is told of the switch look at parameters within a step."""
    model, group = spread("zero", make())
    seen: list[Tensor] = []

    def looks(observed: Any) -> bool:
        seen.append(torch.cat([p.detach().reshape(-1) for p in observed.params]))
        return observed.step == 4

    optimizer = FusePV(
        model.parameters(),
        lr=1e-2,
        switch=When(looks),
        on_switch=lambda _: seen.append(whole(model)),
        process_group=group,
        shard_state=True,
    )
    closure, after = closure_on(model, optimizer), []
    for _ in range(6):
        optimizer.step(closure)
        after.append(whole(model))
    return {"seen": seen, "after": after}


def test_criteria_see_all_rows(ranks: Any) -> None:
    for found in ranks(2):
        seen, after = found["watchers"]["seen"], found["watchers"]["after"]
        assert len(seen) == 5
        for within, then in zip(seen, (*after[:4], after[3]), strict=True):
            assert torch.equal(within, then)


# --- what is refused ------------------------------------------------------------------------


def refusals(rank: int) -> dict[str, str]:
    found = {}

    def note(name: str, attempt: Callable[[], Any]) -> None:
        try:
            attempt()
        except (ValueError, TypeError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    shared: dict[str, Any] = {"process_group": dist.group.WORLD, "shard_state": True}
    plain, (sharded, _) = make(), spread("fsdp", make())
    note("nobody", lambda: Adam(plain.parameters(), shard_state=True))
    note("local", lambda: LBFGS(plain.parameters(), process_group="local", shard_state=True))
    note("dtensors", lambda: FusePV(sharded.parameters(), shard_state=True))
    note("complex", lambda: Adam([nn.Parameter(torch.ones(2, dtype=torch.complex64))], **shared))
    note("bool", lambda: Fuse(plain.parameters(), **{**shared, "shard_state": 2}))
    note("graph", lambda: Adam(plain.parameters(), capturable=True, **shared))
    note("matrix", lambda: FusePV(plain.parameters(), curvature="dense", **shared))
    optimizer = Adam(plain.parameters(), **shared)
    note("dtype", lambda: optimizer.continue_in(torch.float64))
    note("group", lambda: optimizer.add_param_group({"params": [], "shard_state": False}))
    own = nn.Linear(2 + rank, 1, dtype=torch.float64)
    search = LBFGS(own.parameters(), process_group=dist.group.WORLD, line_search_fn="armijo")

    def closure() -> Tensor:
        search.zero_grad()
        loss: Tensor = own(torch.ones(1, 2 + rank, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss.detach()

    note("others", lambda: search.step(closure))
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    note("sparse", Adam(sparse.parameters(), **shared).step)
    half = make()
    trained = Adam(half.parameters(), **shared)
    for step in range(2):
        for param in half.parameters():
            param.grad = torch.ones_like(param)
        note(f"step {step}", trained.step)
        half.float()
    return found


def test_what_cannot_be_done_is_said(ranks: Any) -> None:
    first, second = (found["refusals"] for found in ranks(2))
    assert first.keys() == second.keys()
    for name, wanted in (
        ("nobody", "ValueError: shard_state=True needs process_group"),
        ("local", "process_group='local'"),
        ("dtensors", "params[0] is a DTensor"),
        ("complex", "params[0] has torch.complex64"),
        ("bool", "TypeError: shard_state must be True or False, got 2"),
        ("graph", "capturable=True does not go with shard_state=True"),
        ("matrix", "curvature='dense' goes with neither DTensors nor shard_state=True"),
        ("dtype", "shard_state=True"),
        ("group", "shard_state must be the same in all parameter groups"),
        ("others", "RuntimeError: the ranks of process_group step on different parameters"),
        ("sparse", "TypeError: grads[0] has layout torch.sparse_coo"),
        ("step 1", "ValueError: params[0] is now torch.float32"),
    ):
        assert wanted in first[name], name
    assert "step 0" not in first


def torchs_own(rank: int) -> tuple[Tensor, Tensor, str]:
    """torch's ZeroRedundancyOptimizer, around Adam and around a line search."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    found = []
    for shares in (True, False):
        model, group = spread("ddp", make())
        optimizer: Any
        if shares:
            optimizer = ZeroRedundancyOptimizer(model.parameters(), Adam, lr=1e-2)
        else:
            optimizer = Adam(model.parameters(), lr=1e-2, process_group=group)
        closure = closure_on(model, optimizer)
        for _ in range(10):
            optimizer.step(closure)
        found.append(whole(model))
    with pytest.raises(RuntimeError, match="there are other ranks") as refused:
        ZeroRedundancyOptimizer(make().parameters(), LBFGS, line_search_fn="armijo")
    return found[0], found[1], str(refused.value)


def test_torchs_own_sharding(ranks: Any) -> None:
    for found in ranks(2):
        shared, alone, _ = found["torchs_own"]
        assert torch.equal(shared, alone)
