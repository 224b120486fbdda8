"""Causal depthwise convolution over tokens, with a tail that carries it across pieces.

Letters: B batch, T tokens, D features, K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def init_taps(features: int, width: int, lag: int, device: torch.device | str) -> Tensor:
    """Taps [D, K] that pass on the token ``lag`` places back (0: the token itself), bounded by the width."""
    taps = torch.zeros(features, width, device=device)
    taps[:, min(lag, width - 1)] = 1.0
    return taps


def convolve(taps: Tensor, extended: Tensor, age: Tensor | None = None) -> Tensor:
    """``y[t] = sum_j taps[:, j] x[t - j]``: extended [B, K - 1 + T, D] (the tail first) -> [B, T, D], in its dtype.

    age: int64 [B, T], how many tokens of its document come before each token: what is further back is not seen.
    """
    width = taps.shape[-1]
    tokens = extended.shape[1] - width + 1
    total = None
    for j in range(width):
        part = extended[:, width - 1 - j : width - 1 - j + tokens] * taps[:, j].to(extended.dtype)
        if age is not None and j:
            part = torch.where((age >= j).unsqueeze(-1), part, 0)
        total = part if total is None else total + part
    assert total is not None  # there is at least one tap
    return total


def of_document(tail: Tensor, age: Tensor) -> Tensor:
    """The tail [B, K - 1, D] without the rows that lie before the document of the last token, which ``age`` [B] tokens
    came before."""
    lag = torch.arange(tail.shape[1], 0, -1, device=tail.device)
    return torch.where((lag <= age.unsqueeze(-1) + 1).unsqueeze(-1), tail, 0)


def extend(tail: Tensor, x: Tensor) -> Tensor:
    """The tail [B, K - 1, D] in front of x [B, T, D]: what :func:`convolve` takes."""
    return torch.cat([tail.to(x.dtype), x], 1)


def extend_at(tail: Tensor, x: Tensor, start: Tensor) -> Tensor:
    """Like :func:`extend` for x [B, S, D] in slots whose first token lies at slot ``start`` [B]: the tail right before
    it.
    """
    padded = torch.cat([torch.zeros_like(tail, dtype=x.dtype), x], 1)
    index = start.unsqueeze(-1) + torch.arange(tail.shape[1], device=x.device)
    return torch.scatter(padded, 1, index.unsqueeze(-1).expand(tail.shape), tail.to(x.dtype))


def tail_at(extended: Tensor, end: Tensor, width: int) -> Tensor:
    """The K - 1 rows before slot ``end`` [B] (the number of slots read): the next piece's tail [B, K - 1, D]."""
    index = end.unsqueeze(-1) + torch.arange(width - 1, device=extended.device)
    return torch.gather(extended, 1, index.unsqueeze(-1).expand(*index.shape, extended.shape[-1]))
