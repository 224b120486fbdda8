"""Linear maps, embeddings and the SwiGLU feed-forward as init / apply pairs over dicts of tensors.

Letters: B batch, T tokens, D features, F hidden features, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc import rng


def init_linear(generator: torch.Generator, fan_in: int, fan_out: int, gain: float = 1.0) -> Tensor:
    """A weight [fan_in, fan_out] drawn from N(0, gain^2 / fan_in)."""
    return rng.normal(generator, (fan_in, fan_out), gain / math.sqrt(fan_in))


def linear(weight: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x @ weight`` for x [..., D_in] and weight [D_in, D_out], computed and returned in ``dtype``."""
    return x.to(dtype) @ weight.to(dtype)


def init_feed_forward(generator: torch.Generator, dim: int, hidden: int, gain: float = 1.0) -> dict[str, Tensor]:
    """SwiGLU weights: gate and up [D, F], down [F, D]; ``gain`` scales what the block adds to its stream."""
    return {
        "gate": init_linear(generator, dim, hidden),
        "up": init_linear(generator, dim, hidden),
        "down": init_linear(generator, hidden, dim, gain),
    }


def feed_forward(params: dict[str, Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(silu(x gate) * (x up)) down`` for x [..., D]; result [..., D] in ``dtype``. Shazeer, arXiv 2002.05202."""
    hidden = F.silu(linear(params["gate"], x, dtype)) * linear(params["up"], x, dtype)
    return linear(params["down"], hidden, dtype)
