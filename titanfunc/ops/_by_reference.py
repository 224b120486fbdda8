"""The backward of a kernel that has none of its own: that of the plain-torch function it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from titanfunc.ops._bind import Backward, Reference, _outside_every_transform, _pull


def by_reference(reference: Reference) -> Backward:
    """A backward for ``bind``: gradients [as each input] by the vector-Jacobian product of ``reference``."""

    def backward(
        tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
    ) -> list[Tensor]:
        return list(gradients(reference, tensors, cotangents, ints, floats))

    return backward


def gradients(
    reference: Reference, tensors: list[Tensor], cotangents: list[Tensor], ints: list[int], floats: list[float]
) -> tuple[Tensor, ...]:
    """Fresh gradients of ``reference``, one for each of ``tensors`` and of its shape."""
    with _outside_every_transform():
        found = _pull(reference, tensors, cotangents, ints, floats)
    return tuple(torch.clone(grad, memory_format=torch.contiguous_format) for grad in found)
