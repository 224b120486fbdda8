"""Normalisation, computed in float32 whatever the dtype of its input: the operations of titanfunc.ops.norm."""

from __future__ import annotations

from torch import Tensor

from titanfunc.ops.norm import rms_norm, unit_rows

__all__ = ["l2_norm", "rms_norm"]


def l2_norm(x: Tensor, eps: float = 1e-2) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last axis of x [..., D]: ``unit_rows`` without SiLU."""
    return unit_rows(x, eps=eps)
