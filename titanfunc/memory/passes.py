"""What every form of the chunked write shares: how the tokens lie, and what a write leaves behind.

Letters: B batch, H memory heads, T tokens, N chunks, C slots a chunk, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.memory.network import MemoryNet, Weights, apply_mlp
from titanfunc.memory.recurrent import per_head
from titanfunc.memory.slots import Documents, Slots, slots
from titanfunc.memory.state import MemoryState


class Pass(NamedTuple):
    """A write of N chunks.

    starts: the weights at each chunk's start, leaves [B, H, N, ...]. state: after it.
    loss: [B, H, N, C], the inner loss where it is taken. kept: [B, H, N, C], 0 where a write was dropped.
    read: (queries [B, H, N, C, D], "inclusive" or "exclusive") -> reads of the same shape, token by token.
    """

    starts: Weights
    state: MemoryState
    loss: Tensor
    kept: Tensor
    read: Callable[[Tensor, str], Tensor]


class Layout(NamedTuple):
    """How tokens lie in chunks, and what each chunk does.

    slots: places. chunk_size: tokens of a full chunk. valid: [B, H, N, C], 1 where a slot holds a token (None: all
    do). refresh: [B, H, N], 1 where a chunk takes its own start as anchor (None: all do). closes: bool [B, H, N],
    where the chunk's last token is here. restart: [B, H, N], 1 where a document begins (None: there are none).
    position_after: int64 [B, H].
    """

    slots: Slots
    chunk_size: int
    valid: Tensor | None
    refresh: Tensor | None
    closes: Tensor
    restart: Tensor | None
    position_after: Tensor

    @staticmethod
    def of(
        position: Tensor,
        tokens: int,
        chunk_size: int,
        aligned: bool,
        documents: Documents | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Layout:
        """The layout of ``tokens`` that begin at ``position`` [B, H] of a chunk; flags in ``dtype``."""
        if tokens == 1 and not aligned and documents is None:
            # One token needs no search for its slot.
            place = position % chunk_size
            closes = (place == chunk_size - 1).unsqueeze(-1)
            one = slots(position, 1, 1, aligned=True)
            return Layout(
                one, chunk_size, None, (place == 0).unsqueeze(-1).to(dtype), closes, None, (place + 1) % chunk_size
            )
        layout = slots(position, tokens, chunk_size, aligned, documents)
        restart = None if layout.restart is None else layout.restart.to(dtype)
        if aligned and documents is None and layout.size * layout.count == tokens:
            closes = torch.full((1, 1, layout.count), layout.size == chunk_size, device=position.device)
            closes = closes.expand(*position.shape, -1)
            return Layout(layout, chunk_size, None, None, closes, None, (position * 0 + tokens) % chunk_size)
        valid = layout.valid(dtype)
        closes = (valid[..., -1] > 0) & (layout.size == chunk_size)
        after = (
            (position * 0 + tokens) % chunk_size if aligned and documents is None else layout.end_position(chunk_size)
        )
        return Layout(layout, chunk_size, valid, valid[..., 0], closes, restart, after)

    def place(self, x: Tensor) -> Tensor:
        """[B, H, T, ...] -> [B, H, N, C, ...]."""
        return self.slots.place(x)

    def take(self, x: Tensor) -> Tensor:
        """[B, H, N, C, ...] -> [B, H, T, ...]."""
        return self.slots.take(x)


def read_at(net: MemoryNet, weights: Weights, q: Tensor) -> Tensor:
    """y = M(W; q) for queries [*L, C, D] and weights [*L, ...] that stand still; y like q."""
    if net.depth:
        return apply_mlp(net, weights, q)
    apply = net.apply
    for _ in range(q.ndim - 2):
        apply = torch.func.vmap(apply)
    return apply(weights, q.to(next(iter(weights.values())).dtype)).to(q.dtype)


def restarted(
    layout: Layout, chunk: int, initial: Weights | None, weights: Weights, momentum: Weights
) -> tuple[Weights, Weights]:
    """Weights and momentum [B, H, ...] at the start of a chunk: ``initial`` and zero where a document begins."""
    if layout.restart is None:
        return weights, momentum
    anew = layout.restart[:, :, chunk] > 0
    return (
        tree.map(lambda first, w: torch.where(per_head(anew, w), first, w), initial, weights),
        tree.map(lambda s: torch.where(per_head(anew, s), 0, s), momentum),
    )
