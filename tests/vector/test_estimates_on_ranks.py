"""``estimate_memory`` of every layout beside what is held there, rank by rank.

In one process that takes itself for one of four: what is held does not depend on what is sent.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_cases import imagined
from torch import Tensor, nn
from torch import distributed as dist

from fuse_ext import Adam, FusePV, estimate_memory
from fuse_ext.vector.shards import local

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this torch has no torch.distributed with gloo",
)
SIZE = 4
LAYOUTS = ("hsdp", "columns", "mixed", "two meshes")
# name -> (optimizer, its options, steps)
KINDS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "adam": (Adam, {}, 2),
    "narrow": (Adam, {"moment_dtype": torch.bfloat16}, 2),
    # Those gradients are not worth having bases for.
    "living": (FusePV, {"deterministic": False, "metric": "kronecker"}, 26),
    "living diagonal": (FusePV, {"deterministic": False, "metric": "diagonal"}, 6),
    "one function": (FusePV, {"deterministic": True}, 6),
    "int8": (FusePV, {"deterministic": True, "history_dtype": torch.int8}, 6),
}


def spread(layout: str) -> list[nn.Parameter]:
    """Matrices of uneven shards, a vector and a row, spread so."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    shapes = [(90, 61), (61,), (1, 90), (45, 30, 2)]
    wholes = [torch.randn(shape) / 8 for shape in shapes]
    mesh = init_device_mesh("cpu", (SIZE,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "second"))
    ways: dict[str, list[tuple[Any, Any]]] = {
        "hsdp": [(square, (Replicate(), Shard(0)))] * 4,
        "columns": [(mesh, (Shard(1),)), (None, None), (mesh, (Shard(1),)), (None, None)],
        "mixed": [(mesh, (Shard(0),))] * 2 + [(None, None)] * 2,
        "two meshes": [
            (square, (Shard(0), Shard(1))),
            (square, (Replicate(), Shard(0))),
            (square, (Shard(1), Replicate())),
            (None, None),
        ],
    }
    found = []
    for whole, (on, placements) in zip(wholes, ways[layout], strict=True):
        value = whole
        if on is not None:
            value = distribute_tensor(whole, on, placements, src_data_rank=None)
        found.append(nn.Parameter(value))
    return found


def bytes_held(kind: str, params: list[nn.Parameter]) -> int:
    which, options, steps = KINDS[kind]
    more = {"switch": 3} if which is FusePV else {}
    optimizer = which(params, lr=1e-3, **options, **more)

    def closure() -> Tensor:
        value = torch.zeros(())
        for param in params:
            param.grad = (2.0 * param.detach()).clone()
            value += local(param.detach()).square().sum()
        return value

    for _ in range(steps):
        optimizer.step(closure)
    if which is FusePV:
        report = optimizer.report()
        assert report.phase == "lbfgs"
        held: int = report.state_bytes
        return held
    entries = optimizer.state.values()
    tensors = [local(t) for e in entries for t in e.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_what_a_rank_holds(layout: str, kind: str) -> None:
    which, options, _ = KINDS[kind]
    for rank in range(SIZE):
        with imagined(rank, SIZE):
            params = spread(layout)
            said = estimate_memory(params, which.__name__, **options).phases[-1].state_bytes
            held = bytes_held(kind, params)
        assert abs(held - said) <= 0.02 * said, (rank, held, said)
