"""The plain transformer: the blocks of the other models without memory, full or windowed causal attention.

It has no memory state: each call reads its tokens as a whole context. Letters: B batch, T tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from titanfunc.config import ModelConfig
from titanfunc.models.base import (
    Memory,
    Model,
    Params,
    blocks_of,
    check_tokens,
    compute_dtype,
    embed,
    init_block,
    init_outer,
    split_heads,
    unembed,
)
from titanfunc.nn import Rotary, feed_forward, linear, rms_norm, rotary_table, rotate
from titanfunc.ops.attention import attention


def build(config: ModelConfig) -> Model:
    """The transformer that ``config`` describes (tokens [B, T] -> logits [B, T, V])."""

    def init(generator: torch.Generator) -> Params:
        return init_outer(generator, config, lambda: init_block(generator, config))

    def init_memory(params: Params, batch_size: int) -> Memory:
        return ()

    def apply(
        params: Params, memory: Memory, tokens: Tensor, *, aligned: bool = False, with_metrics: bool = False
    ) -> tuple[Any, ...]:
        check_tokens(config, tokens)
        dtype = compute_dtype(config, params)
        x = embed(params, tokens, dtype)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        rotary = rotary_table(positions, config.dim // config.heads, dtype)
        mask = causal_window(tokens.shape[1], config.window, tokens.device)
        for block in blocks_of(params, config):
            x = x + _attend(block["attention"], rms_norm(block["norm_attention"], x), mask, rotary, config)
            x = x + feed_forward(block["feed_forward"], rms_norm(block["norm_feed_forward"], x), dtype)
        logits = unembed(params, x, dtype)
        return (logits, memory, {}) if with_metrics else (logits, memory)

    return Model(init, init_memory, apply, config)


def causal_window(tokens: int, window: int, device: torch.device) -> Tensor | None:
    """A bool mask [T, T] under which a token sees exactly the last ``window`` tokens; None (causal) where that is
    all.
    """
    if not window or window >= tokens:
        return None
    back = torch.arange(tokens, device=device).unsqueeze(-1) - torch.arange(tokens, device=device)
    return (back >= 0) & (back < window)


def _attend(params: Params, x: Tensor, mask: Tensor | None, rotary: Rotary, config: ModelConfig) -> Tensor:
    q, k, v = (split_heads(linear(params[name], x, x.dtype), config.heads) for name in ("wq", "wk", "wv"))
    y = attention(rotate(q, rotary), rotate(k, rotary), v, mask, config.attention)
    return linear(params["wo"], rearrange(y, "b h t d -> b t (h d)"), x.dtype)
