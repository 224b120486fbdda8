"""Copies that a compiler can neither move before, nor merge with, what they were told to wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def barrier(values: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of ``values`` that exist only once ``after`` does; all of any shapes.

    Nothing computed from the copies can be taken for what was computed from the originals, or be begun before
    ``after``: to a compiler the copying is opaque. Right under grad (of any order; that by ``after`` is zero), vmap and
    fullgraph compile.
    """
    copies: tuple[Tensor, ...] = _apply(len(values), *values, *after)
    return copies


# No bind(): its backward would want zeros for each of ``after``, and its vmap rule the samples in front.
@torch.library.custom_op("titanfunc::barrier", mutates_args=(), schema="(Tensor[] values, Tensor[] after) -> Tensor[]")
def _copy(values: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    return [value.clone(memory_format=torch.contiguous_format) for value in values]


@_copy.register_fake
def _(values: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(value, memory_format=torch.contiguous_format) for value in values]


class _Barrier(torch.autograd.Function):
    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.titanfunc.barrier(list(tensors[:count]), list(tensors[count:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rest = len(inputs) - 1 - inputs[0]
        ctx.mark_non_differentiable(*(copy for copy in output if not copy.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, *cotangents, *[None] * ctx.rest

    @staticmethod
    def vmap(info: Any, in_dims: Any, count: int, *tensors: Tensor) -> Any:
        return _Barrier.apply(count, *tensors), in_dims[1 : 1 + count]


@torch.compiler.allow_in_graph
def _apply(count: int, *tensors: Tensor) -> Any:
    return _Barrier.apply(count, *tensors)
