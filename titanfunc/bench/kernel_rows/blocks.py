"""Rows of a block's small operations: norms, SiLU times gate, rotary positions, a norm with the linear map after it.

Letters: N rows, D features, E features out, B batch, H heads, T tokens.
"""

from __future__ import annotations

from functools import partial

import torch

from titanfunc.ops.gate import silu_gate
from titanfunc.ops.norm import layer_norm, rms_norm, unit_rows
from titanfunc.ops.norm_linear import norm_linear
from titanfunc.ops.rotary import Rotary, rotary_table, rotate


def _draw(shapes, device):
    source = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=source, device=device) for shape in shapes]


def _rows(vectors, n, d, device):
    *features, x = _draw([(d,)] * vectors + [(n, d)], device)
    return *(1 + 0.1 * t for t in features), x.bfloat16()


def _pair(n, d, device):
    return tuple(t.bfloat16() for t in _draw([(n, d)] * 2, device))


def _heads(b, h, t, d, device):
    (x,) = _draw([(b, t, h, d)], device)
    return x.bfloat16().transpose(1, 2), *rotary_table(torch.arange(t, device=device), d, torch.bfloat16)


def _rotate(x, cos, sin, kernels):
    return rotate(x, Rotary(cos, sin), kernels)


def _layer(n, d, e, device):
    scale, weight, x = _draw([(d,), (d, e), (n, d)], device)
    return 1 + 0.1 * scale, weight * d**-0.5, x.bfloat16()


def _bytes(times, *tensors):
    """``times`` the largest tensor: what has to be read and written of it and of those of its size."""
    return times * max(tensor.nbytes for tensor in tensors)


def _flops(products, scale, weight, x):
    return products * 2 * x.numel() * weight.shape[1]


def _both(name, make, function, forward, backward, figure=_bytes, unit="bytes"):
    """A row of the forward pass alone, and one of it with the backward pass, each with its least traffic or work."""
    shared = {
        "make": make,
        "kernel": partial(function, kernels="triton"),
        "reference": partial(function, kernels="reference"),
    }
    return [
        {"name": f"{name} forward", **shared, unit: partial(figure, forward), "grad": False},
        {"name": name, **shared, unit: partial(figure, forward + backward), "grad": True},
    ]


ROWS = []
for _n, _d in ((16384, 1024), (32768, 4096)):
    ROWS += _both(f"rms_norm N{_n} D{_d}", partial(_rows, 1, _n, _d), rms_norm, 2, 3)
    ROWS += _both(f"silu_gate N{_n} F{_d}", partial(_pair, _n, _d), silu_gate, 3, 5)
ROWS += _both("layer_norm N16384 D1024", partial(_rows, 2, 16384, 1024), layer_norm, 2, 3)
ROWS += _both("unit_rows silu N262144 D64", partial(_rows, 0, 262144, 64), partial(unit_rows, silu=True), 2, 3)
ROWS += _both("rotate B8 H16 T2048 D64", partial(_heads, 8, 16, 2048, 64), _rotate, 2, 2)
for _n, _d, _e in ((16384, 1024, 1024), (16384, 1024, 4096)):
    ROWS += _both(
        f"norm_linear N{_n} D{_d} E{_e}", partial(_layer, _n, _d, _e), partial(norm_linear, dtype=torch.bfloat16),
        1, 2, _flops, "flops",
    )  # fmt: skip
