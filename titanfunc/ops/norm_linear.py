"""RMSNorm and the linear map after it as one operation.

Letters: M rows, D features in, E features out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from titanfunc.ops._bind import bind
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless
from titanfunc.ops.norm import KERNEL_DTYPES, KERNEL_FEATURES, rms_norm


def norm_linear(
    scale: Tensor, weight: Tensor, x: Tensor, dtype: torch.dtype, eps: float = 1e-6, kernels: str = "reference"
) -> Tensor:
    """``rms_norm(scale, x) @ weight`` for x [..., D], scale [D] and weight [D, E], computed and returned in ``dtype``.

    ValueError if ``kernels`` does not take these tensors.
    """
    return implementation("norm_linear", kernels)(scale, weight, x, dtype, eps)


@implements("norm_linear", "reference")
def _norm_linear(scale: Tensor, weight: Tensor, x: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    return rms_norm(scale, x, eps).to(dtype) @ weight.to(dtype)


# Under bind x is [M, D], and the one whole number says which of KERNEL_DTYPES the product has.


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import norm_linear as raw

    scale, weight, x = tensors
    return list(raw.norm_linear_forward(scale, weight, x, KERNEL_DTYPES[ints[0]], floats[0]))


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    _, weight, x = tensors
    return [
        torch.empty((x.shape[0], weight.shape[1]), dtype=KERNEL_DTYPES[ints[0]], device=x.device),
        torch.empty(x.shape[:1], dtype=torch.float32, device=x.device),
    ]


def _backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import norm_linear as raw

    scale, weight, x = tensors
    return list(raw.norm_linear_backward(scale, weight, x, outputs[1], cotangents[0], floats[0]))


def _reference(tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float]) -> list[Tensor]:
    scale, weight, x = tensors
    return [_norm_linear(scale, weight, x, KERNEL_DTYPES[ints[0]], floats[0])]


# The weights have no batch axis: samples with weights of their own are products of their own.
_bound = bind("norm_linear", _forward, _fake, _backward, vmap="each", residuals=1, reference=_reference)


@implements("norm_linear", "triton")
def _norm_linear_triton(scale: Tensor, weight: Tensor, x: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    for name, tensor in [("scale", scale), ("weight", weight), ("x", x)]:
        refuse_unless(tensor.dtype in KERNEL_DTYPES, "norm_linear", name, "float32 or bfloat16", tensor.dtype)
        there = tensor.device == x.device
        refuse_unless(there, "norm_linear", name, f"a tensor on {x.device}", f"one on {tensor.device}")
    refuse_unless(dtype in KERNEL_DTYPES, "norm_linear", "dtype", "float32 or bfloat16", dtype)
    refuse_unless(x.dim() > 0, "norm_linear", "x", "[..., D]", "a 0-d tensor")
    size = x.shape[-1]
    refuse_unless(0 < size <= KERNEL_FEATURES, "norm_linear", "x", f"1 to {KERNEL_FEATURES} features", size)
    refuse_unless(scale.shape == (size,), "norm_linear", "scale", f"shape [{size}]", list(scale.shape))
    fits = weight.dim() == 2 and weight.shape[0] == size
    refuse_unless(fits, "norm_linear", "weight", f"shape [{size}, E]", list(weight.shape))
    check_device("norm_linear", x=x)
    y = _bound([scale, weight, x.reshape(-1, size)], [KERNEL_DTYPES.index(dtype)], [eps])[0]
    return y.reshape(*x.shape[:-1], weight.shape[1])
