"""Optimizers as pure functions over pytrees."""

from titanfunc.config import OptimConfig
from titanfunc.optim.adamw import adamw
from titanfunc.optim.base import GradientTransformation, apply_updates, chain, metrics_of
from titanfunc.optim.implicit import conjugate_gradient, fixed_point, implicit_root, neumann, normal_conjugate_gradient
from titanfunc.optim.learned import (
    LearnedState,
    VeLOState,
    init_small_fc_lopt,
    init_velo,
    init_velo_mlp,
    load_weights,
    network_of,
    save_weights,
    small_fc_lopt,
    velo,
    velo_mlp,
    with_network,
)
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
    "AdamState", "EveryState", "GradientTransformation", "Groups", "HeldOut", "LearnedState", "LearningRateState",
    "MuonState", "NestedState", "OptimConfig", "Schedule", "VeLOState", "adamw", "add_decayed_weights", "apply_updates",
    "by_role", "chain", "clip_by_global_norm", "cms_labels", "cms_periods", "conjugate_gradient",
    "current_learning_rate", "every", "fixed_point", "from_config", "implicit_root", "init_small_fc_lopt", "init_velo",
    "init_velo_mlp", "linear", "load_weights", "masked", "metrics_of", "muon", "nested", "network_of", "neumann",
    "normal_conjugate_gradient", "partition", "save_weights", "scale_by_adam", "scale_by_learning_rate",
    "scale_by_muon", "scale_by_role", "scale_learning_rate", "small_fc_lopt", "velo", "velo_mlp", "warmup_cosine",
    "warmup_stable_decay", "with_network",
]  # fmt: skip
