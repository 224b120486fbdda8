"""What a memory carries from token to token, and the gates that drive it.

Letters: B batch, H memory heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.config import PER_TOKEN, WriteRule
from titanfunc.memory.network import MemoryNet, Weights


class Pending(NamedTuple):
    """What a chunk that is not full yet will write, under ``WriteRule(write="chunk")``.

    gradient: the sum of its inner gradients, leaves [B, H, ...]. gates: the sums of alpha, eta, theta, [B, H, 3].
    """

    gradient: Weights
    gates: Tensor


class MemoryState(NamedTuple):
    """One memory for each sample and head.

    weights, momentum: W and S, leaves [B, H, ...]. anchor: the weights at the start of the current chunk, where
    inner gradients are taken, leaves [B, H, ...]. position: tokens read in the current chunk, int64 [B, H].
    pending: a Pending under the per-chunk rule, else ().
    """

    weights: Weights
    momentum: Weights
    anchor: Weights
    position: Tensor
    pending: Pending | tuple[()] = ()


class Gates(NamedTuple):
    """Per token and head, each [B, H, T], float32 or wider.

    forget: alpha in (0, 1). momentum_decay: eta in (0, 1). inner_lr: theta >= 0, per unit of squared error.
    At alpha = 1 or eta = 0 the chunked form still gives the right values, but no gradient to that gate.
    """

    forget: Tensor
    momentum_decay: Tensor
    inner_lr: Tensor


def init_state(weights: Weights, batch_size: int, rule: WriteRule = PER_TOKEN) -> MemoryState:
    """A fresh state [B, H, ...] for every sample from initial weights [H, ...]; the momentum is zero.

    rule: how the memory will write (it decides whether there is something pending). Gradients flow from the state
    back to ``weights``. Raises ValueError for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
    start = tree.map(lambda leaf: leaf.unsqueeze(0).expand(batch_size, *leaf.shape), weights)
    first = tree.leaves(start)[0]
    position = torch.zeros(first.shape[:2], dtype=torch.int64, device=first.device)
    state = MemoryState(start, tree.zeros_like(start), start, position)
    return state._replace(pending=nothing_pending(state)) if rule.write == "chunk" else state


def nothing_pending(state: MemoryState) -> Pending:
    """An empty sum, leaves [B, H, ...], for a state that stands at a chunk's start."""
    first = tree.leaves(state.weights)[0]
    return Pending(tree.zeros_like(state.weights), first.new_zeros((*first.shape[:2], 3)))


def finite_gates(gates: Gates) -> Gates:
    """Gates [B, H, T] under which a token whose gates are not finite neither forgets nor decays, and whose write is
    dropped (its inner_lr is NaN, which every form drops and counts)."""
    forget, decay = torch.isfinite(gates.forget), torch.isfinite(gates.momentum_decay)
    return Gates(
        torch.where(forget, gates.forget, 0),
        torch.where(decay, gates.momentum_decay, 1),
        torch.where(forget & decay, gates.inner_lr, float("nan")),
    )


def check_inputs(
    net: MemoryNet,
    state: MemoryState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    chunk_size: int,
    read: str,
    clip: float | None,
    rule: WriteRule = PER_TOKEN,
) -> None:
    """Raises ValueError, naming the argument, unless q, k, v are [B, H, T, D], gates [B, H, T], states [B, H, ...]."""
    if k.ndim != 4:
        raise ValueError(f"k: wanted [batch, heads, tokens, head size], got shape {tuple(k.shape)}")
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape != k.shape:
            raise ValueError(f"{name}: wanted the shape of k {tuple(k.shape)}, got {tuple(tensor.shape)}")
    if k.shape[2] == 0:
        raise ValueError("k: wanted at least one token, got none")
    for name, gate in zip(Gates._fields, gates, strict=True):
        if gate.shape != k.shape[:3]:
            raise ValueError(f"gates.{name}: wanted {tuple(k.shape[:3])}, got {tuple(gate.shape)}")
        if gate.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"gates.{name}: wanted float32 or float64, got {gate.dtype}")
    for name, leaf in tree.named_leaves(state.weights).items():
        if leaf.shape[:2] != k.shape[:2]:
            raise ValueError(f"state.weights.{name}: wanted {tuple(k.shape[:2])} in front, got {tuple(leaf.shape)}")
    if net.depth and state.weights["w0"].shape[-2] != k.shape[-1]:
        raise ValueError(f"k: wanted head size {state.weights['w0'].shape[-2]} (the memory's), got {k.shape[-1]}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: wanted at least 1, got {chunk_size}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: wanted None or a positive norm, got {clip}")
    if read not in ("inclusive", "exclusive"):
        raise ValueError(f"read: wanted 'inclusive' or 'exclusive', got {read!r}")
    if rule.write == "token" and tree.leaves(state.pending):
        raise ValueError("state.pending: wanted () (write='token' leaves nothing pending), got a chunk's sum")
