"""What a memory minimises: the loss of one residual r = M(k) - v, feature by feature, with two derivatives.

    l2      r^2
    huber   r^2 where |r| <= delta, else 2 delta |r| - delta^2         (Yaad, feature-wise)
    lp      |r|^p with p >= 3, so that it has three derivatives at 0   (Moneta; p = 3 there)

Source: MIRAS (arXiv 2504.13173), section 5. Its other halves, forgetting and momentum, are the gates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc.config import WriteRule


class Objective(NamedTuple):
    """kind: one of titanfunc.config.rule.OBJECTIVES. parameter: huber's delta, lp's p. scale: 1 for a sum over
    features, 1 / D for a mean."""

    kind: str = "l2"
    parameter: float = 0.0
    scale: float = 1.0


L2 = Objective()


def objective_of(rule: WriteRule, features: int) -> Objective:
    """The objective that a rule names, for rows of ``features`` features."""
    parameter = rule.parameter or {"l2": 0.0, "huber": 1.0, "lp": 3.0}[rule.objective]
    return Objective(rule.objective, parameter, 1.0 if rule.loss == "sum" else 1 / features)


def value(objective: Objective, r: Tensor) -> Tensor:
    """The loss of every residual, shaped like r [...]."""
    kind, c, scale = objective
    if kind == "l2":
        return scale * r * r
    size = r.abs()
    if kind == "huber":
        inside = size.clamp(max=c)
        return scale * inside * (2 * size - inside)
    return scale * size**c


def slope(objective: Objective, r: Tensor) -> Tensor:
    """The first derivative, shaped like r [...]."""
    kind, c, scale = objective
    if kind == "l2":
        return 2 * scale * r
    if kind == "huber":
        return 2 * scale * r.clamp(-c, c)
    return c * scale * r.sign() * r.abs() ** (c - 1)


def curvature(objective: Objective, r: Tensor) -> Tensor:
    """The second derivative, shaped like r [...]."""
    kind, c, scale = objective
    if kind == "l2":
        return torch.full_like(r, 2 * scale)
    if kind == "huber":
        return 2 * scale * (r.abs() <= c).to(r.dtype)
    return c * (c - 1) * scale * r.abs() ** (c - 2)
