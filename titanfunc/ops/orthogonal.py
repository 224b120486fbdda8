"""The nearest orthogonal matrix, nearly: a few odd quintic polynomials of a matrix, products alone.

x <- a x + (b y + c y^2) x with y = x x^T, from x of spectral norm at most 1. Sources: Muon (Jordan et al., 2024) for
one triple (a, b, c) again and again; Polar Express (arXiv 2505.16932) for the best triple of every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanfunc.ops.symmetric import gram, square_polynomial

QUINTIC = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MARGIN = 1.01
"""Of the input's norm under Polar Express: rounding must not push a singular value past 1."""
METHODS = ("newton_schulz", "polar_express")


def orthogonalize(
    x: Tensor, steps: int = 5, eps: float = 1e-7, method: str = "newton_schulz", kernels: str = "reference"
) -> Tensor:
    """x [..., N, M] with its singular values moved to about 1, in its own dtype; zero stays zero.

    Five steps of "newton_schulz" leave them between 0.7 and 1.2, of "polar_express" between 0.87 and 1.14 where they
    began above a hundredth of the greatest; further steps of that, its last one again, come nearer.
    kernels: "reference", or "triton" (float32, bfloat16), which computes half of each symmetric product. Raises
    ValueError for another method, for fewer than one step, and for what the kernels do not take.
    """
    if method not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {method!r}")
    if steps < 1:
        raise ValueError(f"steps: wanted at least 1, got {steps}")
    polar = method == "polar_express"
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).reshape(-1, *sorted(x.shape[-2:]))
    scale = torch.rsqrt((y * y).sum((-2, -1), keepdim=True) + eps * eps)
    y = y * (scale / MARGIN if polar else scale)
    for i in range(steps):
        a, b, c = POLAR_EXPRESS[min(i, len(POLAR_EXPRESS) - 1)] if polar else QUINTIC
        inner = square_polynomial(gram(y, kernels=kernels), b, c, kernels=kernels)
        y = torch.baddbmm(y, inner, y, beta=a)
    y = y.reshape(*x.shape[:-2], *y.shape[-2:])
    return y.mT if tall else y
