"""Everything that a training step carries."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import rng, tree
from titanfunc.models.base import Model
from titanfunc.optim.base import GradientTransformation


class TrainState(NamedTuple):
    """A pytree: step (0-d int64, batches seen), params, opt_state, and the guards' counters.

    skipped, skipped_in_row: 0-d int64, steps whose loss or gradient was not finite: in all, and since the last
    good one.
    """

    step: Tensor
    params: Any
    opt_state: Any
    skipped: Tensor
    skipped_in_row: Tensor


def init_state(
    model: Model, tx: GradientTransformation, seed: int = 0, device: torch.device | str | None = None
) -> TrainState:
    """A fresh state on ``device``. The weights are drawn on the CPU, so that a seed means the same everywhere.

    Every leaf has storage of its own: a compiled step writes new values over the old ones.
    """
    params = tree.map(lambda leaf: leaf.to(device or "cpu"), model.init(rng.generator(seed)))
    zeros = (torch.zeros((), dtype=torch.int64, device=device or "cpu") for _ in range(3))
    opt_state = tree.map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), tx.init(params))
    return TrainState(next(zeros), params, opt_state, *zeros)
