"""torch.optim.Muon with a fused torch.optim.AdamW over a pytree of ours, to stand beside our Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.models import matrices


class Mover(NamedTuple):
    """params: what is moved, leaves of any shapes. give(grads, clip_norm=0): sets the gradients, a tree like params,
    brought to that global norm at most (0: as they are). step(): moves."""

    params: Any
    give: Callable[..., None]
    step: Callable[[], None]


def muon_and_adamw(params: Any, *, lr: float, adam_lr: float, weight_decay: float) -> Mover:
    """torch's own optimizers over copies of the parameters (leaves of any shapes): each hidden matrix by Muon, the rest
    by AdamW. torch's Muon takes single matrices, so that stacked leaves are cut for it."""
    hidden = tree.leaves(matrices(params))
    copies = [leaf.clone() for leaf in tree.leaves(params)]
    turned: list[Tensor] = []
    rest: list[Tensor] = []
    for copy, is_hidden in zip(copies, hidden, strict=True):
        for part in _cut(copy.detach(), is_hidden):
            (turned if is_hidden else rest).append(part.requires_grad_())
    muon = torch.optim.Muon(turned, lr=lr, weight_decay=weight_decay, momentum=0.95, nesterov=True)
    fused = rest[0].is_cuda
    adamw = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)

    def give(grads: Any, clip_norm: float = 0.0) -> None:
        found = {True: iter(turned), False: iter(rest)}
        for leaf, is_hidden in zip(tree.leaves(grads), hidden, strict=True):
            for part in _cut(leaf, is_hidden):
                next(found[is_hidden]).grad = part
        if clip_norm:
            torch.nn.utils.clip_grad_norm_([*turned, *rest], clip_norm)

    def step() -> None:
        muon.step()
        adamw.step()

    return Mover(tree.with_leaves(params, copies), give, step)


def _cut(leaf: Tensor, is_hidden: bool) -> list[Tensor]:
    return list(leaf.flatten(0, -3)) if is_hidden and leaf.ndim > 2 else [leaf]
