"""Named arithmetic over pytrees of tensors: nested dicts, tuples and NamedTuples, through optree.

optree sorts dict keys, so leaf lists from here are never zipped with those of another pytree library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

Tree = Any


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``fn`` on every leaf (and on the leaves at the same place of ``rest``); same structure, any shapes.

    Raises ValueError when the structures differ.
    """
    return optree.tree_map(fn, tree, *rest)


def leaves(tree: Tree) -> list[Any]:
    """The leaves in optree's order, of any shapes."""
    return optree.tree_leaves(tree)


def with_leaves(tree: Tree, leaves: list[Any]) -> Tree:
    """A tree of the same structure with other leaves, of any shapes, in the order of ``leaves(tree)``.

    Raises ValueError for another number of leaves.
    """
    return optree.tree_unflatten(optree.tree_structure(tree), leaves)


def named_leaves(tree: Tree) -> dict[str, Any]:
    """``{"blocks.0.attention.wq": leaf, ...}``: every leaf, of any shape, under its path."""
    paths, values, _ = optree.tree_flatten_with_path(tree)
    return {".".join(str(part) for part in path): value for path, value in zip(paths, values, strict=True)}


def zeros_like(tree: Tree) -> Tree:
    """Zeros of every leaf's shape, dtype and device."""
    return map(torch.zeros_like, tree)


def add(left: Tree, right: Tree) -> Tree:
    """``left + right``, leaf by leaf; shapes broadcast."""
    return map(torch.add, left, right)


def scale(tree: Tree, factor: Tensor | float) -> Tree:
    """``factor * tree`` for a number or a 0-d tensor; shapes stay."""
    return map(lambda leaf: leaf * factor, tree)


def where(condition: Tensor, yes: Tree, no: Tree) -> Tree:
    """``yes`` where the 0-d (or broadcastable) bool ``condition`` holds, else ``no``, leaf by leaf."""
    return map(lambda a, b: torch.where(condition, a, b), yes, no)


def global_norm(tree: Tree) -> Tensor:
    """The L2 norm over all elements of all leaves, a 0-d float32 (or float64) tensor."""
    squares = [torch.sum(leaf.to(_wide(leaf.dtype)) ** 2) for leaf in leaves(tree)]
    if not squares:
        return torch.zeros(())
    return torch.sqrt(torch.stack(squares).sum())


def size(tree: Tree) -> int:
    """The number of elements over all leaves, of any shapes."""
    return sum(leaf.numel() for leaf in leaves(tree))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
