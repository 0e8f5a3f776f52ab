"""Stochastic rounding to bfloat16 in plain PyTorch: the same bits as csrc/stochastic.h."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
FACTORS = (0x7FEB352D, 0x846CA68B)
GOLDEN = 0x9E3779B9
# From this magnitude on a finite value could round up to infinity.
LARGEST = 0x7F7F0000


def mixed(x: Tensor, between: int = 0) -> Tensor:
    """A permutation of the 32-bit numbers, here in int64, that looks random (lowbias32)."""
    # Products wrap in int64; their low halves are right.
    x = ((x ^ (x >> 16)) * FACTORS[0] & WORD) ^ between
    x = (x ^ (x >> 15)) * FACTORS[1] & WORD
    return x ^ (x >> 16)


def _mixed_number(x: int) -> int:
    return int(mixed(torch.tensor(x & WORD, dtype=torch.int64, device="cpu")))


def random_bits(begin: int, numel: int, step: int, device: torch.device) -> Tensor:
    """32 random bits, in int64, for each of ``numel`` elements of the flat vector from ``begin``.

    They are a function of the element (modulo 2^32) and of the step alone.
    """
    first = _mixed_number((step & WORD) ^ _mixed_number(step >> 32))
    second = _mixed_number(first + GOLDEN)
    elements = torch.arange(begin, begin + numel, dtype=torch.int64, device=device) & WORD
    return mixed((elements + first) & WORD, second)


def store_stochastic(out: Tensor, values: Tensor, random: Tensor) -> None:
    """Rounds float32 values to bfloat16, up or down with the probability that keeps the mean.

    Args:
        out: bfloat16.
        values: float32.
        random: 16 random bits each, in int64.
    """
    bits = values.view(torch.int32).to(torch.int64) & WORD
    carry = torch.where((bits & 0x7FFFFFFF) < LARGEST, random, 0)
    high = (bits + carry) >> 16
    high = torch.where(high >= 0x8000, high - 0x10000, high)
    out.copy_(high.to(torch.int16).view(torch.bfloat16))
