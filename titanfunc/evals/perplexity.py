"""The mean loss over fixed batches, in the three units that people compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.train.metrics import bits_per_byte


def evaluate(
    eval_step: Callable[[Any, dict[str, Tensor]], Tensor],
    params: Any,
    batches: Iterable[Tensor],
    bytes_per_token: float = 1.0,
) -> dict[str, float]:
    """``{"loss": nats a token, "bits_per_byte": ..., "perplexity": exp(loss)}`` over batches of one size.

    eval_step: ``(params, {"tokens": int64 [B, T + 1]}) -> loss``, 0-d. batches: tokens [B, T + 1] on any device.
    bytes_per_token: of the text. The device is read once, at the end. Raises ValueError if there is no batch.
    """
    device = tree.leaves(params)[0].device
    losses = [eval_step(params, {"tokens": tokens.to(device)}).clone() for tokens in batches]
    if not losses:
        raise ValueError("batches: wanted at least 1, got none")
    loss = torch.stack(losses).mean().item()
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "bits_per_byte": bits_per_byte(loss, bytes_per_token), "perplexity": perplexity}
