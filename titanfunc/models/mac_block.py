"""One MAC block over one piece of text: what each of its segments does.

Letters: B batch, T tokens, D features, R segments, S slots a segment, H memory heads, d memory head size,
P persistent tokens. The model and its formulas are in models/mac.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc import tree
from titanfunc.config import ModelConfig
from titanfunc.memory import layer
from titanfunc.memory.chunked import write
from titanfunc.memory.network import MemoryNet, Weights
from titanfunc.memory.passes import Layout, Pass, read_at
from titanfunc.memory.recurrent import per_head
from titanfunc.memory.slots import slots
from titanfunc.memory.state import MemoryState, init_state
from titanfunc.models.base import Params, projection
from titanfunc.models.mac_piece import MACState, Piece, SegmentCache
from titanfunc.nn import Product, convolve, extend, extend_at, linear, of_document, rms_norm, rotate, tail_at
from titanfunc.ops.attention import attention
from titanfunc.ops.segment_attention import segment_attention


class _Own(NamedTuple):
    """Queries, keys and values made from a block's input, each [B, R, heads, S, D / heads]."""

    queries: Tensor
    keys: Tensor
    values: Tensor


def streams(config: ModelConfig) -> tuple[str, str]:
    """Which of q, k, v are projected from the block's input u, and which from the attention's output y."""
    return ("q", "qkv") if config.mac.write == "attention" else ("qkv", "q")


class Block:
    """One block over one piece: what its steps share, so that each is a short method."""

    def __init__(self, params: Params, config: ModelConfig, net: MemoryNet, state: MACState, piece: Piece) -> None:
        self.params, self.config, self.net, self.state, self.piece = params, config, net, state, piece
        self.memory_params: Params = params.get("memory", {})
        self.from_input, self.from_output = streams(config)
        self.project = projection(config)

    def __call__(self, x: Tensor) -> tuple[Tensor, MACState, Tensor | None]:
        """x [B, T, D] -> (x, new state, sums of the metrics), before the feed-forward."""
        config, params, piece, state = self.config, self.params, self.piece, self.state
        u = rms_norm(params["norm_attention"], x)
        position = piece.layout.end_position(config.mac.segment)
        if not self.memory_params:
            y, cache = self._attend(self._own_keys(piece.layout.place(u)), None, True)
            new = state._replace(cache=self._trim(cache, position), position=position)
            return x + self.project(params["attention"]["wo"], piece.layout.take(y), x.dtype), new, None
        rows = linear(layer.join(self.memory_params, self.from_input), u, u.dtype)
        rows, input_tail = self._convolve_input(rows)
        place = piece.layout.place
        pass_ = self._write_attention if config.mac.write == "attention" else self._write_input
        o, memory, before, cache, output_tail, sums = pass_(place(u), place(rows))
        x = x + self.project(params["attention"]["wo"], piece.layout.take(o), x.dtype)
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
        if self.config.mac.context == "inclusive":
            read = inner.take(written.read(inner.place(q), "inclusive"))
        else:
            read = read_at(self.net, starts, q.unflatten(2, (segments, size))).flatten(2, 3)
        context = self._context(read, u.flatten(1, 2)).unflatten(1, (segments, size))
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
        if piece.aligned and piece.documents is None:
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
        return context if self.config.mac.context == "read" else context + u

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
        gates = layer.gates_of(self.memory_params["gates"], config, x)
        layout = self._chunks(memory, k.shape[2], segments, gates.forget.dtype)
        start = None if layout.restart is None else layer.initial_weights(self.memory_params, k.shape[0])
        written = write(
            self.net, memory, k, v, gates, layout, config.clip or None, config.rule, start, piece.writes,
            kernels=self.config.kernels,
        )  # fmt: skip
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
        rows = self.project(weight, u, u.dtype)
        parts = rows.unflatten(-1, (3, self.config.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        return _Own(rotate(parts[0], self.piece.rotary), rotate(parts[1], self.piece.rotary), parts[2])

    def _attend(self, own: _Own, context: Tensor | None, has_first: bool) -> tuple[Tensor, SegmentCache]:
        """Attention inside segments with context [B, R, S, D] (None: without): (y [B, R, S, D], keys and values
        [B, R, heads, S, .]).
        """
        config, piece, cache = self.config, self.piece, self.state.cache
        batch, segments = own.queries.shape[:2]
        weight = torch.cat([self.params["attention"]["wk"], self.params["attention"]["wv"]], -1)

        def keys_and_values(x: Tensor, product: Product) -> Tensor:
            heads = product(weight, x, own.queries.dtype).unflatten(-1, (2, config.heads, -1))
            return heads.movedim(-3, 0).transpose(-3, -2)

        none = own.keys[..., :0, :]
        context_keys, context_values = (none, none) if context is None else keys_and_values(context, self.project)
        if context is not None:
            context_keys = rotate(context_keys, piece.rotary)
        new = SegmentCache(context_keys, context_values, own.keys, own.values)
        if piece.single or (has_first and piece.moved):
            new = SegmentCache(*(self._with_earlier(x, old) for x, old in zip(new, cache, strict=True)))
        fixed = keys_and_values(self.params["persistent"], linear) if config.persistent else None
        if config.kernels != "reference" and not piece.single:  # one token has nothing to be tiled over
            q, *rest = (x.transpose(1, 2).flatten(2, 3) for x in (own.queries, *new))
            y = segment_attention(
                q, rest[2], rest[3], piece.size,
                (rest[0], rest[1]) if context is not None else None,
                (fixed[0], fixed[1]) if fixed is not None else None,
                kernels=config.kernels,
            )  # fmt: skip
            return y.unflatten(2, (segments, piece.size)).permute(0, 2, 3, 1, 4).flatten(3), new
        seen = [(new.context_keys, new.context_values), (new.keys, new.values)]
        if fixed is not None:
            fixed = fixed.unsqueeze(1).unsqueeze(1)
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
