"""Scaled dot-product attention.

Letters: B batch, H heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str = "sdpa") -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q [B, H, T, D] and k, v [B, H, S, D]; result [B, H, T, D].

    mask: bool, broadcastable to [B, H, T, S], true where a query may look; None: causal, with T = S.
    kernel: "sdpa" takes torch's fused kernels (first derivatives only); "softmax" is written out, in float32
    inside, and differentiates any number of times. Raises ValueError for another kernel.
    """
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if kernel != "softmax":
        raise ValueError(f"kernel: wanted 'sdpa' or 'softmax', got {kernel!r}")
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
    return weights.to(v.dtype) @ v
