"""From a configuration to a model."""

from __future__ import annotations

import torch

from titanfunc import rng, tree
from titanfunc.config import ModelConfig
from titanfunc.models import mac, transformer
from titanfunc.models.base import Model

BUILDERS = {"mac": mac.build, "transformer": transformer.build}


def build(config: ModelConfig) -> Model:
    """The model of ``config.family`` (tokens [B, T] -> logits [B, T, V]); raises ValueError for an unknown one."""
    if config.family not in BUILDERS:
        raise ValueError(f"family: wanted one of {', '.join(BUILDERS)}, got {config.family!r}")
    return BUILDERS[config.family](config)


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters of any shape, counted without allocating them."""
    with torch._subclasses.FakeTensorMode():
        return tree.size(build(config).init(rng.generator(0)))
