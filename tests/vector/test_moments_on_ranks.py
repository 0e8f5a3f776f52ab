"""bfloat16 moments beside shards: what several ranks hold is rounded alike on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import imagined, on_ranks
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import Adam, FusePV
from fuse_ext.vector.shards import lay_out

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)
BF16, SIZE, STEPS = torch.bfloat16, 2, 30
PV: dict[str, Any] = {"deterministic": False, "moment_dtype": BF16}
# A step of several groups, of master weights and of a graph calls the kernel in ways of its own.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adam": (FusePV, {**PV, "switch": 999}),
    "living": (FusePV, {**PV, "switch": 5}),
    "masters": (FusePV, {**PV, "switch": 5, "master_weights": True}),
    "on device": (Adam, {"moment_dtype": BF16, "capturable": True}),
}


def trained(kind: str, groups: int, rank: int) -> tuple[Tensor, float, str]:
    """Whole parameters behind shards of 19 and 18 rows, g.g, and the phase reached."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 37), nn.Tanh(), nn.Linear(37, 33))
    fully_shard(model[0])
    params = list(model.parameters())
    which, options = KINDS[kind]
    given: Any = [{"params": params[k::groups]} for k in range(groups)]
    optimizer = which(given, lr=1e-2, **options)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(torch.randn(8, 6, generator=generator)) - 1).square().mean().backward()
        for param in model[2].parameters():
            assert param.grad is not None
            dist.all_reduce(param.grad)
            param.grad /= SIZE
        optimizer.step()
    # What several ranks hold counts once in a sum over all.
    norm = optimizer.grad_norm_sq if isinstance(optimizer, Adam) else 0.0
    grads = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in params]
    square = float(sum(grad.square().sum() for grad in grads))
    moments = [optimizer.state[p][name] for p in model[2].parameters() for name in MOMENTS]
    held = [p.detach() for p in model[2].parameters()] + [m.float() for m in moments]
    ratio = norm / square if norm else 1.0
    return torch.cat([x.reshape(-1) for x in held]), ratio, getattr(optimizer, "phase", "adam")


MOMENTS = ("exp_avg", "exp_avg_sq")


def trainings(rank: int, folder: str) -> dict[tuple[str, int], Any]:
    return {(kind, groups): trained(kind, groups, rank) for kind in KINDS for groups in (1, 2)}


def test_replicas_stay_equal_to_the_last_bit_behind_uneven_shards(tmp_path: Path) -> None:
    first, second = on_ranks(SIZE, tmp_path, "test_moments_on_ranks:trainings")
    for kind, groups in first:
        (ours, ratio, phase), (theirs, *_) = first[kind, groups], second[kind, groups]
        assert torch.equal(ours, theirs), (kind, groups)
        assert ratio == pytest.approx(1.0, rel=1e-6), (kind, groups)
        assert phase == ("lbfgs" if kind in ("living", "masters") else "adam")


def laid_out(ways: list[Any]) -> tuple[Any, list[int]]:
    """Where parts of 5 x 5 matrices lie on this rank, and its place in a mesh of 2 x 2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2, 2))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    params: list[Any] = []
    for way in ways:
        shape = [5, 5]
        for at, place in zip(way, coordinate, strict=True):
            if not at.is_replicate():
                shape[at.dim] = 3 - place
        whole = {"shape": torch.Size((5, 5)), "stride": (5, 1)}
        params.append(DTensor.from_local(torch.ones(shape), mesh, way, run_check=False, **whole))
    return lay_out(params, [p.to_local().numel() for p in params], 4), [*coordinate]


def test_replicas_lie_alike_where_dimensions_of_a_mesh_divide_in_turns() -> None:
    """Of equally many shards, but held by other pairs of ranks: each has a stretch of its own."""
    from torch.distributed.tensor import Replicate, Shard

    ways = [(Shard(0), Replicate()), (Replicate(), Shard(1)), (Shard(0), Replicate())]
    found: dict[tuple[int, int], set[int]] = {}
    for rank in range(4):
        with imagined(rank, 4):
            layout, coordinate = laid_out(ways)
        assert [stretch.members for stretch in layout.stretches] == [[0, 2], [1]]
        for stretch in layout.stretches:
            assert stretch.share == 0.5
            for i in stretch.members:
                shard = coordinate[1 if i == 1 else 0]
                found.setdefault((i, shard), set()).add(layout.offsets[i] - stretch.place.start)
    assert all(len(places) == 1 for places in found.values()), found
