"""Muon: momentum whose matrices are orthogonalised before they move the weights (Jordan et al., 2024).

Letters: G gradient, M its momentum, N rows and K columns of a matrix, t the number of updates, from 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanfunc import tree
from titanfunc.models.roles import matrices
from titanfunc.ops.backend import implementation
from titanfunc.ops.orthogonal import METHODS, orthogonalize
from titanfunc.optim.adamw import adamw
from titanfunc.optim.base import GradientTransformation, Tree, chain
from titanfunc.optim.partition import partition
from titanfunc.optim.schedules import Schedule
from titanfunc.optim.transforms import add_decayed_weights, clip_by_global_norm, scale_by_learning_rate

SCALES = ("spectral", "adam")


class MuonState(NamedTuple):
    """count: updates so far, 0-d int64. momentum: the decaying mean of G, like the parameters, matrices [..., N, K]."""

    count: Tensor  # type: ignore[assignment]  # a field in place of tuple.count
    momentum: Tree


def scale_by_muon(
    momentum: float | Schedule = 0.95,
    *,
    nesterov: bool = True,
    method: str = "newton_schulz",
    steps: int = 5,
    scale: str = "spectral",
    dtype: torch.dtype | None = torch.bfloat16,
    kernels: str = "reference",
) -> GradientTransformation:
    """G -> scale * orthogonalize(direction), matrix by matrix of leaves [..., N, K].

    M = m M + (1 - m) G; the direction is M, or with ``nesterov`` m M + (1 - m) G once more. momentum: m, or a schedule
    of it (``linear(0.85, 0.95, 300)``). method, steps: of ``ops.orthogonal.orthogonalize``, in ``dtype`` (None: the
    parameters'). Leaves of one shape, or of its transpose, are orthogonalised as one batch.
    scale: "spectral", sqrt(max(1, N / K)), or "adam", 0.2 sqrt(max(N, K)): steps as AdamW's (arXiv 2502.16982).
    kernels: of the orthogonalisation; "triton" takes float32 and bfloat16.
    Raises ValueError for values out of range and for leaves that are no matrices.
    """
    if not callable(momentum) and not 0 <= momentum < 1:
        raise ValueError(f"momentum: wanted a number in [0, 1), got {momentum}")
    if method not in METHODS:
        raise ValueError(f"method: wanted one of {', '.join(METHODS)}, got {method!r}")
    if scale not in SCALES:
        raise ValueError(f"scale: wanted one of {', '.join(SCALES)}, got {scale!r}")
    if steps < 1:
        raise ValueError(f"steps: wanted at least 1, got {steps}")
    implementation("gram", kernels)  # a name that means something

    def init(params: Tree) -> MuonState:
        for name, leaf in tree.named_leaves(params).items():
            if leaf.dtype == torch.float16:
                raise ValueError(f"params: wanted float32, float64 or bfloat16, got float16 for {name}")
            if leaf.ndim < 2 or not leaf.numel():
                raise ValueError(f"params: wanted matrices [..., N, K], got {name} of shape {tuple(leaf.shape)}")
        count = torch.zeros((), dtype=torch.int64, device=tree.leaves(params)[0].device)
        return MuonState(count, tree.zeros_like(params))

    def update(
        updates: Tree, state: MuonState, params: Tree, *, loss: Any = None, **extra: Any
    ) -> tuple[Tree, MuonState]:
        m = momentum(state.count) if callable(momentum) else momentum

        def mean(old: Tensor, new: Tensor) -> Tensor:
            return m * old + (1 - m) * new

        kept = tree.map(mean, state.momentum, updates)
        direction = tree.map(mean, kept, updates) if nesterov else kept
        moved = _orthogonalized(direction, lambda x: orthogonalize(x, steps, method=method, kernels=kernels), dtype)
        return tree.map(lambda x: x * _factor(scale, *x.shape[-2:]), moved), MuonState(state.count + 1, kept)

    return GradientTransformation(init, update)


def muon(
    learning_rate: float | Schedule,
    adam_learning_rate: float | Schedule | None = None,
    *,
    momentum: float | Schedule = 0.95,
    nesterov: bool = True,
    method: str = "newton_schulz",
    steps: int = 5,
    scale: str = "spectral",
    weight_decay: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    mask: Callable[[Tree], Tree] | None = None,
    clip_norm: float | None = None,
    hidden: Callable[[Tree], Tree] = matrices,
    dtype: torch.dtype | None = torch.bfloat16,
    kernels: str = "reference",
) -> GradientTransformation:
    """Muon for the hidden matrices of nested dicts of parameters (any shapes), AdamW for the rest.

    p <- p - lr (scale * orthogonalize(direction) + weight_decay p) for the leaves where ``hidden(params)`` holds (by
    declared role), AdamW with ``b1``, ``b2``, ``eps`` at ``adam_learning_rate`` (None: the same) for embeddings, head,
    norms, gates, biases and vectors. mask: which parameters decay (all by default). clip_norm: largest norm of
    the whole gradient. The rest as in ``scale_by_muon``. Raises ValueError for values out of range.
    """
    turned = chain(
        scale_by_muon(
            momentum, nesterov=nesterov, method=method, steps=steps, scale=scale, dtype=dtype, kernels=kernels
        ),
        *((add_decayed_weights(weight_decay, mask),) if weight_decay else ()),
        scale_by_learning_rate(learning_rate),
    )
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    rest = adamw(rate, b1, b2, eps, weight_decay, mask)
    split = partition({"muon": turned, "adamw": rest}, lambda params: _labels(hidden(params)))
    return chain(clip_by_global_norm(clip_norm), split) if clip_norm else split


def _labels(chosen: Tree) -> Tree:
    return tree.map(lambda yes: "muon" if yes else "adamw", chosen)


def _factor(scale: str, rows: int, columns: int) -> float:
    return max(1.0, rows / columns) ** 0.5 if scale == "spectral" else 0.2 * max(rows, columns) ** 0.5


def _orthogonalized(direction: Tree, turn: Callable[[Tensor], Tensor], dtype: torch.dtype | None) -> Tree:
    """Every leaf [..., N, K] turned, those of one shape together, wide side last; dtypes as they came."""
    leaves = tree.leaves(direction)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, leaf in enumerate(leaves):
        alike.setdefault((*sorted(leaf.shape[-2:]), leaf.dtype), []).append(i)
    for (rows, columns, given), members in alike.items():
        wide = [_wide(leaves[i]).reshape(-1, rows, columns).to(dtype or given) for i in members]
        turned = turn(torch.cat(wide)).to(given).split([len(matrices) for matrices in wide])
        for i, part in zip(members, turned, strict=True):
            shape = leaves[i].shape
            leaves[i] = part.mT.reshape(shape) if shape[-2] > shape[-1] else part.reshape(shape)
    return tree.with_leaves(direction, leaves)


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.shape[-2] > x.shape[-1] else x
