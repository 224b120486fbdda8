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
    kernel: "sdpa" takes torch's fused kernels where they can be trusted (first derivatives only); "softmax" is
    written out, in float32 inside, and differentiates any number of times. Raises ValueError for another.

    On a GPU the fused kernels for masks and for float32 return a random state that lies on the CPU while the
    compiler is told that it is on the GPU; inductor (2.11, 2.13) may then reuse that memory for a kernel's result, and
    the launch fails. There "sdpa" takes only the kernel without mask in half precision.
    """
    if kernel not in ("sdpa", "softmax"):
        raise ValueError(f"kernel: wanted 'sdpa' or 'softmax', got {kernel!r}")
    if kernel == "sdpa" and (not q.is_cuda or (mask is None and q.dtype in (torch.bfloat16, torch.float16))):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1)
    return weights.to(v.dtype) @ v
