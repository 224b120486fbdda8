"""Linear maps, embeddings and the SwiGLU feed-forward as init / apply pairs over dicts of tensors.

Letters: B batch, T tokens, D features, F hidden features, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc import rng

Product = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""(weight [D_in, D_out], x [..., D_in], dtype) -> x @ weight [..., D_out] in dtype, as ``linear`` is."""


def init_linear(generator: torch.Generator, fan_in: int, fan_out: int, gain: float = 1.0) -> Tensor:
    """A weight [fan_in, fan_out] drawn from N(0, gain^2 / fan_in)."""
    return rng.normal(generator, (fan_in, fan_out), gain / math.sqrt(fan_in))


def linear(weight: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x @ weight`` for x [..., D_in] and weight [D_in, D_out], computed and returned in ``dtype``."""
    return x.to(dtype) @ weight.to(dtype)


def linear_each(weights: Sequence[Tensor], x: Tensor, dtype: torch.dtype, product: Product = linear) -> list[Tensor]:
    """x [..., D_in] times each of ``weights`` [D_in, .], in ``dtype``.

    A product other than ``linear`` is asked once, with the weights side by side: what it makes of x serves them all.
    """
    if product is linear:
        return [linear(weight, x, dtype) for weight in weights]
    return list(product(torch.cat(list(weights), -1), x, dtype).split([weight.shape[-1] for weight in weights], -1))


def init_feed_forward(generator: torch.Generator, dim: int, hidden: int, gain: float = 1.0) -> dict[str, Tensor]:
    """SwiGLU weights: gate and up [D, F], down [F, D]; ``gain`` scales what the block adds to its stream."""
    return {
        "gate": init_linear(generator, dim, hidden),
        "up": init_linear(generator, dim, hidden),
        "down": init_linear(generator, hidden, dim, gain),
    }


def feed_forward(params: dict[str, Tensor], x: Tensor, dtype: torch.dtype, product: Product = linear) -> Tensor:
    """``(silu(x gate) * (x up)) down`` for x [..., D]; result [..., D] in ``dtype``. Shazeer, arXiv 2002.05202."""
    gate, up = linear_each((params["gate"], params["up"]), x, dtype, product)
    return product(params["down"], F.silu(gate) * up, dtype)
