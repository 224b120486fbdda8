"""The gates of a chunk, multiplied out: what the chunked form of a rule is made of.

Letters: B batch, H memory heads, N chunks, C tokens a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def at_the_end(forget: Tensor, momentum_decay: Tensor, inner_lr: Tensor) -> Coefficients:
    """Coefficients of full chunks under the per-chunk rule, from gates [B, H, N, C]: the last token alone writes, with
    the chunk's mean gates and the sum of its gradients."""
    size = forget.shape[-1]
    last = (torch.arange(size, device=forget.device) == size - 1).to(forget.dtype)
    alpha, eta, theta = (gate.mean(-1, keepdim=True) for gate in (forget, momentum_decay, inner_lr))
    rows = (theta * last).unsqueeze(-1).expand(*forget.shape, size)
    return Coefficients(rows, rows, 1 - alpha * last, eta * last, 1 + (eta - 1) * last)
