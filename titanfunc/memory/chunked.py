"""The chunked form: many tokens at once, exact, without a weight matrix per token.

Letters: B batch, H memory heads, T tokens, N chunks, C tokens a chunk, D head size. Inside a chunk every
inner gradient is taken at the anchor W_0 (the chunk's start), so that with g_i = grad loss_i(W_0)

    W_t = beta_t W_0 + f_t S_0 - sum_{i <= t} G[t, i] theta_i g_i
    A[t, i] = prod_{i < j <= t} (1 - alpha_j)    N[i, j] = prod_{j < l <= i} eta_l    G = A N    f = A m

and a read of layer l is linear attention over the rows of the chunk's gradients:

    Q W_t = beta (Q W_0) + f (Q S_0) - (G o (Q X^T)) Delta.

A slot without a token (padding, or a place before the first token of a piece that starts inside a chunk) changes
nothing: alpha 0, eta 1, theta 0 and no addition of momentum. Source: Titans (arXiv 2501.00663), section 3.2.
What a write leaves behind is a Pass: memory/chunk_rule.py and memory/any_network.py make others of the same kind.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.config import PER_TOKEN, WriteRule
from titanfunc.memory.any_network import write_any
from titanfunc.memory.chunk_rule import write_whole_chunks
from titanfunc.memory.coefficients import Coefficients, at_the_end, coefficients, shifted
from titanfunc.memory.network import MemoryNet, Weights, matrices_and_biases, named
from titanfunc.memory.passes import Layout, Pass
from titanfunc.memory.recurrent import per_head
from titanfunc.memory.state import Gates, MemoryState, check_inputs, finite_gates, nothing_pending
from titanfunc.ops.backend import implementation, refuse_unless
from titanfunc.ops.memory_read import memory_read, takes
from titanfunc.ops.memory_write import memory_write
from titanfunc.ops.memory_write_kernels import takes_small
from titanfunc.ops.memory_write_read import memory_write_read
from titanfunc.ops.objective import objective_of


def scan(
    net: MemoryNet,
    state: MemoryState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    chunk_size: int = 64,
    *,
    read: str = "inclusive",
    clip: float | None = None,
    aligned: bool = False,
    rule: WriteRule = PER_TOKEN,
    kernels: str = "reference",
) -> tuple[Tensor, MemoryState]:
    """:func:`scan_recurrent` with the same chunk_size, fast: q, k, v [B, H, T, D] -> (y [B, H, T, D], new state).

    An MLP memory takes the closed form, with matrix products in k's dtype; any other network its per-token gradients
    from torch.func, in the dtype of its weights (T copies of them under the per-token rule). aligned: the caller's
    word that every position in ``state`` is 0 (a fresh state), which saves a chunk of work. rule: objective, per-token
    or per-chunk writes, outer gradient. kernels: "triton" writes an MLP memory with kernels (see :func:`write`), and
    reads it with them where it is wide, or small in short chunks. Raises ValueError for wrong shapes, a wrong
    ``read``, a chunk_size below 1, or what the kernels do not take.
    """
    check_inputs(net, state, q, k, v, gates, chunk_size, read, clip, rule)
    layout = Layout.of(state.position, k.shape[2], chunk_size, aligned, dtype=gates.forget.dtype)
    answered = write_and_read(net, state, q, k, v, gates, layout, clip, rule, read, kernels=kernels)
    return layout.take(answered.reads), answered.state


class Answered(NamedTuple):
    """A write of N chunks and its reads [B, H, N, C, D], each token's at itself; the rest as in Pass."""

    reads: Tensor
    state: MemoryState
    loss: Tensor
    kept: Tensor


