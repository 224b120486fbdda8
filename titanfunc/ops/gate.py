"""SiLU times gate, the middle of a SwiGLU feed-forward block (Shazeer, arXiv 2002.05202, equation 6).

Letters: F hidden features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titanfunc.ops._bind import bind
from titanfunc.ops.backend import check_device, implementation, implements, refuse_unless

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def silu_gate(a: Tensor, b: Tensor, kernels: str = "reference") -> Tensor:
    """``silu(a) * b`` for a and b [..., F] of one shape and dtype; computed in float32, result in their dtype.

    ValueError if ``kernels`` does not take these tensors.
    """
    return implementation("silu_gate", kernels)(a, b)


@implements("silu_gate", "reference")
def _silu_gate(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return (F.silu(a.to(wide)) * b.to(wide)).to(a.dtype)


# Under bind a and b are flat, so that the axis vmap folds into is the only one.


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    from titanfunc_kernels import gate

    a, b = tensors
    return [gate.silu_gate_forward(a, b)]


def _fake(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    return [torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device=tensors[0].device)]


def _backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    from titanfunc_kernels import gate

    a, b = tensors
    return list(gate.silu_gate_backward(a, b, cotangents[0]))


_bound = bind(
    "silu_gate", _forward, _fake, _backward, reference=lambda tensors, ints, floats: [_silu_gate(*tensors)]
)  # fmt: skip


@implements("silu_gate", "triton")
def _silu_gate_triton(a: Tensor, b: Tensor) -> Tensor:
    refuse_unless(a.dtype in KERNEL_DTYPES, "silu_gate", "a", "float32 or bfloat16", a.dtype)
    refuse_unless(b.dtype == a.dtype, "silu_gate", "b", f"a's dtype, {a.dtype}", b.dtype)
    refuse_unless(b.shape == a.shape, "silu_gate", "b", f"a's shape, {list(a.shape)}", list(b.shape))
    refuse_unless(b.device == a.device, "silu_gate", "b", f"a tensor on {a.device}", f"one on {b.device}")
    check_device("silu_gate", a=a)
    return _bound([a.reshape(-1), b.reshape(-1)], [], [])[0].reshape(a.shape)
