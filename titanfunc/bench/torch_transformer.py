"""A plain decoder as a torch module, of the sizes of one of our transformer presets: what one writes without this
library. RMSNorm, rotary positions, SwiGLU, causal scaled_dot_product_attention, a head tied as the preset's is. Under
bf16 the weights and, as autocast leaves it, the residual stream are float32.

Letters: B batch, T tokens, D features, H heads, d head size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titanfunc.config import ModelConfig


class Block(nn.Module):
    """x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.norm_attention, self.norm_feed_forward = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = nn.Linear(dim, 2 * config.ff, bias=False), nn.Linear(config.ff, dim, bias=False)
        for layer, gain in ((self.qkv, 1), (self.gate_up, 1), (self.out, 2), (self.down, 2)):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5 / math.sqrt(config.layers * gain))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, T, D], cos and sin [T, d / 2] -> [B, T, D]."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = rotated(qkv[0], cos, sin), rotated(qkv[1], cos, sin), qkv[2]
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(self.norm_feed_forward(x)).chunk(2, -1)
        fed: Tensor = x + self.down(F.silu(gate) * up)
        return fed


class Decoder(nn.Module):
    """Tokens int64 [B, T] -> logits [B, T, V]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [B, T] -> logits [B, T, V]."""
        half = self.config.dim // self.config.heads // 2
        rates = 10_000 ** (-torch.arange(half, device=tokens.device) / half)
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), rates)
        x, cos, sin = self.embedding(tokens), angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embedding.weight if self.head is None else self.head.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Next-token loss in nats, 0-d, of tokens int64 [B, T + 1]."""
        bf16 = self.config.precision == "bf16"
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
            logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, d], its two halves turned by the angles of cos and sin [T, d / 2]."""
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)
