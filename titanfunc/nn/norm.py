"""Normalisation, computed in float32 whatever the dtype of its input."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(scale: Tensor, x: Tensor, eps: float = 1e-6) -> Tensor:
    """``scale * x / sqrt(mean(x^2) + eps)`` over the last axis of x [..., D], scale [D]; result in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-2) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last axis of x [..., D]: unit rows, zero for a zero row.

    ``eps`` bounds the derivative near zero by 1 / sqrt(eps): rows of zeros do occur (a convolution at the very first
    token), and with a floor of 1e-6 their gradient drowned every other.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
