"""Rows of the optimizers' kernels: AdamW over a model's leaves, symmetric products, the learned step of one leaf.

Letters: L matrices, M rows, K columns, N elements, H hidden units.
"""

from __future__ import annotations

from functools import partial

import torch

from titanfunc.ops.adamw import adamw_update
from titanfunc.ops.learned_mlp import learned_mlp_step
from titanfunc.ops.orthogonal import orthogonalize
from titanfunc.ops.symmetric import gram, square_polynomial
from titanfunc.optim.learned.features import factored_axes, init_accumulators, time_embedding

_LARGE = [(8192, 16384)]
# The 168M model's kinds of leaves: twelve layers stacked, and the vectors among them.
_MODEL = [
    (50_304, 768), *[(12, 768, 768)] * 4, *[(12, 768, 3072)] * 2, (12, 3072, 768), *[(12, 768, 16)] * 3,
    *[(12, 768)] * 16, *[(12, 12)] * 4, *[(768,)] * 4, (50_304, 768),
]  # fmt: skip


def _source(device):
    return torch.Generator(device).manual_seed(0)


def _leaves(shapes, device):
    source = _source(device)
    drawn = [[torch.randn(shape, generator=source, device=device) for shape in shapes] for _ in range(4)]
    scalars = [torch.tensor(rate, device=device) for rate in (1e-3, 0.7, 2.0, 3.0)]
    return (*scalars, *drawn[0], *drawn[1], *drawn[2], *(leaf.square() for leaf in drawn[3]))


def _adamw(kernels, *tensors):
    count = (len(tensors) - 4) // 4
    groups = [tensors[4 + i * count : 4 + (i + 1) * count] for i in range(4)]
    moved = adamw_update(*groups, *tensors[:4], decays=[0.1] * count, b2=0.95, apply=True, kernels=kernels)
    return tuple(leaf for group in moved for leaf in group)


def _adamw_bytes(*tensors):
    """Four numbers read and three written for each of the parameters."""
    return 7 * sum(leaf.nbytes for leaf in tensors[4:]) // 4


def _matrices(shape, device):
    return (torch.randn(shape, generator=_source(device), device=device).mul_(shape[-1] ** -0.5).bfloat16(),)


def _symmetric(shape, device):
    (root,) = _matrices(shape, device)
    return (root @ root.mT,)


def _polynomial(kernels, a):
    return square_polynomial(a, -4.7750, 2.0315, kernels=kernels)


def _half(x):
    """Multiplications and additions of one triangle: M (M + 1) / 2 entries of K products."""
    matrices, rows, columns = x.shape
    return matrices * rows * (rows + 1) * columns


def _orthogonalize_flops(x):
    matrices, rows, columns = x.shape
    return 5 * matrices * rows * ((rows + 1) * (rows + columns) + 2 * rows * columns)


def _learned_inputs(shape, hidden, device):
    source = _source(device)
    p, g = (torch.randn(shape, generator=source, device=device) for _ in range(2))
    kept = init_accumulators(p)
    momentum = torch.randn(kept.momentum.shape, generator=source, device=device)
    second = torch.rand(kept.second.shape, generator=source, device=device)
    factors = [torch.rand(factor.shape, generator=source, device=device) for factor in kept.factors]
    layers = []
    for fan_in, fan_out in ((39, hidden), (hidden, hidden), (hidden, 2)):
        layers += [torch.randn(fan_in, fan_out, generator=source, device=device) * fan_in**-0.5]
        layers += [torch.zeros(fan_out, device=device)]
    return (p, g, momentum, second, time_embedding(torch.tensor(100, device=device)), *layers, *factors)


def _learned(kernels, p, g, momentum, second, times, *rest):
    return learned_mlp_step(
        p, g, momentum, second, rest[6:], factored_axes(p.shape), times, rest[:6],
        step_mult=0.01, exp_mult=0.001, kernels=kernels,
    )  # fmt: skip


def _learned_bytes(p, *_):
    """Six numbers read by each of the two passes, one written."""
    return 13 * 4 * p.numel()


def _row(name, make, function, least, grad=False):
    return {
        "name": name, "make": make, "kernel": partial(function, "triton"), "reference": partial(function, "reference"),
        **least, "grad": grad,
    }  # fmt: skip


ROWS = [
    _row("adamw one leaf of 134M", partial(_leaves, _LARGE), _adamw, {"bytes": _adamw_bytes}),
    _row(f"adamw {len(_MODEL)} leaves of 190M", partial(_leaves, _MODEL), _adamw, {"bytes": _adamw_bytes}),
]
for _shape in ((12, 768, 3072), (24, 1024, 1024), (8, 2048, 2048), (1, 4096, 4096), (4, 4096, 11008)):
    _row_of = partial(_row, least={"flops": _half})
    _text = "x".join(map(str, _shape))
    ROWS += [_row_of(f"gram {_text}", partial(_matrices, _shape), lambda kernels, x: gram(x, kernels=kernels))]
    if _shape[1] == _shape[2]:
        ROWS += [_row_of(f"square_polynomial {_text}", partial(_symmetric, _shape), _polynomial)]
for _shape in ((12, 768, 3072), (24, 1024, 1024), (8, 2048, 2048), (4, 4096, 4096)):
    ROWS += [
        _row(
            f"orthogonalize, 5 steps {'x'.join(map(str, _shape))}", partial(_matrices, _shape),
            lambda kernels, x: orthogonalize(x, kernels=kernels), {"flops": _orthogonalize_flops},
        )
    ]  # fmt: skip
for _shape, _hidden in (((4096, 4096), 32), ((12, 768, 3072), 32), ((50_304, 768), 32), ((4096, 4096), 4)):
    ROWS += [
        _row(
            f"learned_mlp {'x'.join(map(str, _shape))} H{_hidden}", partial(_learned_inputs, _shape, _hidden),
            _learned, {"bytes": _learned_bytes},
        )
    ]  # fmt: skip
