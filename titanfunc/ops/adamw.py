"""One AdamW update of many leaves, all its element-wise arithmetic in one pass over memory.

Letters: g gradient, p parameter, m decaying mean of g, v decaying mean of g^2, t the number of updates, from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc.ops._bind import bind
from titanfunc.ops._by_reference import by_reference
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless

DTYPES = (torch.float32, torch.bfloat16)


class Moved(NamedTuple):
    """moved: what is to be added to each parameter, or the new ones. first, second: the new m and v. Lists of leaves"""

    moved: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]


def adamw_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    learning_rate: Tensor,
    clip: Tensor,
    correction1: Tensor,
    correction2: Tensor,
    *,
    decays: Sequence[float],
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    apply: bool = False,
    kernels: str = "reference",
) -> Moved:
    """One step over leaves of any shapes: u = -lr (m_hat / (sqrt(v_hat) + eps) + decay p).

    g <- clip g, m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, m_hat = correction1 m, v_hat = correction2 v.
    learning_rate; clip, the factor of the whole gradient; correction1 and correction2, 1 / (1 - b1^t) and
    1 / (1 - b2^t): 0-d tensors, so that they may change without compiling again. decays: a number a leaf.
    apply: return p + u in place of u. kernels: "reference", or "triton" for float32 and bfloat16, computed in float32.
    Raises ValueError for lists or shapes that do not match. Loshchilov & Hutter, arXiv 1711.05101, algorithm 2.
    """
    for name, group in (("grads", grads), ("first", first), ("second", second), ("decays", decays)):
        if len(group) != len(params):
            raise ValueError(f"{name}: wanted {len(params)}, one a parameter, got {len(group)}")
    for name, group in (("grads", grads), ("first", first), ("second", second)):
        for p, leaf in zip(params, group, strict=True):
            if leaf.shape != p.shape:
                raise ValueError(f"{name}: wanted a leaf of shape {tuple(p.shape)}, got {tuple(leaf.shape)}")
    scalars = (learning_rate, clip, correction1, correction2)
    for name, scalar in zip(("learning_rate", "clip", "correction1", "correction2"), scalars, strict=True):
        if scalar.ndim:
            raise ValueError(f"{name}: wanted a 0-d tensor, got shape {tuple(scalar.shape)}")
    leaves = (*params, *grads, *first, *second)
    run = implementation("adamw", kernels)
    count = len(params)
    results = run((*scalars, *leaves), (count, int(apply)), (b1, b2, eps, *decays))
    return Moved(*(list(results[i * count : (i + 1) * count]) for i in range(3)))


def _groups(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """[scalars, params, grads, first, second] of the flat list."""
    return [list(tensors[:4]), *(list(tensors[4 + i * count : 4 + (i + 1) * count]) for i in range(4))]


@implements("adamw", "reference")
def _reference(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    (count, apply), (b1, b2, eps, *decays) = ints, floats
    (rate, clip, scale1, scale2), params, grads, first, second = _groups(tensors, count)
    grads = [g * clip for g in grads]
    first = [b1 * m + (1 - b1) * g for m, g in zip(first, grads, strict=True)]
    second = [b2 * v + (1 - b2) * g * g for v, g in zip(second, grads, strict=True)]
    directions = [m * scale1 / (torch.sqrt(v * scale2) + eps) for m, v in zip(first, second, strict=True)]
    moved = [(u + decay * p) * -rate for u, p, decay in zip(directions, params, decays, strict=True)]
    if apply:
        moved = [p + u for p, u in zip(params, moved, strict=True)]
    return [*moved, *first, *second]


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels.adamw import adamw

    scalars, params, grads, first, second = _groups(tensors, ints[0])
    b1, b2, eps, *decays = floats
    results = adamw(params, grads, first, second, scalars, decays, b1, b2, eps, bool(ints[1]))
    return [leaf for group in results for leaf in group]


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    params = _groups(tensors, ints[0])[1]
    return [torch.empty(p.shape, dtype=p.dtype, device=p.device) for _ in range(3) for p in params]


_bound = bind("adamw", _forward, _fake, by_reference(_reference), vmap="each", reference=_reference)


@implements("adamw", "triton")
def _triton(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Sequence[Tensor]:
    scalars, params, *others = _groups(tensors, ints[0])
    refuse_unless(len(params) > 0, "adamw", "params", "a leaf at least", "none")
    numbers = dict(zip(("learning_rate", "clip", "correction1", "correction2"), scalars, strict=True))
    for name, scalar in numbers.items():
        refuse_unless(scalar.dtype == torch.float32, "adamw", name, "float32", scalar.dtype)
    groups = dict(zip(("params", "grads", "first", "second"), (params, *others), strict=True))
    check_device("adamw", **numbers, **groups)
    for name, group in groups.items():
        for p, leaf in zip(params, group, strict=True):
            refuse_unless(leaf.dtype in DTYPES, "adamw", name, "float32 or bfloat16", leaf.dtype)
            refuse_unless(leaf.dtype == p.dtype, "adamw", name, f"the parameter's {p.dtype}", leaf.dtype)
    return _bound(tensors, ints, floats)
