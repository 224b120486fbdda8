"""Loss by position: what a token costs, by how much was read before it. L is the tokens that a row predicts."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Bucket(NamedTuple):
    """Positions first .. last (from 1: the first prediction has read one token). loss: nats, a mean over ``tokens``."""

    first: int
    last: int
    loss: float
    tokens: int


def buckets(length: int, octave: int = 2) -> list[tuple[int, int]]:
    """Positions 1 .. length in groups ``(first, last)`` that grow by the octave, ``octave`` of them to each.

    >>> buckets(100, octave=1)
    [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 100)]
    """
    if length < 1:
        raise ValueError(f"length: wanted at least 1, got {length}")
    starts = sorted({round(2 ** (power / octave)) for power in range(octave * length.bit_length())})
    # The last group may be cut short by the row's end, but not below half of what it would have been.
    starts = [one for one, after in itertools.pairwise([*starts, 2 * starts[-1]]) if one + after <= 2 * (length + 1)]
    return list(zip(starts, [*(start - 1 for start in starts[1:]), length], strict=True))


def by_position(loss: Tensor, weights: Tensor | None = None) -> list[Bucket]:
    """The mean of losses [N, L] in each of ``buckets(L)``, in nats.

    weights: [N, L]; then only predictions of weight 1 or more count (answers), and buckets without any are left out.
    """
    counted = torch.ones_like(loss, dtype=torch.bool) if weights is None else (weights >= 1).cpu()
    found = []
    for first, last in buckets(loss.shape[1]):
        inside = counted[:, first - 1 : last]
        if inside.any():
            mean = loss[:, first - 1 : last][inside].double().mean().item()
            found.append(Bucket(first, last, mean, int(inside.sum())))
    return found
