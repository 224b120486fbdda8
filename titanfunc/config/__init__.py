"""Every configuration dataclass, checked on construction. Imports no torch: a mistake is refused at once."""

from titanfunc.config.data import DataConfig
from titanfunc.config.experiment import Experiment
from titanfunc.config.model import MACConfig, MemoryConfig, ModelConfig
from titanfunc.config.presets import PRESETS, override, preset
from titanfunc.config.train import OptimConfig, TrainConfig

__all__ = [
    "PRESETS",
    "DataConfig",
    "Experiment",
    "MACConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "override",
    "preset",
]
