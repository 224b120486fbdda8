"""Every configuration dataclass, checked on construction. Imports no torch: a mistake is refused at once."""

from titanfunc.config.model import MACConfig, MemoryConfig, ModelConfig
from titanfunc.config.presets import PRESETS, override, preset

__all__ = ["PRESETS", "MACConfig", "MemoryConfig", "ModelConfig", "override", "preset"]
