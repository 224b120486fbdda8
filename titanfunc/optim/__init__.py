"""Optimizers as pure functions over pytrees."""

from titanfunc.config import OptimConfig
from titanfunc.optim.adamw import adamw, from_config
from titanfunc.optim.base import GradientTransformation, apply_updates, chain
from titanfunc.optim.partition import EveryState, cms_labels, cms_periods, every, partition
from titanfunc.optim.schedules import Schedule, warmup_cosine
from titanfunc.optim.transforms import (
    AdamState,
    LearningRateState,
    add_decayed_weights,
    clip_by_global_norm,
    current_learning_rate,
    scale_by_adam,
    scale_by_learning_rate,
)

__all__ = [
    "AdamState", "EveryState", "GradientTransformation", "LearningRateState", "OptimConfig", "Schedule", "adamw",
    "add_decayed_weights", "apply_updates", "chain", "clip_by_global_norm", "cms_labels", "cms_periods",
    "current_learning_rate", "every", "from_config", "partition", "scale_by_adam", "scale_by_learning_rate",
    "warmup_cosine",
]  # fmt: skip
