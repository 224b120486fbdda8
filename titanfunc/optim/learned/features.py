"""What a learned optimizer sees of each element: its gradient, its value, and what they have been.

Letters: g gradient, p parameter, m decaying mean of g, v decaying mean of g^2. A last axis holds the decays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
SECOND_DECAYS = (0.999,)
FACTORED_DECAYS = (0.9, 0.99, 0.999)
TIMES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
"""The scales of the time embedding, in updates."""


class Accumulators(NamedTuple):
    """What is remembered of one leaf [*S].

    momentum: m [*S, 3]. second: v [*S, 1]. factors: the row and column means of g^2, [*S, 3] with a 1 in the place of
    the axis that is averaged; or one entry, v [*S, 3], for a leaf of fewer than two axes.
    """

    momentum: Tensor
    second: Tensor
    factors: tuple[Tensor, ...]


def factored_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """The second largest and the largest axis of a shape, of equal ones the later as the larger; None below two axes.

    >>> factored_axes((5, 2, 3)), factored_axes((4, 4)), factored_axes((7,))
    ((2, 0), (0, 1), None)
    """
    if len(shape) < 2:
        return None
    second, largest = sorted(range(len(shape)), key=shape.__getitem__)[-2:]
    return second, largest


def wide(leaf: Tensor) -> Tensor:
    """A leaf of any shape in the dtype that statistics are kept in: float64 if it is that already, else float32."""
    return leaf if leaf.dtype == torch.float64 else leaf.to(torch.float32)


def init_accumulators(leaf: Tensor) -> Accumulators:
    """Zeros for a leaf of any shape."""
    zero = torch.zeros_like(wide(leaf)).unsqueeze(-1)
    several = zero.repeat(*[1] * leaf.ndim, len(FACTORED_DECAYS))
    axes = factored_axes(leaf.shape)
    factors = (several.clone(),) if axes is None else (several.mean(axes[1], True), several.mean(axes[0], True))
    return Accumulators(zero.repeat(*[1] * leaf.ndim, len(MOMENTUM_DECAYS)), zero.clone(), factors)


def to_decay(learned: Tensor) -> Tensor:
    """1 - exp(10 x), kept in [0, 1], for x [K]: decays are learned as x = log(1 - decay) / 10."""
    return (1 - torch.exp(10 * learned)).clamp(0, 1)


def accumulate(old: Accumulators, g: Tensor, decays: Mapping[str, Tensor]) -> Accumulators:
    """The accumulators after one more gradient g [*S]; decays: as learned, "momentum" [3], "second" [1], "factored" [3]

    Factored as in Adafactor (Shazeer & Stern, arXiv 1804.04235) over the two largest axes.
    """
    g = wide(g).unsqueeze(-1)
    squares = g * g + 1e-30
    axes = factored_axes(g.shape[:-1])
    means = (squares,) if axes is None else (squares.mean(axes[1], True), squares.mean(axes[0], True))
    momentum, second, factored = (to_decay(decays[name].to(g.dtype)) for name in ("momentum", "second", "factored"))
    return Accumulators(
        momentum * old.momentum + (1 - momentum) * g,
        second * old.second + (1 - second) * g * g,
        tuple(factored * f + (1 - factored) * new for f, new in zip(old.factors, means, strict=True)),
    )


class Factored(NamedTuple):
    """Adafactor's statistics of a leaf [*S], each [*S, 3] or broadcasting to it.

    gradient, momentum: g and m over the root of what the factors say of g^2. rest: row, column, and the inverse roots
    of both; v itself stands for either in a leaf that has no two axes.
    """

    gradient: Tensor
    momentum: Tensor
    rest: tuple[Tensor, Tensor, Tensor, Tensor]


def factored_statistics(g: Tensor, kept: Accumulators, floor: float) -> Factored:
    """Adafactor's statistics for a gradient g [*S]; floor: of v under m, where the leaf has no two axes."""
    g = wide(g).unsqueeze(-1)
    axes = factored_axes(g.shape[:-1])
    if axes is None:
        (v,) = kept.factors
        inverse = torch.rsqrt(v + 1e-8)
        return Factored(g * torch.rsqrt(v + 1e-9), kept.momentum * torch.rsqrt(v + floor), (v, v, inverse, inverse))
    row, column = kept.factors
    relative = row / (row.mean(axes[0], True) + 1e-9)
    scale = torch.rsqrt(relative.clamp(min=1e-9)) * torch.rsqrt(column.clamp(min=1e-9))
    rest = (row, column, torch.rsqrt(row + 1e-8), torch.rsqrt(column + 1e-8))
    return Factored(g * scale, kept.momentum * scale, rest)


def small_fc_statistics(p: Tensor, g: Tensor, kept: Accumulators) -> Tensor:
    """The 28 statistics [N, 28] of a leaf of N elements, in small_fc's order, each normalised over the leaf.

    g, p, m, v, m / sqrt(v), 1 / sqrt(v), factored g, row, column, 1 / sqrt(row), 1 / sqrt(column), factored m.
    """
    inverse = torch.rsqrt(kept.second + 1e-6)
    of = factored_statistics(g, kept, 1e-6)
    plain = [wide(g).unsqueeze(-1), wide(p).unsqueeze(-1), kept.momentum, kept.second]
    return _normalised([*plain, kept.momentum * inverse, inverse, of.gradient, *of.rest, of.momentum], p.shape)


def velo_statistics(p: Tensor, g: Tensor, kept: Accumulators) -> Tensor:
    """The 30 statistics [N, 30] of a leaf of N elements, in VeLO's order, each normalised over the leaf.

    g, g clipped to 0.1, p, m, v, m / sqrt(v), 1 / sqrt(v), factored g, g / sqrt(v), row, column, 1 / sqrt(row),
    1 / sqrt(column), factored m.
    """
    inverse = torch.rsqrt(kept.second + 1e-6)
    # VeLO has no floor here but the 1e-30 within v, at which the derivative of 1 / sqrt(v) leaves float32.
    of = factored_statistics(g, kept, 1e-20)
    g, p_ = wide(g).unsqueeze(-1), wide(p).unsqueeze(-1)
    plain = [g, g.clamp(-0.1, 0.1), p_, kept.momentum, kept.second, kept.momentum * inverse, inverse]
    return _normalised([*plain, of.gradient, g * inverse, *of.rest, of.momentum], p.shape)


def time_embedding(count: Tensor) -> Tensor:
    """tanh(t / s - 1) [11] for t updates so far (0-d), at the scales s = 1, 3, 10, ..., 100,000."""
    # Scalars, and no tensor of scales: that would be copied to the device at each step.
    return torch.stack([torch.tanh(count.to(torch.float32) / scale - 1) for scale in TIMES])


def _normalised(groups: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """[N, sum of K] from groups that broadcast to [*S, K], each column over its root mean square."""
    columns = []
    for group in groups:
        # Rows and columns are normalised before they are spread over the leaf: their mean square is the same.
        mean_square = group.square().reshape(-1, group.shape[-1]).mean(0)
        column = group * torch.rsqrt(mean_square + 1e-5)
        columns.append(column.expand(*shape, group.shape[-1]).reshape(-1, group.shape[-1]))
    return torch.cat(columns, -1)
