"""Different optimizers for different leaves, and an optimizer that moves its leaves only every so many steps.

Together they give the levels of a Continuum Memory System their frequencies (Behrouz et al. 2025, "Nested Learning",
arXiv 2512.24695): ``partition(cms_periods(make, (1, 8)), cms_labels)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.optim.base import GradientTransformation, State, Tree, chain

# Trees are walked by hand here: optree's paths come out in another form while Dynamo traces.


def partition(
    transformations: Mapping[str, GradientTransformation], labels: Callable[[Tree], Tree]
) -> GradientTransformation:
    """Every leaf (any shapes) by the transformation of its label, each with a state of its own leaves alone.

    labels: parameters (nested dicts) -> nested dicts of the same keys with a label for each leaf.
    The state is the tuple of theirs in the order of ``transformations``, () for one without leaves; so where several
    hold a learning rate, ``current_learning_rate`` is that of the first. What looks at the whole gradient, such as
    ``clip_by_global_norm``, sees only its part inside of one: place it before, with ``chain``.
    Raises ValueError for parameters that are no nested dicts, labels of another shape, and unknown labels.
    """
    names = tuple(transformations)

    def split(params: Tree) -> tuple[Tree, dict[str, GradientTransformation]]:
        chosen = labels(params)
        found = _names(chosen, params, names, "")
        return chosen, {name: transformations[name] for name in names if name in found}

    def init(params: Tree) -> State:
        chosen, used = split(params)
        return tuple(used[name].init(_pick(params, chosen, name)) if name in used else () for name in names)

    def update(updates: Tree, state: State, params: Tree, *, loss: Any = None, **extra: Any) -> tuple[Tree, State]:
        if len(state) != len(names):
            raise ValueError(f"state: wanted {len(names)} parts, one a label, got {len(state)}")
        chosen, used = split(params)
        moved, new = {}, []
        for name, part in zip(names, state, strict=True):
            if name in used:
                mine, own = _pick(updates, chosen, name), _pick(params, chosen, name)
                moved[name], part = used[name].update(mine, part, own, loss=loss, **extra)
            new.append(part)
        return _join(chosen, moved), tuple(new)

    return GradientTransformation(init, update)


def masked(transformation: GradientTransformation, mask: Callable[[Tree], Tree]) -> GradientTransformation:
    """``transformation`` where ``mask(params)``, nested dicts of bools like the parameters (any shapes), holds.

    Elsewhere updates pass through as they are, and nothing is held for them. Raises ValueError for parameters that are
    no nested dicts.
    """
    parts = {"yes": transformation, "no": chain()}
    return partition(parts, lambda params: tree.map(lambda yes: "yes" if yes else "no", mask(params)))


class EveryState(NamedTuple):
    """count: calls since the last update, 0-d int64. total: the sum of their gradients. inner: the optimizer's."""

    count: Tensor  # type: ignore[assignment]  # a field in place of tuple.count
    total: Tree
    inner: State


def every(transformation: GradientTransformation, period: int) -> GradientTransformation:
    """``transformation`` on each ``period``-th call, applied to the mean of the gradients (any shapes) since the last.

    On the other calls the updates are zero and its state stays, bit for bit; so its own count, and with it a
    schedule, advances once in ``period`` calls: give it a schedule that many times shorter. The loss it is
    handed is that of the call on which it moves. A period of 1 is ``transformation`` itself and holds nothing more.
    Which calls move is decided in the graph, by a counter that is a tensor. Raises ValueError for a period below 1.
    """
    if period < 1:
        raise ValueError(f"period: wanted at least 1, got {period}")
    if period == 1:
        return transformation

    def init(params: Tree) -> EveryState:
        count = torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)
        return EveryState(count, tree.zeros_like(params), transformation.init(params))

    def update(
        updates: Tree, state: EveryState, params: Tree, *, loss: Any = None, **extra: Any
    ) -> tuple[Tree, EveryState]:
        count, total = state.count + 1, tree.add(state.total, updates)
        due = count >= period  # more, where a run goes on with a shorter period
        moved, inner = transformation.update(tree.scale(total, 1 / count), state.inner, params, loss=loss, **extra)
        zero = tree.zeros_like
        return tree.where(due, moved, zero(moved)), EveryState(
            torch.where(due, torch.zeros_like(count), count),
            tree.where(due, zero(total), total),
            tree.where(due, inner, state.inner),
        )

    return GradientTransformation(init, update)


def cms_labels(params: Tree) -> Tree:
    """A label for each leaf (any shapes): "level<i>" under a part of that name, as in ``nn.init_cms``, else "rest"."""
    return _label(params, "rest")


def cms_periods(
    make: Callable[[int], GradientTransformation], periods: Sequence[int]
) -> dict[str, GradientTransformation]:
    """What ``partition`` takes beside ``cms_labels``: "rest" every step, "level<i>" every ``periods[i]`` steps.

    make: a period -> the optimizer (for leaves of any shapes) of what moves that often, so that its schedule can be
    as much shorter: ``lambda period: adamw(warmup_cosine(lr, warmup // period, total // period))``.
    """
    levels = {f"level{i}": every(make(period), period) for i, period in enumerate(periods)}
    return {"rest": make(1), **levels}


def _label(params: Tree, label: str) -> Tree:
    if not isinstance(params, dict):
        return label
    return {
        name: _label(part, name if name.startswith("level") and name[5:].isdigit() else label)
        for name, part in params.items()
    }


def _names(chosen: Tree, params: Tree, known: tuple[str, ...], path: str) -> set[str]:
    """The labels in use."""
    if isinstance(chosen, dict):
        if not isinstance(params, dict) or params.keys() != chosen.keys():
            raise ValueError(f"labels: wanted the parameters' nested dicts, got others at {path or 'the root'}")
        parts = [_names(part, params[key], known, f"{path}.{key}" if path else key) for key, part in chosen.items()]
        return set().union(*parts)
    if not isinstance(params, Tensor) or not path:
        raise ValueError(f"params: wanted nested dicts with a label a leaf, got {type(params).__name__} at {path!r}")
    if chosen not in known:
        raise ValueError(f"labels: wanted one of {', '.join(known)}, got {chosen!r} for {path}")
    return {chosen}


def _has(chosen: Tree, name: str) -> bool:
    return any(_has(part, name) for part in chosen.values()) if isinstance(chosen, dict) else chosen == name


def _pick(values: Tree, chosen: Tree, name: str) -> Tree:
    """The leaves labelled ``name``, in their nested dicts without empty ones."""
    return {
        key: _pick(values[key], label, name) if isinstance(label, dict) else values[key]
        for key, label in chosen.items()
        if _has(label, name)
    }


def _join(chosen: Tree, parts: dict[str, Tree]) -> Tree:
    """One tree of the labels' shape again, each leaf from the part of its label."""
    return {
        key: _join(label, {name: part[key] for name, part in parts.items() if key in part})
        if isinstance(label, dict)
        else parts[label][key]
        for key, label in chosen.items()
    }
