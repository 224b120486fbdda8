"""What every model is: three pure functions, and the pieces that its blocks share.

Letters: B batch, T tokens, D features, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.config import ModelConfig
from titanfunc.memory.slots import Documents
from titanfunc.nn import (
    Balance,
    Product,
    cms,
    feed_forward,
    init_cms,
    init_feed_forward,
    init_linear,
    init_moe,
    linear,
    moe,
    rms_norm,
)
from titanfunc.ops.fp8 import linear_fp8
from titanfunc.ops.rematerialize import rematerialize
from titanfunc.ops.shared_code import share_code

Params = dict[str, Any]
Memory = tuple[Any, ...]


class Model(NamedTuple):
    """A model as pure functions.

    init(generator) -> params: a nested dict of float32 tensors on the generator's device.
    init_memory(params, batch_size) -> memory: one state a block, leaves [B, ...], of a size that does not grow; () for
    a transformer without a window, which reads each call's tokens as a whole (with context=N it carries a cache of
    N tokens instead).
    apply(params, memory, tokens) -> (logits [B, T, V], memory) for int64 tokens [B, T], T of any length. Keywords:
    aligned=True is the caller's word that ``memory`` is fresh (or stands at the start of a segment and of a chunk),
    which saves some work; with_metrics=True adds a third result, a dict of 0-d tensors; write=False leaves the
    memories as they are (nothing is written or forgotten); documents: a Documents, where the rows hold several;
    seed: 0-d int64, which turns a mixture's router noise on.
    config: what it was built from.
    """

    init: Callable[[torch.Generator], Params]
    init_memory: Callable[..., Memory]
    apply: Callable[..., Any]
    config: ModelConfig


def compute_dtype(config: ModelConfig, params: Params) -> torch.dtype:
    """bfloat16 under precision bf16 and fp8, else the dtype of the parameters (any shapes)."""
    return params["embedding"].dtype if config.precision == "fp32" else torch.bfloat16


def projection(config: ModelConfig) -> Product:
    """How attention's projections and the feed-forward multiply [..., D_in] by [D_in, D_out]."""
    if config.precision != "fp8":
        return linear
    return functools.partial(linear_fp8, scaling=config.fp8_scaling, kernels=config.kernels)


class Layers(NamedTuple):
    """A block, a function of (x [B, T, D], rest), as a model's settings run it: as it is, again in the backward pass,
    or by code that all blocks alike share."""

    as_it_is: Callable[..., Any]
    again: Callable[..., Any]
    shared: Callable[..., Any]

    @classmethod
    def of(cls, config: ModelConfig, block: Callable[..., Any]) -> Layers:
        """The three ways to run ``block``."""
        again, recompute = rematerialize(block), config.remat == "layer"
        return cls(block, again, share_code(block, recompute, again if recompute else block))

    def chosen(self, config: ModelConfig) -> Callable[..., Any]:
        """How this call runs its blocks.

        One without a backward pass has nothing to compute again and little to compile, and launching shared code costs
        what a token at a time would feel.
        """
        if not torch.is_grad_enabled():
            return self.as_it_is
        if config.layer_code == "shared":
            return self.shared
        return self.again if config.remat == "layer" else self.as_it_is


def residual_gain(config: ModelConfig) -> float:
    """The scale of what each of the 2 x layers branches adds to the stream at the start, 1 / sqrt(2 layers)."""
    return 1 / math.sqrt(2 * config.layers)


class Call(NamedTuple):
    """How ``apply`` was called; the fields are its keywords."""

    aligned: bool = False
    write: bool = True
    documents: Documents | None = None
    seed: Tensor | None = None


def init_outer(generator: torch.Generator, config: ModelConfig, block: Callable[[int], Params]) -> Params:
    """Embedding [V, D], blocks (every leaf of ``block(layer)`` stacked), final norm [D], untied head [D, V].

    Stacked leaves [layers, ...] keep an optimizer's work, and the graph to compile, independent of the depth. A part
    that only some blocks have is stacked over those.
    """
    blocks = [block(layer) for layer in range(config.layers)]
    names = {name: None for block in blocks for name in block}
    params: Params = {
        "embedding": rng.normal(generator, (config.vocab_size, config.dim), 0.02),
        "blocks": {
            name: tree.map(lambda *leaves: torch.stack(leaves), *[block[name] for block in blocks if name in block])
            for name in names
        },
        "norm": torch.ones(config.dim, device=generator.device),
    }
    if not config.tie_embeddings:
        params["head"] = init_linear(generator, config.dim, config.vocab_size, 0.5)
    return params


MEMORY_PARTS = ("memory", "norm_memory", "norm_read")


def blocks_of(params: Params, config: ModelConfig) -> list[Params]:
    """The parameters of each block, from leaves [layers, ...] to a list of dicts of leaves [...]; the parts of a memory
    only where there is one."""
    leaves = tree.map(lambda leaf: leaf.unbind(0), params["blocks"])
    places = {layer: place for place, layer in enumerate(config.memory_at)}
    blocks = []
    for layer in range(config.layers):
        shared = {name: part for name, part in leaves.items() if name not in MEMORY_PARTS}
        block = _pick(shared, layer)
        if layer in places:
            block.update(_pick({name: part for name, part in leaves.items() if name in MEMORY_PARTS}, places[layer]))
        blocks.append(block)
    return blocks


