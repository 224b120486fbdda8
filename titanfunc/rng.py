"""Explicit random generators: nothing in titanfunc draws from a global one."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator. Draws are made on its device: use "cpu" for weights that are equal on every machine."""
    return torch.Generator(device=device).manual_seed(seed)


def normal(source: torch.Generator, shape: tuple[int, ...], std: float) -> Tensor:
    """Float32 draws from N(0, std^2) of the given shape, on the generator's device."""
    return torch.randn(shape, generator=source, device=source.device) * std
