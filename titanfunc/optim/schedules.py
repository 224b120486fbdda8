"""Learning-rate schedules: functions of the number of updates so far, a 0-d tensor, so that nothing recompiles."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int, end: float = 0.0) -> Schedule:
    """A linear rise to ``peak`` over ``warmup_steps``, then half a cosine down to ``end`` at ``total_steps``.

    The first update takes peak / warmup_steps. The schedule maps a 0-d int64 count to a 0-d float32 rate.
    Raises ValueError unless 0 <= warmup_steps < total_steps.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps: wanted 0 or more and fewer than total_steps = {total_steps}, got {warmup_steps}"
        )

    def schedule(count: Tensor) -> Tensor:
        step = count.to(torch.float32)
        rising = peak * (step + 1) / max(warmup_steps, 1)
        progress = ((step - warmup_steps) / (total_steps - warmup_steps)).clamp(0, 1)
        falling = end + (peak - end) * 0.5 * (1 + torch.cos(math.pi * progress))
        return torch.where(step < warmup_steps, rising, falling)

    return schedule


def warmup_stable_decay(
    peak: float, warmup_steps: int, decay_steps: int, total_steps: int, end: float = 0.0
) -> Schedule:
    """A linear rise to ``peak``, a plain, and a straight line down to ``end`` over the last ``decay_steps`` updates.

    The first update takes peak / warmup_steps. The schedule maps a 0-d int64 count to a 0-d float32 rate.
    Raises ValueError unless warm-up and decay are 0 or more and fit into total_steps. Hu et al., arXiv 2404.06395.
    """
    if warmup_steps < 0 or decay_steps < 0 or warmup_steps + decay_steps > total_steps or total_steps < 1:
        raise ValueError(
            f"decay_steps: wanted warmup_steps = {warmup_steps} and decay_steps of 0 or more that fit into "
            f"total_steps = {total_steps}, got {decay_steps}"
        )

    def schedule(count: Tensor) -> Tensor:
        step = count.to(torch.float32)
        rising = (step + 1) / max(warmup_steps, 1)
        left = ((total_steps - step) / max(decay_steps, 1)).clamp(0, 1)
        return torch.where(step < warmup_steps, peak * rising, end + (peak - end) * left)

    return schedule


def linear(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` to ``end`` in ``steps`` updates, then ``end``; a 0-d int64 count to a 0-d float32 value.

    What Muon's momentum takes to warm up. Raises ValueError for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps: wanted at least 1, got {steps}")

    def schedule(count: Tensor) -> Tensor:
        return start + (end - start) * (count.to(torch.float32) / steps).clamp(0, 1)

    return schedule
