"""The step of small_fc_lopt for one leaf: what its network makes of each element's 39 features.

Metz et al. 2022, arXiv 2203.11860. Letters: a leaf [*S] of N elements; H hidden units; g gradient, p parameter, m
decaying means of g, v decaying mean of g^2. Of the features 16 are the element's own (g, p, m, v, m / sqrt(v),
1 / sqrt(v), g and m over Adafactor's root), 12 its row's and its column's, 11 the same for all: the first layer is
multiplied out once a row, a column and a leaf, and only the 16 are left to do for each element.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc.ops._bind import bind
from titanfunc.ops._by_reference import by_reference
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless

HIDDEN = 128
"""The most hidden units of the kernel: both layers' weights lie in shared memory."""


class _Tables(NamedTuple):
    """What an element takes from its row and its column: factors of g and m, and a share of the first layer.

    down, across: of the factored axis that comes first and of the other. Factors [.., 3] and [.., 6] (g's, then m's),
    shares [.., H]; sizes: A, R, B, K, C of the leaf, with the factored axes R and K.
    """

    down_scale: Tensor
    across_scale: Tensor
    down_share: Tensor
    across_share: Tensor
    sizes: tuple[int, ...]


def learned_mlp_step(
    p: Tensor,
    g: Tensor,
    momentum: Tensor,
    second: Tensor,
    factors: Sequence[Tensor],
    axes: tuple[int, int] | None,
    times: Tensor,
    layers: Sequence[Tensor],
    *,
    step_mult: float,
    exp_mult: float,
    kernels: str = "reference",
) -> Tensor:
    """step_mult d exp(exp_mult s) [*S], (d, s) by the network; float32 (float64 for a float64 p), to subtract.

    p, g [*S]; momentum [*S, 3]; second [*S, 1]; factors: row and column means of g^2, [*S, 3] with a 1 in the place
    of ``axes[1]`` and ``axes[0]``, or for ``axes`` None the one v [*S, 3] of a leaf without two axes. times [11];
    layers: weights [39, H], [H, H], [H, 2], each with its bias after it. Each feature is divided by its root mean
    square over the leaf. kernels: "reference", or "triton", which holds no feature of the leaf in memory and takes
    H <= 128. Gradients are those of the reference, live weights' too. Raises ValueError for shapes that do not match.
    """
    hidden = layers[0].shape[-1]
    wanted: list[tuple[int, ...]] = [(39, hidden), (hidden,), (hidden, hidden), (hidden,), (hidden, 2), (2,)]
    if [tuple(layer.shape) for layer in layers] != wanted:
        raise ValueError(f"layers: wanted shapes {wanted}, got {[tuple(layer.shape) for layer in layers]}")
    for name, leaf, shape in (
        ("g", g, p.shape),
        ("momentum", momentum, (*p.shape, 3)),
        ("second", second, (*p.shape, 1)),
    ):
        if leaf.shape != shape:
            raise ValueError(f"{name}: wanted shape {tuple(shape)}, got {tuple(leaf.shape)}")
    run = implementation("learned_mlp", kernels)
    if kernels == "triton":  # before the tables, which are made of all of them
        given = {"p": p, "g": g, "momentum": momentum, "second": second}
        check_device("learned_mlp", **given, factors=factors, times=times, layers=layers)
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    w1, b1, w2, b2, w3, b3 = (layer.to(dtype) for layer in layers)
    tables = _tables(p.shape, factors, axes, w1, b1 + times.to(dtype) @ w1[28:])
    own = torch.cat([w1[:13], w1[25:28]])
    tensors = (
        p.reshape(-1), g.reshape(-1), momentum.reshape(-1, 3), second.reshape(-1), *tables[:4], own, w2, b2, w3, b3,
    )  # fmt: skip
    return run(tensors, tables.sizes, (step_mult, exp_mult))[0].reshape(p.shape)


