"""AdamW as a chain of transformations."""

from __future__ import annotations

from collections.abc import Callable

from titanfunc.config import ModelConfig, OptimConfig
from titanfunc.models.roles import decayed
from titanfunc.optim.base import GradientTransformation, Tree, chain
from titanfunc.optim.partition import cms_labels, cms_periods, partition
from titanfunc.optim.schedules import Schedule, warmup_cosine
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


def from_config(config: OptimConfig, total_steps: int, model: ModelConfig | None = None) -> GradientTransformation:
    """The optimizer of a configuration for a model's parameters, its schedule stretched over ``total_steps``.

    A warm-up of ``total_steps`` or more is cut to a tenth of them, so that very short runs work too.
    model: with a "cms" feed-forward, whose blocks move every ``cms.periods[i]`` steps, from the mean gradient since.
    """
    b1, b2 = config.betas

    def make(period: int) -> GradientTransformation:
        total = max(total_steps // period, 1)
        warmup = config.warmup_steps // period
        warmup = warmup if warmup < total else total // 10
        schedule = warmup_cosine(config.lr, warmup, total, config.lr * config.min_lr_ratio)
        return adamw(schedule, b1, b2, config.eps, config.weight_decay, decayed)

    moved = make(1)
    if model is not None and model.feed_forward == "cms":
        moved = partition(cms_periods(make, model.cms.periods), cms_labels)
    return chain(clip_by_global_norm(config.clip_norm), moved) if config.clip_norm else moved
