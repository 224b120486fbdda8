"""The language model's loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood in nats, 0-d: logits [B, T, V] (reduced in float32 or wider), int64 targets [B, T].

    weights: at least 0, [B, T]; then the mean is sum(w l) / sum(w), and 0 where all weights are.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if weights is None:
        return F.cross_entropy(wide.flatten(0, -2), targets.flatten())
    losses = F.cross_entropy(wide.flatten(0, -2), targets.flatten(), reduction="none")
    share = weights.flatten().to(losses.dtype)
    return (losses * share).sum() / total_weight(share)


def total_weight(weights: Tensor) -> Tensor:
    """The sum of weights of any shape, 0-d, never 0: something to divide by."""
    return weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
