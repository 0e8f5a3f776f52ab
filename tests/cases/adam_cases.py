"""Twins of parameters for torch's own Adam, and what it means that nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("native", "reference")
SHAPES = ((7,), (3, 5), (), (0, 4), (1,), (2, 3, 2))
TOLERANCE = {
    torch.float32: {"rtol": 2e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
}
TOLERANCE[torch.complex64], TOLERANCE[torch.complex128] = TOLERANCE.values()


def make_params(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def twin(params: Sequence[Tensor]) -> list[Tensor]:
    return [copy.deepcopy(p) for p in params]


def give_grads(*families: Sequence[Tensor]) -> None:
    """The same new random gradient, of any magnitude, for each parameter and its twins."""
    for relatives in zip(*families, strict=True):
        grad = torch.randn_like(relatives[0]) * 10.0 ** torch.randint(-3, 3, ()).item()
        for p in relatives:
            p.grad = grad.detach().clone()


def torch_adam(
    params: Any, decoupled_weight_decay: bool = False, **options: Any
) -> torch.optim.Adam:
    """torch's plainest Adam, or AdamW."""
    kind = torch.optim.AdamW if decoupled_weight_decay else torch.optim.Adam
    return kind(params, **{"weight_decay": 0.0, "foreach": False, **options})


def steps(count: int, *optimizers: torch.optim.Optimizer) -> None:
    """Steps every optimizer with the same gradients, ``count`` times."""
    families = [
        [p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers
    ]
    for _ in range(count):
        give_grads(*families)
        for optimizer in optimizers:
            optimizer.step()


def assert_lockstep(
    ours: torch.optim.Optimizer,
    theirs: torch.optim.Optimizer,
    params: Sequence[Tensor],
    twins: Sequence[Tensor],
    **tolerance: Any,
) -> None:
    """Equal parameters, the same state entries in the same order, equal state."""
    for i, (p, q) in enumerate(zip(params, twins, strict=True)):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda m, i=i: f"params[{i}]: {m}")
        state, oracle = ours.state.get(p, {}), theirs.state.get(q, {})
        assert list(state) == list(oracle), (i, list(state), list(oracle))
        for name, expected in oracle.items():
            if name == "step":
                assert state[name].dtype == expected.dtype
                assert state[name] == expected
                continue
            assert state[name].shape == expected.shape
            torch.testing.assert_close(
                state[name], expected, **tolerance, msg=lambda m, n=name, i=i: f"{n}[{i}]: {m}"
            )


def frozen(value: Any) -> Any:
    """A value to compare with ``==``: tensors by their bits, dtype, shape and strides."""
    if isinstance(value, Tensor):
        value = value.to_dense()
        data = value.detach().resolve_conj().contiguous()
        bits = data.flatten().view(torch.uint8).numpy().tobytes() if data.numel() else b""
        return value.dtype, tuple(value.shape), value.stride(), bits
    if isinstance(value, dict):
        return {key: frozen(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(entry) for entry in value]
    return value


def snapshot(optimizer: torch.optim.Optimizer) -> Any:
    """Everything that a refused call must leave alone, bit for bit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return frozen(
        {
            "params": params,
            "versions": [p._version for p in params],
            "grads": [p.grad for p in params],
            "state": [dict(optimizer.state.get(p, {})) for p in params],
            "groups": [
                {**group, "params": list(map(id, group["params"]))}
                for group in optimizer.param_groups
            ],
        }
    )
