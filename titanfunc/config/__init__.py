"""Every configuration dataclass, checked on construction. Imports no torch: a mistake is refused at once."""

from titanfunc.config.data import DataConfig
from titanfunc.config.experiment import Experiment
from titanfunc.config.model import CMSConfig, MACConfig, MemoryConfig, ModelConfig, MoEConfig
from titanfunc.config.optim import OptimConfig
from titanfunc.config.presets import PRESETS, override, preset
from titanfunc.config.rule import PER_TOKEN, WriteRule
from titanfunc.config.train import TrainConfig

__all__ = [
    "PER_TOKEN",
    "PRESETS",
    "CMSConfig",
    "DataConfig",
    "Experiment",
    "MACConfig",
    "MemoryConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "WriteRule",
    "override",
    "preset",
]
