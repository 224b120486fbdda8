"""What every model is: three pure functions, and the pieces that its blocks share.

Letters: B batch, T tokens, D features, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.config import ModelConfig
from titanfunc.nn import init_feed_forward, init_linear, linear, rms_norm

Params = dict[str, Any]
Memory = tuple[Any, ...]


class Model(NamedTuple):
    """A model as pure functions.

    init(generator) -> params: a nested dict of float32 tensors on the generator's device.
    init_memory(params, batch_size) -> memory: one state a memory layer, leaves [B, ...]; () without memory.
    apply(params, memory, tokens) -> (logits [B, T, V], memory) for int64 tokens [B, T], T of any length. Keyword
    aligned=True is the caller's word that ``memory`` is fresh (or stands at a segment's start), which saves a
    segment of work; with_metrics=True adds a third result, a dict of 0-d tensors.
    config: what it was built from.
    """

    init: Callable[[torch.Generator], Params]
    init_memory: Callable[[Params, int], Memory]
    apply: Callable[..., Any]
    config: ModelConfig


def compute_dtype(config: ModelConfig, params: Params) -> torch.dtype:
    """bfloat16 under precision bf16, else the dtype of the parameters (any shapes)."""
    return torch.bfloat16 if config.precision == "bf16" else params["embedding"].dtype


def residual_gain(config: ModelConfig) -> float:
    """The scale of what each of the 2 x layers branches adds to the stream at the start, 1 / sqrt(2 layers)."""
    return 1 / math.sqrt(2 * config.layers)


def init_outer(generator: torch.Generator, config: ModelConfig, block: Callable[[], Params]) -> Params:
    """Embedding [V, D], blocks (every leaf of ``block()`` stacked over layers), final norm [D], untied head [D, V].

    Stacked leaves [layers, ...] keep an optimizer's work, and the graph to compile, independent of the depth.
    """
    params: Params = {
        "embedding": rng.normal(generator, (config.vocab_size, config.dim), 0.02),
        "blocks": tree.map(lambda *leaves: torch.stack(leaves), *[block() for _ in range(config.layers)]),
        "norm": torch.ones(config.dim, device=generator.device),
    }
    if not config.tie_embeddings:
        params["head"] = init_linear(generator, config.dim, config.vocab_size, 0.5)
    return params


def blocks_of(params: Params, config: ModelConfig) -> list[Params]:
    """The parameters of each block, from leaves [layers, ...] to a list of dicts of leaves [...]."""
    leaves = tree.map(lambda leaf: leaf.unbind(0), params["blocks"])
    return [_pick(leaves, i) for i in range(config.layers)]


def _pick(blocks: Params, i: int) -> Params:
    return {name: _pick(part, i) if isinstance(part, dict) else part[i] for name, part in blocks.items()}


def init_block(generator: torch.Generator, config: ModelConfig) -> Params:
    """What all blocks have: attention matrices [D, D], the feed-forward and a norm [D] before each."""
    dim, gain = config.dim, residual_gain(config)
    return {
        "norm_attention": torch.ones(dim, device=generator.device),
        "attention": {
            **{name: init_linear(generator, dim, dim) for name in ("wq", "wk", "wv")},
            "wo": init_linear(generator, dim, dim, gain),
        },
        "norm_feed_forward": torch.ones(dim, device=generator.device),
        "feed_forward": init_feed_forward(generator, dim, config.ff, gain),
    }


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, heads, T, D / heads]."""
    return rearrange(x, "b t (h d) -> b h t d", h=heads)


def embed(params: Params, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens [B, T] -> features [B, T, D]."""
    return torch.nn.functional.embedding(tokens, params["embedding"]).to(dtype)


def unembed(params: Params, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Features [B, T, D] -> logits [B, T, V], through the head or the tied embedding."""
    x = rms_norm(params["norm"], x)
    return linear(params["head"] if "head" in params else params["embedding"].mT, x, dtype)


def check_tokens(config: ModelConfig, tokens: Tensor) -> None:
    """Raises ValueError unless ``tokens`` is int64 [B, T] with at least one token."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.shape[1] == 0:
        got = f"{tokens.dtype} {tuple(tokens.shape)}"
        raise ValueError(f"tokens: wanted int64 [batch, tokens] with at least one token, got {got}")


def check_memory(config: ModelConfig, memory: Memory, tokens: Tensor) -> None:
    """Raises ValueError unless ``memory`` holds a state for every layer, for as many samples as ``tokens`` [B, T]."""
    if len(memory) != config.layers:
        raise ValueError(f"memory: wanted a state for each of {config.layers} layers, got {len(memory)}")
    for state in memory:
        if state.position.shape[0] != tokens.shape[0]:
            raise ValueError(f"memory: wanted states of {tokens.shape[0]} samples, got {state.position.shape[0]}")
