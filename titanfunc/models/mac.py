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
    check_tokens,
    compute_dtype,
    embed,
    init_block,
    init_outer,
    unembed,
)
from titanfunc.nn import convolve, extend, extend_at, feed_forward, init_linear, linear, rms_norm, rotate, tail_at
from titanfunc.ops.attention import attention

METRICS = ("inner_loss", "forget", "momentum_decay", "inner_lr")


class SegmentCache(NamedTuple):
    """Keys and values of the current segment, rotated, zero where nothing was read yet: each [B, heads, S, D / heads]."""

    context_keys: Tensor
    context_values: Tensor
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
            _init_state(block, config, batch_size, compute_dtype(config, params))
            for block in blocks_of(params, config)
        )

    def apply(
        params: Params, memory: Memory, tokens: Tensor, *, aligned: bool = False, with_metrics: bool = False
    ) -> tuple[Any, ...]:
        check_tokens(config, tokens)
        dtype = compute_dtype(config, params)
        x = embed(params, tokens, dtype)
        states, sums = [], []
        for block, state in zip(blocks_of(params, config), memory, strict=True):
            x, state, totals = _Block(block, config, state, x.shape[1], aligned)(x)
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
    tails = (
        torch.zeros(batch_size, rows, len(names) * config.memory.inner_dim, dtype=dtype, device=device)
        for names in _streams(config)
    )
    position = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return MACState(memory, memory.weights, SegmentCache(cache, cache, cache, cache), *tails, position)