def write_and_read(
    net: MemoryNet,
    state: MemoryState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    layout: Layout,
    clip: float | None,
    rule: WriteRule,
    how: str,
    initial: Weights | None = None,
    writes: bool = True,
    kernels: str = "reference",
) -> Answered:
    """:func:`write`, and what it says of queries q [B, H, T, D], read "inclusive" or "exclusive".

    Kernels do both at once where a memory is wide, and never make the cotangents of its histories.
    """
    plain = _in_chunks(rule, layout) and rule.outer_gradient != "none" and writes and layout.restart is None
    at_once = kernels == "triton" and plain and net.depth > 0 and q.dtype == k.dtype
    if not at_once or takes_small(net.depth, layout.slots.size, k.shape[-1], state.weights["w0"].shape[-1], k.dtype):
        written = write(net, state, k, v, gates, layout, clip, rule, initial, writes, kernels)
        return Answered(written.read(layout.place(q), how), *written[1:4])
    placed = Gates(*(layout.place(gate) for gate in finite_gates(gates)))
    rows, c = _rows(layout.place(k), layout.place(v), placed, layout, rule)
    leaves = [leaf for part in state[:3] for leaf in matrices_and_biases(net, part)]
    seen = shifted(c) if how == "exclusive" else c
    both = memory_write_read(
        [*leaves, *rows], layout.place(q), seen.keep_weights, seen.momentum_to_weights, seen.to_weights,
        depth=net.depth, clip=clip or 0.0, objective=objective_of(rule, v.shape[-1]),
        first_order=rule.outer_gradient == "first_order", kernels=kernels,
    )  # fmt: skip
    after = _after(net, both.last_weights, both.last_momentum, both.anchor, layout, rule)
    return Answered(both.y, after, both.loss, both.kept)


def write(
    net: MemoryNet,
    state: MemoryState,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    layout: Layout,
    clip: float | None,
    rule: WriteRule,
    initial: Weights | None = None,
    writes: bool = True,
    kernels: str = "reference",
) -> Pass:
    """Writes k, v [B, H, T, D] with gates [B, H, T], laid out in chunks, and says how to read what was written.

    initial: the weights [B, H, ...] from which the memory of a new document begins (needed if the layout has any).
    writes: False leaves weights, momentum and what is pending as they are, and reads them; only the place in the chunk
    moves on. kernels: see ops/memory_write.py; "triton" raises ValueError for a rule or network that it does not take.
    Under the per-chunk rule it writes full chunks; a piece that may begin or end within one is written in plain
    torch. By kernels a write whose gradient alone overflows is left out, but its theta stays in the chunk's mean.
    """
    implementation("memory_write", kernels)  # a name that means something
    by_kernels = net.depth > 0 and rule.optimizer == "gradient" and not rule.chunk_clip
    refuse_unless(
        kernels == "reference" or by_kernels, "memory_write", "rule, net",
        "an MLP memory, optimizer 'gradient' and no chunk_clip",
        f"depth {net.depth}, {rule.optimizer!r} and {rule.chunk_clip}",
    )  # fmt: skip
    if not writes:
        still = Gates(0 * gates.forget, gates.momentum_decay, 0 * gates.inner_lr)
        resting = state._replace(momentum=tree.zeros_like(state.momentum), pending=tree.zeros_like(state.pending))
        seen = write(net, resting, k, v, still, layout, clip, rule, initial, kernels=kernels)
        return seen._replace(state=_unwritten(state, seen.state, layout))
    if rule.outer_gradient == "none":
        state, k, v, gates = (tree.map(torch.Tensor.detach, each) for each in (state, k, v, gates))
        initial = None if initial is None else tree.map(torch.Tensor.detach, initial)
    placed = Gates(*(layout.place(gate) for gate in finite_gates(gates)))
    rows = layout.place(k), layout.place(v)
    if rule.write == "chunk" and not (kernels == "triton" and _in_chunks(rule, layout)):
        written = write_whole_chunks(net, state, *rows, placed, layout, clip, rule, initial)
    elif net.depth:
        written = _write_mlp(net, state, *rows, placed, layout, clip, rule, initial, kernels)
    else:
        written = write_any(net, state, *rows, placed, layout, clip, rule, initial)
    return written


def _unwritten(before: MemoryState, after: MemoryState, layout: Layout) -> MemoryState:
    """The state ``before`` a pass that wrote nothing, at the place ``after`` it; the fresh one of a new document where
    one began."""
    kept = before._replace(position=after.position)
    if layout.restart is None:
        return kept
    begun = layout.restart.amax(-1) > 0
    return tree.map(lambda new, old: torch.where(per_head(begun, old), new, old), after, kept)


