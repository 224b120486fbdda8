"""Parameter groups: what a learned controller decides about as one, by role and, inside the blocks, by layer.

Letters: G groups, L layers. A leaf of a model's blocks is [L, ...]: each layer's part of it is in a group of its own,
so sums over groups and factors for groups are vectors [G], made of one part a family (a role's groups over the layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.models.roles import require_dicts, roles, stacked
from titanfunc.optim.base import Tree

FAMILY_OF_ROLE = {
    "embedding": "embedding",
    "head": "head",
    "attention": "attention",
    "feed_forward": "feed_forward",
    "memory": "memory",
    "memory_initial": "memory",
    "convolution": "norms_and_gates",
    "gate": "norms_and_gates",
    "persistent": "norms_and_gates",
    "norm": "norms_and_gates",
}


class Groups(NamedTuple):
    """How the leaves of some parameters fall into groups; Python values alone.

    families: (name, L; 0 for leaves outside the blocks), in the order of the groups. of_leaf: for each leaf, in
    tree order, its family's place. sizes: parameters of one group of each family.
    """

    families: tuple[tuple[str, int], ...]
    of_leaf: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """A name for each family: "embedding", "attention", ...; "outer_<name>" for what is outside the blocks of a
        name that they have too."""
        inside = {name for name, layers in self.families if layers}
        found: list[str] = []
        for name, layers in self.families:
            plain = f"outer_{name}" if not layers and name in inside else name
            found.append(plain if plain not in found else f"{plain}_of_{layers}")
        return found

    def pack(self, values: Tensor) -> dict[str, Tensor]:
        """values [G] as ``{family: [L] (or [1])}``."""
        return dict(zip(self.names, self.split(values), strict=True))

    def depth(self, device: torch.device) -> Tensor:
        """[G]: 0 at the embedding, 1 at the head and the last norm, the layers evenly between."""
        parts = []
        for name, layers in self.families:
            inside = torch.arange(1, layers + 1, device=device, dtype=torch.float32) / (layers + 1)
            outside = torch.full((1,), 0.0 if name == "embedding" else 1.0, device=device)
            parts.append(inside if layers else outside)
        return torch.cat(parts)

    def weight(self, device: torch.device) -> Tensor:
        """[G]: the share of all parameters that a group holds; sums to 1."""
        counts = [
            torch.full((max(layers, 1),), float(size), device=device)
            for (_, layers), size in zip(self.families, self.sizes, strict=True)
        ]
        every = torch.cat(counts)
        return every / every.sum()

    def sums(self, *trees: Tree) -> Tensor:
        """[G], float32 (or float64): sums over each group of the product of the trees' leaves (any shapes)."""
        totals: list[Any] = [0.0] * len(self.families)
        for family, leaves in zip(self.of_leaf, zip(*map(tree.leaves, trees), strict=True), strict=True):
            layers = self.families[family][1]
            wide = [leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]
            product = wide[0]
            for leaf in wide[1:]:
                product = product * leaf
            totals[family] = totals[family] + product.reshape(max(layers, 1), -1).sum(-1)
        return torch.cat(totals)

    def scale(self, values: Tree, factors: Tensor) -> Tree:
        """``values`` (leaves of any shapes) times their group's of ``factors`` [G], each in its own dtype."""
        by_family = self.split(factors)
        leaves = [
            leaf * _along(by_family[family].to(leaf.dtype), leaf, self.families[family][1])
            for family, leaf in zip(self.of_leaf, tree.leaves(values), strict=True)
        ]
        return tree.with_leaves(values, leaves)

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """values [G] as one tensor [L] (or [1]) a family."""
        return values.split([max(layers, 1) for _, layers in self.families])


def by_role(params: Tree) -> Groups:
    """The groups of a model's parameters (nested dicts, any shapes): embedding, attention, memory, feed-forward,
    norms and gates, head; one a layer inside the blocks. Parts without a role are groups under their own top names.

    Raises ValueError for parameters that are no nested dicts of tensors, and for a 0-d leaf inside the blocks.
    """
    require_dicts(params)
    names: dict[tuple[str, int], int] = {}
    sizes: list[int] = []
    of_leaf = []

    def place(leaf: Tensor, label: str, inside: bool) -> None:
        if inside and not leaf.ndim:
            raise ValueError("params: wanted leaves [layers, ...] under blocks, got one of no axes")
        family = (label, leaf.shape[0] if inside else 0)
        if family not in names:
            names[family] = len(sizes)
            sizes.append(0)
        of_leaf.append(names[family])
        sizes[names[family]] += leaf.numel() // max(family[1], 1)

    marked = roles(params, missing="?")
    labels = {top: tree.map(lambda role, top=top: FAMILY_OF_ROLE.get(role, top), part) for top, part in marked.items()}
    tree.map(place, params, labels, stacked(params))
    return Groups(tuple(names), tuple(of_leaf), tuple(sizes))


def _along(factors: Tensor, leaf: Tensor, layers: int) -> Tensor:
    return factors.reshape(-1, *[1] * (leaf.ndim - 1)) if layers else factors.reshape(())


Grouping = Callable[[Tree], Groups]
