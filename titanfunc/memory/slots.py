"""Where tokens lie in blocks of fixed size: chunks of a memory, segments of a model.

A block is S slots. Rows may begin anywhere in a block, and documents packed in one row each begin a block of
their own, so that what is computed in blocks for a document does not depend on its neighbours.
Letters: *L leading axes (samples, or samples and heads), T tokens, N blocks, S slots a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents(NamedTuple):
    """Documents packed in rows. starts: bool [*L, T], true where a token begins one. most: at most so many of them,
    whole or cut, lie in one row (a model answers a row with more with NaN)."""

    starts: Tensor
    most: int

    def age(self, before: Tensor) -> Tensor:
        """int64 [*L, T]: how many tokens of its own document come before each token; ``before`` int64 [*L] came
        before the row."""
        place = torch.arange(self.starts.shape[-1], device=self.starts.device)
        first = torch.where(self.starts, place, -1).cummax(-1).values
        return torch.where(first >= 0, place - first, place + before.unsqueeze(-1))

    def over_heads(self, heads: int) -> Documents:
        """The same for [B, heads, T], from [B, T]."""
        starts = self.starts.unsqueeze(1)
        return Documents(starts.expand(-1, heads, -1), self.most)


class Slots(NamedTuple):
    """How T tokens lie in ``count`` blocks of ``size`` slots.

    tokens: T. aligned: token t lies in slot t. Otherwise places int64 [*L, T] is the slot of each token, source int64
    [*L, count * size] the token of each slot, held bool of the same shape whether there is one. restart: bool
    [*L, count], the blocks in which a document begins (None: no documents).
    """

    tokens: int
    size: int
    count: int  # type: ignore[assignment]  # a field in place of tuple.count
    aligned: bool
    position: Tensor
    places: Tensor | None = None
    source: Tensor | None = None
    held: Tensor | None = None
    restart: Tensor | None = None

    def place(self, x: Tensor) -> Tensor:
        """[*L, T, ...] -> [*L, count, S, ...]; zeros in the slots that hold no token."""
        axis, total = self.position.ndim, self.count * self.size
        if self.source is None or self.held is None:
            padding = [0, 0] * (x.ndim - axis - 1) + [0, total - self.tokens]
            padded = F.pad(x, padding) if total > self.tokens else x
        else:
            padded = torch.where(_like(self.held, x), _take(x, self.source), 0)
        return padded.unflatten(axis, (self.count, self.size))

    def take(self, slots: Tensor) -> Tensor:
        """The inverse of ``place``: [*L, count, S, ...] -> [*L, T, ...]."""
        axis = self.position.ndim
        flat = slots.flatten(axis, axis + 1)
        if self.places is None:
            return flat.narrow(axis, 0, self.tokens)
        return _take(flat, self.places.clamp(max=self.count * self.size - 1))

    def valid(self, dtype: torch.dtype) -> Tensor:
        """[*L, count, S]: 1 where a slot holds a token, else 0."""
        held = self.held
        if held is None:
            slot = torch.arange(self.count * self.size, device=self.position.device)
            held = (slot < self.tokens).expand(*self.position.shape, -1)
        return held.to(dtype).unflatten(-1, (self.count, self.size))

    def last(self) -> Tensor:
        """int64 [*L]: the slot of the last token."""
        if self.places is None:
            return torch.full_like(self.position, self.tokens - 1)
        return self.places[..., -1].clamp(max=self.count * self.size - 1)

    def end_position(self, block: int) -> Tensor:
        """int64 [*L]: where in a block of ``block`` slots (a divisor of a larger one) the token after the last lies."""
        if self.places is None:
            return (self.position + self.tokens) % block
        return (self.places[..., -1] + 1) % block


def slots(position: Tensor, tokens: int, size: int, aligned: bool, documents: Documents | None = None) -> Slots:
    """The layout for ``tokens`` that begin at ``position`` [*L] of a block of ``size`` slots.

    aligned: the caller's word that every position is 0. A piece that may begin anywhere needs one block more.
    """
    if documents is not None:
        return _document_slots(position, tokens, size, aligned, documents)
    blocks = -(-tokens // size)
    if aligned:
        return Slots(tokens, min(size, tokens) if blocks == 1 else size, blocks, True, position)
    start = (position % size).unsqueeze(-1)
    token = torch.arange(tokens, device=position.device)
    source = torch.arange((blocks + 1) * size, device=position.device) - start
    held = (source >= 0) & (source < tokens)
    return Slots(tokens, size, blocks + 1, False, position, token + start, source.clamp(0, tokens - 1), held)


def _document_slots(position: Tensor, tokens: int, size: int, aligned: bool, documents: Documents) -> Slots:
    start = torch.zeros_like(position) if aligned else position % size
    most = documents.most + (0 if aligned else 1)
    count = max((tokens + most * (size - 1)) // size, 1)
    total = count * size
    place = documents.age(start) % size  # a document counts from its own start, the first one from where it stands
    opens = place == 0
    block = opens.to(torch.int64).cumsum(-1) - opens[..., :1].to(torch.int64)
    index = block * size + place
    token = torch.arange(tokens, device=position.device).expand(index.shape)
    empty = torch.full((*index.shape[:-1], total + 1), -1, dtype=torch.int64, device=position.device)
    source = torch.scatter(empty, -1, index.clamp(max=total), token)[..., :total]
    held = source >= 0
    source = source.clamp(min=0)
    begins = torch.gather(documents.starts, -1, source) & held
    restart = begins.unflatten(-1, (count, size))[..., 0]
    return Slots(tokens, size, count, False, position, index, source, held, restart)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [*L, T, ...] at index [*L, R] -> [*L, R, ...]."""
    axis = index.ndim - 1
    shape = index.shape + x.shape[axis + 1 :]
    return torch.gather(x, axis, _like(index, x).expand(shape))