def _in_chunks(rule: WriteRule, layout: Layout) -> bool:
    """Whether the closed form of a chunk is all that ``rule`` does: the per-chunk rule needs full chunks for that."""
    full = layout.valid is None and layout.restart is None and layout.slots.size == layout.chunk_size
    return rule.write == "token" or (full and rule.optimizer == "gradient" and not rule.chunk_clip)


def _rows(k: Tensor, v: Tensor, gates: Gates, layout: Layout, rule: WriteRule) -> tuple[list[Tensor], Coefficients]:
    """What memory_write takes behind the state, for k, v [B, H, N, C, D] and gates [B, H, N, C], and the coefficients
    of which it is made.

    Under the per-chunk rule theta stands in the coefficients. A write that is not finite is left out of its mean, but
    for one whose gradient alone overflows: that is known too late.
    """
    valid = layout.valid
    if rule.write == "chunk":
        whole = torch.isfinite(k).all(-1) & torch.isfinite(v).all(-1) & torch.isfinite(gates.inner_lr)
        rate = torch.where(torch.isfinite(gates.inner_lr), 1.0, gates.inner_lr)
        c = at_the_end(gates.forget, gates.momentum_decay, torch.where(whole, gates.inner_lr, 0))
    else:
        rate = gates.inner_lr if valid is None else torch.where(valid > 0, gates.inner_lr, 0)
        c = coefficients(gates.forget, gates.momentum_decay, valid)
    refresh = torch.ones_like(gates.forget[..., 0]) if layout.refresh is None else layout.refresh
    last = (c.keep_weights[..., -1], c.momentum_to_weights[..., -1], c.keep_momentum[..., -1])
    return [k, v, rate, c.to_weights[..., -1, :], c.to_momentum[..., -1, :], *last, refresh], c


def _after(
    net: MemoryNet,
    weights: list[Tensor],
    momentum: list[Tensor],
    anchor: list[Tensor],
    layout: Layout,
    rule: WriteRule,
) -> MemoryState:
    """The state after a write, of leaves [B, H, ...]; under the per-chunk rule it stands at a chunk's start."""
    at = weights if rule.write == "chunk" else anchor
    state = MemoryState(named(net, weights), named(net, momentum), named(net, at), layout.position_after)
    return state._replace(pending=nothing_pending(state)) if rule.write == "chunk" else state


def _write_mlp(
    net: MemoryNet,
    state: MemoryState,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    layout: Layout,
    clip: float | None,
    rule: WriteRule,
    initial: Weights | None,
    kernels: str,
) -> Pass:
    """Chunks in closed form in an MLP memory, by the opaque operation of ops/memory_write.py."""
    rows, c = _rows(k, v, gates, layout, rule)
    weights, momentum, anchor = (matrices_and_biases(net, leaves) for leaves in state[:3])
    written = memory_write(
        weights, momentum, anchor, *rows, depth=net.depth, clip=clip or 0.0, objective=objective_of(rule, v.shape[-1]),
        first_order=rule.outer_gradient == "first_order",
        initial=matrices_and_biases(net, initial) if layout.restart is not None and initial is not None else (),
        restart=layout.restart, kernels=kernels,
    )  # fmt: skip
    after = _after(net, written.last_weights, written.last_momentum, written.anchor, layout, rule)

    def read(q: Tensor, how: str) -> Tensor:
        seen = shifted(c) if how == "exclusive" else c
        small = takes(net.depth, q.shape[-2], q.shape[-1], written.weights[0].shape[-1], q.dtype)
        return memory_read(
            q, written.weights, written.momentum, written.inputs, written.errors,
            seen.keep_weights, seen.momentum_to_weights, seen.to_weights,
            kernels=kernels if small else "reference",
        )  # fmt: skip

    starts = [past.to(w.dtype) for past, w in zip(written.weights, weights, strict=True)]
    return Pass(named(net, starts), after, written.loss, written.kept, read)
