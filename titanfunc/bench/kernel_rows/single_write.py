"""Rows of the single write: the step of one memory on one batch of rows.

Letters: N rows, D features, F hidden features.
"""

from __future__ import annotations

from functools import partial

import torch

from titanfunc.ops.single_write import single_write


def _inputs(n, d, f, depth, device):
    """Matrices, their momenta, k and v."""
    source = torch.Generator(device).manual_seed(0)
    sizes = [(d, f), (f, d)] if depth == 2 else [(d, d)]
    shapes = [*sizes, *sizes, (n, d), (n, d)]
    *matrices, k, v = (torch.randn(shape, generator=source, device=device) for shape in shapes)
    return *(w / w.shape[0] ** 0.5 for w in matrices), k.bfloat16(), v.bfloat16()


def _write(*tensors, kernels):
    """The new weights and momentum, loss and norm. The clip is active and the step as large as the weights.

    So a wrong gradient shows in them, and neither side is timed at more than the write.
    """
    *matrices, k, v = tensors
    depth = len(matrices) // 2
    found = single_write(
        matrices[:depth], matrices[depth:], k, v, 0.1, 0.9, 500.0, max_grad_norm=0.05, kernels=kernels
    )  # fmt: skip
    return *found.weights, *found.momentum, found.loss, found.grad_norm


def _flops(*tensors):
    """The products of rows with matrices: two a matrix, one more for all but the first, which returns no error."""
    *matrices, k, _ = tensors
    depth = len(matrices) // 2
    return sum(2 * k.shape[0] * w.numel() * (2 if i == 0 else 3) for i, w in enumerate(matrices[:depth]))


def _row(n, d, f, depth):
    return {
        "name": f"single write, N {n}, D {d}, {f'F {f}' if depth == 2 else 'one layer'}",
        "make": partial(_inputs, n, d, f, depth),
        "kernel": partial(_write, kernels="triton"),
        "reference": partial(_write, kernels="reference"),
        "flops": _flops,
        "grad": False,
    }


ROWS = [_row(2048, 512, 512, 2), _row(2048, 512, 512, 1), _row(8192, 512, 2048, 2), _row(256, 512, 512, 2)]
