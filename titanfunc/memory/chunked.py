"""The chunked form: per-token writes and reads, exact, without a weight matrix per token.

Letters: B batch, H memory heads, T tokens, N chunks, C tokens a chunk, D head size. Inside a chunk every
inner gradient is taken at the anchor W_0 (the chunk's start), so that with g_i = grad loss_i(W_0)

    W_t = beta_t W_0 + f_t S_0 - sum_{i <= t} G[t, i] theta_i g_i
    A[t, i] = prod_{i < j <= t} (1 - alpha_j)    N[i, j] = prod_{j < l <= i} eta_l    G = A N    f = A m

and a read of layer l is linear attention over the rows of the chunk's gradients:

    Q W_t = beta (Q W_0) + f (Q S_0) - (G o (Q X^T)) Delta.

A slot without a token (padding, or a place before the first token of a piece that starts inside a chunk) changes
nothing: alpha 0, eta 1, theta 0 and no addition of momentum. Source: Titans (arXiv 2501.00663), section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc import tree
from titanfunc.memory.network import MemoryNet, Weights, matrices_and_biases, named
from titanfunc.memory.recurrent import clip_and_drop, inner_gradient, per_head
from titanfunc.memory.state import Gates, MemoryState, check_inputs, finite_gates
from titanfunc.ops.memory_write import Written, matmul, memory_write


class Coefficients(NamedTuple):
    """The gates of every chunk, multiplied out.

    to_weights G and to_momentum N: [B, H, N, C, C], lower triangular. keep_weights beta, momentum_to_weights f,
    keep_momentum m: [B, H, N, C].
    """

    to_weights: Tensor
    to_momentum: Tensor
    keep_weights: Tensor
    momentum_to_weights: Tensor
    keep_momentum: Tensor


def coefficients(forget: Tensor, momentum_decay: Tensor, valid: Tensor | None = None) -> Coefficients:
    """Coefficients of gates [B, H, N, C]; ``valid`` [B, H, N, C] is 1 where a slot holds a token, else 0 (None:
    all do).

    Products are exponentials of differences of cumulative logarithms, never quotients of products.
    """
    tiny = torch.finfo(forget.dtype).tiny
    log_keep = torch.log((1 - forget).clamp(min=tiny))
    log_decay = torch.log(momentum_decay.clamp(min=tiny))
    if valid is not None:
        log_keep, log_decay = log_keep * valid, log_decay * valid
    size = forget.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=forget.device).triu(1)
    # Cumulative sums as a matrix product: at these lengths as quick as a scan, and inductor fuses scans wrongly.
    until = (~later).to(forget.dtype).mT
    log_keep, log_decay = log_keep @ until, log_decay @ until

    def products(log: Tensor) -> Tensor:
        return torch.exp((log.unsqueeze(-1) - log.unsqueeze(-2)).masked_fill(later, float("-inf")))

    from_momentum = products(log_keep)
    if valid is not None:
        from_momentum = from_momentum * valid.unsqueeze(-2)
    to_momentum = products(log_decay)
    keep_momentum = torch.exp(log_decay)
    return Coefficients(
        from_momentum @ to_momentum,
        to_momentum,
        torch.exp(log_keep),
        (from_momentum @ keep_momentum.unsqueeze(-1)).squeeze(-1),
        keep_momentum,
    )


def shifted(c: Coefficients) -> Coefficients:
    """The coefficients of W_{t-1} in place of W_t, for exclusive reads; same shapes."""

    def down(x: Tensor, first: float) -> Tensor:
        return torch.cat([torch.full_like(x[..., :1], first), x[..., :-1]], -1)

    rows = torch.cat([torch.zeros_like(c.to_weights[..., :1, :]), c.to_weights[..., :-1, :]], -2)
    return c._replace(
        to_weights=rows, keep_weights=down(c.keep_weights, 1.0), momentum_to_weights=down(c.momentum_to_weights, 0.0)
    )


def write_slots(
    net: MemoryNet,
    state: MemoryState,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    valid: Tensor | None,
    refresh: Tensor | None,
    clip: float | None,
) -> tuple[Written, Coefficients]:
    """Writes k, v [B, H, N, C, D] with gates and ``valid`` [B, H, N, C] (None: every slot) into an MLP memory.

    refresh: [B, H, N], 1 where a chunk takes its own start as anchor (None: every chunk does).
    """
    rate = gates.inner_lr if valid is None else torch.where(valid > 0, gates.inner_lr, 0)
    if refresh is None:
        refresh = torch.ones_like(gates.forget[..., 0])
    c = coefficients(gates.forget, gates.momentum_decay, valid)
    weights, momentum, anchor = (matrices_and_biases(net, leaves) for leaves in state[:3])
    written = memory_write(
        weights, momentum, anchor, k, v, rate,
        c.to_weights[..., -1, :], c.to_momentum[..., -1, :],
        c.keep_weights[..., -1], c.momentum_to_weights[..., -1], c.keep_momentum[..., -1],
        refresh, depth=net.depth, clip=clip or 0.0,
    )  # fmt: skip
    return written, c


def state_after(net: MemoryNet, written: Written, position: Tensor) -> MemoryState:
    """The state [B, H, ...] that a write leaves, with ``position`` [B, H] as the new place in the chunk."""
    weights = named(net, [leaf[:, :, -1] for leaf in written.weights])
    momentum = named(net, [leaf[:, :, -1] for leaf in written.momentum])
    return MemoryState(weights, momentum, named(net, written.anchor), position)


def read_slots(net: MemoryNet, written: Written, c: Coefficients, q: Tensor) -> Tensor:
    """y = M(W_t; q_t) for queries and results [B, H, N, C, D], all chunks at once."""
    product, wide = q.dtype, c.keep_weights.dtype
    beta, f = c.keep_weights.unsqueeze(-1), c.momentum_to_weights.unsqueeze(-1)
    x = q.to(wide)
    for layer in range(net.depth):
        keys, errors = written.inputs[layer], written.errors[layer]
        start, pace = written.weights[layer][:, :, :-1], written.momentum[layer][:, :, :-1]
        scores = c.to_weights * matmul(x, keys.mT, product)
        y = beta * matmul(x, start, product) + f * matmul(x, pace, product) - matmul(scores, errors, product)
        if net.bias:
            start, pace = (
                past[net.depth + layer][:, :, :-1].unsqueeze(-2) for past in (written.weights, written.momentum)
            )
            y = y + beta * start + f * pace - matmul(c.to_weights, errors, product)
        x = F.silu(y) if layer < net.depth - 1 else y
    return x.to(q.dtype)


def read_start(net: MemoryNet, weights: Weights, q: Tensor) -> Tensor:
    """y = M(W; q) for queries [..., C, D] and weights [..., d_in, d_out] that stand still; y like q."""
    wide = weights["w0"].dtype
    x = q.to(wide)
    for layer in range(net.depth):
        x = matmul(x, weights[f"w{layer}"], q.dtype)
        if net.bias:
            x = x + weights[f"b{layer}"].unsqueeze(-2)
        x = F.silu(x) if layer < net.depth - 1 else x
    return x.to(q.dtype)


class Slots(NamedTuple):
    """How T tokens lie in blocks of S slots when each row starts at a place of its own.

    start: int64 [*L], the slot of the first token. tokens: T. size: S. count: blocks. aligned: start is known to be 0.
    """

    start: Tensor
    tokens: int
    size: int
    count: int  # type: ignore[assignment]  # a field in place of tuple.count
    aligned: bool

    def place(self, x: Tensor) -> Tensor:
        """[*L, T, ...] -> [*L, count, S, ...]; zeros in the slots that hold no token."""
        axis, total = self.start.ndim, self.count * self.size
        if self.aligned:
            padding = [0, 0] * (x.ndim - axis - 1) + [0, total - self.tokens]
            padded = F.pad(x, padding) if total > self.tokens else x
        else:
            source = torch.arange(total, device=x.device) - self.start.unsqueeze(-1)
            held = (source >= 0) & (source < self.tokens)
            padded = torch.where(_like(held, x), _take(x, source.clamp(0, self.tokens - 1)), 0)
        return padded.unflatten(axis, (self.count, self.size))

    def take(self, slots: Tensor) -> Tensor:
        """The inverse of ``place``: [*L, count, S, ...] -> [*L, T, ...]."""
        axis = self.start.ndim
        flat = slots.flatten(axis, axis + 1)
        if self.aligned:
            return flat.narrow(axis, 0, self.tokens)
        return _take(flat, torch.arange(self.tokens, device=slots.device) + self.start.unsqueeze(-1))

    def valid(self, dtype: torch.dtype) -> Tensor:
        """[*L, count, S]: 1 where a slot holds a token, else 0."""
        slot = torch.arange(self.count * self.size, device=self.start.device)
        start = self.start.unsqueeze(-1)
        held = (slot >= start) & (slot < start + self.tokens)
        return held.to(dtype).unflatten(-1, (self.count, self.size))


def slots(position: Tensor, tokens: int, size: int, aligned: bool) -> Slots:
    """The layout for ``tokens`` that begin at ``position`` [*L] of a block of ``size`` slots.

    A piece that may begin anywhere needs one block more than one that begins at a block's start.
    """
    blocks = -(-tokens // size)
    if aligned:
        return Slots(torch.zeros_like(position), tokens, min(size, tokens) if blocks == 1 else size, blocks, True)
    return Slots(position % size, tokens, size, blocks + 1, False)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x [*L, T, ...] at index [*L, R] -> [*L, R, ...]."""
    axis = index.ndim - 1
    shape = index.shape + x.shape[axis + 1 :]
    return torch.gather(x, axis, _like(index, x).expand(shape))


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
) -> tuple[Tensor, MemoryState]:
    """:func:`scan_recurrent` with the same chunk_size, fast: q, k, v [B, H, T, D] -> (y [B, H, T, D], new state).

    An MLP memory takes the closed form; any other network its per-token gradients from torch.func, a chunk
    at a time (chunk_size copies of its weights). Matrix products run in k's dtype. aligned: the caller's
    word that every position in ``state`` is 0 (a fresh state), which saves a chunk of work. Raises ValueError
    for wrong shapes, a wrong ``read``, or a chunk_size below 1.
    """
    check_inputs(net, state, q, k, v, gates, chunk_size, read, clip)
    gates = finite_gates(gates)
    tokens = k.shape[2]
    if tokens == 1 and not aligned:
        layout = slots(state.position, 1, 1, aligned=True)  # one token needs no search for its slot
        refresh = (state.position % chunk_size == 0).unsqueeze(-1)
    else:
        layout = slots(state.position, tokens, chunk_size, aligned)
        refresh = None
    wide = gates.forget.dtype
    valid = layout.valid(wide)
    refresh = valid[..., 0] if refresh is None else refresh.to(wide)
    placed = Gates(*(layout.place(gate) for gate in gates))
    qs, ks, vs = layout.place(q), layout.place(k), layout.place(v)
    position = (state.position % chunk_size + tokens) % chunk_size
    if not net.depth:
        y, weights, momentum, anchor = _scan_any(net, state, qs, ks, vs, placed, valid, refresh, read, clip)
        return layout.take(y), MemoryState(weights, momentum, anchor, position)
    written, c = write_slots(net, state, ks, vs, placed, valid, refresh, clip)
    y = read_slots(net, written, shifted(c) if read == "exclusive" else c, qs)
    return layout.take(y), state_after(net, written, position)


