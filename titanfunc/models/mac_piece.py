"""Where a piece of text lies in a MAC's segments, and what a block carries from piece to piece.

Letters: B batch, T tokens, R segments, S slots a segment, H memory heads, P persistent tokens, D features, K taps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc.config import ModelConfig
from titanfunc.memory.network import Weights
from titanfunc.memory.slots import Documents, Slots, slots
from titanfunc.memory.state import MemoryState
from titanfunc.models.base import Call
from titanfunc.nn import rotary_table


class SegmentCache(NamedTuple):
    """Keys and values of the current segment, rotated, zero where nothing was read yet: each [B, heads, S,
    D / heads]; those of the context (no slots in a block without memory) and the block's own.
    """

    context_keys: Tensor
    context_values: Tensor
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


class Piece:
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
        """Who sees whom: ``fixed`` persistent tokens, the context, if any, and the segment up to oneself."""
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