def _tables(
    shape: Sequence[int], factors: Sequence[Tensor], axes: tuple[int, int] | None, w1: Tensor, constant: Tensor
) -> _Tables:
    """Adafactor's statistics (arXiv 1804.04235) through the first layer; constant [H]: what all elements share."""
    hidden = w1.shape[1]
    if axes is None:
        (v,) = factors
        v = v.reshape(-1, 3)
        normal, inverse = _normalised(v), _normalised(torch.rsqrt(v + 1e-8))
        share = torch.cat([normal, normal, inverse, inverse], -1) @ w1[13:25] + constant
        scale = torch.cat([torch.rsqrt(v + 1e-9), torch.rsqrt(v + 1e-6)], -1)
        return _Tables(v.new_ones(1, 3), scale, v.new_zeros(1, hidden), share, (1, 1, 1, len(v), 1))
    row, column = factors
    relative = row / (row.mean(axes[0], True) + 1e-9)
    scales = [torch.rsqrt(x.clamp(min=1e-9)).reshape(-1, 3) for x in (relative, column)]
    shares = [
        torch.cat([_normalised(x.reshape(-1, 3)), _normalised(torch.rsqrt(x.reshape(-1, 3) + 1e-8))], -1)
        @ torch.cat([w1[at : at + 3], w1[at + 6 : at + 9]])
        for x, at in ((row, 13), (column, 16))
    ]
    i, j = sorted(axes)
    sizes = (prod(shape[:i]), shape[i], prod(shape[i + 1 : j]), shape[j], prod(shape[j + 1 :]))
    down, across = (0, 1) if axes[1] == j else (1, 0)  # row means run along the second largest axis
    scale = torch.cat([scales[across]] * 2, -1)
    return _Tables(scales[down], scale, shares[down], shares[across] + constant, sizes)


def _normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(0) + 1e-5)


@implements("learned_mlp", "reference")
def _reference(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    p, g, m, v, down_scale, across_scale, down_share, across_share, w1, w2, b2, w3, b3 = tensors
    a, i, b, j, c = ints
    step_mult, exp_mult = floats
    # Row and column tables broadcast over [A, R, B, K, C]; p and g in the dtype that statistics are kept in.
    p, g, v = (x.to(m.dtype).unsqueeze(-1) for x in (p, g, v))
    down_scale, down_share = (x.reshape(a, i, b, 1, c, -1) for x in (down_scale, down_share))
    across_scale, across_share = (x.reshape(a, 1, b, j, c, -1) for x in (across_scale, across_share))
    factored = [x * (down_scale * across_scale[..., at : at + 3]).reshape(-1, 3) for x, at in ((g, 0), (m, 3))]
    inverse = torch.rsqrt(v + 1e-6)
    x = _normalised(torch.cat([g, p, m, v, m * inverse, inverse, *factored], -1)) @ w1
    x = torch.relu(x.reshape(a, i, b, j, c, -1) + down_share + across_share).reshape(len(p), -1)
    x = torch.relu(x @ w2 + b2) @ w3 + b3
    return [x[:, 0] * torch.exp(x[:, 1] * exp_mult) * step_mult]


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels.learned_mlp import learned_mlp

    return [learned_mlp(tensors, ints, *floats)]


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    return [torch.empty(tensors[0].shape, dtype=torch.float32, device=tensors[0].device)]


_bound = bind("learned_mlp", _forward, _fake, by_reference(_reference), vmap="each", reference=_reference)


@implements("learned_mlp", "triton")
def _triton(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> Sequence[Tensor]:
    p, g, *rest = tensors
    for name, leaf in (("p", p), ("g", g)):
        fits = leaf.dtype in (torch.float32, torch.bfloat16)
        refuse_unless(fits, "learned_mlp", name, "float32 or bfloat16", leaf.dtype)
    for name, leaf in zip(("momentum", "second", "factors"), rest, strict=False):
        refuse_unless(leaf.dtype == torch.float32, "learned_mlp", name, "float32", leaf.dtype)
    refuse_unless(rest[-1].dtype == torch.float32, "learned_mlp", "layers", "float32", rest[-1].dtype)
    units = len(rest[-3])
    refuse_unless(units <= HIDDEN, "learned_mlp", "layers", f"at most {HIDDEN} hidden units", units)
    return _bound(tensors, ints, floats)
