"""The parts of AdamW as gradient transformations over trees of any shapes.

Letters: g gradient, p parameter, t the number of updates, from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.models.roles import ROLES, roles
from titanfunc.optim.base import GradientTransformation, Tree
from titanfunc.optim.schedules import Schedule


def clip_by_global_norm(max_norm: float) -> GradientTransformation:
    """Scales the whole gradient (any shapes) to an L2 norm of at most ``max_norm``; no state. ValueError unless > 0."""
    if max_norm <= 0:
        raise ValueError(f"max_norm: wanted a positive number, got {max_norm}")

    def update(
        updates: Tree, state: tuple[()], params: Tree, *, loss: Any = None, **extra: Any
    ) -> tuple[Tree, tuple[()]]:
        return tree.scale(updates, max_norm / tree.global_norm(updates).clamp(min=max_norm)), state

    return GradientTransformation(lambda params: (), update)


class AdamState(NamedTuple):
    """count: updates so far, 0-d int64. first, second: decaying means of g and g^2, like the parameters."""

    count: Tensor  # type: ignore[assignment]  # a field in place of tuple.count
    first: Tree
    second: Tree


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> GradientTransformation:
    """g -> m_hat / (sqrt(v_hat) + eps), leaf by leaf (any shapes). Kingma & Ba, arXiv 1412.6980.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, m_hat = m / (1 - b1^t), v_hat = v / (1 - b2^t).
    Raises ValueError for decays outside [0, 1).
    """
    for name, beta in (("b1", b1), ("b2", b2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: wanted a number in [0, 1), got {beta}")

    def init(params: Tree) -> AdamState:
        return AdamState(_count(params), tree.zeros_like(params), tree.zeros_like(params))

    def update(
        updates: Tree, state: AdamState, params: Tree, *, loss: Any = None, **extra: Any
    ) -> tuple[Tree, AdamState]:
        count = state.count + 1
        steps = count.to(torch.float32)
        first = tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, updates)
        second = tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, updates)
        scale1, scale2 = _correction(b1, steps), _correction(b2, steps)
        direction = tree.map(lambda m, v: m * scale1 / (torch.sqrt(v * scale2) + eps), first, second)
        return direction, AdamState(count, first, second)

    return GradientTransformation(init, update)


def _correction(decay: float, steps: Tensor) -> Tensor | float:
    """1 / (1 - decay^t): by expm1, as 1 - decay^t in float32 would lose the digits of a decay near 1."""
    return -1 / torch.expm1(steps * math.log(decay)) if decay else 1.0


def add_decayed_weights(weight_decay: float, mask: Callable[[Tree], Tree] | None = None) -> GradientTransformation:
    """u -> u + weight_decay * p where ``mask(params)``, a tree of bools, holds (everywhere without one); any shapes.

    Placed before the learning rate, it decays a weight by lr * weight_decay a step. Loshchilov & Hutter, 1711.05101.
    """

    def update(
        updates: Tree, state: tuple[()], params: Tree, *, loss: Any = None, **extra: Any
    ) -> tuple[Tree, tuple[()]]:
        chosen = mask(params) if mask else tree.map(lambda p: True, params)
        return tree.map(lambda u, p, yes: u + weight_decay * p if yes else u, updates, params, chosen), state

    return GradientTransformation(lambda params: (), update)


class LearningRateState(NamedTuple):
    """count: updates so far, 0-d int64. learning_rate: the one that the next (constant) or last update took, 0-d.

    scale: what a schedule's rate is multiplied by, 0-d: 1, unless ``scale_learning_rate`` says otherwise.
    """

    count: Tensor  # type: ignore[assignment]  # a field in place of tuple.count
    learning_rate: Tensor
    scale: Tensor


def scale_by_learning_rate(learning_rate: float | Schedule) -> GradientTransformation:
    """u -> -lr u, leaf by leaf (any shapes).

    A number becomes a 0-d tensor in the state, which may be replaced between steps without recompiling;
    a schedule is a function of the number of updates so far. Raises ValueError for a negative number.
    """
    if not callable(learning_rate) and learning_rate < 0:
        raise ValueError(f"learning_rate: wanted 0 or a positive number, got {learning_rate}")

    def init(params: Tree) -> LearningRateState:
        count = _count(params)
        one = torch.ones((), device=count.device)
        if callable(learning_rate):
            return LearningRateState(count, learning_rate(count), one)
        return LearningRateState(count, torch.full((), float(learning_rate), device=count.device), one)

    def update(
        updates: Tree, state: LearningRateState, params: Tree, *, loss: Any = None, **extra: Any
    ) -> tuple[Tree, LearningRateState]:
        rate = learning_rate(state.count) * state.scale if callable(learning_rate) else state.learning_rate
        return tree.scale(updates, -rate), LearningRateState(state.count + 1, rate, state.scale)

    return GradientTransformation(init, update)


def scale_learning_rate(state: Any, factor: float | Tensor) -> Any:
    """An optimizer's state (any shapes) whose learning rates are ``factor`` times what its schedules say from now on.

    The same graph serves: compare peaks without compiling again. Constant rates are scaled themselves.
    Raises ValueError for a number that is not above 0.
    """
    if not isinstance(factor, Tensor) and not factor > 0:
        raise ValueError(f"factor: wanted a positive number, got {factor}")
    if isinstance(state, LearningRateState):
        scale = torch.ones_like(state.scale) * factor
        return state._replace(learning_rate=state.learning_rate * scale / state.scale, scale=scale)
    if isinstance(state, tuple):
        parts = [scale_learning_rate(part, factor) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def scale_by_role(factors: Mapping[str, float]) -> GradientTransformation:
    """u -> factor u for the leaves (nested dicts, any shapes) of each role named, e.g. ``{"embedding": 0.5}``.

    Placed after the learning rate, it multiplies it, the weight decay's too. Raises ValueError for a role that
    ``titanfunc.models.roles`` does not know, and for a factor below 0.
    """
    for role, factor in factors.items():
        if role not in ROLES:
            raise ValueError(f"factors: wanted roles among {', '.join(ROLES)}, got {role!r}")
        if not factor >= 0:
            raise ValueError(f"factors: wanted 0 or a positive number for {role}, got {factor}")

    def update(
        updates: Tree, state: tuple[()], params: Tree, *, loss: Any = None, **extra: Any
    ) -> tuple[Tree, tuple[()]]:
        return tree.map(lambda u, role: u * factors[role] if role in factors else u, updates, roles(params)), state

    return GradientTransformation(lambda params: (), update)


def current_learning_rate(state: Any) -> Tensor | None:
    """The 0-d learning rate inside an optimizer's state, or None where there is none."""
    if isinstance(state, LearningRateState):
        return state.learning_rate
    if isinstance(state, tuple):
        for part in state:
            found = current_learning_rate(part)
            if found is not None:
                return found
    return None


def _count(params: Tree) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)
