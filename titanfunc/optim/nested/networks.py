"""The small networks of a nested optimizer: MLPs that give exactly zero when they are new, and what they read.

Letters: F features, H hidden units, O outputs; ... stands for any axes.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from titanfunc import rng

Network = dict[str, Tensor]


def init_mlp(
    generator: torch.Generator, features: int, hidden: int, layers: int, outputs: int, *, bias: bool = True
) -> Network:
    """Weights {w0, b0, ...} of an MLP with ``layers`` matrices, F -> H -> ... -> O; the last is zero.

    bias: whether the last layer has one.
    """
    sizes = [features, *[hidden] * (layers - 1), outputs]
    network: Network = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        last = i == layers - 1
        weight = torch.zeros(rows, columns) if last else rng.normal(generator, (rows, columns), rows**-0.5)
        network[f"w{i}"] = weight.to(generator.device)
        if bias or i < layers - 1:
            network[f"b{i}"] = torch.zeros(columns, device=generator.device)
    return network


def apply_mlp(network: Network, x: Tensor) -> Tensor:
    """x [..., F] -> [..., O], with tanh between the layers."""
    layers = sum(name.startswith("w") for name in network)
    for i in range(layers):
        x = x @ network[f"w{i}"].to(x.dtype)
        if f"b{i}" in network:
            x = x + network[f"b{i}"].to(x.dtype)
        if i < layers - 1:
            x = torch.tanh(x)
    return x


def log_and_sign(x: Tensor, p: float = 10.0) -> Tensor:
    """x [...] -> [..., 2]: (log|x| / p, sign x), or (-1, e^p x) where |x| < e^-p.

    Andrychowicz et al., arXiv 1606.04474, appendix A.
    """
    small = x.abs() < math.exp(-p)
    logarithm = torch.log(torch.where(small, torch.ones_like(x), x.abs())) / p
    first = torch.where(small, -torch.ones_like(x), logarithm)
    return torch.stack([first, torch.where(small, math.exp(p) * x, torch.sign(x))], -1)
