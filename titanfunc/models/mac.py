"""Memory as context (Titans, arXiv 2501.00663, section 4.1), strictly causal.

Letters: B batch, T tokens, D features, R segments, S slots a segment, H memory heads, d memory head size,
P persistent tokens. In each block, segment by segment (u the normalised input):

    h = read of the memory as it stood before the segment, queries from u (mac.context "residual": u + that read)
    y = attention of u's queries over [persistent | h | u]; token t sees h and u up to t (h_t comes from
        token t, so h as a plain prefix would show the future), and all persistent tokens
    write norm(y) into the memory (mac.write "attention"), or u (mac.write "input": nothing of a segment
        waits for the one before, so all segments attend at once)
    x += (y * 2 sigmoid(read after token t, query from norm(y))) W_o,  then  x += feed_forward(norm x)

The gate is 1 while the memory is empty. Persistent tokens are keys and values only: a row that also queried would
carry the future back. A piece of text may begin anywhere in a segment: tokens lie in slots (memory/chunked.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.config import ModelConfig
from titanfunc.memory import layer
from titanfunc.memory.chunked import write
from titanfunc.memory.network import MemoryNet, Weights
from titanfunc.memory.passes import Layout, Pass, read_at
from titanfunc.memory.recurrent import per_head
from titanfunc.memory.slots import Documents, Slots, slots
from titanfunc.memory.state import MemoryState, init_state
from titanfunc.models.base import (
    Call,
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
    unembed,
)
from titanfunc.nn import (
    convolve,
    extend,
    extend_at,
    init_linear,
    linear,
    of_document,
    rms_norm,
    rotary_table,
    rotate,
    tail_at,
)
from titanfunc.ops.attention import attention


class SegmentCache(NamedTuple):
    """Keys and values of the current segment, rotated, zero where nothing was read yet: each [B, heads, S,
    D / heads]; those of the context (no slots in a block without memory) and the block's own.
    """

    context_keys: Tensor
    context_values: Tensor
    keys: Tensor
    values: Tensor


class _Own(NamedTuple):
    """Queries, keys and values made from a block's input, each [B, R, heads, S, D / heads]."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class MACState(NamedTuple):
    """What one block carries; its size does not grow with the text.

    memory: the MemoryState. before: the memory's weights at the segment's start, leaves [B, H, ...] (both () in a block
    without memory). cache: the current segment's keys and values. input_tail, output_tail: the last rows that the
    convolutions over u and over y saw, [B, K - 1, features]. position: tokens read in the segment, int64 [B].
    """

    memory: MemoryState | Any
    before: Weights | Any
    cache: SegmentCache
    input_tail: Tensor
    output_tail: Tensor
    position: Tensor


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

    def apply(
        params: Params, memory: Memory, tokens: Tensor, *, with_metrics: bool = False, **keywords: Any
    ) -> tuple[Any, ...]:
        call = Call(**keywords)
        check_tokens(config, tokens)
        check_documents(call.documents, tokens)
        check_memory(config, memory, tokens)
        dtype = compute_dtype(config, params)
        x = embed(params, tokens, dtype)
        piece = _Piece(config, memory[0].position, tokens.shape[1], call, dtype)
        states, sums, balances = [], [], []
        for i, (block, state) in enumerate(zip(blocks_of(params, config), memory, strict=True)):
            x, state, totals = _Block(block, config, net, state, piece)(x)
            x, balance = feed(block, config, x, i, call.seed)
            states.append(state)
            balances.append(balance)
            if totals is not None:
                sums.append(totals)
        logits = unembed(params, x, dtype)
        if not with_metrics:
            return logits, tuple(states)
        return logits, tuple(states), {**layer.metrics_of(sums), **mixture_metrics(config, balances)}

    return Model(init, init_memory, apply, config)


def _init_block(generator: torch.Generator, config: ModelConfig, net: MemoryNet, has_memory: bool) -> Params:
    block = init_attention(generator, config)
    if config.mac.context == "residual":
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


def _streams(config: ModelConfig) -> tuple[str, str]:
    """Which of q, k, v are projected from the block's input u, and which from the attention's output y."""
    return ("q", "qkv") if config.mac.write == "attention" else ("qkv", "q")


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
        for names in _streams(config)
    )
    position = torch.zeros(batch_size, dtype=torch.int64, device=device)
    memory = init_state(block["memory"]["initial"], batch_size, config.memory.rule) if has_memory else ()
    before = memory.weights if isinstance(memory, MemoryState) else ()
    return MACState(memory, before, SegmentCache(context, context, own, own), input_tail, output_tail, position)


