"""The Continuum Memory System's feed-forward: a chain of blocks whose weights are to be moved at different rates.

Behrouz et al. 2025, "Nested Learning", arXiv 2512.24695, in the section on the Continuum Memory System (HOPE's
feed-forward): y = f_k(... f_2(f_1(x))), where block l is updated every C_l steps from what it saw in between. Here
are the blocks; their frequencies are the optimizer's: ``titanfunc.optim.partition``, ``every`` and ``cms_labels``.

Letters: B batch, T tokens, D features, F hidden features of all blocks together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titanfunc.nn.linear import Product, feed_forward, init_feed_forward, linear

Levels = dict[str, dict[str, Tensor]]


def init_cms(generator: torch.Generator, dim: int, hidden: int, levels: int, gain: float = 1.0) -> Levels:
    """``{"level0": {gate, up [D, F_0], down [F_0, D]}, "level1": ...}``: as many weights as one feed-forward of F.

    The F hidden features are dealt out evenly, the first levels taking one more each where ``levels`` does not divide.
    ``gain`` scales what the whole chain adds to its stream, so each level's is gain / sqrt(levels).
    Raises ValueError unless 1 <= levels <= hidden.
    """
    if not 1 <= levels <= hidden:
        raise ValueError(f"levels: wanted 1 to hidden = {hidden}, got {levels}")
    share, more = divmod(hidden, levels)
    return {
        f"level{i}": init_feed_forward(generator, dim, share + (i < more), gain / math.sqrt(levels))
        for i in range(levels)
    }


def cms(params: Levels, x: Tensor, dtype: torch.dtype, product: Product = linear) -> Tensor:
    """What the chain adds to x [B, T, D], in ``dtype``: h_0 = x, h_{l+1} = h_l + SwiGLU_l(h_l), result h_k - x.

    So ``x + cms(params, x, dtype)`` is the chain; behind a norm, ``x + cms(params, norm(x), dtype)``, it runs on the
    normed features. With one level it is ``feed_forward``, bit for bit.
    """
    added = feed_forward(params["level0"], x, dtype, product)
    for i in range(1, len(params)):
        added = added + feed_forward(params[f"level{i}"], x + added, dtype, product)
    return added
