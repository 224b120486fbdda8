"""The models whose blocks are a plain stack of sublayers: LMM, MAL, MAG (Titans, arXiv 2501.00663, section 4) and the
transformer.

Letters: B batch, T tokens, D features, H memory heads, d memory head size, W window. In each block, with m(u) the
memory's reads of u (each token writes, then reads), brought back to D features:

    lmm           x += m(norm x)
    mal           x += m(norm x);   x += attention(norm x)
    mag           u = norm x;       x += (norm(attention(u)) * sigmoid(norm(m(u)))) W_o
    transformer                     x += attention(norm x)

then x += feed_forward(norm x). Attention sees exactly the last W tokens and the persistent tokens, which are keys and
values only; a transformer without a window sees all that came before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from titanfunc import rng
from titanfunc.config import ModelConfig
from titanfunc.memory import layer
from titanfunc.memory.network import MemoryNet
from titanfunc.models.base import (
    Call,
    Layers,
    Memory,
    Model,
    Params,
    blocks_of,
    check_documents,
    check_memory,
    check_tokens,
    compute_dtype,
    embed,
    feed,
    init_attention,
    init_feed,
    init_outer,
    mixture_metrics,
    number,
    projection,
    residual_gain,
    split_heads,
    unembed,
)
from titanfunc.nn import (
    Balance,
    WindowCache,
    empty_cache,
    init_linear,
    linear,
    linear_each,
    rms_norm,
    rotary_table,
    rotate,
    window_attention,
)
from titanfunc.ops.attention import attention

READ_FLOOR = 1e-2
"""Under the norm of what a memory read, which is zero until something is written: a bare eps would make its first
gradient huge."""


class BlockState(NamedTuple):
    """What one block carries. memory: a LayerState, or () without memory. cache: a WindowCache, or ()."""

    memory: layer.LayerState | tuple[()]
    cache: WindowCache | tuple[()]


def build(config: ModelConfig, net: MemoryNet) -> Model:
    """The model that ``config`` describes (tokens [B, T] -> logits [B, T, V]), with memories of the network ``net``."""

    def init(generator: torch.Generator) -> Params:
        return init_outer(generator, config, lambda i: _init_block(generator, config, net, i in config.memory_at))

    def init_memory(params: Params, batch_size: int, context: int = 0) -> Memory:
        if context and (config.family != "transformer" or config.window):
            raise ValueError(f"context: wanted 0 (it is for a transformer without a window), got {context}")
        window = config.window or context
        if not config.memory_at and not window:
            return ()
        dtype, device = compute_dtype(config, params), params["embedding"].device

        def state(block: Params) -> BlockState:
            memory = (
                layer.init_layer_state(block["memory"], config.memory, batch_size, dtype) if "memory" in block else ()
            )
            sizes = (batch_size, config.heads, window, config.dim // config.heads)
            return BlockState(memory, empty_cache(*sizes, dtype, device) if window else ())

        return tuple(state(block) for block in blocks_of(params, config))

    def layer_of(x: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, BlockState, Tensor | None, Balance | None]:
        i, block, state, call = rest
        x, state, totals = _mix(block, config, net, x, state, call)
        x, balance = feed(block, config, x, i, call.seed)
        return x, state, totals, balance

    layers = Layers.of(config, layer_of)

    def apply(
        params: Params, memory: Memory, tokens: Tensor, *, with_metrics: bool = False, **keywords: Any
    ) -> tuple[Any, ...]:
        call = Call(**keywords)
        check_tokens(config, tokens)
        check_documents(call.documents, tokens)
        if memory or config.memory_at or config.window:
            check_memory(config, memory, tokens)
        dtype = compute_dtype(config, params)
        x = embed(params, tokens, dtype)
        layer_at = layers.chosen(config)
        states, sums, balances = [], [], []
        for i, block in enumerate(blocks_of(params, config)):
            state = memory[i] if memory else BlockState((), ())
            x, state, totals, balance = layer_at(x, (number(config, i, x.device), block, state, call))
            states.append(state)
            balances.append(balance)
            if totals is not None:
                sums.append(totals)
        logits = unembed(params, x, dtype, call.documents)
        memory = tuple(states) if memory else ()
        if not with_metrics:
            return logits, memory
        return logits, memory, {**layer.metrics_of(sums), **mixture_metrics(config, balances)}

    return Model(init, init_memory, apply, config)


def _init_block(generator: torch.Generator, config: ModelConfig, net: MemoryNet, has_memory: bool) -> Params:
    dim, device = config.dim, generator.device
    block: Params = {}
    if config.family != "lmm":
        block.update(init_attention(generator, config))
        if config.persistent:
            block["persistent"] = rng.normal(generator, (config.persistent, dim), 1.0)
    if has_memory:
        block["memory"] = layer.init_layer(generator, config.memory, dim, net)
        if config.family == "mag":
            block["memory"]["out"] = init_linear(generator, config.memory.inner_dim, dim, config.memory.head_dim**0.5)
            block["norm_memory"] = torch.ones(dim, device=device)
            block["norm_read"] = torch.ones(dim, device=device)
        else:
            gain = residual_gain(config) * config.memory.head_dim**0.5
            block["memory"]["out"] = init_linear(generator, config.memory.inner_dim, dim, gain)
            block["norm_memory"] = torch.ones(dim, device=device)
    block.update(init_feed(generator, config))
    return block


def _mix(
    block: Params, config: ModelConfig, net: MemoryNet, x: Tensor, state: BlockState, call: Call
) -> tuple[Tensor, BlockState, Tensor | None]:
    """What a block does before its feed-forward: x [B, T, D] -> (x, new state, sums of the memory's metrics)."""
    memory, cache, sums, product = state.memory, state.cache, None, projection(config)

    def remember(u: Tensor) -> Tensor:
        nonlocal memory, sums
        assert isinstance(memory, layer.LayerState)
        reads, memory, sums = layer.read_and_write(
            block["memory"], config.memory, net, u, memory,
            aligned=call.aligned, writes=call.write, documents=call.documents, kernels=config.kernels,
        )  # fmt: skip
        return linear(block["memory"]["out"], reads, u.dtype)

    has_memory = "memory" in block
    if config.family == "mag":
        u = rms_norm(block["norm_attention"], x)
        y, cache = _attend(block, config, u, cache, call)
        if has_memory:
            gate = torch.sigmoid(rms_norm(block["norm_read"], remember(u), READ_FLOOR))
            y = rms_norm(block["norm_memory"], y) * gate
        x = x + product(block["attention"]["wo"], y, x.dtype)
    else:
        if has_memory:
            x = x + remember(rms_norm(block["norm_memory"], x))
        if config.family != "lmm":
            y, cache = _attend(block, config, rms_norm(block["norm_attention"], x), cache, call)
            x = x + product(block["attention"]["wo"], y, x.dtype)
    return x, BlockState(memory, cache), sums


def _attend(
    block: Params, config: ModelConfig, u: Tensor, cache: WindowCache | tuple[()], call: Call
) -> tuple[Tensor, WindowCache | tuple[()]]:
    """Attention of u [B, T, D] over its window (or over all of u, without a cache), heads side by side [B, T, D]."""
    params, tokens = block["attention"], u.shape[1]
    projected = linear_each([params[name] for name in ("wq", "wk", "wv")], u, u.dtype, projection(config))
    q, k, v = (split_heads(each, config.heads) for each in projected)
    place = torch.arange(tokens, device=u.device)
    if isinstance(cache, WindowCache):
        age = cache.filled.unsqueeze(-1) + place if call.documents is None else call.documents.age(cache.filled)
        prefix = None
        if config.persistent:
            fixed = linear(torch.cat([params["wk"], params["wv"]], -1), block["persistent"], u.dtype)
            keys_values = rearrange(fixed, "p (two h d) -> two h p d", two=2, h=config.heads)
            prefix = keys_values[0], keys_values[1]
        y, cache = window_attention(q, k, v, cache, age, prefix, config.attention, config.kernels)
    else:
        table = rotary_table(place, config.dim // config.heads, u.dtype)
        mask = None
        if call.documents is not None:
            back = place.unsqueeze(-1) - place
            age = call.documents.age(torch.full_like(place[:1], tokens).expand(u.shape[0]))
            mask = ((back >= 0) & (back <= age.unsqueeze(-1))).unsqueeze(1)
        y = attention(rotate(q, table), rotate(k, table), v, mask, config.attention)
    return rearrange(y, "b h t d -> b t (h d)"), cache
