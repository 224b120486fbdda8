"""Memory as context (Titans, arXiv 2501.00663, section 4.1), strictly causal.

Letters: B batch, T tokens, D features, R segments, S slots a segment, H memory heads, d memory head size,
P persistent tokens. In each block, segment by segment (u the normalised input):

    h = read of the memory as it stood before the segment, queries from u (mac.context "residual": u + that read;
        "inclusive": u + a read after each token's own write, so that nothing of a segment waits to be found again)
    y = attention of u's queries over [persistent | h | u]; token t sees h and u up to t (h_t comes from
        token t, so h as a plain prefix would show the future), and all persistent tokens
    write norm(y) into the memory (mac.write "attention"), or u (mac.write "input": nothing of a segment
        waits for the one before, so all segments attend at once)
    x += (y * 2 sigmoid(read after token t, query from norm(y))) W_o,  then  x += feed_forward(norm x)

The gate is 1 while the memory is empty. Persistent tokens are keys and values only: a row that also queried would
carry the future back. A piece of text may begin anywhere in a segment: tokens lie in slots (memory/chunked.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titanfunc import rng
from titanfunc.config import ModelConfig
from titanfunc.memory import layer
from titanfunc.memory.network import MemoryNet
from titanfunc.memory.state import MemoryState, init_state
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
    unembed,
)
from titanfunc.models.mac_block import Block, streams
from titanfunc.models.mac_piece import MACState, Piece, SegmentCache
from titanfunc.nn import Balance, init_linear


def build(config: ModelConfig, net: MemoryNet) -> Model:
    """The MAC model that ``config`` describes (tokens [B, T] -> logits [B, T, V]), with memories of the network
    ``net``."""

    def init(generator: torch.Generator) -> Params:
        return init_outer(generator, config, lambda i: _init_block(generator, config, net, i in config.memory_at))

    def init_memory(params: Params, batch_size: int) -> Memory:
        dtype = compute_dtype(config, params)
        return tuple(
            _init_state(block, config, batch_size, dtype, params["embedding"].device)
            for block in blocks_of(params, config)
        )

    def layer_at(
        piece: Piece, i: int | Tensor, block: Params, state: MACState, call: Call, x: Tensor
    ) -> tuple[Tensor, MACState, Tensor | None, Balance | None]:
        x, state, totals = Block(block, config, net, state, piece)(x)
        x, balance = feed(block, config, x, i, call.seed)
        return x, state, totals, balance

    def apart(x: Tensor, rest: tuple[Any, ...]) -> tuple[Any, ...]:
        i, block, state, position, call = rest
        return layer_at(Piece(config, position, x.shape[1], call, x.dtype), i, block, state, call, x)

    layers = Layers.of(config, apart)

    def apply(
        params: Params, memory: Memory, tokens: Tensor, *, with_metrics: bool = False, **keywords: Any
    ) -> tuple[Any, ...]:
        call = Call(**keywords)
        check_tokens(config, tokens)
        check_documents(call.documents, tokens)
        check_memory(config, memory, tokens)
        dtype = compute_dtype(config, params)
        x = embed(params, tokens, dtype)
        position, run = memory[0].position, layers.chosen(config)
        piece = Piece(config, position, tokens.shape[1], call, dtype) if run is apart else None
        states, sums, balances = [], [], []
        for i, (block, state) in enumerate(zip(blocks_of(params, config), memory, strict=True)):
            if piece is None:
                x, state, totals, balance = run(x, (number(config, i, x.device), block, state, position, call))
            else:
                x, state, totals, balance = layer_at(piece, i, block, state, call, x)
            states.append(state)
            balances.append(balance)
            if totals is not None:
                sums.append(totals)
        logits = unembed(params, x, dtype, call.documents)
        if not with_metrics:
            return logits, tuple(states)
        return logits, tuple(states), {**layer.metrics_of(sums), **mixture_metrics(config, balances)}

    return Model(init, init_memory, apply, config)


def _init_block(generator: torch.Generator, config: ModelConfig, net: MemoryNet, has_memory: bool) -> Params:
    block = init_attention(generator, config)
    if config.mac.context != "read":
        # Queries that start as keys make every token find itself, and so the context token beside it.
        block["attention"]["wk"] = block["attention"]["wq"].clone()
    block.update(init_feed(generator, config))
    if config.persistent:
        block["persistent"] = rng.normal(generator, (config.persistent, config.dim), 1.0)
    if has_memory:
        inner = config.memory.inner_dim
        gain = (config.memory.head_dim / config.memory.heads) ** 0.5
        block["memory"] = {
            **layer.init_layer(generator, config.memory, config.dim, net),
            "context_out": init_linear(generator, inner, config.dim, gain),
            "gate_out": init_linear(generator, inner, config.dim, gain),
        }
        block["norm_memory"] = torch.ones(config.dim, device=generator.device)
    return block


def _init_state(
    block: Params, config: ModelConfig, batch_size: int, dtype: torch.dtype, device: torch.device
) -> MACState:
    def cache(size: int) -> Tensor:
        shape = (batch_size, config.heads, size, config.dim // config.heads)
        return torch.zeros(shape, dtype=dtype, device=device)

    has_memory = "memory" in block
    context, own = cache(config.mac.segment if has_memory else 0), cache(config.mac.segment)
    rows = max(config.memory.conv_width - 1, 0) if has_memory else 0
    input_tail, output_tail = (
        torch.zeros(batch_size, rows, len(names) * config.memory.inner_dim, dtype=dtype, device=device)
        for names in streams(config)
    )
    position = torch.zeros(batch_size, dtype=torch.int64, device=device)
    memory = init_state(block["memory"]["initial"], batch_size, config.memory.rule) if has_memory else ()
    before = memory.weights if isinstance(memory, MemoryState) else ()
    return MACState(memory, before, SegmentCache(context, context, own, own), input_tail, output_tail, position)
