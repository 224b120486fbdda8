"""The nearest orthogonal matrix, nearly: five steps of a quintic Newton-Schulz iteration.

Source: Muon (Jordan et al., 2024): x <- a x + (b y + c y^2) x with y = x x^T, from x of spectral norm at most 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """x [..., N, M] with its singular values moved to about 1 (0.7 to 1.2; zero stays zero), in its own dtype."""
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y * torch.rsqrt((y * y).sum((-2, -1), keepdim=True) + eps * eps)
    for _ in range(steps):
        square = y @ y.mT
        y = a * y + (b * square + c * square @ square) @ y
    return y.mT if tall else y