def _pick(blocks: Params, i: int) -> Params:
    return {name: _pick(part, i) if isinstance(part, dict) else part[i] for name, part in blocks.items()}


def init_attention(generator: torch.Generator, config: ModelConfig) -> Params:
    """A norm [D] and four matrices [D, D]."""
    dim = config.dim
    return {
        "norm_attention": torch.ones(dim, device=generator.device),
        "attention": {
            **{name: init_linear(generator, dim, dim) for name in ("wq", "wk", "wv")},
            "wo": init_linear(generator, dim, dim, residual_gain(config)),
        },
    }


def init_feed(generator: torch.Generator, config: ModelConfig) -> Params:
    """A norm [D] and the feed-forward that ``config.feed_forward`` names."""
    dim, gain = config.dim, residual_gain(config)
    if config.feed_forward == "moe":
        inner = init_moe(generator, dim, config.ff, config.moe.experts, gain * math.sqrt(config.moe.top_k))
    elif config.feed_forward == "cms":
        inner = init_cms(generator, dim, config.ff, len(config.cms.periods), gain)
    else:
        inner = init_feed_forward(generator, dim, config.ff, gain)
    return {"norm_feed_forward": torch.ones(dim, device=generator.device), "feed_forward": inner}


def number(config: ModelConfig, layer: int, device: torch.device) -> int | Tensor:
    """The layer's number where its block depends on it (a mixture's noise), else 0: such blocks are all alike. A 0-d
    tensor where they share code, which a constant would tell apart."""
    if config.feed_forward != "moe":
        return 0
    return torch.full((), layer, dtype=torch.int64, device=device) if config.layer_code == "shared" else layer


def feed(
    block: Params, config: ModelConfig, x: Tensor, layer: int | Tensor, seed: Tensor | None
) -> tuple[Tensor, Balance | None]:
    """The block's feed-forward of x [B, T, D] with its residual, and how evenly a mixture was used."""
    params, normed, product = block["feed_forward"], rms_norm(block["norm_feed_forward"], x), projection(config)
    if config.feed_forward == "moe":
        options = config.moe
        draws = None if seed is None else seed * config.layers + layer
        y, balance = moe(params, normed, options.top_k, x.dtype, options.noise, draws, options.kernel)
        return x + y, balance
    if config.feed_forward == "cms":
        return x + cms(params, normed, x.dtype, product), None
    return x + feed_forward(params, normed, x.dtype, product), None


def mixture_metrics(config: ModelConfig, balances: list[Balance | None]) -> dict[str, Tensor]:
    """The load-balancing loss to add in training, and how even the mixture is, all 0-d; {} without a mixture."""
    given = [balance for balance in balances if balance is not None]
    if not given:
        return {}
    loss = torch.stack([balance.loss for balance in given]).mean()
    return {
        "auxiliary_loss": config.moe.balance * loss,
        "moe/balance": loss,
        "moe/largest_load": torch.stack([balance.load.max() for balance in given]).max(),
        "moe/entropy": torch.stack([balance.entropy for balance in given]).mean(),
    }


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, heads, T, D / heads]."""
    return rearrange(x, "b t (h d) -> b h t d", h=heads)


def embed(params: Params, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens [B, T] -> features [B, T, D]."""
    return torch.nn.functional.embedding(tokens, params["embedding"]).to(dtype)


def unembed(params: Params, x: Tensor, dtype: torch.dtype, documents: Documents | None = None) -> Tensor:
    """Features [B, T, D] -> logits [B, T, V], through the head or the tied embedding; NaN in rows that hold more
    documents than was said, as there is no room for them."""
    x = rms_norm(params["norm"], x)
    logits = linear(params["head"] if "head" in params else params["embedding"].mT, x, dtype)
    if documents is None:
        return logits
    parts = documents.starts.sum(1) + (~documents.starts[:, 0]).to(torch.int64)
    return torch.where((parts > documents.most)[:, None, None], float("nan"), logits)


def check_tokens(config: ModelConfig, tokens: Tensor) -> None:
    """Raises ValueError unless ``tokens`` is int64 [B, T] with at least one token."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or tokens.shape[1] == 0:
        got = f"{tokens.dtype} {tuple(tokens.shape)}"
        raise ValueError(f"tokens: wanted int64 [batch, tokens] with at least one token, got {got}")


def check_memory(config: ModelConfig, memory: Memory, tokens: Tensor) -> None:
    """Raises ValueError unless ``memory`` holds a state for every layer, for as many samples as ``tokens`` [B, T]."""
    if len(memory) != config.layers:
        raise ValueError(f"memory: wanted a state for each of {config.layers} layers, got {len(memory)}")
    samples = {leaf.shape[0] for leaf in tree.leaves(memory)}
    if samples != {tokens.shape[0]}:
        raise ValueError(f"memory: wanted states of {tokens.shape[0]} samples, got {', '.join(map(str, samples))}")


def check_documents(documents: Documents | None, tokens: Tensor) -> None:
    """Raises ValueError unless ``documents`` is None or marks starts for ``tokens`` [B, T]."""
    if documents is None:
        return
    if documents.starts.shape != tokens.shape or documents.starts.dtype != torch.bool:
        got = f"{documents.starts.dtype} {tuple(documents.starts.shape)}"
        raise ValueError(f"documents.starts: wanted bool {tuple(tokens.shape)}, got {got}")
    if documents.most < 1:
        raise ValueError(f"documents.most: wanted at least 1, got {documents.most}")
