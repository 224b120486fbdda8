"""What each parameter is for, declared once: optimizers split and scale by role, never by accident of a name."""

from __future__ import annotations

from typing import Any

from titanfunc import tree

ROLES = (
    "embedding", "head", "attention", "feed_forward", "memory", "memory_initial", "convolution", "gate",
    "persistent", "norm",
)  # fmt: skip

_PART_ROLE = {
    "embedding": "embedding",
    "head": "head",
    "attention": "attention",
    "feed_forward": "feed_forward",
    "memory": "memory",
    "initial": "memory_initial",
    "taps": "convolution",
    "gates": "gate",
    "persistent": "persistent",
    "norm": "norm",
    "norm_attention": "norm",
    "norm_feed_forward": "norm",
    "norm_memory": "norm",
    "norm_read": "norm",
    "router": "gate",
}
_DECAYED = ("attention", "feed_forward", "memory", "head", "embedding")


def roles(params: Any) -> Any:
    """A pytree like ``params``, nested dicts with leaves of any shape, with each leaf's role, one of ROLES.

    The innermost part of a leaf's path that has a role gives it. Raises ValueError for a leaf without one.
    """
    return _label(params, "", "")


def _label(params: Any, path: str, role: str) -> Any:
    # A plain walk, not optree's paths: those come out in another form while Dynamo traces.
    if isinstance(params, dict):
        return {
            name: _label(part, f"{path}.{name}" if path else name, _PART_ROLE.get(name, role))
            for name, part in params.items()
        }
    if not role:
        raise ValueError(f"params: no role is declared for {path}")
    return role


def decayed(params: Any) -> Any:
    """A pytree of bools like ``params``: true for the matrices that weight decay acts on, false for norms, gates,
    convolutions, persistent tokens and the memory's initial weights (any shapes)."""
    return tree.map(lambda role: role in _DECAYED, roles(params))
