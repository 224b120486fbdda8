"""The optimizer that a configuration describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from titanfunc import rng
from titanfunc.config import ModelConfig, OptimConfig
from titanfunc.models.roles import decayed
from titanfunc.optim.adamw import adamw
from titanfunc.optim.base import GradientTransformation, chain
from titanfunc.optim.learned import init_small_fc_lopt, init_velo, load_weights, small_fc_lopt, velo
from titanfunc.optim.muon import muon
from titanfunc.optim.nested import nested
from titanfunc.optim.partition import cms_labels, cms_periods, partition
from titanfunc.optim.schedules import Schedule, linear, warmup_cosine, warmup_stable_decay
from titanfunc.optim.transforms import clip_by_global_norm, scale_by_role


def from_config(config: OptimConfig, total_steps: int, model: ModelConfig | None = None) -> GradientTransformation:
    """The optimizer of a configuration for a model's parameters, its schedule stretched over ``total_steps``.

    A warm-up of ``total_steps`` or more is cut to a tenth of them, so that very short runs work too.
    model: with a "cms" feed-forward, whose blocks move every ``cms.periods[i]`` steps, from the mean gradient since.
    """

    def make(period: int) -> GradientTransformation:
        base = config.nested.base if config.name == "nested" else config.name
        total = max(total_steps // period, 1)
        return _plain(config, base, partial(_schedule, config, total, period), total)

    moved = make(1)
    if model is not None and model.feed_forward == "cms":
        moved = partition(cms_periods(make, model.cms.periods), cms_labels)
    rates = config.role_rates.changed
    if rates:  # part of what a nested optimizer's networks see and judge
        moved = chain(moved, scale_by_role(rates))
    if config.name == "nested":
        knobs = {each.name: getattr(config.nested, each.name) for each in dataclasses.fields(config.nested)}
        knobs.pop("base")
        return nested(moved, max_grad_norm=config.clip_norm, **knobs)
    return chain(clip_by_global_norm(config.clip_norm), moved) if config.clip_norm else moved


def _schedule(config: OptimConfig, total: int, period: int, ratio: float = 1.0) -> Schedule:
    """The learning rate's course over ``total`` updates, of a peak of ``ratio * lr``."""
    peak, end = config.lr * ratio, config.lr * ratio * config.min_lr_ratio
    warmup = config.warmup_steps // period
    warmup = warmup if warmup < total else total // 10
    if config.schedule == "cosine":
        return warmup_cosine(peak, warmup, total, end)
    return warmup_stable_decay(peak, warmup, min(config.decay_steps // period, total - warmup), total, end)


def _plain(
    config: OptimConfig, name: str, schedule: Callable[..., Schedule], total_steps: int
) -> GradientTransformation:
    b1, b2 = config.betas
    if name == "adamw":
        return adamw(schedule(), b1, b2, config.eps, config.weight_decay, decayed)
    if name == "muon":
        own = config.muon
        momentum = linear(own.momentum_start, own.momentum, own.momentum_steps) if own.momentum_steps else own.momentum
        return muon(
            schedule(), schedule(own.adam_ratio), momentum=momentum, nesterov=own.nesterov, method=own.method,
            steps=own.steps, scale=own.scale, weight_decay=config.weight_decay, b1=b1, b2=b2, eps=config.eps,
            mask=decayed, kernels=config.kernels,
        )  # fmt: skip
    found = dict(part for file in config.learned.weights for part in load_weights(file).items())
    if name == "velo":
        return velo(found or init_velo(rng.generator(0)), total_steps, learning_rate=schedule())
    return small_fc_lopt(
        found or init_small_fc_lopt(rng.generator(0)), learning_rate=schedule(), kernels=config.kernels
    )
