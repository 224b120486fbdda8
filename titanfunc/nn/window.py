"""Exact sliding-window attention, block by block, with a cache of constant size.

Letters: B batch, H heads, T tokens, D head size, W window in tokens, P prefix.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc.nn.rotary import rotary_table, rotate
from titanfunc.ops.attention import attention
from titanfunc.ops.window_attention import window_attention as whole_window_attention


class WindowCache(NamedTuple):
    """keys (not rotated), values: the last W tokens, [B, H, W, D], the newest last. filled: int64 [B], how many of
    them there are."""

    keys: Tensor
    values: Tensor
    filled: Tensor


def empty_cache(
    batch_size: int, heads: int, window: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> WindowCache:
    """A cache [B, H, W, D] of no token."""
    zeros = torch.zeros(batch_size, heads, window, head_dim, dtype=dtype, device=device)
    return WindowCache(zeros, zeros, torch.zeros(batch_size, dtype=torch.int64, device=device))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: WindowCache,
    age: Tensor,
    prefix: tuple[Tensor, Tensor] | None = None,
    kernel: str = "sdpa",
    kernels: str = "reference",
) -> tuple[Tensor, WindowCache]:
    """q, k, v [B, H, T, D] of new tokens -> (y [B, H, T, D], cache): each token sees itself and what came before it,
    W tokens in all, with rotary positions.

    age: int64 [B, T], how many tokens of its own document come before each token (no more are seen). prefix: keys and
    values [H, P, D] that every token sees, without position. Positions count from a block's start, so
    that they stay exact over any number of tokens. kernel: of the reference (ops/attention.py). kernels: "triton" takes
    ops/window_attention.py in one piece, where positions count from the piece's start.
    """
    batch, _, tokens, size = q.shape
    window = cache.keys.shape[-2]
    block = min(window, tokens)
    blocks = -(-tokens // block)
    padding = blocks * block - tokens
    keys, values = torch.cat([cache.keys, k], -2), torch.cat([cache.values, v], -2)
    after = WindowCache(keys[:, :, tokens:], values[:, :, tokens:], (age[:, -1] + 1).clamp(max=window))
    if kernels != "reference":
        table = rotary_table(torch.arange(window + tokens, device=q.device), size, q.dtype)
        here = type(table)(*(x[window:] for x in table))
        asked = None if prefix is None else (q, *prefix)
        y = whole_window_attention(rotate(q, here), rotate(keys, table), values, age, asked, kernels=kernels)
        return y, after

    def spans(x: Tensor) -> Tensor:
        """[B, H, W + T, D] -> what each block looks at, [B, blocks, H, W + block, D]."""
        x = F.pad(x, (0, 0, 0, padding))
        return x.unfold(2, window + block, block).permute(0, 2, 1, 4, 3)

    def in_blocks(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, padding)).unflatten(2, (blocks, block)).transpose(1, 2)

    table = rotary_table(torch.arange(window + block, device=q.device), size, q.dtype)
    here = type(table)(*(x[window:] for x in table))
    plain = in_blocks(q)
    queries, seen_keys, seen_values = rotate(plain, here), rotate(spans(keys), table), spans(values)
    distance = torch.arange(window, window + block, device=q.device).unsqueeze(-1) - torch.arange(
        window + block, device=q.device
    )
    ages = F.pad(age, (0, padding)).unflatten(1, (blocks, block)).unsqueeze(-1)
    mask = (distance >= 0) & (distance < window) & (distance <= ages)  # [B, blocks, block, W + block]
    if prefix is not None:
        # A rotated query would see the prefix by its place in the block; so scores with it come from features of their
        # own, beside those with the window's keys: (rotated q, q) . (rotated k, 0) and (rotated q, q) . (0, prefix).
        shape = (batch, blocks, *prefix[0].shape)
        fixed = prefix[0].expand(shape)
        queries = torch.cat([queries, plain], -1) * 2**0.5  # attention divides by the root of the features
        seen_keys = torch.cat([F.pad(fixed, (size, 0)), F.pad(seen_keys, (0, size))], -2)
        seen_values = torch.cat([prefix[1].expand(shape), seen_values], -2)
        mask = torch.cat([mask.new_ones(*mask.shape[:-1], prefix[0].shape[-2]), mask], -1)
    queries, seen_keys, seen_values, mask = (x.flatten(0, 1) for x in (queries, seen_keys, seen_values, mask))
    y = attention(queries, seen_keys, seen_values, mask.unsqueeze(1), kernel)
    y = y.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]
    return y, after
