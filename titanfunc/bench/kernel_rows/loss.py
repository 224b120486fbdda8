"""Rows of the head with its loss, and of linear layers on 8-bit numbers.

Letters: N tokens, D, D_in, D_out features, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch

from titanfunc.ops.fp8 import linear_fp8
from titanfunc.ops.linear_cross_entropy import linear_cross_entropy


def _head(n, d, v, tied, device):
    source = torch.Generator(device).manual_seed(0)
    x = torch.randn(8, n // 8, d, generator=source, device=device).bfloat16()
    weight = torch.randn((v, d) if tied else (d, v), generator=source, device=device) * d**-0.5
    return x, weight.mT if tied else weight, torch.randint(v, (8, n // 8), generator=source, device=device)


def _loss(kernels, x, weight, targets):
    return linear_cross_entropy(x, weight, targets, kernels=kernels)[0]


def _linear(n, d_in, d_out, device):
    source = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d_in, generator=source, device=device).bfloat16()
    return x, torch.randn(d_in, d_out, generator=source, device=device) * d_in**-0.5


def _fp8(kernels, scaling, x, weight):
    return linear_fp8(weight, x, torch.bfloat16, scaling=scaling, kernels=kernels)


def _bf16(x, weight):
    return x @ weight.bfloat16()


def _flops(products, a, weight, *_):
    return products * 2 * a.numel() * weight.shape[-1]


def _row(name, make, kernel, reference, grad):
    flops = partial(_flops, 3 if grad else 1)
    return {"name": name, "make": make, "kernel": kernel, "reference": reference, "flops": flops, "grad": grad}


ROWS = [
    _row(
        f"linear_cross_entropy N{n} D{d} V{v}{' tied' if tied else ''}{' forward' * (not grad)}",
        partial(_head, n, d, v, tied), partial(_loss, "triton"), partial(_loss, "reference"), grad,
    )
    for n, d, v, tied, grad in (
        (16384, 1024, 32000, False, True), (16384, 1024, 32000, True, True), (16384, 1024, 32000, False, False),
        (16384, 768, 256, False, True),
    )
]  # fmt: skip
for _shape in ((16384, 1024, 4096), (16384, 4096, 4096)):
    _size, _make = "N{} D_in{} D_out{}".format(*_shape), partial(_linear, *_shape)
    ROWS += [
        _row(f"linear_fp8 {s} {_size}", _make, partial(_fp8, "triton", s), partial(_fp8, "reference", s), True)
        for s in ("tensor", "row")
    ]
    ROWS.append(_row(f"linear bf16, to compare, {_size}", _make, _bf16, _bf16, True))
