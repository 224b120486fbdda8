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
    if net is not None:
        _check_net(config, net)
    net = net or memory_net(config.memory)
    return mac.build(config, net) if config.family == "mac" else stack.build(config, net)


def _check_net(config: ModelConfig, net: MemoryNet) -> None:
    """Raises ValueError unless the network takes rows of ``memory.head_dim`` features to the same."""
    size = config.memory.head_dim
    weights = {name: leaf[0] for name, leaf in net.init(rng.generator(0), 1).items()}
    rows = torch.zeros(2, size, dtype=next(iter(weights.values())).dtype)
    wanted = f"net: wanted a network of [N, {size}] -> [N, {size}] (memory.head_dim = {size})"
    try:
        shape = tuple(net.apply(weights, rows).shape)
    except RuntimeError as error:
        raise ValueError(f"{wanted}, got one that says: {str(error).splitlines()[0]}") from error
    if shape != (2, size):
        raise ValueError(f"{wanted}, got results {shape} for [2, {size}]")


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters of any shape, counted without allocating them."""
    with torch._subclasses.FakeTensorMode():
        return tree.size(build(config).init(rng.generator(0)))
