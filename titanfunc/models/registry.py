"""From a configuration to a model."""

from __future__ import annotations

import torch

from titanfunc import rng, tree
from titanfunc.config import ModelConfig
from titanfunc.memory.layer import memory_net
from titanfunc.memory.network import MemoryNet
from titanfunc.models import mac, stack
from titanfunc.models.base import Model


def build(config: ModelConfig, net: MemoryNet | None = None) -> Model:
    """The model of ``config.family`` (tokens [B, T] -> logits [B, T, V]).

    net: the memories' network, rows of ``config.memory.head_dim`` features to the same (None: the SiLU MLP that
    ``config.memory`` describes).
    """
    net = net or memory_net(config.memory)
    return mac.build(config, net) if config.family == "mac" else stack.build(config, net)


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters of any shape, counted without allocating them."""
    with torch._subclasses.FakeTensorMode():
        return tree.size(build(config).init(rng.generator(0)))
