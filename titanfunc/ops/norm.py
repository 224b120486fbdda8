"""Norms over the last axis, computed in float32 whatever the dtype of their input.

Letters: G groups, N rows, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc.ops._bind import bind
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
KERNEL_FEATURES = 8192  # a program of the kernel holds a whole row in registers


def rms_norm(scale: Tensor, x: Tensor, eps: float = 1e-6, kernels: str = "reference") -> Tensor:
    """``scale * x / sqrt(mean(x^2) + eps)`` over the last axis of x [..., D], scale [D]; result in x's dtype.

    Zhang and Sennrich, arXiv 1910.07467, equation 4. ValueError if ``kernels`` does not take these tensors.
    """
    return implementation("rms_norm", kernels)(scale, x, eps)


def layer_norm(scale: Tensor, bias: Tensor, x: Tensor, eps: float = 1e-5, kernels: str = "reference") -> Tensor:
    """``scale * (x - mean(x)) / sqrt(var(x) + eps) + bias`` over the last axis of x [..., D], scale and bias [D].

    The result is in x's dtype. Ba et al., arXiv 1607.06450, equation 4. ValueError if ``kernels`` does not take these
    tensors.
    """
    return implementation("layer_norm", kernels)(scale, bias, x, eps)


def unit_rows(x: Tensor, silu: bool = False, eps: float = 1e-2, kernels: str = "reference") -> Tensor:
    """``h / sqrt(sum(h^2) + eps)`` over the last axis of x [..., D], h = silu(x) or x: unit rows, in x's dtype.

    ``eps`` bounds the derivative near a row of zeros by 1 / sqrt(eps): such rows do occur (a convolution at the very
    first token), and with a floor of 1e-6 their gradient drowned every other. The keys and queries of Titans,
    arXiv 2501.00663, section 4.4. ValueError if ``kernels`` does not take x.
    """
    return implementation("unit_rows", kernels)(x, silu, eps)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@implements("rms_norm", "reference")
def _rms_norm(scale: Tensor, x: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale).to(x.dtype)


@implements("layer_norm", "reference")
def _layer_norm(scale: Tensor, bias: Tensor, x: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * scale + bias).to(x.dtype)


@implements("unit_rows", "reference")
def _unit_rows(x: Tensor, silu: bool, eps: float) -> Tensor:
    wide = F.silu(_wide(x)) if silu else _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _check(operation: str, x: Tensor, **features: Tensor) -> None:
    for name, tensor in {"x": x, **features}.items():
        refuse_unless(tensor.dtype in KERNEL_DTYPES, operation, name, "float32 or bfloat16", tensor.dtype)
        refuse_unless(tensor.device == x.device, operation, name, f"a tensor on {x.device}", f"one on {tensor.device}")
    refuse_unless(x.dim() > 0, operation, "x", "[..., D]", "a 0-d tensor")
    size = x.shape[-1]
    refuse_unless(0 < size <= KERNEL_FEATURES, operation, "x", f"1 to {KERNEL_FEATURES} features", size)
    for name, tensor in features.items():
        refuse_unless(tensor.shape == (size,), operation, name, f"shape [{size}]", list(tensor.shape))
    check_device(operation, x=x)


def _new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _statistic(x: Tensor) -> Tensor:
    return _new(x, *x.shape[:-1], dtype=torch.float32)


# Under bind the tensors have a group axis before them, scale [G, D] and x [G, N, D]: vmap folds its samples into that.


def _rms_forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import norm

    scale, x = tensors
    return list(norm.rms_norm_forward(scale, x, floats[0]))


def _rms_fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    x = tensors[1]
    return [_new(x, *x.shape), _statistic(x)]


def _rms_backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import norm

    scale, x = tensors
    return list(norm.rms_norm_backward(scale, x, outputs[1], cotangents[0]))


_bound_rms_norm = bind(
    "rms_norm", _rms_forward, _rms_fake, _rms_backward, residuals=1,
    reference=lambda tensors, ints, floats: [_rms_norm(tensors[0].unsqueeze(-2), tensors[1], floats[0])],
)  # fmt: skip


@implements("rms_norm", "triton")
def _rms_norm_triton(scale: Tensor, x: Tensor, eps: float) -> Tensor:
    _check("rms_norm", x, scale=scale)
    return _bound_rms_norm([scale.unsqueeze(0), x.reshape(1, -1, x.shape[-1])], [], [eps])[0].reshape(x.shape)


def _layer_forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import norm

    scale, bias, x = tensors
    return list(norm.layer_norm_forward(scale, bias, x, floats[0]))


def _layer_fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    x = tensors[2]
    return [_new(x, *x.shape), _statistic(x), _statistic(x)]


def _layer_backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import norm

    scale, bias, x = tensors
    return list(norm.layer_norm_backward(scale, bias, x, outputs[1], outputs[2], cotangents[0]))


_bound_layer_norm = bind(
    "layer_norm", _layer_forward, _layer_fake, _layer_backward, residuals=2,
    reference=lambda tensors, ints, floats: [
        _layer_norm(tensors[0].unsqueeze(-2), tensors[1].unsqueeze(-2), tensors[2], floats[0])
    ],
)  # fmt: skip


@implements("layer_norm", "triton")
def _layer_norm_triton(scale: Tensor, bias: Tensor, x: Tensor, eps: float) -> Tensor:
    _check("layer_norm", x, scale=scale, bias=bias)
    tensors = [scale.unsqueeze(0), bias.unsqueeze(0), x.reshape(1, -1, x.shape[-1])]
    return _bound_layer_norm(tensors, [], [eps])[0].reshape(x.shape)


def _unit_forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import norm

    return list(norm.unit_rows_forward(tensors[0], bool(ints[0]), floats[0]))


def _unit_fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    return [_new(tensors[0], *tensors[0].shape), _statistic(tensors[0])]


def _unit_backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import norm

    return [norm.unit_rows_backward(tensors[0], outputs[1], cotangents[0], bool(ints[0]))]


_bound_unit_rows = bind(
    "unit_rows", _unit_forward, _unit_fake, _unit_backward, residuals=1,
    reference=lambda tensors, ints, floats: [_unit_rows(tensors[0], bool(ints[0]), floats[0])],
)  # fmt: skip


@implements("unit_rows", "triton")
def _unit_rows_triton(x: Tensor, silu: bool, eps: float) -> Tensor:
    _check("unit_rows", x)
    return _bound_unit_rows([x.reshape(-1, x.shape[-1])], [int(silu)], [eps])[0].reshape(x.shape)
