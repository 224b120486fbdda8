"""The controller: a learning-rate multiplier for every parameter group, from what is known of the group.

Letters: G groups, F statistics.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc.optim.base import Tree
from titanfunc.optim.nested.groups import Groups
from titanfunc.optim.nested.networks import Network, apply_mlp, init_mlp

STATISTICS = ("gradient norm", "parameter norm", "depth", "loss trend")


class Bounds(NamedTuple):
    """What a multiplier stays between, and whether the groups' geometric mean, by weights, is held at 1."""

    least: float
    most: float
    relative: bool


def init_controller(generator: torch.Generator, groups: int, hidden: int, layers: int) -> Network:
    """An MLP [F] -> 1 over the statistics, and an offset [G] for what they do not tell; multipliers are exactly 1."""
    network = init_mlp(generator, len(STATISTICS), hidden, layers, 1, bias=False)
    return {**network, "offset": torch.zeros(groups, device=generator.device)}


def statistics(groups: Groups, grads: Tree, params: Tree, trend: Tensor) -> Tensor:
    """[G, F]: log1p of the gradient's norm (before any clipping) and of the parameters', depth, the loss's trend.

    grads, params: nested dicts of any shapes. trend: 0-d, log loss less its running mean.
    """
    gradient, size = groups.sums(grads, grads).sqrt(), groups.sums(params, params).sqrt()
    depth = groups.depth(gradient.device).to(gradient.dtype)
    found = torch.stack([torch.log1p(gradient), torch.log1p(size), depth, trend.to(depth.dtype).expand_as(depth)], -1)
    return torch.nan_to_num(found, posinf=0.0, neginf=0.0)


def log_multipliers(network: Network, stats: Tensor, groups: Groups, bounds: Bounds) -> Tensor:
    """[G] from statistics [G, F]: each in (log least, log most), smoothly, and 0 for a network that is new.

    With ``bounds.relative`` the groups' mean, by their share of the parameters, is taken off first.
    """
    mlp = {name: leaf for name, leaf in network.items() if name != "offset"}
    # A meta-step moves every weight by about the meta-rate: over the hidden units' number, it moves the MLP's word by
    # no more than an offset.
    raw = apply_mlp(mlp, stats).squeeze(-1) / network["w0"].shape[-1] + network["offset"].to(stats.dtype)
    if bounds.relative:
        raw = raw - (groups.weight(raw.device).to(raw.dtype) * raw).sum()
    return torch.where(raw > 0, _soft(raw, math.log(bounds.most)), _soft(raw, -math.log(bounds.least)))


def _soft(x: Tensor, bound: float) -> Any:
    """x near 0, and never more than ``bound`` away from it."""
    return bound * torch.tanh(x / bound) if bound else x * 0.0
