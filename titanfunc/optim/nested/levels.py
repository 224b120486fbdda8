"""Gradient levels that fire at their own periods, after the Nested Learning paper's continuum of memories.

Source: Behrouz et al. 2025, arXiv 2512.24695. Letters: g the gradient, M_i level i's momentum, p_i its period.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.optim.base import Tree

DECAY = 0.9


class LevelState(NamedTuple):
    """count: gradients since the level last fired, 0-d int64. total: their sum (() for a period of 1). momentum: the
    decaying mean of the means it fired with. fired: how often, 0-d int64. Trees are like the parameters."""

    count: Tensor  # type: ignore[assignment]  # a field in place of tuple.count
    total: Any
    momentum: Tree
    fired: Tensor


def init_levels(params: Tree, periods: Sequence[int]) -> tuple[LevelState, ...]:
    """A state for each level over parameters of any shapes."""
    zero = torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)
    return tuple(
        LevelState(zero, tree.zeros_like(params) if period > 1 else (), tree.zeros_like(params), zero)
        for period in periods
    )


def combine(grads: Tree, levels: tuple[LevelState, ...], periods: Sequence[int]) -> tuple[Tree, tuple[LevelState, ...]]:
    """Gradients of any shapes -> the mean over levels of M_i, each as large as g, and the levels' new states.

    A level fires every p_i steps, with the mean gradient since it last did; one that has not fired yet has no
    share. As each M_i is scaled to the norm of g, a slow level weighs what its share says, however small its mean is.
    """
    new, parts, shares = [], [], []
    size = tree.global_norm(grads)
    for level, period in zip(levels, periods, strict=True):
        count = level.count + 1
        total = tree.add(level.total, grads) if period > 1 else grads
        due = count >= period  # more, where a run goes on with a shorter period
        moved = tree.map(lambda m, t, n=count: DECAY * m + (1 - DECAY) / n * t, level.momentum, total)
        momentum = tree.where(due, moved, level.momentum)
        fired = level.fired + due
        new.append(
            LevelState(
                torch.where(due, torch.zeros_like(count), count),
                tree.where(due, tree.zeros_like(total), total) if period > 1 else (),
                momentum,
                fired,
            )
        )
        share = (fired > 0).to(size.dtype)
        shares.append(share)
        parts.append(tree.scale(momentum, share * size / tree.global_norm(momentum).clamp_min(1e-30)))
    together = parts[0]
    for part in parts[1:]:
        together = tree.add(together, part)
    active = torch.stack(shares).sum().clamp_min(1)
    return tree.scale(together, 1 / active), tuple(new)
