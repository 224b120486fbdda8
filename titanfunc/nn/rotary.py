"""Rotary positions (arXiv 2104.09864)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """cos and sin of every position's angles, each [..., T, D / 2]."""

    cos: Tensor
    sin: Tensor


def rotary_table(positions: Tensor, head_dim: int, dtype: torch.dtype, base: float = 10_000.0) -> Rotary:
    """The angles of ``positions`` [..., T] (in tokens) for heads of ``head_dim`` features, an even number."""
    half = head_dim // 2
    wide = torch.promote_types(dtype, torch.float32)
    frequency = base ** (-torch.arange(half, device=positions.device, dtype=wide) / half)
    angle = positions.to(wide).unsqueeze(-1) * frequency
    return Rotary(torch.cos(angle).to(dtype), torch.sin(angle).to(dtype))


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """Rotates pairs of features (the first half with the second) of x [..., T, D] by the table's angles."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * table.cos - second * table.sin, first * table.sin + second * table.cos], -1)
