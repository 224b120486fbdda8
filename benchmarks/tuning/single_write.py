"""The single write: its tiles. Letters: N rows, D features, F hidden features."""

from __future__ import annotations

from functools import partial

import torch
from titanfunc_kernels import single_write

from tuning.case import Calls, Case, draw


def _make(n: int, d: int, f: int, device: torch.device) -> Calls:
    shapes = [(1, d, f), (1, f, d)]
    weights = [w * w.shape[1] ** -0.5 for w in draw(device, *shapes)]
    momentum = draw(device, *shapes, seed=1)
    k, v = draw(device, (1, n, d), (1, n, d), seed=2, dtype=torch.bfloat16)
    # Called through the module, where a setting may have put another default.
    return Calls(
        lambda: single_write.single_write(weights, momentum, k, v, [0.1, 0.9, 0.1], max_grad_norm=0.01)
    )  # fmt: skip


def case(n: int, d: int, f: int, candidates=()) -> Case:
    """One memory of two layers, clipped."""
    return Case(f"N {n} D {d} F {f}", partial(_make, n, d, f), candidates)


def _blocks(**fields: int):
    return {"single_write.BLOCKS.bfloat16": fields}


_APART = {"single_write.single_write.together": False}
_CANDIDATES = [
    _blocks(columns=64),
    _blocks(stages=4),
    _blocks(inner=128, columns=64, back_columns=64),
    _blocks(gradient=128, gradient_inner=64),
    _blocks(elements=1024),
    _APART,
    _blocks(columns=64, back_columns=64),
    _blocks(columns=64, stages=4),
    _blocks(columns=64, gradient_inner=64),
    _blocks(gradient_inner=64, stages=4),
    _blocks(columns=64, back_columns=64, warps=4, stages=4),
    _blocks(rows=64, columns=64, back_columns=64, warps=4, stages=4),
    _blocks(rows=64, columns=128, back_columns=128),
    _blocks(elements=4096),
    _blocks(stages=2),
    _APART | _blocks(columns=64),
    _APART | _blocks(columns=64, elements=1024, stages=4),
    _APART | _blocks(rows=64, columns=64, back_columns=64, warps=4, stages=4, elements=1024),
]
CASES = [case(2048, 512, 512, _CANDIDATES), case(8192, 512, 2048, _CANDIDATES[:5])]
