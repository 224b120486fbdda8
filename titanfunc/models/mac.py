"""Memory as context (Titans, arXiv 2501.00663, section 4.1), strictly causal.

Letters: B batch, T tokens, D features, R segments, S slots a segment, H memory heads, d memory head size,
P persistent tokens. In each block, segment by segment (u the normalised input):

    h = read of the memory as it stood before the segment, queries from u
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
from titanfunc.memory.chunked import Slots, read_slots, read_start, slots, state_after, write_slots
from titanfunc.memory.network import Weights, named
from titanfunc.memory.recurrent import per_head
from titanfunc.memory.state import Gates, MemoryState, init_state
from titanfunc.models.base import (
    Memory,
    Model,
    Params,
    blocks_of,
    check_memory,
    check_tokens,
    compute_dtype,
    embed,
    init_block,
    init_outer,
    unembed,
)
from titanfunc.nn import (
    convolve,
    extend,
    extend_at,
    feed_forward,
    init_linear,
    linear,
    rms_norm,
    rotary_table,
    rotate,
    tail_at,
)
from titanfunc.ops.attention import attention

METRICS = ("inner_loss", "forget", "momentum_decay", "inner_lr")


class SegmentCache(NamedTuple):
    """Keys and values of the current segment, rotated, zero where nothing was read yet: each [B, heads, S,
    D / heads].
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

    memory: the MemoryState. before: the memory's weights at the segment's start, leaves [B, H, ...].
    cache: the current segment's keys and values. input_tail, output_tail: the last rows that the convolutions over
    u and over y saw, [B, K - 1, features]. position: tokens read in the segment, int64 [B].
    """

    memory: MemoryState
    before: Weights
    cache: SegmentCache
    input_tail: Tensor
    output_tail: Tensor
    position: Tensor


def build(config: ModelConfig) -> Model:
    """The MAC model that ``config`` describes (tokens [B, T] -> logits [B, T, V])."""

    def init(generator: torch.Generator) -> Params:
        return init_outer(generator, config, lambda: _init_block(generator, config))

    def init_memory(params: Params, batch_size: int) -> Memory:
        return tuple(
            _init_state(block, config, batch_size, compute_dtype(config, params)) for block in blocks_of(params, config)
        )

    def apply(
        params: Params, memory: Memory, tokens: Tensor, *, aligned: bool = False, with_metrics: bool = False
    ) -> tuple[Any, ...]:
        check_tokens(config, tokens)
        check_memory(config, memory, tokens)
        dtype = compute_dtype(config, params)
        x = embed(params, tokens, dtype)
        piece = _Piece(config, memory[0].position, tokens.shape[1], aligned, dtype)
        states, sums = [], []
        for block, state in zip(blocks_of(params, config), memory, strict=True):
            x, state, totals = _Block(block, config, state, piece)(x)
            states.append(state)
            sums.append(totals)
        logits = unembed(params, x, dtype)
        if not with_metrics:
            return logits, tuple(states)
        total = torch.stack(sums).sum(0)
        metrics = {f"memory/{name}": total[i] / total[-1] for i, name in enumerate(METRICS)}
        return logits, tuple(states), {**metrics, "memory/dropped": total[-2]}

    return Model(init, init_memory, apply, config)


def _init_block(generator: torch.Generator, config: ModelConfig) -> Params:
    block = init_block(generator, config)
    inner = config.memory.inner_dim
    gain = (config.dim / config.memory.heads) ** 0.5 / config.dim**0.5  # unit reads come back at unit scale
    block["persistent"] = rng.normal(generator, (config.persistent, config.dim), 1.0)
    block["memory"] = {
        **layer.init_layer(generator, config.memory, config.dim),
        "context_out": init_linear(generator, inner, config.dim, gain * config.memory.head_dim**0.5),
        "gate_out": init_linear(generator, inner, config.dim, gain * config.memory.head_dim**0.5),
    }
    block["norm_memory"] = torch.ones(config.dim, device=generator.device)
    return block


def _streams(config: ModelConfig) -> tuple[str, str]:
    """Which of q, k, v are projected from the block's input u, and which from the attention's output y."""
    return ("q", "qkv") if config.mac.write == "attention" else ("qkv", "q")


def _init_state(block: Params, config: ModelConfig, batch_size: int, dtype: torch.dtype) -> MACState:
    memory = init_state(block["memory"]["initial"], batch_size)
    device = memory.position.device
    cache = torch.zeros(
        batch_size, config.heads, config.mac.segment, config.dim // config.heads, dtype=dtype, device=device
    )
    rows = max(config.memory.conv_width - 1, 0)
    input_tail, output_tail = (
        torch.zeros(batch_size, rows, len(names) * config.memory.inner_dim, dtype=dtype, device=device)
        for names in _streams(config)
    )
    position = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return MACState(memory, memory.weights, SegmentCache(cache, cache, cache, cache), input_tail, output_tail, position)


class _Piece:
    """Where a piece of T tokens lies in its segments: what all blocks share.

    position: int64 [B], the place of its first token in the segment (0 when ``aligned``).
    """

    def __init__(self, config: ModelConfig, position: Tensor, tokens: int, aligned: bool, dtype: torch.dtype) -> None:
        self.position, self.tokens, self.aligned = position, tokens, aligned
        # One token at an unknown place goes straight to the caches; more are laid out in slots.
        self.single = tokens == 1 and not aligned
        self.layout: Slots = slots(position, tokens, 1 if self.single else config.mac.segment, aligned or self.single)
        self.size, self.segments, device = self.layout.size, self.layout.count, position.device
        self.full = self.single or (aligned and self.size * self.segments == tokens)
        self.valid = None if self.full else self.layout.valid(torch.float32)  # [B, R, S]
        self.moved = not (aligned or self.single)  # tokens may begin anywhere in their first segment
        slot = torch.arange(config.mac.segment if self.single else self.size, device=device)
        here = position.reshape(-1, 1, 1, 1, 1)
        self.rotary = rotary_table(here[..., 0] if self.single else slot, config.dim // config.heads, dtype)
        self.slot, self.here = slot.unsqueeze(-1), here
        seen = slot <= (here if self.single else slot.unsqueeze(-1))
        always = torch.ones(*seen.shape[:-1], config.persistent, dtype=torch.bool, device=device)
        mask = torch.cat([always, seen, seen], -1)  # [S, P + 2 S], or [B, 1, 1, 1, P + 2 S] for a single token
        self.mask = mask.flatten(0, 1) if self.single else mask

    def held(self, segments: slice) -> Tensor | None:
        """Which slots of some segments hold a token, [B, slots], or None where all do."""
        return None if self.valid is None else self.valid[:, segments].flatten(1)

    def end(self, segment: int) -> Tensor:
        """The slot [B] of ``segment`` before which its last token lies (0 where it holds none)."""
        return (self.layout.start + self.tokens - segment * self.size).clamp(0, self.size)


class _Block:
    """One block over one piece: what its steps share, so that each is a short method."""

    def __init__(self, params: Params, config: ModelConfig, state: MACState, piece: _Piece) -> None:
        self.params, self.config, self.state, self.piece = params, config, state, piece
        self.memory_params, self.net = params["memory"], layer.memory_net(config.memory)
        self.from_input, self.from_output = _streams(config)

    def __call__(self, x: Tensor) -> tuple[Tensor, MACState, Tensor]:
        """x [B, T, D] -> (x, new state, sums of the metrics)."""
        config, params, piece = self.config, self.params, self.piece
        u = rms_norm(params["norm_attention"], x)
        rows = linear(layer.join(self.memory_params, self.from_input), u, u.dtype)
        rows, input_tail = self._convolve_input(rows)
        place = piece.layout.place
        pass_ = self._write_attention if config.mac.write == "attention" else self._write_input
        o, memory, before, cache, output_tail, sums = pass_(place(u), place(rows))
        x = x + linear(params["attention"]["wo"], piece.layout.take(o), x.dtype)
        x = x + feed_forward(params["feed_forward"], rms_norm(params["norm_feed_forward"], x), x.dtype)
        position = (piece.position + piece.tokens) % config.mac.segment
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
            before = self._before(before, memory.weights, r)
            context = self._context(read_start(self.net, before, queries[:, :, r])).unsqueeze(1)
            y, cache = self._attend(_Own(*(x[:, one] for x in own)), context, r == 0)
            y = y.flatten(1, 2)
            norm = rms_norm(self.params["norm_memory"], y)
            projected = linear(weight, norm, y.dtype)
            projected, tail = self._convolve_output("qkv", projected, tail, r, piece.size)
            q, k, v = layer.heads_of(self.config.memory, "qkv", projected)
            written, c, inner, total = self._write(memory, k, v, norm, piece.held(one))
            memory = state_after(self.net, written, memory.position)
            outputs.append(self._gate(y, inner.take(read_slots(self.net, written, c, inner.place(q)))))
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
        written, c, inner, total = self._write(state.memory, k, v, u.flatten(1, 2), piece.held(slice(None)))
        chunks = size // inner.size if segments > 1 else inner.count
        starts = named(self.net, [w[:, :, : segments * chunks : chunks] for w in written.weights])
        if not piece.aligned:
            first = self._before(state.before, tree.map(lambda w: w[:, :, 0], starts), 0)
            starts = tree.map(lambda w, f: torch.cat([f.unsqueeze(2), w[:, :, 1:]], 2), starts, first)
        read = read_start(self.net, starts, q.unflatten(2, (segments, size)))
        context = self._context(read.flatten(2, 3)).unflatten(1, (segments, size))
        y, cache = self._attend(self._own_keys(u), context, True)
        y = y.flatten(1, 2)
        projected = linear(self.memory_params["wq"], rms_norm(self.params["norm_memory"], y), y.dtype)
        projected, tail = self._convolve_output("q", projected, state.output_tail, 0, segments * size)
        query = layer.heads_of(self.config.memory, "q", projected)[0]
        o = self._gate(y, inner.take(read_slots(self.net, written, c, inner.place(query))))
        memory = state_after(self.net, written, self._memory_position())
        return o.unflatten(1, (segments, size)), memory, self._last_before(starts), cache, tail, total

    # The steps.

    def _memory_position(self) -> Tensor:
        return (self.state.memory.position + self.piece.tokens) % self.config.memory.chunk_size

    def _convolve_input(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Over u, in token order: [B, T, n H d] -> the same, and the new tail."""
        if not self.config.memory.conv_width:
            return rows, self.state.input_tail
        extended = extend(self.state.input_tail, rows)
        mixed = convolve(layer.taps_of(self.memory_params, self.from_input), extended)
        return mixed, extended[:, extended.shape[1] - self.state.input_tail.shape[1] :]

    def _convolve_output(
        self, names: str, rows: Tensor, tail: Tensor, segment: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Over y, in ``length`` slots from ``segment`` on: rows [B, length, n H d] -> the same, and the new tail."""
        width, piece = self.config.memory.conv_width, self.piece
        if not width:
            return rows, tail
        extended = extend_at(tail, rows, piece.layout.start) if piece.moved and segment == 0 else extend(tail, rows)
        if piece.full:
            tail = extended[:, length:]
        else:
            end = piece.end(segment) if length == piece.size else piece.layout.start + piece.tokens
            tail = tail_at(extended, end, width)
        return convolve(layer.taps_of(self.memory_params, names), extended), tail

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
        last = (self.piece.layout.start + self.piece.tokens - 1) // self.piece.size

        def pick(w: Tensor) -> Tensor:
            shape = w[:, :, :1].shape
            return torch.gather(w, 2, last.reshape(-1, *[1] * (w.ndim - 1)).expand(shape)).squeeze(2)

        return tree.map(pick, starts)

    def _context(self, read: Tensor) -> Tensor:
        """Reads [B, H, slots, d] -> context tokens [B, slots, D]."""
        return linear(self.memory_params["context_out"], layer.merge_heads(read), read.dtype)

    def _gate(self, y: Tensor, read: Tensor) -> Tensor:
        """y [B, slots, D] times 2 sigmoid of the read [B, H, slots, d]."""
        gate = linear(self.memory_params["gate_out"], layer.merge_heads(read), y.dtype)
        return y * 2 * torch.sigmoid(gate)

    def _write(self, memory: MemoryState, k: Tensor, v: Tensor, x: Tensor, held: Tensor | None) -> tuple[Any, ...]:
        """Writes k, v [B, H, slots, d], gates from x [B, slots, D], tokens in the slots ``held`` [B, slots] (None:
        all).

        Returns what was written, its coefficients, the layout in chunks, and the sums of the metrics.
        """
        config = self.config.memory
        inner = slots(torch.zeros_like(memory.position), k.shape[2], config.chunk_size, aligned=True)
        gates = layer.gates_of(self.memory_params["gates"], config, x)
        wide = gates.forget.dtype
        padded = inner.count * inner.size > k.shape[2]
        in_chunks = refresh = None
        if held is not None or padded:
            held = torch.ones_like(gates.forget[:, 0]) if held is None else held.to(wide)
            in_chunks = inner.place(held.unsqueeze(1).expand(k.shape[:3]))
            refresh = in_chunks[..., 0]
        if self.piece.single:
            refresh = (memory.position % config.chunk_size == 0).to(wide).unsqueeze(-1)
        written, c = write_slots(
            self.net, memory, inner.place(k), inner.place(v),
            Gates(*(inner.place(gate) for gate in gates)), in_chunks, refresh, config.clip,
        )  # fmt: skip
        measured = torch.stack([inner.take(written.loss), *gates]).detach()
        ones = torch.ones_like(measured[0]) if held is None else held.unsqueeze(1).expand(k.shape[:3])
        dropped = 1 - inner.take(written.kept)
        totals = torch.cat([measured, torch.stack([dropped.detach(), ones])]) * ones
        return written, c, inner, totals.flatten(1).sum(1).to(torch.float32)

    def _own_keys(self, u: Tensor) -> _Own:
        """Queries, keys and values of u [B, R, S, D], each [B, R, heads, S, D / heads], rotated."""
        weight = torch.cat([self.params["attention"][name] for name in ("wq", "wk", "wv")], -1)
        parts = linear(weight, u, u.dtype).unflatten(-1, (3, self.config.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        return _Own(rotate(parts[0], self.piece.rotary), rotate(parts[1], self.piece.rotary), parts[2])

    def _attend(self, own: _Own, context: Tensor, has_first: bool) -> tuple[Tensor, SegmentCache]:
        """Attention inside segments with context [B, R, S, D]: (y [B, R, S, D], keys and values [B, R, heads, S,
        .]).
        """
        config, piece, cache = self.config, self.piece, self.state.cache
        batch, segments = context.shape[:2]
        weight = torch.cat([self.params["attention"]["wk"], self.params["attention"]["wv"]], -1)

        def keys_and_values(x: Tensor) -> Tensor:
            heads = linear(weight, x, context.dtype).unflatten(-1, (2, config.heads, -1))
            return heads.movedim(-3, 0).transpose(-3, -2)

        keys, values = keys_and_values(context)
        new = SegmentCache(rotate(keys, piece.rotary), values, own.keys, own.values)
        if piece.single:
            here = piece.slot == piece.here
            new = SegmentCache(*(torch.where(here, n, old.unsqueeze(1)) for n, old in zip(new, cache, strict=True)))
        elif has_first and piece.moved:
            earlier = piece.slot < piece.here
            merged = (torch.where(earlier, old.unsqueeze(1), n[:, :1]) for n, old in zip(new, cache, strict=True))
            new = SegmentCache(*(torch.cat([m, n[:, 1:]], 1) for m, n in zip(merged, new, strict=True)))
        fixed_keys, fixed_values = keys_and_values(self.params["persistent"]).unsqueeze(1).unsqueeze(1)
        shape = (batch, segments, *fixed_keys.shape[2:])
        y = attention(
            own.queries.flatten(0, 1),
            torch.cat([fixed_keys.expand(shape), new.context_keys, new.keys], -2).flatten(0, 1),
            torch.cat([fixed_values.expand(shape), new.context_values, new.values], -2).flatten(0, 1),
            piece.mask,
            config.attention,
        )
        return y.unflatten(0, (batch, segments)).transpose(2, 3).flatten(3), new

    def _trim(self, cache: SegmentCache, filled: Tensor) -> SegmentCache:
        """Of keys and values [B, R, heads, S, .], the last token's segment, zero from slot ``filled`` [B] on."""
        size, piece = self.config.mac.segment, self.piece
        keep = (torch.arange(size, device=filled.device) < filled.unsqueeze(-1))[:, None, :, None]

        def last(x: Tensor) -> Tensor:
            if piece.moved:
                index = ((piece.layout.start + piece.tokens - 1) // size).reshape(-1, 1, 1, 1, 1)
                x = torch.gather(x, 1, index.expand(-1, 1, *x.shape[2:])).squeeze(1)
            else:
                x = F.pad(x[:, -1], (0, 0, 0, size - x.shape[-2]))
            return torch.where(keep, x, 0)

        return SegmentCache(*(last(x) for x in cache))
