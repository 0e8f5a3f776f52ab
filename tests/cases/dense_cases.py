"""Inputs for the tests of dense_direction, and what of its results is defined."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuse_ext.kernels import scalars as ring
from fuse_ext.kernels.reference.dense import as_square, as_tiles
from fuse_ext.kernels.scalars import TERM_SIZE, TILE, matrix_place, matrix_size

F32, F64, CPU = torch.float32, torch.float64, torch.device("cpu")
SLOTS = 2


def header_index(name: str) -> int:
    return ring.index(name, SLOTS)


def new_arguments(
    numel: int, dtype: torch.dtype = F32, room: int = 4, **options: Any
) -> dict[str, Any]:
    """Arguments of dense_direction with no pair yet; whatever may not be read is NaN."""
    whole = -(-numel // TILE) * TILE
    vectors = torch.full((2 * room + 1, whole + TILE), float("nan"), dtype=F64)
    vectors[-1, :whole] = 0.0
    return {
        "grad": torch.randn(numel, dtype=F64).to(dtype),
        "grad_prev": torch.zeros(numel, dtype=dtype),
        "direction": torch.zeros(numel, dtype=dtype),
        "matrix": torch.full((matrix_size(numel),), float("nan"), dtype=F64),
        "vectors": vectors,
        "matrix_scalars": torch.zeros(matrix_place("header") + TERM_SIZE * room, dtype=F64),
        "scalars": ring.new_scalars(SLOTS, CPU),
        "lr_scale": None,
        "pair_step": None,
        "curvature_tol": 1e-8,
        "taking_part": numel,
        "broyden": True,
        "self_scaling": True,
    } | options


def dense_arguments(
    numel: int,
    dtype: torch.dtype = F32,
    *,
    held: int = 2,
    room: int = 4,
    known: bool = True,
    exact: bool = True,
    shares: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """In the middle of a run: ``held`` of ``room`` terms, and a step of 0.5 along -H grad_prev."""
    made = new_arguments(numel, dtype, room, pair_step=0.5)
    whole = -(-numel // TILE) * TILE
    root = torch.zeros(whole, 5, dtype=F64)
    root[:numel] = torch.randn(numel, 5, dtype=F64) / max(numel, 1) ** 0.5
    made["matrix"].copy_(as_tiles(torch.eye(whole, dtype=F64) + root @ root.T))
    made["vectors"][: 2 * held, :whole] = 0.0
    made["vectors"][: 2 * held, :numel] = (
        torch.randn(2 * held, numel, dtype=F64) / max(numel, 1) ** 0.5
    )
    numbers = made["matrix_scalars"]
    for name, value in (("scale", 0.7), ("terms", held), ("pairs", held + 3)):
        numbers[matrix_place(name)] = float(value)
    numbers[matrix_place("known")] = float(known)
    numbers[matrix_place("exact")] = float(exact)
    a = torch.tensor([0.5, -0.1, 0.3], dtype=F64)
    terms = numbers[matrix_place("header") :][: TERM_SIZE * held].view(-1, TERM_SIZE)
    terms.copy_(a * (0.5 + torch.rand(held, 1, dtype=F64)))
    previous = torch.randn(numel, dtype=F64)
    made["grad_prev"].copy_(previous)
    product = inverse_hessian(made) @ made["grad_prev"].double()
    made["vectors"][-1, :whole] = 0.0
    made["vectors"][-1, :numel] = product if known else float("nan")
    made["direction"].copy_(-product)
    p = made["direction"].double()
    made["scalars"][header_index("direction_dot_grad")] = float(p @ made["grad_prev"].double())
    made["grad"].copy_(made["grad_prev"].double() + 0.5 * p * (0.3 + torch.rand(numel, dtype=F64)))
    if shares:
        made["lr_scale"] = 0.5 + torch.rand(numel, dtype=dtype)
    return made | options


def inverse_hessian(arguments: dict[str, Any]) -> Tensor:
    """H [numel, numel]."""
    numel, numbers = arguments["grad"].numel(), arguments["matrix_scalars"]
    if not numbers[matrix_place("pairs")]:
        return torch.eye(numel, dtype=F64)
    square = as_square(arguments["matrix"], numel)[:numel, :numel].clone()
    for t in range(int(numbers[matrix_place("terms")])):
        pair = arguments["vectors"][2 * t : 2 * t + 2, :numel]
        ss, sw, ww = numbers[matrix_place("header") :][TERM_SIZE * t :][:TERM_SIZE].tolist()
        square += pair.T @ torch.tensor([[ss, sw], [sw, ww]], dtype=F64) @ pair
    return square * numbers[matrix_place("scale")]


def defined(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What an op must have left: all but the terms and vectors that are not held."""
    numel, numbers = arguments["grad"].numel(), arguments["matrix_scalars"]
    whole = -(-numel // TILE) * TILE
    held = int(numbers[matrix_place("terms")])
    vectors = arguments["vectors"]
    found = {
        name: arguments[name] for name in ("grad", "grad_prev", "direction", "scalars", "lr_scale")
    }
    found |= {
        "numbers": numbers[: matrix_place("header") + TERM_SIZE * held],
        "terms": vectors[: 2 * held, :whole],
        "known": vectors[-1, :whole],
        "beyond": vectors[:, whole:],
    }
    if numbers[matrix_place("pairs")]:  # else M is not read
        found["matrix"] = arguments["matrix"]
    return {name: value for name, value in found.items() if value is not None}


def quadratic(numel: int, largest: float) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with eigenvalues from 1 to ``largest``, and a starting point (float64)."""
    basis = torch.linalg.qr(torch.randn(numel, numel, dtype=F64)).Q
    values = torch.linspace(0, 1, numel, dtype=F64).mul(math.log(largest)).exp()
    return basis @ torch.diag(values) @ basis.T, torch.randn(numel, dtype=F64)
