"""What a nested optimizer carries from step to step.

Letters: L layers of a family of groups, G groups, F statistics, g a gradient, phi the networks' weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.optim.base import State, Tree
from titanfunc.optim.muon import MuonState
from titanfunc.optim.nested.meta import MetaState
from titanfunc.optim.transforms import AdamState, current_learning_rate

LOSS_DECAY = 0.9


class Record(NamedTuple):
    """What the last update was made of, beside what is in ``Inner``, for the gradient that comes after it to judge.
    updates: the base's, as it came. grads: what a momentum network saw (() if none did, or ``Inner.before`` is that).
    trend: 0-d, of the loss."""

    updates: Tree
    grads: Any
    trend: Tensor


class Schedule(NamedTuple):
    """The base's learning rate: peak, the most so far, and share, the last one as a share of it (0-d both)."""

    peak: Tensor
    share: Tensor


class Made(NamedTuple):
    """What an update is made of. updates: the base's. stats: [G, F], the controller's input. seen: a momentum
    network's input, or (). share: what log multipliers are multiplied by, 0-d, or 1."""

    updates: Tree
    stats: Tensor
    seen: Any
    share: Tensor | float


class Inner(NamedTuple):
    """What moves the parameters; () for all that is off. base: its state. stats: [G, F], as of the controller's last
    look. average: 0-d, running mean of the log loss. mean: decaying mean of g, trees like the parameters, as is
    before: the last g. memories: of deep_momentum. levels: of the gradient levels. schedule: a Schedule."""

    count: Tensor  # type: ignore[assignment]  # a field in place of tuple.count
    base: State
    stats: Tensor
    average: Tensor
    mean: Any
    before: Any
    memories: Any
    levels: Any
    schedule: Any


class NestedState(NamedTuple):
    """inner: what moves the parameters. phi: the networks' weights. multipliers: {family: [L]}, those of the last
    update. record, meta: for learning phi; () where nothing learns."""

    inner: Inner
    phi: Tree
    multipliers: dict[str, Tensor]
    record: Any
    meta: Any

    def metrics(self) -> dict[str, Tensor]:
        """0-d: each family's mean multiplier and each layer's, the least and the greatest, the norm of the base's
        momentum, and what is known of learning phi."""
        found = {f"nested/multiplier_{name}": values.mean() for name, values in self.multipliers.items()}
        for name, values in self.multipliers.items():
            if len(values) > 1:
                found |= {f"nested/multiplier_{name}.{i}": value for i, value in enumerate(values)}
        every = torch.cat(list(self.multipliers.values()))
        found |= {"nested/least_multiplier": every.min(), "nested/greatest_multiplier": every.max()}
        if isinstance(self.meta, MetaState):
            found |= {"nested/meta_loss": self.meta.loss, "nested/meta_steps": self.meta.steps}
            found["nested/meta_refused"] = self.meta.refused
        momenta = _momenta(self.inner.base)
        if momenta:
            found["nested/momentum_norm"] = tree.global_norm(momenta)
        return found


def _momenta(state: Any) -> list[Tree]:
    """The momenta in a base's state: AdamW's first moments, and Muon's."""
    if isinstance(state, AdamState):
        return [state.first]
    if isinstance(state, MuonState):
        return [state.momentum]
    return [each for part in state for each in _momenta(part)] if isinstance(state, tuple) else []


def annealed(schedule: Any, base: Any) -> Any:
    """The Schedule (0-d leaves) after an update of ``base``, a state; () where nothing fades."""
    if not isinstance(schedule, Schedule):
        return ()
    rate = current_learning_rate(base)
    assert rate is not None  # init saw to it
    rate = rate.to(schedule.peak.dtype)
    peak = torch.maximum(schedule.peak, rate)
    return Schedule(peak, torch.where(peak > 0, rate / peak.clamp_min(1e-30), 1.0))


def share_of(schedule: Any) -> Tensor | float:
    """What log multipliers are multiplied by, 0-d, or 1 where nothing fades."""
    return schedule.share if isinstance(schedule, Schedule) else 1.0


def follow(inner: Inner, loss: Any) -> tuple[Tensor, Tensor]:
    """The running mean of the log loss with this one in it, and what this one is above the mean before (0-d both)."""
    if loss is None:
        return inner.average, torch.zeros_like(inner.average)
    now = torch.log(loss.to(inner.average.dtype).clamp_min(1e-8))
    old = torch.where(inner.count == 0, now, inner.average)
    return LOSS_DECAY * old + (1 - LOSS_DECAY) * now, now - old