def _scan_any(
    net: MemoryNet,
    state: MemoryState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    valid: Tensor,
    refresh: Tensor,
    read: str,
    clip: float | None,
) -> tuple[Tensor, Weights, Weights, Weights]:
    """The chunked form of any network, in slots [B, H, N, C, D]: W_t is built for every token of one chunk at a
    time.
    """
    c = coefficients(gates.forget, gates.momentum_decay, valid)
    reading = shifted(c) if read == "exclusive" else c
    gradient_of = lambda w, k, v: inner_gradient(net, w, k, v)  # noqa: E731
    for axes in ((None, 0, 0), 0, 0):
        gradient_of = torch.func.vmap(gradient_of, in_dims=axes)
    apply = net.apply
    for _ in range(3):
        apply = torch.func.vmap(apply)
    weights, momentum, anchor = state[:3]
    wide = tree.leaves(weights)[0].dtype
    outputs = []
    for i in range(k.shape[2]):
        fresh = refresh[:, :, i] > 0
        anchor = tree.map(lambda w, a: torch.where(per_head(fresh, w), w, a), weights, anchor)  # noqa: B023
        gradient = gradient_of(anchor, k[:, :, i].to(wide), v[:, :, i].to(wide))
        gradient, rate = clip_and_drop(gradient, (gates.inner_lr * valid)[:, :, i], clip)
        step = tree.map(lambda g: per_head(rate, g) * g, gradient)  # noqa: B023

        def combine(w: Tensor | None, s: Tensor, g: Tensor, kw: Tensor, ks: Tensor, kg: Tensor) -> Tensor:
            """kw W + ks S - kg g, with kw, ks [B, H, R], kg [B, H, R, C], g [B, H, C, ...] -> [B, H, R, ...]."""
            summed = torch.matmul(kg, g.flatten(3)).unflatten(-1, g.shape[3:]) if g.ndim > 3 else kg @ g.unsqueeze(-1)
            summed = summed.reshape(*kg.shape[:3], *g.shape[3:])
            total = per_head(ks, summed) * s.unsqueeze(2) - summed
            return total if w is None else per_head(kw, summed) * w.unsqueeze(2) + total

        rows = [x[:, :, i] for x in (reading.keep_weights, reading.momentum_to_weights, reading.to_weights)]
        at_token = tree.map(lambda w, s, g: combine(w, s, g, *rows), weights, momentum, step)  # noqa: B023
        outputs.append(apply(at_token, q[:, :, i].to(wide)))
        last = [x[:, :, i, -1:] for x in (c.keep_weights, c.momentum_to_weights, c.to_weights)]
        decay = [x[:, :, i, -1:] for x in (c.keep_momentum, c.to_momentum)]
        new = tree.map(lambda w, s, g: combine(w, s, g, *last).squeeze(2), weights, momentum, step)  # noqa: B023
        momentum = tree.map(lambda s, g: combine(None, s, g, decay[0], *decay).squeeze(2), momentum, step)  # noqa: B023
        weights = new
    return torch.stack(outputs, 2).to(q.dtype), weights, momentum, anchor
