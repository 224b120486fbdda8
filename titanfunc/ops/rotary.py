"""Rotary positions (Su et al., arXiv 2104.09864).

Letters: T tokens, D features; G groups with a table each, H heads that share one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titanfunc.ops._bind import bind
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
KERNEL_FEATURES = 2048  # a program of the kernel holds whole rows in registers


class Rotary(NamedTuple):
    """cos and sin of every position's angles, each [..., T, D / 2]."""

    cos: Tensor
    sin: Tensor


def rotary_table(positions: Tensor, head_dim: int, dtype: torch.dtype, base: float = 10_000.0) -> Rotary:
    """The angles of ``positions`` [..., T] (in tokens) for heads of ``head_dim`` features, an even number.

    ValueError for positions that are not whole numbers. One operation to a compiler: inductor would take cosines and
    powers again in every kernel that rotates something.
    """
    if positions.is_floating_point():
        raise ValueError(f"positions: wanted whole numbers, got {positions.dtype}")
    half = head_dim // 2
    cos, sin = _table([positions.reshape(-1)], [half, _TABLE_DTYPES.index(dtype)], [base])
    return Rotary(*(x.reshape(*positions.shape, half) for x in (cos, sin)))


# Under bind: positions [T].


def _make_table(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    (positions,), (half, index) = tensors, ints
    dtype = _TABLE_DTYPES[index]
    wide = torch.promote_types(dtype, torch.float32)
    frequency = floats[0] ** (-torch.arange(half, device=positions.device, dtype=wide) / half)
    angle = positions.to(wide).unsqueeze(-1) * frequency
    return [torch.cos(angle).to(dtype), torch.sin(angle).to(dtype)]


def _fake_table(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    return [tensors[0].new_empty((*tensors[0].shape, ints[0]), dtype=_TABLE_DTYPES[ints[1]]) for _ in range(2)]


def _no_gradient(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    return [torch.zeros_like(tensors[0])]  # positions are whole numbers


_TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_table = bind("rotary_table", _make_table, _fake_table, _no_gradient)


def rotate(x: Tensor, table: Rotary, kernels: str = "reference") -> Tensor:
    """Rotates pairs of features (the first half with the second) of x [..., T, D] by the table's angles.

    arXiv 2104.09864, equation 34, with the pairs D / 2 apart. The table is a constant: it gets no gradient. Its leading
    axes are broadcast to x's. The result's dtype is what x's and the table's promote to. ValueError if ``kernels`` does
    not take these tensors.
    """
    return implementation("rotate", kernels)(x, table)


@implements("rotate", "reference")
def _rotate(x: Tensor, table: Rotary) -> Tensor:
    cos, sin = table.cos.detach(), table.sin.detach()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


# Under bind: x [G, H, T, D], cos and sin [G, T, D / 2].


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import rotary

    x, cos, sin = tensors
    return [rotary.rotate_forward(x, cos, sin, torch.promote_types(x.dtype, cos.dtype))]


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    x, cos, _ = tensors
    return [torch.empty(x.shape, dtype=torch.promote_types(x.dtype, cos.dtype), device=x.device)]


def _backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import rotary

    x, cos, sin = tensors
    dx = rotary.rotate_backward(cotangents[0], cos, sin, x.dtype)
    # Nobody reads the table's: it goes in detached. Filling them with zeros would be two more launches.
    return [dx, torch.empty_like(cos), torch.empty_like(sin)]


def _of_groups(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    x, cos, sin = tensors
    return [_rotate(x, Rotary(cos.unsqueeze(1), sin.unsqueeze(1)))]


_bound = bind("rotate", _forward, _fake, _backward, reference=_of_groups)


@implements("rotate", "triton")
def _rotate_triton(x: Tensor, table: Rotary) -> Tensor:
    cos, sin = table.cos.detach(), table.sin.detach()
    for name, tensor in [("x", x), ("cos", cos), ("sin", sin)]:
        refuse_unless(tensor.dtype in KERNEL_DTYPES, "rotate", name, "float32 or bfloat16", tensor.dtype)
        refuse_unless(tensor.device == x.device, "rotate", name, f"a tensor on {x.device}", f"one on {tensor.device}")
    refuse_unless(x.dim() > 1, "rotate", "x", "[..., T, D]", list(x.shape))
    *leading, tokens, size = x.shape
    even = size % 2 == 0 and 0 < size <= KERNEL_FEATURES
    refuse_unless(even, "rotate", "x", f"2 to {KERNEL_FEATURES} features, an even number", size)
    refuse_unless(
        cos.shape == sin.shape and cos.dtype == sin.dtype, "rotate", "sin", "cos's shape and dtype", sin.shape
    )
    own = [1] * (len(leading) + 2 - cos.dim()) + list(cos.shape[:-2])
    fits = cos.shape[-2:] == (tokens, size // 2) and len(own) == len(leading)
    fits = fits and all(a in (1, b) for a, b in zip(own, leading, strict=True))
    refuse_unless(fits, "rotate", "cos", f"[..., {tokens}, {size // 2}] to broadcast to x", list(cos.shape))
    check_device("rotate", x=x)

    # Groups are the leading axes in which the table differs, and all but the last of them in any case, which is
    # batch by heads; so x may be a view with its heads and tokens swapped.
    differs = [i + 1 for i, length in enumerate(own) if length > 1]
    axes = max([0, len(leading) - 1, *differs])
    groups, heads = math.prod(leading[:axes]), math.prod(leading[axes:])
    cos, sin = (t.reshape(*own[:axes], tokens, -1).expand(*leading[:axes], tokens, -1) for t in (cos, sin))
    tensors = [x.reshape(groups, heads, tokens, size), *(t.reshape(groups, tokens, size // 2) for t in (cos, sin))]
    return _bound(tensors, [], [])[0].reshape(x.shape)
