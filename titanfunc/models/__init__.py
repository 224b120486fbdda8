"""Language models as pure functions: MAC and the plain transformer."""

from titanfunc.config import MACConfig, MemoryConfig, ModelConfig, preset
from titanfunc.config.presets import PRESETS as presets
from titanfunc.models.base import Model
from titanfunc.models.registry import build, count_parameters
from titanfunc.models.roles import decayed, matrices, roles

__all__ = [
    "MACConfig", "MemoryConfig", "Model", "ModelConfig", "build", "count_parameters", "decayed", "matrices", "preset",
    "presets", "roles",
]  # fmt: skip