class _Piece:
    """Where a piece of T tokens lies in its segments: what all blocks share.

    position: int64 [B], the place of its first token in the segment (0 when ``aligned``, or where a document begins).
    """

    def __init__(self, config: ModelConfig, position: Tensor, tokens: int, call: Call, dtype: torch.dtype) -> None:
        self.tokens, self.aligned, self.writes = tokens, call.aligned, call.write
        self.documents: Documents | None = call.documents
        if self.documents is not None:
            position = torch.where(self.documents.starts[:, 0], 0, position)
        self.position = position
        # One token at an unknown place goes straight to the caches; more are laid out in slots.
        self.single = tokens == 1 and not call.aligned and self.documents is None
        size = 1 if self.single else config.mac.segment
        self.layout: Slots = slots(position, tokens, size, call.aligned or self.single, self.documents)
        self.size, self.segments, device = self.layout.size, self.layout.count, position.device
        self.full = self.single or (self.layout.aligned and self.size * self.segments == tokens)
        self.valid = None if self.full else self.layout.valid(torch.float32)  # [B, R, S]
        self.moved = not (self.layout.aligned or self.single)  # tokens may begin anywhere in their first segment
        slot = torch.arange(config.mac.segment if self.single else self.size, device=device)
        here = position.reshape(-1, 1, 1, 1, 1)
        self.rotary = rotary_table(here[..., 0] if self.single else slot, config.dim // config.heads, dtype)
        self.slot, self.here = slot.unsqueeze(-1), here
        self.seen = slot <= (here if self.single else slot.unsqueeze(-1))  # [S, S], or [B, 1, 1, 1, S] for one token
        self.age: Tensor | None = None
        if self.documents is not None:
            self.age = self.documents.age(torch.full_like(position, 1 << 30))

    def mask(self, fixed: int, context: bool) -> Tensor:
        """Who sees whom: ``fixed`` persistent tokens, the context, if any, and the segment's own tokens up to oneself."""
        always = torch.ones(*self.seen.shape[:-1], fixed, dtype=torch.bool, device=self.seen.device)
        mask = torch.cat([always, self.seen, self.seen] if context else [always, self.seen], -1)
        return mask.flatten(0, 1) if self.single else mask

    def held(self, segments: slice) -> Tensor | None:
        """Which slots of some segments hold a token, [B, slots], or None where all do."""
        return None if self.valid is None else self.valid[:, segments].flatten(1)

    def restart(self, segment: int) -> Tensor | None:
        """Bool [B]: where a document begins with this segment; None without documents."""
        return None if self.layout.restart is None else self.layout.restart[:, segment]

    def end(self, segment: int) -> Tensor:
        """The slot [B] of ``segment`` before which its last token lies (0 where it holds none)."""
        assert self.valid is not None
        slot = torch.arange(1, self.size + 1, device=self.valid.device)
        return (self.valid[:, segment].to(torch.int64) * slot).amax(-1)

    def last_segment(self) -> Tensor:
        """The segment [B] of the last token."""
        return self.layout.last() // self.size


class _Block:
    """One block over one piece: what its steps share, so that each is a short method."""

    def __init__(self, params: Params, config: ModelConfig, net: MemoryNet, state: MACState, piece: _Piece) -> None:
        self.params, self.config, self.net, self.state, self.piece = params, config, net, state, piece
        self.memory_params: Params = params.get("memory", {})
        self.from_input, self.from_output = _streams(config)

    def __call__(self, x: Tensor) -> tuple[Tensor, MACState, Tensor | None]:
        """x [B, T, D] -> (x, new state, sums of the metrics), before the feed-forward."""
        config, params, piece, state = self.config, self.params, self.piece, self.state
        u = rms_norm(params["norm_attention"], x)
        position = piece.layout.end_position(config.mac.segment)
        if not self.memory_params:
            y, cache = self._attend(self._own_keys(piece.layout.place(u)), None, True)
            new = state._replace(cache=self._trim(cache, position), position=position)
            return x + linear(params["attention"]["wo"], piece.layout.take(y), x.dtype), new, None
        rows = linear(layer.join(self.memory_params, self.from_input), u, u.dtype)
        rows, input_tail = self._convolve_input(rows)
        place = piece.layout.place
        pass_ = self._write_attention if config.mac.write == "attention" else self._write_input
        o, memory, before, cache, output_tail, sums = pass_(place(u), place(rows))
        x = x + linear(params["attention"]["wo"], piece.layout.take(o), x.dtype)
        return x, MACState(memory, before, self._trim(cache, position), input_tail, output_tail, position), sums

    # The two orders, over u [B, R, S, D] and the memory's rows from u [B, R, S, n H d].

    def _write_attention(self, u: Tensor, rows: Tensor) -> tuple[Any, ...]:
        """The paper's order: segments one after another, each writes what its attention made."""
        state, piece = self.state, self.piece
        memory, before, tail = state.memory, state.before, state.output_tail
        queries = layer.heads_of(self.config.memory, "q", rows.flatten(1, 2))[0].unflatten(
            2, (piece.segments, piece.size)
        )
        weight = layer.join(self.memory_params, "qkv")
        own = self._own_keys(u)
        outputs, caches, sums = [], [], []
        for r in range(piece.segments):
            one = slice(r, r + 1)
            anew = piece.restart(r)
            if anew is not None:
                tail = torch.where(anew[:, None, None], 0, tail)
                start = self._fresh(memory)
                memory = tree.map(lambda new, old: torch.where(per_head(anew, old), new, old), start, memory)  # noqa: B023
            before = self._before(before, memory.weights, r)
            context = self._context(read_at(self.net, before, queries[:, :, r]), u[:, r]).unsqueeze(1)
            y, cache = self._attend(_Own(*(x[:, one] for x in own)), context, r == 0)
            y = y.flatten(1, 2)
            norm = rms_norm(self.params["norm_memory"], y)
            projected = linear(weight, norm, y.dtype)
            projected, tail = self._convolve_output("qkv", projected, tail, r, piece.size)
            q, k, v = layer.heads_of(self.config.memory, "qkv", projected)
            written, inner, total = self._write(memory, k, v, norm, one)
            memory = written.state._replace(position=memory.position)
            outputs.append(self._gate(y, inner.take(written.read(inner.place(q), "inclusive"))))
            caches.append(cache)
            sums.append(total)
        cache = SegmentCache(*(torch.cat(parts, 1) for parts in zip(*caches, strict=True)))
        memory = memory._replace(position=self._memory_position())
        return torch.stack(outputs, 1), memory, before, cache, tail, torch.stack(sums).sum(0)

    def _write_input(self, u: Tensor, rows: Tensor) -> tuple[Any, ...]:
        """The parallel order: one scan writes the whole input, then every segment attends at once."""
        state, piece = self.state, self.piece
        segments, size = piece.segments, piece.size
        q, k, v = layer.heads_of(self.config.memory, "qkv", rows.flatten(1, 2))
        written, inner, total = self._write(state.memory, k, v, u.flatten(1, 2), slice(None))
        chunks = size // inner.slots.size if segments > 1 else inner.slots.count
        starts = tree.map(lambda w: w[:, :, : segments * chunks : chunks], written.starts)
        if not piece.aligned:
            first = self._before(state.before, tree.map(lambda w: w[:, :, 0], starts), 0)
            starts = tree.map(lambda w, f: torch.cat([f.unsqueeze(2), w[:, :, 1:]], 2), starts, first)
        read = read_at(self.net, starts, q.unflatten(2, (segments, size)))
        context = self._context(read.flatten(2, 3), u.flatten(1, 2)).unflatten(1, (segments, size))
        y, cache = self._attend(self._own_keys(u), context, True)
        y = y.flatten(1, 2)
        projected = linear(self.memory_params["wq"], rms_norm(self.params["norm_memory"], y), y.dtype)
        projected, tail = self._convolve_output("q", projected, state.output_tail, 0, segments * size)
        query = layer.heads_of(self.config.memory, "q", projected)[0]
        o = self._gate(y, inner.take(written.read(inner.place(query), "inclusive")))
        memory = written.state._replace(position=self._memory_position())
        return o.unflatten(1, (segments, size)), memory, self._last_before(starts), cache, tail, total

    # The steps.

    def _memory_position(self) -> Tensor:
        size, position = self.config.memory.chunk_size, self.state.memory.position
        if self.piece.documents is None:
            return (position + self.piece.tokens) % size
        return self.piece.layout.end_position(size).unsqueeze(-1).expand_as(position)

    def _fresh(self, memory: MemoryState) -> MemoryState:
        """The state with which a document begins."""
        fresh = init_state(self.memory_params["initial"], memory.position.shape[0], self.config.memory.rule)
        return fresh._replace(position=memory.position)

    def _convolve_input(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Over u, in token order: [B, T, n H d] -> the same, and the new tail."""
        if not self.config.memory.conv_width:
            return rows, self.state.input_tail
        extended = extend(self.state.input_tail, rows)
        mixed = convolve(layer.taps_of(self.memory_params, self.from_input), extended, self.piece.age)
        tail = extended[:, extended.shape[1] - self.state.input_tail.shape[1] :]
        return mixed, tail if self.piece.age is None else of_document(tail, self.piece.age[:, -1])

    def _convolve_output(
        self, names: str, rows: Tensor, tail: Tensor, segment: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Over y, in ``length`` slots from ``segment`` on: rows [B, length, n H d] -> the same, and the new tail."""
        width, piece = self.config.memory.conv_width, self.piece
        if not width:
            return rows, tail
        moved = piece.moved and segment == 0
        extended = extend_at(tail, rows, piece.position) if moved else extend(tail, rows)
        whole = length > piece.size or piece.segments == 1  # all of the piece at once
        age = None
        if piece.age is not None and whole:
            age = piece.layout.place(piece.age).flatten(1)
        if piece.full:
            tail = extended[:, length:]
        else:
            end = piece.layout.last() + 1 if whole else piece.end(segment)
            tail = tail_at(extended, end, width)
        if piece.age is not None and whole:
            tail = of_document(tail, piece.age[:, -1])
        return convolve(layer.taps_of(self.memory_params, names), extended, age), tail

    def _before(self, before: Weights, weights: Weights, segment: int) -> Weights:
        """The weights at a segment's start: the memory's own where its first slot holds a token, else as carried."""
        piece = self.piece
        if piece.aligned:
            return weights  # each of its segments holds a token
        starts = (piece.position == 0) if piece.valid is None else piece.valid[:, segment, 0] > 0
        return tree.map(lambda w, b: torch.where(per_head(starts, w), w, b), weights, before)

    def _last_before(self, starts: Weights) -> Weights:
        """Of the weights at every segment's start [B, H, R, ...], those of the segment of the last token."""
        if not self.piece.moved:
            return tree.map(lambda w: w[:, :, -1], starts)
        last = self.piece.last_segment()

        def pick(w: Tensor) -> Tensor:
            shape = w[:, :, :1].shape
            return torch.gather(w, 2, last.reshape(-1, *[1] * (w.ndim - 1)).expand(shape)).squeeze(2)

        return tree.map(pick, starts)

    def _context(self, read: Tensor, u: Tensor) -> Tensor:
        """Reads [B, H, slots, d] of u [B, slots, D] -> context tokens [B, slots, D]."""
        context = linear(self.memory_params["context_out"], layer.merge_heads(read), read.dtype)
        return context + u if self.config.mac.context == "residual" else context

    def _gate(self, y: Tensor, read: Tensor) -> Tensor:
        """y [B, slots, D] times 2 sigmoid of the read [B, H, slots, d]."""
        gate = linear(self.memory_params["gate_out"], layer.merge_heads(read), y.dtype)
        return y * 2 * torch.sigmoid(gate)

    def _write(
        self, memory: MemoryState, k: Tensor, v: Tensor, x: Tensor, segments: slice
    ) -> tuple[Pass, Layout, Tensor]:
        """Writes k, v [B, H, slots, d] with gates from x [B, slots, D]: all slots of some segments.

        Returns what was written, how it lies in chunks, and the sums of the metrics.
        """
        config, piece = self.config.memory, self.piece
        gates = layer.gates_of(self.memory_params["gates"], config, x, piece.writes)
        layout = self._chunks(memory, k.shape[2], segments, gates.forget.dtype)
        start = None if layout.restart is None else layer.initial_weights(self.memory_params, k.shape[0])
        written = write(self.net, memory, k, v, gates, layout, config.clip or None, config.rule, start)
        held = piece.held(segments)
        ones = None if held is None else held.unsqueeze(1).expand(k.shape[:3])
        sums = layer.sums_of(layout.take(written.loss), gates, layout.take(written.kept), ones)
        return written, layout, sums

    def _chunks(self, memory: MemoryState, count: int, segments: slice, dtype: torch.dtype) -> Layout:
        """How ``count`` slots of some segments lie in chunks."""
        piece, size = self.piece, self.config.memory.chunk_size
        position, held = memory.position, piece.held(segments)
        if piece.single:
            return Layout.of(position, 1, size, False, dtype=dtype)
        if held is None:
            return Layout.of(position, count, size, True, dtype=dtype)
        inner = slots(position, count, size, aligned=True)
        valid = inner.place(held.to(dtype).unsqueeze(1).expand(*position.shape, count))
        closes = (valid[..., -1] > 0) & (inner.size == size)
        restart = None
        if piece.layout.restart is not None and (segments.start is None):
            begins = piece.layout.restart.to(dtype).unsqueeze(-1)
            begins = torch.nn.functional.pad(begins, (0, piece.size // inner.size - 1)).flatten(1)
            restart = begins.unsqueeze(1).expand(*position.shape, -1)
        return Layout(inner, size, valid, valid[..., 0], closes, restart, position)

    def _own_keys(self, u: Tensor) -> _Own:
        """Queries, keys and values of u [B, R, S, D], each [B, R, heads, S, D / heads], rotated."""
        weight = torch.cat([self.params["attention"][name] for name in ("wq", "wk", "wv")], -1)
        parts = linear(weight, u, u.dtype).unflatten(-1, (3, self.config.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        return _Own(rotate(parts[0], self.piece.rotary), rotate(parts[1], self.piece.rotary), parts[2])

    def _attend(self, own: _Own, context: Tensor | None, has_first: bool) -> tuple[Tensor, SegmentCache]:
        """Attention inside segments with context [B, R, S, D] (None: without): (y [B, R, S, D], keys and values
        [B, R, heads, S, .]).
        """
        config, piece, cache = self.config, self.piece, self.state.cache
        batch, segments = own.queries.shape[:2]
        weight = torch.cat([self.params["attention"]["wk"], self.params["attention"]["wv"]], -1)

        def keys_and_values(x: Tensor) -> Tensor:
            heads = linear(weight, x, own.queries.dtype).unflatten(-1, (2, config.heads, -1))
            return heads.movedim(-3, 0).transpose(-3, -2)

        none = own.keys[..., :0, :]
        context_keys, context_values = (none, none) if context is None else keys_and_values(context)
        if context is not None:
            context_keys = rotate(context_keys, piece.rotary)
        new = SegmentCache(context_keys, context_values, own.keys, own.values)
        if piece.single or (has_first and piece.moved):
            new = SegmentCache(*(self._with_earlier(x, old) for x, old in zip(new, cache, strict=True)))
        seen = [(new.context_keys, new.context_values), (new.keys, new.values)]
        if config.persistent:
            fixed = keys_and_values(self.params["persistent"]).unsqueeze(1).unsqueeze(1)
            seen.insert(
                0,
                (
                    fixed[0].expand(batch, segments, *fixed.shape[3:]),
                    fixed[1].expand(batch, segments, *fixed.shape[3:]),
                ),
            )
        keys, values = (torch.cat(parts, -2).flatten(0, 1) for parts in zip(*seen, strict=True))
        mask = piece.mask(config.persistent, context is not None)
        y = attention(own.queries.flatten(0, 1), keys, values, mask, config.attention)
        return y.unflatten(0, (batch, segments)).transpose(2, 3).flatten(3), new

    def _with_earlier(self, x: Tensor, old: Tensor) -> Tensor:
        """Keys or values [B, R, heads, S, .] with those of earlier pieces, [B, heads, S, .], in the first segment."""
        piece = self.piece
        if not old.shape[-2]:
            return x  # a context without slots
        if piece.single:
            return torch.where(piece.slot == piece.here, x, old.unsqueeze(1))
        first = torch.where(piece.slot < piece.here, old.unsqueeze(1), x[:, :1])
        return torch.cat([first, x[:, 1:]], 1)

    def _trim(self, cache: SegmentCache, filled: Tensor) -> SegmentCache:
        """Of keys and values [B, R, heads, S, .], the last token's segment, zero from slot ``filled`` [B] on."""
        size, piece = self.config.mac.segment, self.piece
        keep = (torch.arange(size, device=filled.device) < filled.unsqueeze(-1))[:, None, :, None]

        def last(x: Tensor) -> Tensor:
            if not x.shape[-2]:
                return x[:, -1]  # a context without slots
            if piece.moved:
                index = piece.last_segment().reshape(-1, 1, 1, 1, 1)
                x = torch.gather(x, 1, index.expand(-1, 1, *x.shape[2:])).squeeze(1)
            else:
                x = F.pad(x[:, -1], (0, 0, 0, size - x.shape[-2]))
            return torch.where(keep, x, 0)

        return SegmentCache(*(last(x) for x in cache))
