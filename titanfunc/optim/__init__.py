"""Optimizers as pure functions over pytrees."""

from titanfunc.config import OptimConfig
from titanfunc.optim.adamw import adamw
from titanfunc.optim.base import GradientTransformation, apply_updates, chain, metrics_of
from titanfunc.optim.muon import MuonState, muon, scale_by_muon
from titanfunc.optim.nested import Groups, HeldOut, NestedState, by_role, nested
from titanfunc.optim.partition import EveryState, cms_labels, cms_periods, every, masked, partition
from titanfunc.optim.registry import from_config
from titanfunc.optim.schedules import Schedule, linear, warmup_cosine, warmup_stable_decay
from titanfunc.optim.transforms import (
    AdamState,
    LearningRateState,
    add_decayed_weights,
    clip_by_global_norm,
    current_learning_rate,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_role,
    scale_learning_rate,
)

__all__ = [
    "AdamState", "EveryState", "GradientTransformation", "Groups", "HeldOut", "LearningRateState", "MuonState",
    "NestedState", "OptimConfig", "Schedule", "adamw", "add_decayed_weights", "apply_updates", "by_role", "chain",
    "clip_by_global_norm", "cms_labels", "cms_periods", "current_learning_rate", "every", "from_config", "linear",
    "masked", "metrics_of", "muon", "nested", "partition", "scale_by_adam", "scale_by_learning_rate", "scale_by_muon",
    "scale_by_role", "scale_learning_rate", "warmup_cosine", "warmup_stable_decay",
]  # fmt: skip
