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
