"""A small transformer over bytes (pre-LN, rotary positions, tied embedding)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class Block(nn.Module):
    """Attention and a two-layer network, each on a normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """(n, length, width) to the same."""
        n, length, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(n, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rotation), rotate(k, rotation)
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attended(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.down(gelu(self.up(self.before_mlp(x))))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns each pair of features by an angle that grows with the position (Su et al. 2021)."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Transformer(nn.Module):
    """Scores of the next byte. With 128 bytes and the sizes given here: 608,000 parameters.

    Args:
        vocabulary: Bytes.
        context: Longest input.
        width: Of each position's vector.
        layers: Blocks.
        heads: Of each block's attention; width / heads is even.
    """

    def __init__(
        self, vocabulary: int, context: int, width: int = 128, layers: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        # What is added to the sum of all layers is scaled by their number, as in GPT-2.
        for block in self.blocks:
            for added in (block.attended, block.down):
                nn.init.normal_(added.weight, std=0.02 / (2 * layers) ** 0.5)
        self.output.weight = self.embedding.weight
        half = width // heads // 2
        angles = torch.outer(torch.arange(context), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, length) bytes to (n, length, vocabulary) scores."""
        length = x.shape[1]
        rotation = (self.cos[:length], self.sin[:length])
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, rotation)
        return self.output(self.norm(x))
