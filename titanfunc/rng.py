"""Explicit randomness: nothing in titanfunc draws from a global generator.

Initial weights come from a generator. A compiled step has none: there, draws are a function of a seed held in a
tensor and of the place of the element (counter-based, as in Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3"), so a step stays pure, replays the same, and does not recompile when the seed changes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator. Draws are made on its device: use "cpu" for weights that are equal on every machine."""
    return torch.Generator(device=device).manual_seed(seed)


def normal(source: torch.Generator, shape: tuple[int, ...], std: float) -> Tensor:
    """Float32 draws from N(0, std^2) of the given shape, on the generator's device."""
    return torch.randn(shape, generator=source, device=source.device) * std


def uniform(seed: Tensor, shape: tuple[int, ...], stream: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Float32 draws from [0, 1), multiples of 2^-24, of the given shape: a pure function of seed, stream and place.

    seed: 0-d int64, any value; neighbouring seeds and streams are unrelated. device: the seed's by default.
    Raises ValueError for a seed of another kind.
    """
    return _unit(_bits(seed, shape, 2 * stream, device), 40)


def gaussian(seed: Tensor, shape: tuple[int, ...], stream: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Float32 draws from N(0, 1) of the given shape, like :func:`uniform` and unrelated to its draws.

    Box & Muller 1958: sqrt(-2 ln(1 - u)) cos(2 pi v), at most 5.8 in size. Raises ValueError as ``uniform`` does.
    """
    bits = _bits(seed, shape, 2 * stream + 1, device)
    return torch.sqrt(-2 * torch.log1p(-_unit(bits, 40))) * torch.cos(2 * math.pi * _unit(bits, 8))


def gumbel(seed: Tensor, shape: tuple[int, ...], stream: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Float32 draws of the given shape from the standard Gumbel distribution, made of those of :func:`uniform`: the
    largest of logits plus these is a draw by their softmax. Raises ValueError as ``uniform`` does.
    """
    u = uniform(seed, shape, stream, device).clamp(min=2.0**-25)  # never 1, and here never 0: both ends are finite
    return -torch.log(-torch.log1p(-u))


def _signed(value: int) -> int:
    """The int64 with the bits of ``value`` modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


# The increment and the multipliers of splitmix64: Steele, Lea & Flood 2014, in Stafford's 13th variant.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _bits(seed: Tensor, shape: tuple[int, ...], stream: int, device: torch.device | str | None) -> Tensor:
    """64 random bits for each element, int64 of the given shape. int64 arithmetic wraps: that is modulo 2^64."""
    if seed.ndim != 0 or seed.dtype != torch.int64:
        raise ValueError(f"seed: wanted a 0-d int64 tensor, got {seed.dtype} {tuple(seed.shape)}")
    key = _mix(_mix(seed * _GOLDEN + _FIRST) + _signed(stream * _GOLDEN))
    place = torch.arange(math.prod(shape), device=device or seed.device)
    # The key comes first: a compiler may work out products of the bare index in 32 bits.
    return _mix((key ^ place) * _GOLDEN).reshape(shape)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser: a bijection of 64 bits in which each bit of the input flips half of the output's."""
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def _shift(z: Tensor, places: int) -> Tensor:
    """A logical shift to the right: torch's own copies the sign of an int64 into the upper bits."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _unit(bits: Tensor, places: int) -> Tensor:
    """24 of the bits, from ``places`` up, as a float32 in [0, 1): all that its mantissa holds."""
    return ((bits >> places) & 0xFFFFFF).to(torch.float32) * 2.0**-24