class _Block:
    """One block over one piece: what its steps share, so that each is a short method."""

    def __init__(self, params: Params, config: ModelConfig, state: MACState, tokens: int, aligned: bool) -> None:
        self.params, self.config, self.state = params, config, state
        self.memory_params, self.net = params["memory"], layer.memory_net(config.memory)
        self.tokens, self.aligned = tokens, aligned
        # One token at an unknown place goes straight to the caches; more are laid out in slots.
        self.single = tokens == 1 and not aligned
        size = 1 if self.single else config.mac.segment
        self.layout: Slots = slots(state.position, tokens, size, aligned or self.single)
        self.from_input, self.from_output = _streams(config)

    def __call__(self, x: Tensor) -> tuple[Tensor, MACState, Tensor]:
        """x [B, T, D] -> (x, new state, sums of the metrics)."""
        config, params = self.config, self.params
        u = rms_norm(params["norm_attention"], x)
        rows = layer.project(self.memory_params, self.from_input, u, u.dtype)
        rows, input_tail = self._convolve_input(rows)
        place = self.layout.place
        valid = self.layout.valid(torch.float32)
        pass_ = self._write_attention if config.mac.write == "attention" else self._write_input
        o, memory, before, cache, output_tail, sums = pass_(place(u), place(rows), valid)
        x = x + linear(params["attention"]["wo"], self.layout.take(o), x.dtype)
        x = x + feed_forward(params["feed_forward"], rms_norm(params["norm_feed_forward"], x), x.dtype)
        position = (self.state.position + self.tokens) % config.mac.segment
        return x, MACState(memory, before, self._trim(cache, position), input_tail, output_tail, position), sums

    # The two orders. u [B, R, S, D], rows [B, R, S, n H d], valid [B, R, S].

    def _write_attention(self, u: Tensor, rows: Tensor, valid: Tensor) -> tuple[Any, ...]:
        """The paper's order: segments one after another, each writes what its attention made."""
        state, (batch, segments, size) = self.state, valid.shape
        memory, before, tail = state.memory, state.before, state.output_tail
        outputs, caches, sums = [], [], []
        for r in range(segments):
            one = slice(r, r + 1)
            before = self._before(before, memory.weights, valid[:, r], first=r == 0)
            query = layer.heads_of(self.config.memory, "q", rows[:, r])[0]
            context = self._context(read_start(self.net, before, query)).unsqueeze(1)
            y, cache = self._attend(u[:, one], context, has_first=r == 0)
            y = y.flatten(1, 2)
            norm = rms_norm(self.params["norm_memory"], y)
            projected = layer.project(self.memory_params, "qkv", norm, y.dtype)
            read_from = valid[:, : r + 1].sum((1, 2)).long()
            start = self.layout.start if r == 0 else torch.zeros_like(self.layout.start)
            held = valid[:, r].sum(-1).long()
            projected, tail = self._convolve_output(self.from_output, projected, tail, start, held)
            q, k, v = layer.heads_of(self.config.memory, "qkv", projected)
            position = state.memory.position + read_from.unsqueeze(-1)
            written, c, inner, total = self._write(memory, k, v, norm, valid[:, r])
            memory = state_after(self.net, written, position % self.config.memory.chunk_size)
            outputs.append(self._gate(y, inner.take(read_slots(self.net, written, c, inner.place(q)))))
            caches.append(cache)
            sums.append(total)
        cache = SegmentCache(*(torch.cat(parts, 1) for parts in zip(*caches, strict=True)))
        return torch.stack(outputs, 1), memory, before, cache, tail, torch.stack(sums).sum(0)

    def _write_input(self, u: Tensor, rows: Tensor, valid: Tensor) -> tuple[Any, ...]:
        """The parallel order: one scan writes the whole input, then every segment attends at once."""
        state, (batch, segments, size) = self.state, valid.shape
        q, k, v = layer.heads_of(self.config.memory, "qkv", rows.flatten(1, 2))
        flat = u.flatten(1, 2)
        written, c, inner, total = self._write(state.memory, k, v, flat, valid.flatten(1, 2))
        chunks = size // inner.size if segments > 1 else inner.count
        starts = named(self.net, [w[:, :, : segments * chunks : chunks] for w in written.weights])
        first = self._before(
            state.before, tree.map(lambda w: w[:, :, 0], starts), valid[:, 0], first=True
        )
        starts = tree.map(lambda w, f: torch.cat([f.unsqueeze(2), w[:, :, 1:]], 2), starts, first)
        read = read_start(self.net, starts, q.unflatten(2, (segments, size)))
        context = self._context(read.flatten(2, 3)).unflatten(1, (segments, size))
        y, cache = self._attend(u, context, has_first=True)
        y = y.flatten(1, 2)
        norm = rms_norm(self.params["norm_memory"], y)
        projected = layer.project(self.memory_params, "q", norm, y.dtype)
        held = valid.sum((1, 2)).long()
        projected, tail = self._convolve_output("q", projected, state.output_tail, self.layout.start, held)
        query = layer.heads_of(self.config.memory, "q", projected)[0]
        o = self._gate(y, inner.take(read_slots(self.net, written, c, inner.place(query))))
        position = (state.memory.position + self.tokens) % self.config.memory.chunk_size
        memory = state_after(self.net, written, position)
        before = self._last_before(starts)
        return o.unflatten(1, (segments, size)), memory, before, cache, tail, total

    # The steps.

    def _convolve_input(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Over u, in token order: [B, T, n H d] -> the same, and the new tail."""
        if not self.config.memory.conv_width:
            return rows, self.state.input_tail
        extended = extend(self.state.input_tail, rows)
        mixed = convolve(layer.taps_of(self.memory_params, self.from_input), extended)
        return mixed, extended[:, extended.shape[1] - self.state.input_tail.shape[1] :]

    def _convolve_output(
        self, names: str, rows: Tensor, tail: Tensor, start: Tensor, held: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Over y, in slots [B, slots, n H d] whose ``held`` tokens begin at slot ``start``."""
        width = self.config.memory.conv_width
        if not width:
            return rows, tail
        if self.aligned or self.single:
            extended = extend(tail, rows)
        else:
            extended = extend_at(tail, rows, start)
        end = start + held
        return convolve(layer.taps_of(self.memory_params, names), extended), tail_at(extended, end, width)

    def _before(self, before: Weights, weights: Weights, valid: Tensor, first: bool) -> Weights:
        """The weights at a segment's start: the memory's own where its first slot holds a token, else as carried."""
        if self.aligned and first:
            return weights
        starts = (self.state.position == 0) if self.single else valid[:, 0] > 0
        return tree.map(
            lambda w, b: torch.where(per_head(starts, w), w, b), weights, before
        )

    def _last_before(self, starts: Weights) -> Weights:
        """Of the weights at every segment's start [B, H, R, ...], those of the segment of the last token."""
        if self.single or self.aligned:
            return tree.map(lambda w: w[:, :, -1], starts)
        last = (self.layout.start + self.tokens - 1) // self.layout.size
        return tree.map(
            lambda w: torch.gather(w, 2, per_head(last, w[:, :, :1]).expand_as(w[:, :, :1])).squeeze(2), starts
        )

    def _context(self, read: Tensor) -> Tensor:
        """Reads [B, H, slots, d] -> context tokens [B, slots, D]."""
        return linear(self.memory_params["context_out"], layer.merge_heads(read), read.dtype)

    def _gate(self, y: Tensor, read: Tensor) -> Tensor:
        """y [B, slots, D] times 2 sigmoid of the read [B, H, slots, d]."""
        gate = linear(self.memory_params["gate_out"], layer.merge_heads(read), y.dtype)
        return y * 2 * torch.sigmoid(gate)

    def _write(self, memory: MemoryState, k: Tensor, v: Tensor, x: Tensor, valid: Tensor) -> tuple[Any, ...]:
        """Writes k, v [B, H, slots, d], gates from x [B, slots, D], valid [B, slots].

        Returns what was written, its coefficients, the layout in chunks, and the sums of the metrics.
        """
        config = self.config.memory
        inner = slots(torch.zeros_like(memory.position), k.shape[2], config.chunk_size, aligned=True)
        gates = layer.gates_of(self.memory_params["gates"], config, x)
        held = valid.to(gates.forget.dtype).unsqueeze(1).expand(k.shape[:3])
        in_chunks = inner.place(held)
        refresh = in_chunks[..., 0]
        if self.single:
            refresh = (memory.position % config.chunk_size == 0).to(held.dtype).unsqueeze(-1)
        written, c = write_slots(
            self.net, memory, inner.place(k), inner.place(v),
            Gates(*(inner.place(gate) for gate in gates)), in_chunks, refresh, config.clip,
        )  # fmt: skip
        measured = (inner.take(written.loss), *gates)
        sums = [torch.sum(value.detach() * held) for value in measured]
        dropped = torch.sum((1 - written.kept.detach()) * in_chunks)
        return written, c, inner, torch.stack([*sums, dropped, held.sum()]).to(torch.float32)

    def _attend(self, u: Tensor, context: Tensor, has_first: bool) -> tuple[Tensor, SegmentCache]:
        """Attention inside segments: u, context [B, R, S, D] -> (y [B, R, S, D], keys and values [B, R, heads, S, .])."""
        config, params, cache = self.config, self.params["attention"], self.state.cache
        batch, segments, size, _ = u.shape
        start = self.state.position.reshape(-1, 1, 1, 1, 1)
        positions = start[..., 0] if self.single else torch.arange(size, device=u.device)

        def heads(weight: Tensor, x: Tensor) -> Tensor:
            return linear(weight, x, u.dtype).unflatten(-1, (config.heads, -1)).transpose(2, 3)

        query = rotate(heads(params["wq"], u), positions)
        new = SegmentCache(
            rotate(heads(params["wk"], context), positions), heads(params["wv"], context),
            rotate(heads(params["wk"], u), positions), heads(params["wv"], u),
        )  # fmt: skip
        if self.single:
            here = torch.arange(config.mac.segment, device=u.device).unsqueeze(-1) == start
            new = SegmentCache(
                *(torch.where(here, n, old.unsqueeze(1)) for n, old in zip(new, cache, strict=True))
            )
        elif has_first and not self.aligned:
            earlier = torch.arange(size, device=u.device).unsqueeze(-1) < start
            merged = (
                torch.where(earlier, old.unsqueeze(1), n[:, :1]) for n, old in zip(new, cache, strict=True)
            )
            new = SegmentCache(*(torch.cat([m, n[:, 1:]], 1) for m, n in zip(merged, new, strict=True)))
        slot = torch.arange(new.keys.shape[-2], device=u.device)
        seen = slot <= (start if self.single else slot.unsqueeze(-1))
        always = torch.ones(*seen.shape[:-1], config.persistent, dtype=torch.bool, device=u.device)
        mask = torch.cat([always, seen, seen], -1)

        def keys_of(weight: Tensor, *parts: Tensor) -> Tensor:
            fixed = linear(weight, self.params["persistent"], u.dtype).unflatten(-1, (config.heads, -1)).transpose(0, 1)
            fixed = fixed.expand(batch, segments, *fixed.shape)
            return torch.cat([fixed, *parts], -2).flatten(0, 1)

        y = attention(
            query.flatten(0, 1),
            keys_of(params["wk"], new.context_keys, new.keys),
            keys_of(params["wv"], new.context_values, new.values),
            mask.flatten(0, 1) if self.single else mask,
            config.attention,
        )
        return y.unflatten(0, (batch, segments)).transpose(2, 3).flatten(3), new

    def _trim(self, cache: SegmentCache, filled: Tensor) -> SegmentCache:
        """Of keys and values [B, R, heads, S, .], the last token's segment, zero from slot ``filled`` [B] on."""
        size = self.config.mac.segment
        keep = torch.arange(size, device=filled.device) < filled.unsqueeze(-1)
        keep = keep[:, None, :, None]

        def last(x: Tensor) -> Tensor:
            if self.single or self.aligned:
                x = x[:, -1]
                x = F.pad(x, (0, 0, 0, size - x.shape[2]))
            else:
                index = ((self.layout.start + self.tokens - 1) // size).reshape(-1, 1, 1, 1, 1)
                x = torch.gather(x, 1, index.expand(-1, 1, *x.shape[2:])).squeeze(1)
            return torch.where(keep, x, 0)

        return SegmentCache(*(last(x) for x in cache))
