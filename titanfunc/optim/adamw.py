"""AdamW as a chain of transformations."""

from __future__ import annotations

from collections.abc import Callable

from titanfunc.optim.base import GradientTransformation, Tree, chain
from titanfunc.optim.schedules import Schedule
from titanfunc.optim.transforms import (
    add_decayed_weights,
    clip_by_global_norm,
    scale_by_adam,
    scale_by_learning_rate,
)


def adamw(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Callable[[Tree], Tree] | None = None,
    clip_norm: float | None = None,
) -> GradientTransformation:
    """AdamW over parameters of any shapes: p <- p - lr (m_hat / (sqrt(v_hat) + eps) + weight_decay p).

    learning_rate: a number or a schedule. mask: which parameters decay (``titanfunc.models.decayed`` for a model's
    matrices; all by default). clip_norm: largest norm of the whole gradient, before the moments.
    Raises ValueError for values out of range. Loshchilov & Hutter, arXiv 1711.05101.
    """
    parts = [scale_by_adam(b1, b2, eps)]
    if clip_norm:
        parts.insert(0, clip_by_global_norm(clip_norm))
    if weight_decay:
        parts.append(add_decayed_weights(weight_decay, mask))
    return chain(*parts, scale_by_learning_rate(learning_rate))
