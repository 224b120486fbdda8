"""memory_write in plain torch with the precision of its kernels, which the reference does not have.

Kernels keep the histories of W and S in k's dtype, and their backward starts each chunk from what was kept. The
reference keeps them in the dtype of the weights; rounded behind it alone, they would be rounded in the outputs and
whole in the backward, where every gradient of keep_weights, momentum_to_weights and keep_momentum is a sum over them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.kernels import checks
from titanfunc.ops import memory_write as reference
from titanfunc.ops._bind import bind

FLOOR = 2.0**-10
"""Of the factors' gradients in bfloat16: half of what its rounding may change in one number. The problems tested on a
CPU need none; of 180 drawn otherwise, with 2 to 12 numbers a factor, a few do, the most of them 1.4e-3."""


def _forward(tensors: list[Tensor], ints: list[int], floats: list[float]) -> list[Tensor]:
    outputs, dtype = reference.write_chunks(tensors, ints, floats), tensors[3 * ints[1]].dtype
    return [out.to(dtype) if i < 2 * ints[1] else out for i, out in enumerate(outputs)]


def _backward(
    tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> list[Tensor]:
    wide, past = tensors[0].dtype, 2 * ints[1]
    kept, given = ([x.to(wide) if i < past else x for i, x in enumerate(each)] for each in (outputs, cotangents))
    return reference._backward(tensors, kept, given, ints, floats)


write = bind("memory_write_rounded", _forward, reference._fake, _backward)
"""Tensors [B, H, ...] in order, ints and floats, as what stands in the table of ops/backend.py has them -> the leaves
of Written, differentiable once; for tests alone, eagerly. In float64 it rounds nothing."""


def memory_write(tensors: Sequence[Tensor], depth: int, clip: float, first_order: bool = False) -> reference.Written:
    """:func:`titanfunc.ops.memory_write.memory_write` of matrices alone, its tensors in order, by :data:`write`."""
    return reference.written_of(write(tensors, [depth, depth, 0, int(first_order)], [clip, 0.0, 1.0]), depth, depth)


def assert_gradients_as_exact(
    dtype: torch.dtype, got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], factors: int
) -> None:
    """The tolerance rule for gradients of an operation on k of ``dtype``; ``factors``: the first of three.

    A factor multiplies W or S: its gradient is a sum of D F products that may cancel, and has one number a chunk, too
    few for the largest error of plain torch to be more than luck. In bfloat16 the three are judged together, each over
    its largest number, and with a floor.
    """
    few = range(factors, factors + 3) if dtype == torch.bfloat16 else ()
    for i, each in enumerate(zip(got, plain, exact, strict=True)):
        if i not in few:
            checks.assert_as_exact(f"gradient {i}", *each, floor=2e-6)
    for i in few:
        assert got[i].shape == exact[i].shape and got[i].dtype == torch.float32
    if few:
        together = (torch.cat([(x[i] / exact[i].abs().max()).flatten() for i in few]) for x in (got, plain, exact))
        checks.assert_as_exact("gradients of the factors", *together, FLOOR)
