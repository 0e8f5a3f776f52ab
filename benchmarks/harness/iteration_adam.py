"""Adam's step beside torch.optim.Adam's three ways."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fuse_ext
from benchmarks.harness import limits
from benchmarks.harness.iteration_limits import bare_adam
from benchmarks.harness.rounds import Spread, clocked, interleaved, repeated, show_time
from benchmarks.harness.tables import count, number, table
from benchmarks.harness.workloads import split

# Reads p, g, m, v and writes p, m, v, in float32; with m and v in bfloat16.
BYTES_A_PARAMETER = 28
NARROW = "bf16 moments"
NARROW_BYTES = 20
# From here on the vectors are far larger than any cache, and the limit is the memory's.
OUT_OF_CACHE = 10**7

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fuse_ext": fuse_ext.Adam,
    NARROW: partial(fuse_ext.Adam, moment_dtype=torch.bfloat16),
    "torch fused": partial(torch.optim.Adam, fused=True),
    "torch foreach": partial(torch.optim.Adam, foreach=True),
    "torch for-loop": partial(torch.optim.Adam, foreach=False),
}
SIZES = {  # (parameters, tensors, dtype): the last three are targets
    True: [
        (10**5, 8, torch.float32),
        (10**6, 8, torch.float32),
        (10**6, 8, torch.float64),
        (10**6, 8, torch.bfloat16),
        (10**4, 8, torch.float32),
        (10**6, 300, torch.float32),
        (2 * 10**7, 1, torch.float32),
    ],
    False: [
        (10**3, 4, torch.float32),
        (10**5, 8, torch.float32),
        (10**6, 1, torch.float32),
        (10**6, 8, torch.float32),
        (10**6, 1000, torch.float32),
        (10**7, 8, torch.float32),
        (10**7, 300, torch.float32),
        (10**6, 8, torch.float64),
        (10**7, 8, torch.float64),
        (10**6, 8, torch.bfloat16),
        (10**7, 8, torch.bfloat16),
        (10**4, 8, torch.float32),
        (10**6, 300, torch.float32),
        (2 * 10**7, 1, torch.float32),
    ],
}


@dataclass(frozen=True)
class AdamRow:
    """One size.

    Attributes:
        numel: Parameters.
        tensors: In so many tensors.
        dtype: Of the parameters.
        seconds: A step, for each optimizer.
        limit: The best way to update four such vectors, and its bytes a second; None where the
            vectors may lie in a cache.
        bare: A step as the op alone, without an optimizer.
    """

    numel: int
    tensors: int
    dtype: str
    seconds: dict[str, Spread]
    limit: tuple[str, Spread] | None
    bare: Spread

    def speedup(self, peer: str = "torch fused") -> Spread:
        """How many times as fast as the peer we are, round by round."""
        return self.seconds[peer].over(self.seconds["fuse_ext"])

    def fraction(self, optimizer: str = "fuse_ext") -> Spread | None:
        """Share of the limit that an optimizer reaches, round by round."""
        if self.limit is None:
            return None
        moved = (NARROW_BYTES if optimizer == NARROW else BYTES_A_PARAMETER) * self.numel
        return self.seconds[optimizer].per(moved).over(self.limit[1])


def measure(args: argparse.Namespace) -> list[AdamRow]:
    """All sizes of the mode."""
    sizes = [size for size in SIZES[args.quick] if size[0] <= args.largest]
    return [_measure_one(args.rounds, *size) for size in sizes]


def _measure_one(rounds: int, numel: int, tensors: int, dtype: torch.dtype) -> AdamRow:
    torch.manual_seed(0)
    sizes = split(numel, tensors)
    start = [torch.randn(size).to(dtype) for size in sizes]
    # Gradients come in other tensors at every step, as after zero_grad(set_to_none=True).
    grads = [[torch.randn(size).to(dtype) for size in sizes] for _ in range(2)]
    cases: dict[str, Callable[[], float]] = {}
    ours: list[Tensor] = []
    for name, make in OPTIMIZERS.items():
        if name == NARROW and dtype == torch.float64:
            continue
        params = [nn.Parameter(part.clone()) for part in start]
        optimizer = make(params)
        hand_out = _giving(params, grads)
        hand_out()
        optimizer.step()
        cases[name] = repeated(clocked(optimizer.step, hand_out))
        if name == "fuse_ext":
            state = optimizer.state[params[0]]
            ours = [params[0].detach(), grads[0][0], state["exp_avg"], state["exp_avg_sq"]]
    label = f"Adam, {count(numel)} in {tensors}"
    ways: limits.Ways = {}
    if numel >= OUT_OF_CACHE and tensors == 1 and dtype == torch.float32:
        ways = limits.updating(ours, "the optimizer's vectors")
        pages = [limits.in_large_pages(numel) for _ in range(4)]
        ways.update(limits.updating(pages, "large pages"))
    params = [nn.Parameter(part.clone()) for part in start]
    hand_out = _giving(params, grads)
    bare = {"the op alone": repeated(clocked(bare_adam(params), hand_out))}
    seconds = interleaved({**cases, **ways, **bare}, rounds, label)
    limit = limits.best({way: seconds.pop(way) for way in ways}) if ways else None
    alone = seconds.pop("the op alone")
    return AdamRow(numel, tensors, str(dtype).removeprefix("torch."), seconds, limit, alone)


def _giving(params: list[nn.Parameter], grads: list[list[Tensor]]) -> Callable[[], None]:
    turn = 0

    def hand_out() -> None:
        nonlocal turn
        turn = 1 - turn
        for param, grad in zip(params, grads[turn], strict=True):
            param.grad = grad

    return hand_out


def as_table(rows: list[AdamRow]) -> str:
    """Markdown; the ratio says how many times as fast as torch's fused step we are.

    Rates and the share of the limit are those of float32 moments.
    """
    headers = ["Adam step", *OPTIMIZERS, "fused / ours", "ours, GB/s", "of the limit"]
    return table(headers, [_cells(row) for row in rows])


def _cells(row: AdamRow) -> list[str]:
    fraction = row.fraction()
    rate = ""
    if row.dtype == "float32":
        rate = number(row.seconds["fuse_ext"].per(BYTES_A_PARAMETER * row.numel / 1e9).median)
    return [
        f"{count(row.numel)} {row.dtype} in {row.tensors}",
        *(show_time(row.seconds[name]) if name in row.seconds else "" for name in OPTIMIZERS),
        row.speedup().show(),
        rate,
        "" if fraction is None else f"{100 * fraction.median:.0f}%",
    ]


def as_json(rows: list[AdamRow]) -> list[dict[str, Any]]:
    """For the results file."""
    return [
        {
            "parameters": row.numel,
            "tensors": row.tensors,
            "dtype": row.dtype,
            "seconds": row.seconds,
            "fused_over_ours": row.speedup(),
            "limit": row.limit and {"way": row.limit[0], "bytes_per_second": row.limit[1]},
            "fraction_of_limit": row.fraction(),
            "bare_op_seconds": row.bare,
        }
        for row in rows
    ]
