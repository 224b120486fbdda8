"""Matrix products whose result is symmetric, at half the arithmetic: X X^T, and b A + c A A for symmetric A.

Letters: L matrices, M rows, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titanfunc.ops._bind import bind
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless

DTYPES = (torch.float32, torch.bfloat16)


def gram(x: Tensor, *, kernels: str = "reference") -> Tensor:
    """X X^T [L, M, M] for x [L, M, K].

    kernels: "reference", or "triton" for float32 and bfloat16, which sums in float32, computes the tiles on and below
    the diagonal and stores each above it too. Raises ValueError for another number of axes.
    """
    if x.ndim != 3:
        raise ValueError(f"x: wanted matrices [L, M, K], got shape {tuple(x.shape)}")
    return implementation("gram", kernels)(x)


def square_polynomial(a: Tensor, linear: float, square: float, *, kernels: str = "reference") -> Tensor:
    """linear A + square A A [L, M, M] for symmetric a [L, M, M], whose symmetry is taken on trust.

    kernels: as in ``gram``. Raises ValueError for matrices that are not square.
    """
    if a.ndim != 3 or a.shape[1] != a.shape[2]:
        raise ValueError(f"a: wanted square matrices [L, M, M], got shape {tuple(a.shape)}")
    return implementation("square_polynomial", kernels)(a, linear, square)


@implements("gram", "reference")
def _gram_reference(x: Tensor) -> Tensor:
    return x @ x.mT


@implements("square_polynomial", "reference")
def _square_reference(a: Tensor, linear: float, square: float) -> Tensor:
    return torch.baddbmm(a, a, a, beta=linear, alpha=square)


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    (x,) = tensors
    return [torch.empty((*x.shape[:2], x.shape[1]), dtype=x.dtype, device=x.device)]


def _gram_forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels.symmetric import symmetric

    return [symmetric(tensors[0])]


def gram_gradient(x: Tensor, given: Tensor) -> Tensor:
    """(G + G^T) X [L, M, K], the gradient of ``gram`` for a cotangent G [L, M, M]."""
    return (given + given.mT) @ x


def _gram_backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    return [gram_gradient(tensors[0], cotangents[0])]


def _square_forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels.symmetric import symmetric

    return [symmetric(tensors[0], alpha=floats[1], beta=floats[0])]


def square_gradient(a: Tensor, given: Tensor, linear: float, square: float) -> Tensor:
    """linear G + square (G A^T + A^T G) [L, M, M], the gradient of ``square_polynomial`` for a cotangent G."""
    part = torch.baddbmm(given, given, a.mT, beta=linear, alpha=square)
    return torch.baddbmm(part, a.mT, given, alpha=square)


def _square_backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    return [square_gradient(tensors[0], cotangents[0], floats[0], floats[1])]


_gram = bind(
    "gram", _gram_forward, _fake, _gram_backward,
    reference=lambda tensors, ints, floats: [_gram_reference(tensors[0])],
)  # fmt: skip
_square = bind(
    "square_polynomial", _square_forward, _fake, _square_backward,
    reference=lambda tensors, ints, floats: [_square_reference(tensors[0], *floats)],
)  # fmt: skip


@implements("gram", "triton")
def _gram_triton(x: Tensor) -> Tensor:
    _refuse("gram", "x", x)
    return _gram([x], [], [])[0]


@implements("square_polynomial", "triton")
def _square_triton(a: Tensor, linear: float, square: float) -> Tensor:
    _refuse("square_polynomial", "a", a)
    return _square([a], [], [linear, square])[0]


def _refuse(operation: str, name: str, x: Tensor) -> None:
    refuse_unless(x.dtype in DTYPES, operation, name, "float32 or bfloat16", x.dtype)
    check_device(operation, **{name: x})
