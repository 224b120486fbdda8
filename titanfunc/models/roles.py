"""What each parameter is for, declared once: optimizers split and scale by role, never by accident of a name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from titanfunc import tree

ROLES = (
    "embedding", "head", "attention", "feed_forward", "memory", "memory_initial", "convolution", "gate",
    "persistent", "norm",
)  # fmt: skip

STACKED = "blocks"
"""The part of a model's parameters whose leaves begin with an axis of layers."""

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
_HIDDEN = ("attention", "feed_forward", "memory", "hidden")
_DECAYED = ("attention", "feed_forward", "memory", "head", "embedding")


def roles(params: Any, missing: str = "") -> Any:
    """A pytree like ``params``, nested dicts with leaves of any shape, with each leaf's role, one of ROLES.

    The innermost part of a leaf's path that has a role gives it. Where none has, it is ``missing``; without that,
    a ValueError is raised.
    """
    return _label(params, "", "", missing)


def _label(params: Any, path: str, role: str, missing: str) -> Any:
    # A plain walk, not optree's paths: those come out in another form while Dynamo traces.
    if isinstance(params, dict):
        return {
            name: _label(part, f"{path}.{name}" if path else name, _PART_ROLE.get(name, role), missing)
            for name, part in params.items()
        }
    if not role and not missing:
        raise ValueError(f"params: no role is declared for {path}")
    return role or missing


def require_dicts(params: Any, path: str = "params") -> None:
    """Raise ``ValueError`` unless ``params`` are nested dicts with a tensor (of any shape) in each, somewhere."""
    if isinstance(params, dict) and params:
        for name, part in params.items():
            require_dicts(part, f"{path}.{name}")
    elif not isinstance(params, Tensor):
        raise ValueError(f"params: wanted nested dicts of tensors, got {type(params).__name__} for {path}")
    elif path == "params":
        raise ValueError("params: wanted nested dicts of tensors, got a tensor alone")


def stacked(params: Any) -> Any:
    """A pytree of bools like ``params``, nested dicts: whether a leaf is [layers, ...], all blocks' of its kind."""
    return {name: tree.map(lambda leaf, inside=name == STACKED: inside, part) for name, part in params.items()}


def matrices(params: Any) -> Any:
    """A pytree of bools like ``params``, nested dicts: true for the hidden layers' matrices (of each block, head or
    expert), which Muon moves; false for embeddings, head, norms, gates, convolutions, first memory weights and biases.

    Parameters without a role are taken by their number of axes: 2 or more make a matrix. Raises ValueError for what
    is no nested dicts of tensors.
    """
    require_dicts(params)

    def hidden(leaf: Any, role: str, inside: bool) -> bool:
        return role in _HIDDEN and leaf.ndim - inside >= 2

    return tree.map(hidden, params, roles(params, missing="hidden"), stacked(params))


def decayed(params: Any) -> Any:
    """A pytree of bools like ``params``: true for the matrices that weight decay acts on, false for norms, gates,
    convolutions, persistent tokens and the memory's initial weights (any shapes)."""
    return tree.map(lambda role: role in _DECAYED, roles(params))
