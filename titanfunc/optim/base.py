"""Gradient transformations: an optimizer as two pure functions over pytrees of any shapes.

The contract is optax's: ``update`` turns gradients into what is to be *added* to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from titanfunc import tree

Tree = Any
State = Any


class Update(Protocol):
    """``update(updates, state, params, *, loss, **extra) -> (updates, state)`` over pytrees of the parameters' shapes.

    extra: what some transformation may use and the others pass by, such as ``held_out`` (see ``nested``).
    """

    def __call__(
        self, updates: Tree, state: State, params: Tree, *, loss: Any = None, **extra: Any
    ) -> tuple[Tree, State]:
        """What is to be added to ``params``, and the new state."""


class GradientTransformation(NamedTuple):
    """init(params) -> state and update(updates, state, params, *, loss, **extra) -> (updates, state)."""

    init: Callable[[Tree], State]
    update: Update


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """One transformation after another over trees of any shapes; the state is the tuple of theirs."""

    def init(params: Tree) -> State:
        return tuple(t.init(params) for t in transformations)

    def update(updates: Tree, state: State, params: Tree, *, loss: Any = None, **extra: Any) -> tuple[Tree, State]:
        if len(state) != len(transformations):
            raise ValueError(f"state: wanted {len(transformations)} parts, one a transformation, got {len(state)}")
        new = []
        for transformation, part in zip(transformations, state, strict=True):
            updates, part = transformation.update(updates, part, params, loss=loss, **extra)
            new.append(part)
        return updates, tuple(new)

    return GradientTransformation(init, update)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """``params + updates``, leaf by leaf (any shapes), each in its parameter's dtype."""
    return tree.map(lambda p, u: p + u.to(p.dtype), params, updates)


def metrics_of(state: State) -> dict[str, Tensor]:
    """The 0-d metrics of every part of an optimizer's state that has some: a NamedTuple with a method ``metrics``."""
    found: dict[str, Tensor] = {}
    if isinstance(state, tuple):
        for part in state:
            found.update(metrics_of(part))
        if hasattr(state, "metrics"):
            found.update(state.metrics())
    return found
